"""The trackers, for real: what wandb (offline) and tensorboard wrote is read back from their files."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError
from vlm_itl.core.files import write_json
from vlm_itl.reports.tracking import (
    TRACKERS,
    Tracker,
    _wandb_id,
    flatten_record,
    make_tracker,
    panel,
    public_config,
    read_gallery,
    read_wandb_file,
)

NAMES = ("background", "bird", "cat")
SECRETS = {
    "OPENAI_API_KEY": "planted-openai-value-1",
    "HF_TOKEN": "planted-hugging-value-2",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_DB_PASSWORD": "planted-password-value-3",
}


def a_record(index: int = 0) -> dict:
    return {
        "index": index,
        "labelled": 10 + 10 * index,
        "labelled_share": 0.1 + 0.1 * index,
        "pseudo": 3,
        "budget": {"images": 30, "train_images": 20, "val_images": 10, "judge_calls": 12, "judge_usd": None},
        "metrics": {
            "val": {
                "mean_iou": 0.5,
                "pixel_accuracy": 0.8,
                "mean_accuracy": float("nan"),
                "per_class_iou": {"background": 0.9, "bird": None, "cat": 0.1},
            },
            "train_loss": 0.7,
            "steps": 40,
        },
        "judge": {"n": 12, "agreement_rate": 0.75, "kappa": None, "accepted": 3},
        "selection": {"strategy": "random", "ids": ["a", "b"], "reasons": ["", ""]},
        "pseudo_ids": ["c"],
        "seconds": {"train": 1.5},
    }


SUMMARY = {
    "mode": "vlm",
    "name": "toy",
    "finished": True,
    "simulated": True,
    "labels": list(NAMES),
    "curve": {
        "labelled": [10, 20],
        "labelled_share": [0.1, 0.2],
        "val_mean_iou": [0.4, 0.5],
        "test_mean_iou": [0.35, 0.45],
        "agreement_rate": [None, 0.75],
    },
    "test": {"mean_iou": 0.45, "pixel_accuracy": 0.8, "per_class_iou": {"background": 0.9, "bird": None, "cat": 0.3}},
    "aubc": 0.4,
    "seconds": {"total": 9.0},
}


def save_mask(path: Path, mask: np.ndarray) -> str:
    image = Image.fromarray(mask.astype(np.uint8), "L").convert("P")
    image.putdata(mask.astype(np.uint8).ravel().tolist())
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * (252 * 3) + [224, 224, 192])
    image.save(path)
    return path.name


def write_gallery(round_dir: Path, sizes: list[tuple[int, int]] = ((48, 32), (40, 56))) -> Path:
    """Validation samples with truth, and pool samples with verdicts and without truth, of different sizes."""
    folder = round_dir / "gallery"
    folder.mkdir(parents=True)
    entries = []
    for split in ("val", "pool"):
        for width, height in sizes:
            i = len(entries)
            mask = np.zeros((height, width), np.uint8)
            mask[: height // 2] = 2
            mask[0] = 255
            Image.fromarray(np.full((height, width, 3), 90 + i, np.uint8)).save(folder / f"{i}_image.jpg")
            entry = {"id": f"id{i}", "split": split, "image": f"{i}_image.jpg", "iou": 0.1 * i, "truth": None}
            entry |= {"verdict": None, "p_yes": None}
            entry["prediction"] = save_mask(folder / f"{i}_prediction.png", np.where(mask == 255, 0, mask))
            if split == "val":
                entry["truth"] = save_mask(folder / f"{i}_truth.png", mask)
            else:
                entry |= {"verdict": ["no", "abstain"][i % 2], "p_yes": [0.25, None][i % 2]}
            entries.append(entry)
    write_json(folder / "index.json", entries)
    return round_dir


def arguments(run_dir: Path, **changes) -> dict:
    config = {
        "seed": 7,
        "strategy": "entropy",
        "api_key": SECRETS["OPENAI_API_KEY"],
        "judge_options": {"token": "hidden-in-config-4", "url": f"https://u:{SECRETS['MY_DB_PASSWORD']}@host/v1"},
        "note": f"called with {SECRETS['HF_TOKEN']}",
        "cache": Path("/tmp/somewhere"),
        "max_new_tokens": 16,
    }
    return {"project": "tests", "group": "grp", "run_dir": run_dir, "config": config, "labels": NAMES} | changes


# ---------------------------------------------------------------- wandb, offline


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """One vlm experiment of two rounds told to wandb offline, round 1 again by a resumed tracker, then the summary."""
    folder = tmp_path_factory.mktemp("wandb")
    run_dir = folder / "run"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        patch.setenv("WANDB_MODE", "offline")
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        rounds = [write_gallery(run_dir / f"round_{i:03d}") for i in range(2)]
        figure = run_dir / "figures" / "learning_curve.png"
        figure.parent.mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(figure)
        with make_tracker("wandb", **arguments(run_dir)) as tracker:
            tracker.log_round(a_record(0), rounds[0])
            tracker.log_round(a_record(1), rounds[1])
        with make_tracker("wandb", **arguments(run_dir)) as tracker:
            tracker.log_round(a_record(1), rounds[1])
            tracker.finish(SUMMARY, [figure])
    return run_dir


@pytest.fixture(scope="module")
def runs(offline):
    told = [read_wandb_file(path) for path in (offline / "wandb").glob("offline-run-*/*.wandb")]
    return {run["name"]: run for run in told}


def test_one_run_a_round_in_one_group_and_a_summary(offline, runs):
    assert len(list((offline / "wandb").glob("offline-run-*"))) == 3  # round 1 was told twice
    assert {name: run["job_type"] for name, run in runs.items()} == {
        "grp-round-000": "round",
        "grp-round-001": "round",
        "grp-summary": "summary",
    }
    assert {run["group"] for run in runs.values()} == {"grp"}
    assert {run["project"] for run in runs.values()} == {"tests"}
    assert len({run["id"] for run in runs.values()}) == 3


def test_the_round_run_holds_metrics_and_config(runs):
    for index in range(2):
        run = runs[f"grp-round-{index:03d}"]
        assert len(run["history"]) == 1
        row = run["history"][0]
        wanted = {
            "round": index,
            "labelled_share": 0.1 + 0.1 * index,
            "val/mean_iou": 0.5,
            "val/pixel_accuracy": 0.8,
            "val/iou/background": 0.9,
            "val/iou/cat": 0.1,
            "budget/images": 30,
            "judge/agreement_rate": 0.75,
            "train/loss": 0.7,
        }
        assert {name: row.get(name) for name in wanted} == pytest.approx(wanted)
        assert not {"val/iou/bird", "val/mean_accuracy", "judge/kappa", "budget/judge_usd"} & set(row)
        assert row["_step"] == index
        config = run["config"]
        assert (config["seed"], config["strategy"], config["max_new_tokens"]) == (7, "entropy", 16)
        assert config["round"] == index and config["cache"] == "/tmp/somewhere"
        assert "api_key" not in config and "token" not in config["judge_options"]


def test_the_round_run_holds_pictures_with_masks(offline, runs):
    run = runs["grp-round-001"]
    row = run["history"][0]
    text = json.dumps(row)
    assert any(name.startswith("samples/val") for name in row) and any(name.startswith("judge/gallery") for name in row)
    assert "prediction" in text and "ground_truth" in text
    labels = json.dumps(run["config"]["_wandb"])
    assert '"255": "void"' in labels and '"2": "cat"' in labels
    assert "id2 \\u00b7 no \\u00b7 p_yes 0.25" in text or "id2 · no · p_yes 0.25" in text
    (files,) = (offline / "wandb").glob(f"offline-run-*-{run['id']}/files/media")
    pictures = {p.relative_to(files).as_posix() for p in files.rglob("*.png")}
    masks = [files / p for p in pictures if p.startswith("images/mask/")]
    assert len([p for p in pictures if p.startswith("images/samples/val")]) == 2
    assert len([p for p in pictures if p.startswith("images/judge/gallery")]) == 2
    assert len(masks) >= 4
    values = [set(np.unique(np.asarray(Image.open(p))).tolist()) for p in masks]
    assert {0, 2, 255} in values  # void survives, nothing is interpolated
    assert set().union(*values) == {0, 2, 255}
    assert {Image.open(p).size for p in masks} == {(48, 56)}  # padded to one size


def test_the_round_run_holds_the_judges_table(offline, runs):
    run = runs["grp-round-000"]
    (table,) = (offline / "wandb").glob(f"offline-run-*-{run['id']}/files/media/table/judge/*.table.json")
    told = json.loads(table.read_text())
    assert told["columns"] == ["id", "split", "verdict", "p_yes", "iou"]
    assert [row[:4] for row in told["data"]] == [["id2", "pool", "no", 0.25], ["id3", "pool", "abstain", None]]


def test_the_summary_run_holds_curve_test_and_figures(offline, runs):
    run = runs["grp-summary"]
    points = [row for row in run["history"] if "labelled_share" in row]
    assert [row["labelled_share"] for row in points] == [0.1, 0.2]
    assert [row["curve/val_mean_iou"] for row in points] == [0.4, 0.5]
    assert [row["curve/test_mean_iou"] for row in points] == [0.35, 0.45]
    assert [row.get("curve/agreement_rate") for row in points] == [None, 0.75]
    for key in ("curve/val_mean_iou", "curve/test_mean_iou", "curve/agreement_rate"):
        assert run["metrics"][key] == "labelled_share"
    final = run["summary"]
    assert (final["test/mean_iou"], final["test/iou/cat"], final["aubc"]) == (0.45, 0.3, 0.4)
    assert final["simulated"] is True and final["mode"] == "vlm"
    assert "test/iou/bird" not in final
    (media,) = (offline / "wandb").glob(f"offline-run-*-{run['id']}/files/media")
    assert list(media.rglob("learning_curve*.png"))
    assert run["config"]["seed"] == 7


def test_no_secret_is_in_any_file(offline):
    files = [p for p in offline.rglob("*") if p.is_file()]
    planted = [value.encode() for value in (*SECRETS.values(), "hidden-in-config-4")]
    leaks = [(p.name, value) for p in files for value in planted if value in p.read_bytes()]
    assert len(files) > 20 and leaks == []


def test_the_id_belongs_to_the_run_folder(tmp_path):
    first = _wandb_id(tmp_path / "one", "project", "grp", "grp-round-000")
    assert first == _wandb_id(tmp_path / "one", "project", "grp", "grp-round-000")
    assert first != _wandb_id(tmp_path / "one", "project", "grp", "grp-round-001")
    assert first != _wandb_id(tmp_path / "other", "project", "grp", "grp-round-000")  # another experiment of that name


# ---------------------------------------------------------------- what goes wrong


def told_warnings(tracker: Tracker, round_dir: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, tracker:
        warnings.simplefilter("always")
        for index in range(3):
            tracker.log_round(a_record(index), round_dir)
        tracker.finish(SUMMARY, [Path("not/there.png")])
    return [str(w.message) for w in caught if w.category is RuntimeWarning]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_blocked_folder_is_one_warning(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / name).write_text("in the way")
    (told,) = told_warnings(make_tracker(name, **arguments(tmp_path)), tmp_path)
    assert told.startswith(f"{name}: round 0 was not tracked") and "goes on" in told
    assert (tmp_path / name).read_text() == "in the way"


FRESH = """
import warnings
from test_tracking import *

