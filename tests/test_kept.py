"""What one keeps of a run: model folders that answer elsewhere as measured, predictions, cards, publishing."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, MobileNetV2Config, MobileNetV2Model

from vlm_itl.cli.run import main
from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import MaskStore, read_indices
from vlm_itl.data.sources import SegData, load_data, toy_images
from vlm_itl.data.transforms import predicted_classes
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.export import export_run
from vlm_itl.experiment.loop import run_al, run_baseline
from vlm_itl.formats import read_masks
from vlm_itl.model.metrics import ConfusionMatrix
from vlm_itl.model.predict import Inference, evaluate, measured_view, predict_batches, predict_folder
from vlm_itl.model.segmenter import SAVED_AS, Segmenter, load_model, load_weights, own_labels, save_model, saved_note
from vlm_itl.reports.cards import dataset_card, human_time, model_card, write_model_card
from vlm_itl.reports.publish import dataset_parcel, publish_dataset
from vlm_itl.reports.report import read_run
from vlm_itl.reports.run_figures import plot_learning_curve

ROOT = Path(__file__).resolve().parent.parent
PAIR = LabelSpace(("background", "crack", "hole"), palette=[(0, 0, 0), (9, 9, 9), (90, 0, 0)])
BATCH = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def measured_elsewhere(folder: Path, data: SegData, code: bool) -> float:
    """The test mIoU through transformers alone."""
    how: dict[str, Any] = {"trust_remote_code": code} if code else {}
    processor = AutoImageProcessor.from_pretrained(folder, **how)
    net = AutoModelForSemanticSegmentation.from_pretrained(folder, **how).eval()
    matrix = ConfusionMatrix(len(data.labels))
    for row in data.test:
        with torch.inference_mode():
            out = net(**processor(row["image"], return_tensors="pt"))
        mask = processor.post_process_semantic_segmentation(out, target_sizes=[row["image"].size[::-1]])[0]
        matrix.update(mask, torch.as_tensor(row["mask"]))
    return float(matrix.compute(data.labels.names)["mean_iou"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileNetV2 of random weights, as somebody would have it on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nano_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the default network on the six toy images."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    settings = {"dataset": "toy", "steps": 4, "batch_size": 2, "image_size": 32, "val_share": 0.25, "gallery": 0}
    list(run_baseline(make_config(**settings, mixture={}, output_dir=str(folder))))
    return folder


def kept_folder(run: Path) -> Path:
    """The folder of the run's last model."""
    return next(run.glob("round_*/model"))


# --- model folders ----------------------------------------------------------------------------------------------------


def test_the_default_network_is_a_model_by_its_folder(nano_run: Path):
    folder = kept_folder(nano_run)
    again = load_model(str(folder), own_labels(str(folder)))
    assert again.labels.names == toy_images().labels.names and again.pretrained
    assert np.array_equal(again.labels.palette, toy_images().labels.palette)
    fresh = load_weights(load_model("cnn-nano", again.labels, seed=7), folder)
    with torch.inference_mode():
        assert torch.equal(again(BATCH), fresh(BATCH))
    assert saved_note(folder)["image_size"] == 32 and saved_note(folder)["model"] == "cnn-nano"


def test_a_run_goes_on_from_the_default_network_of_another(nano_run: Path, tmp_path: Path):
    settings = {"dataset": "toy", "steps": 2, "batch_size": 2, "image_size": 32, "val_share": 0.25, "gallery": 0}
    model = str(kept_folder(nano_run))
    list(run_baseline(make_config(**settings, model=model, mixture={}, output_dir=str(tmp_path / "next"))))
    again = load_model(str(kept_folder(tmp_path / "next")))
    assert saved_note(kept_folder(tmp_path / "next"))["model"] == "cnn-nano" and len(again.labels) == 3


