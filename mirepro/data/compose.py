"""Random things for rendered scenes, and what can be seen of them: boxes, masks, keypoints."""

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from mirepro import rng
from mirepro.data import masks, patterns, shapes
from mirepro.data.render import F64, I64, Draws, Layer, apply, rotation, visible

KEYPOINTS = {
    "names": list(shapes.KEYPOINTS),
    "flips": list(range(len(shapes.KEYPOINTS))),
    "sigmas": [0.08] * len(shapes.KEYPOINTS),
}
"""`flips[i]` is the keypoint that i becomes in a mirror image; shapes are drawn mirrored as often as not."""


def pose(draws: Draws, scale: F64, tilt: float, mirrored: bool) -> F64:
    """`(B, 2, 2)` random rotation (2 atan(tilt) at most), stretch and, if `mirrored`, mirror image of area scale^2.

    Six draws.
    """
    turn = rotation(draws.between(-tilt, tilt))
    stretch = draws.between(0.88, 1.12)
    mirror = np.where(draws.take(1)[:, 0] < 0.5 * mirrored, -1.0, 1.0)
    upside = np.where(draws.take(1)[:, 0] < 0.5, -1.0, 1.0) if tilt == 1 else np.ones_like(mirror)
    wide, high = scale * stretch * mirror * upside, scale / stretch * upside
    return np.stack([turn[..., 0] * wide[:, None], turn[..., 1] * high[:, None]], -1)


class Pose(TypedDict):
    """How freely a thing turns; see `thing`."""

    tilt: float
    grain: float
    mirrored: bool


CALM: Pose = {"tilt": 0.12, "grain": 0.2, "mirrored": False}
"""The labelled objects' pose: some 32 images a class must be enough to learn it."""


def thing(
    draws: Draws, outline: I64, pattern: I64, centre: F64, scale: F64, colours: F64,
    tilt: float = 1.0, grain: float = 1.0, mirrored: bool = True, present: NDArray[np.bool_] | None = None,
) -> Layer:  # fmt: skip
    """A layer with a random pose and texture.

    Args:
        draws: The scenes' numbers.
        outline: `(B,)` places in `shapes.OUTLINES`.
        pattern: `(B,)` places in `patterns.PATTERNS`.
        centre: `(B, 2)` centre of its box, pixels.
        scale: `(B,)` square root of its area, pixels.
        colours: `(B, 2, 3)`.
        tilt: See `pose`.
        grain: The texture turns by 2 atan(grain) at most.
        mirrored: See `pose`.
        present: `(B,)`, all by default.
    """
    period = draws.between(5.0, 6.5)
    texture = rotation(draws.between(-grain, grain)) / period[:, None, None]
    present = np.ones(len(outline), bool) if present is None else present
    axes = pose(draws, scale, tilt, mirrored)
    corners = apply(axes, shapes.vertex_table()[outline])
    centre = centre - (corners.min(1) + corners.max(1)) / 2
    return Layer(outline, present, centre, axes, pattern, texture, 0.9 * scale / period, colours, draws.take_bits())


LEVELS = np.array([0.15, 0.5, 0.85])
"""Brightness of the three parts of a picture, dealt out at random: every outline and texture shows in any channel."""


def palette(draws: Draws) -> I64:
    """`(B, 3)` places in `LEVELS`: background, first and second colour of things, in a random order."""
    return np.argsort(draws.take(3), axis=1, kind="stable")


def tint(draws: Draws, level: F64) -> F64:
    """`(B, 3)` a free colour near a level."""
    return np.clip(level[:, None] + draws.between(-0.08, 0.08)[:, None] + 0.4 * (draws.take(3) - 0.5), 0, 1)


def colours(draws: Draws, order: I64) -> F64:
    """`(B, 2, 3)` two free colours at the two levels that the background leaves, either way round."""
    swap = (draws.take(1)[:, 0] < 0.5).astype(np.int64)
    rows = np.arange(len(order))
    return np.stack([tint(draws, LEVELS[order[rows, 1 + (swap + i) % 2]]) for i in range(2)], 1)


def background(draws: Draws, order: I64) -> tuple[F64, F64, F64]:
    """Two colours `(B, 2, 3)` of the background's level, the fade between them, the light."""
    pair = np.stack([tint(draws, LEVELS[order[:, 0]]) for _ in range(2)], 1)
    fade = 4 * draws.take(2) - 2
    light = 0.4 * draws.take(2) - 0.2
    return pair, fade, light


def clutter(draws: Draws, order: I64, centre: F64, low: float, high: float, chance: float) -> Layer:
    """A plain outline with a free pattern; low and high bound the square root of its area in pixels."""
    word = draws.take_bits()
    outline = len(shapes.SHAPES) + rng.mulhi(word[:, 0], len(shapes.OUTLINES) - len(shapes.SHAPES))
    pattern = rng.mulhi(word[:, 1], len(patterns.PATTERNS))
    present = draws.take(1)[:, 0] < chance
    scale = draws.between(low, high)
    return thing(draws, outline, pattern, centre, scale, colours(draws, order), present=present)


def beside(draws: Draws, target: Layer, scale: F64) -> F64:
    """`(B, 2)` a random place near the rim of a layer, where clutter hides a part of it."""
    turn = rotation(draws.between(-1, 1))[..., 0]
    side = np.where(draws.take(1) < 0.5, -1.0, 1.0)
    reach = draws.between(0.5, 0.9) * scale
    return target.centre + turn * side * reach[:, None]


def annotations(owner: NDArray[np.int8], layers: list[Layer], number: int) -> list[dict[str, Any] | None]:
    """What shows of one layer in each scene of a batch: COCO objects, None for absent or almost hidden ones."""
    layer, seen = layers[number], visible(owner, number)
    points = apply(layer.axes, shapes.keypoint_table()[layer.outline]) + layer.centre[:, None]
    return [
        annotation(seen[b], points[b], int(layer.outline[b])) if layer.present[b] and seen[b].sum() >= 24 else None
        for b in range(len(seen))
    ]


def annotation(seen: NDArray[np.bool_], points: F64, category: int) -> dict[str, Any]:
    """A COCO object from its visible pixels.

    Args:
        seen: `(S, S)` visible pixels.
        points: `(5, 2)` keypoints in pixels.
        category: Shape number.

    Returns:
        Box, area and mask of the visible part; a keypoint has v = 2 where it shows, 1 where something hides it, and
        0 outside the image.
    """
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    flat: list[float] = []
    for x, y in points:
        within = 0 <= x < seen.shape[1] and 0 <= y < seen.shape[0]
        v = (2 if seen[int(y), int(x)] else 1) if within else 0
        flat += [round(float(x), 2), round(float(y), 2), v] if v else [0, 0, 0]
    return {
        "bbox": [int(b) for b in box], "category": category, "area": float(seen.sum()), "iscrowd": 0,
        "segmentation": masks.encode(seen), "keypoints": flat,
    }  # fmt: skip


def ppm(image: NDArray[np.uint8]) -> bytes:
    """An `(H, W, 3)` image as binary PPM: bytes that depend on no compressor."""
    return b"P6\n%d %d\n255\n" % (image.shape[1], image.shape[0]) + image.tobytes()
