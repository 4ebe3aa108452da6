"""What scores and selects cost, side by side with the plain way of doing the same and with other libraries.

Run as `python benchmarks/bench_sampler.py` (six minutes, 3 GB) in an environment that holds the peers, as settings.ini
says beside `extra_peers`; rows of absent peers say so. One thread, CPU time, medians of turns taken in one process;
memory is the peak over what was there before, each measured in a process of its own. Rows as in table.py, also in
results/bench_sampler.json.
"""

import gc
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch read it

import numpy as np
import torch
from PIL import Image
from table import Row, compare, publish, take_turns
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from vlm_itl.core.files import project_root
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import DecodeRows, MaskStore, make_rows
from vlm_itl.model.doubt import uncertainty_maps
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import Segmenter, load_model
from vlm_itl.sampler.selects import ball_radius, probcover
from vlm_itl.sampler.strategy import Sampler, kcenter_greedy
from vlm_itl.sampler.uncertainty import make_second_look, mc_passes, scoring_options

T = 10  # looks
IMAGES = 32  # of BALD, 256 x 256
BATCH = 8
PEERS = {"baal": "pip install baal==2.1.0", "skmatter": "pip install --no-deps skmatter==0.4.1"}


def missing(name: str) -> bool:
    "Is a peer absent? Then that is said, and its rows are left out."
    if importlib.util.find_spec(name):
        return False
    print(f"{name} is not installed ({PEERS[name]}): its rows are left out", flush=True)
    return True


def turns(functions: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    "CPU milliseconds of each turn, after one to warm up."
    taken = take_turns(functions, repeats, clock=time.process_time)
    return {name: [1000 * seconds for seconds in found] for name, found in taken.items()}


# ---- memory, and what is measured in a process of its own


def status(key: str) -> float:
    "A number of /proc/self/status in MB."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def extra(function: Callable[[], Any]) -> dict[str, float]:
    "Peak memory over what there was before, MB, and CPU seconds."
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = status("VmRSS"), time.process_time()
    function()
    seconds = time.process_time() - start
    peak = min(status("VmHWM"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"mb": peak - before, "seconds": seconds}


def small_model() -> Segmenter:
    "A SegFormer of the size of B0 with random weights, for VOC."
    labels = LabelSpace.voc()
    torch.manual_seed(0)
    net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=len(labels)))
    return Segmenter(net, labels, name="b0").eval()


