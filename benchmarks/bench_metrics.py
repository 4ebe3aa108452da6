"""Mean IoU by one table of counts against the formula of `evaluate` and against torchmetrics, on the same real masks.

Run as `python benchmarks/bench_metrics.py [repeats] [JSON]` (half a minute): one thread, CPU time, each way over all
images by turns, rows as in table.py; equality of every class first. `evaluate` fetches its metric from the Hub, so its
formula (three histograms an image) stands in for it here; the library adds the time to write and read each mask as a
picture, so the true ratio is larger.

Truths are the masks of PASCAL VOC 2012 and predictions are what Grounded-SAM made of the same photographs, where
VLM_ITL_SHARED has both; else truths of generated scenes and the same drawn at a quarter of their size. Masks of which
a fifth of the pixels are noise, which no model draws, are the hard case for counting by runs, and are for reading only.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch read it

import numpy as np
import torch
from PIL import Image
from table import Row, compare, publish, same, take_turns
from torchmetrics import JaccardIndex

from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import read_mask
from vlm_itl.data.scenes import make_scenes
from vlm_itl.model.metrics import ConfusionMatrix, class_iou

SHARED = Path(os.environ.get("VLM_ITL_SHARED", "nowhere"))
LABELS = LabelSpace.voc()
C, VOID, COUNT = len(LABELS), 255, 60

Pair = tuple[np.ndarray, np.ndarray]  # (H, W) uint8: prediction, truth


def real_masks() -> list[Pair]:
    "Masks of a foundation model and of people, of the same photographs; none where they are not at hand."
    truths, predictions = SHARED / "data/VOCdevkit/VOC2012/SegmentationClass", SHARED / "data/grounded_sam_voc"
    found = [path for path in sorted(predictions.glob("*.png")) if (truths / path.name).is_file()][:COUNT]
    return [(read_mask(path, LABELS), read_mask(truths / path.name, LABELS)) for path in found]


def scene_masks() -> list[Pair]:
    "Truths of generated scenes, and the same drawn at a quarter of their size."
    root = make_scenes(n_train=COUNT, n_test=1, size=(500, 500))
    truths = [read_mask(path, LABELS) for path in sorted((root / "SegmentationClass").glob("*.png"))[:COUNT]]
    known = [np.where(truth == VOID, 0, truth) for truth in truths]
    quarter = [Image.fromarray(mask).resize((mask.shape[1] // 4, mask.shape[0] // 4), 0) for mask in known]
    return [(np.asarray(small.resize(t.shape[::-1], 0)), t) for small, t in zip(quarter, truths, strict=True)]


def noisy(pairs: list[Pair]) -> list[Pair]:
    "The same with a fifth of the predicted pixels at random."
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, C, p.shape, dtype=np.uint8) for p, _ in pairs]
    return [(np.where(rng.random(p.shape) < 0.8, p, n), t) for (p, t), n in zip(pairs, noise, strict=True)]


def evaluate_way(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    "Hits, predictions and truths of one image by histogram, as `evaluate`'s mean_iou counts them: (3, C)."
    known = truth != VOID
    prediction, truth = prediction[known], truth[known]
    parts = prediction[prediction == truth], prediction, truth
    return np.stack([np.histogram(part, bins=C, range=(0, C - 1))[0] for part in parts])


def over(count: Callable[[object, object], object], pairs: list[tuple[object, object]]) -> None:
    "All images, one at a time."
    for prediction, truth in pairs:
        count(prediction, truth)


def equality(what: str, pairs: list[Pair]) -> Row:
    "Of the IoU of each class, by us and by `evaluate`'s formula."
    hits, predicted, true = sum(evaluate_way(p, t) for p, t in pairs).astype(float)
    union, matrix = predicted + true - hits, ConfusionMatrix(C)
    over(matrix.update, pairs)
    theirs = np.divide(hits, union, out=np.full(C, np.nan), where=union > 0)
    ours = class_iou(matrix.counts)
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    return same(f"mIoU, {what}: a class, ours and evaluate's formula", float(np.nanmax(np.abs(ours - theirs))), 1e-9)


def speed(what: str, pairs: list[Pair], goal: str, repeats: int) -> Iterator[Row]:
    "Bytes and wide numbers against both peers."
    tensors = [(torch.tensor(p).long(), torch.tensor(t).long()) for p, t in pairs]
    jaccard = JaccardIndex("multiclass", num_classes=C, ignore_index=VOID)
    ways = {
        "ours": partial(over, ConfusionMatrix(C).update, pairs),
        "evaluate": partial(over, evaluate_way, pairs),
        "ours, int64": partial(over, ConfusionMatrix(C).update, tensors),
        "torchmetrics": partial(over, jaccard.update, tensors),
    }
    taken = {
        name: [1000 * seconds / len(pairs) for seconds in turns] for name, turns in take_turns(ways, repeats).items()
    }
    yield compare(f"mIoU, {what} / evaluate's formula", taken["ours"], taken["evaluate"], "ms/image", goal)
    yield compare(f"mIoU, {what} / torchmetrics", taken["ours"], taken["torchmetrics"], "ms/image", goal)
    both = (taken["ours, int64"], taken["torchmetrics"])
    yield compare(f"mIoU, {what}, int64 tensors / torchmetrics", *both, "ms/image", "none")


def main(repeats: int = 5) -> list[Row]:
    "Equality, then time."
    torch.set_num_threads(1)
    pairs = real_masks()
    what = "masks of photographs" if pairs else "masks of scenes"
    pairs = pairs or scene_masks()
    noise = noisy(pairs)
    equal = [equality(what, pairs), equality("noise", noise)]
    return [*equal, *speed(what, pairs, ">= 8", repeats), *speed("noise", noise, "none", 2)]


if __name__ == "__main__":
    publish(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5), sys.argv[2] if len(sys.argv) > 2 else None)
