"""Files that are either there whole or not at all."""

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from mirepro.errors import UserError


def write_bytes(path: Path | str, content: bytes) -> None:
    """Writes a file atomically: temporary file beside it, fsync, rename.

    The temporary file's name is fixed, so that one left behind by a killed process is used up by the next attempt and
    never stays in a folder whose content is hashed.

    Raises:
        UserError: The folder is read-only, missing a permission, or the disk is full.
    """
    path = Path(path)
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _owned(fresh) as file:
            try:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
                os.replace(fresh, path)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise refusal(path, error) from error


def _owned(fresh: Path) -> BinaryIO:
    """Opens a temporary file, empty, that no other process writes; the lock goes when it is closed."""
    while True:
        file = fresh.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(file.fileno()), fresh.stat()):
                file.truncate(0)
                return file
        except FileNotFoundError:
            pass  # its former owner has renamed it meanwhile: it is the published file now
        file.close()


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refusal(path: Path, error: OSError) -> UserError:
    """Says in one line why a path cannot be written."""
    remedies = {
        errno.ENOSPC: "free some disk space and run the command again",
        errno.EROFS: "the file system is read-only; use another folder",
        errno.EACCES: "make the folder writable or use another one",
    }
    remedy = remedies.get(error.errno or 0, "check the folder")
    return UserError(f"{path}: cannot write ({error.strerror}); {remedy}")


def write_text(path: Path | str, content: str) -> None:
    """Writes UTF-8 text atomically; see `write_bytes`."""
    write_bytes(path, content.encode())


def dump_json(value: Any) -> str:
    """Canonical text of a JSON value: sorted keys, one space of indentation, a final newline."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path | str, value: Any) -> None:
    """Writes canonical JSON atomically; NaN and infinity are refused with ValueError."""
    write_text(path, dump_json(value))


def read_json(path: Path | str) -> Any:
    """Reads JSON.

    Raises:
        UserError: The file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the stage that makes it (`mirepro repro`)") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore or regenerate the file") from error


def sha256(path: Path | str) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
