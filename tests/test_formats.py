"""Masks in and out: every format gives back what it was given; tools read what we write, we read what they write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_itl.cli.run import main
from vlm_itl.core.checks import ConfigError, DataError, RunError, VlmItlError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import MaskStore
from vlm_itl.data.sources import load_data, toy_images
from vlm_itl.experiment import export_run, make_config, run_al, run_baseline, run_masks
from vlm_itl.formats import MaskFormat, MaskRow, MaskSet, push_masks, read_masks, register_format, write_masks
from vlm_itl.formats.formats import FORMATS
from vlm_itl.formats.label_studio import brush_results, mask_of_results
from vlm_itl.formats.libraries import to_datasets
from vlm_itl.formats.run_lengths import (
    decode_brush,
    decode_coco,
    decode_cvat,
    encode_brush,
    encode_coco,
    encode_cvat,
)
from vlm_itl.proposals import make_proposer

ROUND = ("voc", "cvat-masks", "ade", "coco", "cvat", "labelstudio", "huggingface")  # any classes; datumaro is not here
LABELS = LabelSpace(("background", "cat", "dog", "thin line", "übrig"))
MANY = LabelSpace(tuple(["background", *(f"class-{index}" for index in range(1, 254))]))


def hard() -> list[np.ndarray]:
    """Void, holes, one pixel, thin lines, odd sizes, all of one class, classes that touch the border."""
    masks = [np.zeros(size, np.uint8) for size in ((40, 61), (1, 1), (1, 7), (7, 1), (33, 17))]
    big = masks[0]
    big[5:30, 5:40], big[12:20, 12:22], big[14:16, 14:18] = 1, 0, 2  # a hole, with something in it
    big[39, 60], big[:, 50], big[35, :], big[31:33, 2:9] = 3, 3, 4, VOID
    np.fill_diagonal(big[20:], 4)
    masks[2][0] = (0, 1, VOID, VOID, 2, 0, 1)
    masks[3][:, 0] = (VOID, 1, 1, 2, 2, 2, VOID)
    masks[4][:] = np.random.default_rng(0).choice([0, 1, 2, 3, 4, VOID], (33, 17))
    return [*masks, np.full((5, 6), 3, np.uint8), np.full((5, 6), VOID, np.uint8), np.zeros((9, 4), np.uint8)]


def with_images(masks: list[np.ndarray], labels: LabelSpace, folder: Path) -> MaskSet:
    """Rows with photographs, and every kind of provenance."""
    names = ["a", "b.c", "übung-猫", "d_e", "ë", "f", "g", "h", *(f"more-{n}" for n in range(len(masks)))]
    known: list[dict[str, Any]] = [
        {"by": "human", "who": "anna@example.org", "seconds": 61.25},
        {"by": "judge", "who": "ovis2", "p_yes": 0.875},
        {"by": "corrected", "seconds": 12.5},
        {"by": "verified", "who": "Zoë <z@example.org>", "p_yes": 0.5, "seconds": 4.0},
        {},
    ]
    folder.mkdir(parents=True)
    rows = []
    for number, (name, mask) in enumerate(zip(names, masks, strict=False)):
        path = folder / f"{name}.{('jpg', 'png')[number % 2]}"
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*mask.shape, 3), np.uint8)).save(path)
        rows.append(MaskRow(name, mask, path, **known[number % len(known)]))
    return MaskSet(labels, rows)


def same(ours: MaskSet, again: MaskSet, provenance: bool = True) -> None:
    """The same ids, masks and provenance, whatever the order; photographs where there were some."""
    back = {row.id: row for row in again}
    assert sorted(back) == sorted(row.id for row in ours)
    for row in ours:
        mask = back[row.id].mask
        assert mask.dtype == np.uint8 and mask.shape == row.mask.shape and (mask == row.mask).all(), row.id
        assert not provenance or back[row.id].provenance == row.provenance
        assert (back[row.id].image is None) == (row.image is None)


@pytest.mark.parametrize("word", ROUND)
def test_round_trip(word: str, tmp_path: Path) -> None:
    ours = with_images(hard(), LABELS, tmp_path / "photographs")
    out = write_masks(ours, tmp_path / "out", word)
    again = read_masks(out)  # the format is guessed
    assert again.labels.names == LABELS.names
    same(ours, again)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("word", ROUND)
def test_many_classes_and_classes_without_a_background(word: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    many = [rng.choice([0, 1, 127, 128, 200, 253, VOID], (23, 31)).astype(np.uint8)]
    ours = with_images(many, MANY, tmp_path / "many")
    same(ours, read_masks(write_masks(ours, tmp_path / "out", word)))
    bare = LabelSpace(("road", "sky", "void-like"))
    ours = with_images([rng.choice([0, 1, 2, VOID], (9, 11)).astype(np.uint8)], bare, tmp_path / "bare")
    out = write_masks(ours, tmp_path / "out-bare", word)
    assert read_masks(out).labels.names == bare.names
    same(ours, read_masks(out))
    same(ours, read_masks(out, labels=bare))


def test_cityscapes(tmp_path: Path) -> None:
    labels = LabelSpace(("road", "person", "sky", "car", "bicycle"))
    ours = with_images(hard(), labels, tmp_path / "photographs")
    again = read_masks(write_masks(ours, tmp_path / "out", "cityscapes"), labels=labels, unknown="void")
    same(ours, again)
    assert len(read_masks(tmp_path / "out").labels) == 19
    with pytest.raises(ConfigError, match="no class 'background'"):
        write_masks(MaskSet(LABELS, ours.rows), tmp_path / "no", "cityscapes")
    same(ours, read_masks(tmp_path / "out", classes=list(labels.names)))


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_run_lengths_of_any_region(shape: tuple[int, int], seed: int, share: float) -> None:
    region = np.random.default_rng(seed).random(shape) < share
    assert (decode_brush(encode_brush(region), shape) == region).all()
    assert (decode_coco(encode_coco(region), shape) == region).all()
    if region.any():
        assert (decode_cvat(encode_cvat(region), shape) == region).all()


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), st.data())
def test_packed_counts_that_are_cut_are_no_region(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    """pycocotools fills what they do not reach with whatever lies in memory."""
    coded = encode_coco(np.random.default_rng(seed).random(shape) < 0.5)
    cut = data.draw(st.integers(0, len(coded["counts"]) - 1))
    for counts in (coded["counts"][:cut], coded["counts"][:cut].encode()):
        with pytest.raises(DataError, match="in COCO's form"):
            decode_coco({**coded, "counts": counts}, shape)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-3, 300), max_size=30), shapes)
def test_a_broken_brush_is_told_in_one_line(rle: list[int], shape: tuple[int, int]) -> None:
    good = encode_brush(np.ones(shape, bool))
    for broken in (rle, good[: len(rle)] + rle, good[:7] + [byte & 255 for byte in rle]):
        try:
            assert decode_brush(broken, shape, "task 7").shape == shape
        except DataError as error:
            assert "\n" not in str(error) and "task 7" in str(error)


def test_brushes_with_soft_edges() -> None:
    """Label Studio's editor writes values one by one where the edge of a stroke is soft."""
    values = "".join(f"{value:08b}" for value in (9, 9, 9, 127, 1, 2, 3, 128))
    bits = f"{8:032b}" + "00111" + "0010" * 4 + "0" + "00" + "111" + values
    rle = np.packbits([int(bit) for bit in bits]).tolist()
    assert decode_brush(rle, (1, 2)).tolist() == [[False, True]]


