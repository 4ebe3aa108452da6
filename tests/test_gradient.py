"""The last layer is found in any family, its gradient is the one of autograd, and BADGE draws as k-means++ does."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm_itl.core.checks import ConfigError
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.sources import load_data, toy_images
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import Segmenter, load_model, watch_last_layer
from vlm_itl.sampler.gradient import GradientProbe, last_layer_gradient, projection
from vlm_itl.sampler.selects import kmeanspp
from vlm_itl.sampler.strategy import Sampler


class Tiny(nn.Module):
    """A network of two layers that may upsample, and may bring a second head."""

    def __init__(self, classes: int, up: int = 1, second: bool = False, kernel: int = 1):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, stride=4, padding=1)
        self.last = nn.Conv2d(5, classes, kernel, padding=kernel // 2)
        self.other = nn.Conv2d(5, classes, 1) if second else None
        self.up = up

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> Any:
        hidden = self.first(pixel_values).relu()
        logits = self.last(hidden)
        if self.other is not None:
            self.other(hidden)  # an auxiliary head that runs last
        if self.up > 1:
            logits = F.interpolate(logits, scale_factor=self.up, mode="bilinear", align_corners=False)
        return type("Out", (), {"logits": logits, "hidden_states": (hidden,)})()


LABELS = LabelSpace.voc()
PIXELS = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("up", "second"), [(1, False), (4, False), (1, True), (4, True)])
def test_the_last_layer_is_found(up: int, second: bool):
    model = Segmenter(Tiny(len(LABELS), up, second), LABELS)
    with torch.inference_mode(), watch_last_layer(model) as last:
        logits = model(PIXELS)
        assert last.find(logits) is model.net.last
        hidden, output = last.passed(logits)
        assert hidden.shape == (2, 5, 8, 12) and output.shape == (2, len(LABELS), 8, 12)
    assert not model.net.last._forward_hooks


def test_a_network_without_such_a_layer_says_so():
    model = Segmenter(Tiny(len(LABELS), kernel=3), LABELS, name="wide")
    data = toy_images()
    wide = Segmenter(Tiny(len(data.labels), kernel=3), data.labels, name="wide")
    with pytest.raises(ConfigError, match="'wide' has no 1 x 1 convolution.*BADGE"):
        score_pool(wide, data.train, Inference(64), probe=GradientProbe())
    assert not any(m._forward_hooks for m in wide.modules())
    with pytest.raises(ConfigError, match="watch"):
        GradientProbe().read(model(PIXELS), lambda shape: torch.ones(2, *shape[-2:], dtype=torch.bool))


@pytest.mark.parametrize("scale", [1.0, 50.0, 1e4])
def test_gradient_equals_autograd(scale: float):
    """Ash et al. 2020: the gradient of the loss to the network's own answer."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 6, 5, 7, generator=generator, dtype=torch.float64)
    weight = (scale * torch.randn(4, 6, 1, 1, generator=generator, dtype=torch.float64)).requires_grad_()
    valid = torch.rand(2, 5, 7, generator=generator) > 0.3
    logits = F.conv2d(hidden, weight)
    found = last_layer_gradient(hidden, logits.detach(), valid)
    for row in range(2):
        inside = logits[row][:, valid[row]].T
        (grad,) = torch.autograd.grad(F.cross_entropy(inside, inside.argmax(1)), weight, retain_graph=True)
        assert torch.allclose(found[row], grad[:, :, 0, 0], atol=1e-12)


def test_padding_and_batch_change_nothing(scenes_small: Any):
    model = load_model("segformer-nano", scenes_small.labels, seed=0)
    images = scenes_small.train.select(range(7))
    found = [score_pool(model, images, Inference(64, batch_size=b), probe=GradientProbe()).gradient for b in (1, 3, 7)]
    assert found[0] is not None and found[0].shape == (7, 512)
    scale = abs(found[0]).max()
    assert all(abs(found[0] - other).max() < 1e-5 * scale for other in found[1:] if other is not None)
    plain = score_pool(model, images, Inference(64))
    assert plain.gradient is None and plain.take(plain.ids[:2]).gradient is None
    probed = score_pool(model, images, Inference(64), probe=GradientProbe())
    assert all((probed.scores[k] == plain.scores[k]).all() for k in plain.scores)  # the probe only looks
    assert (probed.take(probed.ids[::-1]).gradient == probed.gradient[::-1]).all()


