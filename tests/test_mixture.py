"""Mixing human masks and pseudo-labels: shares hold batch by batch, edges mean something, nothing changes without."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image

from vlm_itl.core.checks import ConfigError
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import make_rows
from vlm_itl.data.sources import toy_images
from vlm_itl.data.transforms import TrainingSet, collate
from vlm_itl.experiment.config import make_config
from vlm_itl.model.mixture import (
    Draws,
    Mixture,
    capped_rates,
    classes_shown,
    deal,
    draws_of,
    mixed_order,
    read_mixture,
)
from vlm_itl.model.predict import Inference
from vlm_itl.model.recipe import TrainSettings, pixel_loss, train_transform
from vlm_itl.model.segmenter import load_model
from vlm_itl.model.train import fit


def pool(count: int, people: int, kinds: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whose masks they are, and classes of which the first is in most images."""
    rng = np.random.default_rng(seed)
    classes = rng.random((count, kinds)) < np.geomspace(0.7, 0.03, kinds)
    return np.arange(count) < people, classes


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.875, 1.0])
@pytest.mark.parametrize(("steps", "batch_size"), [(1, 1), (7, 3), (40, 8)])
def test_every_batch_has_its_share_of_human_masks(share: float, steps: int, batch_size: int):
    human, _ = pool(50, 9, 3)
    order = mixed_order(human, np.ones(50), None, steps, batch_size, make_rng(0), human_share=share)
    counts = human[order].reshape(steps, batch_size).sum(axis=1)
    assert len(order) == steps * batch_size
    assert (np.abs(counts - share * batch_size) < 1 + 1e-9).all()
    assert abs(counts.sum() - share * len(order)) <= 0.5 + 1e-9


def test_images_of_one_kind_come_equally_often_and_in_passes():
    human, _ = pool(50, 9, 3)
    order = mixed_order(human, np.ones(50), None, 100, 8, make_rng(1), human_share=0.5)
    for kind in (human, ~human):
        own = order[kind[order]]
        times = np.bincount(own, minlength=50)[kind]
        assert times.max() - times.min() <= 1
        assert len(set(own[: kind.sum()])) == kind.sum()  # everybody once before anybody twice


def test_without_a_share_the_numbers_of_images_decide():
    human, _ = pool(40, 10, 3)
    order = mixed_order(human, np.ones(40), None, 50, 8, make_rng(2))
    assert (human[order].reshape(50, 8).sum(axis=1) == 2).all()
    assert (np.bincount(order) == 10).all()


@pytest.mark.parametrize("people", [0, 12])
def test_where_one_kind_is_missing_the_other_fills_the_batches(people: int):
    human, _ = pool(12, people, 3)
    order = mixed_order(human, np.ones(12), None, 6, 4, make_rng(0), human_share=0.25)
    assert (np.bincount(order, minlength=12) == 2).all()


def test_what_weighs_nothing_is_never_drawn():
    human, classes = pool(20, 5, 2)
    weight = np.where(np.arange(20) % 3 == 0, 0.0, 0.7)
    order = mixed_order(human, weight, classes, 30, 4, make_rng(0), 0.5, 0.4, 1.0)
    assert not set(order) & set(np.flatnonzero(weight == 0))
    with pytest.raises(ConfigError, match="weight 0"):
        mixed_order(human, np.zeros(20), classes, 1, 1, make_rng(0))


@pytest.mark.parametrize("cap", [0.3, 0.5, 0.9])
def test_no_class_fills_more_than_the_cap(cap: float):
    human, classes = pool(400, 40, 6)
    order = mixed_order(human, np.ones(400), classes, 300, 8, make_rng(0), human_share=0.5, class_cap=cap)
    drawn = order[~human[order]]
    assert (classes[drawn].mean(axis=0) <= cap + 0.01).all()
    uncapped = mixed_order(human, np.ones(400), classes, 300, 8, make_rng(0), human_share=0.5)
    assert classes[uncapped[~human[uncapped]]].mean(axis=0).max() > 0.6
    own = np.bincount(order[human[order]])[:40]
    assert own.max() - own.min() <= 1  # human masks know no cap


def test_a_cap_that_cannot_hold_leaves_the_classes_even():
    one = np.ones((5, 1), dtype=bool)
    assert len(set(capped_rates(np.ones(5), one, 0.1))) == 1
    three = np.eye(3, dtype=bool)[[0] * 20 + [1] * 5 + [2]]
    rates = capped_rates(np.ones(26), three, 0.1)
    assert np.abs(rates @ three / rates.sum() - 1 / 3).max() < 0.02


def test_a_class_in_every_image_does_not_lift_the_cap_of_others():
    """It is in all draws, whatever the rates; they sank together, and nothing was capped."""
    both = np.stack([np.ones(20, dtype=bool), np.arange(20) < 16], axis=1)
    rates = capped_rates(np.ones(20), both, 0.5)
    assert abs(rates[:16].sum() / rates.sum() - 0.5) < 0.01
    assert (rates == capped_rates(np.ones(20), both[:, 1:], 0.5)).all()
    order = mixed_order(np.zeros(20, bool), np.ones(20), both, 40, 5, make_rng(0), class_cap=0.5)
    assert (order < 16).mean() <= 0.51


@pytest.mark.parametrize(
    "names", [("background", "red", "blue"), ("red", "background", "blue"), ("red", "blue", "sky")]
)
def test_the_background_is_the_class_of_that_name_else_the_first(names: tuple[str, ...]):
    labels, cells = LabelSpace(names), []
    for held in ([0], [0, 1], [1, 2]):
        buffer = BytesIO()
        Image.fromarray(np.array([held], np.uint8)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    full = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]], bool)
    wanted = [place for place, name in enumerate(names) if place != (1 if names[1] == "background" else 0)]
    rows = make_rows(["a", "b", "c"], cells, cells)
    assert (classes_shown(rows, labels) == full[:, wanted]).all()


