"""Properties of every combination of parts, references for each select, and the defects of public libraries."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.core.files import read_json
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import DecodeRows, make_rows
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import Loop
from vlm_itl.model.doubt import AGGREGATORS, PASS_SCORES, PIXEL_SCORES
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import MODELS, Segmenter, load_model, register_model
from vlm_itl.sampler.gradient import GradientProbe
from vlm_itl.sampler.selects import (
    ball_radius,
    class_weights,
    cluster,
    gumbel_topk,
    known_strategies,
    probcover,
    typiclust,
)
from vlm_itl.sampler.strategy import SCORES, SELECTS, SHORT, Sampler, aggregates, kcenter_greedy, parse_strategy
from vlm_itl.sampler.uncertainty import scoring_options

pytestmark = pytest.mark.usefixtures("undrawn")

STRATEGIES = known_strategies()
LABELS = LabelSpace(("background", "red", "blue"))
DRAWN = ("power", "softmax", "softrank")  # selects that draw
NO_POINTS = np.empty((0, 3), np.float32)


def make_pool(n: int = 30, seed: int = 0, dim: int = 3, **changes: Any) -> SimpleNamespace:
    """A pool with all scores that pixels may give; some tied, some images near-copies."""
    rng = np.random.default_rng(seed)
    keys = ["judge", *(f"{s}-{a}" for s in (*PIXEL_SCORES, *PASS_SCORES) for a in AGGREGATORS)]
    points = rng.normal(size=(n, dim)).astype(np.float32)
    points[n // 2 : n // 2 + 3] = points[:1]
    fields = {
        "ids": [f"im{i:04d}" for i in range(n)],
        "scores": {key: rng.random(n).round(1).astype(np.float32) for key in keys},
        "embedding": points,
        "class_hist": rng.dirichlet(np.full(4, 0.3), n).astype(np.float32),
        "gradient": points * rng.random((n, 1)).astype(np.float32).round(1),
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
        gradient=pool.gradient[order],
    )


def test_every_part_of_the_issue_is_there():
    scores = {"random", "entropy", "margin", "least_confidence", "bald", "expected_entropy", "variation_ratio", "judge"}
    assert scores <= set(SCORES)
    assert (
        set(aggregates()) - {"none"} == set(AGGREGATORS) == {"mean", "topk", "class_balanced", "boundary", "patch_max"}
    )
    selects = {"top", "power", "softmax", "softrank", "coreset", "badge", "typiclust", "probcover", "class_stratified"}
    assert selects <= set(SELECTS)
    assert {str(parse_strategy(s)) for s in SHORT} <= set(STRATEGIES)
    for name in STRATEGIES:
        key = parse_strategy(name).score_key
        assert scoring_options([key] if key else []) is not None  # the scoring pass can deliver every one


def test_the_experiment_knows_them_all():
    for name in ("bald-topk-power", "class_random", "entropy-boundary-class_stratified"):
        assert make_config(strategy=name).strategy == name


@pytest.mark.parametrize("name", STRATEGIES)
def test_properties_of_every_combination(name: str):
    sampler = Sampler(name)
    for n, n_labelled, k, seed in [(30, 6, 5, 0), (12, 0, 12, 1), (9, 8, 1, 2)]:
        pool = make_pool(n, seed)
        mixed = [str(i) for i in np.random.default_rng(seed + 1).permutation(pool.ids)]
        labelled, candidates = mixed[:n_labelled], mixed[n_labelled:]
        ids, reasons = sampler.select(pool, candidates, k, make_rng(seed, "select"), labelled)
        assert len(ids) == len(reasons) == k == len(set(ids))
        assert set(ids) <= set(candidates) and not set(ids) & set(labelled)
        assert all(isinstance(i, str) for i in ids) and all(reason and "\n" not in reason for reason in reasons)
        other = sampler.select(shuffled(pool, seed), candidates[::-1], k, make_rng(seed, "select"), labelled[::-1])
        assert other == (ids, reasons)


# ---- from images to ids


class LocalNet(nn.Module):
    """Predicts every cell of 4 x 4 pixels from these alone, so that padding can be compared bit by bit."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 6, 4, stride=4)
        self.dropout = nn.Dropout2d(0.3)  # drops channels: the same ones whatever the padding
        self.classifier = nn.Conv2d(6, classes, 1)
        self.classifier.weight.data *= 4  # sure of some cells, unsure of others

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        features = self.body(pixel_values).relu()
        return SimpleNamespace(logits=self.classifier(self.dropout(features)), hidden_states=(features,))


