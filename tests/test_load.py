"""A pool of 300 images on its way through a round opens no more files than one of 30, and choosing walks it once."""

import json
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from datasets import DatasetDict
from PIL import Image

from vlm_itl.core.seeds import make_rng
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import MaskStore, make_rows
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.experiment.annotator import Oracle, training_rows
from vlm_itl.experiment.human_turn import choose
from vlm_itl.experiment.judge_turn import judge_masks, measure_judge
from vlm_itl.experiment.pool import Ledger, Pool
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import load_model
from vlm_itl.sampler.strategy import Sampler
from vlm_itl.vlm.handler import make_handler

SIDE, HANDLES = 32, Path("/proc/self/fd")
needs_proc = pytest.mark.skipif(not HANDLES.is_dir(), reason="open handles are counted in /proc, which is not there")


def handles() -> int:
    "What this process has open."
    return len(os.listdir(HANDLES))


def write_folder(folder: Path, count: int) -> Path:
    "A folder data set of small noisy squares; 4 images of it validate and test."
    rng, palette = make_rng(0, "load"), LabelSpace.voc().palette.tobytes()
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    names = [f"{n:04d}" for n in range(count + 4)]
    for name in names:
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg")
        mask = Image.fromarray(np.full((SIDE, SIDE), int(name) % 5, dtype=np.uint8))
        mask.putpalette(palette)
        mask.save(folder / "masks" / f"{name}.png")
    (folder / "train.txt").write_text("\n".join(names[2:]))
    (folder / "test.txt").write_text("\n".join(names[:2]))
    (folder / "classes.txt").write_text("\n".join(LabelSpace.voc().names))
    return folder


def load(folder: Path, count: int) -> SegData:
    "So many images in the pool."
    return load_data(str(write_folder(folder, count)), val_share=2)


def most_open(folder: Path, count: int) -> int:
    "Walk a pool through a round; the most that was open while masks were read, above what was open before."
    seen = [handles()]
    data = load(folder / "data", count)
    oracle, masks = Oracle(data, Ledger()), MaskStore(folder / "masks", data.labels)
    pool = Pool(oracle.ids)
    model = load_model("segformer-nano", data.labels)
    scores = score_pool(model, oracle.images, Inference(SIDE, batch_size=16, device="cpu"), masks=masks)
    judge = make_handler("mock")

    def truth(image_id: str) -> np.ndarray:
        seen.append(handles())
        return oracle.peek_for_simulation(image_id)

    judge.bind_truth(truth)
    judged = judge_masks(judge, oracle.images, masks, "quality")
    yes = [j.id for j in judged if j.verdict == "yes"]
    measure_judge(judged, yes, oracle, masks, 0.7)
    pool.set_pseudo({i: masks.path(i) for i in yes})
    verdicts = {j.id: j.verdict for j in judged}
    ids, _ = choose(Sampler("entropy"), scores, pool, 10, verdicts, yes, "triage", make_rng(0))
    oracle.label(ids)
    pool.add_human(ids)
    for row in training_rows(pool, oracle):
        assert row["mask"].shape == (SIDE, SIDE)
    assert len(seen) == count + 1
    return max(*seen, handles()) - seen[0]


@needs_proc
def test_a_round_opens_no_more_files_for_more_images(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    "Ten times the pool, the same handles."
    most_open(tmp_path / "warm", 10)
    few, many = (most_open(tmp_path / str(count), count) for count in (30, 300))
    record_property("trust.load_handles", many - few)
    assert many <= few


class Yes(BaseHTTPRequestHandler):
    "Says yes over connections that stay open."

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        "One chat completion."
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes"}}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        "Say nothing."


@needs_proc
def test_a_judge_over_http_closes_its_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Three chunks of questions, then as much is open as before."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    data = load(tmp_path / "data", 70)
    masks = MaskStore(tmp_path / "masks", data.labels)
    oracle = Oracle(data, Ledger())
    for image_id in oracle.ids:
        masks.write(image_id, np.full((SIDE, SIDE), 3, dtype=np.uint8))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Yes)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    judge = make_handler("openai", model="m", base_url=f"http://127.0.0.1:{server.server_address[1]}/v1")
    judge_masks(judge, oracle.images.select(range(2)), masks, "quality")  # imports the client
    time.sleep(0.2)
    before, threads = handles(), threading.active_count()
    said = judge_masks(judge, oracle.images, masks, "quality")
    give_up = time.monotonic() + 10
    while (handles() > before or threading.active_count() > threads) and time.monotonic() < give_up:
        time.sleep(0.05)  # the server's side closes a moment later
    left = handles() - before, threading.active_count() - threads
    server.shutdown()
    server.server_close()
    thread.join()
    assert [j.verdict for j in said] == ["yes"] * 70
    assert left[0] <= 0 and left[1] <= 0