def test_folders_of_earlier_versions_load_inside_their_run_and_say_why_not_outside(nano_run: Path, tmp_path: Path):
    folder = kept_folder(nano_run)
    old = tmp_path / "run" / "round_000" / "model"
    old.mkdir(parents=True)
    (old / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for name in ("config.json", "data.json"):
        (tmp_path / "run" / name).write_bytes((nano_run / name).read_bytes())
    with torch.inference_mode():
        assert torch.equal(load_model(str(old))(BATCH), load_model(str(folder))(BATCH))
    (tmp_path / "run" / "data.json").unlink()
    with pytest.raises(ConfigError, match="no config.json") as caught:
        load_model(str(old), PAIR)
    assert "\n" not in str(caught.value)


def test_other_classes_take_the_rows_of_their_names(tmp_path: Path):
    model = load_model("cnn-nano", PAIR, seed=1)
    folder = save_model(model, tmp_path)
    turned = load_model(str(folder), LabelSpace(("hole", "patch", "background")))
    weights, theirs = turned.net.head.weight, model.net.head.weight
    assert torch.equal(weights[[0, 2]], theirs[[2, 0]]) and not torch.equal(weights[1], theirs[1])
    assert any("new are: patch" in note for note in turned.notes)


def test_broken_folders_of_own_networks_are_named(tmp_path: Path):
    folder = save_model(load_model("cnn-nano", PAIR), tmp_path)
    note = json.loads((folder / SAVED_AS).read_text())
    weights = (folder / "model.safetensors").read_bytes()
    for content, said, message in (
        ({**note, "model": "gone"}, weights, "no kind of model here"),
        ({**note, "classes": ["a", "b"]}, weights, "is not that of 'cnn-nano'"),
        ({**note, "classes": "background"}, weights, "classes"),
        (note, b"nothing", "is not that of 'cnn-nano'"),
    ):
        (folder / SAVED_AS).write_text(json.dumps(content))
        (folder / "model.safetensors").write_bytes(said)
        with pytest.raises(ConfigError, match=message) as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value)


def test_what_has_no_classes_says_so(weights: Path):
    with pytest.raises(ConfigError, match="is new and has no classes"):
        load_model("cnn-nano")
    with pytest.raises(ConfigError, match="is no segmenter but MobileNetV2ForImageClassification"):
        load_model(str(weights / "mobilenet-v2-imagenet"))
    assert own_labels(str(weights / "deeplabv3-mobilenetv2-voc")).names == LabelSpace.voc().names


def models(data: SegData, encoder: Path) -> dict[str, Segmenter]:
    """One of each kind, its logits far enough from each other that masks have every class."""
    names = {"nano": "cnn-nano", "segformer": "segformer-nano", "probe": f"probe:{encoder}"}
    made = {kind: load_model(name, data.labels, seed=3) for kind, name in names.items()}
    for model in made.values():
        last = [m for m in model.net.modules() if isinstance(m, torch.nn.Conv2d) and m.out_channels == len(data.labels)]
        torch.nn.init.normal_(last[-1].weight, std=3.0)
    return made


@pytest.mark.parametrize("resize", ["keep", "stretch"])
@pytest.mark.parametrize("kind", ["nano", "segformer", "probe"])
def test_others_get_the_measured_quality(kind: str, resize: str, scenes_small: SegData, encoder: Path, tmp_path: Path):
    """transformers alone, on generated scenes: test mIoU within 1e-3 of ours, padded or not."""
    model = models(scenes_small, encoder)[kind]
    ours = evaluate(model, scenes_small.test, Inference(64, resize))["mean_iou"]
    folder = save_model(model, tmp_path / "m", 64, resize)
    assert abs(measured_elsewhere(folder, scenes_small, kind != "segformer" or resize == "keep") - ours) < 1e-3


def test_others_get_the_measured_quality_on_photographs(voc: Path, weights: Path, tmp_path: Path):
    """A published checkpoint on VOC: within 1e-3; what is lost without the padding is why there is a processor."""
    data = load_data(str(voc), leaks="off", options={"max_test": 10, "max_train": 8})
    model = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), data.labels)
    for resize in ("keep", "stretch"):
        ours = evaluate(model, data.test, Inference(128, resize))["mean_iou"]
        folder = save_model(model, tmp_path / resize, 128, resize)
        assert abs(measured_elsewhere(folder, data, resize == "keep") - ours) < 1e-3


ALONE = """
import sys
sys.modules["vlm_itl"] = None  # as where it is not installed
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
image = Image.open("p.png")
for folder in sys.argv[1:]:
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    net = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        out = net(**processor(image, return_tensors="pt"))
    found = processor.post_process_semantic_segmentation(out, target_sizes=[image.size[::-1]])[0]
    Image.fromarray(found.byte().numpy()).save(folder + ".png")
"""


