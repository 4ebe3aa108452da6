"""Who pays for what, who sees what: every door to an unpaid mask is shut, and the budget adds up."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import VOID
from vlm_itl.data.masks import MaskStore, raw_rows, row_ids
from vlm_itl.data.scenes import make_scenes
from vlm_itl.data.sources import SegData, load_data, toy_images
from vlm_itl.experiment.annotator import Oracle, mask_pixels, training_rows
from vlm_itl.experiment.pool import Ledger, Pool, as_count, budget_schedule, read_ledger
from vlm_itl.judging.measures import FULL_MASK_SECONDS


def png(pixels: np.ndarray) -> bytes:
    """The bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_embedded(folder: Path, count: int = 12) -> Path:
    """A `save_to_disk` folder of two splits with the bytes of all pictures inside; image k has side 10 + k."""
    rng = np.random.default_rng(0)
    columns = Features({"id": Value("string"), "image": ImageColumn(), "mask": ImageColumn()})
    splits = {}
    for split, numbers in {"train": range(count), "validation": range(count, count + 3)}.items():
        rows: dict[str, list[Any]] = {"id": [], "image": [], "mask": []}
        for number in numbers:
            side = 10 + number
            rows["id"].append(f"e{number:02d}")
            photo = rng.integers(0, 256, (side, 12, 3), dtype=np.uint8)
            mask = rng.integers(0, 21, (side, 12), dtype=np.uint8)
            rows["image"].append({"bytes": png(photo), "path": None})
            rows["mask"].append({"bytes": png(mask), "path": None})
        splits[split] = Dataset.from_dict(rows, features=columns)
    DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module", params=["voc", "embedded"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SegData:
    """Nine images of a pool, once as files in VOC layout, once as bytes inside a data set."""
    folder = tmp_path_factory.mktemp(request.param) / "d"
    if request.param == "voc":
        return load_data(str(make_scenes(folder, n_train=12, n_test=2, seed=3)), val_share=3)
    return load_data(str(write_embedded(folder)), val_share=3, options={"classes": "voc"})


@pytest.fixture
def oracle(data: SegData) -> Oracle:
    """A fresh oracle with an empty ledger."""
    return Oracle(data, Ledger())


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_ledger_by_hand():
    ledger = Ledger(mask_seconds=10.0)
    ledger.pay_masks([100, 50])
    ledger.pay_masks([30], split="val")
    assert (ledger.train_images, ledger.val_images, ledger.images, ledger.pixels) == (2, 1, 3, 180)
    assert ledger.human_seconds == 30.0
    ledger.pay_masks([])
    assert ledger.images == 3
    assert next(iter(ledger.record())) == "images" and ledger.record()["images"] == 3
    assert read_ledger(ledger.record()) == ledger
    assert Ledger().mask_seconds == FULL_MASK_SECONDS


def test_an_unknown_price_stays_unknown():
    ledger = Ledger()
    ledger.pay_judge(4, 0.5)
    ledger.pay_judge(1, 0.25)
    assert (ledger.judge_calls, ledger.judge_usd) == (5, 0.75)
    ledger.pay_judge(2, None)
    ledger.pay_judge(2, 1.0)
    assert (ledger.judge_calls, ledger.judge_usd) == (9, None)
    assert read_ledger(ledger.record()).judge_usd is None


@given(st.lists(st.lists(st.integers(1, 10**7), max_size=5), max_size=6))
def test_ledger_does_not_depend_on_the_parts(parts):
    one, two = Ledger(), Ledger()
    for part in parts:
        one.pay_masks(part)
    two.pay_masks([p for part in parts for p in part])
    assert (one.images, one.pixels) == (two.images, two.pixels)
    assert one.human_seconds == pytest.approx(two.human_seconds, abs=0.01)


