"""What choosing from a million images costs: seconds and memory of every strategy, and how they grow with the pool.

Run as `python benchmarks/bench_scale.py` (Linux, half an hour, 3 GB of disk and 2 GB of memory while it runs) or with
`--quick` (5,000 and 20,000 images, one minute, nothing is written). One thread, CPU seconds, each measurement in a
process of its own. The features are synthetic (groups that overlap, with a spectrum that falls like that of real ones)
and memory-mapped, as they are where a pool is large; as many images are labelled already as are chosen. Memory is the
peak of the process over what it was before the features were opened, so it holds them too, and the goal of two times
their size leaves room for one copy of them, and no more. The exponent is the slope of log seconds over log images
between the two largest pools. Besides the strategies: a ledger, a run folder and a resume of a million rows.

Rows have the keys {part, ours, peer, unit, ratio, goal, holds}, "peer" being the features (memory) or the smaller pool
(exponent). All of them, and what was measured, in results/scale.json.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", VLM_ITL_PROGRESS="0")

import numpy as np

from vlm_itl.core.files import project_root, write_json
from vlm_itl.core.seeds import make_rng
from vlm_itl.sampler.selects import Sampler, ball_radius, probcover

STRATEGIES = {
    "random": "random",
    "uncertainty": "entropy",
    "power": "entropy-mean-power",
    "classes by chance": "class_random",
    "classes in turn": "entropy-mean-class_stratified",
    "coreset of the unsure": "entropy-mean-coreset",
    "coreset": "coreset",
    "badge": "badge",
    "typiclust": "typiclust",
    "probcover": "probcover",
}
BY_FEATURES = ("coreset", "badge", "typiclust")  # wide features, too; probcover would take an hour
GROUPS, CLASSES, BLOCK = 64, 21, 8192
ROWS: list[dict[str, Any]] = []


def row(part: str, ours: float, peer: float, unit: str, goal: str, holds: bool, ratio: float | None = None) -> None:
    "One line, printed and kept."
    ratio = ours / peer if ratio is None else ratio
    kept = {"part": part, "ours": round(ours, 2), "peer": round(peer, 2), "unit": unit, "ratio": round(ratio, 3)}
    ROWS.append({**kept, "goal": goal, "holds": bool(holds)})
    print(json.dumps(ROWS[-1]), flush=True)


# ---- what is chosen from


def write_features(path: Path, n: int, dim: int, dtype: str) -> Path:
    "Features on disk: groups that overlap; each further coordinate varies less."
    rng, scale = make_rng(0, "scale", n, dim), 1 / np.sqrt(1 + np.arange(dim, dtype=np.float32) / 4)
    centres = rng.normal(size=(GROUPS, dim)).astype(np.float32) * scale
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n, dim))
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        noise = rng.standard_normal((count, dim), dtype=np.float32) * scale
        array[start : start + count] = centres[rng.integers(0, GROUPS, count)] + noise
    array.flush()
    return path


def make_pool(path: Path) -> SimpleNamespace:
    "A scoring pass as it is read from disk."
    features = np.load(path, mmap_mode="r")
    n, rng = len(features), make_rng(0, "scale", "scores")
    scores = {"entropy-mean": rng.random(n, dtype=np.float32)}
    hist = rng.random((n, CLASSES), dtype=np.float32) ** 8
    return SimpleNamespace(
        ids=[f"{i:08d}" for i in range(n)], scores=scores, class_hist=hist, embedding=features, gradient=features
    )


def status(key: str) -> float:
    "A number of /proc/self/status in MB."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def watched(function: Callable[[], Any]) -> dict[str, Any]:
    "CPU and wall seconds, and the peak of the process over what it was before."
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, cpu, wall = status("VmRSS"), time.process_time(), time.perf_counter()
    value = function()
    seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return {**seconds, "peak_mb": status("VmHWM") - before, "value": value}


def choose(path: str, strategy: str, k: str) -> dict[str, Any]:
    "One selection; the first choice of all loads what has to be loaded, and is not counted."
    small = np.load(path, mmap_mode="r")[:2000].copy()
    warm = SimpleNamespace(**{**vars(make_pool(Path(path))), "ids": [f"{i}" for i in range(2000)]})
    warm.embedding = warm.gradient = small
    warm.class_hist, warm.scores = warm.class_hist[:2000], {"entropy-mean": warm.scores["entropy-mean"][:2000]}
    Sampler(strategy).select(warm, warm.ids, 5, make_rng(0))
    pool, many = make_pool(Path(path)), int(k)
    labelled = pool.ids[:: len(pool.ids) // many][:many]
    known = set(labelled)
    free = [i for i in pool.ids if i not in known]
    found = watched(lambda: Sampler(strategy).select(pool, free, many, make_rng(0), labelled)[0])
    found["picks"] = hashlib.sha256(" ".join(found.pop("value")).encode()).hexdigest()[:12]
    return {**found, "features_mb": pool.embedding.nbytes / 2**20}


def covered(path: str, k: str) -> dict[str, Any]:
    "Share of a pool that probcover covers with k balls, counting a sample and counting all."
    points = np.asarray(np.load(path, mmap_mode="r"))
    radius = ball_radius(points, GROUPS, make_rng(0))
    none = points[:0]
    share = {s: sum(probcover(points, none, int(k), radius, s)[1]) / len(points) for s in (16_384, len(points))}
    return {"sampled": share[16_384], "exact": share[len(points)]}


# ---- the books of a run


def books(count: str, folder: str) -> dict[str, Any]:
    "Ledger and pool of so many images, in memory, and a round of them on disk."
    from vlm_itl.experiment.pool import Ledger, Pool

    n = int(count)
    ids = [f"{i:08d}" for i in range(n)]
    ledger, found = Ledger(), {}
    pool = Pool(ids)

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.process_time()
        value = function()
        found[name] = time.process_time() - start
        return value

    timed("human masks of 1 %", lambda: (ledger.pay_masks([1000] * (n // 100)), pool.add_human(ids[: n // 100])))
    accepted = {i: Path(folder) for i in ids[n // 100 : n // 2]}
    timed("pseudo-labels of half", lambda: pool.set_pseudo(accepted, dict.fromkeys(accepted, 0.9)))
    timed("what is unlabelled", lambda: pool.unlabelled)
    timed("human masks of 1 % more", lambda: pool.add_human(pool.unlabelled[-n // 100 :]))
    return found


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {"choose": choose, "covered": covered, "books": books}


def alone(*arguments: str) -> dict[str, Any]:
    "The same in a fresh process."
    command = [sys.executable, __file__, "--measure", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def main(quick: bool) -> None:
    "All rows."
    sizes, k = ([5_000, 20_000], 500) if quick else ([50_000, 200_000, 1_000_000], 10_000)
    found: dict[str, Any] = {}
    versions = {name: version(name) for name in ("numpy", "scikit-learn")}

    def keep() -> None:
        if not quick:
            kept = {"versions": versions, "rows": ROWS, "measured": found}
            write_json(project_root() / "results" / "scale.json", kept)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {n: write_features(folder / f"{n}.npy", n + k, 64, "float32") for n in sizes}
        for label, strategy in STRATEGIES.items():
            for n, path in files.items():
                one = found[f"{label}, {n:,} x 64 float32"] = alone("choose", str(path), strategy, str(k))
                print(json.dumps({label: n, **one}), flush=True)
            few, many = (found[f"{label}, {n:,} x 64 float32"] for n in sizes[-2:])
            part = f"{label}: {k:,} of {sizes[-1]:,} x 64 float32"
            peak, size = many["peak_mb"], many["features_mb"]
            holds = peak < 2 * size or quick  # a small pool is lost among the blocks
            row(f"{part}: peak memory, features included / features", peak, size, "MB", "< 2", holds)
            slope = math.log(max(many["cpu_s"], 0.01) / max(few["cpu_s"], 0.01)) / math.log(sizes[-1] / sizes[-2])
            part = f"{part}: exponent from {sizes[-2]:,}"
            row(part, many["cpu_s"], few["cpu_s"], "s", "<= 1.2", slope <= 1.2 or many["cpu_s"] < 1, slope)
            keep()
        wide = write_features(folder / "wide.npy", sizes[-1] + k, 256, "float16")
        for strategy in BY_FEATURES:
            one = found[f"{strategy}, {sizes[-1]:,} x 256 float16"] = alone("choose", str(wide), strategy, str(k))
            print(json.dumps({strategy: "256 float16", **one}), flush=True)
            peak, size = one["peak_mb"], one["features_mb"]
            part = f"{strategy}: {k:,} of {sizes[-1]:,} x 256 float16: peak memory, features included / features"
            row(part, peak, size, "MB", "< 2", peak < 2 * size)
            keep()
        n = 4_000 if quick else 40_000
        some = write_features(folder / "some.npy", n, 64, "float32")
        share = found["probcover covers"] = alone("covered", str(some), "100")
        ours, peer = share["sampled"], share["exact"]
        part = f"probcover: share of {n:,} images covered by 100 balls, counting 16,384 / counting all"
        row(part, ours, peer, "", ">= 0.95", ours >= 0.95 * peer)
        found["books"] = alone("books", str(sizes[-1]), name)
    keep()
    print(json.dumps({"books": found["books"], "versions": versions, "fail": [r for r in ROWS if not r["holds"]]}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASURES[sys.argv[2]](*sys.argv[3:])))
    else:
        main(quick="--quick" in sys.argv[1:])
