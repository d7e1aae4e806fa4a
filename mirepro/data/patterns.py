"""Eight surface patterns: each mixes two free colours, so that texture tells them apart and colour does not."""

import numpy as np
from numpy.typing import NDArray

PATTERNS = ("plain", "stripes", "checks", "dots", "rings", "gradient", "halves", "speckle")

Plane = NDArray[np.float32]


def _fraction(x: Plane) -> Plane:
    return x - np.floor(x)


def _parity(x: Plane) -> NDArray[np.bool_]:
    return (np.floor(x).astype(np.int32) & 1).astype(bool)


def mix(pattern: int, x: Plane, y: Plane, radius: Plane, bits: NDArray[np.uint32]) -> Plane:
    """The share of the second colour at each point.

    Args:
        pattern: Place in `PATTERNS`.
        x: `(B, H, W)` first texture coordinate in periods, 0 at the object's centre.
        y: Second texture coordinate.
        radius: `(B, 1, 1)` half the object's extent in periods.
        bits: `(B, 2)` 64 random bits per object, the speckle's cells.

    Returns:
        `(B, H, W)` float32 in [0, 1].
    """
    name = PATTERNS[pattern]
    if name == "plain":
        return np.zeros_like(x)
    if name == "gradient":
        return np.clip(x / (np.float32(1.2) * radius) + np.float32(0.5), 0, 1).astype(np.float32)
    if name == "stripes":
        on = _parity(2 * x)
    elif name == "checks":
        on = _parity(2 * x) ^ _parity(2 * y)
    elif name == "dots":
        dx, dy = _fraction(x) - np.float32(0.5), _fraction(y) - np.float32(0.5)
        on = dx * dx + dy * dy < np.float32(0.13)
    elif name == "rings":
        on = _parity(2 * np.sqrt(x * x + y * y))
    elif name == "halves":
        on = x > 0
    else:
        on = _speckle(x, y, bits)
    return on.astype(np.float32)


def _speckle(x: Plane, y: Plane, bits: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Irregular cells: 64 random bits on an 8 x 8 lattice that repeats."""
    column = np.floor(x * np.float32(2.5)).astype(np.int32) & 7
    row = np.floor(y * np.float32(2.5)).astype(np.int32) & 7
    word = np.where(row < 4, bits[:, 0][:, None, None], bits[:, 1][:, None, None])
    return ((word >> ((row & 3) * 8 + column).astype(np.uint32)) & 1).astype(bool)
