"""Fuzzed pictures, masks and data sets: each is read, or one line says which file is wrong and why."""

from __future__ import annotations

import gc
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from fuzzing import FACTOR, TEXTS, WILD, Tried, fuzz
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, PngImagePlugin

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import (
    PIXEL_LIMIT,
    MaskStore,
    check_headers,
    make_rows,
    open_image,
    pixel_limit,
    read_image,
    read_indices,
    read_mask,
)
from vlm_itl.data.sources import check_data, load_data
from vlm_itl.data.transforms import _LARGE, EvalTransform, TrainTransform, predicted_classes, unpad_one
from vlm_itl.experiment.annotator import mask_pixels
from vlm_itl.vlm.handler import JudgeQuery
from vlm_itl.vlm.render import render

Record = Callable[[str, Any], None]
THREE = LabelSpace(("background", "red", "blue"))
MODES = (
    "1",
    "L",
    "P",
    "PA",
    "LA",
    "RGB",
    "RGBA",
    "I;16",
    "I",
    "F",
    "CMYK",
    "LAB",
    "HSV",
    "YCbCr",
    "La",
    "RGBa",
    "RGBX",
)
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM")


def cell(data: bytes) -> dict[str, Any]:
    """A cell with bytes inside."""
    return {"bytes": data, "path": None}


def read_all(data: Any, tried: Tried) -> None:
    """A cell as image and as mask; what works must have a fit shape and type."""
    with tried.case():
        image = read_image(data, name="a")
        assert image.mode == "RGB" and min(image.size) >= 1
    with tried.case():
        mask = read_mask(data, THREE, name="a")
        assert mask.dtype == np.uint8 and mask.ndim == 2 and set(np.unique(mask)) <= {0, 1, 2, 255}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(kind: str = "PNG", size: tuple[int, int] = (9, 7), **options: Any) -> bytes:
    """A small file with every class in it."""
    values = (np.arange(size[0] * size[1], dtype=np.uint8) % 3).reshape(size[1], size[0])
    image = Image.fromarray(values)
    if kind in ("PNG", "GIF"):
        image.putpalette(THREE.palette.tobytes())
    return saved(image.convert("RGB") if kind in ("JPEG", "WEBP") else image, kind, **options)


# ---- masks ----


