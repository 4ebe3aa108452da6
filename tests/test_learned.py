"""The judge that learns: nothing is guessed by what has seen it, promises hold, unpaid truth is never read."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from vlm_itl.core.checks import ConfigError, JudgeError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import MaskStore, row_ids
from vlm_itl.data.scenes import make_scenes
from vlm_itl.data.sources import load_data
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_al
from vlm_itl.model.predict import Inference
from vlm_itl.model.segmenter import load_model
from vlm_itl.proposals import learned as room
from vlm_itl.proposals.learned import Lesson, Scholar, balanced_choice, conformal_factor, lesson_of, probability_curve
from vlm_itl.proposals.segments import Segments, segment_ious
from vlm_itl.vlm.cache import CachedHandler, handler_identity
from vlm_itl.vlm.handler import HANDLERS, JudgeQuery, Shown, VLMHandler, handler_options, make_handler

from faults import at_step, in_child, kill  # isort: skip

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True, scope="module")
def small_forests():
    """Sixty trees guess worse than two hundred, and as honestly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "TREES", 60)
        yield


def lessons(seed: int, images: int, noise: float = 0.1, each: int = 3) -> Lesson:
    """Segments whose first column tells their IoU, but for noise that belongs to the image."""
    rng = np.random.default_rng(seed)
    ids = np.repeat([f"im{i:04d}" for i in range(images)], each)
    quality = rng.random(images * each)
    shared = np.repeat(rng.normal(0, noise, images), each)
    iou = np.clip(quality + shared + rng.normal(0, noise, len(ids)), 0, 1)
    values = np.column_stack([quality, rng.random((len(ids), 4))]).astype(np.float32)
    none = np.zeros((len(ids), 0), np.float32)
    table = Segments(ids, np.tile(np.arange(each), images), values, tuple("abcde"), none, none)
    whole = {i: float(iou[ids == i].mean()) for i in np.unique(ids).tolist()}
    return Lesson(table, iou, whole, table)


# ---- learning ----


def test_nothing_is_guessed_by_a_forest_that_has_seen_its_image(monkeypatch: pytest.MonkeyPatch):
    """Every forest is watched: what it learnt from and what it guessed about never share an image."""
    lesson = lessons(0, 30)
    of = {row.tobytes(): image for row, image in zip(lesson.segments.values, lesson.segments.ids, strict=True)}
    seen: dict[int, set[str]] = {}
    pairs: list[tuple[set[str], set[str]]] = []

    def images(columns: np.ndarray) -> set[str]:
        return {str(of[row[:5].astype(np.float32).tobytes()]) for row in columns}

    grow, guess = room.Forest.grow.__func__, room.Forest.guess  # type: ignore[attr-defined]

    def watched_grow(cls: Any, columns: np.ndarray, iou: np.ndarray, seed: int) -> Any:
        forest = grow(cls, columns, iou, seed)
        seen[id(forest)] = images(columns)
        return forest

    def watched_guess(self: Any, columns: np.ndarray) -> Any:
        pairs.append((seen[id(self)], images(columns)))
        return guess(self, columns)

    monkeypatch.setattr(room.Forest, "grow", classmethod(watched_grow))
    monkeypatch.setattr(room.Forest, "guess", watched_guess)
    Scholar(lesson, 3, folds=5)
    assert len(pairs) == 5 and not any(learnt & guessed for learnt, guessed in pairs)
    assert set().union(*(guessed for _, guessed in pairs)) == set(lesson.whole)
    assert all(learnt | guessed == set(lesson.whole) for learnt, guessed in pairs)


def test_noise_is_not_learnt_and_a_signal_is():
    lesson = lessons(1, 60)
    scholar = Scholar(lesson, 3)
    assert roc_auc_score(lesson.iou >= 0.7, scholar.guesses) > 0.85
    mixed = Lesson(lesson.segments, np.random.default_rng(0).permutation(lesson.iou), lesson.whole, lesson.truths)
    assert 0.35 < roc_auc_score(mixed.iou >= 0.7, Scholar(mixed, 3).guesses) < 0.65


