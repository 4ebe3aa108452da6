"""A pool of a million rows through the loop itself: what its books cost, a round and a resume.

Run as `python benchmarks/bench_million.py [rows ...]` (minutes, 4 GB for a million). Real are the pool, the selection,
the ledger, the run folder, the guards and the resume; the network is one that learns nothing and draws its scores, and
the pictures are of 8 x 8 pixels, so that everything but the books is small. Three rounds; each asks for 10,000 masks
(fewer in a small pool). CPU seconds; the exponent is that of the last two sizes. Rows go to results/million.json.
"""

import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_itl.core.files import from_json, project_root, to_json, write_json

SIZES = (20_000, 100_000, 1_000_000)


class Sleeper:
    "A network that learns nothing: has what a run asks of it."

    segmenter = None

    def __init__(self) -> None:
        self.notes: list[str] = []

    def restart(self) -> None:
        pass

    def load(self, folder: Path) -> None:
        pass

    def fit(self, rows: Any, validation: Any, desc: str, checkpoints: Path, unlabelled: Any = None) -> Any:
        from vlm_itl.model.train import FitResult

        return FitResult(steps=0, train_loss=0.0)

    def evaluate(self, rows: Any, desc: str, counts: Any = None) -> dict[str, Any]:
        return {"mean_iou": 0.5, "pixel_accuracy": 0.5}

    def look(self, images: Any, masks: Any = None, **options: Any) -> Any:
        from vlm_itl.data.masks import row_ids
        from vlm_itl.model.scoring import PoolScores

        ids, rng = row_ids(images), np.random.default_rng(len(images))
        score = {"entropy-mean": rng.random(len(ids), dtype=np.float32)}
        return PoolScores(ids, score, np.zeros((len(ids), 2), np.float32), np.zeros((len(ids), 3), np.float32))

    def earlier(self, folders: Sequence[Path]) -> list[Any]:
        return []

    def save(self, folder: Path, pictures: Sequence[Any]) -> None:
        folder.mkdir()


def make_pool(count: int) -> Any:
    "A data set of so many small pictures, cut from the six that one can count."
    from vlm_itl.data.masks import DecodeRows, make_rows, raw_rows
    from vlm_itl.data.sources import SegData, toy_images

    toy = toy_images()
    images, masks = (raw_rows(toy.train)[name] for name in ("image", "mask"))
    ids = [f"row-{number:07d}" for number in range(count)]
    rows = make_rows(ids, [images[i % 4] for i in range(count)], [masks[i % 4] for i in range(count)])
    return SegData(rows.with_transform(DecodeRows(toy.labels)), toy.val, toy.test, toy.labels, "million")


def measure(count: int) -> dict[str, Any]:
    "One size, in this process."
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import Loop

    each = min(10_000, count // 10)
    data, found = make_pool(count), dict[str, Any](rows=count, asked=each)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        plan = {"mode": "al", "initial": each, "increment": each, "max_labelled": 3 * each, "steps": 0, "gallery": 0}
        config = make_config({**plan, "output_dir": f"{folder}/run", "keep_models": "none", "leaks": "off"})

        def loop() -> Loop:
            return Loop(config, data, Sleeper(), draw=lambda path: [])

        clock = time.process_time()
        run = loop()
        found["start"] = time.process_time() - clock
        for number in range(2):
            clock = time.process_time()
            run.run_round()
            found[f"round {number}"] = time.process_time() - clock
        run.folder.close()
        clock = time.process_time()
        run = loop()
        found["resume"] = time.process_time() - clock
        clock = time.process_time()
        last = list(run.run())[-1]
        found["round 2 and the end"] = time.process_time() - clock
        run.folder.close()
        assert last.labelled == 3 * each == len(set(run.state.pool.human)), "rows were lost"
        sizes = [path.stat().st_size for path in Path(folder, "run").rglob("*") if path.is_file()]
        found["files MB"] = sum(sizes) / 2**20
    found["more memory MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return found


def main(sizes: Sequence[int] = SIZES) -> None:
    "Each size in a process of its own."
    lines = []
    for count in sizes:
        done = subprocess.run([sys.executable, __file__, "--one", str(count)], stdout=subprocess.PIPE, check=True)
        lines.append(from_json(done.stdout.decode().splitlines()[-1], dict))
        print({k: round(v, 2) for k, v in lines[-1].items()}, flush=True)
    stages = ("start", "round 0", "round 1", "resume", "round 2 and the end")
    growth = {
        name: math.log(max(1e-3, lines[-1][name]) / max(1e-3, lines[-2][name]))
        / math.log(lines[-1]["rows"] / lines[-2]["rows"])
        for name in stages
        if len(lines) > 1
    }
    print({name: round(value, 2) for name, value in growth.items()})
    if tuple(sizes) == SIZES:
        record = {"command": "python benchmarks/bench_million.py", "sizes": lines, "exponents": growth}
        write_json(project_root() / "results/million.json", record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(to_json(measure(int(sys.argv[2]))))
    else:
        main(tuple(map(int, sys.argv[1:])) or SIZES)
