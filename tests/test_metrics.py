"""Metrics against independent references: the formula of `evaluate`'s mean_iou, torchmetrics, scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torchmetrics import JaccardIndex

from vlm_itl.core.checks import DataError, VlmItlError
from vlm_itl.model.metrics import (
    ConfusionMatrix,
    boundary_iou,
    class_iou,
    count_pairs,
    image_iou,
    mean_iou_of,
)

VOID = 255


def evaluate_way(predictions, truths, num_labels, ignore_index=VOID):
    "What `evaluate.load('mean_iou')` computes (it needs the Hub): histograms of hits, predictions and truths, summed."
    hits, predicted, true = np.zeros(num_labels), np.zeros(num_labels), np.zeros(num_labels)
    edges = {"bins": num_labels, "range": (0, num_labels - 1)}
    for prediction, truth in zip(predictions, truths, strict=True):
        known = truth != ignore_index
        prediction, truth = prediction[known], truth[known]
        hits += np.histogram(prediction[prediction == truth], **edges)[0]
        predicted += np.histogram(prediction, **edges)[0]
        true += np.histogram(truth, **edges)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = hits / (predicted + true - hits)
        return {
            "mean_iou": np.nanmean(iou),
            "mean_accuracy": np.nanmean(hits / true),
            "overall_accuracy": hits.sum() / true.sum(),
            "per_category_iou": iou,
        }


def made_up(rng, num_classes, count=5, absent=(), size=(24, 31)):
    "Random predictions and truths that agree on about two thirds of the pixels, with void and absent classes."
    present = np.setdiff1d(np.arange(num_classes), absent)
    truths = [rng.choice(present, size=size).astype(np.uint8) for _ in range(count)]
    predictions = [np.where(rng.random(size) < 0.6, t, rng.choice(present, size=size)).astype(np.uint8) for t in truths]
    for truth in truths:
        truth[rng.random(size) < 0.1] = VOID
    return predictions, truths


@pytest.mark.parametrize("num_classes", [2, 3, 21, 150])
@pytest.mark.parametrize("absent", [(), (1,)])
def test_equals_evaluate(num_classes, absent):
    rng = np.random.default_rng(num_classes)
    predictions, truths = made_up(rng, num_classes, absent=absent)
    predictions = [np.where(p == VOID, 0, p) for p in predictions]
    theirs = evaluate_way(predictions, truths, num_classes)
    matrix = ConfusionMatrix(num_classes)
    for prediction, truth in zip(predictions, truths, strict=True):
        matrix.update(prediction, truth)
    ours = matrix.compute()
    assert abs(ours["mean_iou"] - theirs["mean_iou"]) < 1e-9
    assert abs(ours["mean_accuracy"] - theirs["mean_accuracy"]) < 1e-9
    assert abs(ours["pixel_accuracy"] - theirs["overall_accuracy"]) < 1e-9
    np.testing.assert_allclose(ours["per_class_iou"], theirs["per_category_iou"], atol=1e-9, equal_nan=True)
    assert np.isnan(np.array(ours["per_class_iou"])[list(absent)]).all()


@pytest.mark.parametrize("absent", [(), (3, 4)])
def test_equals_torchmetrics(absent):
    rng = np.random.default_rng(1)
    predictions, truths = made_up(rng, 6, absent=absent)
    jaccard = JaccardIndex("multiclass", num_classes=6, ignore_index=VOID, average="none").set_dtype(torch.float64)
    macro = JaccardIndex("multiclass", num_classes=6, ignore_index=VOID, average="macro")
    matrix = ConfusionMatrix(6)
    for prediction, truth in zip(predictions, truths, strict=True):
        matrix.update(prediction, truth)
        jaccard.update(torch.tensor(prediction).long(), torch.tensor(truth).long())
        macro.update(torch.tensor(prediction).long(), torch.tensor(truth).long())
    confusion = jaccard.confmat.double().numpy()  # its counts are exact; its division is float32
    assert np.array_equal(matrix.counts, confusion)
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    theirs = np.mean(hit[union > 0] / union[union > 0])
    assert abs(matrix.compute()["mean_iou"] - theirs) < 1e-9
    assert abs(matrix.compute()["mean_iou"] - float(macro.compute())) < 1e-6


def test_hallucinated_class_counts_in_one_mean_only():
    matrix = ConfusionMatrix(4).update([[0, 0, 2, 1]], [[0, 0, 0, 1]])
    numbers = matrix.compute()
    assert numbers["mean_iou"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert numbers["mean_iou_in_truth"] == pytest.approx((2 / 3 + 1) / 2)
    assert numbers["classes_in_truth"] == 2
    assert math.isnan(numbers["per_class_iou"][3])


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a,
        lambda a: a.astype(np.int16),
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.uint16),
        lambda a: a[::-1][::-1],
        lambda a: np.broadcast_to(a, a.shape),
        lambda a: torch.tensor(a),
        lambda a: torch.tensor(a).long(),
        lambda a: torch.tensor(a).to(torch.int32).T.contiguous().T,
        lambda a: a.tolist(),
    ],
)
def test_any_integer_type_gives_the_same_counts(make):
    rng = np.random.default_rng(2)
    (prediction,), (truth,) = made_up(rng, 5, count=1)
    wanted = count_pairs(prediction, truth, 5)
    assert torch.equal(count_pairs(make(prediction), truth, 5), wanted)
    assert torch.equal(count_pairs(prediction, make(truth), 5), wanted)
    assert torch.equal(count_pairs(make(prediction), make(truth), 5), wanted)


def test_read_only_arrays_do_not_warn(recwarn):
    array = np.zeros((4, 4), dtype=np.uint8)
    array.flags.writeable = False
    count_pairs(array, array, 2)
    assert not recwarn.list


def test_bool_masks_and_batches():
    batch = np.zeros((2, 3, 4), dtype=bool)
    batch[0] = True
    assert count_pairs(batch, batch, 2).tolist() == [[12, 0], [0, 12]]


@pytest.mark.parametrize("ignore_index", [255, -100, 0, 1000])
def test_other_void_values(ignore_index):
    truth = np.array([1, 2, ignore_index, ignore_index])
    prediction = np.array([1, 1, 2, 7])  # 7 is out of range, but on void
    counts = count_pairs(prediction, truth, 3, ignore_index)
    assert counts.sum() == 2 and counts[1, 1] == 1 and counts[2, 1] == 1


@pytest.mark.parametrize(("num_classes", "void"), [(1, 255), (21, 255), (21, 0), (21, 20), (255, 255), (256, 255)])
def test_regions_are_counted_as_their_pixels_are(num_classes, void):
    "Masks of regions are counted run by run; any value may stand where the truth is void, and nowhere else."
    rng = np.random.default_rng(num_classes + void)
    truth, prediction = np.kron(rng.integers(0, num_classes, (2, 8, 5)), np.ones((1, 6, 20))).astype(np.uint8)
    truth[20:31, 13:77] = void
    prediction[22:30, 20:60] = 255
    prediction[truth != void] = np.minimum(prediction, num_classes - 1)[truth != void]
    by_hand = np.zeros((num_classes, num_classes), dtype=np.int64)
    known = truth != void
    np.add.at(by_hand, (truth[known], prediction[known]), 1)
    assert np.array_equal(count_pairs(prediction, truth, num_classes, void), by_hand)
    if num_classes < 255:
        for what, changed in (("truth", truth), ("prediction", prediction)):
            changed[:3, :50] = 254
            with pytest.raises(DataError, match=f"{what} holds 254 in"):
                count_pairs(prediction, truth, num_classes, void)
            changed[:3, :50] = num_classes - 1 if void != num_classes - 1 else 1


def test_more_than_256_classes():
    truth = np.array([0, 299, 300, 255])
    matrix = ConfusionMatrix(301, ignore_index=-1).update(truth, truth)
    assert matrix.counts.trace() == 4


@pytest.mark.parametrize("as_type", [np.uint8, np.int64])
@pytest.mark.parametrize("what", ["prediction", "truth"])
def test_out_of_range_is_named_and_adds_nothing(as_type, what):
    good, bad = np.zeros((3, 3), dtype=as_type), np.zeros((3, 3), dtype=as_type)
    bad[1, 1] = 21
    matrix = ConfusionMatrix(21).update(good, good)
    before = matrix.counts
    with pytest.raises(ValueError, match=f"{what} holds 21 in 1 pixels; allowed are 0..20"):
        matrix.update(bad if what == "prediction" else good, bad if what == "truth" else good)
    assert np.array_equal(matrix.counts, before)


def test_negative_values_and_void_predictions_are_refused():
    with pytest.raises(DataError, match="prediction holds -1"):
        count_pairs(np.array([-1]), np.array([0]), 2)
    with pytest.raises(DataError, match="prediction holds 255"):
        count_pairs(np.array([255], dtype=np.uint8), np.array([0], dtype=np.uint8), 2)
    assert count_pairs(np.array([255], dtype=np.uint8), np.array([255], dtype=np.uint8), 2).sum() == 0


@pytest.mark.parametrize(
    ("prediction", "truth", "says"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "differ in shape"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "take argmax"),
        (torch.zeros(2, 2), torch.zeros(2, 2).long(), "take argmax"),
        (np.array([["a"]]), np.zeros((1, 1), int), "whole numbers"),
    ],
)
def test_wrong_input_is_one_clear_error(prediction, truth, says):
    with pytest.raises(VlmItlError, match=says):
        ConfusionMatrix(2).update(prediction, truth)


def test_merge_equals_one_pass_in_any_order():
    rng = np.random.default_rng(3)
    predictions, truths = made_up(rng, 7, count=6)
    whole, parts = ConfusionMatrix(7), [ConfusionMatrix(7) for _ in range(3)]
    for index, (prediction, truth) in enumerate(zip(predictions, truths, strict=True)):
        whole.update(prediction, truth)
        parts[index % 3].update(torch.tensor(prediction).long(), torch.tensor(truth))
    merged = ConfusionMatrix(7)
    for part in reversed(parts):
        merged.merge(part)
    assert np.array_equal(merged.counts, whole.counts)
    assert merged.compute() == whole.compute()
    with pytest.raises(DataError, match="cannot merge"):
        merged.merge(ConfusionMatrix(8))


def test_counts_is_a_copy_and_int64():
    matrix = ConfusionMatrix(2).update([0], [0])
    matrix.counts[0, 0] = 99
    assert matrix.counts[0, 0] == 1 and matrix.counts.dtype == np.int64


def test_empty_and_all_void():
    for matrix in (ConfusionMatrix(3), ConfusionMatrix(3).update([[1]], [[VOID]])):
        numbers = matrix.compute()
        assert all(math.isnan(numbers[k]) for k in ("mean_iou", "mean_iou_in_truth", "pixel_accuracy", "mean_accuracy"))
        named = matrix.compute(["a", "b", "c"])
        assert math.isnan(named["mean_iou"]) and named["per_class_iou"] == {"a": None, "b": None, "c": None}
    with pytest.raises(DataError, match="2 names for 3 classes"):
        ConfusionMatrix(3).compute(["a", "b"])
    with pytest.raises(DataError, match="at least 1"):
        ConfusionMatrix(0)


def test_empty_image_counts_nothing():
    assert count_pairs(np.zeros((0, 5), np.uint8), np.zeros((0, 5), np.uint8), 3).sum() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stays_on_the_device():
    rng = np.random.default_rng(4)
    predictions, truths = made_up(rng, 21)
    host, device = ConfusionMatrix(21), ConfusionMatrix(21)
    for prediction, truth in zip(predictions, truths, strict=True):
        host.update(prediction, truth)
        assert count_pairs(torch.tensor(prediction).cuda().long(), torch.tensor(truth), 21).is_cuda
        device.update(torch.tensor(prediction).cuda(), torch.tensor(truth).cuda())
    assert np.array_equal(host.counts, device.counts)
    assert np.array_equal(ConfusionMatrix(21).merge(device).counts, host.counts)


def test_mean_iou_of():
    assert mean_iou_of({"a": 0.5, "b": None, "c": 1.0}) == 0.75
    assert mean_iou_of({"a": 0.5, "b": None, "c": 1.0}, ["b", "c"]) == 1.0
    assert mean_iou_of([0.25, 0.75, math.nan], [0, 2]) == 0.25
    assert math.isnan(mean_iou_of({"a": None}))
    with pytest.raises(DataError, match="no class 'd'; known are a, b"):
        mean_iou_of({"a": 1.0, "b": 0.0}, ["d"])


def test_image_iou_is_the_mean_over_classes_present():
    rng = np.random.default_rng(5)
    for absent in [(), (0, 1), (2, 3, 4)]:
        (prediction,), (truth,) = made_up(rng, 6, count=1, absent=absent)
        theirs = evaluate_way([prediction], [truth], 6)["mean_iou"]
        assert abs(image_iou(prediction, truth, 6) - theirs) < 1e-9


def test_nothing_to_compare_with_is_no_good_mask():
    truth = np.ones((4, 4), np.uint8)
    assert not image_iou(truth, np.full_like(truth, VOID), 2) >= 0.0


def boundary_by_erosion(prediction, truth, share):
    "Boundary IoU of one binary mask as in its authors' code: pad with zeros, erode d times by 3 x 3, subtract."
    d = max(1, int(round(share * np.sqrt(prediction.shape[0] ** 2 + prediction.shape[1] ** 2))))
    bands = []
    for mask in (prediction, truth):
        padded = np.pad(mask, 1)
        eroded = binary_erosion(padded, np.ones((3, 3)), iterations=d, border_value=1)[1:-1, 1:-1]
        bands.append(mask & ~eroded)
    return (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
def test_boundary_iou_equals_repeated_erosion(share):
    rng = np.random.default_rng(6)
    coarse = rng.random((6, 8)) < 0.5
    truth = np.kron(coarse, np.ones((15, 15), bool))
    prediction = np.roll(truth, (1, 2), axis=(0, 1)) & (rng.random(truth.shape) < 0.99)
    ours = boundary_iou(prediction, truth, 2, share=share)
    assert abs(ours - boundary_by_erosion(prediction, truth, share)) < 1e-12


def test_boundary_iou_void_and_background():
    truth = np.zeros((50, 50), np.uint8)
    truth[10:40, 10:40] = 1
    truth[9:41, 9] = VOID
    prediction = np.zeros_like(truth)
    prediction[10:40, 9:40] = 1  # differs from the truth on void only
    assert boundary_iou(prediction, truth, 2) == 1.0
    assert boundary_iou(prediction, truth, 2, background=None) == 1.0
    empty = np.zeros_like(truth)
    assert boundary_iou(empty, truth, 2) == 0.0 and math.isnan(boundary_iou(empty, empty, 2))
    with pytest.raises(DataError, match="one image"):
        boundary_iou(truth[None], truth[None], 2)


def test_class_iou_does_not_warn(recwarn):
    assert np.isnan(class_iou(np.zeros((2, 2)))).all() and not recwarn.list
