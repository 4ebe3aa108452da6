"""vlm_itl_run: what it refuses, where it writes, its exit codes. A test that starts a kernel takes about a second."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import pytest

from vlm_itl.cli import run
from vlm_itl.core.checks import ConfigError, check_choice

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
        code = "import sys; from vlm_itl.cli.run import main; sys.exit(main())"
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


# ---- settings that mean one thing ----

UNCLEAR = [
    ("seed: 010", "leading zero"),
    ("seed: !!int 010", "leading zero"),
    ("seed: 0o17", "in tens"),
    ("seed: 1_000", "without _"),
    ("tau: 1_0.5", "without _"),
    ("mask_seconds: 1:30", "sixties"),
    ("binary: yes", "true or false"),
    ("judge_options: {strict: off}", "true or false"),
    ("seed: 1\nmode: al\nseed: 2", "'seed' stands there twice"),
    ("data_options: {n_train: 1, n_train: 2}", "'n_train' stands there twice"),
    ("data_options: {1: a, '1': b}", "twice"),
    ("data_options: {1: a, true: b}", "twice"),
    ("seed: 1\n---\nseed: 2", "single document"),
    ("data_options:\n\tn_train: 1", "spaces"),
    ("1: 2", "no name of a parameter"),
    ("true: 2", "no name of a parameter"),
    ("null: 2", "no name of a parameter"),
]


@pytest.mark.parametrize(("text", "said"), UNCLEAR)
def test_36_yaml_that_two_readings_fit_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    for read in (lambda: run.read_yaml(text, "-y"), lambda: run.read_yaml_file(tmp_path / "a.yaml")):
        with pytest.raises(ConfigError) as error:
            read()
        assert said in str(error.value) and "\n" not in str(error.value)


def test_36_yaml_that_is_clear_is_read() -> None:
    text = "\ufeffrate: 1e-3\nmore: [.5, -0, 0x1F, '010', 'no', 2026-01-31, 127.0.0.1:8000]\nflag: TRUE\nmap: {0: 255}"
    more = [0.5, 0, 31, "010", "no", "2026-01-31", "127.0.0.1:8000"]
    read = {"rate": 0.001, "more": more, "flag": True, "map": {0: 255}}
    assert run.read_yaml(text, "-y") == read == run.read_yaml(text.encode("utf-8"), "-y")
    assert run.read_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}", "-y")["c"] == {"b": 2}


def test_36_the_command_line_reads_alike(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "leading zero" in refused(capsys, "run_tiny", "-p", "images", "010")
    assert "without _" in refused(capsys, "run_tiny", "-p", "images", "1_000")
    assert "true or false" in refused(capsys, "run_tiny", "-p", "strict", "yes")
    assert "twice" in refused(capsys, "run_tiny", "-p", "images", "1", "-p", "images", "2")
    assert "twice" in refused(capsys, "run_tiny", "-p", "judge", "a", "-r", "judge", "b")
    assert run.typed_value("judge", "010", "str") == "010" and run.typed_value("share", "1e-3", "float") == 0.001


def test_36_capitals_do_not_hide_a_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'al'"):
        check_choice("mode", "AL", ["baseline", "al", "vlm"])
    with pytest.raises(ConfigError, match="'images'"):
        run.check_parameters({"IMAGES": 3}, {"images": "int"})


# ---- outside a clone ----


@pytest.mark.parametrize("name", [".", "/", "..", "~nobody_of_this_name/x", "x" * 300, ""])
def test_what_cannot_be_a_notebook_is_one_line(home: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert "run_tiny" in refused(capsys, name)


@pytest.mark.parametrize("content", ["", "{}", "[1]", None])
def test_an_output_that_is_no_notebook_is_kept(
    home: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    kept = home / "kept.ipynb"
    kept.mkdir() if content is None else kept.write_text(content)
    assert "overwritten" in refused(capsys, "run_tiny", "kept.ipynb")
    assert kept.is_dir() if content is None else kept.read_text() == content


def test_33_without_a_clone_the_shipped_notebooks_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "run_al " in listed and "run_judge " in listed and str(tmp_path) not in listed
    assert run.find_notebook("run_al").is_file() and run.plan_output("run_al").parent == tmp_path / "runs"
    assert run.main(["init"]) == 2
    assert run.main(["init", "mine"]) == 0
    assert "next: cd mine" in capsys.readouterr().out.splitlines()[-1]
    assert Path("mine/run_al.ipynb").is_file() and run.read_yaml_file("mine/configs/voc_al.yaml")["mode"] == "al"
    assert run.read_yaml_file("configs/voc_al.yaml")["mode"] == "al"  # that of the package
    Path("mine/run_al.ipynb").unlink()
    Path("mine/run_baseline.ipynb").write_text("mine")
    assert run.main(["init", "mine"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert Path("mine/run_baseline.ipynb").read_text() == "mine" and not Path("mine/run_al.ipynb").exists()
    assert run.main(["init", "mine/run_judge.ipynb"]) == 2
    monkeypatch.chdir("mine")
    assert run.find_notebook("run_judge") == tmp_path / "mine" / "run_judge.ipynb"
    assert run.find_notebook("run_al").is_file()  # again that of the package


def test_33_the_wheel_brings_notebooks_and_configurations(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    command[3:3] = ["egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120)
    shipped = tmp_path / "lib" / "vlm_itl" / "shipped"
    for source in [*sorted((root / "nbs").glob("run_*.ipynb")), *sorted((root / "configs").glob("*.yaml"))]:
        assert (shipped / source.parent.name / source.name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("words", ["--version", "--help", "list", "run_la", "run_al -p stratgy entropy"])
def test_the_command_line_loads_no_torch(words: str) -> None:
    """What is answered without running anything answers at once: papermill and `core` are all that it needs."""
    code = f"import sys, vlm_itl.cli.run as r; r.main({words.split()!r})"
    code += "; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("set()"), done
    assert words != "--version" or done.stdout.startswith("vlm_itl ")


# ---- run again in one kernel ----


def cells_of(path: Path) -> list[str]:
    """The code of a notebook."""
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", ["run_al", "run_baseline", "run_judge"])
@pytest.mark.parametrize("history", [True, False])
def test_21_run_all_twice(root: Path, name: str, history: bool) -> None:
    from vlm_itl.experiment.config import notebook_settings

    cells = cells_of(root / "nbs" / f"{name}.ipynb")
    left: dict[str, Any] = {"rounds": [], "curve": {}, "seconds": 3.0, "shown": ["a"], "test": {}, "group": "size"}
    space: dict[str, Any] = {"__name__": "__main__", "In": [""], "Out": {}} if history else {"__name__": "__main__"}
    seen = []
    for turn in range(3):
        for cell in [*cells[:1], *(["seed = 3"] if turn == 1 else []), cells[1]]:  # papermill's cell, once
            if history:
                space["In"].append(cell)
            exec(cell, space)
        if history:
            space["In"].append("config = make(notebook_settings(given))")
        seen.append(notebook_settings(space["given"]))
        if history:
            space["In"] += [
                "rounds = []\nfor record in run(config):\n    rounds.append(record)",
                "shown = ['a']\nshown[0]",
            ]
        space.update(left)
    assert list(seen[0]) == list(seen[1]) == list(seen[2]) and not set(left) & set(seen[0])
    assert [settings["seed"] for settings in seen] == [0, 3, 0]


def test_21_a_misspelt_name_is_still_found_when_run_again() -> None:
    from vlm_itl.experiment.config import make_config, notebook_settings

    cells = ["", "seed: int = 0\nmode: str = 'al'", "given = dict(globals())", "make_config(notebook_settings(given))"]
    space = {
        "seed": 0,
        "mode": "al",
        "rounds": [],
        "given": {"seed": 0, "mode": "al"},
        "In": [*cells, "rounds = []\nrun()"],
    }
    again = {**space, "sede": 0, "In": [*space["In"], "sede: int = 0\nmode: str = 'al'", *cells[2:]]}
    with pytest.raises(ConfigError, match="'seed'"):
        make_config(notebook_settings(again))


def test_21_an_interrupt_is_one_line_in_jupyter() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    from vlm_itl.core.runfolder import Stopped

    shell = InteractiveShell()
    shown: list[list[str]] = []
    shell._showtraceback = lambda etype, value, lines: shown.append(lines)  # type: ignore[method-assign]
    try:
        raise Stopped("stopped during round 1. Run the same again to go on.")
    except Stopped:
        shell.showtraceback()
    assert shown == [["Stopped: stopped during round 1. Run the same again to go on."]]