told = told_warnings(make_tracker("wandb", **arguments(Path("run"))), Path("none"))
print(json.dumps(told))
"""


def test_what_cannot_start_online_is_written_offline(tmp_path):
    """wandb.init itself raises, as there is no key. A fresh process, because wandb remembers its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    here = Path(__file__).parent
    environment |= {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    ran = subprocess.run(
        [sys.executable, "-c", FRESH],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    (told,) = json.loads(ran.stdout.splitlines()[-1])  # the missing figure is a second mishap, and stays silent
    assert "'online' does not work" in told and "wandb sync" in told
    names = [read_wandb_file(p)["name"] for p in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")]
    assert sorted(names) == ["grp-round-000", "grp-round-001", "grp-round-002", "grp-summary"]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_broken_gallery_costs_only_the_pictures(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    round_dir = write_gallery(tmp_path / "round_000")
    (round_dir / "gallery" / "0_prediction.png").write_bytes(b"no picture")
    with pytest.warns(RuntimeWarning, match="gallery could not be read"):
        with make_tracker(name, **arguments(tmp_path / "run")) as tracker:
            tracker.log_round(a_record(), round_dir)
    if name == "wandb":
        (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
        assert read_wandb_file(path)["history"][0]["val/mean_iou"] == 0.5
    else:
        assert [e.step for e in read_events(tmp_path / "run", "rounds").Scalars("val/mean_iou")] == [0]


def test_settings_that_are_wrong_stop_before_the_start(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="tensorboard"):
        make_tracker("tensorbord", **arguments(tmp_path))
    with pytest.raises(ConfigError, match="offline"):
        make_tracker("wandb", **arguments(tmp_path, mode="of"))
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="WANDB_MODE='oflline'.*'offline'"):
        patch.setenv("WANDB_MODE", "oflline")
        make_tracker("wandb", **arguments(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        make_tracker("wandb", **arguments(tmp_path))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm_itl\[tensorboard\]'"):
        make_tracker("tensorboard", **arguments(tmp_path))


@pytest.mark.parametrize("how", ["option", "environment"])
def test_disabled_writes_nothing(tmp_path, monkeypatch, how):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = make_tracker("wandb", **arguments(tmp_path, mode="disabled" if how == "option" else None))
    assert told_warnings(tracker, tmp_path) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_making_a_tracker_writes_nothing(tmp_path, name):
    make_tracker(name, **arguments(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_readers_own_run_stays_open(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with wandb.init(project="mine", dir=tmp_path, settings=wandb.Settings(silent=True)) as mine:
        with make_tracker("wandb", **arguments(tmp_path / "run")) as tracker:
            tracker.log_round(a_record(), tmp_path)
        assert wandb.run is mine
        mine.log({"still": 1})


# ---------------------------------------------------------------- tensorboard


def read_events(run_dir: Path, part: str):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(run_dir / "tensorboard" / part)).Reload()


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("board")
    rounds = [write_gallery(run_dir / f"round_{i:03d}") for i in range(3)]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        with make_tracker("tensorboard", **arguments(run_dir)) as tracker:
            tracker.log_round(a_record(0), rounds[0])
            tracker.log_round(a_record(1), rounds[1])
        with make_tracker("tensorboard", **arguments(run_dir)) as tracker:  # resumed: round 1 again
            tracker.log_round(a_record(1), rounds[1])
            tracker.log_round(a_record(2), rounds[2])
            tracker.finish(SUMMARY, [rounds[0] / "gallery" / "0_image.jpg"])
            tracker.finish(SUMMARY, [rounds[0] / "gallery" / "0_image.jpg"])
    return run_dir


def test_tensorboard_has_each_round_once(board):
    events = read_events(board, "rounds")
    assert [e.step for e in events.Scalars("val/mean_iou")] == [0, 1, 2]
    assert [e.step for e in events.Scalars("judge/agreement_rate")] == [0, 1, 2]
    assert set(flatten_record(a_record())) <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"samples/val/id0", "samples/val/id1", "judge/0", "judge/1"}
    assert {"config/text_summary", "judge/table/text_summary"} <= set(events.Tags()["tensors"])
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"strategy": "entropy"' in text and "planted" not in text and "hidden" not in text


def test_tensorboard_summary(board):
    events = read_events(board, "summary")
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("curve/test_mean_iou")] == [(10, 0.35), (20, 0.45)]
    assert [round(e.value, 6) for e in events.Scalars("test/iou/cat")] == [0.3]
    assert "figures/0_image" in events.Tags()["images"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_no_secret_in_tensorboard(board):
    told = b"".join(p.read_bytes() for p in (board / "tensorboard").rglob("*") if p.is_file())
    assert told and not any(v.encode() in told for v in (*SECRETS.values(), "hidden-in-config-4"))


# ---------------------------------------------------------------- the small parts


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "OPENAI_API_KEY", "hf_token", "hftoken", "Tokens", "db_password", "client_secret", "auth"],
)
def test_secret_names_are_dropped(name):
    assert public_config({name: "x", "seed": 1}) == {"seed": 1}
    assert public_config({"deep": [{name: "x"}]}) == {"deep": [{}]}


@pytest.mark.parametrize("name", ["monkey", "turkey", "author", "keyframes", "tokenizer", "strategy"])
def test_innocent_names_stay(name):
    assert public_config({name: "x"}) == {name: "x"}


def test_numbers_stay_whatever_their_name():
    assert public_config({"max_tokens": 5, "token": None, "use_key": True}) == {
        "max_tokens": 5,
        "token": None,
        "use_key": True,
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("http://host/x?api_key=abc&y=1", "http://host/x?api_key=***&y=1"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ("sk-proj-abcdefghijklmnop", "***"),
        ("Answer with one token: yes or no", "Answer with one token: yes or no"),
        ("nvidia/segformer-b0-finetuned-ade-512-512", "nvidia/segformer-b0-finetuned-ade-512-512"),
    ],
)
def test_secrets_inside_texts_are_blanked(text, shown):
    assert public_config({"note": text}) == {"note": shown}


def test_odd_values_do_not_stop_a_config():
    shown = public_config({"path": Path("a/b"), "array": np.arange(2), "odd": {1, 2}, "nan": float("nan")})
    assert shown["path"] == "a/b" and shown["array"] == [0, 1] and shown["nan"] is None
    json.dumps(shown)


def test_flatten_takes_lists_and_missing_parts():
    flat = flatten_record({"index": 2, "metrics": {"val": {"per_class_iou": [0.5, None, 0.25]}}, "judge": None}, NAMES)
    assert flat == {"round": 2, "val/iou/background": 0.5, "val/iou/cat": 0.25}


def test_gallery_is_limited_reduced_and_keeps_classes(tmp_path):
    round_dir = write_gallery(tmp_path / "r", sizes=[(300, 200), (20, 30)])
    (first,) = read_gallery(round_dir, limit=1, side=100)
    assert first.image.shape == (67, 100, 3) and first.prediction.shape == first.truth.shape == (67, 100)
    assert set(np.unique(first.prediction)) == {0, 2} and set(np.unique(first.truth)) <= {0, 2, 255}
    shown = panel(first)
    assert shown.shape == (67, 3 * 100 + 2 * 4, 3)
    assert tuple(shown[20, 250]) == (0, 128, 0)  # the palette's colour of class 2


def test_masks_follow_the_size_of_a_reduced_photo(tmp_path):
    round_dir = write_gallery(tmp_path / "r", sizes=[(48, 32)])
    photo = round_dir / "gallery" / "0_image.jpg"
    Image.open(photo).resize((24, 16)).save(photo)
    first = read_gallery(round_dir)[0]
    assert first.image.shape[:2] == first.prediction.shape == first.truth.shape == (16, 24)


def test_the_environment_is_left_alone():
    assert not [name for name in os.environ if name.startswith("WANDB_SILENT")]
