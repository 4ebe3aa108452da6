"""The loop of rounds: truth is paid for, runs repeat and resume, bad input is refused."""

import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import papermill
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.core.files import project_root
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.masks import DecodeRows, MaskStore, make_rows, raw_rows, truth_reader
from vlm_itl.data.scenes import make_scenes
from vlm_itl.data.sources import load_data, toy_images
from vlm_itl.experiment.acceptance import _audit
from vlm_itl.experiment.annotator import Oracle, training_rows
from vlm_itl.experiment.config import Config, make_config, run_path
from vlm_itl.experiment.human_turn import choose
from vlm_itl.experiment.loop import Loop, load_run_data, run_al, run_baseline
from vlm_itl.experiment.pool import Ledger, Pool
from vlm_itl.model.metrics import image_iou
from vlm_itl.model.predict import Inference, evaluate
from vlm_itl.model.recipe import TrainSettings
from vlm_itl.model.scoring import PoolScores, score_pool
from vlm_itl.model.segmenter import MODELS, load_model
from vlm_itl.model.train import fit
from vlm_itl.reports.tracking import read_wandb_file
from vlm_itl.sampler.strategy import Sampler

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = {
    "model": "segformer-nano",
    "proposer": "own",
    "steps": 6,
    "batch_size": 4,
    "image_size": 48,
    "initial": 6,
    "increment": 6,
    "max_labelled": 18,
    "gallery": 2,
    "val_share": 4,
    "keep_models": "all",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A small VOC folder of generated scenes that tests may copy and spoil."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "voc", n_train=34, n_test=4, seed=3)


def run(folder, out, **settings):
    return list(run_al(make_config({**TINY, "dataset": str(folder), "output_dir": str(out), **settings})))


def lines_without_clock(out):
    records = [json.loads(line) for line in (Path(out) / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def weights(out, index):
    return load_file(Path(out) / f"round_{index:03d}" / "model" / "model.safetensors")


def spoil_unpaid(folder, copy, paid, seed=0):
    """Copy a VOC folder and replace the masks of unpaid training images by random classes."""
    shutil.copytree(folder, copy)
    rng = np.random.default_rng(seed)
    spoilt = 0
    for name in (copy / "ImageSets/Segmentation/train.txt").read_text().split():
        if name not in paid:
            path = copy / "SegmentationClass" / f"{name}.png"
            with Image.open(path) as old:
                size, palette = old.size, old.getpalette()
            new = Image.fromarray(rng.integers(0, 21, size[::-1], dtype=np.uint8))
            new.putpalette(palette)
            new.save(path)
            spoilt += 1
    return spoilt


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "al", "strategy": "entropy"},
        {"mode": "al", "strategy": "coreset"},
        {"mode": "vlm", "judge": "always_yes", "policy": "pseudo", "strategy": "margin"},
        {"mode": "vlm", "judge": "always_no", "policy": "triage", "strategy": "least_confidence"},
    ],
    ids=lambda s: "-".join(s.values()),
)
def test_truth_is_paid_for(scenes, tmp_path, settings):
    first = run(scenes, tmp_path / "a", **settings)
    paid = set(first[0].start_ids) | {i for r in first for i in r.selection["ids"]}
    data = load_data(str(scenes), seed=0, val_share=4)
    paid |= set(data.val.with_format(None)["id"][:])
    assert spoil_unpaid(scenes, tmp_path / "spoilt", paid) > 5
    second = run(tmp_path / "spoilt", tmp_path / "b", **settings)
    assert [r.start_ids for r in second] == [r.start_ids for r in first]
    assert [r.selection for r in second] == [r.selection for r in first]
    assert [r.pseudo_ids for r in second] == [r.pseudo_ids for r in first]
    assert [r.metrics for r in second] == [r.metrics for r in first]
    for index in range(3):
        one, two = weights(tmp_path / "a", index), weights(tmp_path / "b", index)
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_same_seed_same_bytes(scenes, tmp_path):
    for name in ("a", "b"):
        run(scenes, tmp_path / name, mode="vlm", judge_options={"accuracy": 0.8})
    assert lines_without_clock(tmp_path / "a") == lines_without_clock(tmp_path / "b")
    run(scenes, tmp_path / "c", mode="vlm", judge_options={"accuracy": 0.8}, seed=1)
    assert lines_without_clock(tmp_path / "a") != lines_without_clock(tmp_path / "c")


