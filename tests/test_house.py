"""The house keeps its shape: arrows run downwards, light rooms stay light, what is public is explained and used."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "vlm_itl"
PARTS = (
    *("core", "data", "formats", "model", "probe", "sampler", "vlm", "proposals", "judging", "people", "reports"),
    "experiment",
)
ALL = (*PARTS, "cli", "studies")


def rooms() -> dict[str, int]:
    """part.room -> its number, from the notebooks."""
    found = {}
    for part in ALL:
        for path in (ROOT / "nbs" / part).glob("[0-9][0-9]_*.ipynb"):
            if not path.stem.startswith("00_"):
                found[f"{part}.{path.stem[3:]}"] = int(path.stem[:2])
    return found


def modules() -> list[Path]:
    """Every exported module of a room."""
    return sorted(p for part in ALL for p in (LIB / part).glob("*.py") if p.name != "__init__.py")


def targets(path: Path) -> Iterator[str]:
    """The rooms that a module imports from, wherever in the file."""
    part = path.parent.name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("vlm_itl")):
            name = (node.module or "").removeprefix("vlm_itl").strip(".")
            if name or [alias.name for alias in node.names] != ["__version__"]:  # what the package itself knows
                yield f"{part}.{name}" if node.level == 1 else name


def test_every_room_has_its_notebook():
    assert {f"{p.parent.name}.{p.stem}" for p in modules()} == set(rooms())
    assert [p.name for p in LIB.glob("*.py") if p.name not in ("__init__.py", "_modidx.py")] == []


def test_what_can_be_run_stands_alone_in_nbs():
    notebooks = [p.name for p in (ROOT / "nbs").glob("*.ipynb")]
    assert "index.ipynb" in notebooks and len(notebooks) <= 7
    assert all(name == "index.ipynb" or name.startswith("run_") for name in notebooks)


@pytest.mark.parametrize("path", modules(), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_arrows_run_downwards(path: Path):
    """Parts import earlier parts, rooms lower numbers of their part: so there are no circles either."""
    numbers, here = rooms(), f"{path.parent.name}.{path.stem}"
    for target in targets(path):
        part = target.split(".")[0]
        assert target in numbers, f"{here} imports {target}, which is no room"
        order = (ALL.index(part), numbers[target]), (ALL.index(path.parent.name), numbers[here])
        assert order[0] < order[1], f"{here} imports {target}, which comes later"


def imported(statement: str) -> set[str]:
    """The top-level packages that a fresh process has after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(out.split())


def test_core_and_the_command_line_are_light():
    """Settings, files and run folders need no network."""
    light = [f"vlm_itl.core.{p.stem}" for p in (LIB / "core").glob("*.py") if p.name != "__init__.py"]
    light += ["vlm_itl.sampler", "vlm_itl.cli.run", "vlm_itl"]
    heavy = imported("import " + ", ".join(light)) & {"torch", "transformers", "datasets", "wandb", "openai"}
    assert not heavy, f"{sorted(heavy)} came along"


def test_strategies_and_selects_are_light():
    """Which strategies there are, and what they are called, is asked before any network is loaded."""
    names = ("view", "strategy", "selects")
    heavy = {"torch", "transformers", "datasets"}
    assert not imported("import " + ", ".join(f"vlm_itl.sampler.{name}" for name in names)) & heavy
    assert not imported("from vlm_itl.sampler import Sampler\nSampler('bald-topk-typiclust')") & heavy


@pytest.mark.parametrize("part", PARTS)
def test_importing_a_part_imports_nothing_heavy(part: str):
    assert not imported(f"import vlm_itl.{part}") & {"torch", "transformers", "datasets", "wandb", "matplotlib"}


def others() -> list[str]:
    """What the rooms import from other packages when they are themselves imported, as statements."""
    lines: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8")) for path in modules()]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import) or (
            isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("vlm_itl")
        ):
            lines.add(ast.unparse(node))
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):  # these are not run yet
            waiting += ast.iter_child_nodes(node)
    return sorted(lines - {"from __future__ import annotations", "import vlm_itl"})


