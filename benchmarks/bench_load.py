"""What a pool of 20,000 images asks for beside one of 2,000: memory, time, file handles, sockets, temporary files.

Run as `python benchmarks/bench_load.py` (Linux, ten to fifteen minutes, 200 MB of disk while it runs) or with `--quick`
(200 and 2,000 images, one minute, nothing is written). One thread. The images are generated: JPEGs of 64 x 64 and
palette masks, in folders of their own. Every measurement is a process of its own, which first walks a small pool
through all stages, so that what is loaded once counts for neither size:

- `stages`: the library's functions as a run calls them, one after the other, with a scoring pass that writes masks, a
  simulated judge, a judge over HTTP (a loopback server in a further process), and selections of 100 images;
- `run_al`: two whole rounds with the simulated judge, policy pseudo, and four training steps.

Memory is the peak of the whole process, which is what its user sees, libraries included; beside it stands what a stage
adds at its peak, and the growth in bytes an image. A pool is not free: scores, features, ids and answers are kept, one
row an image, and those bytes are what the growth should be. Handles are sampled twenty times a second. Times are CPU
seconds of the process, medians where a stage is so short that it takes several turns; the bar of time is on each stage.
One JSON row a line with the keys {part, ours, peer, unit, ratio, goal, holds}: "ours" is the large pool, "peer" the
small one; all of them, and what each stage measured, in results/bench_load.json.
"""

import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", VLM_ITL_PROGRESS="0", NO_PROXY="127.0.0.1")

import numpy as np
from PIL import Image

SIDE = 64  # pixels
PICKS = 100  # of each selection, whatever the pool
HELD = 20  # validation images and test images, whatever the pool
EXTRA = (
    PICKS + 2 * HELD
)  # labelled at the start, to validate and to test: on top of the pool, so that N images are scored
WARM = 300  # images of the pool that warms up
SELECTIONS = {
    "entropy top": ("entropy-mean-top", 7),
    "margin power": ("margin-mean-power", 7),
    "coreset": ("coreset", 3),
    "entropy coreset": ("entropy-mean-coreset", 3),
    "typiclust": ("typiclust", 3),
    "class stratified": ("entropy-mean-class_stratified", 3),
}
REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "loopback",
    "usage": {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301},
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "No"},
            "logprobs": {
                "content": [
                    {
                        "token": "No",
                        "logprob": -0.2,
                        "top_logprobs": [{"token": "No", "logprob": -0.2}, {"token": "Yes", "logprob": -1.8}],
                    }
                ]
            },
        }
    ],
}


# ---- the server, in a process of its own


class Answer(BaseHTTPRequestHandler):
    "The same answer to every question, over connections that stay open."

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    body = json.dumps(REPLY).encode()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        "Say nothing."


def serve() -> None:
    "Say the port, then answer until stdin closes."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


@contextmanager
def server() -> Iterator[str]:
    "The address of a loopback server."
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None and process.stdin is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.stdin.close()
        process.wait()


# ---- the pool


def write_images(folder: Path, count: int) -> None:
    "JPEGs of coarse noise with a rectangle of one class, and their masks."
    from vlm_itl.core.seeds import make_rng
    from vlm_itl.data.labels import LabelSpace

    palette = LabelSpace.voc().palette
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for index in range(count):
        rng = make_rng(0, "load", index)
        picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        left, top, kind = (int(n) for n in rng.integers((4, 4, 1), (32, 32, 21)))
        box = (left, top, left + 24, top + 24)
        picture.paste(tuple(palette[kind].tolist()), box)
        mask = Image.new("P", (SIDE, SIDE))
        mask.putpalette(palette.tobytes())
        mask.paste(kind, box)
        picture.save(folder / "images" / f"{index:05d}.jpg", quality=85)
        mask.save(folder / "masks" / f"{index:05d}.png", compress_level=1)


