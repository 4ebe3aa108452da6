"""Sweeps on a real Slurm of one node (tests/small_slurm.py): time limits, preemption, scancel, lost nodes, a controller
that restarts. What is left of a run is compared with the same run undisturbed, byte by byte.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_slurm import SmallSlurm, missing, wait_for

from vlm_itl.data.scenes import make_scenes

pytest.importorskip("submitit", reason="submitit is not installed (pip install 'vlm_itl[slurm]')")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

COMMAND = [sys.executable, "-c", "import sys; from vlm_itl.cli.sweep import main; sys.exit(main())"]
SETTINGS = {"data_options": {"n_train": 24, "n_test": 8}, "initial": 6, "increment": 6, "max_labelled": 12}
SETTINGS |= {"image_size": 48, "batch_size": 4, "gallery": 1, "save_every": 50}
CLUSTER = {"time": 1, "grace": 5, "poll": 0.5}
BARE = """\
import sys


class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vlm_itl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Bare())
"""  # a sitecustomize.py of a node where nobody has installed us
LONG_S = 200  # more than three times the shortest limit that Slurm knows


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallSlurm]:
    """One Slurm for all tests."""
    with SmallSlurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(autouse=True)
def node_in_order(slurm: SmallSlurm) -> Iterator[None]:
    """Whatever a test has done to the node and the queue, the next one finds both as new."""
    yield
    slurm.ask("scancel", "--me")
    slurm.ask("scontrol", "update", f"nodename={slurm.name}", "state=resume")
    wait_for(lambda: not slurm.ask("squeue", "-h"), 90, "the queue is empty")
    wait_for(lambda: "idle" in slurm.ask("sinfo", "-h", "-o", "%T"), 90, "the node is idle")


class OnSlurm:
    """A sweep as a user starts it."""

    def __init__(
        self,
        slurm: SmallSlurm,
        folder: Path,
        seeds: int = 1,
        steps: int = 60,
        settings: Mapping[str, Any] | None = None,  # beside the usual ones
        **cluster: Any,
    ):
        self.slurm, self.folder, self.out = slurm, folder, folder / "sweep"
        grid = {"notebook": "run_al", "settings": {**SETTINGS, "steps": steps, **(settings or {})}, "seeds": seeds}
        (folder / "grid.yaml").write_text(json.dumps(grid))  # JSON is YAML
        told = {**CLUSTER, **cluster}
        (folder / "slurm.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in told.items()))

    def start(self, *more: str, engine: str = "slurm") -> subprocess.Popen[str]:
        """The command."""
        words = [*COMMAND, "grid.yaml", "--out", str(self.out), "--engine", engine, "--cluster", "slurm.yaml", *more]
        environment = {**os.environ, **self.slurm.environment}
        environment.pop("VLM_ITL_MAX_STEPS", None)
        environment["OMP_NUM_THREADS"] = "1"  # with two, sums end elsewhere after a thousand steps
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, cwd=self.folder, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT
        )

    def record(self, seed: int = 0) -> dict[str, Any]:
        """How the point last ended."""
        path = self.out / f"seed={seed}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def trains(self, seed: int = 0) -> bool:
        """Has this attempt written a checkpoint?"""
        began = self.out / f"seed={seed}.json"
        written = (self.out / f"seed={seed}").glob(".round_*.work/**/checkpoint-*")
        return began.is_file() and any(path.stat().st_mtime > began.stat().st_mtime for path in written)

    def jobs(self) -> list[str]:
        """Ids in the queue."""
        return self.slurm.ask("squeue", "-h", "-r", "-o", "%i").split()


def content(run: Path) -> dict[str, bytes]:
    """What must be the same: metrics, selections and weights of each round, and the test."""
    names = [*run.glob("round_*/**/*.safetensors"), *run.glob("test_*.json")]
    files = {str(path.relative_to(run)): path.read_bytes() for path in names}
    for path in run.glob("round_*/record.json"):
        record = json.loads(path.read_text())
        kept = {name: value for name, value in record.items() if name != "seconds"}
        kept["training"] = {n: v for n, v in (record.get("training") or {}).items() if "second" not in n}
        files[str(path.relative_to(run))] = json.dumps(kept, sort_keys=True).encode()
    assert len(files) >= 3
    return files


class Undisturbed:
    """The same runs on this machine, without a scheduler, each done once."""

    def __init__(self, slurm: SmallSlurm, factory: pytest.TempPathFactory):
        self.slurm, self.factory, self.runs = slurm, factory, dict[int, Path]()

    def run(self, steps: int) -> Path:
        """The run folder."""
        if steps not in self.runs:
            sweep = OnSlurm(self.slurm, self.factory.mktemp("undisturbed"), steps=steps)
            process = sweep.start(engine="local")
            said = process.communicate(timeout=1200)[0]
            assert process.returncode == 0, said
            self.runs[steps] = sweep.out / "seed=0"
        return self.runs[steps]

    def __call__(self, steps: int) -> dict[str, bytes]:
        """What is left of it."""
        return content(self.run(steps))

    def a_step(self, steps: int) -> float:
        """Seconds of a training step, in a round that need not import anything any more."""
        return json.loads((self.run(steps) / "round_001/record.json").read_text())["seconds"]["train"] / steps


@pytest.fixture(scope="module")
def undisturbed(slurm: SmallSlurm, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """One for all tests."""
    return Undisturbed(slurm, tmp_path_factory)


def test_a_time_limit_shorter_than_the_run(slurm: SmallSlurm, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """At least three times its time is up; it comes back by itself, and ends as if nothing had been.

    A job has its minute. So the run is made as long as takes LONG_S of training on this machine, as it is now.
    """
    steps = 10 * round(LONG_S / undisturbed.a_step(600) / 20)  # in each of two rounds
    sweep = OnSlurm(slurm, tmp_path, steps=steps)
    process = sweep.start()
    said = process.communicate(timeout=1500)[0]
    record = sweep.record()
    assert process.returncode == 0 and record["state"] == "done", said
    assert record["attempts"] >= 4, record
    assert "Traceback" not in said
    assert content(sweep.out / "seed=0") == undisturbed(steps)


def test_requeued_by_hand_three_times(slurm: SmallSlurm, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """An administrator requeues the job in its training; nothing but time is lost."""
    sweep = OnSlurm(slurm, tmp_path, time=30, steps=1200)
    process = sweep.start()
    for attempt in range(1, 4):
        wait_for(lambda n=attempt: sweep.record().get("attempts") == n and sweep.trains(), 120, "it trains")
        slurm.ask("scontrol", "requeue", sweep.jobs()[0])
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and sweep.record()["attempts"] >= 4, said
    assert content(sweep.out / "seed=0") == undisturbed(1200)


def test_cancelled_and_started_again(slurm: SmallSlurm, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """`scancel` ends the job in good order, it does not come back, and the same command goes on."""
    sweep = OnSlurm(slurm, tmp_path, time=30)
    process = sweep.start()
    wait_for(sweep.trains, 120, "it trains")
    slurm.ask("scancel", sweep.jobs()[0])
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "the same command goes on" in said, said
    assert sweep.record()["state"] == "stopped" and sweep.record()["signal"] == signal.SIGTERM
    process = sweep.start()
    assert process.wait(timeout=300) == 0
    assert sweep.record()["attempts"] == 2 and content(sweep.out / "seed=0") == undisturbed(60)


def test_preempted_by_somebody_more_important(slurm: SmallSlurm, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """The job writes its checkpoint in the grace period, makes room, and comes back afterwards."""
    sweep = OnSlurm(slurm, tmp_path, time=30, partition="low", cpus=2)
    process = sweep.start()
    wait_for(sweep.trains, 120, "it trains")
    slurm.ask("sbatch", "-p", "high", "-c", "2", "-o", "/dev/null", "--wrap", "sleep 3")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and sweep.record()["attempts"] == 2, said
    assert content(sweep.out / "seed=0") == undisturbed(60)


def test_a_drained_node_and_a_controller_that_restarts(
    slurm: SmallSlurm, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """A node that is drained ends what it has and takes nothing new; a controller that is away is waited for."""
    sweep = OnSlurm(slurm, tmp_path, time=30, seeds=2, cpus=2)
    process = sweep.start()
    wait_for(sweep.trains, 120, "the first trains")
    slurm.ask("scontrol", "update", f"nodename={slurm.name}", "state=drain", "reason=test")
    slurm.stop("slurmctld")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=25)  # longer than squeue asks on its own
    slurm.again("slurmctld")
    wait_for(lambda: sweep.record().get("state") == "done", 200, "the first has ended")
    wait_for(lambda: len(sweep.jobs()) == 1, 120, "the controller has heard of it")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    assert not sweep.record(1)  # it was not begun, and waits
    slurm.ask("scontrol", "update", f"nodename={slurm.name}", "state=resume")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and [sweep.record(seed)["attempts"] for seed in (0, 1)] == [1, 1], said
    assert "the scheduler does not answer" in said and "DOWN, DRAINED" in said, said
    assert content(sweep.out / "seed=0") == undisturbed(60)


def test_a_node_that_dies(slurm: SmallSlurm, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """Without warning, without a checkpoint of that moment; what it had goes on when there is a node again."""
    sweep = OnSlurm(slurm, tmp_path, time=30)
    process = sweep.start()
    wait_for(sweep.trains, 120, "it trains")
    slurm.die()
    assert sweep.record()["state"] == "running"
    slurm.ask("scontrol", "update", f"nodename={slurm.name}", "state=down", "reason=test")  # SlurmdTimeout does it too
    wait_for(lambda: "PENDING" in slurm.ask("squeue", "-h", "-o", "%T"), 60, "the job waits for a node")
    slurm.again("slurmd")
    slurm.ask("scontrol", "update", f"nodename={slurm.name}", "state=resume")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and sweep.record()["attempts"] == 2, said
    assert content(sweep.out / "seed=0") == undisturbed(60)


def test_who_stops_watching_stops_nothing(slurm: SmallSlurm, tmp_path: Path) -> None:
    """Ctrl-C leaves the jobs alone; the same command submits nothing twice and watches again."""
    sweep = OnSlurm(slurm, tmp_path, time=30, seeds=2, steps=2)
    process = sweep.start()
    wait_for(lambda: len(sweep.jobs()) == 2, 60, "both are in the queue")
    wait_for((sweep.out / "jobs.json").is_file, 20, "the command has noted it")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the jobs go on by themselves" in said, said
    process = sweep.start()
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "0 jobs submitted, 2 there already" in said, said
    assert [sweep.record(seed)["attempts"] for seed in (0, 1)] == [1, 1]


def test_the_printed_script_works(slurm: SmallSlurm, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """`--print` without submitit; exit code 85 brings a job back."""
    sweep = OnSlurm(slurm, tmp_path, time=30)
    script = sweep.start("--print").communicate(timeout=60)[0]
    (tmp_path / "sweep.sh").write_text(script)
    subprocess.run(["sbatch", "sweep.sh"], cwd=tmp_path, check=True, env={**os.environ, **slurm.environment})
    wait_for(sweep.trains, 120, "it trains")
    slurm.ask("scancel", "--signal=USR1", sweep.jobs()[0])
    wait_for(lambda: sweep.record().get("state") == "done", 200, "it came back, and is done")
    assert sweep.record()["attempts"] == 2 and content(sweep.out / "seed=0") == undisturbed(60)


def test_a_worker_without_the_package(slurm: SmallSlurm, tmp_path: Path) -> None:
    """The log's last line says what is wrong, and the command repeats it, once."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE)
    sweep = OnSlurm(slurm, tmp_path, seeds=2, setup=[f"export PYTHONPATH={tmp_path / 'bare'}"])
    process = sweep.start()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "No module named 'vlm_itl'" in said and "Its Python lacks a package" in said
    assert "Traceback" not in said


