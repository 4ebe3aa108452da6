"""Free judges: confidences against cleanlab and by hand, a second segmenter on real photographs, humans from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

from vlm_itl.core.checks import ConfigError, DataError, JudgeError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import MaskStore, read_image, read_mask
from vlm_itl.data.sources import load_data
from vlm_itl.data.transforms import unpad_one
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_al
from vlm_itl.model.metrics import image_iou
from vlm_itl.model.predict import Inference, predict_batches
from vlm_itl.model.segmenter import Segmenter, load_model, load_weights, save_model
from vlm_itl.vlm.cache import CachedHandler, handler_identity
from vlm_itl.vlm.free import (
    CONFIDENCE_KINDS,
    ConfidenceHandler,
    HumanHandler,
    SecondOpinionHandler,
    class_table,
    mask_agreement,
    mask_confidence,
    mask_hash,
    native_logits,
    read_verdicts,
    tta_agreement,
    write_verdicts,
)
from vlm_itl.vlm.handler import JudgeQuery, VLMHandler, make_handler
from vlm_itl.vlm.local_model import fingerprint

pytestmark = pytest.mark.usefixtures("undrawn")

VOC = LabelSpace.voc()
COLORS = LabelSpace(("background", "red", "blue"))
PAINT = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
VIEW = Inference(image_size=32, device="cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ColorNet(nn.Module):
    """Sees red as red: logits are minus the distance to each colour; one weight says how sure it is."""

    def __init__(self) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(5.0))
        self.forwards = 0

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> Any:
        self.forwards += len(pixel_values)
        pixels = pixel_values * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        pixels = pixels + torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        paint = torch.tensor(PAINT / 255, dtype=torch.float32)
        distance = (pixels[:, None] - paint[None, :, :, None, None]).square().sum(2)
        return SimpleNamespace(logits=-self.sure * distance, hidden_states=[pixels])


def colors() -> Segmenter:
    return Segmenter(ColorNet(), COLORS, name="colors").eval()


def truth_of(i: int) -> np.ndarray:
    """32 x 24, a red box and a blue one, in places that depend on `i`."""
    mask = np.zeros((24, 32), np.uint8)
    mask[4 : 14 + i % 4, 3:15] = 1
    mask[8:20, 18 : 26 + i % 3] = 2
    return mask


def photo(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(PAINT[np.where(mask == VOID, 0, mask)])


def ask(i: int = 0, mask: Any = None, **fields: Any) -> JudgeQuery:
    shown = truth_of(i) if mask is None else mask
    image = fields.pop("image", photo(truth_of(i)))
    return JudgeQuery(f"im{i}", image, shown, labels=fields.pop("labels", COLORS), **fields)


def confidence(**options: Any) -> VLMHandler:
    handler = make_handler("confidence", **options)
    handler.bind_segmenter(colors(), VIEW)
    return handler


def broken() -> Image.Image:
    raise OSError("image file is truncated")


BAD_QUERIES = [
    ("text", "JudgeQuery is needed"),
    (ask(image=None), "PIL image"),
    (ask(image="photo.jpg"), "PIL image"),
    (ask(image=broken), "image file is truncated"),
    (ask(image=lambda: 3), "PIL image is needed, not int"),
    (ask(image=Image.new("RGB", (9, 9))), "differ in size"),
    (ask(mask=truth_of(0) / 2), "uint8"),
    (ask(mask=np.full((24, 32), VOID, np.uint8)), "empty"),
    (ask(mask=np.full((24, 32), 3, np.uint8)), "class 3 is outside"),
    (ask(class_ids=(7,)), "class 7 is outside"),
]


def check_bad_queries(handler: VLMHandler) -> None:
    """Each bad query abstains with its reason; the good ones between them are answered as if alone."""
    (alone,) = handler.judge([ask(1)])
    found = handler.judge([q for bad, _ in BAD_QUERIES for q in (bad, ask(1))])  # type: ignore[misc]
    for (_, message), answer in zip(BAD_QUERIES, found[::2], strict=True):
        assert answer.verdict == "abstain" and answer.error and re.search(message, answer.error), answer
        assert "\n" not in answer.error
    assert {(a.verdict, a.p_yes) for a in found[1::2]} == {(alone.verdict, alone.p_yes)}


# ---- confidence: the scores ----


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.7])
def test_softmin_is_cleanlabs(temperature: float) -> None:
    rank = pytest.importorskip("cleanlab.segmentation.rank")
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2, size=(5, 4, 13, 9))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    masks = rng.integers(0, 4, (5, 13, 9)).astype(np.uint8)
    wanted, _ = rank.get_label_quality_scores(
        masks.astype(int), probabilities, method="softmin", temperature=temperature, verbose=False
    )
    found = [
        mask_confidence(torch.tensor(one), mask, "softmin", temperature)
        for one, mask in zip(logits, masks, strict=True)
    ]
    assert found == pytest.approx(wanted.tolist(), abs=1e-6)


def test_scores_by_their_definition() -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(scale=3, size=(5, 11, 7)))
    p = logits.softmax(0).numpy()
    mask = rng.integers(0, 5, (11, 7)).astype(np.uint8)
    mask[:3] = VOID
    ys, xs = np.nonzero(mask != VOID)
    own = p[mask[ys, xs], ys, xs]
    others = p[:, ys, xs].copy()
    others[mask[ys, xs], np.arange(len(ys))] = -1
    entropy = -(p[:, ys, xs] * np.log(p[:, ys, xs])).sum(0) / np.log(5)
    weights = np.exp((1 - own) / 0.1)
    wanted = {
        "max_probability": own.mean(),
        "margin": (1 + own - others.max(0)).mean() / 2,
        "entropy": 1 - entropy.mean(),
        "softmin": (weights * own).sum() / weights.sum(),
    }
    assert {k: mask_confidence(logits, mask, k) for k in wanted} == pytest.approx(wanted, abs=1e-6)
    spoilt = logits.clone()
    spoilt[:, :3] = 99 * torch.randn(5, 3, 7)  # under void
    assert {k: mask_confidence(spoilt, mask, k) for k in wanted} == pytest.approx(wanted, abs=1e-6)
    best = logits.argmax(0).to(torch.uint8).numpy()
    assert mask_confidence(logits, best) == pytest.approx(p.max(0).mean(), abs=1e-6)
    assert all(0 <= mask_confidence(1e4 * logits, m, k) <= 1 for k in wanted for m in (mask, best))
    with pytest.raises(ConfigError, match="kind"):
        mask_confidence(logits, mask, "tta")


def test_native_logits_are_those_that_draw_the_masks(scenes_small: Any) -> None:
    model = load_model("segformer-nano", scenes_small.labels, seed=1)
    view = Inference(image_size=48, batch_size=3)
    rows = scenes_small.test.select(range(5))
    pictures = [rows[i]["image"] for i in range(5)]
    wanted = [
        unpad_one(one, box, 48, native)
        for batch, logits, _ in predict_batches(model, rows, view)
        for one, box, native in zip(logits, batch["box"], batch["native"], strict=True)
    ]
    found = list(native_logits(model, pictures, view))
    assert all(f.shape == w.shape and torch.allclose(f, w, atol=1e-6) for f, w in zip(found, wanted, strict=True))


def test_agreement() -> None:
    left, right = np.array([[1, 1, 0, VOID]], np.uint8), np.array([[1, 0, 0, 2]], np.uint8)
    assert mask_agreement(left, right, 3) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert mask_agreement(left, right, 3, [1]) == 0.5 and np.isnan(mask_agreement(left, right, 3, [2]))
    assert mask_agreement(left, right, 3) == mask_agreement(right, left, 3)
    assert mask_agreement(left, left, 3) == 1 and np.isnan(mask_agreement(left, np.full_like(left, VOID), 3))


def test_tta_looks_at_mirrored_and_resized_pictures() -> None:
    model, truths = colors(), [truth_of(i) for i in range(3)]
    pictures = [photo(t) for t in truths]
    net: Any = model.net
    assert tta_agreement(model, pictures, truths, VIEW, scales=(1.0,)) == [1.0] * 3 and net.forwards == 3
    net.forwards = 0
    whole = tta_agreement(model, pictures, truths, VIEW)
    assert net.forwards == 3 * 5 and all(0.85 < value <= 1 for value in whole)
    moved = [np.roll(t, 5, 1) for t in truths]
    assert all(a < 0.8 * b for a, b in zip(tta_agreement(model, pictures, moved, VIEW), whole, strict=True))


# ---- confidence: the handler ----


@pytest.mark.parametrize("kind", CONFIDENCE_KINDS)
def test_confidence_answers_in_order_whatever_the_batch(kind: str) -> None:
    handler = confidence(kind=kind)
    queries = [ask(i, np.roll(truth_of(i), i, 1)) for i in range(7)]
    found = handler.judge(queries)
    assert [j.id for j in found] == [q.id for q in queries]
    assert all(j.score_kind == "score" and 0 <= j.p_yes <= 1 and j.usd == 0.0 and j.latency_s >= 0 for j in found)
    handler.batch_size = 2
    again = handler.judge(queries[::-1])[::-1]
    assert [j.p_yes for j in again] == pytest.approx([j.p_yes for j in found], abs=1e-6)
    good, spoilt = handler.judge([ask(0), ask(0, np.roll(truth_of(0), 9, 1))])
    assert good.p_yes == pytest.approx(spoilt.p_yes) if kind == "entropy" else good.p_yes > spoilt.p_yes


def test_confidence_threshold_and_errors() -> None:
    (found,) = confidence().judge([ask()])
    assert found.p_yes is not None
    assert (
        make_handler("confidence", kind="tta", tau=0.4).threshold == 0.4 and make_handler("confidence").threshold == 0.9
    )  # type: ignore[attr-defined]
    assert confidence(threshold=found.p_yes).judge([ask()])[0].verdict == "yes"
    assert confidence(threshold=min(1, found.p_yes + 1e-6)).judge([ask()])[0].verdict == "no"
    with pytest.raises(JudgeError, match="bind_segmenter"):
        make_handler("confidence").judge([ask()])
    closed = confidence()
    closed.close()
    with pytest.raises(JudgeError, match="bind_segmenter"):
        closed.judge([ask()])
    for options in ({"kind": "sure"}, {"threshold": 2}, {"temperature": 0}, {"scales": []}, {"scales": "1"}):
        with pytest.raises(ConfigError):
            make_handler("confidence", **options)
    with pytest.raises(ConfigError, match="scale"):
        make_handler("confidence", kind="tta", scales=[-1])
    other = LabelSpace(("background", "red", "green"))
    assert "other classes" in str(confidence().judge([ask(labels=other)])[0].error)


@pytest.mark.parametrize("kind", CONFIDENCE_KINDS)
def test_a_picture_is_looked_at_once_however_many_questions_are_about_it(kind: str) -> None:
    handler = confidence(kind=kind)
    net: Any = handler.segmenter()[0].net
    queries = [
        ask(number, np.roll(truth_of(number), by, 1), class_ids=(c,), question="label")
        for number in (0, 1)
        for by in (0, 9)
        for c in (1, 2)
    ]
    alone = [handler.judge([query])[0].p_yes for query in queries]
    net.forwards = 0
    together = [answer.p_yes for answer in handler.judge(queries)]
    assert net.forwards == 2 * (5 if kind == "tta" else 1)  # five further views
    assert together == pytest.approx(alone, abs=1e-6)
    assert len(set(together)) > 1


@pytest.mark.parametrize("kind", ["max_probability", "tta"])
def test_bad_queries_cost_confidence_only_themselves(kind: str) -> None:
    check_bad_queries(confidence(kind=kind))


def test_a_broken_network_abstains() -> None:
    model = colors()
    handler = make_handler("confidence")
    handler.bind_segmenter(model, VIEW)
    with torch.no_grad():
        model.net.sure.fill_(float("nan"))  # type: ignore[operator, union-attr]
    (found,) = handler.judge([ask()])
    assert found.verdict == "abstain" and "not a number" in str(found.error)


def test_other_weights_are_another_judge(tmp_path: Path) -> None:
    model = colors()
    net: Any = model.net
    before = fingerprint(model, each=None)
    assert before == fingerprint(colors(), each=None)
    judge = CachedHandler(judge="confidence", path=tmp_path / "c.sqlite")
    assert judge.needs_segmenter
    with pytest.raises(JudgeError, match="bind_segmenter"):
        judge.judge([ask()])
    judge.bind_segmenter(model, VIEW)
    first = judge.judge([ask(0), ask(1)])
    net.forwards = 0
    assert all(j.cached for j in judge.judge([ask(0), ask(1)])) and net.forwards == 0
    with torch.no_grad():
        net.sure.add_(1e-4)
    judge.bind_segmenter(model, VIEW)  # as a run does after a training
    assert fingerprint(model, each=None) != before
    second = judge.judge([ask(0), ask(1)])
    assert net.forwards == 2 and [j.p_yes for j in first] != [j.p_yes for j in second]


def test_what_changes_an_answer_changes_the_identity() -> None:
    handlers = [confidence(), confidence(kind="margin"), confidence(threshold=0.5), confidence(kind="softmin")]
    handlers += [
        confidence(kind="softmin", temperature=0.2),
        confidence(kind="tta"),
        confidence(kind="tta", scales=[1]),
    ]
    for view in (replace(VIEW, image_size=48), replace(VIEW, resize="stretch"), replace(VIEW, precision="bf16")):
        handlers.append(confidence())
        handlers[-1].bind_segmenter(colors(), view)
    assert len({str(handler_identity(h)) for h in handlers}) == len(handlers)
    same = confidence(temperature=0.9)  # not used by max_probability
    same.bind_segmenter(colors(), replace(VIEW, batch_size=1, num_workers=0))
    assert handler_identity(same) == handler_identity(handlers[0])


def test_a_run_binds_each_rounds_network(tmp_path: Path) -> None:
    """The confidences on file are those of the round's own weights, for the round's own masks."""
    config = make_config(
        mode="vlm",
        judge="cached",
        judge_options={"judge": "confidence", "options": {"kind": "margin"}, "path": str(tmp_path / "c.sqlite")},
        policy="observe",
        proposer="own",
        model="segformer-nano",
        dataset="scenes",
        data_options={"n_train": 24, "n_test": 4},
        val_share=4,
        steps=4,
        batch_size=4,
        image_size=48,
        initial=6,
        increment=6,
        max_labelled=12,
        gallery=0,
        test_every_round=False,
        keep_models="all",
        output_dir=str(tmp_path / "run"),
    )
    rounds = list(run_al(config))
    data = load_data("scenes", seed=0, val_share=4, options={"n_train": 24, "n_test": 4})
    images = {row["id"]: row["image"] for row in data.train}
    model = load_model("segformer-nano", data.labels, seed=0)
    said = []
    for index in range(len(rounds)):
        folder = tmp_path / "run" / f"round_{index:03d}"
        load_weights(model, folder / "model")
        lines = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
        said.append({line["id"]: line["p_yes"] for line in lines})
        for line in lines[:3]:
            (logits,) = native_logits(model, [images[line["id"]]], config.view)
            drawn = logits.argmax(0).to(torch.uint8).numpy()
            if (folder / "masks").is_dir():
                assert (MaskStore(folder / "masks", data.labels)[line["id"]] == drawn).mean() > 0.999
            assert line["p_yes"] == pytest.approx(mask_confidence(logits, drawn, "margin"), abs=1e-4)
    assert len(rounds) == 2 and said[0] != {i: p for i, p in said[1].items()}


# ---- second opinion: classes ----


@pytest.mark.parametrize(
    ("theirs", "ours", "classes", "wanted"),
    [
        (["background", "cat", "dog"], ["background", "cat", "dog"], None, [0, 1, 2]),
        (["dog", "background", "cat"], ["background", "cat", "dog"], None, [2, 0, 1]),
        (["wall", "TV monitor", "dining-table"], ["background", "tvmonitor", "diningtable"], None, [0, 1, 2]),
        (["wall", "kitty", "sky"], ["background", "cat"], {"kitty": "cat"}, [0, 1, 0]),
        (["wall", "cat", "kitten"], ["background", "cat"], {"kitten": "cat"}, [0, 1, 1]),
        (["road", "car", "sky"], ["road", "car"], None, [0, 1, VOID]),
    ],
)
def test_class_table(theirs: list[str], ours: list[str], classes: dict[str, str] | None, wanted: list[int]) -> None:
    table, missing = class_table(theirs, LabelSpace(tuple(ours)), classes)
    assert table[: len(theirs)].tolist() == wanted and missing == ()


def test_class_table_refuses_and_excuses() -> None:
    ours = LabelSpace(("background", "cat", "sheep", "cow"))
    with pytest.raises(ConfigError, match="knows no 'sheep', 'cow'.*classes=.*partial=True"):
        class_table(["wall", "cat"], ours)
    table, missing = class_table(["wall", "cat"], ours, partial=True)
    assert missing == (2, 3) and table[:2].tolist() == [0, 1]
    with pytest.raises(ConfigError, match="no class 'cta'. Did you mean 'cat'"):
        class_table(["wall", "cat"], ours, {"cta": "cat"}, partial=True)
    with pytest.raises(ConfigError, match="no class 'sheeep'. Did you mean 'sheep'"):
        class_table(["wall", "cat"], ours, {"cat": "sheeep"}, partial=True)
    with pytest.raises(ConfigError, match="knows no 'background'"):
        class_table(["cat", "sheep", "cow"], ours)
    binary = VOC.binary()
    table, missing = class_table(["tree", "person", "sky", "cat"], binary, partial=True)
    assert table[:4].tolist() == [0, 1, 0, 1] and missing == ()
    assert class_table(["background", "foreground"], binary)[0][:2].tolist() == [0, 1]


# ---- second opinion: real photographs ----


@pytest.fixture(scope="module")
def opinion(weights: Path) -> SecondOpinionHandler:
    handler = make_handler("second_opinion", model=str(weights / "deeplabv3-mobilenetv2-voc"), image_size=256)
    assert isinstance(handler, SecondOpinionHandler)
    return handler


@pytest.fixture(scope="module")
def grounded(shared: Path, voc: Path) -> list[tuple[JudgeQuery, np.ndarray]]:
    """Ten photographs, the masks of Grounded-SAM, and the truth."""
    folder = shared / "data" / "grounded_sam_voc"
    if not folder.is_dir():
        pytest.skip("grounded_sam_voc is not in the shared folder")
    found = []
    for path in sorted(folder.glob("*.png"))[::42][:10]:
        image = read_image(voc / "JPEGImages" / f"{path.stem}.jpg")
        truth = read_mask(voc / "SegmentationClass" / f"{path.stem}.png", VOC)
        found.append((JudgeQuery(path.stem, image, read_mask(path, VOC), labels=VOC), truth))
    return found


def forwards(handler: SecondOpinionHandler) -> list[int]:
    """A list that grows by the number of pictures in each forward pass."""
    seen: list[int] = []
    handler._net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return seen


def test_a_second_opinion_on_real_masks(
    opinion: SecondOpinionHandler, grounded: list[tuple[JudgeQuery, np.ndarray]]
) -> None:
    seen = forwards(opinion)
    queries = [query for query, _ in grounded]
    found = opinion.judge(queries)
    assert sum(seen) == len(queries)
    theirs = opinion.masks_of([query.picture() for query in queries])
    wanted = [image_iou(t, q.mask, 21) for t, q in zip(theirs, queries, strict=True)]
    assert [j.p_yes for j in found] == pytest.approx(wanted) and all(j.score_kind == "score" for j in found)
    assert all((j.verdict == "yes") == (j.p_yes >= 0.7) for j in found)
    # another question, another mask of the same images: no further pass
    opinion.judge([replace(q, question="exhaustive") for q in queries])
    real = opinion.judge([replace(q, mask=truth) for q, truth in grounded])
    swapped = [np.where(q.mask == 0, 0, np.where(q.mask == 15, 12, 15)).astype(np.uint8) for q in queries]
    wrong = opinion.judge([replace(q, mask=mask) for q, mask in zip(queries, swapped, strict=True)])
    assert sum(seen) == len(queries)
    assert np.mean([j.p_yes for j in wrong]) < 0.6 * np.mean([j.p_yes for j in real])
    # the free judge knows something about a foundation model's real errors
    ious = [image_iou(q.mask, truth, 21) for q, truth in grounded]
    everything = ious + [image_iou(m, truth, 21) for m, (_, truth) in zip(swapped, grounded, strict=True)]
    assert spearmanr(everything, [j.p_yes for j in (*found, *wrong)])[0] > 0.6


def test_a_second_opinion_remembers_a_bounded_number_of_masks(
    weights: Path, grounded: list[tuple[JudgeQuery, np.ndarray]]
) -> None:
    path = str(weights / "deeplabv3-mobilenetv2-voc")
    handler = SecondOpinionHandler(path, image_size=64, remember=3, batch_size=2)
    seen, queries = forwards(handler), [query for query, _ in grounded[:5]]
    once = handler.judge(queries)
    assert len(handler._masks) == 3 and sum(seen) == 5
    assert [j.p_yes for j in handler.judge(queries[2:])] == [j.p_yes for j in once[2:]] and sum(seen) == 5
    handler.judge(queries[:1])
    assert sum(seen) == 6
    twice = [queries[0], replace(queries[0], id="again"), queries[0]]
    handler.close()
    handler.judge(twice[:2])
    assert sum(seen) == 7 and len(handler._masks) == 1
    forgetful = SecondOpinionHandler(path, image_size=64, remember=0)
    assert forgetful.judge(queries[:1])[0].p_yes == once[0].p_yes and not forgetful._masks


def test_what_is_no_segmenter_is_refused(weights: Path, tmp_path: Path) -> None:
    good = str(weights / "deeplabv3-mobilenetv2-voc")
    for options, message in [
        ({"model": str(weights / "mobilenet-v2-imagenet")}, "is no semantic segmenter"),
        ({"model": str(tmp_path)}, "neither a model folder nor reachable"),
        ({"model": "nobody/no-such-model"}, "neither a model folder nor reachable"),
        ({"model": good, "classes": {"sheeep": "cat"}}, "no class 'sheeep'. Did you mean 'sheep'"),
        ({"model": good, "classes": ["cat"]}, "dictionary"),
        ({"model": good, "threshold": 7}, "threshold"),
        ({"model": good, "image_size": 4}, "image_size"),
        ({"model": good, "remember": -1}, "remember"),
        ({"model": good, "device": "tpu"}, "device"),
    ]:
        with pytest.raises(ConfigError, match=message) as error:
            make_handler("second_opinion", **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="needs the option 'model'"):
        make_handler("second_opinion")


# ---- second opinion: a network of one's own ----


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained SegFormer with three classes, saved."""
    return save_model(load_model("segformer-nano", COLORS, seed=0), tmp_path_factory.mktemp("nano"))