def make_pool(written: Path, folder: Path, count: int) -> Path:
    "A folder data set of so many pool images, by hard links; images to begin, validate and test with come on top."
    from vlm_itl.data.labels import LabelSpace

    names = [f"{index:05d}" for index in range(count + EXTRA)]
    for part, suffix in (("images", "jpg"), ("masks", "png")):
        (folder / part).mkdir(parents=True)
        for name in names:
            os.link(written / part / f"{name}.{suffix}", folder / part / f"{name}.{suffix}")
    (folder / "train.txt").write_text("\n".join(names[HELD:]))  # HELD of them will validate
    (folder / "test.txt").write_text("\n".join(names[:HELD]))
    (folder / "classes.txt").write_text("\n".join(LabelSpace.voc().names))
    return folder


# ---- what a stage costs


class Watch:
    "Samples open handles, sockets among them, and temporary files, while a stage runs."

    def __init__(self) -> None:
        self.most = {"handles": 0, "sockets": 0, "temporary": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def look(self) -> dict[str, int]:
        "What is open now."
        kinds = []
        for name in os.listdir("/proc/self/fd"):
            try:
                kinds.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:
                continue  # closed meanwhile
        sockets = sum(kind.startswith("socket:") for kind in kinds)
        return {"handles": len(kinds), "sockets": sockets, "temporary": len(os.listdir(tempfile.gettempdir()))}

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.most = {name: max(self.most[name], value) for name, value in self.look().items()}

    def __enter__(self) -> "Watch":
        self.most = self.look()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()


def megabytes(key: str) -> float:
    "VmRSS (memory now) or VmHWM (its peak) of this process."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


class Stages:
    "Runs stages one after the other and keeps what each cost."

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, name: str, work: Callable[[], Any], turns: int = 1) -> Any:
        "One stage, perhaps several times; its last result."
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, cpu, wall = megabytes("VmRSS"), [], []
        result = None
        with Watch() as watch:
            for _ in range(turns):
                result = None
                clocks = time.process_time(), time.perf_counter()
                result = work()
                cpu.append(time.process_time() - clocks[0])
                wall.append(time.perf_counter() - clocks[1])
        peak = megabytes("VmHWM")
        left = watch.look()
        self.found[name] = {
            "cpu_s": round(median(cpu), 4),
            "wall_s": round(median(wall), 4),
            "peak_mb": round(peak, 1),
            "added_mb": round(peak - before, 1),
            "kept_mb": round(megabytes("VmRSS") - before, 1),
            "most": watch.most,
            "left": left,
        }
        return result


