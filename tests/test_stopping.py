"""Rules to stop by: they see what a run sees, end it there, and a run that is ended early is a whole one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit
from toyloop import Parrot, settings, toy_loop

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.sources import toy_images
from vlm_itl.experiment import make_config, run_al
from vlm_itl.experiment.loop import Loop
from vlm_itl.judging import StopRule, miou_gain, why_stop
from vlm_itl.judging.stopping import Point, expected_gain, fit_curve, next_seconds, stop_regret, stops_at

PEOPLE = {"policy": "observe", "initial": 1, "increment": 1, "max_labelled": 4, "mode": "al"}


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_the_curve_is_that_of_a_general_optimiser() -> None:
    """Against scipy's `curve_fit` with the same bounds, on curves with noise: the same next gain."""
    rng, n = np.random.default_rng(0), np.arange(20, 260, 20.0)
    for _ in range(10):
        y = 0.6 - rng.uniform(0.5, 2) * n ** -rng.uniform(0.3, 1) + rng.normal(0, 0.004, len(n))
        ours = fit_curve(n, y)
        theirs, _ = curve_fit(
            lambda k, a, b, c: a - b * k**-c, n, y, (0.6, 1, 0.5), bounds=([-5, 0, 0.1], [1, 50, 2]), maxfev=20000
        )
        other = theirs[0] - theirs[1] * 260.0 ** -theirs[2] - (theirs[0] - theirs[1] * 240.0 ** -theirs[2])
        assert ours.at(260) - ours.at(240) == pytest.approx(other, abs=5e-4)


def test_a_falling_curve_promises_nothing() -> None:
    points = [Point(k, 240.0 * k, 0.5 - 0.001 * k) for k in (20, 40, 60, 80)]
    assert expected_gain(points, 100) == pytest.approx(0, abs=1e-9)
    assert stops_at(StopRule(price=1e6), points) == 2 and why_stop(StopRule(price=1e6), points[:2], 60) == ""


def test_rounds_that_say_nothing_stop_nothing() -> None:
    """A validation split without truth has no mean IoU, and a round that asked nobody no new place on the curve."""
    rule = StopRule(price=1.0)
    assert why_stop(rule, [Point(k, 240.0 * k, math.nan) for k in (20, 40, 60)], 80) == ""
    assert why_stop(rule, [Point(20, 4800.0, 0.3), Point(40, 9600.0, 0.4), Point(40, 9600.0, 0.41)], 60) == ""


def test_a_bootstrap_of_pairs_agrees_on_a_gain() -> None:
    """Images drawn again with replacement: the same standard error within a fifth, in the median."""
    rng, ratios = np.random.default_rng(1), []
    for _ in range(12):
        truth = rng.integers(50, 900, (60, 1, 4)).astype(float) * (rng.random((60, 1, 4)) < 0.6)
        share = np.clip(rng.normal(0.6, 0.2, truth.shape), 0, 1)
        before, after = (
            np.concatenate([truth * np.clip(share + more, 0, 1), truth, truth], axis=1)
            for more in (0.0, rng.normal(0.05, 0.1, truth.shape))
        )

        def gain(rows: Any, before: np.ndarray = before, after: np.ndarray = after) -> float:
            sums = [counts[rows].sum(0) for counts in (before, after)]
            old, new = ((s[0] / (s[1] + s[2] - s[0])).mean() for s in sums)
            return float(new - old)

        found = miou_gain(before, after)
        assert found.gain == pytest.approx(gain(slice(None)))
        spread = np.std([gain(rng.integers(0, 60, 60)) for _ in range(300)])
        ratios.append((found.high - found.low) / 2 / 2.0 / spread)  # t of 59 degrees is 2.0
    assert 0.8 < np.median(ratios) < 1.25


def test_the_next_round_costs_what_the_last_masks_did() -> None:
    start = Point(10, 4000.0, 0.3, masks=20)  # ten of them to validate on
    assert next_seconds([start], 15) == 1000.0
    assert next_seconds([start, Point(20, 5000.0, 0.4, masks=30)], 30) == 1000.0
    assert next_seconds([start, Point(10, 4000.0, 0.4, masks=20)], 30) == 0.0  # nobody drew anything