def test_a_worker_without_the_data(slurm: SmallSlurm, tmp_path: Path) -> None:
    """A disk that the node does not see: the point fails in one line, and goes on when it does."""
    data, away = tmp_path / "data", tmp_path / "unmounted"
    shutil.copytree(make_scenes(n_train=24, n_test=8), data)
    sweep = OnSlurm(slurm, tmp_path, settings={"dataset": str(data), "data_options": {}})
    slurm.ask("scontrol", "update", f"nodename={slurm.name}", "state=drain", "reason=test")
    process = sweep.start()
    wait_for(sweep.jobs, 60, "it is in the queue")
    data.rename(away)
    slurm.ask("scontrol", "update", f"nodename={slurm.name}", "state=resume")
    said = process.communicate(timeout=120)[0]
    (line,) = [line for line in said.splitlines() if line.startswith("failed")]
    assert process.returncode == 1 and f"{data}: no such folder" in line, said
    away.rename(data)
    assert sweep.start().wait(timeout=200) == 0
    assert sweep.record()["state"] == "done"


def test_a_scheduler_that_is_gone(slurm: SmallSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and nothing is started."""
    monkeypatch.setitem(slurm.environment, "SLURM_CONF", str(tmp_path / "slurm.conf"))
    gone = (slurm.folder / "slurm.conf").read_text().replace("SlurmctldPort=", "SlurmctldPort=1 #")
    (tmp_path / "slurm.conf").write_text(gone)
    sweep = OnSlurm(slurm, tmp_path)
    process = sweep.start()
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 2 and "squeue says: slurm_load_jobs error: Unable to contact slurm" in said, said
    assert not (sweep.out / "jobs.json").exists()
