"""A judge on a server, asked while the model draws its masks, against asked afterwards.

Run as `python benchmarks/bench_early.py [repeats]` (two minutes). A run of one round on generated scenes, a small
SegFormer at 256 px with no training to speak of, and a server on this machine that answers each question after
100 ms, one at a time: wall-clock seconds of the look at the pool and of the judge's turn together, in alternation.
What both write down is compared first. The peer of the last row is the longer of the two alone, which nothing beats.
Only waiting can be hidden: the judge's own work (drawing and packing pictures) and the model's share the cores, so on a
machine that is busy with something else there is nothing to gain (.89 and 1.03 at a load of nine on two cores).
"""

import json
import os
import sys
import tempfile
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("VLM_ITL_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from table import Row, compare, publish, same

from vlm_itl.experiment import acceptance, make_config
from vlm_itl.experiment.loop import Loop

DELAY, IMAGES = 0.1, 100


class Answers(BaseHTTPRequestHandler):
    "Says yes or no by the picture, after a while."

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *parts: Any) -> None:
        "Quiet."

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(DELAY)
        word = "Yes" if zlib.crc32(body) % 2 else "No"
        message = {"role": "assistant", "content": word}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
        told = {"id": "1", "object": "chat.completion", "created": 0, "model": "toy", "choices": [choice]}
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def one_round(url: str, early: bool) -> tuple[dict[str, float], list[Any]]:  # seconds of each step; what was said
    "A run of one round."
    judge = {"model": "toy", "base_url": url, "logprobs": False, "concurrency": 1}
    data = {"n_train": IMAGES, "n_test": 2, "size": [256, 256]}
    small = {"model": "segformer-nano", "image_size": 256, "steps": 1, "batch_size": 2, "gallery": 0, "val_share": 2}
    budget = {"initial": 2, "increment": 2, "max_labelled": 2, "preflight": 0}
    with tempfile.TemporaryDirectory() as folder:
        named = {"mode": "vlm", "judge": "openai", "judge_options": judge, "output_dir": folder + "/run"}
        loop = Loop.from_config(make_config({"dataset": "scenes", "data_options": data, **small, **budget, **named}))
        with mock.patch.object(acceptance, "may_ask_early", acceptance.may_ask_early if early else lambda *_: False):
            record = loop.run_round()
        lines = (Path(loop.folder.round_path(0)) / "judgements.jsonl").read_text().splitlines()
        loop.folder.close()
    said = [{k: v for k, v in json.loads(line).items() if k != "latency_s"} for line in lines]
    return record.seconds, said


def main(repeats: int = 3) -> list[Row]:
    "All rows."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    taken: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    said: dict[bool, list[Any]] = {}
    for turn in range(repeats + 1):
        for early in (True, False):
            seconds, said[early] = one_round(url, early)
            if turn:
                taken[early].append(seconds)
    server.shutdown()
    both = {early: [s["score"] + s["judge"] for s in rows] for early, rows in taken.items()}
    longer = [max(s["score"], s["judge"]) for s in taken[False]]
    what = f"look and judge, {len(said[True])} masks, a server of {DELAY * 1e3:.0f} ms"
    return [
        same(f"{what}: answers that differ", sum(a != b for a, b in zip(said[True], said[False], strict=True))),
        compare(f"{what}: early, afterwards", both[True], both[False], "s", "none"),
        compare(f"{what}: early, the longer of the two", both[True], longer, "s", "none"),
    ]


if __name__ == "__main__":
    publish(main(*map(int, sys.argv[1:2])))