@pytest.mark.parametrize("word", ROUND)
def test_broken_files_are_told_in_one_line(word: str, tmp_path: Path) -> None:
    """Half a file, nothing, and garbage."""
    out = write_masks(with_images(hard()[:3], LABELS, tmp_path / "photographs"), tmp_path / "out", word)
    files = [
        p for p in out.rglob("*") if p.is_file() and p.suffix in (".json", ".xml", ".zip", ".txt", ".arrow", ".csv")
    ]
    rng = np.random.default_rng(0)
    for path in files:
        whole = path.read_bytes()
        for content in (
            whole[: len(whole) // 2],
            b"",
            rng.bytes(200),
            whole.replace(b"1", b"x"),
            whole.replace(b":", b""),
        ):
            path.write_bytes(content)
            try:
                [row.mask for row in read_masks(out, word)]
            except VlmItlError as error:
                assert "\n" not in str(error)
        path.write_bytes(whole)
    same(read_masks(out), read_masks(out, word))


def coco_file(path: Path, **changed: Any) -> Path:
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    parts: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 4}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": square, "iscrowd": 0}],
    }
    path.write_text(json.dumps(parts | changed))
    return path


def test_coco_of_others(tmp_path: Path) -> None:
    read = read_masks(coco_file(tmp_path / "a.json"))
    assert read.labels.names == ("background", "cat") and read.rows[0].mask[:2, :2].all()
    other = [{"id": 1, "image_id": 1, "category_id": 5, "segmentation": [[0, 0, 2, 0, 2, 2]]}]
    with pytest.raises(DataError, match="no category 5"):
        _ = read_masks(coco_file(tmp_path / "a.json", annotations=other)).rows[0].mask
    with pytest.raises(DataError, match="odd"):
        read_masks(coco_file(tmp_path / "a.json", images=[{"id": 1}]))
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]
    assert not read_masks(coco_file(tmp_path / "a.json", annotations=boxes)).rows[0].mask.any()
    climbing = [{"id": 1, "file_name": "../../a.jpg", "height": 4, "width": 4}]
    assert read_masks(coco_file(tmp_path / "a.json", images=climbing)).rows[0].image is None


def detections(*scores: Any) -> list[dict[str, Any]]:
    """A large cat, a small dog in it, and a smaller cat; None: no score."""
    places = [(1, [[0, 0, 4, 0, 4, 4, 0, 4]]), (2, [[0, 0, 2, 0, 2, 2, 0, 2]]), (1, [[3, 3, 4, 3, 4, 4, 3, 4]])]
    regions = [{"id": n, "image_id": 1, "category_id": c, "segmentation": s} for n, (c, s) in enumerate(places)]
    return [r | ({} if score is None else {"score": score}) for r, score in zip(regions, scores, strict=True)]


ANIMALS = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


@pytest.mark.parametrize(
    ("scores", "dogs", "sure"),
    [
        ((None, None, None), 4, {}),  # somebody's drawing: the smaller lies above
        ((0.9, 0.2, 0.5), 0, {"cat": 0.9, "dog": 0.2}),  # the surer cat covers the dog, though it is larger
        ((0.2, 0.9, 0.5), 4, {"cat": 0.5, "dog": 0.9}),
        ((0.5, 0.5, 0.5), 4, {"cat": 0.5, "dog": 0.5}),
        ((0.9, None, 0.5), 4, {"cat": 0.9}),  # drawn, not guessed
        ((90, 20, 50), 0, {}),  # percents: an order, and no shares
        (("sure", "0.2", None), 0, {"dog": 0.2}),
    ],
)
def test_the_surer_of_two_detections_lies_above(tmp_path: Path, scores: Any, dogs: int, sure: Any) -> None:
    file = coco_file(tmp_path / "a.json", annotations=detections(*scores), categories=ANIMALS)
    row = read_masks(file).rows[0]
    assert (row.mask == 2).sum() == dogs and (row.mask == 1).sum() == 16 - dogs
    assert row.scores == sure


def test_a_bare_list_of_results_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(detections(0.9, 0.2, 0.5)))
    with pytest.raises(DataError, match="a bare list of results.*as its 'annotations'"):
        read_masks(tmp_path / "results.json", "coco")


def test_proposals_keep_the_scores_of_detections(tmp_path: Path) -> None:
    toy = toy_images()
    names, (height, width) = toy.labels.names[1:3], toy.train[0]["mask"].shape
    parts = {
        "categories": [{"id": n, "name": name} for n, name in enumerate([*names, "unicorn"], start=1)],
        "images": [{"id": 1, "file_name": "toy-0.png", "height": height, "width": width}],
        "annotations": [*detections(0.9, 0.3, 0.5), {**detections(1, 0.8, 1)[1], "id": 9, "category_id": 3}],
    }
    options = {"path": str(coco_file(tmp_path / "a.json", **parts)), "format": "coco", "unknown": "background"}
    store = MaskStore(tmp_path / "store", toy.labels)
    made = make_proposer("folder", **options).propose(toy.train.remove_columns("mask"), store)
    assert made["toy-0"].class_scores == {1: 0.9, 2: 0.3} and made["toy-0"].score == pytest.approx(0.6)
    assert (store["toy-0"] == 1).sum() == 16


