"""Sweeps on this machine: what is refused, what is skipped, and what survives deaths, full disks and signals.

The points are a toy notebook without torch: six images, and ways to end. What a run keeps over an interruption is
tested by test_resume.py; here it is enough that the same command runs it again.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import psutil
import pytest
import torch

from vlm_itl.cli import cluster, local, points, run
from vlm_itl.cli.cluster import SlurmCrew, batch_script, read_cluster, run_dask
from vlm_itl.cli.grid import MOST_POINTS, Record, Sweep, make_points, open_sweep, table_rows
from vlm_itl.cli.local import Crew
from vlm_itl.cli.points import work_on
from vlm_itl.cli.sweep import main
from vlm_itl.core.checks import ConfigError, RunError
from vlm_itl.data.sources import toy_images
from vlm_itl.model.predict import Inference
from vlm_itl.probe.features import FeatureCache, look_once

COMMAND = [sys.executable, "-c", "import sys; from vlm_itl.cli.sweep import main; sys.exit(main())"]
PARAMETERS = """\
labelled: int = 2  # images with a mask
share: float | int = 1.0  # a share of them, or a count
seed: int = 0  # of everything random
seconds: float = 0.0  # how long it takes
fill: int = 0  # bytes it writes
device: str = "auto"  # how, not what
output_dir: str = ""  # the run folder
"""
BODY = """\
import json, os, time
from pathlib import Path

folder = Path(output_dir)
folder.mkdir(parents=True, exist_ok=True)
if labelled > 6:
    raise ValueError(f"labelled must be at most 6, not {labelled}")
started = len(list(folder.glob("start*")))
(folder / f"start{started}").write_text(str(os.getppid()))
if fill:
    (folder / "large").write_bytes(bytes(fill))
try:
    time.sleep(seconds if started == 0 else 0)
except KeyboardInterrupt:
    (folder / "checkpoint").touch()
    raise
