"""A release as one tar file: packed the same way every time, unpacked with suspicion."""

import os
import shutil
import tarfile
from pathlib import Path

from mirepro import files
from mirepro.audit import safe, source
from mirepro.errors import UserError


def pack(folder: Path, archive: Path) -> None:
    """Writes the files of a folder in the order of their names, without times, owners and modes.

    Raises:
        UserError: The archive cannot be written.
    """
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(temporary, "x", format=tarfile.PAX_FORMAT) as tar:
            for path in safe.walk(folder):
                facts = tarfile.TarInfo(str(path.relative_to(folder)))
                facts.size = path.stat().st_size
                with path.open("rb") as file:
                    tar.addfile(facts, file)
        temporary.replace(archive)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise files.refusal(archive, error) from error


def unpack(archive: Path, folder: Path) -> None:
    """Takes the files of an archive into an empty folder.

    Raises:
        UserError: No tar file, damaged, too much, or a member that is no plain file inside the folder.
    """
    if not archive.is_file():
        raise UserError(f"{archive}: no such file; give a folder, a tar file or docker://HOST/NAME@DIGEST")
    total = 0
    try:
        with tarfile.open(archive, "r:") as tar:
            for count, member in enumerate(tar):
                name = safe.inside(member.name, str(archive))
                if member.type != tarfile.REGTYPE or _sparse(member):
                    raise UserError(f"{archive}: {name}: refused; a release holds plain files only")
                total += member.size
                source.bounded(Path(name), member.size, total, count)
                target, content = folder / name, tar.extractfile(member)
                if target.exists() or content is None:
                    raise UserError(f"{archive}: {name}: refused; it is there twice")
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive}: not a tar file, or a damaged one ({error}); fetch it again") from error


def _sparse(member: tarfile.TarInfo) -> bool:
    """Whether a member says that it is larger than what is stored; it bears the type of a plain file."""
    return member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers)
