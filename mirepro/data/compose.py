"""Random things for rendered scenes, and what can be seen of them: boxes, masks, keypoints."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirepro import rng
from mirepro.data import masks, patterns, shapes
from mirepro.data.render import F64, Draws, Layer, apply, farthest, rotation, visible

KEYPOINTS = {
    "names": list(shapes.KEYPOINTS),
    "flips": list(range(len(shapes.KEYPOINTS))),
    "sigmas": [0.08] * len(shapes.KEYPOINTS),
}
"""`flips[i]` is the keypoint that i becomes in a mirror image; shapes are drawn mirrored as often as not."""


def pose(draws: Draws, scale: F64, tilt: float) -> F64:
    """`(B, 2, 2)` random rotation (2 atan(tilt) at most), stretch and mirror image of area scale^2.

    Six draws.
    """
    turn = rotation(draws.between(-tilt, tilt))
    stretch = draws.between(0.88, 1.12)
    mirror = np.where(draws.take(1)[:, 0] < 0.5, -1.0, 1.0)
    upside = np.where(draws.take(1)[:, 0] < 0.5, -1.0, 1.0) if tilt == 1 else np.ones_like(mirror)
    wide, high = scale * stretch * mirror * upside, scale / stretch * upside
    return np.stack([turn[..., 0] * wide[:, None], turn[..., 1] * high[:, None]], -1)


def thing(
    draws: Draws, outline: NDArray[np.int64], pattern: NDArray[np.int64], centre: F64, scale: F64, colours: F64,
    tilt: float = 1.0, present: NDArray[np.bool_] | None = None,
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
        present: `(B,)`, all by default.
    """
    period = draws.between(5.0, 7.5)
    texture = rotation(draws.between(-1, 1)) / period[:, None, None]
    present = np.ones(len(outline), bool) if present is None else present
    axes = pose(draws, scale, tilt)
    corners = apply(axes, shapes.vertex_table()[outline])
    centre = centre - (corners.min(1) + corners.max(1)) / 2
    return Layer(outline, present, centre, axes, pattern, texture, 0.9 * scale / period, colours, draws.take_bits())


def colours(draws: Draws) -> F64:
    """`(B, 2, 3)` two free colours: the second goes a random way towards the farthest of three from the first."""
    first, rest = draws.take(3), draws.take(9).reshape(-1, 3, 3)
    contrast = draws.between(0.45, 1.0)[:, None]
    return np.stack([first, first + contrast * (farthest(rest, [first]) - first)], 1)


def background(draws: Draws, things: list[F64]) -> tuple[F64, F64, F64]:
    """Two colours `(B, 2, 3)` that stand out against the things' colours, the fade between them, the light."""
    others = [pair[:, i] for pair in things for i in range(2)]
    base = farthest(draws.take(12).reshape(-1, 4, 3), others)
    second = np.clip(base + (draws.take(3) - 0.5), 0, 1)
    fade = 4 * draws.take(2) - 2
    light = 0.6 * draws.take(2) - 0.3
    return np.stack([base, second], 1), fade, light


def clutter(draws: Draws, centre: F64, low: float, high: float, chance: float) -> Layer:
    """A plain outline with a free pattern; low and high bound the square root of its area in pixels."""
    word = draws.take_bits()
    outline = len(shapes.SHAPES) + rng.mulhi(word[:, 0], len(shapes.OUTLINES) - len(shapes.SHAPES))
    pattern = rng.mulhi(word[:, 1], len(patterns.PATTERNS))
    present = draws.take(1)[:, 0] < chance
    scale = draws.between(low, high)
    return thing(draws, outline, pattern, centre, scale, colours(draws), present=present)


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
