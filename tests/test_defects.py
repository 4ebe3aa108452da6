"""Defects found in public active-learning libraries, one test each that fails where ours has the same one.

benchmarks/peers_samplers.py shows the libraries themselves on such inputs. Further guards against the same defects:
test_strategies.py (a broken number stops every strategy), test_scores.py (MC dropout in every kind of network).
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy as plain_entropy
from scipy.stats import spearmanr, ttest_rel
from test_report import write_run

from vlm_itl.core.checks import DataError
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.sources import toy_images
from vlm_itl.model.doubt import AGGREGATORS, PASS_SCORES, uncertainty_maps
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import load_model
from vlm_itl.reports.compare import compare
from vlm_itl.reports.report import aubc, read_run
from vlm_itl.sampler.selects import cluster, probcover, typiclust
from vlm_itl.sampler.strategy import Sampler, kcenter_greedy
from vlm_itl.sampler.uncertainty import PassAccumulator, make_scorers, mc_passes, scoring_options

DIVERSE = ("coreset", "typiclust", "probcover")


@pytest.fixture(scope="module")
def toy() -> Any:
    return toy_images()


def make_pool(points: np.ndarray, score: np.ndarray | None = None) -> SimpleNamespace:
    """A scored pool of given features."""
    n = len(points)
    values = np.zeros(n, np.float32) if score is None else score.astype(np.float32)
    return SimpleNamespace(
        ids=[f"im{i:04d}" for i in range(n)],
        scores={"margin-mean": values},
        embedding=points.astype(np.float32),
        class_hist=np.full((n, 2), 0.5, np.float32),
    )


# ---- scores


def test_looks_that_disagree_are_doubtful():
    """baal 2.1: Entropy and Margin of MC passes average the logits, so the surer look silences the other."""
    looks = torch.tensor([[20.0, 0.0], [0.0, 5.0]])
    accumulator = PassAccumulator()
    for look in looks:
        accumulator.add(look.view(1, 2, 1, 1))
    maps = accumulator.maps()
    mean = torch.softmax(looks.double(), 1).mean(0).numpy()
    assert abs(maps["predictive_entropy"].item() - plain_entropy(mean) / math.log(2)) < 1e-9
    assert uncertainty_maps(looks.mean(0).view(1, 2, 1, 1))["entropy"].item() < 0.01  # of the averaged logits
    assert maps["predictive_entropy"].item() > 0.99 and maps["bald"].item() > 0.9
    assert maps["variation_ratio"].item() == 0.5


def striped(width: int) -> torch.Tensor:
    """Logits (16, 5, 6, width) of images that hold many classes side by side, or few, all surely or all not."""
    rng = np.random.default_rng(0)
    stripes = 2 ** rng.integers(0, 4, 16)
    classes = np.stack([np.repeat(rng.integers(0, 5, s), width // s) for s in stripes])[:, None].repeat(6, 1)
    z = rng.normal(size=(16, 5, 6, width)) + rng.uniform(2, 8, (16, 1, 1, 1)) * np.eye(5)[classes].transpose(0, 3, 1, 2)
    return torch.tensor(z, dtype=torch.float32)


@pytest.mark.parametrize("width", [8, 16])
def test_one_look_is_not_averaged_over_the_width(width: int):
    """baal 2.1: a dense pass (N, C, H, W) is taken for (N, C, H, passes); the mean goes over the width first."""
    logits = striped(width)
    z = logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    true = plain_entropy(p, axis=1).mean((1, 2)) / math.log(5)
    valid = torch.ones(16, 6, width, dtype=torch.bool)
    found = AGGREGATORS["mean"](uncertainty_maps(logits)["entropy"], valid, logits.argmax(1)).numpy()
    assert np.abs(found - true).max() < 1e-6
    wrong = plain_entropy(np.exp(z.mean(-1)) / np.exp(z.mean(-1)).sum(1, keepdims=True), axis=1).mean(1)
    assert spearmanr(wrong, true).statistic < 0.8  # the input tells the two apart
    looks = PassAccumulator().add(logits).maps()["expected_entropy"]
    assert looks.shape == (16, 6, width)
    assert np.abs(AGGREGATORS["mean"](looks, valid, logits.argmax(1)).numpy() - true).max() < 1e-6


def test_size_and_spread_of_an_image_are_no_score():
    """Mittal et al. repository: entropy maps rescaled to 0-255 per image, so the surest image looks like any other."""
    sure = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.02
    unsure = 0.4 + sure * 10
    small, flat = unsure[:, :4, :4], torch.full((1, 16, 16), 0.5)
    for name, function in AGGREGATORS.items():
        values = []
        for image in (sure, unsure, small, flat):
            inside = torch.ones_like(image, dtype=torch.bool)
            values.append(function(image, inside, torch.zeros_like(image).long()).item())
        assert values[0] < 0.02 and values[1] > 0.4, name
        assert math.isclose(values[3], 0.5, rel_tol=1e-6), name  # a sum would grow, a rescaled flat map is 0 / 0
        assert 0.4 < values[2] < 0.61, name


# ---- broken predictions


def broken_on(toy: Any, image_id: str, value: float, in_looks_only: bool) -> Any:
    """A nano that gives one bad logit for one image: whenever it sees it, or in the looks of MC dropout alone."""
    model = load_model("segformer-nano", toy.labels, seed=0)
    batches = Inference(64, batch_size=1).loader(toy.train.remove_columns("mask"))
    (bad,) = [batch["pixel_values"] for batch in batches if batch["id"] == [image_id]]
    state = {"bad": False, "calls": 0}  # is it this image; calls of the last layer since it came

    def before(net: Any, inputs: Any) -> None:
        state.update(bad=torch.equal(inputs[0], bad), calls=0)

    def spoil(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        state["calls"] += 1
        if state["bad"] and (state["calls"] > 2 or not in_looks_only):  # 2: a whole pass, and the search for the layer
            output = output.clone()
            output[0, 1, 0, 0] = value
        return output

    model.register_forward_pre_hook(before)
    model.net.decode_head.classifier.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("strategy", ["entropy", "margin-topk-power", "bald-patch_max-coreset", "coreset"])
def test_a_broken_prediction_is_an_error_that_names_the_image(toy: Any, strategy: str, value: float):
    """baal, nnActive: an image whose prediction is NaN scores 0 and is silently never chosen."""
    key = Sampler(strategy).strategy.score_key
    options = scoring_options([key] if key else [], passes=2)
    for batch_size in (1, 4):
        if batch_size == 1:
            model = broken_on(toy, "toy-2", value, in_looks_only=False)
        else:
            model = load_model("segformer-nano", toy.labels, seed=0)
            model.net.decode_head.classifier.register_forward_hook(
                lambda layer, inputs, output: output.index_fill(0, torch.tensor(2), value)
            )
        with pytest.raises(DataError, match="'toy-2' is not finite"):
            score_pool(model, toy.train, Inference(64, batch_size=batch_size), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", [f"{score}-{aggregate}" for score in PASS_SCORES for aggregate in AGGREGATORS])
def test_a_look_that_breaks_under_dropout_is_an_error_too(toy: Any, key: str, value: float):
    """baal, nnActive: NaN in one of the MC passes becomes 0."""
    model = broken_on(toy, "toy-2", value, in_looks_only=True)
    strategy = Sampler(f"{key}-top")
    with pytest.raises(DataError, match="toy-2"):
        scored = score_pool(model, toy.train, Inference(64, batch_size=1), **scoring_options([key], passes=2))
        strategy.select(scored, scored.ids, 1, make_rng(0))


# ---- dropout


@pytest.mark.parametrize("start", ["evaluation", "training"])
def test_bald_leaves_batchnorm_alone(toy: Any, start: str):
    """DISTIL: MC dropout calls model.train(), and BatchNorm learns from the pool."""
    model = load_model("segformer-nano", toy.labels, seed=0)
    model.train(start == "training")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    looks = list(mc_passes(model, pixels, passes=3))
    assert not torch.equal(looks[0], looks[1])
    assert "decode_head.batch_norm.running_mean" in {name.removeprefix("net.") for name in before}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bald_of_a_sure_image_is_a_number():
    """DISTIL: p ln p of a probability that is 0 in float32 is NaN, and so is the BALD of every sure image."""
    sure = torch.tensor([0.0, 1e4, -1e4]).view(1, 3, 1, 1)
    maps = PassAccumulator().add(sure).add(sure).maps()
    assert all(value.item() == 0 for value in maps.values())
    assert all(0 <= value.item() < 1e-9 for value in uncertainty_maps(sure).values())


# ---- choosing


@pytest.mark.parametrize("select", ["power", "softmax", "softrank"])
def test_draws_prefer_the_unsure_and_spare_the_global_generator(select: str):
    """baal 2.1: PowerSampling(Margin()) picks the confident images, and draws from numpy's global generator."""
    logits = torch.tensor(np.random.default_rng(0).normal(0, 3, (60, 4, 2, 2)), dtype=torch.float32)
    valid = torch.ones(60, 2, 2, dtype=torch.bool)
    score = make_scorers(["margin-mean"])["margin-mean"](logits, valid).numpy()
    ordered = torch.softmax(logits, 1).sort(1).values
    margin = (ordered[:, -1] - ordered[:, -2]).mean((1, 2)).numpy()  # large = sure
    pool = make_pool(np.zeros((60, 1)), score)
    before = np.random.get_state()[1].copy()
    torch_before = torch.get_rng_state()
    rows = []
    for seed in range(60):
        np.random.seed(seed)  # must not matter
        before = np.random.get_state()[1].copy()
        ids, _ = Sampler(f"margin-mean-{select}", beta=3.0).select(pool, pool.ids, 8, make_rng(7, seed))
        assert (np.random.get_state()[1] == before).all()
        rows += [int(i[2:]) for i in ids]
    assert torch.equal(torch_before, torch.get_rng_state())
    assert margin[rows].mean() < margin.mean() - 0.02
    again = [Sampler(f"margin-mean-{select}").select(pool, pool.ids, 8, make_rng(7)) for _ in range(2)]
    assert again[0] == again[1]