def walk(pool_folder: Path, work: Path, address: str, stages: Stages) -> dict[str, float]:
    "All stages on one pool; bytes that are kept for an image, by what they are."
    from vlm_itl.core.seeds import make_rng
    from vlm_itl.data.masks import MaskStore
    from vlm_itl.data.sources import load_data
    from vlm_itl.experiment.annotator import Oracle, training_rows
    from vlm_itl.experiment.human_turn import choose
    from vlm_itl.experiment.judge_turn import doubts, judge_masks, measure_judge
    from vlm_itl.experiment.pool import Ledger, Pool
    from vlm_itl.model.predict import Inference
    from vlm_itl.model.scoring import score_pool
    from vlm_itl.model.segmenter import load_model
    from vlm_itl.sampler.strategy import Sampler
    from vlm_itl.vlm.handler import make_handler

    data = stages.run("load_data", lambda: load_data(str(pool_folder), val_share=HELD))
    model = load_model("segformer-nano", data.labels)
    ledger = Ledger()
    oracle = stages.run("oracle", lambda: Oracle(data, ledger), turns=3)
    pool = Pool(oracle.ids)
    n, view = len(pool.ids), Inference(SIDE, batch_size=8, device="cpu")

    start = sorted(pool.ids)[:PICKS]
    oracle.label(start)
    pool.add_human(start)
    masks = MaskStore(work / "masks", data.labels)
    scores = stages.run("score_pool", lambda: score_pool(model, oracle.images, view, masks=masks))
    free = oracle.images.select(oracle.rows(pool.unlabelled))
    mock = make_handler("mock", seed=0)
    mock.bind_truth(oracle.peek_for_simulation)
    judged = stages.run("judge (mock)", lambda: judge_masks(mock, free, masks, "quality"))
    asked = make_handler("openai", model="loopback", base_url=address)
    heard = stages.run("judge (openai)", lambda: judge_masks(asked, free, masks, "quality"))
    assert [j.verdict for j in heard] == ["no"] * len(heard), heard[0]
    yes = [j.id for j in judged if j.verdict == "yes"]
    stages.run("measure the judge", lambda: measure_judge(judged, yes, oracle, masks, 0.7))
    scores.scores["judge"] = doubts(judged, scores.ids)
    verdicts = {j.id: j.verdict for j in judged}
    half = pool.unlabelled[::2]  # pseudo-labels of half the pool, whatever the judge said
    stages.run("pseudo-labels", lambda: pool.set_pseudo({i: masks.path(i) for i in half}), turns=5)
    stages.run("training_rows", lambda: training_rows(pool, oracle), turns=3)
    for name, (strategy, turns) in SELECTIONS.items():
        sampler = Sampler(strategy)
        policy = "triage" if name == "entropy top" else "observe"
        stages.run(
            f"choose ({name})",
            lambda s=sampler, p=policy: choose(s, scores, pool, PICKS, verdicts, half, p, make_rng(0, "select")),
            turns,
        )
    cold = Sampler("typiclust")
    stages.run("cold start (typiclust)", lambda: cold.select(scores, pool.ids, PICKS, make_rng(0)), turns=3)
    arrays = sum(values.nbytes for values in (scores.embedding, scores.class_hist, *scores.scores.values()))
    return {
        "scores, features, class shares (float32)": arrays / n,
        "answers of a judge (pickled)": len(pickle.dumps(heard)) / n,
        "ids (pickled)": len(pickle.dumps(pool.ids)) / n,
        "masks on disk": sum(path.stat().st_size for path in masks.folder.iterdir()) / n,
    }


def whole_run(pool_folder: Path, work: Path, stages: Stages, name: str) -> None:
    "Two rounds of `run_al` with a judge."
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_al

    config = make_config(
        mode="vlm",
        dataset=str(pool_folder),
        val_share=HELD,
        strategy="entropy",
        policy="pseudo",
        initial=PICKS,
        increment=PICKS,
        max_labelled=2 * PICKS,
        image_size=SIDE,
        steps=4,
        device="cpu",
        output_dir=str(work / name),
    )
    rounds = stages.run("run_al", lambda: list(run_al(config)))
    assert len(rounds) == 2 and rounds[0].judge["n"] > 0
    for record in rounds:
        for step, seconds in record.seconds.items():
            stages.found[f"run_al round {record.index}: {step}"] = {"wall_s": seconds}


def measure(what: str, warm: str, pool: str, address: str) -> None:
    "In a process of its own: warm up on a small pool, then measure; the last line of output is the result."
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ["BENCH_LOAD_WORK"]) as name:
        work, stages, rows = Path(name), Stages(), {}
        for turn, folder in (("warm", Path(warm)), ("measured", Path(pool))):
            stages = Stages()
            (work / turn).mkdir()
            if what == "stages":
                rows = walk(folder, work / turn, address, stages)
            else:
                whole_run(folder, work / turn, stages, "run")
            if turn == "warm":
                gc.collect()
                base = megabytes("VmRSS")
        peak = max(stage["peak_mb"] for stage in stages.found.values() if "peak_mb" in stage)
        print(json.dumps({"base_mb": round(base, 1), "peak_mb": peak, "bytes": rows, "stages": stages.found}))


# ---- both sizes