def test_second_look_does_not_disturb_the_probe(scenes_small: Any):
    """Dropout looks run the network again; the gradient is that of the first look."""
    from vlm_itl.sampler.uncertainty import scoring_options

    model = load_model("segformer-nano", scenes_small.labels, seed=0)
    images = scenes_small.train.select(range(3))
    alone = score_pool(model, images, Inference(64), probe=GradientProbe())
    both = score_pool(model, images, Inference(64), probe=GradientProbe(), **scoring_options(["bald-mean"]))
    assert (alone.gradient == both.gradient).all() and "bald-mean" in both.scores


def test_on_a_real_checkpoint(voc: Any, weights: Any):
    """DeepLabV3 pads before its last layer; real photographs."""
    data = load_data(str(voc), options={"max_train": 8, "max_test": 2}, val_share=2)
    model = load_model(str(weights / "deeplabv3-mobilenetv2-voc"), data.labels)
    found = score_pool(model, data.train, Inference(129), probe=GradientProbe())
    assert found.gradient is not None and found.gradient.shape == (6, 512)
    lengths = np.linalg.norm(found.gradient, axis=1)
    assert (lengths > 0).all() and np.corrcoef(lengths, found.scores["least_confidence-mean"])[0, 1] > 0
    ids, reasons = Sampler("badge").select(found, found.ids, 4, make_rng(0))
    assert len(set(ids)) == 4 and reasons[0] == "longest gradient" and ids[0] == found.ids[int(lengths.argmax())]


def test_projection_is_seeded_and_keeps_distances():
    one, two, other = projection(2000, 256, 1), projection(2000, 256, 1), projection(2000, 256, 2)
    assert one is not None and torch.equal(one, two) and not torch.equal(one, other)  # type: ignore[arg-type]
    points = torch.randn(30, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ratio = torch.pdist(points @ one) / torch.pdist(points)
    assert 0.75 < ratio.min() and ratio.max() < 1.25 and abs(ratio.mean() - 1) < 0.03


def test_kmeanspp_draws_with_its_probabilities():
    """Against the squared distances written out."""
    points = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    first = int((points**2).sum(1).argmax())
    squared = ((points - points[first]) ** 2).sum(1).astype(float)
    draws = np.bincount([kmeanspp(points, 2, make_rng(s))[0][1] for s in range(4000)], minlength=12)
    p = squared / squared.sum()
    assert (abs(draws - 4000 * p) <= 4.5 * np.sqrt(4000 * p * (1 - p)) + 1e-9).all() and draws[first] == 0
    for seed in range(5):  # each distance is the one to the nearest earlier pick
        picks, apart = kmeanspp(points, 12, make_rng(seed))
        assert sorted(picks) == list(range(12)) and math.isinf(apart[0])
        for n in range(1, 12):
            nearest = min(np.linalg.norm(points[picks[n]] - points[p]) for p in picks[:n])
            assert math.isclose(apart[n], nearest, rel_tol=1e-4)


def test_kmeanspp_agrees_with_scikit_learn_on_spread():
    """The same seeding in scikit-learn reaches the same cost on average."""
    from sklearn.cluster import kmeans_plusplus

    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(c, 0.3, (40, 4)) for c in rng.normal(0, 4, (6, 4))]).astype(np.float32)

    def cost(rows: Any) -> float:
        return float(((points[:, None] - points[rows][None]) ** 2).sum(-1).min(1).mean())

    ours = np.median([cost(kmeanspp(points, 6, make_rng(s))[0]) for s in range(40)])
    theirs = np.median([cost(kmeans_plusplus(points, 6, random_state=s, n_local_trials=1)[1]) for s in range(40)])
    chance = np.median([cost(make_rng(s).choice(len(points), 6, replace=False)) for s in range(40)])
    assert ours < 1.3 * theirs and ours < chance


def test_kmeanspp_memory_is_linear():
    points = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)  # 2.6 MB; N x N would be 1.6 GB
    tracemalloc.start()
    kmeanspp(points, 50, make_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * points.nbytes
