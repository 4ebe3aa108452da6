"""When to stop drawing: what each rule saves and misses, replayed on finished runs on photographs.

    python benchmarks/bench_stop.py            # the runs: 15 of some minutes each; goes on where it stopped
    python benchmarks/bench_stop.py --show     # the table, from what is committed (seconds)

Data, network and proposals are those of `judge_pays.py` (437 + 445 photographs of PASCAL VOC 2012, VLM_ITL_SHARED); 40
of the 437 are validation images, which cost masks, too. Twelve rounds from 20 to 240 human masks, three arms, five
seeds. A rule sees what it would see in a run: human seconds and validation images. What ending costs is measured on the
test images, over the seven classes that occur in numbers. What a point of mean IoU (.01) is worth is the user's
business, so there are three prices. Wrong is a rule that misses more than the masks of one round.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from judge_pays import BASE, FOLDER, ROOT, SEVEN, interval

from vlm_itl.core.files import plain, write_json
from vlm_itl.judging.stopping import Point, StopRule, stop_regret, stops_at

ARMS: dict[str, dict[str, Any]] = {
    "by chance": {"mode": "al"},
    "by entropy": {"mode": "al", "strategy": "entropy"},
    "with proposals, learned": {**FOLDER, "judge": "learned", "accept_by": "class", "strategy": "entropy"},
}
ROUNDS = {"initial": 20, "increment": 20, "max_labelled": 240, "val_share": 40, "test_every_round": True}
PRICES = (1800.0, 7200.0, 28800.0)  # human seconds that .01 of mean IoU is worth
CURVES, TABLE = ROOT / "results/stop_curves.npz", ROOT / "results/stop.json"
RULES: dict[str, dict[str, Any]] = {  # "price" is filled in
    "to the end": {"seconds": 1e9},
    "half the seconds": {"seconds": 0.0},
    "gain: 1 round back": {"gain": 0.0, "rounds": 1},
    "gain: 3 rounds back": {"gain": 0.0, "rounds": 3},
    "gain: 5 rounds back": {"gain": 0.0, "rounds": 5},
    "gain: 3 rounds back, 50 %": {"gain": 0.0, "rounds": 3, "level": 0.5},
    "price": {"price": 0.0},
}


def run_one(key: tuple[str, int, Path]) -> dict[str, Any]:
    "One run, reduced to what rules and the table look at."
    import torch

    from vlm_itl.experiment import make_config, run_al

    torch.set_num_threads(1)
    arm, seed, work = key
    out = work / f"{arm}-{seed}".replace(" ", "_").replace(",", "")
    with contextlib.redirect_stdout(io.StringIO()):
        rounds = list(run_al(make_config({**BASE, **ARMS[arm], **ROUNDS, "seed": seed, "output_dir": str(out)})))
    tests = [json.loads((out / f"test_{r.index:03d}.json").read_text())["per_class_iou"] for r in rounds]
    counts = np.stack([np.load(out / f"round_{r.index:03d}/val_counts.npz")["counts"] for r in rounds])
    shutil.rmtree(out)
    return {
        "arm": arm,
        "seed": seed,
        "labelled": np.array([r.labelled for r in rounds]),
        "masks": np.array([r.budget["images"] for r in rounds]),
        "seconds": np.array([r.budget["human_seconds"] for r in rounds]),
        "val": np.array([r.metrics["val"]["interval"]["miou"] for r in rounds]),
        "test": np.array([sum(ious[name] or 0.0 for name in SEVEN) / len(SEVEN) for ious in tests]),
        "counts": counts.astype(np.int32),
    }


def read_curves(path: Path) -> list[dict[str, Any]]:
    "The runs in a file, or none."
    if not path.is_file():
        return []
    with np.load(path) as kept:
        names = [json.loads(line) for line in kept["names"]]
        return [
            {"arm": arm, "seed": seed, **{part: kept[f"{part}/{arm}/{seed}"] for part in PARTS}} for arm, seed in names
        ]


PARTS = ("labelled", "masks", "seconds", "val", "test", "counts")


def write_curves(path: Path, runs: list[dict[str, Any]]) -> None:
    "All runs into one file."
    arrays = {f"{part}/{run['arm']}/{run['seed']}": run[part] for run in runs for part in PARTS}
    names = np.array([json.dumps([run["arm"], run["seed"]]) for run in runs])
    np.savez_compressed(path.with_suffix(".part.npz"), names=names, **arrays)
    path.with_suffix(".part.npz").replace(path)


def points_of(run: dict[str, Any]) -> list[Point]:
    "The rounds as a rule sees them."
    columns = (run[part].tolist() for part in ("labelled", "seconds", "val"))
    rows = zip(*columns, run["counts"], run["masks"].tolist(), strict=True)
    return [Point(*row) for row in rows]


def replay(run: dict[str, Any], name: str, price: float) -> dict[str, Any]:
    "What a rule would have done in a run."
    options = dict(RULES[name])
    if "price" in options:
        options["price"] = price
    if name == "half the seconds":
        options["seconds"] = float(run["seconds"][0] + run["seconds"][-1]) / 2
    points, test = points_of(run), run["test"].tolist()
    at = stops_at(StopRule(**options), points)
    regret = stop_regret(points, test, price, at)
    best = min(range(len(points)), key=lambda k: stop_regret(points, test, price, k))
    wrong = regret > (run["seconds"][-1] - run["seconds"][0]) / (len(points) - 1)
    found = {"rule": name, "price": price, "arm": run["arm"], "seed": run["seed"], "masks": points[at].labelled}
    return {
        **found,
        "saved": 1 - (points[at].seconds - points[0].seconds) / (points[-1].seconds - points[0].seconds),
        "lost": test[-1] - test[at],
        "regret": regret / 3600,
        "too early": wrong and at < best,
        "too late": wrong and at > best,
        "best": points[best].labelled,
    }


def summarise(runs: list[dict[str, Any]]) -> pd.DataFrame:
    "One line a price and rule: means over all runs, the regret with a t interval over the seeds (arms averaged)."
    told = pd.DataFrame([replay(run, name, price) for run in runs for name in RULES for price in PRICES])
    lines = []
    for (price, rule), group in told.groupby(["price", "rule"], sort=False):
        mean, low, high = interval(group.groupby("seed")["regret"].mean())
        line = {"price": price, "rule": rule, "runs": len(group), "regret hours": mean, "low": low, "high": high}
        columns = ("masks", "best", "saved", "lost", "too early", "too late")
        lines.append({**line, **{name: float(group[name].mean()) for name in columns}})
    return pd.DataFrame(lines).sort_values(["price", "regret hours"], kind="stable")


def main() -> None:
    "Run what is missing, and print the table."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--show", action="store_true", help="run nothing")
    given = parser.parse_args()
    runs = read_curves(given.curves)
    done = {(run["arm"], run["seed"]) for run in runs}
    todo = [] if given.show else [(a, s) for s in range(given.seeds) for a in ARMS if (a, s) not in done]
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for found in pool.imap_unordered(run_one, [(*key, ROOT / "runs/stop") for key in todo]):
            runs.append(found)
            write_curves(given.curves, runs)
            print(found["arm"], found["seed"], found["test"].round(3).tolist(), flush=True)
    table = summarise(runs)
    print(table.round(3).to_string(index=False))
    write_json(TABLE, plain({"command": "python benchmarks/bench_stop.py", "table": table.to_dict("records")}))


if __name__ == "__main__":
    main()