def test_runs_may_share_their_data(scenes, tmp_path):
    """Loaded once, or by each for itself: the same rounds. Data that the settings do not name are refused."""
    named = {"dataset": str(scenes), "judge": "mock", "proposer": "simulated"}
    with_judge = make_config({**TINY, **named, "mode": "vlm", "output_dir": str(tmp_path / "shared-judged")})
    data = load_run_data(with_judge)
    for mode in ("al", "vlm"):
        config = make_config({**TINY, **named, "mode": mode, "output_dir": str(tmp_path / f"shared-{mode}")})
        alone = make_config({**TINY, **named, "mode": mode, "output_dir": str(tmp_path / f"alone-{mode}")})
        assert len(list(run_al(config, data))) == len(list(run_al(alone)))
        assert lines_without_clock(tmp_path / f"shared-{mode}") == lines_without_clock(tmp_path / f"alone-{mode}")
    for other in ({"seed": 1}, {"val_share": 3}, {"dataset": "toy"}, {"binary": True}):
        config = make_config({**TINY, **named, "mode": "al", "output_dir": str(tmp_path / "other"), **other})
        with pytest.raises(ConfigError, match="load_run_data"):
            next(run_al(config, data))
    with pytest.raises(ConfigError, match="load_run_data"):
        next(run_al(with_judge, toy_images()))


def test_strategies_share_start_and_first_weights(scenes, tmp_path):
    for name in ("random", "entropy"):
        run(scenes, tmp_path / name, strategy=name)
    one, two = lines_without_clock(tmp_path / "random"), lines_without_clock(tmp_path / "entropy")
    assert one[0]["start_ids"] == two[0]["start_ids"] and one[0]["metrics"] == two[0]["metrics"]
    a, b = weights(tmp_path / "random", 0), weights(tmp_path / "entropy", 0)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["typiclust", "probcover", "coreset"])
def test_cold_start(scenes, tmp_path, kind):
    """Features of the untrained encoder choose the start; truth is not read, every strategy starts alike."""
    first = run(scenes, tmp_path / "a", strategy="random", cold_start=kind)
    by_chance = make_rng(0, "start").permutation(30)
    again = run(scenes, tmp_path / "b", strategy="entropy", cold_start=kind)
    assert first[0].start_ids == again[0].start_ids and first[0].metrics == again[0].metrics
    assert len(set(first[0].start_ids)) == 6
    data = load_data(str(scenes), seed=0, val_share=4)
    ids = sorted(data.train.with_format(None)["id"][:])
    assert set(first[0].start_ids) <= set(ids) and set(first[0].start_ids) != {ids[i] for i in by_chance[:6]}
    paid = set(first[0].start_ids) | {i for r in first for i in r.selection["ids"]}
    spoil_unpaid(scenes, tmp_path / "spoilt", paid | set(data.val.with_format(None)["id"][:]))
    spoilt = run(tmp_path / "spoilt", tmp_path / "c", strategy="random", cold_start=kind)
    assert spoilt[0].start_ids == first[0].start_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "badge"},
        {"strategy": "bald", "strategy_options": {"rounds": 2}},
        {"strategy": "judge-none-top", "mode": "vlm", "policy": "observe", "judge_options": {"accuracy": 0.8}},
        {"strategy": "judge-none-top", "mode": "vlm", "policy": "observe", "proposer": "simulated"},  # no pass is made
    ],
    ids=["badge", "ensemble", "judge", "judge of masks from elsewhere"],
)
def test_new_scores_resume(scenes, tmp_path, settings):
    """What a strategy needs from earlier rounds is there again after a stop."""
    whole = run(scenes, tmp_path / "whole", **settings)
    config = make_config({**TINY, "dataset": str(scenes), "output_dir": str(tmp_path / "cut"), **settings})
    rounds = run_al(config)
    next(rounds)
    rounds.close()
    assert len(list(run_al(config))) == 3
    assert lines_without_clock(tmp_path / "whole") == lines_without_clock(tmp_path / "cut")
    if settings["strategy"].startswith("judge"):
        for record in whole[:2]:
            lines = (tmp_path / f"whole/round_{record.index:03d}/judgements.jsonl").read_text().splitlines()
            said = {j["id"]: j["verdict"] for j in map(json.loads, lines)}
            wrong = sorted(i for i, verdict in said.items() if verdict == "no")
            k = len(record.selection["ids"])
            assert record.selection["ids"][: min(k, len(wrong))] == wrong[:k]  # what the judge refused comes first