def ls_task(**changed: Any) -> dict[str, Any]:
    results = brush_results(hard()[0], LABELS)
    return {
        "id": 1,
        "data": {"image": "/data/upload/3/0a1b2c3d-my%20cat.jpg"},
        "annotations": [{"result": results}],
    } | changed


def ls_file(path: Path, *tasks: dict[str, Any]) -> Path:
    path.write_text(json.dumps(tasks))
    return path


def test_label_studio_of_others(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    read = read_masks(ls_file(path, ls_task()), labels=LABELS)
    assert read.rows[0].id == "my-cat" and (read.rows[0].mask == hard()[0]).all() and read.rows[0].by == "human"
    skipped = ls_task(annotations=[{"was_cancelled": True, "result": []}])
    with pytest.raises(DataError, match="none has an annotation"):
        read_masks(ls_file(path, skipped))
    assert read_masks(ls_file(path, ls_task(), skipped)).note == "1 tasks without an annotation were left out"
    first = {"result": brush_results(np.zeros_like(hard()[0]) + 1, LABELS), "updated_at": "2026-01-01"}
    last = {"result": brush_results(hard()[0], LABELS), "updated_at": "2026-02-01", "lead_time": 9.5}
    both = read_masks(ls_file(path, ls_task(annotations=[last, first])), labels=LABELS)
    assert (both.rows[0].mask == hard()[0]).all() and both.rows[0].seconds == 9.5
    changed = {"result": brush_results(hard()[0], LABELS, origin="prediction-changed"), "parent_prediction": 3}
    assert read_masks(ls_file(path, ls_task(annotations=[changed]))).rows[0].by == "corrected"
    with pytest.raises(ConfigError, match="no class 'cat'"):
        read_masks(ls_file(path, ls_task()), labels=LabelSpace(("background", "cats")))
    size = {"original_width": 10, "original_height": 10}
    other = ls_task(annotations=[{"result": [{**brush_results(hard()[0], LABELS)[0], **size}]}])
    with pytest.raises(DataError, match="no picture of 10 x 10"):
        _ = read_masks(ls_file(path, other)).rows[0].mask
    triangle = {"points": [[0, 0], [100, 0], [0, 100]], "polygonlabels": ["cat"]}
    polygon = [{"id": "p", "type": "polygonlabels", "value": triangle, **size}]
    assert 40 <= read_masks(ls_file(path, ls_task(annotations=[{"result": polygon}]))).rows[0].mask.sum() <= 60
    box = {"x": 0, "y": 0, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["cat"]}
    boxed = ls_task(annotations=[{"result": [*polygon, {"id": "b", "type": "rectanglelabels", "value": box, **size}]}])
    assert read_masks(ls_file(path, boxed)).note.startswith("1 boxes")
    nameless = [
        {k: v for k, v in brush_results(hard()[0], LABELS)[0].items() if k != "value"} | {"value": {"rle": [1]}}
    ]
    with pytest.raises(DataError, match="no label"):
        mask_of_results(nameless, LABELS, (40, 61))


def test_coco_files_that_were_put_together(tmp_path: Path) -> None:
    """Two images or two classes of one id: the regions of one would become those of the other."""
    ours = MaskSet(LABELS, [MaskRow("a", hard()[0]), MaskRow("b", hard()[4])])
    (file,) = write_masks(ours, tmp_path / "out", "coco").glob("annotations/*.json")
    good = json.loads(file.read_text())
    for what, name in (("images", "file_name"), ("categories", "name")):
        bad = json.loads(json.dumps(good))
        bad[what][1]["id"] = bad[what][0]["id"]
        bad["annotations"] = [part for part in bad["annotations"] if part["image_id"] == good["images"][0]["id"]]
        file.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=f"{what} '{good[what][0][name]}' and '{good[what][1][name]}' have one id"):
            read_masks(tmp_path / "out")
    good["categories"].append(good["categories"][1])  # the same once more does no harm
    file.write_text(json.dumps(good))
    same(ours, read_masks(tmp_path / "out", labels=LABELS))


def test_what_encloses_nothing_is_nothing(tmp_path: Path) -> None:
    """Two clicks of a polygon that nobody has gone on with, in every tool."""
    square = [[0, 0], [4, 0], [4, 4], [0, 4]]
    assert (decode_coco([[1, 1, 3, 3], sum(square, [])], (8, 8)) == decode_coco([sum(square, [])], (8, 8))).all()
    file = tmp_path / "annotations.xml"
    for points, empty in ((square, False), (square[:2], True), ([], True)):
        value = {"points": [[12.5 * x, 12.5 * y] for x, y in points], "polygonlabels": ["cat"]}
        size = {"original_width": 8, "original_height": 8}
        result = [{"id": "p", "type": "polygonlabels", "value": value, **size}]
        assert (mask_of_results(result, LABELS, (8, 8)).max() == 0) == empty
        text = ";".join(f"{x},{y}" for x, y in points)
        image = f'<image name="a.jpg" width="8" height="8"><polygon label="cat" points="{text}"/></image>'
        file.write_text(f"<annotations>{image}</annotations>")
        if points:
            assert (read_masks(file).rows[0].mask.max() == 0) == empty
    with pytest.raises(DataError, match="in percent of the picture"):
        mask_of_results([{**result[0], "value": {"polygonlabels": ["cat"]}}], LABELS, (8, 8))
    file.write_text("<annotations>" + image.replace("/>", ' z_order="top"/>', 1) + "</annotations>")
    with pytest.raises(DataError, match="z_order is a whole number"):
        _ = read_masks(file).rows[0].mask
    file.write_text('<annotations><label><name>cat</name></label><track label="cat"/></annotations>')
    with pytest.raises(DataError, match="1 tracks were left out, export a video as 'CVAT for images 1.1'"):
        read_masks(file)