def our_mask(model: Segmenter, picture: Image.Image, view: Inference) -> np.ndarray:
    """What `evaluate` counts."""
    rows = datasets.Dataset.from_list([{"id": "p", "image": picture}])
    batch, logits, _ = next(predict_batches(model, rows, view))
    return predicted_classes(logits[0], batch["box"][0], view.image_size, batch["native"][0]).numpy()


def test_own_networks_work_where_vlm_itl_is_not(encoder: Path, tmp_path: Path):
    """In another process and another folder, with nothing of ours to import."""
    picture = Image.radial_gradient("L").resize((70, 50)).convert("RGB")
    picture.save(tmp_path / "p.png")
    kept = {"nano": "cnn-nano", "probe": f"probe:{encoder}"}
    for folder, name in kept.items():
        save_model(load_model(name, PAIR, seed=2), tmp_path / folder, 64, "keep")
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", ALONE, *kept], check=True, cwd=tmp_path, env=env, capture_output=True)
    for folder in kept:
        ours = our_mask(load_model(str(tmp_path / folder)), picture, Inference(64))
        assert (np.array(Image.open(tmp_path / f"{folder}.png")) == ours).mean() > 0.999


def test_nothing_loads_by_halves_without_its_code(encoder: Path, tmp_path: Path):
    """A probe's folder is no MobileNetV2 with a new head for whoever does not trust its code: it is refused."""
    folder = save_model(load_model(f"probe:{encoder}", PAIR), tmp_path, 64)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=False)


# --- predictions ------------------------------------------------------------------------------------------------------


def photographs(data: SegData, folder: Path) -> Path:
    """The test images as files, some in a folder below."""
    (folder / "more").mkdir(parents=True)
    for place, row in enumerate(data.test):
        row["image"].save(folder / ("more" if place % 3 == 0 else ".") / f"{row['id']}.png")
    return folder


def written(out: Path) -> dict[str, bytes]:
    """What predict_folder leaves; of the journal, its lines."""
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    lines = {line: b"" for line in files.pop(".predicted.jsonl").decode().splitlines()}
    return {**files, **lines}


@pytest.mark.parametrize("kind", ["nano", "segformer", "probe"])
def test_a_folder_is_predicted_as_evaluate_counts(kind: str, scenes_small: SegData, encoder: Path, tmp_path: Path):
    """Masks on disk give the mIoU of `evaluate`; files, folders below, palette and scores are as promised."""
    model, view = models(scenes_small, encoder)[kind], Inference(64, "keep", 3)
    folder = save_model(model, tmp_path / "m", 64, "keep")
    table = predict_folder(folder, photographs(scenes_small, tmp_path / "p"), tmp_path / "out")
    matrix, where = ConfusionMatrix(len(scenes_small.labels)), dict(zip(table["file"], table["id"], strict=True))
    for row in scenes_small.test:
        path = tmp_path / "out" / "masks" / f"{where[row['id'] + '.png']}.png"
        matrix.update(torch.from_numpy(read_indices(path)), torch.as_tensor(row["mask"]))
        assert Image.open(path).size == row["image"].size
        assert Image.open(path).getpalette()[:12] == np.asarray(scenes_small.labels.palette)[:4].ravel().tolist()
    ours = evaluate(model, scenes_small.test, view)["mean_iou"]
    assert matrix.compute(scenes_small.labels.names)["mean_iou"] == pytest.approx(ours, abs=1e-3)
    kept = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert list(kept["id"]) == list(table["id"]) and kept["confidence"].between(0, 1).all()
    shares = kept[[f"share of {name}" for name in scenes_small.labels.names]].sum(axis=1)
    assert np.allclose(shares, 1) and len(list((tmp_path / "out" / "overlays").glob("*.jpg"))) == len(table)