(folder / "summary.json").write_text(json.dumps({"test": {"mean_iou": labelled / 6 + seed / 100}}))
print("run folder:", output_dir)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the toy notebook."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(BODY)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "run_toy.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grid(text: str) -> str:
    """A grid file in the current folder."""
    Path("grid.yaml").write_text(f"notebook: run_toy\n{text}\n")
    return "grid.yaml"


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true answer."""
    give_up = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < give_up, "it did not come"
        time.sleep(0.05)
    return answer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid: {labeled: [1]}", "no parameter 'labeled'. Did you mean 'labelled'?"),
        ("grid: {labelled: [two]}", "the notebook wants labelled: int"),
        ("grid: {labelled: []}", "grid: labelled must be a list of values, not empty"),
        ("grid: {labelled: 3}", "grid: labelled must be a list of values, such as [3]"),
        ("seeds: three", "seeds must be how many, or a list of whole numbers"),
        ("grid: {labelled: [1, 2, 1]}", "grid: labelled has 1 twice"),
        ("cases: [{labelled: 2}, {seed: 0}]", "points 1 and 2 of the grid compute the same"),
        ("grid: {seconds: [1, 1.0]}", "points 1 and 2 of the grid compute the same"),
        ("grid: {device: [cpu, cuda]}", "device changes nothing of what comes out"),
        ("grid: {seed: [1]}\nseeds: 2", "seed is set in two places"),
        ("seeds: 0", "seeds must be a whole number >= 1"),
        ("sedes: 3", "a grid file has no 'sedes'"),
        ("settings: {output_dir: x}", "output_dir is not yours to set"),
        ("settings: 3", "settings must hold lines like"),
        ("settings: {labelled: 010}", "is counted in eights"),
    ],
)
def test_a_bad_grid_is_one_line_and_starts_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert main([grid(text)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("vlm_itl_sweep: ") and err.count("\n") == 1 and said in err
    assert not (home / "runs").exists()


def test_one_image_is_not_all_of_them(home: Path) -> None:
    """`initial=1` and `initial=1.0` are two settings of a run; where a float is wanted, 1 and 1.0 are one."""
    assert len(open_sweep(grid("grid: {share: [1, 1.0]}"), "s").points) == 2
    with pytest.raises(ConfigError, match="points 1 and 2 of the grid compute the same"):
        open_sweep(grid("grid: {seconds: [1, 1.0]}"), "s")


def test_an_oversized_grid_is_counted_not_built(home: Path) -> None:
    axes = {name: list(range(500)) for name in ("labelled", "seed", "fill", "seconds")}
    started = time.process_time()
    with pytest.raises(
        ConfigError, match=rf"62,500,000,000 points \(500 labelled x .*, a sweep at most {MOST_POINTS:,}"
    ):
        make_points({"grid": axes}, home / "run_toy.ipynb", {})
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grid.yaml", "--jobs", "-1"], "--jobs must be a whole number >= 0"),
        (["grid.yaml", "--memory", "-3"], "--memory must be a number >= 0"),
        (["grid.yaml", "--engine", "dask"], "--engine dask needs the --address"),
        (["grid.yaml", "--engine", "slurm", "--cluster", "none.yaml"], "cannot read the cluster file none.yaml"),
        (["grid.yml"], "cannot read the grid file grid.yml"),
        (["empty.yaml"], "empty.yaml is empty"),
        (["folder"], "folder holds no sweep"),
    ],
)
def test_a_bad_option_is_one_line_and_starts_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    grid("seeds: 1")
    Path("empty.yaml").touch()
    Path("folder").mkdir()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert not (home / "runs").exists()


def test_nothing_is_left_to_print(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = open_sweep(grid("seeds: 1"), "s")
    sweep.run_folder(sweep.points[0]).mkdir()
    sweep.write(sweep.points[0], Record("done"))
    assert main(["s", "--print"]) == 2
    assert "all points are done" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "thesis.tex").touch()
    assert main([grid("seeds: 1"), "--out", "mine"]) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert os.listdir(home / "mine") == ["thesis.tex"]


def test_a_changed_grid_never_shows_what_another_one_did(home: Path) -> None:
    """The names of points that a grid has dropped are not given to others, and go back to whose they were."""
    for labelled in (1, 2, 3):
        sweep = open_sweep(grid(f"settings: {{labelled: {labelled}}}\ngrid: {{fill: [0, 1]}}"), "s")
        assert sweep.left() == [0, 1]
        for point in sweep.points:
            sweep.run_folder(point).mkdir()
            sweep.write(point, Record("done"))
    assert open_sweep(grid("settings: {labelled: 1}\ngrid: {fill: [0, 1]}"), "s").points[1].name == "fill=1"
    told = json.loads((sweep.path / "sweep.json").read_text())
    del told["names"], told["usual"]  # as it was written before it remembered
    (sweep.path / "sweep.json").write_text(json.dumps(told | {"points": []}))
    assert open_sweep(grid("settings: {labelled: 4}\ngrid: {fill: [0, 1]}"), "s").left() == [0, 1]


def test_a_setting_that_is_named_like_a_column_is_in_the_table(home: Path) -> None:
    rows = table_rows(open_sweep(grid("grid: {seconds: [0, 3], labelled: [2]}"), "s"))
    assert [(row["setting_seconds"], row["labelled"], row["seconds"]) for row in rows] == [(0, 2, 0.0), (3, 2, 0.0)]


def test_what_was_done_with_other_defaults_is_not_mixed_in(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody edits the parameters of the notebook, and gives the same command."""
    sweep = open_sweep(grid("grid: {fill: [0]}\nsettings: {seed: 3}"), "s")
    sweep.run_folder(sweep.points[0]).mkdir()
    sweep.write(sweep.points[0], Record("done"))
    text = (home / "run_toy.ipynb").read_text()
    (home / "run_toy.ipynb").write_text(text.replace("seed: int = 0", "seed: int = 9").replace('\\"auto', '\\"cpu'))
    assert main(["s"]) == 0  # the seed is given, and the device changes no result
    (home / "run_toy.ipynb").write_text(text.replace("labelled: int = 2", "labelled: int = 3"))
    for words in (["s"], ["grid.yaml", "--out", "s"], ["s", "--print"]):
        assert main(words) == 2
        assert "labelled is 3 in run_toy.ipynb now, and was 2 when fill=0 was done" in capsys.readouterr().err
    (home / "run_toy.ipynb").unlink()
    assert main(["s"]) == 0  # nothing is left to do