@dataclass(frozen=True)
class Padded(Inference):
    """Noise on the right and below, `extra` pixels of it, beyond the padding that every image gets."""

    extra: int = 0

    def loader(self, images: Any, labels: Any = None) -> Any:
        inner = Inference(self.image_size - self.extra, batch_size=self.batch_size)
        for batch in inner.loader(images, labels):
            whole = torch.randint(0, 256, (len(batch["id"]), 3, self.image_size, self.image_size), dtype=torch.uint8)
            whole[:, :, : inner.image_size, : inner.image_size] = batch["pixel_values"]
            yield {**batch, "pixel_values": whole}


@pytest.fixture(scope="module")
def images() -> Any:
    """Fourteen images of different sizes, smooth enough to differ, three of them copies."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        width, height = (int(side) for side in rng.integers(21, 80, 2))
        pictures.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pictures[8:8] = [pictures[7]] * 2
    masks = [Image.new("L", picture.size) for picture in pictures]
    return make_rows([f"im{i:04d}" for i in range(14)], pictures, masks).with_transform(DecodeRows(LABELS))


def choose_all(scored: Any) -> dict[str, list[str]]:
    """What every strategy picks: six of eleven candidates, three labelled."""
    scored.scores["judge"] = scored.scores["margin-mean"]  # what a judge would add
    picked = {}
    for name in STRATEGIES:
        labelled = scored.ids[:3]
        rest = [i for i in scored.ids if i not in labelled]
        picked[name] = Sampler(name).select(scored, rest, 6, make_rng(0, "select"), labelled)[0]
    return picked


KEYS = [f"{score}-{aggregate}" for score in (*PIXEL_SCORES, *PASS_SCORES) for aggregate in AGGREGATORS]


@pytest.mark.parametrize("kind", ["segformer", "local"])
def test_order_padding_and_batch_size_change_no_choice(images: Any, kind: str):
    """Every combination, from images of different sizes to ids."""
    model = (
        load_model("segformer-nano", LABELS) if kind == "segformer" else Segmenter(LocalNet(3), LABELS, name="local")
    )
    options = scoring_options(KEYS, passes=4)
    views: dict[str, Inference] = {f"batch of {n}": Inference(48, batch_size=n) for n in (1, 3, 8)}
    if kind == "local":  # attention sees the padding, and so does a convolution wider than its step
        views |= {f"{extra} more pixels": Padded(48 + extra, batch_size=3, extra=extra) for extra in (4, 20)}
    pools = {name: score_pool(model, images, view, probe=GradientProbe(8), **options) for name, view in views.items()}
    backwards = score_pool(
        model, images.select(range(14)[::-1]), views["batch of 3"], probe=GradientProbe(8), **options
    )
    pools["backwards"] = backwards.take(images["id"])
    first = pools["batch of 1"]
    right = choose_all(first)
    assert len({tuple(ids) for ids in right.values()}) > 20  # the choices differ, so something could go wrong
    for name, pool in pools.items():
        for key in KEYS:
            assert np.allclose(pool.scores[key], first.scores[key], atol=1e-5), (name, key)
        found = choose_all(pool)
        unlike = [one for one in right if found[one] != right[one]]
        assert not unlike, (name, unlike)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_broken_number_stops_the_choice_and_names_the_image(name: str):
    """From arrays; test_defects.py goes there from predictions."""
    sampler = Sampler(name)
    for value in (np.nan, np.inf):
        judged = ("judge",) if sampler.strategy.score == "judge" else ()
        for array in (*sampler.needs, *judged):
            broken = make_pool(12)
            if array in ("scores", "judge"):
                broken.scores[sampler.strategy.score_key or "judge"][7] = value
            else:
                getattr(broken, array)[7, 1] = value
            with pytest.raises(DataError, match="im0007"):
                sampler.select(broken, broken.ids, 2, make_rng(0))
            rest = [i for i in broken.ids if i != "im0007"]
            assert len(sampler.select(broken, rest, 2, make_rng(0))[0]) == 2


@pytest.mark.parametrize("name", STRATEGIES)
def test_bad_and_odd_pools(name: str):
    pool, sampler = make_pool(6), Sampler(name)
    with pytest.raises(ConfigError, match="k=7 .* only 6"):
        sampler.select(pool, pool.ids, 7, make_rng(0))
    with pytest.raises(ConfigError, match="pool is empty"):
        sampler.select(pool, [], 1, make_rng(0))
    with pytest.raises(DataError, match="labelled already.*im0002"):
        sampler.select(pool, pool.ids, 1, make_rng(0), ["im0002"])
    same = make_pool(
        9,
        embedding=np.full((9, 4), 0.1, np.float32),
        class_hist=np.tile(np.float32([[1, 0]]), (9, 1)),
        gradient=np.zeros((9, 2)),
    )  # identical images of one class
    same.scores = {key: np.full(9, 0.3, np.float32) for key in same.scores}
    ids, _ = sampler.select(same, same.ids[2:][::-1], 4, make_rng(0), labelled=same.ids[:2])
    assert len(set(ids)) == 4
    chance = sampler.strategy.select in DRAWN or sampler.strategy.score in ("random", "class_random")
    assert chance or ids == same.ids[2:6]
    nothing = make_pool(3, class_hist=np.zeros((3, 2), np.float32))  # no class is predicted anywhere
    nothing.scores = {key: np.zeros(3, np.float32) for key in nothing.scores}
    assert set(sampler.select(nothing, nothing.ids, 3, make_rng(0))[0]) == set(nothing.ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bold-mean-top", "score='bold'.*Did you mean 'bald'.*'variation_ratio'"),
        ("bald-topp-top", "aggregate='topp'.*Did you mean 'topk'.*'patch_max'"),
        ("bald-topk-powr", "select='powr'.*Did you mean 'power'.*'probcover'"),
        ("none-none-power", "needs a score"),
        ("none-none-class_stratified", "needs a score"),
        ("bald-none-top", "one of: mean, topk"),
        ("class_random-mean-top", "aggregate is 'none'"),
    ],
)
def test_unknown_parts(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_strategy(text)


# ---- drawn by chance


@pytest.mark.parametrize(("kind", "beta"), [("power", 1.0), ("power", 3.0), ("softmax", 2.0), ("softrank", 1.0)])
def test_first_draw_has_its_probability(kind: str, beta: float):
    values = np.array([0.2, 0.9, 0.5, 0.4])
    weights = {"power": values**beta, "softmax": np.exp(beta * values), "softrank": np.array([4.0, 1, 2, 3]) ** -beta}[
        kind
    ]
    firsts = np.bincount([gumbel_topk(kind, values, 1, beta, make_rng(s))[0] for s in range(4000)], minlength=4)
    p = weights / weights.sum()
    assert (abs(firsts - 4000 * p) < 4.5 * np.sqrt(4000 * p * (1 - p))).all()


def test_second_draw_is_without_replacement():
    values = np.array([1.0, 2.0, 5.0])
    pairs = [tuple(gumbel_topk("power", values, 2, 1.0, make_rng(s))) for s in range(4000)]
    after = [b for a, b in pairs if a == 2]
    assert abs(after.count(1) / len(after) - 2 / 3) < 0.04  # 2 : 1 among the rest


@pytest.mark.parametrize("kind", DRAWN)
def test_large_beta_is_top(kind: str):
    pool = make_pool(30)
    pool.scores["margin-mean"] = np.linspace(0.01, 1, 30)[np.random.default_rng(0).permutation(30)]
    top = Sampler("margin").select(pool, pool.ids, 6, make_rng(0))[0]
    assert Sampler(f"margin-mean-{kind}", beta=1e6).select(pool, pool.ids, 6, make_rng(0))[0] == top


def test_scores_of_zero_come_last_and_negative_ones_are_refused():
    values = np.array([0.0, 0.0, 0.1, 0.2])
    for seed in range(20):
        picks = gumbel_topk("power", values, 4, 1.0, make_rng(seed)).tolist()
        assert set(picks[:2]) == {2, 3} and picks[2:] == [0, 1]
    with pytest.raises(ConfigError, match="at least 0.*softrank"):
        gumbel_topk("power", values - 1, 2, 1.0, make_rng(0))
    with pytest.raises(ConfigError, match="beta must be"):
        Sampler("entropy-mean-power", beta=0).select(make_pool(), make_pool().ids, 2, make_rng(0))


# ---- covering


def blobs(per_group: int, groups: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Well separated groups of points, and the group of each."""
    rng = np.random.default_rng(seed)
    centres = 20 * np.eye(groups, 3 + groups)
    group = np.repeat(np.arange(groups), per_group)
    return (centres[group] + rng.normal(size=(len(group), 3 + groups))).astype(np.float32), group


