"""Rules that hold for every notebook of the book, whoever wrote it."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
from papermill import inspect_notebook

from vlm_itl.experiment import Config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
RUNS = [path for path in NOTEBOOKS if path.name.startswith("run_")]
TUTORIALS = [path for path in NOTEBOOKS if path.parent.name == "tutorials"]
CHAPTERS = [path for path in NOTEBOOKS if re.match(r"\d\d[a-z]*_", path.name) and path not in TUTORIALS]
MODULES = [path for path in sorted((ROOT / "vlm_itl").rglob("*.py")) if not path.name.startswith("_")]
MAX_BYTES = 300 * 1024


def module_of(chapter: Path) -> str:
    """`data/01_labels.ipynb` -> `data.labels`; the first page of a part is its `__init__`."""
    number, name = chapter.stem.split("_", 1)
    return f"{chapter.parent.name}.{'__init__' if number == '00' else name}"


def cells_of(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    """The code (or markdown) cells of a notebook."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def sources(path: Path) -> str:
    """All sources and outputs of a notebook as one text."""
    return path.read_text(encoding="utf-8")


def stems(paths: list[Path]) -> list[str]:
    """Names for pytest's report."""
    return [f"{path.parent.name}/{path.stem}" for path in paths]


def test_there_are_chapters() -> None:
    assert CHAPTERS
    assert (ROOT / "nbs" / "index.ipynb") in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_links_lead_somewhere(path: Path) -> None:
    """Chapters move; what points to them follows."""
    text = "\n".join(cell.source for cell in cells_of(path, "markdown"))
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing, f"{path.name} points to {missing}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_notebook_has_a_title_and_is_small(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# "), "the first cell is the title"
    assert re.search(r"^> \S", first.source, re.MULTILINE), "under the title stands one line: '> what it promises'"
    assert path.stat().st_size <= MAX_BYTES, f"{path.name} has {path.stat().st_size} bytes"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_notebook_names_no_place_of_one_machine(path: Path) -> None:
    local = re.findall(r"(?<![\w.])/(?:home|root|work|tmp|Users|mnt|data|opt|var|private)/[\w.-]+", sources(path))
    assert not local, f"absolute paths: {sorted(set(local))[:5]}"


def test_no_notebook_shows_the_mode_of_wandb() -> None:
    texts = ["".join(o.get("text", "")) for path in NOTEBOOKS for cell in cells_of(path) for o in cell.outputs]
    assert not any("WANDB offline mode" in text for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_notebook_stores_no_error(path: Path) -> None:
    failed = [cell.id for cell in cells_of(path) for output in cell.outputs if output.output_type == "error"]
    assert not failed


@pytest.mark.parametrize("path", CHAPTERS, ids=stems(CHAPTERS))
def test_chapter_exports_the_module_it_is_named_after(path: Path) -> None:
    named = re.findall(r"^#\s*\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in cells_of(path)), re.MULTILINE)
    assert named == [module_of(path)]
    assert (ROOT / "vlm_itl" / f"{module_of(path).replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("path", CHAPTERS, ids=stems(CHAPTERS))
def test_chapter_exports_imports_or_code_but_not_both_in_one_cell(path: Path) -> None:
    for cell in cells_of(path):
        if not re.match(r"#\s*\|\s*export", cell.source):
            continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body}
        assert len(kinds) <= 1, f"cell {cell.id} mixes imports and code"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_only_run_notebooks_take_parameters(path: Path) -> None:
    tagged = [cell for cell in cells_of(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == (1 if path in RUNS else 0)


@pytest.mark.parametrize("path", [*RUNS, *TUTORIALS], ids=stems([*RUNS, *TUTORIALS]))
def test_what_is_run_exports_nothing(path: Path) -> None:
    assert not re.search(r"^#\s*\|\s*(export|default_exp)", "\n".join(c.source for c in cells_of(path)), re.MULTILINE)


@pytest.mark.parametrize("path", TUTORIALS, ids=stems(TUTORIALS))
def test_a_tutorial_is_short_and_needs_public_names_only(path: Path) -> None:
    assert len(cells_of(path)) + len(cells_of(path, "markdown")) <= 20
    for cell in cells_of(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm_itl"):
                assert (node.module or "").count(".") == 1, f"{node.module} is a room; the part has the public names"


@pytest.mark.parametrize("path", RUNS, ids=stems(RUNS))
def test_papermill_understands_every_parameter(path: Path) -> None:
    """papermill overlooks `x: int | None = 1` (write Optional) and lines with a second `=`, be it in the comment."""
    (cell,) = [cell for cell in cells_of(path) if "parameters" in cell.metadata.get("tags", [])]
    body = ast.parse(cell.source).body
    assert body and all(isinstance(node, ast.AnnAssign) for node in body), "only lines like `name: type = value`"
    seen = inspect_notebook(str(path))
    assert set(seen) == {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    for name, parameter in seen.items():
        assert parameter["inferred_type_name"] != "None", f"{name} has no type"
        assert parameter["help"], f"{name} has no comment"


def test_the_notebook_and_the_library_have_the_same_defaults() -> None:
    """Whoever runs `run_al` from a notebook or from Python gets the same experiment."""
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(Config)}
    for name in ("run_al", "run_baseline"):
        seen = {n: ast.literal_eval(p["default"]) for n, p in inspect_notebook(str(ROOT / f"nbs/{name}.ipynb")).items()}
        shared = {n: value for n, value in seen.items() if n in defaults and n != "mode"}
        shared.pop("steps" if name == "run_baseline" else "mode", None)  # all labels are learnt from for longer
        assert len(shared) > 20
        assert {n: (value, defaults[n]) for n, value in shared.items() if value != defaults[n]} == {}, name


@pytest.mark.parametrize("path", RUNS, ids=stems(RUNS))
def test_run_notebook_says_where_its_run_folder_lies(path: Path) -> None:
    assert any("run folder:" in cell.source for cell in cells_of(path)), "print('run folder:', path) for vlm_itl_run"


def test_every_import_of_the_library_is_a_requirement() -> None:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    texts = [settings["requirements"], *(settings[key] for key in settings if key.startswith("extra_"))]
    required = {re.split(r"[<>=!~\[]", word)[0].lower().replace("_", "-") for text in texts for word in text.split()}
    providers = packages_distributions()
    missing = []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"vlm_itl"}:
                offers = {offer.lower().replace("_", "-") for offer in providers.get(name, [name])}
                if not offers & required:
                    missing.append(f"{module.name} imports {name}")
    assert not missing, f"add to requirements in settings.ini: {missing}"


def test_constraints_name_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if line and not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)]
    assert not wrong


def test_readme_is_in_sync() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_readme.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_readme_shows_only_pictures_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "data:image" not in text
    for target in re.findall(r'!\[[^\]]*\]\(([^)\s]+)|<img[^>]*src="([^"]+)"', text):
        path = target[0] or target[1]
        assert re.match(r"https?://", path) or (ROOT / path).is_file(), f"README shows {path}, which does not exist"
