"""Paints batches of layered scenes; only + - * / and sqrt, element by element, so that every CPU gives the same bytes.

Sums run in a fixed order over slices and rotations come from (1 - t^2) / (1 + t^2) and 2 t / (1 + t^2): no libm, BLAS
or reduction whose order depends on the machine takes part.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirepro import rng
from mirepro.data import patterns, shapes

SAMPLES = 3
"""Sub-samples per pixel and axis."""
GENERATOR = 20051314
"""Seed of all rendered data; a scene's number is its counter."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Draws:
    """A scene's uniform numbers, taken in order."""

    def __init__(self, scene: NDArray[np.int64], total: int) -> None:
        self.values = rng.uniform(GENERATOR, rng.Stream.DATA, 0, scene, total).astype(np.float64)
        self.bits = rng.words(GENERATOR, rng.Stream.DATA, 1, scene, 64)
        self.used = self.used_bits = 0

    def take(self, n: int) -> F64:
        """`(B, n)` float64 in [0, 1)."""
        self.used += n
        assert self.used <= self.values.shape[1], "more draws than were asked for"
        return self.values[:, self.used - n : self.used]

    def between(self, low: float, high: float) -> F64:
        """`(B,)` float64 in [low, high)."""
        return low + (high - low) * self.take(1)[:, 0]

    def take_bits(self) -> NDArray[np.uint32]:
        """`(B, 2)` random words."""
        self.used_bits += 2
        return self.bits[:, self.used_bits - 2 : self.used_bits]


@dataclass(frozen=True)
class Layer:
    """One thing per scene of a batch, with pose in pixels."""

    outline: NDArray[np.int64]  # (B,) place in shapes.OUTLINES
    present: NDArray[np.bool_]  # (B,)
    centre: F64  # (B, 2) pixels
    axes: F64  # (B, 2, 2) outline -> pixels: columns are the images of the unit vectors
    pattern: NDArray[np.int64]  # (B,)
    texture: F64  # (B, 2, 2) pixels relative to the centre -> periods
    radius: F64  # (B,) half extent in periods
    colours: F64  # (B, 2, 3) in [0, 1]
    bits: NDArray[np.uint32]  # (B, 2)


def rotation(t: F64) -> F64:
    """`(B, 2, 2)` rotations by 2 atan(t), from rational functions."""
    c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def apply(matrix: F64, point: F64) -> F64:
    """`(B, ..., 2)` images of points under one 2 x 2 matrix per scene, without BLAS."""
    m = matrix.reshape(len(matrix), *(1,) * (point.ndim - 2), 2, 2)
    x, y = point[..., 0], point[..., 1]
    return np.stack([m[..., 0, 0] * x + m[..., 0, 1] * y, m[..., 1, 0] * x + m[..., 1, 1] * y], -1)


def inverse(matrix: F64) -> F64:
    """`(B, 2, 2)` inverses."""
    (a, b), (c, d) = (matrix[:, 0, 0], matrix[:, 0, 1]), (matrix[:, 1, 0], matrix[:, 1, 1])
    det = a * d - b * c
    return np.stack([np.stack([d / det, -b / det], -1), np.stack([-c / det, a / det], -1)], -2)


def _grid(size: int) -> tuple[F32, F32]:
    line = ((np.arange(size * SAMPLES) + 0.5) / SAMPLES).astype(np.float32)
    return line[None, None, :], line[None, :, None]


def _planes(matrix: F64, dx: F32, dy: F32) -> tuple[F32, F32]:
    m = matrix.astype(np.float32)[:, :, :, None, None]
    return m[:, 0, 0] * dx + m[:, 0, 1] * dy, m[:, 1, 0] * dx + m[:, 1, 1] * dy


def _paint(layer: Layer, number: int, size: int, canvas: F32, owner: NDArray[np.int8]) -> None:
    """Paints one layer over canvas `(B, 3, H, W)` and writes its number where it covers owner `(B, H, W)`."""
    xs, ys = _grid(size)
    for outline, pattern in sorted(set(zip(layer.outline.tolist(), layer.pattern.tolist(), strict=True))):
        rows = np.flatnonzero((layer.outline == outline) & (layer.pattern == pattern) & layer.present)
        if not len(rows):
            continue
        centre = layer.centre[rows].astype(np.float32)
        dx, dy = xs - centre[:, 0][:, None, None], ys - centre[:, 1][:, None, None]
        covered = shapes.inside(outline, *_planes(inverse(layer.axes[rows]), dx, dy))
        x, y = _planes(layer.texture[rows], dx, dy)
        radius = layer.radius[rows].astype(np.float32)[:, None, None]
        share = patterns.mix(pattern, x, y, radius, layer.bits[rows])
        first, second = layer.colours[rows].astype(np.float32).transpose(1, 0, 2)
        for channel in range(3):
            base = first[:, channel][:, None, None]
            colour = base + share * (second[:, channel][:, None, None] - base)
            canvas[rows, channel] = np.where(covered, colour, canvas[rows, channel])
        owner[rows] = np.where(covered, np.int8(number), owner[rows])


def _ramp(size: int, samples: int, direction: F64) -> F32:
    """`(B, H, W)` linear ramp over the image, 0 at its middle."""
    line = ((np.arange(size * samples) + 0.5) / (samples * size) - 0.5).astype(np.float32)
    d = direction.astype(np.float32)[:, :, None, None]
    return d[:, 0] * line[None, None, :] + d[:, 1] * line[None, :, None]


def scene(
    layers: list[Layer], background: F64, fade: F64, light: F64, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Renders a batch.

    Args:
        layers: From back to front.
        background: `(B, 2, 3)` two colours.
        fade: `(B, 2)` direction of the ramp from the first to the second colour.
        light: `(B, 2)` change of brightness over the image.
        size: Side in pixels.

    Returns:
        Images `(B, S, S, 3)` uint8 and the number of the topmost layer at every sub-sample `(B, S*3, S*3)`, -1 for
        the background.
    """
    share = np.clip(_ramp(size, SAMPLES, fade) + np.float32(0.5), 0, 1)
    low, high = background.astype(np.float32).transpose(1, 0, 2)[:, :, :, None, None]
    canvas = low + share[:, None] * (high - low)
    owner = np.full(share.shape, -1, np.int8)
    for number, layer in enumerate(layers):
        _paint(layer, number, size, canvas, owner)
    total = np.zeros((len(canvas), 3, size, size), np.float32)
    for i in range(SAMPLES):
        for j in range(SAMPLES):
            total += canvas[:, :, i::SAMPLES, j::SAMPLES]
    lit = total * (np.float32(255 / SAMPLES**2) * (np.float32(0.9) + _ramp(size, 1, light)[:, None]))
    return np.floor(np.clip(lit, 0, 255) + np.float32(0.5)).astype(np.uint8).transpose(0, 2, 3, 1), owner


def visible(owner: NDArray[np.int8], number: int) -> NDArray[np.bool_]:
    """`(B, S, S)` pixels of which a layer shows on at least half of the sub-samples."""
    own = (owner == number).astype(np.int32)
    count = sum(own[:, i::SAMPLES, j::SAMPLES] for i in range(SAMPLES) for j in range(SAMPLES))
    return np.asarray(2 * count >= SAMPLES**2)
