"""A judge on trial: settings, every source of masks, answers remembered, stopped runs, the notebook and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import papermill
import pytest
from PIL import Image

from vlm_itl.cli.run import main, run_notebook
from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.core.files import project_root
from vlm_itl.data.sources import load_data
from vlm_itl.judging import trial as judging
from vlm_itl.judging.trial import JudgeConfig, judge_run_path, make_judge_config, try_judge
from vlm_itl.vlm.handler import Judgement, JudgeStopped
from vlm_itl.vlm.simulated import MockHandler

TINY: dict[str, Any] = {
    "options": {"sensitivity": 0.9, "specificity": 0.8},
    "data_options": {"n_train": 24, "n_test": 8},
    "limit": 3,
    "resamples": 50,
}
FIGURES = {"roc", "risk_coverage", "acceptance", "break_even", "mistakes"}  # no graded scores, so no reliability


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of predicted masks: every test scene, some of them moved far."""
    folder = tmp_path_factory.mktemp("masks")
    for row, example in enumerate(load_data("scenes", options=TINY["data_options"]).test):
        mask = np.where(example["mask"] == 255, 0, example["mask"]).astype(np.uint8)
        Image.fromarray(np.roll(mask, 25 * (row % 2), axis=1)).save(folder / f"{example['id']}.png")
    return folder


