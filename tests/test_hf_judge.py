"""The judge `hf` against transformers' own decision pipeline and generate, batched against single, and bad input."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_vlms

from vlm_itl.core.checks import ConfigError, JudgeError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.scenes import make_scenes
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_al
from vlm_itl.vlm.cache import CachedHandler, query_key
from vlm_itl.vlm.handler import JudgeQuery, abstain, handler_options, make_handler
from vlm_itl.vlm.local import HFJudge, by_length, common_prefix, inputs_once, padded, share_image_features
from vlm_itl.vlm.local_model import LoadedVLM, answer_tokens, first_logits, load_vlm, move_inputs, vlm_inputs, yes_no
from vlm_itl.vlm.render import instruct, render

pytestmark = pytest.mark.usefixtures("undrawn")

VOC = LabelSpace.voc()
CHATS = ["llava", "idefics3", "paligemma"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model of each kind, and a language model without eyes."""
    root = tmp_path_factory.mktemp("vlms")
    made = {kind: tiny_vlms.build(kind, root / kind) for kind in tiny_vlms.KINDS}
    return {**made, "text": tiny_vlms.text_only(root / "text"), "root": root}


@pytest.fixture(scope="module")
def judge(folders: dict[str, Path]) -> Callable[..., HFJudge]:
    """Make a judge of a kind; no floor."""

    def make(kind: str, **options: Any) -> HFJudge:
        made = make_handler("hf", model=str(folders[kind]), **{"min_mass": 0.0, **options})
        assert isinstance(made, HFJudge)
        return made

    return make


def photo(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def ask(seed: int, **fields: Any) -> JudgeQuery:
    mask = np.zeros((40, 48), np.uint8)
    mask[5 + seed % 7 : 30, 5:40] = 8 if seed % 2 else 12
    return JudgeQuery(f"im{seed}", fields.pop("image", photo(seed)), mask, labels=VOC, **fields)


def questions(count: int) -> list[JudgeQuery]:
    """Different pictures, questions of different length."""
    texts = ["quality", "Right?", "exhaustive", "Is the {class_names} wholly covered? Answer yes or no."]
    return [ask(seed, question=texts[seed % 4]) for seed in range(count)]


# ---- equal to others ----


@pytest.mark.parametrize("kind", CHATS)
def test_equals_the_decision_pipeline(kind: str, folders: dict[str, Path], judge: Callable[..., HFJudge]) -> None:
    """transformers' own P(yes), question type `noul`, one prompt at a time, generic prompt."""
    pytest.importorskip("transformers.pipelines.decision")
    from transformers.decision import DecisionConfig

    model = transformers.AutoModelForImageTextToText.from_pretrained(folders[kind]).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders[kind], backend="pil")
    # Idefics3's processor counts characters, which the sanitised (piecewise) encoding of 5.23 does not give
    settings = DecisionConfig(sanitize_control_tokens=kind != "idefics3")
    pipe = transformers.pipeline(
        "decision", model=model, tokenizer=processor.tokenizer, processor=processor, decision_config=settings
    )
    asked = ["Is the cat covered?", "Good?", "Does each region cover its object, and nothing else?"]
    pictures = [photo(seed) for seed in range(3)]
    wanted = []
    with torch.no_grad():
        for question, picture in zip(asked, pictures, strict=True):
            request = {
                "state": "img-1",
                "questions": {"q": {"type": "noul", "instructions": question}},
                "assets": {"img-1": picture},
            }
            wanted.append(pipe(request)["q"]["noul"])
    found = judge(kind).ask(pictures, [f"\n\n{question}\nAnswer Yes or No only." for question in asked])
    assert np.ptp(wanted) > 1e-3  # the answers differ, so that a mix-up would show
    assert [f.p_yes for f in found] == pytest.approx(wanted, abs=1e-5)


def test_the_decision_pipeline_cannot_ask_blip(folders: dict[str, Path]) -> None:
    """BLIP-VQA has no chat template and starts its answer in a decoder: its own `generate`, below, is the measure."""
    pytest.importorskip("transformers.pipelines.decision")
    from transformers.decision import DecisionConfig

    model = transformers.BlipForQuestionAnswering.from_pretrained(folders["blip"]).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders["blip"], backend="pil")
    pipe = transformers.pipeline(
        "decision", model=model, tokenizer=processor.tokenizer, processor=processor, decision_config=DecisionConfig()
    )
    request = {"state": "img-1", "questions": {"q": {"type": "noul", "instructions": "Good?"}}}
    with pytest.raises(ValueError, match="chat template"):
        pipe({**request, "assets": {"img-1": photo(0)}})


@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
def test_equals_one_step_of_generate(kind: str, judge: Callable[..., HFJudge]) -> None:
    """The first step of the model's own `generate`, one item at a time."""
    made = judge(kind, share_images=False)
    pictures, texts = [photo(s) for s in range(3)], ["is it?", "is it a cat?", "right"]
    for picture, text, found in zip(pictures, texts, made.ask(pictures, texts), strict=True):
        inputs = vlm_inputs(made.vlm, [picture], [text])
        out = made.vlm.net.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        chances = out.logits[0][0].double().softmax(-1)
        p_yes, p_no = (chances[ids].sum().item() for ids in (made.vlm.yes, made.vlm.no))
        assert found.p_yes == pytest.approx(p_yes / (p_yes + p_no), abs=1e-5)
        assert found.p_mass == pytest.approx(p_yes + p_no, abs=1e-5)
        assert found.raw == made.vlm.tokenizer.decode([int(chances.argmax())])


