"""What a round of a run costs over its bare parts: training steps, one pass over the pool, one over validation.

Run as `python benchmarks/bench_round.py [repeats] [JSON]`: one thread, CPU seconds, ours and bare by turns. A bare
part is a plain loop around the same network, the same data transforms and the same number of steps; with a judge, the
bare pass also draws each mask at its own size, writes it, and asks how sure the network is of it, which is what the
judge `confidence` does. What a run does besides (journals, ledgers, hashes, measuring the judge against the truth,
pictures, keeping weights) counts against us. The start of a run (data set, preflight) is no part of a round; the test
split and the demo have rows of their own.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLM_ITL_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_step import bare_loop
from table import Row, below, compare, cpu_seconds, publish, take_turns

from vlm_itl.data import masks, transforms
from vlm_itl.data.masks import MaskStore
from vlm_itl.data.sources import SegData
from vlm_itl.data.transforms import predicted_classes, unpad_one
from vlm_itl.experiment.config import Config, make_config
from vlm_itl.experiment.loop import Loop, load_run_data
from vlm_itl.model.metrics import ConfusionMatrix
from vlm_itl.model.predict import Inference
from vlm_itl.model.segmenter import Segmenter

START = 50  # labelled before round 0
SCENES = {"dataset": "scenes", "model": "segformer-nano", "image_size": 96}


def settings(mode: str, steps: int, **more: Any) -> Config:
    "A run of two rounds, of which the first is timed."
    judge = {"judge": "confidence", "preflight": 0} if mode == "vlm" else {}
    plan = {"initial": START, "increment": 10, "max_labelled": START + 10, "steps": steps, "log_with": "none"}
    folder = Path(tempfile.mkdtemp(prefix="bench_round_")) / "run"
    return make_config({"mode": mode, **judge, **plan, **SCENES, **more, "output_dir": str(folder)})


def look(model: Segmenter, rows: Any, view: Inference, seen: Callable[[Any, torch.Tensor], None]) -> None:
    "One pass in a plain loop."
    model.eval()
    with torch.inference_mode():
        for batch in view.loader(rows, model.labels if "mask" in rows.column_names else None):
            seen(batch, model(batch["pixel_values"]))


def bare_round(model: Segmenter, data: SegData, config: Config) -> None:
    "Train, validate, look at the pool."
    few = replace(data, train=data.train.select(range(START)))
    bare_loop(model, few, config.steps, config.image_size)
    view, matrix, doubt = config.view, ConfusionMatrix(len(data.labels)), list[float]()

    def count(batch: Any, logits: torch.Tensor) -> None:
        for one, box, native, truth in zip(logits, batch["box"], batch["native"], batch["mask"], strict=True):
            matrix.update(predicted_classes(one, box, view.image_size, native), torch.as_tensor(truth))

    def score(batch: Any, logits: torch.Tensor) -> None:
        p = logits.log_softmax(1)
        doubt.extend((-(p.exp() * p).sum(1).mean((1, 2))).tolist())

    def judge(batch: Any, logits: torch.Tensor) -> None:
        score(batch, logits)
        for name, one, box, native in zip(batch["id"], logits, batch["box"], batch["native"], strict=True):
            whole = unpad_one(one, box, view.image_size, native)
            mask = predicted_classes(one, box, view.image_size, native)
            store.write(name, mask.numpy())
            doubt.append(float(whole.softmax(0).amax(0).mean()))

    look(model, data.val, view, count)
    pool = data.train.select(range(START, len(data.train))).remove_columns("mask")
    with tempfile.TemporaryDirectory() as folder:
        store = MaskStore(Path(folder), data.labels)
        look(model, pool, view, judge if config.mode == "vlm" else score)


def afresh(way: Callable[[], object]) -> None:
    "Nothing is kept of what the other way has decoded."
    masks._MASKS.forget()
    transforms._SQUARES.forget()
    way()


def rounds(part: str, goal: str, repeats: int, mode: str, steps: int, **more: Any) -> Row:
    "The first round of a run against its bare parts."
    taken: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(repeats):
        loop = Loop.from_config(settings(mode, steps, **more))
        data, model = load_run_data(loop.config), loop.team.learner.segmenter  # `run_round` begins it anew
        bare_loop(model, data, 2, loop.config.image_size)  # to warm up
        ways = {"bare": partial(bare_round, model, data, loop.config), "ours": loop.run_round}
        fresh = {name: partial(afresh, way) for name, way in ways.items()}
        for name, seconds in take_turns(fresh, 1, warm=0).items():
            taken[name] += seconds
        loop.folder.close()
        print(f"{part}, turn {turn + 1}: {taken['ours'][-1]:.2f} s, bare {taken['bare'][-1]:.2f} s", flush=True)
    return compare(f"a round / bare parts, {part}", taken["ours"], taken["bare"], "s", goal)


def of_photographs() -> dict[str, Any] | None:
    "VOC with a pretrained MobileNetV2, where they are."
    shared = Path(os.environ.get("VLM_ITL_SHARED", "nowhere"))
    voc, weights = shared / "data" / "VOCdevkit" / "VOC2012", shared / "weights" / "mobilenet-v2-imagenet"
    if not (voc.is_dir() and weights.is_dir()):
        return None
    return {"dataset": str(voc), "model": str(weights), "image_size": 160}


def demo(repeats: int) -> list[Row]:
    "The whole demo with no training: two kernels' worth of imports, twin, run, figures."
    command = "import sys; from vlm_itl.cli.run import main; sys.exit(main())"
    taken = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            given = ["nbs/run_al.ipynb", f"{folder}/demo.ipynb", "-f", "configs/demo.yaml"]
            given += ["-p", "steps", "0", "-p", "output_dir", f"{folder}/run"]
            start = cpu_seconds()
            subprocess.run([sys.executable, "-c", command, *given], check=True, capture_output=True)
            taken.append(cpu_seconds() - start)
    return [below("the whole demo beyond training (steps 0)", taken, 15.0, "s")]


def main(repeats: int = 3) -> list[Row]:
    "Rounds on scenes (long ones from two repeats on) and on photographs, and the demo."
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = [
        rounds("al, 100 steps", "<= 1.15", repeats, "al", 100),
        rounds("vlm with confidence, 100 steps", "<= 1.25", repeats, "vlm", 100),
    ]
    if repeats > 1:  # long ones
        rows.append(rounds("al, 400 steps", "<= 1.05", repeats - 1, "al", 400))
        rows.append(rounds("vlm with confidence, 400 steps", "<= 1.10", repeats - 1, "vlm", 400))
    if (photographs := of_photographs()) is not None:
        part = "VOC, MobileNetV2 at 160, vlm with confidence, 30 steps"
        rows.append(rounds(part, "<= 1.15", 1, "vlm", 30, **photographs))
    return [*rows, *demo(1)]


if __name__ == "__main__":
    publish(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3), sys.argv[2] if len(sys.argv) > 2 else None)