def test_arrays_as_masks(record_property: Record) -> None:
    """Arrays of any type and shape; one that is read equals the array."""
    tried = Tried()
    types = st.sampled_from(
        ["bool", "int8", "uint8", "int64", "uint64", "float16", "float64", "complex64", "U3", "S2", "O", "M8[s]"]
    )
    shapes = st.sampled_from([(), (0,), (0, 3), (2, 0), (1, 1), (1, 5), (3, 3), (2, 3, 1), (1, 1, 1, 1)])

    def filled(kind: str, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
        if kind == "O":
            return st.just(np.full(shape, None, dtype=object))
        small = kind in ("int64", "float64", "uint8")
        elements = st.sampled_from([0, 1, 2, 255]) if small else None
        return st.one_of(hnp.arrays(kind, shape), hnp.arrays(kind, shape, elements=elements) if small else st.nothing())

    @fuzz(400)
    @given(st.tuples(types, shapes).flatmap(lambda pair: filled(*pair)), st.booleans())
    def check(values: np.ndarray, binary: bool) -> None:
        with tried.case():
            mask = read_mask(values, THREE, binary=binary, name="a")
            assert mask.dtype == np.uint8 and mask.ndim == 2 and mask.size and (mask == values).all()

    check()
    tried.report(record_property)


@pytest.mark.parametrize(
    "values",
    [
        np.full((2, 2), 0.5),
        np.full((2, 2), np.nan),
        np.full((2, 2), np.inf),
        np.zeros((0, 3)),
        np.array([["a"]]),
        np.full((2, 2), None),
        np.zeros((2, 2, 1)),
        np.full((1, 1), -1),
    ],
)
def test_arrays_that_are_no_masks(values: np.ndarray) -> None:
    """A half was cut down to 0 in silence; text and objects failed inside numpy."""
    with pytest.raises(DataError):
        read_mask(values, THREE, name="a")


def test_masks_and_images_in_files(record_property: Record) -> None:
    """Any pixel format, size, palette and file format."""
    tried = Tried()
    sizes = st.sampled_from([(1, 1), (1, 9), (9, 1), (3, 5), (8, 8), (17, 2)])

    @fuzz(600)
    @given(
        st.sampled_from(MODES),
        sizes,
        st.sampled_from(FORMATS),
        st.integers(0, 2**32 - 1),
        st.sampled_from([0, 3, 9, 768]),
        st.booleans(),
    )
    def check(mode: str, size: tuple[int, int], kind: str, seed: int, palette: int, low: bool) -> None:
        rng = np.random.default_rng(seed)
        image = Image.new(mode, size)
        count = len(image.tobytes())
        image.frombytes(rng.integers(0, 3 if low else 256, count, dtype=np.uint8).tobytes())
        if mode == "P" and palette:
            colors = (
                THREE.palette.tobytes()[:palette]
                if seed % 2
                else rng.integers(0, 256, palette, dtype=np.uint8).tobytes()
            )
            image.putpalette(colors)
        if seed % 5 == 0:
            image.info["transparency"] = [0, b"\0\1\2", (1, 2, 3)][seed % 3]
        read_all(image, tried)
        try:
            data = saved(image, kind)
        except Exception:  # Pillow cannot write every mode into every format
            return
        read_all(cell(data), tried)

    check()
    tried.report(record_property)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_several_frames(kind: str) -> None:
    """An animated picture is its first frame; of several masks none is chosen in silence."""
    frames = [Image.fromarray(np.full((6, 6), value, dtype=np.uint8)) for value in (1, 2, 0)]
    data = saved(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert read_image(cell(data)).size == (6, 6)
    with pytest.raises(DataError, match="3 frames"):
        read_mask(cell(data), THREE)


# ---- files ----


def test_cut_at_every_length(record_property: Record) -> None:
    """Files of every format that end too early."""
    tried = Tried()
    for kind in FORMATS:
        data = sample(kind)
        for length in range(0, len(data), max(1, len(data) // 90) if FACTOR == 1 else 1):
            read_all(cell(data[:length]), tried)
    for options in ({"interlace": 1}, {"pnginfo": _text_chunks(), "icc_profile": b"x" * 40}):
        data = sample("PNG", **options)
        for length in range(0, len(data), 2):
            read_all(cell(data[:length]), tried)
    tried.report(record_property)


def _text_chunks() -> PngImagePlugin.PngInfo:
    """Notes in a PNG."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("a", "b" * 50, zip=True)
    notes.add_itxt("c", "d", zip=True)
    return notes


def test_flipped_bytes(record_property: Record) -> None:
    """Bytes of a file changed; Pillow's own errors and warnings never surface."""
    tried, rng = Tried(), random.Random(1 if FACTOR == 1 else None)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [sample(kind) for kind in FORMATS] + [
        sample("JPEG", exif=exif),
        sample("PNG", exif=exif),
        sample("TIFF", compression="tiff_lzw"),
    ]
    for _ in range(int(600 * FACTOR)):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if data[:4] == b"\x89PNG" and rng.random() < 0.5:
            data = _mended(bytes(data))
        if _claimed(data) <= 10**7:  # large ones take seconds; they have tests of their own
            read_all(cell(bytes(data)), tried)
    tried.report(record_property)


def _claimed(data: bytes | bytearray) -> int:
    """Pixels by the header."""
    try:
        with open_image(cell(bytes(data))) as image:
            return image.width * image.height
    except DataError:
        return 0


def _mended(data: bytes) -> bytearray:
    """A PNG whose checksums are right again, so that the change gets through."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        if length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out


def test_cells_of_any_type(record_property: Record) -> None:
    """What is no cell at all."""
    tried = Tried()
    cells = st.one_of(
        WILD,
        st.fixed_dictionaries(
            {}, optional={"path": st.one_of(TEXTS, st.none()), "bytes": st.one_of(st.binary(max_size=9), st.none())}
        ),
    )

    @fuzz(300)
    @given(cells)
    def check(value: Any) -> None:
        read_all(value, tried)

    check()
    tried.report(record_property)


def test_strange_files(tmp_path: Path, record_property: Record) -> None:
    """Folders, pipes, devices, loops, other formats, names that no terminal can show."""
    tried = Tried()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    contents = {
        "empty.jpg": b"",
        "text.png": b"hello",
        "page.jpg": b"<!doctype html><html></html>",
        "zip.png": b"PK\x03\x04" + b"\0" * 40,
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "wrong.jpg": sample("PNG"),
        "new\nline\x1b[31m.png": b"x",
        "caf\u00e9 \u732b.png": sample("PNG"),
        os.fsdecode(b"half\xff.png"): b"x",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    for path in (*sorted(tmp_path.iterdir()), Path("/dev/zero"), tmp_path / ("x" * 300), tmp_path / "a\0b"):
        read_all(str(path), tried)
    for name in ("pipe.jpg", "folder.jpg", "script.png", "loop.jpg", "zip.png", "drawing.png"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
    assert read_image(tmp_path / "wrong.jpg").size == (9, 7)
    tried.report(record_property)


# ---- EXIF ----


@pytest.mark.parametrize("size", [(8, 6), (6, 6)])
def test_all_pairs_of_orientations(size: tuple[int, int], record_property: Record) -> None:
    """Each file is turned by its own tag; where only one has a tag and the sizes do not tell, both are refused."""
    tried = Tried()
    truth = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0]) % 3
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how the camera stores it

    def stored(values: np.ndarray, turn: int, kind: str) -> dict[str, Any]:
        picture = Image.fromarray(values)
        way = undo.get(turn)
        picture = picture if way is None else picture.transpose(Image.Transpose(way))
        exif = Image.Exif()
        if turn:
            exif[0x0112] = turn
        return cell(saved(picture, kind, **({"exif": exif} if turn else {})))

    refused = 0
    for first in range(9):  # 0 = no tag
        for second in range(9):
            for kind in ("PNG", "TIFF"):
                rows = make_rows(["a"], [stored(truth * 80, first, kind)], [stored(truth, second, kind)])
                with tried.case():
                    turned = max(first, second)
                    unsure = min(first, second) == 0 and turned >= 2 and not (turned >= 5 and size[0] != size[1])
                    try:
                        check_headers(rows)
                    except DataError as error:
                        assert unsure and "EXIF orientation" in str(error), (first, second, kind, error)
                        refused += 1
                        continue
                    assert not unsure, (first, second, kind)
                    row = rows.with_format(None)[0]
                    assert (np.array(read_image(row["image"]).convert("L")) == truth * 80).all(), (first, second, kind)
                    assert (read_mask(row["mask"], THREE) == truth).all(), (first, second, kind)
                    again = read_image(read_image(row["image"]))  # what was set upright is not turned again
                    assert (np.array(again.convert("L")) == truth * 80).all()
    assert refused == 2 * 2 * (7 if size[0] == size[1] else 3)
    record_property("trust.exif_pairs", 64)
    tried.report(record_property)


@pytest.mark.parametrize("value", [0, 9, 255, -1, "x", b"\xff", (3, 4)])
def test_broken_orientation_says_nothing(value: Any) -> None:
    """A tag outside 1..8, or of another type."""
    exif = Image.Exif()
    exif[0x0112] = value
    try:
        data = sample("JPEG", exif=exif)
    except Exception:
        data = sample("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    check_headers(make_rows(["a"], [cell(data)]))
    assert read_image(cell(data)).size == (9, 7)


def test_orientation_behind_the_pixels_of_a_png() -> None:
    """The standard allows the tag there; it was not seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = sample("PNG")
    assert read_image(cell(data[:-12] + chunk + data[-12:])).size == (7, 9)


# ---- size ----


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0" * 100)
    parts = [head, pixels, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts
    )


@pytest.mark.parametrize("size", [(100_000, 100_000), (10_000, 9_000), (2**31 - 1, 2**31 - 1), (PIXEL_LIMIT + 1, 1)])
def test_bombs_are_refused_everywhere(size: tuple[int, int], tmp_path: Path) -> None:
    """By the header, by everything that opens pictures, in our words."""
    path = tmp_path / "a.png"
    path.write_bytes(bomb(*size))
    rows = make_rows(["a"], [path], [path])
    store = MaskStore(tmp_path, THREE)
    readers: list[Callable[[], Any]] = [
        lambda: read_image(path),
        lambda: read_mask(path, THREE),
        lambda: read_indices(path),
        lambda: check_headers(rows),
        lambda: mask_pixels(rows),
        lambda: store["a"],
    ]
    for reader in readers:
        with pytest.raises(DataError, match="a.png: .*(VLM_ITL_MAX_PIXELS|not a readable image)"):
            reader()


def test_limit_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower, higher, and nonsense."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv("VLM_ITL_MAX_PIXELS", "62")
    with pytest.raises(DataError, match="9 x 7 pixels are more than the limit of 62"):
        read_image(cell(sample()))
    monkeypatch.setenv("VLM_ITL_MAX_PIXELS", "100000000")
    with open_image(cell(bomb(10_000, 9_000))) as image:
        assert image.size == (10_000, 9_000)
    for wrong in ("many", "-1", "1e9", "²"):
        monkeypatch.setenv("VLM_ITL_MAX_PIXELS", wrong)
        with pytest.raises(ConfigError, match="VLM_ITL_MAX_PIXELS"):
            pixel_limit()


def test_no_warning_of_pillow_surfaces(tmp_path: Path) -> None:
    """In a process of its own, where nobody has set filters, and in one that shows all."""
    (tmp_path / "bomb.png").write_bytes(bomb(10_000, 9_000))
    (tmp_path / "odd.jpg").write_bytes(sample("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    code = (
        "import sys; from vlm_itl.core.checks import DataError; from vlm_itl.data.masks import read_image\n"
        "for p in sys.argv[1:]:\n try: read_image(p)\n except DataError as e: print(e)"
    )
    for flags in ((), ("-W", "always")):
        paths = [str(tmp_path / name) for name in ("bomb.png", "odd.jpg")]
        done = subprocess.run([sys.executable, *flags, "-c", code, *paths], capture_output=True, text=True, timeout=120)
        assert "90000000" in done.stdout or "10000 x 9000" in done.stdout
        assert "DecompressionBomb" not in done.stderr and "EXIF" not in done.stderr


def test_huge_notes_in_a_png() -> None:
    """A compressed profile or text that unpacks to 200 MB is refused or left out, not unpacked."""
    for name, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        body = name + head + zlib.compress(b"\0" * 200_000_000, 1)
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        data = sample("PNG")
        with Tried().case():
            assert read_image(cell(data[:33] + chunk + data[33:])).size == (9, 7)


def test_wide_pictures(tmp_path: Path, record_property: Record) -> None:
    """20,000 pixels wide, or one pixel high, through reading, transforms, prediction and drawing."""
    for width, height in ((20_000, 1), (1, 20_000), (20_000, 300)):
        image = Image.new("RGB", (width, height), (9, 99, 199))
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[:, : width // 2 + 1] = 1
        row = {"id": "a", "image": image, "mask": mask}
        shown = EvalTransform(64, labels=THREE)(row)
        assert shown["pixel_values"].shape == (3, 64, 64) and shown["native"] == (height, width)
        made = TrainTransform(64, THREE)(row, np.random.default_rng(0))
        assert made["pixel_values"].shape == (3, 64, 64)
        logits = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
        found = predicted_classes(logits, shown["box"], 64, shown["native"])
        assert found.shape == (height, width)
        query = JudgeQuery("a", image, mask, labels=THREE)
        assert max(render(query, "contour_tint", 768).size) <= 768
        del image, mask, found
        gc.collect()


def test_one_class_at_a_time_is_the_same() -> None:
    """Large images are predicted class by class, to the bit as small ones are."""
    logits = torch.randn(5, 24, 24, generator=torch.Generator().manual_seed(0))
    native = (1500, _LARGE // 1500 + 7)
    box = (round(96 * native[0] / native[1]), 96)
    whole = unpad_one(logits, box, 96, native).argmax(0)
    assert (predicted_classes(logits, box, 96, native) == whole).all()


# ---- data sets ----


def folder_with(path: Path, count: int = 4) -> Path:
    """A folder of images and masks."""
    for part in ("images", "masks"):
        (path / part).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (path / part / f"{index}.png").write_bytes(sample("PNG"))
    return path


NAMES = st.one_of(
    TEXTS,
    st.sampled_from(["0", "1", "2", "3", "0.png", "../0", "/etc/passwd", "0\r", "\ufeff1", "a,b", '"', "train", "val"]),
)


def test_lists(tmp_path: Path, record_property: Record) -> None:
    """Lists, tables and class names of any content, in any encoding."""
    tried = Tried()
    folder = folder_with(tmp_path)
    (folder / "classes.txt").write_text("background\nred\nblue\n")
    whole = [
        b"0\r\n1\r\n",
        b"\xef\xbb\xbf0\n1\n",
        b"caf\xe9\n",
        b"0\x001\n",
        b"0\n0\n",
        b"\xff\xfe0\0",
        b"",
        b"../0\n",
        b"/etc/passwd\n",
        b"2\n3\n",
    ]
    content = st.one_of(
        st.sampled_from(whole), st.lists(NAMES, max_size=4).map(lambda n: "\n".join(n).encode("utf-8", "replace"))
    )
    table = st.lists(st.tuples(NAMES, NAMES), max_size=5).map(
        lambda rows: "id,split\n" + "".join(f"{a},{b}\n" for a, b in rows)
    )

    @fuzz(200)
    @given(
        content,
        content,
        st.one_of(st.none(), table.map(lambda t: t.encode("utf-8", "replace")), content),
        st.one_of(st.none(), st.none(), content),
    )
    def check(train: bytes, val: bytes, split: bytes | None, classes: bytes | None) -> None:
        files = {
            "train.txt": train,
            "val.txt": val,
            "split.csv": split,
            "classes.txt": classes or b"background\nred\nblue\n",
        }
        for name, data in files.items():
            (folder / name).unlink(missing_ok=True)
            if data is not None:
                (folder / name).write_bytes(data)
        with tried.case():
            check_data(load_data(str(folder)))

    check()
    tried.report(record_property)


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("train.txt", b"0\n\xe9\n", "train.txt: line 2 is not UTF-8"),
        ("train.txt", b"0\x00\n", "zero byte"),
        ("split.csv", b"id,split\n0,train\n\xff", "split.csv: line 3 is not UTF-8"),
        ("split.csv", b'id,split\n"' + b"x" * 200_000, "split.csv: no CSV"),
        ("classes.txt", b"background\n\xff", "classes.txt: line 2 is not UTF-8"),
    ],
)
def test_lists_that_are_no_text(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    """They ended in a UnicodeDecodeError or a csv.Error."""
    folder = folder_with(tmp_path)
    (folder / "val.txt").write_text("1\n2\n")
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        load_data(str(folder))


def test_class_names_with_a_byte_order_mark(tmp_path: Path) -> None:
    """It became part of the name of class 0."""
    folder = folder_with(tmp_path)
    (folder / "classes.txt").write_bytes(b"\xef\xbb\xbfbackground\r\nred\r\nblue\r\n")
    assert load_data(str(folder), leaks="off").labels.names == ("background", "red", "blue")


def test_options_of_sources(tmp_path: Path, record_property: Record) -> None:
    """Classes, palettes, values and limits of any type."""
    tried = Tried()
    folder = folder_with(tmp_path)
    names = st.sampled_from(["classes", "palette", "values", "max_train", "max_test", "splits", "x"])
    close = st.sampled_from(
        [
            ["a", "b", "c"],
            [[0, 0, 0], [1, 1, 1], [2, 2, 2]],
            [0, 1, 2],
            [0, 1, 999],
            [[0, 0], [1]],
            [300, 0, 1],
            2,
            "toy",
        ]
    )

    @fuzz(250)
    @given(
        st.dictionaries(names, st.one_of(close, WILD), max_size=2),
        st.sampled_from([0.25, 1, 10**6, "x", None, float("nan")]),
    )
    def check(options: dict[str, Any], share: Any) -> None:
        with tried.case():
            load_data(str(folder), options=options, val_share=share)

    check()
    tried.report(record_property)


def test_odd_columns(tmp_path: Path, record_property: Record) -> None:
    """Tables that `datasets` reads, with columns of other types and missing cells."""
    tried = Tried()
    good = [cell(sample("PNG")) for _ in range(4)]
    tables: list[dict[str, Any]] = [
        {"image": good, "mask": good},
        {"image": [1, 2, 3, 4], "mask": good},
        {"image": ["a"] * 4, "mask": ["b"] * 4},
        {"image": good, "mask": [*good[:3], None]},
        {"image": good, "mask": good, "id": [None, "a", "a", "../x"]},
        {"image": good, "mask": good, "id": [[1], [2], [3], [4]]},
        {"image": good},
        {"image": [good] * 4, "mask": good},
        {"image": [cell(b"")] * 4, "mask": good},
        {"image": [{"bytes": None, "path": "/etc/passwd"}] * 4, "mask": good},
    ]
    for number, table in enumerate(tables):
        path = tmp_path / f"{number}"
        DatasetDict({"train": Dataset.from_dict(table), "val": Dataset.from_dict(table)}).save_to_disk(str(path))
        with tried.case():
            check_data(load_data(str(path)))
    for damage in (b"", b"{}", b"[", b"\xff"):
        for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json"):
            broken = tmp_path / "0" / name
            kept = broken.read_bytes()
            broken.write_bytes(damage)
            with tried.case():
                load_data(str(tmp_path / "0"))
            broken.write_bytes(kept)
    tried.report(record_property)


def test_names_of_sources(record_property: Record) -> None:
    """Anything where a data set's name belongs."""
    tried = Tried()

    @fuzz(150)
    @given(
        st.one_of(
            TEXTS.filter(lambda text: text not in ("..", "/", "")),
            st.sampled_from(["toy", "x" * 5000, "a\0b", "~nobody/x", "voc", "folder", "hub"]),
        )
    )
    def check(name: str) -> None:
        with tried.case():
            load_data(name)

    check()
    tried.report(record_property)


def test_masks_of_a_store(tmp_path: Path, record_property: Record) -> None:
    """A predicted mask that was damaged on disk is named."""
    tried, store = Tried(), MaskStore(tmp_path, THREE)
    store.write("a", np.eye(8, dtype=np.uint8))
    data = store.path("a").read_bytes()
    for length in range(0, len(data), 8):
        store.path("a").write_bytes(data[:length])
        with tried.case():
            assert store["a"].shape == (8, 8)
    store.path("a").write_bytes(saved(Image.new("RGB", (8, 8)), "PNG"))
    with pytest.raises(DataError, match="a.png"):
        store["a"]
    tried.report(record_property)


def test_class_names_that_are_no_text() -> None:
    """A number of 5,000 digits has no text, and made Python itself complain."""
    assert LabelSpace([1, 2.5]).names == ("1", "2.5")  # type: ignore[arg-type]
    names = LabelSpace(["a", 10**5000]).names  # type: ignore[list-item,arg-type]
    assert names[0] == "a" and len(names[1]) < 400
