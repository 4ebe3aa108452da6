"""Two processes against one: a training and a pass over a pool, on a machine with two idle cores (or more).

Run as `python benchmarks/bench_processes.py [repeats]` (three minutes). One thread in each process, wall-clock seconds
in alternation: CPU time would not show what is gained, so the machine has to be quiet. SegFormer-B0 (random weights) at
256 px is large enough that a step (seconds) hides the exchange of its 3.7 million weights and gradients (some 20 ms);
`cnn-nano` is shown beside it as what is too small. What both find is compared first.
"""

import os
import sys
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch read it
os.environ.setdefault("VLM_ITL_PROGRESS", "0")

import numpy as np
import torch
from table import Row, compare, publish, same, take_turns
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from vlm_itl.core.processes import Processes
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import Segmenter, load_model
from vlm_itl.model.train import TrainSettings, fit
from vlm_itl.sampler.together import Together, put_together

STEPS = 4


def segformer_b0(data: SegData) -> Segmenter:
    "As released, with random weights and without dropout, so that one and two processes compute the same."
    torch.manual_seed(0)
    options: dict[str, Any] = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "num_labels": len(data.labels)}
    return Segmenter(SegformerForSemanticSegmentation(SegformerConfig(**options)), data.labels, name="SegFormer-B0")


def rows_of(make: Any, data: SegData, size: int, batch: int, repeats: int, goal: str) -> list[Row]:
    "A training and a pass, by one process and by two."
    model, view = make(data), Inference(size, batch_size=batch)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = TrainSettings(steps=STEPS, batch_size=batch, warmup=0.0, learning_rate=1e-4)
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
    seconds = take_turns(ways, repeats, clock=time.perf_counter)
    pair.stop()
    what = f"{model.name} at {size}, batches of {batch}"
    return [
        same(f"{what}: loss of {STEPS} steps, relative", abs(losses[0] - losses[1]) / losses[0], 1e-4),
        same(f"{what}: scores of the pool", unlike),
        compare(f"{what}: {STEPS} steps, two processes / one", seconds["train 2"], seconds["train 1"], "s", goal),
        compare(f"{what}: a pass, two processes / one", seconds["pass 2"], seconds["pass 1"], "s", goal),
    ]


def main(repeats: int = 5) -> list[Row]:
    "All rows."
    torch.set_num_threads(1)
    data = load_data("scenes", val_share=2, options={"n_train": 34, "n_test": 2, "size": (256, 256)})
    small = rows_of(lambda d: load_model("cnn-nano", d.labels), data, 96, 8, repeats, "none")
    return [*rows_of(segformer_b0, data, 256, 8, repeats, ">= 1.7"), *small]


if __name__ == "__main__":
    publish(main(*map(int, sys.argv[1:2])))
