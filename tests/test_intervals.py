"""Intervals of mean IoU from a few labelled images: they hold on a real model's masks, and a bootstrap agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_al
from vlm_itl.judging.intervals import draw_sample, miou_interval, quality_strata, told_interval
from vlm_itl.model.metrics import class_counts, count_pairs
from vlm_itl.reports.report import interval_words, read_run

LABELLED, REPLAYS = 40, 200


@pytest.fixture(scope="module")
def tables(shared: Path) -> np.ndarray:
    """Counts (N, 3, 21) of Grounded-SAM's masks for VOC photographs, by image."""
    folder, truths = shared / "data/grounded_sam_voc", shared / "data/VOCdevkit/VOC2012/SegmentationClass"
    if not folder.is_dir() or not truths.is_dir():
        pytest.skip("Grounded-SAM's masks or VOC are not here")
    paths = sorted(path for path in folder.rglob("*.png") if (truths / path.name).is_file())
    pairs = ((np.array(Image.open(path)), np.array(Image.open(truths / path.name))) for path in paths[::2])
    return np.stack([class_counts(count_pairs(torch.from_numpy(p), torch.from_numpy(t), 21)) for p, t in pairs])


def of_all(tables: np.ndarray, classes: tuple[int, ...]) -> float:
    """The mean IoU of all images over some classes."""
    right, true, predicted = tables.sum(0)
    iou = right / np.maximum(1, true + predicted - right)
    return float(iou[list(classes)].mean())