@pytest.mark.parametrize("ids", [None, "r"])  # as scripts write predictions: without ids, or with one for all
def test_a_region_of_label_studio_has_its_own_label(ids: str | None, tmp_path: Path) -> None:
    """What stands in a region counts; by its id a label is found only where a brush has none itself."""
    mask = hard()[0]
    results = brush_results(mask, LABELS)
    assert len(results) > 2
    same = [{key: value for key, value in result.items() if key != "id"} for result in results]
    same = [result | ({} if ids is None else {"id": ids}) for result in same]
    assert (mask_of_results(same, LABELS, mask.shape) == mask).all()
    read = read_masks(ls_file(tmp_path / "export.json", ls_task(annotations=[{"result": same}])), labels=LABELS)
    assert (read.rows[0].mask == mask).all()
    apart = [{**r, "type": "brush", "value": {"format": "rle", "rle": r["value"]["rle"]}} for r in results]
    named = [{**r, "type": "labels", "value": {"labels": r["value"]["brushlabels"]}} for r in results]
    assert (mask_of_results([*named, *apart], LABELS, mask.shape) == mask).all()
    both = [{**results[0], "value": {**results[0]["value"], "brushlabels": ["cat", "dog"]}}]
    with pytest.raises(DataError, match=r"2 labels \(cat, dog\)"):
        mask_of_results(both, LABELS, mask.shape)


def test_cvat_of_others(tmp_path: Path) -> None:
    """z_order decides, boxes are counted, polygons are drawn."""
    path = tmp_path / "annotations.xml"
    below = '<polygon label="cat" points="0,0;8,0;8,8;0,8" z_order="1"/>'
    above = '<mask label="dog" source="manual" rle="0, 4" left="2" top="2" width="2" height="2" z_order="2"/>'
    box = '<box label="cat" xtl="0" ytl="0" xbr="1" ybr="1"/>'
    image = f'<image id="0" name="x/a.jpg" width="8" height="8">{above}{below}{box}</image>'
    path.write_text(f"<annotations>{image}</annotations>")
    read = read_masks(path)
    assert read.note.startswith("1 boxes") and read.labels.names == ("background", "dog", "cat")
    assert read.rows[0].mask[2:4, 2:4].tolist() == [[1, 1], [1, 1]] and (read.rows[0].mask == 2).sum() == 60
    outside = image.replace('left="2"', 'left="7"')
    path.write_text(f"<annotations>{outside}</annotations>")
    with pytest.raises(DataError, match="do not fill the box"):
        _ = read_masks(path).rows[0].mask


def test_what_is_refused(tmp_path: Path) -> None:
    ours = MaskSet(LABELS, [MaskRow("a", hard()[0])])
    cases = [
        (lambda: read_masks(tmp_path / "none"), "no such file"),
        (lambda: read_masks(tmp_path), "say format="),
        (lambda: read_masks(tmp_path, "coco"), "no COCO file"),
        (lambda: write_masks(ours, tmp_path / "o", "cocos"), "Did you mean 'coco'"),
        (lambda: write_masks(ours, tmp_path / "o", "coco", splits="x"), "no option 'splits'"),
        (lambda: write_masks(MaskSet(LABELS, []), tmp_path / "o", "coco"), "no masks"),
        (lambda: write_masks(MaskSet(LABELS, [*ours.rows] * 2), tmp_path / "o", "coco"), "two masks"),
        (lambda: write_masks(MaskSet(LABELS, [MaskRow("../a", hard()[0])]), tmp_path / "o", "coco"), "no id"),
        (lambda: write_masks(MaskSet(LABELS, [MaskRow("a", hard()[0] + 9)]), tmp_path / "o", "voc"), "means no class"),
        (lambda: write_masks(MaskSet(LABELS, [MaskRow("a", hard()[0], by="me")]), tmp_path / "o", "voc"), "by='me'"),
    ]
    for call, words in cases:
        with pytest.raises(VlmItlError, match=words):
            call()
        assert not [*tmp_path.iterdir()]
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="61x40"):
        write_masks(MaskSet(LABELS, [MaskRow("a", hard()[0], tmp_path / "small.png")]), tmp_path / "o", "coco")


def test_a_photograph_on_its_side_is_written_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.jpg", exif=exif)
    ours = MaskSet(LABELS, [MaskRow("a", np.zeros((6, 4), np.uint8), tmp_path / "a.jpg")])
    out = write_masks(ours, tmp_path / "out", "voc")
    with Image.open(out / "JPEGImages" / "a.png") as upright:
        assert upright.size == (4, 6)


def test_what_is_written_can_be_learnt_from(tmp_path: Path) -> None:
    """`load_data` reads the three that are data sets to it, and finds the same masks."""
    ours = with_images([*hard()[:1] * 8], LABELS, tmp_path / "photographs")
    for word in ("voc", "huggingface"):
        out = write_masks(ours, tmp_path / word, word)
        data = load_data(out, val_share=1, leaks="off")
        assert data.labels.names == LABELS.names
        assert all((row["mask"] == hard()[0]).all() for split in data.splits.values() for row in split)


def test_a_format_of_your_own(tmp_path: Path) -> None:
    before = FORMATS.keep()

    class Text(MaskFormat):
        "One line a mask."

        def recognises(self, path: Path) -> bool:
            return path.suffix == ".masks"

        def read(self, path: Path) -> MaskSet:
            rows = [np.array([list(map(int, line.split()))], np.uint8) for line in path.read_text().splitlines()]
            return MaskSet(LABELS, [MaskRow(str(n), mask) for n, mask in enumerate(rows)])

        def write(self, masks: MaskSet, folder: Path) -> None:
            raise NotImplementedError

    try:
        register_format("text-lines")(Text)
        (tmp_path / "x.masks").write_text("0 1 2\n")
        assert read_masks(tmp_path / "x.masks").rows[0].mask.tolist() == [[0, 1, 2]]
        with pytest.raises(ConfigError, match="class over MaskFormat"):
            register_format("other")(dict)  # type: ignore[arg-type]
    finally:
        before()


