"""Transforms: geometry, exact repetition, and the way back to the original pixels."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import _MASKS, _Runs, make_rows, raw_rows, read_mask
from vlm_itl.data.sources import SegData, load_data, toy_images
from vlm_itl.data.transforms import (
    _SQUARES,
    EvalTransform,
    TrainingSet,
    TrainTransform,
    _largest_so_far,
    collate,
    largest_class,
    unpad_one,
)

TOY = toy_images()
LABELS = LabelSpace(tuple(f"class {index}" for index in range(200)))


def coordinates(width: int, height: int) -> dict[str, Any]:
    """A row whose red is the column and whose mask is the row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    mask = np.broadcast_to(np.arange(height, dtype=np.uint8)[:, None], (height, width)).copy()
    return {"id": "grid", "image": Image.fromarray(pixels), "mask": mask}


@pytest.mark.parametrize(("width", "height"), [(200, 150), (90, 199), (31, 17), (1, 40), (64, 64)])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_image_and_labels_stay_together(width: int, height: int, size: int) -> None:
    """Green holds the original row, so it must agree with the label wherever the label is not void."""
    transform = TrainTransform(size, LABELS, jitter=0)
    for draw in range(20):
        out = transform(coordinates(width, height), make_rng(0, draw))
        assert out["pixel_values"].shape == (3, size, size) and out["pixel_values"].dtype == torch.uint8
        assert out["labels"].shape == (size, size) and out["labels"].dtype == torch.uint8
        inside = out["labels"] != VOID
        assert inside.any()
        apart = (out["pixel_values"][1].int() - out["labels"].int()).abs()[inside]
        assert apart.float().mean() <= 2 + height / size  # bilinear against nearest, at strong shrinking
        padding = out["pixel_values"][:, ~inside]
        assert (padding == 128).all()


def test_scale_one_shows_what_evaluation_shows() -> None:
    row = coordinates(100, 60)
    train = TrainTransform(64, LABELS, scale=(1, 1), flip=0, jitter=0)(row, make_rng(0))
    shown = EvalTransform(64)(row)
    height, width = shown["box"]
    assert (height, width) == (38, 64)
    rows = torch.nonzero((train["labels"] != VOID).any(dim=1)).ravel()
    assert len(rows) == height
    ours = train["pixel_values"][:, rows[0] : rows[0] + height].int()
    assert (ours - shown["pixel_values"][:, :height].int()).abs().max() <= 1


def test_every_random_part_can_be_off_without_moving_the_rest() -> None:
    row = coordinates(180, 140)
    one = TrainTransform(64, LABELS, flip=0, jitter=0.3)(row, make_rng(4))
    other = TrainTransform(64, LABELS, flip=0, jitter=0)(row, make_rng(4))
    assert torch.equal(one["labels"], other["labels"])
    mirrored = TrainTransform(64, LABELS, flip=1, jitter=0)(row, make_rng(4))
    assert torch.equal(mirrored["labels"].flip(-1), other["labels"])


def test_a_window_of_void_is_drawn_again() -> None:
    row = coordinates(200, 200)
    row["mask"] = np.full((200, 200), VOID, dtype=np.uint8)
    row["mask"][:, :60] = 1
    transform = TrainTransform(32, LABELS, scale=(4, 4))
    assert all((transform(row, make_rng(draw))["labels"] == 1).any() for draw in range(40))
    row["mask"][:] = VOID
    assert (transform(row, make_rng(0))["labels"] == VOID).all()  # nothing to find: given up after some tries


def test_with_transform_repeats_and_varies() -> None:
    def draws() -> list[torch.Tensor]:
        rows = TOY.train.with_transform(TrainTransform(16, TOY.labels, seed=3))
        return [rows[1]["pixel_values"], rows[1]["pixel_values"], rows[2]["pixel_values"]]

    first, second = draws(), draws()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    training = TrainingSet(TOY.train, TrainTransform(16, TOY.labels), length=18, seed=3)
    options: dict[str, Any] = {"batch_size": 4, "collate_fn": collate}
    alone = list(DataLoader(training, **options))
    loader = DataLoader(training, num_workers=workers, persistent_workers=True, **options)
    for _ in range(2):  # the second pass over persistent workers as well
        for one, other in zip(alone, loader, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in ("pixel_values", "labels"))