PROCESS = """
def process():  # what a library could change of the process that imports it, by name
    import gc, locale, logging, multiprocessing, os, random, signal, socket, sys, warnings
    import matplotlib, numpy, pandas, PIL.Image, PIL.ImageFile, torch, transformers

    loggers = [logging.getLogger(name) for name in [None, *logging.Logger.manager.loggerDict]]
    told = {f"logger {log.name}": (log.level, log.disabled, len(log.handlers)) for log in loggers}
    return {
        **{f"environment {name}": value for name, value in os.environ.items()},
        **{f"warnings {line}": True for line in warnings.filters},
        **{f"matplotlib {name}": str(value) for name, value in matplotlib.rcParams.items()},
        **{name: state for name, state in told.items() if state != (0, False, 0)},
        "PIL": (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES),
        "generators": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "transformers": transformers.logging.get_verbosity(),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "numpy": (numpy.geterr(), numpy.get_printoptions()),
        "pandas": pandas.get_option("display.max_rows"),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "python": (os.getcwd(), list(sys.path), str(sys.excepthook), sys.getrecursionlimit(), gc.get_threshold(),
                   socket.getdefaulttimeout(), locale.setlocale(locale.LC_ALL), multiprocessing.get_start_method(True)),
    }
"""


def test_importing_the_library_leaves_the_process_as_it_was():
    """Of everything that can be changed for others; what the packages below ours do is theirs, and comes first."""
    ours = ", ".join(f"vlm_itl.{path.parent.name}.{path.stem}" for path in modules())
    code = [*others(), PROCESS, "before = process()", f"import {ours}", "after = process()"]
    code += ["names = [name for name in before | after if before.get(name) != after.get(name)]"]
    code += ["print('CHANGED', {name: str((before.get(name), after.get(name)))[:200] for name in names})"]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "CHANGED {}"


def public() -> list[tuple[str, str]]:
    """(part, name) of everything public."""
    return [(part, name) for part in PARTS for name in importlib.import_module(f"vlm_itl.{part}").__all__]


def test_the_library_has_the_names_of_its_parts():
    import vlm_itl

    assert set(vlm_itl.__all__) == {name for _, name in public()}
    assert all(part in (vlm_itl.__doc__ or "") for part in PARTS)


def undocumented(thing: Any) -> list[str]:
    """The arguments of a function, or the fields of a data class, about which no comment says anything."""
    thing = inspect.unwrap(thing)
    if dataclasses.is_dataclass(thing):
        classes = [c for c in inspect.getmro(thing) if dataclasses.is_dataclass(c)]  # a field may be inherited
        names, source = [f.name for f in dataclasses.fields(thing)], "".join(map(inspect.getsource, classes))
    else:
        target = thing.__init__ if inspect.isclass(thing) and "__init__" in vars(thing) else thing
        if not inspect.isfunction(target):
            return []
        names = [p for p in inspect.signature(target).parameters if p not in ("self", "cls")]
        source = inspect.getsource(target)
    lines = [line for line in source.splitlines() if "#" in line]
    return [name for name in names if not any(re.search(rf"\b{re.escape(name)}\b.*#", line) for line in lines)]


@pytest.mark.parametrize(("part", "name"), public(), ids=lambda x: x)
def test_what_is_public_is_explained(part: str, name: str):
    """A docstring, and a word about each argument or field."""
    thing = getattr(importlib.import_module(f"vlm_itl.{part}"), name)
    if callable(thing):
        assert inspect.getdoc(thing), f"{part}.{name} has no docstring"
        assert not undocumented(thing), f"{part}.{name}: no comment says what {undocumented(thing)} are"


def texts() -> str:
    """README, tutorials, run notebooks and tests: where a user of a public name may stand."""
    found = [(ROOT / "README.md").read_text(encoding="utf-8")]
    for path in [*(ROOT / "nbs").glob("run_*.ipynb"), *(ROOT / "nbs" / "tutorials").glob("*.ipynb")]:
        book = json.loads(path.read_text(encoding="utf-8"))
        found += ["".join(cell["source"]) for cell in book["cells"]]
    return "\n".join(found + [p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py")])


def test_what_is_public_is_used():
    text = texts()
    unused = [f"{part}.{name}" for part, name in public() if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert not unused, f"public, but used in no README, tutorial or test: {unused}"
