"""One seed, one machine, one outcome: with any number of data workers, in a notebook, and in another process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_resume import SMALL, content, settings

from vlm_itl.cli.run import run_notebook
from vlm_itl.core.files import project_root
from vlm_itl.data.scenes import make_scenes
from vlm_itl.experiment.loop import run_al


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VOC folder."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "voc", n_train=20, n_test=3, seed=3)


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run without data workers."""
    out = tmp_path_factory.mktemp("alone") / "run"
    list(run_al(settings(scenes, out)))
    return without_workers(out)


def without_workers(folder: Path) -> dict[str, Any]:
    """What a run left, but for the setting that differs."""
    found = content(folder)
    for config in (found["config.json"], found["summary.json"]["config"]):
        del config["num_workers"]
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_data_workers(workers: int, scenes: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    """Weights, masks, verdicts and metrics: every file."""
    list(run_al(settings(scenes, tmp_path / "run", num_workers=workers)))
    assert without_workers(tmp_path / "run") == alone


def test_data_workers_in_a_notebook(scenes: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    """papermill starts the same kernel as Jupyter; workers are forks of it."""
    given = {**SMALL, "dataset": str(scenes), "output_dir": str(tmp_path / "run"), "num_workers": 2}
    done = run_notebook(project_root() / "nbs/run_al.ipynb", tmp_path / "out.ipynb", given)
    assert done.error is None
    assert without_workers(tmp_path / "run") == alone


SCRIPT = """
import json, sys
from vlm_itl.experiment.loop import run_al
from vlm_itl.experiment.config import make_config
list(run_al(make_config(json.loads(sys.argv[1]))))
"""


def test_another_process(scenes: Path, tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh interpreter that orders sets and dictionaries of text by another secret."""
    given = {**SMALL, "dataset": str(scenes), "output_dir": str(tmp_path / "run")}
    monkeypatch.setenv("PYTHONHASHSEED", "1234")
    subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(given)], check=True)
    assert without_workers(tmp_path / "run") == alone