@pytest.mark.parametrize("seed", range(3))
def test_typiclust_takes_the_densest_of_each_group(seed: int):
    points, group = blobs(25, seed=seed)
    picks, _, counts = typiclust(points, np.empty((0, points.shape[1]), np.float32), 4, make_rng(seed))
    assert sorted(group[picks]) == [0, 1, 2, 3] and counts == [0] * 4
    for pick in picks:
        rows = np.flatnonzero(group == group[pick])
        distance = np.sqrt(((points[rows][:, None].astype(float) - points[rows][None]) ** 2).sum(-1))
        assert rows[np.sort(distance, 1)[:, 1:13].mean(1).argmin()] == pick  # 12 = half the group


def test_typiclust_leaves_covered_groups_and_outliers():
    points, group = blobs(20)
    candidates = np.concatenate([points[3:], np.full((1, points.shape[1]), 500, np.float32)])  # and an outlier
    picks, _, _ = typiclust(candidates, points[:3], 3, make_rng(0), max_clusters=5)
    groups_of = np.append(group[3:], 9)
    assert sorted(groups_of[picks]) == [1, 2, 3]
    everything, _, _ = typiclust(candidates, points[:3], len(candidates), make_rng(0))
    assert sorted(everything) == list(range(len(candidates)))


def plain_probcover(points: np.ndarray, labelled: np.ndarray, k: int, delta: float) -> tuple[list[int], list[int]]:
    """The full matrix."""
    near = np.sqrt(((points[:, None].astype(float) - points[None]) ** 2).sum(-1)) <= delta
    uncovered = np.ones(len(points), bool)
    for point in labelled:
        uncovered &= np.sqrt(((points.astype(float) - point) ** 2).sum(-1)) > delta
    picks, gains = [], []
    while len(picks) < k and uncovered.any():
        gain = (near & uncovered).sum(1)
        picks.append(int(gain.argmax()))
        gains.append(int(gain.max()))
        uncovered &= ~near[picks[-1]]
    return picks, gains


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("delta", [0.01, 0.7, 1.5, 100.0])
def test_probcover_equals_the_full_matrix(seed: int, delta: float):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(200, 4)) + 50
    points[100:110] = points[0]  # copies
    labelled = rng.normal(size=(5, 4)) + 50
    assert probcover(points, labelled, 40, delta) == plain_probcover(points, labelled, 40, delta)
    assert probcover(points, labelled[:0], 40, delta) == plain_probcover(points, labelled[:0], 40, delta)