def first_round(folder, out, **settings):
    """The first round alone, which holds a choice."""
    return Loop.from_config(
        make_config({**TINY, "dataset": str(folder), "output_dir": str(out), **settings})
    ).run_round()


def test_options_reach_their_parts(scenes, tmp_path):
    def chosen(name, strategy, **options):
        return first_round(scenes, tmp_path / name, strategy=strategy, strategy_options=options).selection["ids"]

    base, sharp = chosen("a", "entropy-topk-power"), chosen("b", "entropy-topk-power", beta=1e6)
    top, share = chosen("c", "entropy-topk-top"), chosen("d", "entropy-topk-top", share=1.0)
    assert sharp == top != base and share == chosen("e", "entropy") != top


def test_an_ensemble_of_saved_checkpoints(scenes, tmp_path):
    """`members` are folders in Hugging Face format; BALD then needs no dropout."""
    first_round(scenes, tmp_path / "other", strategy="random", seed=7)
    folder = str(tmp_path / "other" / "round_000" / "model")
    by_dropout = first_round(scenes, tmp_path / "a", strategy="bald")
    by_members = first_round(scenes, tmp_path / "b", strategy="bald", strategy_options={"members": [folder]})
    assert by_dropout.metrics == by_members.metrics
    assert by_dropout.selection["ids"] != by_members.selection["ids"]
    with pytest.raises(ConfigError, match="no/such"):
        first_round(scenes, tmp_path / "c", strategy="bald", strategy_options={"members": ["no/such/folder"]})


@pytest.mark.parametrize("warm", [False, True])
def test_resume_equals_undisturbed(scenes, tmp_path, warm):
    settings = {"mode": "vlm", "judge_options": {"accuracy": 0.8}, "warm_start": warm}
    run(scenes, tmp_path / "whole", **settings)
    config = make_config({**TINY, "dataset": str(scenes), "output_dir": str(tmp_path / "cut"), **settings})
    rounds = run_al(config)
    next(rounds)
    rounds.close()
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert len(list(run_al(config))) == 3
    assert lines_without_clock(tmp_path / "whole") == lines_without_clock(tmp_path / "cut")
    assert (tmp_path / "cut" / "summary.json").exists()


def test_accepted_images_train_on_the_predicted_mask(scenes, tmp_path):
    data = load_data(str(scenes), val_share=4)
    oracle, pool = Oracle(data, Ledger()), Pool([])
    pool = Pool(oracle.ids)
    oracle.label(oracle.ids[:3])
    pool.add_human(oracle.ids[:3])
    model = load_model("segformer-nano", data.labels)
    masks = MaskStore(tmp_path, data.labels)
    score_pool(model, oracle.images, Inference(image_size=48), masks=masks)
    pool.set_pseudo({i: masks.path(i) for i in oracle.ids[2:6]})
    rows = training_rows(pool, oracle)
    assert rows.with_format(None)["id"][:] == oracle.ids[:6]  # a human mask wins over a pseudo-label
    for row in rows:
        truth = oracle.peek_for_simulation(row["id"])
        expected = truth if row["id"] in pool.human else masks[row["id"]]
        assert np.array_equal(row["mask"], expected)
        assert row["id"] in pool.human or image_iou(row["mask"], truth, 21) < 1