def test_a_prediction_that_was_killed_goes_on_and_ends_the_same(scenes_small: SegData, tmp_path: Path, monkeypatch):
    """Between any two writes: a mask, an overlay, half a line of the journal; a file that changed is done anew."""
    model, view = load_model("cnn-nano", scenes_small.labels), Inference(64, "keep", 3)
    folder = photographs(scenes_small, tmp_path / "p")
    predict_folder(model, folder, tmp_path / "whole", view)
    out, write = tmp_path / "out", MaskStore.write
    for last in range(0, 8, 2):
        calls = iter(range(100))

        def dying(store: Any, image_id: str, mask: Any, last: int = last, calls: Any = calls) -> None:
            if next(calls) == last:
                raise KeyboardInterrupt
            write(store, image_id, mask)

        monkeypatch.setattr(MaskStore, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            predict_folder(model, folder, out, view)
        if (out / ".predicted.jsonl").is_file():
            with (out / ".predicted.jsonl").open("a") as journal:
                journal.write('{"id": "half')
        if last > 3:
            break
    monkeypatch.setattr(MaskStore, "write", write)
    predict_folder(model, folder, out, view)
    assert written(out) == written(tmp_path / "whole")
    changed = next(folder.glob("*.png"))
    Image.new("RGB", (40, 30)).save(changed)
    table = predict_folder(model, folder, out, view)
    assert table.set_index("file").loc[changed.name, "width"] == 40


def test_bad_folders_and_models_are_one_line(scenes_small: SegData, nano_run: Path, weights: Path, tmp_path: Path):
    folder = photographs(scenes_small, tmp_path / "p")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("notes")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"mode": "al"}')
    done = predict_folder(nano_run, folder, tmp_path / "done", overlays=False)
    assert len(done) == len(scenes_small.test) and not (tmp_path / "done" / "overlays").exists()
    voc21 = weights / "deeplabv3-mobilenetv2-voc"
    for model, given, out, message in (
        (nano_run, tmp_path / "empty", "a", "no photographs"),
        (nano_run, tmp_path / "gone", "a", "no such folder"),
        (nano_run, folder, "p/masks", "would be taken for photographs"),
        (nano_run, folder, "other", "holds no predictions"),
        (voc21, folder, "done", "of another model"),
        (tmp_path / "bare", folder, "a", "a run that holds no model"),
        (tmp_path / "empty", folder, "a", "no config.json"),
        (weights / "mobilenet-v2-imagenet", folder, "a", "no segmenter"),
        ("segformer-nano", folder, "a", "is new"),
    ):
        with pytest.raises((ConfigError, DataError, RunError), match=message) as caught:
            predict_folder(model, given, tmp_path / out)
        assert "\n" not in str(caught.value)
    assert measured_view(str(voc21)) == Inference(513, "stretch")


@pytest.mark.parametrize("word", ["coco", "cvat", "cvat-masks", "labelstudio", "voc", "huggingface"])
def test_predictions_in_the_form_of_a_tool(
    nano_run: Path, scenes_small: SegData, tmp_path: Path, capsys: Any, word: str
):
    """The same masks with their photographs, marked as nobody's work; written anew where photographs came along."""
    folder, out = photographs(scenes_small, tmp_path / "p"), tmp_path / "out"
    command = ["predict", str(nano_run), str(folder), "--out", str(out), "--format", word, "--no-overlays"]
    assert main(command) == 0 and f"as {word} in" in capsys.readouterr().out
    shutil.copy(next(folder.glob("*.*")), folder / "one_more.png")
    assert main(command) == 0
    labels = load_model(str(kept_folder(nano_run))).labels
    back, store = read_masks(out / word, labels=labels), MaskStore(out / "masks", labels)
    assert len(back) == len(list(folder.rglob("*.*"))) == len(scenes_small.test) + 1
    for row in back:
        assert np.array_equal(row.mask, store[row.id]) and row.by == "model" and row.photograph is not None
    if word == "labelstudio":
        tasks = json.loads((out / word / "tasks.json").read_text())
        assert all(task["predictions"] and not task["annotations"] for task in tasks)


