"""Does choosing matter on the generated scenes? Every strategy against random, in pairs of the same seed.

    python benchmarks/choosing_matters.py                      # 4 strategies x 5 seeds, two at a time
    python benchmarks/choosing_matters.py --seeds 2 --jobs 1   # a taste

Runs are resumable: they lie in runs/choosing/, and a second call goes on where the first stopped. Results go to
results/choosing_matters.json and .csv: the area under the budget curve of test mean IoU, its paired difference to
random with a 95 % bootstrap interval over seeds, and p values corrected by Holm.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = ("random", "entropy", "margin", "coreset")
RECIPE = {"mode": "al", "initial": 0.1, "increment": 0.1, "max_labelled": 0.4, "gallery": 0, "keep_models": "none"}


def run_one(strategy: str, seed: int, folder: Path) -> None:
    """One run in this process."""
    from vlm_itl.experiment import make_config, run_al

    config = make_config(RECIPE, strategy=strategy, seed=seed, output_dir=str(folder / f"{strategy}-s{seed}"))
    for record in run_al(config):
        print(f"{strategy} seed {seed}: {record}", flush=True)


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "choosing")
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "SEED"), help="run one and stop")
    args = parser.parse_args()
    if args.one:
        return run_one(args.one[0], int(args.one[1]), args.folder)
    todo = [(strategy, seed) for seed in range(args.seeds) for strategy in STRATEGIES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLM_ITL_PROGRESS": "0"}

    def start(job: tuple[str, int]) -> None:
        command = [sys.executable, __file__, "--folder", str(args.folder), "--one", job[0], str(job[1])]
        subprocess.run(command, env=environment, check=True)

    with ThreadPoolExecutor(args.jobs) as workers:
        list(workers.map(start, todo))
    report(args.folder)


def report(folder: Path) -> None:
    """Compare the finished runs and write the results."""
    import vlm_itl
    from vlm_itl.compare import compare, plot_compare
    from vlm_itl.core import write_json
    from vlm_itl.report import list_runs, plot_learning_curve, round_table, save_png

    runs = list_runs(folder)
    result = compare(runs)
    print(result)
    out = ROOT / "results"
    out.mkdir(exist_ok=True)
    curves = {run.name: round_table(run)[["labelled_share", "test_mean_iou"]].to_dict("list") for run in runs}
    config = {k: v for k, v in runs[0].config.items() if k not in ("strategy", "seed", "output_dir")}
    content = {
        "version": vlm_itl.__version__,
        "command": "python benchmarks/choosing_matters.py",
        "table": result.table.to_dict("records"),
        "pairs": result.pairs.to_dict("records"),
        "notes": result.notes,
        "curves": curves,
        "config": config,
    }
    write_json(out / "choosing_matters.json", content)
    result.table.round(5).to_csv(out / "choosing_matters.csv", index=False)
    save_png(plot_compare(result), out / "choosing_matters.png")
    save_png(plot_learning_curve(runs), out / "choosing_matters_curves.png")


if __name__ == "__main__":
    main()
