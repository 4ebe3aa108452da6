"""Scores against float64, streams of looks, aggregates against loops, and MC dropout that touches nothing."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import entr, log_softmax, softmax
from torch import nn

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.sources import toy_images
from vlm_itl.model.doubt import (
    AGGREGATORS,
    PASS_SCORES,
    PIXEL_SCORES,
    boundary_mean,
    class_balanced_mean,
    patch_max,
    split_key,
    topk_mean,
    uncertainty_maps,
)
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import load_model
from vlm_itl.sampler.uncertainty import (
    PassAccumulator,
    dropout_layers,
    make_scorers,
    make_second_look,
    mc_passes,
    scoring_options,
)

KINDS = ("random", "sure", "torn", "huge", "shifted", "tiny differences", "pairs", "one dominant", "plus or minus")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy() -> Any:
    return toy_images()


def make_logits(kind: str, classes: int = 21, seed: int = 0) -> torch.Tensor:
    """Logits (2, C, 6, 7) float32 of a kind that breaks careless formulas."""
    z = torch.randn(2, classes, 6, 7, generator=torch.Generator().manual_seed(seed))
    if kind == "sure":
        z[:, 0] += 40
    if kind == "torn":
        z[:] = 3.0
    if kind == "huge":
        z *= 1e4
    if kind == "shifted":
        z += 1e3
    if kind == "tiny differences":
        z *= 1e-4
    if kind == "pairs":  # the two best are equal
        z[:, 1] = z[:, 0] = z.amax(1) + 1
    if kind == "one dominant":
        z = torch.full_like(z, -1e4)
        z[:, seed % classes] = 1e4
    if kind == "plus or minus":
        z = z.sign() * 1e4
    return z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 3, 21, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_one_look_equal_float64(kind: str, classes: int, dtype: torch.dtype):
    logits = make_logits(kind, classes).to(dtype)
    z = logits.float().numpy().astype(np.float64)
    log_p = log_softmax(z, axis=1)
    p = softmax(z, axis=1)
    ordered = np.sort(p, axis=1)
    expected = {
        "entropy": -(p * log_p).sum(1) / math.log(classes),
        "margin": 1 - (ordered[:, -1] - ordered[:, -2]),
        "least_confidence": 1 - ordered[:, -1],
    }
    maps = uncertainty_maps(logits)
    assert set(maps) == set(PIXEL_SCORES)
    for name, values in maps.items():
        assert np.abs(values.numpy() - expected[name]).max() < 1e-6, name
        assert values.min() >= 0 and values.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 5, 150])
@pytest.mark.parametrize("passes", [1, 2, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_several_looks_equal_float64(kind: str, classes: int, passes: int, dtype: torch.dtype):
    looks = [make_logits(kind, classes, seed).to(dtype) for seed in range(passes)]
    z = np.stack([look.float().numpy() for look in looks]).astype(np.float64)  # (T, B, C, h, w)
    p, log_p = softmax(z, axis=2), log_softmax(z, axis=2)
    mean = p.mean(0)
    scale = math.log(classes)
    entropy = -(mean * np.log(np.where(mean > 0, mean, 1))).sum(1) / scale
    expected_entropy = -(p * log_p).sum(2).mean(0) / scale
    votes = np.stack([(z.argmax(2) == c).sum(0) for c in range(classes)])
    expected = {
        "predictive_entropy": entropy,
        "expected_entropy": expected_entropy,
        "bald": np.clip(entropy - expected_entropy, 0, 1),
        "variation_ratio": 1 - votes.max(0) / passes,
    }
    accumulator = PassAccumulator()
    for look in looks:
        accumulator.add(look)
    for name, values in accumulator.maps().items():
        assert np.abs(values.numpy() - expected[name]).max() < 1e-9, name
        assert values.dtype == torch.float64 and values.min() >= 0
    if passes == 1:
        assert accumulator.maps()["bald"].max() < 1e-12


@pytest.mark.parametrize("classes", [2, 21, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_images_equal_float64(kind: str, classes: int):
    """Every key, from logits to one number an image, against the definition."""
    looks = [make_logits(kind, classes, seed) for seed in range(3)]
    valid = torch.ones(2, 6, 7, dtype=torch.bool)
    valid[1, 4:], valid[1, :, 5:] = False, False
    p = softmax(np.stack([look.numpy() for look in looks]).astype(np.float64), axis=2)
    entropy = entr(p).sum(2) / math.log(classes)  # (T, B, h, w)
    votes = np.stack([(p.argmax(2) == c).sum(0) for c in range(classes)])
    ordered = np.sort(p[0], axis=1)
    maps = {
        "entropy": entropy[0],
        "margin": 1 - ordered[:, -1] + ordered[:, -2],
        "least_confidence": 1 - ordered[:, -1],
        "expected_entropy": entropy.mean(0),
        "variation_ratio": 1 - votes.max(0) / 3,
        "bald": entr(p.mean(0)).sum(1) / math.log(classes) - entropy.mean(0),
    }
    accumulator = PassAccumulator()
    for look in looks:
        accumulator.add(look)
    assert set(maps) == {*PIXEL_SCORES, *PASS_SCORES}
    for name, values in maps.items():
        predicted = p[0].argmax(1) if name in PIXEL_SCORES else p.mean(0).argmax(1)
        for aggregate in AGGREGATORS:
            if name in PIXEL_SCORES:
                found = make_scorers([f"{name}-{aggregate}"])[f"{name}-{aggregate}"](looks[0], valid)
            else:
                found = AGGREGATORS[aggregate](accumulator.maps()[name], valid, accumulator.probability.argmax(1))
            limit = 1e-6 if name in PIXEL_SCORES else 1e-9
            for image, (h, w) in enumerate([(6, 7), (4, 5)]):
                right = plain_aggregate(aggregate, values[image, :h, :w], predicted[image, :h, :w])
                assert abs(found[image].item() - right) < limit, (name, aggregate)


def test_bald_is_never_negative():
    """In float32 it is, for about a third of sure pixels."""
    z = torch.randn(1, 21, 40, 40, generator=torch.Generator().manual_seed(0))
    z[:, 3] += 12
    accumulator = PassAccumulator()
    for _ in range(10):
        accumulator.add(z)
    raw = torch.special.entr(accumulator.mean()).sum(1) - accumulator.entropy / accumulator.passes
    assert raw.abs().max() < 1e-12 and accumulator.maps()["bald"].min() >= 0


def test_accumulator_memory_does_not_grow_with_passes():
    def peak(passes: int) -> int:
        accumulator, sizes = PassAccumulator(), []
        for t in range(passes):
            accumulator.add(make_logits("random", seed=t))
            held = [v for v in vars(accumulator).values() if isinstance(v, torch.Tensor)]
            sizes.append(sum(v.numel() * v.element_size() for v in held))
        return max(sizes)

    tracemalloc.start()
    assert peak(2) == peak(30)
    tracemalloc.stop()


def test_accumulator_errors():
    with pytest.raises(ConfigError, match="no look"):
        PassAccumulator().maps()
    with pytest.raises(ConfigError, match="a look of shape"):
        PassAccumulator().add(torch.zeros(1, 2, 3, 3)).add(torch.zeros(1, 3, 3, 3))


def make_maps(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, a valid rectangle and predictions of 3 images; padding holds absurd scores and classes."""
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(3, 12, 14, generator=g)
    predicted = torch.randint(0, 3, (3, 3, 4), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :, :14]
    valid = torch.zeros(3, 12, 14, dtype=torch.bool)
    for image, (h, w) in enumerate([(12, 14), (9, 14), (5, 6)]):
        valid[image, :h, :w] = True
    return values.masked_fill(~valid, 99.0), valid, predicted.masked_fill(~valid, 7)


