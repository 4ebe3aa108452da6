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

from vlm_itl.cli.run import LiveText, main
from vlm_itl.core.checks import ConfigError, DataError, JudgeError, RunError, printable
from vlm_itl.core.figures import make_figure, save_png
from vlm_itl.core.guards import hide_secrets, inside, markdown_cell, refuse_links, refuse_secrets
from vlm_itl.core.reading import _PlainLoader
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import MaskStore
from vlm_itl.data.scenes import make_scenes
from vlm_itl.data.sources import load_data
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_al
from vlm_itl.model.segmenter import load_model, load_weights, save_model
from vlm_itl.reports.compare import Comparison
from vlm_itl.reports.report import read_run, round_table, summary_table
from vlm_itl.reports.run_figures import asked_items, gallery_items, plot_gallery, save_figures
from vlm_itl.reports.tracking import public_config, read_gallery
from vlm_itl.vlm.cache import JudgementCache
from vlm_itl.vlm.free import checkpoint_classes
from vlm_itl.vlm.handler import JudgeQuery, JudgeStopped
from vlm_itl.vlm.local_model import load_vlm, save_tiny_vlm
from vlm_itl.vlm.server import OpenAIHandler

LABELS = LabelSpace(("background", "red", "blue"))
TINY: dict[str, Any] = {
    "steps": 2, "batch_size": 4, "image_size": 48, "initial": 6, "increment": 6, "max_labelled": 12, "gallery": 2,
    "model": "segformer-nano", "proposer": "own",
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


def test_a_trainer_checkpoint_runs_no_pickle(tmp_path: Path) -> None:
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
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        bomb(checkpoint / name, marker)
        with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
            train(2, resume=True)
        (checkpoint / name).write_bytes(whole)
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
    assert len(load_data(str(tmp_path / "disk"), val_share=1, leaks="off", options={"classes": ["a", "b"]}).train) == 3
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
    readme = "---\nconfigs:\n- config_name: default\n  data_files: script.pkl\n"
    readme += "dataset_info:\n  builder_name: pandas\n---\n"
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
    forbidden = {"eval", "exec", "compile", "__import__", "system", "popen", "extractall", "unpack_archive"}
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
                assert called not in ("exec_module", "load_module") or path.name == "plugins.py"  # what a setting names
                assert owner not in ("np", "numpy", "torch") or called != "load", f"{path.name}:{node.lineno}"
                assert owner != "yaml" or called in ("safe_load", "safe_dump", "dump", "load")
                if owner == "yaml" and called == "load":
                    assert arguments["Loader"] == "_PlainLoader" and issubclass(_PlainLoader, yaml.SafeLoader)
                assert arguments.get("shell", "False") == "False"
                assert arguments.get("trust_remote_code", "False") == "False"
                assert arguments.get("verify", "True") in ("True", "_certificates()")  # those of the system
                assert arguments.get("allow_pickle", "False") == "False"


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
    "../../secret", "..", "/etc/passwd", "a/../../b", "a/..", "./x", "", ".", "a//b", "C:\\Windows\\x", "C:x",
    "..\\..\\x",
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
        if isinstance(name, str) and not name.endswith((".", "..")) and name:
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
    calls: list[Callable[[], Any]] = [lambda: read_run(run), lambda: save_figures(run)]
    if place in LINKS[:4]:  # the rest takes the same check, and a second each
        calls.append(lambda: list(run_al(make_config(settings))))
    for call in calls:
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


# ---- keys ----

KEYS = {
    "OPENAI_API_KEY": "sk-planted0openai0A1b2C3d4E5f6",
    "HF_TOKEN": "hf_plantedHUGGINGfaceA1b2C3d4E5f6",
    "WANDB_API_KEY": "aabbccddeeff00112233445566778899aabbccdd",
    "MY_LAB_SERVER_KEY": "planted-lab-key-0Zz9Yy8Xx7",
}


class Echo(http.server.BaseHTTPRequestHandler):
    """A server that repeats the key it was given, wherever it can."""

    asked = 0
    keys: set[str] = set()
    protocol_version = "HTTP/1.1"

    def log_message(self, *parts: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"]
        type(self).asked += 1
        self.keys.add(key)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"Yes. {key}"}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        good = {"id": key, "object": "chat.completion", "created": 0, "model": f"m {key}", "choices": [choice]}
        turn = type(self).asked % 6
        status, body = 200, {**good, "usage": usage}
        if turn == 2:
            status, body = 500, {"error": {"message": f"upstream refused {key}", "code": key}}
        elif turn == 3:
            status, body = 400, {"error": {"message": f"odd: {key} / {key.split()[1]}"}}
        elif turn == 5:
            body = {**good, "choices": [], "error": key}
        if type(self).asked > 16:
            status, body = 401, {"error": {"message": f"Incorrect API key provided: {key}"}}
        data = f"{{not json {key}".encode() if turn == 4 and status == 200 else json.dumps(body).encode()
        self.send_response(status, f"key {key}")
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Echo", str(key))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what is packed inside: PNG chunks and pictures of a notebook."""
    data = path.read_bytes()
    yield data
    if data.startswith(b"\x89PNG"):
        place = 8
        while place + 8 <= len(data):
            length = int.from_bytes(data[place : place + 4], "big")
            chunk, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
            if chunk in (b"zTXt", b"iTXt"):
                for start in range(len(body)):
                    try:
                        yield zlib.decompress(body[start:])
                    except zlib.error:
                        continue
            place += 12 + length
    if data.startswith(b"\x1f\x8b"):
        yield zlib.decompress(data, 31)


def forms(key: str) -> list[bytes]:
    """A key as it may stand in a file."""
    packed = [base64.b64encode(b"x" * n + key.encode())[4:-4] for n in range(3)]
    return [key.encode(), key[4:].encode(), key[::-1].encode(), key.encode().hex().encode(), *packed]


def search(folder: Path, said: bytes = b"") -> tuple[int, list[str]]:
    """How many bytes were searched for the planted keys, and where one was found."""
    total, found = len(said), []
    parts = [("stdout and stderr", said)]
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            parts += [(str(path.relative_to(folder)), piece) for piece in pieces(path)]
            parts.append(("name", str(path.relative_to(folder)).encode()))
    for where, data in parts:
        total += len(data)
        found += [f"{name} in {where}" for name, key in KEYS.items() for form in forms(key) if form in data]
    return total, found


def test_the_search_finds_a_key(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x" + KEYS["HF_TOKEN"].encode())
    (tmp_path / "b").write_bytes(base64.b64encode(f'{{"k": "{KEYS["OPENAI_API_KEY"]}"}}'.encode()))
    assert {line.split()[0] for line in search(tmp_path)[1]} == {"HF_TOKEN", "OPENAI_API_KEY"}


def test_keys_are_written_nowhere(
    scenes: Path, tmp_path: Path, root: Path, record_property: Callable[[str, Any], None]
) -> None:
    """A whole run with failures, tracked, under papermill, stopped by a 401 in its last round with a traceback."""
    pytest.importorskip("openai")
    Echo.asked, Echo.keys = 0, set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    home = tmp_path / "home"
    home.mkdir()
    options = {"model": "toy", "base_url": url, "api_key_env": "MY_LAB_SERVER_KEY", "max_retries": 0, "concurrency": 2}
    settings = {
        **TINY, "dataset": str(scenes), "output_dir": str(home / "run"), "judge": "cached", "log_with": "wandb",
        "judge_options": {"judge": "openai", "options": options, "path": str(home / "cache.sqlite")}, "max_labelled": 9,
        "increment": 3, "gallery": 1, "test_every_round": False, "question": "exhaustive",  # asked once about any mask
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    environment = {
        **os.environ, **KEYS, "WANDB_MODE": "offline", "HOME": str(home), "TMPDIR": str(home),
        "WANDB_CACHE_DIR": str(home / "w"), "WANDB_CONFIG_DIR": str(home / "wc"), "PYTHONPATH": str(root),
    }  # fmt: skip
    code = "import sys; from vlm_itl.cli.run import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(root / "nbs/run_al.ipynb"), str(home / "out.ipynb")]
    try:
        done = subprocess.run(
            [*command, "-f", str(tmp_path / "p.yaml")], env=environment, capture_output=True, cwd=home, timeout=120
        )
    finally:
        server.shutdown()
        server.server_close()
    said = done.stdout + done.stderr
    assert done.returncode == 1 and b"refuses the key (401)" in said, said[-2000:]
    assert Echo.keys == {f"Bearer {KEYS['MY_LAB_SERVER_KEY']}"}
    notebook = (home / "out.ipynb").read_text()
    assert "Traceback" in notebook and "refuses the key" in notebook
    assert list(home.glob("run/wandb/**/*.wandb")) and list(home.glob("run/round_*/record.json"))
    kept = b"".join(path.read_bytes() for path in home.glob("cache.sqlite*"))
    assert b"Yes. Bearer ***" in kept  # the echoed answers are really there
    total, found = search(home, said)
    assert not found
    record_property("trust.security_key_bytes_searched", total)


def test_settings_with_keys_are_refused_before_they_are_shown(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    hidden = "hunter2-of-the-lab"
    wrong: list[dict[str, Any]] = [
        *({"judge_options": {"options": {name: hidden}}} for name in (
            "apikey", "api_key", "apiKey", "access_key", "x-api-key", "secret_access_key", "password", "passwd", "pwd",
            "token", "accessToken", "auth", "Cookie", "credentials", "client-secret", "Authorization", "key",
        )),
        {"judge_options": {"extra_body": {"headers": {"X-Auth": hidden}}}},
        {"judge_options": {"extra_body": [{"note": KEYS["OPENAI_API_KEY"]}]}},
        {"judge_options": {"base_url": f"https://me:{hidden}@host/v1"}},
        {"judge_options": {"base_url": f"https://host/v1?api_key={hidden}"}},
        {"judge_options": {"system": f"Bearer {hidden}"}},
        {"judge_options": {KEYS["HF_TOKEN"]: 1}},
        {"model": f"a {KEYS['MY_LAB_SERVER_KEY']}"},
        {"project": KEYS["WANDB_API_KEY"]},
        {"dataset": f"https://me:{hidden}@host/data"},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(ConfigError) as error:
            make_config(settings)
        listed = [*KEYS.values(), hidden]
        assert "environment variable" in str(error.value) and not any(key in str(error.value) for key in listed)
        name, value = next(iter(settings.items()))
        text = json.dumps(value) if isinstance(value, dict) else value
        for option in (["-y", yaml.safe_dump(settings)], ["-p", name, text]):
            out = tmp_path / "out.ipynb"
            assert main([str(root / "nbs/run_al.ipynb"), str(out), *option]) == 2, (option, settings)
            said = "".join(capsys.readouterr())
            assert not any(key in said for key in listed) and not out.exists(), option
    make_config(model="hf-internal-testing/tiny-random-segformer", judge_options={"api_key_env": "MY_LAB_SERVER_KEY"})
    refuse_secrets("x", {"max_tokens": 5, "pad_token": "<pad>", "monkey": "a", "keys": 3, "path": "/data/sk-1"})


def test_19_a_folder_is_no_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = {"PWD": tmp_path, "OLDPWD": tmp_path / "gone", "SSH_AUTH_SOCK": tmp_path / "agent.1", "KEY_DIR": tmp_path}
    places |= {"GOOGLE_APPLICATION_CREDENTIALS": tmp_path, "API_TOKEN_FILE": tmp_path / "absent"}
    for name, place in places.items():
        monkeypatch.setenv(name, str(place))
        text = f"{place}/images"
        assert hide_secrets(text) == text, name
        assert make_config(dataset=text, data_options={"masks": text}).dataset == text, name
    monkeypatch.setenv("MAX_TOKENS", "12345678")
    assert hide_secrets("12345678 and /data/monkey=3/x") == "12345678 and /data/monkey=3/x"
    for name, secret in (("MYSQL_PWD", "hunter2hunter2"), ("S3_KEY", "/ab+cdefgh/ij="), ("X_API_TOKEN", "abcdefghij")):
        monkeypatch.setenv(name, secret)
        assert hide_secrets(f"a {secret}") == "a ***", name
    for text in ("https://h/v1?api_key=abc", "x-api-key=abc", "access_token=abc", "apikey=abc", "MY_SECRET=abc"):
        assert hide_secrets(text) == text.replace("abc", "***")


def test_texts_of_others_are_blanked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "correct horse battery")
    text = "login correct horse battery at https://u:p@h/?token=abc with ghp_0123456789abcdefABCDEF"
    assert hide_secrets(text) == "login *** at https://***@h/?token=*** with ***"
    assert public_config({"a": [text], "b": {"x_api_key": "z"}})["b"] == {}


# ---- text of others ----

MARKUP = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a | b | c", "`x` ```y```", "[x](javascript:alert(1))",
    "$$\\frac{1}{$$",
    "$\\undefined$", "</td></tr></table><iframe src=//x>", "&lt;b&gt;", "'\" onmouseover=alert(1) x='",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\x00b\x08c\x9bd", "\u202egnp.exe", "![x](http://x/y.png)", "_hidden",
)  # fmt: skip


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        assert not any("script:" in (value or "") for _, value in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


PLAIN_TAGS = {"p", "code", "b", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "div", "style", "em", "strong"}


def test_markup_of_others_is_text(finished: Path, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    planted = 0
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    everything = " ".join(MARKUP)
    (run / "config.json").write_text(json.dumps({**config, "strategy": everything, "judge": MARKUP[0]}))
    summary = json.loads((run / "summary.json").read_text())
    summary["labels"] = [*MARKUP, *summary["labels"][len(MARKUP) :]]
    (run / "summary.json").write_text(json.dumps(summary))
    index = run / "round_001" / "gallery" / "index.json"
    entries = json.loads(index.read_text()) * len(MARKUP)
    named = [{**e, "id": text, "verdict": text} for e, text in zip(entries, MARKUP, strict=False)]
    for start in range(0, len(named), 6):
        index.write_text(json.dumps(named[start : start + 6]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # glyphs that the font lacks
            save_png(plot_gallery(run), tmp_path / "gallery.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(save_figures(run)) >= 3
    pages = [summary_table(run)._repr_html_(), round_table(run)._repr_html_()]
    planted += 4 * len(MARKUP)
    for text in MARKUP:
        table = pd.DataFrame({"strategy": [text], text: [1.0]})
        pages.append(Comparison(text, text, text, table, table, [text])._repr_html_())
        markdown = f"| id | verdict |\n|---|---|\n| {markdown_cell(text)} | yes |\n"
        parsed = Tags(markdown2html_mistune(markdown))
        assert parsed.tags <= PLAIN_TAGS and parsed.attributes <= {"style"}, (parsed.tags, text)
        assert "yes" in parsed.text and markdown.count("\n") == 3 and "$" not in re.sub(r"\\\$", "", markdown)
        for shown in (str(RunError(text)), str(JudgeStopped(f"said {text}")), printable(text), markdown_cell(text)):
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
        planted += 10
    for page in pages:
        parsed = Tags(page)
        assert parsed.tags <= PLAIN_TAGS, parsed.tags - PLAIN_TAGS
        assert parsed.attributes <= {"border", "class", "style", "scoped"}, parsed.attributes
    record_property("trust.security_markup_planted", planted)


def test_a_terminal_is_not_steered_by_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    live = LiveText()
    for text in MARKUP:
        live.write(f"{text}\n")
    shown = "".join(capsys.readouterr())
    assert "red" in shown and "\\x1b]0;title\\x07" in shown
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", shown.replace("\r", ""))


def test_a_tracker_shows_text_as_text(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from vlm_itl.reports.tracking import make_tracker

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "round_000" / "gallery" / "index.json"
    entries = json.loads(path.read_text())
    text = "".join(MARKUP[:5])
    path.write_text(json.dumps([{**entry, "id": text, "verdict": "yes"} for entry in entries]))
    config = {"note": "``` <script>alert(1)</script>"}
    with make_tracker("tensorboard", project="p", group="g", run_dir=run, config=config, labels=["a"]) as tracker:
        tracker.log_round(json.loads((run / "round_000" / "record.json").read_text()), run / "round_000")
    found = EventAccumulator(str(run / "tensorboard" / "rounds"), size_guidance={"tensors": 0})
    found.Reload()
    tags = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    table = tags["judge/table/text_summary"]
    assert "<" not in table and not re.search(r"(?<!\\)[`\[]", table)
    assert tags["config/text_summary"].count("```") == 2


def test_dollars_in_names_are_no_formulas(tmp_path: Path) -> None:
    figure, ((axes,),) = make_figure(3, 2)
    axes.plot([0, 1], label=r"$\bad$ and $\frac{$")
    axes.set_title("$a_b$ $")
    axes.set_xticks([0, 1], ["$x$$", r"$\nope$"])
    axes.legend()
    assert save_png(figure, tmp_path / "x.png").stat().st_size > 1000


# ---- servers ----


class Bad(http.server.BaseHTTPRequestHandler):
    """Redirects, floods, drips, or answers packed."""

    how = ""
    seen: list[str] = []
    target = ""

    def log_message(self, *parts: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(self.how)
        self.send_response(307 if self.how == "redirect" else 200)
        self.send_header("Content-Type", "application/json")
        if self.how == "redirect":
            self.send_header("Location", self.target)
            self.send_header("Content-Length", "0")
        if self.how == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            for _ in range(40 if self.how in ("flood", "drip") else 0):
                self.wfile.write(b" " * (2**18 if self.how == "flood" else 1))
                self.wfile.flush()
                time.sleep(0.1 if self.how == "drip" else 0)
            if self.how == "packed":
                self.wfile.write(zlib.compress(b" " * 10_000_000, wbits=31))
        except OSError:
            self.seen.append("hung up")


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., OpenAIHandler]]:
    """A judge that asks a bad server, and a second server where redirects lead to."""
    pytest.importorskip("openai")
    monkeypatch.setenv("MY_LAB_SERVER_KEY", KEYS["MY_LAB_SERVER_KEY"])
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Bad, Echo)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = [server.server_address[1] for server in servers]
    Bad.target, Bad.seen, Echo.asked, Echo.keys = f"http://localhost:{ports[1]}/v1/chat/completions", [], 0, set()

    def make(how: str, **options: Any) -> OpenAIHandler:
        Bad.how = how
        url = options.pop("base_url", f"http://127.0.0.1:{ports[0]}/v1")
        given = {"timeout_s": 1.0, "max_retries": 0, "api_key_env": "MY_LAB_SERVER_KEY", **options}
        return OpenAIHandler(model="toy", base_url=url, **given)

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def query() -> JudgeQuery:
    """A question."""
    return JudgeQuery("a", Image.new("RGB", (6, 6)), np.ones((6, 6), np.uint8), labels=LABELS)


def test_a_redirect_is_not_followed(bad: Callable[..., OpenAIHandler]) -> None:
    with pytest.raises(JudgeError, match="another address"):
        bad("redirect").judge([query()])
    assert Bad.seen == ["redirect"] and Echo.asked == 0


@pytest.mark.parametrize(("how", "said"), [("flood", "larger than"), ("drip", "end"), ("packed", "packed")])
def test_a_reply_is_bounded(bad: Callable[..., OpenAIHandler], how: str, said: str) -> None:
    began = time.monotonic()
    (answer,) = bad(how).judge([query()])
    assert answer.verdict == "abstain" and said in str(answer.error)
    assert time.monotonic() - began < 30
    assert KEYS["MY_LAB_SERVER_KEY"] not in str(Bad.seen)


def test_a_key_travels_encrypted_or_not_at_all(bad: Callable[..., OpenAIHandler]) -> None:
    for url in (
        "http://10.0.0.5:8000/v1",
        "http://127.evil.com/v1",
        "http://localhost.evil.com/v1",
        "http://[2001:db8::1]/v1",
    ):
        with pytest.raises(ConfigError, match="plain_http=True"):
            bad("", base_url=url)
        bad("", base_url=url, plain_http=True)
        bad("", base_url=url, api_key_env=None)
    for url in ("http://[::1]:8000/v1", "http://localhost:1/v1", "https://host/v1"):
        bad("", base_url=url)
    for url in ("http://[bad", "file:///etc/passwd", "https://h/v1?key=a", "https://a:b@h/v1", "https://h/v1#x"):
        with pytest.raises(ConfigError):
            bad("", base_url=url)


def test_a_certificate_is_checked(bad: Callable[..., OpenAIHandler], tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost"], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *parts: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Echo.asked = 0
    try:
        with pytest.raises(JudgeError, match="(?i)certificate"):
            bad("", base_url=f"https://localhost:{server.server_address[1]}/v1").judge([query()])
    finally:
        server.shutdown()
        server.server_close()
    assert Echo.asked == 0


# ---- what is installed ----


def test_constraints_are_exact_and_fit(root: Path) -> None:
    lines = [line.split("#")[0].strip() for line in (root / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    found = {}
    for pin in pins:
        assert pin.url is None and not pin.marker
        assert re.fullmatch(r"==[^=*,]+", str(pin.specifier)), f"{pin} is not exact"
        assert found.setdefault(canonicalize_name(pin.name), pin) is pin, f"{pin.name} twice"
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini")
    section = settings["DEFAULT"]
    asked = [*section["requirements"].split(), *section["dev_requirements"].split()]
    for extra in ("extra_tensorboard", "extra_openai"):
        asked += section[extra].split()
    for text in asked:
        want = Requirement(text)
        pin = found[canonicalize_name(want.name)]
        version = str(pin.specifier).removeprefix("==")
        assert want.url is None and want.specifier.contains(version, prereleases=True), f"{want} against {pin}"


def test_the_policy_is_there(root: Path) -> None:
    text = (root / "SECURITY.md").read_text()
    for part in ("safetensors", "trust_remote_code", "api_key_env", "plain_http", "tools/audit.sh", "advisory"):
        assert part in text
    assert "@" not in text  # no address is made up
    assert os.access(root / "tools" / "audit.sh", os.X_OK)


def test_the_audit_says_when_it_cannot_run(root: Path, tmp_path: Path) -> None:
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "AUDIT": str(tmp_path / "nothing-here")}
    done = subprocess.run([root / "tools" / "audit.sh"], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "not audited" in done.stdout
    fake = tmp_path / "pip-audit"
    cases = [("echo found; exit 1", 1, "found"), ("echo 'Connection refused' >&2; exit 1", 0, "not audited")]
    cases += [("echo none; exit 0", 0, "none"), ("echo 'x could not be audited'; exit 0", 0, "not audited")]
    for body, code, said in cases:
        fake.write_text(f"#!/bin/sh\n{body}\n")
        fake.chmod(0o755)
        environment["AUDIT"] = str(fake)
        done = subprocess.run(
            [root / "tools" / "audit.sh"], env=environment, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == code and said in done.stdout, done
