"""A throw-away copy of what is audited: a folder, or a revision of a git repository; nothing of it is executed.

Only names that results and their code consist of are taken: `.mirepro/`, `.dvc/`, hooks and configuration stay behind.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mirepro.audit import safe
from mirepro.errors import UserError

TAKEN = (
    "audit.yaml", "containers", "csrc", "data", "docs", "dvc.lock", "dvc.yaml", "locks", "metrics", "mirepro",
    "params.yaml", "profiles", "published", "release.dsse.json", "relocks", "reports", "requirements.lock", "runs",
    "tables",
)  # fmt: skip
"""What is copied; everything else is ignored."""
SKIPPED = ("__pycache__", "node_modules", "build")
SKIPPED_SUFFIXES = (".so", ".pyc")
RECORDED = (".gitignore",)
FETCHED = ("runs/", "metrics/", "tables/", "reports/")
"""Where a remote's artefacts may lie: results, never code, parameters or the policy."""
PROTOCOLS = "file:git:http:https:ssh"
UNUSABLE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
FILE_BYTES, TOTAL_BYTES, COUNT = 2 << 30, 200 << 30, 200_000


@dataclass(frozen=True)
class Source:
    """The copy and where it came from.

    Attributes:
        copy: The throw-away folder.
        facts: `kind` (folder or git), `location`, `commit`, `changed` (files that differ from the commit).
    """

    copy: Path
    facts: dict[str, Any]


def take(what: str, copy: Path) -> Source:
    """Copies a folder, or a git URL or folder with `@revision`, to an empty folder.

    Raises:
        UserError: No such source or revision, or it holds links, submodules or too much.
    """
    place, at, revision = what.rpartition("@")
    if Path(what).is_dir():
        return _folder(Path(what), copy)
    if at and place and "/" not in revision and (Path(place).is_dir() or "://" in place):
        return _git(place, revision, copy)
    if "://" in what:
        return _git(what, "HEAD", copy)
    raise UserError(f"{what}: no such folder; give a folder, FOLDER@REVISION or a git URL")


def _folder(folder: Path, copy: Path) -> Source:
    taken = [name for name in TAKEN if (folder / name).exists() or (folder / name).is_symlink()]
    total = 0
    count = 0
    for name in taken:
        path = folder / name
        if path.is_symlink():
            raise UserError(f"{path}: refused; links are never followed")
        for file in safe.walk(path) if path.is_dir() else [path]:
            relative = file.relative_to(folder)
            if _ignored(relative):
                continue
            size = file.stat().st_size
            total, count = total + size, count + 1
            bounded(file, size, total, count)
            _copy(file, copy / relative)
    commit = _commit(folder)
    changed = None if commit is None else _changed(folder, commit, copy)
    return Source(copy, {"kind": "folder", "location": folder.resolve().name, "commit": commit, "changed": changed})


def _ignored(path: Path) -> bool:
    return path.suffix in SKIPPED_SUFFIXES or not set(path.parts).isdisjoint(SKIPPED)


def bounded(path: Path, size: int, total: int, count: int) -> None:
    """Refuses what is larger than any result.

    Raises:
        UserError: A file, or all of them together.
    """
    if path.suffix == ".json" and size > safe.JSON_BYTES:
        raise UserError(f"{path}: refused; {size} bytes of JSON exceed the limit of {safe.JSON_BYTES}")
    if size > FILE_BYTES or total > TOTAL_BYTES or count > COUNT:
        limits = f"{FILE_BYTES >> 30} GiB a file, {TOTAL_BYTES >> 30} GiB and {COUNT} files in all"
        raise UserError(f"{path}: refused; the limits are {limits}")


def _copy(source: Path, target: Path) -> None:
    """Copies a regular file's bytes; a link put there in the meantime is not followed."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as reader, _create(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def _create(target: Path) -> BinaryIO:
    """Opens a new file of the copy.

    Raises:
        UserError: The source's names for its files contradict each other, or are longer than names may be.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        words = f"{target}: refused; names of the source overlap or are too long ({error.strerror})"
        raise UserError(words) from error


