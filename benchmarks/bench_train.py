"""Memory of evaluation and scoring, and the cost of the uncertainty maps (what a training step costs: bench_step.py).

Run as `python benchmarks/bench_train.py [repeats]`: one thread, medians, one JSON row a line with the keys
{part, ours, peer, unit, ratio, goal, holds}. Ways take turns, so that a busy machine is busy for all of them; times are
CPU seconds of this process. Ratios travel between machines; milliseconds and megabytes do not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLM_ITL_PROGRESS", "0")
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from datasets import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import DecodeRows, MaskStore, make_rows, raw_rows
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.model.doubt import uncertainty_maps
from vlm_itl.model.predict import Inference, evaluate
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import Segmenter, load_model

SIZE = 96  # pixels
SCENES = 200  # files written; more images are the same files under further names


def row(part: str, ours: float, peer: float, unit: str, ratio: float, goal: str, holds: bool) -> None:
    "Print one result as a line of JSON."
    values = {"part": part, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "goal": goal, "holds": holds}
    print(json.dumps(values), flush=True)


def scenes() -> SegData:
    "Generated scenes, written once to the usual cache."
    return load_data("scenes", options={"n_train": SCENES, "n_test": 2}, val_share=1)


# --- memory -----------------------------------------------------------------------------------------------------------


def many(data: SegData, count: int) -> Dataset:
    "As many images as asked for, each with a name of its own."
    cells = raw_rows(data.train)[:]
    turns = [n % len(data.train) for n in range(count)]
    images = [cells["image"][n] for n in turns]
    masks = [cells["mask"][n] for n in turns]
    rows = make_rows([f"n{n:05d}" for n in range(count)], images, masks)
    return rows.with_transform(DecodeRows(data.labels))


def megabytes(name: str) -> float:
    "VmRSS (memory now) or VmHWM (its peak) of this process."
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1]) / 1024


def measure_memory(work: str, count: int) -> None:
    "In a process of its own: print the memory before the pass, and what its peak adds to that. Linux only."
    torch.set_num_threads(1)
    data = scenes()
    rows, model = many(data, count), load_model("segformer-nano", data.labels)
    view = Inference(SIZE, batch_size=8, device="cpu")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
    before = megabytes("VmRSS")
    if work == "evaluate":
        evaluate(model, rows, view)
    else:
        with tempfile.TemporaryDirectory() as folder:
            score_pool(model, rows, view, masks=MaskStore(Path(folder), data.labels))
    print(json.dumps([before, megabytes("VmHWM") - before]))


def memory(work: str, repeats: int) -> None:
    "Peak of 600 images against 200."
    added: dict[int, list[float]] = {SCENES: [], 3 * SCENES: []}
    whole: dict[int, list[float]] = {SCENES: [], 3 * SCENES: []}
    for _ in range(repeats):
        for count in added:
            command = [sys.executable, __file__, "--memory", work, str(count)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            before, more = json.loads(out.splitlines()[-1])
            added[count].append(more)
            whole[count].append(before + more)
    few, lot = median(whole[SCENES]), median(whole[3 * SCENES])
    ratio = lot / few
    row(
        f"{work}, peak memory, 600 images against 200",
        round(lot, 1),
        round(few, 1),
        "MB",
        round(ratio, 3),
        "0.9 to 1.1",
        0.9 <= ratio <= 1.1,
    )
    few, lot = median(added[SCENES]), median(added[3 * SCENES])
    row(
        f"{work}, memory above the loaded model, 600 against 200",
        round(lot, 1),
        round(few, 1),
        "MB",
        round(lot / few, 3),
        "0.9 to 1.1",
        0.9 <= lot / few <= 1.1,
    )


# --- uncertainty ------------------------------------------------------------------------------------------------------


def three_softmaxes(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    "The three maps, each from its own softmax."
    entropy = torch.distributions.Categorical(logits=logits.movedim(1, -1), validate_args=False).entropy()
    top = logits.softmax(1).topk(2, dim=1).values
    return {
        "entropy": entropy / np.log(logits.shape[1]),
        "margin": 1 - (top[:, 0] - top[:, 1]),
        "least_confidence": 1 - logits.softmax(1).max(1).values,
    }


def milliseconds(ways: list[Callable[[], object]], repeats: int) -> list[float]:
    "Median CPU time of each way; the ways take turns, the first turn warms up."
    times: list[list[float]] = [[] for _ in ways]
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for way, taken in zip(ways, times, strict=True):
                start = time.process_time()
                way()
                taken.append(1000 * (time.process_time() - start))
    return [median(taken[1:]) for taken in times]


def segformer_b0(labels: LabelSpace) -> Segmenter:
    "A network of the size of SegFormer-B0 (the configuration's defaults), weights random."
    return Segmenter(SegformerForSemanticSegmentation(SegformerConfig(num_labels=len(labels))), labels).eval()


def uncertainty(repeats: int) -> None:
    "Fused maps against three softmaxes, and against the forward pass they follow."
    labels = LabelSpace.voc()
    sizes = {
        "segformer-b0 at 512": (segformer_b0(labels), 512),
        "segformer-nano at 96": (load_model("segformer-nano", labels), SIZE),
    }
    for name, (model, side) in sizes.items():
        batch = 1 if side == 512 else 8
        pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        with torch.inference_mode():
            logits = model(pixels)
            ours, theirs = uncertainty_maps(logits), three_softmaxes(logits)
        difference = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
        ways = [
            lambda x=logits: uncertainty_maps(x),
            lambda x=logits: three_softmaxes(x),
            lambda m=model, p=pixels: m(p),
        ]
        fused, separate, forward = milliseconds(ways, repeats)
        counts = name.startswith("segformer-b0")  # the goal speaks of a network of the usual size
        row(
            f"uncertainty, {name}, against three softmaxes",
            round(fused, 3),
            round(separate, 3),
            "ms",
            round(fused / separate, 3),
            "< 1",
            fused < separate,
        )
        row(
            f"uncertainty, {name}, against a forward pass",
            round(fused, 3),
            round(forward, 3),
            "ms",
            round(fused / forward, 4),
            "<= 0.03" if counts else "none",
            fused <= 0.03 * forward or not counts,
        )
        row(f"uncertainty, {name}, largest difference", difference, 0.0, "", difference, "<= 1e-5", difference <= 1e-5)


def main(repeats: int = 5) -> None:
    "All parts."
    torch.set_num_threads(1)
    scenes()
    memory("evaluate", min(repeats, 3))
    memory("score_pool", min(repeats, 3))
    uncertainty(4 * repeats)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2], int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
