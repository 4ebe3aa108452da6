"""Learning from images without masks: equal to a slow reference, blind to their masks, the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toyloop
from datasets import Dataset
from transformers import MobileNetV2Config, MobileNetV2Model

from vlm_itl.core.checks import ConfigError
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.sources import toy_images
from vlm_itl.model import convergence
from vlm_itl.model.predict import Inference
from vlm_itl.model.recipe import TrainSettings
from vlm_itl.model.segmenter import load_model
from vlm_itl.model.train import FitResult, fit
from vlm_itl.probe.consistency import Consistency, agreement_loss, complementary, cut_box, follow, paste
from vlm_itl.probe.features import FeatureCache
from vlm_itl.probe.probe import Probe, ProbeHead
from vlm_itl.probe.probe_training import fit_probe

VIEW = Inference(64)
TOY = toy_images(64)
IMAGES = TOY.train.remove_columns("mask")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with random weights, large enough that its maps are not all zero."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    net = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.35))
    for weights in net.parameters():
        weights.data *= 8 if weights.dim() == 4 else 1
    net.save_pretrained(folder)
    return folder


def new_probe(encoder: Path) -> Probe:
    probe = load_model(f"probe:{encoder}", TOY.labels, 0, {"head_width": 16})
    probe.cache = FeatureCache(encoder / "seen")
    return probe


def learnt(probe: Probe, extra: Any, **settings: Any) -> dict[str, torch.Tensor]:
    fit_probe(probe, TOY.train.select([0]), TrainSettings(**{"steps": 20, **settings}), VIEW, extra=extra)
    return {key: value.clone() for key, value in probe.net.head.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], two[key]) for key in one)


def test_the_term_against_loops():
    torch.manual_seed(0)
    taught = (4 * torch.randn(3, 5, 4, 6)).softmax(1)
    views = [torch.randn(3, 5, 4, 6) for _ in range(2)]
    inside = torch.rand(3, 4, 6) < 0.8
    total = 0.0
    for view in views:
        for b, y, x in np.ndindex(3, 4, 6):
            best = int(taught[b, :, y, x].argmax())
            if inside[b, y, x] and taught[b, best, y, x] >= 0.7:
                total -= float(view[b, :, y, x].log_softmax(0)[best])
    assert np.isclose(float(agreement_loss(taught, views, inside, 0.7)), total / (2 * int(inside.sum())))


def test_who_is_sure_of_nothing_teaches_nothing():
    taught = torch.full((1, 4, 2, 2), 0.25)
    views = [torch.randn(1, 4, 2, 2, requires_grad=True)] * 2
    loss = agreement_loss(taught, views, torch.ones(1, 2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not views[0].grad.any()


def test_pieces_come_from_the_next_image_at_the_same_place_on_every_scale():
    image = torch.arange(3.0).view(3, 1, 1, 1)
    fine, coarse = image.expand(3, 2, 32, 32), image.expand(3, 5, 8, 8)
    boxes = [(0.25, 0.5, 0.75, 1.0)] * 3
    large, small = paste(fine, boxes), paste(coarse, boxes)
    assert (large[0, 0, 8:24, 16:] == 1).all() and large[0, 0].sum() == 16 * 16
    assert torch.equal(large[:, :1, ::4, ::4], small[:, :1])
    assert (large[2, 0, 8:24, 16:] == 0).all()  # the last takes from the first
    for n in range(300):
        top, left, bottom, right = cut_box(make_rng(n))
        assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1


def test_two_views_share_the_channels_and_average_to_the_whole():
    torch.manual_seed(0)
    maps, means = [torch.randn(4, 32, 3, 3), torch.randn(4, 8, 2, 2)], [torch.randn(32), torch.randn(8)]
    one, other = complementary(maps, means, make_rng(0))
    for a, b, whole, mean in zip(one, other, maps, means, strict=True):
        assert torch.allclose((a + b) / 2, whole, atol=1e-6)
        lost = torch.isclose(a, mean[:, None, None], atol=1e-6).all(-1).all(-1)
        also = torch.isclose(b, mean[:, None, None], atol=1e-6).all(-1).all(-1)
        assert (lost ^ also).all() and lost.any() and also.any()


def test_the_teacher_is_a_moving_mean():
    torch.manual_seed(0)
    student, teacher = ProbeHead([3], 2, 4), ProbeHead([3], 2, 4)
    value = teacher.classify.bias.clone()
    for step in range(1, 2000):
        student.classify.bias.data.normal_()
        keep = min(step / (step + 9), 0.99)
        value = keep * value + (1 - keep) * student.classify.bias
        follow(teacher, student, step)
    assert torch.allclose(teacher.classify.bias, value, atol=1e-5)


def test_it_changes_what_is_learnt_and_weight_zero_does_not(encoder: Path):
    plain = learnt(new_probe(encoder), None)
    arms = {}
    for weight in (0.0, 1.0):
        probe = new_probe(encoder)
        arms[weight] = learnt(probe, Consistency(probe, IMAGES, VIEW, weight, sure=0.2))
    assert not equal(plain, arms[1.0])
    shared = {key: value for key, value in plain.items() if key.startswith(("mean", "scale"))}
    assert equal(shared, arms[1.0])  # means and scales come from the labelled image alone


def test_the_same_seed_learns_the_same_and_a_second_training_starts_over(encoder: Path):
    probe = new_probe(encoder)
    start = {key: value.clone() for key, value in probe.net.head.state_dict().items()}
    term = Consistency(probe, IMAGES, VIEW, 1.0, sure=0.2, seed=3)
    first = learnt(probe, term)
    probe.net.head.load_state_dict(start)
    assert equal(first, learnt(probe, term))  # as the looks of steps="auto" do
    again = new_probe(encoder)
    assert equal(first, learnt(again, Consistency(again, IMAGES, VIEW, 1.0, sure=0.2, seed=3)))
    other = new_probe(encoder)
    assert not equal(first, learnt(other, Consistency(other, IMAGES, VIEW, 1.0, sure=0.2, seed=4)))


def test_masks_of_unlabelled_images_are_never_read(encoder: Path):
    """Garbage in the masks that nobody has paid for changes nothing."""
    rows = TOY.train.with_format(None)
    broken = rows.remove_columns("mask").add_column("mask", [{"bytes": b"no picture", "path": None}] * len(rows))
    arms = []
    for images in (TOY.train, broken):
        probe = new_probe(encoder)
        arms.append(learnt(probe, Consistency(probe, images, VIEW, 1.0, sure=0.2)))
    assert equal(*arms)


def test_a_run_hands_over_what_nobody_has_said_anything_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Round by round: neither people's masks nor pseudo-labels, and no masks at all."""
    told: list[tuple[set[str], set[str]]] = []

    def learns(self: Any, rows: Dataset, *more: Any, unlabelled: Dataset | None = None) -> FitResult:
        assert unlabelled is None or "mask" not in unlabelled.column_names
        told.append((set(rows["id"]), set() if unlabelled is None else set(unlabelled["id"])))
        return FitResult(steps=0, train_loss=0.0)

    monkeypatch.setattr(toyloop.Parrot, "fit", learns)
    config = toyloop.settings(tmp_path / "run", model="probe:nothing", consistency=0.5)
    list(toyloop.toy_loop(config).run())
    assert len(told) == 3
    pool = set().union(*told[0])
    for known, unknown in told:
        assert not known & unknown and known | unknown == pool or not unknown and len(pool - known) < 2