def test_bad_queries_cost_a_second_opinion_only_themselves(nano: Path) -> None:
    check_bad_queries(make_handler("second_opinion", model=str(nano), image_size=32))


def test_a_second_opinion_says_what_it_does_not_know(nano: Path) -> None:
    four = LabelSpace(("background", "red", "blue", "green"))
    with pytest.raises(JudgeError, match="knows no 'green'"):
        make_handler("second_opinion", model=str(nano)).judge([ask(labels=four)])
    partial = make_handler("second_opinion", model=str(nano), partial=True, image_size=32)
    green = truth_of(0)
    green[0, 0] = 3
    known, unknown = partial.judge([ask(labels=four), ask(mask=green, labels=four)])
    assert known.p_yes is not None and unknown.verdict == "abstain" and "'green'" in str(unknown.error)
    assert make_handler("second_opinion", model=str(nano), tau=0.4).threshold == 0.4  # type: ignore[attr-defined]
    part = make_handler("second_opinion", model=str(nano), image_size=32).judge([ask(class_ids=(1,)), ask()])
    assert part[0].p_yes != part[1].p_yes


def test_the_identity_of_a_second_opinion(nano: Path, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"image_size": 32}, {"resize": "stretch"}, {"threshold": 0.5}]
    options += [{"classes": {"red": "blue"}, "partial": True}, {"partial": True}]
    made = [str(handler_identity(make_handler("second_opinion", model=str(nano), **o))) for o in options]
    assert len(set(made)) == len(options)
    assert made[0] == str(handler_identity(make_handler("second_opinion", model=str(nano), batch_size=1, remember=0)))
    other = load_model("segformer-nano", COLORS, seed=1)
    save_model(other, tmp_path)
    one = handler_identity(make_handler("second_opinion", model=str(tmp_path)))
    save_model(load_model("segformer-nano", COLORS, seed=2), tmp_path)
    assert one != handler_identity(make_handler("second_opinion", model=str(tmp_path)))


