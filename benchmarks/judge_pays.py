"""Does a judge pay? Human masks alone against proposals of a foundation model, judged in many ways, on photographs.

Run as `VLM_ITL_SHARED=... python benchmarks/judge_pays.py --seeds 10` (about a minute and a half for each row, number
of human masks and seed on two cores; it goes on where it stopped). Data: 437 + 445 photographs of PASCAL VOC 2012.
Proposals: the masks of Grounded-SAM for the 437, made by a model that has seen far more than these. Segmenter: a probe
on a frozen MobileNetV2 of ImageNet, 256 px, 150 steps. Every row is a run of `run_al`, one seed, one number of human
masks, drawn by chance; rows of one seed share the drawn images. A judge that needs the round's model is asked after a
training on all human masks but one. Measured: mean IoU on the test images over the seven classes that occur in numbers,
human seconds at 239.7 s a mask.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

SEVEN = ("background", "cat", "cow", "dog", "horse", "person", "sheep")
SHARED = Path(os.environ.get("VLM_ITL_SHARED", "../shared"))
BASE: dict[str, Any] = {
    "dataset": str(SHARED / "data/VOCdevkit/VOC2012"),
    "leaks": "off",
    "val_share": 1,
    "model": f"probe:{SHARED / 'weights/mobilenet-v2-imagenet'}",
    "image_size": 256,
    "resize": "stretch",
    "steps": 150,
    "strategy": "random",
    "preflight": 0,
    "gallery": 0,
    "keep_models": "last",
    "test_every_round": False,
    "tau": 0.5,
    "precision": "bf16",
}
FOLDER = {"mode": "vlm", "proposer": "folder", "proposer_options": {"path": str(SHARED / "data/grounded_sam_voc")}}
HALF = {"mixture": {"human_share": 0.5}}


def judged(judge: str, options: dict[str, Any] | None = None, by: str = "image", **more: Any) -> dict[str, Any]:
    "A row in which a judge sees the proposals."
    return {**FOLDER, "judge": judge, "judge_options": options or {}, "accept_by": by, **more}


SECOND = {"model": str(SHARED / "weights/deeplabv3-mobilenetv2-voc")}
JUDGES: dict[str, tuple[str, dict[str, Any]]] = {
    "perfect": ("mock", {"accuracy": 1.0}),
    "right 9 in 10": ("mock", {"accuracy": 0.9}),
    "ovis2": ("mock", {"kind": "curve", "curve": "ovis2"}),
    "learned": ("learned", {}),
    "confidence": ("confidence", {}),
    "second_opinion (has seen VOC)": ("second_opinion", SECOND),
}
NEED_MODEL = ("confidence",)  # asked after a training
ROWS: dict[str, dict[str, Any]] = {
    "human only": {"mode": "al"},
    "human only, entropy": {"mode": "al", "strategy": "entropy"},
    "accept all": judged("always_yes"),
    "accept all, half human": judged("always_yes", **HALF),
}
for name, (judge, options) in JUDGES.items():
    for by in ("image", "class", "pixels"):
        ROWS[f"{name}, {by}"] = judged(judge, options, by)
ROWS["learned, class, half human"] = judged("learned", by="class", **HALF)
ROWS["self-training, perfect"] = {"mode": "vlm", "proposer": "own", "judge": "mock", "judge_options": {"accuracy": 1.0}}
ROWS["self-training, accept all"] = {"mode": "vlm", "proposer": "own", "judge": "always_yes"}
ROWS["consistency"] = {"mode": "al", "consistency": 0.3}
for rho in (0.0, 0.25, 0.5, 0.75, 1.0):
    ROWS[f"echo rho {rho}"] = judged("mock", {"kind": "echo", "rho": rho, "auc": 0.9})
ROWS["all masks"] = {"mode": "al"}  # full supervision: every image has a human mask, whatever --masks says


def is_late(row: str) -> bool:
    "Is the judge asked after a training, on all human masks but one?"
    own = ROWS[row]
    needs_model = own.get("proposer") == "own" or own.get("accept_by") == "pixels"
    return needs_model or row.startswith(("echo", *NEED_MODEL))


def settings_of(row: str, masks: int, seed: int, out: Path) -> dict[str, Any]:
    "The settings of one run."
    first, step = (masks - 1, 1) if is_late(row) else (masks, 1)
    if ROWS[row].get("strategy") == "entropy":  # three rounds, two where masks are few
        first, step = {40: (20, 20), 80: (20, 30), 160: (40, 60)}.get(masks, (masks // 2, masks - masks // 2))
    if row == "all masks":
        first = masks = 436  # and one for validation
    sizes = {"initial": first, "increment": step, "max_labelled": masks}
    return {**BASE, **ROWS[row], **sizes, "seed": seed, "output_dir": str(out)}


def run_one(row: str, masks: int, seed: int, work: Path) -> dict[str, Any]:
    "One run, and what came of it."
    from vlm_itl.experiment import make_config, run_al

    out = work / f"{row}-{masks}-{seed}".replace(" ", "_").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)  # of a process that was killed; the settings may have changed since
    found: dict[str, Any] = {"row": row, "masks": masks, "seed": seed}
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            list(run_al(make_config(settings_of(row, masks, seed, out))))
    except Exception as error:  # the others go on
        return {**found, "error": f"{type(error).__name__}: {error}"[:500]}
    summary = json.loads((out / "summary.json").read_text())
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    ious = summary["test"]["per_class_iou"]
    last, asked = rounds[-1], rounds[-2 if is_late(row) else -1]["judge"] or {}
    shutil.rmtree(out)
    return {
        **found,
        "miou7": round(sum(ious[name] or 0.0 for name in SEVEN) / len(SEVEN), 4),
        "miou": round(summary["test"]["mean_iou"], 4),
        "pseudo": last["pseudo"],
        "human_seconds": round(last["budget"]["human_seconds"], 1),
        "judged": asked.get("n"),
        "accepted": asked.get("accepted"),
        "label_miou": asked.get("accepted_label_miou"),
        "kept_pixels": asked.get("kept_pixels"),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def _start() -> None:
    "What a worker process does first."
    import torch

    torch.set_num_threads(1)


def main() -> None:
    "Run what is missing, all rows of a seed before the next, and append a line for each."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="some of: " + "; ".join(ROWS))
    parser.add_argument("--masks", type=int, nargs="+", default=[40, 80, 160])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/judge_pays.jsonl"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    lines = given.out.read_text().splitlines() if given.out.is_file() else []
    done = {(r["row"], r["masks"], r["seed"]) for r in map(json.loads, lines) if "error" not in r}
    todo = [(r, m, s) for r in given.rows for s in range(given.seeds) for m in given.masks if (r, m, s) not in done]
    todo = sorted((key for key in todo if key[0] != "all masks" or key[1] == given.masks[0]), key=lambda key: key[2])
    given.out.parent.mkdir(exist_ok=True)
    work = given.out.parent / "judge_pays"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, spawn, _start, max_tasks_per_child=25) as pool, given.out.open("a") as file:
        for ended in as_completed([pool.submit(run_one, *key, work) for key in todo]):
            found = ended.result()
            print(json.dumps(found), file=file, flush=True)
            print(found["row"], found["masks"], found["seed"], found.get("miou7", found.get("error")), flush=True)


if __name__ == "__main__":
    main()
