"""Real photographs: a published checkpoint evaluated, and an ImageNet encoder trained, on a VOC 2012 folder.

    python benchmarks/voc_subset.py --shared ../shared             # both parts; about twenty minutes on one core
    python benchmarks/voc_subset.py --shared ../shared --part check

`--shared` holds data/VOCdevkit/VOC2012, weights/deeplabv3-mobilenetv2-voc and weights/mobilenet-v2-imagenet. The folder
used here has 437 of the 1,464 official training images and 445 of the 1,449 validation images, mostly animals and
people: its figures must not be put beside those of full VOC. Results go to results/voc_subset.json.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import vlm_itl
from vlm_itl.core.files import read_json, write_json
from vlm_itl.data.sources import load_data
from vlm_itl.experiment.config import make_config, run_path
from vlm_itl.experiment.loop import run_baseline
from vlm_itl.model.metrics import mean_iou_of
from vlm_itl.model.predict import Inference, evaluate
from vlm_itl.model.segmenter import load_model

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "voc_subset.json"
SEVEN = ("background", "cat", "cow", "dog", "horse", "person", "sheep")  # the well-populated classes of this subset


def digest(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are compared."""
    per_class = metrics["per_class_iou"]
    return {
        "classes_in_truth": metrics["classes_in_truth"],
        "mean_iou_in_truth": metrics["mean_iou_in_truth"],
        "mean_iou_7": mean_iou_of(per_class, SEVEN),
        "pixel_accuracy": metrics["pixel_accuracy"],
        "per_class_iou": per_class,
    }


def check(shared: Path) -> dict[str, Any]:
    """Evaluate DeepLabV3-MobileNetV2 (VOC) on all validation images, at its own input size and with the aspect kept."""
    data = load_data(str(shared / "data/VOCdevkit/VOC2012"))
    model = load_model(str(shared / "weights/deeplabv3-mobilenetv2-voc"), data.labels)
    published = {"mean_iou_in_truth": 0.564, "mean_iou_7": 0.796, "pixel_accuracy": 0.931}
    found = {resize: digest(evaluate(model, data.test, Inference(513, resize))) for resize in ("stretch", "keep")}
    return {"published": published, **found}


def train(shared: Path) -> dict[str, Any]:
    """Train from the ImageNet encoder for eight epochs at 256 px."""
    config = make_config(
        mode="baseline",
        dataset=str(shared / "data/VOCdevkit/VOC2012"),
        model=str(shared / "weights/mobilenet-v2-imagenet"),
        image_size=256,
        epochs=8,
        output_dir=str(ROOT / "runs" / "voc_subset"),
    )
    (record,) = run_baseline(config)
    summary = read_json(run_path(config) / "summary.json")
    command = (
        "vlm_itl_run nbs/run_baseline.ipynb -p dataset ../shared/data/VOCdevkit/VOC2012 "
        "-p model ../shared/weights/mobilenet-v2-imagenet -p image_size 256 -p epochs 8"
    )
    return {
        "command": command,
        "train_images": record.labelled,
        "val_images": summary["sizes"]["val"],
        "train_seconds": record.seconds["train"],
        "threads": torch.get_num_threads(),
        **digest(summary["test"]),
    }


def main() -> None:
    """Run the parts asked for and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("VLM_ITL_SHARED", "../shared")))
    parser.add_argument("--part", choices=("check", "train", "both"), default="both")
    args = parser.parse_args()
    found = read_json(OUT) if OUT.is_file() else {}
    versions = {"vlm_itl": vlm_itl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found["versions"], found["cores"] = versions, os.cpu_count()
    for name, part in (("check", check), ("train", train)):
        if args.part in (name, "both"):
            started = time.perf_counter()
            found[name] = part(args.shared)
            print(f"{name}: {time.perf_counter() - started:.0f} s", found[name], flush=True)
    OUT.parent.mkdir(exist_ok=True)
    write_json(OUT, found)


if __name__ == "__main__":
    main()