def plain_aggregate(name: str, values: np.ndarray, predicted: np.ndarray) -> float:
    """One unpadded image, in loops."""
    h, w = values.shape
    if name == "mean":
        return values.mean()
    if name == "topk":
        return np.sort(values.ravel())[::-1][: math.ceil(0.05 * h * w)].mean()
    if name == "class_balanced":
        return np.mean([values[predicted == c].mean() for c in np.unique(predicted)])
    if name == "boundary":
        band = [
            values[y, x]
            for y in range(h)
            for x in range(w)
            if len(np.unique(predicted[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2])) > 1
        ]
        return np.mean(band) if band else values.mean()
    a, b = min(8, h), min(8, w)
    return max(values[y : y + a, x : x + b].mean() for y in range(h - a + 1) for x in range(w - b + 1))


@pytest.mark.parametrize("name", list(AGGREGATORS))
@pytest.mark.parametrize("seed", range(4))
def test_aggregates_equal_loops_and_never_see_padding(name: str, seed: int):
    values, valid, predicted = make_maps(seed)
    found = AGGREGATORS[name](values, valid, predicted)
    assert found.shape == (3,)
    for image in range(3):
        rows, cols = int(valid[image].any(1).sum()), int(valid[image].any(0).sum())
        one = values[image, :rows, :cols].double().numpy(), predicted[image, :rows, :cols].numpy()
        assert abs(found[image].item() - plain_aggregate(name, *one)) < 1e-6
        cut = (values[image : image + 1, :rows, :cols], valid[image : image + 1, :rows, :cols])
        alone = AGGREGATORS[name](*cut, predicted[image : image + 1, :rows, :cols])
        assert abs(found[image].item() - alone.item()) < 1e-6  # batch and padding change nothing


