"""Two processes against one: a training and a pass over a pool, on a machine with two idle cores (or more).

Run as `python benchmarks/bench_processes.py [repeats]` (two minutes). One thread in each process, turns in
alternation, by two clocks at once: wall-clock seconds, which say something on a quiet machine only, and the CPU seconds
of the busier process, which are what is left of the wall clock where both have a core to themselves. The rows say how
many others wanted a core meanwhile (the load of the last minute, less our own). SegFormer-B0 (random weights) at 256 px
in batches of 16 is large enough that a step (two seconds) hides the exchange of its 3.7 million weights and gradients
(some 40 ms) and what a training costs once (a fifth of a second): 1.84 by the clock on two idle cores. Batches of
8 gave 1.58 (half a batch of 8 is no longer worth as much a picture as the whole); `cnn-nano` is shown beside it as too
small. What both find is compared first.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch read it
os.environ.setdefault("VLM_ITL_PROGRESS", "0")

import numpy as np
import psutil
import torch
from table import Row, compare, publish, same
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from vlm_itl.core.processes import Processes
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.model.predict import Inference
from vlm_itl.model.recipe import TrainSettings
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import Segmenter, load_model
from vlm_itl.model.train import fit
from vlm_itl.sampler.together import Together, put_together


def cpu_of_each() -> list[float]:
    "CPU seconds of this process and of its helpers so far."
    return [time.process_time(), *(sum(child.cpu_times()[:2]) for child in psutil.Process().children())]


def by_both_clocks(ways: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, list[float]], ...]:
    "Turns of all ways: their wall-clock seconds, and the CPU seconds of the process with most to do."
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            before, started = cpu_of_each(), time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
            work[name].append(max(after - start for after, start in zip(cpu_of_each(), before, strict=True)))
    return seconds, work


def segformer_b0(data: SegData) -> Segmenter:
    "As released, with random weights and without dropout, so that one and two processes compute the same."
    torch.manual_seed(0)
    options: dict[str, Any] = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "num_labels": len(data.labels)}
    return Segmenter(SegformerForSemanticSegmentation(SegformerConfig(**options)), data.labels, name="SegFormer-B0")


def rows_of(make: Any, data: SegData, size: int, batch: int, steps: int, repeats: int, goal: str) -> list[Row]:
    "A training and a pass, by one process and by two."
    model, view = make(data), Inference(size, batch_size=batch)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = TrainSettings(steps=steps, batch_size=batch, warmup=0.0, learning_rate=1e-4)
    images, pair = data.train.remove_columns("mask"), Processes(2)
    team = Together(model, view, pair)

    def train(share: Any) -> float:
        model.load_state_dict(start)
        return fit(model, data.train, settings, view, share=share).train_loss

    losses = [train(None), train(team.share)]
    model.load_state_dict(start)
    alone, both = score_pool(model, images, view), put_together(team.look(score_pool, images, None, {}))
    unlike = max(float(np.abs(alone.scores[n] - both.scores[n]).max()) for n in alone.scores)
    ways = {
        "train 1": lambda: train(None),
        "train 2": lambda: train(team.share),
        "pass 1": lambda: score_pool(model, images, view),
        "pass 2": lambda: team.look(score_pool, images, None, {}),
    }
    seconds, work = by_both_clocks(ways, repeats)  # all of them have run once for the comparison
    others = max(0.0, os.getloadavg()[0] - 1.5)  # one way keeps one core busy, the other two
    pair.stop()
    what = f"{model.name} at {size}, batches of {batch}"
    return [
        same(f"{what}: loss of {steps} steps, relative", abs(losses[0] - losses[1]) / losses[0], 1e-4),
        same(f"{what}: scores of the pool", unlike),
        *(
            compare(f"{what}: {name}, two processes / one, {clock}", taken[f"{way} 2"], taken[f"{way} 1"], "s", goal)
            for way, name in (("train", f"{steps} steps"), ("pass", "a pass"))
            for taken, clock in ((work, "CPU of the busier"), (seconds, f"wall clock, {others:.1f} others"))
        ),
    ]


def main(repeats: int = 3) -> list[Row]:
    "All rows."
    torch.set_num_threads(1)
    data = load_data("scenes", val_share=2, options={"n_train": 66, "n_test": 2, "size": (256, 256)})
    small = rows_of(lambda d: load_model("cnn-nano", d.labels), data, 96, 8, 12, repeats, "none")
    return [*rows_of(segformer_b0, data, 256, 16, 6, repeats, ">= 1.7"), *small]


if __name__ == "__main__":
    publish(main(*map(int, sys.argv[1:2])))