# ---- human ----

ROWS = [("im0", truth_of(0), "yes"), ("im1", truth_of(1), "no"), ("im2", truth_of(2), "abstain"), ("a,b é", None, "no")]


@pytest.mark.parametrize("name", ["v.csv", "v.jsonl"])
def test_human_verdicts_round_trip(tmp_path: Path, name: str) -> None:
    path = write_verdicts(tmp_path / name, ROWS)
    found = read_verdicts(path)
    assert found == {i: {"" if m is None else mask_hash(m): v} for i, m, v in ROWS}
    handler = make_handler("human", path=path, usd=0.035)
    queries = [ask(0), ask(1), ask(2), ask(3), ask(0, np.roll(truth_of(0), 1, 1)), replace(ask(0), id="a,b é")]
    said = handler.judge(queries)
    assert [j.verdict for j in said] == ["yes", "no", "abstain", "abstain", "abstain", "abstain"]
    assert [j.p_yes for j in said] == [1.0, 0.0, None, None, None, None]
    assert [j.latency_s for j in said] == [9.0, 9.0, 9.0, 0.0, 0.0, 0.0]
    assert [j.usd for j in said] == [0.035, 0.035, 0.035, 0.0, 0.0, 0.0]
    errors = [None, None, None, "no human verdict", "another mask", "any_mask"]
    assert all((j.error is None) if e is None else e in str(j.error) for j, e in zip(said, errors, strict=True))
    loose = make_handler("human", path=path, any_mask=True, seconds=2)
    answers = [j.verdict for j in loose.judge(queries)]
    assert answers == ["yes", "no", "abstain", "abstain", "abstain", "no"]  # a hash still has to fit
    assert HumanHandler(path).judge([ask(0)])[0].usd is None