def bald(way: str) -> dict[str, float]:
    "BALD of images by us or by baal, at 1/4 size, from the same network and pixels."
    model = small_model()
    pixels = torch.randint(0, 256, (IMAGES, 3, 256, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.inference_mode():
        model(pixels[:1])
    if way == "ours":
        look = make_second_look(["bald-mean"], passes=T)
        valid = torch.ones(BATCH, 64, 64, dtype=torch.bool)
        return extra(lambda: [look(model, pixels[i : i + BATCH], valid) for i in range(0, IMAGES, BATCH)])
    if way == "stacked":

        def stacked() -> None:
            probabilities = []
            for i in range(0, IMAGES, BATCH):
                looks = [logits.softmax(1) for logits in mc_passes(model, pixels[i : i + BATCH], T)]
                probabilities.append(torch.stack(looks))
            p = torch.cat(probabilities, 1)  # (T, N, C, h, w)
            (torch.special.entr(p.mean(0)).sum(1) - torch.special.entr(p).sum(2).mean(0)).mean((1, 2))

        return extra(stacked)
    from baal import ModelWrapper
    from baal.active.heuristics import BALD
    from baal.bayesian.dropout import patch_module
    from baal.modelwrapper import TrainingArgs

    args = TrainingArgs(batch_size=BATCH, workers=0, use_cuda=False, replicate_in_memory=way != "lean")
    wrapper = ModelWrapper(patch_module(model), args)
    data = torch.utils.data.TensorDataset(pixels)
    if way == "array":
        return extra(
            lambda: BALD(reduction="mean").get_ranks(wrapper.predict_on_dataset(data, T, verbose=False))  # type: ignore[arg-type]
        )
    return extra(
        lambda: BALD(reduction="mean").get_ranks(wrapper.predict_on_dataset_generator(data, T, verbose=False))  # type: ignore[arg-type]
    )


def scoring(count: str) -> dict[str, float]:
    "One pass over images on disk: scores of one look and of several, embedding, masks written."
    labels = LabelSpace.voc()
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), make_rng(0, "bench", "images")
        paths = [folder / f"{i:05d}.png" for i in range(int(count))]
        for path in paths:
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((128, 96), Image.Resampling.BICUBIC).save(path, compress_level=1)
        rows = make_rows([p.stem for p in paths], paths).with_transform(DecodeRows(labels))
        model = load_model("segformer-nano", labels)
        options = scoring_options(["entropy-topk", "bald-mean", "bald-patch_max"], passes=4)
        masks = MaskStore(folder / "masks", labels)
        return extra(lambda: score_pool(model, rows, Inference(96, batch_size=BATCH), masks=masks, **options))


class Pool:
    "Features and nothing else."

    def __init__(self, embedding: np.ndarray) -> None:
        self.ids = [f"{i:06d}" for i in range(len(embedding))]
        self.scores: dict[str, np.ndarray] = {}
        self.embedding = embedding
        self.class_hist = np.full((len(embedding), 21), 1 / 21, dtype=np.float32)


def grouped(n: int, dim: int) -> np.ndarray:
    "Features of 21 groups that overlap a little."
    rng = make_rng(0, "bench", "features")
    group = rng.integers(0, 21, n)
    return (rng.normal(size=(21, dim))[group] + rng.normal(size=(n, dim))).astype(np.float32)


def coreset_large(count: str) -> dict[str, float]:
    "1000 picks of N by core-set, d = 256, through the sampler."
    pool = Pool(grouped(int(count), 256))
    found = extra(lambda: Sampler("coreset").select(pool, pool.ids, 1000, make_rng(0)))
    return {**found, "features": pool.embedding.nbytes / 2**20}


def probcover_large(count: str) -> dict[str, float]:
    "1000 picks of N by probcover, d = 64, with the radius it finds."
    points = grouped(int(count), 64)
    radius = ball_radius(points, 21, make_rng(0))
    found = extra(lambda: probcover(points, points[:0], 1000, radius))
    return {**found, "features": points.nbytes / 2**20}


CHILDREN: dict[str, Callable[[str], dict[str, float]]] = {
    "bald": bald,
    "scoring": scoring,
    "coreset": coreset_large,
    "probcover": probcover_large,
}


def alone(name: str, argument: str) -> dict[str, float]:
    "The same in a fresh process."
    command = [sys.executable, __file__, "--measure", name, argument]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


# ---- the parts


def score_rows() -> list[Row]:
    "Fused scores and BALD against forward passes."
    model = small_model()
    pixels = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    look = make_second_look(["bald-mean"], passes=T)
    with torch.inference_mode():
        logits = model(pixels)
        full = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")
        cost = turns(
            {
                "forward": lambda: model(pixels),
                "fused": lambda: uncertainty_maps(logits),
                "full": lambda: uncertainty_maps(full),
                "bald": lambda: look(model, pixels, valid),
            }
        )
    inside = next(m for m in model.encoder.modules() if isinstance(m, torch.nn.Dropout))
    inside.p = 0.1  # one more active layer, at the start: T whole passes
    with torch.inference_mode():
        whole = turns({"forward": lambda: model(pixels), "bald": lambda: look(model, pixels, valid)}, repeats=3)
    once, each = ([T * forward for forward in found["forward"]] for found in (cost, whole))
    bald = f"BALD T = {T} / T forward passes"
    forward = cost["forward"]
    return [
        compare("three fused scores at 1/4 size / forward pass", cost["fused"], forward, "ms", "<= 0.03"),
        compare("three fused scores at full size / forward pass", cost["full"], forward, "ms", "<= 0.35"),
        compare(f"{bald} (last layer's dropout: encoded once)", cost["bald"], once, "ms", "<= 1.1"),
        compare(f"{bald} (dropout in the encoder too: T whole passes)", whole["bald"], each, "ms", "<= 1.1"),
    ]


def baal_rows() -> list[Row]:
    "BALD against baal's three ways."
    if missing("baal"):
        return []
    ways = {
        "array": "array (its default)",
        "generator": "generator",
        "lean": "generator with replicate_in_memory=False (its leanest)",
    }
    head, rows = f"BALD T = {T}, {IMAGES} images 256 x 256, 1/4 size, {BATCH} at once", list[Row]()
    ours = alone("bald", "ours")
    for way, words in ways.items():
        theirs = alone("bald", way)
        time_row = f"{head}: CPU time / baal's {words}", [ours["seconds"]], [theirs["seconds"]]
        memory_row = f"{head}: extra memory / baal's {words}", [ours["mb"]], [theirs["mb"]]
        rows += [compare(*time_row, "s", "<= 0.333"), compare(*memory_row, "MB", "<= 0.5")]
    return rows


def full_matrix(points: np.ndarray, k: int) -> list[int]:
    "K-center by the matrix of all distances; starts nearest the mean."
    squared = (points**2).sum(1)
    distance = squared[:, None] + squared - 2 * points @ points.T
    picks = [int(((points - points.mean(0)) ** 2).sum(1).argmin())]
    while len(picks) < k:
        nearest = distance[:, picks].min(1)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return picks


def coreset_rows(n: int = 10_000, k: int = 500) -> list[Row]:
    "Core-set against the full matrix and skmatter."
    points = make_rng(0, "bench", "coreset").normal(size=(n, 256)).astype(np.float32)
    right = kcenter_greedy(points, None, k)[0]
    size = f"N = {n}, k = {k}, d = 256"
    assert full_matrix(points, k) == right
    cost = turns({"ours": lambda: kcenter_greedy(points, None, k), "full": lambda: full_matrix(points, k)}, repeats=1)
    rows = [compare(f"full-matrix core-set / ours, {size}", cost["ours"], cost["full"], "ms", ">= 30")]
    if missing("skmatter"):
        return rows
    from skmatter.sample_selection import FPS

    def peer() -> Any:
        return FPS(n_to_select=k, initialize=right[0]).fit(points)

    assert peer().selected_idx_.tolist() == right
    cost = turns({"ours": lambda: kcenter_greedy(points, None, k), "peer": peer}, repeats=3)
    part = f"core-set / skmatter's FPS, same picks, {size}"
    return [*rows, compare(part, cost["ours"], cost["peer"], "ms", "<= 1")]


def memory_rows(large: int = 50_000) -> list[Row]:
    "What must not grow."
    few, many = ([alone("scoring", count)["mb"] for _ in range(3)] for count in ("200", "2000"))
    rows = [compare("memory of scoring, 2000 images / 200 images", many, few, "MB", "<= 1.1")]
    found = alone("coreset", str(large))
    part = f"core-set of 1000 of {large}, d = 256: extra memory / features"
    rows.append(compare(part, [found["mb"]], [found["features"]], "MB", "<= 2"))
    found = alone("probcover", str(large))
    part = f"probcover of 1000 of {large}, d = 64 ({found['seconds']:.0f} s): extra memory / an N x N matrix in float32"
    rows.append(compare(part, [found["mb"]], [large * large * 4 / 2**20], "MB", "<= 0.05"))
    return rows


def main() -> list[Row]:
    "All rows."
    torch.set_num_threads(1)
    return [*score_rows(), *baal_rows(), *coreset_rows(), *memory_rows()]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        torch.set_num_threads(1)
        print(json.dumps(CHILDREN[sys.argv[2]](sys.argv[3])))
    else:
        publish(main(), project_root() / "results" / "bench_sampler.json")