def test_promises_hold_for_what_comes():
    """Coverage of intervals and calibration of probabilities, over lessons of 40 images and pools of 200."""
    held, held_whole, gaps = [], [], []
    for seed in range(6):
        scholar = Scholar(lessons(seed, 40), 3, tau=0.6, coverage=0.9)
        pool = lessons(1000 + seed, 200)
        each, whole = scholar.judge(pool.segments)
        held += [g.low <= t <= g.high for g, t in zip(each, pool.iou, strict=True)]
        held_whole += [whole[i].low <= t <= whole[i].high for i, t in pool.whole.items()]
        gaps.append(np.mean([g.p_good for g in each]) - (pool.iou >= 0.6).mean())
    assert 0.85 < np.mean(held) < 0.96 and 0.83 < np.mean(held_whole) < 0.98
    assert abs(np.mean(gaps)) < 0.05


def test_the_factor_is_the_smallest_that_covers():
    rng = np.random.default_rng(0)
    for n in (3, 9, 10, 50):
        errors, spread = rng.random(n), rng.random(n) + 0.1
        factor = conformal_factor(errors, spread, 0.8)
        covered = sum(e <= factor * s for e, s in zip(errors, spread, strict=True))
        assert factor == np.inf or (covered >= 0.8 * (n + 1) and covered - 1 < 0.8 * (n + 1))
    assert conformal_factor(np.ones(3), np.ones(3), 0.9) == np.inf


def test_the_curve_is_logistic_rises_and_knows_one_sided_lessons():
    guesses = np.random.default_rng(0).random(400)
    good = np.random.default_rng(1).random(400) < expit(8 * guesses - 4)
    slope, offset = probability_curve(guesses, good)
    assert abs(expit(slope * 0.5 + offset) - 0.5) < 0.08 and 5 < slope < 12
    assert probability_curve(guesses, ~good)[0] == 0  # a guess that is worse than none is not turned round
    assert np.isclose(expit(probability_curve(guesses, np.zeros(400, bool))[1]), 1 / 402)


def test_the_same_lesson_the_same_guesses_in_any_order():
    lesson, pool = lessons(2, 25), lessons(3, 10).segments
    first = Scholar(lesson, 3).judge(pool)[0]
    assert Scholar(lesson, 3).judge(pool)[0] == first
    backwards = Scholar(lesson, 3).judge(pool.take(np.arange(len(pool))[::-1]))[0]
    assert [g.iou for g in backwards[::-1]] == [g.iou for g in first]
    assert Scholar(lesson, 3, seed=1).judge(pool)[0] != first


def test_likeness_leaves_out_the_image_itself():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 6)).astype(np.float32)
    table = Segments(
        np.repeat(list("abcdef"), 2), np.tile([0, 1], 6), np.zeros((12, 0), np.float32), (), vectors, vectors
    )
    judged = room.Likeness(table, 2)
    rows = table.ids == "a"
    with_it, without = judged.compare(table)[rows], judged.compare(table.take(rows), without=["a"])
    assert (with_it[:, 0] > without[:, 0]).all() and without[0, 3] == with_it[0, 3] - 1


# ---- balanced acceptance ----


def test_balanced_acceptance_keeps_the_mix():
    rng = np.random.default_rng(0)
    classes, belief = rng.integers(0, 4, 800), rng.random(800)
    scores = belief + 0.3 * classes + 0.3 * rng.random(800)  # the model's own taste, and one class before the others
    plain = scores > np.quantile(scores, 0.6)
    chosen = balanced_choice(scores, classes, belief, 0.4)
    assert abs(chosen.mean() - 0.4) < 0.01
    assert np.ptp([chosen[classes == c].mean() for c in range(4)]) < 0.02
    assert np.ptp([plain[classes == c].mean() for c in range(4)]) > 0.5
    fifth = (belief * 5).astype(int)
    spread = [np.ptp([taken[fifth == k].mean() for k in range(5)]) for taken in (chosen, plain)]
    assert spread[0] < 0.25 and spread[1] > 2 * spread[0]
    assert (
        not balanced_choice(scores, classes, belief, 0.0).any() and balanced_choice(scores, classes, belief, 1.0).all()
    )
    assert len(balanced_choice(scores[:0], classes[:0], belief[:0], 0.5)) == 0


# ---- the handler ----


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "voc", n_train=44, n_test=4, seed=3)