def test_mask_pixels_come_from_the_headers(data, tmp_path):
    expected = [row["mask"].size for row in data.train]
    assert mask_pixels(data.train) == expected and mask_pixels(raw_rows(data.train)) == expected
    whole = png(np.random.default_rng(0).integers(0, 21, (30, 40), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes(whole[:60])  # the header is whole, the pixels are not
    cell = {"id": ["a"], "image": [None], "mask": [{"path": str(tmp_path / "cut.png"), "bytes": None}]}
    kinds = Features({"id": Value("string"), "image": ImageColumn(decode=False), "mask": ImageColumn(decode=False)})
    assert mask_pixels(Dataset.from_dict(cell, features=kinds)) == [1200]


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "arrow", "numpy", "pandas", "python", "own"])
def test_what_everybody_sees_has_no_mask(oracle, form):
    rows = oracle.images if form == "own" else oracle.images.with_format(form)
    assert rows.column_names == ["id", "image"] and set(rows.features) == {"id", "image"}
    first, batch = rows[0], rows[:2]
    for seen in (first, batch):
        names = getattr(seen, "column_names", None) if form in ("arrow", "pandas") else list(seen)
        if form == "pandas":
            names = list(seen.columns)
        assert list(names) == ["id", "image"]
    with pytest.raises((KeyError, ValueError)):
        rows["mask"][0]


def test_the_table_below_has_no_mask_either(oracle):
    below = oracle.images.data.table
    assert below.column_names == ["id", "image"]
    assert "mask" not in str(oracle.images.with_format("arrow")[:].schema.names)
    again = pickle.loads(pickle.dumps(raw_rows(oracle.images)))
    assert set(again.column_names) == {"id", "image"}
    oracle.images[0]
    oracle.images.select([1, 0]).with_format(None)[0]
    assert oracle.ledger.peeks == 0 and not oracle.simulated and oracle.paid == set()


def test_an_unpaid_mask_is_refused(oracle):
    ids = oracle.ids
    with pytest.raises(ConfigError, match=f"{ids[0]}.*not been paid"):
        oracle.labelled([ids[0]])
    oracle.label(ids[:2])
    for asked in ([ids[0], ids[2]], [ids[2]], ids):
        with pytest.raises(ConfigError, match=f"'{ids[2]}'.*not been paid"):
            oracle.labelled(asked)
    rows = oracle.labelled([ids[1], ids[0]])
    assert row_ids(rows) == [ids[1], ids[0]]
    assert len(oracle.labelled([])) == 0


def test_the_right_masks_are_handed_out(oracle, data):
    truth = {row["id"]: row["mask"] for row in data.train}
    order = oracle.ids[5:1:-1]
    oracle.label(order)
    for row in oracle.labelled(order):
        assert np.array_equal(row["mask"], truth[row["id"]])
    assert oracle.ledger.train_images == 4 and oracle.ledger.val_images == 0
    assert oracle.ledger.pixels == sum(truth[i].size for i in order)
    assert oracle.ledger.human_seconds == pytest.approx(4 * FULL_MASK_SECONDS)
    assert oracle.ledger.peeks == 0 and not oracle.simulated


def test_paid_rows_reach_no_further_than_what_was_paid(oracle):
    oracle.label(oracle.ids[:2])
    rows = oracle.labelled(oracle.ids[:2])
    assert len(rows) == 2 and set(raw_rows(rows)["id"][:]) == set(oracle.ids[:2])
    with pytest.raises(IndexError):
        raw_rows(rows)[2]


def test_nobody_pays_twice(oracle):
    oracle.label(oracle.ids[:2])
    before = oracle.ledger.record()
    with pytest.raises(ConfigError, match="labelled already"):
        oracle.label([oracle.ids[3], oracle.ids[1]])
    with pytest.raises(DataError, match="'nobody'.*not in the pool"):
        oracle.label(["nobody"])
    with pytest.raises(ConfigError):
        oracle.label([oracle.ids[4], oracle.ids[4]])
    assert oracle.ledger.record() == before and oracle.paid == set(oracle.ids[:2])


