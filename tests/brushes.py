"""What brush, outline and fill of the canvas mark, by their definitions: every pixel is asked, in whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Point = tuple[int, int]  # x, y


def stroke(shape: tuple[int, int], points: Sequence[Point], size: int) -> np.ndarray:  # (H, W) bool
    """All pixels whose centre is within size / 2 of the line through the centres of some pixels."""
    marked = np.zeros(shape, bool)
    for a, b in zip(points, points[1:] or points, strict=False):
        margin = size // 2 + 1
        x0, x1 = max(min(a[0], b[0]) - margin, 0), max(a[0], b[0]) + margin + 1
        y0, y1 = max(min(a[1], b[1]) - margin, 0), max(a[1], b[1]) + margin + 1
        part = marked[y0:y1, x0:x1]
        if part.size:
            y, x = np.mgrid[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]].astype(np.int64)
            part |= _near(x, y, a, b, size)
    return marked


def _near(x: np.ndarray, y: np.ndarray, a: Point, b: Point, size: int) -> np.ndarray:
    """Is a pixel near enough to the line from a to b?"""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, length = (x - a[0]) * dx + (y - a[1]) * dy, dx * dx + dy * dy
    to_a, to_b = (x - a[0]) ** 2 + (y - a[1]) ** 2, (x - b[0]) ** 2 + (y - b[1]) ** 2
    beside = 4 * ((x - a[0]) * dy - (y - a[1]) * dx) ** 2 <= size**2 * length
    return np.where(along <= 0, 4 * to_a <= size**2, np.where(along >= length, 4 * to_b <= size**2, beside))


def outline(shape: tuple[int, int], points: Sequence[Point]) -> np.ndarray:  # (H, W) bool
    """The inside of a closed line by the even-odd rule, and the line itself, one pixel wide."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.int64)
    left, right = np.zeros(shape, np.int64), np.zeros(shape, np.int64)  # how often the line passes on either side
    for a, b in zip(points, [*points[1:], points[0]], strict=True):
        crossed = (a[1] <= y) != (b[1] <= y)
        sign = 1 if b[1] > a[1] else -1
        offset = sign * ((y - a[1]) * (b[0] - a[0]) - (x - a[0]) * (b[1] - a[1]))  # 0: on the line
        left += crossed & (offset <= 0)
        right += crossed & (offset >= 0)
    inside = (left % 2 == 1) | (right % 2 == 1)  # a pixel on an edge is inside if it is so from one of its sides
    return inside | stroke(shape, [*points, points[0]], 1)


def area(mask: np.ndarray, point: Point) -> np.ndarray:  # (H, W) bool
    """All pixels of one class that hang together with a pixel, by their sides."""
    parts, _ = ndimage.label(mask == mask[point[1], point[0]])
    return parts == parts[point[1], point[0]]
