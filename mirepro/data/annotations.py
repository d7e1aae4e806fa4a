"""JSON annotation files in COCO's format: every field has its type before anything is made of it."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mirepro import files
from mirepro.data import masks
from mirepro.errors import UserError

LIMIT = 10**9
"""Coordinates and areas are smaller; NaN and infinity are not."""
SLACK = 1.0
"""Pixels that a box may stick out of its image: COCO's own boxes are rounded."""
ENTRIES = {"images": "image", "annotations": "annotation", "categories": "category"}
"""What an entry of each list is called."""

_FILE = re.compile(r"[\w.-]+\.(jpg|png|ppm)", re.ASCII)


class Kind(NamedTuple):
    """What a field has to be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


Fields = Mapping[str, Mapping[str, Kind]]
"""For each list of a file the fields of its entries; `id` is always one of them."""


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**15  # a bool is an int, too, but no number in JSON


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LIMIT


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_numbers, _wholes = _each(_number), _each(_whole)


def _polygon(value: Any) -> bool:
    return _numbers(value) and len(value) >= 6 and len(value) % 2 == 0


def _shape(value: Any) -> bool:
    if isinstance(value, dict):
        counts = value.get("counts")
        return _wholes(value.get("size")) and (_text(counts) or _wholes(counts))
    return bool(value) and _each(_polygon)(value)


ID = Kind("a whole number", _whole)
IDS = Kind("a list of whole numbers", _wholes)
PIXELS = Kind("a number of pixels", lambda value: _whole(value) and value > 0)
TEXT = Kind("a text", _text)
TEXTS = Kind("a list of texts", _each(_text))
FILE = Kind("the name of an image file", lambda value: _text(value) and bool(_FILE.fullmatch(value)))
FLAG = Kind("0 or 1", lambda value: type(value) is int and value in (0, 1))
AREA = Kind("a number of square pixels", lambda value: _number(value) and value >= 0)
BOX = Kind("[x, y, width, height]", lambda value: _numbers(value) and len(value) == 4)
SHAPE = Kind("polygons of three points or more, or run lengths", _shape)
POSE = Kind("a list of x, y and 0, 1 or 2", lambda value: _numbers(value) and set(value[2::3]) <= {0, 1, 2})


def read(path: Path, kind: str, fields: Fields) -> dict[str, Any]:
    """An annotation file whose entries have the fields that its format defines, and ids of their own.

    Args:
        path: The file.
        kind: What it should be, with its article, for the message.
        fields: The fields of each list's entries.

    Raises:
        UserError: Missing, bad JSON; a list or a field is missing, a field is of another kind, an id stands twice.
    """
    content = _load(path)
    for part, kinds in fields.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path}: no list {part!r}; not {kind} annotation file")
        seen: set[int] = set()
        for place, entry in enumerate(entries):
            if trouble := _trouble(entry, kinds, seen):
                named = isinstance(entry, dict) and _whole(entry.get("id"))
                where = f"{ENTRIES[part]} {entry['id']}" if named else f"{part}[{place}]"
                raise UserError(f"{path}: {where}: {trouble}; fetch the file again")
            seen.add(entry["id"])
    return dict(content)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file; complete the data")
    try:
        return files.read_json(path)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists within lists
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from error


def _trouble(entry: Any, kinds: Mapping[str, Kind], seen: set[int]) -> str:
    """What is wrong with an entry; empty where nothing is."""
    if not isinstance(entry, dict):
        return f"{_short(entry)} is no object"
    for key, kind in kinds.items():
        if key not in entry:
            return f"no {key!r}"
        if not kind.fits(entry[key]):
            return f"{key}: {_short(entry[key])} is not {kind.words}"
    return "its id stands there twice" if entry["id"] in seen else ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_shape(one: Mapping[str, Any], width: int, height: int, where: str) -> None:
    """Compares an annotation's box and mask with its image.

    Raises:
        UserError: The box or a polygon lies outside, or the run lengths do not fill the image.
    """
    x, y, w, h = one["bbox"]
    if not (min(x, y) >= -SLACK and min(w, h) >= 0 and x + w <= width + SLACK and y + h <= height + SLACK):
        raise UserError(f"{where}: box {one['bbox']} lies outside its image of {width} x {height} pixels")
    shape = one["segmentation"]
    if isinstance(shape, dict):
        # Summed before they are decoded: a damaged number could ask for any amount of memory.
        counts = masks._counts(shape["counts"]) if isinstance(shape["counts"], str) else shape["counts"]
        good = shape["size"] == [height, width] and min(counts, default=0) >= 0 and sum(counts) == height * width
    else:
        good = all(abs(value) <= 2 * max(width, height) for polygon in shape for value in polygon)
    if not good:
        raise UserError(f"{where}: bad segmentation: it is not one of {width} x {height} pixels")
