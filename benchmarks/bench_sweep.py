"""What a sweep costs beside a bare pool of processes that does the same executions.

Run as `python benchmarks/bench_sweep.py` (minutes). Both run the same notebook with papermill at the same points, two
at a time, in alternation: ours as `vlm_itl_sweep` does (a process a point, records, memory watched, starts staggered),
the peer as `concurrent.futures.ProcessPoolExecutor` over `papermill.execute_notebook`. Two notebooks: a short one that
computes for two seconds, and `run_al` on generated scenes with a short training. The results of both are compared
first. Seconds on the clock, in turns: CPU time of processes that others start is not all to be had. On a busy machine a
turn may take half as long again as the one before it, most of it in the notebooks, which are the same for both. So the
goal is held to what each way adds to its executions: its time over that of the executions (as papermill wrote it into
the executed notebooks) shared out over the processes. Where executions take equally long, that is the ratio of times.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch read it

import nbformat
from papermill import execute_notebook
from table import Row, compare, publish, same, take_turns

from vlm_itl.cli.grid import Sweep, open_sweep
from vlm_itl.cli.local import Crew
from vlm_itl.core.files import project_root

PARAMETERS = """\
seed: int = 0  # of everything random
output_dir: str = ""  # the run folder
"""
BODY = """\
import json, time
from pathlib import Path

start, value = time.process_time(), seed
while time.process_time() - start < 2:
    value = (value * 6364136223846793005 + 1) % 2**64
Path(output_dir).mkdir(parents=True, exist_ok=True)
Path(output_dir, "summary.json").write_text(json.dumps({"test": {"mean_iou": seed / 10}}))
"""
GOAL = "<= 1.1"
SMALL = {"initial": 6, "increment": 6, "max_labelled": 12, "steps": 20, "image_size": 48, "gallery": 0}


def short_notebook(folder: Path) -> Path:
    "A notebook that computes for two seconds."
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(BODY)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "run_short.ipynb")
    return folder / "run_short.ipynb"


def execute(task: tuple[str, str, dict[str, Any]]) -> None:
    "One execution of the peer."
    notebook, executed, settings = task
    execute_notebook(notebook, executed, settings, progress_bar=False)


def ours(sweep: Sweep, jobs: int) -> None:
    "All points of a sweep anew."
    for path in sweep.path.iterdir():
        if path.name not in ("sweep.json", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    Crew(sweep, jobs).run(sweep.left())
    assert not sweep.left()


def peer(sweep: Sweep, jobs: int, folder: Path) -> None:
    "The same executions by a bare pool."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tasks = [
        (str(sweep.notebook), str(folder / f"{p.name}.ipynb"), {**p.settings, "output_dir": str(folder / p.name)})
        for p in sweep.points
    ]
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        list(pool.map(execute, tasks))


def results(folder: Path, sweep: Sweep) -> list[Any]:
    "What each point measured on test."
    return [json.loads((folder / p.name / "summary.json").read_text())["test"]["mean_iou"] for p in sweep.points]


def executions(folder: Path, sweep: Sweep, jobs: int) -> float:
    "Seconds of all executions, as papermill has noted them, shared out over the processes."
    notebooks = [nbformat.read(folder / f"{point.name}.ipynb", as_version=4) for point in sweep.points]
    return sum(float(notebook.metadata.papermill.duration) for notebook in notebooks) / jobs


def turns(part: str, sweep: Sweep, jobs: int, repeats: int, warm: int) -> list[Row]:
    "Equal first, then time on the clock, after some warm turns each."
    pool = sweep.path.with_name(f"{sweep.path.name}-pool")
    added: dict[str, list[float]] = {"ours": [], "peer": []}  # time of a turn over that of its executions

    def timed(name: str, way: Callable[[], None], folder: Path) -> None:
        started = time.perf_counter()
        way()
        added[name].append((time.perf_counter() - started) / executions(folder, sweep, jobs))

    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: timed("ours", lambda: ours(sweep, jobs), sweep.path),
        "peer": lambda: timed("peer", lambda: peer(sweep, jobs, pool), pool),
    }
    taken = take_turns(ways, repeats, warm, clock=time.perf_counter)
    differences = [abs(a - b) for a, b in zip(results(sweep.path, sweep), results(pool, sweep), strict=True)]
    what = f"sweep, {len(sweep.points)} points of {part}, {jobs} at once"
    return [
        same(f"{what}: results", max(differences)),
        compare(f"{what}: time over executions", added["ours"][warm:], added["peer"][warm:], "x", GOAL),
        compare(f"{what}: time", taken["ours"], taken["peer"], "s", "none"),
    ]


def main(repeats: int = 3, points: int = 4, jobs: int = 2, real: bool = True) -> list[Row]:
    "All rows."
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        short = open_sweep({"notebook": str(short_notebook(folder)), "seeds": points}, folder / "short")
        rows = turns("2 CPU seconds", short, jobs, repeats, 1)
        if real:
            notebook = str(project_root() / "nbs" / "run_al.ipynb")
            small = open_sweep({"notebook": notebook, "settings": SMALL, "seeds": points}, folder / "real")
            rows += turns("run_al, 20 steps a round", small, jobs, repeats, 0)  # the short ones have warmed the disk
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="only the notebook that takes two seconds")
    given = parser.parse_args()
    publish(main(given.repeats, given.points, given.jobs, not given.short))
