"""What `fit` costs over a bare loop of the same maths: a step by the slope over several lengths, and a call itself.

Run as `python benchmarks/bench_step.py [repeats] [JSON]`: one thread, CPU seconds, ways in alternation, on photographs
where VLM_ITL_SHARED has them, else on generated scenes. The weights after three steps are compared first.
"""

import os
import sys
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLM_ITL_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from table import Row, below, compare, publish, same, take_turns
from torch.utils.data import DataLoader
from transformers import get_polynomial_decay_schedule_with_warmup

from vlm_itl.core.seeds import seed_everything
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.data.transforms import TrainingSet, collate
from vlm_itl.model.predict import Inference
from vlm_itl.model.segmenter import Segmenter, freeze_batchnorm, load_model, parameter_groups
from vlm_itl.model.train import TrainSettings, fit, learning_rates, pixel_loss, train_transform

SIZE, BATCH = 96, 8
STEPS = (20, 60, 100, 160)  # whose slope is the cost of a step


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
        loss = pixel_loss(model(batch["pixel_values"]), batch["labels"])
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


def main(repeats: int = 3) -> list[Row]:
    "Equality, the slope, and what a call costs without its steps."
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as `fit` does
    data = pictures()
    rows = [same("training: a weight after 3 steps, ours and bare", largest_difference(ours(data, 3), bare(data, 3)))]
    ways = {f"{way.__name__} {n}": lambda way=way, n=n: way(data, n) for n in STEPS for way in (ours, bare)}
    taken = take_turns(ways, repeats)
    lines = {}  # way -> (ms a step, seconds of a call) of each turn
    for way in ("ours", "bare"):
        turns = zip(*(taken[f"{way} {n}"] for n in STEPS), strict=True)
        lines[way] = [np.polyfit(STEPS, seconds, 1) for seconds in turns]
    steps = {way: [1000 * float(slope) for slope, _ in found] for way, found in lines.items()}
    rows.append(
        compare(f"a step, nano at {SIZE} / bare, slope over {STEPS}", steps["ours"], steps["bare"], "ms", "<= 1.03")
    )
    whole = {way: [float(sum(taken[f"{way} {n}"][turn] for n in STEPS)) for turn in range(repeats)] for way in lines}
    rows.append(compare("all these trainings, nano / bare", whole["ours"], whole["bare"], "s", "none"))
    one_step = take_turns({"ours": lambda: ours(data, 1), "bare": lambda: bare(data, 1)}, 3 * repeats)
    fixed = [a - b for a, b in zip(one_step["ours"], one_step["bare"], strict=True)]
    rows.append(below("fixed cost of a `fit` (one step, less the same step bare)", [median(fixed)], 0.1, "s"))
    return rows


if __name__ == "__main__":
    publish(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3), sys.argv[2] if len(sys.argv) > 2 else None)
