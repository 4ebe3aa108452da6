"""Training and passes over a pool: equal to slow references, repeatable, blind to masks, harmless to the model."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from scipy.special import log_softmax, softmax
from torch import nn
from torchmetrics import JaccardIndex
from transformers import (
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
)

from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import DecodeRows, MaskStore, make_rows, raw_rows
from vlm_itl.data.sources import SegData, toy_images
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_baseline
from vlm_itl.model import recipe, train
from vlm_itl.model.doubt import uncertainty_maps
from vlm_itl.model.predict import Inference, evaluate, pick_device
from vlm_itl.model.recipe import TrainSettings, pixel_loss
from vlm_itl.model.scoring import PoolScores, masked_mean, score_pool, valid_cells
from vlm_itl.model.segmenter import Segmenter, load_model
from vlm_itl.model.train import fit

pytestmark = pytest.mark.usefixtures("undrawn")

VOC = LabelSpace.voc()
SEVEN = LabelSpace(tuple("abcdefg"))
SIZES = [(64, 64), (40, 64), (64, 33), (90, 61), (50, 120), (17, 160)]  # (H, W)


def png(pixels: np.ndarray) -> dict[str, Any]:
    """A cell with a PNG inside."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def made_up(sizes: list[tuple[int, int]], classes: int = 7, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Blocky random pictures with masks of some classes and some void."""
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for height, width in sizes:
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        images.append(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])
        mask = rng.integers(0, classes - 1, (height // 6 + 1, width // 6 + 1), dtype=np.uint8)
        mask = mask.repeat(6, 0).repeat(6, 1)[:height, :width].copy()
        mask[rng.random(mask.shape) < 0.05] = VOID
        masks.append(mask)
    return images, masks


def rows_of(images: list[np.ndarray], masks: list[np.ndarray] | None, labels: LabelSpace) -> Dataset:
    """A data set over arrays."""
    ids = [f"i{number}" for number in range(len(images))]
    cells = None if masks is None else [png(m) for m in masks]
    return make_rows(ids, [png(i) for i in images], cells).with_transform(DecodeRows(labels))


class Pointwise(nn.Module):
    """A network whose cell sees its own 4 x 4 pixels only."""

    def __init__(self, classes: int):
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 1)

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> Any:
        """Means of 4 x 4 pixels, and one layer over them."""
        small = F.avg_pool2d(pixel_values, 4)
        out = type("Out", (), {})()
        out.logits, out.hidden_states = self.layer(small), (small,)
        return out


def pointwise(labels: LabelSpace) -> Segmenter:
    """A seeded segmenter over `Pointwise`."""
    torch.manual_seed(0)
    return Segmenter(Pointwise(len(labels)), labels).eval()


@pytest.fixture(scope="module")
def batchnorm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with BatchNorm in encoder and head."""
    folder = tmp_path_factory.mktemp("mobilenet")
    torch.manual_seed(0)
    MobileNetV2ForSemanticSegmentation(MobileNetV2Config(depth_multiplier=0.35, num_labels=7)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def some() -> SegData:
    """Twelve small images in one split each of eight, two and two."""
    images, masks = made_up([(48, 64), (64, 48), (40, 40)] * 4, seed=1)
    rows = rows_of(images, masks, SEVEN)
    return SegData(rows.select(range(8)), rows.select([8, 9]), rows.select([10, 11]), SEVEN, "made up")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], part: str = "") -> bool:
    """Are all tensors whose name contains `part` equal, bit for bit?"""
    names = [k for k in one if part in k]
    assert names and one.keys() == two.keys()
    return all(torch.equal(one[k], two[k]) for k in names)


# --- uncertainty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 21, 150])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0, 1e4])
def test_uncertainty_equals_float64(classes, scale):
    logits = scale * np.random.default_rng(classes).uniform(-1, 1, (2, classes, 9, 8)).astype(np.float32)
    if scale == 1e4:
        logits = np.sign(logits) * np.float32(1e4)  # ties at the extreme
        logits[:, 0] = 1e4
    exact = logits.astype(np.float64)
    p, log_p = softmax(exact, axis=1), log_softmax(exact, axis=1)
    ordered = np.sort(p, axis=1)
    expected = {
        "entropy": -(p * np.maximum(log_p, -1e300)).sum(1) / math.log(classes),
        "margin": 1 - (ordered[:, -1] - ordered[:, -2]),
        "least_confidence": 1 - ordered[:, -1],
    }
    found = uncertainty_maps(torch.from_numpy(logits))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float32 and found[name].shape == (2, 9, 8)
        assert 0 <= found[name].min() and found[name].max() <= 1
        assert np.abs(found[name].numpy() - values).max() <= 1e-6, name


def test_uncertainty_of_half_precision_and_shift():
    logits = torch.randn(1, 21, 5, 5, generator=torch.Generator().manual_seed(0))
    for name, values in uncertainty_maps(logits.bfloat16()).items():
        assert torch.equal(values, uncertainty_maps(logits.bfloat16().float())[name])
        assert torch.allclose(uncertainty_maps(logits + 100)[name], uncertainty_maps(logits)[name], atol=1e-4)


# --- cells and means --------------------------------------------------------------------------------------------------


def test_valid_cells_by_hand():
    found = valid_cells([(8, 8), (4, 8), (3, 5), (1, 8), (0, 0)], 8, (4, 4))
    by_hand = [  # cell centres lie at 1, 3, 5, 7
        "1111 1111 1111 1111",
        "1111 1111 0000 0000",
        "1100 0000 0000 0000",
        "1000 0000 0000 0000",  # no centre is inside: the first cell stands for the image
        "1000 0000 0000 0000",
    ]
    for one, rows in zip(found, by_hand, strict=True):
        assert ["".join(str(int(v)) for v in row) for row in one] == rows.split()


def test_valid_cells_of_other_shapes():
    assert valid_cells([(5, 5)], 10, (2, 5)).tolist() == [[[True, True, False, False, False], [False] * 5]]
    assert valid_cells([(1, 1)], 100, (1, 1)).all()
    assert valid_cells([(100, 100)], 100, (3, 7)).all()


def test_masked_mean_by_hand():
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    valid = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [1, 1]]]).bool()
    assert masked_mean(values, valid).tolist() == [2.5, 6.5]
    deep = torch.stack([values, -values], dim=1)  # (B, D, h, w)
    assert masked_mean(deep, valid).tolist() == [[2.5, -2.5], [6.5, -6.5]]
    spoilt = values.clone()
    spoilt[0, 0, 1] = 1e30
    assert masked_mean(spoilt, valid).tolist() == [2.5, 6.5]


# --- loss -------------------------------------------------------------------------------------------------------------


def test_pixel_loss_equals_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 7, (2, 32, 32), generator=generator).to(torch.uint8)
    truth[:, ::5] = VOID
    for shape in ((32, 32), (8, 8)):
        logits = torch.randn(2, 7, *shape, generator=generator, requires_grad=True)
        large = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
        expected = F.cross_entropy(large, truth.long(), ignore_index=VOID)
        assert torch.allclose(pixel_loss(logits, truth), expected, atol=1e-6)


def test_loss_without_a_labelled_pixel_is_zero():
    logits = torch.randn(2, 7, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((2, 16, 16), VOID))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


# --- evaluation -------------------------------------------------------------------------------------------------------


def reference_logits(model: Segmenter, image: np.ndarray, size: int, resize: str) -> np.ndarray:
    """Logits on the original pixels by own letterbox and own float64 bilinear sampling: (C, H, W)."""
    height, width = image.shape[:2]
    box = (size, size)
    if resize == "keep":
        box = (max(1, round(height * size / max(height, width))), max(1, round(width * size / max(height, width))))
    square = np.full((size, size, 3), 128, dtype=np.uint8)
    square[: box[0], : box[1]] = np.asarray(Image.fromarray(image).resize(box[::-1], Image.Resampling.BILINEAR))
    with torch.inference_mode():
        grid = model(torch.from_numpy(square).permute(2, 0, 1)[None])[0].double().numpy()
    for axis, (part, native) in enumerate(zip(box, (height, width), strict=True), start=1):
        cells = part * grid.shape[axis] / size
        last = max(1, math.ceil(cells - 1e-9)) - 1
        place = np.clip((np.arange(native) + 0.5) * cells / native - 0.5, 0, last)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, last)
        weight = (place - low).reshape([-1 if a == axis else 1 for a in range(3)])
        grid = grid.take(low, axis) * (1 - weight) + grid.take(high, axis) * weight
    return grid


@pytest.mark.parametrize("resize", ["keep", "stretch"])
@pytest.mark.parametrize("size", [64, 50])
def test_evaluate_equals_torchmetrics(resize, size):
    images, masks = made_up(SIZES)
    model = load_model("segformer-nano", SEVEN, seed=2)
    jaccard = JaccardIndex("multiclass", num_classes=7, ignore_index=VOID, average="macro")
    each = JaccardIndex("multiclass", num_classes=7, ignore_index=VOID, average="none")
    correct = total = 0
    for image, mask in zip(images, masks, strict=True):
        logits = reference_logits(model, image, size, resize)
        top = np.sort(logits, axis=0)
        mask[top[-1] - top[-2] < 1e-4] = VOID  # rounding may decide there
        prediction = logits.argmax(0)
        assert (mask != VOID).mean() > 0.8
        for metric in (jaccard, each):
            metric.update(torch.from_numpy(prediction)[None], torch.from_numpy(mask).long()[None])
        correct += (prediction == mask).sum()
        total += (mask != VOID).sum()
    view = Inference(image_size=size, resize=resize, batch_size=4)
    found = evaluate(model, rows_of(images, masks, SEVEN), view)
    assert found["pixel_accuracy"] == pytest.approx(correct / total, abs=1e-9)
    # torchmetrics divides in float32: its counts are compared exactly, by dividing them in float64
    counts = jaccard.confmat.double()
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    iou = (counts.diag() / union)[union > 0]
    assert found["mean_iou"] == pytest.approx(iou.mean().item(), abs=1e-9)
    assert found["mean_iou"] == pytest.approx(jaccard.compute().item(), abs=1e-6)
    per_class = [v for v in found["per_class_iou"].values() if v is not None]
    assert per_class == pytest.approx(iou.tolist(), abs=1e-9)
    assert len(found["per_class_iou"]) == 7


def test_evaluate_does_not_depend_on_the_batch(some):
    model = load_model("segformer-nano", SEVEN)
    results = [evaluate(model, some.train, Inference(48, batch_size=b)) for b in (1, 3, 8)]
    for other in results[1:]:
        assert other["mean_iou"] == pytest.approx(results[0]["mean_iou"], abs=1e-3)


def test_nothing_to_evaluate(some):
    with pytest.raises(DataError, match="empty"):
        evaluate(load_model("segformer-nano", SEVEN), some.train.select([]), Inference(48))


def test_a_mask_of_another_size_is_named():
    images, masks = made_up(SIZES[:2])
    rows = rows_of(images, [masks[0], masks[1][:-3]], SEVEN)
    with pytest.raises(DataError, match="i1"):
        evaluate(load_model("segformer-nano", SEVEN), rows, Inference(48))


# --- one pass over a pool ---------------------------------------------------------------------------------------------


def scores_equal(one: PoolScores, two: PoolScores) -> bool:
    """Do two passes agree, image by image?"""
    two = two.take(one.ids)
    pairs = [(one.scores[k], two.scores[k]) for k in one.scores]
    pairs += [(one.embedding, two.embedding), (one.class_hist, two.class_hist)]
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def test_scores_depend_on_neither_batch_nor_order():
    images, _ = made_up(SIZES)
    rows = rows_of(images, None, SEVEN)
    model = load_model("segformer-nano", SEVEN, seed=1)
    whole = score_pool(model, rows, Inference(64, batch_size=4))
    assert whole.ids == [f"i{n}" for n in range(6)] and len(whole) == 6
    assert whole.embedding.shape == (6, 160) and whole.class_hist.shape == (6, 7)
    assert np.allclose(whole.class_hist.sum(1), 1, atol=1e-5)
    assert {v.dtype for v in whole.scores.values()} == {np.dtype(np.float32)}
    assert scores_equal(whole, score_pool(model, rows, Inference(64, batch_size=1)))
    order = [3, 0, 5, 1, 4, 2]
    turned = score_pool(model, rows.select(order), Inference(64, batch_size=3))
    assert turned.ids == [f"i{n}" for n in order] and scores_equal(whole, turned)


def test_padding_counts_for_nothing():
    """With a network of pointwise cells the scores are those of the image without any padding."""
    images, _ = made_up([(64, 64), (32, 64), (64, 16), (8, 64)])
    model = pointwise(SEVEN)
    found = score_pool(model, rows_of(images, None, SEVEN), Inference(64))
    for number, image in enumerate(images):
        with torch.inference_mode():
            logits, features = model(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], features=True)
        for name, values in uncertainty_maps(logits).items():
            assert found.scores[f"{name}-mean"][number] == pytest.approx(values.mean().item(), abs=1e-6)
        assert np.allclose(found.embedding[number], features[0].mean((-2, -1)), atol=1e-5)
        share = np.bincount(logits[0].argmax(0).ravel(), minlength=7) / logits[0, 0].numel()
        assert np.allclose(found.class_hist[number], share, atol=1e-6)


def test_no_mask_is_read(tmp_path):
    images, masks = made_up(SIZES)
    (tmp_path / "garbage.png").write_bytes(b"no picture at all")
    Image.fromarray(masks[0][:5, :5] * 0 + 200).save(tmp_path / "wrong.png")
    bad: list[Any] = [tmp_path / "garbage.png", tmp_path / "missing.png", tmp_path / "wrong.png"] * 2
    ids = [f"i{n}" for n in range(6)]
    rows = make_rows(ids, [png(i) for i in images], bad).with_transform(DecodeRows(SEVEN))
    model = load_model("segformer-nano", SEVEN)
    found = score_pool(model, rows, Inference(64), masks=MaskStore(tmp_path / "masks", SEVEN))
    expected = score_pool(model, rows_of(images, None, SEVEN), Inference(64))
    assert found.ids == expected.ids and scores_equal(found, expected)
    with pytest.raises(DataError):
        evaluate(model, rows, Inference(64))


@pytest.mark.parametrize("resize", ["keep", "stretch"])
def test_masks_on_disk_are_the_argmax_at_native_size(tmp_path, resize):
    images, _ = made_up(SIZES)
    model = load_model("segformer-nano", SEVEN, seed=2)
    store = MaskStore(tmp_path / "masks", SEVEN)
    found = score_pool(model, rows_of(images, None, SEVEN), Inference(64, resize), masks=store)
    assert found.masks is store
    for number, image in enumerate(images):
        mask = store[f"i{number}"]
        assert mask.shape == image.shape[:2] and mask.dtype == np.uint8 and f"i{number}" in store
        logits = reference_logits(model, image, 64, resize)
        top = np.sort(logits, axis=0)
        sure = top[-1] - top[-2] > 1e-4
        assert sure.mean() > 0.9 and np.array_equal(mask[sure], logits.argmax(0)[sure])
        with Image.open(store.path(f"i{number}")) as picture:
            assert picture.mode == "P" and picture.getpalette()[:21] == SEVEN.palette[:7].ravel().tolist()


def test_a_mask_that_is_not_there_is_named(tmp_path):
    store = MaskStore(tmp_path, SEVEN)
    assert "x" not in store
    with pytest.raises(DataError, match=r"x\.png"):
        store["x"]
    (tmp_path / "y.png").write_bytes(b"half")
    with pytest.raises(DataError, match=r"y\.png"):
        store["y"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_prediction_names_the_image(value):
    images, masks = made_up(SIZES)
    rows = rows_of(images, masks, SEVEN)
    model = pointwise(SEVEN)

    def spoil(_: nn.Module, __: Any, out: Any) -> None:
        seen.append(len(out.logits))
        if sum(seen) > 4:
            out.logits[0, 3, 0, 0] = value

    for work in (score_pool, evaluate):
        seen: list[int] = []
        hook = model.net.register_forward_hook(spoil)
        with pytest.raises(DataError, match="'i4'.*not finite"):
            work(model, rows, Inference(64, batch_size=2))
        hook.remove()


def test_an_empty_pool_has_no_scores(some):
    found = score_pool(load_model("segformer-nano", SEVEN), some.train.select([]), Inference(48))
    assert len(found) == 0 and found.ids == [] and found.class_hist.shape == (0, 7)
    assert len(found.embedding) == 0


def test_further_scores_and_rows_by_id(some):
    def biggest(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return logits.amax((1, 2, 3))

    model = load_model("segformer-nano", SEVEN)
    found = score_pool(model, some.train, Inference(48), scorers={"biggest-max": biggest})
    assert set(found.scores) == {"entropy-mean", "margin-mean", "least_confidence-mean", "biggest-max"}
    part = found.take(["i5", "i2"])
    assert part.ids == ["i5", "i2"] and part.scores["biggest-max"].tolist() == [
        found.scores["biggest-max"][5],
        found.scores["biggest-max"][2],
    ]
    with pytest.raises(DataError, match="'nobody'"):
        found.take(["i1", "nobody"])
    assert found.take([]).ids == []


def test_passes_leave_no_trace(some, batchnorm_folder):
    """Buffers, weights and the global generators are as before, whatever mode the model was in."""
    for model in (load_model("segformer-nano", SEVEN), load_model(str(batchnorm_folder), SEVEN)):
        before = state(model)
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(1)
        model.train()
        score_pool(model, some.train, Inference(48, batch_size=3))
        model.train()
        evaluate(model, some.train, Inference(48, batch_size=3))
        assert equal(before, state(model)) and equal(before, state(model), "running_mean")
        assert torch.equal(torch.rand(2), expected)


# --- training ---------------------------------------------------------------------------------------------------------


def trained(data: Dataset, settings: TrainSettings, seed: int = 0, size: int = 48, **more: Any) -> Any:
    """A fresh small model after a training, and what the training says."""
    model = load_model("segformer-nano", SEVEN)
    result = fit(model, data, settings, Inference(size), seed=seed, **more)
    return model, result


def test_same_seed_same_weights(some):
    settings = TrainSettings(steps=3, batch_size=4)
    before = torch.get_rng_state()
    one, first = trained(some.train, settings)
    torch.manual_seed(99)
    np.random.seed(99)
    two, second = trained(some.train, settings)
    other, _ = trained(some.train, settings, seed=1)
    assert equal(state(one), state(two)) and first.train_loss == second.train_loss and first.history == second.history
    assert not equal(state(one), state(other))
    assert not one.training and first.steps == 3 and first.best_step is None and first.seconds > 0
    torch.set_rng_state(before)


def test_training_changes_every_parameter(some):
    model, _ = trained(some.train, TrainSettings(steps=3, batch_size=4))
    fresh = dict(load_model("segformer-nano", SEVEN).named_parameters())
    still = [n for n, p in model.named_parameters() if torch.equal(p, fresh[n])]
    assert not still, still


def test_no_step_looks_for_packages_on_disk(some, monkeypatch):
    import accelerate.optimizer

    def looked() -> bool:
        raise AssertionError("a step has asked whether an optimizer is installed")

    monkeypatch.setattr(accelerate.optimizer, "is_lomo_available", looked)
    assert trained(some.train, TrainSettings(steps=2, batch_size=4))[1].steps == 2


def test_frozen_statistics_stay(some, batchnorm_folder):
    settings = TrainSettings(steps=2, batch_size=4)
    model = load_model(str(batchnorm_folder), SEVEN)
    assert model.pretrained
    before = state(model)
    fit(model, some.train, settings, Inference(48))
    after = state(model)
    for name in [n for n in before if "running_" in n or "num_batches" in n]:
        assert torch.equal(before[name], after[name]) == name.startswith("net.mobilenet_v2."), name
    assert not equal(before, after, "mobilenet_v2.conv_stem.first_conv.convolution.weight")
    whole = load_model(str(batchnorm_folder), SEVEN)
    fit(whole, some.train, TrainSettings(steps=2, batch_size=4, batch_norm="freeze"), Inference(48))
    assert equal(before, state(whole), "running_")
    free = load_model(str(batchnorm_folder), SEVEN)
    fit(free, some.train, TrainSettings(steps=2, batch_size=4, batch_norm="train"), Inference(48))
    assert not equal(before, state(free), "mobilenet_v2.conv_stem.first_conv.normalization.running_mean")


def test_images_without_a_label_do_no_harm():
    images, masks = made_up([(48, 48)] * 4)
    rows = rows_of(images, [np.full_like(m, VOID) for m in masks], SEVEN)
    model, result = trained(rows, TrainSettings(steps=2, batch_size=2))
    assert result.train_loss == 0 and all(torch.isfinite(v).all() for v in state(model).values())


def test_epochs_replace_steps(some):
    assert recipe.total_steps(TrainSettings(steps=7), 100) == 7
    assert recipe.total_steps(TrainSettings(steps=7, epochs=2, batch_size=8), 20) == 5
    assert recipe.total_steps(TrainSettings(epochs=0.5, batch_size=8), 8) == 1
    _, result = trained(some.train, TrainSettings(steps=50, epochs=1, batch_size=4))
    assert result.steps == 2


def test_fewer_images_than_a_batch(some):
    _, result = trained(some.train.select([0]), TrainSettings(steps=2, batch_size=4))
    assert result.steps == 2 and math.isfinite(result.train_loss)


def test_no_steps_no_change(some):
    model, result = trained(some.train, TrainSettings(steps=0))
    assert result.steps == 0 and math.isnan(result.train_loss)
    assert equal(state(model), state(load_model("segformer-nano", SEVEN)))


@pytest.mark.parametrize(
    ("scheduler", "options", "expected"),  # of step 1, 2, ... 10, as shares of the full rate; two steps of warm-up
    [
        ("polynomial", {}, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("polynomial", {"scheduler_power": 2.0}, [0, 0.5, *[(n / 8) ** 2 for n in range(8, 0, -1)]]),
        ("linear", {}, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", {}, [0, 0.5, *[(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]]),
        ("constant_with_warmup", {}, [0, 0.5] + [1] * 8),
        ("constant", {}, [1] * 10),
    ],
)
def test_schedule(some, scheduler, options, expected, monkeypatch):
    used = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        used.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    settings = TrainSettings(
        steps=10, batch_size=1, scheduler=scheduler, warmup=0.2, learning_rate=1e-3, head_scale=10, **options
    )
    trained(some.train, settings, size=32)
    assert np.allclose([rates[0] for rates in used], np.array(expected) * 1e-3, atol=1e-9)
    assert np.allclose([rates[-1] for rates in used], np.array(expected) * 1e-2, atol=1e-8)


def test_best_weights_are_kept(some):
    settings = TrainSettings(steps=5, batch_size=4, eval_every=2, learning_rate=0.2, warmup=0.0, scheduler="constant")
    model, result = trained(some.train, settings, validation=some.val)
    looks = {h["step"]: h["eval_mean_iou"] for h in result.history if "eval_mean_iou" in h}
    assert {2, 4} <= set(looks) and result.best_step in looks
    assert looks[result.best_step] == max(looks.values())
    assert evaluate(model, some.val, Inference(48))["mean_iou"] == pytest.approx(max(looks.values()), abs=1e-9)


def test_looking_at_validation_changes_no_step(some):
    """The weights at a step are the same with and without looks at the validation images on the way."""
    blind, _ = trained(some.train, TrainSettings(steps=4, batch_size=4, scheduler="constant"))
    settings = TrainSettings(steps=4, batch_size=4, scheduler="constant", eval_every=1)
    seeing, result = trained(some.train, settings, validation=some.val)
    shorter = TrainSettings(steps=result.best_step, batch_size=4, scheduler="constant")
    expected = blind if result.best_step == 4 else trained(some.train, shorter)[0]
    assert equal(state(seeing), state(expected))


def test_rates_and_recipe_depend_on_the_start():
    scratch = load_model("segformer-nano", SEVEN)
    assert recipe.learning_rates(TrainSettings(), scratch) == (5e-3, 1.0)
    scratch.pretrained = True
    assert recipe.learning_rates(TrainSettings(), scratch) == (1e-4, 10.0)
    assert recipe.learning_rates(TrainSettings(learning_rate=1.0, head_scale=2.0), scratch) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("pretrained", "crop", "side", "scale"),
    [
        (False, 0.0, 72, (1.0, 2.0)),  # 0.75 * 96; scales (0.75, 1.5) of evaluation's, in units of the crop
        (True, 0.0, 96, (0.5, 2.0)),
        (True, 0.5, 48, (1.0, 4.0)),
        (True, 2.0, 192, (0.25, 1.0)),
    ],
)
def test_crop_is_a_share_of_the_evaluation_size(pretrained, crop, side, scale):
    model = load_model("segformer-nano", SEVEN)
    model.pretrained = pretrained
    transform = recipe.train_transform(TrainSettings(crop=crop), model, 96)
    assert transform.size == side and transform.scale == pytest.approx(scale)


@pytest.mark.parametrize("crop", [0.5, 0.75, 1.0, 1.5])
def test_scale_one_shows_things_as_large_as_evaluation(crop):
    """At scale 1 a crop of an image of evaluation size is a cut-out of it, pixel by pixel, or the image in padding."""
    mask = np.random.default_rng(0).integers(0, 7, (64, 64), dtype=np.uint8)
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    settings = TrainSettings(crop=crop, augment={"scale": (1, 1), "flip": 0, "jitter": 0})
    transform = recipe.train_transform(settings, load_model("segformer-nano", SEVEN), 64)
    out = transform({"id": "a", "image": png(image), "mask": png(mask)}, np.random.default_rng(1))
    seen, side = out["labels"].numpy(), round(crop * 64)
    assert seen.shape == (side, side)
    small, large = (seen, mask) if side <= 64 else (mask, seen)
    windows = np.lib.stride_tricks.sliding_window_view(large, small.shape)
    assert (windows == small).all((-2, -1)).sum() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "cosin"}, "cosine"),
        ({"precision": "fp64"}, "bf16"),
        ({"steps": -1}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"warmup": 1.5}, "warmup"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"eval_every": 2}, "validation"),
        ({"early_stopping": 2}, "eval_every"),
        ({"augment": {"blur": 1}}, "augment"),
        ({"augment": {"scale": 2}}, "augment"),
        ({"batch_norm": "frozen"}, "freeze_encoder"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_settings_get_one_clear_line(some, settings, message):
    with pytest.raises(ConfigError) as caught:
        trained(some.train, TrainSettings(**{"steps": 1, "batch_size": 2, **settings}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_bad_input(some):
    with pytest.raises(DataError, match="nothing to train on"):
        trained(some.train.select([]), TrainSettings(steps=1))
    with pytest.raises(ConfigError, match="not usable"):
        pick_device("cuda:77")
    with pytest.raises((RunError, DataError), match="diverged|not finite"):
        trained(some.train, TrainSettings(steps=4, learning_rate=1e30, max_grad_norm=0, warmup=0.0))


def test_decoded_and_raw_rows_train_alike():
    toy = toy_images(32)
    results = []
    for rows in (toy.train, raw_rows(toy.train)):
        model = load_model("segformer-nano", toy.labels)
        results.append(fit(model, rows, TrainSettings(steps=2, batch_size=2), Inference(32)).train_loss)
    assert results[0] == results[1]


# --- fault 35: what cannot work is refused before anything is started or written --------------------------------------

IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "num_workers": {"num_workers": 10**6},
    "batch_size": {"batch_size": 10**9},
    "more images than there are": {"batch_size": 1_000},
    "eval_batch_size": {"eval_batch_size": 10**9},
    "crop": {"crop": 1e-6},
    "image_size": {"image_size": 10**6},
    "device": {"device": "meta"},
    "steps": {"steps": 10**15},
    "epochs": {"epochs": 1e300},
    "fp16": {"precision": "fp16", "device": "cpu"},
    "batch norm": {"batch_size": 1},
    "freeze": {"batch_norm": "frozen"},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_fault_35_impossible_settings_write_nothing(what, batchnorm_folder, tmp_path):
    given = {
        "dataset": "toy",
        "model": str(batchnorm_folder),
        "val_share": 0,
        "image_size": 32,
        "steps": 1,
        "gallery": 0,
    }
    with pytest.raises(ConfigError) as caught:
        run = {**given, "batch_size": 2, "output_dir": str(tmp_path / "run"), **IMPOSSIBLE[what]}
        list(run_baseline(make_config(run)))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    named = next(iter(IMPOSSIBLE[what]))
    assert named in str(caught.value)


def test_fault_35_bounds_leave_room():
    """Sixteen loader processes, large batches and small crops are nobody's mistake."""
    TrainSettings(num_workers=16, batch_size=512, crop=0.1).check(96)
    Inference(1024, batch_size=64, num_workers=16).check()


def test_a_size_that_the_network_cannot_take_is_one_line(tmp_path):
    """A network of positions takes its own size only."""
    vit = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    config = Data2VecVisionConfig(
        **vit, image_size=32, patch_size=8, num_labels=7, out_indices=[1, 2, 3, 4], use_auxiliary_head=False
    )
    Data2VecVisionForSemanticSegmentation(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), SEVEN)
    for ask in (
        lambda: train.try_once(model, TrainSettings(steps=0), Inference(48)),
        lambda: evaluate(model, toy_images().test, Inference(48)),
    ):
        with pytest.raises(ConfigError, match=r"48 x 48 px.*image_size.*made for 32") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_trying_leaves_no_trace(batchnorm_folder):
    for name in ("segformer-nano", str(batchnorm_folder)):
        model = load_model(name, SEVEN)
        before, random = state(model), torch.get_rng_state()
        train.try_once(model, TrainSettings(batch_size=2), Inference(32), n_images=8)
        assert equal(before, state(model)) and torch.equal(random, torch.get_rng_state()) and not model.training
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_that_the_memory_cannot_hold_is_counted(monkeypatch):
    """What a picture takes is measured; a machine of 100 MB holds some of them."""
    model = load_model("segformer-nano", SEVEN)
    monkeypatch.setattr("vlm_itl.model.train.memory_here", lambda: 10**8)
    with pytest.raises(ConfigError, match=r"batch_size=64.* MiB in training"):
        train.try_once(model, TrainSettings(batch_size=64), Inference(128))
    train.try_once(model, TrainSettings(batch_size=2), Inference(128))
