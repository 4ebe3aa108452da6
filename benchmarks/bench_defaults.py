"""Does the pipeline that the library is named after win with its own defaults, or lose? On generated scenes.

    python benchmarks/bench_defaults.py            # 5 seeds, an hour on two cores; goes on where it stopped
    python benchmarks/bench_defaults.py --show     # the table of what is there

`mode=al` and `mode=vlm` with nothing else set but the seed, so that both have the same human masks, network, steps and
strategy; both with trainings half as long, since a gain may be one of too little training; all masks of the pool
(`mode=baseline`); then `mode=vlm` with one default changed. Measured: test mean IoU after each round. Everything
about the judge and its proposals is simulated here: this compares settings, and says nothing about a real judge.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vlm_itl.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
ROWS: dict[str, dict[str, Any]] = {
    "al": {"mode": "al"},
    "vlm": {"mode": "vlm"},
    "all masks": {"mode": "baseline", "steps": 3200},  # as in run_baseline
    "al, half the steps": {"mode": "al", "steps": 800},
    "vlm, half the steps": {"mode": "vlm", "steps": 800},
    "vlm, accept_by=image": {"mode": "vlm", "accept_by": "image"},
    "vlm, tau=0.5": {"mode": "vlm", "tau": 0.5},
    "vlm, policy=triage": {"mode": "vlm", "policy": "triage"},
    "vlm, no mixture": {"mode": "vlm", "mixture": {}},
    "vlm, human_share=.5": {"mode": "vlm", "mixture": {"human_share": 0.5}},
    "vlm, proposer=own": {"mode": "vlm", "proposer": "own"},
}

RIVALS = {"vlm, half the steps": "al, half the steps"}  # compared with its like


def run_one(key: tuple[str, int]) -> dict[str, Any]:
    "Test mean IoU after each round of one run."
    import torch

    from vlm_itl.experiment import make_config
    from vlm_itl.experiment.loop import run_experiment

    torch.set_num_threads(1)
    row, seed = key
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder) / "run"
        rounds = list(run_experiment(make_config({**ROWS[row], "seed": seed, "gallery": 0, "output_dir": str(out)})))
        curve = json.loads((out / "summary.json").read_text())["curve"]
    accepted = [r.judge["accepted"] if r.judge else None for r in rounds]
    return {
        "row": row,
        "seed": seed,
        **{k: curve[k] for k in ("labelled", "pseudo", "test_mean_iou")},
        "accepted": accepted,
    }


def interval(values: np.ndarray) -> list[float]:  # mean, low, high
    "A 95 % t interval."
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return [round(float(x), 4) for x in (values.mean(), values.mean() - half, values.mean() + half)]


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "For each row and round: mean IoU, and what it is over `al` of as many steps, in pairs of seeds."
    curves = {(line["row"], line["seed"]): np.array(line["test_mean_iou"]) for line in lines}
    table = []
    for row in ROWS:
        rival = RIVALS.get(row, "al")
        seeds = sorted(seed for name, seed in curves if name == row and (rival, seed) in curves)
        if not seeds:
            continue
        own, other = (np.stack([curves[name, seed] for seed in seeds]) for name in (row, rival))
        compared = row not in ("al", *RIVALS.values()) and own.shape == other.shape
        labelled = next(line["labelled"] for line in lines if line["row"] == row)
        for index, masks in enumerate(labelled):
            found = {"row": row, "masks": masks, "seeds": len(seeds), "miou": interval(own[:, index])}
            more = interval((own - other)[:, index]) if compared else None
            table.append({**found, "over al": more})
    return table


def main() -> None:
    "Run what is missing, and print the table."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--lines", type=Path, default=ROOT / "runs/defaults.jsonl")
    parser.add_argument("--show", action="store_true", help="run nothing")
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.lines.read_text().splitlines()] if given.lines.is_file() else []
    done = {(line["row"], line["seed"]) for line in lines}
    todo = [] if given.show else [(r, s) for s in range(given.seeds) for r in given.rows if (r, s) not in done]
    given.lines.parent.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool, given.lines.open("a") as file:
        for found in pool.imap_unordered(run_one, todo):
            lines.append(found)
            print(json.dumps(found), file=file, flush=True)
            print(found["row"], found["seed"], [round(x, 3) for x in found["test_mean_iou"]], flush=True)
    table = summarise(lines)
    for line in table:
        print(line)
    write_json(ROOT / "results/defaults.json", {"command": "python benchmarks/bench_defaults.py", "table": table})


if __name__ == "__main__":
    main()