def test_spoilt_masks_reported_and_remembered(tmp_path: Path):
    settings = {**TINY, "limit": 6}  # of three images nobody would be trusted
    config = make_judge_config(settings, output_dir=str(tmp_path / "run"))
    trial = try_judge(config)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["queries"] > 30 and report["images"] == 6 and report["simulated"]
    assert set(trial.cards) == {"mock", "always_yes", "always_no"} == set(report["cards"])
    assert {path.stem for path in (tmp_path / "run/figures").glob("*.png")} == FIGURES == set(trial.figures)
    assert report["sentence"].startswith("Deserves trust: mock") and "simulated" in report["sentence"]
    assert set(report["cards"]["mock"]["by"]) == {"kind", "class", "size", "error"}
    lines = [json.loads(line) for line in (tmp_path / "run/judgements.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * report["queries"]
    assert {"judge", "row", "id", "kind", "iou", "verdict", "p_yes"} <= set(lines[0])
    assert report["certified"] is None  # many masks an image
    again = try_judge(config)
    assert again.report["cost"] == trial.report["cost"] and again.cards == trial.cards
    with pytest.raises(RunError, match="another configuration"):
        try_judge(make_judge_config(settings, output_dir=str(tmp_path / "run"), seed=1))


def test_one_changed_pixel_is_one_question(masks: Path, tmp_path: Path):
    """A folder of masks; the second run asks nobody, and one pixel of one mask asks once."""
    mine = tmp_path / "masks"
    mine.mkdir()
    for path in masks.glob("*.png"):
        (mine / path.name).write_bytes(path.read_bytes())
    config = make_judge_config(TINY, limit=0, masks=str(mine), output_dir=str(tmp_path / "run"))
    first = try_judge(config)
    assert first.report["queries"] == first.report["cost"]["mock"]["calls"] == 8
    assert set(first.report["certified"]) == set(first.cards)
    assert try_judge(config).report["cost"]["mock"]["calls"] == 8
    changed = sorted(mine.glob("*.png"))[3]
    pixels = np.array(Image.open(changed))
    pixels[0, 0] = 1 - min(1, pixels[0, 0])
    Image.fromarray(pixels).save(changed)
    assert try_judge(config).report["cost"]["mock"]["calls"] == 8 + 1


def test_masks_of_a_segmenter(tmp_path: Path):
    config = make_judge_config(
        TINY, masks="model", model="segformer-nano", image_size=64, limit=4, output_dir=str(tmp_path)
    )
    trial = try_judge(config)
    assert trial.report["queries"] == 4 == len(list((tmp_path / "masks").glob("*.png")))
    assert trial.report["base_rate"] == 0  # untrained: nothing is good, and nothing is made up
    assert trial.cards["mock"]["measures"]["roc_auc"]["value"] is None and "break_even" not in trial.figures
    assert "cannot be compared" in trial.report["sentence"]


def test_what_a_judge_adds_to_the_segmenter_is_told(masks: Path, tmp_path: Path):
    """Beside a segmenter's belief in the same masks; without one, or where that is on trial itself, nothing is said."""
    beside: dict[str, Any] = {"limit": 0, "masks": str(masks), "data_options": {"n_train": 24, "n_test": 16}}
    few = make_judge_config(TINY, **{**beside, "data_options": TINY["data_options"]}, output_dir=str(tmp_path / "few"))
    assert try_judge(few).report["added"] is None
    with_model = {"model": "cnn-nano", "image_size": 64, "masks": "corruption", "limit": 4}
    trial = try_judge(make_judge_config(TINY, **with_model, output_dir=str(tmp_path / "run")))
    added = trial.cards["mock"]["added"]
    assert added["sentence"] == trial.report["added"] and set(added) > {"partial_auc", "agreement_auc", "strata"}
    own = {**with_model, "handler": "confidence", "options": {}}
    assert try_judge(make_judge_config(TINY, **own, output_dir=str(tmp_path / "own"))).report["added"] is None


def test_a_stopped_trial_goes_on(tmp_path: Path):
    limited = make_judge_config(TINY, max_calls=30, output_dir=str(tmp_path))
    with pytest.raises(JudgeStopped, match="max_calls=30"):
        try_judge(limited)
    assert not (tmp_path / "report.json").exists()
    trial = try_judge(make_judge_config(TINY, output_dir=str(tmp_path)))  # a limit changes no number
    cost = trial.report["cost"]["mock"]
    assert cost["calls"] > 30 and cost["calls"] + cost["from_cache"] == trial.report["queries"]


def test_certificate_on_the_other_half(masks: Path, tmp_path: Path):
    """A perfect judge, half the masks good: with alpha and delta this lax a few images certify."""
    config = make_judge_config(
        TINY, options={"accuracy": 1.0}, limit=0, masks=str(masks), alpha=0.5, delta=0.5, output_dir=str(tmp_path)
    )
    report = try_judge(config).report
    assert report["certified"]["mock"]["threshold"] is not None and report["certified"]["mock"]["bad_share"] == 0
    assert report["certified"]["always_no"]["threshold"] is None


def test_certificate_tears_no_group(masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Frames of one film would certify themselves: what belongs together is in one half."""
    names = sorted(path.stem for path in masks.glob("*.png"))
    pairs = {name: f"film {place // 2}" for place, name in enumerate(names)}
    score = {name: (place // 2 + 1) / 10 for place, name in enumerate(names)}  # alike in a pair
    halves: list[list[float]] = []

    def watched(p_yes: list[float], *_: Any) -> dict[str, Any]:
        halves.append(sorted(p_yes))
        return {"threshold": None}

    monkeypatch.setattr(judging, "certify", watched)
    monkeypatch.setattr(MockHandler, "_judge_one", lambda self, query: Judgement("yes", score[query.id], id=query.id))
    loaded = load_data("scenes", options=TINY["data_options"])
    for groups, seed in [({}, 0), *((pairs, seed) for seed in range(3)), (dict.fromkeys(names, "film"), 0)]:
        monkeypatch.setattr(judging, "load_data", lambda *_, _groups=groups, **__: replace(loaded, groups=_groups))
        folder = str(tmp_path / f"{len(groups)} {len(set(groups.values()))} {seed}")
        config = make_judge_config(TINY, limit=0, masks=str(masks), seed=seed, output_dir=folder)
        halves.clear()
        found = try_judge(config).report["certified"]["mock"]
        if groups == pairs:
            assert len(halves[0]) == len({*halves[0]}) == 2  # one of each: two frames of a film are no two observations
        assert len(set(groups.values())) != 1 or found["reason"] == "no image to certify on"


def test_frames_of_one_film_are_drawn_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Intervals by image would be those of independent pictures, which the frames of a film are not."""
    settings = {**TINY, "data_options": {"n_train": 6, "n_test": 8}, "limit": 0, "per_image": 4}
    alone = try_judge(make_judge_config(settings, output_dir=str(tmp_path / "alone")))
    loaded = load_data("scenes", options=settings["data_options"])
    films = {name: f"film {place % 2}" for place, name in enumerate(loaded.test["id"])}
    monkeypatch.setattr(judging, "load_data", lambda *_, **__: replace(loaded, groups=films))
    films_only = try_judge(make_judge_config(settings, output_dir=str(tmp_path / "films")))
    assert alone.cards["mock"]["images"] == 8 and alone.cards["mock"]["measures"]["roc_auc"]["low"] is not None
    assert films_only.cards["mock"]["images"] == 2 and films_only.cards["mock"]["measures"]["roc_auc"]["low"] is None
    assert alone.ranking.trusted == ("mock",)
    assert films_only.ranking.trusted == () and films_only.report["images"] == 8


def test_settings_are_checked(tmp_path: Path):
    for settings, message in [
        ({"handlr": "mock"}, "Did you mean 'handler'"),
        ({"handler": "mok"}, "Did you mean 'mock'"),
        ({"split": "tset"}, "split"),
        ({"masks": "model"}, "needs model"),
        ({"style": "contour"}, "leave style empty"),
        ({"tau": 2}, "tau"),
        ({"limit": -1}, "limit"),
        ({"split": "test+test"}, "each split once"),
        ({"split": "auto+train"}, "'auto' alone"),
        ({"options": "sensitivity"}, "dictionary"),
        ({"confidences": ["margn"]}, "Did you mean 'margin'"),
        ({"question": "qualty"}, "Did you mean 'quality'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_judge_config(settings)
    with pytest.raises(ConfigError, match="no option 'sensitivty'"):
        try_judge(make_judge_config(options={"sensitivty": 1}, output_dir=str(tmp_path)))
    with pytest.raises(DataError, match="no such folder"):
        try_judge(make_judge_config(TINY, masks="no/such/folder", output_dir=str(tmp_path)))
    assert make_judge_config(options='{"accuracy": 0.9}', limit="3").options == {"accuracy": 0.9}
    assert make_judge_config(confidences="margin").confidences == ["margin"]  # a word alone is a list of one
    assert judge_run_path(make_judge_config()) != judge_run_path(make_judge_config(seed=1))
    assert judge_run_path(make_judge_config()) == judge_run_path(make_judge_config(max_calls=5))


def test_notebook_offers_every_setting():
    found = papermill.inspect_notebook(str(project_root() / "nbs/run_judge.ipynb"))
    defaults = JudgeConfig().to_dict()
    assert set(found) == set(defaults)
    assert all(parameter["help"] for parameter in found.values())
    for name, parameter in found.items():
        assert repr(defaults[name]).replace("'", '"') == parameter["default"].replace("'", '"'), name


@pytest.mark.slow  # nbdev_test runs the notebook as well
def test_notebook_runs(tmp_path: Path):
    settings = {**TINY, "limit": 2, "output_dir": str(tmp_path / "run")}
    done = run_notebook("run_judge", tmp_path / "out.ipynb", settings, progress_bar=False)
    assert done.error is None and done.run_folder == tmp_path / "run"
    assert (tmp_path / "run/report.json").is_file()


def test_console_refuses_unknown_names(capsys: pytest.CaptureFixture[str]):
    assert main(["nbs/run_judge.ipynb", "-p", "judge", "mock"]) == 2
    assert "no parameter 'judge'" in capsys.readouterr().err
    assert main(["nbs/run_judge.ipynb", "--help-notebook"]) == 0
    assert "handler" in capsys.readouterr().out


def test_grounded_sam_on_trial(voc: Path, shared: Path, tmp_path: Path):
    """Real masks of a real model, and a judge that says yes to all: its card says what it is worth."""
    folder = shared / "data/grounded_sam_voc"
    if not folder.is_dir():
        pytest.skip("data/grounded_sam_voc is not in the shared folder")
    config = make_judge_config(
        handler="always_yes", dataset=str(voc), masks=str(folder), limit=30, resamples=50, output_dir=str(tmp_path)
    )
    trial = try_judge(config)
    measures = trial.cards["always_yes"]["measures"]
    assert trial.report["queries"] == 30 and 0 < measures["base_rate"]["value"] < 1
    assert measures["agreement_rate"]["value"] == measures["base_rate"]["value"] and measures["kappa"]["value"] == 0
    assert trial.ranking.trusted == ()
