"""What other active-learning libraries do on the arrays that ours is given: each known defect, and where both agree.

Run as `python benchmarks/peers_samplers.py` in an environment that holds the peers (how to make one is said in
settings.ini beside `extra_peers`); a minute. It prints one JSON row a line, {library, part, input, peer, ours, how,
shown}, and writes them with the versions to results/peers_samplers.json, which chapter 05d shows as a table. A peer
that is not installed stands in the table as missing. Repositories that are no packages are restated as formulas from
reading their source, and such rows say "formula".
"""

import contextlib
import io
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from scipy.special import softmax
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

from vlm_itl.core.checks import DataError
from vlm_itl.core.files import project_root, write_json
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.sources import toy_images
from vlm_itl.model.doubt import AGGREGATORS, uncertainty_maps
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import load_model
from vlm_itl.reports.compare import compare
from vlm_itl.reports.report import aubc
from vlm_itl.sampler.selects import ball_radius, cluster, gumbel_topk, probcover, typiclust
from vlm_itl.sampler.strategy import kcenter_greedy
from vlm_itl.sampler.uncertainty import PassAccumulator, mc_passes

PEERS = {  # package on PyPI -> how to install it
    "baal": "pip install baal==2.1.0",
    "scikit-activeml": "pip install scikit-activeml==1.0.1",
    "small-text": "pip install small-text==1.4.1",
    "skmatter": "pip install --no-deps skmatter==0.4.1",
    "decile-distil": "pip install decile-distil==0.2.0",
}
Row = dict[str, Any]
AGREES = "agrees: "  # how a part begins in which no defect is shown
ROWS: list[tuple[str, str, Callable[[], list[Row]]]] = []  # package ("": formula), part, function


def versions() -> dict[str, str | None]:
    "Of the peers (None: not installed) and of what all of them stand on."
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in [*PEERS, "numpy", "scipy", "scikit-learn", "torch", "transformers"]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def part(package: str, name: str) -> Callable[[Callable[[], list[Row]]], Callable[[], list[Row]]]:
    "Register a function that gives the rows of one part."

    def register(function: Callable[[], list[Row]]) -> Callable[[], list[Row]]:
        ROWS.append((package, name, function))
        return function

    return register


def row(input_: str, peer: str, ours: str, shown: bool, **more: Any) -> Row:
    "One line; `shown`: the defect (or the agreement) was seen in this run."
    return {"input": input_, "peer": peer, "ours": ours, "shown": bool(shown), **more}


def entropy(logits: np.ndarray) -> np.ndarray:  # (N, C, ...) -> (N, ...), nats, float64
    "From the definition."
    return stats.entropy(softmax(logits.astype(np.float64), 1), axis=1)


def image_score(name: str, logits: np.ndarray) -> np.ndarray:  # (N, C, h, w) -> (N,)
    "Our mean score of images, from logits."
    z = torch.as_tensor(logits, dtype=torch.float32)
    valid = torch.ones(z.shape[0], *z.shape[2:], dtype=torch.bool)
    return AGGREGATORS["mean"](uncertainty_maps(z)[name], valid, z.argmax(1)).double().numpy()


