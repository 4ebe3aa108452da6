"""A frozen encoder that remembers what it saw: any family, the same from disk as from pixels, whole when saved."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    BertConfig,
    ConvNextConfig,
    Dinov2Config,
    MobileNetV2Config,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    ViTConfig,
)

from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import DecodeRows, MaskStore, make_rows, raw_rows, row_ids
from vlm_itl.data.scenes import make_scenes
from vlm_itl.data.sources import SegData, load_data, toy_images
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import run_al
from vlm_itl.experiment.round import make_learner
from vlm_itl.model.predict import Inference, evaluate, predict_batches
from vlm_itl.model.recipe import TrainSettings
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import MODELS, Segmenter, load_model, load_weights, save_model
from vlm_itl.model.train import try_once
from vlm_itl.probe.features import FeatureCache, MapEncoder, Seen, image_keys, look_once, pack, unpack
from vlm_itl.probe.probe import Probe
from vlm_itl.probe.probe_training import fit_probe
from vlm_itl.sampler.gradient import GradientProbe
from vlm_itl.sampler.region_choice import score_regions
from vlm_itl.sampler.regions import Regions
from vlm_itl.sampler.uncertainty import scoring_options
from vlm_itl.vlm.handler import JudgeQuery, RowPicture, make_handler

LAYERS = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
FAMILIES: dict[str, Any] = {
    "mobilenet_v2": MobileNetV2Config(depth_multiplier=0.25),
    "segformer": SegformerConfig(**STAGES, num_attention_heads=[1, 1, 1, 1]),
    "dinov2": Dinov2Config(**LAYERS, patch_size=14),
    "vit": ViTConfig(**LAYERS, patch_size=16, image_size=64),
    "convnext": ConvNextConfig(**STAGES),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2),
}
VIEW = Inference(64, batch_size=3)
QUICK = TrainSettings(steps=8, batch_size=4)
SMALL = {"head_width": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of a test are its own."""
    monkeypatch.setenv("VLM_ITL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder for each family, with random weights."""
    place = tmp_path_factory.mktemp("encoders")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(place / name)
    return {name: str(place / name) for name in FAMILIES}


@pytest.fixture
def toy() -> SegData:
    """Six images one can count; the last two long and narrow, so that there is padding."""
    return toy_images(64)


@pytest.fixture
def probe(encoders: dict[str, str], toy: SegData) -> Probe:
    """An untrained one."""
    return opened(encoders, toy.labels)


def opened(encoders: dict[str, str], labels: LabelSpace, seed: int = 0, **options: Any) -> Probe:
    """A small probe."""
    model = load_model(f"probe:{encoders['segformer']}", labels, seed, {**SMALL, **options})
    assert isinstance(model, Probe)
    return model


def narrow(labels: LabelSpace, count: int = 3) -> datasets.Dataset:
    """Photographs of several shapes, with masks; noise."""
    rng, images, masks = np.random.default_rng(0), [], []
    place = Path(tempfile.mkdtemp(dir=os.environ["VLM_ITL_CACHE"].removesuffix("cache")))
    for number in range(count):
        shape = [(40, 90), (90, 40), (50, 50)][number % 3]
        coarse = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC).save(place / f"{number}.png")
        Image.fromarray(rng.integers(0, len(labels), shape, dtype=np.uint8)).save(place / f"mask{number}.png")
        images.append(place / f"{number}.png")
        masks.append(place / f"mask{number}.png")
    rows = make_rows([f"n{number}" for number in range(count)], images, masks)
    return rows.with_transform(DecodeRows(labels))


def heads_equal(one: Probe, other: Probe) -> bool:
    """To the last bit."""
    theirs = other.net.head.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.net.head.state_dict().items())


