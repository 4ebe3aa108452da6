"""The page of picks: shares add up, figures hold every picture, wrong picks are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.studies.picks import class_shares, pick_with, plot_class_shares, plot_picks


@pytest.fixture()
def pool() -> SimpleNamespace:
    """Eight images of three classes, one of which is never predicted."""
    histogram = np.zeros((8, 3), np.float32)
    histogram[:, 0] = [1, 1, 1, 1, 1, 0.5, 0.25, 0]
    histogram[:, 2] = 1 - histogram[:, 0]
    scores = {"entropy": np.linspace(0, 1, 8)}
    return SimpleNamespace(ids=list("abcdefgh"), scores=scores, embedding=np.eye(8), class_hist=histogram)


def test_shares(pool: SimpleNamespace):
    shares = class_shares({"top": (["h"], ["why"]), "all": (pool.ids, [])}, pool, ["sky", "cow", "cat"])
    assert list(shares.columns) == ["sky", "cat"] and np.isclose(shares.loc["pool"].sum(), 1)
    assert np.allclose(shares.loc["all"], 1) and np.isclose(shares.loc["top", "cat"], 1 / (2.25 / 8))
    with pytest.raises(DataError, match="'z', picked by top"):
        class_shares({"top": (["z"], [])}, pool, ["sky", "cow", "cat"])


def test_pick_with_is_seeded(pool: SimpleNamespace):
    one = pick_with(["entropy", "random"], pool, pool.ids[1:], 3, labelled=["a"], seed=1)
    assert one == pick_with(["entropy", "random"], pool, pool.ids[:0:-1], 3, labelled=["a"], seed=1)
    assert one["entropy"][0] == ["h", "g", "f"] and "a" not in one["random"][0]


def test_figures(scenes_small: Any, pool: SimpleNamespace):
    ids = [row["id"] for row in scenes_small.train.select(range(4))]
    figure = plot_picks({"one": (ids[:3], []), "two": (ids[2:], [])}, scenes_small.train)
    pictures = [axis for axis in figure.axes if axis.images]
    assert len(pictures) == 5 and sum(text.get_text() == "2x" for a in pictures for text in a.texts) == 2
    shares = class_shares(pick_with(["entropy"], pool, pool.ids, 2), pool, ["sky", "cow", "cat"])
    shown = plot_class_shares(shares).axes[0]
    assert [t.get_text() for t in shown.get_yticklabels()] == ["entropy"] and len(shown.texts) == 2
    plt.close("all")
    with pytest.raises(ConfigError, match="no strategy"):
        plot_picks({}, scenes_small.train)