def test_a_peek_is_counted_and_shown(oracle, data):
    truth = data.train[3]
    assert np.array_equal(oracle.peek_for_simulation(truth["id"]), truth["mask"])
    assert oracle.simulated and oracle.ledger.peeks == 1
    assert oracle.ledger.images == 0 and oracle.ledger.human_seconds == 0 and oracle.paid == set()
    with pytest.raises(ConfigError):
        oracle.labelled([truth["id"]])
    with pytest.raises(DataError, match="not in the pool"):
        oracle.peek_for_simulation(row_ids(data.val)[0])


def test_validation_and_test_are_not_in_the_pool(oracle, data):
    assert not set(oracle.ids) & (set(row_ids(data.val)) | set(row_ids(data.test)))
    assert oracle.ids == row_ids(data.train) == row_ids(oracle.images)
    assert oracle.rows(oracle.ids[::-1]) == list(range(len(oracle.ids)))[::-1]


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_pool_states():
    pool = Pool(list("abcdef"))
    assert pool.unlabelled == list("abcdef") and pool.share == 0
    pool.add_human(["d", "b"])
    assert pool.human == ["d", "b"] and pool.unlabelled == list("acef") and pool.share == pytest.approx(1 / 3)
    pool.set_pseudo({"a": Path("a.png"), "b": Path("b.png"), "e": Path("e.png")})
    assert set(pool.pseudo) == {"a", "e"}  # a human mask wins
    assert pool.unlabelled == list("acef")  # an accepted image may still be chosen
    pool.add_human(["e"])
    assert set(pool.pseudo) == {"a"} and pool.human == ["d", "b", "e"]
    pool.set_pseudo({"f": Path("f.png")})
    assert set(pool.pseudo) == {"f"}  # acceptance is renewed each round
    pool.set_pseudo({})
    assert pool.pseudo == {} and pool.unlabelled == list("acf")
    assert Pool(["x"]).human is not Pool(["y"]).human


@given(st.lists(st.sets(st.integers(0, 19)), max_size=6), st.lists(st.sets(st.integers(0, 19)), max_size=6))
def test_states_exclude_each_other(humans, accepted):
    pool = Pool([str(n) for n in range(20)])
    for paid, believed in zip(humans, accepted, strict=False):
        pool.add_human([str(n) for n in sorted(paid) if str(n) not in pool.human])
        pool.set_pseudo({str(n): Path(f"{n}.png") for n in believed})
        assert not set(pool.pseudo) & set(pool.human) and not set(pool.human) & set(pool.unlabelled)
        assert sorted([*pool.human, *pool.unlabelled]) == sorted(pool.ids) and len(set(pool.human)) == len(pool.human)
        assert 0 <= pool.share <= 1


# --- what is trained on -----------------------------------------------------------------------------------------------


def test_training_rows(oracle, data, tmp_path):
    truth = {row["id"]: row["mask"] for row in data.train}
    pictures = {row["id"]: np.asarray(row["image"]) for row in data.train}
    pool = Pool(oracle.ids)
    assert len(training_rows(pool, oracle)) == 0
    oracle.label(oracle.ids[:3])
    pool.add_human(oracle.ids[:3])
    assert row_ids(training_rows(pool, oracle)) == oracle.ids[:3]
    store = MaskStore(tmp_path / "masks", data.labels)
    for image_id in oracle.ids[2:6]:
        store.write(image_id, np.full_like(truth[image_id], 7))
    pool.set_pseudo({i: store.path(i) for i in oracle.ids[5:1:-1]})
    rows = training_rows(pool, oracle)
    assert row_ids(rows) == oracle.ids[:6] and len(set(row_ids(rows))) == 6
    for row in rows:
        expected = truth[row["id"]] if row["id"] in pool.human else np.full_like(truth[row["id"]], 7)
        assert np.array_equal(row["mask"], expected)
        assert np.array_equal(np.asarray(row["image"]), pictures[row["id"]])
    for cell in raw_rows(rows).select(range(3, 6))["mask"][:]:  # no trace of the truth in the raw cells either
        assert cell["bytes"] is None and Path(cell["path"]).parent == tmp_path / "masks"
    assert oracle.ledger.peeks == 0 and oracle.paid == set(oracle.ids[:3])