def test_polygons_of_datumaro_are_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Datumaro hands out of files of COCO or CVAT: polygons were left out, and the mask was empty."""

    def part(kind: str, z: int = 0, **more: Any) -> Any:
        return SimpleNamespace(type=SimpleNamespace(name=kind), label=0, z_order=z, **more)

    square = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
    parts = [part("polygon", 1, points=square), part("bbox")]
    photo = SimpleNamespace(path="a.jpg", size=(8, 9))
    items = [SimpleNamespace(id="a", annotations=parts, media=photo, attributes={})]
    items += [SimpleNamespace(id="b", annotations=parts[:1], media=None, attributes={})]

    class Read(list[Any]):
        def categories(self) -> Any:
            return {"label": [SimpleNamespace(name="cat")]}

        def infos(self) -> Any:
            return {}

    package = SimpleNamespace(
        Dataset=SimpleNamespace(import_from=lambda *where: Read(items)), AnnotationType=SimpleNamespace(label="label")
    )
    monkeypatch.setattr("vlm_itl.formats.libraries._datumaro", lambda: package)
    found = read_masks(tmp_path, "datumaro", layout="coco")
    assert (found.rows[0].mask == decode_coco([square], (8, 9))).all() and found.note.startswith("1 boxes")
    with pytest.raises(DataError, match="b: nothing says how large it is"):
        _ = found.rows[1].mask


def test_datumaro_is_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    try:
        import datumaro  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install datumaro"):
            write_masks(MaskSet(LABELS, [MaskRow("a", hard()[0])]), tmp_path / "out", "datumaro")
    else:
        pytest.skip("datumaro is installed")


def test_push_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to `datasets` and to the Hub's client, and what is said where they refuse."""
    import datasets
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    def push(self: Any, repo: str, private: bool = False) -> Any:
        calls.append((repo, {**self["train"][0], "private": private}))
        return type("Commit", (), {"commit_url": f"https://example.org/{repo}"})()

    def upload(self: Any, **what: Any) -> None:
        calls.append((what["path_in_repo"], Path(what["path_or_fileobj"]).read_text(encoding="utf-8")))

    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", push)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", upload)
    ours = with_images(hard()[:2], LABELS, tmp_path / "photographs")
    assert push_masks(ours, "anna/cats") == "https://example.org/anna/cats"
    (repo, row), (first, names), (second, _) = calls
    assert repo == "anna/cats" and row["private"] and row["by"] == "human" and row["seconds"] == 61.25
    assert (np.asarray(row["mask"]) == hard()[0]).all() and row["image"].size == (61, 40)
    assert (first, second) == ("id2label.json", "labelmap.txt") and json.loads(names)["1"] == "cat"

    def refuse(self: Any, repo: str, private: bool = False) -> Any:
        raise OSError("403 Forbidden\nmore lines")

    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", refuse)
    with pytest.raises(ConfigError, match="did not take the data set .OSError: 403 Forbidden."):
        push_masks(ours, "anna/cats")