def test_rare_classes_come_more_often():
    human, classes = pool(300, 300, 6, seed=3)
    shares = {}
    for balance in (0.0, 0.5, 1.0):
        order = mixed_order(human, np.ones(300), classes, 400, 8, make_rng(0), balance=balance)
        shares[balance] = classes[order].mean(axis=0)
    assert shares[0.0][-1] < shares[0.5][-1] < shares[1.0][-1]
    assert np.abs(shares[0.0] - classes.mean(axis=0)).max() < 0.01


def test_the_order_is_a_function_of_the_generator():
    human, classes = pool(60, 20, 4)
    how: dict[str, Any] = {"human_share": 0.4, "class_cap": 0.5, "balance": 0.5}
    first, again, other = (mixed_order(human, np.ones(60), classes, 50, 8, make_rng(s), **how) for s in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_dealing_is_never_more_than_one_from_its_due():
    rates = np.random.default_rng(0).random(30) * 5
    rates[3] = 0
    for count in (1, 17, 200, 3000):
        times = np.bincount(deal(rates, count, make_rng(count)), minlength=30)
        assert times.sum() == count and times[3] == 0
        assert np.abs(times - count * rates / rates.sum()).max() < 1.7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"human": 0.5}, "'human' is not known"),
        ({"human_share": 1.5}, "human_share must be a number >= 0 and <= 1"),
        ({"human_share": "half"}, "human_share"),
        ({"pseudo_weight": None}, "pseudo_weight"),
        ({"weight_by": "area"}, "weight_by"),
        ({"class_cap": 0}, "class_cap"),
        ({"balance": math.inf}, "balance"),
        ("half", "mixture must be a dictionary"),
    ],
)
def test_wrong_options_are_one_line(options: Any, words: str):
    for refused in (lambda: read_mixture(options), lambda: make_config({"mixture": options})):
        with pytest.raises(ConfigError, match=words) as error:
            refused()
        assert "\n" not in str(error.value)


def judged_rows() -> Dataset:
    """The toy, one image of four by people."""
    rows = toy_images().train
    return rows.add_column("human", [True, False, False, False]).add_column("p_yes", [1.0, 0.5, 0.25, 1.0])


def test_nothing_asked_for_nothing_changed():
    toy = toy_images()
    assert draws_of(judged_rows(), toy.labels, read_mixture({}), 9, 4, seed=3) == Draws(None, None)
    model = load_model("segformer-nano", toy.labels)
    settings = TrainSettings(steps=3, batch_size=2)
    plain = TrainingSet(toy.train, train_transform(settings, model, 32), 6, seed=0)
    assert "weight" not in plain[0]


def test_weights_in_the_rows_count_without_a_mixture():
    rows = toy_images().train.add_column("weight", [1.0, 0.5, 1.0, 1.0])
    draws = draws_of(rows, toy_images().labels, Mixture(), 9, 4, seed=3)
    assert draws.order is None and draws.weights is not None and draws.weights.tolist() == [1.0, 0.5, 1.0, 1.0]


def test_weights_are_those_of_a_loss_by_hand():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 5, 6, 6), torch.randint(0, 5, (3, 6, 6))
    truth[0, :2] = 255
    weights = torch.tensor([1.0, 0.5, 0.0])
    each = F.cross_entropy(logits, truth, ignore_index=255, reduction="none").sum(dim=(1, 2))
    by_hand = (each * weights).sum() / (truth != 255).sum()
    assert torch.allclose(pixel_loss(logits, truth, weights=weights), by_hand)
    assert torch.allclose(pixel_loss(logits, truth, weights=torch.ones(3)), pixel_loss(logits, truth))


def test_a_training_draws_by_its_mixture():
    toy, rows = toy_images(), judged_rows()
    mixture = Mixture(human_share=0.5, weight_by="p_yes", pseudo_weight=0.5)
    draws = draws_of(rows, toy.labels, mixture, steps=4, batch_size=4, seed=0)
    assert draws.order is not None and draws.weights is not None
    assert (np.bincount(draws.order == 0) == 8).all() and np.allclose(draws.weights, [1, 0.25, 0.125, 0.5])
    model = load_model("segformer-nano", toy.labels)
    settings = TrainSettings(steps=4, batch_size=4)
    drawn = TrainingSet(rows, train_transform(settings, model, 32), 16, 0, draws.order, draws.weights)
    batch = collate([drawn[i] for i in range(4)])
    assert torch.equal(batch["weight"], torch.as_tensor(draws.weights)[draws.order[:4]])


def test_a_mixture_changes_the_weights_learnt_and_equal_shares_do_not_break_repeatability():
    toy, view = toy_images(), Inference(32)

    def learnt(rows: Dataset, **mixture: Any) -> list[torch.Tensor]:
        model = load_model("segformer-nano", toy.labels)
        fit(model, rows, TrainSettings(steps=2, batch_size=2, mixture=mixture), view)
        return list(model.state_dict().values())

    def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    plain = learnt(toy.train)
    assert same(plain, learnt(judged_rows()))  # pseudo-labels without a mixture: as ever
    light = learnt(judged_rows(), pseudo_weight=0.1)
    assert not same(plain, light) and same(light, learnt(judged_rows(), pseudo_weight=0.1))