def test_training_set_is_a_function_of_the_index() -> None:
    make = lambda: TrainingSet(TOY.train, TrainTransform(16, TOY.labels), length=100, seed=1)  # noqa: E731
    forward = [item["pixel_values"] for item in map(make().__getitem__, range(12))]
    backward = [item["pixel_values"] for item in map(make().__getitem__, reversed(range(12)))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    order = [make().row_index(index) for index in range(40)]
    epochs = [order[start : start + 4] for start in range(0, 40, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 3
    other = TrainingSet(TOY.train, TrainTransform(16, TOY.labels), length=100, seed=2)
    assert [other.row_index(index) for index in range(40)] != order
    copy = pickle.loads(pickle.dumps(make()))
    assert torch.equal(copy[5]["pixel_values"], forward[5])
    with pytest.raises(IndexError):
        make()[100]
    assert len(list(iter(make()))) == 100


def test_training_set_takes_pseudo_labels() -> None:
    """Rows may be any sequence, and a mask an array: that is how a predicted mask is trained on."""
    rows = [{**raw_rows(TOY.train)[index], "mask": np.full((8, 8), 2, dtype=np.uint8)} for index in range(2)]
    training = TrainingSet(rows, TrainTransform(16, TOY.labels), length=4)
    assert all(set(training[index]["labels"].unique().tolist()) <= {2, VOID} for index in range(4))
    rows[0]["mask"] = np.zeros((7, 8), dtype=np.uint8)
    with pytest.raises(DataError, match="toy-0"):
        [TrainingSet(rows, TrainTransform(16, TOY.labels), length=4)[index] for index in range(4)]


def test_trainer_reads_a_training_set_in_order(tmp_path: Path) -> None:
    """`Trainer` with the sequential strategy sees draw 0, 1, 2, ... and survives the missing `id`."""
    from transformers import Trainer, TrainingArguments

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Conv2d(3, 3, 1)
            self.seen: list[torch.Tensor] = []

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            self.seen.append(pixel_values.clone())
            logits = self.net(pixel_values.float() / 255)
            return {"loss": F.cross_entropy(logits, labels.long(), ignore_index=VOID), "logits": logits}

    training = TrainingSet(TOY.train, TrainTransform(16, TOY.labels), length=8, seed=0)
    model = Tiny()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, train_sampling_strategy="sequential",
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=training, data_collator=collate).train()
    expected = torch.stack([training[index]["pixel_values"] for index in range(8)])
    assert torch.equal(torch.cat(model.seen), expected)


@pytest.mark.parametrize("resize", ["keep", "stretch"])
def test_eval_transform(resize: str) -> None:
    out = EvalTransform(64, resize, labels=LABELS)(coordinates(100, 60))
    assert out["native"] == (60, 100) and out["mask"].shape == (60, 100)
    assert out["box"] == ((38, 64) if resize == "keep" else (64, 64))
    assert (out["pixel_values"][:, out["box"][0] :] == 128).all()
    assert "mask" not in EvalTransform(64, resize)(coordinates(100, 60))


def test_eval_transform_never_reads_masks_it_was_not_asked_for(tmp_path: Path) -> None:
    Image.new("RGB", (10, 8)).save(tmp_path / "a.png")
    rows = make_rows(["a"], [tmp_path / "a.png"], [tmp_path / "absent.png"])
    assert EvalTransform(16)(rows[0])["native"] == (8, 10)
    assert rows.with_transform(EvalTransform(16))[0]["id"] == "a"
    with pytest.raises(DataError, match=r"absent\.png"):
        EvalTransform(16, labels=TOY.labels)(rows[0])


def test_collate_keeps_native_masks_as_a_list() -> None:
    transform = EvalTransform(32, labels=LABELS)
    batch = collate([transform(coordinates(40, 30)), transform(coordinates(20, 50))])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["native"] == [(30, 40), (50, 20)] and [mask.shape for mask in batch["mask"]] == [(30, 40), (50, 20)]


def reference(logits: np.ndarray, box: tuple[int, int], size: int, native: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation written out, one output pixel at a time."""
    out = np.zeros((logits.shape[0], *native))
    cells = [box[axis] * logits.shape[axis + 1] / size for axis in (0, 1)]
    last = [int(np.ceil(cells[axis] - 1e-9)) - 1 for axis in (0, 1)]
    for y, x in itertools.product(range(native[0]), range(native[1])):
        weights = []
        for axis, place in ((0, y), (1, x)):
            where = max(0.0, (place + 0.5) * cells[axis] / native[axis] - 0.5)
            low = min(int(where), last[axis])
            weights.append(((low, 1 - (where - low)), (min(low + 1, last[axis]), where - low)))
        for (row, a), (column, b) in itertools.product(*weights):
            out[:, y, x] += a * b * logits[:, row, column]
    return out


@pytest.mark.parametrize("grid", [8, 16, 17, 32])
@pytest.mark.parametrize("native", [(37, 50), (50, 37), (9, 9), (3, 50), (64, 64)])
def test_unpad_is_bilinear(grid: int, native: tuple[int, int]) -> None:
    size = 64
    box = EvalTransform(size)({"id": "x", "image": Image.new("RGB", native[::-1])})["box"]
    logits = torch.randn(2, grid, grid, generator=torch.Generator().manual_seed(0))
    ours = unpad_one(logits, box, size, native)
    assert ours.shape == (2, *native)
    assert np.allclose(ours.numpy(), reference(logits.numpy(), box, size, native), atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_unpad_never_misses_a_row(seed: int) -> None:
    """Any size comes back whole, whatever the rounding."""
    generator = np.random.default_rng(seed)
    for _ in range(200):
        native = tuple(int(side) for side in generator.integers(1, 700, 2))
        size = int(generator.choice([32, 96, 128, 256, 513]))
        grid = int(generator.integers(2, size + 1))
        box = tuple(max(1, round(side * size / max(native))) for side in native)
        out = unpad_one(torch.zeros(1, grid, grid), (box[0], box[1]), size, (native[0], native[1]))
        assert out.shape == (1, *native)


def test_real_voc_goes_there_and_back(voc: Path) -> None:
    """One-hot logits of real masks through the square of 256 and back: nearly every labelled pixel survives."""
    data = load_data(str(voc), options={"max_test": 12})
    agree = []
    for row in data.test:
        shown = EvalTransform(256)(row)
        height, width = shown["box"]
        small = np.asarray(Image.fromarray(row["mask"]).resize((width, height), Image.Resampling.NEAREST))
        square = torch.zeros(256, 256, dtype=torch.long)
        square[:height, :width] = torch.from_numpy(np.where(small == VOID, 0, small).astype(np.int64))
        logits = F.one_hot(square, 21).permute(2, 0, 1).float()
        back = unpad_one(logits, shown["box"], 256, shown["native"]).argmax(0).numpy()
        labelled = row["mask"] != VOID
        agree.append((back == row["mask"])[labelled].mean())
    assert np.mean(agree) > 0.985


@pytest.mark.parametrize(
    "arguments",
    [{"size": 4}, {"scale": (0, 1)}, {"scale": (2, 1)}, {"flip": 2}, {"jitter": 1.0}, {"size": 64.5}],
)
def test_impossible_transforms(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainTransform(**{"size": 64, "labels": TOY.labels, **arguments})


def test_impossible_sets() -> None:
    with pytest.raises(ConfigError):
        TrainingSet([], TrainTransform(16, TOY.labels), length=3)
    with pytest.raises(ConfigError):
        TrainingSet(TOY.train, TrainTransform(16, TOY.labels), length=0)
    with pytest.raises(ConfigError, match="keep"):
        EvalTransform(32, "crop")


def test_binary_labels_in_training(scenes_small: SegData) -> None:
    row = raw_rows(scenes_small.train)[0]
    out = TrainTransform(64, scenes_small.labels, binary=True)(row, make_rng(0))
    assert set(out["labels"].unique().tolist()) <= {0, 1, VOID}


# --- what is kept between two looks -----------------------------------------------------------------------------------


def test_runs_give_every_mask_back() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((1, 1), (3, 5), (40, 60))]
    masks += [np.repeat(mask, 9, axis=1) for mask in masks] + [np.full((30, 20), VOID, np.uint8)]
    for mask in masks:
        for view in (mask, mask[:, ::-1]):
            packed = _Runs.of(view)
            back = packed.unpack()
            assert np.array_equal(back, view) and back.dtype == np.uint8 and packed.bytes <= max(5, view.size)
            back[:] = 7
            assert np.array_equal(packed.unpack(), view)


def old(path: Path) -> None:
    """A file is not kept in the moment in which it was written."""
    os.utime(path, (0, 0))
    time.sleep(0.06)


def test_a_file_that_has_changed_is_looked_at_again(tmp_path: Path) -> None:
    image, mask, transform = tmp_path / "a.png", tmp_path / "a_mask.png", EvalTransform(32, labels=LABELS)
    row = {"id": "a", "image": str(image), "mask": str(mask)}

    def write(shade: int, side: int) -> None:
        Image.new("RGB", (side, 20), (shade, 0, 0)).save(image)
        Image.fromarray(np.full((20, side), shade, np.uint8)).save(mask)
        for path in (image, mask):
            old(path)

    write(10, 40)
    first, again = transform(row), transform(row)
    assert _SQUARES.kept and _MASKS.kept and all(first[key] == again[key] for key in ("box", "native"))
    first["pixel_values"][:], first["mask"][:] = 0, 0  # what is done to an answer does not spoil the next one
    assert torch.equal(again["pixel_values"], transform(row)["pixel_values"]) and again["mask"].max() == 10
    for shade, side in ((11, 40), (11, 44)):
        write(shade, side)
        new = transform(row)
        assert new["native"] == (20, side) and new["pixel_values"][0, 0, 0] == shade and (new["mask"] == shade).all()
        assert (read_mask(str(mask), LABELS) == shade).all()
    image.unlink()
    with pytest.raises(DataError, match="no such file"):
        transform(row)


@pytest.mark.parametrize("classes", [1, 2, 21, 150, 254])
def test_the_first_of_the_largest_classes(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    for shape in ((1, 1), (7, 5), (33, 20)):
        logits = (3 * torch.randn(classes, *shape, generator=generator)).round()  # many are alike
        first = torch.from_numpy(logits.numpy().argmax(0)).to(torch.uint8)
        assert torch.equal(largest_class(logits), first) and torch.equal(_largest_so_far(iter(logits)), first)
        turned = logits.transpose(1, 2)
        assert torch.equal(largest_class(turned), first.T)
        assert torch.equal(largest_class(logits.bfloat16().requires_grad_()), first)  # small whole numbers are kept