@pytest.mark.parametrize("word", ["coco", "cvat", "labelstudio"])
def test_the_hint_for_a_tools_folder_is_a_call_that_works(word: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A folder given as a data set is refused with a command; after that command it is a data set."""
    ours = with_images([*hard()[:1] * 8], LABELS, tmp_path / "photographs")
    out = write_masks(ours, tmp_path / "out", word)
    (out / "label_config.xml").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="read_masks") as refused:
        load_data(out)
    call = str(refused.value).split('python -c "')[1].split('"; then')[0]
    exec(call, {})
    data = load_data("my_masks", val_share=1, leaks="off")
    assert data.labels.names == LABELS.names
    assert all((row["mask"] == hard()[0]).all() for split in data.splits.values() for row in split)
    (file,) = [path for path in out.rglob("*") if path.suffix in (".json", ".xml")]
    with pytest.raises(DataError, match="is a file.*read_masks"):
        load_data(file)


def test_proposals_from_a_file_of_another_tool(tmp_path: Path) -> None:
    toy = toy_images()
    rows = [MaskRow(row["id"], row["mask"], by="judge", p_yes=0.25) for row in toy.train]
    path = write_masks(MaskSet(toy.labels, rows[1:]), tmp_path / "ls", "labelstudio") / "tasks.json"
    folder = make_proposer("folder", path=str(path), format="labelstudio")
    store = MaskStore(tmp_path / "store", toy.labels)
    made = folder.propose(toy.train.remove_columns("mask"), store)
    assert sorted(made) == ["toy-1", "toy-2", "toy-3"] and made["toy-1"].score == 0.25
    assert all((store[row.id] == row.mask).all() for row in rows[1:])
    before = make_proposer("folder", path=str(path), format="labelstudio").stamps(["toy-1", "toy-2"])
    assert before == folder.stamps(["toy-1", "toy-2"])
    path.write_text(path.read_text().replace('"toy-1"', '"toy-9"').replace("toy-1.png", "toy-0.png"))
    after = make_proposer("folder", path=str(path), format="labelstudio").stamps(["toy-0", "toy-1", "toy-2"])
    assert sorted(after) == ["toy-0", "toy-2"] and after["toy-2"] == before["toy-2"]
    with pytest.raises(ConfigError, match="format='cocos'"):
        make_proposer("folder", path=str(path), format="cocos")
    with pytest.raises(ConfigError, match="says itself"):
        make_proposer("folder", path=str(path), format="coco", classes=["a", "b"])
    small = [MaskRow("toy-1", np.ones((4, 4), np.uint8))]
    path = write_masks(MaskSet(toy.labels, small), tmp_path / "small", "coco")
    with pytest.raises(DataError, match="4x4"):
        make_proposer("folder", path=str(path), format="coco").propose(toy.train.remove_columns("mask"), store)


# --- what a run has labelled


def new_run(folder: Path, **more: Any) -> Path:
    plan = {"initial": 1, "increment": 1, "max_labelled": 2, "steps": 2, "batch_size": 2, "image_size": 32}
    list(run_al(make_config(dataset="toy", output_dir=str(folder), **{**plan, **more})))
    return folder


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, toy = tmp_path_factory.mktemp("run"), toy_images()
    truth = [MaskRow(row["id"], row["mask"]) for split in toy.splits.values() for row in split]
    proposed = {"path": str(write_masks(MaskSet(toy.labels, truth), place / "coco", "coco")), "format": "coco"}
    more = {"mode": "vlm", "judge": "mock", "judge_options": {"accuracy": 1.0}}
    return new_run(place / "run", **more, proposer="folder", proposer_options=proposed)


def test_a_run_is_exported(judged_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People's masks are those of the data set, accepted ones those of the last round; nothing else is there."""
    records = [json.loads(line) for line in (judged_run / "rounds.jsonl").read_text().splitlines()]
    human = {*records[0]["start_ids"], *(i for r in records for i in r["selection"]["ids"])}
    accepted = {*records[0]["pseudo_ids"]} - human
    assert main(["export", str(judged_run), "--format", "voc", "--out", str(tmp_path / "out"), "-o", "split=all"]) == 0
    assert f"{len(human)} human" in capsys.readouterr().out
    read = {row.id: row for row in read_masks(tmp_path / "out", labels=toy_images().labels)}
    assert accepted and {i for i, row in read.items() if row.by == "human"} == human
    assert {i for i, row in read.items() if row.by == "judge"} == accepted and sorted(read) == sorted(human | accepted)
    truth = {row["id"]: row["mask"] for row in toy_images().train}
    assert all((read[i].mask == truth[i]).all() for i in human)
    assert all((read[i].mask == truth[i]).all() for i in accepted)
    assert all(read[i].who == "mock" and read[i].p_yes is not None for i in accepted)
    assert (tmp_path / "out" / "ImageSets" / "Segmentation" / "all.txt").is_file()


def test_a_run_whose_goal_was_the_data_set_is_exported(judged_run: Path, tmp_path: Path) -> None:
    """`labels/` counts, with its lines."""
    run = tmp_path / "run"
    shutil.copytree(judged_run, run)
    store, truth = MaskStore(run / "labels" / "masks", toy_images().labels), {}
    lines = []
    for number, row in enumerate(toy_images().train):
        truth[row["id"]] = row["mask"]
        store.write(row["id"], row["mask"])
        by = ("human", "judge", "verified", "corrected")[number]
        told = {"judge": "mock", "p_yes": 0.75, "human_seconds": 2.0 * number}
        lines.append({"id": row["id"], "by": by, "proposer": "own", **told})
    (run / "labels" / "provenance.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "labels" / "labels.json").write_text("{}")
    out, masks = export_run(run, "labelstudio", tmp_path / "out")
    read = {row.id: row for row in read_masks(out, labels=masks.labels)}
    assert all((read[i].mask == mask).all() for i, mask in truth.items()) and len(read) == 4
    assert read["toy-0"].provenance == {"by": "human", "seconds": 0.0}
    assert read["toy-1"].provenance == {"by": "judge", "who": "mock", "p_yes": 0.75, "seconds": 2.0}
    assert read["toy-3"].provenance == {"by": "corrected", "seconds": 6.0}


def test_a_run_on_pictures_that_repeat_is_exported(tmp_path: Path) -> None:
    """Copies of a picture stay in one split, so what looks for them decides which images are the pool."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "classes.txt").write_text("background\nthing\n")
    for number in range(8):
        pixels, mask = rng.integers(0, 255, (24, 32, 3), np.uint8), np.zeros((24, 32), np.uint8)
        mask[number : number + 9, 3:20] = 1
        for copy in ("a", "b"):
            Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{copy}{number}.png")
            Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{copy}{number}.png")
    plan: dict[str, Any] = {
        "steps": 1,
        "batch_size": 2,
        "image_size": 32,
        "gallery": 0,
        "test_share": 4,
        "val_share": 4,
    }
    for seed in range(3):
        run = tmp_path / f"run-{seed}"
        settings = make_config(plan, dataset=str(tmp_path / "data"), seed=seed, output_dir=str(run), mode="baseline")
        (record,) = run_baseline(settings)
        found = {row.id: row.mask[int(row.id[1]), 3] for row in run_masks(run)}
        assert found == dict.fromkeys(record.start_ids, 1) and len(found) == 8


def test_what_cannot_be_exported_is_told(judged_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(tmp_path), "--format", "coco", "--out", str(tmp_path / "x")], "is no run folder"),
        ([str(judged_run), "--format", "cocos", "--out", str(tmp_path / "x")], "Did you mean 'coco'"),
        ([str(judged_run), "--format", "coco"], "--out"),
        ([str(judged_run), "--format", "coco", "--out", str(judged_run)], "holds something already"),
        ([str(judged_run), "--format", "coco", "--out", str(tmp_path / "x"), "-o", "split"], "NAME=VALUE"),
    ):
        assert main(["export", *arguments]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
    assert not [*tmp_path.iterdir()]
    shutil.copytree(judged_run, tmp_path / "run")
    card = json.loads((tmp_path / "run" / "data.json").read_text())
    (tmp_path / "run" / "data.json").write_text(json.dumps(card | {"labels": ["a", "b", "c"]}))
    with pytest.raises(RunError, match="other classes"):
        run_masks(tmp_path / "run")


# --- real photographs, and the tools themselves


def voc_root() -> Path:
    shared = os.environ.get("VLM_ITL_SHARED", "")
    root = Path(shared) / "data" / "VOCdevkit" / "VOC2012"
    if not shared or not root.is_dir():
        pytest.skip("VLM_ITL_SHARED names no folder with data/VOCdevkit/VOC2012")
    return root


def real(count: int | None) -> MaskSet:
    read = read_masks(voc_root(), "voc", classes="voc")
    return MaskSet(read.labels, read.rows[:count])


@pytest.mark.parametrize("word", ROUND)
def test_real_photographs(word: str, tmp_path: Path) -> None:
    ours = real(3)
    same(ours, read_masks(write_masks(ours, tmp_path / "out", word), labels=LabelSpace.voc()))


@pytest.mark.slow
@pytest.mark.parametrize("word", ROUND)
def test_all_real_photographs(word: str, tmp_path: Path) -> None:
    ours = real(None)
    assert len(ours) > 800
    same(ours, read_masks(write_masks(ours, tmp_path / "out", word), labels=LabelSpace.voc()))


@pytest.mark.slow
@pytest.mark.parametrize("word", ROUND)
def test_large_photographs(word: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.kron(rng.choice([0, 1, 2, 4, VOID], (300, 400)), np.ones((10, 10))).astype(np.uint8)
    mask[::97], mask[1500, 2000] = 3, 4  # thin lines, and one pixel
    Image.fromarray(np.zeros((3000, 4000, 3), np.uint8)).save(tmp_path / "a.jpg")
    ours = MaskSet(LABELS, [MaskRow("a", mask, tmp_path / "a.jpg")])
    same(ours, read_masks(write_masks(ours, tmp_path / "out", word)))


def tools(*arguments: str | Path) -> None:
    """Run the tools' own libraries; `VLM_ITL_TOOLS` is the Python of an environment that has them."""
    python = os.environ.get("VLM_ITL_TOOLS", "")
    if not python:
        pytest.skip("VLM_ITL_TOOLS names no Python with label-studio-sdk, cvat-sdk and datumaro")
    script = Path(__file__).parent / "format_tools.py"
    done = subprocess.run([python, script, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def check_regions(path: Path, ours: MaskSet, without: tuple[str, ...] = (), void: str = "void") -> None:
    """What a tool has read is what the masks hold, class by class."""
    read, expected = np.load(path), {}
    for row in ours:
        for value in np.unique(row.mask).tolist():
            name = void if value == VOID else ours.labels.names[value]
            if name not in without:
                expected[f"{row.id}|{name}"] = row.mask == value
    assert sorted(read.files) == sorted(expected)
    assert all((read[name] == region).all() for name, region in expected.items())


def test_pycocotools_reads_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    ours = with_images(hard(), LABELS, tmp_path / "photographs")
    (path,) = write_masks(ours, tmp_path / "out", "coco").rglob("*.json")
    coco = COCO(str(path))
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    rows = {row.id: row.mask for row in ours}
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = rows[Path(coco.imgs[annotation["image_id"]]["file_name"]).stem]
        name = names[annotation["category_id"]]
        region = mask == (VOID if name == "void" else LABELS.names.index(name))
        assert (coco.annToMask(annotation) == region).all() and annotation["area"] == region.sum()
    assert len(coco.getAnnIds()) == sum(len({*np.unique(mask)} - {0}) for mask in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["hard", "real"])
@pytest.mark.parametrize(
    ("word", "layout", "void"),
    [("voc", "voc_segmentation", "ignored"), ("cvat-masks", "voc_segmentation", "ignored"), ("coco", "coco", "void")]
    + [("cvat", "cvat", "void")],
)
def test_datumaro_reads(source: str, word: str, layout: str, void: str, tmp_path: Path) -> None:
    ours = with_images(hard(), LABELS, tmp_path / "photographs") if source == "hard" else real(40)
    out = write_masks(ours, tmp_path / "out", word)
    if word == "cvat-masks":
        zipfile.ZipFile(out / "segmentation_mask.zip").extractall(out)
    tools("read-datumaro", layout, out, tmp_path / "read.npz")
    check_regions(tmp_path / "read.npz", ours, () if layout == "voc_segmentation" else ("background",), void)


@pytest.mark.slow
def test_datumaro_reads_cityscapes(tmp_path: Path) -> None:
    ours = with_images(hard(), LabelSpace(("road", "person", "sky", "car", "bicycle")), tmp_path / "photographs")
    tools("read-datumaro", "cityscapes", write_masks(ours, tmp_path / "out", "cityscapes"), tmp_path / "read.npz")
    check_regions(tmp_path / "read.npz", ours, ("void",))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["hard", "real"])
def test_label_studio_and_cvat_read(source: str, tmp_path: Path) -> None:
    ours = with_images(hard(), LABELS, tmp_path / "photographs") if source == "hard" else real(6)
    people = MaskSet(ours.labels, [row for row in ours if row.by != "judge"])  # predictions are not converted
    tools("read-labelstudio", write_masks(people, tmp_path / "ls", "labelstudio"), tmp_path / "ls.npz")
    check_regions(tmp_path / "ls.npz", people, ("background",))
    xml = write_masks(ours, tmp_path / "cvat", "cvat") / "annotations.xml"
    tools("read-cvat", xml, tmp_path / "cvat.npz")
    check_regions(tmp_path / "cvat.npz", ours, ("background",))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["coco_instances", "cvat", "voc_segmentation", "datumaro", "labelstudio"])
def test_we_read_what_tools_write(layout: str, tmp_path: Path) -> None:
    masks = {f"im-{n}": np.where(mask == VOID, 0, mask) for n, mask in enumerate([hard()[0], hard()[4], hard()[2]])}
    np.savez(tmp_path / "masks.npz", names=np.array(LABELS.names), **masks)
    if layout == "labelstudio":
        tools("write-labelstudio", tmp_path / "masks.npz", tmp_path / "out.json")
        again = read_masks(tmp_path / "out.json", labels=LABELS)
        assert {(row.who, row.seconds, row.by) for row in again} == {("anna@example.org", 31.5, "human")}
    else:
        tools("write-datumaro", layout, tmp_path / "masks.npz", tmp_path / "out")
        options = {"crowd": "class"} if layout == "coco_instances" else {}  # Datumaro marks every RLE as a crowd
        out, ours = tmp_path / "out", layout != "datumaro"
        again = read_masks(out, labels=LABELS, **options) if ours else with_datumaro(out, LABELS)
    same(MaskSet(LABELS, [MaskRow(name, mask) for name, mask in masks.items()]), MaskSet(LABELS, [
        MaskRow(row.id, row.mask) for row in again
    ]))  # fmt: skip


def with_datumaro(path: Path, labels: LabelSpace) -> MaskSet:
    """Read with our format 'datumaro' in a process that has its package behind our own ones."""
    code = f"""
import sys, numpy as np
sys.path.append({site_of_tools()!r})
from vlm_itl.data.labels import LabelSpace
from vlm_itl.formats import read_masks
read = read_masks({str(path)!r}, labels=LabelSpace({labels.names!r}))
np.savez({str(path / "read.npz")!r}, **{{row.id: row.mask for row in read}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    read = np.load(path / "read.npz")
    return MaskSet(labels, [MaskRow(name, read[name]) for name in read.files])


def site_of_tools() -> str:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.run([os.environ["VLM_ITL_TOOLS"], "-c", code], capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_datumaro_round_trip(tmp_path: Path) -> None:
    """Our format 'datumaro', both ways, and Datumaro reads it."""
    if not os.environ.get("VLM_ITL_TOOLS"):
        pytest.skip("VLM_ITL_TOOLS names no Python with datumaro")
    ours = with_images(hard(), LABELS, tmp_path / "photographs")
    write_masks(ours, tmp_path / "in", "huggingface")
    code = f"""
import sys
sys.path.append({site_of_tools()!r})
from vlm_itl.formats import read_masks, write_masks
first = read_masks({str(tmp_path / "in")!r})
second = read_masks(write_masks(first, {str(tmp_path / "dm")!r}, "datumaro"))
assert second.labels.names == first.labels.names
write_masks(second, {str(tmp_path / "back")!r}, "huggingface")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    same(ours, read_masks(tmp_path / "back"))
    tools("read-datumaro", "datumaro", tmp_path / "dm", tmp_path / "read.npz")
    check_regions(tmp_path / "read.npz", ours, ("background",))


@pytest.mark.parametrize("word", ["coco", "cvat", "labelstudio", "voc", "huggingface"])
@pytest.mark.parametrize("whole", [("sky", "tree"), ("cat", "background", "dog"), ("background", "cat")])
def test_a_binary_space_reads_foregrounds_and_what_they_are_made_of(tmp_path: Path, word: str, whole: tuple[str, ...]):
    """Class 0 is the background where none is called so, as `LabelSpace.binary` says; it was taken for foreground."""
    space, mask = LabelSpace(whole), np.array([[0, 1], [1, 0]], np.uint8)
    ground = space.label2id.get("background", 0)
    write_masks(MaskSet(space, [MaskRow("a", mask)]), tmp_path / "whole", word)
    (row,) = read_masks(tmp_path / "whole", word, space.binary()).rows
    assert (row.mask == (mask != ground)).all()
    write_masks(MaskSet(LabelSpace(("background", "foreground")), [MaskRow("a", mask)]), tmp_path / "merged", word)
    (row,) = read_masks(tmp_path / "merged", word, space.binary()).rows
    assert (row.mask == mask).all()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"photo": "s3://mine/cats/cat.jpg"}, "cat"),
        ({"text": "a cat", "url": "https://x.org/cat.jpg?X-Amz-Expires=1"}, "cat"),
        ({"img": "/data/upload/3/0123abcd-cat.png"}, "cat"),
        ({"image": "/data/local-files/?d=cats/cat.jpg"}, "cat"),
        ({"text": "a cat"}, "task-7"),
    ],
)
def test_a_task_of_label_studio_is_called_like_its_photograph(tmp_path: Path, data: dict[str, str], name: str):
    """Whatever the field of the photograph is called: only 'image' was looked into."""
    told = brush_results(np.ones((2, 2), np.uint8), LabelSpace(("background", "cat")))
    (tmp_path / "a.json").write_text(json.dumps([{"id": 7, "data": data, "annotations": [{"result": told}]}]))
    assert [row.id for row in read_masks(tmp_path / "a.json", "labelstudio")] == [name]


