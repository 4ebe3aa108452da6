"""What `fit` costs over a bare loop of the same maths: a step by the slope over 20 to 160 steps, and a call itself.

Run as `python benchmarks/bench_step.py [repeats] [JSON]`: one thread, CPU seconds, on photographs where VLM_ITL_SHARED
has them, else on generated scenes. Both trainings draw the same pictures and take turns step by step, each in a thread
that waits while the other computes, so that a busy machine is as busy for both. The weights after three steps are
compared first.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLM_ITL_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from table import Row, below, compare, publish, same, take_turns
from torch.utils.data import DataLoader
from transformers import get_polynomial_decay_schedule_with_warmup

from vlm_itl.core.seeds import seed_everything
from vlm_itl.data import masks
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.data.transforms import TrainingSet, collate
from vlm_itl.model import train
from vlm_itl.model.predict import Inference
from vlm_itl.model.recipe import TrainSettings, learning_rates, train_transform
from vlm_itl.model.segmenter import Segmenter, freeze_batchnorm, load_model, parameter_groups
from vlm_itl.model.train import fit

SIZE, BATCH = 96, 8
FIRST, LAST = 20, 160  # steps between which the slope is taken


def pictures() -> SegData:
    "Photographs of VOC 2012 where they are, else generated scenes."
    voc = Path(os.environ.get("VLM_ITL_SHARED", "")) / "data" / "VOCdevkit" / "VOC2012"
    if "VLM_ITL_SHARED" in os.environ and voc.is_dir():
        return load_data(str(voc), val_share=0.1)
    return load_data("scenes", val_share=0.1)


def ours(data: SegData, steps: int, name: str = "segformer-nano", size: int = SIZE) -> Segmenter:
    "A training by `fit`."
    model = load_model(name, data.labels)
    fit(model, data.train, TrainSettings(steps=steps, batch_size=BATCH, device="cpu"), Inference(size, device="cpu"))
    return model


def bare(data: SegData, steps: int, name: str = "segformer-nano", size: int = SIZE) -> Segmenter:
    "The same maths in a loop of one's own."
    model = load_model(name, data.labels)
    bare_loop(model, data, steps, size)
    return model


def bare_loop(model: Segmenter, data: SegData, steps: int, size: int) -> None:
    "Steps of AdamW on batches of the training set, and nothing else."
    settings = TrainSettings(steps=steps, batch_size=BATCH, device="cpu")
    examples = TrainingSet(data.train, train_transform(settings, model, size), length=steps * BATCH, seed=0)
    rate, head_scale = learning_rates(settings, model)
    optimizer = torch.optim.AdamW(parameter_groups(model, rate, head_scale, settings.weight_decay), lr=rate)
    warmup = round(settings.warmup * steps)
    schedule = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=0.0, power=1.0)
    seed_everything(0, "train")
    for batch in DataLoader(examples, batch_size=BATCH, collate_fn=collate):
        model.train()
        freeze_batchnorm(model, settings.batch_norm)
        loss = train.pixel_loss(model(batch["pixel_values"]), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def largest_difference(one: Segmenter, two: Segmenter) -> float:
    "Between any two weights or statistics."
    first, second = one.state_dict(), two.state_dict()
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


class Paced:
    "Lets two threads compute by turns, a step each, and notes the CPU time of every step."

    def __init__(self) -> None:
        self.moves, self.turn = threading.Condition(), 0
        self.clocks: list[list[float]] = [[], []]  # of each thread: its CPU seconds where its steps begin
        self.over = [False, False]
        self.me = threading.local()

    def run(self, number: int, way: Callable[[], object]) -> None:
        "One of the two trainings, from its first step on."
        self.me.number = number
        try:
            way()
        finally:
            with self.moves:
                self.over[number], self.turn = True, 1 - number
                self.moves.notify_all()

    def step(self) -> None:
        "A step begins: the other one first."
        number = self.me.number
        self.clocks[number].append(time.thread_time())
        with self.moves:
            self.turn = 1 - number
            self.moves.notify_all()
            self.moves.wait_for(lambda: self.turn == number or self.over[1 - number])


def side_by_side(data: SegData) -> tuple[float, float]:
    "Milliseconds of a step, ours and bare, over the same steps of two trainings that take turns."
    paced, loss = Paced(), train.pixel_loss

    def counted(*tensors: torch.Tensor, **options: torch.Tensor | None) -> torch.Tensor:
        paced.step()
        return loss(*tensors, **options)

    train.pixel_loss = counted
    other = threading.Thread(target=paced.run, args=(1, lambda: bare(data, LAST + 1)))
    try:
        other.start()
        paced.run(0, lambda: ours(data, LAST + 1))
        other.join()
    finally:
        train.pixel_loss = loss
    one, two = (1000 * (clock[LAST] - clock[FIRST]) / (LAST - FIRST) for clock in paced.clocks)
    return one, two


def main(repeats: int = 3) -> list[Row]:
    "Equality, the slope, and what a call costs without its steps."
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as `fit` does
    masks._MASKS.each = 0  # nothing is kept, or whoever comes second would find the masks decoded
    data = pictures()
    rows = [same("training: a weight after 3 steps, ours and bare", largest_difference(ours(data, 3), bare(data, 3)))]
    ms = zip(*(side_by_side(data) for _ in range(repeats)), strict=True)
    part = f"a step, nano at {SIZE} / bare, slope over {FIRST} to {LAST} steps"
    rows.append(compare(part, *map(list, ms), "ms", "<= 1.03"))
    one_step = take_turns({"ours": lambda: ours(data, 1), "bare": lambda: bare(data, 1)}, 3 * repeats)
    fixed = [a - b for a, b in zip(one_step["ours"], one_step["bare"], strict=True)]
    rows.append(below("fixed cost of a `fit` (one step, less the same step bare)", [median(fixed)], 0.1, "s"))
    return rows


if __name__ == "__main__":
    publish(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3), sys.argv[2] if len(sys.argv) > 2 else None)
