"""Large pools: what is read a block at a time and measured late chooses what the plain way chooses."""

import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vlm_itl.core.checks import DataError
from vlm_itl.core.seeds import make_rng
from vlm_itl.sampler import selects, strategy
from vlm_itl.sampler.selects import Sampler, ball_radius, cluster, neighbour_distance, probcover, typiclust
from vlm_itl.sampler.strategy import kcenter_greedy, kmeanspp
from vlm_itl.sampler.view import Column, as_column, centred, part_of


def features(n: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    "Groups that overlap, with copies."
    rng = make_rng(seed, "scale")
    points = rng.normal(size=(12, dim))[rng.integers(0, 12, n)] * 2 + rng.normal(size=(n, dim))
    points[n // 2 : n // 2 + n // 20] = points[: n // 20]
    return points.astype(np.float32)


def pool_of(points: np.ndarray) -> SimpleNamespace:
    "A scoring pass with these features."
    rng = make_rng(0, "scale", "scores")
    scores = {"entropy-mean": rng.random(len(points))}
    hist = rng.random((len(points), 5)).astype(np.float32)
    ids = [f"{i:06d}" for i in range(len(points))]
    return SimpleNamespace(ids=ids, scores=scores, embedding=points, gradient=points, class_hist=hist)


def plain_kcenter(points: np.ndarray, centres: np.ndarray, k: int) -> list[int]:
    "One pass for every pick, in float64."
    points, centres = points.astype(float), centres.astype(float)
    best, picks = np.full(len(points), np.inf), []
    for centre in centres:
        best = np.minimum(best, ((points - centre) ** 2).sum(1))
    for _ in range(k):
        best[picks] = -1
        picks.append(int(best.argmax()))
        best = np.minimum(best, ((points - points[picks[-1]]) ** 2).sum(1))
    return picks


@pytest.mark.parametrize("far", [1, 7, 100, 10_000])
@pytest.mark.parametrize("dim", [1, 8])
def test_kcenter_picks_the_same_however_few_it_looks_at(far: int, dim: int, monkeypatch: pytest.MonkeyPatch):
    points = features(1500, dim)
    monkeypatch.setattr(strategy, "_FAR", far)
    picks, distances = kcenter_greedy(points, points[:4], 200)
    assert picks == plain_kcenter(points, points[:4], 200)
    assert all(a >= b for a, b in zip(distances, distances[1:], strict=False))


def test_kcenter_on_a_lattice_breaks_ties_by_row(monkeypatch: pytest.MonkeyPatch):
    points = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), -1).reshape(-1, 2)
    right = kcenter_greedy(points, points[:1], 144)
    monkeypatch.setattr(strategy, "_FAR", 5)
    assert kcenter_greedy(points, points[:1], 144) == right and sorted(right[0]) == list(range(144))


def test_draws_by_old_distances_have_the_same_distribution(monkeypatch: pytest.MonkeyPatch):
    points = np.array([[9.0, 0], [0, 0], [0, 1], [4, 4], [4, 5], [1, 1]], dtype=np.float32)

    def pairs() -> np.ndarray:
        drawn = [kmeanspp(points, 4, make_rng(seed))[0] for seed in range(1500)]
        assert all(len(set(picks)) == 4 and picks[0] == 0 for picks in drawn)
        return np.stack([np.bincount([picks[place] for picks in drawn], minlength=6) for place in (1, 2, 3)]) / 1500

    by_turns = pairs()
    monkeypatch.setattr(strategy, "_ONE_BY_ONE", 0)
    monkeypatch.setattr(strategy, "_PATIENCE", 1)  # measured as late as can be
    assert np.abs(pairs() - by_turns).max() < 0.06


def test_late_draws_come_to_an_end_among_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategy, "_ONE_BY_ONE", 0)
    points = np.repeat(np.eye(4, dtype=np.float32), 30, axis=0)
    picks, distances = kmeanspp(points, 120, make_rng(0))
    assert sorted(picks) == list(range(120)) and sum(d > 0 for d in distances) == 4  # inf, and three others