def git(*arguments: str, folder: Path, content: bytes | None = None) -> bytes:
    """Runs git without hooks, file-system monitors, credentials and anybody's configuration.

    Only `clone` speaks with anybody: any other command on a partial clone would fetch what lacks from the remote that
    the source names, by a program that the source names. GIT_ALLOW_PROTOCOL counts before any configuration.

    Raises:
        UserError: git is missing or fails.
    """
    quiet = ["core.hooksPath=/dev/null", "core.fsmonitor=false", "safe.directory=*"]
    options = [part for setting in quiet for part in ("-c", setting)]
    kept = {name: os.environ[name] for name in ("PATH", "SSH_AUTH_SOCK") if name in os.environ}
    environment = kept | {
        "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C",
        "GIT_ASKPASS": "true", "GIT_NO_REPLACE_OBJECTS": "1", "HOME": "/nonexistent",
        "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": PROTOCOLS if arguments[0] == "clone" else "none",
    }  # fmt: skip
    command = ["git", *options, *arguments]
    try:
        result = subprocess.run(command, cwd=folder, env=environment, input=content, capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"git: {error.strerror}; apt-get install git") from error
    if result.returncode:
        reason = result.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"git {arguments[0]}: {reason[0]}; check the address and the revision")
    return result.stdout


def _git(place: str, revision: str, copy: Path) -> Source:
    """The blobs of a revision, byte for byte: no filter, no attribute, no hook."""
    if revision.startswith("-") or place.startswith("-"):
        raise UserError(f"{place}@{revision}: refused; no address or revision starts with a dash")
    repository = copy.with_name(f"{copy.name}.git")
    location = str(Path(place).resolve()) if Path(place).is_dir() else place
    git("clone", "--bare", "--quiet", "--no-hardlinks", "--", location, str(repository), folder=copy.parent)
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", folder=repository).decode().strip()
    _extract(repository, _tree(repository, commit), copy)
    shutil.rmtree(repository)
    shown = Path(place).resolve().name if Path(place).is_dir() else place
    return Source(copy, {"kind": "git", "location": shown, "commit": commit, "changed": []})


def _tree(repository: Path, commit: str) -> dict[str, str]:
    """`{path: blob}` of the taken names of a commit.

    Raises:
        UserError: A link or a submodule among them, or a path that leaves the folder.
    """
    found: dict[str, str] = {}
    for line in git("ls-tree", "-r", "-z", "--full-tree", commit, folder=repository).split(b"\0")[:-1]:
        facts, _, name = line.partition(b"\t")
        mode, _, blob = facts.decode().split()
        path = name.decode(errors="replace")
        if path.partition("/")[0] not in TAKEN or _ignored(Path(path)):
            continue
        if mode not in ("100644", "100755"):
            raise UserError(f"{path}: refused; links and submodules are never followed")
        if not any(part.startswith(".") for part in safe.inside(path, "git tree").split("/")):
            found[path] = blob
    return found


def _extract(repository: Path, tree: dict[str, str], copy: Path, portion: int = 500) -> None:
    total = 0
    names = list(tree)
    for start in range(0, len(names), portion):
        part = names[start : start + portion]
        wanted = "".join(f"{tree[name]}\n" for name in part).encode()
        sizes = git("cat-file", "--batch-check=%(objectsize)", folder=repository, content=wanted).splitlines()
        for place, (name, size) in enumerate(zip(part, sizes, strict=True)):
            if not size.isdigit():  # "<id> missing"
                raise UserError(f"{name}: its content {tree[name]} is not in the repository; fetch all of it there")
            total += int(size)
            bounded(Path(name), int(size), total, start + place)
        stream = memoryview(git("cat-file", "--batch", folder=repository, content=wanted))
        for name in part:
            stream = _one(stream, copy / name)


def _one(stream: memoryview, target: Path) -> memoryview:
    """Writes the first blob of git's batch output (`<id> blob <size>`, newline, content, newline)."""
    head = bytes(stream[:200]).partition(b"\n")[0]
    start, size = len(head) + 1, int(head.split()[2])
    with _create(target) as file:
        file.write(stream[start : start + size])
    return stream[start + size + 1 :]


def _commit(folder: Path) -> str | None:
    """The commit a folder stands at; None outside git."""
    if not (folder / ".git").exists():
        return None
    try:
        return git("rev-parse", "--verify", "--quiet", "HEAD", folder=folder).decode().strip()
    except UserError:
        return None


