"""What a judge is worth on real photographs: Grounded-SAM's masks, a trained segmenter's masks, and spoilt ones.

    python benchmarks/judge_worth.py --shared ../shared                        # all parts; half an hour
    python benchmarks/judge_worth.py --shared ../shared --part sam --limit 50  # one part, fewer images
    python benchmarks/judge_worth.py --shared ../shared --handler hf --options '{"model": "FOLDER"}'

`--shared` holds data/VOCdevkit/VOC2012, data/grounded_sam_voc, weights/deeplabv3-mobilenetv2-voc and
weights/mobilenet-v2-imagenet. The judge is by default `second_opinion`: a published DeepLabV3-MobileNetV2 whose own
mask is compared with the one judged. Free judges stand beside it: always yes, always no, the confidence of a segmenter.

- `sam`: the masks of Grounded-SAM for the 437 training images. The DeepLab checkpoint scores better on these images
  than on the validation images (see its README), so it has probably seen them: its card here flatters it.
- `segmenter`: the masks, on the 445 validation images, of a MobileNetV2 with ImageNet weights trained here for a few
  epochs at 192 px (or of `--segmenter FOLDER`); the free confidences are its own.
- `corruption`: true masks of validation images, spoilt in seven ways, with the same segmenter's confidence in them.

Each part goes to results/judge_worth.json under the name of its judge, with its ROC curve beside; parts that were not
run stay as they are. Answers are cached in `--runs`: run again, and only the measures are computed.
"""

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm_itl.core.figures import save_png
from vlm_itl.core.files import read_json, resolve_path, write_json
from vlm_itl.experiment.config import make_config, run_path
from vlm_itl.experiment.loop import run_baseline
from vlm_itl.judging.trial import make_judge_config, try_judge

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "judge_worth.json"
PARTS = ("sam", "segmenter", "corruption")


def trained_segmenter(shared: Path, runs: Path) -> Path:
    """Train (or find) the segmenter whose masks are judged."""
    config = make_config(
        mode="baseline",
        dataset=str(shared / "data/VOCdevkit/VOC2012"),
        model=str(shared / "weights/mobilenet-v2-imagenet"),
        model_options={"output_stride": 16},
        image_size=192,
        epochs=6,
        test_every_round=False,
        output_dir=str(runs / "judge-worth-segmenter"),
    )
    for record in run_baseline(config):
        print(record, flush=True)
    return run_path(config) / "round_000" / "model"


def digest(trial: Any) -> dict[str, Any]:
    """The numbers of a trial that are kept."""
    report = trial.report
    kept = ("sentence", "trusted", "best_free", "queries", "images", "base_rate", "simulated", "model", "certified")
    cards = {name: card["measures"] for name, card in report["cards"].items()}
    groups = {
        column: {
            group: {
                "n": part["n"],
                **{m: part["measures"][m] for m in ("base_rate", "sensitivity", "specificity", "roc_auc")},
            }
            for group, part in parts.items()
        }
        for column, parts in report["cards"][report["judge"]]["by"].items()
    }
    plain = {name: report[name] for name in kept} | {"model": Path(str(report["model"])).name}
    return {**plain, "ranking": report["ranking"], "cards": cards, "by": groups}


def main() -> None:
    """The parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT / os.environ.get("VLM_ITL_SHARED", "../shared"))
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given more than once; all without")
    parser.add_argument("--handler", default="second_opinion")
    parser.add_argument("--options", default=None, help="options of the handler, JSON")
    parser.add_argument("--question", default="quality")
    parser.add_argument("--segmenter", default="", help="folder of a trained segmenter, instead of training one")
    parser.add_argument("--limit", type=int, default=0, help="images of each part; 0: all (corruption: 40)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where run folders go")
    given = parser.parse_args()
    shared = resolve_path(given.shared)
    deeplab = str(shared / "weights/deeplabv3-mobilenetv2-voc")
    options = {"model": deeplab, "image_size": 513, "resize": "stretch"} if given.handler == "second_opinion" else {}
    options = options if given.options is None else json.loads(given.options)
    parts = given.part or list(PARTS)
    segmenter = given.segmenter
    if not segmenter and set(parts) & {"segmenter", "corruption"}:
        segmenter = str(trained_segmenter(shared, given.runs))
    common: dict[str, Any] = {
        "handler": given.handler,
        "options": options,
        "question": given.question,
        "dataset": str(shared / "data/VOCdevkit/VOC2012"),
        "limit": given.limit,
        "cache": str(given.runs / "judge-worth.sqlite"),
    }
    if given.handler != "second_opinion":
        common["second_opinion"] = deeplab
    own = {"model": segmenter, "image_size": 192}
    settings: dict[str, dict[str, Any]] = {
        "sam": {
            "masks": str(shared / "data/grounded_sam_voc"),
            "model": deeplab,
            "image_size": 257,
            "resize": "stretch",
        },
        "segmenter": {"masks": "model", **own},
        "corruption": {"masks": "corruption", "limit": given.limit or 40, **own},
    }
    settings["sam"] |= {"confidences": ["max_probability", "softmin"], "min_share": 0.1}  # few of its masks are good
    settings["corruption"]["confidences"] = ["max_probability", "margin", "softmin"]
    for part in parts:
        folder = given.runs / f"judge-worth-{part}-{given.handler}{f'-{given.limit}' if given.limit else ''}"
        trial = try_judge(make_judge_config({**common, **settings[part]}, output_dir=str(folder)))
        summary = Path(settings[part]["model"]).parent.parent / "summary.json"
        print(f"{part}: {trial.report['sentence']}", flush=True)
        save_png(trial.figures["roc"], OUT.with_name(f"judge_worth_{part}_{given.handler}.png"))
        found = read_json(OUT) if OUT.is_file() else {}
        found.setdefault(part, {})[given.handler] = digest(trial)
        if part != "sam" and summary.is_file():
            test = read_json(summary)["test"]
            kept = ("mean_iou_in_truth", "pixel_accuracy")
            found["segmenter_trained_here"] = {"epochs": 6, "image_size": 192, **{name: test[name] for name in kept}}
        found["about"] = {
            "command": "python benchmarks/judge_worth.py --shared ../shared",
            "data": "437 train and 445 val images of PASCAL VOC 2012, mostly animals and people: not full VOC",
            "tau": trial.report["config"]["tau"],
            "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        }
        write_json(OUT, found)


if __name__ == "__main__":
    main()
