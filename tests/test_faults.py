"""A full disk, a read-only folder, data that vanish, no memory left: one clear line each, and the run goes on."""

import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faults import at_file, at_forward, at_step, files, in_child, no_space
from test_resume import content, settings

from vlm_itl.data.scenes import make_scenes
from vlm_itl.experiment.loop import run_al
from vlm_itl.judging.trial import make_judge_config, try_judge
from vlm_itl.model.segmenter import Segmenter

GO_ON = "run the same again to go on"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VOC folder."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "voc", n_train=20, n_test=3, seed=3)


@pytest.fixture(scope="module")
def undisturbed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run leaves."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    list(run_al(settings(scenes, out)))
    return content(out)


def check_line(code: int, said: str, *wanted: str) -> None:
    """One line of ours, that holds some words."""
    assert code == 3, said
    assert re.match(r"(Run|Data|Judge)Error: ", said) and "\n" not in said, said
    for words in wanted:
        assert words in said, said


@pytest.fixture(scope="module")
def total_writes(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often a run opens a file of its folder for writing."""
    out = tmp_path_factory.mktemp("counted") / "run"

    def work() -> None:
        opened: list[int] = []
        at_file(f"{out}/*", 0, lambda: opened.append(1), every=True)
        list(run_al(settings(scenes, out)))
        raise RuntimeError(str(len(opened)))

    total = int(in_child(work)[1].split(": ")[1])
    assert total > 60
    return total


def failing_write(scenes: Path, out: Path, number: int, undisturbed: dict[str, Any]) -> None:
    """The `number`-th write fails as on a full disk, then there is room again."""
    config = settings(scenes, out)

    def work() -> None:
        at_file(f"{out}/*", number, no_space)
        list(run_al(config))

    code, said = in_child(work)
    check_line(code, said, "No space left on device")
    list(run_al(config))
    assert content(out) == undisturbed


SAMPLED = 5


@pytest.mark.parametrize("part", range(SAMPLED))
def test_full_disk_at_any_write(
    part: int, total_writes: int, scenes: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """Writes over the whole run, evenly chosen; the slow test tries every one."""
    failing_write(scenes, tmp_path / "run", 1 + part * (total_writes - 1) // (SAMPLED - 1), undisturbed)


@pytest.mark.slow
def test_full_disk_at_every_write(
    total_writes: int, scenes: Path, tmp_path: Path, undisturbed: dict[str, Any], record_property: Any
) -> None:
    """Every single write of a run."""
    record_property("trust.failing_writes", total_writes)
    for number in range(1, total_writes + 1):
        failing_write(scenes, tmp_path / f"run{number}", number, undisturbed)
        shutil.rmtree(tmp_path / f"run{number}")


@pytest.mark.parametrize("limit", [0, 20_000, 4_000_000])
def test_no_file_above_a_size(limit: int, scenes: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The kernel refuses bytes (RLIMIT_FSIZE), so writers in C++ and Rust fail as well: weights and optimizers."""
    config = settings(scenes, tmp_path / "run")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        list(run_al(config))

    code, said = in_child(work)
    check_line(code, said)
    list(run_al(config))
    assert content(tmp_path / "run") == undisturbed


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A real file system of 60 MB."""
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def test_small_disk(small_disk: Path, scenes: Path, undisturbed: dict[str, Any]) -> None:
    """Another file takes the room in the middle of the run; when it is gone, the run goes on."""
    config = settings(scenes, small_disk / "run", keep_models="last")
    hog = small_disk / "hog"

    def fill() -> None:
        try:
            with open(hog, "wb", buffering=0) as file:
                while file.write(b"0" * 4096):
                    pass
        except OSError:
            pass

    def work() -> None:
        at_step(5, fill)
        list(run_al(config))

    code, said = in_child(work)
    check_line(code, said)
    hog.unlink()  # fails if the run never came so far
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    list(run_al(config))
    found = content(small_disk / "run")
    assert found["rounds.jsonl"] == undisturbed["rounds.jsonl"]
    assert found["summary.json"]["test"] == undisturbed["summary.json"]["test"]


def as_nobody(work: Any) -> Any:
    """Root may write anywhere, so tests of permissions give that up."""

    def inner() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    return inner


def test_read_only_folder(scenes: Path, undisturbed: dict[str, Any]) -> None:
    """A run folder that became read-only, and a parent that always was."""
    top = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(scenes, top / "voc")
        os.chmod(top, 0o755)
        config = settings(top / "voc", top / "run")

        def work() -> None:
            at_step(7, lambda: os._exit(9))
            list(run_al(config))

        assert in_child(work)[0] == 9
        for path in [*top.rglob("*"), top]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = files(top / "run")
        check_line(*in_child(as_nobody(lambda: list(run_al(config)))), str(top / "run"), "writable")
        other = settings(top / "voc", top / "other")
        check_line(*in_child(as_nobody(lambda: list(run_al(other)))), "cannot create the run folder")
        assert files(top / "run") == before
        for path in [top, *top.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        list(run_al(config))
        assert content(top / "run")["rounds.jsonl"] == undisturbed["rounds.jsonl"]
    finally:
        shutil.rmtree(top, ignore_errors=True)


WHERE: dict[str, Any] = {
    "training": lambda act: at_step(2, act),
    "scoring": lambda act: at_forward(Segmenter, 5, act),
    "judging": lambda act: at_file("*pool.jsonl", 1, act),
    "final evaluation": lambda act: at_file("*test_000.json*", 1, act),
}


@pytest.mark.parametrize(
    ("where", "workers"), [("training", 2), ("scoring", 0), ("scoring", 2), ("judging", 0), ("final evaluation", 0)]
)
def test_vanished_data(where: str, workers: int, scenes: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The data folder is unmounted in the middle, also under data workers: the line names the file."""
    data = tmp_path / "voc"
    shutil.copytree(scenes, data)
    config = settings(data, tmp_path / "run", num_workers=workers)

    def vanish() -> None:
        data.rename(tmp_path / "away")

    def work() -> None:
        WHERE[where](vanish)
        list(run_al(config))

    code, said = in_child(work)
    check_line(code, said, str(data), "no such file", GO_ON)
    (tmp_path / "away").rename(data)
    list(run_al(config))
    found = content(tmp_path / "run")
    assert (
        found["rounds.jsonl"] == undisturbed["rounds.jsonl"] and found["test_001.json"] == undisturbed["test_001.json"]
    )


def test_vanished_before_resuming(scenes: Path, tmp_path: Path) -> None:
    """A data folder that is not there when the run goes on; a pseudo-label that somebody removed."""
    data = tmp_path / "voc"
    shutil.copytree(scenes, data)
    config = settings(data, tmp_path / "run")

    def work() -> None:
        at_step(7, lambda: os._exit(9))
        list(run_al(config))

    assert in_child(work)[0] == 9
    data.rename(tmp_path / "away")
    check_line(*in_child(lambda: list(run_al(config))), str(data))
    (tmp_path / "away").rename(data)
    masks = tmp_path / "run/round_000/masks"
    masks.rename(tmp_path / "masks")
    code, said = in_child(lambda: list(run_al(config)))
    if code:
        check_line(code, said, "masks", GO_ON)
    (tmp_path / "masks").rename(masks) if not masks.exists() else None
    assert len(list(run_al(config))) == 2


def too_much() -> None:
    """Ask the allocator of torch for more than any machine has."""
    torch.empty(2**60, dtype=torch.uint8)


def too_much_python() -> None:
    """Ask Python for it."""
    bytearray(2**62)


@pytest.mark.parametrize(
    ("where", "ask"), [("training", too_much), ("scoring", too_much_python), ("final evaluation", too_much)]
)
def test_out_of_memory(ask: Any, where: str, scenes: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Real failures of the allocators."""
    config = settings(scenes, tmp_path / "run")

    def work() -> None:
        WHERE[where](ask)
        list(run_al(config))

    check_line(*in_child(work), "memory ran out during", "smaller batch_size", GO_ON)
    list(run_al(config))
    assert content(tmp_path / "run") == undisturbed


def test_killed_data_worker(scenes: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """What the kernel does to a data worker when memory runs out."""
    config = settings(scenes, tmp_path / "run", num_workers=1)

    def work() -> None:
        at_step(2, lambda: [child.kill() for child in psutil.Process().children()])
        list(run_al(config))

    check_line(*in_child(work), "memory ran out during", GO_ON)
    list(run_al(config))
    assert content(tmp_path / "run")["rounds.jsonl"] == undisturbed["rounds.jsonl"]


@pytest.mark.parametrize("number", [1, 6])
def test_trial_on_a_full_disk(number: int, scenes: Path, tmp_path: Path) -> None:
    """The judge's trial: the same guards."""
    out = tmp_path / "trial"
    config = make_judge_config(dataset=str(scenes), output_dir=str(out), limit=3, resamples=20)

    def work() -> None:
        at_file(f"{out}/*", number, no_space)
        try_judge(config)

    check_line(*in_child(work), "No space left on device")
    assert try_judge(config).report["queries"] > 0
