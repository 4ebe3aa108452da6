"""Nothing let in, nothing leaked: planted pickles, code, paths, keys and markup, in real files and real processes."""

from __future__ import annotations

import ast
import base64
import http.server
import io
import json
import os
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments

from vlm_itl.baselines import checkpoint_classes
from vlm_itl.cache import JudgementCache, JudgeStopped
from vlm_itl.compare import Comparison
from vlm_itl.core import ConfigError, DataError, JudgeError, RunError, printable
from vlm_itl.data import load_data
from vlm_itl.experiment import run_al
from vlm_itl.guards import hide_secrets, inside, markdown_cell, refuse_links, refuse_secrets
from vlm_itl.hf_model import load_vlm, save_tiny_vlm
from vlm_itl.labels import LabelSpace
from vlm_itl.model import load_model, load_weights, save_model
from vlm_itl.openai_judge import OpenAIHandler
from vlm_itl.report import asked_items, gallery_items, make_figure, read_run, round_table, save_figures, save_png
from vlm_itl.run import LiveText, main
from vlm_itl.scenes import make_scenes
from vlm_itl.settings import make_config
from vlm_itl.tracking import public_config, read_gallery
from vlm_itl.train import MaskStore
from vlm_itl.vlm import JudgeQuery

LABELS = LabelSpace(("background", "red", "blue"))
TINY: dict[str, Any] = {
    "steps": 2, "batch_size": 4, "image_size": 48, "initial": 6, "increment": 6, "max_labelled": 12, "gallery": 2,
    "val_share": 4, "keep_models": "all", "mode": "vlm", "judge": "mock", "policy": "triage",
}  # fmt: skip


class Bomb:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def bomb(path: Path, marker: Path) -> None:
    """Plant a pickle under a name, in the format that a reader of this name expects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, a=np.array([Bomb(marker)], dtype=object))
    elif path.suffix in (".pkl", ".pickle", ".model"):
        path.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save({"weight": Bomb(marker)}, path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VOC folder."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "voc", n_train=20, n_test=3, seed=3)


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder; copy it before spoiling it."""
    folder = tmp_path_factory.mktemp("run") / "run"
    list(run_al(make_config({**TINY, "dataset": str(scenes), "output_dir": str(folder)})))
    return folder


# ---- pickles ----

BESIDE = (
    "pytorch_model.bin training_args.bin optimizer.pt scheduler.pt scaler.pt rng_state.pth tokenizer.pkl vocab.model "
    "extra.pickle embeddings.npy embeddings.npz adapter.ckpt"
).split()


