"""Boxes: folders that hold what one kind of recomputation needs and nothing of what it is to find."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mirepro import files, profiles
from mirepro.audit import integrity, safe
from mirepro.audit.sandbox import OWN
from mirepro.errors import UserError
from mirepro.profiles import Profile


def put(copy: Path, box: Path, names: Iterable[str]) -> None:
    """Copies files and folders that exist, by path relative to the copy."""
    for name in names:
        source, target = copy / name, box / name
        if target.exists() or not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, symlinks=True) if source.is_dir() else shutil.copyfile(source, target)


def take(room: Path, box: Path, names: Iterable[str]) -> None:
    """Moves results that foreign code left in its room, files or folders of files, to their places in the box.

    Raises:
        UserError: A link, a device or a pipe at or above any of them; the code could show other files as its results.
    """
    for name in names:
        for place in [*reversed(Path(name).parents), Path(name)]:
            if (room / place).is_symlink():
                raise UserError(f"{place}: refused; links are never followed")
        source, target = room / name, box / name
        found = list(safe.walk(source)) if source.is_dir() else [source] * source.exists()
        shutil.rmtree(target, ignore_errors=True)
        for path in found:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(place, safe.regular(path))


def base(copy: Path, box: Path, profile: Profile, sets: Iterable[str]) -> Profile:
    """A box with parameters, locks, published values and the intact shards of some data sets.

    Shards that differ from their manifest are left out, so that rendered data are made anew and others are missed.
    """
    parameters = str(profile.path.relative_to(copy))
    put(copy, box, ["params.yaml", parameters, f"locks/{profile.name}", f"published/{profile.name}.csv"])
    for name in sets:
        put(copy, box, [f"data/{name}/manifest.json"])
        listed = integrity.shards(copy, name)
        if all((copy / path).is_file() and files.sha256(copy / path) == sha256 for path, sha256 in listed):
            put(copy, box, [path for path, _ in listed])
    return profiles.load(box, profile.name)


def add_code(copy: Path, box: Path) -> None:
    """Puts the audited package into a box, with the judge's compiled operators if they are the same version.

    Raises:
        UserError: The operators differ, so that the audited code cannot run on this installation.
    """
    put(copy, box, ["mirepro", "docs/deviations.md"])
    version = "mirepro/ops_version.json"
    if not (box / version).is_file() or (box / version).read_bytes() != (OWN / version).read_bytes():
        raise UserError(f"{version}: the audited operators are another version; install the audited project to re-run")
    for library in (OWN / "mirepro").glob("*.so"):
        shutil.copyfile(library, box / "mirepro" / library.name)


def set_parameters(box: Path, profile: Profile, change: dict[str, Any]) -> Profile:
    """Changes parameters of a box (fresh or perturbed seeds) and reads its profile again."""
    values = profiles.merge(profile.values, change)
    files.write_text(profile.path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return profiles.load(box, profile.name)
