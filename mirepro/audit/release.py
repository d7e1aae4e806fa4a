"""The publisher's side: a signed list of all files of a result, and the artefacts that git does not hold.

A release is a folder, or a tar of it: `release.dsse.json` and `files/md5/...`, a local remote as DVC has it.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.audit import archive, images, integrity, registry, relock, safe, source, statement
from mirepro.audit.integrity import FAIL, PASS, UNKNOWN, Audited, Check
from mirepro.audit.statement import ABSENT
from mirepro.errors import UserError

FILE = images.RELEASE
FOLDERS = ("metrics", "tables", "reports", "locks", "relocks", "runs")


def names(audited: Audited) -> list[str]:
    """The files that a release signs: results, locks, evidence of re-pinning, parameters, manifests and policy."""
    name = audited.name
    folders = tuple(f"{folder}/{name}/" for folder in FOLDERS)
    own = str(audited.profile.path.parent.relative_to(audited.copy))
    beside = [f"{own}/{file}".removeprefix("./") for file in ("dvc.lock", "dvc.yaml", "params.yaml")]
    single = {*beside, integrity.IMAGES, "audit.yaml", "requirements.lock", f"published/{name}.csv"}
    single |= {f"data/{data}/manifest.json" for data in audited.profile.values["datasets"]}
    return sorted(path for path in audited.found if path.startswith(folders) or path in single)


def make(audited: Audited, key: Path, commit: str | None = None) -> dict[str, Any]:
    """The signed envelope over all files of a result."""
    subjects = [{"name": name, "digest": {"sha256": audited.found[name].sha256}} for name in names(audited)]
    predicate = {"name": f"mirepro {audited.name}", "purl": f"pkg:generic/mirepro-{audited.name}"}
    predicate |= {"releaseId": commit} if commit else {}
    return statement.envelope(statement.make(subjects, statement.RELEASE, predicate), statement.private_key(key))


def check(audited: Audited, key: Path | None, remote: Path | None = None) -> Check:
    """The publisher's signed list against the files.

    Args:
        audited: What is audited.
        key: The publisher's public key; without one the signature is not checked.
        remote: A release that the auditor named; its list counts, else that of the source.
    """
    given = remote is not None and (remote / FILE).is_file()
    path = remote / FILE if remote is not None and given else audited.copy / FILE
    if key is None and not given:
        return Check("signature", UNKNOWN, "signature: not checked (no --publisher-key)")
    public = None if key is None else statement.public_key(key)
    if not path.is_file():
        return Check("signature", FAIL, f"the source has no {FILE}, so nothing is signed by that key")
    outer, inner = statement.read(path)
    if key is not None and public is not None and not statement.signed_by(outer, public):
        return Check("signature", FAIL, f"{FILE} is not signed by {key.name}")
    wrong = [words for words in statement.differing(inner, audited.copy) if words != f"{integrity.IMAGES}: {ABSENT}"]
    named = {item["name"] for item in inner["subject"]}
    wrong += [f"{name}: not in the release" for name in names(audited) if name not in named]
    found = integrity.verdict("signature", wrong, f"{len(named)} files fit", "files differ from what was signed")
    if key is None:
        unsigned = f"the release's {found.detail}; signature: not checked (no --publisher-key)"
        return found if wrong else Check("signature", UNKNOWN, unsigned)
    return found if wrong else Check("signature", PASS, f"signed by {key.name}, {found.detail}")


def publish(root: Path, profile: str, key: Path, out: Path) -> int:
    """Freezes a result: checks it, signs the list of its files, and lays artefacts out as a DVC remote.

    Args:
        root: The publisher's checkout; the signed list is written there too.
        profile: Its profile.
        key: Private key.
        out: Empty folder for the release, or a new file that ends in .tar.

    Returns:
        The number of files signed.

    Raises:
        UserError: Something does not fit together, so that an audit of level 0 would fail.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out}: is there and not empty; choose another name")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out}: lies in the checkout; choose another folder")
    statement.private_key(key)
    if out.suffix != ".tar":
        return _publish(root, profile, key, out)
    with tempfile.TemporaryDirectory(prefix="mirepro-release-") as place:
        count = _publish(root, profile, key, Path(place) / "release")
        archive.pack(Path(place) / "release", out)
    return count


def _publish(root: Path, profile: str, key: Path, out: Path) -> int:
    copy = out / "copy"
    copy.mkdir(parents=True)
    taken = source.take(str(root), copy)
    if taken.facts["changed"] not in ([], [FILE]):
        changed = ", ".join((taken.facts["changed"] or ["everything: no git commit"])[:5])
        raise _withdraw(out, f"{root}: not committed: {changed}; commit first")
    if (root / images.LOCK).is_file() and (words := images.outdated(root)):
        raise _withdraw(out, f"{images.LOCK}: {words}; {images.REMEDY}")
    committed = integrity.locks(copy, profile)
    audited = integrity.open_copy(copy, profile)
    found = [*integrity.checks(audited, root, committed), relock.check(audited)]
    wrong = [f"{item.name}: {item.detail}" for item in found if item.status != integrity.PASS and item.name != "data"]
    if wrong:
        raise _withdraw(out, f"{root}: {'; '.join(wrong)}; `mirepro repro` first")
    envelope = make(audited, key, taken.facts["commit"])
    _store(audited, audited.lock, out)
    shutil.rmtree(copy)
    for folder in (out, root):
        files.write_json(folder / FILE, envelope)
    return len(names(audited))


def push(out: Path, name: str) -> str:
    """Puts a release, a folder or a tar, into an OCI registry; returns its address by digest.

    Raises:
        UserError: Not an address, no skopeo, or the registry refuses.
    """
    registry.address(name)
    with tempfile.TemporaryDirectory(prefix="mirepro-push-") as place:
        packed = out if out.is_file() else Path(place) / "release.tar"
        if packed != out:
            archive.pack(out, packed)
        return registry.push(packed, name, Path(place) / "image")


def receive(what: str | Path, work: Path) -> Path:
    """A release or another DVC remote as a folder; tars are unpacked and registries asked in the empty folder `work`.

    Raises:
        UserError: It cannot be fetched, or is hostile.
    """
    text = str(what)
    if not text.startswith(registry.PREFIX) and not text.endswith(".tar"):
        return Path(what)
    fetched = registry.pull(text, work / "image") if text.startswith(registry.PREFIX) else Path(what)
    archive.unpack(fetched, work / "release")
    return work / "release"


def _withdraw(out: Path, words: str) -> UserError:
    shutil.rmtree(out)
    return UserError(words)


def _store(audited: Audited, lock: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Outputs that git does not hold, as DVC's remote stores them."""
    for stage in lock.values():
        for one in stage.get("outs") or []:
            path = one["path"]
            if not path.startswith("runs/"):
                continue
            inner = {path} if path in audited.found else {n for n in audited.found if n.startswith(f"{path}/")}
            for name in inner:
                _put(out, audited.found[name].md5, safe.regular(audited.copy / name))
            if one["md5"].endswith(".dir"):
                _put(out, one["md5"], source.listing(audited.found, path))


def _put(out: Path, md5: str, content: bytes) -> None:
    path = out / "files" / "md5" / md5[:2] / md5[2:]
    if not path.exists():
        files.write_bytes(path, content)