@pytest.mark.parametrize("style", ["overlay", "side_by_side", "crop"])
@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
def test_batched_equals_single_and_order_is_kept(kind: str, style: str, judge: Callable[..., HFJudge]) -> None:
    made, queries = judge(kind, style=style, batch_size=5), questions(12)
    together = made.judge(queries)
    made.batch_size = 1
    alone = made.judge(queries)
    backward = judge(kind, style=style, batch_size=7).judge(queries[::-1])[::-1]
    assert [a.id for a in together] == [q.id for q in queries]
    assert np.ptp([a.p_yes for a in alone]) > 1e-3
    for a, b, c in zip(together, alone, backward, strict=True):
        assert a.p_yes == pytest.approx(b.p_yes, abs=1e-5) and a.p_yes == pytest.approx(c.p_yes, abs=1e-5)
        assert a.p_mass == pytest.approx(b.p_mass, abs=1e-5)
        assert a.verdict == b.verdict == ("yes" if a.p_yes >= 0.5 else "no")
        assert a.tokens == b.tokens and a.score_kind == "logprobs" and a.usd == 0 and a.latency_s > 0


# ---- every family (FAULTS 17 and 22) ----


def agrees_with_itself(made: HFJudge) -> None:
    """Together as alone, shared as unshared, and P(yes) as the model's own `generate` begins its answer."""
    shapes = [(48, 40), (96, 40), (40, 64)]
    queries = [q for seed in range(3) for q in (ask(seed, image=photo(seed, shapes[seed])),) * 2]
    queries = [fitted(replace(q, question=("quality", "Right?")[n % 2])) for n, q in enumerate(queries)]
    pictures = [made.render_query(query) for query in queries]
    texts = [made.query_text(query) for query in queries]
    alone = [made.ask([picture], [text])[0] for picture, text in zip(pictures, texts, strict=True)]
    assert np.ptp([a.p_yes for a in alone]) > 5e-5 and not any(a.error for a in alone)
    for order in ([0, 2, 4, 1, 3, 5], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1]):
        for _ in range(2):  # what may be shared is compared the first time
            together = made.ask([pictures[i] for i in order], [texts[i] for i in order])
            assert [t.p_yes for t in together] == pytest.approx([alone[i].p_yes for i in order], abs=1e-5)
            assert [t.p_mass for t in together] == pytest.approx([alone[i].p_mass for i in order], abs=1e-5)
    for row in (0, 3):
        inputs = move_inputs(made.vlm, vlm_inputs(made.vlm, [pictures[row]], [texts[row]], made.prompt))
        out = made.vlm.net.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        p_yes, p_mass = yes_no(out.logits[0], made.vlm.yes, made.vlm.no)
        assert alone[row].p_yes == pytest.approx(p_yes.item(), abs=1e-5)
        assert alone[row].p_mass == pytest.approx(p_mass.item(), abs=1e-5)


def fitted(query: JudgeQuery) -> JudgeQuery:
    """The query with a mask of its picture's size."""
    mask = np.zeros(query.image.size[::-1], np.uint8)
    mask[5:30, 5:30] = 8
    return replace(query, mask=mask)


@pytest.mark.filterwarnings("error:judge 'hf'.*takes no pictures", "ignore:judge 'hf'.*one by one")
@pytest.mark.parametrize("kind", tiny_vlms.ODD)
def test_22_every_family_works(kind: str, tmp_path: Path) -> None:
    """Without torchvision, films or num2words: processors that read films, that hide behind torchvision, that place the
    picture themselves, that ask a second tokenizer, that start the answer in a decoder."""
    made = make_handler("hf", model=str(tiny_vlms.build(kind, tmp_path / kind)), min_mass=0.0)
    agrees_with_itself(made)
    assert not hasattr(made.vlm.processor, "video_processor")


