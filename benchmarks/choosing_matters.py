"""Does choosing matter on the generated scenes? Every strategy against random, in pairs of the same seed.

    python benchmarks/choosing_matters.py                      # 4 strategies x 5 seeds at 400 steps, two at a time
    python benchmarks/choosing_matters.py --set all            # every score, aggregate, select and start, at 200 steps
    python benchmarks/choosing_matters.py --seeds 2 --jobs 1   # a taste

Runs are resumable: they lie in runs/choosing_few/ or runs/choosing_all/, and a second call goes on where the first
stopped. Results go to results/choosing_matters.json and .csv, or results/all_strategies.json and .csv: the area under
the budget curve of test mean IoU, its paired difference to random with a 95 % bootstrap interval over seeds, and p
values corrected by Holm. Trainings of 400 steps have not converged: the areas say which choice helps early.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE: dict[str, Any] = {
    "mode": "al", "initial": 0.1, "increment": 0.1, "max_labelled": 0.4, "gallery": 0, "keep_models": "none",
    "data_options": {"shift": True},  # all classes alike in test, unlike in the pool
}  # fmt: skip
Arm = tuple[str, dict[str, Any]]  # strategy, further settings

FEW: list[Arm] = [(name, {}) for name in ("random", "entropy", "margin", "coreset")]
PLAIN = (
    *("random", "class_random", "entropy", "margin", "least_confidence"),  # scores of one look
    *("bald", "expected_entropy-mean-top", "variation_ratio-mean-top"),  # of several
    *("entropy-topk-top", "entropy-class_balanced-top", "entropy-boundary-top", "entropy-patch_max-top"),  # aggregates
    *("entropy-mean-power", "entropy-mean-softmax", "entropy-mean-softrank", "entropy-mean-class_stratified"),
    *("coreset", "typiclust", "probcover", "badge"),  # features or gradients alone
)
ALL: list[Arm] = [
    *((name, {}) for name in PLAIN),
    # the pool is 450 images and 45 are asked for, so the default of 10 times as many would keep them all
    *((f"entropy-mean-{s}", {"strategy_options": {"prefilter": 2}}) for s in ("coreset", "typiclust", "probcover")),
    ("entropy-mean-badge", {"strategy_options": {"prefilter": 2}}),
    ("entropy-mean-power", {"strategy_options": {"beta": 4}}),
    ("entropy-mean-class_stratified", {"strategy_options": {"beta": 1}}),
    *(("entropy", {"cold_start": start}) for start in ("typiclust", "probcover", "coreset")),
]
SETS: dict[str, tuple[list[Arm], dict[str, Any], str]] = {
    "few": (FEW, {}, "choosing_matters"),
    "all": (ALL, {"steps": 200}, "all_strategies"),
}


def arm_name(arm: Arm) -> str:
    """A folder name."""
    strategy, more = arm
    flat = {
        k: v for key, value in more.items() for k, v in (value if isinstance(value, dict) else {key: value}).items()
    }
    return "-".join([strategy, *(f"{key}_{value}" for key, value in flat.items())])


def run_one(which: str, number: int, seed: int, folder: Path) -> None:
    """One run in this process."""
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_al

    arms, recipe, _ = SETS[which]
    strategy, more = arms[number]
    out = str(folder / f"{arm_name(arms[number])}-s{seed}")
    for record in run_al(make_config({**RECIPE, **recipe, **more}, strategy=strategy, seed=seed, output_dir=out)):
        print(f"{arm_name(arms[number])} seed {seed}: {record}", flush=True)


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=list(SETS), default="few")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", nargs=2, type=int, metavar=("NUMBER", "SEED"), help="run one of the set and stop")
    args = parser.parse_args()
    folder = args.folder or ROOT / "runs" / f"choosing_{args.set}"
    arms, _, name = SETS[args.set]
    if args.one:
        return run_one(args.set, *args.one, folder)
    todo = [(number, seed) for seed in range(args.seeds) for number in range(len(arms))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLM_ITL_PROGRESS": "0"}

    def start(job: tuple[int, int]) -> None:
        if (folder / f"{arm_name(arms[job[0]])}-s{job[1]}" / "summary.json").is_file():
            return
        command = [sys.executable, __file__, "--set", args.set, "--folder", str(folder), "--one", *map(str, job)]
        subprocess.run(command, env=environment, check=True)

    with ThreadPoolExecutor(args.jobs) as workers:
        list(workers.map(start, todo))
    report(folder, name, f"python benchmarks/choosing_matters.py{' --set all' if args.set == 'all' else ''}")


def report(folder: Path, name: str, command: str) -> None:
    """Compare the finished runs and write the results."""
    import vlm_itl
    from vlm_itl.core.figures import save_png
    from vlm_itl.core.files import write_json
    from vlm_itl.reports.compare import compare, plot_compare
    from vlm_itl.reports.report import list_runs, round_table
    from vlm_itl.reports.run_figures import plot_learning_curve

    runs = list_runs(folder)
    result = compare(runs)
    print(result)
    out = ROOT / "results"
    out.mkdir(exist_ok=True)
    curves = {run.name: round_table(run)[["labelled_share", "test_mean_iou"]].to_dict("list") for run in runs}
    arm = ("strategy", "strategy_options", "cold_start", "seed", "output_dir")
    content = {
        "version": vlm_itl.__version__,
        "command": command,
        "table": result.table.to_dict("records"),
        "pairs": result.pairs.to_dict("records"),
        "notes": result.notes,
        "curves": curves,
        "config": {k: v for k, v in runs[0].config.items() if k not in arm},
    }
    write_json(out / f"{name}.json", content)
    result.table.round(5).to_csv(out / f"{name}.csv", index=False)
    save_png(plot_compare(result), out / f"{name}.png")
    if len(result.table) < 8:
        save_png(plot_learning_curve(runs), ROOT / "nbs" / "images" / f"{name}_curves.png")  # README and book show it


if __name__ == "__main__":
    main()