def test_the_command_predicts(nano_run: Path, scenes_small: SegData, tmp_path: Path, capsys: Any):
    folder, out = photographs(scenes_small, tmp_path / "p"), tmp_path / "out"
    assert main(["predict", str(nano_run), str(folder), "--out", str(out), "--batch-size", "2"]) == 0
    assert f"{len(scenes_small.test)} masks" in capsys.readouterr().out
    (folder / "broken.jpg").write_bytes(b"nothing")
    assert main(["predict", str(nano_run), str(folder), "--out", str(out), "--batch-size", "2"]) == 1
    assert "not read" in capsys.readouterr().err
    assert main(["predict", str(nano_run), str(folder), "--out", str(out), "--image-size", "40"]) == 2
    assert main(["predict", str(nano_run), str(folder), "--out", str(out), "--resize", "keep"]) == 2
    assert main(["predict", str(nano_run), str(folder), "--ou"]) == 2
    assert main(["predict", str(nano_run), str(folder), "--out", str(out), "--format", "cocoa"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 4 and "'coco'" in told and "Traceback" not in told
    (folder / "broken.jpg").unlink()
    shutil.copytree(kept_folder(nano_run), other := tmp_path / "stretched")
    note = json.loads((other / "vlm_itl.json").read_text())
    (other / "vlm_itl.json").write_text(json.dumps({**note, "resize": "stretch"}))
    words = [str(folder), "--image-size", "40", "--no-overlays", "--out"]
    assert main(["predict", str(other), *words, str(tmp_path / "larger")]) == 0
    assert "at 40 px (stretch)" in capsys.readouterr().out  # another size alone does not change how it is brought to it


def test_real_photographs_are_predicted(voc: Path, weights: Path, tmp_path: Path):
    """A published checkpoint of another library on VOC photographs: what `evaluate` counts, at the size it names."""
    data = load_data(str(voc), leaks="off", options={"max_test": 6, "max_train": 8})
    for row in data.test:
        (tmp_path / "p").mkdir(exist_ok=True)
        row["image"].save(tmp_path / "p" / f"{row['id']}.png")
    name, view = str(weights / "deeplabv3-mobilenetv2-voc"), Inference(160, "stretch", 4)
    table = predict_folder(name, tmp_path / "p", tmp_path / "out", view)
    matrix = ConfusionMatrix(21)
    for row in data.test:
        mask = read_indices(tmp_path / "out" / "masks" / f"{row['id']}.png")
        matrix.update(torch.from_numpy(mask), torch.as_tensor(row["mask"]))
    ours = evaluate(load_model(name, data.labels), data.test, view)
    assert matrix.compute(data.labels.names)["mean_iou"] == pytest.approx(ours["mean_iou"], abs=1e-3)
    assert table["classes"].str.contains("background").all()


# --- cards and the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with a simulated judge that ends with a labelled data set."""
    folder = tmp_path_factory.mktemp("runs") / "judged"
    settings = {"mode": "vlm", "dataset": "scenes", "data_options": {"n_train": 24, "n_test": 8}, "goal": "dataset"}
    settings |= {"steps": 4, "batch_size": 2, "image_size": 32, "val_share": 6, "gallery": 0, "preflight": 0}
    settings |= {"initial": 8, "increment": 4, "max_labelled": 8, "judge_options": {"accuracy": 0.9}}
    list(run_al(make_config(**settings, output_dir=str(folder))))
    return folder


def test_a_model_card_says_what_the_run_says(judged_run: Path):
    run, folder = read_run(judged_run), kept_folder(judged_run)
    card = ModelCard.load(write_model_card(run, folder, license="mit"))
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["mean_iou"] == pytest.approx(run.summary["test"]["mean_iou"], abs=1e-5)
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-segmentation"
    budget = run.rounds[-1]["budget"]
    assert f"| masks of people, to learn from | {budget['train_images']} |" in card.text
    assert "**assumed**: 239.7 seconds a mask" in card.text and "**simulated**" in card.text
    assert "For learning and testing".casefold() in card.text.casefold() and "## Use" in card.text
    assert str(judged_run.parent) not in card.content  # no path of this machine
    assert write_model_card(run, folder, license="mit").read_text() == card.content
    load_model(str(folder))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that is none of the simulated ones, proposals that are, and people who correct what it rejects."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    settings = {"mode": "vlm", "dataset": "scenes", "data_options": {"n_train": 24, "n_test": 8}, "policy": "fix"}
    settings |= {"steps": 0, "image_size": 32, "val_share": 4, "gallery": 0, "preflight": 0, "judge": "learned"}
    settings |= {"proposer": "simulated", "accept_by": "image", "initial": 10, "increment": 4, "max_labelled": 14}
    list(run_al(make_config(**settings, output_dir=str(folder))))
    return folder


def test_who_was_simulated_is_said_of_whom_it_is_true(plain_run: Path, judged_run: Path):
    """A free judge of simulated masks was called a judge that reads the truth, in cards, labels and figures."""
    run = read_run(plain_run)
    assert run.simulated and not run.simulated_judge and run.label == "entropy, learned judge (simulated masks, fix)"
    assert (
        plot_learning_curve([run], ["test"]).axes[0].get_title(loc="left")
        == "simulated: the masks are made of the truth"
    )
    for card in (model_card(run), dataset_card(run)):
        assert "The judge `learned` was a real one, which was shown **simulated** masks" in card
        assert "The judge was simulated" not in card and "The proposals were simulated" in card
    assert read_run(judged_run).simulated_judge and "The judge was simulated" in model_card(judged_run)
    assert not json.loads((plain_run / "data.json").read_text())["simulated_judge"]


def test_a_dataset_card_counts_who_made_the_masks(judged_run: Path):
    card, labels = DatasetCard(dataset_card(judged_run)), json.loads((judged_run / "labels/labels.json").read_text())
    assert sum(labels["by"].values()) == labels["images"] and labels["promise"] in card.text
    assert card.data.size_categories == "n<1K" and "machine-generated" in card.data.annotations_creators
    assert f"{labels['measured']['quality']:.3f}" in card.text and "rights in the photographs" in card.text


@pytest.mark.parametrize("word", ["coco", "huggingface", "voc"])
def test_a_published_export_is_not_called_peoples_work(plain_run: Path, tmp_path: Path, word: str):
    """A run that has labelled no pool exports what its judge accepted, too: card and folder count the same."""
    exported, masks = export_run(plain_run, word, tmp_path / "made")
    by = Counter(row.by for row in masks)
    assert by["judge"] and by["corrected"] and by["human"]
    sent = dataset_parcel(plain_run, exported, "me/labels").files["README.md"]
    for page in (bytes(sent).decode(), dataset_card(plain_run)):
        card = DatasetCard(page)
        assert f"| a proposal, accepted by the judge alone | {by['judge']} |" in card.text
        assert f"| a proposal, corrected by a person | {by['corrected']} |" in card.text
        assert f"| drawn by a person | {by['human']} |" in card.text and "Only the masks of people" not in card.text
        assert f"{sum(by.values())} masks" in card.text and "machine-generated" in card.data.annotations_creators
        assert f", {by['corrected']} of them corrected" in card.text


@pytest.mark.parametrize("accept_by", ["image", "class"])
def test_a_card_says_what_was_judged(plain_run: Path, tmp_path: Path, accept_by: str):
    """Answers about classes are more than masks, and were called masks."""
    shutil.copytree(plain_run, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text()) | {"accept_by": accept_by}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    card = model_card(tmp_path / "run")
    assert ("classes of masks judged against a truth" in card) == (accept_by == "class")
    assert ("a class of a mask counting as good" in card) == (accept_by == "class")


def test_a_whole_pool_keeps_its_shares(judged_run: Path, plain_run: Path):
    """All of its images are labelled: that they were not chosen by chance is said of those that were chosen."""
    told = "Images were not chosen by chance"
    assert told not in dataset_card(judged_run) and told in dataset_card(plain_run)


def test_cards_of_runs_without_a_round_or_a_test_are_honest(nano_run: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"mode": "al"}')
    for card in (model_card, dataset_card):
        with pytest.raises(RunError, match="no whole round"):
            card(tmp_path)
    (tmp_path / "round_000").mkdir()
    (tmp_path / "round_000" / "record.json").write_text('{"index": 0}')
    assert "was not measured" in model_card(tmp_path) and ModelCard(model_card(tmp_path)).data.eval_results is None
    assert "**measured**" in human_time({"images": 3, "timed_masks": 3, "human_seconds": 60.0})
    looks = {"images": 3, "timed_masks": 3, "checks": 4, "human_seconds": 96.0}  # the looks at 9 seconds, untimed
    assert "assumed for the others" in human_time(looks)
    assert "**measured** in the tool" in human_time({**looks, "timed_checks": 4})


def entries(repo: dict[str, Any]) -> list[dict[str, Any]]:
    """Files and folders of a repository, as the Hub lists them."""
    folders = {str(above) for path in repo["files"] for above in Path(path).parents if str(above) != "."}
    files = [
        {"type": "file", "path": path, "size": len(content), "oid": "1"} for path, content in repo["files"].items()
    ]
    return files + [{"type": "directory", "path": path, "oid": "1"} for path in sorted(folders)]


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub as a push asks for; everything is kept in `server.repos`."""

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def repos(self) -> dict[str, Any]:
        return self.server.repos  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self.headers.get("Authorization") != "Bearer hf_fake":
            return self.reply({"error": "Invalid credentials"}, 401)
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.repos[name] = {"private": private, "files": {}}
            return self.reply({"url": f"http://{self.headers['Host']}/{name.removeprefix('models/')}"})
        if parts[1] == "validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if parts[-2:] == ["objects", "batch"]:
            href = f"http://{self.headers['Host']}/large/"
            objects = [{**o, "actions": {"upload": {"href": href + o["oid"]}}} for o in json.loads(body)["objects"]]
            return self.reply({"transfer": "basic", "objects": objects})
        repo = self.repos["/".join(parts[1:4])]
        if parts[4] == "preupload":
            modes = {
                f["path"]: "lfs" if f["path"].endswith(".parquet") else "regular" for f in json.loads(body)["files"]
            }
            return self.reply(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if parts[4] == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", []) if b"=" in body else json.loads(body)["paths"]
            return self.reply([entry for entry in entries(repo) if entry["path"] in wanted])
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                repo["files"][line["value"]["path"]] = self.server.large[line["value"]["oid"]]  # type: ignore[attr-defined]
        address = f"http://{self.headers['Host']}/{'/'.join(parts[1:4]).removeprefix('models/')}/commit/{'1' * 40}"
        self.reply({"commitUrl": address, "commitOid": "1" * 40, "hookOutput": ""})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.large[self.path.rpartition("/")[2]] = content  # type: ignore[attr-defined]
        self.reply({})

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        kind = parts[1] if parts[0] == "api" else parts[0] if parts[0] == "datasets" else "models"
        name = "/".join([kind, *parts[2:4]]) if parts[0] == "api" else "/".join(parts[:3])
        if name not in self.repos:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        repo = self.repos[name]
        if "resolve" in parts:
            content = repo["files"].get("/".join(parts[parts.index("resolve") + 2 :]))
            if content is None:
                return self.reply({"error": "no entry"}, 404, X_Error_Code="EntryNotFound")
            return self.reply(content, ETag='"1"', X_Repo_Commit="1" * 40)
        if "tree" in parts:
            below = "/".join(parts[parts.index("tree") + 2 :])
            found = [e for e in entries(repo) if e["path"].rpartition("/")[0] == below or "recursive=true" in self.path]
            if below and not found:
                return self.reply({"error": "no entry"}, 404, X_Error_Code="EntryNotFound")
            return self.reply(found)
        siblings = [{"rfilename": path} for path in repo["files"]]
        self.reply({"id": "/".join(parts[2:4]), "private": repo["private"], "sha": "1" * 40, "siblings": siblings})

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    """A Hub on the loopback."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.repos, server.asked, server.large = {}, [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def publish(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., tuple[int, str, str]]:
    """The command, for which the Hub is ours."""
    address = f"http://127.0.0.1:{hub.server_port}"
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)

    def call(*words: str, token: str = "hf_fake") -> tuple[int, str, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        code = main(["publish", *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def test_a_model_goes_to_the_hub_and_comes_back(hub: Any, publish: Any, judged_run: Path, tmp_path: Path):
    """Private, in one commit, with its card; what is there is a model folder that loads."""
    (kept_folder(judged_run) / "secrets.txt").write_text("not for others")
    code, out, err = publish(str(judged_run), "--to", "me/roads", "--license", "mit")
    assert code == 0, err
    repo = hub.repos["models/me/roads"]
    assert repo["private"] and "secrets.txt" not in repo["files"] and "hf_fake" not in out + err
    for name, content in repo["files"].items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    again, before = load_model(str(tmp_path / "back")), load_model(str(kept_folder(judged_run)))
    with torch.inference_mode():
        assert torch.equal(again(BATCH), before(BATCH))
    card = ModelCard(repo["files"]["README.md"].decode())
    assert card.data.license == "mit" and 'folder, picture = "me/roads"' in card.text


def test_a_data_set_goes_to_the_hub_with_both_pages_in_one(hub: Any, publish: Any, judged_run: Path, tmp_path: Path):
    """What `datasets` saved, by its own push: our words and its front matter; another folder as it is."""
    rows = datasets.Dataset.from_dict({"id": ["a", "b"], "share": [0.5, 0.25]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    code, out, err = publish(str(judged_run), "--to", "me/labels", "--data", str(tmp_path / "saved"))
    assert code == 0, err
    files = hub.repos["datasets/me/labels"]["files"]
    card = DatasetCard(files["README.md"].decode())
    assert (
        "## Who made the masks" in card.text
        and card.data.to_dict()["configs"]
        and hub.repos["datasets/me/labels"]["private"]
    )
    (parquet,) = [content for name, content in files.items() if name.endswith(".parquet")]
    assert pd.read_parquet(io.BytesIO(parquet))["id"].tolist() == ["a", "b"]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "annotations.json").write_text("{}")
    code, out, err = publish(str(judged_run), "--to", "me/coco", "--data", str(tmp_path / "coco"), "--public")
    assert code == 0, err
    assert not hub.repos["datasets/me/coco"]["private"] and set(hub.repos["datasets/me/coco"]["files"]) == {
        "README.md",
        "annotations.json",
    }


@pytest.mark.parametrize("word", ["huggingface", "coco"])
def test_what_a_run_exports_goes_to_the_hub(hub: Any, publish: Any, judged_run: Path, tmp_path: Path, word: str):
    """An export as it is, pictures, masks, class names and who made them, under the card of the run; and back."""
    exported, masks = export_run(judged_run, word, tmp_path / "made")
    code, out, err = publish(str(judged_run), "--to", f"me/made-{word}", "--data", str(exported))
    assert code == 0, err
    files = hub.repos[f"datasets/me/made-{word}"]["files"]
    assert "## Who made the masks" in files["README.md"].decode() and hub.repos[f"datasets/me/made-{word}"]["private"]
    for name, content in files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    if word == "coco":
        found = {row.id: (row.mask, row.by) for row in read_masks(tmp_path / "back")}
    else:
        (parquet,) = [path for path in (tmp_path / "back").rglob("*.parquet")]
        assert json.loads(files["id2label.json"])["0"] == masks.labels.names[0] and "labelmap.txt" in files
        rows = datasets.Dataset.from_parquet(str(parquet), cache_dir=str(tmp_path / "cache"))
        found = {row["id"]: (np.array(row["mask"]), row["by"]) for row in rows}
    assert {row.id for row in masks} == {*found}
    for row in masks:
        assert np.array_equal(found[row.id][0], row.mask) and found[row.id][1] == row.by


def test_a_data_set_that_is_not_there_is_not_sent(judged_run: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "gone", "is no folder"), (tmp_path / "empty", "is empty")):
        with pytest.raises(DataError, match=message):
            publish_dataset(judged_run, folder, "me/labels")


def test_what_must_not_be_sent_is_not(hub: Any, publish: Any, judged_run: Path, tmp_path: Path):
    """A dry run asks nothing; a bad token, none, a public repository, no network: one line each."""
    asked = len(hub.asked)
    code, out, err = publish(str(judged_run), "--to", "me/dry", "--dry-run", token="")
    assert code == 0 and len(hub.asked) == asked and "model.safetensors" in out
    hub.repos["models/me/open"] = {"private": False, "files": {}}
    for words, token, message in (
        (("--to", "me/none"), "", "set HF_TOKEN"),
        (("--to", "me/other"), "hf_wrong", "token is not valid"),
        (("--to", "me/open"), "hf_fake", "exists and is public"),
        (("--to", "open"), "hf_fake", "user/name"),
    ):
        code, out, err = publish(str(judged_run), *words, token=token)
        assert code == 2 and message in err and err.count("\n") == 1, err
        assert "hf_wrong" not in err and not hub.repos["models/me/open"]["files"]