def striped_logits(images: int = 64) -> np.ndarray:  # (N, 21, 24, 32)
    "Images of 1 to 16 upright stripes, each of one class, predicted more or less surely."
    rng = make_rng(0, "peers", "stripes")
    stripes = 2 ** rng.integers(0, 5, images)
    classes = np.stack([np.repeat(rng.integers(0, 21, s), 32 // s) for s in stripes])[:, None].repeat(24, 1)
    sure = rng.uniform(4, 8, (images, 1, 1, 1))
    return rng.normal(size=(images, 21, 24, 32)) + sure * np.eye(21)[classes].transpose(0, 3, 1, 2)


# ---- scores


@part("baal", "Entropy and Margin of MC passes average logits")
def baal_passes() -> list[Row]:
    from baal.active.heuristics import Entropy, Margin

    looks = np.array([[20.0, 0.0], [0.0, 5.0]])  # (T, C)
    stacked = looks.T[None]  # (1, C, T), what baal is given
    accumulator = PassAccumulator()
    for look in looks:
        accumulator.add(torch.tensor(look).view(1, 2, 1, 1))
    mean = softmax(looks, 1).mean(0)
    true = stats.entropy(mean)
    peer = Entropy().get_uncertainties(stacked.copy())[0]
    ours = accumulator.maps()["predictive_entropy"].item() * np.log(2)
    margin, true_margin = Margin().get_uncertainties(stacked.copy())[0], abs(mean[0] - mean[1])
    return [
        row(
            "one pixel, two looks that disagree: logits (20, 0) and (0, 5)",
            f"entropy {peer:.4f}, margin {margin:.4f}",
            f"entropy {ours:.4f} (from the definition {true:.4f}; margin {true_margin:.4f})",
            peer < 0.1 * true and abs(ours - true) < 1e-9,
        )
    ]


@part("baal", "one dense pass (N, C, H, W): the width is averaged away")
def baal_width() -> list[Row]:
    from baal.active.heuristics import Entropy

    logits = striped_logits()
    true = entropy(logits).mean((1, 2))
    peer = Entropy(reduction="mean").get_uncertainties(logits.copy())
    theirs, ours = (stats.spearmanr(v, true).statistic for v in (peer, image_score("entropy", logits)))
    return [
        row(
            "64 images of 1 to 16 upright stripes, 21 classes, one pass",
            f"Spearman {theirs:.2f} with the true mean entropy",
            f"Spearman {ours:.4f}",
            theirs < 0.8 and ours > 0.9999,
        )
    ]


@part("baal", "PowerSampling(Margin()) prefers the sure images; global generator")
def baal_power() -> list[Row]:
    from baal.active.heuristics import Margin
    from baal.active.heuristics.stochastics import PowerSampling

    p = make_rng(0, "peers", "power").dirichlet([0.3] * 5, 200)
    ordered = np.sort(p, 1)
    margin = ordered[:, -1] - ordered[:, -2]
    np.random.seed(0)  # noqa: NPY002  baal can be seeded in no other way
    draws = [PowerSampling(Margin(), 20).get_ranks(p)[0] for _ in range(50)]
    ours = [gumbel_topk("power", 1 - margin, 20, 1.0, make_rng(s)) for s in range(50)]
    again = [gumbel_topk("power", 1 - margin, 20, 1.0, make_rng(s)) for s in range(50)]
    theirs, mine = (margin[np.concatenate(d)].mean() for d in (draws, ours))
    return [
        row(
            f"200 images with margins of mean {margin.mean():.3f}; 20 drawn, 50 times",
            f"mean margin of the picks {theirs:.3f}: surer than the pool; two calls in a row differ",
            f"mean margin of the picks {mine:.3f}; the same generator, the same picks",
            theirs > margin.mean() > mine and (np.array(ours) == np.array(again)).all(),
        )
    ]


@part("baal", "an image whose prediction is NaN is silently never chosen")
def baal_nan() -> list[Row]:
    from baal.active.heuristics import BALD, Entropy, Margin

    looks = make_rng(0, "peers", "nan").normal(size=(10, 5, 4, 3, 6))  # (N, C, h, w, T)
    looks[7] = np.nan
    ranks = {}
    for heuristic in (Entropy(reduction="mean"), BALD(reduction="mean"), Margin(reduction="mean")):
        order, _ = heuristic.get_ranks(looks.copy())
        ranks[type(heuristic).__name__] = 1 + int(np.flatnonzero(order == 7)[0])
    return [
        row(
            "10 images, the prediction of one is NaN",
            "rank " + ", ".join(f"{rank} of 10 by {name}" for name, rank in ranks.items()) + "; a warning",
            nan_answer(),
            set(ranks.values()) == {10},
        )
    ]


def nan_answer() -> str:
    "What our scoring pass says to a network that breaks on one image."
    toy = toy_images()
    model = load_model("segformer-nano", toy.labels, seed=0)
    broken = toy.train[3]["id"]
    calls = iter(range(len(toy.train)))

    def spoil(net: nn.Module, inputs: Any, output: Any) -> None:
        if next(calls) == 3:
            output.logits.fill_(np.nan)

    model.net.register_forward_hook(spoil)
    try:
        score_pool(model, toy.train, Inference(64, batch_size=1))
    except DataError as error:
        assert broken in str(error)
        return "DataError: " + str(error).split(":")[0].replace(broken, "NAME")
    return "no error"


@part("", "an image whose prediction is NaN is silently never chosen")
def nnactive_nan() -> list[Row]:
    p = torch.full((4, 3, 3), 0.25)
    p[:, 1] = np.nan
    theirs = -(p * p.log()).nan_to_num().sum(0)
    return [
        row(
            "one map of probabilities, a row of it NaN",
            f"entropy {theirs[1, 0].abs():.1f} where it is NaN, {theirs[0, 0]:.2f} elsewhere",
            nan_answer(),
            theirs[1].eq(0).all(),
            library="nnActive",
        )
    ]


@part("", "entropy maps rescaled to 0-255 per image before averaging")
def mittal_rescaling() -> list[Row]:
    rng = make_rng(0, "peers", "doubt")
    level = rng.uniform(0.02, 0.5, (64, 1, 1))
    doubt = np.where(rng.random((64, 24, 32)) < 0.5, level, 0.001)  # probability of the second of two classes
    logits = np.stack([np.log1p(-doubt), np.log(doubt)], 1)
    maps = entropy(logits)  # (N, h, w)
    true = maps.mean((1, 2))
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    peer = np.round(255 * (maps - low) / (high - low)).mean((1, 2))
    theirs, ours = (stats.spearmanr(v, true).statistic for v in (peer, image_score("entropy", logits)))
    return [
        row(
            "64 images, two classes: half of the pixels are doubtful, the second class at .02 to .5 there",
            f"Spearman {theirs:.2f} with the true mean entropy: the surest image looks like any other",
            f"Spearman {ours:.4f}",
            theirs < 0.8,
            library="Mittal et al. repository",
        )
    ]


# ---- dropout


class Classifier(nn.Module):
    "A segmenter seen as a classifier of images, as DISTIL wants it: logits and, if asked, an embedding."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, last: bool = False) -> Any:
        out = self.model(x.to(torch.uint8), features=last)
        return (out[0].mean((2, 3)), out[1].mean((2, 3))) if last else out.mean((2, 3))

    def get_embedding_dim(self) -> int:
        return 5


class Handler(torch.utils.data.Dataset):
    "DISTIL's data handler: pairs of image and index."

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.x[index], index


@part("decile-distil", "MC dropout calls model.train(): BatchNorm learns from the pool")
def distil_batchnorm() -> list[Row]:
    from distil.active_learning_strategies.bayesian_active_learning_disagreement_dropout import BALDDropout

    toy = toy_images()
    pixels = make_rng(0, "peers", "pixels").integers(0, 256, (8, 3, 64, 64)).astype(np.float32)

    def moved(run: Callable[[Any], Any]) -> float:
        model = load_model("segformer-nano", toy.labels, seed=0)
        norm = model.net.decode_head.batch_norm
        before = norm.running_mean.clone()
        run(model)
        return (norm.running_mean - before).abs().max().item()

    theirs = moved(
        lambda m: BALDDropout(
            pixels[:0], np.zeros(0), pixels, Classifier(m), Handler, len(toy.labels), {"n_drop": 5}
        ).select(2)
    )
    ours = moved(lambda m: list(mc_passes(m, torch.tensor(pixels, dtype=torch.uint8), passes=5)))
    return [
        row(
            "a SegFormer with a BatchNorm, 8 unlabelled images, 5 looks",
            f"running mean moved by {theirs:.3f}",
            f"running mean moved by {ours:g}",
            theirs > 0 and ours == 0,
        )
    ]


@part("decile-distil", "BALD of a sure image is NaN")
def distil_underflow() -> list[Row]:
    from distil.active_learning_strategies.bayesian_active_learning_disagreement_dropout import BALDDropout

    looks = torch.tensor([[0.0, 200.0], [1.0, 0.0], [2.0, 0.0], [0.5, 0.0]])
    p = F.softmax(looks, 1)
    strategy = BALDDropout(np.zeros((0, 2)), np.zeros(0), looks.numpy(), nn.Identity(), Handler, 2, {"n_drop": 2})
    order = strategy.select(4).tolist()  # its two looks are equal: there is no dropout
    theirs = (-p * p.log()).sum(1)[0].item()
    accumulator = PassAccumulator().add(looks.T[None, :, :, None]).add(looks.T[None, :, :, None])
    ours = accumulator.maps()["bald"].max().item()
    return [
        row(
            "4 images, logits (0, 200) for one of them, no disagreement",
            f"BALD {theirs} for the sure image, rank {order.index(0) + 1} of 4",
            f"BALD {ours:.1g} for all",
            np.isnan(theirs),
        )
    ]


@part("decile-distil", "core-set when nothing is labelled")
def distil_coreset() -> list[Row]:
    from distil.active_learning_strategies.core_set import CoreSet

    points = make_rng(0, "peers", "points").normal(size=(200, 8)).astype(np.float32)
    rest = dict(Y=np.zeros(0), net=nn.Identity(), handler=Handler, nclasses=2)
    strategy = CoreSet(points[:0], unlabeled_x=points, **rest)
    picks = [{tuple(p[i]) for i in strategy.furthest_first(p, points[:0], 10)} for p in (points, points[::-1])]
    ours = [{tuple(p[i]) for i in kcenter_greedy(p, None, 10)[0]} for p in (points, points[::-1])]
    try:  # the repository's later version builds its start with this call
        torch.tile(float("inf"), 200)  # type: ignore[arg-type]
        later = "the repository's later version works"
    except TypeError:
        later = "the repository's later version stops with TypeError (formula)"
    same = len(picks[0] & picks[1])
    return [
        row(
            "200 points and none labelled, in two orders; 10 picks",
            f"starts with the first row: {same} of 10 picks alike in both orders; {later}",
            f"starts nearest the mean: {len(ours[0] & ours[1])} of 10 alike",
            same < 10 and ours[0] == ours[1],
        )
    ]


# ---- covering


def right_coreset(points: np.ndarray, candidates: np.ndarray, labelled: np.ndarray, k: int) -> list[int]:
    "K-center greedy from the definition, float64."
    distance = np.sqrt(((points[candidates][:, None] - points[labelled][None]) ** 2).sum(-1)).min(1)
    picks = []
    for _ in range(k):
        i = int(distance.argmax())
        picks.append(int(candidates[i]))
        distance = np.minimum(distance, np.sqrt(((points[candidates] - points[candidates[i]]) ** 2).sum(-1)))
    return picks


@part("small-text", "greedy_coreset mixes positions and indices; cosine distance gives NaN")
def small_text_coreset() -> list[Row]:
    from small_text.query_strategies.coresets import _cosine_distance, greedy_coreset

    points = make_rng(0, "peers", "coreset").normal(size=(2000, 32))
    mixed = make_rng(0, "peers", "order").permutation(2000)
    labelled, candidates = np.sort(mixed[:100]), np.sort(mixed[100:])
    right = set(right_coreset(points, candidates, labelled, 100))
    start = time.process_time()
    theirs = greedy_coreset(points, candidates, labelled, 100, distance_metric="euclidean")
    cost = time.process_time() - start
    start = time.process_time()
    ours = {int(candidates[i]) for i in kcenter_greedy(points[candidates], points[labelled], 100)[0]}
    own = time.process_time() - start
    copies = np.repeat(points[:50, :8], 2, 0)
    with np.errstate(invalid="ignore"):
        nan = int(np.isnan(_cosine_distance(copies, copies)).sum())
    distances = kcenter_greedy(copies, None, 100)[1]
    share = len({int(candidates[i]) for i in theirs} & right) / 100
    documented = len({int(i) for i in theirs} & right) / 100
    return [
        row(
            "2000 points, 100 labelled anywhere among them, 100 picks",
            f"{share:.0%} of the right set if its answer is read as positions, {documented:.0%} if as documented; "
            f"{cost / own:.0f} times our CPU time",
            f"{len(ours & right)} % of the right set",
            share < 1 and documented < 1 and ours == right,
        ),
        row(
            "50 points, each twice",
            f"{nan} of 10000 cosine distances are NaN",
            f"no distance is NaN, copies are {max(distances[50:]):g} apart",
            nan > 0 and np.isfinite(distances[1:]).all(),
        ),
    ]


def parts_of(groups: np.ndarray) -> frozenset[tuple[int, ...]]:
    "A clustering without the names of its clusters."
    return frozenset(tuple(np.flatnonzero(groups == g).tolist()) for g in np.unique(groups))


@part("", "ProbCover drops the last N % 500 candidates; unseeded k-means")
def typiclust_repository() -> list[Row]:
    points = make_rng(0, "peers", "probcover").normal(0, 0.01, (703, 2))
    points[500:] += np.stack([100 * np.arange(1, 204), np.zeros(203)], 1)  # the last 203 lie far from all others
    near = np.abs(points[:, None] - points[None]).max(-1) < 1.0
    ball = near.copy()
    ball[500 * (len(points) // 500) :] = False  # balls are made in whole blocks of 500
    covered = np.zeros(703, dtype=bool)
    for _ in range(204):
        covered |= ball[(ball & ~covered).sum(1).argmax()]
    picks, gains = probcover(points, points[:0], 204, 1.0)
    many = make_rng(0, "peers", "kmeans").normal(size=(300, 8))
    runs = {parts_of(KMeans(10, n_init=1).fit_predict(many)) for _ in range(5)}
    ours = {parts_of(cluster(many, 10, make_rng(3))) for _ in range(5)}
    return [
        row(
            "703 points, the last 203 of them far from all others; 204 picks",
            f"{covered.sum()} of 703 covered",
            f"{sum(gains)} of 703 covered",
            covered.sum() == 500 and sum(gains) == 703 and len(picks) == 204,
            library="TypiClust repository",
        ),
        row(
            "k-means of 300 points into 10 clusters, 5 times",
            f"{len(runs)} different clusterings",
            f"{len(ours)} clustering from one generator",
            len(runs) > 1 and len(ours) == 1,
            library="TypiClust repository",
        ),
    ]


@part("scikit-activeml", "TypiClust with copies: an image twice in one batch, or a crash")
def activeml_copies() -> list[Row]:
    from skactiveml.pool import TypiClust

    points = np.repeat(make_rng(0, "peers", "copies").normal(size=(4, 3)), 5, axis=0)
    unknown = np.full(20, np.nan)
    picks = TypiClust(random_state=0).query(points, unknown, batch_size=8)
    some = unknown.copy()
    some[::5] = 0
    try:
        TypiClust(random_state=0).query(points, some, batch_size=2)
        crash = "works"
    except UnboundLocalError:
        crash = "UnboundLocalError"
    ours = typiclust(points, points[:0], 8, make_rng(0), min_size=1)[0]
    rest = np.flatnonzero(np.isnan(some))
    after = typiclust(points[rest], points[::5], 2, make_rng(0), min_size=1)[0]
    return [
        row(
            "4 points, each 5 times; 8 picks of 20, then 2 picks where one of each is labelled",
            f"{len(set(picks.tolist()))} different picks of 8; then {crash}",
            f"{len(set(ours))} different picks of 8; then {len(set(after))} of 2",
            len(set(picks.tolist())) < 8 and len(set(ours)) == 8,
        )
    ]


@part("scikit-activeml", "ProbCover's radii are fixed numbers, and it holds N x N distances")
def activeml_radius() -> list[Row]:
    from skactiveml.pool import ProbCover

    points = separated([50, 46, 60, 42], seed=0)
    theirs = ProbCover(n_classes=4, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.query(points, np.full(len(points), np.nan))
    ours = ball_radius(points, 4, make_rng(0))

    def covered(radius: float) -> float:
        gains = probcover(points, points[:0], 4, radius)[1]
        return sum(gains) / len(points)

    return [
        row(
            "198 points in 4 groups 28 apart; 4 picks",
            f"radius {theirs.delta_max_:.1f} (the largest it tries): 4 balls cover {covered(theirs.delta_max_):.0%}; "
            f"keeps {theirs.distances_.size} distances",
            f"radius {ours:.1f} from the pool itself: 4 balls cover {covered(ours):.0%}; keeps none",
            covered(theirs.delta_max_) < 0.5 < covered(ours),
        )
    ]


# ---- statistics


def write_runs(folder: Path, values: dict[str, list[float]]) -> list[Path]:
    "Run folders of one round each, as `compare` reads them."
    paths = []
    for strategy, levels in values.items():
        for seed, level in enumerate(levels):
            path = folder / f"{strategy}-{seed}"
            (path / "round_000").mkdir(parents=True)
            iou = dict.fromkeys(("mean_iou", "mean_iou_in_truth", "pixel_accuracy"), level) | {"per_class_iou": {}}
            record = {"index": 0, "labelled": 10, "labelled_share": 0.1, "pseudo": 0, "metrics": {"val": iou}}
            record |= {"budget": {"images": 10, "human_seconds": 1.0, "judge_usd": None}, "seconds": {"total": 1.0}}
            record |= {"judge": None, "selection": {"ids": []}, "start_ids": [f"start-{seed}"]}
            config = {"mode": "al", "strategy": strategy, "seed": seed, "steps": 10, "output_dir": str(path)}
            write_json(path / "config.json", config)
            write_json(path / "data.json", {"labels": ["a"]})
            write_json(path / "round_000" / "record.json", record)
            (path / "rounds.jsonl").write_text(json.dumps(record) + "\n")
            write_json(path / "summary.json", {"mode": "al", "finished": True, "simulated": False, "labels": ["a"]})
            paths.append(path)
    return paths


@part("", "paired test pairs by row order, not by seed; skip_first changes only the divisor")
def nnactive_statistics() -> list[Row]:
    rng = make_rng(0, "peers", "seeds")
    level = rng.normal(0.5, 0.05, 8)  # what the start set of each seed gives
    values = {"random": level.tolist(), "entropy": (level + 0.01 + rng.normal(0, 0.003, 8)).tolist()}
    by_row = []
    for s in range(20):
        order = make_rng(s, "peers", "rows").permutation(8)
        by_row.append(stats.ttest_1samp(np.array(values["entropy"])[order] - values["random"], 0).pvalue)
    with tempfile.TemporaryDirectory() as name:
        folders = write_runs(Path(name), values)
        ours = []
        for s in range(5):
            mixed = [folders[i] for i in make_rng(s, "peers", "folders").permutation(16)]
            ours.append(float(compare(mixed, metric="val", measure="final").table["p"][0]))
    wins = np.array([1.0, 0.0, 1.0, 1.0])  # was one better, at each budget
    theirs, right = wins.sum() / 3, wins[1:].sum() / 3
    curve = [0.2, 0.6, 0.6, 0.6]
    cut = aubc([0.1, 0.2, 0.3, 0.4], curve, 0.2, 0.4)
    return [
        row(
            "8 seeds, a true difference of 0.010 each; the rows of one side in 20 orders",
            f"p from {min(by_row):.2f} to {max(by_row):.2f}",
            f"p = {min(ours):.1e} in each of 5 orders",
            max(by_row) > 0.05 and max(ours) - min(ours) < 1e-12,
            library="nnActive",
        ),
        row(
            "better at budgets 1, 3 and 4 of 4; the first one skipped",
            f"penalty {theirs:.2f} where {right:.2f} is right",
            f"no penalty matrix; the area of a curve .2 .6 .6 .6 without its first budget is {cut:.2f}",
            theirs != right and abs(cut - 0.6) < 1e-12,
            library="nnActive",
        ),
    ]


# ---- where all agree


def separated(sizes: list[int], seed: int) -> np.ndarray:  # (N, D) float32
    "Groups of points far apart."
    rng = make_rng(seed, "peers", "groups")
    group = np.repeat(np.arange(len(sizes)), sizes)
    return (20 * np.eye(len(sizes), len(sizes) + 3)[group] + rng.normal(size=(len(group), len(sizes) + 3))).astype("f4")


class Given:
    "A clustering that is known already, in the shape scikit-activeml asks for."

    def __init__(self, groups: Any = None, n_clusters: int = 0) -> None:
        self.groups = groups

    def fit_predict(self, points: np.ndarray) -> np.ndarray:
        return np.asarray(self.groups)


@part("skmatter", AGREES + "farthest points from the same start")
def skmatter_agrees() -> list[Row]:
    from skmatter.sample_selection import FPS

    points = make_rng(0, "peers", "fps").normal(size=(2000, 64)).astype(np.float32)
    ours = kcenter_greedy(points, None, 200)[0]
    theirs = FPS(n_to_select=200, initialize=ours[0]).fit(points).selected_idx_.tolist()
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    words = f"{same} of 200 picks alike, in order"
    return [row("2000 points, 64 features, 200 picks", words, "", same == 200, picks=theirs)]  # for the tests


@part("scikit-activeml", AGREES + "CoreSet, TypiClust on given clusters, ProbCover at a given radius")
def activeml_agrees() -> list[Row]:
    from skactiveml.pool import CoreSet, ProbCover, TypiClust

    points = make_rng(1, "peers", "agree").normal(size=(300, 4))
    known = np.full(300, np.nan)
    known[290:] = 0
    theirs = CoreSet(random_state=0).query(points, known, batch_size=40).tolist()
    ours = kcenter_greedy(points[:290], points[290:], 40)[0]
    rows = [row("300 points, 10 labelled, 40 core-set picks", agreement(theirs, ours), "", theirs == ours)]
    groups = separated([50, 46, 60, 52, 70, 44], seed=0)
    clusters = cluster(groups, 6, make_rng(0))
    asked = TypiClust(random_state=0, k=20, cluster_algo=Given, cluster_algo_dict={"groups": clusters})
    theirs = asked.query(groups, np.full(len(groups), np.nan), batch_size=6).tolist()
    ours = typiclust(groups, groups[:0], 6, make_rng(0), min_size=1)[0]
    rows.append(row("322 points in 6 groups of 44 to 70", agreement(theirs, ours) + " (TypiClust)", "", theirs == ours))
    picks, gains = probcover(points[:290], points[290:], 30, 0.9)
    asked, best = ProbCover(deltas=[0.9], random_state=0), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pick, gain in zip(picks, gains, strict=True):
            worth = asked.query(points, known, batch_size=1, return_utilities=True)[1][0]
            best.append(np.nanmax(worth) == worth[pick] == gain)
            known[pick] = 0
    rows.append(
        row("300 points, 10 labelled, radius 0.9", f"{sum(best)} of 30 picks are a best one (ProbCover)", "", all(best))
    )
    return rows


def agreement(theirs: list[int], ours: list[int]) -> str:
    "In words."
    return f"{sum(a == b for a, b in zip(theirs, ours, strict=True))} of {len(ours)} picks alike, in order"


@part("baal", AGREES + "BALD of the same passes")
def baal_bald() -> list[Row]:
    from baal.active.heuristics import BALD

    looks = make_rng(0, "peers", "bald").normal(0, 4, (10, 2, 21, 12, 12))  # (T, N, C, h, w)
    theirs = BALD().get_uncertainties(np.moveaxis(looks, 0, -1).copy())
    accumulator = PassAccumulator()
    for look in looks:
        accumulator.add(torch.tensor(look))
    worst = np.abs(theirs / np.log(21) - accumulator.maps()["bald"].numpy()).max()
    size = "10 passes over 2 images of 12 x 12, 21 classes, float64"
    return [row(size, f"largest difference {worst:.0e}", "", worst < 1e-12)]


def main() -> None:
    "All rows, printed and written."
    torch.set_num_threads(1)
    have = versions()
    rows = []
    for package, name, function in ROWS:
        head: Row = {"library": package, "kind": "agreement" if name.startswith(AGREES) else "defect"}
        head["part"] = name.removeprefix(AGREES)
        if package and have[package] is None:
            found = [row("", f"missing: {PEERS[package]}", "", False) | {"shown": None, "how": "missing"}]
        else:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = function()
        for one in found:
            how = {"how": "run" if package else "formula"}
            rows.append({**head, "version": have.get(package), **how, **one})
            print(json.dumps(rows[-1]), flush=True)
    write_json(project_root() / "results" / "peers_samplers.json", {"versions": have, "rows": rows})


if __name__ == "__main__":
    main()
