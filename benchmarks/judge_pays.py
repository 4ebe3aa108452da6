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
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    for by in ("image", "class"):
        ROWS[f"{name}, {by}"] = judged(judge, options, by)
    ROWS[f"{name}, class, half human"] = judged(judge, options, "class", **HALF)
ROWS["self-training, perfect"] = {"mode": "vlm", "proposer": "own", "judge": "mock", "judge_options": {"accuracy": 1.0}}
ROWS["self-training, accept all"] = {"mode": "vlm", "proposer": "own", "judge": "always_yes"}
ROWS["consistency"] = {"mode": "al", "consistency": 0.3}
for rho in (0.0, 0.25, 0.5, 0.75, 1.0):
    ROWS[f"echo rho {rho}"] = judged("mock", {"kind": "echo", "rho": rho, "auc": 0.9})


def settings_of(row: str, masks: int, seed: int, out: Path) -> dict[str, Any]:
    "The settings of one run."
    own = ROWS[row]
    late = own.get("proposer") == "own" or row.startswith(("echo", *NEED_MODEL)) or own.get("accept_by") == "pixels"
    first, step = (masks - 1, 1) if late else (masks, 1)
    if own.get("strategy") == "entropy":
        first, step = 20, 20
    return {
        **BASE,
        **own,
        "seed": seed,
        "initial": first,
        "increment": step,
        "max_labelled": masks,
        "output_dir": str(out),
    }


RUN = """import json, sys
from vlm_itl.experiment import make_config, run_al
list(run_al(make_config(json.load(sys.stdin))))"""


def run_one(row: str, masks: int, seed: int, work: Path) -> dict[str, Any]:
    "One run in a process of its own, and what came of it."
    out = work / f"{row}-{masks}-{seed}".replace(" ", "_").replace(",", "")
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(settings_of(row, masks, seed, out)),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLM_ITL_PROGRESS": "0", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        return {"row": row, "masks": masks, "seed": seed, "error": done.stderr.strip().splitlines()[-1][-500:]}
    summary = json.loads((out / "summary.json").read_text())
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    ious = summary["test"]["per_class_iou"]
    last, judge = rounds[-1], rounds[-1]["judge"] or {}
    shutil.rmtree(out)
    return {
        "row": row,
        "masks": masks,
        "seed": seed,
        "miou7": sum(ious[name] or 0.0 for name in SEVEN) / len(SEVEN),
        "pseudo": last["pseudo"],
        "human_seconds": last["budget"]["human_seconds"],
        "judged": judge.get("n"),
        "accepted": judge.get("accepted"),
        "label_miou": judge.get("accepted_label_miou"),
        "kept_pixels": judge.get("kept_pixels"),
        "seconds": last["seconds"],
    }


def main() -> None:
    "Run what is missing, two at a time, and append a line for each."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="some of: " + "; ".join(ROWS))
    parser.add_argument("--masks", type=int, nargs="+", default=[40, 80, 160])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/judge_pays.jsonl"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    lines = given.out.read_text().splitlines() if given.out.is_file() else []
    done = {(r["row"], r["masks"], r["seed"]) for r in map(json.loads, lines) if "error" not in r}
    todo = [(r, m, s) for s in range(given.seeds) for m in given.masks for r in given.rows if (r, m, s) not in done]
    given.out.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool, given.out.open("a") as file:
        for found in pool.map(lambda key: run_one(*key, given.out.parent / "judge_pays"), todo):
            print(json.dumps(found), file=file, flush=True)
            print(found["row"], found["masks"], found["seed"], found.get("miou7", found.get("error")), flush=True)


if __name__ == "__main__":
    main()