def test_a_confidence_judge_is_told_what_the_probe_remembers(
    probe: Probe, toy: SegData, monkeypatch: pytest.MonkeyPatch
):
    """It looks at no photograph that the pass over the pool has seen, and is as sure as that pass was."""
    fit_probe(probe, toy.train, QUICK, VIEW)
    rows, judge = narrow(toy.labels, 5).remove_columns("mask"), make_handler("confidence")
    drawn = MaskStore(Path(os.environ["VLM_ITL_CACHE"]) / "drawn", toy.labels)
    judge.bind_segmenter(probe, VIEW)
    score_pool(probe, rows, VIEW, drawn, watchers=judge.watchers())
    pictures = [RowPicture(rows, place) for place in range(len(rows))]
    asked = [JudgeQuery(i, p, drawn[i], labels=toy.labels) for i, p in zip(row_ids(rows), pictures, strict=True)]
    watched = judge.judge(asked)
    judge.bind_segmenter(probe, VIEW)  # what was watched is forgotten
    shown_again = judge.judge([replace(query, image=query.image()) for query in asked])
    with monkeypatch.context() as patch:
        patch.setattr(MapEncoder, "forward", lambda *_: pytest.fail("the picture was looked at again"))
        remembered = judge.judge([*asked, replace(asked[0], mask=1 - np.minimum(asked[0].mask, 1))])
    assert [one.p_yes for one in remembered[:-1]] == [one.p_yes for one in watched]
    assert [one.p_yes for one in shown_again] == pytest.approx([one.p_yes for one in watched], abs=2e-3)  # float16
    assert remembered[-1].p_yes != remembered[0].p_yes  # another mask of the same picture


def test_a_confidence_judge_says_which_picture_it_cannot_read(probe: Probe, toy: SegData):
    """One broken file is one question without an answer."""
    rows, judge = narrow(toy.labels, 3), make_handler("confidence")
    Path(raw_rows(rows)[1]["image"]["path"]).write_bytes(b"no picture")
    judge.bind_segmenter(probe, VIEW)
    sizes = [(40, 90), (90, 40), (50, 50)]
    answers = judge.judge(
        JudgeQuery(str(n), RowPicture(rows, n), np.zeros(size, np.uint8), labels=toy.labels)
        for n, size in enumerate(sizes)
    )
    assert [one.verdict == "abstain" for one in answers] == [False, True, False] and answers[1].error
    wrong = judge.judge([JudgeQuery("0", RowPicture(rows, 0), np.zeros((9, 9), np.uint8), labels=toy.labels)])
    assert "differ in size" in wrong[0].error


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_is_read_from_disk_as_from_pixels(family: str, encoders: dict[str, str], toy: SegData):
    """Maps, logits and the embedding are equal to the last bit; trained, saved and loaded again as well."""
    probe = load_model(f"probe:{encoders[family]}", toy.labels, options=SMALL)
    assert isinstance(probe, Probe)
    fit_probe(probe, toy.train, QUICK, VIEW)
    rows = narrow(toy.labels)
    pixels = [(b, logits, f) for b, logits, f in predict_batches(Looked(probe), rows, VIEW, features=True)]
    stored = list(predict_batches(probe, rows, VIEW, features=True))
    for (one, logits, maps), (other, kept, kept_maps) in zip(pixels, stored, strict=True):
        assert [one[k] for k in ("id", "box", "native")] == [other[k] for k in ("id", "box", "native")]
        assert torch.allclose(logits, kept, atol=2e-3) and torch.allclose(maps, kept_maps, atol=2e-3)
        assert (logits.argmax(1) == kept.argmax(1)).float().mean() >= 0.999
        assert all(np.array_equal(a, b) for a, b in zip(one["mask"], other["mask"], strict=True))


def Looked(probe: Probe) -> Segmenter:  # noqa: N802
    """The same network without a memory."""
    return Segmenter(probe.net, probe.labels, probe.norm, "looked")


def test_what_has_no_maps_is_refused(tmp_path: Path, toy: SegData):
    words = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    AutoModel.from_config(BertConfig(**words)).save_pretrained(tmp_path / "bert")
    for name, message in (
        (str(tmp_path / "bert"), "no encoder of pictures|no feature maps"),
        ("", "needs an encoder"),
        (str(tmp_path), "no config.json"),
        ("segformer-nano", "neither built in"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            load_model(f"probe:{name}", toy.labels)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="head_width"):
        load_model("probe:x", toy.labels, options={"head_width": 1.5})
    assert "probe:" in list(MODELS) and "probe:anything" in MODELS


def test_a_segmenter_lends_its_encoder(tmp_path: Path, toy: SegData):
    """Its own head is left out; the encoder's weights are its."""
    whole = SegformerForSemanticSegmentation(FAMILIES["segformer"])
    whole.save_pretrained(tmp_path / "whole")
    probe = load_model(f"probe:{tmp_path / 'whole'}", toy.labels, options=SMALL)
    theirs = whole.segformer.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in probe.net.encoder.net.state_dict().items())


