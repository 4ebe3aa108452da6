"""Does bf16 cost accuracy? The same trainings and tests in fp32 and in bf16, in pairs of one seed, and their CPU time.

    python benchmarks/bench_precision.py --seeds 6        # half an hour on two cores

A pair shares data, drawn images, first weights and order of batches; one JSON row a training goes to --rows as soon as
it is done, and a second run goes on from there. Scenes: a small convolutional network and a small SegFormer; the
photographs of `VLM_ITL_SHARED`: MobileNetV2 trained as a whole, and as a frozen encoder under a head. `--show` keeps
the summary in results/precision.json: mean difference bf16 - fp32 of test mean IoU with its 95 % t interval, and the
ratio of CPU seconds.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_convergence import ROOT, interval, one

from vlm_itl.core.files import write_json
from vlm_itl.data.sources import load_data
from vlm_itl.experiment.config import make_config

SHARED = Path(os.environ.get("VLM_ITL_SHARED", ROOT.parent / "shared"))
VOC, MOBILENET = SHARED / "data/VOCdevkit/VOC2012", SHARED / "weights/mobilenet-v2-imagenet"
TASKS: dict[str, dict[str, Any]] = {
    "scenes, cnn-nano": {"dataset": "scenes", "model": "cnn-nano", "image_size": 64, "steps": 800},
    "scenes, segformer-nano": {"dataset": "scenes", "model": "segformer-nano", "image_size": 64, "steps": 800},
    "photographs, probe": {"dataset": str(VOC), "model": f"probe:{MOBILENET}", "image_size": 256, "steps": 150},
    "photographs, MobileNetV2": {"dataset": str(VOC), "model": str(MOBILENET), "image_size": 160, "steps": 150},
}
ARM = 0.4  # share of the images with masks


def measure(seeds: int, path: Path) -> None:
    """All trainings that are not yet in the file of rows; seeds outside, so that all tasks grow together."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {(row["task"], row["seed"], row["precision"]) for row in done}
    data = {name: load_data(name, seed=0, val_share=1) for name in {task["dataset"] for task in TASKS.values()}}
    for seed in range(seeds):
        for name, task in TASKS.items():
            for precision in ("fp32", "bf16"):
                if (name, seed, precision) not in known:
                    config = replace(make_config(**task), seed=seed, precision=precision)
                    row = {"task": name, "seed": seed, "precision": precision}
                    row |= one(config, data[task["dataset"]], ARM, seed)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)


def summarise(path: Path) -> list[dict[str, Any]]:
    """One line a task."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    table = []
    for name in TASKS:
        by = {p: {r["seed"]: r for r in rows if (r["task"], r["precision"]) == (name, p)} for p in ("fp32", "bf16")}
        whole = sorted(by["fp32"].keys() & by["bf16"].keys())
        iou = {p: np.array([by[p][seed]["iou"] for seed in whole]) for p in by}
        cpu = {p: np.array([by[p][seed]["cpu_s"] for seed in whole], float) for p in by}
        line = {"task": name, "seeds": len(whole), "fp32": round(float(iou["fp32"].mean()), 4)}
        line |= {"bf16_less_fp32": interval(iou["bf16"] - iou["fp32"])}
        table.append(line | {"cpu_bf16_over_fp32": round(float(np.median(cpu["bf16"] / cpu["fp32"])), 3)})
    return table


def main() -> None:
    """Measure what is missing, or show what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "precision.jsonl")
    parser.add_argument("--show", action="store_true", help="only keep and print the summary")
    args = parser.parse_args()
    if not args.show:
        measure(args.seeds, args.rows)
    table = summarise(args.rows)
    print(*map(json.dumps, table), sep="\n")
    if args.show:
        write_json(ROOT / "results" / "precision.json", {"share_of_images": ARM, "tasks": table})


if __name__ == "__main__":
    main()
