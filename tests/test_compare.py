"""Paired statistics over runs made up with known differences."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from test_report import study, write_run

from vlm_itl.core.checks import ConfigError, RunError
from vlm_itl.core.files import write_json
from vlm_itl.reports.compare import compare, holm, paired_interval, plot_compare
from vlm_itl.reports.report import list_runs, read_run


def test_holm_against_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(6) ** 3
        order = np.argsort(p)
        expected = np.empty(6)
        expected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(6, 0, -1)))
        np.testing.assert_allclose(holm(p.tolist()), expected)
    assert math.isnan(holm([math.nan, 0.2])[0]) and holm([math.nan, 0.2])[1] == 0.2 and holm([]) == []


def test_interval_equals_scipy():
    differences = np.random.default_rng(1).normal(0.02, 0.01, 12)
    ours = paired_interval(differences, resamples=20_000)
    theirs = stats.bootstrap((differences,), np.mean, n_resamples=20_000, method="percentile", rng=2)
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=3e-4)
    assert all(math.isnan(v) for v in paired_interval([0.1]))


def test_compare_finds_the_planted_difference(tmp_path):
    runs = study(tmp_path)
    result = compare(runs)
    row = result.table.iloc[0]
    scale = 7 / 12 * (0.05 / 2 + 0.05) / 2  # mean of the three classes; trapezoids over 0, g, g
    planted = [scale * (0.05 + 0.002 * s) / 0.05 for s in range(5)]
    assert row["strategy"] == "entropy" and row["n"] == 5 and row["wins"] == 5
    np.testing.assert_allclose(sorted(result.pairs["difference"]), planted, atol=1e-12)
    assert row["low"] <= row["difference"] <= row["high"] and row["low"] > 0
    peer = stats.ttest_rel(result.pairs["value"], result.pairs["baseline_value"])
    assert row["p"] == row["p_holm"] == pytest.approx(peer.pvalue)
    assert result.notes == [] and "entropy" in str(result) and "<table" in result._repr_html_()
    again = compare([run.path for run in reversed(runs)])
    assert again.table.equals(result.table)


def test_compare_pairs_by_seed_not_by_order(tmp_path):
    runs = study(tmp_path)
    shuffled = [runs[i] for i in np.random.default_rng(0).permutation(len(runs))]
    ours = compare(runs).pairs.sort_values("seed")["difference"].to_numpy()
    np.testing.assert_allclose(compare(shuffled).pairs.sort_values("seed")["difference"].to_numpy(), ours)


def test_compare_names_what_is_left_out(tmp_path):
    runs = study(tmp_path / "study")
    runs = [run for run in runs if run.name not in ("random-1", "entropy-2")]
    runs.append(read_run(write_run(tmp_path / "going-on", strategy="entropy", seed=7, finished=False)))
    runs.append(read_run(write_run(tmp_path / "full", mode="baseline", levels=(0.9,))))
    result = compare(runs)
    assert result.pairs["seed"].tolist() == [0, 3, 4]
    notes = " ".join(result.notes)
    assert "going-on is not finished" in notes and "full supervision" in notes
    assert "random has no run of seed 1" in notes and "entropy has no run of seed 2" in notes
    assert "fewer than 5" in notes


def test_compare_one_seed_has_no_interval(tmp_path):
    result = compare(study(tmp_path, seeds=[3]))
    row = result.table.iloc[0]
    assert math.isnan(row["low"]) and math.isnan(row["p"]) and row["difference"] > 0
    assert plot_compare(result).axes[0].get_yticklabels()[0].get_text() == "entropy (n = 1)"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 99}, "differ in steps: 10 and 99"),
        ({"image_size": 64}, "differ in image_size"),
    ],
)
def test_compare_refuses_other_recipes(tmp_path, change, says):
    runs = study(tmp_path / "study", seeds=range(2))
    odd = read_run(write_run(tmp_path / "odd", strategy="margin", seed=0, **change))
    with pytest.raises(RunError, match=says):
        compare([*runs, odd])


def test_compare_refuses_what_is_no_pair(tmp_path):
    runs = study(tmp_path / "study", seeds=range(2))
    with pytest.raises(RunError, match="both 'entropy' with seed 0"):
        compare([*runs, runs[0]])
    with pytest.raises(RunError, match="none of the runs is 'coreset'"):
        compare(runs, baseline="coreset")
    with pytest.raises(RunError, match="no run shares a seed"):
        compare([run for run in runs if run.name in ("random-0", "entropy-1")])
    runs[0].rounds[0]["start_ids"] = ["another image"]
    with pytest.raises(RunError, match="other start images"):
        compare(runs)
    with pytest.raises(RunError, match="no finished runs"):
        compare(write_run(tmp_path / "x", finished=False))


def stamp_files(run, **changed):
    "What a run notes of its files; `changed`: id -> hash of its mask."
    names = ["a", "b"]
    image = {"size": [9, 9], "written": [1, 2], "changed": [0, 0], "hash": ["", ""]}
    mask = {"size": [5, 5], "hash": [changed.get(name, name * 32) for name in names]}
    write_json(run.path / "stamps.json", {"test": {"ids": names, "image": image, "mask": mask}})


def test_compare_refuses_a_data_set_that_has_changed(tmp_path):
    """A folder keeps its name when a mask of its test split is mended, and the settings are the same."""
    runs = study(tmp_path, seeds=range(2))
    for run in runs:
        stamp_files(run)
    assert compare(runs).notes == ["fewer than 5 pairs for entropy: too few for a claim."]
    stamp_files(runs[0], b="")  # not hashed: nothing speaks against it
    assert len(compare(runs).pairs) == 2
    stamp_files(runs[0], b="mended")
    with pytest.raises(RunError, match="no pair, they were measured on other test files, such as those of b"):
        compare(runs)
    assert compare(runs, metric="val").pairs["seed"].tolist() == [0, 1]
    stamp_files(runs[0])
    (runs[0].path / "stamps.json").write_text("{")  # not known: nothing speaks against it either
    for run in runs:
        run.data["sizes"] = {"test": 2}
    assert len(compare(runs).pairs) == 2
    runs[0].data["sizes"] = {"test": 3}
    with pytest.raises(RunError, match="measured on 2 and 3 test images|measured on 3 and 2 test images"):
        compare(runs)
    runs[0].data["sizes"] = {"test": 2}
    runs[0].summary["labels"] = ["background", "dog", "cat"]
    with pytest.raises(RunError, match="measured on other classes"):
        compare(runs)


def test_compare_says_where_budgets_have_nothing_in_common(tmp_path):
    write_run(tmp_path / "one", (0.4, 0.5, 0.6))
    write_run(tmp_path / "two", (0.5,), strategy="entropy")
    with pytest.raises(RunError, match=r"no range of budgets is common to all runs .two ends at 10.0%"):
        compare(list_runs(tmp_path))
    notes = compare(list_runs(tmp_path), measure="final").notes
    assert notes[0] == "budgets differ: the last rounds are at 10.0% to 30.0% of the pool."


def test_compare_without_test_metrics_points_to_val(tmp_path):
    runs = study(tmp_path, seeds=range(2), tests=False)
    with pytest.raises(RunError, match="metric='val'"):
        compare(runs)
    assert compare(runs, metric="val").metric == "val_mean_iou"
    runs[0].rounds[1]["metrics"]["val"] = None
    with pytest.raises(RunError, match="metric='test'"):
        compare(runs, metric="val")
    runs[0].rounds[1]["metrics"]["val"] = runs[1].rounds[1]["metrics"]["val"]
    assert compare(runs, metric="test", measure="final").measure == "final"


def test_compare_judges_and_policies(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"al-{seed}", seed=seed)
        for policy in ("observe", "pseudo"):
            write_run(
                tmp_path / f"{policy}-{seed}",
                (0.5, 0.7, 0.9),
                mode="vlm",
                seed=seed,
                policy=policy,
                judge_options={"accuracy": 0.9},
            )
    result = compare(list_runs(tmp_path))
    assert result.baseline == "random"
    assert set(result.table["strategy"]) == {
        "random, simulated mock judge (observe)",
        "random, simulated mock judge (pseudo)",
    }


def test_compare_over_the_common_budget(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"a-{seed}", (0.4, 0.4, 0.4), seed=seed)
        write_run(tmp_path / f"b-{seed}", (0.4, 0.4, 0.4, 0.9), seed=seed, strategy="margin")
    result = compare(list_runs(tmp_path))
    assert result.table["difference"][0] == pytest.approx(0.0) and result.table["p"][0] == 1.0
    assert "common range, 10.0% to 30.0%" in result.notes[0]


def test_compare_wilcoxon_and_final(tmp_path):
    runs = study(tmp_path)
    assert compare(runs, test="wilcoxon").table["p"][0] == pytest.approx(0.0625)
    final = compare(runs, measure="final").pairs["difference"]
    np.testing.assert_allclose(final, [7 / 12 * (0.05 + 0.002 * s) for s in range(5)])
    with pytest.raises(ConfigError, match="measure"):
        compare(runs, measure="best")


def test_no_warnings_on_the_way(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_compare(compare(study(tmp_path))).savefig(tmp_path / "x.png")