def _changed(folder: Path, commit: str, copy: Path) -> list[str]:
    """Files that differ from the commit, are gone or are not in it; runs and shards are never in git.

    Hashed here, since git would run the filters that the source configures.
    """
    recorded = _tree(folder, commit)
    here = {str(path.relative_to(copy)): path for path in safe.walk(copy)}
    changed = [
        name for name, blob in recorded.items() if name not in here or blob_id(here[name].read_bytes()) != blob
    ]  # fmt: skip
    added = [name for name in here if name not in recorded and not name.startswith("runs/") and "/shards/" not in name]
    return sorted(changed + added)


def blob_id(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fetch(copy: Path, remote: Path, outputs: Iterable[tuple[str, str]]) -> list[str]:
    """Takes outputs that are not there from a folder that is a DVC remote or cache; every byte is checked.

    Args:
        copy: The copy.
        remote: Holds `files/md5/ab/cdef...`.
        outputs: (path, md5 as in dvc.lock, with `.dir` for folders).

    Returns:
        The paths that the remote lacks, or that lie elsewhere than results do.

    Raises:
        UserError: No such remote, an object in it is damaged, or outputs overlap.
    """
    store = remote / "files" / "md5"
    if not store.is_dir():
        raise UserError(f"{remote}: no DVC remote or cache; it has no folder files/md5")
    lacking = []
    for path, md5 in outputs:
        wanted = _listing(store, path, md5) if path.startswith(FETCHED) else None
        if wanted is None or not all((store / one[:2] / one[2:]).is_file() for _, one in wanted):
            lacking.append(path)
            continue
        for name, one in wanted:
            _copy(_object(store, one, name), copy / name)
    return lacking


def _listing(store: Path, path: str, md5: str) -> Sequence[tuple[str, str]] | None:
    """(path, md5) of the files of an output; None where its folder's listing is not there."""
    safe.inside(path, "dvc.lock")
    if not md5.endswith(".dir"):
        return [(path, digest(md5))]
    found = store / digest(md5[:-4])[:2] / md5[2:]
    if not found.is_file():
        return None
    content = safe.regular(found, safe.JSON_BYTES)
    if hashlib.md5(content).hexdigest() != md5[:-4]:
        raise UserError(f"{found}: damaged; its content has another md5")
    items = safe.parse_json(content, str(found))
    try:
        return [(f"{path}/{safe.inside(item['relpath'], str(found))}", digest(item["md5"])) for item in items]
    except (KeyError, TypeError) as error:
        raise UserError(f"{found}: not a DVC folder listing") from error


def digest(text: Any) -> str:
    """An md5 in hex, checked before it becomes a path.

    Raises:
        UserError: It is none.
    """
    if not isinstance(text, str) or len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise UserError(f"dvc.lock: {text!r} is no md5")
    return text


def _object(store: Path, md5: str, name: str) -> Path:
    path = store / md5[:2] / md5[2:]
    if hashlib.md5(safe.regular(path)).hexdigest() != md5:
        raise UserError(f"{path}: damaged object of {name}; its content has another md5")
    return path


@dataclass(frozen=True)
class Hashes:
    """A file's size and digests."""

    size: int
    sha256: str
    md5: str


def inventory(copy: Path) -> dict[str, Hashes]:
    """Digests of every file of the copy, by path relative to it."""
    return {str(path.relative_to(copy)): hashes(path) for path in safe.walk(copy)}


def hashes(path: Path) -> Hashes:
    """Both digests of one file."""
    content = path.read_bytes()
    return Hashes(len(content), hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest())


def listing(found: dict[str, Hashes], folder: str) -> bytes:
    """DVC's listing of a folder, whose md5 is the folder's."""
    inner = {name[len(folder) + 1 :]: item.md5 for name, item in found.items() if name.startswith(f"{folder}/")}
    order = sorted(inner, key=lambda name: tuple(name.split("/")))
    return json.dumps([{"md5": inner[name], "relpath": name} for name in order], sort_keys=True).encode()


def folder_md5(found: dict[str, Hashes], folder: str) -> str | None:
    """DVC's digest of a folder; None where it holds no file."""
    content = listing(found, folder)
    return None if content == b"[]" else hashlib.md5(content).hexdigest() + ".dir"