def test_17_positions_that_padding_moves_are_asked_one_by_one(tmp_path: Path) -> None:
    folder = str(tiny_vlms.build("git", tmp_path / "git"))
    with pytest.warns(UserWarning) as said:
        made = make_handler("hf", model=folder, min_mass=0.0, batch_size=6)
    (line,) = [str(warning.message) for warning in said if "judge 'hf'" in str(warning.message)]
    assert "(git)" in line and "one by one" in line and "\n" not in line and made.sharing == "off: asked one by one"
    assert "one by one" in made.notes()["batches"]  # for the record of the run
    pictures, texts = (
        [photo(seed) for seed in range(4)],
        ["is it?", "is it a cat, and nothing beside it?", "right", "ok?"],
    )
    gap = first_logits(made.vlm, vlm_inputs(made.vlm, pictures, texts)) - torch.cat(
        [first_logits(made.vlm, vlm_inputs(made.vlm, [p], [t])) for p, t in zip(pictures, texts, strict=True)]
    )
    assert gap.abs().max() > 0.1  # the fault is there
    queries = questions(6)
    together = made.judge(queries)
    made.batch_size = 1
    assert [t.p_yes for t in together] == pytest.approx([a.p_yes for a in made.judge(queries)], abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:judge 'hf'.*takes no pictures", "ignore:judge 'hf'.*one by one")
def test_22_all_families_of_the_shared_builder(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """25 families; their builder wants films, which are left out here where torchvision is missing."""
    from vlm_itl.vlm.local_model import still_pictures, without_torchvision

    script = shared / "faults" / "tiny_families.py"
    if not script.is_file():
        pytest.skip("faults/tiny_families.py is not in the shared folder")
    monkeypatch.setenv("VLM_ITL_CLONE", str(root))
    hub = sys.modules["transformers"]  # what the builder will import
    films = {"Qwen2VL": "Qwen2VL", "Qwen2_5_VL": "Qwen2VL", "Qwen3VL": "Qwen3VL", "InternVL": "InternVL"}
    films |= {name: name for name in ("SmolVLM", "LlavaOnevision", "Glm4v")}
    for family, film in {**films, "Pixtral": ""}.items():
        kind = still_pictures(without_torchvision(getattr(hub, f"{family}Processor")))
        monkeypatch.setattr(hub, f"{family}Processor", kind, raising=False)
        if film:
            monkeypatch.setattr(hub, f"{film}VideoProcessor", lambda: None, raising=False)
    spec = importlib.util.spec_from_file_location("tiny_families", script)
    assert spec is not None and spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    assert len(families.KINDS) == 25
    for kind in families.KINDS:
        families.build(kind, tmp_path / kind)
        made = make_handler("hf", model=str(tmp_path / kind), min_mass=0.0)
        agrees_with_itself(made)
        print(kind, made.sharing, made.vlm.alone or "in batches", made.vlm.by_generate)


def test_22_what_cannot_be_asked_is_refused_when_it_is_made(folders: dict[str, Path], tmp_path: Path) -> None:
    """By name and with the reason, before anything is trained."""

    def changed(name: str, file: str, **fields: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(folders["llava"], folder)
        known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({**known, **fields}))
        return folder

    strange = changed("strange", "config.json", image_token_index=5)
    quantised = changed("quantised", "config.json", quantization_config={"quant_method": "quark9", "bits": 4})
    gptq = changed("gptq", "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    for folder, error, message in [
        (strange, ConfigError, r"'.*strange' \(llava\) cannot be asked .*image tokens"),
        (quantised, ConfigError, r"quark9.*'.*quantised' is quantised in a way that transformers does not know"),
        (gptq, JudgeError, r"\(quantised: gptq\) of '.*gptq' needs a package"),
    ]:
        with pytest.raises(error, match=message) as found:
            make_handler("hf", model=str(folder))
        assert "\n" not in str(found.value)


def test_weights_that_start_at_random_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers prints a table and goes on: the head of such a model answers noise."""
    for name, change in (("headless", lambda head: None), ("other", lambda head: head[:50].contiguous())):
        folder = tmp_path / name
        shutil.copytree(folders["llava"], folder)
        weights = load_file(folder / "model.safetensors")
        (key,) = [key for key in weights if "lm_head" in key]
        head = change(weights.pop(key))
        save_file({**weights, **({} if head is None else {key: head})}, folder / "model.safetensors", {"format": "pt"})
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ConfigError, match=r"lacks 1 weights .*lm_head.*random") as found:
                make_handler("hf", model=str(folder), model_options=options)
            assert "\n" not in str(found.value)


# ---- the prompt, wherever it was saved ----


def test_22_chat_templates_wherever_they_were_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    template = (folders["llava"] / "chat_template.jinja").read_text()
    files = {"tokenizer_config.json": template, "processor_config.json": template, "chat_template.json": template}
    named = [{"name": "default", "template": template}, {"name": "tools", "template": "{{ tools }}"}]
    wanted = shown(load_vlm(str(folders["llava"])))
    for number, (file, text) in enumerate([*files.items(), ("tokenizer_config.json", named)]):
        folder = tmp_path / str(number)
        shutil.copytree(folders["llava"], folder)
        (folder / "chat_template.jinja").unlink()
        known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({**known, "chat_template": text}))
        assert shown(load_vlm(str(folder))) == wanted, file


def test_a_template_without_pictures_is_said_and_not_used(folders: dict[str, Path], tmp_path: Path) -> None:
    words = "{% for m in messages %}{{ m['role'] }}: {{ m['content'].strip() }}{% endfor %}"
    for name, template in {
        "words": words,
        "refuses": "{{ raise_exception('no') }}",
        "broken": "{% for m in %}",
    }.items():
        folder = tmp_path / name
        shutil.copytree(folders["llava"], folder)
        (folder / "chat_template.jinja").write_text(template)
        with pytest.warns(UserWarning, match=r"takes no pictures.*USER: <image>") as said:
            made = make_handler("hf", model=str(folder), min_mass=0.0)
        assert not any("\n" in str(warning.message) for warning in said)
        assert shown(made.vlm).endswith("is it? ASSISTANT:")


def test_22_a_model_that_thinks_is_asked_for_its_answer(folders: dict[str, Path], tmp_path: Path) -> None:
    template = (folders["llava"] / "chat_template.jinja").read_text()
    switch = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n"
    switch += "{% endif %}"
    for name, opening in {"switch": switch, "always": "<think>\n"}.items():
        folder = tmp_path / name
        shutil.copytree(folders["llava"], folder)
        (folder / "chat_template.jinja").write_text(template.replace("assistant: ", "assistant: " + opening))
        vlm = load_vlm(str(folder))
        assert shown(vlm).endswith("is it?assistant: <think>\n\n</think>\n\n"), name
        assert shown(vlm, "is <think> it?").endswith("it?assistant: <think>\n\n</think>\n\n")


@pytest.mark.parametrize("kind", ["llava", "idefics3", "blip"])
def test_marks_typed_in_a_question_are_words(kind: str, judge: Callable[..., HFJudge]) -> None:
    """A class called `<image>` is no second picture, and `</s>` ends nothing."""
    made = judge(kind)
    labels = LabelSpace(("background", "<image>", "</s>[SEP]"))
    queries = [JudgeQuery(f"m{i}", photo(i), np.full((40, 48), i % 3, np.uint8), labels=labels) for i in (1, 2)]
    (first, second), other = made.judge(queries), made.judge([ask(0)])[0]
    assert not first.error and not second.error and first.p_yes != second.p_yes and not other.error


def test_pictures_of_any_mode_are_rgb_to_the_model(judge: Callable[..., HFJudge]) -> None:
    made = judge("llava")
    grey = photo(0).convert("L")
    answers = made.ask([grey, grey.convert("RGB"), grey.convert("RGBA"), grey.convert("LA")], ["right?"] * 4)
    assert [a.p_yes for a in answers] == pytest.approx([answers[0].p_yes] * 4, abs=1e-6)


# ---- image features ----


@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
def test_equal_pictures_pass_the_tower_once(kind: str, folders: dict[str, Path]) -> None:
    vlm = load_vlm(str(folders[kind]))
    entered = []
    tower = next(
        m for name, m in vlm.net.named_modules() if name.rsplit(".", 1)[-1] in ("vision_tower", "vision_model")
    )
    patches = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d))
    patches.register_forward_hook(lambda module, args, out: entered.append(len(out)))
    pictures = [photo(s) for s in (0, 1, 0, 0, 1)]
    inputs = vlm_inputs(vlm, pictures, ["a", "is it?", "right?", "is it a cat?", "b"])
    before = first_logits(vlm, inputs)
    assert share_image_features(vlm.net)
    after = first_logits(vlm, inputs)
    assert entered == [5, 2] and (before - after).abs().max() < 1e-5


def test_a_model_without_a_known_tower_is_left_alone() -> None:
    assert not share_image_features(torch.nn.Linear(2, 2))


# ---- several questions about one picture ----

FOUR = ["quality", "exhaustive", "Does the mask stay inside the {class_names}? Answer yes or no.", "Right?"]


def four_each(count: int, question_first: bool = False) -> list[JudgeQuery]:
    """Four questions about each of some pictures, by picture or by question."""
    base = [ask(seed) for seed in range(count)]
    pairs = [(b, q) for q in FOUR for b in base] if question_first else [(b, q) for b in base for q in FOUR]
    return [replace(b, question=q) for b, q in pairs]


@pytest.mark.parametrize("question_first", [False, True], ids=["by picture", "by question"])
@pytest.mark.parametrize("style", ["overlay", "marks"])
@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
def test_shared_equals_plain(kind: str, style: str, question_first: bool, judge: Callable[..., HFJudge]) -> None:
    """After the first batches, which are computed both ways, the shared pass alone gives the plain numbers."""
    queries = four_each(5, question_first)
    plain = judge(kind, style=style, share_images=False, batch_size=1).judge(queries)
    shared = judge(kind, style=style, batch_size=8)
    first = shared.judge(queries)
    second = shared.judge(queries)
    assert np.ptp([p.p_yes for p in plain]) > 1e-3
    for found in (first, second):
        assert [f.id for f in found] == [q.id for q in queries]
        assert [f.p_yes for f in found] == pytest.approx([p.p_yes for p in plain], abs=1e-5)
        assert [f.p_mass for f in found] == pytest.approx([p.p_mass for p in plain], abs=1e-5)
        assert [(f.verdict, f.tokens, f.raw) for f in found] == [(p.verdict, p.tokens, p.raw) for p in plain]
    wanted = {"llava": "on", "idefics3": "on", "paligemma": "off: its logits would change", "blip": "off: encoder and"}
    assert shared.sharing.startswith(wanted[kind])


def test_the_shared_pass_reads_less(judge: Callable[..., HFJudge]) -> None:
    """Eight rows of two pictures: two beginnings, eight rests, and no plain pass once it has been compared."""
    made = judge("llava", batch_size=8)
    passes: list[tuple[int, int]] = []
    made.vlm.net.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    made.judge(four_each(2))
    compared = list(passes)
    made.judge(four_each(2))
    again = passes[len(compared) :]
    (heads, *tails), plain = again, compared[-1]
    assert compared == [*again, plain] and plain[0] == 8  # the plain pass came last, and once
    assert heads[0] == 2 and sum(rows for rows, _ in tails) == 8
    assert heads[1] > 60 and heads[1] + max(tokens for _, tokens in tails) == plain[1]  # beginning + rest = all
    assert sum(rows * tokens for rows, tokens in again) < 0.75 * plain[0] * plain[1]


def test_pictures_asked_about_once_take_the_plain_pass(judge: Callable[..., HFJudge]) -> None:
    """Mixed batches: groups of two and three beside single rows, in any order."""
    queries = four_each(4)
    mixed = [queries[i] for i in (12, 0, 5, 1, 6, 7, 8)]  # pictures 3 0 1 0 1 1 2
    plain = judge("llava", share_images=False, batch_size=1).judge(mixed)
    made = judge("llava", batch_size=7)
    for _ in range(2):
        assert [f.p_yes for f in made.judge(mixed)] == pytest.approx([p.p_yes for p in plain], abs=1e-5)
    assert made.sharing == "on"


@pytest.mark.parametrize("fault", ["wrong", "subtle", "error"])
def test_a_model_that_reads_on_wrongly_is_found_out(fault: str, judge: Callable[..., HFJudge]) -> None:
    """Wrong numbers or an error where a past is given: plain numbers all the same, and never tried again."""
    made = judge("llava", batch_size=8)
    real, tried = made.vlm.net.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:
            return real(*args, **kwargs)
        tried.append(1)
        if fault == "error":
            raise ValueError("no past here")
        out = real(*args, **kwargs)
        out.logits[:, :, 7] += 1 if fault == "wrong" else 0.01  # neither yes nor no
        return out

    forward.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    made.vlm.net.forward = forward
    plain = judge("llava", share_images=False).judge(four_each(4))
    assert [f.p_yes for f in made.judge(four_each(4))] == pytest.approx([p.p_yes for p in plain], abs=1e-5)
    assert made.sharing == ("off: ValueError: no past here" if fault == "error" else made.sharing)
    before = len(tried)
    made.judge(four_each(4))
    assert made.sharing.startswith("off") and 1 <= len(tried) == before


def test_a_picture_behind_the_question_is_not_shared(judge: Callable[..., HFJudge]) -> None:
    made = judge("llava", prompt="{question} {image} A:", batch_size=8)
    plain = judge("llava", prompt="{question} {image} A:", share_images=False, batch_size=1).judge(four_each(2))
    assert [f.p_yes for f in made.judge(four_each(2))] == pytest.approx([p.p_yes for p in plain], abs=1e-5)
    assert made._prefix is not None and not made._prefix._seen and made.sharing == "on"


def test_common_prefix_and_padding_by_hand() -> None:
    rows = [torch.tensor(r) for r in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 6])]
    assert common_prefix(rows) == 2 and common_prefix(rows[:1]) == 3 and common_prefix([rows[0]] * 2) == 3
    assert common_prefix([rows[0], rows[2]]) == 3  # one token is left to each
    ids, mask = padded(rows[:2], "left", 0)
    assert ids.tolist() == [[1, 2, 3, 4], [0, 1, 2, 5]] and mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert padded(rows[:2], "right", 9)[0].tolist() == [[1, 2, 3, 4], [1, 2, 5, 9]]


def test_rows_in_passes_of_similar_length() -> None:
    assert by_length([25, 70, 18, 19]) == [[2, 3, 0], [1]]  # spares 3 * (70 - 25) = 135 tokens
    assert by_length([25, 70, 18, 19], worth=136) == [[2, 3, 0, 1]]
    assert by_length([5]) == [[0]] and by_length([7, 7, 7], worth=1) == [[0, 1, 2]]
    assert by_length([10, 100, 11, 300], worth=100) == [[0, 2], [1], [3]]


@pytest.mark.parametrize("kind", tiny_vlms.KINDS)
def test_equal_pictures_are_drawn_and_prepared_once(
    kind: str, judge: Callable[..., HFJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, drawn, prepared = judge(kind, batch_size=8), [], []
    real = made.render_query
    monkeypatch.setattr(made, "render_query", lambda query: drawn.append(query.id) or real(query))
    processor = made.vlm.processor.image_processor
    original = type(processor).preprocess

    def counting(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.append(len(images))
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(type(processor), "preprocess", counting)
    made.judge(four_each(2))
    assert drawn == ["im0", "im1"] and prepared == [2]
    assert "preprocess" not in vars(processor)  # nothing is left behind


def test_prepared_once_leaves_pictures_in_parts_alone(folders: dict[str, Path]) -> None:
    """Idefics3 with splitting: pictures of different size become different numbers of parts."""
    split = {
        "do_image_splitting": True,
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
    }
    vlm = load_vlm(str(folders["idefics3"]), processor_options=split)
    pictures = [photo(0, (96, 40)), photo(1), photo(0, (96, 40))]
    together = inputs_once(vlm, pictures, ["a", "b", "a"])
    alone = [vlm_inputs(vlm, [picture], ["a"]) for picture in pictures]
    assert together["pixel_values"].shape[1] == max(one["pixel_values"].shape[1] for one in alone) > 1
    for row, one in enumerate(alone):
        parts = one["pixel_values"].shape[1]
        assert torch.equal(together["pixel_values"][row, :parts], one["pixel_values"][0])


# ---- who is asked, for the cache ----


def test_weights_and_options_are_in_the_key_of_the_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    base = {"model": str(folders["llava"]), "min_mass": 0.0}
    made = make_handler("hf", **base)
    key = query_key(ask(1), made)
    assert query_key(ask(1), make_handler("hf", **base, batch_size=3, share_images=False)) == key
    others = [{"style": "contour"}, {"max_side": 32}, {"prompt": "{image} {question}"}, {"dtype": "bfloat16"}]
    others += [{"min_mass": 0.2}, {"model_options": {"attn_implementation": "eager"}}]
    keys = {query_key(ask(1), make_handler("hf", **{**base, **other})) for other in others}
    assert len(keys | {key}) == 7
    vlm = load_vlm(base["model"])
    with torch.no_grad():
        vlm.net.lm_head.weight.add_(1e-3)
    vlm.net.save_pretrained(tmp_path / "taught")
    vlm.processor.save_pretrained(tmp_path / "taught")
    taught = make_handler("hf", model=str(tmp_path / "taught"))
    assert taught.identity()["weights"] != made.identity()["weights"]
    for file in ("chat_template.jinja", "processor_config.json"):  # the same weights, asked or shown in another way
        other = tmp_path / file
        shutil.copytree(base["model"], other)
        text = (other / file).read_text()
        (other / file).write_text(
            text.replace("assistant: ", "answer: ").replace('"do_normalize": true', '"do_normalize": false')
        )
        changed = make_handler("hf", model=str(other), min_mass=0.0)
        changed.model = made.model  # in the same place
        assert (other / file).read_text() != text and query_key(ask(1), changed) != key


def test_through_the_cache_nothing_is_computed_twice(judge: Callable[..., HFJudge], tmp_path: Path) -> None:
    made = judge("llava")
    asked: list[int] = []
    real = made.ask
    made.ask = lambda pictures, texts: asked.append(len(pictures)) or real(pictures, texts)  # type: ignore[method-assign]
    cached = CachedHandler(judge=made, path=tmp_path / "c.sqlite")
    first = cached.judge(four_each(3))
    again = cached.judge(four_each(3))
    assert sum(asked) == 12 and all(a.cached for a in again)
    assert [a.p_yes for a in again] == [f.p_yes for f in first]
    changed = four_each(3)
    mask = changed[5].mask.copy()
    mask[0, 0] = 8
    changed[5] = replace(changed[5], mask=mask)
    cached.judge(changed)
    assert sum(asked) == 13


def test_quantisation_reaches_from_pretrained(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The very object arrives, the device is left to it, and dtype stays as given. (Running it needs a GPU.)"""
    seen: dict[str, Any] = {}
    real = transformers.AutoModelForImageTextToText.from_pretrained

    def spy(place: str, **options: Any) -> Any:
        seen.update(options)
        options.pop("quantization_config", None)
        return real(place, **options)

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", spy)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    made = make_handler("hf", model=str(folders["llava"]), model_options={"quantization_config": config})
    assert seen["quantization_config"] is config and seen["dtype"] == torch.float32
    assert "load_in_4bit" in str(made.identity()["model_options"])
    other = transformers.BitsAndBytesConfig(load_in_8bit=True)
    monkeypatch.setitem(made._options, "model_options", {"quantization_config": other})
    assert query_key(ask(1), made) != query_key(ask(1), make_handler("hf", model=str(folders["llava"])))


# ---- the words and the numbers ----


def test_answer_tokens() -> None:
    words = ["yes", "Yes", "YES", "▁yes", "Ġyes", " yes", "no", "Ġno", "▁NO", "##no", "yesterday", "not", "", "▁", "Ġ"]
    yes, no = answer_tokens({word: index for index, word in enumerate(words)})
    assert yes == [0, 1, 2, 3, 4, 5] and no == [6, 7, 8]
    with pytest.raises(ConfigError, match="no single token for 'no'"):
        answer_tokens({"yes": 0, "nope": 1})


def test_yes_no_by_hand_and_at_the_ends() -> None:
    p_yes, p_mass = yes_no(torch.tensor([[3.0, 1, 2, 3, 1]]).log(), [0, 1], [2])
    assert p_yes.item() == pytest.approx(4 / 6) and p_mass.item() == pytest.approx(0.6)
    p_yes, p_mass = yes_no(torch.tensor([[200.0, -200, 0], [0, 0, 300]]), [0], [1])
    assert p_yes.tolist() == [1.0, 0.5] and p_mass[0] == 1 and p_mass[1] < 1e-100
    same = yes_no(torch.tensor([[1.0, 2, 3]]), [0], [1])[0] - yes_no(torch.tensor([[11.0, 12, 13]]), [0], [1])[0]
    assert abs(same.item()) < 1e-12  # a constant added to all logits changes nothing


def test_every_spelling_counts(tmp_path: Path) -> None:
    folder = tiny_vlms.build("llava", tmp_path / "many", words=("Yes", "yes", "No", "no", "NO"))
    vlm = load_vlm(str(folder))
    assert len(vlm.yes) == 2 and len(vlm.no) == 3 and not set(vlm.yes) & set(vlm.no)


# ---- abstaining ----


def test_abstains_on_low_mass_and_keeps_the_numbers(judge: Callable[..., HFJudge]) -> None:
    (free,) = judge("llava").judge([ask(0)])
    high, low = judge("llava", min_mass=min(1.0, free.p_mass * 1.1)), judge("llava", min_mass=free.p_mass * 0.9)
    (silent,), (spoken,) = high.judge([ask(0)]), low.judge([ask(0)])
    assert silent.verdict == "abstain" and "P(yes) + P(no)" in silent.error and silent.p_yes == free.p_yes
    assert spoken.verdict == free.verdict and spoken.error is None
    assert handler_options("hf")["min_mass"] == 0.1


def test_abstains_where_logits_are_not_numbers(judge: Callable[..., HFJudge]) -> None:
    made = judge("llava")
    with torch.no_grad():
        made.vlm.net.lm_head.weight.fill_(math.nan)
    (found,) = made.judge([ask(0)])
    assert found.verdict == "abstain" and "not numbers" in found.error and found.p_yes is None


def test_a_bad_item_costs_only_itself(judge: Callable[..., HFJudge]) -> None:
    def gone() -> Image.Image:
        raise FileNotFoundError("photo.jpg")

    good = questions(3)
    bad = [
        ask(4, image=gone),
        ask(5, image=None),
        ask(6, image=photo(6, (10, 10))),
        "text",
        ask(7, class_ids=(77,)),
        JudgeQuery("m", photo(1), np.zeros((40, 48), np.int64), labels=VOC),
    ]
    mixed = [good[0], *bad[:3], good[1], *bad[3:], good[2]]
    found = judge("llava").judge(mixed)
    wanted = judge("llava").judge(good)
    assert len(found) == len(mixed)
    for query, answer in zip(mixed, found, strict=True):
        if any(query is b for b in bad):
            assert answer.verdict == "abstain" and answer.error and "\n" not in answer.error
    for answer, other in zip([found[0], found[4], found[8]], wanted, strict=True):
        assert answer.id == other.id and answer.p_yes == pytest.approx(other.p_yes, abs=1e-5)


def test_a_failing_forward_is_an_abstention(judge: Callable[..., HFJudge], monkeypatch: pytest.MonkeyPatch) -> None:
    made = judge("llava", batch_size=2)
    real = HFJudge.ask

    def shaky(self: HFJudge, pictures: Any, texts: Any) -> Any:
        if len(pictures) > 1 or "Right?" in texts[0]:
            raise RuntimeError("out of memory\nTried to allocate")
        return real(self, pictures, texts)

    monkeypatch.setattr(HFJudge, "ask", shaky)
    found = made.judge(questions(4))
    assert [f.verdict == "abstain" for f in found] == [False, True, False, False]
    assert found[1].error == "RuntimeError: out of memory Tried to allocate"


# ---- the whole path carries signal ----


def disc(seed: int) -> tuple[JudgeQuery, bool]:
    """A disc on a plain ground, its mask right (even seeds) or too small, shifted or halved."""
    labels = LabelSpace(("background", "disc"), palette=[(0, 0, 0), (255, 0, 0)])
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:32, :32]
    y, x, radius = *rng.uniform(9, 23, 2), rng.uniform(6, 9)
    inside = np.hypot(row - y, column - x) < radius
    pixels = np.where(inside[..., None], (60, 200, 60), (40, 60, 160)) + rng.normal(0, 8, (32, 32, 3))
    shift = tuple(int(step) for step in rng.choice([-6, 6], 2))
    spoilt = [np.hypot(row - y, column - x) < 0.55 * radius, np.roll(inside, shift, (0, 1)), inside & (column < x)]
    mask = inside if seed % 2 == 0 else spoilt[int(rng.integers(3))]
    photograph = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    query = JudgeQuery(f"disc{seed}", photograph, mask.astype(np.uint8), question="Right?", labels=labels)
    return query, seed % 2 == 0


@pytest.mark.slow
def test_a_tiny_model_learns_to_judge(tmp_path: Path) -> None:
    """Fine-tuned on 800 drawn masks, judged on 200 unseen ones through the handler: AUC at least 0.8."""
    vlm = load_vlm(str(tiny_vlms.build("llava", tmp_path / "start", spread=1)))
    scenes = [disc(seed) for seed in range(800)]
    queries = [query for query, _ in scenes]
    inputs = vlm_inputs(vlm, [render(query) for query in queries], [instruct(query) for query in queries])
    answers = torch.tensor([vlm.yes[0] if good else vlm.no[0] for _, good in scenes])
    steps, generator = 150, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vlm.net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(scenes), (48,), generator=generator)
        batch = {key: value[rows] for key, value in inputs.items()}
        logits = vlm.net(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, answers[rows]).backward()
        torch.nn.utils.clip_grad_norm_(vlm.net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vlm.net.save_pretrained(tmp_path / "taught")
    vlm.processor.save_pretrained(tmp_path / "taught")
    unseen = [disc(seed) for seed in range(5000, 5200)]
    found = make_handler("hf", model=str(tmp_path / "taught"), batch_size=32).judge([query for query, _ in unseen])
    p_yes, good = np.array([answer.p_yes for answer in found]), np.array([good for _, good in unseen])
    auc = (p_yes[good][:, None] > p_yes[~good][None]).mean()
    print(f"AUC {auc:.3f}, mean p_mass {np.mean([answer.p_mass for answer in found]):.3f}")
    assert auc >= 0.8 and all(answer.verdict != "abstain" for answer in found)


# ---- options ----


def test_bfloat16_stays_close(judge: Callable[..., HFJudge]) -> None:
    full, half = judge("idefics3"), judge("idefics3", dtype="bfloat16")
    assert next(half.vlm.net.parameters()).dtype == torch.bfloat16
    queries = questions(4)
    for a, b in zip(full.judge(queries), half.judge(queries), strict=True):
        assert b.verdict in ("yes", "no") and abs(a.p_yes - b.p_yes) < 0.3


def test_style_and_max_side_reach_the_picture(judge: Callable[..., HFJudge], monkeypatch: pytest.MonkeyPatch) -> None:
    made = judge("llava", style="side_by_side", max_side=32)
    seen = []
    monkeypatch.setattr(made, "ask", lambda pictures, texts: seen.append((pictures, texts)) or [abstain("")])
    made.judge([ask(1)])
    assert max(seen[0][0][0].size) == 32 and "Left the photograph" in seen[0][1][0] and "= cat" in seen[0][1][0]


def shown(vlm: LoadedVLM, question: str = "is it?", prompt: str = "") -> str:
    """What a model reads, as text."""
    return vlm.tokenizer.decode(vlm_inputs(vlm, [photo(0)], [question], prompt)["input_ids"][0])


def test_prompt_replaces_the_chat_template(judge: Callable[..., HFJudge]) -> None:
    made = judge("llava", prompt="{image} Q: {question} A:")
    text = shown(made.vlm, prompt=made.prompt)
    assert text.count("<image>") == 16 and text.endswith("Q: is it? A:")
    assert shown(made.vlm).endswith("is it?assistant: ")
    made.vlm.processor.chat_template = made.vlm.tokenizer.chat_template = None
    assert shown(made.vlm).startswith("USER: <image>") and shown(made.vlm).endswith("\nis it? ASSISTANT:")


def test_options_pass_through(folders: dict[str, Path]) -> None:
    made = make_handler(
        "hf",
        model=str(folders["llava"]),
        model_options={"attn_implementation": "eager"},
        processor_options={"size": {"shortest_edge": 40}},
        device="cpu",
    )
    assert made.vlm.net.config._attn_implementation == "eager"
    assert made.vlm.processor.image_processor.size["shortest_edge"] == 40
    assert made.model == str(folders["llava"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "contuor"}, "Did you mean 'contour'"),
        ({"batch_size": 0}, "batch_size"),
        ({"min_mass": 1.5}, "min_mass"),
        ({"max_side": 2}, "max_side"),
        ({"dtype": "float8"}, "dtype"),
        ({"device": "gpu"}, "device='gpu' is not usable here"),
        ({"prompt": "Is it good?"}, "prompt must hold"),
        ({"prompt": "{image} {question} {class}"}, "no other braces"),
        ({"prompt": "{image} {question} {"}, "prompt must hold"),
        ({"model_options": "4bit"}, "model_options must be a dictionary"),
        ({"modle": "x"}, "Did you mean 'model'"),
    ],
)
def test_bad_options(folders: dict[str, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        make_handler("hf", **{"model": str(folders["llava"]), **options})
    assert "\n" not in str(found.value)


def test_bad_models_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    empty, broken, wordless = tmp_path / "empty", tmp_path / "broken", tmp_path / "wordless"
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text("{not json")
    tiny_vlms.build("llava", wordless, words=("Maybe",))
    lost = tiny_vlms.build("llava", tmp_path / "lost")
    (lost / "model.safetensors").unlink()
    cases = [
        (str(folders["text"]), ConfigError, "takes no images"),
        (str(tmp_path / "missing"), ConfigError, "does not exist"),
        ("./missing", ConfigError, "does not exist"),
        (str(empty), ConfigError, "holds no config.json"),
        (str(broken), JudgeError, "cannot load the configuration"),
        (str(wordless), ConfigError, "no single token for 'yes'"),
        (str(lost), JudgeError, "cannot load the model"),
        ("nobody/no-such-model", JudgeError, "neither in the local cache nor reachable"),
        ("", ConfigError, "model must be"),
        (None, ConfigError, "model must be"),
    ]
    for model, error, message in cases:
        with pytest.raises(error, match=message) as found:
            make_handler("hf", model=model)
        assert "\n" not in str(found.value), model
    with pytest.raises(ConfigError, match="needs the option 'model'"):
        make_handler("hf")


def test_the_experiment_knows_the_judge_and_imports_little() -> None:
    """Importing the loop registers `hf`, without loading a model class or torchvision."""
    code = (
        "import sys, vlm_itl.experiment; from vlm_itl.vlm.handler import handler_options; assert handler_options('hf');"
        "assert not [m for m in sys.modules if m.startswith(('torchvision', 'transformers.models.idefics3'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_judges_the_masks_of_an_experiment(folders: dict[str, Path], tmp_path: Path) -> None:
    """`mode="vlm"` with a real model: judged each round, every unlabelled image once."""
    scenes = make_scenes(tmp_path / "voc", n_train=24, n_test=4, seed=3)
    settings = {
        "dataset": str(scenes),
        "output_dir": str(tmp_path / "run"),
        "mode": "vlm",
        "policy": "observe",
        "judge": "hf",
        "judge_options": {"model": str(folders["llava"]), "min_mass": 0.0},
        "steps": 4,
        "batch_size": 4,
        "image_size": 48,
        "initial": 6,
        "increment": 6,
        "max_labelled": 12,
        "val_share": 4,
        "gallery": 1,
    }
    (first, *_) = list(run_al(make_config(settings)))
    written = (tmp_path / "run" / "round_000" / "judgements.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in written]
    assert len(answers) == 24 - 4 - 6 == first.judge["n"]
    assert {answer["verdict"] for answer in answers} <= {"yes", "no"}
    assert all(answer["score_kind"] == "logprobs" and 0 < answer["p_yes"] < 1 for answer in answers)
