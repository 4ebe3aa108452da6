"""Fuzzed run folders: read as far as they can be, else refused in one line; and no refusal changes a byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import FACTOR, Tried
from toyloop import Parrot

from vlm_itl.core.checks import JudgeError, RunError, VlmItlError
from vlm_itl.core.runfolder import RunFolder
from vlm_itl.data.sources import load_data
from vlm_itl.experiment.config import Config, make_config
from vlm_itl.experiment.loop import Loop, run_al
from vlm_itl.model.segmenter import load_model
from vlm_itl.reports.compare import compare
from vlm_itl.reports.report import list_runs, read_run, round_table, summary_table
from vlm_itl.reports.run_figures import (
    plot_class_iou,
    plot_gallery,
    plot_judge,
    plot_learning_curve,
    save_figures,
)
from vlm_itl.vlm.cache import JudgementCache
from vlm_itl.vlm.handler import Judgement, make_handler

Record = Callable[[str, Any], None]
SMALL = {
    "mode": "vlm", "dataset": "toy", "judge": "always_yes", "steps": 1, "batch_size": 2, "image_size": 32, "initial": 1,
    "increment": 1, "max_labelled": 3, "gallery": 2, "val_share": 1, "keep_models": "last",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run and one that stopped after two rounds."""
    base = tmp_path_factory.mktemp("runs")
    found = {}
    for name in ("whole", "half"):
        found[name] = base / name
        rounds = run_al(make_config({**SMALL, "output_dir": str(base / name)}))
        for number, _ in enumerate(rounds, start=1):
            if name == "half" and number == 2:
                break
        del rounds
    return found


def content(folder: Path) -> dict[str, bytes | str]:
    """Every file of a run, without locks and without the card of the data, which each start writes anew."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and not path.name.startswith(".") and path.name != "data.json"
    }


def resume(folder: Path) -> None:
    """What a second start does before it computes anything."""
    settings = json.loads((folder / "config.json").read_bytes())
    known = {n: v for n, v in settings.items() if n in Config.__dataclass_fields__}
    experiment = Loop.from_config(make_config({**known, "output_dir": str(folder)}))
    experiment.folder.close()


def resume_as(config: dict[str, Any], folder: Path) -> None:
    """A second start with the settings of the first, whatever the folder says."""
    settings = make_config({**config, "output_dir": str(folder)})
    toy = load_data("toy", val_share=1)
    loop = Loop(settings, toy, Parrot(toy), make_handler(settings.judge))  # no network is needed to go on
    loop.folder.close()


READERS: dict[str, Callable[[Path], Any]] = {
    "rounds": lambda folder: RunFolder(folder).rounds(),
    "summary": lambda folder: RunFolder(folder).summary,
    "read": lambda folder: (repr(read_run(folder)), read_run(folder).labels, read_run(folder).label),
    "list": lambda folder: [repr(run) for run in list_runs(folder.parent)],
    "table": lambda folder: round_table(folder),
    "summary table": lambda folder: summary_table([folder]),
}
DRAWERS: dict[str, Callable[[Path], Any]] = {
    "curve": plot_learning_curve,
    "classes": plot_class_iou,
    "gallery": plot_gallery,
    "judge": plot_judge,
    "compare": lambda folder: compare([folder, folder], baseline="random"),
}

NONSENSE: list[Any] = [
    None, True, -1, 0, 1.5, 10**400, "x", "", [], {}, [None], [1], {"a": 1}, ["toy-0"], "\ud800",
    float("nan"), float("inf"), [[[]]], {"": None},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    inner: list[tuple[Any, ...]] = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in pairs:
        inner += places(one, (*path, key))
    return inner


def spoil_value(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with one value changed, removed, or one more name."""
    value = json.loads(data)
    everywhere = places(value)
    if not everywhere:
        return b"[]"
    path = rng.choice(everywhere)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    kind = rng.randrange(5)
    if kind == 0:
        del holder[path[-1]]
    elif kind == 1 and isinstance(holder, dict):
        holder["from_a_newer_version"] = rng.choice(NONSENSE)
    else:
        holder[path[-1]] = rng.choice(NONSENSE)
    return json.dumps(value).encode()