@pytest.fixture(scope="module")
def photographs(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, MaskStore]:
    """A pool, and proposals of which half have a class turned into another."""
    data = load_data(str(scenes), val_share=2)
    store = MaskStore(tmp_path_factory.mktemp("proposals"), data.labels)
    for number, row in enumerate(data.train):
        mask = np.where(row["mask"] == 255, 0, row["mask"]).astype(np.uint8)
        objects = np.unique(mask[mask != 0])
        if number % 2 and len(objects):
            mask[mask == objects[0]] = 20
        store.write(row["id"], mask)
    return data, store


def taught(photographs: tuple[Any, MaskStore], paid: int = 24, segmenter: Any = None, **options: Any) -> VLMHandler:
    data, store = photographs
    handler = make_handler("learned", **options)
    handler.bind_labelled(Shown(data.train.select(range(paid)), store, segmenter))
    pool = data.train.select(range(paid, len(data.train))).remove_columns("mask")
    handler.bind_pool(Shown(pool, store, segmenter))
    return handler


def questions(photographs: tuple[Any, MaskStore], paid: int = 24, **fields: Any) -> list[JudgeQuery]:
    data, store = photographs
    ids = row_ids(data.train)[paid:]
    return [JudgeQuery(i, None, store[i], labels=data.labels, **fields) for i in ids]


