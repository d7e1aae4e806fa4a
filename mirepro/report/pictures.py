"""Images inside the page: uncompressed PNG data URIs, and boxes, masks and keypoints drawn over them as SVG.

PNG pixels are stored, not compressed, because compressors differ between zlib versions and the page must not. Large
images are shrunk first, in whole numbers: no rounding of floats, hence the same bytes on every machine.
"""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mirepro.data.masks as masks

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7")


def thumbnail(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The image itself if it is small enough, else shrunk until its longer side has `side` pixels.

    Args:
        image: `(3, H, W)`.
        side: In pixels.
    """
    height, width = image.shape[1:]
    longest = max(height, width)
    if longest <= side:
        return image
    return resized(image, max(1, height * side // longest), max(1, width * side // longest))


def resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """`(3, height, width)`: each pixel the mean of the area that it covers in the image `(3, H, W)`, rounded.

    Weights and sums are whole numbers, below 2^63 for any image that fits in memory.
    """
    _, high, wide = image.shape
    total = _overlaps(high, height) @ image.astype(np.int64) @ _overlaps(wide, width).T
    return ((total + high * wide // 2) // (high * wide)).astype(np.uint8)


def _overlaps(old: int, new: int) -> NDArray[np.int64]:
    """`(new, old)`: how much of each old pixel a new one covers, where both rows of pixels are `old * new` long."""
    start, place = np.arange(new)[:, None] * old, np.arange(old) * new
    return np.maximum(0, np.minimum(start + old, place + new) - np.maximum(start, place))


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


def _segmentation(segmentation: Any, sx: float, sy: float, side: int) -> str:
    """Path data of a mask in a square of `side` pixels; polygons are scaled by sx and sy."""
    if isinstance(segmentation, Mapping):
        return mask_path(masks.resize(decode_rle(segmentation), side))
    return "".join(
        "M" + "L".join(f"{short(x * sx)} {short(y * sy)}" for x, y in zip(ring[::2], ring[1::2], strict=True)) + "z"
        for ring in segmentation
    )


def short(value: float) -> str:
    """A coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def marks(objects: Sequence[Mapping[str, Any]], frame: Sequence[int], side: int) -> str:
    """SVG elements of an image's objects.

    Args:
        objects: As COCO has them: `bbox` (x, y, w, h), `segmentation` (run lengths or polygons), `keypoints` (see
            `visible`), the last two optional.
        frame: Height and width of the image that they refer to, in pixels.
        side: Side of the square that is drawn on, in pixels.
    """
    sx, sy = side / frame[1], side / frame[0]
    return "".join(shape(item, COLOURS[i % len(COLOURS)], sx, sy, side) for i, item in enumerate(objects))


def shape(item: Mapping[str, Any], colour: str, sx: float, sy: float, side: int) -> str:
    """SVG elements of one object (see `marks`), its coordinates scaled by sx and sy."""
    x, y, width, height = (short(value * scale) for value, scale in zip(item["bbox"], (sx, sy) * 2, strict=True))
    parts = []
    if item.get("segmentation"):
        path = _segmentation(item["segmentation"], sx, sy, side)
        parts.append(f'<path d="{path}" fill="{colour}" fill-opacity=".45"/>')
    parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{colour}"/>')
    points = "".join(f"M{short(px * sx)} {short(py * sy)}h0" for px, py in visible(item.get("keypoints")))
    if points:  # lines of no length with round ends: dots, black ones below; a third of the bytes of circles
        parts += [
            f'<path class="dots" d="{points}" stroke="{stroke}" stroke-width="{width}"/>'
            for stroke, width in (("#000", 3), (colour, 2.2))
        ]
    return "".join(parts)


def visible(keypoints: Any) -> list[tuple[float, float]]:
    """The points to draw, of COCO's flat `x, y, v, ...` (those with v > 0) or of predicted `(K, 2)` pairs (all)."""
    points = np.asarray([] if keypoints is None else keypoints, float)
    if points.ndim < 2:
        points = points.reshape(-1, 3)
    return [(float(p[0]), float(p[1])) for p in points if len(p) < 3 or p[2] > 0]


def finds(image: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An image's detections as objects for `marks`."""
    none = [None] * len(image["boxes"])
    parts = zip(image["boxes"], image.get("masks") or none, image.get("keypoints") or none, strict=True)
    return [{"bbox": box, "segmentation": mask, "keypoints": points} for box, mask, points in parts]