def test_rows_of_numbers_are_taken_apart_again():
    maps = [torch.randn(2, 3, 4, 5).half().float(), torch.randn(2, 2, 1, 2).half().float()]
    assert all(torch.equal(a, b) for a, b in zip(maps, unpack(pack(maps), [3, 2]), strict=True))
    with pytest.raises(ConfigError, match="another encoder"):
        unpack(pack(maps), [3, 3])


def test_the_cache_knows_contents(tmp_path: Path, probe: Probe):
    """Another picture under the same name, another size: other files. A copy of a picture: the same."""
    rows = narrow(probe.labels)
    keys = image_keys(rows, VIEW, probe.made_by)
    assert keys == image_keys(raw_rows(rows), VIEW, probe.made_by) and len(set(keys)) == 3
    paths = [Path(row["image"]["path"]) for row in raw_rows(rows)]
    paths[1].write_bytes(paths[0].read_bytes())
    again = image_keys(rows, VIEW, probe.made_by)
    assert again == [keys[0], keys[0], keys[2]]
    for other in (Inference(32), Inference(64, resize="stretch")):
        assert not {*keys} & {*image_keys(rows, other, probe.made_by)}
    assert image_keys(rows, Inference(64, batch_size=1), probe.made_by) == again
    memory = datasets.Dataset.from_dict({"id": ["a"], "image": [{"path": None, "bytes": paths[0].read_bytes()}]})
    assert image_keys(memory, VIEW, probe.made_by) == keys[:1]


def test_a_broken_file_is_made_anew_and_a_missing_picture_named(probe: Probe):
    rows = narrow(probe.labels)
    first = score_pool(probe, rows, VIEW)
    keys = image_keys(rows, VIEW, probe.made_by)
    for key, content in zip(keys, (b"", probe.cache.path(keys[1]).read_bytes()[:-30], None), strict=True):
        if content is not None:
            probe.cache.path(key).write_bytes(content)
    with zipfile.ZipFile(probe.cache.path(keys[2]), "w") as file:
        file.writestr("features.npy", b"no array")
    assert np.array_equal(score_pool(probe, rows, VIEW).scores["entropy-mean"], first.scores["entropy-mean"])
    assert all(probe.cache.read(key) is not None for key in keys)
    Path(raw_rows(rows)[0]["image"]["path"]).unlink()
    with pytest.raises(DataError, match="0.png"):
        score_pool(probe, rows, VIEW)