def test_human_files_of_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("\ufeffverdict,comment,id\r\n YES ,nice,im0\r\nno,,im1\r\n")
    assert read_verdicts(tmp_path / "v.csv") == {"im0": {"": "yes"}, "im1": {"": "no"}}
    (tmp_path / "v.jsonl").write_text('{"id": "im0", "verdict": "yes", "mask": null}\n\n{"id": 7, "verdict": "no"}\n')
    assert read_verdicts(tmp_path / "v.jsonl") == {"im0": {"": "yes"}, "7": {"": "no"}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("v.csv", "id,verdict\nim0,maybe\n", "v.csv, line 2: .*not 'maybe'"),
        ("v.csv", "id,verdict\nim0,yes\nim1\n", "line 3"),
        ("v.csv", "name,answer\nim0,yes\n", "line 2"),
        ("v.csv", "id,verdict,mask\nim0,yes,ab\nim0,no,ab\n", "line 3: image 'im0' has another verdict"),
        ("v.jsonl", '{"id": "im0", "verdict": "yes"}\nnot json\n', "line 2: a JSON object"),
        ("v.jsonl", "[1]\n", "line 1: a JSON object"),
        ("v.csv", None, "cannot be read"),
    ],
)
def test_bad_human_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        make_handler("human", path=tmp_path / name)


