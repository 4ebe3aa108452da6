"""Does a judge pay? Human masks alone against proposals of a foundation model, judged in many ways, on photographs.

Run as `make study` (hours: half a minute of CPU for each row, number of human masks and seed; it goes on where it
stopped), shown by `make results` (seconds). Data: 437 + 445 photographs of PASCAL VOC 2012 (folder VLM_ITL_SHARED).
Proposals: the masks of Grounded-SAM for the 437, made by a model that has seen far more than these. Segmenter: a
probe on a frozen MobileNetV2 of ImageNet, 256 px, 150 steps. Every row is a run of `run_al`, one seed, one number of
human masks, drawn by chance; rows of one seed share the drawn images. Half of each batch are people's masks; in the
rows "by number" every image comes as often as any other, and each is compared with its like. A judge that needs the
round's model is asked after a training on all human masks but one. Measured: mean IoU on the test images over the
seven classes that occur in numbers, human seconds at 239.7 s a mask. Intervals are t intervals over the seeds,
differences are paired.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from vlm_itl.core.figures import COLORS, MARKERS, legend_below, make_figure, save_png, tidy_axes
from vlm_itl.core.files import plain, write_json

ROOT = Path(__file__).resolve().parents[1]

SEVEN = ("background", "cat", "cow", "dog", "horse", "person", "sheep")
SHARED = Path(os.environ.get("VLM_ITL_SHARED", ROOT.parent / "shared"))
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
    "mixture": {"human_share": 0.5},  # said here, so that rows stay comparable when a default changes
}
FOLDER = {"mode": "vlm", "proposer": "folder", "proposer_options": {"path": str(SHARED / "data/grounded_sam_voc")}}
BY_NUMBER, NUMBERED = {"mixture": {}}, ", by number"  # every image as often as any other, whoever drew its mask


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
}
for name, (judge, options) in JUDGES.items():
    for by in ("image", "class", "pixels"):
        ROWS[f"{name}, {by}"] = judged(judge, options, by)
ROWS["self-training, perfect"] = {"mode": "vlm", "proposer": "own", "judge": "mock", "judge_options": {"accuracy": 1.0}}
ROWS["self-training, accept all"] = {"mode": "vlm", "proposer": "own", "judge": "always_yes"}
for row in ("accept all", "learned, class", "learned, image", "perfect, class", "self-training, accept all"):
    ROWS[row + NUMBERED] = {**ROWS[row], **BY_NUMBER}
ROWS["consistency"] = {"mode": "al", "consistency": 0.3}
for rho in (0.0, 0.25, 0.5, 0.75, 1.0):
    ROWS[f"echo rho {rho}"] = judged("mock", {"kind": "echo", "rho": rho, "auc": 0.9})
ROWS["all masks"] = {"mode": "al"}  # full supervision: every image has a human mask, whatever --masks says


def is_late(row: str) -> bool:
    "Is the judge asked after a training, on all human masks but one?"
    own = ROWS[row]
    needs_model = own.get("proposer") == "own" or own.get("accept_by") == "pixels"
    return needs_model or row.startswith(("echo", *NEED_MODEL))


def settings_of(row: str, masks: int, seed: int, out: Path, steps: int = BASE["steps"]) -> dict[str, Any]:
    "The settings of one run."
    first, step = (masks - 1, 1) if is_late(row) else (masks, 1)
    if ROWS[row].get("strategy") == "entropy":  # three rounds, two where masks are few
        first, step = {40: (20, 20), 80: (20, 30), 160: (40, 60)}.get(masks, (-(-masks // 2), masks // 2))
    if row == "all masks":
        first = masks = 436  # and one for validation
    sizes = {"initial": first, "increment": step, "max_labelled": masks}
    return {**BASE, **ROWS[row], **sizes, "steps": steps, "seed": seed, "output_dir": str(out)}


PLACES = ("output_dir", "seed", "initial", "increment", "max_labelled", "dataset", "model", "plugins", "device")
PLACES += ("proposer_options", "judge_options", "clicks")  # hold folders; change no mask


def recipe_of(settings: dict[str, Any]) -> str:
    "A word for all settings of a row, defaults among them: rows of two recipes must not stand under one name."
    from vlm_itl.experiment import make_config

    told = {name: value for name, value in make_config(settings).to_dict().items() if name not in PLACES}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def refuse_mixing(lines: list[dict[str, Any]], rows: list[str], steps: int) -> None:
    "End where a row was measured under another recipe before, since a default has changed."
    known = {(line["row"], line["recipe"]) for line in lines if line.get("recipe")}
    for row, recipe in sorted(known):
        if row in rows and recipe != recipe_of(settings_of(row, 40, 0, Path("x"), steps)):
            raise SystemExit(
                f"{row!r} was measured with other settings than it has now (recipe {recipe}): say in ROWS or BASE what "
                "has changed, or give what is new an --out of its own."
            )


def run_one(row: str, masks: int, seed: int, work: Path, steps: int = BASE["steps"]) -> dict[str, Any]:
    "One run, and what came of it."
    from vlm_itl.experiment import make_config, run_al

    out = work / f"{row}-{masks}-{seed}".replace(" ", "_").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)  # of a process that was killed; the settings may have changed since
    settings = settings_of(row, masks, seed, out, steps)
    found: dict[str, Any] = {"row": row, "masks": masks, "seed": seed, "recipe": recipe_of(settings)}
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            list(run_al(make_config(settings)))
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
        "device": _device(),
    }


def _device() -> str:
    "Where the network ran."
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _run_key(key: tuple[str, int, int, Path, int]) -> dict[str, Any]:
    "`run_one` of one argument."
    return run_one(*key)


def _start() -> None:
    "What a worker process does first."
    import torch

    torch.set_num_threads(1)
    _remember_second_masks()


def _remember_second_masks() -> None:
    "Have what the second segmenter draws of the photographs drawn once in this process, not once in every run."
    from vlm_itl.vlm.free import MaskMemory, SecondOpinionHandler

    memory, make = MaskMemory(1000), SecondOpinionHandler.__init__

    @functools.wraps(make)  # the options are read from its signature
    def make_with_memory(self: Any, *values: Any, **options: Any) -> None:
        make(self, *values, **options)
        self._masks = memory

    memory.clear = lambda: None  # type: ignore[method-assign]  # a run that ends leaves them to the next
    SecondOpinionHandler.__init__ = make_with_memory  # type: ignore[method-assign]


FIELDS = (
    "row",
    "masks",
    "seed",
    "miou7",
    "miou",
    "pseudo",
    "human_seconds",
    "judged",
    "accepted",
    "label_miou",
    "kept_pixels",
    "cpu_seconds",
    "device",
    "recipe",
)
ENOUGH = 5  # seeds for a point of a curve
RAW, SUMMARY = ROOT / "results/judge_pays.csv", ROOT / "results/judge_pays.json"


def read_raw(path: Path) -> pd.DataFrame:
    "What was measured so far, one line per run; the last of equal ones."
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [found for found in map(json.loads, lines) if "error" not in found]
    table = pd.DataFrame(kept, columns=list(FIELDS)).fillna({"device": "cpu", "recipe": ""})
    return table.drop_duplicates(["row", "masks", "seed"], keep="last").sort_values(["row", "masks", "seed"])


def interval(values: Any) -> tuple[float, float, float]:
    "Mean, and its 95 % t interval."
    numbers = np.asarray(values, dtype=float)
    if len(numbers) < 2:
        return float(numbers.mean()), math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return float(numbers.mean()), float(numbers.mean()) - half, float(numbers.mean()) + half


def summarise(raw: pd.DataFrame) -> pd.DataFrame:
    "One line per row and number of masks: mean IoU, what it gains over two others in pairs, share of full supervision."
    value = raw.set_index(["row", "masks", "seed"])["miou7"]
    full = value.loc["all masks"].droplevel("masks") if "all masks" in raw["row"].values else pd.Series(dtype=float)
    lines = []
    for (row, masks), group in raw[raw["row"] != "all masks"].groupby(["row", "masks"], sort=False):
        own = group.set_index("seed")["miou7"]
        line: dict[str, Any] = {
            "row": row,
            "masks": int(masks),
            "n": len(own),
            "human_hours": group["human_seconds"].mean() / 3600,
        }
        line["miou7"], line["low"], line["high"] = interval(own)
        for name in ("human only", "accept all"):
            rival = name + NUMBERED * (name == "accept all" and row.endswith(NUMBERED))  # of the same recipe
            other = value.loc[rival, masks] if (rival, masks) in value.index else pd.Series(dtype=float)
            both = own.index.intersection(other.index)
            if row != rival and len(both) > 1:
                line |= dict(
                    zip((f"over {name}", f"{name} low", f"{name} high"), interval(own[both] - other[both]), strict=True)
                )
        both = own.index.intersection(full.index)
        line["of full"] = float((own[both] / full[both]).mean()) if len(both) else math.nan
        line |= {"accepted": (group["accepted"] / group["judged"]).mean(), "label_miou": group["label_miou"].mean()}
        lines.append(line)
    return pd.DataFrame(lines)


def seconds_to(raw: pd.DataFrame, row: str, share: float = 0.9) -> list[float]:
    "For each seed, the human seconds at which a row reaches a share of full supervision, read between its points."
    full = raw[raw["row"] == "all masks"].set_index("seed")["miou7"]
    found, mine = [], raw[raw["row"] == row]
    fewest = mine["masks"].min()
    for seed, group in mine.groupby("seed"):
        if seed not in full.index:
            continue
        points = group.sort_values("masks")
        first = points.iloc[0]
        if first["masks"] > fewest and first["miou7"] >= share * full[seed]:
            continue  # it was there before its first point, and others were measured with fewer masks
        seconds, best = points["human_seconds"].to_numpy(), np.maximum.accumulate(points["miou7"].to_numpy())
        ends = (np.append(seconds, 104_748.9), np.append(best, max(best[-1], full[seed])))
        found.append(float(np.interp(share * full[seed], ends[1], ends[0])))
    return found


def show(raw: pd.DataFrame) -> None:
    "Print and write the table, and draw the figures."
    table = summarise(raw)
    seeds = raw.groupby(["row", "masks"])["seed"].transform("nunique")
    often = raw[seeds >= ENOUGH]  # a row of which some seeds begin at fewer masks than others has no time to compare
    full = interval(raw[raw["row"] == "all masks"]["miou7"])
    times = {
        row: interval(seconds_to(often, row))
        for row in ("human only", "human only, entropy", "accept all", "learned, class")
    }
    print(table.round(3).to_string(index=False))
    print(f"all masks: {full[0]:.3f} ({full[1]:.3f} to {full[2]:.3f})")
    for row, (mean, low, high) in times.items():
        print(f"{row}: 90 % of full supervision after {mean:,.0f} human seconds ({low:,.0f} to {high:,.0f})")
    raw.to_csv(RAW, index=False)
    write_json(SUMMARY, plain({"all_masks": full, "seconds_to_90": times, "table": table.to_dict("records")}))
    save_png(draw_curves(table, full[0]), ROOT / "nbs/images/judge_pays.png")
    if table["row"].str.startswith("echo").any():
        save_png(draw_rho(table), ROOT / "nbs/images/judge_rho.png")


CURVES = {
    "human only": "human masks only, by chance",
    "human only, entropy": "human masks only, by entropy",
    "self-training, accept all": "+ the model's own masks, all",
    "accept all": "+ proposals, all",
    "learned, class": "+ proposals, judged by a free judge (learned)",
    "perfect, class": "+ proposals, judged by the truth",
}


def draw_curves(table: pd.DataFrame, full: float) -> Figure:
    "Mean IoU against human masks, where enough seeds have been run for an interval that says something."
    table = table[table["n"] >= ENOUGH]
    figure, ((axes,),) = make_figure(7.2, 4.0)
    for number, (row, text) in enumerate(CURVES.items()):
        part = table[table["row"] == row].sort_values("masks")
        if len(part):
            axes.plot(part["masks"], part["miou7"], MARKERS[number] + "-", color=COLORS[number], label=text)
            axes.fill_between(part["masks"], part["low"], part["high"], color=COLORS[number], alpha=0.15, linewidth=0)
    axes.axhline(full, color="#555555", linestyle="--", linewidth=1, label="all 437 masks drawn")
    axes.set_xscale("log", base=2)
    ticks = sorted(table["masks"].unique())
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    tidy_axes(axes, "masks that people drew", "mean IoU of 7 classes, 445 photographs")
    legend_below(figure, axes)
    return figure


def draw_rho(table: pd.DataFrame) -> Figure:
    "Mean IoU against how much a judge's errors are the model's own, its AUC fixed."
    figure, ((axes,),) = make_figure(6.0, 3.4)
    part = table[table["row"].str.startswith("echo")].copy()
    part["rho"] = part["row"].str.split().str[-1].astype(float)
    for number, (masks, group) in enumerate(part.sort_values("rho").groupby("masks")):
        axes.plot(
            group["rho"], group["miou7"], MARKERS[number] + "-", color=COLORS[number], label=f"{masks} human masks"
        )
        axes.fill_between(group["rho"], group["low"], group["high"], color=COLORS[number], alpha=0.15, linewidth=0)
        level = table[(table["row"] == "accept all") & (table["masks"] == masks)]["miou7"]
        if len(level):
            axes.axhline(level.iloc[0], color=COLORS[number], linestyle=":", label=f"accept all, {masks}")
    tidy_axes(axes, "rho: share of the judge's errors that are the model's", "mean IoU of 7 classes")
    legend_below(figure, axes)
    return figure


def main() -> None:
    "Run what is missing, all rows of a seed before the next, and append a line for each."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="some of: " + "; ".join(ROWS))
    parser.add_argument("--masks", type=int, nargs="+", default=[40, 80, 160])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/judge_pays.jsonl")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=BASE["steps"], help="of a training; others need an --out of theirs"
    )
    parser.add_argument("--show", action="store_true", help="run nothing: the table and the figures of what is there")
    given = parser.parse_args()
    if given.steps != BASE["steps"] and given.out == parser.get_default("out"):
        parser.error("rows with other --steps must not be mixed with those of the study: give them an --out of theirs.")
    if given.show:
        return show(read_raw(given.out) if given.out.is_file() else pd.read_csv(RAW))
    text = given.out.read_text().splitlines() if given.out.is_file() else []
    lines = [line for line in map(json.loads, text) if "error" not in line]
    refuse_mixing(lines, given.rows, given.steps)
    done = {(line["row"], line["masks"], line["seed"]) for line in lines}
    todo = [(r, m, s) for r in given.rows for s in range(given.seeds) for m in given.masks if (r, m, s) not in done]
    todo = sorted((key for key in todo if key[0] != "all masks" or key[1] == given.masks[0]), key=lambda key: key[2])
    given.out.parent.mkdir(exist_ok=True)
    work = given.out.parent / "judge_pays"
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(given.jobs, _start, maxtasksperchild=25) as pool, given.out.open("a") as file:
        for found in pool.imap_unordered(_run_key, [(*key, work, given.steps) for key in todo]):
            print(json.dumps(found), file=file, flush=True)
            print(found["row"], found["masks"], found["seed"], found.get("miou7", found.get("error")), flush=True)


if __name__ == "__main__":
    main()