def alone(what: str, folder: Path, warm: Path, pool: Path, address: str) -> dict[str, Any]:
    "One measurement in a fresh process with a folder for temporary files of its own."
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        environment = {**os.environ, "TMPDIR": temporary, "BENCH_LOAD_WORK": str(folder)}
        command = [sys.executable, __file__, "--measure", what, str(warm), str(pool), address]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.strip().splitlines()[-1])


def compare(what: str, few: int, many: int, small: dict[str, Any], large: dict[str, Any]) -> list[dict[str, Any]]:
    "The rows of one kind of measurement."
    times, size = many / few, f"{what}, {many:,} / {few:,} images"
    rows = []

    def row(part: str, ours: float, peer: float, unit: str, goal: str, holds: bool | None) -> None:
        ratio = float(f"{ours / peer:.4g}") if peer else None
        values = {"part": f"{size}: {part}", "ours": ours, "peer": peer, "unit": unit, "ratio": ratio}
        rows.append({**values, "goal": goal, "holds": holds})
        print(json.dumps(rows[-1]), flush=True)

    ratio = large["peak_mb"] / small["peak_mb"]
    row("peak memory of the process", large["peak_mb"], small["peak_mb"], "MB", "0.85 to 1.15", 0.85 <= ratio <= 1.15)
    added = [round(one["peak_mb"] - one["base_mb"], 1) for one in (large, small)]
    row("peak memory above the warm process", added[0], added[1], "MB", "none", None)
    growth = (large["peak_mb"] - small["peak_mb"]) * 2**20 / (many - few)
    row(
        "growth of the peak an image, against what is kept by design",
        round(growth),
        by_design(large),
        "B",
        "none",
        None,
    )
    stages = {name: stage for name, stage in large["stages"].items() if "cpu_s" in stage}
    for name, stage in stages.items():
        ours, peer = stage["cpu_s"], small["stages"][name]["cpu_s"]
        row(f"CPU time of {name}", ours, peer, "s", f"<= {1.1 * times:g}", ours <= 1.1 * times * peer)
    for kind in ("handles", "sockets", "temporary"):
        ours, peer = (max(s["most"][kind] for s in one["stages"].values() if "most" in s) for one in (large, small))
        row(f"most {kind} open", ours, peer, "", "no more", ours <= peer)
        ours, peer = (
            list(s for s in one["stages"].values() if "left" in s)[-1]["left"][kind] for one in (large, small)
        )
        row(f"{kind} left at the end", ours, peer, "", "no more", ours <= peer)
    return rows


def by_design(found: dict[str, Any]) -> float:
    "Bytes an image that are kept in memory: two judges' answers, scores and ids."
    kept = {"scores": 1, "answers": 2, "ids": 1}
    return round(sum(kept.get(name.split()[0].strip(","), 0) * value for name, value in found["bytes"].items()))


def main(quick: bool) -> None:
    "Both sizes, both kinds."
    from importlib.metadata import version

    from vlm_itl.core.files import project_root, write_json

    few, many = (200, 2_000) if quick else (2_000, 20_000)
    versions = {name: version(name) for name in ("numpy", "torch", "datasets", "openai", "pillow")}
    rows, found = [], {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, server() as address:
        folder = Path(name)
        write_images(folder / "written", many + EXTRA)
        pools = {n: make_pool(folder / "written", folder / f"pool_{n}", n) for n in (few, many)}
        warm = make_pool(folder / "written", folder / "pool_warm", WARM)
        print(json.dumps({"versions": versions, "written_s": round(time.perf_counter() - began, 1)}), flush=True)
        for what in ("stages", "run_al"):
            sizes = {n: alone(what, folder, warm, pools[n], address) for n in (few, many)}
            rows += compare(what, few, many, sizes[few], sizes[many])
            found[what] = {str(n): one for n, one in sizes.items()}
            if not quick:
                write_json(
                    project_root() / "results" / "bench_load.json",
                    {"versions": versions, "rows": rows, "measured": found},
                )
    print(json.dumps({"seconds": round(time.perf_counter() - began)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    elif sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:6])
    else:
        main(quick="--quick" in sys.argv[1:])