def test_human_errors_and_identity(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format of v.xls.*csv"):
        make_handler("human", path=tmp_path / "v.xls")
    with pytest.raises(ConfigError, match="verdict='perhaps'"):
        write_verdicts(tmp_path / "v.csv", [("a", None, "perhaps")])
    write_verdicts(tmp_path / "v.csv", ROWS[:1])
    with pytest.raises(ConfigError, match="seconds"):
        make_handler("human", path=tmp_path / "v.csv", seconds=-1)
    first = handler_identity(make_handler("human", path=tmp_path / "v.csv"))
    cached = CachedHandler(judge="human", options={"path": tmp_path / "v.csv"}, path=tmp_path / "c.sqlite")
    assert [j.verdict for j in cached.judge([ask(0), ask(1)])] == ["yes", "abstain"] and len(cached.cache) == 1
    write_verdicts(tmp_path / "copy.jsonl", ROWS[:1])
    assert first == handler_identity(make_handler("human", path=tmp_path / "copy.jsonl"))
    write_verdicts(tmp_path / "v.csv", ROWS[:2])
    assert first != handler_identity(make_handler("human", path=tmp_path / "v.csv"))


def test_bad_queries_cost_a_human_only_themselves(tmp_path: Path) -> None:
    write_verdicts(tmp_path / "v.csv", ROWS)
    handler = make_handler("human", path=tmp_path / "v.csv")
    found = handler.judge([q for bad, _ in BAD_QUERIES for q in (bad, ask(1))])  # type: ignore[misc]
    assert {j.verdict for j in found[1::2]} == {"no"} and all(j.verdict in ("yes", "abstain") for j in found[::2])


def test_confidence_is_a_handler() -> None:
    assert issubclass(ConfidenceHandler, VLMHandler) and make_handler("confidence").needs_segmenter


def test_a_humans_no_to_a_whole_mask_is_none_to_each_of_its_classes(tmp_path: Path) -> None:
    """accept_by=class asks about single classes; one of them may well be right."""
    two, one = truth_of(0), np.where(truth_of(1) == 2, 0, truth_of(1)).astype(np.uint8)
    handler = make_handler("human", path=write_verdicts(tmp_path / "v.csv", [("im0", two, "no"), ("im1", one, "no")]))
    assert handler.judge([ask(0)])[0].verdict == "no"
    said = handler.judge([replace(ask(0), class_ids=(c,), question="label") for c in (1, 2)])
    assert [j.verdict for j in said] == ["abstain"] * 2 and all("whole mask" in str(j.error) for j in said)
    assert handler.judge([replace(ask(1, one), class_ids=(1,), question="label")])[0].verdict == "no"


@pytest.mark.parametrize("name", ["v.csv", "v.jsonl"])
def test_ids_with_odd_spaces_round_trip(tmp_path: Path, name: str) -> None:
    ids = ["a\u2028b", "a\x85b", "a\x0cb", "a b"]
    assert list(read_verdicts(write_verdicts(tmp_path / name, [(i, None, "yes") for i in ids]))) == ids