def test_photographs_inside_a_data_set_are_not_copied(tmp_path: Path) -> None:
    "Pseudo-labels of 50 images of 200 kB, which the data set holds as bytes: the training rows add next to nothing."
    rng, square = make_rng(0, "load"), np.zeros((SIDE, SIDE), dtype=np.uint8)

    def cell(pixels: np.ndarray, more: int = 0) -> dict[str, object]:
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"path": None, "bytes": buffer.getvalue() + rng.bytes(more)}

    images = [cell(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), 200_000) for _ in range(61)]
    rows = make_rows([f"{n:02d}" for n in range(61)], images, [cell(square) for _ in range(61)])
    split = {"train": rows.select(range(60)), "test": rows.select([60])}
    DatasetDict(split).save_to_disk(str(tmp_path / "data"))
    data = load_data(str(tmp_path / "data"), val_share=4, options={"classes": 2})
    oracle, masks = Oracle(data, Ledger()), MaskStore(tmp_path / "masks", data.labels)
    pool = Pool(oracle.ids)
    oracle.label(oracle.ids[:6])
    pool.add_human(oracle.ids[:6])
    for image_id in pool.unlabelled:
        masks.write(image_id, square + 1)
    pool.set_pseudo({i: masks.path(i) for i in pool.unlabelled})
    before = pyarrow.total_allocated_bytes()
    joined = training_rows(pool, oracle)
    assert pyarrow.total_allocated_bytes() - before < 200_000
    assert [row["mask"].max() for row in joined] == [0] * 6 + [1] * 50
    assert [row["id"] for row in joined] == [*oracle.ids[:6], *sorted(pool.pseudo)]


class Pretended:
    "Scores and predicted classes without a network."

    def __init__(self, rng: np.random.Generator, count: int, classes: int) -> None:
        self.ids = [f"{n:03d}" for n in range(count)]
        self.scores = {"entropy-mean": rng.integers(0, 6, count) / 6}  # with ties
        self.embedding = np.zeros((count, 1), dtype=np.float32)
        holds = rng.random((count, classes)) < rng.random()
        self.class_hist = (rng.random((count, classes)) * holds).astype(np.float32)


def plain_stratified(pool: Pretended, k: int) -> list[str]:
    "The rule of class_stratified, looking at all that is left for every pick."
    values, histogram = pool.scores["entropy-mean"], pool.class_hist
    holds = (histogram > 0) & (histogram >= 0.01 * histogram.sum(1, keepdims=True))
    left, chosen, picks = list(np.argsort(-values, kind="stable")), np.zeros(histogram.shape[1], int), []
    while len(picks) < k:
        turns = [c for c in range(len(chosen)) if holds[left, c].any()]
        turn = min(turns, key=lambda c: (chosen[c], holds[:, c].sum(), c), default=None)
        pick = next(i for i in left if turn is None or holds[i, turn])
        left.remove(pick)
        picks.append(pool.ids[pick])
        chosen = chosen + holds[pick]
    return picks


@pytest.mark.parametrize("seed", range(40))
def test_class_stratified_is_the_plain_rule(seed: int) -> None:
    "Queues that are walked once give the picks of the slow rule, ties and empty images included."
    rng = make_rng(seed, "stratified")
    pool = Pretended(rng, int(rng.integers(1, 40)), int(rng.integers(2, 7)))
    k = int(rng.integers(1, len(pool.ids) + 1))
    picks, reasons = Sampler("entropy-mean-class_stratified").select(pool, pool.ids, k, make_rng(0))
    assert picks == plain_stratified(pool, k) and len(reasons) == k