def test_an_unpaid_human_label_cannot_be_trained_on(oracle):
    pool = Pool(oracle.ids)
    pool.add_human(oracle.ids[:1])
    with pytest.raises(ConfigError, match="not been paid"):
        training_rows(pool, oracle)


def test_pseudo_labels_alone(oracle, data, tmp_path):
    store = MaskStore(tmp_path, data.labels)
    first = oracle.ids[0]
    store.write(first, np.zeros(data.train[0]["mask"].shape, np.uint8))
    pool = Pool(oracle.ids)
    pool.set_pseudo({first: store.path(first)})
    rows = training_rows(pool, oracle)
    assert row_ids(rows) == [first] and not rows[0]["mask"].any()


def test_a_void_truth_stays_void_in_the_toy():
    toy = toy_images()
    oracle = Oracle(SegData(toy.test, toy.val, toy.train, toy.labels, "turned"), Ledger())
    oracle.label(["toy-5"])
    (row,) = oracle.labelled(["toy-5"])
    assert (row["mask"][:, -1] == VOID).all() and oracle.ledger.pixels == 64


# --- the budget -------------------------------------------------------------------------------------------------------

SHARES = st.one_of(st.floats(0, 1), st.integers(0, 400))


@settings(max_examples=300)
@given(st.integers(1, 400), SHARES, SHARES, SHARES)
def test_budget_schedule(n_pool, initial, increment, max_labelled):
    try:
        counts = budget_schedule(n_pool, initial, increment, max_labelled)
    except ConfigError as error:
        assert "\n" not in str(error)
        amounts = [(a, round(a * n_pool) if isinstance(a, float) else a) for a in (initial, increment, max_labelled)]
        (_, first), (_, step), (_, last) = amounts
        assert max(first, step, last) > n_pool or first < 1 or last < first or (step < 1 and last > first)
        return
    assert counts[0] == as_count("initial", initial, n_pool)
    assert counts[-1] == as_count("max_labelled", max_labelled, n_pool) <= n_pool
    stride = increment * n_pool if isinstance(increment, float) else increment  # a share is not rounded on its own
    steps = np.diff(counts)
    assert (steps > 0).all() and (steps <= max(1, math.ceil(stride - 1e-9))).all()
    assert len(steps) <= 1 + math.ceil((counts[-1] - counts[0]) / max(1, stride))
    assert all(isinstance(count, int) for count in counts)


def test_budget_by_hand():
    assert budget_schedule(100, 0.1, 0.1, 0.5) == [10, 20, 30, 40, 50]
    assert budget_schedule(100, 10, 25, 1.0) == [10, 35, 60, 85, 100]
    assert budget_schedule(100, 1.0, 1.0, 1.0) == [100]
    assert budget_schedule(7, 3, 0, 3) == [3]
    assert budget_schedule(100, 10.0, 5, 20.0) == [10, 15, 20]  # a YAML file may write a count as 10.0
    assert budget_schedule(1, 1, 1, 1) == [1]
    assert budget_schedule(42, 0.1, 0.1, 0.5) == [4, 8, 13, 17, 21]  # no last round of one image
    assert budget_schedule(17, 0.5, 3, 17) == [8, 11, 14, 17]  # a count is never exceeded


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ((0, 5, 10), "at least one"),
        ((0.001, 5, 10), "at least one"),
        ((5, 0, 10), "increment"),
        ((5, 5, 101), "more images than the pool"),
        ((5, 101, 10), "more images than the pool"),
        ((20, 5, 10), "less than initial"),
        ((5, 5, 1), "write 1.0"),
        ((-1, 5, 10), "initial"),
        ((2.5, 5, 10), "whole number"),
        ((float("nan"), 5, 10), "initial"),
        ((float("inf"), 5, 10), "initial"),
        (("many", 5, 10), "initial"),
        ((True, 5, 10), "initial"),
    ],
    ids=str,
)
def test_impossible_budgets_get_one_clear_line(amounts, message):
    with pytest.raises(ConfigError) as caught:
        budget_schedule(100, *amounts)
    assert message in str(caught.value) and "\n" not in str(caught.value)
