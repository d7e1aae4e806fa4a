"""Data sets: rendered ones are built from nothing, licensed ones imported; all end as tar shards with a manifest."""

from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.data import desk, scenes, shards
from mirepro.errors import UserError

_RENDERED = {"desk": desk, "scenes": scenes}
NAMES = tuple(_RENDERED)
"""The data sets that the project renders itself."""


def build(name: str, folder: Path | str) -> dict[str, Any]:
    """Renders a data set and compares it with the manifest in its folder, if there is one.

    Args:
        name: One of `NAMES`.
        folder: The data set's folder, `data/<name>`.

    Returns:
        The manifest.

    Raises:
        UserError: Unknown name, or the bytes differ from the frozen manifest.
    """
    if name not in _RENDERED:
        raise UserError(f"data.{name}: unknown data set; rendered: {', '.join(NAMES)}; others are imported")
    module = _RENDERED[name]
    splits = {split: module.split(split) for split in module.SPLITS}
    frozen = (Path(folder) / "manifest.json").exists()
    return shards.write(folder, name, splits, module.META, frozen)


__all__ = ["NAMES", "build", "files"]
