"""Every bad input to every judge that looks: one clear line, and the verdicts about everything else kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import tiny_vlms
from test_openai_judge import OK, Server, failing, reply

from vlm_itl.core.checks import ConfigError, JudgeError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.vlm.cache import CachedHandler
from vlm_itl.vlm.handler import JudgeQuery, JudgeStopped, VLMHandler
from vlm_itl.vlm.local import HFJudge
from vlm_itl.vlm.server import OpenAIHandler

pytest.importorskip("openai")

VOC = LabelSpace.voc()
KINDS = ["hf", "openai"]
Make = Callable[..., VLMHandler]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vlm")
    tiny_vlms.build("llava", folder / "llava")
    tiny_vlms.build("llava", folder / "wordless", words=("Maybe",))
    tiny_vlms.text_only(folder / "text")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    import threading

    made = Server(lambda number, attempt, wish: (OK, reply("Yes", wish=wish)))
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def make(tiny: Path, server: Server) -> Make:
    """A judge of a kind that answers what can be answered."""

    def one(kind: str, **options: Any) -> VLMHandler:
        if kind == "hf":
            return HFJudge(**{"model": str(tiny / "llava"), "min_mass": 0.0, "batch_size": 4, **options})
        return OpenAIHandler(**{"model": "toy", "base_url": server.url, "patience": 3, "max_retries": 0, **options})

    return one


def ask(i: int, **fields: Any) -> JudgeQuery:
    rng = np.random.default_rng(i)
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    mask = np.zeros((24, 32), np.uint8)
    mask[4:20, 4 + i % 4 : 28] = 8
    return replace(JudgeQuery(f"im{i}", picture, mask, labels=VOC), **fields)


def unreadable() -> Image.Image:
    raise OSError("image file is truncated\n(3 bytes not processed)")


def mask_of(value: Any, kind: Any = np.uint8) -> np.ndarray:
    return np.full((24, 32), value, kind)


BAD: dict[str, tuple[Any, str]] = {
    "no query": ("cat.jpg", "a JudgeQuery is needed, not str"),
    "no image": (ask(1, image=None), "a PIL image is needed, not NoneType"),
    "image is a path": (ask(1, image="cat.jpg"), "must be a PIL image or a function"),
    "image is an array": (ask(1, image=np.zeros((24, 32, 3), np.uint8)), "must be a PIL image or a function"),
    "image loads to bytes": (ask(1, image=lambda: b"..."), "a PIL image is needed, not bytes"),
    "image unreadable": (ask(1, image=unreadable), "image file is truncated"),
    "image of another size": (ask(1, image=Image.new("RGB", (10, 10))), "differ in size"),
    "mask is a list": (ask(1, mask=[[0, 8]]), "must be a uint8 array (H, W), not list"),
    "mask is int64": (ask(1, mask=mask_of(8, np.int64)), "must be a uint8 array (H, W), not int64"),
    "mask is a picture": (ask(1, mask=np.zeros((24, 32, 3), np.uint8)), "must be a uint8 array (H, W)"),
    "mask is a PIL image": (ask(1, mask=Image.new("L", (32, 24))), "must be a uint8 array (H, W), not Image"),
    "mask without pixels": (ask(1, mask=np.zeros((0, 0), np.uint8)), "the mask is empty"),
    "mask all void": (ask(1, mask=mask_of(255)), "the mask is empty: no pixel, or void everywhere"),
    "mask of an unknown class": (ask(1, mask=mask_of(99)), "class 99 is outside the label space of 21 classes"),
    "asked for an unknown class": (ask(1, class_ids=(77,)), "class 77 is outside the label space of 21 classes"),
    "asked for a class by name": (ask(1, class_ids=("cat",)), "class_ids must be whole numbers"),
    "no label space": (ask(1, labels=None), "labels must be a LabelSpace, not NoneType"),
    "unknown question": (ask(1, question="qualty"), "Did you mean 'quality'"),
    "unknown placeholder": (ask(1, question="Is {clas_names} right?"), "unknown placeholder {clas_names}"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_item_costs_only_itself(kind: str, bad: str, make: Make, server: Server) -> None:
    """Between good ones: they keep their verdicts and places, it abstains with one line, and no call is made for it."""
    query, says = BAD[bad]
    judge = make(kind)
    answers = judge.judge([ask(0), query, ask(2)])
    assert [a.verdict == "abstain" for a in answers] == [False, True, False]
    assert [a.id for a in answers] == ["im0", getattr(query, "id", ""), "im2"]
    wrong = answers[1]
    assert says in str(wrong.error) and "\n" not in str(wrong.error) and len(str(wrong.error)) < 300
    assert wrong.p_yes is None and wrong.attempts == 0 and wrong.score_kind == "none"
    assert kind == "hf" or len(server.wishes) == 2
    alone = make(kind).judge([ask(0), ask(2)])
    assert [answers[0].verdict, answers[2].verdict] == [a.verdict for a in alone]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_background_alone_can_be_asked_about(kind: str, make: Make) -> None:
    """Nothing found is an answer that can be wrong or right: it is no bad input."""
    (answer,) = make(kind).judge([ask(0, mask=mask_of(0), question="exhaustive")])
    assert answer.verdict in ("yes", "no") and answer.error is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_image_input(kind: str, make: Make, tiny: Path, server: Server, tmp_path: Path) -> None:
    """Local: refused when loaded. Behind a server: a few questions, then one line; earlier verdicts are kept."""
    if kind == "hf":
        with pytest.raises(ConfigError, match=r"\(LlamaForCausalLM\) takes no images") as refused:
            make("hf", model=str(tiny / "text"))
        assert "\n" not in str(refused.value)
        return
    judge = CachedHandler(judge=make("openai", concurrency=1), path=tmp_path / "c.sqlite")
    judge.judge([ask(0), ask(1)])
    server.script = lambda number, attempt, wish: (400, failing("this model does not support\nimage input"))
    before = len(server.wishes)
    with pytest.raises(JudgeStopped, match="failed 3 times in a row.*does not support image input") as stopped:
        judge.judge([ask(i) for i in range(50)])
    assert "\n" not in str(stopped.value) and len(server.wishes) - before == 3 and len(judge.cache) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_without_yes_and_no(kind: str, make: Make, tiny: Path, server: Server) -> None:
    """A vocabulary without the words is refused; a model that would say something else abstains."""
    if kind == "hf":
        with pytest.raises(ConfigError, match="no single token for 'yes'"):
            make("hf", model=str(tiny / "wordless"))
        judge = make("hf", min_mass=1.0)
    else:
        judge = make("openai")
        server.script = lambda number, attempt, wish: (OK, reply("A cat on a sofa.", p=0.89, wish=wish))
    answers = judge.judge([ask(0), ask(1)])
    assert [a.verdict for a in answers] == ["abstain"] * 2
    assert all(a.error and "\n" not in a.error for a in answers)
    assert answers[0].raw  # what it did say is kept


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there(kind: str, make: Make, tmp_path: Path) -> None:
    """A folder that is missing, an address where nobody listens: one line at once."""
    if kind == "hf":
        with pytest.raises(ConfigError, match="does not exist") as missing:
            make("hf", model=str(tmp_path / "nowhere"))
    else:
        with pytest.raises(JudgeError, match=r"http://127.0.0.1:9/v1 cannot be reached") as missing:
            make("openai", base_url="http://127.0.0.1:9/v1").judge([ask(i) for i in range(50)])
    assert "\n" not in str(missing.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_one_call_and_one_line(status: int, make: Make, server: Server) -> None:
    server.script = lambda number, attempt, wish: (status, failing("no"))
    with pytest.raises(JudgeError, match=rf"refuses the key \({status}\); look at api_key_env") as caught:
        make("openai", max_retries=4).judge([ask(i) for i in range(500)])
    assert len(server.wishes) == 1 and "\n" not in str(caught.value)
