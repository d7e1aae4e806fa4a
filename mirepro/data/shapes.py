"""Twelve asymmetric outlines with named keypoints, and three plain outlines for clutter.

Every outline is one polygon (the mug has a hole), moved and scaled to area 1 with its box around 0, so that
neither area nor position tells the shape. Coordinates: x right, y down.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]

KEYPOINTS = ("head", "tail", "arm", "corner", "notch")
"""Each names a place on the outline that a mirror image keeps: no keypoint changes its name under a flip."""


@dataclass(frozen=True)
class Shape:
    """An outline: closed rings (inside by the even-odd rule) and its keypoints in the order of `KEYPOINTS`."""

    name: str
    rings: tuple[tuple[Point, ...], ...]
    keypoints: tuple[Point, ...] = ()


_RAW = (
    Shape("ell", (((0, 0), (4, 0), (4, 8.2), (9, 8.2), (9, 12), (0, 12)),),
          ((2, 1.3), (7.7, 10.1), (1.6, 5.4), (1.3, 10.7), (4.6, 9.2))),
    Shape("flag", (((0, 0), (3, 0), (10.5, 3.8), (3, 7.6), (3, 11), (0, 11)),),
          ((8, 3.8), (1.5, 9.8), (3.2, 6), (1.3, 1.3), (3.2, 1.6))),
    Shape("hammer", (((0, 2), (2, 0), (10, 0), (10, 4), (7, 4), (7, 11), (4, 11), (4, 4), (0, 4)),),
          ((1.4, 2.4), (5.5, 9.8), (8.7, 2.7), (8.7, 1.3), (5.5, 3.5))),
    Shape("house", (((0, 5), (5, 0), (6.6, 1.6), (6.6, -1), (9.2, -1), (9.2, 4.2), (10, 5), (8.8, 5), (8.8, 10),
                     (1.2, 10), (1.2, 5)),),
          ((5, 1.7), (7.5, 8.7), (7.9, 0.3), (2.5, 8.7), (1.9, 4.6))),
    Shape("fish", (((0, 5), (2.5, 2.2), (5, -1), (6.2, 2.2), (8.5, 4), (12, 0.8), (12, 9), (8.5, 6.4), (5.5, 8.6),
                    (2.2, 7.6)),),
          ((1.6, 5), (10.8, 7.2), (5, 1.2), (10.8, 3), (8.5, 5.2))),
    Shape("arrow", (((0, 3.4), (5.4, 3.4), (5.4, -1), (11, 5), (5.4, 9), (5.4, 7.2), (0, 7.2)),),
          ((9.2, 5), (1.3, 4.6), (6.5, 1.8), (1.3, 6), (6.4, 7.2))),
    Shape("bolt", (((4, 0), (9.4, 0), (7, 4.2), (10.5, 4.2), (2.4, 12.4), (4.2, 7.4), (0.8, 7.4)),),
          ((7.6, 1.2), (4.2, 9.6), (8.4, 5.2), (5, 1.2), (2.6, 6.4))),
    Shape("cane", (((0, 3), (3, 0), (7, 0), (10, 3), (10, 11), (6.6, 11), (6.6, 4.4), (5.8, 3.5), (4.2, 3.5),
                    (3.4, 4.4), (3.4, 6.6), (0, 6.6)),),
          ((1.7, 5.3), (8.3, 9.6), (5, 1.5), (8.3, 3.2), (2.2, 2.6))),
    Shape("step", (((0, 0), (7.4, 0), (7.4, 6), (11, 6), (13, 8), (11, 10), (3.8, 10), (3.8, 4), (0, 4)),),
          ((1.4, 1.4), (11.3, 8), (6, 1.4), (5.2, 8.6), (6, 6.9))),
    Shape("mug", (((0, 0), (7, 0), (7, 0.4), (11.4, 0.4), (11.4, 6.8), (7, 6.8), (7, 10), (0, 10)),
                  ((7, 2.6), (9.2, 2.6), (9.2, 4.8), (7, 4.8))),
          ((1.4, 1.4), (5.6, 8.6), (10.3, 1.6), (1.4, 8.6), (10.3, 5.7))),
    Shape("eff", (((0, 0), (10.5, 0), (10.5, 3.3), (3.5, 3.3), (3.5, 5.2), (7.4, 5.2), (7.4, 8.4), (3.5, 8.4),
                   (3.5, 12), (0, 12)),),
          ((9.1, 1.65), (1.75, 10.6), (6, 6.8), (1.5, 1.5), (2.2, 6.8))),
    Shape("horned", (((4.8, 0.1), (7.5, 0.7), (9.2, 2.2), (5, 5.2), (10, 5.8), (9.2, 8), (7.2, 9.5), (5, 10),
                      (2.5, 9.4), (0.7, 7.5), (0, 5), (0.5, 2.8), (1, 1.8), (0.8, -2.6)),),
          ((1.8, 0.2), (2.4, 7.8), (7.4, 2), (8.2, 6.9), (4, 5.2))),
)  # fmt: skip


def _disc(sides: int = 4) -> tuple[Point, ...]:
    """A circle's points from the rational parametrisation, `sides` per quarter."""
    quarter = [((1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)) for t in (i / sides for i in range(sides))]
    points: list[Point] = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return tuple(points)