def spoil(folder: Path, rng: random.Random) -> str:
    """Damage one file; what was done, for the message."""
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and p.parent.name != "figures"
    )
    texts = [p for p in files if p.suffix in (".json", ".jsonl") and "model" not in p.parts]
    path = rng.choice(texts if rng.random() < 0.85 else files)
    data = path.read_bytes()
    kind = rng.choice(["value"] * 8 + ["cut", "flip", "gone", "empty", "folder", "deep", "type", "lines", "link"])
    if kind == "value" and path.suffix == ".json":
        path.write_bytes(spoil_value(data, rng))
    elif kind in ("value", "lines") and path.suffix == ".jsonl":
        lines = data.splitlines() or [b"{}"]
        at = rng.randrange(len(lines))
        lines[at] = rng.choice([b"", b"[1]", b"{", lines[at][: len(lines[at]) // 2], spoil_value(lines[at], rng)])
        path.write_bytes(b"\n".join(lines))
    elif kind == "flip":
        broken = bytearray(data or b"x")
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(broken))
    elif kind in ("gone", "folder", "link"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        if kind == "link":
            path.symlink_to(path)
    elif kind == "deep":
        path.write_bytes(b'{"a":' * 20_000)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "type":
        path.write_bytes(json.dumps(rng.choice(NONSENSE)).encode())
    else:
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    return f"{kind} {path.relative_to(folder)}"


@pytest.mark.parametrize("name", ["whole", "half"])
def test_damaged_runs(name: str, runs: dict[str, Path], tmp_path: Path, record_property: Record) -> None:
    """Everything that reads run folders, against everything that may happen to a file; then a second start."""
    rng = random.Random(name if FACTOR == 1 else None)
    config = {**SMALL, "output_dir": ""}
    tried = Tried()
    for number in range(int(90 * FACTOR)):
        folder = tmp_path / f"{number}" / "run"
        shutil.copytree(runs[name], folder)
        what = [spoil(folder, rng)]
        before = content(folder)
        readers = {**READERS, **(DRAWERS if number % 5 == 0 else {})}
        for reader, read in readers.items():
            with _told(tried, f"{reader}: {what}"):
                read(folder)
        assert content(folder) == before, what
        refused = True
        with _told(tried, f"resume: {what}"):
            resume_as(config, folder)
            refused = False
        if refused:
            assert content(folder) == before, what
        shutil.rmtree(folder.parent)
    tried.report(record_property)


class _told:
    """A case that says which damage it was."""

    def __init__(self, tried: Tried, what: str) -> None:
        self.what, self.inner = what, tried.case()

    def __enter__(self) -> None:
        self.inner.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        if error is not None and not isinstance(error, (VlmItlError, UserWarning)):
            error.add_note(self.what)
        if isinstance(error, UserWarning) and "the last line is cut off" in str(error):  # said on purpose
            kind, error, trace = None, None, None
            self.inner.__exit__(None, None, None)
            return True
        return self.inner.__exit__(kind, error, trace)


def test_json_cut_at_every_length(runs: dict[str, Path], tmp_path: Path, record_property: Record) -> None:
    """A record that ends too early is refused by its name, and stays as it is."""
    tried = Tried()
    folder = tmp_path / "run"
    shutil.copytree(runs["half"], folder)
    for name in ("config.json", "round_000/record.json", "rounds.jsonl"):
        path = folder / name
        data = path.read_bytes()
        for length in range(0, len(data) - 2, max(1, len(data) // 150)):
            path.write_bytes(data[:length])
            with _told(tried, f"{name} cut at {length}"):
                read_run(folder)
            with _told(tried, f"{name} cut at {length}"):
                try:
                    RunFolder(folder).rounds()
                    assert RunFolder(folder).config
                except RunError as error:
                    assert path.name in str(error)
                    raise
        path.write_bytes(data)
    tried.report(record_property)


# ---- what was found, one by one ----


def changed(runs: dict[str, Path], tmp_path: Path, file: str, **values: Any) -> Path:
    """A copy of the half-finished run with other values in a file."""
    folder = tmp_path / "run"
    shutil.copytree(runs["half"], folder)
    record = json.loads((folder / file).read_bytes())
    (folder / file).write_text(json.dumps({**record, **values}))
    return folder


@pytest.mark.parametrize(
    "values, said",
    [
        ({"from_a_newer_version": 1}, "rounds with 'from_a_newer_version'.*update"),
        ({"selection": {"ids": ["nobody"], "reasons": []}}, "do not fit its data.*'nobody' is not in the pool"),
        ({"selection": []}, "record.json is no record of round 1"),
        ({"budget": {"what": 1}}, "holds something that this version does not write"),
        ({"index": 7}, r"index = 7, not 1"),
        ({"labelled": "many"}, "labelled = 'many'"),
    ],
)
def test_rounds_that_do_not_fit(values: dict[str, Any], said: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """A second start says which file, and changes nothing."""
    folder = changed(runs, tmp_path, "round_001/record.json", **values)
    before = content(folder)
    with pytest.raises(RunError, match=said):
        resume_as(SMALL, folder)
    assert content(folder) == before


def test_setting_of_a_newer_version(runs: dict[str, Path], tmp_path: Path) -> None:
    """Going on is refused, since it may change numbers; reading is not."""
    folder = changed(runs, tmp_path, "config.json", from_a_newer_version=3)
    with pytest.raises(RunError, match="'from_a_newer_version' is no setting of this version"):
        resume_as(SMALL, folder)
    assert len(read_run(folder).rounds) == 2


def test_reports_read_what_a_newer_version_adds(runs: dict[str, Path], tmp_path: Path) -> None:
    """Unknown names in a record are of no consequence to a table."""
    folder = changed(runs, tmp_path, "round_001/record.json", from_a_newer_version=3)
    (folder / "rounds.jsonl").unlink()
    assert len(round_table(folder)) == 2
    assert len(save_figures(folder)) >= 2


@pytest.mark.parametrize("damage", ["text", "cut", "flip", "table", "folder", "value"])
def test_broken_cache(damage: str, tmp_path: Path) -> None:
    """A judgement cache that is none says so, and what to do; its bytes stay."""
    path = tmp_path / "a.sqlite"
    cache = JudgementCache(path)
    cache.put({f"k{i}": Judgement("yes", 1.0, raw="yes" * 50) for i in range(60)})
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if damage == "table":
            connection.execute("DROP TABLE judgements")
            connection.execute("CREATE TABLE judgements (a)")
        if damage == "value":
            connection.execute("UPDATE judgements SET verdict = 'maybe', p_yes = 'x'")
    connection.close()
    cache.close()
    data = path.read_bytes()
    if damage == "text":
        path.write_text("no data base")
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        path.write_bytes(data[:4096] + bytes(len(data) - 4096))
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    with pytest.raises(JudgeError, match="judgement cache .*a.sqlite cannot be used: .*Move it away"):
        again = JudgementCache(path, patience_s=0.1)
        again.get([f"k{i}" for i in range(60)])
        len(again)


@pytest.mark.parametrize("file", ["vlm_itl.json", "model.safetensors"])  # config.json is for others: see test_kept
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff" * 40, b'{"a":' * 5000])
def test_broken_model_folder(file: str, data: bytes, runs: dict[str, Path], tmp_path: Path) -> None:
    """The weights of a round, damaged."""
    from vlm_itl.data.sources import toy_images

    source = sorted(runs["whole"].glob("round_*/model"))[-1]
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / file).write_bytes(data)
    with pytest.raises(VlmItlError) as caught:
        load_model(str(folder), toy_images().labels)
    assert "\n" not in str(caught.value)