@pytest.mark.parametrize("spread", [1.0, 0.001])
def test_probcover_needs_no_full_matrix(spread: float):
    """Not even where every ball holds a quarter of the pool, and a sparse graph would be as large as a full one."""
    rng = np.random.default_rng(0)
    points = np.eye(4, 8)[rng.integers(0, 4, 8000)] + spread * rng.normal(size=(8000, 8))  # N x N in float32: 256 MB
    tracemalloc.start()
    picks, gains = probcover(points.astype(np.float32), np.empty((0, 8), np.float32), 50, 0.8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6 and (len(picks) == 50 if spread == 1.0 else sum(gains) == 8000 and len(picks) == 4)


def test_probcover_takes_copies_together():
    """Rounding must not part them, nor an image from its own ball, however small the ball."""
    points = np.repeat(np.random.default_rng(0).normal(5, 1, (20, 64)), 3, axis=0)
    picks, gains = probcover(points, points[:2], 60, 1e-12)
    assert gains == [3] * 19 and picks == list(range(3, 60, 3))


def test_radius_separates_the_groups():
    points, group = blobs(30)
    radius = ball_radius(points, 4, make_rng(0))
    distance = np.sqrt(((points[:, None].astype(float) - points[None]) ** 2).sum(-1))
    pure = [(group[row <= radius] == g).all() for row, g in zip(distance, group, strict=True)]
    assert np.mean(pure) >= 0.95 and radius > np.median(distance[group[:, None] == group])
    assert ball_radius(np.zeros((5, 2)), 3, make_rng(0)) > 0
    assert ball_radius(points, 4, make_rng(0), sample=50) > 0


@pytest.mark.parametrize("select", ["coreset", "typiclust", "probcover"])
def test_prefilter_keeps_the_most_unsure(select: str):
    pool = make_pool(40)
    best = set(np.array(pool.ids)[np.argsort(-pool.scores["bald-topk"], kind="stable")[:6]])
    ids, reasons = Sampler(f"bald-topk-{select}", prefilter=2).select(pool, pool.ids, 3, make_rng(0))
    assert set(ids) <= best and all("6 highest in bald" in reason for reason in reasons)
    with pytest.raises(ConfigError, match="prefilter must be"):
        Sampler(f"bald-topk-{select}", prefilter=0).select(pool, pool.ids, 3, make_rng(0))


# ---- the same by other libraries


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_coreset_equals_skmatter(seed: int, dtype: type):
    """Farthest points from the same start, in the same order."""
    fps = pytest.importorskip("skmatter.sample_selection", reason="skmatter is not installed").FPS
    points = np.random.default_rng(seed).normal(size=(400, 12)).astype(dtype)
    free, distances = kcenter_greedy(points, None, 80)
    assert free == fps(n_to_select=80, initialize=free[0]).fit(points).selected_idx_.tolist()
    theirs = fps(n_to_select=81, initialize=5).fit(points).selected_idx_.tolist()
    rest = np.delete(np.arange(400), 5)
    assert rest[kcenter_greedy(points[rest], points[5:6], 80)[0]].tolist() == theirs[1:]
    assert np.isfinite(distances[1:]).all()


def test_coreset_equals_what_skmatter_chose(root: Path):
    """The recorded picks, for where skmatter cannot be installed beside the newest scikit-learn."""
    points = make_rng(0, "peers", "fps").normal(size=(2000, 64)).astype(np.float32)
    rows = read_json(root / "results" / "peers_samplers.json")["rows"]
    (recorded,) = [row["picks"] for row in rows if row["library"] == "skmatter" and row["how"] == "run"]
    assert len(recorded) == 200 and kcenter_greedy(points, None, 200)[0] == recorded


def test_coreset_equals_scikit_activeml():
    """The farthest from what is labelled, in the same order."""
    pool = pytest.importorskip("skactiveml.pool")
    points = np.random.default_rng(0).normal(size=(300, 6))
    known = np.full(300, np.nan)
    known[280:] = 0
    theirs = pool.CoreSet(random_state=0).query(points, known, batch_size=60).tolist()
    assert kcenter_greedy(points[:280], points[280:], 60)[0] == theirs


class GivenClusters:
    """A clustering that is known already, in the shape scikit-activeml asks for."""

    def __init__(self, groups: Any = None, n_clusters: int = 0) -> None:
        self.groups = groups

    def fit_predict(self, points: np.ndarray) -> np.ndarray:
        return np.asarray(self.groups)


def their_typiclust(points: np.ndarray, labelled: int, k: int, groups: np.ndarray, neighbours: int) -> list[int]:
    """scikit-activeml's picks; the last `labelled` points are labelled."""
    pool = pytest.importorskip("skactiveml.pool")
    known = np.full(len(points), np.nan)
    known[len(points) - labelled :] = 0
    query = pool.TypiClust(
        random_state=0, k=neighbours, cluster_algo=GivenClusters, cluster_algo_dict={"groups": groups}
    )
    return query.query(points, known, batch_size=k).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_typiclust_equals_scikit_activeml(seed: int):
    """On the same clusters of different sizes, each at least twice as large as the neighbourhood."""
    sizes = np.array([26, 22, 30, 24, 34, 28])
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(6), sizes)
    points = 20 * np.eye(6, 9)[group] + rng.normal(size=(len(group), 9))
    order = rng.permutation(len(points))
    points = points[order]
    labelled = points[len(points) - 2 :]
    groups = cluster(points, 6, make_rng(seed))
    ours = typiclust(points[:-2], labelled, 4, make_rng(seed), neighbours=10)[0]
    assert ours == their_typiclust(points, 2, 4, groups, neighbours=10)