@pytest.mark.parametrize("word", ["coco", "cvat", "labelstudio"])
@pytest.mark.parametrize("name", ["void", "ignore", "Unlabeled"])
def test_a_class_is_not_lost_by_its_name(tmp_path: Path, word: str, name: str):
    """Files of regions call void so: such a class came back as void, from our own files and from those of tools."""
    space, mask = LabelSpace(("background", name)), np.array([[0, 1], [1, 0]], np.uint8)
    masks = MaskSet(space, [MaskRow("a", mask)])
    with pytest.raises(ConfigError, match=f"the class '{name}' would become void, as files of {word}"):
        write_masks(masks, tmp_path / "out", word)
    write_masks(MaskSet(LabelSpace(("background", "cat")), [MaskRow("a", mask)]), tmp_path / "cat", word)
    with pytest.raises(ConfigError, match="give it another name"):
        read_masks(tmp_path / "cat", word, space)
    (row,) = read_masks(write_masks(masks, tmp_path / "voc", "voc"), labels=space).rows
    assert (row.mask == mask).all() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("zipped", [False, True])
def test_rows_of_a_zip_outlive_their_set(tmp_path: Path, zipped: bool):
    """`for row in read_masks("export.zip")` lost the unpacked files at once: no such file."""
    masks = {row["id"]: row["mask"] for row in toy_images().train}
    rows = [MaskRow(name, mask, by="human") for name, mask in masks.items()]
    folder = write_masks(MaskSet(toy_images().labels, rows), tmp_path / "out", "voc" if zipped else "cvat-masks")
    path = Path(shutil.make_archive(str(tmp_path / "all"), "zip", folder)) if zipped else folder
    assert all((row.mask == masks[row.id]).all() for row in read_masks(path))
    listed = list(read_masks(path, labels=toy_images().labels))
    assert all((row.mask == masks[row.id]).all() and row.by == "human" for row in listed)


