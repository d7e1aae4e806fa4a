"""What imports read from: a folder or a tar of it, and images that must decode."""

import io
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from mirepro import files
from mirepro.errors import UserError


@contextmanager
def unpacked(path: Path | str, beside: Path) -> Iterator[Path]:
    """A source's folder; a tar (plain or compressed) is unpacked for the time of the import.

    Args:
        path: Folder or tar file.
        beside: The import's target; the temporary folder is made next to it.

    Raises:
        UserError: No such path, no tar, or a member that would land outside.
    """
    path = Path(path)
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; give the data's folder or a tar of it")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".import-", dir=beside.parent))
    except OSError as error:
        raise files.refusal(beside.parent, error) from error
    try:
        _extract(path, work)
        yield work
    except UserError as error:  # name the member of the tar instead of a temporary file
        raise UserError(str(error).replace(f"{work}/", f"{path}:").replace(str(work), str(path))) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _extract(path: Path, work: Path) -> None:
    """Files and folders only; Debian 12's Python has no extraction filters yet."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                target = work / member.name
                if member.name.startswith("/") or not Path(os.path.normpath(target)).is_relative_to(work):
                    raise UserError(f"{path}: member {member.name!r} leads out of the archive; nothing imported")
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                elif (content := tar.extractfile(member) if member.isreg() else None) is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open(target, "wb") as file:
                        shutil.copyfileobj(content, file)
                else:
                    raise UserError(f"{path}: member {member.name!r} is a link or a device; pack plain files")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a complete tar file ({reason}); fetch it again") from error
    except OSError as error:
        if error.errno is None:  # bz2 and gzip report damaged data so
            raise UserError(f"{path}: not a complete tar file ({error}); fetch it again") from error
        raise files.refusal(work, error) from error


def root(folder: Path, *members: str) -> Path | None:
    """The folder that holds all the members: the given one or one of its children; None where there is none."""
    children = sorted(p for p in folder.iterdir() if p.is_dir())
    return next((p for p in (folder, *children) if all((p / m).exists() for m in members)), None)


def read_image(path: Path) -> tuple[bytes, tuple[int, int]]:
    """An image file's bytes, once they are known to decode, and its (width, height).

    Raises:
        UserError: The file is missing or does not decode.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: missing or unreadable image ({error.strerror}); complete the data") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return content, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition(" <_io")[0]
        raise UserError(f"{path}: corrupt image ({reason}); fetch it again") from error