def test_typiclust_differs_where_a_cluster_is_small():
    """In a cluster smaller than twice the neighbourhood we look at half of it, as the authors do: all is no density."""
    rng = np.random.default_rng(0)
    knot, scattered = rng.normal(0, 0.05, (7, 2)), rng.normal(0, 1, (6, 2))
    points = np.concatenate([np.array([4.0, 0]) + knot, scattered])
    (ours,), _, _ = typiclust(points, points[:0], 1, make_rng(0), neighbours=12)
    (theirs,) = their_typiclust(points, 0, 1, np.zeros(13, int), neighbours=12)
    assert ours < 7  # in the knot
    assert theirs == np.linalg.norm(points[:, None] - points[None], axis=-1).sum(1).argmin()  # the middle of all


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_typiclust_differs_where_copies_leave_too_few_clusters():
    """We go on with the least covered cluster; scikit-activeml 1.0.1 draws from all, an image twice if it comes so."""
    points = np.repeat(np.random.default_rng(0).normal(size=(4, 3)), 5, axis=0)
    pool = pytest.importorskip("skactiveml.pool")
    theirs = pool.TypiClust(random_state=0).query(points, np.full(20, np.nan), batch_size=8).tolist()
    picks, _, counts = typiclust(points, points[:0], 8, make_rng(0))
    assert len(set(theirs)) < 8 == len(set(picks)) and counts == [0] * 4 + [1] * 4


