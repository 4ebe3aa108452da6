"""Are the steps that `steps="auto"` finds enough? The same training, twice as long, should be no better.

    python benchmarks/bench_convergence.py --data scenes --seeds 3                 # hours on two cores
    python benchmarks/bench_convergence.py --data photographs --model probe:../shared/weights/mobilenet-v2-imagenet

For every seed and arm (10 %, 40 %, all of the images with masks): how many steps `auto` takes (1x), test mean IoU after
them, after as many with another training seed (what chance alone does), and after twice as many (2x). One JSON row a
training goes to --rows as soon as it is done, and a second run goes on from there. Photographs are the VOC 2012 subset
of `VLM_ITL_SHARED`, by the seven classes that it has enough of. `--out results/convergence.json` keeps the summary.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.stats import t as student

from vlm_itl.core.files import write_json
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.experiment.config import Config, make_config
from vlm_itl.experiment.round import make_learner
from vlm_itl.model.metrics import mean_iou_of

ROOT = Path(__file__).resolve().parent.parent
SEVEN = ("background", "cat", "cow", "dog", "horse", "person", "sheep")  # the well-populated classes of the subset
ARMS = (0.1, 0.4, 1.0)  # shares of the images with masks
BAR = 0.01  # mean IoU


def test_iou(metrics: dict[str, Any], photographs: bool) -> float:
    """The number that is compared."""
    return float(mean_iou_of(metrics["per_class_iou"], SEVEN) if photographs else metrics["mean_iou"])


def one(config: Config, data: SegData, arm: float, selection: int) -> dict[str, Any]:
    """One training of one arm."""
    picked = make_rng(selection, "arm").permutation(len(data.train))[: max(1, round(arm * len(data.train)))]
    learner = make_learner(config, data.labels, len(data.train))
    started = time.process_time()
    with TemporaryDirectory() as folder:
        result = learner.fit(data.train.select(np.sort(picked)), data.val, "training", Path(folder))
    seconds = time.process_time() - started
    iou = test_iou(learner.evaluate(data.test, "testing"), config.dataset != "scenes")
    losses = ("held_out_loss", "held_out_wrong")
    looks = [[h["steps"], *(round(h[name], 4) for name in losses)] for h in result.history if losses[0] in h]
    return {"images": len(picked), "steps": result.steps, "iou": iou, "cpu_s": round(seconds), "looks": looks}


def measure(
    base: Config, data: SegData, seeds: range, rows: Path, arms: Sequence[float] = ARMS
) -> list[dict[str, Any]]:
    """All trainings that are not yet in the file of rows."""
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    known = {(r["data"], r["model"], r["seed"], r["arm"], r["way"]): r for r in done}
    name = "scenes" if base.dataset == "scenes" else "photographs"
    for seed in seeds:
        for arm in arms:
            found = 0
            for way in ("1x", "1x again", "2x"):
                key = (name, Path(base.model).name, seed, arm, way)
                if key not in known:
                    steps: Any = {"1x": "auto", "1x again": found, "2x": 2 * found}[way]
                    config = replace(base, seed=seed + 1000 * (way == "1x again"), steps=steps)
                    row = dict(zip(("data", "model", "seed", "arm", "way"), key, strict=True))
                    known[key] = {**row, **one(config, data, arm, seed)}
                    rows.parent.mkdir(parents=True, exist_ok=True)
                    with rows.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
                    print(known[key], flush=True)
                found = known[key]["steps"] if way == "1x" else found
    return list(known.values())


def interval(values: np.ndarray) -> list[float]:
    """Mean, and half the width of its 95 % interval."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return [round(float(values.mean()), 4), round(float(half), 4)]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line an arm: steps, what doubling adds, what chance does, and whether the bar holds."""
    table = []
    for data, model, arm in sorted({(r["data"], r["model"], r["arm"]) for r in rows}):
        ways = {way: {} for way in ("1x", "1x again", "2x")}
        for row in rows:
            if (row["data"], row["model"], row["arm"]) == (data, model, arm):
                ways[row["way"]][row["seed"]] = row
        whole = sorted(set.intersection(*(set(found) for found in ways.values())))
        if not whole:
            continue
        iou = {way: np.array([found[seed]["iou"] for seed in whole]) for way, found in ways.items()}
        gain = interval(iou["2x"] - iou["1x"])
        table.append(
            {
                "data": data,
                "model": model,
                "arm": arm,
                "seeds": len(whole),
                "steps": [ways["1x"][seed]["steps"] for seed in whole],
                "iou_1x": round(float(iou["1x"].mean()), 4),
                "gain_of_2x": gain,
                "chance": round(float(np.abs(iou["1x again"] - iou["1x"]).mean()), 4),
                "holds": abs(gain[0]) < BAR,
            }
        )
    return table


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("scenes", "photographs"), default="scenes")
    parser.add_argument("--model", default="segformer-nano")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", type=float, nargs="+", default=ARMS, help="shares of the images with masks")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("VLM_ITL_SHARED", "../shared")))
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "convergence.jsonl")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dataset = "scenes" if args.data == "scenes" else str(args.shared / "data/VOCdevkit/VOC2012")
    base = make_config(dataset=dataset, model=args.model, image_size=args.image_size)
    data = load_data(dataset, seed=0, val_share=1)  # one image: nobody looks at it
    rows = measure(base, data, range(args.first_seed, args.first_seed + args.seeds), args.rows, args.arms)
    table = summarise(rows)
    for line in table:
        print(json.dumps(line))
    if args.out:
        write_json(args.out, {"bar": BAR, "arms": table, "rows": rows})


if __name__ == "__main__":
    main()
