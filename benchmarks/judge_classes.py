"""Which classes a judge lets in, and what of them is right: why judged proposals are worth what `judge_pays.py` says.

    python benchmarks/judge_classes.py            # three minutes on one core
    python benchmarks/judge_classes.py --show     # the table of what is there

Data and settings of `judge_pays.py`: 40 human masks by chance, Grounded-SAM's proposals for the other photographs,
judged class by class before any training (nothing is trained here). For each class: how many proposals hold it, how
many of these are right (IoU of the class at least .5, which is what the judge is asked), how many the judge accepts,
and how many of the accepted are right. Sums over the seeds.
"""

import argparse
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from judge_pays import BASE, FOLDER, ROOT, SHARED
from PIL import Image

from vlm_itl.core.files import plain, write_json
from vlm_itl.data.labels import LabelSpace
from vlm_itl.model.metrics import class_iou, count_pairs

TABLE = ROOT / "results/judge_classes.json"
VOC = LabelSpace.voc()
PROPOSED, TRUE = SHARED / "data/grounded_sam_voc", SHARED / "data/VOCdevkit/VOC2012/SegmentationClass"


def verdicts(seed: int, work: Path) -> list[dict[str, Any]]:
    "One line for each class that a proposal holds: accepted or not, and its IoU."
    from vlm_itl.experiment import make_config, run_al

    shutil.rmtree(work, ignore_errors=True)
    few = {"initial": 40, "increment": 1, "max_labelled": 40, "steps": 0, "seed": seed, "output_dir": str(work)}
    with contextlib.redirect_stdout(io.StringIO()):
        list(run_al(make_config({**BASE, **FOLDER, "judge": "learned", "accept_by": "class", **few})))
    judged = [json.loads(line) for line in (work / "round_000/judgements.jsonl").read_text().splitlines()]
    shutil.rmtree(work)
    lines = []
    for one in judged:
        proposal, truth = (np.array(Image.open(folder / f"{one['id']}.png")) for folder in (PROPOSED, TRUE))
        ious = dict(zip(VOC.names, class_iou(count_pairs(proposal, truth, len(VOC))), strict=True))
        for answer in one["raw"].split(", "):
            name, _, verdict = answer.partition(": ")
            lines.append({"class": name, "accepted": verdict == "yes", "iou": ious[name], "seed": seed})
    return lines


def summarise(lines: pd.DataFrame) -> pd.DataFrame:
    "A row for each class, the most frequent first, and one for all."
    right = lines["iou"] >= BASE["tau"]
    lines = lines.assign(right=right, both=right & lines["accepted"])

    def row(name: str, group: pd.DataFrame) -> dict[str, Any]:
        taken, good = group["accepted"].sum(), group["right"].sum()
        counts = {"class": name, "proposed": len(group) / lines["seed"].nunique(), "right": group["right"].mean()}
        found = {"accepted": group["accepted"].mean(), "right of the accepted": group["both"].sum() / max(1, taken)}
        return {**counts, **found, "accepted of the right": group["both"].sum() / max(1, good)}

    rows = [row(str(name), group) for name, group in lines.groupby("class")]
    return pd.DataFrame([row("all", lines), *sorted(rows, key=lambda one: -one["proposed"])])


def main() -> None:
    "Run what is asked for, and print the table."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--show", action="store_true", help="run nothing")
    given = parser.parse_args()
    if given.show:
        print(pd.DataFrame(json.loads(TABLE.read_text())["table"]).round(2).to_string(index=False))
        return
    work = ROOT / "runs/judge_classes"
    table = summarise(pd.DataFrame([line for seed in range(given.seeds) for line in verdicts(seed, work)]))
    print(table.round(2).to_string(index=False))
    record = {"command": "python benchmarks/judge_classes.py", "seeds": given.seeds, "table": table.to_dict("records")}
    write_json(TABLE, plain(record))


if __name__ == "__main__":
    main()