@pytest.mark.parametrize("name", list(AGGREGATORS))
def test_aggregates_of_odd_images(name: str):
    function = AGGREGATORS[name]
    pixel, yes, zero = torch.full((1, 1, 1), 0.3), torch.ones(1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1).long()
    assert math.isclose(function(pixel, yes, zero).item(), 0.3, rel_tol=1e-6)
    flat = torch.full((2, 9, 9), 0.7)
    one_class = torch.zeros(2, 9, 9).long()
    assert np.allclose(function(flat, torch.ones(2, 9, 9, dtype=torch.bool), one_class), 0.7)


def test_options_of_aggregates():
    values, valid, predicted = make_maps(0)
    assert torch.allclose(topk_mean(values, valid, predicted, share=1.0), AGGREGATORS["mean"](values, valid, predicted))
    assert topk_mean(values, valid, predicted, share=0).lt(1).all()  # one pixel at least
    assert (patch_max(values, valid, predicted, side=1) == topk_mean(values, valid, predicted, share=0)).all()
    wide = boundary_mean(values, valid, predicted, width=20)
    assert wide.shape == (3,) and class_balanced_mean(values, valid, predicted).lt(1).all()


def drop_model(toy: Any, rate: float = 0.0, hidden: float = 0.0, attention: float = 0.0) -> Any:
    """A nano with dropout at chosen places."""
    model = load_model("segformer-nano", toy.labels, seed=0)
    model.net.decode_head.dropout.p = rate
    for name, layer in model.net.named_modules():
        if isinstance(layer, nn.Dropout) and name != "decode_head.dropout":
            layer.p = attention if "attention" in name else hidden
    return model