def test_steps_are_found_for_a_probe_with_consistency(encoder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convergence, "FIRST_STEPS", 2)
    monkeypatch.setattr(convergence, "MOST_STEPS", 4)
    monkeypatch.setattr(convergence, "ENOUGH_IMAGES", 4)
    monkeypatch.setattr(convergence, "hold_out", lambda human, seed: (np.array([0, 1, 2]), np.array([3])))
    heads = []
    for steps in ("auto", 4):
        probe = new_probe(encoder)
        term = Consistency(probe, IMAGES, VIEW, 1.0, sure=0.2)
        result = fit_probe(probe, TOY.train, TrainSettings(steps=steps), VIEW, extra=term)
        heads.append({key: value.clone() for key, value in probe.net.head.state_dict().items()})
        if steps == "auto":
            assert [entry["steps"] for entry in result.history if "held_out_loss" in entry] == [2, 4]
    same = {key: value for key, value in heads[1].items() if not key.startswith(("mean", "scale"))}
    assert result.steps == 4 and equal(same, heads[0])


def test_a_probe_draws_by_its_mixture(encoder: Path):
    """Pseudo-labels that the judge is sure are bad are not there; without a mixture its doubt changes nothing."""
    rows = TOY.train.add_column("human", [True, True, False, False]).add_column("p_yes", [1.0, 1.0, 0.0, 0.0])
    heads = {}
    for name, (given, mixture) in {
        "plain": (TOY.train, {}),
        "columns": (rows, {}),
        "weighed": (rows, {"weight_by": "p_yes"}),
    }.items():
        probe = new_probe(encoder)
        fit_probe(probe, given, TrainSettings(steps=6, batch_size=2, mixture=mixture), VIEW)
        heads[name] = dict(probe.net.head.state_dict())
    assert equal(heads["plain"], heads["columns"]) and not equal(heads["plain"], heads["weighed"])


def test_errors(encoder: Path):
    probe = new_probe(encoder)
    none: Dataset = IMAGES.select([])
    with pytest.raises(ConfigError, match="learns from unlabelled images, and there are 0"):
        Consistency(probe, none, VIEW, 1.0)
    network = load_model("segformer-nano", TOY.labels)
    with pytest.raises(ConfigError, match="built for probes"):
        fit(network, TOY.train, TrainSettings(steps=1, consistency=1.0), VIEW)