def test_rows_are_written_for_datasets_without_being_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`datasets` hashed every closure and the code behind it, a tenth of a second for each mask."""
    import dis

    count, real = [0], dis.dis
    monkeypatch.setattr(dis, "dis", lambda *given, **more: (count.__setitem__(0, count[0] + 1), real(*given, **more)))
    rows = [MaskRow(f"a-{n}", lambda: np.ones((2, 2), np.uint8)) for n in range(20)]
    masks = MaskSet(LabelSpace(("background", "cat")), rows)
    write_masks(masks, tmp_path / "out", "huggingface")
    assert len(read_masks(tmp_path / "out")) == 20 and count[0] < 20
    twice = [to_datasets(one, tmp_path / "cache") for one in (masks, replace(masks, rows=rows[:3]))]
    assert [len(one["train"]) for one in twice] == [20, 3]  # in one cache, and not mixed up


def test_what_is_wrong_with_a_row_is_said_by_every_format(tmp_path: Path):
    masks = MaskSet(LabelSpace(("background", "cat")), [MaskRow("a", np.full((2, 2), 9, np.uint8))])
    for word in ROUND:
        with pytest.raises(DataError, match="mask value 9 at row 0, column 0 means no class"):
            write_masks(masks, tmp_path / word, word)


def test_exports_of_label_studio_that_hold_no_region_say_so(tmp_path: Path):
    """JSON-MIN is recognised, and refused by its name; nothing painted anywhere asks for the classes."""
    path = tmp_path / "export.json"
    tag = [{"format": "rle", "rle": [0, 1], "brushlabels": ["cat"], "original_width": 8, "original_height": 6}]
    smallest = {"id": 1, "image": "/upload/a.png", "tag": tag, "annotator": 1, "annotation_id": 3, "lead_time": 3.2}
    path.write_text(json.dumps([smallest]))
    for word in (None, "labelstudio"):
        with pytest.raises(DataError, match="export the project as JSON \\(not JSON-MIN\\)"):
            read_masks(path, word)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    path.write_text(json.dumps([{"id": 1, "data": {"image": "/a.png"}, "annotations": [{"id": 1, "result": []}]}]))
    with pytest.raises(DataError, match="nothing is painted in any annotation.*say classes="):
        read_masks(path)
    assert (read_masks(path, classes=["background", "cat"]).rows[0].mask == 0).all()
