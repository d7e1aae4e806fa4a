"""Images inside the page: uncompressed PNG data URIs, and boxes, masks and keypoints drawn over them as SVG.

PNG pixels are stored, not compressed, because compressors differ between zlib versions and the page must not.
"""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7")


def png(image: NDArray[np.uint8]) -> bytes:
    """A PNG of an RGB image.

    Args:
        image: `(3, H, W)` uint8.
    """
    _, height, width = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = image.transpose(1, 2, 0).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", stored(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def stored(content: bytes) -> bytes:
    """A zlib stream of stored blocks (RFC 1950 and 1951, level 0)."""
    blocks = [content[start : start + 65535] for start in range(0, len(content), 65535)] or [b""]
    parts = [b"\x78\x01"]
    for place, block in enumerate(blocks):
        last = place == len(blocks) - 1
        parts.append(struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block)
    return b"".join(parts) + struct.pack(">I", zlib.adler32(content))


def uri(image: NDArray[np.uint8]) -> str:
    """The PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def decode_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """`(H, W)` mask of a COCO run-length encoding, compressed (string) or plain (list of counts).

    Source: COCO's maskApi.c (rleFrString): runs alternate from 0 in column order; from the third on they are
    differences to the run two before, in 5-bit groups, the lowest first.
    """
    height, width = rle["size"]
    counts = rle["counts"] if isinstance(rle["counts"], list) else _counts(rle["counts"])
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def _counts(text: str) -> list[int]:
    counts: list[int] = []
    place = 0
    while place < len(text):
        value, shift = 0, 0
        while True:
            group = ord(text[place]) - 48
            place += 1
            value |= (group & 31) << shift
            shift += 5
            if not group & 32:
                break
        if group & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def mask_path(mask: NDArray[np.bool_]) -> str:
    """SVG path data that covers the mask's pixels, one rectangle for each horizontal run."""
    padded = np.pad(mask.astype(np.int8), ((0, 0), (1, 1)))
    edges = np.diff(padded, axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    return "".join(f"M{x} {y}h{e - x}v1H{x}z" for x, y, e in zip(starts, rows, ends, strict=True))


def _segmentation(segmentation: Any) -> str:
    if isinstance(segmentation, Mapping):
        return mask_path(decode_rle(segmentation))
    return "".join(
        "M" + "L".join(f"{short(x)} {short(y)}" for x, y in zip(ring[::2], ring[1::2], strict=True)) + "z"
        for ring in segmentation
    )


def short(value: float) -> str:
    """A coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def shape(box: Sequence[float], colour: str, mask: Any = None, keypoints: Any = None) -> str:
    """SVG elements of one object.

    Args:
        box: x, y, w, h in pixels.
        colour: Stroke and fill.
        mask: COCO run-length encoding or polygons.
        keypoints: See `visible`.
    """
    x, y, width, height = (short(value) for value in box)
    parts = []
    if mask:
        parts.append(f'<path d="{_segmentation(mask)}" fill="{colour}" fill-opacity=".45"/>')
    parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{colour}"/>')
    parts += [
        f'<circle cx="{short(px)}" cy="{short(py)}" r="1.3" fill="{colour}" stroke="#000" stroke-width=".4"/>'
        for px, py in visible(keypoints)
    ]
    return "".join(parts)


def visible(keypoints: Any) -> list[tuple[float, float]]:
    """The points to draw, of COCO's flat `x, y, v, ...` (those with v > 0) or of predicted `(K, 2)` pairs (all)."""
    points = np.asarray([] if keypoints is None else keypoints, float)
    if points.ndim < 2:
        points = points.reshape(-1, 3)
    return [(float(p[0]), float(p[1])) for p in points if len(p) < 3 or p[2] > 0]


def truth(objects: Sequence[Mapping[str, Any]]) -> str:
    """SVG elements of an image's annotations."""
    return "".join(
        shape(item["bbox"], COLOURS[i % len(COLOURS)], item.get("segmentation"), item.get("keypoints"))
        for i, item in enumerate(objects)
    )


def found(image: Mapping[str, Any]) -> str:
    """SVG elements of an image's detections."""
    count = len(image["boxes"])
    masks, keypoints = image.get("masks") or [None] * count, image.get("keypoints") or [None] * count
    return "".join(shape(image["boxes"][i], COLOURS[i % len(COLOURS)], masks[i], keypoints[i]) for i in range(count))