def test_points_that_other_code_has_done_are_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They stay, and whoever reads the table knows; an edited text is no other code."""
    sweep = open_sweep(grid("grid: {labelled: [2, 3]}"), "s")
    assert work_on(sweep, 0).state == "done"
    sweep.run_folder(sweep.points[1]).mkdir()
    sweep.write(sweep.points[1], Record("done"))  # by a library that did not look
    notebook = json.loads((home / "run_toy.ipynb").read_text())
    notebook["cells"].insert(0, {"cell_type": "markdown", "metadata": {}, "source": "# A title"})
    (home / "run_toy.ipynb").write_text(json.dumps(notebook))
    assert main(["s"]) == 0 and "other code" not in capsys.readouterr().out
    notebook["cells"].append({**notebook["cells"][-1], "source": "labelled += 1", "id": "more"})
    (home / "run_toy.ipynb").write_text(json.dumps(notebook))
    assert main(["s"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of the points that are done ran other code than run_toy.ipynb has now" in said and "labelled=2" in said
    (home / "run_toy.ipynb").unlink()
    assert main(["s"]) == 0 and "other code" not in capsys.readouterr().out


@pytest.mark.slow
def test_done_is_skipped_failed_is_tried_again_and_the_table_tells(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([grid("grid: {labelled: [3, 9]}"), "--out", "s"]) == 1
    first = capsys.readouterr()
    assert "failed  labelled=9" in first.out and "labelled must be at most 6" in first.out
    assert main(["s"]) == 1
    rows = list(csv.DictReader(open("s/table.csv")))
    assert [(row["state"], row["attempts"]) for row in rows] == [("done", "1"), ("failed", "2")]
    assert float(rows[0]["test_mean_iou"]) == 0.5 and "at most 6" in rows[1]["error"]
    assert main([grid("grid: {labelled: [3, 4]}\nsettings: {device: cpu}"), "--out", "s"]) == 0
    assert [record.attempts for point in Sweep("s").points if (record := Sweep("s").record(point))] == [1, 1]


def test_a_killed_worker_and_a_dead_kernel_lose_nothing(home: Path) -> None:
    """The process of one point, the kernel of another: both are run again, and the third never notices."""
    sweep = open_sweep(grid("settings: {seconds: 60}\nseeds: 2"), "s")

    def kill() -> None:
        """Both, as soon as they are at work."""
        starts = [sweep.run_folder(point) / "start0" for point in sweep.points]
        if not killed and all(path.is_file() and path.read_text() for path in starts):
            worker, other = (int(path.read_text()) for path in starts)
            (kernel,) = psutil.Process(other).children()
            os.kill(worker, signal.SIGKILL)
            kernel.kill()
            killed.append(worker)

    killed: list[int] = []
    crew = Crew(sweep, jobs=2, memory_gb=0.1)
    rest = crew._rest
    crew._rest = lambda: (kill(), rest())[1]  # type: ignore[method-assign]
    assert crew.run(sweep.left()) == 0
    assert killed and sweep.left() == []
    assert [record.attempts for point in sweep.points if (record := sweep.record(point))] == [2, 2]


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, str], None]]:
    """Mounts a disk of a size at a folder, or gives one that is mounted another size; gone after the test."""
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> None:
        options = f"size={size}" + (",remount" if folder in mounted else "")
        folder.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in dict.fromkeys(mounted):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="no `mount` here")
def test_a_full_disk_on_one_point(home: Path, small_disk: Callable[[Path, str], None]) -> None:
    """It fails in one line, the others end, and with more room the same command ends all."""
    sweep = open_sweep(grid("grid: {fill: [0, 4000000, 1]}"), "s")
    small_disk(sweep.run_folder(sweep.points[1]), "256k")
    told: dict[int, Record] = {}
    assert Crew(sweep, jobs=1, memory_gb=0.1, tell=told.__setitem__).run(sweep.left()) == 0
    assert [told[number].state for number in range(3)] == ["done", "failed", "done"]
    assert "No space left on device" in str(told[1].error) and "\n" not in str(told[1].error)
    small_disk(sweep.run_folder(sweep.points[1]), "16m")
    assert Crew(sweep, jobs=1, memory_gb=0.1).run(sweep.left()) == 0
    assert sweep.left() == [] and _attempts(sweep) == [1, 2, 1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="no `mount` here")
def test_one_point_fills_the_disk_of_all(
    home: Path, small_disk: Callable[[Path, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even records can be written any more; what was done before stays done, and the command says what it is."""
    small_disk(home / "s", "1m")
    assert main([grid("grid: {fill: [0, 4000000, 1]}"), "--out", "s", "--jobs", "1"]) in (1, 2)
    said = "".join(capsys.readouterr())
    assert "No space left on device" in said and "Traceback" not in said
    assert Sweep("s").left() == [1, 2]
    small_disk(home / "s", "16m")
    assert main(["s"]) == 0
    assert Sweep("s").left() == [] and _attempts(Sweep("s"))[0] == 1


