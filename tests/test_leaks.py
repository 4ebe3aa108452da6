"""Planted leaks that are caught: copies in two splits, unpaid truth, the test split read early, unpaid validation."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, concatenate_datasets
from datasets import Image as ImageColumn
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader

import vlm_itl.leaks as leaks_module
from vlm_itl.core import DataError, LeakError, VlmItlError
from vlm_itl.corruption import truth_reader
from vlm_itl.data import check_data, load_data, raw_rows, row_ids
from vlm_itl.experiment import Experiment, run_al
from vlm_itl.labels import DecodeRows, make_rows, read_image
from vlm_itl.leaks import (
    SAME,
    bits_apart,
    check_apart,
    check_leaks,
    difference,
    find_twins,
    look_over,
    looks_file,
    seal,
    take_look,
)
from vlm_itl.pool import Ledger, mask_pixels
from vlm_itl.sampler import Sampler
from vlm_itl.scenes import SceneOptions, draw_scene, make_scenes
from vlm_itl.settings import make_config
from vlm_itl.train import Inference, TrainSettings, evaluate, fit
from vlm_itl.transforms import EvalTransform, TrainingSet, TrainTransform

TINY = {
    "steps": 2,
    "batch_size": 2,
    "image_size": 48,
    "initial": 3,
    "increment": 2,
    "max_labelled": 5,
    "val_share": 4,
    "gallery": 0,
}


# --- copies


def encoded(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def resized(picture: Image.Image, factor: float) -> Image.Image:
    """A picture of another size."""
    return picture.resize((round(picture.width * factor), round(picture.height * factor)))


def turned(picture: Image.Image, quality: int = 90) -> bytes:
    """A quarter turn in the pixels, taken back by the EXIF note."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture.transpose(Image.Transpose.ROTATE_90), quality=quality, exif=exif)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "q60": lambda p: encoded(p, quality=60),
    "q95": lambda p: encoded(p, quality=95),
    "png": lambda p: encoded(p, "PNG"),
    "webp": lambda p: encoded(p, "WEBP", quality=75),
    "half": lambda p: encoded(resized(p, 0.5), quality=90),
    "larger": lambda p: encoded(resized(p, 1.7), quality=90),
    "square": lambda p: encoded(p.resize((256, 256)), quality=90),
    "flipped": lambda p: encoded(ImageOps.mirror(p), quality=90),
    "flipped small q60": lambda p: encoded(resized(ImageOps.mirror(p), 0.6), quality=60),
    "flipped half png": lambda p: encoded(resized(ImageOps.mirror(p), 0.5), "PNG"),
    "exif": turned,
}


def looked(files: list[bytes]) -> np.ndarray:
    """The looks of some files."""
    return np.array([take_look(data) for data in files])


def is_twin(one: np.ndarray, other: np.ndarray) -> bool:
    """Are these two looks the same picture?"""
    return bool(find_twins((["a"], one[None]), (["b"], other[None])))


