"""How good a probe is on real photographs, and what a round of it costs, with its features on disk.

Run as `VLM_ITL_SHARED=... python benchmarks/bench_probe.py` (five minutes, the first time two more): a frozen
MobileNetV2 of ImageNet under a head that learns from 40, 80 and 160 masks drawn by chance from 437 photographs of
PASCAL VOC 2012, measured on 445 others; mean IoU of the seven classes that are there in numbers, at half the size that
the network saw, as the prototype did, and of the first seed at the size of the photographs. Then one round: train on
80, score the other 357, and write their masks. One thread, CPU seconds. `--write` puts all into results/probe.json;
the other options change one thing each.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch read it

import datasets
import numpy as np
import torch

from vlm_itl.core.files import project_root, write_json
from vlm_itl.data.masks import DecodeRows, MaskStore, raw_rows, row_ids
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.model.metrics import ConfusionMatrix
from vlm_itl.model.predict import Inference, evaluate
from vlm_itl.model.recipe import TrainSettings
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import load_model
from vlm_itl.probe.probe import Probe, SeenImages, enlarge
from vlm_itl.probe.probe_training import fit_probe, shrink_mask

SEVEN = ("background", "cat", "cow", "dog", "horse", "person", "sheep")  # with enough images each
BEFORE = {40: 0.43, 80: 0.49, 160: 0.55}  # of the prototype, masks of half the size, 2 seeds
GOAL_S = 30.0  # of a round


def photographs(shared: Path) -> tuple[datasets.Dataset, SegData]:
    "All 437 images of train, in the order of their names, and the data set with its test images."
    data = load_data(str(shared / "data/VOCdevkit/VOC2012"), val_share=1)
    rows = datasets.concatenate_datasets([raw_rows(data.train), raw_rows(data.val)])
    rows = rows.select(np.argsort(row_ids(rows)))
    return rows.with_transform(DecodeRows(data.labels)), data


def small_truth(rows: datasets.Dataset, view: Inference) -> torch.Tensor:  # (N, S / 2, S / 2) uint8
    "Masks at half the size that the network sees."
    side = view.image_size
    masks = []
    for row in rows:
        height, width = row["mask"].shape
        long = max(height, width)
        box = (side, side) if view.resize == "stretch" else (height * side // long, width * side // long)
        masks.append(shrink_mask(row["mask"], box, side, side // 2))
    return torch.from_numpy(np.stack(masks))


@torch.inference_mode()
def small_miou7(probe: Probe, seen: SeenImages, truth: torch.Tensor) -> float:
    "Mean IoU of the seven classes at half size."
    counts = ConfusionMatrix(len(probe.labels))
    for start in range(0, len(seen), 32):
        places = range(start, min(len(seen), start + 32))
        rows = torch.from_numpy(np.stack([seen[place].features for place in places]))
        logits = enlarge(probe.eval()(rows), truth.shape[-2:])
        counts.update(logits.argmax(1), truth[start : start + 32])
    ious = counts.compute(probe.labels.names)["per_class_iou"]
    return mean(ious[name] or 0.0 for name in SEVEN)


def miou7(probe: Probe, test: datasets.Dataset, view: Inference) -> float:
    "Mean IoU of the seven classes."
    ious = evaluate(probe, test, view)["per_class_iou"]
    return mean(ious[name] or 0.0 for name in SEVEN)


def interval(values: list[float]) -> float:
    "Half of the 95 % t interval of a mean."
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return t * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def main() -> None:
    "Measure, print, and maybe write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="", help="folder or Hub id; empty: the MobileNetV2 in VLM_ITL_SHARED")
    parser.add_argument("--image-size", type=int, default=256, help="side in pixels")
    parser.add_argument("--resize", default="stretch", choices=("keep", "stretch"))
    parser.add_argument("--width", type=int, default=128, help="channels of the head")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=0.0, help="learning rate; 0: the usual one")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient; 0: any")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=[40, 80, 160])
    parser.add_argument("--quick", dest="native", action="store_false", help="half size only, and no round")
    parser.add_argument("--write", action="store_true", help="into results/probe.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path(os.environ["VLM_ITL_SHARED"])
    rows, data = photographs(shared)
    view = Inference(given.image_size, given.resize, 16, given.precision)
    settings = TrainSettings(
        steps=given.steps, learning_rate=given.rate, max_grad_norm=given.clip, precision=given.precision
    )
    encoder = given.encoder or str(shared / "weights/mobilenet-v2-imagenet")

    def new_probe(seed: int) -> Probe:
        model = load_model(f"probe:{encoder}", data.labels, seed, {"head_width": given.width})
        assert isinstance(model, Probe)
        return model

    probe, start = new_probe(0), time.process_time()
    for part in (rows, data.test):
        probe.seen(part, view)
    first_look = time.process_time() - start
    start = time.process_time()
    seen, size = probe.seen(data.test, view), probe.seen(rows, view)[0].features.nbytes
    known = {"first_look_s": round(first_look, 1), "known_look_s": round(time.process_time() - start, 2)}
    print(json.dumps({**known, "bytes_per_image": size}), flush=True)
    truth = small_truth(data.test, view)
    found: dict[str, Any] = {
        "settings": {k: v for k, v in vars(given).items() if k not in ("write", "encoder", "native")}
    }
    found |= {**known, "bytes_per_image": size, "budgets": {}}
    if given.native:
        found["round"] = one_round(new_probe(0), rows, settings, view)
        print(json.dumps(found["round"]), flush=True)
    for budget in given.budgets:
        scores: list[float] = []
        seconds: list[float] = []
        native = None
        for seed in range(given.seeds):
            chosen = rows.select(np.random.default_rng(seed).permutation(len(rows))[:budget])
            probe, start = new_probe(seed), time.process_time()
            fit_probe(probe, chosen, settings, view, seed=seed)
            seconds.append(time.process_time() - start)
            scores.append(round(small_miou7(probe, seen, truth), 4))
            if seed == 0:
                native = round(miou7(probe, data.test, view), 4) if given.native else None
        row = {
            "miou7": round(mean(scores), 4),
            "interval": round(interval(scores), 4),
            "each": scores,
            "native": native,
        }
        row |= {"prototype": BEFORE.get(budget), "train_s": round(mean(seconds), 1)}
        found["budgets"][str(budget)] = row
        print(json.dumps({"masks": budget, **row}), flush=True)
    if given.write:
        write_json(project_root() / "results" / "probe.json", found)


def one_round(probe: Probe, rows: datasets.Dataset, settings: TrainSettings, view: Inference) -> dict[str, Any]:
    "CPU seconds of what a round does, features known."
    drawn = np.random.default_rng(0).permutation(len(rows))
    start = time.process_time()
    fit_probe(probe, rows.select(drawn[:80]), settings, view)
    trained = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        score_pool(probe, rows.select(drawn[80:]), view, masks=MaskStore(folder, probe.labels))
    whole = time.process_time() - start
    seconds = {"train": round(trained - start, 1), "score_and_masks": round(whole - (trained - start), 1)}
    return {**seconds, "whole": round(whole, 1), "goal": GOAL_S, "holds": whole <= GOAL_S}


if __name__ == "__main__":
    main()