def strata_of(tables: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Four strata by a prediction of quality that is somewhat right."""
    same = tables[:, 0].sum(1) / tables[:, 1].sum(1)
    return quality_strata(same + rng.normal(0, 0.1, len(tables)))


def test_intervals_hold_on_masks_of_a_real_model(tables: np.ndarray):
    """In at least 90 % of 200 replays with 40 masks, stratified or not, where 95 % are promised."""
    rng = np.random.default_rng(0)
    for strata in (strata_of(tables, rng), np.zeros(len(tables), dtype=int)):
        sizes, held = np.bincount(strata), []
        for _ in range(REPLAYS):
            places = draw_sample(strata, LABELLED, rng)
            found = miou_interval(tables[places], strata[places], sizes)
            held.append(found.low <= of_all(tables, found.classes) <= found.high)
        assert np.mean(held) >= 0.9


def test_with_eight_images_they_hold_as_often_as_the_report_says(tables: np.ndarray):
    """Too seldom: 80 to 85 %, which `interval_words` says wherever there are fewer than 40."""
    rng = np.random.default_rng(5)
    for strata in (strata_of(tables, rng), np.zeros(len(tables), dtype=int)):
        sizes, held = np.bincount(strata), []
        for _ in range(2 * REPLAYS):
            places = draw_sample(strata, 8, rng)
            found = miou_interval(tables[places], strata[places], sizes)
            held.append(found.low <= of_all(tables, found.classes) <= found.high)
        assert 0.75 < np.mean(held) < 0.9
    known = {"miou": 0.5, "low": 0.4, "high": 0.6, "level": 0.95, "classes": 3, "masks_to_halve": 24}
    told = [interval_words({"interval": known | {"images": n}}) for n in (8, 40)]
    assert "too narrow (of 8, 80 to 85 % held in replays)" in told[0] and told[1].endswith("would halve the interval")


def test_a_bootstrap_finds_the_same_width(tables: np.ndarray):
    """Images drawn again with replacement within their strata: standard errors agree within 30 % in the median."""
    rng = np.random.default_rng(1)
    strata = strata_of(tables, rng)
    ratios = []
    for _ in range(12):
        places = draw_sample(strata, 60, rng)
        found = miou_interval(tables[places], strata[places], least=5)  # of endlessly many: as a bootstrap sees it
        groups = [np.flatnonzero(strata[places] == k) for k in range(4)]
        again = [np.concatenate([rng.choice(g, len(g)) for g in groups]) for _ in range(200)]
        spread = np.std([of_all(tables[places][rows], found.classes) for rows in again])
        ratios.append((found.high - found.low) / 2 / 2.0 / spread)  # t of 56 degrees is 2.0
    assert 0.77 < np.median(ratios) < 1.3


def test_the_masks_that_it_names_halve_the_interval(tables: np.ndarray):
    rng = np.random.default_rng(2)
    strata = strata_of(tables, rng)
    sizes = np.bincount(strata)

    def look(n: int) -> tuple[float, float]:
        found = [
            miou_interval(tables[p], strata[p], sizes, least=4)
            for p in (draw_sample(strata, n, rng) for _ in range(60))
        ]
        return float(np.median([f.high - f.low for f in found])), float(np.median([f.masks_to_halve for f in found]))

    width, more = look(LABELLED)
    assert 0.35 < look(LABELLED + int(more))[0] / width < 0.65


def test_the_estimate_is_that_of_evaluate_where_all_is_labelled(tables: np.ndarray):
    found = miou_interval(tables, sizes=[len(tables)], least=1)
    assert found.miou == pytest.approx(of_all(tables, found.classes)) and found.low == found.high
    assert found.masks_to_halve == 0 and found.images == len(tables)


def test_frames_of_films_count_as_films():
    """Twelve films of twenty frames, alike in a film: by frame the intervals hold seldom, by film as promised."""
    rng = np.random.default_rng(2)
    held: dict[str, list[bool]] = {"frame": [], "film": []}
    for _ in range(REPLAYS):
        true = rng.integers(50, 150, (12, 2)).repeat(20, axis=0)
        found = rng.beta(6, 3, (12, 2)).repeat(20, axis=0) * rng.uniform(0.95, 1.05, (240, 2))
        right = (true * found.clip(0, 1)).astype(int)
        counts = np.stack([right, true, right + (true - right) // 2], axis=1)
        for name, together in (("frame", None), ("film", np.repeat(range(12), 20))):
            told = told_interval(counts, together)
            assert told["images"] == 240 and told.get("groups") == (12 if name == "film" else None)
            held[name].append(told["low"] <= TRUE_MIOU <= told["high"])
    assert np.mean(held["frame"]) < 0.6 and np.mean(held["film"]) > 0.88


def of_many() -> float:
    """The mean IoU of endlessly many of these films."""
    rng = np.random.default_rng(3)
    true, found = rng.integers(50, 150, (200_000, 2)), rng.beta(6, 3, (200_000, 2))
    right = (true * found).astype(int)
    return float((right.sum(0) / (true + (true - right) // 2).sum(0)).mean())


TRUE_MIOU = of_many()


def test_a_run_knows_which_of_its_images_belong_together(tmp_path: Path):
    """What keeps films in one split also makes them one observation: of validation, test and the rule to stop."""
    rng = np.random.default_rng(0)
    (tmp_path / "d" / "images").mkdir(parents=True)
    (tmp_path / "d" / "masks").mkdir()
    for place in range(33):
        mask = np.zeros((24, 24), np.uint8)
        mask[: 6 + place % 12, :12] = 1
        name = f"film{place // 3}_{place % 3}.png"
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(tmp_path / "d" / "images" / name)
        Image.fromarray(mask).save(tmp_path / "d" / "masks" / name)
    data = {"classes": ["background", "crack"], "groups": r"(film\d+)_"}
    settings = {"dataset": str(tmp_path / "d"), "data_options": data, "val_share": 6, "steps": 1, "gallery": 0}
    settings |= {"mode": "al", "image_size": 32, "initial": 3, "increment": 3, "max_labelled": 6, "leaks": "off"}
    out = tmp_path / "run"
    rounds = list(run_al(make_config(settings, stop={"gain": 0.0, "rounds": 1}, output_dir=str(out))))
    told = rounds[0].metrics["val"]["interval"]
    assert (told["images"], told["groups"]) == (6, 2)
    tested = read_run(out).metrics(0, "test")["interval"]
    assert tested["groups"] * 3 == tested["images"] and "groups that the" in interval_words({"interval": tested})


def test_what_is_no_sample_is_refused():
    tables = np.ones((4, 3, 2))
    for arguments, message in (
        ({"strata": [0, 0, 0, 1]}, "every stratum needs two"),
        ({"strata": [0, 0, 0, 2]}, "stratum 1 has 0"),
        ({"strata": [0, 0]}, "one stratum an image"),
        ({"sizes": [3]}, "fewer images than were drawn"),
        ({"least": 5}, "no class"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            miou_interval(tables, **arguments)
        assert "\n" not in str(caught.value)
    for level in (0, 1, 95):
        with pytest.raises(ConfigError, match="level"):
            miou_interval(tables, level=level)
    with pytest.raises(ConfigError, match="strata"):
        quality_strata([0.1, 0.2], count=3)
    with pytest.raises(ConfigError, match="to draw"):
        draw_sample(np.array([0, 0, 1, 1]), 3, np.random.default_rng(0))