def test_regret_is_nothing_at_the_best_round_only() -> None:
    points, test = [Point(k, 240.0 * k, 0.0) for k in (10, 20, 30, 40)], [0.3, 0.4, 0.45, 0.451]
    found = [stop_regret(points, test, 600.0, at) for at in range(4)]
    assert found.index(0.0) == 2 and min(found) == 0.0 and found[3] == pytest.approx(2400 - 60)


def test_a_run_ends_where_the_seconds_do(tmp_path: Path) -> None:
    whole = list(toy_loop(settings(tmp_path / "whole", **PEOPLE)).run())
    seconds = [r.budget["human_seconds"] for r in whole]
    stop = {"seconds": seconds[1] + 1}
    early = list(toy_loop(settings(tmp_path / "early", **PEOPLE, stop=stop)).run())
    assert len(whole) == 4 and len(early) == 2
    assert [r.labelled for r in early] == [1, 2] and not early[0].stopped and "human seconds" in early[1].stopped
    assert early[1].selection["ids"] == [] and "the last one" in str(early[1])  # nobody is asked for what is not used
    summary = summary_of(tmp_path / "early")
    assert summary["stopped"] == early[1].stopped and summary["finished"]
    assert summary["budget"]["human_seconds"] == seconds[1] and summary["test"] is not None
    assert summary_of(tmp_path / "whole")["stopped"] == ""
    again = list(toy_loop(settings(tmp_path / "early", **PEOPLE, stop=stop)).run())  # it is done, and stays so
    assert again == early


def test_a_killed_run_stops_at_the_same_round(tmp_path: Path) -> None:
    stop = {"seconds": 1000.0}
    whole = list(toy_loop(settings(tmp_path / "whole", **PEOPLE, stop=stop)).run())
    loop = toy_loop(settings(tmp_path / "killed", **PEOPLE, stop=stop))
    loop.run_round()
    loop.folder.close()
    on = list(toy_loop(settings(tmp_path / "killed", **PEOPLE, stop=stop)).run())
    assert [(r.labelled, r.stopped) for r in on] == [(r.labelled, r.stopped) for r in whole]


def test_rules_look_at_validation_images(tmp_path: Path) -> None:
    """A real network that learns nothing: the gain ends it as early as can be, and its intervals are in the records."""
    size = {"n_train": 16, "n_test": 3, "size": (32, 40)}
    small = {
        "mode": "al",
        "strategy": "random",
        "data_options": size,
        "steps": 0,
        "image_size": 32,
        "gallery": 0,
        "val_share": 4,
    }
    plan = {"initial": 2, "increment": 2, "max_labelled": 12, "stop": {"gain": 0.0, "rounds": 2}}
    rounds = list(run_al(make_config({**small, **plan, "output_dir": str(tmp_path / "run")})))
    assert len(rounds) == 3 and "gained" in rounds[2].stopped
    found = rounds[0].metrics["val"]["interval"]
    assert found["low"] <= found["miou"] <= found["high"] and found["images"] == 4
    test = summary_of(tmp_path / "run")["test"]["interval"]
    assert test["images"] == 3 and test["low"] <= test["miou"] <= test["high"]
    card = next((tmp_path / "run").glob("round_*/model/README.md")).read_text()
    assert "would halve the interval" in card


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for stop, message in (
        ({"second": 5}, "Did you mean 'seconds'"),
        ({"rounds": 2}, "seconds, gain or price"),
        ({"gain": -1}, "gain"),
        ({"level": 1, "gain": 0}, "level"),
        ("soon", "stop"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            make_config(stop=stop)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="only one"):
        make_config(mode="baseline", stop={"seconds": 5})
    data = toy_images()
    config = settings(tmp_path / "run", **PEOPLE, stop={"price": 5})
    with pytest.raises(ConfigError, match="val_share"):
        Loop(config, data, Parrot(data))
    with pytest.raises(DataError, match="three rounds"):
        fit_curve([10, 20], [0.3, 0.4])
    with pytest.raises(DataError, match="same images"):
        miou_gain(np.ones((3, 3, 2)), np.ones((4, 3, 2)))
