"""How long to train: one rule, found again after a kill, never on what a judge drew."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from vlm_itl.cli.run import check_parameters, notebook_parameters
from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.data.masks import DecodeRows, make_rows, raw_rows
from vlm_itl.data.sources import toy_images
from vlm_itl.experiment.config import make_config, notebook_settings
from vlm_itl.model import convergence, train
from vlm_itl.model.convergence import Growth, grow_steps, held_out_losses, hold_out
from vlm_itl.model.predict import Inference
from vlm_itl.model.recipe import TrainSettings
from vlm_itl.model.segmenter import Segmenter, load_model
from vlm_itl.model.train import fit

VIEW = Inference(32)
TOY = toy_images()


def many(count: int, **columns: list[Any]) -> Dataset:
    """The toy's images over and over, under new names."""
    cells = raw_rows(TOY.train)[:]
    turns = [n % len(TOY.train) for n in range(count)]
    ids = [f"i{n:02d}" for n in range(count)]
    rows = make_rows(ids, [cells["image"][n] for n in turns], [cells["mask"][n] for n in turns])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows.with_transform(DecodeRows(TOY.labels))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks of 1, 2 and 4 steps."""
    monkeypatch.setattr(convergence, "FIRST_STEPS", 1)
    monkeypatch.setattr(convergence, "MOST_STEPS", 4)


@pytest.mark.parametrize(
    ("losses", "steps", "limited"),
    [
        ([1.0, 0.99, 0.985], 200, False),  # 1 % is not enough, twice; twice the best is taken
        ([1.0, 0.97, 0.96, 0.955], 400, False),
        ([1.0, 1.2, 0.9, 0.89, 0.89], 800, False),  # one bad look ends nothing
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.495], 6400, False),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], 6400, True),
        ([1.0, 1.2, 1.1], 200, False),
        ([0.0, 0.0, 0.0], 200, False),
    ],
)
def test_the_rule(losses: list[float], steps: int, limited: bool):
    told = iter(losses)
    found = grow_steps(lambda n: [next(told)])
    assert (found.steps, found.limited) == (steps, limited)
    assert [loss for _, (loss,) in found.looks] == losses


def test_it_is_not_over_while_either_loss_falls():
    """Ten held-out scenes of two draws: missing mean IoU and wrong pixels after 100, 200, ... steps."""
    missing, wrong = (
        [0.6835, 0.6905, 0.6937, 0.6852, 0.6433, 0.6568, 0.66],
        [0.122, 0.109, 0.101, 0.096, 0.087, 0.104, 0.1],
    )
    told = dict(zip([100 * 2**n for n in range(7)], zip(missing, wrong, strict=True), strict=True))
    assert grow_steps(lambda n: told[n][:1]).steps == 200  # test mean IoU .42
    assert grow_steps(lambda n: told[n]).steps == 3200  # .51, as after 1600 steps
    other = {100: (0.7, 0.091), 200: (0.748, 0.115), 400: (0.639, 0.119), 800: (0.624, 0.079)}
    assert grow_steps(lambda n: other[n][1:], most=800).steps == 200  # test mean IoU .36
    assert grow_steps(other.__getitem__, most=800) == Growth(800, list(other.items()), limited=True)


def test_pixels_count_only_while_the_mean_iou_is_as_good():
    """A probe on 44 photographs, nine of them held out: fewer wrong pixels, and small classes lost; test is flat."""
    missing = [0.5413, 0.5351, 0.5275, 0.571, 0.6063, 0.5912, 0.628]
    wrong = [0.2201, 0.2176, 0.2112, 0.2014, 0.1899, 0.1831, 0.1911]
    told = dict(zip([100 * 2**n for n in range(7)], zip(missing, wrong, strict=True), strict=True))
    found = grow_steps(told.__getitem__)
    assert found.steps == 800 and [steps for steps, _ in found.looks] == [100, 200, 400, 800, 1600]
    level = {steps: (0.5275, lost) for steps, (_, lost) in told.items()}
    assert grow_steps(level.__getitem__).steps == 6400


def test_cost_is_bounded():
    for first, most in [(100, 6400), (100, 100), (100, 50), (7, 1000)]:
        asked: list[int] = []
        found = grow_steps(lambda n, asked=asked: asked.append(n) or [1 / n], first, most)
        assert found.limited and max(asked) <= most < 2 * max(asked) and sum(asked) <= 2 * most


def test_a_loss_that_is_no_number_stops_it():
    with pytest.raises(RunError, match="lower learning_rate"):
        grow_steps(lambda n: [0.5, math.inf])


def test_only_human_masks_are_held_out():
    for seed in range(5):
        human = np.random.default_rng(seed).random(60) < 0.5
        learn, held = hold_out(human, seed)
        assert human[held].all() and len(held) == human.sum() // 5
        assert sorted([*learn, *held]) == list(range(60))
    assert (hold_out(human, 0)[1] == hold_out(human, 0)[1]).all()
    assert hold_out(np.arange(50) < 9, 0) is None and hold_out(np.arange(50) < 10, 0) is not None


def test_a_constant_network_misses_all_but_one_class():
    """By hand: everything is class 0, so one class of three has an IoU, its share of the valid pixels."""
    model = load_model("segformer-nano", TOY.labels).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    masks = np.concatenate([np.asarray(row["mask"]).ravel() for row in TOY.train])
    by_hand = 1 - (masks[masks != 255] == 0).mean() / 3
    ground = (masks[masks != 255] == 0).mean()
    assert held_out_losses(model, TOY.train, VIEW) == pytest.approx((by_hand, 1 - ground))


def test_nothing_valid_held_out_is_told():
    cells = raw_rows(TOY.train)[:]
    void = [{"bytes": own_png(np.full((64, 64), 255, np.uint8)), "path": None}] * 4
    images = [{"bytes": own_png(np.zeros((64, 64, 3), np.uint8)), "path": None}] * 4
    rows = make_rows(cells["id"], images, void).with_transform(DecodeRows(TOY.labels))
    with pytest.raises(DataError, match="no valid pixel"):
        held_out_losses(load_model("segformer-nano", TOY.labels), rows, VIEW)


def own_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def weights(model: Segmenter) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def learn(rows: Dataset, folder: Path | None = None, **more: Any) -> tuple[Any, list[torch.Tensor]]:
    model = load_model("segformer-nano", TOY.labels)
    settings = TrainSettings(**{"steps": "auto", "batch_size": 2, **more})
    return fit(model, rows, settings, VIEW, checkpoints=folder), weights(model)


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_auto_is_the_training_of_the_number_it_finds(short: None):
    rows = many(12)
    result, found = learn(rows)
    looks = [entry for entry in result.history if "held_out_loss" in entry]
    told = {entry["steps"]: (entry["held_out_loss"], entry["held_out_wrong"]) for entry in looks}
    assert [*told][:2] == [1, 2] and result.steps == grow_steps(told.__getitem__, 1, 4).steps
    fixed, plain = learn(rows, steps=result.steps)
    assert same(found, plain) and fixed.train_loss == result.train_loss


def test_killed_between_two_looks_finds_the_same(short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = many(12)
    result, found = learn(rows, tmp_path / "whole")
    real, calls = train.held_out_losses, []

    def dies(*arguments: Any) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "held_out_losses", dies)
    with pytest.raises(KeyboardInterrupt):
        learn(rows, tmp_path / "killed")
    monkeypatch.setattr(train, "held_out_losses", real)
    trained: list[int] = []
    monkeypatch.setattr(train, "_run", lambda *a, run=train._run: trained.append(a[0].steps) or run(*a))
    again, same_found = learn(rows, tmp_path / "killed")
    assert same(found, same_found) and again.history == result.history
    third = [4] if len([entry for entry in result.history if "held_out_loss" in entry]) == 3 else []
    assert trained == [*third, result.steps]  # the looks that were done are read, not trained again


def test_pseudo_labels_decide_nothing_about_the_number(short: None, monkeypatch: pytest.MonkeyPatch):
    """Whatever stands in their masks, they are never held out."""
    seen: list[list[str]] = []
    real = train.held_out_losses
    monkeypatch.setattr(
        train, "held_out_losses", lambda m, rows, *more: seen.append(rows["id"]) or real(m, rows, *more)
    )
    learn(many(20, human=[n < 10 for n in range(20)], weight=[1.0] * 20))
    assert seen and all(name < "i10" for ids in seen for name in ids)


def test_too_few_masks_are_told(short: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convergence, "FALLBACK_STEPS", 2)
    with pytest.warns(UserWarning, match="fewer than 10: 2 steps are taken"):
        result, _ = learn(many(4))
    assert result.steps == 2


def test_settings():
    assert make_config({"steps": "auto"}).train_settings.steps == "auto"
    for wrong, words in [
        ({"steps": "automatic"}, "steps must be a whole number or 'auto'"),
        ({"steps": "auto", "epochs": 3}, "set one of the two"),
        ({"steps": -1}, "steps must be a whole number >= 0"),
        ({"steps": 1.5}, "steps"),
        ({"consistency": 0.5}, "consistency is built for probes"),
        ({"consistency": -1, "model": "probe:x"}, "consistency must be"),
    ]:
        with pytest.raises(ConfigError, match=words):
            make_config(wrong)


def test_a_time_limit_for_demos_holds_for_auto(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLM_ITL_MAX_STEPS", "30")
    assert notebook_settings({"steps": "auto"})["steps"] == 30


@pytest.mark.parametrize("name", ["run_al", "run_baseline"])
def test_the_command_line_takes_auto_and_numbers(name: str):
    known = notebook_parameters(Path(__file__).parent.parent / "nbs" / f"{name}.ipynb")
    assert check_parameters({"steps": "auto"}, known) == {"steps": "auto"}
    assert check_parameters({"steps": "70"}, known) == {"steps": 70}
    with pytest.raises(ConfigError, match="does not fit"):
        check_parameters({"steps": "1.5"}, known)


def test_growth_says_whether_it_was_cut_off():
    assert Growth(7) == Growth(7, [], False)


@pytest.mark.parametrize("cut", [True, False])
def test_a_search_that_the_limit_ends_is_told(cut: bool, monkeypatch: pytest.MonkeyPatch):
    """Nobody takes the longest training that was tried for one that is long enough."""
    rows, losses = TOY.train.select([0] * 10), iter([1.0, 0.9, 0.8] if cut else [1.0, 1.0, 1.0])
    monkeypatch.setattr(convergence, "MOST_STEPS", 400)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = convergence.find_steps(rows, 0, lambda *_: [next(losses)])
    assert found.limited is cut and bool(said) is cut
    assert not cut or "still gains at 400 steps" in str(said[0].message)