@pytest.fixture(scope="module")
def photographs(voc: Path) -> list[Path]:
    """Twenty photographs of VOC."""
    names = (voc / "ImageSets/Segmentation/trainval.txt").read_text().split()
    return [voc / "JPEGImages" / f"{name}.jpg" for name in names[:: len(names) // 20][:20]]


def test_planted_copies_of_photographs_are_found(
    photographs: list[Path], record_property: Callable[[str, object], None]
) -> None:
    """Every way to copy, against all twenty, is found, and finds its own original only."""
    originals = looked([path.read_bytes() for path in photographs])
    ids = [path.stem for path in photographs]
    found = 0
    for copy in COPIES.values():
        copies = looked([copy(read_image(str(path))) for path in photographs])
        twins = find_twins((ids, originals), ([f"copy {name}" for name in ids], copies))
        assert {(twin.first, twin.second) for twin in twins} == {(name, f"copy {name}") for name in ids}
        found += len(twins)
    same = find_twins((ids, originals), (ids, originals))
    assert [twin.how for twin in same] == ["the same file"] * len(ids)
    record_property("trust.leak_planted", found + len(same))


def test_real_voc_has_no_false_alarm(voc: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """882 photographs, all pairs as they are and mirrored; looked at once, then remembered."""
    cache = tmp_path / "cache"
    began = time.perf_counter()
    data = load_data(str(voc), cache_dir=cache)
    first = time.perf_counter() - began
    count = sum(len(rows) for rows in data.splits.values())
    assert count == 882
    began = time.perf_counter()
    load_data(str(voc), cache_dir=cache)
    record_property("trust.leak_first_s", round(first, 2))
    record_property("trust.leak_again_s", round(time.perf_counter() - began, 2))
    looks = np.concatenate([look_over(rows, cache)[0] for rows in data.splits.values()])
    alarms, nearest = 0, 9.0
    for bits in ("bits", "mirrored"):
        left, right = np.nonzero(np.triu(bits_apart(looks["bits"], looks[bits]) <= 14, 1))
        thumbs = looks["thumb"][right]
        apart = difference(looks["thumb"][left], thumbs[:, :, ::-1] if bits == "mirrored" else thumbs)
        alarms += int((apart <= SAME).sum())
        nearest = min(nearest, float(apart.min()))
    record_property("trust.leak_false_alarms", alarms)
    assert alarms == 0 and nearest > 2 * SAME


def test_different_pictures_are_not_copies(photographs: list[Path]) -> None:
    """One made much brighter, cropped hard, or turned without a note, is not called a copy; nor is anything else."""
    picture = read_image(str(photographs[0]))
    look = take_look(photographs[0].read_bytes())
    width, height = picture.size
    for other in (
        ImageEnhance.Brightness(picture).enhance(1.4),
        picture.crop((width // 5, height // 5, width, height)),
        picture.transpose(Image.Transpose.ROTATE_90),
    ):
        assert not is_twin(look, take_look(encoded(other, quality=95)))


def test_scenes_and_their_copies() -> None:
    """Copies of scenes are found; frames of a clip are told from copies by the note of the source."""
    options = SceneOptions(n_train=90, n_test=20)
    pictures = [draw_scene(options, "train", index)[0] for index in range(12)]
    originals = looked([encoded(picture, quality=90) for picture in pictures])
    for name, copy in COPIES.items():
        for look, picture in zip(originals, pictures, strict=True):
            assert is_twin(look, take_look(copy(picture))), name
    test = looked([encoded(draw_scene(options, "test", index)[0], quality=85) for index in range(20)])
    names = [str(index) for index in range(20)]
    assert find_twins((names[:12], originals), (names, test)) == []


@pytest.mark.parametrize("seed", range(3))
def test_default_scenes_load(seed: int, recwarn: pytest.WarningsRecorder) -> None:
    """Frames in train and in validation are near each other by design, and no leak, by name and by folder."""
    load_data("scenes", seed=seed)
    load_data(str(make_scenes()), seed=seed)
    assert not [w for w in recwarn if "in train and" in str(w.message)]


def test_toy_loads_and_its_copy_is_found(tmp_path: Path) -> None:
    """Six pictures of a few squares are six pictures; one of them twice is a leak."""
    data = load_data("toy", cache_dir=tmp_path)
    rows = concatenate_datasets([raw_rows(data.test), raw_rows(data.train.select([2]))])
    with pytest.raises(LeakError, match="'toy-2' in train and 'toy-2' in test are the same file"):
        check_leaks({"train": data.train, "test": rows}, cache_dir=tmp_path)


def test_flat_pictures_have_nothing_to_recognise() -> None:
    """Two plain pictures of nearly one colour are two pictures; the same file is the same file."""
    one, other = (take_look(encoded(Image.new("RGB", (40, 30), (90, shade, 40)), "PNG")) for shade in (120, 121))
    assert is_twin(one, one) and not is_twin(one, other)


def test_many_alike_end_soon() -> None:
    """Hundreds of equal pictures in both splits: a twin for each, in bounded memory."""
    looks = np.repeat(take_look(encoded(Image.new("RGB", (20, 20)), "PNG"))[None], 800)
    names = [str(index) for index in range(800)]
    assert len(find_twins((names, looks), (names, looks))) == 800  # not 640,000 comparisons of thumbnails


# --- load_data


def write_voc(folder: Path, train: dict[str, bytes], test: dict[str, bytes]) -> str:
    """A folder in VOC layout; masks are plain."""
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for split, files in (("train", train), ("val", test)):
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(files))
        for name, data in files.items():
            picture = read_image({"bytes": data, "path": None})
            suffix = "png" if data[:4] == b"\x89PNG" else "webp" if data[:4] == b"RIFF" else "jpg"
            (folder / "JPEGImages" / f"{name}.{suffix}").write_bytes(data)
            mask = Image.new("L", picture.size)
            mask.save(folder / "SegmentationClass" / f"{name}.png")
    return str(folder)


@pytest.fixture(scope="module")
def scenes() -> list[bytes]:
    """Twelve different scenes as JPEG files."""
    options = SceneOptions(n_train=1, n_test=12)
    return [encoded(draw_scene(options, "test", index)[0], quality=90) for index in range(12)]


@pytest.mark.parametrize("kind", ["file", *COPIES])
def test_load_data_refuses_a_copy(kind: str, scenes: list[bytes], tmp_path: Path) -> None:
    """A copy in the test split stops the loading; both names, both splits and the way out are in one line."""
    copy = scenes[2] if kind == "file" else COPIES[kind](read_image({"bytes": scenes[2], "path": None}))
    train = {f"t{index}": data for index, data in enumerate(scenes[:6])}
    test = {"copy": copy, **{f"v{index}": data for index, data in enumerate(scenes[6:9])}}
    source = write_voc(tmp_path / "voc", train, test)
    with pytest.raises(LeakError, match="'t2' in (train|val) and 'copy' in test are the same") as caught:
        load_data(source, cache_dir=tmp_path / "cache", val_share=2)
    assert "\n" not in str(caught.value) and "leaks='warn'" in str(caught.value) and isinstance(caught.value, DataError)
    with pytest.warns(UserWarning, match="'t2' in"):
        load_data(source, cache_dir=tmp_path / "cache", val_share=2, leaks="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(source, cache_dir=tmp_path / "cache", val_share=2, leaks="off")


def test_a_copy_between_train_and_its_carved_validation(scenes: list[bytes], tmp_path: Path) -> None:
    """A picture that lies twice in train is a leak as soon as one of the two validates."""
    train = {f"t{index}": data for index, data in enumerate([*scenes[:5], scenes[0]])}
    source = write_voc(tmp_path / "voc", train, {"v": scenes[6]})
    outcomes = set()
    for seed in range(8):
        try:
            data = load_data(source, seed=seed, val_share=2, cache_dir=tmp_path / "cache")
            outcomes.add(len({"t0", "t5"} & set(row_ids(data.val))))
        except LeakError as error:
            assert "'t0'" in str(error) and "'t5'" in str(error)
            outcomes.add(1)
    assert 1 in outcomes and outcomes <= {0, 1, 2}


@pytest.mark.parametrize("spoil", [None, "png"], ids=["same bytes", "encoded again"])
def test_hub_like_val_is_train(spoil: str | None, scenes: list[bytes], tmp_path: Path) -> None:
    """A `datasets` folder whose val is its train has a sentence of its own."""
    columns = Features({"image": ImageColumn(), "mask": ImageColumn()})
    splits = {}
    for split in ("train", "validation"):
        cells = []
        for data in scenes[:8]:
            picture = read_image({"bytes": data, "path": None})
            again = COPIES["png"](picture) if spoil and split == "validation" else data
            mask = encoded(Image.new("L", picture.size), "PNG")
            cells.append({"image": {"bytes": again, "path": None}, "mask": {"bytes": mask, "path": None}})
        splits[split] = Dataset.from_list(cells, features=columns)
    DatasetDict(splits).save_to_disk(str(tmp_path / "hub"))
    with pytest.raises(LeakError, match="all 6 pictures of train are in test too.*Take another revision"):
        load_data(str(tmp_path / "hub"), val_share=2, cache_dir=tmp_path / "cache")
    rows = {
        name: make_rows(
            [f"{name}{i}" for i in range(8)],
            raw_rows(splits[name].cast_column("image", ImageColumn(decode=False)))["image"][:],
        )
        for name in splits
    }
    with pytest.raises(LeakError, match="so the splits are the same data"):
        check_leaks(rows, cache_dir=tmp_path / "cache")


def test_masks_are_not_read(scenes: list[bytes], tmp_path: Path) -> None:
    """The check opens images only: masks with broken pixels do not stop it."""
    source = write_voc(tmp_path / "voc", {f"t{i}": d for i, d in enumerate(scenes[:4])}, {"v": scenes[5]})
    for path in (tmp_path / "voc/SegmentationClass").glob("*.png"):
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"IDAT") - 4] + b"\x00\x00\x00\x04IDATgarbage")
    data = load_data(source, val_share=1, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="broken"):
        data.train[0]


# --- what is remembered


def test_cache_hits_and_changed_files(scenes: list[bytes], tmp_path: Path) -> None:
    """The second look decodes nothing; a file that was replaced is looked at again, and its leak is found."""
    source = write_voc(tmp_path / "voc", {f"t{i}": d for i, d in enumerate(scenes[:4])}, {"v": scenes[5]})
    data = load_data(source, val_share=1, cache_dir=tmp_path)
    assert [look_over(rows, tmp_path)[1] for rows in data.splits.values()] == [0, 0, 0]
    path = tmp_path / "voc/JPEGImages/v.jpg"
    old = path.stat()
    path.write_bytes(scenes[1])
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert look_over(data.test, tmp_path)[1] == 1 and look_over(data.test, tmp_path)[1] == 0
    shutil.copy(tmp_path / "voc/SegmentationClass/t1.png", tmp_path / "voc/SegmentationClass/v.png")
    with pytest.raises(LeakError, match="'t1' in .* and 'v' in test"):
        load_data(source, val_share=1, cache_dir=tmp_path)


def test_embedded_bytes_are_remembered_by_content(scenes: list[bytes], tmp_path: Path) -> None:
    """Bytes inside a data set have no file: what they are is their key."""
    rows = make_rows(["a", "b"], [{"bytes": data, "path": None} for data in scenes[:2]])
    assert look_over(rows, tmp_path)[1] == 2
    again = make_rows(["c", "d"], [{"bytes": data, "path": "elsewhere.jpg"} for data in scenes[1:3]])
    assert look_over(again, tmp_path)[1] == 1


@pytest.mark.parametrize("damage", ["garbage", "another table", "short blobs", "a folder", "no folder"])
def test_a_broken_cache_costs_time_only(damage: str, scenes: list[bytes], tmp_path: Path) -> None:
    """Whatever lies where looks are remembered: the leak is found, and a warning says what was wrong with it."""
    rows = {"train": make_rows(["a"], [{"bytes": scenes[0], "path": None}])}
    rows["test"] = make_rows(
        ["b"], [{"bytes": COPIES["half"](read_image({"bytes": scenes[0], "path": None})), "path": None}]
    )
    cache = tmp_path / "cache"
    if damage == "no folder":
        cache.write_text("a file where the folder should be")
    else:
        cache.mkdir()
        file = looks_file(cache)
        if damage == "garbage":
            file.write_bytes(b"this is no data base " * 500)
        elif damage == "a folder":
            file.mkdir()
        else:
            look_over(rows["train"], cache)
            with sqlite3.connect(file) as base:
                base.execute("drop table looks" if damage == "another table" else "update looks set look = x'00'")
                if damage == "another table":
                    base.execute("create table looks (other integer)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(LeakError, match="'a' in train and 'b' in test"):
            check_leaks(rows, cache_dir=cache)
    if damage != "short blobs":  # those are simply looked at again
        assert any("looks" in str(warning.message) for warning in caught)


# --- the seal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen scenes in VOC layout."""
    return make_scenes(tmp_path_factory.mktemp("leaks") / "scenes", n_train=16, n_test=4, seed=5)


@pytest.fixture
def experiment(folder: Path, tmp_path: Path) -> Iterator[Experiment]:
    """A run that has done nothing yet."""
    yield Experiment(make_config(TINY, mode="al", dataset=str(folder), output_dir=str(tmp_path / "run")))


@pytest.fixture(scope="module")
def idle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The same, for tests that only look at its data."""
    path = tmp_path_factory.mktemp("idle") / "run"
    return Experiment(make_config(TINY, mode="al", dataset=str(folder), output_dir=str(path)))


READS: dict[str, Callable[[Experiment, Dataset], Any]] = {
    "row": lambda e, rows: rows[0]["mask"],
    "negative row": lambda e, rows: rows[-1],
    "slice": lambda e, rows: rows[:2],
    "column": lambda e, rows: rows["mask"][0],
    "iteration": lambda e, rows: list(rows),
    "without the image": lambda e, rows: rows.remove_columns("image")[0],
    "chosen": lambda e, rows: rows.select([1, 0])[0],
    "decoded anew": lambda e, rows: rows.with_transform(DecodeRows(e.data.labels))[0],
    "decoded from raw rows": lambda e, rows: DecodeRows(e.data.labels)(raw_rows(rows)[:1]),
    "truth_reader": lambda e, rows: truth_reader(rows)(row_ids(rows)[0]),
    "training": lambda e, rows: TrainingSet(rows, TrainTransform(48, e.data.labels), length=1, seed=0)[0],
    "evaluation": lambda e, rows: rows.with_transform(EvalTransform(48, labels=e.data.labels))[0],
    "evaluate": lambda e, rows: evaluate(e.model, rows, Inference(48)),
    "fit": lambda e, rows: fit(e.model, rows, TrainSettings(steps=1, batch_size=2), Inference(48)),
    "joined": lambda e, rows: concatenate_datasets([raw_rows(rows), raw_rows(rows)]).with_transform(
        DecodeRows(e.data.labels)
    )[0],
    "pickled": lambda e, rows: pickle.loads(pickle.dumps(rows))[0],
    "loader": lambda e, rows: next(iter(DataLoader(rows, batch_size=None))),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("way", READS)
def test_sealed_truth_is_refused_by_every_way(way: str, split: str, idle: Experiment) -> None:
    """Whoever reads a mask of the pool or of the test split through the experiment's data gets a `LeakError`."""
    with pytest.raises(LeakError, match="sealed|LeakError"):
        READS[way](idle, idle.data.splits[split])


def test_sealed_truth_is_refused_in_a_worker(idle: Experiment) -> None:
    """A loader process has no more than the process that started it."""
    with pytest.raises(LeakError, match="sealed"):
        next(iter(DataLoader(idle.data.train, batch_size=None, num_workers=1)))


def test_no_path_and_no_bytes_under_the_seal(idle: Experiment) -> None:
    """Whatever form the rows are read in, closed cells hold neither a path nor bytes of a mask."""
    for split, closed in (("train", ["mask"]), ("test", ["image", "mask"])):
        rows = idle.data.splits[split]
        assert "SegmentationClass" not in str(rows.data.table) and "SegmentationClass" not in str(raw_rows(rows)[:])
        assert "SegmentationClass" not in str(rows.with_format("arrow")[:])
        for column in closed:
            assert {(cell["bytes"], cell["path"][:7]) for cell in raw_rows(rows)[column]} == {(None, "sealed:")}
        for form in ("numpy", "torch", None):
            with pytest.raises(FileNotFoundError, match="sealed"):
                rows.cast_column("mask", ImageColumn()).with_format(form)["mask"][0]
    with pytest.raises((VlmItlError, OSError)):
        mask_pixels(idle.data.train)
    with pytest.raises(DataError, match="16 broken rows: row .* is sealed: a mask of the pool"):
        check_data(idle.data)


def test_what_is_free_stays_free(experiment: Experiment, folder: Path) -> None:
    """Images of the pool, paid masks, validation, and all of the data when loaded outside an experiment."""
    data = load_data(str(folder), val_share=4)
    free = [row["id"] for row in experiment.oracle.images]
    assert free == row_ids(experiment.data.train) == row_ids(data.train)
    images = experiment.data.train.remove_columns("mask")
    assert np.array_equal(np.asarray(images[3]["image"]), np.asarray(data.train[3]["image"]))
    experiment.oracle.label(free[:2])
    for row, truth in zip(experiment.oracle.labelled(free[:2]), data.train.select([0, 1]), strict=True):
        assert np.array_equal(row["mask"], truth["mask"])
    assert np.array_equal(experiment.data.val[0]["mask"], data.val[0]["mask"])
    peeked = experiment.oracle.peek_for_simulation(free[5])
    assert np.array_equal(peeked, data.train[5]["mask"]) and experiment.oracle.simulated
    with pytest.raises(VlmItlError):
        experiment.oracle.labelled(free[2:3])
    assert len(check_data(data)) == 22


def test_seal_keeps_rows_of_any_origin(folder: Path, tmp_path: Path) -> None:
    """Files and embedded bytes, chosen and joined rows: order and decoding stay, and the images are not copied."""
    data = load_data(str(folder), val_share=4)
    cells = [{"bytes": Path(cell["path"]).read_bytes(), "path": None} for cell in raw_rows(data.train)["image"]]
    masks = raw_rows(data.train)["mask"][:]
    make_rows(row_ids(data.train), cells, masks).save_to_disk(str(tmp_path / "d"))
    stored = Dataset.load_from_disk(str(tmp_path / "d"))
    for rows in (stored, stored.select([5, 2, 7]), concatenate_datasets([stored.select([1]), stored])):
        decoded = rows.with_transform(DecodeRows(data.labels))
        closed = seal(decoded, ["mask"], "closed here")
        assert closed.column_names == decoded.column_names and row_ids(closed) == row_ids(decoded)
        images = closed.remove_columns("mask")
        assert np.array_equal(np.asarray(images[1]["image"]), np.asarray(decoded[1]["image"]))
        with pytest.raises(LeakError, match="closed here"):
            closed[1]


def test_a_strategy_that_peeks_is_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that holds the experiment and ranks by the truth ends the run, before it changed a choice."""
    config = make_config(TINY, mode="al", strategy="entropy", dataset=str(folder), output_dir=str(tmp_path / "run"))
    experiment = Experiment(config)

    class Peeking(Sampler):
        def select(self, scores: Any, candidates: Any, k: int, rng: Any, labelled: Any = ()) -> Any:
            candidates = list(candidates)
            order = sorted(range(len(candidates)), key=lambda i: -int((experiment.data.train[i]["mask"] > 0).sum()))
            return [candidates[i] for i in order[:k]], ["truth"] * k

    monkeypatch.setattr(experiment, "sampler", Peeking("entropy"))
    with pytest.raises(LeakError, match="a mask of the pool"):
        experiment.run_round()
    assert experiment.folder.rounds() == []


def test_a_judge_that_peeks_is_stopped(folder: Path, tmp_path: Path) -> None:
    """A judge that holds the experiment's data reads no truth; the simulated one asks the oracle, and is counted."""
    config = make_config(TINY, mode="vlm", judge="mock", dataset=str(folder), output_dir=str(tmp_path / "run"))
    experiment = Experiment(config)
    assert experiment.handler is not None
    experiment.handler.bind_truth(truth_reader(experiment.data.train))
    with pytest.raises(LeakError, match="a mask of the pool"):
        experiment.run_round()
    honest = Experiment(replace(config, output_dir=str(tmp_path / "honest")))
    honest.run_round()
    assert honest.ledger.peeks > 0 and honest.oracle.simulated


# --- test, validation, calibration


def test_test_split_opens_at_the_end(folder: Path, tmp_path: Path) -> None:
    """Before the last round neither `test_round` nor a row of the test split can be read; after it both can."""
    config = make_config(TINY, mode="al", dataset=str(folder), output_dir=str(tmp_path / "run"))
    experiment = Experiment(config)
    experiment.run_round()
    for read in (lambda: experiment.test_round(0), lambda: experiment.data.test[0], experiment.finish):
        with pytest.raises(LeakError, match="after the last round"):
            read()
    assert not list(experiment.folder.path.glob("test_*.json"))
    experiment.run_round()
    assert experiment.finished
    with pytest.raises(LeakError):
        experiment.data.test[0]
    assert experiment.finish()["test"]["mean_iou"] is not None
    assert experiment.data.test[0]["mask"].ndim == 2


def test_calibration_images_that_were_trained_on(folder: Path, tmp_path: Path) -> None:
    """An image of the pool among the validation images is refused, before it trains and before it certifies."""
    settings = {**TINY, "mode": "vlm", "judge": "mock", "acceptance": "certified", "alpha": 0.6, "dataset": str(folder)}
    experiment = Experiment(make_config(settings, output_dir=str(tmp_path / "run")))
    experiment.run_round()
    taught = experiment.oracle.labelled(experiment.pool.human[:1])
    joined = concatenate_datasets([raw_rows(experiment.data.val).select(range(3)), raw_rows(taught)])
    experiment.data = replace(experiment.data, val=joined.with_transform(DecodeRows(experiment.data.labels)))
    with pytest.raises(LeakError, match=f"image {experiment.pool.human[0]!r} was trained on"):
        experiment._certify(tmp_path)
    with pytest.raises(LeakError, match="was trained on"):
        experiment.run_round()
    with pytest.raises(LeakError, match=r"calibration image 'b' \(and 1 more\) was trained on"):
        check_apart(["a", "b", "c"], ["c", "b", "x"], "calibration")


@pytest.mark.parametrize("paid", [0, 3, 5])
def test_validation_that_is_not_in_the_budget(paid: int, experiment: Experiment) -> None:
    """Validation rows are used only if the ledger was charged for exactly as many."""
    ledger = Ledger()
    ledger.pay_masks([100] * paid, validation=True)
    experiment.ledger = experiment.oracle.ledger = ledger
    with pytest.raises(LeakError, match=f"4 validation images are read and {paid} were paid for"):
        experiment.run_round()


def test_resumed_ledger_and_changed_validation(folder: Path, tmp_path: Path) -> None:
    """A record whose budget lost its validation, or a data set that now validates with others, is refused."""
    copy = tmp_path / "scenes"
    shutil.copytree(folder, copy)
    config = make_config(TINY, mode="al", dataset=str(copy), output_dir=str(tmp_path / "run"))
    Experiment(config).run_round()
    record = tmp_path / "run/round_000/record.json"
    whole = record.read_text()
    record.write_text(whole.replace('"val_images": 4', '"val_images": 0'))
    assert record.read_text() != whole
    with pytest.raises(LeakError, match="4 validation images are read and 0 were paid for"):
        Experiment(config).run_round()
    record.write_text(whole)
    lists = copy / "ImageSets/Segmentation/train.txt"
    names = lists.read_text().split()
    lists.write_text("\n".join([*names[:3], *names[4:]]))
    validating = set(row_ids(load_data(str(copy), val_share=4).val))
    if validating == set(row_ids(load_data(str(folder), val_share=4).val)):
        pytest.fail("the same images validate: choose another name to drop")
    with pytest.raises(LeakError, match="has paid for other validation images"):
        Experiment(config)


def test_leaks_setting_reaches_the_data(scenes: list[bytes], tmp_path: Path) -> None:
    """An experiment on leaking data is refused, warned about, or run, as `leaks` says."""
    train = {f"t{index}": data for index, data in enumerate(scenes[:9])}
    source = write_voc(tmp_path / "voc", train, {"v": scenes[0], "w": scenes[10]})
    settings = {**TINY, "mode": "al", "dataset": source, "output_dir": str(tmp_path / "run")}
    with pytest.raises(LeakError):
        list(run_al(make_config(settings)))
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="are the same file"):
        Experiment(make_config(settings, leaks="warn"))
    with pytest.raises(VlmItlError, match="leaks='of' is not known"):
        make_config(settings, leaks="of")


def test_version_of_looks_is_in_the_name() -> None:
    """Looks of another kind must not be read: whoever changes `LOOK` changes the file's name."""
    assert leaks_module.LOOK.itemsize == 32 + 8 + 8 + 16 * 16 * 3 + 1 and looks_file("x").name == "looks-1.sqlite"
