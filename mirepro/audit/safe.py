"""Reading files that a stranger wrote: bounded size and depth, no links, no way out of the folder, no pickle."""

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mirepro.errors import UserError

JSON_BYTES = 32 << 20
YAML_BYTES = 4 << 20
DEPTH = 40
DIGITS = 20
"""Of an integer in JSON: all of 64 bits; far more would not fit into a floating-point number."""
SUFFIXES = (".safetensors", ".json", ".jsonl", ".txt", ".tar", ".html", ".md")
"""What results consist of; anything else in an outputs folder is refused, pickles in particular."""


def regular(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file.

    Raises:
        UserError: A link, a device, a pipe, too large, or not there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; it is missing from what is audited") from error
    except OSError as error:
        raise UserError(f"{path}: refused ({error.strerror}); links are never followed") from error
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise UserError(f"{path}: refused; not a regular file")
        if limit is not None and facts.st_size > limit:
            raise UserError(f"{path}: refused; {facts.st_size} bytes exceed the limit of {limit}")
        return file.read()


def parse_json(content: bytes, name: str) -> Any:
    """Strict JSON: UTF-8 (escapes too), only finite numbers, no repeated key, bounded depth.

    Raises:
        UserError: Anything else.
    """
    try:
        value = json.loads(
            content.decode(), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite,
            parse_int=_bounded,
        )  # fmt: skip
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text and cannot be written
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: refused; not strict JSON ({error or 'too deep'})") from error
    if _depth(value, DEPTH) < 0:
        raise UserError(f"{name}: refused; nested deeper than {DEPTH}")
    return value


def read_json(path: Path) -> Any:
    """Reads strict JSON of a bounded size; see `regular` and `parse_json`."""
    return parse_json(regular(path, JSON_BYTES), str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _constant(text[:DIGITS])


def _bounded(text: str) -> int:
    if len(text.removeprefix("-")) > DIGITS:
        raise ValueError(f"an integer of more than {DIGITS} digits")
    return int(text)


def _depth(value: Any, left: int) -> int:
    """What is left of an allowed depth below a value; negative as soon as it is used up."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if left < 0:
        return left
    return min((_depth(item, left - 1) for item in inner), default=left)


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader without repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuses a repeated key."""
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len({repr(name) for name in names}) != len(names):
            raise yaml.YAMLError("a key is repeated")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping of a bounded size without aliases (which can grow without bound).

    Raises:
        UserError: Anything else.
    """
    content = regular(path, YAML_BYTES)
    try:
        text = content.decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader)):
            raise UserError(f"{path}: refused; YAML aliases are not allowed here")
        value = yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: refused; not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of keys")
    return value


def inside(name: Any, what: str) -> str:
    """A relative path that cannot leave its folder.

    Raises:
        UserError: Absolute, with `..`, empty, or no text.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise UserError(f"{what}: {name!r} is no path")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "" in parts or "." in parts:
        raise UserError(f"{what}: {name!r} is refused; paths stay inside the audited folder")
    return name


def walk(folder: Path) -> Iterator[Path]:
    """Regular files below a folder, sorted; hidden names are left out.

    Raises:
        UserError: A link, a device or a pipe.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            raise UserError(f"{path}: refused; links are never followed")
        if entry.is_dir(follow_symlinks=False):
            yield from walk(path)
        elif entry.is_file(follow_symlinks=False):
            yield path
        else:
            raise UserError(f"{path}: refused; neither a file nor a folder")


def harmless(path: Path) -> None:
    """Refuses a file that is no result: by suffix, and by the marks of pickles and archives of them.

    Raises:
        UserError: The file is refused.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: refused; results are {', '.join(SUFFIXES)}, and no pickle is ever loaded")
    if path.suffix == ".safetensors":
        _header(path)


def _header(path: Path) -> None:
    """Checks that a safetensors file starts with its JSON header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= JSON_BYTES or size > path.stat().st_size:
            raise UserError(f"{path}: refused; not a safetensors file (a pickle would start like this)")
        header = parse_json(file.read(size).rstrip(), str(path))
    if not isinstance(header, dict):
        raise UserError(f"{path}: refused; not a safetensors file")
