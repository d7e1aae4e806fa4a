"""Masks in COCO's run-length encoding (column-major runs, zeros first; the compressed text of pycocotools)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encodes a mask.

    Args:
        mask: `(H, W)` bool.

    Returns:
        `{"size": [H, W], "counts": text}`, equal to pycocotools' encoding.
    """
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": "".join(_text(counts))}


def _text(counts: list[int]) -> list[str]:
    """Counts as 5-bit groups, lowest first, from the fourth count on as differences to the last but one."""
    out = []
    for i, count in enumerate(counts):
        x, more = count - counts[i - 2] if i > 2 else count, True
        while more:
            group = x & 0x1F
            x >>= 5
            more = x != (-1 if group & 0x10 else 0)
            out.append(chr(48 + (group | (0x20 if more else 0))))
    return out


def _counts(text: str) -> list[int]:
    counts: list[int] = []
    x = shift = 0
    for char in text:
        group = ord(char) - 48
        x |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:
                x -= 1 << shift
            counts.append(x + counts[-2] if len(counts) > 2 else x)
            x = shift = 0
    return counts


def decode(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The mask of a COCO segmentation: compressed or plain run lengths, or polygons.

    Returns:
        `(H, W)` bool.

    Raises:
        ValueError: The runs do not fill the image.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        counts = _counts(counts) if isinstance(counts, str) else counts
        values = (np.arange(len(counts)) & 1).astype(bool)
        flat = np.repeat(values, counts)
        if list(segmentation["size"]) != [height, width] or flat.size != height * width:
            raise ValueError(f"runs fill {flat.size} pixels of size {segmentation['size']}, not {height} x {width}")
        return flat.reshape(width, height).T
    from faster_coco_eval.core import mask as coco  # COCO's own polygon rasteriser

    parts = coco.decode(coco.frPyObjects(segmentation, height, width))
    return np.asarray(np.asarray(parts, bool).reshape(height, width, -1).any(axis=2))


def resize(mask: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """`(size, size)` mask of the nearest pixels."""
    rows = ((np.arange(size) + 0.5) * mask.shape[0] / size).astype(np.int64)
    columns = ((np.arange(size) + 0.5) * mask.shape[1] / size).astype(np.int64)
    return mask[rows][:, columns]