def _attempts(sweep: Sweep) -> list[int]:
    """How often each point was started."""
    return [record.attempts for point in sweep.points if (record := sweep.record(point)) is not None]


def test_where_not_even_the_record_can_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = open_sweep(grid("seeds: 1"), "s")

    def full(*_: Any) -> None:
        raise RunError("cannot write s/seed=0.json: No space left on device.")

    monkeypatch.setattr(Sweep, "write", full)
    record = work_on(sweep, 0)
    assert record.state == "failed" and "No space left" in str(record.error)
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert work_on(sweep, 0).state == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGUSR1, 85), (signal.SIGUSR2, 85)]
)
def test_a_signal_ends_in_good_order(home: Path, number: int, code: int) -> None:
    """Each point is told once and writes its checkpoint; the exit code says who asked."""
    process = subprocess.Popen([*COMMAND, grid("settings: {seconds: 60}\nseeds: 2"), "--out", "s", "--jobs", "1"])
    wait_for((home / "s/seed=0/start0").is_file)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    assert (home / "s/seed=0/checkpoint").is_file() and not (home / "s/seed=1").exists()
    assert json.loads((home / "s/seed=0.json").read_text())["state"] == "stopped"


@pytest.mark.slow
def test_a_killed_command_takes_its_points_along(home: Path) -> None:
    """They notice, and stop in good order; the next command, which comes at once, waits for them."""
    process = subprocess.Popen([*COMMAND, grid("settings: {seconds: 60}\nseeds: 1"), "--out", "s"])
    wait_for((home / "s/seed=0/start0").is_file)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert main(["s"]) == 0
    assert (home / "s/seed=0/checkpoint").is_file() and _attempts(Sweep("s")) == [2]


