"""Real photographs and real weights: the numbers they came with are reached through the library's own doors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_itl.data.labels import VOID
from vlm_itl.data.masks import read_mask, row_ids
from vlm_itl.data.sources import load_data
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_al
from vlm_itl.model.metrics import mean_iou_of
from vlm_itl.model.predict import Inference, evaluate
from vlm_itl.model.segmenter import load_model

SEVEN = ("background", "cat", "cow", "dog", "horse", "person", "sheep")
VIEW = Inference(image_size=513, resize="stretch", batch_size=4)  # what the checkpoint was trained on


def test_deeplab_sees_what_is_there(voc, weights):
    data = load_data(str(voc))
    model = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), data.labels)
    found = evaluate(model, data.test.select(range(12)), VIEW)
    assert found["pixel_accuracy"] > 0.85 and found["mean_iou_in_truth"] > 0.5


@pytest.mark.slow
def test_deeplab_reaches_its_published_figures(voc, weights):
    data = load_data(str(voc))
    assert len(data.test) == 445
    model = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), data.labels)
    found = evaluate(model, data.test, VIEW)
    assert found["classes_in_truth"] == 18
    assert found["mean_iou_in_truth"] == pytest.approx(0.564, abs=0.02)
    assert mean_iou_of(found["per_class_iou"], SEVEN) == pytest.approx(0.796, abs=0.02)
    assert found["pixel_accuracy"] == pytest.approx(0.931, abs=0.02)


def numbers(value):
    """All numbers inside a record."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def test_a_judged_run_on_real_photographs(voc, weights, tmp_path):
    config = make_config(
        mode="vlm",
        dataset=str(voc),
        model=str(weights / "mobilenet-v2-imagenet"),
        data_options={"max_train": 40, "max_test": 10},
        image_size=64,
        steps=3,
        batch_size=4,
        val_share=4,
        initial=6,
        increment=6,
        max_labelled=12,
        gallery=2,
        output_dir=str(tmp_path / "run"),
    )
    rounds = list(run_al(config))
    assert [r.labelled for r in rounds] == [6, 12]
    for record in rounds:
        assert math.isfinite(record.metrics["train_loss"]) and 0 <= record.metrics["val"]["mean_iou"] <= 1
        assert record.judge["n"] == 36 - record.labelled and record.judge["coverage"] == 1
        assert all(math.isfinite(n) for n in numbers([record.metrics, record.judge, record.budget]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"] and summary["simulated"] and 0 < summary["test"]["pixel_accuracy"] <= 1
    assert summary["budget"]["images"] == 16 and any("re-initialised" in n for n in summary["notes"])
    figures = list((tmp_path / "run" / "figures").glob("*.png"))
    assert {f.stem for f in figures} >= {"learning_curve", "class_iou", "gallery", "judge"}
    for path in figures:
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_masks_of_a_foundation_model_mean_the_same_classes(shared, voc):
    folder = shared / "data/grounded_sam_voc"
    if not folder.is_dir():
        pytest.skip("data/grounded_sam_voc is not in the shared folder")
    data = load_data(str(voc), val_share=1)
    assert {path.stem for path in folder.glob("*.png")} == set(row_ids(data.train)) | set(row_ids(data.val))
    agreement = []
    for row in data.train.select(range(10)):
        mask, truth = read_mask(folder / f"{row['id']}.png", data.labels), row["mask"]
        assert mask.shape == truth.shape and mask.dtype == np.uint8 and VOID not in mask and mask.max() < 21
        assert set(np.unique(truth)) - {VOID} <= set(np.unique(mask))
        agreement.append((mask == truth)[truth != VOID].mean())
    assert np.median(agreement) > 0.75  # such models err: a quarter of the pixels and less in the worst image


def test_both_precisions_agree_on_real_photographs(voc, weights):
    data = load_data(str(voc))
    model = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), data.labels)
    two = data.test.select(range(2))
    with torch.random.fork_rng():
        exact, half = (evaluate(model, two, Inference(257, "stretch", 2, precision=p)) for p in ("fp32", "bf16"))
    assert half["pixel_accuracy"] == pytest.approx(exact["pixel_accuracy"], abs=0.02)
