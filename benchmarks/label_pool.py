"""What does a labelled data set cost? Proposals, a judge and people who correct, against drawing and verifying all.

Run as `python benchmarks/label_pool.py --seeds 10` (a quarter of an hour on two cores; it goes on where it stopped), or
`--show` (seconds). 437 photographs of PASCAL VOC 2012, masks proposed by Grounded-SAM, 40 masks drawn by chance first
and one for validation; `run_al` with goal="dataset". Two goals: mean IoU of the labels .8, and at most a tenth of the
masks below IoU .7 with probability .9. Judges: `learned` (free, from the 40), one that is always right, one that
knows nothing. People correct what is not accepted, at the price of the pixels they change, or draw it anew.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
from judge_pays import BASE, FOLDER, ROOT, interval

from vlm_itl.core.files import plain, write_json

DRAW = {"rate": 1000.0}  # a correction costs more than a drawing, so that nobody corrects
JUDGES: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("learned", {}),
    "perfect": ("mock", {"accuracy": 1.0}),
    "knows nothing": ("mock", {"kind": "binormal", "auc": 0.5}),
}
GOALS: dict[str, dict[str, Any]] = {"quality .8": {"quality": 0.8}, "bad .1": {"bad": 0.1}}
ROWS = [(goal, judge, "correct") for goal in GOALS for judge in JUDGES]
ROWS += [("quality .8", judge, "draw") for judge in ("learned", "knows nothing")]
BY = ("judge", "verified", "corrected", "human")
RAW, SUMMARY = ROOT / "results/label_pool.csv", ROOT / "results/label_pool.json"


def run_one(key: tuple[str, str, str, int, Path]) -> dict[str, Any]:
    "One run, and its account."
    from vlm_itl.experiment import make_config, run_al

    goal, judge, way, seed, work = key
    name, options = JUDGES[judge]
    out = work / f"{goal}-{judge}-{way}-{seed}".replace(" ", "_")
    shutil.rmtree(out, ignore_errors=True)
    settings = {**BASE, **FOLDER, "judge": name, "judge_options": options, "tau": 0.7, "steps": 0, "seed": seed}
    settings |= {"initial": 40, "increment": 1, "max_labelled": 40, "output_dir": str(out)}
    settings |= {"goal": "dataset", "goal_options": GOALS[goal], "fix_options": DRAW if way == "draw" else {}}
    found: dict[str, Any] = {"goal": goal, "judge": judge, "way": way, "seed": seed}
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            list(run_al(make_config(settings)))
    except Exception as error:  # the others go on
        return {**found, "error": f"{type(error).__name__}: {error}"[:500]}
    card = json.loads((out / "labels" / "labels.json").read_text())
    shutil.rmtree(out)
    measured = card["measured"]
    return {
        **found,
        "seconds": sum(card["human_seconds"].values()),
        "quality": measured["quality"],
        "bad": measured["bad"],
        "draw_all": measured["draw_all"]["seconds"],
        "verify_all": measured["verify_all"]["seconds"],
        "verify_quality": measured["verify_all"]["quality"],
        **{f"n_{name}": card["by"].get(name, 0) for name in BY},
        "cpu_seconds": time.process_time() - start,
    }


def _start() -> None:
    "What a worker process does first."
    import torch

    torch.set_num_threads(1)


def show(raw: pd.DataFrame) -> None:
    "Print and write the table: means and 95 % t intervals over the seeds."
    lines = []
    for (goal, judge, way), group in raw.groupby(["goal", "judge", "way"], sort=False):
        line: dict[str, Any] = {"goal": goal, "judge": judge, "the rest": way}
        for name, values in (
            ("hours", group["seconds"] / 3600),
            ("quality", group["quality"]),
            ("bad", group["bad"]),
            ("times cheaper than drawing all", group["draw_all"] / group["seconds"]),
            ("than verifying all", group["verify_all"] / group["seconds"]),
        ):
            line[name], line[f"{name} low"], line[f"{name} high"] = interval(values)
        line |= {name: group[name].mean() for name in (*(f"n_{name}" for name in BY), "verify_quality")}
        lines.append({**line, "n": len(group)})
    table = pd.DataFrame(lines)
    print(table.round(3).T.to_string())
    raw.round(5).to_csv(RAW, index=False)
    write_json(SUMMARY, plain({"table": table.to_dict("records")}))


def main() -> None:
    "Run what is missing, append a line for each, show all."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/label_pool.jsonl")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="run nothing")
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.is_file() else []
    done = {(r["goal"], r["judge"], r["way"], r["seed"]) for r in lines if "error" not in r}
    todo = [(*row, seed) for seed in range(given.seeds) for row in ROWS if (*row, seed) not in done]
    given.out.parent.mkdir(exist_ok=True)
    if not given.show and todo:
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(given.jobs, _start, maxtasksperchild=25) as pool, given.out.open("a") as file:
            for found in pool.imap_unordered(run_one, [(*key, given.out.parent / "label_pool") for key in todo]):
                lines.append(found)
                print(json.dumps(found), file=file, flush=True)
                print({name: value for name, value in found.items() if name != "cpu_seconds"}, flush=True)
    good = [line for line in lines if "error" not in line]
    show(pd.DataFrame(good) if good else pd.read_csv(RAW))


if __name__ == "__main__":
    main()