_CLUTTER = (
    Shape("bar", (((0, 0), (3, 0), (3, 1.6), (0, 1.6)),)),
    Shape("wedge", (((0, 0), (2, 0.4), (0.6, 1.7)),)),
    Shape("disc", (_disc(),)),
)


def _area(ring: tuple[Point, ...]) -> float:
    """Enclosed area (shoelace formula)."""
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(ring, ring[1:] + ring[:1], strict=True))) / 2


def _normalised(shape: Shape) -> Shape:
    """The shape with area 1 and its box's centre at 0; rings after the first are holes."""
    side = float(np.sqrt(_area(shape.rings[0]) - sum(_area(hole) for hole in shape.rings[1:])))
    xs, ys = zip(*shape.rings[0], strict=True)
    x0, y0 = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2

    def move(points: tuple[Point, ...]) -> tuple[Point, ...]:
        return tuple(((x - x0) / side, (y - y0) / side) for x, y in points)

    return Shape(shape.name, tuple(move(r) for r in shape.rings), move(shape.keypoints))


SHAPES = tuple(_normalised(s) for s in _RAW)
OUTLINES = SHAPES + tuple(_normalised(s) for s in _CLUTTER)
"""The twelve shapes, then the clutter: an outline's number is its place here."""


@cache
def keypoint_table() -> NDArray[np.float64]:
    """`(12, 5, 2)` keypoints in the shapes' own coordinates."""
    return np.array([s.keypoints for s in SHAPES])


@cache
def vertex_table() -> NDArray[np.float64]:
    """`(15, V, 2)` vertices of the outer rings, the first one repeated to equal length."""
    longest = max(len(o.rings[0]) for o in OUTLINES)
    return np.array([o.rings[0] + o.rings[0][:1] * (longest - len(o.rings[0])) for o in OUTLINES])


def inside(outline: int, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether points lie in an outline (even-odd rule: count the edges to the right of the point).

    Args:
        outline: Place in `OUTLINES`.
        u: x of the points in the outline's coordinates, any shape.
        v: y of the points.
    """
    result = np.zeros(u.shape, bool)
    for ring in OUTLINES[outline].rings:
        above = [y > v for _, y in ring]
        for i, (x1, y1) in enumerate(ring):
            j = (i + 1) % len(ring)
            x2, y2 = ring[j]
            if y1 != y2:
                slope = (x2 - x1) / (y2 - y1)
                result ^= (above[i] ^ above[j]) & (u < v * slope + (x1 - y1 * slope))
    return result
