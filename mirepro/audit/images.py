"""The tree that the container images are built from, and whether their lock still names the one of this commit."""

import hashlib
import subprocess
from pathlib import Path

from mirepro import files
from mirepro.audit import safe
from mirepro.errors import UserError

LOCK = "containers/images.lock.yaml"
RELEASE = "release.dsse.json"
MEASURED = "benchmarks/results/image.json"
LATER = (LOCK, RELEASE, MEASURED)
"""Files that are made from an image's digest, so that no image can hold them."""
REMEDY = "`containers/build --base mmdebstrap --twice` makes it anew"


def tree(root: Path) -> str:
    """sha256 over mode, blob and name of every file of a checkout's commit but those made from the digest.

    Raises:
        UserError: No git checkout with a commit.
    """
    command = ["git", "-C", str(root), "ls-tree", "-r", "--full-tree", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{root}: no commit of git; clone the repository or commit first")
    lines = (line for line in result.stdout.splitlines() if line.partition("\t")[2] not in LATER)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def outdated(root: Path) -> str:
    """Why the lock of a checkout was not written for its commit; empty where it was.

    Raises:
        UserError: No lock, or no git checkout.
    """
    path = root / LOCK
    if not path.is_file():
        raise UserError(f"{path}: is missing; {REMEDY}")
    content, here = safe.read_yaml(path), tree(root)
    built, inputs = content.get("tree"), content.get("files")
    if built == here:
        return ""
    known = inputs.items() if isinstance(inputs, dict) else ()
    other = [name for name, digest in known if not _is(root / str(name), digest)]
    words = f"built from tree {str(built)[:12]}, this commit is tree {here[:12]}"
    return f"{words} ({'other: ' + ', '.join(other) if other else 'the same locks and Dockerfile'})"


def _is(path: Path, digest: object) -> bool:
    return path.is_file() and files.sha256(path) == digest
