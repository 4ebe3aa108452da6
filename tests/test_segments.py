"""Numbers of segments: against slow and plain implementations, on masks of every kind, and quickly."""

from __future__ import annotations

import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import MaskStore, read_mask
from vlm_itl.data.sources import load_data
from vlm_itl.model.metrics import class_iou, count_pairs
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import grid_mask, grid_size, look_on_grid
from vlm_itl.model.segmenter import load_model
from vlm_itl.proposals import segments as room
from vlm_itl.proposals.proposers import Proposal
from vlm_itl.proposals.segments import (
    MODEL,
    PROPOSER,
    SHAPE,
    Segments,
    describe,
    describe_one,
    segment_ious,
    split_mask,
)
from vlm_itl.vlm.handler import Shown

VOC = LabelSpace.voc()


def blobs(seed: int, size: tuple[int, int] = (60, 90), classes: int = 4, void: bool = True) -> np.ndarray:
    """Smooth patches of some classes, with a strip of void."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(classes, *size)), (0, 6, 6))
    mask = np.array([0, 8, 12, 15, 3])[fields.argmax(0)].astype(np.uint8)
    if void:
        mask[:, 40:43] = VOID
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_shapes_equal_a_count_of_cells(seed: int):
    mask = blobs(seed)
    parts, (h, w) = split_mask(mask), mask.shape
    found = room.shape_features(parts, 0)
    objects = [c for c in parts.class_ids if c != 0]
    assert parts.class_ids.tolist() == sorted(set(mask.ravel().tolist()) - {VOID})
    for row, c in enumerate(parts.class_ids.tolist()):
        cells = [(y, x) for y in range(h) for x in range(w) if mask[y, x] == c]
        near = [(0, 1), (1, 0), (0, -1), (-1, 0)]
        edge = sum(
            any(0 <= y + a < h and 0 <= x + b < w and mask[y + a, x + b] != c for a, b in near) for y, x in cells
        )
        ys, xs = np.array(cells).T
        rim = sum(y in (0, h - 1) or x in (0, w - 1) for y, x in cells)
        pieces = ndimage.label(mask == c)
        tall, wide = np.ptp(ys) + 1, np.ptp(xs) + 1
        every = sum((mask == k).sum() for k in objects)
        wanted = {
            "share": len(cells) / (h * w),
            "share_of_objects": len(cells) / every if c else np.nan,
            "outline": edge / len(cells) ** 0.5,
            "pieces": np.log(pieces[1]),
            "largest": max((pieces[0] == k).sum() for k in range(1, pieces[1] + 1)) / len(cells),
            "rim": rim / (2 * h + 2 * w - 4),
            "fill": len(cells) / (tall * wide),
            "height": tall / h,
            "width": wide / w,
            "row": ys.mean() / h,
            "column": xs.mean() / w,
            "classes": len(objects),
            "object": float(c != 0),
        }
        np.testing.assert_allclose(found[row], [wanted[name] for name in SHAPE], rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_networks_opinion_equals_loops_over_cells(seed: int):
    mask = blobs(seed, (24, 30))
    p = np.random.default_rng(seed).dirichlet(np.full(21, 0.2), mask.shape).transpose(2, 0, 1)
    parts = split_mask(mask)
    found = room.model_features(p, parts)
    for row, c in enumerate(parts.class_ids.tolist()):
        inside, edge = mask == c, parts.boundary[row]
        layers = {"": inside, "_boundary": edge, "_interior": inside & ~edge}
        ranked = np.sort(p, axis=0)
        maps = {"entropy": -(p * np.log(p + 1e-300)).sum(0) / np.log(21), "margin": ranked[-1] - ranked[-2]}
        maps |= {"largest_p": ranked[-1], "support": p[c]}
        wanted = {
            f"{n}{s}": m[layer].mean() if layer.any() else np.nan
            for n, m in maps.items()
            for s, layer in layers.items()
        }
        wins = p.argmax(0) == c
        wanted |= {
            "missed": p[c][~inside].sum() / max(p[c].sum(), 1),
            "soft_iou": p[c][inside].sum() / (inside.sum() + p[c][~inside].sum()),
            "agreement": (wins & inside).sum() / (wins | inside).sum(),
            "rival": max(p[k][inside].mean() for k in range(21) if k != c),
        }
        np.testing.assert_allclose(found[row], [wanted[name] for name in MODEL], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ious_of_segments_are_those_of_the_metrics(seed: int):
    mask, truth = blobs(seed, void=False), blobs(seed + 50)
    found = segment_ious(mask, truth)
    np.testing.assert_allclose(found[:21], class_iou(count_pairs(mask, truth, 21)))
    silent = mask.copy()
    silent[:20] = VOID  # what is not said is missed
    for c in np.unique(truth[truth != VOID]):
        either = ((silent == c) | (truth == c)) & (truth != VOID)
        assert segment_ious(silent, truth)[c] == ((silent == c) & (truth == c)).sum() / either.sum()


def test_tiny_thin_whole_and_void_masks():
    speck = np.zeros((600, 800), np.uint8)
    speck[3, 5] = 8  # one pixel of half a million: no cell of the grid shows it
    table = describe_one("a", speck, VOC, probabilities=np.full((21, 96, 128), 1 / 21))
    assert table.class_ids.tolist() == [0, 8] and table.values[1, 0] == 0 and np.isnan(table.values[1, 2])
    for mask in (np.full((1, 7), 8, np.uint8), np.full((50, 1), 8, np.uint8), np.full((9, 9), 8, np.uint8)):
        whole = describe_one("a", mask, VOC)
        assert whole.values[0, 0] == 1 and whole.values[0, SHAPE.index("fill")] == 1
    nothing = describe_one("a", np.full((9, 9), VOID, np.uint8), VOC)
    assert len(nothing) == 0 and nothing.values.shape == (0, len(SHAPE) + len(PROPOSER))
    assert len(Segments.join([nothing, table.take(np.zeros(2, bool))])) == 0 if nothing.names == table.names else True


def test_what_proposers_tell():
    mask = blobs(0)
    shifted = np.roll(mask, 3, axis=0)
    proposal = Proposal("a", "folder:x", 0.9, {8: 0.7})
    table = describe_one("a", mask, VOC, proposal, [shifted, mask]).frame().set_index("class_id")
    assert np.allclose(table["score"], 0.9) and np.isclose(table.loc[8, "class_score"], 0.7)
    assert np.isnan(table.loc[12, "class_score"])
    other = segment_ious(mask, shifted)
    assert np.isclose(table.loc[8, "least_peer"], other[8]) and np.isclose(table.loc[8, "peers"], (1 + other[8]) / 2)


def test_features_of_an_encoder_are_pooled_by_share_of_a_cell():
    layers = np.zeros((1, 8, 8), bool)
    layers[0, :4, :6] = True
    features = np.arange(4.0).reshape(1, 2, 2)  # cells of the map: 0 1 / 2 3
    assert room.pooled_features(features, layers)[0, 0] == (16 * 0 + 8 * 1) / 24
    assert np.isnan(room.pooled_features(features, np.zeros((1, 8, 8), bool))).all()


def test_a_pool_is_described_as_its_images_are(tmp_path):
    data, view = load_data("toy"), Inference(image_size=64, batch_size=3)
    model, store = load_model("segformer-nano", data.labels), MaskStore(tmp_path, data.labels)
    for row in data.train:
        store.write(row["id"], row["mask"])
    shown = Shown(data.train.remove_columns("mask"), store, segmenter=(model, view), others=(store,))
    tables = describe(shown, encoder=(model, view))
    assert not torch.is_inference_mode_enabled()  # two networks have looked, and left no trace
    looks = dict(look_on_grid(model, data.train, view))
    for row, table in zip(data.train, tables, strict=True):
        alone = describe_one(row["id"], row["mask"], data.labels, None, [row["mask"]], looks[row["id"]])
        np.testing.assert_allclose(table.values, alone.values, atol=1e-4)
        assert set(table.ids) == {row["id"]} and table.pooled.shape == table.ring.shape
    assert [len(t.names) for t in describe(shown, model=False)] == [len(SHAPE) + len(PROPOSER)] * len(tables)


def test_grids_and_padded_images():
    data = datasets.Dataset.from_dict({"id": ["a"], "image": [Image.new("RGB", (300, 150), (200, 30, 30))]})
    model = load_model("segformer-nano", VOC)
    ((image_id, p),) = look_on_grid(model, data, Inference(image_size=64))
    assert image_id == "a" and p.shape == (21, *grid_size((150, 300))) == (21, 64, 128)
    assert np.allclose(p.sum(0), 1, atol=1e-5)
    ((_, features),) = room.look_features(model, data, Inference(image_size=64))
    assert features.shape[1] * 2 == features.shape[2]  # the padding is cut off
    assert grid_mask(np.zeros((150, 300), np.uint8)).shape == (64, 128)


def test_real_masks_are_described_in_seconds(voc, shared):
    masks = sorted((shared / "data" / "grounded_sam_voc").glob("*.png"))
    if not masks:
        pytest.skip("no masks of Grounded-SAM in the shared folder")
    began, count = time.process_time(), 0
    for path in masks[:40]:
        table = describe_one(path.stem, read_mask(path, VOC), VOC)
        count += len(table)
        assert np.isfinite(table.values[:, SHAPE.index("share")]).all()
    assert count > 80 and (time.process_time() - began) / 40 < 0.05