def test_a_signal_before_the_notebook(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a point waits for its turn it can be stopped, too; nothing is computed, and the record says so."""
    sweep = open_sweep(grid("seeds: 1"), "s")
    monkeypatch.setattr(points, "take_turn", lambda: signal.raise_signal(signal.SIGUSR1))
    record = work_on(sweep, 0)
    assert (record.state, record.signal) == ("stopped", signal.SIGUSR1) and sweep.record(sweep.points[0]) == record
    assert not sweep.run_folder(sweep.points[0]).exists()


@pytest.mark.slow
def test_two_commands_at_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([*COMMAND, grid("settings: {seconds: 60}\nseeds: 1"), "--out", "s"])
    wait_for((home / "s/seed=0/start0").is_file)
    assert main(["s"]) == 2
    assert "is in use by another process" in capsys.readouterr().err
    with pytest.raises(RunError, match="point seed=0 is in use"):
        work_on(Sweep("s"), 0)
    process.send_signal(signal.SIGINT)
    process.wait()


@pytest.mark.slow
def test_points_by_name_tell_what_they_come_to(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the jobs of an array do; the table of all is made by whoever asks for all."""
    path = grid("grid: {labelled: [3, 9]}\nseeds: 2")
    assert main([path, "--out", "s", "--only", "labelled=3,seed=0", "--only", "labelled=3,seed=1"]) == 0
    said = capsys.readouterr().out
    assert "done    labelled=3,seed=0" in said and "mean IoU 0.510 (test)" in said
    assert not Path("s/table.csv").exists()
    assert main(["s", "--only", "labelled=9,seed=0"]) == 1
    assert main(["s"]) == 1
    assert "3  2 of 2          0.505  0.4415  0.5685" in capsys.readouterr().out
    assert Path("s/settings.png").is_file()


@pytest.mark.slow
def test_memory_decides_how_many(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one, one runs at a time; nothing waits for ever."""
    monkeypatch.setattr(local, "free_gb", lambda: 0.5)
    sweep = open_sweep(grid("seeds: 2"), "s")
    crew, most = Crew(sweep, jobs=2), []
    rest = crew._rest
    crew._rest = lambda: (most.append(len(crew.running)), rest())[1]  # type: ignore[method-assign,func-returns-value]
    crew.run(sweep.left())
    assert max(most) == 1 and sweep.left() == []
    assert all(record.peak_gb > 0.01 for point in sweep.points if (record := sweep.record(point)))


SMALL = "data_options: {n_train: 24, n_test: 8}, initial: 6, increment: 6, max_labelled: 12, image_size: 48"


@pytest.mark.slow
def test_one_wandb_run_a_round_across_requeues(home: Path) -> None:
    """Stopped by a scheduler in its second round, and run again: each round is told under one id, and so is the end."""
    settings = f"settings: {{{SMALL}, batch_size: 4, gallery: 0, steps: 200, save_every: 20, log_with: wandb}}"
    Path("grid.yaml").write_text(f"notebook: run_al\n{settings}\nseeds: 1\n")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    words = [*COMMAND, "grid.yaml", "--out", "s"]
    process = subprocess.Popen(words, env=environment)
    wait_for(lambda: list((home / "s/seed=0").glob(".round_001.work/**/checkpoint-*")), 240)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=120) == 85
    before = _wandb_ids(home / "s/seed=0")
    assert len(before) == 1  # the first round
    assert subprocess.run(words, env=environment, check=False).returncode == 0
    after = _wandb_ids(home / "s/seed=0")
    assert after[:1] == before and len(set(after)) == 3  # two rounds and the summary


def _wandb_ids(run: Path) -> list[str]:
    """The ids under which a run was told, in the order of time."""
    return [path.name.rpartition("-")[2] for path in sorted(run.glob("wandb/**/offline-run-*"))]


def _look(folder: str, log: str) -> None:
    """A process that wants the features of the toy's images."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.05)
        return pixels.amax((2, 3)).half()

    torch.set_num_threads(1)
    keys = look_once(toy_images().train, Inference(16), FeatureCache(folder), b"brightest", encode)
    assert all(np.isfinite(FeatureCache(folder).read(key).features).all() for key in keys)  # type: ignore[union-attr]


def test_features_are_written_once(tmp_path: Path) -> None:
    """Three processes want the same four images: each is looked at once."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_look, args=(str(tmp_path / "cache"), str(tmp_path / "log"))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 4


SHARES = [({"SLURM_CPUS_PER_TASK": "3"}, "3"), ({"OMP_NUM_THREADS": "5"}, "5"), ({}, "2")]


@pytest.mark.parametrize(("given", "threads"), SHARES)
def test_a_job_has_as_many_threads_as_processors(home: Path, given: dict[str, str], threads: str) -> None:
    """Torch would take all that it sees, and end elsewhere than the same run with its share."""
    (home / "slurm.yaml").write_text("cpus: 2\n")
    script = batch_script(open_sweep(grid("seeds: 1"), "s"), [["seed=0"]], read_cluster(home / "slurm.yaml"))
    shell = script[: script.index("points=(")] + "echo $OMP_NUM_THREADS\n"
    environment = {"PATH": os.environ["PATH"], **given}
    said = subprocess.run(["bash"], input=shell, env=environment, capture_output=True, text=True).stdout
    assert said.strip() == threads


def test_without_slurm_or_dask_there_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = open_sweep(grid("seeds: 1"), "s")
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(ConfigError, match="there is no Slurm here"):
        SlurmCrew(sweep, read_cluster(None), lambda number, record: None).submit([0])
    pytest.importorskip("distributed", reason="dask is not installed")
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.5)
    with pytest.raises(ConfigError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        run_dask(sweep, [["seed=0"]], "tcp://127.0.0.1:9", lambda number, record: None)


@pytest.mark.slow
def test_dask(home: Path) -> None:
    """A cluster of processes: points end, a refused one is told, and a worker that is killed costs an attempt."""
    distributed = pytest.importorskip("distributed", reason="dask is not installed (pip install 'vlm_itl[dask]')")
    sweep = open_sweep(grid("cases: [{labelled: 9}, {labelled: 1}, {seconds: 60}]"), "s")
    told: dict[str, Record] = {}
    with distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as workers:
        helper = multiprocessing.get_context("fork").Process(target=_kill_worker, args=(str(home / "s/seconds=60"),))
        helper.start()
        names = [[point.name] for point in sweep.points]
        run_dask(sweep, names, workers.scheduler_address, lambda n, r: told.__setitem__(sweep.points[n].name, r))
        helper.join()
    assert {name: record.state for name, record in told.items()} == {
        "labelled=9": "failed", "labelled=1": "done", "seconds=60": "done"
    }  # fmt: skip


@pytest.mark.slow
def test_a_dask_scheduler_that_disappears(home: Path) -> None:
    """One line; what its workers had begun ends in good order, and the same sweep goes on elsewhere."""
    pytest.importorskip("distributed", reason="dask is not installed (pip install 'vlm_itl[dask]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--host", address]
    scheduler = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    words = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    worker = subprocess.Popen([*words, "--death-timeout", "20"], stderr=subprocess.DEVNULL)
    try:
        words = [*COMMAND, grid("settings: {seconds: 20}\nseeds: 2"), "--out", "s", "--engine", "dask"]
        process = subprocess.Popen([*words, "--address", address], text=True, stderr=subprocess.PIPE)
        wait_for((home / "s/seed=0/start0").is_file)
        scheduler.kill()
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and f"the Dask scheduler at {address} is gone" in said, said
    finally:
        for process in (scheduler, worker):
            process.terminate()
            process.wait(timeout=60)
    assert main(["s"]) == 0


def _kill_worker(folder: str) -> None:
    """Kill the process that works on a point."""
    start = Path(folder) / "start0"
    wait_for(lambda: start.is_file() and start.read_text())
    os.kill(int(start.read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_the_run_command_answers_a_scheduler(home: Path) -> None:
    """`vlm_itl_run` alone, under SIGUSR1: 85, and the kernel, which the scheduler signals too, lives to write."""
    words = [sys.executable, "-c", "import sys; from vlm_itl.cli.run import main; sys.exit(main())", "run_toy"]
    process = subprocess.Popen([*words, "out.ipynb", "-p", "seconds", "60", "-p", "output_dir", "r"])
    wait_for((home / "r/start0").is_file)
    time.sleep(0.2)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == run.GO_ON == 85
    assert (home / "r/checkpoint").is_file()