@pytest.mark.filterwarnings("ignore:The maximum purity")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("delta", [0.4, 0.9, 1.6])
def test_probcover_equals_scikit_activeml(seed: int, delta: float):
    """Each pick is one of their best, worth what they say; they draw among the best, we take the first."""
    pool = pytest.importorskip("skactiveml.pool")
    points = np.random.default_rng(seed).normal(size=(200, 4))
    known = np.full(200, np.nan)
    known[190:] = 0
    theirs = pool.ProbCover(deltas=[delta], random_state=0)
    picks, gains = probcover(points[:190], points[190:], 40, delta)
    for pick, gain in zip(picks, gains, strict=True):
        worth = theirs.query(points, known, batch_size=1, return_utilities=True)[1][0]
        assert worth[pick] == np.nanmax(worth) == gain
        assert np.flatnonzero(worth == gain)[0] == pick
        known[pick] = 0
    if len(picks) < 40:  # all is covered: for them everything is worth 0 and they draw; we stop, and spread out
        worth = theirs.query(points, known, batch_size=1, return_utilities=True)[1][0]
        assert np.nanmax(worth) == 0


@pytest.mark.filterwarnings("ignore:The maximum purity")
def test_radius_equals_scikit_activeml():
    """Theirs is the largest of given numbers; with a fine grid it is ours, with its own (0.2 to 2) it covers little."""
    pool = pytest.importorskip("skactiveml.pool")
    points, _ = blobs(30)
    groups = cluster(points, 4, make_rng(0))
    known = np.full(len(points), np.nan)
    grid = np.linspace(0.5, 40, 400)
    same = {"n_classes": 4, "cluster_algo": GivenClusters, "cluster_algo_dict": {"groups": groups}}
    fine, own = pool.ProbCover(deltas=grid, **same), pool.ProbCover(**same)
    fine.query(points, known), own.query(points, known)
    radius = ball_radius(points, 4, make_rng(0))
    assert fine.delta_max_ <= radius < fine.delta_max_ + grid[1] - grid[0]
    covered = [sum(probcover(points, points[:0], 4, r)[1]) for r in (radius, own.delta_max_)]
    assert covered[0] == len(points) and covered[1] < 0.5 * len(points)


