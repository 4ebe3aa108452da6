"""Planted leaks that are caught: copies in two splits, unpaid truth, the test split read early, unpaid validation."""

from __future__ import annotations

import io
import json
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
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader

from vlm_itl.core.checks import ConfigError, DataError, LeakError, VlmItlError
from vlm_itl.data import leaks as leaks_module
from vlm_itl.data import prints as prints_module
from vlm_itl.data.groups import name_groups
from vlm_itl.data.leaks import check_apart, check_leaks, find_twins, seal, together
from vlm_itl.data.masks import DecodeRows, make_rows, raw_rows, read_image, row_ids, truth_reader
from vlm_itl.data.prints import LOOK, TURNS, inner_box, look_over, looks_file, take_look, turn, turn_waves
from vlm_itl.data.prints import wave_shapes as shapes_of
from vlm_itl.data.scenes import SceneOptions, draw_scene, make_scenes
from vlm_itl.data.sources import check_data, load_data
from vlm_itl.data.transforms import EvalTransform, TrainingSet, TrainTransform
from vlm_itl.experiment.acceptance import certify_round
from vlm_itl.experiment.annotator import mask_pixels
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.loop import Loop, finish, run_al
from vlm_itl.experiment.pool import Ledger
from vlm_itl.model.predict import Inference, evaluate
from vlm_itl.model.recipe import TrainSettings
from vlm_itl.model.train import fit
from vlm_itl.sampler.strategy import Sampler

pytestmark = pytest.mark.usefixtures("undrawn")

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
    ids = [name for rows in data.splits.values() for name in row_ids(rows)]
    alarms = sum(name != other for name, other in together(ids, looks).items())
    record_property("trust.leak_false_alarms", alarms)
    assert alarms == 0


