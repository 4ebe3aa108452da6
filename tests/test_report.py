"""Reports from run folders alone: folders made up here, with known numbers, in every state a run can be in."""

import io
import json
import math
import shutil
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from vlm_itl.core import figures
from vlm_itl.core.checks import ConfigError, RunError
from vlm_itl.core.figures import COLORS
from vlm_itl.core.files import write_json, write_text
from vlm_itl.reports.report import aubc, find_references, list_runs, read_run, round_table, summary_table
from vlm_itl.reports.run_figures import (
    gallery_items,
    plot_class_iou,
    plot_gallery,
    plot_judge,
    plot_learning_curve,
    save_figures,
)

NAMES = ["background", "cat", "dog"]


def metrics(level, dog=True):
    iou = {"background": level, "cat": level / 2, "dog": level / 4 if dog else None}
    present = [v for v in iou.values() if v is not None]
    mean = sum(present) / len(present)
    return {"mean_iou": mean, "mean_iou_in_truth": mean, "pixel_accuracy": level, "per_class_iou": iou}


def gallery(folder, truth=True, verdict=None):
    folder.mkdir(parents=True)
    mask = np.zeros((12, 16), np.uint8)
    mask[2:8, 3:9], mask[9:11, 9:12] = 1, 2
    void = mask.copy()
    void[2, :] = 255
    Image.fromarray(np.full((12, 16, 3), 200, np.uint8)).save(folder / "0_image.jpg")
    for name, values in [("prediction", mask), ("truth", void)]:
        picture = Image.fromarray(values).convert("P")
        palette = np.zeros((256, 3), np.uint8)
        palette[:3], palette[255] = [[0, 0, 0], [128, 0, 0], [0, 128, 0]], [224, 224, 192]
        picture.putpalette(palette.tobytes())
        picture.save(folder / f"0_{name}.png")
    entry = {"id": "a/b", "image": "0_image.jpg", "truth": "0_truth.png" if truth else None, "split": "pool"}
    entry |= {"prediction": "0_prediction.png", "verdict": verdict, "p_yes": None, "iou": 0.5}
    write_json(folder / "index.json", [entry])


def write_run(path, levels=(0.4, 0.6, 0.8), finished=True, mode="al", strategy="random", seed=0, tests=True, **more):
    "A run folder whose validation IoU of the background is `levels`, and on test .1 less."
    (path / "figures").mkdir(parents=True)
    config = {"mode": mode, "strategy": strategy, "seed": seed, "steps": 10, "judge": "mock", "policy": "pseudo"}
    write_json(path / "config.json", config | {"output_dir": str(path)} | more)
    write_json(path / "data.json", {"labels": NAMES})
    lines = []
    for index, level in enumerate(levels):
        share = 1.0 if mode == "baseline" else 0.1 * (index + 1)
        record = {"index": index, "labelled": round(100 * share), "labelled_share": share, "pseudo": 0}
        record |= {"budget": {"images": 20 + round(100 * share), "human_seconds": 3600.0, "judge_usd": None}}
        record |= {"metrics": {"val": metrics(level, dog=False)}, "judge": None, "selection": {"ids": []}}
        record |= {"start_ids": [f"start-{seed}"] if index == 0 else [], "seconds": {"total": 1.5}}
        if mode == "vlm":
            record["pseudo"] = 5 * index
            record["judge"] = {"n": 10, "accepted": 4, "agreement_rate": 0.8, "balanced_accuracy": 0.7}
            record["judge"] |= {"sensitivity": 0.9, "specificity": None, "coverage": 1.0, "accepted_label_miou": None}
        write_json(make(path / f"round_{index:03d}") / "record.json", record)
        lines.append(json.dumps(record) + "\n")
        if finished and tests:
            write_json(path / f"test_{index:03d}.json", metrics(level - 0.1))
    write_text(path / "rounds.jsonl", "".join(lines))
    if finished:
        summary = {"mode": mode, "finished": True, "simulated": mode == "vlm", "labels": NAMES}
        write_json(path / "summary.json", summary | {"test": metrics(levels[-1] - 0.1)})
    return path


