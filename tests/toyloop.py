"""A whole loop on six images that one can count, with a network that has never seen a tensor: nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from vlm_itl.data.masks import MaskStore, row_ids
from vlm_itl.data.sources import SegData, toy_images
from vlm_itl.experiment.config import Config, make_config
from vlm_itl.experiment.loop import Loop
from vlm_itl.model.scoring import PoolScores
from vlm_itl.model.train import FitResult
from vlm_itl.vlm.handler import Judgement, JudgeStopped, VLMHandler


class Parrot:
    """Learns nothing but how many rows it was shown; the masks it predicts for some images are right."""

    segmenter = None

    def __init__(self, data: SegData, right: Sequence[str] = ("toy-1",)) -> None:
        self.notes: list[str] = []
        self.truth = {row["id"]: row["mask"] for split in (data.train, data.val) for row in split}
        self.right, self.rows, self.seen = set(right), 0, []

    def restart(self) -> None:
        self.rows = 0

    def load(self, folder: Path) -> None:
        self.rows = int((folder / "rows.txt").read_text())

    def fit(self, rows: datasets.Dataset, validation: datasets.Dataset, desc: str, checkpoints: Path) -> FitResult:
        self.seen.append({row["id"]: row["mask"] for row in rows})
        self.rows = len(rows)
        return FitResult(steps=0, train_loss=0.0)

    def evaluate(self, rows: datasets.Dataset, desc: str, counts: list[np.ndarray] | None = None) -> dict[str, Any]:
        return {"mean_iou": self.rows / 10, "pixel_accuracy": self.rows / 10, "images": len(rows)}

    def look(self, images: datasets.Dataset, masks: MaskStore | None = None, **options: Any) -> PoolScores:
        ids = row_ids(images)
        for image_id in ids if masks is not None else ():
            truth = self.truth[image_id]
            masks.write(image_id, truth if image_id in self.right else np.full_like(truth, 2))
        scores = {"entropy-mean": np.array([float(i[-1]) for i in ids], np.float32)}  # the last one is the least sure
        return PoolScores(ids, scores, np.zeros((len(ids), 2), np.float32), np.zeros((len(ids), 3), np.float32))

    def look_at_regions(self, images: datasets.Dataset, regions: Any, **options: Any) -> PoolScores:
        raise AssertionError("images are asked for here")

    def earlier(self, folders: Sequence[Path]) -> list[Any]:
        return []

    def save(self, folder: Path, pictures: Sequence[Any]) -> None:
        folder.mkdir()
        (folder / "rows.txt").write_text(str(self.rows))


class Listener:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.summary: dict[str, Any] = {}

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def log_round(self, record: dict[str, Any], folder: Path) -> None:
        self.told.append(record["index"])

    def finish(self, summary: dict[str, Any], figures: Any) -> None:
        self.summary = summary


class Eye(VLMHandler):
    """Says yes to masks with more than one class, and remembers whom it was asked about."""

    name = "eye"
    batch_size = 1

    def __init__(self, stops_after: int = 99) -> None:
        self.asked: list[str] = []
        self.stops_after = stops_after

    def _judge_one(self, query: Any) -> Judgement:
        if len(self.asked) >= self.stops_after:
            raise JudgeStopped("the money is gone.", {})
        self.asked.append(query.id)
        verdict = "yes" if len(np.unique(query.mask)) > 1 else "no"
        return Judgement(verdict, p_yes=float(verdict == "yes"), usd=0.25)


def no_figures(folder: Path) -> list[Path]:
    """Nothing is drawn."""
    return []


def settings(folder: Path, **more: Any) -> Config:
    small: dict[str, Any] = {
        "mode": "vlm",
        "proposer": "own",
        "initial": 1,
        "increment": 1,
        "max_labelled": 3,
        "gallery": 0,
        "preflight": 0,
        "steps": 0,
    }
    return make_config({**small, "output_dir": str(folder), **more})


def toy_loop(config: Config, stops_after: int = 99) -> Loop:
    """A loop of the six images, a network that parrots, and an eye as a judge."""
    toy = toy_images()
    return Loop(config, toy, Parrot(toy), Eye(stops_after), tracker=Listener(), draw=no_figures)
