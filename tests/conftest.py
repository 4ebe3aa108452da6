"""Fixtures for every test: where real data lies, and an environment without network, wandb server or progress bars."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Set on import, before a test module imports torch, transformers, wandb or matplotlib, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("VLM_ITL_PROGRESS", "0")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in `make test`: a fork of a process with threads waits for ever
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the run notebooks: threads that wait burn no time

# No clock in a test: what is imported by its first example takes longer than the 200 ms that are usual (as in CI).
settings.register_profile("no clock", settings.default, deadline=None)
settings.load_profile("no clock")


def pytest_collection_finish() -> None:
    """What was imported stays: leaving it out of garbage collections halves the time of a small training."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a test that looks at no figure draw none, a quarter of their time. `drawn` marks exceptions."""
    if request.node.get_closest_marker("drawn") is None:
        monkeypatch.setattr("vlm_itl.experiment.loop.save_figures", lambda folder: [])


@pytest.fixture(scope="session", autouse=True)
def cache_folder() -> Iterator[Path]:
    """One cache for the session (env VLM_ITL_CACHE; kept if set), so that generated scenes are written once."""
    given = os.environ.get("VLM_ITL_CACHE")
    if given:
        yield Path(given)
        return
    folder = Path(tempfile.mkdtemp(prefix="vlm_itl_cache_"))
    os.environ["VLM_ITL_CACHE"] = str(folder)
    yield folder
    del os.environ["VLM_ITL_CACHE"]
    shutil.rmtree(folder, ignore_errors=True)


def _inside(folder: Path, part: str) -> Path:
    """`folder/part`, or skip the test and say what is missing."""
    path = folder / part
    if not path.exists():
        pytest.skip(f"{part} is not in the shared folder")
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder that holds settings.ini."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data and weights beside the project (env VLM_ITL_SHARED, default ../shared)."""
    folder = (ROOT / os.environ.get("VLM_ITL_SHARED", "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip("no folder with real data: set VLM_ITL_SHARED to it")
    return folder


@pytest.fixture(scope="session")
def voc(shared: Path) -> Path:
    """Real PASCAL VOC 2012 (the folder that holds JPEGImages)."""
    return _inside(shared, "data/VOCdevkit/VOC2012")


@pytest.fixture(scope="session")
def weights(shared: Path) -> Path:
    """Folder of pretrained checkpoints in Hugging Face format."""
    return _inside(shared, "weights")


@pytest.fixture(scope="session")
def scenes_small(cache_folder: Path) -> Any:
    """A few generated scenes (SegData), written once for the whole session."""
    from vlm_itl.data.sources import load_data

    return load_data("scenes", seed=0, options={"n_train": 24, "n_test": 8})
