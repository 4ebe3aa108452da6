"""Regions: covers, scores against brute force, choices without overlap, partial labels that are paid, whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.measure import label as connected_parts

from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.labels import VOID
from vlm_itl.data.masks import MaskStore, row_ids
from vlm_itl.data.scenes import make_scenes
from vlm_itl.data.sources import load_data
from vlm_itl.experiment.annotator import Oracle, training_rows
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.human_turn import policy_groups, spent_pixels
from vlm_itl.experiment.loop import run_al
from vlm_itl.experiment.pool import Ledger, Pool, read_ledger
from vlm_itl.model.doubt import uncertainty_maps
from vlm_itl.model.metrics import image_iou
from vlm_itl.model.predict import Inference, predict_batches
from vlm_itl.model.scoring import PoolScores, score_pool
from vlm_itl.model.segmenter import load_model
from vlm_itl.reports.report import round_table
from vlm_itl.reports.run_figures import plot_learning_curve
from vlm_itl.sampler.gradient import GradientProbe
from vlm_itl.sampler.region_choice import cell_weights, choose_regions, name_regions, score_regions
from vlm_itl.sampler.regions import (
    REGIONS,
    Regions,
    count_clicks,
    cover_of_parts,
    region_id,
    region_label,
    register_regions,
    slic_cover,
    split_region,
    window_cover,
)
from vlm_itl.sampler.strategy import SELECTS, Sampler, parse_strategy

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("slic", {"count": 20}),
    ("window", {"side": 30}),
    ("window", {"side": 30, "stride": 20}),
]
TINY: dict[str, Any] = {
    "model": "segformer-nano",
    "proposer": "own",
    "steps": 3,
    "batch_size": 4,
    "image_size": 48,
    "initial": 4,
    "increment": 2,
    "max_labelled": 8,
    "gallery": 2,
    "val_share": 4,
    "keep_models": "all",
    "test_every_round": False,
    "unit": "region",
    "region_options": {"count": 20},
}


def pictures() -> list[Image.Image]:
    """Odd sizes, one colour, one pixel."""
    rng = np.random.default_rng(0)
    noisy = Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8))
    sizes = [(1, 1), (1, 30), (30, 1), (2, 2), (90, 64)]
    return [noisy, noisy.convert("L").convert("RGB"), *(Image.new("RGB", size, (9, 80, 200)) for size in sizes)]


# ---- covers


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_pixel_has_a_region(kind: str, options: dict[str, Any]):
    for image in pictures():
        cover = REGIONS[kind](image, **options)
        again = REGIONS[kind](image, **options)
        masks = np.array([cover.mask(i) for i in range(len(cover))])
        assert masks.any(0).all() and masks.shape[1:] == (image.height, image.width)
        assert (masks.sum((1, 2)) == cover.areas()).all() and (cover.areas() > 0).all()
        assert (masks == np.array([again.mask(i) for i in range(len(again))])).all()
        if kind == "slic" or "stride" not in options:
            assert (masks.sum(0) == 1).all()
        for mask, (top, left, bottom, right) in zip(masks, cover.boxes, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
        with pytest.raises(DataError, match="no region"):
            cover.mask(len(cover))


def test_superpixels_are_in_one_piece(voc: Path):
    data = load_data(str(voc), options={"max_train": 4, "max_test": 2}, val_share=1)
    for row in data.train:
        cover = slic_cover(row["image"], count=60)
        assert 30 <= len(cover) <= 90
        assert all(connected_parts(cover.mask(i), connectivity=2).max() == 1 for i in range(len(cover)))


def test_a_kind_of_ones_own_is_one_function():
    @register_regions("halves")
    def halves(image: Image.Image) -> Any:
        parts = np.zeros((image.height, image.width), int)
        parts[:, image.width // 2 :] = 1
        return cover_of_parts(parts)

    try:
        assert REGIONS["halves"](Image.new("RGB", (4, 2))).areas().tolist() == [4, 4]
    finally:
        del REGIONS["halves"]


def test_names():
    assert split_region(region_id("2007_000032", 12)) == ("2007_000032", 12)
    for wrong in ("image", "image#", "image#x", "#"):
        with pytest.raises(DataError, match="not the name of a region"):
            split_region(wrong)
    with pytest.raises(DataError, match="'#'"):
        region_id("a#b", 1)
    picture = Image.new("RGB", (4, 4))
    named = datasets.Dataset.from_list([{"id": "a", "image": picture}, {"id": "a#b", "image": picture}])
    with pytest.raises(DataError, match="'a#b'"):
        Regions(named)


# ---- scores


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_mean_equals_brute_force(scenes_small: Any, kind: str, options: dict[str, Any]):
    """Pixel by pixel: the value of the cell it falls into; batches and padding change nothing."""
    model = load_model("segformer-nano", scenes_small.labels, seed=0)
    images = scenes_small.train.select(range(5))
    regions = Regions(images, kind, **options)
    found = score_regions(model, images, regions, Inference(64, batch_size=5), key="entropy-mean")
    expected, features, classes = [], [], []
    for batch, logits, feature_map in predict_batches(model, images, Inference(64, batch_size=1), features=True):
        entropy, (h, w) = uncertainty_maps(logits)["entropy"][0], logits.shape[-2:]
        cover, box = regions.cover(batch["id"][0]), batch["box"][0]
        for index in range(len(cover)):
            values, rows, hist = [], [], np.zeros(len(scenes_small.labels))
            for y, x in zip(*np.nonzero(cover.mask(index)), strict=True):
                at = [(p + 0.5) * s / n / 64 for p, s, n in ((y, box[0], cover.size[0]), (x, box[1], cover.size[1]))]
                cell = int(at[0] * h), int(at[1] * w)
                values.append(float(entropy[cell]))
                hist[int(logits[0, :, cell[0], cell[1]].argmax())] += 1
                rows.append(feature_map[0, :, int(at[0] * feature_map.shape[2]), int(at[1] * feature_map.shape[3])])
            expected.append(np.mean(values))
            features.append(torch.stack(rows).double().mean(0).numpy())
            classes.append(hist / hist.sum())
    assert np.allclose(found.scores["entropy-mean"], expected, atol=1e-6)
    assert np.allclose(found.embedding, features, atol=1e-4) and np.allclose(found.class_hist, classes, atol=1e-6)


@pytest.mark.parametrize("key", ["margin-topk", "bald-mean", "entropy-class_balanced", "entropy-patch_max"])
def test_every_score_reaches_regions(scenes_small: Any, key: str):
    model = load_model("segformer-nano", scenes_small.labels, seed=0)
    images = scenes_small.train.select(range(4))
    regions = Regions(images, "slic", count=20)
    found = [score_regions(model, images, regions, Inference(64, batch_size=b), key=key) for b in (1, 4)]
    assert np.allclose(found[0].scores[key], found[1].scores[key], atol=1e-6)
    assert np.isfinite(found[0].scores[key]).all() and found[0].scores[key].std() > 0


@pytest.mark.parametrize("width", [10**6, 32])
def test_gradients_of_regions_make_up_that_of_the_image(scenes_small: Any, width: int):
    """Square images without padding, sixteen pixels a cell: each region counts by its size."""
    rows = scenes_small.train.select(range(4))
    square = [{"id": row["id"], "image": row["image"].resize((64, 64))} for row in rows]
    images = datasets.Dataset.from_list(square)
    model = load_model("segformer-nano", scenes_small.labels, seed=0)
    whole = score_pool(model, images, Inference(64), probe=GradientProbe(width)).gradient
    for kind, options in KINDS[:2]:
        regions = Regions(images, kind, **options)
        parts, one = (
            score_regions(model, images, regions, Inference(64, batch_size=b), probe=GradientProbe(width))
            for b in (4, 1)
        )
        assert whole is not None and parts.gradient is not None and one.gradient is not None and parts.scores == {}
        assert np.allclose(parts.gradient, one.gradient, atol=1e-5)
        areas = np.array([regions.mask(name).sum() for name in parts.ids])
        for row, image_id in enumerate(row_ids(images)):
            mine = [i for i, name in enumerate(parts.ids) if split_region(name)[0] == image_id]
            mean = (parts.gradient[mine] * areas[mine, None]).sum(0) / areas[mine].sum()
            assert abs(mean - whole[row]).max() < 1e-5


def test_names_without_a_network_are_the_same(some_regions: Any, scenes_small: Any):
    images = scenes_small.train.select(range(3))
    model = load_model("segformer-nano", scenes_small.labels, seed=0)
    for _, _, regions in some_regions:
        named, scored = name_regions(images, regions), score_regions(model, images, regions, Inference(64))
        assert named.ids == scored.ids
        picks = [
            choose_regions(Sampler("random"), pool, pool.ids, regions, make_rng(3), k=7, max_overlap=0.9)
            for pool in (named, scored)
        ]
        assert picks[0] == picks[1]


def test_a_map_that_was_packed_is_the_map_that_was_drawn(scenes_small: Any):
    images = scenes_small.train.select(range(3))
    regions = Regions(images, "slic", count=30)
    for row in images:
        drawn = slic_cover(row["image"], count=30)
        for cover in (regions.cover(row["id"]), regions._make(row["id"])):  # from the image; from what was packed
            assert cover.boxes == drawn.boxes and cover.parts is not None and drawn.parts is not None
            assert (cover.parts == drawn.parts).all() and cover.parts.dtype == drawn.parts.dtype
        assert (regions.areas(row["id"]) == drawn.areas()).all()


def test_weights_ignore_padding_and_keep_every_pixel():
    rng = np.random.default_rng(0)
    for size, box in [((37, 53), (45, 64)), ((90, 20), (64, 14)), ((1, 50), (1, 64))]:
        cover = cover_of_parts(rng.integers(0, 5, size))
        weights = cell_weights(cover, box, 64, (16, 16))
        assert (weights.sum((1, 2)).numpy() == cover.areas()).all()
        rows, columns = -(-box[0] * 16 // 64), -(-box[1] * 16 // 64)
        assert weights[:, rows:].sum() == 0 and weights[:, :, columns:].sum() == 0


def test_a_broken_prediction_names_the_image(scenes_small: Any):
    model = load_model("segformer-nano", scenes_small.labels, seed=0)
    with torch.no_grad():
        next(iter(model.net.decode_head.classifier.parameters())).fill_(torch.nan)
    images = scenes_small.train.select(range(2))
    with pytest.raises(DataError, match=row_ids(images)[0]):
        score_regions(model, images, Regions(images, "slic", count=9), Inference(64), key="entropy-mean")


# ---- choices


@pytest.fixture(scope="module")
def some_regions(scenes_small: Any) -> Any:
    """Images with covers of every kind."""
    images = scenes_small.train.select(range(8))
    return [(kind, options, Regions(images, kind, **options)) for kind, options in KINDS]


def pool_of(regions: Regions, images: list[str], seed: int = 0) -> PoolScores:
    """Numbers drawn at random, some tied."""
    ids = [region_id(i, r) for i in images for r in range(len(regions.cover(i)))]
    rng = np.random.default_rng(seed)
    scores = {"entropy-mean": rng.random(len(ids)).round(2).astype(np.float32)}
    embedding, hist = rng.normal(size=(len(ids), 4)).astype(np.float32), rng.dirichlet([0.3] * 4, len(ids))
    return PoolScores(ids, scores, embedding, hist, gradient=rng.normal(size=(len(ids), 6)).astype(np.float32))


@pytest.mark.parametrize("select", list(SELECTS))
@pytest.mark.parametrize("number", range(3))
def test_properties_of_every_select(scenes_small: Any, some_regions: Any, select: str, number: int):
    _, _, regions = some_regions[number]
    images = row_ids(scenes_small.train.select(range(8)))
    pool = pool_of(regions, images)
    sampler = Sampler("badge" if select == "badge" else f"entropy-mean-{select}")
    paid = [pool.ids[3], pool.ids[40]]
    candidates = [i for i in pool.ids if i not in paid]
    settings = {"per_image": 4, "max_overlap": 0.3, "gap": number == 0}
    ids, reasons = choose_regions(
        sampler, pool, candidates, regions, make_rng(1), k=15, paid=paid, labelled=paid, **settings
    )
    assert len(ids) == 15 == len(set(ids)) == len(reasons) and not set(ids) & set(paid)
    order = np.random.default_rng(1).permutation(len(pool.ids))
    mixed = pool.take([pool.ids[i] for i in order])
    again = choose_regions(
        sampler, mixed, candidates[::-1], regions, make_rng(1), k=15, paid=paid[::-1], labelled=paid, **settings
    )
    assert again == (ids, reasons)
    for image in images:
        now = [i for i in ids if split_region(i)[0] == image]
        assert len(now) <= 4
        everything = now + [i for i in paid if split_region(i)[0] == image]
        for a in now:
            for b in everything:
                if a != b:
                    one, two = regions.mask(a), regions.mask(b)
                    assert (one & two).sum() <= 0.3 * min(one.sum(), two.sum())
                    if number == 0 and b in now:  # no neighbours
                        both = connected_parts(one | two, connectivity=2)
                        assert both.max() == 2


def test_budget_of_pixels(scenes_small: Any, some_regions: Any):
    images = row_ids(scenes_small.train.select(range(8)))
    for _, options, regions in some_regions:
        pool = pool_of(regions, images)
        overlap = 0.5 if "stride" in options else 0.0
        for budget in (1, 500, 7000):
            ids, _ = choose_regions(
                Sampler("entropy"), pool, pool.ids, regions, make_rng(0), pixels=budget, max_overlap=overlap
            )
            spent = spent_pixels(regions, ids)
            assert len(ids) >= 1 and (spent <= budget or len(ids) == 1)
            if budget == 7000:
                assert spent > 5500  # the next one did not fit
                values = dict(zip(pool.ids, pool.scores["entropy-mean"], strict=True))
                assert [values[i] for i in ids] == sorted((values[i] for i in ids), reverse=True)


def test_bad_choices(scenes_small: Any, some_regions: Any):
    _, _, regions = some_regions[1]
    images = row_ids(scenes_small.train.select(range(2)))
    pool = pool_of(regions, images)
    chosen = len(pool.ids)
    with pytest.raises(ConfigError, match=f"only {chosen} can be had"):
        choose_regions(Sampler("entropy"), pool, pool.ids, regions, make_rng(0), k=chosen + 1)
    with pytest.raises(ConfigError, match="only 2 can be had"):
        choose_regions(Sampler("entropy"), pool, pool.ids, regions, make_rng(0), k=5, per_image=1)
    wrong: list[dict[str, Any]] = [{}, {"k": 1, "pixels": 1}, {"k": 0}, {"k": 1, "max_overlap": 1.0}]
    for options in [*wrong, {"k": 1, "per_image": -1}, {"k": 1, "gap": "no"}]:
        with pytest.raises(ConfigError):
            choose_regions(Sampler("entropy"), pool, pool.ids, regions, make_rng(0), **options)
    pool.gradient = None
    with pytest.raises(ConfigError, match="gradient"):
        choose_regions(Sampler(parse_strategy("badge")), pool, pool.ids, regions, make_rng(0), k=2)
    with pytest.raises(ConfigError, match="'slic', 'window'"):
        Regions(scenes_small.train, "hexagon")


# ---- labels and costs


def test_answers(scenes_small: Any):
    truth = np.array([[1, 1, 2, VOID], [1, 2, 2, VOID]], np.uint8)
    inside = np.array([[True, True, True, True], [False] * 4])
    assert region_label(truth, inside).tolist() == [[1, 1, 2, VOID], [VOID] * 4]
    assert region_label(truth, inside, "dominant").tolist() == [[1, 1, 1, 1], [VOID] * 4]
    assert (region_label(np.full((2, 4), VOID, np.uint8), inside, "dominant") == VOID).all()
    with pytest.raises(ConfigError, match="precise"):
        region_label(truth, inside, "roughly")


def test_clicks():
    truth = np.zeros((60, 60), np.uint8)
    assert count_clicks(truth) == 1
    truth[10:30, 10:30] = 3
    truth[40:50, 40:55] = 3  # another piece of the same class
    assert count_clicks(truth) == 1 + 4 + 4
    ring = np.zeros((60, 60), np.uint8)
    ring[10:50, 10:50] = 1
    ring[20:40, 20:40] = 0  # a hole: the hole is a segment, and the ring has two outlines
    assert count_clicks(ring) == 1 + (4 + 4) + 4
    assert count_clicks(np.full((5, 5), VOID, np.uint8)) == 1
    assert count_clicks(truth, truth == 3, "dominant") == 1


@pytest.mark.parametrize("kind", ["precise", "dominant"])
def test_ledger_and_partial_masks(scenes_small: Any, some_regions: Any, kind: str):
    for _, _, regions in some_regions:
        oracle = Oracle(scenes_small, Ledger())
        image_id = row_ids(scenes_small.train)[0]
        truth = scenes_small.train[0]["mask"]
        names = [region_id(image_id, i) for i in range(len(regions.cover(image_id)))]
        inside = np.zeros(truth.shape, bool)
        for name in names[:3]:
            oracle.label_regions([name], regions, kind)
            inside |= regions.mask(name)
            assert oracle.ledger.pixels == inside.sum() and (oracle.asked(image_id, regions) == inside).all()
        rows = training_rows(Pool(oracle.ids), oracle, regions)
        assert row_ids(rows) == [image_id]
        mask = rows[0]["mask"]
        assert (mask[~inside] == VOID).all()
        if kind == "precise":
            assert (mask[inside] == truth[inside]).all()
        oracle.label_regions(names[3:], regions, kind)
        assert oracle.ledger.pixels == truth.size and oracle.ledger.regions == len(names)
        assert abs(oracle.ledger.human_seconds - oracle.ledger.mask_seconds) < 0.01 * len(names)
        assert oracle.ledger.clicks is not None and oracle.ledger.clicks >= len(names)
        with pytest.raises(ConfigError, match="labelled already"):
            oracle.label_regions(names[:1], regions, kind)
        with pytest.raises(DataError, match="not in the pool"):
            oracle.label_regions(["elsewhere#0000"], regions, kind)


def test_old_ledgers_can_still_be_read():
    """Clicks that nobody counted are unknown, and stay so."""
    old = {k: v for k, v in Ledger().record().items() if k not in ("regions", "clicks")}
    ledger = read_ledger(old)
    assert ledger == Ledger(clicks=None)
    ledger.pay_region(10, 100, 3)
    ledger.pay_masks([100], clicks=7)
    assert ledger.clicks is None and ledger.pixels == 110
    ledger = Ledger()
    ledger.pay_masks([100], clicks=7)
    assert ledger.clicks == 7
    ledger.pay_masks([100])
    assert ledger.clicks is None


def test_what_is_paid_in_part_is_not_sold_again(scenes_small: Any, tmp_path: Path):
    oracle, regions = Oracle(scenes_small, Ledger()), Regions(scenes_small.train, "slic", count=12)
    image_id = oracle.ids[0]
    names = [region_id(image_id, i) for i in range(len(regions.cover(image_id)))]
    oracle.label_regions(names[:2], regions)
    before = oracle.ledger.record()
    for again in ([image_id], [oracle.ids[1], image_id]):
        with pytest.raises(ConfigError, match="in part"):
            oracle.label(again)
    assert oracle.ledger.record() == before and image_id not in oracle.paid
    pool = Pool(oracle.ids)
    store = MaskStore(tmp_path, scenes_small.labels)
    store.write(image_id, np.zeros(regions.cover(image_id).size, np.uint8))
    pool.set_pseudo({image_id: store.path(image_id)})
    with pytest.raises(ConfigError, match="needs its regions"):
        training_rows(pool, oracle)
    oracle.label_regions(names[2:], regions)  # the whole image by now: nothing left to ask, to judge or to guess
    pool.set_complete(oracle.complete)
    assert pool.complete == {image_id} and not pool.pseudo and image_id not in pool.unlabelled
    pool.set_pseudo({image_id: store.path(image_id)})
    assert not pool.pseudo
    rows = training_rows(pool, oracle)
    assert row_ids(rows) == [image_id] and (rows[0]["mask"] == scenes_small.train[0]["mask"]).all()


# ---- whole runs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VOC folder of generated scenes that tests may copy and spoil."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "voc", n_train=24, n_test=3, seed=3)


def run(folder: Path, out: Path, **settings: Any) -> list[Any]:
    return list(run_al(make_config({**TINY, "dataset": str(folder), "output_dir": str(out), **settings})))


def lines(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


SETTINGS: list[dict[str, Any]] = [
    {"strategy": "entropy"},
    {"strategy": "margin", "mode": "vlm", "judge": "mock", "judge_options": {"accuracy": 0.7}},
    {"strategy": "random", "region": "window", "region_options": {"side": 40, "stride": 30, "max_overlap": 0.5}},
    {"strategy": "entropy-mean-coreset", "region_labels": "dominant", "region_options": {"count": 12, "per_image": 2}},
    {"strategy": "judge-none-top", "mode": "vlm", "judge": "always_yes", "policy": "triage"},
    {"strategy": "badge", "region_options": {"count": 20, "gap": True}},
]
FAST = 2  # of these; the others are for the longer suite


@pytest.mark.parametrize(
    "settings",
    [pytest.param(s, marks=[pytest.mark.slow] if i >= FAST else []) for i, s in enumerate(SETTINGS)],
    ids=lambda s: "-".join(map(str, list(s.values())[:2])),
)
def test_a_run_resumes_and_spends_its_budget(scenes: Path, tmp_path: Path, settings: dict[str, Any]):
    whole = run(scenes, tmp_path / "whole", **settings)
    config = make_config({**TINY, "dataset": str(scenes), "output_dir": str(tmp_path / "cut"), **settings})
    rounds = run_al(config)
    next(rounds)
    rounds.close()
    assert len(list(run_al(config))) == 3
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert [r.labelled for r in whole] == [4, 6, 8] and whole[0].regions == 0 < whole[1].regions < whole[2].regions
    pool = load_data(str(scenes), seed=0, val_share=4).train
    sizes = [np.asarray(row["mask"]).size for row in pool]
    for record in whole[1:]:
        aim = record.labelled / len(pool)
        assert abs(record.labelled_share - aim) < 0.6 * max(sizes) / sum(sizes)  # within a region of the aim
    last = whole[-1].budget
    assert last["regions"] == whole[-1].regions and last["clicks"] > last["regions"]
    assert (tmp_path / "whole" / "figures" / "asked.png").is_file()


@pytest.mark.usefixtures("undrawn")
def test_clicks_of_whole_masks_are_counted_where_somebody_asks(scenes: Path, tmp_path: Path):
    """No outline is drawn only to count its corners; regions are always asked for by clicks."""
    for asked in (False, True):
        records = run(scenes, tmp_path / str(asked), unit="image", clicks=asked)
        assert all((r.budget["clicks"] is not None) == asked for r in records)
        assert not asked or records[0].budget["clicks"] >= 8  # four to learn from, four for validation
    with pytest.raises(RunError, match="clicks=True"):
        plot_learning_curve(tmp_path / "False", against="clicks")


@pytest.mark.usefixtures("undrawn")
def test_budgets_out_of_reach_are_not_claimed(scenes: Path, tmp_path: Path):
    """One region an image a round: `labelled` says what was paid, and figures count it in images and clicks."""
    options = {"count": 20, "per_image": 1}
    records = run(scenes, tmp_path / "r", region_options=options, increment=8, max_labelled=20)
    labelled = [r.labelled for r in records]
    assert labelled[0] == 4 and labelled[1] < 12 and labelled[2] < 20  # what was aimed at
    assert labelled[1:] == [np.ceil(r.labelled_share * 20) for r in records[1:]]
    table = round_table(tmp_path / "r")
    assert table["images"].tolist() == [n + 4 for n in labelled]  # four for validation
    assert (np.diff(table["clicks"]) > 0).all() and table["regions"].tolist() == [0, 16, 32]
    assert [r.budget["regions"] for r in records] == [0, 16, 32]
    line = plot_learning_curve(tmp_path / "r", ["val"], against="clicks").axes[0].lines[0]
    assert list(line.get_xdata()) == table["clicks"].tolist()
    rounds = [json.loads(text) for text in (tmp_path / "r" / "rounds.jsonl").read_text().splitlines()]
    for record in rounds:
        del record["budget"]["clicks"]
    (tmp_path / "r" / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds))
    with pytest.raises(RunError, match="clicks"):
        plot_learning_curve(tmp_path / "r", against="clicks")


@pytest.mark.usefixtures("undrawn")
def test_images_paid_for_whole_are_not_judged(scenes: Path, tmp_path: Path):
    """Everything is bought in the end; the judge is asked about less and less."""
    settings = {"mode": "vlm", "judge": "always_yes", "region_options": {"count": 2}, "increment": 8}
    records = run(scenes, tmp_path / "r", **settings, max_labelled=1.0)
    asked = np.diff([0, *(r.budget["judge_calls"] for r in records)]).tolist()
    assert asked[0] == 16 and asked[1] < 16 and asked[2] == 0
    assert records[-1].labelled_share == 1 and records[-1].labelled == 20 and records[-1].pseudo == 0


@pytest.mark.usefixtures("undrawn")
def test_a_run_older_than_a_setting_goes_on(scenes: Path, tmp_path: Path):
    settings = {"unit": "image", "region_options": {}, "max_labelled": 6}
    whole = run(scenes, tmp_path / "whole", **settings)
    config = make_config({**TINY, "dataset": str(scenes), "output_dir": str(tmp_path / "old"), **settings})
    rounds = run_al(config)
    next(rounds)
    rounds.close()
    path = tmp_path / "old" / "config.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k != "unit" and not k.startswith("region")}
    path.write_text(json.dumps(old))
    assert [r.selection for r in run_al(config)] == [r.selection for r in whole]
    with pytest.raises(RunError, match="unit: 'image' there, 'region' now"):
        next(run_al(make_config({**config.to_dict(), "unit": "region"})))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "entropy-mean-coreset", "region_labels": "dominant"},
        pytest.param({"mode": "vlm", "judge": "always_yes"}, marks=pytest.mark.slow),
    ],
    ids=["al", "vlm"],
)
def test_unpaid_regions_are_not_read(scenes: Path, tmp_path: Path, settings: dict[str, Any]):
    """Garbage in every pixel that was not paid for changes no id, no metric, no weight."""
    first = run(scenes, tmp_path / "a", **settings)
    copy = tmp_path / "spoilt"
    shutil.copytree(scenes, copy)
    data = load_data(str(scenes), seed=0, val_share=4)
    regions = Regions(data.train.remove_columns("mask"), "slic", count=20)
    names = [name for r in first[:-1] for name in r.selection["ids"]]
    keep_whole = {*first[0].start_ids, *row_ids(data.val)}
    rng = np.random.default_rng(0)
    for image_id in row_ids(data.train):
        if image_id in keep_whole:
            continue
        path = copy / "SegmentationClass" / f"{image_id}.png"
        with Image.open(path) as old:
            mask, palette = np.array(old), old.getpalette()
        inside = np.zeros(mask.shape, bool)
        for name in names:
            if split_region(name)[0] == image_id:
                inside |= regions.mask(name)
        spoilt = Image.fromarray(np.where(inside, mask, rng.integers(0, 21, mask.shape)).astype(np.uint8))
        spoilt.putpalette(palette)
        spoilt.save(path)
    second = run(copy, tmp_path / "b", **settings)
    assert [r.selection for r in first] == [r.selection for r in second]
    assert [r.metrics for r in first] == [r.metrics for r in second]
    assert [r.pseudo_ids for r in first] == [r.pseudo_ids for r in second]
    weights = [sorted((tmp_path / name).glob("round_*/model/*.safetensors")) for name in "ab"]
    assert len(weights[0]) == 3 and [p.read_bytes() for p in weights[0]] == [p.read_bytes() for p in weights[1]]


def test_pseudo_labels_carry_the_humans_regions(scenes: Path, tmp_path: Path):
    data = load_data(str(scenes), val_share=4)
    oracle, regions = Oracle(data, Ledger()), Regions(data.train.remove_columns("mask"), "slic", count=12)
    image_id = oracle.ids[0]
    truth = data.train[0]["mask"]
    oracle.label_regions([region_id(image_id, 0), region_id(image_id, 3)], regions)
    store = MaskStore(tmp_path, data.labels)
    predicted = np.full(truth.shape, 5, np.uint8)
    store.write(image_id, predicted)
    pool = Pool(oracle.ids)
    pool.set_pseudo({image_id: store.path(image_id)})
    mask = training_rows(pool, oracle, regions)[0]["mask"]
    inside = oracle.asked(image_id, regions)
    assert (mask[inside] == truth[inside]).all() and (mask[~inside] == 5).all()
    assert image_iou(mask, truth, len(data.labels)) >= 0


@pytest.mark.usefixtures("undrawn")
def test_real_photographs(voc: Path, tmp_path: Path):
    settings = {"data_options": {"max_train": 14, "max_test": 2}, "image_size": 64, "val_share": 2, "initial": 3}
    records = run(voc, tmp_path / "run", **settings, increment=1, max_labelled=5, region_options={"count": 60})
    assert [r.labelled for r in records] == [3, 4, 5] and records[-1].regions > 60
    assert abs(records[-1].labelled_share - 5 / 12) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "pixel"}, "'image', 'region'"),
        ({"region": "hexagon"}, "'slic', 'window'"),
        ({"region_options": {"cuont": 3}}, "Did you mean 'count'"),
        ({"region_options": {"count": 0}}, "count"),
        ({"region_options": {"per_image": 0.5}}, "per_image"),
        ({"region_labels": "rough"}, "dominant"),
        ({"mode": "baseline"}, "modes al and vlm"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_settings(scenes: Path, tmp_path: Path, settings: dict[str, Any], message: str):
    from vlm_itl.experiment.loop import run_experiment

    with pytest.raises(ConfigError) as caught:
        list(
            run_experiment(make_config({**TINY, "dataset": str(scenes), "output_dir": str(tmp_path / "r"), **settings}))
        )
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_policy_groups():
    verdicts = {"a": "yes", "b": "no", "c": "abstain"}
    assert policy_groups(list("abcd"), verdicts, ["a"], "observe") == [list("abcd")]
    assert policy_groups(list("abcd"), verdicts, ["a"], "pseudo") == [list("bcd"), ["a"]]
    assert policy_groups(list("abcd"), verdicts, ["a"], "triage") == [["b"], ["c", "d"], ["a"]]
    assert policy_groups(list("abcd"), {}, [], "triage") == [list("abcd")]


def test_windows_larger_than_the_image():
    assert len(window_cover(Image.new("RGB", (20, 10)), side=500)) == 1
