"""Properties of every strategy, k-center against a plain reference, and the defects of public libraries."""

from __future__ import annotations

import tracemalloc
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.core.seeds import make_rng
from vlm_itl.model.doubt import AGGREGATORS
from vlm_itl.sampler.strategy import (
    SCORES,
    SELECTS,
    SHORT,
    Sampler,
    Strategy,
    aggregates,
    kcenter_greedy,
    parse_strategy,
    register_score,
    register_select,
    shortlist,
)

# the rows of the chapter itself; test_strategies.py goes through those of later chapters too
OWN_SCORES = ("entropy", "margin", "least_confidence", "random", "none")
OWN_AGGREGATES = ("mean", "none")
OWN_SELECTS = ("top", "bottom", "coreset")


def every_strategy() -> list[str]:
    """All combinations that mean something."""
    names = []
    for parts in product(OWN_SCORES, OWN_AGGREGATES, OWN_SELECTS):
        try:
            names.append(str(parse_strategy("-".join(parts))))
        except ConfigError:
            continue
    return names


STRATEGIES = every_strategy()


def make_pool(n: int = 40, seed: int = 0, dim: int = 5, **changes: Any) -> SimpleNamespace:
    """A pool with all scores that pixels may give, some of them tied."""
    rng = np.random.default_rng(seed)
    keys = [f"{s}-{a}" for s in SCORES for a in AGGREGATORS if SCORES[s].per_pixel]
    scores = {key: rng.random(n).round(1).astype(np.float32) for key in keys}
    fields = {
        "ids": [f"im{i:04d}" for i in range(n)],
        "scores": scores,
        "embedding": rng.normal(size=(n, dim)).astype(np.float32),
        "class_hist": rng.random((n, 3)).astype(np.float32),
    }
    return SimpleNamespace(**{**fields, **changes})


def shuffled(pool: SimpleNamespace, seed: int) -> SimpleNamespace:
    """The same pool in another order."""
    order = np.random.default_rng(seed).permutation(len(pool.ids))
    return SimpleNamespace(
        ids=[pool.ids[i] for i in order],
        scores={k: v[order] for k, v in pool.scores.items()},
        embedding=pool.embedding[order],
        class_hist=pool.class_hist[order],
    )