def made_up_scores(n=12):
    ids = [f"i{k:02d}" for k in range(n)]
    rng = np.random.default_rng(0)
    scores = {"entropy-mean": rng.random(n).astype(np.float32)}
    embedding = rng.random((n, 4)).astype(np.float32)
    return PoolScores(ids, scores, embedding, np.full((n, 2), 0.5, np.float32))


def test_policies_decide_who_is_next():
    scores = made_up_scores()
    ids = scores.ids
    verdicts = {i: v for i, v in zip(ids, ["yes"] * 4 + ["no"] * 3 + ["abstain"] * 5, strict=True)}
    accepted = [i for i in ids if verdicts[i] == "yes"]
    sampler = Sampler("entropy")

    def pick(policy, k):
        return choose(sampler, scores, Pool(ids), k, verdicts, accepted, policy, make_rng(0, policy))[0]

    assert set(pick("triage", 3)) == set(ids[4:7])
    assert set(pick("triage", 5)[:3]) == set(ids[4:7]) and set(pick("triage", 5)[3:]) <= set(ids[7:])
    assert not set(pick("pseudo", 8)) & set(accepted)
    assert set(pick("pseudo", 10)) >= set(ids[4:])
    top = [ids[i] for i in np.argsort(-scores.scores["entropy-mean"])[:4]]
    assert pick("observe", 4) == top


def test_16_triage_is_not_pseudo():
    """All judged, nothing abstained: the strategy chooses under pseudo, the judge under triage."""
    scores, sampler = made_up_scores(), Sampler("entropy")
    ids = scores.ids
    verdicts = {i: "yes" if n % 3 == 0 else "no" for n, i in enumerate(ids)}
    yes = [i for i in ids if verdicts[i] == "yes"]

    def pick(policy, *more):
        return choose(sampler, scores, Pool(ids), 3, verdicts, yes, policy, make_rng(1, "policy"), *more)[0]

    assert pick("pseudo") != pick("triage") and not {*pick("pseudo"), *pick("triage")} & set(yes)
    p_yes = {i: 0.9 if verdicts[i] == "yes" else 0.4 - n / 100 for n, i in enumerate(ids)}
    assert pick("triage", p_yes) == ["i11", "i10", "i08"]  # the surest rejections


@pytest.mark.drawn
def test_vlm_rounds_hold_every_measure(scenes, tmp_path):
    rounds = run(scenes, tmp_path / "r", mode="vlm", policy="observe", judge_options={"accuracy": 0.9}, tau=0.2)
    wanted = {"agreement_rate", "balanced_accuracy", "sensitivity", "specificity", "kappa", "coverage"}
    for record in rounds:
        assert wanted | {"accepted", "accepted_label_miou", "n"} <= record.judge.keys()
        assert record.judge["n"] == 30 - record.labelled
        assert record.pseudo == 0 and record.pseudo_ids == []
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["simulated"] and len(summary["curve"]["agreement_rate"]) == 3
    assert summary["budget"]["images"] == 18 + 4 and summary["budget"]["judge_calls"] == 24 + 18 + 12
    for name in ("learning_curve", "class_iou", "gallery", "judge"):
        assert (tmp_path / "r" / "figures" / f"{name}.png").stat().st_size > 3000


