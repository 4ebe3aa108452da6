"""vlm_itl_run: what it refuses, where it writes, its exit codes. A test that starts a kernel takes about a second."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import nbformat
import pytest

from vlm_itl import run
from vlm_itl.core import ConfigError

PARAMETERS = """\
images: int = 6  # how many
share: float = 0.5  # of them
judge: str = "mock"  # who looks
strict: bool = False  # or not
anything = None  # without a type
overlooked: "int | None" = None  # papermill's pattern does not see this one
"""
BODY = """\
from pathlib import Path
folder = Path("runs/tiny")
(folder / "figures").mkdir(parents=True, exist_ok=True)
(folder / "summary.json").write_text("{}")
(folder / "figures" / "curve.png").write_bytes(b"")
if images > 6:
    raise ValueError("only six images\\nare there")
print(repr([images, share, judge, strict, anything, overlooked, Path.cwd().name]))
print("run folder:", folder)
"""


def write_notebook(path: Path, *cells: tuple[str, list[str]]) -> Path:
    """A notebook of code cells, each with its tags."""
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
        cells=[nbformat.v4.new_markdown_cell("# Tiny run\n\n> For tests.")]
        + [nbformat.v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in cells],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with one run notebook; the current folder."""
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = vlm_itl\n")
    write_notebook(tmp_path / "nbs" / "run_tiny.ipynb", (PARAMETERS, ["parameters"]), (BODY, []))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run the command, expect exit code 2 and one line; return it."""
    assert run.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vlm_itl_run: ") and err.count("\n") == 1
    assert not list(Path.cwd().glob("runs/*"))
    return err


@pytest.mark.parametrize("name", ["nbs/run_tiny.ipynb", "nbs/run_tiny", "run_tiny", "run_tiny.ipynb"])
def test_notebook_is_found_from_any_folder(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert run.find_notebook(name) == home / "nbs" / "run_tiny.ipynb"
    monkeypatch.chdir(home / "nbs")
    assert run.find_notebook(name) == home / "nbs" / "run_tiny.ipynb"


def test_bad_usage_is_one_line_and_starts_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (home / "nbs" / "run_tiny.ipynb").read_bytes()
    (home / "bad.yaml").write_text("imagse: 3\n")
    (home / "list.yaml").write_text("- 3\n")
    (home / "broken.yaml").write_text("images: [\n")
    (home / "evil.yaml").write_text("judge: !!python/object/apply:os.getcwd []\n")
    assert "'images'" in refused(capsys, "run_tiny", "-p", "imagse", "3")
    assert "images, share, judge, strict, anything, overlooked" in refused(capsys, "run_tiny", "-r", "nothing", "3")
    assert "'images'" in refused(capsys, "run_tiny", "-f", "bad.yaml")
    assert "name: value" in refused(capsys, "run_tiny", "-f", "list.yaml")
    assert "broken.yaml" in refused(capsys, "run_tiny", "-f", "broken.yaml")
    assert "evil.yaml" in refused(capsys, "run_tiny", "-f", "evil.yaml")
    assert "absent.yaml" in refused(capsys, "run_tiny", "-f", "absent.yaml")
    assert "-y" in refused(capsys, "run_tiny", "-y", "[1, 2]")
    assert "-b" in refused(capsys, "run_tiny", "-b", "abc")
    assert "images: int" in refused(capsys, "run_tiny", "-p", "images", "few")
    assert "images: int" in refused(capsys, "run_tiny", "-y", "images: true")
    assert "strict: bool" in refused(capsys, "run_tiny", "-p", "strict", "perhaps")
    assert "quotes" in refused(capsys, "run_tiny", "-y", "judge: no")
    assert "run_tiny" in refused(capsys, "run_tyni")
    assert "run_tiny" in refused(capsys)
    assert "2 arguments" in refused(capsys, "run_tiny", "-p", "images")
    assert "--nonsense" in refused(capsys, "run_tiny", "--nonsense")
    assert "overwritten" in refused(capsys, "run_tiny", "nbs/run_tiny.ipynb")
    assert (home / "nbs" / "run_tiny.ipynb").read_bytes() == source


def test_notebook_without_parameters_or_broken(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_notebook(home / "nbs" / "run_bare.ipynb", ("1 + 1", []))
    (home / "nbs" / "run_broken.ipynb").write_text("{")
    (home / "nbs" / "run_empty.ipynb").write_text("{}")
    assert "no cell tagged 'parameters'" in refused(capsys, "run_bare", "-p", "images", "3")
    assert "run_broken" in refused(capsys, "run_broken")
    assert "run_empty" in refused(capsys, "run_empty")


def test_a_good_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "given.yaml").write_text("images: 2\nshare: 6e-5\njudge: always_no\n")
    words = "run_tiny -f given.yaml -p images 4 -p strict true -p anything 1e3 -r overlooked 5 --no-progress-bar"
    assert run.main([*words.split(), "-y", "images: 3"]) == 0
    out, _ = capsys.readouterr()
    assert f"[4, 6e-05, 'always_no', True, 1000.0, '5', {home.name!r}]" in out
    (executed,) = home.glob("runs/*-run_tiny.ipynb")
    assert f"executed notebook: runs/{executed.name}" in out
    assert "run folder:        runs/tiny" in out
    assert "runs/tiny/summary.json" in out and "runs/tiny/figures/curve.png" in out


def test_a_failing_notebook(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["run_tiny", "kept.ipynb", "-p", "images", "7", "--no-progress-bar"]) == 1
    out, err = capsys.readouterr()
    assert err.strip().splitlines()[-1].endswith("ValueError: only six images")
    assert "kept.ipynb" in out
    assert "Traceback" in (home / "kept.ipynb").read_text()


def test_python_call_takes_values_and_options(home: Path) -> None:
    done = run.run_notebook("run_tiny", "out.ipynb", {"images": 1}, prepare_only=True, progress_bar=False)
    assert done.error is None and done.run_folder is None and done.results() == []
    assert "images = 1" in (home / "out.ipynb").read_text()
    missing = run.run_notebook("run_tiny", "out.ipynb", kernel_name="no_such_kernel", progress_bar=False)
    assert missing.error is not None and "no_such_kernel" in missing.error
    with pytest.raises(ConfigError, match="images"):
        run.run_notebook("run_tiny", parameters={"imagse": 1})


def test_help_and_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["run_tiny", "--help-notebook"]) == 0
    assert "how many" in capsys.readouterr().out
    assert run.main(["list"]) == 0
    assert "Tiny run" in capsys.readouterr().out
    assert run.main(["--help"]) == 0
    assert "--parameters_file" in capsys.readouterr().out


def test_output_names_do_not_collide(home: Path) -> None:
    now = datetime(2026, 11, 23, 10, 15, 0)
    first = run.plan_output("nbs/run_tiny.ipynb", now=now)
    assert first == home / "runs" / "20261123-101500-run_tiny.ipynb"
    first.write_text("{}")
    assert run.plan_output("nbs/run_tiny.ipynb", now=now).name == "20261123-101500-run_tiny-2.ipynb"
    assert run.plan_output("nbs/run_tiny.ipynb", "elsewhere", now=now).parent == home / "elsewhere"


@pytest.mark.parametrize(
    ("value", "kind", "read"),
    [("40", "float", 40), (40, "float", 40), ("1.0", "float", 1.0), (0.5, "float", 0.5), ("None", "str", "None")],
)
def test_typed_value_keeps_counts_and_shares_apart(value: object, kind: str, read: object) -> None:
    got = run.typed_value("initial", value, kind)
    assert got == read and type(got) is type(read)


@pytest.mark.parametrize(
    ("value", "kind"), [("1.0", "int"), (True, "float"), ("True", "int"), ("None", "int"), ([1], "float"), ("", "int")]
)
def test_typed_value_refuses(value: object, kind: str) -> None:
    with pytest.raises(ConfigError, match="initial"):
        run.typed_value("initial", value, kind)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("-4", -4), ("0.5", 0.5), ("6e-5", 6e-5), ("True", True), ("None", None), ("true", "true"), ("", "")],
)
def test_guess_is_papermills(text: str, value: object) -> None:
    from papermill.cli import _resolve_type

    assert run.guess_value(text) == value == _resolve_type(text)


def test_base64_is_read_first(home: Path) -> None:
    options = {
        "parameters_base64": [base64.b64encode(b"images: 1\nshare: 0.1").decode()],
        "parameters_file": [],
        "parameters_yaml": ["images: 2"],
        "parameters": [("images", "3")],
        "parameters_raw": [("anything", "4")],
    }
    known = run.notebook_parameters(home / "nbs" / "run_tiny.ipynb")
    assert run.gather_parameters(options, known) == {"images": 3, "share": 0.1, "anything": "4"}
    assert options == {}


def test_dates_in_yaml_stay_text() -> None:
    assert run.read_yaml("judge: 2026-11-23", "-y") == {"judge": "2026-11-23"}


@pytest.fixture
def script(home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The console script as a process of its own, with nothing on stdin."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from vlm_itl.run import main; sys.exit(main())"
        environment = {**os.environ, "COLUMNS": "100"}
        return subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return call


def test_exit_codes_of_the_process(script: Callable[..., subprocess.CompletedProcess[str]], home: Path) -> None:
    bad = script("run_tiny", "-p", "imagse", "1")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    good = script("run_tiny", "out.ipynb", "-p", "images", "1")
    assert good.returncode == 0 and "run folder:" in good.stdout and (home / "out.ipynb").is_file()