def test_the_known_combinations_are_there():
    assert (
        set(OWN_SCORES) <= set(SCORES) and set(OWN_AGGREGATES) <= set(aggregates()) and set(OWN_SELECTS) <= set(SELECTS)
    )
    assert {str(parse_strategy(s)) for s in ("random", "entropy", "margin", "least_confidence", "coreset")} <= set(
        STRATEGIES
    )
    assert all(parse_strategy(s) for s in SHORT)
    assert {"entropy-mean-bottom", "margin-mean-coreset", "random-none-top"} <= set(STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_properties_of_every_strategy(name: str, data: st.DataObject):
    n = data.draw(st.integers(2, 30), label="n")
    n_labelled = data.draw(st.integers(0, n - 1), label="labelled")
    k = data.draw(st.integers(1, n - n_labelled), label="k")
    seed = data.draw(st.integers(0, 5), label="seed")
    pool = make_pool(n, seed)
    mixed = [str(i) for i in np.random.default_rng(seed + 1).permutation(pool.ids)]
    labelled, candidates = mixed[:n_labelled], mixed[n_labelled:]
    sampler = Sampler(name)
    ids, reasons = sampler.select(pool, candidates, k, make_rng(seed, "select"), labelled)
    assert len(ids) == len(reasons) == k == len(set(ids))
    assert set(ids) <= set(candidates) and not set(ids) & set(labelled)
    assert all(isinstance(i, str) for i in ids) and all(reason and "\n" not in reason for reason in reasons)
    other = sampler.select(shuffled(pool, seed), candidates[::-1], k, make_rng(seed, "select"), labelled[::-1])
    assert other == (ids, reasons)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_number_stops_the_choice_and_names_the_image(name: str, value: float):
    sampler = Sampler(name)
    pool = make_pool(12)
    for array in sampler.needs:
        broken = make_pool(12)
        if array == "scores":
            broken.scores[sampler.strategy.score_key][7] = value
        else:
            getattr(broken, array)[7, 1] = value
        with pytest.raises(DataError, match="im0007"):
            sampler.select(broken, pool.ids, 2, make_rng(0))
        # what is neither candidate nor read is of no interest
        rest = [i for i in pool.ids if i != "im0007"]
        assert len(sampler.select(broken, rest, 2, make_rng(0))[0]) == 2


def test_a_broken_embedding_of_a_labelled_image_is_named():
    pool = make_pool(12)
    pool.embedding[3] = np.nan
    with pytest.raises(DataError, match="im0003"):
        Sampler("coreset").select(pool, [i for i in pool.ids if i != "im0003"], 2, make_rng(0), ["im0003"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_bad_input(name: str):
    pool, sampler = make_pool(6), Sampler(name)
    with pytest.raises(ConfigError, match="k=7 .* only 6"):
        sampler.select(pool, pool.ids, 7, make_rng(0))
    for k in (0, -1, 1.5, True, None):
        with pytest.raises(ConfigError, match="k must be"):
            sampler.select(pool, pool.ids, k, make_rng(0))
    with pytest.raises(ConfigError, match="pool is empty"):
        sampler.select(pool, [], 1, make_rng(0))
    with pytest.raises(DataError, match="twice.*im0001"):
        sampler.select(pool, ["im0001", "im0001"], 1, make_rng(0))
    with pytest.raises(DataError, match="labelled already.*im0002"):
        sampler.select(pool, pool.ids, 1, make_rng(0), ["im0002"])
    with pytest.raises(DataError, match="not scored.*'elsewhere'"):
        sampler.select(pool, ["elsewhere"], 1, make_rng(0))
    doubled = make_pool(6, ids=["im0001"] * 6)
    with pytest.raises(DataError, match="scored images.*twice"):
        sampler.select(doubled, ["im0001"], 1, make_rng(0))


@pytest.mark.parametrize("name", STRATEGIES)
def test_identical_images_are_chosen_by_id(name: str):
    n = 9
    pool = make_pool(n, embedding=np.full((n, 4), 0.1, np.float32))
    pool.scores = {k: np.full(n, 0.3, np.float32) for k in pool.scores}
    ids, _ = Sampler(name).select(pool, pool.ids[2:][::-1], 4, make_rng(0), labelled=pool.ids[:2])
    assert len(set(ids)) == 4
    if not name.startswith("random"):
        assert ids == pool.ids[2:6]


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_candidate_one_class(name: str):
    pool = make_pool(1, class_hist=np.ones((1, 1), np.float32))
    assert Sampler(name).select(pool, pool.ids, 1, make_rng(0))[0] == pool.ids


def test_needs_are_said_beforehand():
    assert Sampler("random").needs == () and not Sampler("random").needs_labelled
    assert Sampler("margin").needs == ("scores",)
    assert Sampler("coreset").needs == ("embedding",) and Sampler("coreset").needs_labelled
    assert Sampler("entropy-mean-coreset").needs == ("scores", "embedding")
    pool = make_pool(5)
    assert Sampler("random").select(None, pool.ids, 2, make_rng(3)) == Sampler("random").select(
        pool, pool.ids, 2, make_rng(3)
    )
    with pytest.raises(ConfigError, match="needs the score 'entropy-mean'.*holds: none"):
        Sampler("entropy").select(None, pool.ids, 2, make_rng(0))
    with pytest.raises(ConfigError, match="needs the embedding"):
        Sampler("coreset").select(make_pool(5, embedding=None), pool.ids, 2, make_rng(0))
    # labelled images need not be scored where nothing of them is read
    assert Sampler("entropy").select(pool, pool.ids, 1, make_rng(0), labelled=["elsewhere"])
    with pytest.raises(DataError, match="not scored.*'elsewhere'"):
        Sampler("coreset").select(pool, pool.ids, 1, make_rng(0), labelled=["elsewhere"])


def test_scores_are_found_with_and_without_the_aggregate():
    values = np.array([0.1, 0.9, 0.5], np.float32)
    for key in ("entropy", "entropy-mean"):
        pool = make_pool(3, scores={key: values})
        ids, reasons = Sampler("entropy").select(pool, pool.ids, 2, make_rng(0))
        assert ids == ["im0001", "im0002"]
        assert reasons == ["entropy 0.900, rank 1 of 3", "entropy 0.500, rank 2 of 3"]
        assert Sampler("entropy-mean-bottom").select(pool, pool.ids, 1, make_rng(0))[0] == ["im0000"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entorpy", "Did you mean 'entropy'.*coreset"),
        ("entorpy-mean-top", "score='entorpy'.*Did you mean 'entropy'.*'margin'"),
        ("entropy-maen-top", "aggregate='maen'.*'mean'"),
        ("entropy-mean-tp", "select='tp'.*'coreset'"),
        ("entropy-top", "not known"),
        ("entropy-mean-top-x", "not known"),
        ("", "not known"),
        ("random-mean-top", "aggregate is 'none'"),
        ("entropy-none-top", "one of: mean"),
        ("none-none-top", "needs a score"),
        (None, "must be text"),
    ],
)
def test_unknown_strategies(text: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_strategy(text)


def test_strategy_objects_are_checked_too():
    assert parse_strategy(Strategy("margin", "mean", "top")) == parse_strategy("margin") == parse_strategy(" margin ")
    with pytest.raises(ConfigError, match="score='x'"):
        parse_strategy(Strategy("x", "mean", "top"))
    with pytest.raises(ConfigError, match="no option 'prefiler'.*prefilter"):
        Sampler("coreset", prefiler=3)
    with pytest.raises(ConfigError, match="no option 'prefilter'.*none"):
        Sampler("entropy", prefilter=3)
    with pytest.raises(ConfigError, match="prefilter must be"):
        Sampler("entropy-mean-coreset", prefilter=0).select(make_pool(5), make_pool(5).ids, 1, make_rng(0))


def test_random_is_uniform_and_paired():
    ids = [f"im{i}" for i in range(10)]
    picked = [i for s in range(600) for i in Sampler("random").select(None, ids, 3, make_rng(s, "select"))[0]]
    counts = np.array([picked.count(i) for i in ids])
    assert abs(counts - 180).max() < 4 * np.sqrt(600 * 0.3 * 0.7)


def plain_kcenter(points: np.ndarray, centres: np.ndarray, k: int) -> list[int]:
    """The full distance matrix in float64."""
    everything = np.concatenate([points, centres]).astype(np.float64)
    distance = np.sqrt(((everything[:, None] - everything[None]) ** 2).sum(-1))
    n = len(points)
    chosen, picks = list(range(n, len(everything))), []
    for _ in range(k):
        nearest = distance[:n][:, chosen].min(1)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
        chosen.append(picks[-1])
    return picks


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kcenter_equals_the_full_matrix(seed: int, offset: float, dtype: type):
    rng = np.random.default_rng(seed)
    points = (rng.normal(size=(300, 16)) + offset).astype(dtype)
    centres = (rng.normal(size=(7, 16)) + offset).astype(dtype)
    before = points.copy(), centres.copy()
    picks, distances = kcenter_greedy(points, centres, 60)
    assert picks == plain_kcenter(points, centres, 60)
    assert (points == before[0]).all() and (centres == before[1]).all()
    assert all(a >= b for a, b in zip(distances, distances[1:], strict=False))


def test_kcenter_without_labels_starts_nearest_the_mean():
    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    picks, distances = kcenter_greedy(points, None, 10)
    assert picks[0] == int(((points - points.mean(0)) ** 2).sum(1).argmin()) and distances[0] == np.inf
    assert picks[1:] == plain_kcenter(np.array(points), points[picks[:1]], 9)
    pool = make_pool(50, embedding=points)
    ids, reasons = Sampler("coreset").select(pool, pool.ids, 2, make_rng(0))
    assert ids[0] == pool.ids[picks[0]] and reasons[0] == "nearest to the mean of the pool"
    assert reasons[1].startswith("distance ")


def test_kcenter_gives_copies_distance_zero():
    rng = np.random.default_rng(0)
    points = np.repeat(rng.normal(1e3, 1, (20, 64)).astype(np.float32), 3, axis=0)
    picks, distances = kcenter_greedy(points, None, 60)
    assert len({p // 3 for p in picks[:20]}) == 20 and min(distances[:20]) > 0
    assert distances[20:] == [0.0] * 40 and picks[20:] == sorted(picks[20:])


def test_kcenter_crosses_its_blocks():
    rng = np.random.default_rng(1)
    points, centres = rng.normal(size=(4500, 4)), rng.normal(size=(300, 4))
    picks, _ = kcenter_greedy(points, centres, 5)
    nearest = np.full(4500, np.inf)
    for centre in centres:
        nearest = np.minimum(nearest, ((points - centre) ** 2).sum(1))
    assert picks[0] == int(nearest.argmax())


def test_kcenter_memory_is_linear():
    points = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)  # 5.1 MB; N x N would be 1.6 GB
    tracemalloc.start()
    kcenter_greedy(points, points[:300], 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = 5 * 4096 * 256 * 4  # temporaries of one block against 256 centres
    assert peak < 1.5 * points.nbytes + blocks


def test_coreset_takes_less_than_twice_the_features():
    """Through the sampler, from a pool of features to ids; the pool is left as it was."""
    pool = make_pool(20_000, dim=64)
    before = pool.embedding.copy()
    tracemalloc.start()
    Sampler("coreset").select(pool, pool.ids[10:], 20, make_rng(0), pool.ids[:10])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * pool.embedding.nbytes  # one copy, and ids, rows and blocks
    assert (pool.embedding == before).all()


def test_prefilter_keeps_the_most_unsure():
    values = np.array([0.1, 0.9, 0.5, 0.9, 0.2])
    assert shortlist(values, 1, 2.0, "entropy").tolist() == [1, 3]
    assert shortlist(values, 3, 1.0, "entropy").tolist() == [1, 2, 3]
    assert shortlist(values, 1, 2.0, "none").tolist() == [0, 1, 2, 3, 4]
    pool = make_pool(40)
    best = set(np.array(pool.ids)[np.argsort(-pool.scores["entropy-mean"], kind="stable")[:6]])
    ids, reasons = Sampler("entropy-mean-coreset", prefilter=2).select(pool, pool.ids, 3, make_rng(0))
    assert set(ids) <= best and all("6 highest in entropy" in reason for reason in reasons)


def test_parts_of_ones_own():
    @register_score("half", "for this test")
    def half(view: Any) -> np.ndarray:
        return np.arange(len(view.ids))[: len(view.ids) // 2]

    @register_select("twice", "for this test")
    def twice(view: Any, values: np.ndarray, k: int, score: str) -> list[tuple[int, str]]:
        return [(0, "first")] * k

    try:
        ids = ["a", "b", "c"]
        with pytest.raises(ConfigError, match="'half' returned"):
            Sampler("half-none-top").select(None, ids, 1, make_rng(0))
        with pytest.raises(ConfigError, match="'twice' returned"):
            Sampler("random-none-twice").select(None, ids, 2, make_rng(0))
        with pytest.raises(ConfigError, match="dashes"):
            register_score("a-b", "no")
        with pytest.raises(ConfigError, match="needs a function"):
            register_score("empty", "no")(None)
    finally:
        SCORES.pop("half"), SELECTS.pop("twice")