def test_wandb_offline_holds_the_whole_story(scenes, tmp_path):
    run(scenes, tmp_path / "r", mode="vlm", judge_options={"accuracy": 0.9}, log_with="wandb")
    told = [read_wandb_file(path) for path in sorted((tmp_path / "r" / "wandb").rglob("*.wandb"))]
    assert sorted(one["job_type"] for one in told) == ["round", "round", "round", "summary"]
    assert len({one["group"] for one in told}) == 1
    for one in told:
        if one["job_type"] == "round":
            keys = set(one["summary"]) | {k for row in one["history"] for k in row}
            assert {"val/mean_iou", "val/iou/background", "budget/images", "judge/agreement_rate"} <= keys
            assert {"samples/val", "judge/gallery"} <= {key.split(".")[0] for key in keys}  # pictures
            assert one["config"]["strategy"] == "entropy"
    summary = next(one for one in told if one["job_type"] == "summary")
    keys = set(summary["summary"]) | {k for row in summary["history"] for k in row}
    assert {"curve/val_mean_iou", "curve/test_mean_iou", "curve/agreement_rate", "test/mean_iou"} <= keys


@pytest.mark.parametrize("warm", [False, True])
def test_a_network_of_your_own_runs_whole(scenes, tmp_path, warm, monkeypatch):
    class Pixelwise(torch.nn.Module):  # no Hugging Face network: no config.json, no save_pretrained
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 21, 1)

        def forward(self, pixel_values, output_hidden_states=False):
            hidden = self.body(pixel_values).relu()
            return SimpleNamespace(logits=self.head(hidden), hidden_states=(hidden,))

    monkeypatch.setitem(MODELS, "pixelwise", lambda labels: Pixelwise())
    rounds = run(scenes, tmp_path / "r", model="pixelwise", warm_start=warm)
    assert [r.labelled for r in rounds] == [6, 12, 18]
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["test"]["mean_iou"] is not None
    assert not (tmp_path / "r" / "round_000" / "model" / "config.json").exists()


def test_baseline_and_evaluation_only(scenes, tmp_path):
    base = {k: v for k, v in TINY.items() if k not in ("initial", "increment", "max_labelled")}
    config = make_config(base, dataset=str(scenes), output_dir=str(tmp_path / "b"))
    (record,) = run_baseline(config)
    assert record.labelled == 30 and record.labelled_share == 1 and record.judge is None
    saved = tmp_path / "b" / "round_000" / "model"
    again = make_config(base, dataset=str(scenes), output_dir=str(tmp_path / "e"), model=str(saved), steps=0)
    (evaluated,) = run_baseline(again)
    assert evaluated.metrics["val"] == record.metrics["val"] and evaluated.metrics["steps"] == 0


def test_early_stopping_keeps_the_best(scenes):
    data = load_data(str(scenes), val_share=6)
    model = load_model("segformer-nano", data.labels)
    view = Inference(image_size=48)
    settings = TrainSettings(steps=12, batch_size=4, eval_every=2, early_stopping=2, learning_rate=0.3, warmup=0.0)
    result = fit(model, data.train, settings, view, validation=data.val)
    looks = {h["step"]: h["eval_mean_iou"] for h in result.history if "eval_mean_iou" in h}
    assert result.best_step == max(looks, key=lambda s: (looks[s], -s)) and result.steps <= 12
    assert evaluate(model, data.val, view)["mean_iou"] == pytest.approx(max(looks.values()), abs=1e-9)