def make(folder):
    folder.mkdir()
    return folder


def study(path, seeds=range(5), gain=0.05, **more):
    for seed in seeds:
        luck = 0.01 * seed
        write_run(path / f"random-{seed}", (0.4 + luck, 0.5 + luck, 0.6 + luck), seed=seed, **more)
        own = gain + 0.002 * seed
        write_run(
            path / f"entropy-{seed}",
            (0.4 + luck, 0.5 + luck + own, 0.6 + luck + own),
            seed=seed,
            strategy="entropy",
            **more,
        )
    return list_runs(path)


# ---- reading


def test_reads_a_finished_run(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert run.finished and run.mode == "al" and run.label == "random" and run.labels == NAMES
    table = round_table(run)
    assert table["val_mean_iou"].tolist() == pytest.approx([0.3, 0.45, 0.6])
    assert table["test_mean_iou"].tolist() == pytest.approx([7 / 12 * v for v in (0.3, 0.5, 0.7)])
    assert table["human_hours"].tolist() == [1.0] * 3 and math.isnan(table["judge_usd"][0])
    assert "agreement_rate" not in table


def test_unfinished_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", finished=False))
    assert not run.finished and run.summary is None and run.labels == NAMES
    table = round_table(run)
    assert table["test_mean_iou"].isna().all() and table["val_mean_iou"].notna().all()
    assert [p.name for p in save_figures(run.path)] == ["learning_curve.png", "class_iou.png"]
    assert summary_table(run)["aubc_on"].tolist() == ["val"]
    (axes,) = plot_learning_curve(run).axes
    assert axes.get_ylabel() == "mean IoU (val)"


def test_labels_and_curve_from_what_there_is(tmp_path):
    path = write_run(tmp_path / "run", tests=False)
    (path / "data.json").unlink()
    summary = json.loads((path / "summary.json").read_text())
    del summary["labels"]
    write_json(path / "summary.json", summary | {"curve": {"test_mean_iou": [0.1, None, 0.3]}})
    run = read_run(path)
    assert run.labels == NAMES
    test = round_table(run)["test_mean_iou"].tolist()
    assert test[0] == 0.1 and math.isnan(test[1]) and test[2] == pytest.approx(7 / 12 * 0.7)


def test_last_line_cut_off_is_left_out_with_a_warning(tmp_path):
    path = write_run(tmp_path / "run", finished=False)
    text = (path / "rounds.jsonl").read_text()
    (path / "rounds.jsonl").write_text(text[:-40])
    with pytest.warns(UserWarning, match="last line is cut off"):
        run = read_run(path)
    assert len(run.rounds) == 2


def test_broken_line_in_the_middle_is_an_error(tmp_path):
    path = write_run(tmp_path / "run", finished=False)
    first, *rest = (path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (path / "rounds.jsonl").write_text(first[:-9] + "\n" + "".join(rest))
    with pytest.raises(RunError, match="line 1, is not a round"):
        read_run(path)


def test_round_folders_stand_in_for_a_missing_index(tmp_path):
    path = write_run(tmp_path / "run")
    (path / "rounds.jsonl").unlink()
    assert len(read_run(path).rounds) == 3


def test_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(RunError, match="holds no run") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="is no folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(RunError, match="is no folder"):
        list_runs(tmp_path / "missing")
    assert list_runs(tmp_path) == []
    with pytest.raises(RunError, match="no runs were given"):
        summary_table([])
    write_json(tmp_path / "config.json", {"mode": "al"})
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunError, match="summary.json is not readable"):
        read_run(tmp_path)


def test_run_without_rounds_draws_nothing(tmp_path):
    path = write_run(tmp_path / "run", levels=(), finished=False)
    run = read_run(path)
    assert run.rounds == [] and round_table(run).empty and summary_table(run)["rounds"].tolist() == [0]
    for draw in (plot_learning_curve, plot_class_iou, plot_judge, save_figures):
        with pytest.raises(RunError, match="no finished round"):
            draw(run)


def test_list_runs_goes_deep_but_not_into_runs(tmp_path):
    inner = write_run(tmp_path / "a" / "b" / "run")
    model = make(inner / "round_000" / "model")
    write_json(model / "config.json", {"mode": "a model's own", "model_type": "segformer"})
    write_json(make(tmp_path / "checkpoint") / "config.json", {"model_type": "segformer"})
    assert [run.path for run in list_runs(tmp_path)] == [inner]
    assert [run.path for run in list_runs(inner)] == [inner]


# ---- figures


def test_figures_of_every_kind_of_run(tmp_path):
    for mode, wanted in [("al", []), ("vlm", ["judge"]), ("baseline", [])]:
        path = write_run(tmp_path / mode, mode=mode, levels=(0.7,) if mode == "baseline" else (0.4, 0.6, 0.8))
        gallery(path / "round_000" / "gallery", truth=mode != "vlm", verdict="no" if mode == "vlm" else None)
        names = [p.stem for p in save_figures(path)]
        assert names == ["learning_curve", "class_iou", "gallery", *wanted]
        for name in names:
            with Image.open(path / "figures" / f"{name}.png") as picture:
                assert min(picture.size) > 150
    assert not plt.get_fignums()


def test_judge_figure_needs_a_judge(tmp_path):
    with pytest.raises(RunError, match="no judge's answers"):
        plot_judge(write_run(tmp_path / "al"))


def test_figures_with_nothing_measured(tmp_path):
    path = write_run(tmp_path / "run", finished=False)
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line["metrics"]["val"] = None
    write_text(path / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert save_figures(path) == []


def test_learning_curve_groups_seeds_and_draws_full_supervision(tmp_path):
    runs = study(tmp_path / "study")
    runs.append(read_run(write_run(tmp_path / "full", mode="baseline", levels=(0.9,))))
    (axes,) = plot_learning_curve(runs).axes
    names = axes.get_legend_handles_labels()[1]
    assert names == [f"full supervision: {7 / 12 * 0.8:.3f}", "entropy (5 seeds)", "random (5 seeds)"]
    line = next(one for one in axes.get_lines() if one.get_label().startswith("random"))
    assert line.get_color() == COLORS[1]
    np.testing.assert_allclose(line.get_ydata(), [7 / 12 * (v - 0.1 + 0.02) for v in (0.4, 0.5, 0.6)])
    with pytest.raises(ConfigError, match="against"):
        plot_learning_curve(runs, against="time")
    with pytest.raises(ConfigError, match="metric"):
        plot_learning_curve(runs, metrics=["loss"])


def test_learning_curve_marks_pseudo_labels_and_recipes(tmp_path):
    vlm = write_run(tmp_path / "vlm", mode="vlm")
    (axes,) = plot_learning_curve(vlm).axes
    names = axes.get_legend_handles_labels()[1]
    assert names == ["test", "images learnt from, pseudo-labels included", "val"]
    assert axes.get_title(loc="left") == "random, simulated mock judge (pseudo)"
    other = write_run(tmp_path / "longer", mode="vlm", steps=20)
    (axes,) = plot_learning_curve([vlm, other]).axes
    names = [name for name in axes.get_legend_handles_labels()[1] if "learnt" not in name]
    assert names == [
        "random, simulated mock judge (pseudo); steps=10",
        "random, simulated mock judge (pseudo); steps=20",
    ]


def test_learning_curve_of_runs_of_unequal_length(tmp_path):
    long = write_run(tmp_path / "long", seed=0)
    short = write_run(tmp_path / "short", seed=1, levels=(0.4, 0.6), finished=False)
    (axes,) = plot_learning_curve([long, short]).axes
    assert len(axes.get_lines()[0].get_xdata()) == 2  # means are over the same runs everywhere


def test_class_iou_keeps_absent_classes_grey(tmp_path):
    figure = plot_class_iou(write_run(tmp_path / "run"))
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == NAMES
    values = axes.collections[0].get_array().reshape(3, 4)
    assert values.mask[2].tolist() == [True, True, True, False]
    assert [tick.get_text() for tick in axes.get_xticklabels()][-1] == "test"


def test_class_iou_of_many_rounds_and_classes(tmp_path):
    path = write_run(tmp_path / "run", levels=np.linspace(0.1, 0.9, 40).tolist())
    figure = plot_class_iou(path)
    assert len(figure.axes[0].get_xticks()) < 20


@pytest.mark.parametrize(
    ("names", "covered"), [(["cat", "background", "dog"], [0, 2]), (["road", "sky", "car"], [0, 1, 2])]
)
def test_the_gallery_covers_all_but_the_class_called_background(tmp_path, names, covered):
    """Wherever it stands in the list: class 0 was left bare, and a background elsewhere covered the photograph."""
    path = write_run(tmp_path / "run")
    gallery(path / "round_001" / "gallery")
    write_json(path / "summary.json", json.loads((path / "summary.json").read_text()) | {"labels": names})
    mask = Image.fromarray(np.repeat(np.array([[0, 1, 2, 255]], np.uint8), 2, axis=0))
    mask.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    for file in (path / "round_001" / "gallery").glob("*prediction*.png"):
        mask.save(file)
    for file in (path / "round_001" / "gallery").glob("*image*"):
        Image.new("RGB", (4, 2), (100, 100, 100)).save(file)
    shown = plot_gallery(path).axes[3].images[0].get_array()[0]
    assert [place for place, pixel in enumerate(shown.tolist()) if max(pixel) - min(pixel) > 30] == covered


def test_gallery_draws_void_cream_and_misses_no_truth(tmp_path):
    path = write_run(tmp_path / "run")
    gallery(path / "round_001" / "gallery", verdict="abstain")
    figure = plot_gallery(path)
    truth = figure.axes[1].get_images()[0].get_array()
    assert (truth[2] == [224, 224, 192]).all() and (truth[5, 5] == [128, 0, 0]).all()
    overlay = figure.axes[3].get_images()[0].get_array()
    assert np.abs(overlay[0, 0].astype(int) - 200).max() <= 2  # background shows the image
    assert figure.axes[3].get_xlabel() == "abstain, IoU 0.50"
    assert gallery_items(path, round=0) == [] and len(gallery_items(path, round=1)) == 1
    with pytest.raises(RunError, match="no pictures of round 0"):
        plot_gallery(path, round=0)
    (path / "round_001" / "gallery" / "0_image.jpg").write_bytes(b"not a picture")
    with pytest.raises(RunError, match="0_image.jpg: not a readable image"):
        plot_gallery(path)


def test_moved_run_folder_still_draws(tmp_path):
    path = write_run(tmp_path / "run", mode="vlm")
    gallery(path / "round_002" / "gallery", verdict="yes")
    shutil.move(path, tmp_path / "elsewhere")
    assert len(save_figures(tmp_path / "elsewhere")) == 4


def test_aubc():
    assert aubc([0.1, 0.2, 0.4], [0.5, 0.5, 0.5]) == pytest.approx(0.5)
    assert aubc([0.1, 0.2, 0.4], [0.0, 1.0, 0.0]) == pytest.approx(0.5)
    assert aubc([0.0, 1.0], [0.0, 1.0], low=0.5, high=1.0) == pytest.approx(0.75)
    assert aubc([0.1, 0.2, 0.3], [0.2, None, 0.4]) == pytest.approx(0.3)
    assert math.isnan(aubc([0.1], [0.2])) and math.isnan(aubc([0.1, 0.1], [0.2, 0.3]))
    assert math.isnan(aubc([0.1, 0.2], [0.2, 0.3], low=0.0))


def test_no_warnings_on_the_way(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = study(tmp_path / "study")
        for run in runs[:1]:
            save_figures(run)
        plot_learning_curve(runs).savefig(tmp_path / "y.png")


# ---- what is shown first, and beside what


def test_the_short_table_shows_the_result_first_and_nothing_that_was_not_measured(tmp_path):
    run = write_run(tmp_path / "run", mode="vlm")
    assert round_table(run, short=True).columns.tolist()[:5] == [
        "round", "labelled", "pseudo", "val_mean_iou", "test_mean_iou",
    ]  # fmt: skip
    assert len(round_table(run, short=True).columns) <= 11 and "kappa" in round_table(run)
    assert "pseudo" not in round_table(write_run(tmp_path / "al"), short=True)


def test_rounds_with_as_many_labelled_images_are_all_drawn(tmp_path):
    """Parts of images are counted in whole ones, rounded up: two rounds may have the same number."""
    run = write_run(tmp_path / "run")
    path = run / "rounds.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["labelled"] = 6
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    line = plot_learning_curve(run, ["val"]).axes[0].lines[0]
    assert len(records) > 1 and list(line.get_xdata()) == [record["labelled_share"] for record in records]


def test_references_are_the_twin_without_a_judge_and_full_supervision(tmp_path):
    run = write_run(tmp_path / "vlm", mode="vlm", dataset="scenes")
    for name, more in {
        "twin": {"mode": "al"},
        "full": {"mode": "baseline", "levels": (0.9,)},
        "other-seed": {"mode": "al", "seed": 1},
        "other-recipe": {"mode": "al", "steps": 20},
        "other-data": {"mode": "baseline", "levels": (0.9,), "dataset": "elsewhere"},
        "unfinished": {"mode": "baseline", "levels": (0.9,), "finished": False},
    }.items():
        write_run(tmp_path / name, **{"dataset": "scenes", **more})
    for folder in (run, tmp_path / "twin"):
        write_json(folder / "data.json", {"labels": NAMES, "sizes": {"test": 9}})
    write_run(tmp_path / "newer", mode="baseline", levels=(0.7,), dataset="scenes")  # of a folder that has grown
    write_json(tmp_path / "newer" / "data.json", {"labels": NAMES, "sizes": {"test": 12}})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    assert sorted(other.name for other in find_references(run)) == ["full", "twin"]
    assert [other.name for other in find_references(tmp_path / "twin")] == ["full"]
    (axes,) = plot_learning_curve([run, *find_references(run)]).axes
    names = axes.get_legend_handles_labels()[1]
    assert any("full supervision" in n for n in names) and any("simulated mock" in n for n in names)
    assert "simulated" in axes.get_title(loc="left")


@pytest.mark.parametrize(("kind", "said"), [("logprobs", "p(yes) 0.81"), ("score", "score 0.81"), (None, "score 0.81")])
def test_a_score_is_not_called_a_probability(tmp_path, kind, said):
    run = write_run(tmp_path / "run", mode="vlm")
    gallery(run / "round_000" / "gallery", verdict="no")
    index = run / "round_000" / "gallery" / "index.json"
    (item,) = json.loads(index.read_text())
    write_json(index, [item | {"p_yes": 0.81, "score_kind": kind}])
    assert any(said in axes.get_xlabel() for axes in plot_gallery(run).axes)


def test_equal_rates_do_not_hide_each_other(tmp_path):
    axes = plot_judge(write_run(tmp_path / "run", mode="vlm")).axes[0]
    places = [tuple(line.get_xdata()) for line in axes.get_lines() if len(line.get_xdata()) == 3]
    assert len(places) == len(set(places)) >= 3


def test_names_in_any_script_are_one_line_at_most(monkeypatch):
    """A warning a letter, where no font has them: one for all; a font that has them is taken where it is installed."""
    figure = figures.make_figure(2, 2)[0]
    figure.text(0.1, 0.5, "一号照片 二号照片")
    monkeypatch.setattr(figures, "_wide_fonts", list)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure.savefig(io.BytesIO())
    assert [str(one.message).split(":")[0] for one in said] == ["figures show boxes"]
    monkeypatch.setattr(figures, "_wide_fonts", lambda: ["Last Resort High-Efficiency"])  # it has a sign for each
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO())
