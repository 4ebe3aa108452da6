"""Mean IoU by one bincount against the ways of `evaluate` and torchmetrics, side by side on the same masks.

Run as `python benchmarks/bench_metrics.py [repeats]`: one thread, medians, one JSON row a line with the keys
{part, ours, peer, unit, ratio, goal, holds}. Ratios travel between machines; milliseconds do not. `evaluate` fetches
its metric from the Hub, so its formula (three histograms an image) stands in for it here; the library adds the time to
write and read each mask as a picture, so the true ratio is larger. The ways take turns, image by image, so that a busy
machine is busy for all of them.
"""

import json
import sys
import time
from statistics import median

import numpy as np
import torch
from torchmetrics import JaccardIndex

from vlm_itl.model.metrics import ConfusionMatrix, class_iou, count_pairs

C, H, W, VOID = 21, 375, 500, 255


def made_up_masks(count: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    "Predictions and truths of the size of a VOC photo: blocks of classes, void lines, a fifth of the pixels wrong."
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        truth = np.kron(rng.integers(0, C, (15, 20)), np.ones((25, 25))).astype(np.uint8)
        prediction = np.where(rng.random((H, W)) < 0.8, truth, 3).astype(np.uint8)
        truth[:, ::25] = VOID
        pairs.append((prediction, truth))
    return pairs


def evaluate_way(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    "Hits, predictions and truths of one image by histogram, as `evaluate`'s mean_iou counts them: (3, C)."
    known = truth != VOID
    prediction, truth = prediction[known], truth[known]
    parts = prediction[prediction == truth], prediction, truth
    return np.stack([np.histogram(part, bins=C, range=(0, C - 1))[0] for part in parts])


def milliseconds(ways, repeats: int) -> list[float]:
    "Median time of one image for each way, a pair of a function and its images."
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats + 1):
        for index in range(len(ways[0][1])):
            for (function, pairs), taken in zip(ways, times, strict=True):
                start = time.perf_counter()
                function(*pairs[index])
                taken.append(1000 * (time.perf_counter() - start))
    images = len(ways[0][1])
    return [median(taken[images:]) for taken in times]  # the first round over the images warms up


def row(part: str, ours: float, peer: float, unit: str, ratio: float, goal: str, holds: bool) -> None:
    "Print one result as a line of JSON."
    values = {"part": part, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "goal": goal, "holds": holds}
    print(json.dumps(values))


def main(repeats: int = 5) -> None:
    "Time, then equality."
    torch.set_num_threads(1)
    pairs = made_up_masks()
    as_tensors = [(torch.tensor(p).long(), torch.tensor(t).long()) for p, t in pairs]
    matrix, jaccard = ConfusionMatrix(C), JaccardIndex("multiclass", num_classes=C, ignore_index=VOID)
    ways = [(matrix.update, pairs), (matrix.update, as_tensors), (evaluate_way, pairs), (jaccard.update, as_tensors)]
    ours, wide, theirs, torchmetrics = milliseconds(ways, repeats)
    row(
        "mIoU, uint8 masks, against evaluate's way",
        round(ours, 3),
        round(theirs, 3),
        "ms/image",
        round(theirs / ours, 1),
        ">= 8",
        theirs / ours >= 8,
    )
    row(
        "mIoU, uint8 masks, against torchmetrics",
        round(ours, 3),
        round(torchmetrics, 3),
        "ms/image",
        round(torchmetrics / ours, 1),
        ">= 8",
        torchmetrics / ours >= 8,
    )
    row(
        "mIoU, int64 tensors, against torchmetrics",
        round(wide, 3),
        round(torchmetrics, 3),
        "ms/image",
        round(torchmetrics / wide, 1),
        "none",
        True,
    )

    hits, predicted, true = sum(evaluate_way(p, t) for p, t in pairs).astype(float)
    peer_iou = hits / (predicted + true - hits)
    our_iou = class_iou(sum(count_pairs(p, t, C) for p, t in pairs))
    difference = float(np.nanmax(np.abs(our_iou - peer_iou)))
    row(
        "mIoU, largest difference of a class",
        float(np.nanmean(our_iou)),
        float(np.nanmean(peer_iou)),
        "IoU",
        difference,
        "<= 1e-9",
        difference <= 1e-9,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
