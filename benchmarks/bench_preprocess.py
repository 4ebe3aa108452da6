"""From files to tensors: the transforms against the way of the scripts this library replaces, and albumentations.

Run as `VLM_ITL_SHARED=... python benchmarks/bench_preprocess.py [repeats]` (a minute): 40 photographs of PASCAL VOC
2012 with their masks, once as palette pictures and once as RGB, which is what the Hub's copy of VOC holds; generated
scenes where there are no photographs. One thread, CPU time, turns in one process; rows as in table.py.

The plain way, restated: the RGB mask is compared with each of the 21 colours, then `SegformerImageProcessor` makes both
tensors. albumentations (settings.ini, extra_peers) gets the same functions: a random crop of a random size, resized,
mirrored, its colours changed.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch read it

import numpy as np
import torch
from PIL import Image
from table import Row, compare, publish, same, take_turns
from transformers import SegformerImageProcessor

from vlm_itl.data import masks, transforms
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import read_image, read_mask
from vlm_itl.data.scenes import make_scenes
from vlm_itl.data.transforms import EvalTransform, TrainTransform

SHARED = Path(os.environ.get("VLM_ITL_SHARED", "../shared"))
VOC, SIZE, COUNT = LabelSpace.voc(), 512, 40
COLOURS = np.asarray(VOC.palette, dtype=np.uint8)[: len(VOC)]


def pairs(colour: Path) -> list[dict[str, Any]]:
    "Rows of id, photograph, palette mask, and the same mask written as RGB into a folder."
    root = SHARED / "data/VOCdevkit/VOC2012"
    root = root if root.is_dir() else make_scenes(n_train=COUNT, n_test=1, size=(500, 500))
    rows = []
    for path in sorted((root / "SegmentationClass").glob("*.png"))[:COUNT]:
        Image.open(path).convert("RGB").save(colour / path.name)
        image = root / f"JPEGImages/{path.stem}.jpg"
        rows.append({"id": path.stem, "image": str(image), "mask": str(path), "rgb": str(colour / path.name)})
    return rows


def plain_mask(path: str) -> np.ndarray:
    "Class indices of an RGB mask, one colour at a time; 255 where none fits."
    picture = np.asarray(Image.open(path).convert("RGB"))
    indices = np.full(picture.shape[:2], 255, dtype=np.uint8)
    for index, colour in enumerate(COLOURS):
        indices[(picture == colour).all(axis=-1)] = index
    return indices


def plain_way(rows: list[dict[str, Any]], processor: Any) -> None:
    "Photograph and RGB mask to tensors."
    for row in rows:
        picture = np.asarray(Image.open(row["image"]).convert("RGB"))
        processor(picture, segmentation_maps=plain_mask(row["rgb"]), return_tensors="pt")


def first_looks(transform: Callable[..., Any], rows: list[dict[str, Any]]) -> None:
    "Every file as if it were met for the first time."
    masks._MASKS.forget()
    transforms._SQUARES.forget()
    for row in rows:
        transform(row)


def evaluation_rows(rows: list[dict[str, Any]], repeats: int) -> list[Row]:
    "No augmentation."
    processor = SegformerImageProcessor(size={"height": SIZE, "width": SIZE}, do_reduce_labels=False)
    transform = EvalTransform(SIZE, "stretch", VOC)
    unlike = max(int((read_mask(row["rgb"], VOC) != plain_mask(row["rgb"])).sum()) for row in rows)
    coloured = [{**row, "mask": row["rgb"]} for row in rows]
    seconds = take_turns(
        {
            "palette": lambda: first_looks(transform, rows),
            "rgb": lambda: first_looks(transform, coloured),
            "plain": lambda: plain_way(rows, processor),
        },
        repeats,
    )
    each = {name: [1e3 * value / len(rows) for value in found] for name, found in seconds.items()}
    return [
        same("masks read from RGB: pixels that differ", float(unlike)),
        compare(f"preprocessing at {SIZE}, RGB masks", each["rgb"], each["plain"], "ms/image", ">= 8"),
        compare(f"preprocessing at {SIZE}, palette masks", each["palette"], each["plain"], "ms/image", ">= 8"),
    ]


def albumentations_way(size: int) -> Callable[[dict[str, Any]], Any]:
    "The same functions by albumentations, from files to tensors."
    import albumentations as A

    compose = A.Compose(
        [
            A.RandomResizedCrop(size=(size, size), scale=(0.25, 1.0), ratio=(1, 1)),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.025, p=1),
        ]
    )

    def one(row: dict[str, Any]) -> torch.Tensor:
        found = compose(image=np.asarray(read_image(row["image"])), mask=read_mask(row["mask"], VOC))
        return torch.from_numpy(found["image"].transpose(2, 0, 1).copy()), torch.from_numpy(found["mask"])

    return one


def training_rows(rows: list[dict[str, Any]], repeats: int) -> list[Row]:
    "With augmentation: crops of a quarter to the whole of the picture."
    if importlib.util.find_spec("albumentations") is None:
        print("albumentations is not installed: pip install -e '.[peers]'; its rows are left out.")
        return []
    found, rng = [], np.random.default_rng(0)
    for size in (SIZE, 160):
        ours, theirs = TrainTransform(size, VOC, scale=(1.0, 2.0)), albumentations_way(size)
        seconds = take_turns(
            {"ours": lambda o=ours: [o(row, rng) for row in rows], "theirs": lambda t=theirs: [t(row) for row in rows]},
            repeats,
        )
        each = [[1e3 * value / len(rows) for value in seconds[name]] for name in ("ours", "theirs")]
        found.append(compare(f"augmentation at {size} / albumentations", *each, "ms/image", "<= 1.1"))
    return found


def main(repeats: int = 5) -> list[Row]:
    "All rows."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = pairs(Path(folder))
        return [*evaluation_rows(rows, repeats), *training_rows(rows, repeats)]


if __name__ == "__main__":
    publish(main(*map(int, sys.argv[1:2])))
