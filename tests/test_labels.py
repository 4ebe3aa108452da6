"""What the pixels of images and masks mean: every spelling, and every way to get it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import BORDER_COLOR, VOID, LabelSpace
from vlm_itl.data.masks import DecodeRows, check_headers, make_rows, read_image, read_mask, row_ids

VOC = LabelSpace.voc()
INDICES = np.array([[0, 8, 15], [20, VOID, 1]], dtype=np.uint8)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    """Write an image and give its path."""
    image.save(path, **options)
    return path


def photo(width: int = 30, height: int = 20, mode: str = "RGB") -> Image.Image:
    """A small picture with some structure."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def palette_image(mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """A mask as VOC writes it."""
    image = Image.fromarray(mask)
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image


@pytest.mark.parametrize(
    "spelling",
    [
        palette_image(INDICES, VOC.palette),
        Image.fromarray(INDICES),
        Image.fromarray(VOC.colorize(INDICES)),
        Image.fromarray(VOC.colorize(INDICES)).convert("RGBA"),
        Image.fromarray(INDICES.astype(np.uint16)),
        Image.fromarray(INDICES.astype(np.int32)),
        Image.fromarray(INDICES).convert("LA"),
    ],
    ids=lambda image: image.mode,
)
def test_every_spelling_reads_the_same(spelling: Image.Image, tmp_path: Path) -> None:
    path = save(spelling, tmp_path / ("mask.tif" if spelling.mode == "I" else "mask.png"))
    mask = read_mask(path, VOC)
    assert mask.dtype == np.uint8 and mask.flags.writeable
    assert (mask == INDICES).all()
    assert read_mask(path, VOC, binary=True).tolist() == [[0, 1, 1], [1, VOID, 1]]
    assert (read_mask({"path": None, "bytes": path.read_bytes()}, VOC, name="x") == INDICES).all()


def test_one_bit_mask(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1"), tmp_path / "bit.png")
    assert read_mask(path, LabelSpace(("background", "thing"))).tolist() == [[0, 1]]


@pytest.mark.parametrize("value", [21, 37, 253, 254])
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_value_outside_names_file_and_value(value: int, mode: str, tmp_path: Path) -> None:
    mask = np.array([[0, 0], [0, value]], dtype=np.uint16 if mode == "I;16" else np.uint8)
    image = palette_image(mask, VOC.palette) if mode == "P" else Image.fromarray(mask)
    path = save(image, tmp_path / "wrong.png")
    with pytest.raises(DataError, match=rf"wrong\.png: mask value {value} at row 1, column 1"):
        read_mask(path, VOC)


def test_deep_value_is_not_wrapped(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.array([[256 + 8]], dtype=np.uint16)), tmp_path / "deep.png")
    with pytest.raises(DataError, match="mask value 264"):
        read_mask(path, VOC)


def test_colour_outside_names_file_and_colour(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.array([[[1, 2, 3]]], dtype=np.uint8)), tmp_path / "odd.png")
    with pytest.raises(DataError, match=r"odd\.png: mask colour \(1, 2, 3\)"):
        read_mask(path, VOC)


def test_border_colour_is_void_in_every_label_space(tmp_path: Path) -> None:
    labels = LabelSpace(("a", "b"), palette=[(0, 0, 0), (9, 9, 9)])
    pixels = np.array([[BORDER_COLOR, (9, 9, 9)]], dtype=np.uint8)
    assert read_mask(save(Image.fromarray(pixels), tmp_path / "m.png"), labels).tolist() == [[VOID, 1]]


def test_reordered_palette_is_refused(tmp_path: Path) -> None:
    swapped = VOC.palette.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    path = save(palette_image(np.array([[0, 1, 2]], dtype=np.uint8), swapped), tmp_path / "sorted.png")
    with pytest.raises(DataError, match=r"sorted\.png.*index and colour disagree"):
        read_mask(path, VOC)


@pytest.mark.parametrize("palette", [np.zeros((256, 3)), np.arange(256)[:, None].repeat(3, 1)], ids=["black", "grey"])
def test_a_palette_that_says_nothing_counts_by_index(palette: np.ndarray, tmp_path: Path) -> None:
    path = save(palette_image(INDICES, palette), tmp_path / "m.png")
    assert (read_mask(path, VOC) == INDICES).all()


def test_grey_values_can_be_named(tmp_path: Path) -> None:
    labels = LabelSpace(("background", "thing"), values=(0, 255))
    path = save(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)), tmp_path / "m.png")
    assert read_mask(path, labels).tolist() == [[0, 1]]
    with pytest.raises(DataError, match="value 1 "):
        read_mask(save(Image.fromarray(np.array([[1]], dtype=np.uint8)), tmp_path / "n.png"), labels)


def test_binary_knows_where_the_background_is() -> None:
    labels = LabelSpace(("tree", "background", "car")).binary()
    cell = Image.fromarray(np.array([[0, 1, 2, VOID]], dtype=np.uint8))
    assert read_mask(cell, labels).tolist() == [[1, 0, 1, VOID]]
    assert read_mask(np.array([[0, 1, VOID]]), labels).tolist() == [[0, 1, VOID]]  # an array is already merged


def test_array_is_checked() -> None:
    with pytest.raises(DataError, match="value 21"):
        read_mask(np.array([[21]]), VOC)
    with pytest.raises(DataError, match="value -1"):
        read_mask(np.array([[-1]]), VOC)
    with pytest.raises(DataError, match="two dimensions"):
        read_mask(np.zeros((2, 2, 2), dtype=np.uint8), VOC)


def test_jpeg_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="JPEG"):
        read_mask(save(photo(), tmp_path / "m.jpg"), VOC)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "YCbCr"])
def test_image_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((20, 30), 40_000, dtype=np.uint16))
    else:
        picture = photo(mode=mode)
    path = tmp_path / ("p.jpg" if mode in ("CMYK", "YCbCr") else "p.png")
    image = read_image(save(picture, path))
    assert image.mode == "RGB" and image.size == (30, 20)


def test_float_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pixel format 'F'"):
        read_image(save(photo(mode="F"), tmp_path / "p.tiff"))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_cut_file_is_named(share: float, suffix: str, tmp_path: Path) -> None:
    path = save(photo(200, 100), tmp_path / f"whole.{suffix}")
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"cut\.{suffix}"):
        read_image(cut)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\nxxxx"])
def test_not_an_image(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.png"):
        read_image(tmp_path / "x.png")
    with pytest.raises(DataError, match="row 'seven'"):
        read_mask({"path": None, "bytes": content}, VOC, name="seven")


def test_missing_file_and_empty_cell(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    for cell in (None, {"path": None, "bytes": None}):
        with pytest.raises(DataError, match="row 'r1'.*empty"):
            read_mask(cell, VOC, name="r1")


def test_exif_turns_image_and_header_alike(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = save(photo(30, 20), tmp_path / "turned.jpg", exif=exif)
    assert read_image(image).size == (20, 30)
    upright = save(Image.new("L", (20, 30)), tmp_path / "upright.png")
    lying = save(Image.new("L", (30, 20)), tmp_path / "lying.png")
    check_headers(make_rows(["a"], [image], [upright]))
    rows = make_rows(["a"], [image], [lying])
    with pytest.raises(DataError, match="'a'.*30x20.*20x30.*EXIF"):
        check_headers(rows)
    with pytest.raises(DataError, match="EXIF"):
        rows.with_transform(DecodeRows(VOC))[0]


def test_headers_find_missing_and_empty_cells(tmp_path: Path) -> None:
    image = save(photo(), tmp_path / "a.png")
    with pytest.raises(DataError, match="no such file"):
        check_headers(make_rows(["a"], [image], [tmp_path / "b.png"]))
    with pytest.raises(DataError, match="'a': no mask"):
        check_headers(make_rows(["a"], [image], [None]))
    check_headers(make_rows(["a"], [image]))  # no masks at all: the unlabelled pool


def test_rows_columns_apart(tmp_path: Path) -> None:
    image = save(photo(), tmp_path / "a.png")
    rows = make_rows(["a", "b"], [image, image]).with_transform(DecodeRows(VOC))
    assert row_ids(rows) == ["a", "b"]
    assert [picture.size for picture in rows["image"][:]] == [(30, 20)] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"names": ("one",)},
        {"names": ("a", "a")},
        {"names": tuple(f"class {index}" for index in range(255))},
        {"names": ("a", "b"), "palette": [(0, 0, 0)]},
        {"names": ("a", "b"), "palette": [(0, 0, 0), (0, 0, 0)]},
        {"names": ("a", "b"), "palette": [(0, 0, 0), (0, 0, 300)]},
        {"names": ("a", "b"), "values": (1, 1)},
        {"names": ("a", "b"), "values": (0, 256)},
        {"names": ("a", "b"), "ignore_index": 0},
    ],
)
def test_impossible_label_spaces(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LabelSpace(**arguments)


def test_label_space_is_a_value() -> None:
    assert hash(LabelSpace.voc()) == hash(VOC) and len({VOC, LabelSpace.voc(), VOC.binary()}) == 2
    assert LabelSpace(("a", "b")) != LabelSpace(("a", "b"), palette=[(0, 0, 0), (1, 1, 1)])
    assert VOC.binary().binary() == VOC.binary()
    with pytest.raises(ValueError):
        VOC.palette[0] = 1