# ---- balancing


def test_class_random_draws_classes_alike():
    histogram = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0.5, 0.5]])
    assert np.allclose(class_weights(histogram), [1 / 9, 1 / 9, 1 / 9, 1 / 9, 5 / 9])
    pool = make_pool(5, class_hist=histogram)
    firsts = [Sampler("class_random").select(pool, pool.ids, 1, make_rng(s))[0][0] for s in range(2000)]
    assert abs(firsts.count("im0004") / 2000 - 5 / 9) < 0.04


def test_class_stratified_gives_every_class_its_turn():
    rng = np.random.default_rng(0)
    classes = np.array([0] * 40 + [1] * 6 + [2] * 4)
    pool = make_pool(50, class_hist=np.eye(3, dtype=np.float32)[classes])
    pool.scores["entropy-mean"] = np.where(classes == 0, 0.5, 0.1) + 0.01 * rng.random(
        50
    )  # top would take class 0 only
    ids, reasons = Sampler("entropy-mean-class_stratified").select(pool, pool.ids, 9, make_rng(0))
    assert np.bincount([classes[int(i[2:])] for i in ids]).tolist() == [3, 3, 3]
    assert "for class 2, which 0 chosen images hold" in reasons[0]
    everything, _ = Sampler("entropy-mean-class_stratified").select(pool, pool.ids, 50, make_rng(0))
    assert sorted(everything) == pool.ids
    a, b = (Sampler("entropy-mean-class_stratified", beta=1.0).select(pool, pool.ids, 9, make_rng(s)) for s in (0, 1))
    assert a != b


def test_a_round_with_parts_of_every_kind(scenes_small: Any, tmp_path: Any):
    """From the strategy's name to the scores of the pass over the pool."""
    picked = {}
    for strategy in ("bald-topk-power", "entropy-boundary-class_stratified", "none-none-typiclust"):
        config = make_config(
            strategy=strategy,
            model="segformer-nano",
            data_options={"n_train": 24, "n_test": 8},
            image_size=48,
            steps=1,
            initial=4,
            increment=4,
            max_labelled=8,
            gallery=0,
            test_every_round=False,
            output_dir=str(tmp_path / strategy),
        )
        record = Loop.from_config(config).run_round()
        picked[strategy] = record.selection["ids"]
        assert len(set(picked[strategy])) == 4 and record.selection["strategy"] == strategy
        again = Loop.from_config(make_config({**config.to_dict(), "output_dir": str(tmp_path / f"{strategy}-again")}))
        assert again.run_round().selection == record.selection


def test_bald_needs_dropout_and_says_so_before_training(scenes_small: Any, tmp_path: Any):
    @register_model("bare")
    def bare(labels: Any) -> nn.Module:
        net = MODELS["segformer-nano"](labels)
        for parent in list(net.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.Dropout):
                    setattr(parent, child_name, nn.Identity())
        return net

    options = {"n_train": 24, "n_test": 8}
    try:
        config = make_config(strategy="bald", model="bare", data_options=options, output_dir=str(tmp_path / "run"))
        with pytest.raises(ConfigError, match="no dropout layer"):
            Loop.from_config(config)
        assert not (tmp_path / "run").exists()
    finally:
        MODELS.pop("bare")
