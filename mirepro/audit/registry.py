"""A release in an OCI registry: an image with one layer, the release's tar, moved by skopeo.

Format: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.audit import safe
from mirepro.errors import UserError

PREFIX = "docker://"
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d+)?/[a-z0-9][a-z0-9._/-]*(:[\w][\w.-]*|@sha256:[0-9a-f]{64})?")
LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1)(:\d+)?/")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def layout(archive: Path, folder: Path) -> str:
    """Lays an archive out as an OCI image in an empty folder; returns the manifest's digest."""
    (folder / "blobs" / "sha256").mkdir(parents=True)
    layer = files.sha256(archive)
    shutil.copyfile(archive, folder / "blobs" / "sha256" / layer)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}"]}}
    kind = "application/vnd.oci.image.layer.v1.tar"
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": _blob(folder, config, "application/vnd.oci.image.config.v1+json"),
        "layers": [{"mediaType": kind, "digest": f"sha256:{layer}", "size": archive.stat().st_size}],
    }  # fmt: skip
    found = _blob(folder, manifest, MANIFEST)
    files.write_json(folder / "index.json", {"schemaVersion": 2, "manifests": [found]})
    files.write_json(folder / "oci-layout", {"imageLayoutVersion": "1.0.0"})
    return str(found["digest"])


def _blob(folder: Path, content: dict[str, Any], kind: str) -> dict[str, Any]:
    text = files.dump_json(content).encode()
    name = hashlib.sha256(text).hexdigest()
    files.write_bytes(folder / "blobs" / "sha256" / name, text)
    return {"mediaType": kind, "digest": f"sha256:{name}", "size": len(text)}


def push(archive: Path, name: str, work: Path) -> str:
    """Puts an archive into a registry; returns the address by digest.

    Args:
        archive: A release's tar.
        name: `HOST/NAME:TAG`, with or without `docker://`.
        work: An empty folder.

    Raises:
        UserError: Not an address, skopeo is missing, or the registry refuses.
    """
    place = address(name)
    digest = layout(archive, work)
    _skopeo(f"oci:{work}", f"{PREFIX}{place}", _plain("dest", place))
    return f"{PREFIX}{place.partition('@')[0].rpartition(':')[0] if _tagged(place) else place}@{digest}"


def pull(name: str, work: Path) -> Path:
    """Fetches a release's tar into an empty folder; every blob has its digest.

    Raises:
        UserError: Not an address, skopeo is missing, the registry refuses, or it holds something else.
    """
    place = address(name)
    _skopeo(f"{PREFIX}{place}", f"oci:{work}", _plain("src", place))
    try:
        (found,) = safe.read_json(work / "index.json")["manifests"]
        manifest = safe.parse_json(_checked(work, found["digest"]).read_bytes(), name)
        (layer,) = manifest["layers"]
        return _checked(work, layer["digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: not a release; `mirepro publish --push` makes one ({error!r})") from error


def address(name: str) -> str:
    """`HOST/NAME:TAG` or `HOST/NAME@DIGEST`, checked.

    Raises:
        UserError: Something else.
    """
    place = name.removeprefix(PREFIX)
    if not NAME.fullmatch(place):
        raise UserError(f"{name}: no address of a registry; give HOST/NAME:TAG or HOST/NAME@sha256:...")
    return place


def _tagged(place: str) -> bool:
    return ":" in place.rpartition("/")[2]


def _plain(side: str, place: str) -> list[str]:
    """A registry on this machine may speak HTTP."""
    return [f"--{side}-tls-verify=false"] if LOOPBACK.match(place) else []


def _checked(work: Path, digest: str) -> Path:
    kind, _, name = digest.partition(":")
    path = work / "blobs" / safe.inside(kind, "registry") / safe.inside(name, "registry")
    if kind != "sha256" or not path.is_file() or files.sha256(path) != name:
        raise UserError(f"{digest}: the registry gave other bytes; fetch it again")
    return path


def _skopeo(source: str, target: str, options: list[str]) -> None:
    command = ["skopeo", "--insecure-policy", "copy", "-q", "--preserve-digests", *options, "--", source, target]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"skopeo: {error.strerror}; apt-get install skopeo") from error
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"skopeo: {source} -> {target}: {reason[0][-300:]}; check the address and `skopeo login`")