def test_probcover_is_exact_where_all_are_counted(monkeypatch: pytest.MonkeyPatch):
    points = features(900, 2)
    right = probcover(points, points[:3], 60, 0.7)
    for settle in (1, 40, 10_000):
        monkeypatch.setattr(selects, "_SETTLE", settle)
        assert probcover(points, points[:3], 60, 0.7) == right
    picks, gains = right
    inside = ((points[:, None] - points[None]) ** 2).sum(-1) <= 0.7**2
    left = ~inside[:3].any(0)
    for pick, gain in zip(picks, gains, strict=True):
        assert gain == (inside & left).sum(1).max() == (inside[pick] & left).sum()
        left &= ~inside[pick]


def test_probcover_of_a_sample_covers_nearly_as_much():
    points = features(4000, 4)
    radius = 2 * ball_radius(points, 12, make_rng(0))  # balls of hundreds, of which a sample holds tens
    picks, gains = probcover(points, points[:0], 20, radius, sample=500, rng=make_rng(0))
    inside = ((points[picks][:, None] - points[None]) ** 2).sum(-1) <= radius**2
    assert abs(sum(gains) - inside.any(0).sum()) <= 1  # what is told of the whole pool is counted, not estimated
    assert sum(gains) >= 0.8 * sum(probcover(points, points[:0], 20, radius)[1])
    everything, more = probcover(points[:300], points[:0], 300, 1e-9, sample=50)
    assert sum(more) == 300 and len(set(everything)) == len(everything)  # sample after sample, until all are covered


def test_clusters_of_a_sample_hold_everybody(monkeypatch: pytest.MonkeyPatch):
    points = features(3000)
    monkeypatch.setattr(selects, "_FITTED", 500)
    groups = cluster(points, 10, make_rng(0), more=points[:7])
    assert len(groups) == 3007 and (groups[3000:] == groups[:7]).all() and len(set(groups)) == 10
    picks, _, counts = typiclust(points, points[:5], 40, make_rng(0), max_clusters=10)
    assert len(set(picks)) == 40 and max(counts) >= 3


def test_density_against_a_sample_finds_the_dense(monkeypatch: pytest.MonkeyPatch):
    rng = make_rng(0)
    points = np.concatenate([rng.normal(0, 0.1, (300, 3)), rng.normal(3, 2, (300, 3))])
    monkeypatch.setattr(selects, "_COMPARED", 200)
    assert set(np.argsort(neighbour_distance(points, 20))[:200]) <= set(range(300))


def test_a_column_is_the_array_it_stands_for(tmp_path: Path):
    points = features(9000)
    np.save(tmp_path / "points.npy", points.astype(np.float16))
    stored = np.load(tmp_path / "points.npy", mmap_mode="r")
    rows = np.arange(0, 9000, 2)
    column = part_of(Column(stored, rows), np.arange(100, 4400))
    assert np.array_equal(np.concatenate([block for _, block in column.blocks()]), stored[rows[100:4400]].astype("f4"))
    assert np.abs(centred(column)[:].mean(0)).max() < 1e-4 and as_column(column) is column
    assert column.copy().dtype == np.float16


@pytest.mark.parametrize("name", ["coreset", "badge", "typiclust", "probcover", "class_random"])
def test_memory_mapped_features_choose_the_same(name: str, tmp_path: Path):
    points = features(2000)
    np.save(tmp_path / "points.npy", points)
    near, far = pool_of(points), pool_of(np.load(tmp_path / "points.npy", mmap_mode="r"))
    labelled = near.ids[::40]
    free = sorted(set(near.ids) - set(labelled))
    chosen = [Sampler(name).select(pool, free, 60, make_rng(3), labelled) for pool in (near, far)]
    assert chosen[0] == chosen[1] and np.array_equal(points, near.embedding)


@pytest.mark.parametrize("name", ["coreset", "badge", "probcover"])
def test_choosing_copies_no_features(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategy, "_ONE_BY_ONE", 1000)  # as a large pool is treated
    monkeypatch.setattr(strategy, "_FAR", 500)
    pool = pool_of(features(20_000, 256))
    options = {"sample": 500, "delta": 60.0} if name == "probcover" else {}
    tracemalloc.start()
    Sampler(name, **options).select(pool, pool.ids, 10, make_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = 6 * Column.BLOCK * 256 * 8
    assert peak < blocks + 0.6 * pool.embedding.nbytes


def test_a_broken_row_far_down_is_named():
    points = features(9000)
    points[8765, 3] = np.nan
    pool = pool_of(points)
    with pytest.raises(DataError, match="embedding is NaN or infinite for 1 of 9000 images: 008765"):
        Sampler("coreset").select(pool, pool.ids, 3, make_rng(0))