def test_the_cache_stays_within_its_bound(tmp_path: Path):
    cache = FeatureCache(tmp_path, gigabytes=3e-6)
    for number, key in enumerate(("aa", "bb", "cc")):
        cache.write(key, Seen(np.zeros(200, np.float16), (1, 1), (1, 1)))
        os.utime(cache.path(key), (number, number))
    cache.touch(["aa"])
    size = cache.path("aa").stat().st_size
    cache.make_room(3000 - 2 * size, keep=["dd"])
    assert [cache.path(key).exists() for key in ("aa", "bb", "cc")] == [True, False, True]
    with pytest.raises(ConfigError, match="cache_gb"):
        cache.make_room(3000 - size, keep=["aa", "cc"])
    with pytest.raises(ConfigError, match="cache_gb"):
        FeatureCache(tmp_path, gigabytes=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot keep features"):
        FeatureCache(tmp_path / "file").write("aa", Seen(np.zeros(2, np.float16), (1, 1), (1, 1)))


def test_two_processes_fill_one_cache(tmp_path: Path):
    """Both end, and the files are those of one."""
    toy, cache = toy_images(64), FeatureCache(tmp_path / "both")

    def brightest(pixels: torch.Tensor) -> torch.Tensor:  # what a forked process may compute
        return torch.from_numpy(pixels.numpy().max((2, 3)).astype(np.float16))

    def fill() -> None:
        for number in range(40):
            look_once(toy.train, VIEW, cache, bytes([number]), brightest)

    running = [multiprocessing.get_context("fork").Process(target=fill) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=300)
    assert [process.exitcode for process in running] == [0, 0]
    keys = [key for number in range(40) for key in image_keys(toy.train, VIEW, bytes([number]))]
    assert all(cache.read(key) is not None for key in keys)
    assert {path.suffix for path in cache.folder.rglob("*") if path.is_file()} == {".npz", ".lock"}


def test_everything_that_looks_at_a_pool_works_from_memory(probe: Probe, tmp_path: Path, monkeypatch: Any):
    """Scores of one look and of several, gradients, regions, evaluation: no photograph is opened."""
    rows, store = narrow(probe.labels), MaskStore(tmp_path / "masks", probe.labels)
    member = opened({"segformer": probe.name.removeprefix("probe:")}, probe.labels, seed=1)
    probe.seen(rows, VIEW)
    covers = Regions(rows, "window", side=32)
    for image_id in row_ids(rows):
        covers.areas(image_id)  # regions look at photographs for themselves
    monkeypatch.setattr("vlm_itl.data.transforms.read_image", None)
    monkeypatch.setattr(Probe, "encode", None)
    keys = ["entropy-topk", "margin-boundary", "bald-mean", "variation_ratio-mean", "expected_entropy-patch_max"]
    found = score_pool(probe, rows, VIEW, masks=store, probe=GradientProbe(), **scoring_options(keys, passes=3))
    assert {*keys} <= {*found.scores} and found.gradient is not None and found.embedding.shape == (3, 32)
    assert store["n0"].shape == (40, 90) and store["n1"].shape == (90, 40)
    assert found.scores["bald-mean"].max() > 0  # the dropout of the head
    several = score_pool(probe, rows, VIEW, **scoring_options(["bald-mean"], members=[member]))
    assert several.scores["bald-mean"].max() > 0
    assert 0 <= evaluate(probe, rows, VIEW)["mean_iou"] < 1
    for key in ("entropy-topk", "bald-mean"):
        parts = score_regions(probe, rows, covers, VIEW, key=key, looks={"passes": 3})
        assert len(parts) > 3 and np.isfinite(parts.scores[key]).all()
    assert sum(p.requires_grad for p in probe.parameters()) == len(list(probe.net.head.parameters()))


def test_a_training_is_the_same_every_time(encoders: dict[str, str], toy: SegData):
    """Whatever the cache held, whatever else was drawn; another seed is another training."""
    settings = TrainSettings(steps=10, batch_size=3)
    runs = []
    for number, seed in enumerate((0, 0, 0, 1)):
        probe = opened(encoders, toy.labels)
        if number == 1:  # half of it is gone
            for key in image_keys(toy.train, VIEW, probe.made_by)[:2]:
                probe.cache.path(key).unlink()
        torch.rand(number)
        state = torch.get_rng_state()
        fit_probe(probe, toy.train, settings, Inference(64, batch_size=1 + number), seed=seed)
        assert torch.equal(state, torch.get_rng_state()) and not probe.training
        runs.append(probe)
    assert heads_equal(runs[0], runs[1]) and heads_equal(runs[0], runs[2]) and not heads_equal(runs[0], runs[3])


def test_settings_and_data_that_make_no_sense(probe: Probe, toy: SegData):
    for settings in ({"crop": 0.5}, {"augment": {"jitter": 0.1}}, {"scheduler": "cosine"}, {"head_scale": 2.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}=.*means nothing to a probe"):
            fit_probe(probe, toy.train, TrainSettings(**settings), VIEW)
    with pytest.raises(DataError, match="nothing to train on"):
        fit_probe(probe, toy.train.select([]), QUICK, VIEW)
    with pytest.raises(ConfigError, match="eval_every"):
        fit_probe(probe, toy.train, TrainSettings(eval_every=2), VIEW)
    with pytest.raises(RunError, match="diverged at step"):
        fit_probe(probe, toy.train, TrainSettings(steps=20, learning_rate=1e30), VIEW)
    assert fit_probe(probe, toy.train, TrainSettings(steps=0), VIEW).steps == 0


def test_few_steps_and_validation(encoders: dict[str, str], toy: SegData):
    for steps in (1, 2, 3):
        result = fit_probe(opened(encoders, toy.labels), toy.train, TrainSettings(steps=steps), VIEW)
        assert result.steps == steps and math.isfinite(result.train_loss) and result.best_step is None
    probe = opened(encoders, toy.labels)
    result = fit_probe(probe, toy.train, TrainSettings(steps=6, eval_every=2), VIEW, validation=toy.val)
    looks = {entry["step"]: entry["eval_mean_iou"] for entry in result.history if "eval_mean_iou" in entry}
    assert list(looks) == [2, 4, 6] and looks[result.best_step] == max(looks.values())
    assert evaluate(probe, toy.val, VIEW)["mean_iou"] == max(looks.values())


def test_weights_and_order_are_heard(encoders: dict[str, str], toy: SegData):
    """A pseudo-label of weight 0 is never drawn, so its mask teaches nothing; `extra` counts."""

    def trained(rows: datasets.Dataset, mixture: dict[str, Any] | None = None, **more: Any) -> Probe:
        probe = opened(encoders, toy.labels, head_dropout=0.0)
        with torch.no_grad():
            probe.net.head.measured.fill_(True)  # else the maps of all rows set the scale
        fit_probe(probe, rows, replace(QUICK, mixture=mixture or {}), VIEW, **more)
        return probe

    raw = raw_rows(toy.train)

    def judged(rows: datasets.Dataset, sure: float) -> datasets.Dataset:
        rows = raw_rows(rows).add_column("human", [True, True, False, True])
        return rows.add_column("p_yes", [1.0, 1.0, sure, 1.0]).with_transform(DecodeRows(toy.labels))

    spoilt = raw.map(lambda row, i: {**row, "mask": raw[0]["mask"]} if i == 2 else row, with_indices=True)
    spoilt = spoilt.cast(raw.features).with_transform(DecodeRows(toy.labels))
    heard = {"weight_by": "p_yes"}
    assert heads_equal(trained(judged(toy.train, 0.5)), trained(toy.train))
    assert heads_equal(trained(judged(toy.train, 0.0), heard), trained(judged(spoilt, 0.0), heard))
    assert not heads_equal(trained(judged(toy.train, 0.5), heard), trained(judged(toy.train, 1.0), heard))
    shifted = trained(toy.train, extra=lambda probe, step: 0.1 * probe.net.head.classify.bias.sum())
    assert not heads_equal(shifted, trained(toy.train))


def test_a_saved_probe_is_a_whole_model(probe: Probe, toy: SegData, tmp_path: Path):
    """From its folder alone, with its head; a copy shares the encoder; a head for other classes keeps known rows."""
    fit_probe(probe, toy.train, QUICK, VIEW)
    save_model(probe, tmp_path / "m", 64, "keep", [row["image"] for row in narrow(toy.labels)])
    again = load_model(str(tmp_path / "m"), toy.labels)
    assert isinstance(again, Probe) and heads_equal(again, probe) and again.made_by == probe.made_by
    readme = (tmp_path / "m" / "README.md").read_text()
    assert "load_model(folder" in readme and "{" not in readme
    code = readme.split("```")[1].removeprefix("python").replace('Image.open("...")', "picture")
    names: dict[str, Any] = {"picture": toy.train[1]["image"]}
    exec(code.replace('"..."', repr(str(tmp_path / "m"))), names)  # what the folder says of itself
    assert names["mask"].shape == (64, 64)
    copied = copy.deepcopy(probe)
    assert copied.net.encoder is probe.net.encoder
    fit_probe(copied, toy.train, QUICK, VIEW, seed=3)
    assert not heads_equal(copied, probe) and heads_equal(load_weights(copied, tmp_path / "m"), probe)
    other = load_model(str(tmp_path / "m"), LabelSpace(("blue", "green", "background")))
    assert torch.equal(other.net.head.classify.weight[[2, 0]], probe.net.head.classify.weight[[0, 2]])
    with pytest.raises(ConfigError, match="another probe"):
        load_weights(other, tmp_path / "m")


def test_broken_folders_are_named(probe: Probe, toy: SegData, tmp_path: Path):
    folder = save_model(probe, tmp_path / "m")
    about = json.loads((folder / "vlm_itl.json").read_text())
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name, content, message in (
        ("head.safetensors", b"", "head.safetensors cannot be read"),
        ("vlm_itl.json", b"{", "not readable JSON"),
        ("vlm_itl.json", json.dumps({**about, "model": "prob:"}).encode(), "no kind of model"),
        ("vlm_itl.json", json.dumps({**about, "head_width": 8}).encode(), "does not fit"),
        ("vlm_itl.json", json.dumps({**about, "head_width": "wide"}).encode(), "head_width"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises((ConfigError, RunError), match=message) as caught:
            load_model(str(folder), toy.labels)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(whole[name])


def test_trying_a_probe_changes_nothing(probe: Probe):
    before = copy.deepcopy(probe.state_dict())
    try_once(probe, QUICK, VIEW, 10)
    assert all(torch.equal(value, before[key]) for key, value in probe.state_dict().items())


SCENES = {"n_train": 16, "n_test": 4}
RUN: dict[str, Any] = {
    "mode": "al", "val_share": 2, "image_size": 64, "steps": 6, "batch_size": 4, "gallery": 0,
    "initial": 4, "increment": 2, "max_labelled": 8, "model_options": SMALL, "keep_models": "all",
}  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_a_run_with_a_probe(encoders: dict[str, str], tmp_path: Path):
    """Three rounds; stopped between, and with garbage in masks that nobody paid for, the same; its models are whole."""
    settings = {**RUN, "model": f"probe:{encoders['segformer']}", "strategy": "bald"}

    voc = make_scenes(tmp_path / "voc", **SCENES)

    def run(name: str) -> Iterator[Any]:
        yield from run_al(make_config({**settings, "dataset": str(voc), "output_dir": str(tmp_path / name)}))

    rounds = list(run("one"))
    assert len(rounds) == 3
    stopped = run("two")
    next(stopped)
    stopped.close()
    list(run("two"))  # goes on where it stopped
    paid = {i for one in rounds for i in (*one.start_ids, *one.selection["ids"])}
    unpaid = {*row_ids(load_data(str(voc), val_share=2).train)} - paid
    for image_id in unpaid:
        path = next(voc.rglob(f"SegmentationClass/{image_id}.png"))
        mask = Image.open(path)
        garbage = Image.fromarray(np.random.default_rng(0).permuted(np.asarray(mask), axis=0)).convert("P")
        garbage.putpalette(mask.getpalette())
        garbage.save(path)
    list(run("three"))
    found = [(tmp_path / name / "rounds.jsonl").read_text().splitlines() for name in ("one", "two", "three")]
    plain = [[{**json.loads(line), "seconds": None} for line in part] for part in found]
    assert len(unpaid) == 6 and plain[0] == plain[1] == plain[2]
    models = sorted(tmp_path.glob("one/**/vlm_itl.json"))
    assert models
    labels = LabelSpace(json.loads(models[-1].read_text())["classes"])
    assert isinstance(load_model(str(models[-1].parent), labels), Probe)


def test_members_see_with_the_same_eyes(encoders: dict[str, str], toy: SegData):
    settings = {**RUN, "model": f"probe:{encoders['segformer']}", "strategy": "bald"}
    good = make_config({**settings, "strategy_options": {"members": [settings["model"]]}})
    assert len(make_learner(good, toy.labels, 4).members) == 1
    for member in ("segformer-nano", f"probe:{encoders['convnext']}"):
        with pytest.raises(ConfigError, match="same encoder"):
            make_learner(make_config({**settings, "strategy_options": {"members": [member]}}), toy.labels, 4)
    with pytest.raises(ConfigError, match="means nothing to a probe"):
        make_learner(make_config({**settings, "crop": 0.5}), toy.labels, 4)


def test_real_photographs_from_memory_as_from_pixels(voc: Path, weights: Path, tmp_path: Path):
    """A pretrained MobileNetV2: masks at the size of the photographs agree on .999 of the pixels, padded or not."""
    labels = LabelSpace.voc()
    ids = (voc / "ImageSets/Segmentation/train.txt").read_text().split()[:4]
    files = [
        [voc / folder / f"{i}.{kind}" for i in ids]
        for folder, kind in (("JPEGImages", "jpg"), ("SegmentationClass", "png"))
    ]
    rows = make_rows(ids, *files).with_transform(DecodeRows(labels))
    probe = load_model(f"probe:{weights / 'mobilenet-v2-imagenet'}", labels)
    assert isinstance(probe, Probe) and probe.net.head.channels == [32, 96, 320]
    for resize in ("keep", "stretch"):
        view = Inference(128, resize)
        result = fit_probe(probe, rows, TrainSettings(steps=12, batch_size=4), view)
        assert result.history[-1]["loss"] < result.history[0]["loss"]
        stores = [MaskStore(tmp_path / f"{resize}{number}", labels) for number in range(2)]
        folder = save_model(probe, tmp_path / resize, 128, resize)
        for model, store in ((probe, stores[0]), (Looked(load_model(str(folder), labels)), stores[1])):
            score_pool(model, rows, view, masks=store)
        same = [np.mean(stores[0][i] == stores[1][i]) for i in row_ids(rows)]
        assert min(same) >= 0.999
    assert MapEncoder(probe.net.encoder.net).fingerprint() == probe.net.encoder.fingerprint()