def some_pixels(n: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("rates", [{"rate": 0.3}, {"hidden": 0.2}, {"rate": 0.1, "hidden": 0.2, "attention": 0.1}, {}])
def test_mc_dropout_touches_nothing_and_ignores_the_batch(toy: Any, rates: dict[str, float]):
    """In every kind of network; test_defects.py names the library that does touch it."""
    model = drop_model(toy, **rates)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(some_pixels(1))  # transformers adds hooks of its own in the first pass
    runs: list[int] = []
    model.encoder.register_forward_hook(lambda *_: runs.append(1))
    hooks = sum(len(layer._forward_hooks) for layer in model.modules())
    state = torch.get_rng_state()
    looks = list(mc_passes(model, some_pixels(), passes=4, seed=5))
    assert torch.equal(state, torch.get_rng_state())
    assert len(runs) == (1 if "hidden" not in rates else 4)
    assert len(looks) == 4 and not torch.allclose(looks[0], looks[1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(layer.training for layer in model.modules())
    assert hooks == sum(len(layer._forward_hooks) for layer in model.modules())
    alone = list(mc_passes(model, some_pixels()[1:2], passes=4, seed=5))
    assert all(torch.allclose(a[1:2], b, atol=1e-4) for a, b in zip(looks, alone, strict=True))
    other = next(mc_passes(model, some_pixels(), passes=1, seed=6))
    assert not torch.allclose(other, looks[0])


def test_mc_dropout_has_the_mean_and_spread_of_dropout(toy: Any):
    model = drop_model(toy, rate=0.5)
    pixels = some_pixels(1)[..., :48, :48]
    ours = torch.stack(list(mc_passes(model, pixels, passes=120)))
    model.eval()
    model.net.decode_head.dropout.train()  # the textbook way
    torch.manual_seed(0)
    with torch.inference_mode():
        theirs = torch.stack([model(pixels) for _ in range(120)])
    model.eval()
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() / spread).mean() < 0.18  # about sqrt(2 / 120) * 0.8 = 0.10
    assert abs((ours.std(0) / spread).mean() - 1) < 0.05


def test_dropout_layers(toy: Any):
    assert dropout_layers(drop_model(toy, rate=0.3)) == {"decode_head.dropout": 0.3}
    assert dropout_layers(drop_model(toy)) == {"decode_head.dropout": 0.1}
    bare = drop_model(toy)
    for parent in list(bare.net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(parent, name, nn.Identity())
    with pytest.raises(ConfigError, match="no dropout layer"):
        dropout_layers(bare)
    with pytest.raises(ConfigError, match="passes"):
        next(mc_passes(drop_model(toy), some_pixels(), passes=0))


def test_mc_dropout_on_a_real_checkpoint(weights: Path):
    """Dropout2d at rate 0.8 before the last layer of DeepLab: channels are dropped, and the encoder runs once."""
    model = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), LabelSpace.voc())
    assert dropout_layers(model) == {"segmentation_head.dropout": 0.8}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs: list[int] = []
    model.encoder.register_forward_hook(lambda *_: runs.append(1))
    accumulator = PassAccumulator()
    for logits in mc_passes(model, some_pixels(), passes=4):
        accumulator.add(logits)
    assert len(runs) == 1 and accumulator.maps()["bald"].mean() > 0.01
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_keys():
    assert split_key("bald-class_balanced") == ("bald", "class_balanced")
    with pytest.raises(ConfigError, match="Did you mean 'entropy'"):
        split_key("entorpy-mean")
    with pytest.raises(ConfigError, match="aggregate.*'patch_max'"):
        split_key("entropy-path_max")
    with pytest.raises(ConfigError, match="several looks"):
        make_scorers(["bald-mean"])
    with pytest.raises(ConfigError, match="one look"):
        make_second_look(["entropy-topk"])
    assert scoring_options(["entropy-mean"]) == {} == scoring_options([])
    assert set(scoring_options(["margin-topk", "bald-mean"])) == {"scorers", "second_look"}


def test_every_key_through_the_pool(toy: Any):
    keys = [f"{name}-{aggregate}" for name in (*PIXEL_SCORES, *PASS_SCORES) for aggregate in AGGREGATORS]
    model = drop_model(toy, rate=0.2)
    scored = score_pool(model, toy.train, Inference(64, batch_size=4), **scoring_options(keys, passes=3))
    backwards = toy.train.select(range(len(toy.train))[::-1])
    again = score_pool(model, backwards, Inference(64, batch_size=1), **scoring_options(keys, passes=3)).take(
        scored.ids
    )
    plain = score_pool(model, toy.train, Inference(64, batch_size=4))
    assert set(keys) <= set(scored.scores)
    for key in keys:
        assert np.isfinite(scored.scores[key]).all() and (scored.scores[key] >= 0).all(), key
        assert np.allclose(scored.scores[key], again.scores[key], atol=1e-5), key
    for key, values in plain.scores.items():
        assert np.array_equal(values, scored.scores[key])  # further scores change nothing


def test_a_broken_prediction_names_the_image(toy: Any):
    model = drop_model(toy, rate=0.2)
    with torch.no_grad():
        model.net.decode_head.classifier.weight[:] = math.nan
    with pytest.raises(DataError, match=toy.train[0]["id"]):
        score_pool(model, toy.train, Inference(64), **scoring_options(["bald-mean"], passes=2))