def plain_coreset(points: np.ndarray, candidates: list[int], labelled: list[int], k: int) -> list[int]:
    """From the definition, by row of `points`."""
    chosen, picks = list(labelled), []
    for _ in range(k):
        distance = [-1 if c in picks else ((points[c] - points[chosen]) ** 2).sum(1).min() for c in candidates]
        picks.append(candidates[int(np.argmax(distance))])
        chosen.append(picks[-1])
    return picks


@pytest.mark.parametrize("seed", range(3))
def test_coreset_means_the_images_it_names(seed: int):
    """small-text 1.4.1: greedy_coreset mixes positions among the candidates with rows of the pool."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(60, 5)).astype(np.float32)
    pool = make_pool(points)
    mixed = rng.permutation(60)
    labelled, candidates = sorted(mixed[:10].tolist()), sorted(mixed[10:50].tolist())  # ten are neither
    ids, _ = Sampler("coreset").select(
        pool, [pool.ids[i] for i in candidates], 15, make_rng(0), [pool.ids[i] for i in labelled]
    )
    assert [int(i[2:]) for i in ids] == plain_coreset(points.astype(np.float64), candidates, labelled, 15)


def test_coreset_distances_of_copies_are_zero():
    """small-text 1.4.1: the cosine distance of copies is the arccos of a number above 1, NaN."""
    points = np.repeat(np.random.default_rng(0).normal(1e3, 1, (30, 64)), 2, axis=0).astype(np.float32)
    picks, distances = kcenter_greedy(points, points[:2], 58)
    assert np.isfinite(distances).all() and distances[29:] == [0.0] * 29
    assert len({p // 2 for p in picks[:29]}) == 29


@pytest.mark.parametrize("select", DIVERSE)
def test_diversity_works_when_nothing_is_labelled(select: str):
    """DISTIL: core-set stops with a TypeError when nothing is labelled, or starts with whatever row is first."""
    points = np.random.default_rng(0).normal(size=(40, 4))
    pool = make_pool(points)
    ids, _ = Sampler(f"none-none-{select}").select(pool, pool.ids, 7, make_rng(0))
    assert len(set(ids)) == 7
    order = np.random.default_rng(1).permutation(40)
    other = make_pool(points[order])
    other.ids = [pool.ids[i] for i in order]
    assert Sampler(f"none-none-{select}").select(other, other.ids, 7, make_rng(0))[0] == ids


@pytest.mark.parametrize("n", [3, 499, 503, 1203])
def test_probcover_loses_no_candidate(n: int):
    """TypiClust repository: ProbCover never looks at the last N % 500 candidates, and not at all below 500."""
    points = np.random.default_rng(0).normal(0, 0.01, (n, 2))
    points[-3:] += np.array([[100, 0], [200, 0], [300, 0]])
    picks, gains = probcover(points, np.empty((0, 2)), 4, 1.0)
    assert {n - 3, n - 2, n - 1} <= set(picks) and sum(gains) == n


def test_kmeans_is_seeded():
    """TypiClust repository: its k-means is not seeded."""
    points = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    for count in (10, 100):  # 100: in batches
        runs = []
        for seed in (1, 2):
            np.random.seed(seed)  # must not matter
            runs.append(cluster(points, count, make_rng(3)))
        assert (runs[0] == runs[1]).all()
    assert (cluster(points, 10, make_rng(3)) != cluster(points, 10, make_rng(4))).any()
    assert set(cluster(np.zeros((5, 2)), 3, make_rng(0))) == {0}


def test_typiclust_takes_no_image_twice():
    """scikit-activeml 1.0.1: where images are copies, TypiClust picks one twice, or stops with an UnboundLocalError."""
    points = np.repeat(np.random.default_rng(0).normal(size=(4, 3)), 5, axis=0)
    picks, _, _ = typiclust(points, points[:0], 20, make_rng(0))
    assert sorted(picks) == list(range(20))
    covered, _, _ = typiclust(points, points[::5], 6, make_rng(0))
    assert len(set(covered)) == 6


# ---- statistics


def test_pairs_are_of_the_same_seed(tmp_path: Path):
    """nnActive: the paired test pairs by the order of the rows, not by seed."""
    level = np.random.default_rng(0).normal(0, 0.05, 6)
    gain = 0.02 + 0.001 * np.arange(6)
    runs = []
    for seed in range(6):
        runs.append(write_run(tmp_path / f"r{seed}", (0.5 + level[seed],), seed=seed))
        if seed != 2:  # one side lacks a seed, so even sorted rows do not match
            own = 0.5 + level[seed] + gain[seed]
            runs.append(write_run(tmp_path / f"e{5 - seed}", (own,), seed=seed, strategy="entropy"))
    found = [
        compare([read_run(runs[i]) for i in np.random.default_rng(s).permutation(11)], measure="final") for s in (0, 1)
    ]
    assert found[0].table.equals(found[1].table)
    pairs = found[0].pairs.sort_values("seed")
    assert pairs["seed"].tolist() == [0, 1, 3, 4, 5]
    np.testing.assert_allclose(pairs["difference"], 7 / 12 * np.delete(gain, 2), atol=1e-12)
    right = ttest_rel(pairs["value"], pairs["baseline_value"]).pvalue
    assert found[0].table["p"][0] == pytest.approx(right) and right < 1e-3


def test_a_cut_curve_is_divided_by_what_is_left():
    """nnActive: skip_first changes only the divisor; the first budget is counted all the same."""
    shares, curve = [0.1, 0.2, 0.3, 0.4], [0.2, 0.6, 0.6, 0.6]
    assert aubc(shares, curve, 0.2, 0.4) == pytest.approx(0.6)  # the first budget is out of both
    assert aubc(shares, curve) == pytest.approx((0.4 + 0.6 + 0.6) / 3)