def test_it_is_found_by_name():
    assert "learned" in HANDLERS and handler_options("learned")["coverage"] == 0.9
    with pytest.raises(ConfigError, match="'ballanced'.*Did you mean 'balanced'"):
        make_handler("learned", ballanced=True)
    for wrong in ({"folds": 1}, {"coverage": 1.0}, {"threshold": 2}, {"tau": -1}, {"encoder_size": 3}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make_handler("learned", **wrong)


def test_it_tells_good_masks_from_bad_ones_whole_and_by_class(photographs):
    data, store = photographs
    truth = {row["id"]: segment_ious(store[row["id"]], row["mask"]) for row in data.train}
    handler = taught(photographs)
    said = handler.judge(questions(photographs))
    good = [np.nanmean(truth[j.id]) >= 0.7 for j in said]
    assert roc_auc_score(good, [j.p_yes for j in said]) > 0.9
    assert all((j.verdict == "yes") == (j.p_yes >= 0.5) and j.usd == 0 and j.raw.startswith("IoU ") for j in said)
    asked = [
        JudgeQuery(q.id, None, q.mask, (c,), "label", labels=q.labels)
        for q in questions(photographs)
        for c in q.classes()
    ]
    answers = handler.judge(asked)
    right = [truth[q.id][q.class_ids[0]] >= 0.7 for q in asked]
    assert roc_auc_score(right, [j.p_yes for j in answers]) > 0.9
    one = asked[0]
    absent = next(c for c in range(1, 20) if c not in one.mask)
    (none,) = handler.judge([JudgeQuery(one.id, None, one.mask, (absent,), "label", labels=one.labels)])
    assert none.verdict == "abstain" and "has no" in str(none.error)


def test_a_pure_function_of_lesson_and_mask(photographs):
    asked = questions(photographs)
    said = [j.p_yes for j in taught(photographs).judge(asked)]
    assert [j.p_yes for j in taught(photographs).judge(asked[::-1])][::-1] == said
    handler = taught(photographs)
    handler.bind_labelled(Shown(photographs[0].train.select(range(24)), photographs[1]), 0)  # anew: not learnt twice
    assert [j.p_yes for j in handler.judge(asked)] == said
    assert handler_identity(handler) == handler_identity(taught(photographs))
    assert handler_identity(taught(photographs, paid=23)) != handler_identity(handler)


def test_the_same_lesson_is_learnt_once_and_another_one_anew(photographs, monkeypatch: pytest.MonkeyPatch):
    """A round asks before its training and after it: only what has changed costs anything."""
    data, store = photographs
    learnt, looked = [], []
    scholar, look = room.Scholar, room.LearnedHandler._look_at
    monkeypatch.setattr(room, "Scholar", lambda *a, **k: learnt.append(1) or scholar(*a, **k))
    monkeypatch.setattr(room.LearnedHandler, "_look_at", lambda self, s: looked.append(1) or look(self, s))
    handler, asked = taught(photographs), questions(photographs)
    said = [j.p_yes for j in handler.judge(asked)]
    pool = data.train.select(range(24, len(data.train))).remove_columns("mask")
    handler.bind_labelled(Shown(data.train.select(range(24)), store))
    handler.bind_pool(Shown(pool, store))
    assert [j.p_yes for j in handler.judge(asked)] == said and (len(learnt), len(looked)) == (1, 1)
    handler.bind_labelled(Shown(data.train.select(range(20)), store))
    handler.bind_pool(Shown(pool, store))
    fresh = [j.p_yes for j in handler.judge(asked)]
    assert (len(learnt), len(looked)) == (2, 2) and fresh != said
    assert fresh == [j.p_yes for j in taught(photographs, paid=20).judge(asked)]


def test_a_mask_that_the_round_does_not_have_is_judged_alone(photographs):
    data, _ = photographs
    handler, row = taught(photographs), data.train[30]
    mask = np.where(row["mask"] == 255, 0, row["mask"]).astype(np.uint8)
    mask[0, 0] = 1 - min(mask[0, 0], 1)
    (said,) = handler.judge([JudgeQuery(row["id"], row["image"], mask, labels=data.labels)])
    assert said.error is None and said.p_yes is not None


def test_unpaid_masks_and_garbage_in_them_change_nothing(photographs):
    data, store = photographs
    handler = taught(photographs)
    said = [j.p_yes for j in handler.judge(questions(photographs))]

    def garbage(batch: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("the mask of an unpaid image was read")

    pool = data.train.select(range(24, len(data.train))).with_transform(garbage)
    handler.bind_pool(Shown(pool, store))
    assert [j.p_yes for j in handler.judge(questions(photographs))] == said


def test_with_model_encoder_balance_and_cache(photographs, tmp_path):
    data, _ = photographs
    segmenter = load_model("segformer-nano", data.labels), Inference(image_size=48)
    folder = tmp_path / "encoder"
    segmenter[0].net.save_pretrained(folder)
    options = {"ask_model": True, "encoder": str(folder), "encoder_size": 48, "balanced": True}
    plain = taught(photographs, segmenter=segmenter, ask_model=True).judge(questions(photographs))
    handler = taught(photographs, segmenter=segmenter, **options)
    assert handler.needs_unseen and not make_handler("learned").needs_unseen
    said = handler.judge(questions(photographs))
    assert all(j.error is None for j in said) and [j.p_yes for j in said] != [j.p_yes for j in plain]
    accepted, sure = sum(j.verdict == "yes" for j in said), sum(j.p_yes >= 0.5 for j in said)
    assert abs(accepted - sure) <= 3
    cached = CachedHandler(judge=taught(photographs), path=tmp_path / "c.sqlite")
    assert cached.needs_labelled and cached.needs_pool and cached.least_labelled == 10
    asked = [
        JudgeQuery(q.id, data.train[24 + n]["image"], q.mask, labels=q.labels)
        for n, q in enumerate(questions(photographs))
    ]
    first = cached.judge(asked)
    assert [j.p_yes for j in cached.judge(asked)] == [j.p_yes for j in first] and cached.judge(asked)[0].cached


def test_too_little_to_learn_from_is_said_in_a_line(photographs):
    data, store = photographs
    with pytest.raises(JudgeError, match="needs 10 labelled images .* and there are 6: .* or set folds to 3"):
        taught(photographs, paid=6).judge(questions(photographs, paid=6))
    with pytest.raises(JudgeError, match="needs 10 labelled images, and there are 2"):
        taught(photographs, paid=2).judge(questions(photographs, paid=2))
    with pytest.raises(JudgeError, match="come without"):
        make_handler("learned").bind_labelled(Shown(data.train.remove_columns("mask"), store))
    with pytest.raises(JudgeError, match="bind_pool"):
        make_handler("learned").judge(questions(photographs))
    with pytest.raises(JudgeError, match="balanced=True asks the segmenter"):
        taught(photographs, balanced=True).judge(questions(photographs))
    everything_right = MaskStore(store.folder / "right", data.labels)
    for row in data.train:
        everything_right.write(row["id"], np.where(row["mask"] == 255, 0, row["mask"]).astype(np.uint8))
    said = taught((data, everything_right)).judge(questions((data, everything_right)))
    assert all(j.verdict == "yes" and j.p_yes > 0.9 for j in said)  # one-sided lessons


# ---- in the loop ----

TINY = {
    "mode": "vlm",
    "judge": "learned",
    "judge_options": {"folds": 2},
    "tau": 0.3,
    "steps": 3,
    "batch_size": 4,
    "image_size": 48,
    "initial": 8,
    "increment": 6,
    "max_labelled": 14,
    "gallery": 0,
    "val_share": 4,
}


def run(folder: Path, out: Path, **more: Any) -> list[Any]:
    return list(run_al(make_config({**TINY, "dataset": str(folder), "output_dir": str(out), **more})))


def without_clock(rounds: list[Any]) -> list[dict[str, Any]]:
    return [{**vars(r), "seconds": None} for r in rounds]


def test_a_run_that_is_killed_while_it_learns_ends_alike_and_reads_no_unpaid_mask(scenes, tmp_path):
    whole = run(scenes, tmp_path / "whole")
    assert [r.judge["n"] for r in whole] == [32, 26] and all(r.budget["peeks"] == 0 for r in whole)

    def work() -> None:
        at_step(7, kill)  # in the second twin of round 0
        run(scenes, tmp_path / "killed")

    assert in_child(work) == (-signal.SIGKILL, "")
    assert without_clock(run(scenes, tmp_path / "killed")) == without_clock(whole)
    assert not list((tmp_path / "killed").rglob("unseen")) and not list((tmp_path / "killed").rglob("twin_*"))
    paid = set(whole[0].start_ids) | {i for r in whole for i in r.selection["ids"]}
    paid |= set(row_ids(load_data(str(scenes), seed=0, val_share=4).val))
    shutil.copytree(scenes, tmp_path / "spoilt")
    for path in (tmp_path / "spoilt" / "SegmentationClass").glob("train_*.png"):
        if path.stem not in paid:
            with Image.open(path) as old:
                new, palette = (
                    np.random.default_rng(0).integers(0, 21, old.size[::-1], dtype=np.uint8),
                    old.getpalette(),
                )
            picture = Image.fromarray(new)
            picture.putpalette(palette)
            picture.save(path)
    spoilt = run(tmp_path / "spoilt", tmp_path / "other")
    assert [(r.selection, r.pseudo_ids) for r in spoilt] == [(r.selection, r.pseudo_ids) for r in whole]


def test_too_few_labelled_images_are_refused_before_anything_is_trained(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_itl.experiment.round.fit", lambda *a, **k: pytest.fail("a network was trained"))
    with pytest.raises(ConfigError, match="needs 10 of them in round 0, and there are 8: set initial to 10"):
        run(scenes, tmp_path / "run", judge_options={})


def test_masks_of_a_foundation_model_on_photographs(voc, shared, tmp_path):
    """Forty paid photographs, Grounded-SAM's masks: better than the prototype's agreement judge (AUC .79 / .82)."""
    from vlm_itl.data.masks import read_mask

    labels, data = LabelSpace.voc(), load_data(str(voc), val_share=1, leaks="off")
    rows = data.train.select(range(0, 140))
    store = MaskStore(tmp_path, labels)
    source = shared / "data" / "grounded_sam_voc"
    if not source.is_dir():
        pytest.skip("no masks of Grounded-SAM in the shared folder")
    for image_id in row_ids(rows):
        store.write(image_id, read_mask(source / f"{image_id}.png", labels))
    lesson, rest = lesson_of(Shown(rows.select(range(40)), store)), lesson_of(Shown(rows.select(range(40, 140)), store))
    _, whole = Scholar(lesson, len(labels)).judge(rest.segments)
    for tau, least in ((0.5, 0.8), (0.7, 0.83)):
        assert roc_auc_score([rest.whole[i] >= tau for i in rest.whole], [whole[i].iou for i in rest.whole]) > least


def test_it_is_asked_before_the_first_training_where_it_needs_no_model(scenes, tmp_path):
    """Masks from elsewhere, learnt from the images of the start: round 0 trains on what is accepted already."""
    more = {"proposer": "simulated", "accept_by": "class", "max_labelled": 10, "tau": 0.5}
    (first,) = run(scenes, tmp_path / "run", **{**more, "initial": 10})
    assert first.pseudo > 0
    options = {"ask_model": True}
    (later,) = run(scenes, tmp_path / "waits", **{**more, "initial": 10, "judge_options": options})
    assert later.pseudo == 0 and later.judge["n"] > 0