def test_the_bombs_are_live(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    bomb(tmp_path / "x.pt", marker)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert marker.exists()


def test_no_pickle_is_read_from_a_model_folder(
    tmp_path: Path, record_property: Callable[[str, Any], None], scenes: Path
) -> None:
    marker, planted = tmp_path / "ran", 0
    good = save_model(load_model("segformer-nano", LABELS), tmp_path / "good")
    save_tiny_vlm(tmp_path / "vlm")
    for folder in (good, tmp_path / "vlm"):
        for name in BESIDE:
            bomb(folder / name, marker)
            planted += 1
    model = load_model(str(good), LABELS)
    load_weights(model, good)
    load_vlm(str(tmp_path / "vlm"), device="cpu")
    checkpoint_classes(str(good))
    for folder in (good, tmp_path / "vlm"):
        (folder / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "model.pt", "weights.ckpt", "tf_model.h5", "flax_model.msgpack", "w.pkl"):
            for old in [p for p in folder.iterdir() if p.name in {*BESIDE, "model.pt", "weights.ckpt", "w.pkl"}]:
                old.unlink()
            bomb(folder / name, marker)
            planted += 1
            with pytest.raises(ConfigError, match="convert it once"):
                load_model(str(folder), LABELS) if folder == good else load_vlm(str(folder), device="cpu")
            (folder / name).unlink()
    bomb(good / "pytorch_model.bin", marker)
    for there in ("pytorch_model.bin", "../pytorch_model.bin", "/etc/x.safetensors", 3):
        (good / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": there}}))
        planted += 1
        with pytest.raises(ConfigError, match="only safetensors"):
            load_model(str(good), LABELS)
    (good / "model.safetensors.index.json").unlink()
    bomb(good / "adapter_model.bin", marker)
    (good / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="adapter_model.bin"):
        load_model(str(good), LABELS)
    for option in ({"use_safetensors": False}, {"weights_only": False}):
        with pytest.raises(ConfigError, match="always True"):
            load_vlm(str(tmp_path / "vlm"), model_options=option)
    assert not marker.exists()
    record_property("trust.security_pickles_planted", planted + 3 + 6)  # beside: 3 of the Trainer, 6 of data sets


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_trainer_checkpoint_runs_no_pickle(tmp_path: Path, name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}

    rows: Any = [{"x": torch.ones(2), "labels": torch.ones(())}] * 8

    def train(steps: int, resume: bool = False) -> Any:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
        )
        return Trainer(Net(), arguments, train_dataset=rows).train(resume_from_checkpoint=resume)

    train(1)
    marker = tmp_path / "ran"
    checkpoint = tmp_path / "checkpoint-1"
    bomb(checkpoint / "training_args.bin", marker)
    bomb(checkpoint / "extra.pkl", marker)
    assert train(2, resume=True).global_step == 2  # what is not needed is not read
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert (checkpoint / name).is_file()
    bomb(checkpoint / name, marker)
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
        train(2, resume=True)
    assert not marker.exists()


SCRIPT = "from pathlib import Path\nPath({!r}).touch()\n"


def test_no_pickle_and_no_script_is_read_from_a_data_folder(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    picture = {"bytes": None, "path": None}
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    picture["bytes"] = buffer.getvalue()  # type: ignore[assignment]
    rows = datasets.Dataset.from_dict({"image": [picture] * 4, "mask": [picture] * 4})
    rows = rows.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "disk")
    for name in ("data.pkl", "train/data.pickle", "train/x.pt", "disk.py"):
        (tmp_path / "disk" / name).write_bytes(
            SCRIPT.format(str(marker)).encode() if name.endswith(".py") else pickle.dumps(Bomb(marker))
        )
    assert len(load_data(str(tmp_path / "disk"), val_share=1, options={"classes": ["a", "b"]}).train) == 3
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text(SCRIPT.format(str(marker)))
    (script / "script.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    archive = tmp_path / "archive"
    archive.mkdir()
    with tarfile.open(archive / "train.tar", "w") as file:
        for name in ("a.pkl", "a.pyd", "a.pth", "a.npy", "../../escaped.pkl"):
            bomb(tmp_path / "one" / f"x.{name.rsplit('.')[-1]}", marker)
            file.add(next((tmp_path / "one").iterdir()), name)
            shutil.rmtree(tmp_path / "one")
    with tarfile.open(archive / "test.tar", "w") as file:
        file.add(script / "script.pkl", "a.pkl")
    readme = "---\nconfigs:\n- config_name: default\n  data_files: script.pkl\ndataset_info:\n  builder_name: pandas\n---\n"
    for folder in (script, archive):
        (folder / "README.md").write_text(readme if folder == script else "")
        with pytest.raises(DataError):
            load_data(str(folder), cache_dir=tmp_path / "cache")
    assert not marker.exists() and not (tmp_path.parent / "escaped.pkl").exists()


def test_a_foreign_cache_runs_nothing(tmp_path: Path) -> None:
    import sqlite3

    marker = tmp_path / "ran"
    cache = JudgementCache(tmp_path / "c.sqlite")
    cache.close()
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        connection.execute(
            "INSERT INTO judgements (key, verdict, score_kind, raw, attempts) VALUES ('k', 'yes', 'hard', ?, 1)",
            (pickle.dumps(Bomb(marker)),),
        )
        connection.execute(f"CREATE VIEW v AS SELECT load_extension('{marker}')")
    JudgementCache(tmp_path / "c.sqlite").get(["k"])
    assert not marker.exists()


def test_the_library_calls_nothing_that_runs_text(root: Path) -> None:
    """No pickle, eval, exec, shell, archive or unsafe YAML anywhere in the library."""
    forbidden = {"eval", "exec", "compile", "__import__", "system", "popen", "extractall", "unpack_archive", "unsafe_load"}
    modules = {"pickle", "dill", "joblib", "shelve", "marshal", "zipfile", "tarfile", "subprocess", "cloudpickle"}
    allowed = {("re", "compile"), ("torch", "compile"), ("transformers", "compile")}
    for path in sorted((root / "vlm_itl").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
                names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
                assert not names & modules, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                owner = getattr(getattr(node.func, "value", None), "id", "")
                arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if isinstance(node.func, ast.Attribute) and called == "eval" and not node.args:
                    continue  # a network goes into evaluation mode
                assert called not in forbidden or (owner, called) in allowed, f"{path.name}:{node.lineno} {called}"
                assert owner not in ("np", "numpy", "torch") or called != "load", f"{path.name}:{node.lineno}"
                assert owner != "yaml" or called in ("safe_load", "safe_dump", "dump", "load")
                if owner == "yaml" and called == "load":
                    assert arguments["Loader"] == "NoDatesSafeLoader"
                assert arguments.get("shell", "False") == "False"
                assert arguments.get("trust_remote_code", "False") == "False"
                assert arguments.get("verify", "True") == "True" and arguments.get("allow_pickle", "False") == "False"


# ---- code from elsewhere ----


def test_code_in_a_model_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"
    code = SCRIPT.format(str(marker)) + "raise OSError('the planted code ran')\n"
    auto = {k: "planted.X" for k in ("AutoConfig", "AutoModelForSemanticSegmentation", "AutoModelForImageTextToText")}
    own = {"model_type": "planted", "auto_map": auto, "architectures": ["XForSemanticSegmentation"]}
    segmenter = tmp_path / "segmenter"
    segmenter.mkdir()
    (segmenter / "config.json").write_text(json.dumps(own))
    (segmenter / "planted.py").write_text(code)
    for call in (lambda: load_model(str(segmenter), LABELS), lambda: checkpoint_classes(str(segmenter))):
        with pytest.raises(ConfigError, match="Python code of its own"):
            call()
    known = save_model(load_model("segformer-nano", LABELS), tmp_path / "known")
    for file in ("config.json", "preprocessor_config.json"):
        settings = json.loads((known / file).read_text())
        settings["auto_map"] = auto | {"AutoImageProcessor": "planted.X"}
        (known / file).write_text(json.dumps(settings))
    (known / "planted.py").write_text(code)
    load_model(str(known), LABELS)  # transformers has a class of its own for it
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_model(str(known), LABELS, options={"trust_remote_code": True})

    vlm = tmp_path / "vlm"
    save_tiny_vlm(vlm)
    (vlm / "planted.py").write_text(code)
    config = json.loads((vlm / "config.json").read_text())
    (vlm / "config.json").write_text(json.dumps({**config, "model_type": "planted", "auto_map": auto}))
    with pytest.raises(ConfigError, match="model_options.*trust_remote_code"):
        load_vlm(str(vlm), device="cpu")
    (vlm / "config.json").write_text(json.dumps(config))
    for file in vlm.glob("*processor*.json"):
        known_map = {"AutoProcessor": "planted.X", "AutoImageProcessor": "planted.X"}
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": known_map}))
    try:
        load_vlm(str(vlm), device="cpu")
    except (ConfigError, JudgeError):
        pass
    assert not marker.exists()
    (vlm / "config.json").write_text(json.dumps({**config, "model_type": "planted", "auto_map": auto}))
    with pytest.raises((ConfigError, JudgeError)):
        load_vlm(str(vlm), device="cpu", model_options={"trust_remote_code": True})
    assert marker.exists(), "the plant is dead: with the flag it should have run"


def test_yaml_makes_no_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str], root: Path) -> None:
    marker = tmp_path / "ran"
    for tag in ("!!python/object/apply:os.mknod", "!!python/object/new:os.mknod", "!!python/name:os.mknod"):
        text = f"judge_options: {tag} ['{marker}']"
        (tmp_path / "p.yaml").write_text(text)
        notebook = str(root / "nbs" / "run_al.ipynb")
        packed = base64.b64encode(text.encode()).decode()
        for option in (["-y", text], ["-f", str(tmp_path / "p.yaml")], ["-b", packed]):
            assert main([notebook, str(tmp_path / "out.ipynb"), *option]) == 2
            assert "not YAML" in capsys.readouterr().err
        with pytest.raises((ConfigError, yaml.YAMLError)):
            make_config(judge_options=text.split(": ", 1)[1])
    assert not marker.exists()


# ---- paths ----

WRONG = (
    "../../secret", "..", "/etc/passwd", "a/../../b", "a/..", "./x", "", ".", "a//b", "C:\\Windows\\x", "C:x", "..\\..\\x",
    "\\\\host\\share", "x\0.png", "//etc/passwd", "../" * 40 + "etc/passwd", None, 3, ["x"],
)  # fmt: skip


def test_names_from_a_run_folder_stay_inside(
    finished: Path, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    run, planted = tmp_path / "a" / "b" / "run", 0
    shutil.copytree(finished, run)
    secret = tmp_path / "a" / "secret.png"
    Image.new("P", (48, 48), 1).save(secret)
    store = MaskStore(run / "round_000" / "masks", LABELS)
    for name in WRONG:
        planted += 1
        with pytest.raises(RunError):
            inside(run, name)
        if isinstance(name, str) and name not in ("", ".", ".."):
            planted += 2
            with pytest.raises(RunError):
                store[name]
            with pytest.raises(RunError):
                store.write(name, np.zeros((2, 2), np.uint8))
    gallery = run / "round_000" / "gallery" / "index.json"
    entries = json.loads(gallery.read_text())
    asked = run / "round_000" / "asked" / "index.json"
    asked.parent.mkdir(exist_ok=True)
    escapes = ["../../../secret.png", str(secret), "../masks/../../../secret.png", "..\\x.png", "x\0.png"]
    for name in escapes:
        for kind in ("image", "truth", "prediction"):
            planted += 1
            gallery.write_text(json.dumps([{**entries[0], kind: name}]))
            with pytest.raises(RunError, match="no name of a file inside"):
                gallery_items(run, 0)
            with pytest.raises(RunError, match="no name of a file inside"):
                read_gallery(run / "round_000")
        planted += 1
        asked.write_text(json.dumps([{"id": "x", "regions": 1, "file": name}]))
        with pytest.raises(RunError, match="no name of a file inside"):
            asked_items(run)
    record_property("trust.security_paths_planted", planted + len(LINKS))


LINKS = (
    "round_000/masks", "figures", ".round_002.tmp", "round_001", "round_000/model", "wandb", "summary.json",
    "round_000/record.json", "config.json", "round_000/gallery/0_image.jpg", "tensorboard",
)  # fmt: skip


@pytest.mark.parametrize("place", LINKS)
def test_links_in_a_run_folder_are_refused(finished: Path, scenes: Path, tmp_path: Path, place: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(finished, run)
    outside.mkdir()
    (outside / "precious.txt").write_text("mine")
    link = run / place
    was_file = link.is_file()
    if link.is_dir():
        shutil.move(link, outside / "moved")
    elif was_file:
        shutil.move(link, outside / "moved.file")
    link.symlink_to(outside / "moved.file" if was_file else outside)
    before = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    settings = {**TINY, "dataset": str(scenes), "output_dir": str(run)}
    for call in (lambda: read_run(run), lambda: list(run_al(make_config(settings))), lambda: save_figures(run)):
        with pytest.raises(RunError, match="symbolic link"):
            call()
    assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == before


def test_a_crafted_record_writes_and_reads_nothing_outside(finished: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    Image.new("P", (48, 48), 1).save(tmp_path / "x.png")
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p != run}
    path = run / "round_000" / "record.json"
    record = json.loads(path.read_text())
    text = json.dumps(record)
    for image_id in {*record["pseudo_ids"], *record["selection"]["ids"]}:
        text = text.replace(json.dumps(image_id), json.dumps("../../../x"), 1)
    path.write_text(text)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "round_001")
    config = make_config({**TINY, "dataset": str(scenes), "output_dir": str(run)})
    with pytest.raises((RunError, DataError, ConfigError)):
        list(run_al(config))
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p != run} == before


def test_links_are_searched_at_any_depth_and_a_run_may_lie_behind_one(tmp_path: Path) -> None:
    (tmp_path / "real" / "a" / "b").mkdir(parents=True)
    (tmp_path / "there").symlink_to(tmp_path / "real")
    refuse_links(tmp_path / "there")
    (tmp_path / "real" / "wandb").mkdir()
    (tmp_path / "real" / "wandb" / "latest").symlink_to("/tmp")
    refuse_links(tmp_path / "there")
    (tmp_path / "real" / "a" / "b" / "c").symlink_to("../..")
    with pytest.raises(RunError, match="symbolic link"):
        refuse_links(tmp_path / "there")


def test_lists_of_a_data_set_name_no_file_outside(scenes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data" / "voc"
    shutil.copytree(scenes, copy)
    Image.new("RGB", (48, 48)).save(tmp_path / "x.jpg")
    for name in ("../../x", "../../../x", str(tmp_path / "x"), "..\\x"):
        (copy / "ImageSets" / "Segmentation" / "train.txt").write_text(f"{name}\n")
        with pytest.raises(DataError):
            load_data(str(copy))
