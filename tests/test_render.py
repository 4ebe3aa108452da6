"""Every style: nothing drawn where nothing was asked, native size, the input untouched, errors in one line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.vlm.handler import JudgeQuery
from vlm_itl.vlm.render import (
    STYLES,
    inner_border,
    instruct,
    mark_positions,
    register_style,
    render,
    shrink,
    window_of,
)

VOC = LabelSpace.voc()
SAME_SIZE = ["overlay", "contour", "contour_tint", "marks"]


def scene(seed: int = 0, height: int = 60, width: int = 80) -> tuple[Image.Image, np.ndarray]:
    """Noise, with blocks of three classes and of void."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    blocks = rng.choice([0, 8, 12, 15, VOID], (height // 10, width // 10)).astype(np.uint8)
    return Image.fromarray(pixels), blocks.repeat(10, 0).repeat(10, 1)


def ask(seed: int = 0, **fields: object) -> JudgeQuery:
    image, mask = scene(seed)
    return JudgeQuery("a", image, mask, labels=VOC, **fields)


def test_the_seven_styles_are_there() -> None:
    assert list(STYLES) == ["overlay", "contour", "contour_tint", "crop", "blur", "side_by_side", "marks"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("class_ids", [(), (12,)])
@pytest.mark.parametrize("style", SAME_SIZE)
def test_what_was_not_asked_about_is_not_drawn(style: str, class_ids: tuple[int, ...], seed: int) -> None:
    query = ask(seed, class_ids=class_ids)
    before, drawn = np.asarray(query.image), np.asarray(render(query, style))
    asked = np.isin(query.mask, query.classes())
    assert drawn.shape == before.shape
    assert (drawn[~asked] == before[~asked]).all()
    for class_id in query.classes():
        assert (drawn[query.mask == class_id] != before[query.mask == class_id]).any()


@pytest.mark.parametrize("seed", range(3))
def test_blur_leaves_void_and_the_inside_alone(seed: int) -> None:
    query = ask(seed)
    before, drawn = np.asarray(query.image), np.asarray(render(query, "blur"))
    inside = np.zeros(query.mask.shape, bool)
    for class_id in query.classes():
        region = query.mask == class_id
        inside |= region & ~inner_border(region)
    kept = inside | (query.mask == VOID)
    assert (drawn[kept] == before[kept]).all() and (drawn[query.mask == 0] != before[query.mask == 0]).any()


def test_crop_is_the_window_of_contour_and_tint() -> None:
    image, mask = scene()
    mask[:] = 0
    mask[20:40, 30:50] = 8
    query = JudgeQuery("a", image, mask, labels=VOC)
    assert window_of(mask, (8,)) == (25, 15, 55, 45)
    wanted = np.asarray(render(query, "contour_tint"))[15:45, 25:55]
    assert (np.asarray(render(query, "crop")) == wanted).all()


def test_side_by_side_keeps_the_photograph() -> None:
    query = ask()
    drawn = np.asarray(render(query, "side_by_side"))
    assert (drawn[:, :80] == np.asarray(query.image)).all()
    assert (drawn[:, -80:] == np.asarray(render(query, "overlay"))).all()


@pytest.mark.parametrize("style", list(STYLES))
def test_styles_are_pure(style: str) -> None:
    query = ask()
    image, mask = np.asarray(query.image).copy(), query.mask.copy()
    first, second = render(query, style), render(query, style)
    assert first.mode == "RGB" and first.tobytes() == second.tobytes()
    assert (np.asarray(query.image) == image).all() and (query.mask == mask).all()


@pytest.mark.parametrize("style", list(STYLES))
def test_a_mask_without_objects_draws_nothing(style: str) -> None:
    image, mask = scene()
    mask[:] = 0
    query = JudgeQuery("a", image, mask, labels=VOC)
    drawn = np.asarray(render(query, style))
    if style in (*SAME_SIZE, "crop"):
        assert (drawn == np.asarray(image)).all()
    assert "Legend" not in instruct(query, style)


@pytest.mark.parametrize("style", list(STYLES))
def test_drawn_at_native_size_and_resized_once(style: str) -> None:
    query = ask()
    native = render(query, style)
    small = render(query, style, max_side=32)
    assert max(small.size) == 32
    assert small.tobytes() == native.resize(small.size, Image.Resampling.LANCZOS).tobytes()
    assert render(query, style, max_side=4000).size == native.size  # never enlarged


def test_tint_is_at_most_one_half() -> None:
    image, mask = scene()
    mask[:] = 8
    drawn = np.asarray(render(JudgeQuery("a", image, mask, labels=VOC)), dtype=int)
    wanted = (np.asarray(image, dtype=int) + VOC.palette[8].astype(int)) / 2
    assert np.abs(drawn - wanted).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (500, 8)])
@pytest.mark.parametrize("style", list(STYLES))
def test_odd_sizes(style: str, size: tuple[int, int]) -> None:
    mask = np.full(size[::-1], 8, np.uint8)
    query = JudgeQuery("a", Image.new("RGB", size), mask, labels=VOC)
    assert min(render(query, style).size) >= 1 and min(render(query, style, max_side=8).size) >= 1


def test_marks_lie_inside_and_small_regions_get_none() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[10:40, 10:40], mask[60:90, 60:90], mask[95, 95], mask[0, 50] = 8, 8, 8, 12
    found = mark_positions(mask, (8, 12))
    assert [number for number, *_ in found] == [1, 1, 2]
    assert all(mask[y, x] == (8, 12)[number - 1] for number, x, y, _ in found)


def test_instructions_name_colours_or_numbers_once() -> None:
    query = ask()
    assert "Legend: dark brown = cat, indigo = dog, rose = person." in instruct(query)
    assert "1 = cat, 2 = dog, 3 = person" in instruct(query, "marks")
    assert instruct(query).endswith(query.text())
    own = ask(question="With {legend}: is the mask right?")
    assert "Legend:" not in instruct(own) and instruct(own).count("= cat") == 1


def test_bad_input_is_one_line() -> None:
    for message, error, what in [
        ("Did you mean 'contour'", ConfigError, lambda: render(ask(), "contuor")),
        ("style", ConfigError, lambda: instruct(ask(), "contuor")),
        ("max_side", ConfigError, lambda: render(ask(), max_side=2)),
        ("max_side", ConfigError, lambda: shrink(Image.new("RGB", (9, 9)), "big")),
        ("context", ConfigError, lambda: window_of(np.zeros((4, 4), np.uint8), (1,), -1)),
        (
            "differ in size",
            DataError,
            lambda: render(JudgeQuery("a", Image.new("RGB", (3, 3)), ask().mask, labels=VOC)),
        ),
        ("PIL image", DataError, lambda: render(JudgeQuery("a", None, ask().mask, labels=VOC))),
    ]:
        with pytest.raises(error, match=message) as found:
            what()
        assert "\n" not in str(found.value)


def test_a_style_of_ones_own() -> None:
    @register_style("own", "Nothing to see.")
    def draw(image, mask, labels, class_ids):
        return image if class_ids else None

    try:
        query = ask()
        assert render(query, "own").tobytes() == query.image.tobytes() and instruct(query, "own").startswith("Nothing")
        query.mask[:] = 0
        with pytest.raises(DataError, match="must return a PIL image"):
            render(query, "own")
    finally:
        del STYLES["own"]