def test_the_usual_precision_is_written_down(monkeypatch):
    """bf16 for a probe where the device computes in it; what a run began with is what it is resumed with."""
    for able, found in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("vlm_itl.experiment.config.computes_bf16", lambda device, able=able: able)
        config = make_config(model="probe:somewhere")
        assert config.precision == config.view.precision == config.train_settings.precision == found
        assert make_config(config.to_dict()) == config
        assert make_config(model="probe:somewhere", precision="fp32").precision == "fp32"
        assert make_config(model="cnn-nano").precision == make_config().precision == "fp32"
    assert make_config(config.to_dict()).to_dict()["precision"] == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_train(precision):
    toy = toy_images()
    model = load_model("segformer-nano", toy.labels)
    result = fit(model, toy.train, TrainSettings(steps=4, precision=precision), Inference(64, precision=precision))
    assert np.isfinite(result.train_loss)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_workers_change_nothing(scenes, tmp_path):
    run(scenes, tmp_path / "w0")
    run(scenes, tmp_path / "w2", num_workers=2)
    assert lines_without_clock(tmp_path / "w0") == lines_without_clock(tmp_path / "w2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "active"}, "Allowed: 'baseline', 'al', 'vlm'"),
        ({"strategy": "entropi"}, "entropy"),
        ({"judge": "gpt", "mode": "vlm"}, "mock"),
        ({"judge_options": {"acuracy": 1}, "mode": "vlm"}, "accuracy"),
        ({"policy": "all"}, "observe"),
        ({"initial": 100}, "more images than the pool"),
        ({"max_labelled": 3}, "less than initial"),
        ({"initial": 0.001}, "at least one"),
        ({"model": "no-such-model"}, "segformer-nano"),
        ({"model_options": {"x": 1}}, "takes none"),
        ({"image_size": 0}, "image_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"early_stopping": 3}, "eval_every"),
        ({"device": "tpu"}, "tpu"),
        ({"precision": "fp16"}, "GPU"),
        ({"log_with": "mlflow"}, "wandb"),
        ({"cold_start": "typical"}, "'typiclust'"),
        ({"strategy_options": {"beta": 2}}, "no option 'beta'. Its options: none"),
        ({"strategy": "bald", "strategy_options": {"pases": 2}}, "Did you mean 'passes'"),
        ({"strategy": "judge-none-top"}, "only mode 'vlm'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_settings_get_one_clear_line(scenes, tmp_path, settings, message):
    with pytest.raises(ConfigError) as caught:
        run(scenes, tmp_path / "r", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_another_run_is_left_alone(scenes, tmp_path):
    run(scenes, tmp_path / "r")
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*.json*")}
    with pytest.raises(RunError, match="seed: 0 there, 5 now"):
        run(scenes, tmp_path / "r", seed=5)
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").rglob("*.json*")}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no run"):
        run(scenes, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_broken_file_in_the_middle_loses_nothing(scenes, tmp_path):
    copy = tmp_path / "voc"
    shutil.copytree(scenes, copy)
    whole = run(scenes, tmp_path / "whole")
    late = whole[1].selection["ids"][0]  # paid for after round 1, trained on in round 2
    path = copy / "JPEGImages" / f"{late}.jpg"
    data = path.read_bytes()
    train = [n for n in (copy / "ImageSets/Segmentation/train.txt").read_text().split() if n != late]
    assert train
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=late):
        run(copy, tmp_path / "r")
    path.write_bytes(data)
    run(copy, tmp_path / "r")
    assert lines_without_clock(tmp_path / "r") == lines_without_clock(tmp_path / "whole")


def test_garbage_outside_the_label_space_names_file_and_value(scenes, tmp_path):
    copy = tmp_path / "voc"
    shutil.copytree(scenes, copy)
    first = run(scenes, tmp_path / "first")[0].start_ids[0]
    path = copy / "SegmentationClass" / f"{first}.png"
    with Image.open(path) as old:
        Image.fromarray(np.full(old.size[::-1], 77, dtype=np.uint8)).save(path)
    with pytest.raises(DataError, match=rf"{first}.*77"):
        run(copy, tmp_path / "r")


def test_a_diverging_training_says_so(scenes, tmp_path):
    with pytest.raises((RunError, DataError), match="diverged|not finite"):
        run(scenes, tmp_path / "r", learning_rate=1e30, max_grad_norm=0, warmup=0.0)


def test_run_notebooks_offer_every_setting():
    defaults = Config()
    for name in ("run_al", "run_baseline"):
        found = papermill.inspect_notebook(str(project_root() / "nbs" / f"{name}.ipynb"))
        own = {"twin"} if name == "run_al" else set()  # what the notebook does beside the run
        assert set(found) - set(defaults.to_dict()) == own
        if name == "run_al":
            assert set(found) - own == set(defaults.to_dict())
        for parameter in found.values():
            assert parameter["help"], parameter["name"]


def test_worked_yaml_files():
    sweeps = {"sweep", "slurm"}  # a grid, and what a job of it is
    files = [f for f in sorted((project_root() / "configs").glob("*.yaml")) if f.stem not in sweeps]
    assert {f.stem for f in files} >= {"voc_baseline", "voc_al", "voc_vlm"}
    for path in files:
        settings = yaml.safe_load(path.read_text())
        twin = settings.pop("twin", False)
        config = make_config(settings)
        assert run_path(config) and (config.model.startswith("nvidia/") or (twin and path.stem == "demo"))


CERTIFIED = {
    "mode": "vlm",
    "acceptance": "certified",
    "judge_options": {"accuracy": 1.0},
    "val_share": 14,
    "initial": 5,
    "increment": 5,
    "max_labelled": 15,
    "tau": 0.1,  # after six steps few masks are better
    "alpha": 0.4,
    "delta": 0.6,  # 0.2 a round: five clean ones are enough to begin
}


@pytest.fixture(scope="module")
def certified(scenes, tmp_path_factory):
    """A whole run with certified acceptance: its folder."""
    folder = tmp_path_factory.mktemp("certified") / "whole"
    run(scenes, folder, **CERTIFIED)
    return folder


@pytest.mark.parametrize("by", ["image", "class"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_rates_are_those_of_what_was_accepted(scenes, tmp_path, by, threshold):
    """Reports call them good masks accepted, and good among the accepted; they followed verdicts that did not count."""
    more = {
        "proposer": "simulated",
        "acceptance": "threshold",
        "judge_threshold": threshold,
        "tau": 0.6,
        "preflight": 0,
    }
    if by == "class" and threshold:
        more["judge_options"] = {"accuracy": 0.8}
    (record,) = run(scenes, tmp_path / "run", mode="vlm", accept_by=by, initial=5, max_labelled=5, **more)
    found = record.judge
    if not threshold:  # everything is accepted
        assert found["sensitivity"] == 1.0 and found["specificity"] == 0.0 and found["acceptance"] == 1.0
        assert found["precision"] == found["base_rate"] < 1
    lines = (tmp_path / "run/round_000/judgements.jsonl").read_text().splitlines()
    told = [entry for entry in map(json.loads, lines) if entry["iou"] is not None]
    assert {entry["verdict"] for entry in told} >= {"yes", "no"} or by == "class"  # what was said stays as it was said
    if by == "image":
        good = [entry["iou"] >= 0.6 for entry in told if entry["p_yes"] >= threshold]
        assert found["precision"] == (pytest.approx(np.mean(good)) if good else None)


@pytest.mark.parametrize("by", ["class", "pixels", "image"])
def test_who_checks_a_part_of_a_mask_says_whether_that_part_is_right(scenes, tmp_path, by):
    """What was left out is not missed: whoever looked at right parts called them bad, and they were dropped."""
    more = {"proposer": "simulated", "judge_options": {"accuracy": 1.0}, "tau": 0.6, "initial": 5, "increment": 3}
    more |= {"proposer": "own", "tau": 0.08, "confident": 0.3} if by == "pixels" else {}
    rounds = run(scenes, tmp_path / "run", mode="vlm", accept_by=by, audit=1.0, max_labelled=8, **more)
    audited, tau = rounds[1].judge["audited"], more["tau"]
    data = load_data(str(scenes))
    kept, truth = MaskStore(tmp_path / "run/round_000/accepted", data.labels), truth_reader(data.train)
    wrong = {}
    for name in audited["checked"]:
        mask, true = kept[name], truth(name)
        said = (mask != 255) & (true != 255) if by != "image" else true != 255
        pairs = [
            ((mask == c) & (true == c) & said, ((mask == c) | (true == c)) & said) for c in range(len(data.labels))
        ]
        wrong[name] = np.mean([both.sum() / any_.sum() for both, any_ in pairs if any_.any()]) < tau
    assert len(wrong) > 3 and [i for i in wrong if wrong[i]] == audited["bad"]


def test_nothing_is_wrong_where_all_of_the_truth_is_void(tmp_path):
    """Neither a look at it nor the audit of a certificate calls it bad, as the goal dataset does not."""
    toy = toy_images()
    pixels, size = BytesIO(), toy.train[1]["mask"].shape
    Image.fromarray(np.full(size, 255, np.uint8)).save(pixels, "PNG")
    rows = [{**row, "mask": {"bytes": pixels.getvalue(), "path": None}} for row in raw_rows(toy.train)]
    void = make_rows([row["id"] for row in rows], *([row[name] for row in rows] for name in ("image", "mask")))
    oracle = Oracle(replace(toy, train=void.with_transform(DecodeRows(toy.labels))), Ledger())
    shown = {"toy-1": toy.train[1]["mask"]}
    assert oracle.check("toy-1", shown, 0.9) and oracle.check("toy-1", shown, 0.9, partly=True)
    assert oracle.ledger.checks == 2
    team = SimpleNamespace(config=SimpleNamespace(seed=0, tau=0.9))
    found = _audit(team, SimpleNamespace(rounds=[], ledger=oracle.ledger), ["toy-1"], {"toy-1": float("nan")})
    assert found == {"checked": ["toy-1"], "bad": []} and oracle.ledger.checks == 3


def test_certified_acceptance_is_paid_for_and_recorded(scenes, certified):
    """Every round certifies on the validation masks, charges the questions, and accepts only above the threshold."""
    rounds = run(scenes, certified, **CERTIFIED)
    asked = 0
    for record in rounds:
        made = record.judge["certified"]
        lines = (certified / f"round_{record.index:03d}/calibration.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert len(answers) == 14 and made["n"] == 14 and made["delta"] == pytest.approx(0.2)
        asked += 14 + record.judge["n"]
        assert 0 <= record.budget["judge_calls"] - asked <= 3 * len(rounds)  # an empty mask is asked about once more
        audit = made["audit"]
        assert len(audit["checked"]) == (0 if not record.judge["accepted"] else 1)
        if made["threshold"] is None:
            assert record.judge["accepted"] == 0 and record.pseudo_ids == []
        else:
            assert made["bound"] <= 0.4 and record.judge["accepted"] > 0
        assert not set(record.pseudo_ids) & set(audit["bad"])
    assert any(record.judge["certified"]["threshold"] is not None for record in rounds)
    checks = sum(len(record.judge["certified"]["audit"]["checked"]) for record in rounds)
    budget = rounds[-1].budget
    assert budget["checks"] == checks > 0
    assert budget["human_seconds"] == pytest.approx(239.7 * budget["images"] + 9 * checks)
    assert not (certified / "round_000/held_out").exists()


def test_certified_acceptance_resumes(scenes, certified, tmp_path):
    """Killed after a round and started again: the same lines as undisturbed."""
    rounds = run_al(make_config({**TINY, "dataset": str(scenes), "output_dir": str(tmp_path / "cut"), **CERTIFIED}))
    next(rounds)
    rounds.close()
    (tmp_path / "cut" / ".round_001.tmp" / "held_out").mkdir(parents=True)  # what a kill leaves behind
    again = run(scenes, tmp_path / "cut", **CERTIFIED)
    assert len(again) == 3 and lines_without_clock(tmp_path / "cut") == lines_without_clock(certified)


def test_a_useless_judge_accepts_nothing(scenes, tmp_path):
    """A coin, over masks most of which are bad: no threshold passes, and the record says so."""
    settings = {**CERTIFIED, "tau": 0.9, "judge_options": {"accuracy": 0.5}, "max_labelled": 10}
    for record in run(scenes, tmp_path, **settings):
        assert record.judge["certified"]["threshold"] is None and record.judge["accepted"] == 0
        assert record.pseudo == 0 and record.pseudo_ids == []
        assert record.judge["certified"]["audit"] == {"checked": [], "bad": []}
    for wrong in ({"alpha": 0}, {"delta": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make_config(**wrong)
