"""What scores and selects cost, side by side with the plain way of doing the same.

Run as `python benchmarks/bench_sampler.py [N [k]]` (default 10000 images, 500 picks: a minute, and 0.4 GB for the full
matrix): one thread, CPU time, medians, one JSON row a line with the keys {part, ours, peer, unit, ratio, goal, holds}.
The peers here are formulas, not libraries: three softmaxes, T full forward passes, the full distance matrix.
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from vlm_itl.labels import LabelSpace
from vlm_itl.model import Segmenter
from vlm_itl.sampler import kcenter_greedy
from vlm_itl.scores import make_second_look
from vlm_itl.train import uncertainty_maps

T = 10  # looks


def cpu_seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    "Median CPU time of a call, after one to warm up."
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return median(times)


def row(part: str, ours: float, peer: float, ratio: float, goal: str, holds: bool) -> None:
    "Print one line."
    record = {"part": part, "ours": round(1e3 * ours, 2), "peer": round(1e3 * peer, 2), "unit": "ms"}
    print(json.dumps({**record, "ratio": round(ratio, 4), "goal": goal, "holds": holds}), flush=True)


def full_matrix(points: np.ndarray, k: int) -> list[int]:
    "K-center by the matrix of all distances; starts nearest the mean."
    squared = (points**2).sum(1)
    distance = squared[:, None] + squared - 2 * points @ points.T
    picks = [int(((points - points.mean(0)) ** 2).sum(1).argmin())]
    while len(picks) < k:
        nearest = distance[:, picks].min(1)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return picks


def main(n: int = 10_000, k: int = 500) -> None:
    "All rows."
    torch.set_num_threads(1)
    labels = LabelSpace.voc()
    net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=len(labels)))  # the size of B0
    model = Segmenter(net, labels, name="b0").eval()
    pixels = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    with torch.inference_mode():
        forward = cpu_seconds(lambda: model(pixels))
        logits = model(pixels)
        fused = cpu_seconds(lambda: uncertainty_maps(logits))
        row(
            "fused scores at 1/4 size / forward pass",
            fused,
            forward,
            fused / forward,
            "<= 0.03",
            fused <= 0.03 * forward,
        )
        valid = torch.ones(2, *logits.shape[-2:], dtype=torch.bool)
        look = make_second_look(["bald-mean"], passes=T)
        bald = cpu_seconds(lambda: look(model, pixels, valid))
        row(
            f"BALD T = {T} / T forward passes",
            bald,
            T * forward,
            bald / forward / T,
            "<= 1.1",
            bald <= 1.1 * T * forward,
        )
    points = np.random.default_rng(0).normal(size=(n, 256)).astype(np.float32)
    ours = cpu_seconds(lambda: kcenter_greedy(points, None, k), repeats=1)
    start = time.process_time()
    picks = full_matrix(points, k)
    peer = time.process_time() - start
    assert picks == kcenter_greedy(points, None, k)[0]
    part = f"full-matrix core-set / ours, N = {n}, k = {k}, d = 256"
    row(part, ours, peer, peer / ours, ">= 30", peer >= 30 * ours)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:3]))