def test_different_pictures_are_not_copies(photographs: list[Path]) -> None:
    """A strong crop is another picture, and so is every other photograph."""
    picture = read_image(str(photographs[0]))
    width, height = picture.size
    crop = take_look(encoded(picture.crop((width // 3, height // 3, width, height)), quality=95))
    look = take_look(photographs[0].read_bytes())
    assert not is_twin(look, crop)
    assert not any(is_twin(look, take_look(path.read_bytes())) for path in photographs[1:])


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


# --- what is equal, what is turned, what is changed


def painted(shift: tuple[int, int], blocks: int = 8) -> np.ndarray:
    """One grey structure in other colours: equal luminance, red and blue shifted."""
    grey = np.kron(np.random.default_rng(0).integers(60, 190, (blocks, blocks)), np.ones((16, 16)))
    red, blue = shift
    green = -(0.299 * red + 0.114 * blue) / 0.587
    return np.stack([grey + red, grey + green, grey + blue], -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("how", ["bytes", "pixels"])
def test_f06_exact_copies_are_always_found(how: str) -> None:
    """FAULTS 6: the same file, or the same pixels packed otherwise, among 200 pictures of one grey structure."""
    twin = Image.fromarray(painted((45, -45)))
    others = [encoded(Image.fromarray(painted((s - 100, 90 - s)), "RGB"), "PNG") for s in range(200)]
    file = encoded(twin, "PNG")
    other = file if how == "bytes" else encoded(twin, "PNG", compress_level=1)
    found = find_twins((["test"], looked([file])), ([*map(str, range(200)), "copy"], looked([*others, other])))
    assert [(t.first, t.second, t.how, t.apart) for t in found] == [
        ("test", "copy", "the same file" if how == "bytes" else "the same pixels", 0.0)
    ]


def test_f06_exact_copies_of_what_cannot_be_recognised() -> None:
    """Equal bytes are found where the picture is flat, one pixel, or broken; what is missing equals nothing."""
    flat, pixel = (encoded(Image.new("RGB", size, (9, 9, 9)), "PNG") for size in ((40, 40), (1, 1)))
    broken = encoded(Image.new("RGB", (64, 64)), "PNG")[:60]
    for file in (flat, pixel, broken, b"", b"no picture"):
        assert is_twin(take_look(file), take_look(file)), file[:8]
    assert not is_twin(take_look(flat), take_look(pixel)) and not is_twin(take_look(b""), take_look(broken))
    missing = np.zeros((), LOOK)
    assert not is_twin(missing, missing) and len(set(together(["a", "b"], np.array([missing] * 2)).values())) == 2


@pytest.mark.parametrize("place", range(8))
def test_f37_each_of_the_eight_turns(place: int, scene_looks: np.ndarray, scene_files: list[bytes]) -> None:
    """FAULTS 37: every turn is found and named; `turn` does to arrays what Pillow does to pictures."""
    picture = read_image({"bytes": scene_files[2], "path": None})
    way = [None, 0, 1, 3, 5, 4, 2, 6][place]  # Pillow's transpositions in the order of TURNS
    turned_picture = picture if way is None else picture.transpose(Image.Transpose(way))
    copy = take_look(encoded(turned_picture, quality=95))
    found = find_twins((["a"], copy[None]), (["b"], scene_looks[2:3]))
    assert [twin.how for twin in found] == [TURNS[place]]
    grid, back = np.arange(6).reshape(1, 2, 3), leaks_module._BACK[place]
    assert np.array_equal(turn(turn(grid, place), back), grid)
    if way is not None:
        pillow = np.asarray(Image.fromarray(grid[0].astype(np.uint8)).transpose(Image.Transpose(way)))
        assert np.array_equal(pillow, turn(grid, place)[0])
    waves = prints_module.waves(np.arange(24 * 24).reshape(1, 24, 24) % 37)
    again = prints_module.waves(turn(np.arange(24 * 24).reshape(1, 24, 24) % 37, place))
    assert np.allclose(turn_waves(waves, place), again, atol=0.1)


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "brighter": lambda p: encoded(ImageEnhance.Brightness(p).enhance(1.2), quality=90),
    "darker": lambda p: encoded(ImageEnhance.Brightness(p).enhance(0.8), quality=90),
    "contrast": lambda p: encoded(ImageEnhance.Contrast(p).enhance(0.7), quality=90),
    "gamma": lambda p: encoded(p.point([round(255 * (i / 255) ** 0.7) for i in range(256)] * 3), quality=90),
    "grey": lambda p: encoded(ImageOps.grayscale(p), quality=90),
    "blur": lambda p: encoded(p.filter(ImageFilter.GaussianBlur(2)), quality=90),
    "watermark": lambda p: encoded(watermarked(p), quality=90),
    "border": lambda p: encoded(ImageOps.expand(p, round(0.08 * min(p.size)), "white"), quality=90),
    "letterbox": lambda p: encoded(ImageOps.pad(p, (max(p.size), max(p.size) * 5 // 4)), quality=90),
    "crop 95 %": lambda p: encoded(ImageOps.crop(p, round(0.025 * min(p.size))), quality=90),
    "corner 95 %": lambda p: encoded(p.crop((0, 0, round(0.95 * p.width), round(0.95 * p.height))), quality=90),
    "upside down": lambda p: encoded(p.transpose(Image.Transpose.ROTATE_180), quality=90),
    "on its side": lambda p: encoded(p.transpose(Image.Transpose.ROTATE_90), quality=90),
    "alpha": lambda p: encoded(p.convert("RGBA"), "PNG"),
    "16 bits": lambda p: encoded(Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 257), "PNG"),
    "cmyk": lambda p: encoded(p.convert("CMYK"), quality=90),
    "gif": lambda p: encoded(p, "GIF", save_all=True, append_images=[ImageOps.mirror(p)]),
    "several": lambda p: encoded(
        ImageOps.crop(ImageEnhance.Brightness(ImageOps.mirror(p)).enhance(1.2), 4), quality=70
    ),
}


def watermarked(picture: Image.Image) -> Image.Image:
    """Half-transparent writing across the middle."""
    layer = Image.new("RGBA", picture.size)
    ImageDraw.Draw(layer).text(
        (picture.width * 0.05, picture.height * 0.4), "(c) a stock of photographs", (255,) * 3 + (140,)
    )
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


@pytest.fixture(scope="module")
def scene_files() -> list[bytes]:
    """Six scenes as files."""
    options = SceneOptions(n_train=1, n_test=6, shift=True)  # the six on which the thresholds were chosen
    return [encoded(draw_scene(options, "test", index)[0], quality=90) for index in range(6)]


@pytest.fixture(scope="module")
def scene_looks(scene_files: list[bytes]) -> np.ndarray:
    """Their looks."""
    return looked(scene_files)


@pytest.mark.parametrize("change", CHANGES)
def test_f37_changed_copies_are_found(change: str, scene_files: list[bytes], scene_looks: np.ndarray) -> None:
    """FAULTS 37: of six scenes every changed copy finds its own original, and nothing else."""
    pictures = [read_image({"bytes": data, "path": None}) for data in scene_files]
    names = [str(index) for index in range(6)]
    found = find_twins((names, looked([CHANGES[change](picture) for picture in pictures])), (names, scene_looks))
    assert all(twin.first == twin.second for twin in found) and len(found) == 6


@pytest.mark.parametrize("change", CHANGES)
def test_f37_changed_photographs_are_found(change: str, photographs: list[Path]) -> None:
    """The same for four photographs of VOC."""
    some = photographs[::5]
    copies, names = looked([CHANGES[change](read_image(str(path))) for path in some]), [path.stem for path in some]
    found = find_twins((names, copies), (names, looked([path.read_bytes() for path in some])))
    assert all(twin.first == twin.second for twin in found) and len(found) == len(names)


def test_limits_decide(monkeypatch: pytest.MonkeyPatch, scene_files: list[bytes]) -> None:
    """Each limit is looked at: where one of them is closed, a changed copy is no copy any more."""
    picture = read_image({"bytes": scene_files[1], "path": None})
    one, other = take_look(scene_files[1]), take_look(encoded(ImageEnhance.Color(picture).enhance(1.3), quality=80))
    assert is_twin(one, other)
    limits = {"_STRONG": 1.1, "_FITTED": 1.1, "_AGREE": 1.1, "_COLOUR": 0, "FLAT": 200, "_DETAIL": 1.1}
    for name, closed in limits.items():
        with monkeypatch.context() as patch:
            patch.setattr(leaks_module if name == "_STRONG" else prints_module, name, closed)
            patch.setattr(prints_module, "_SAME", 0)
            assert not is_twin(one, other), name


def test_limits_of_what_is_looked_at_closely() -> None:
    """Waves alike and hashes near, or waves so much alike that hashes do not count: each limit to one step."""
    one, other = (np.kron(np.random.default_rng(s).integers(0, 256, (8, 8)), np.ones((3, 3))) for s in (0, 1))
    looks = np.zeros(41, LOOK)
    looks["readable"], looks["grey"] = True, [(1 - t) * one + t * other for t in np.linspace(0, 1, 41)]
    shapes = shapes_of(looks["grey"]).reshape(41, -1)
    assert (shapes @ shapes[0])[[11, 12, 20, 21]] == pytest.approx([0.919, 0.897, 0.578, 0.522], abs=0.001)

    def kept(step: int, apart: int) -> bool:
        copy = looks[step : step + 1].copy()
        copy["bits"] = np.packbits(np.arange(64) < apart)
        pairs = leaks_module._candidates(leaks_module._Views(looks[:1]), leaks_module._Views(copy))
        return any((turns == 0).any() for _, _, turns in pairs)

    assert kept(11, 64) and not kept(12, 64)  # ALIKE
    assert kept(12, 19) and not kept(12, 20)  # NEAR_BITS
    assert kept(20, 0) and not kept(21, 0)  # STRONG


def test_drawings_and_pictures_of_one_kind_are_not_copies() -> None:
    """Stripes, a few shapes in other colours, smooth slopes: alike to a moving eye, and no copies."""
    stripes = [np.where(np.arange(32)[None, :, None] > edge, 255, 0) + np.zeros((32, 1, 3)) for edge in range(8, 20, 3)]
    slope = np.linspace(0, 255, 32)
    slopes = [
        np.add.outer(slope * a, slope * b)[..., None].repeat(3, 2) for a, b in ((0.2, 0.7), (0.3, 0.6), (0.5, 0.2))
    ]
    colours = [painted(shift, 4) for shift in ((60, -60), (-60, 60), (0, 90))]
    for pictures in (stripes, slopes, colours):
        looks = looked([encoded(Image.fromarray(p.clip(0, 255).astype(np.uint8)), "PNG") for p in pictures])
        names = [str(index) for index in range(len(pictures))]
        assert len(set(together(names, looks).values())) == len(pictures)


def test_frames_are_cut_off_and_skies_stay() -> None:
    """The inside of a frame and of bars, to the pixel; a picture without a frame is whole, a plain one as well."""
    rng = np.random.default_rng(0)
    for left, top, right, bottom in ((0, 0, 0, 0), (5, 5, 5, 5), (0, 12, 0, 9), (7, 0, 3, 0)):
        whole = np.full((40 + top + bottom, 60 + left + right, 3), 200, np.uint8)
        whole[top : top + 40, left : left + 60] = rng.integers(0, 180, (40, 60, 3))
        assert inner_box(whole) == (left, top, left + 60, top + 40)
    assert inner_box(np.full((20, 30, 3), 7, np.uint8)) == (0, 0, 30, 20)


def test_a_hundred_alike_end_soon_and_hold_together() -> None:
    """Frames of a still film: one group, without looking at all pairs closely."""
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(0, 200, (12, 12, 3)), np.ones((8, 8, 1)))
    files = [
        encoded(Image.fromarray((base + rng.normal(0, 4, base.shape)).clip(0, 255).astype(np.uint8)), "PNG")
        for _ in range(120)
    ]
    groups = together([str(index) for index in range(120)], looked(files))
    assert set(groups.values()) == {"0"}


# --- groups


def write_folder(folder: Path, names: list[str], seed: int = 0) -> str:
    """A folder of small noise pictures without a split."""
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for name in names:
        for part, pixels in (("images", rng.integers(0, 256, (16, 16, 3))), ("masks", np.zeros((16, 16)))):
            path = folder / part / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    (folder / "classes.txt").write_text("background\nthing\n")
    return str(folder)


FRAMES = [f"clip{clip}_{frame:03d}" for clip in "abcdefghij" for frame in range(4)]


@pytest.mark.parametrize("groups", ["frames", r"^(clip.)_", "groups.csv", "groups.json", "a mapping"])
def test_f31_groups_are_carved_together(groups: str, tmp_path: Path) -> None:
    """FAULTS 31: frames of a clip are never in two of train, validation and test, for any seed."""
    source, said = write_folder(tmp_path / "film", FRAMES), groups
    listed = {name: name[:5] for name in FRAMES}
    if groups.startswith("groups."):
        said = str(tmp_path / groups)
        lines = "id,group\n" + "".join(f"{name}.png,{group}\n" for name, group in listed.items())
        Path(said).write_text(lines if groups.endswith("csv") else json.dumps(listed))
    option = {"groups": listed if groups == "a mapping" else said}
    seen = set()
    for seed in range(3):
        data = load_data(source, seed=seed, val_share=9, cache_dir=tmp_path / "cache", options=option)
        clips = {split: {name[:5] for name in row_ids(rows)} for split, rows in data.splits.items()}
        assert not clips["train"] & clips["val"] and not clips["test"] & (clips["train"] | clips["val"])
        assert (len(data.val), len(data.test)) == (8, 8)  # never more than asked, whole clips only
        assert row_ids(
            load_data(source, seed=seed, val_share=9, cache_dir=tmp_path / "c", options=option).val
        ) == row_ids(data.val)
        assert len({data.groups[name] for name in row_ids(data.val)}) == 2
        seen.add(tuple(sorted(clips["val"])))
    assert len(seen) > 1


def test_f31_folders_and_clips(tmp_path: Path) -> None:
    """Sub-folders are groups where asked; generated scenes know their clips."""
    names = [f"night{place}/{frame}" for place in range(6) for frame in range(3)]
    data = load_data(
        write_folder(tmp_path / "n", names), val_share=4, cache_dir=tmp_path / "c", options={"groups": "folder"}
    )
    assert not {name[:6] for name in row_ids(data.val)} & {name[:6] for name in row_ids(data.train)}
    options = {"n_train": 60, "n_test": 4, "groups": "clips"}
    scenes = load_data("scenes", val_share=10, options=options)
    held = {scenes.groups[name] for name in row_ids(scenes.val)}
    assert not held & {scenes.groups[name] for name in row_ids(scenes.train)}


def test_f31_look_alikes_stay_together_without_a_word(tmp_path: Path) -> None:
    """A one-split folder with every picture twice: no seed is refused, no pair is torn; `max_train` changes nothing."""
    source = write_folder(tmp_path / "twice", [f"a{index:02d}" for index in range(10)])
    for index in range(10):
        for part in ("images", "masks"):
            with Image.open(tmp_path / f"twice/{part}/a{index:02d}.png") as picture:
                (ImageOps.flip(picture) if part == "images" else picture).save(
                    tmp_path / f"twice/{part}/b{index:02d}.png"
                )
    for seed in range(2):
        for limit in ({}, {"max_train": 10, "max_test": 3}):
            data = load_data(source, seed=seed, val_share=4, cache_dir=tmp_path / "c", options=limit)
            where = {name: split for split, rows in data.splits.items() for name in row_ids(rows)}
            assert all(where.get(f"b{name[1:]}", split) == split for name, split in where.items() if name[0] == "a")


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("frame", "groups='frame' is not known: clips, folder, frames, a file"),
        ("nowhere.csv", "nowhere.csv: no such file; it should hold id,group"),
        ("^(zzz)_", "fits none of the images, such as 'clipa_000'"),
        ("(", "is no pattern"),
        ("clips", "this source knows of no clips"),
        ({"clipa_000": "a"}, r"'clipa_001' \(and 38 more\) has no group"),
        (
            "clip",
            r"a test split of 0.2 asks for 8 of 40 images, and the smallest .* has 40: .* set the option groups",
        ),
    ],
)
def test_f31_what_groups_cannot_be(groups: Any, words: str, tmp_path: Path) -> None:
    """One line that names the option."""
    source = write_folder(tmp_path / "film", FRAMES)
    groups = "^(clip)" if groups == "clip" else groups
    with pytest.raises((ConfigError, DataError), match=words) as caught:
        load_data(source, val_share=4, cache_dir=tmp_path / "c", options={"groups": groups})
    assert "\n" not in str(caught.value)


def test_f31_groups_that_given_splits_tear(scenes: list[bytes], tmp_path: Path) -> None:
    """Lists that put one group into train and test are refused, or warned about, as `leaks` says."""
    train = {f"clip{i // 2}_{i}": data for i, data in enumerate(scenes[:6])}
    source = write_voc(tmp_path / "voc", train, {"clip1_9": scenes[7], "other_1": scenes[8]})
    arguments = {"val_share": 2, "cache_dir": tmp_path / "c", "options": {"groups": "frames"}}
    with pytest.raises(LeakError, match="group 'clip1' is in (train|val) .* and in test .'clip1_9'.*option groups"):
        load_data(source, **arguments)
    with pytest.warns(UserWarning, match="group 'clip1'"):
        load_data(source, leaks="warn", **arguments)
    load_data(source, leaks="off", **arguments)


def test_a_file_that_was_swapped_under_its_old_date(scenes: list[bytes], tmp_path: Path) -> None:
    """Same size, same date, other content: looked at again. A link to a file of another split is that file."""
    one, other = (
        scenes[0] + bytes(max(0, len(scenes[1]) - len(scenes[0]))),
        scenes[1] + bytes(max(0, len(scenes[0]) - len(scenes[1]))),
    )
    path = tmp_path / "a.jpg"
    path.write_bytes(one)
    rows, date = make_rows(["a"], [path]), path.stat()
    first = look_over(rows, tmp_path)[0]
    path.write_bytes(other)
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
    again, count = look_over(rows, tmp_path)
    assert count == 1 and not np.array_equal(first["content"], again["content"])
    for name, link in (("soft.jpg", os.symlink), ("hard.jpg", os.link)):
        link(path, tmp_path / name)
        with pytest.raises(LeakError, match="are the same file"):
            check_leaks({"train": rows, "test": make_rows(["b"], [tmp_path / name])}, cache_dir=tmp_path)


def test_names_of_frames() -> None:
    """What stands before the last number, and nothing of what divides the two."""
    names = ["clip1_0001", "clip1_0002", "aachen_000000_000019_leftImg8bit_x", "v-1.frame7", "0001", "title"]
    found = name_groups("frames", [make_rows(names, [{"path": None, "bytes": b""}] * len(names))])
    assert [found.get(name) for name in names[:2]] == ["clip1", "clip1"] and found["v-1.frame7"] == "v-1.frame"
    assert "title" not in found


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
    (folder / "classes.txt").write_text("background\nthing\n")
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
    """FAULTS 31: a picture that lies twice in train validates with its copy or not at all, whatever the seed."""
    train = {f"t{index}": data for index, data in enumerate([*scenes[:5], scenes[0]])}
    source = write_voc(tmp_path / "voc", train, {"v": scenes[6]})
    sides = set()
    for seed in range(8):
        data = load_data(source, seed=seed, val_share=2, cache_dir=tmp_path / "cache")
        assert len(data.val) == 2
        sides.add(len({"t0", "t5"} & set(row_ids(data.val))))
    assert sides == {0, 2}  # never torn


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
        load_data(str(tmp_path / "hub"), val_share=2, cache_dir=tmp_path / "cache", options={"classes": 2})
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
def experiment(folder: Path, tmp_path: Path) -> Iterator[Loop]:
    """A run that has done nothing yet."""
    yield Loop.from_config(make_config(TINY, mode="al", dataset=str(folder), output_dir=str(tmp_path / "run")))


@pytest.fixture(scope="module")
def idle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """The same, for tests that only look at its data."""
    path = tmp_path_factory.mktemp("idle") / "run"
    return Loop.from_config(make_config(TINY, mode="al", dataset=str(folder), output_dir=str(path)))


READS: dict[str, Callable[[Loop, Dataset], Any]] = {
    "row": lambda e, rows: rows[0]["mask"],
    "negative row": lambda e, rows: rows[-1],
    "slice": lambda e, rows: rows[:2],
    "column": lambda e, rows: rows["mask"][0],
    "iteration": lambda e, rows: list(rows),
    "without the image": lambda e, rows: rows.remove_columns("image")[0],
    "chosen": lambda e, rows: rows.select([1, 0])[0],
    "decoded anew": lambda e, rows: rows.with_transform(DecodeRows(e.team.data.labels))[0],
    "decoded from raw rows": lambda e, rows: DecodeRows(e.team.data.labels)(raw_rows(rows)[:1]),
    "truth_reader": lambda e, rows: truth_reader(rows)(row_ids(rows)[0]),
    "training": lambda e, rows: TrainingSet(rows, TrainTransform(48, e.team.data.labels), length=1, seed=0)[0],
    "evaluation": lambda e, rows: rows.with_transform(EvalTransform(48, labels=e.team.data.labels))[0],
    "evaluate": lambda e, rows: evaluate(e.team.learner.segmenter, rows, Inference(48)),
    "fit": lambda e, rows: fit(e.team.learner.segmenter, rows, TrainSettings(steps=1, batch_size=2), Inference(48)),
    "joined": lambda e, rows: concatenate_datasets([raw_rows(rows), raw_rows(rows)]).with_transform(
        DecodeRows(e.team.data.labels)
    )[0],
    "pickled": lambda e, rows: pickle.loads(pickle.dumps(rows))[0],
    "loader": lambda e, rows: next(iter(DataLoader(rows, batch_size=None))),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("way", READS)
def test_sealed_truth_is_refused_by_every_way(way: str, split: str, idle: Loop) -> None:
    """Whoever reads a mask of the pool or of the test split through the experiment's data gets a `LeakError`."""
    with pytest.raises(LeakError, match="sealed|LeakError"):
        READS[way](idle, idle.team.data.splits[split])


def test_sealed_truth_is_refused_in_a_worker(idle: Loop) -> None:
    """A loader process has no more than the process that started it."""
    with pytest.raises(LeakError, match="sealed"):
        next(iter(DataLoader(idle.team.data.train, batch_size=None, num_workers=1)))


def test_no_path_and_no_bytes_under_the_seal(idle: Loop) -> None:
    """Whatever form the rows are read in, closed cells hold neither a path nor bytes of a mask."""
    for split, closed in (("train", ["mask"]), ("test", ["image", "mask"])):
        rows = idle.team.data.splits[split]
        assert "SegmentationClass" not in str(rows.data.table) and "SegmentationClass" not in str(raw_rows(rows)[:])
        assert "SegmentationClass" not in str(rows.with_format("arrow")[:])
        for column in closed:
            assert {(cell["bytes"], cell["path"][:7]) for cell in raw_rows(rows)[column]} == {(None, "sealed:")}
        for form in ("numpy", "torch", None):
            with pytest.raises(FileNotFoundError, match="sealed"):
                rows.cast_column("mask", ImageColumn()).with_format(form)["mask"][0]
    with pytest.raises((VlmItlError, OSError)):
        mask_pixels(idle.team.data.train)
    with pytest.raises(DataError, match="16 broken rows: row .* is sealed: a mask of the pool"):
        check_data(idle.team.data)


def test_what_is_free_stays_free(experiment: Loop, folder: Path) -> None:
    """Images of the pool, paid masks, validation, and all of the data when loaded outside an experiment."""
    data = load_data(str(folder), val_share=4)
    free = [row["id"] for row in experiment.team.annotator.images]
    assert free == row_ids(experiment.team.data.train) == row_ids(data.train)
    images = experiment.team.data.train.remove_columns("mask")
    assert np.array_equal(np.asarray(images[3]["image"]), np.asarray(data.train[3]["image"]))
    experiment.team.annotator.label(free[:2])
    for row, truth in zip(experiment.team.annotator.labelled(free[:2]), data.train.select([0, 1]), strict=True):
        assert np.array_equal(row["mask"], truth["mask"])
    assert np.array_equal(experiment.team.data.val[0]["mask"], data.val[0]["mask"])
    peeked = experiment.team.annotator.peek_for_simulation(free[5])
    assert np.array_equal(peeked, data.train[5]["mask"]) and experiment.team.annotator.simulated
    with pytest.raises(VlmItlError):
        experiment.team.annotator.labelled(free[2:3])
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
    experiment = Loop.from_config(config)

    class Peeking(Sampler):
        def select(self, scores: Any, candidates: Any, k: int, rng: Any, labelled: Any = ()) -> Any:
            candidates = list(candidates)
            order = sorted(
                range(len(candidates)), key=lambda i: -int((experiment.team.data.train[i]["mask"] > 0).sum())
            )
            return [candidates[i] for i in order[:k]], ["truth"] * k

    monkeypatch.setattr(experiment.team, "sampler", Peeking("entropy"))
    with pytest.raises(LeakError, match="a mask of the pool"):
        experiment.run_round()
    assert experiment.folder.rounds() == []


def test_a_judge_that_peeks_is_stopped(folder: Path, tmp_path: Path) -> None:
    """A judge that holds the experiment's data reads no truth; the simulated one asks the oracle, and is counted."""
    config = make_config(
        TINY, mode="vlm", judge="mock", dataset=str(folder), output_dir=str(tmp_path / "run"), preflight=0
    )
    experiment = Loop.from_config(config)
    assert experiment.team.handler is not None
    experiment.team.handler.bind_truth(truth_reader(experiment.team.data.train))
    with pytest.raises(LeakError, match="a mask of the pool"):
        experiment.run_round()
    honest = Loop.from_config(replace(config, output_dir=str(tmp_path / "honest")))
    honest.run_round()
    assert honest.state.ledger.peeks > 0 and honest.team.annotator.simulated


# --- test, validation, calibration


def test_test_split_opens_at_the_end(folder: Path, tmp_path: Path) -> None:
    """Before the last round neither `test_round` nor a row of the test split can be read; after it both can."""
    config = make_config(TINY, mode="al", dataset=str(folder), output_dir=str(tmp_path / "run"))
    experiment = Loop.from_config(config)
    experiment.run_round()
    for read in (lambda: experiment.test_round(0), lambda: experiment.team.data.test[0], lambda: finish(experiment)):
        with pytest.raises(LeakError, match="after the last round"):
            read()
    assert not list(experiment.folder.path.glob("test_*.json"))
    experiment.run_round()
    assert experiment.finished
    with pytest.raises(LeakError):
        experiment.team.data.test[0]
    assert finish(experiment)["test"]["mean_iou"] is not None
    assert experiment.team.data.test[0]["mask"].ndim == 2


def test_calibration_images_that_were_trained_on(folder: Path, tmp_path: Path) -> None:
    """An image of the pool among the validation images is refused, before it trains and before it certifies."""
    settings = {**TINY, "mode": "vlm", "judge": "mock", "acceptance": "certified", "alpha": 0.6, "dataset": str(folder)}
    experiment = Loop.from_config(make_config(settings, output_dir=str(tmp_path / "run")))
    experiment.run_round()
    taught = experiment.team.annotator.labelled(experiment.state.pool.human[:1])
    joined = concatenate_datasets([raw_rows(experiment.team.data.val).select(range(3)), raw_rows(taught)])
    experiment.team.data = replace(
        experiment.team.data, val=joined.with_transform(DecodeRows(experiment.team.data.labels))
    )
    with pytest.raises(LeakError, match=f"image {experiment.state.pool.human[0]!r} was trained on"):
        certify_round(experiment.team, experiment.state, tmp_path)
    with pytest.raises(LeakError, match="was trained on"):
        experiment.run_round()
    with pytest.raises(LeakError, match=r"calibration image 'b' \(and 1 more\) was trained on"):
        check_apart(["a", "b", "c"], ["c", "b", "x"], "calibration")


@pytest.mark.parametrize("paid", [0, 3, 5])
def test_validation_that_is_not_in_the_budget(paid: int, experiment: Loop) -> None:
    """Validation rows are used only if the ledger was charged for exactly as many."""
    ledger = Ledger()
    ledger.pay_masks([100] * paid, split="val")
    experiment.team.annotator.ledger = ledger
    with pytest.raises(LeakError, match=f"4 validation images are read and {paid} were paid for"):
        experiment.run_round()


def test_resumed_ledger_and_changed_validation(folder: Path, tmp_path: Path) -> None:
    """A record whose budget lost its validation, or a data set that now validates with others, is refused."""
    copy = tmp_path / "scenes"
    shutil.copytree(folder, copy)
    config = make_config(TINY, mode="al", dataset=str(copy), output_dir=str(tmp_path / "run"))
    Loop.from_config(config).run_round()
    record = tmp_path / "run/round_000/record.json"
    whole = record.read_text()
    record.write_text(whole.replace('"val_images": 4', '"val_images": 0'))
    assert record.read_text() != whole
    with pytest.raises(LeakError, match="4 validation images are read and 0 were paid for"):
        Loop.from_config(config).run_round()
    record.write_text(whole)
    lists = copy / "ImageSets/Segmentation/train.txt"
    names = lists.read_text().split()
    lists.write_text("\n".join([*names[:3], *names[4:]]))
    validating = set(row_ids(load_data(str(copy), val_share=4).val))
    if validating == set(row_ids(load_data(str(folder), val_share=4).val)):
        pytest.fail("the same images validate: choose another name to drop")
    with pytest.raises(LeakError, match="has paid for other validation images"):
        Loop.from_config(config)


def test_leaks_setting_reaches_the_data(scenes: list[bytes], tmp_path: Path) -> None:
    """An experiment on leaking data is refused, warned about, or run, as `leaks` says."""
    train = {f"t{index}": data for index, data in enumerate(scenes[:9])}
    source = write_voc(tmp_path / "voc", train, {"v": scenes[0], "w": scenes[10]})
    settings = {**TINY, "mode": "al", "dataset": source, "output_dir": str(tmp_path / "run")}
    with pytest.raises(LeakError):
        list(run_al(make_config(settings)))
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="are the same file"):
        Loop.from_config(make_config(settings, leaks="warn"))
    with pytest.raises(VlmItlError, match="leaks='of' is not known"):
        make_config(settings, leaks="of")


def test_version_of_looks_is_in_the_name() -> None:
    """Looks of another kind must not be read: whoever changes `LOOK` changes the file's name."""
    assert LOOK.itemsize == 64 + 2 + 2 * (8 + 24 * 24 + 8 * 8 * 2) and looks_file("x").name == "looks-2.sqlite"
