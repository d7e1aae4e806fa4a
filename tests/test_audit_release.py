"""Releases: what a publisher freezes and signs, as a folder, a tar and in a registry; and audits against them."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audited import Project, commit
from registries import serve

from mirepro.audit import archive, images, integrity, levels, registry, release, selftest, statement
from mirepro.audit.levels import Options
from mirepro.errors import UserError

TOOLS = ("docker-registry", "skopeo")


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Path:
    """A checkout to publish, with keys beside it."""
    shutil.copytree(project.root, tmp_path / "copy", symlinks=True)
    statement.new_keys(tmp_path / "key")
    return tmp_path / "copy"


def published(copy: Path, name: str = "release.tar") -> Path:
    """A release of the checkout, which then holds neither runs nor the signed list."""
    out = copy.parent / name
    release.publish(copy, "desk", copy.parent / "key", out)
    (copy / release.FILE).unlink()
    for folder in ("runs", "data/desk/shards"):
        shutil.rmtree(copy / folder)
    return out


def audit(copy: Path, level: int = 0, **options: Any) -> dict[str, Any]:
    """The report of a quiet audit."""
    return levels.audit(Options(str(copy), copy.parent / "out", level, **options), lambda line: None)


def states(report: dict[str, Any]) -> dict[str, str]:
    """Checks by name."""
    return {check["name"]: check["status"] for check in report["checks"]}


def test_a_tar_brings_artefacts_and_signature(copy: Path) -> None:
    """Level 0 checks against the release; without its key only the digests; nothing without the release."""
    tar, public = published(copy), copy.parent / "key.pub"
    report = audit(copy, remote=tar, publisher_key=public)
    assert (report["verdict"], states(report)["signature"]) == ("REPRODUCED", "pass"), report["why"]
    unsigned = {check["name"]: check for check in audit(copy, remote=tar)["checks"]}["signature"]
    assert (unsigned["status"], "files fit" in unsigned["detail"]) == ("not checked", True)
    assert states(audit(copy, publisher_key=public))["signature"] == "fail"
    selftest.swap(copy / "tables/desk/T1.json", '"n": 3', '"n": 4')
    for key in (public, None):
        assert states(audit(copy, remote=tar, publisher_key=key))["signature"] == "fail"


def test_tars_of_the_same_release_are_equal(copy: Path, tmp_path: Path) -> None:
    release.publish(copy, "desk", tmp_path / "key", tmp_path / "folder")
    release.publish(copy, "desk", tmp_path / "key", tmp_path / "a.tar")
    shutil.copytree(tmp_path / "folder", tmp_path / "moved")
    archive.pack(tmp_path / "moved", tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    (tmp_path / "moved" / release.FILE).write_text("{}")
    archive.pack(tmp_path / "moved", tmp_path / "c.tar")
    assert (tmp_path / "a.tar").read_bytes() != (tmp_path / "c.tar").read_bytes()


def test_the_list_names_everything(copy: Path, tmp_path: Path) -> None:
    """Every output of the lock, tables, code locks, parameters, the lock of images; and the commit."""
    lock = copy / integrity.IMAGES
    lock.parent.mkdir()
    sha256 = integrity.files.sha256(copy / "dvc.lock")
    text = f"images: {{cpu: {{digest: 'sha256:{'a' * 64}'}}}}\nfiles: {{dvc.lock: {sha256}}}\n"
    lock.write_text(text + f"tree: {images.tree(copy)}\n")
    commit(copy)
    release.publish(copy, "desk", tmp_path / "key", tmp_path / "release")
    _, inner = statement.read(tmp_path / "release" / release.FILE)
    named = {item["name"] for item in inner["subject"]}
    wanted = [integrity.IMAGES, "dvc.lock", "params.yaml", "tables/desk/T1.json", "locks/desk/pretrain.json"]
    wanted += ["runs/desk/pretrain/ir-s0/encoder.safetensors", "metrics/desk/evaluate/ir-s0.json"]
    assert set(wanted) <= named
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=copy, capture_output=True, text=True, check=True)
    assert inner["predicate"]["releaseId"] == head.stdout.strip()
    assert states(audit(copy, publisher_key=tmp_path / "key.pub"))["images"] == "pass"
    lock.write_text(lock.read_text().replace("aaaa", "bbbb"))
    found = states(audit(copy, publisher_key=tmp_path / "key.pub"))
    assert (found["images"], found["signature"]) == ("pass", "fail")
    lock.write_text(lock.read_text().replace(sha256, "0" * 64))
    assert states(audit(copy))["images"] == "fail"
    with pytest.raises(UserError, match="not committed: containers"):
        release.publish(copy, "desk", tmp_path / "key", tmp_path / "again")


def test_images_of_an_earlier_commit_are_not_published(copy: Path, tmp_path: Path) -> None:
    """Control: with a lock for this very tree, and that tree with the signed list, the same is published."""
    lock = copy / images.LOCK
    lock.parent.mkdir()
    sha256 = integrity.files.sha256(copy / "dvc.lock")
    text = f"images: {{cpu: {{digest: 'sha256:{'a' * 64}'}}}}\nfiles: {{dvc.lock: {sha256}}}\ntree: "
    lock.write_text(f"{text}{images.tree(copy)}\n")
    (copy / "docs" / "later.md").write_text("after the images")
    commit(copy)
    with pytest.raises(UserError, match=r"images.lock.yaml: built from tree \w{12}, this commit is tree .*--twice"):
        release.publish(copy, "desk", tmp_path / "key", tmp_path / "release")
    assert not (tmp_path / "release").exists()
    lock.write_text(f"{text}{images.tree(copy)}\n")
    commit(copy)
    for name in ("release", "again"):
        release.publish(copy, "desk", tmp_path / "key", tmp_path / name)
        commit(copy)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None) -> tarfile.TarInfo:
    """A member of a hostile archive."""
    facts = tarfile.TarInfo(name)
    facts.type, facts.linkname, facts.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
    facts.size = facts.size if size is None else size
    return facts


def sparse(name: str, size: int) -> tarfile.TarInfo:
    """A plain file by its type that says it is much larger than what is stored."""
    facts = member(name)
    facts.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(size)}
    return facts


HOSTILE = {
    "a climbing member": [member("../x")],
    "an absolute member": [member("/tmp/mirepro-x")],
    "a climbing member below a folder": [member("files/../../x")],
    "a link": [member("files", tarfile.SYMTYPE, "/etc")],
    "a hard link": [member("files", tarfile.LNKTYPE, "/etc/passwd")],
    "a file through a link": [member("files", tarfile.SYMTYPE, "/tmp"), member("files/x")],
    "a device": [member("files", tarfile.CHRTYPE)],
    "a pipe": [member("files", tarfile.FIFOTYPE)],
    "a name twice": [member("x"), member("x")],
    "a file below a file": [member("x"), member("x/y")],
    "a tar bomb": [sparse("x", 1 << 24)],
    "too large a file": [member("x", size=1 << 40)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path: Path, name: str) -> None:
    """Without the refusal of sparse files a tar of 10 kB fills the disk."""
    formats = [tarfile.PAX_FORMAT if facts.pax_headers else tarfile.GNU_FORMAT for facts in HOSTILE[name]]
    headers = [facts.tobuf(form) for facts, form in zip(HOSTILE[name], formats, strict=True)]
    bodies = [bytes([120] + [0] * 511) * (facts.size > 0) for facts in HOSTILE[name]]
    blocks = [part for pair in zip(headers, bodies, strict=True) for part in pair]
    (tmp_path / "x.tar").write_bytes(b"".join(blocks) + bytes(1024))
    with pytest.raises(UserError, match=r"refused|no path|not a tar file"):
        archive.unpack(tmp_path / "x.tar", tmp_path / "in" / "folder")
    assert not (tmp_path / "in" / "x").exists()
    assert not (tmp_path / "x").exists()
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "not a tar file"),
        (lambda path: path.write_bytes(b"PK" + bytes(5000)), "not a tar file"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: subprocess.run(["gzip", "-k", path], check=True) and path.with_suffix(".tar.gz").replace(path),
         "not a tar file"),
    ],
)  # fmt: skip
def test_damaged_archives(copy: Path, change: Callable[[Path], Any], message: str) -> None:
    tar = published(copy)
    change(tar)
    with pytest.raises(UserError, match=message):
        audit(copy, remote=tar)


def test_one_flipped_bit_in_a_tar(copy: Path) -> None:
    """Anywhere in an artefact: refused, and nothing of it is used."""
    tar = published(copy)
    with tarfile.open(tar) as opened:
        largest = max(opened, key=lambda item: item.size * item.name.startswith("files/"))
    content = bytearray(tar.read_bytes())
    content[largest.offset_data + largest.size // 2] ^= 1
    tar.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        audit(copy, remote=tar)


def test_addresses() -> None:
    for good in ("localhost:5000/a:1", "docker://ghcr.io/a/b:v1.0", f"ghcr.io/a/b@sha256:{'0' * 64}", "quay.io/a/b"):
        assert registry.address(good) == good.removeprefix("docker://")
    for bad in ("a", "--flag", "host/a b", "dir:/etc", "host/../a", "host/a@sha256:12", ""):
        with pytest.raises(UserError, match="no address"):
            registry.address(bad)


def test_command_line(copy: Path, root: Path, tmp_path: Path) -> None:
    def run(*arguments: str, folder: Path = copy) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mirepro", *arguments]
        env = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    result = run("publish", "../release.tar", "--key", "../key")
    assert (result.returncode, "files signed: ../release.tar" in result.stdout) == (0, True), result.stderr
    result = run("verify", release.FILE, "--key", "../key.pub")
    assert (result.returncode, "signature: good" in result.stdout) == (0, True)
    shutil.rmtree(copy / "runs")
    audited = ("audit", "copy", "--level", "0", "--remote", "release.tar", "--publisher-key", "key.pub")
    result = run(*audited, folder=tmp_path)
    assert (result.returncode, "REPRODUCED" in result.stdout) == (0, True), result.stdout + result.stderr
    for arguments, message in (
        (("publish", "../release.tar", "--key", "../key"), "choose another name"),
        (("publish", "inside", "--key", "../key"), "lies in the checkout"),
        (("publish", "../new", "--key", "../key.pub"), "not a private key"),
        (("publish", "../new", "--key", "../key", "--push", "dir:/x"), "no address"),
        (("publish", "../new", "--key", "../key"), "mirepro repro"),
    ):
        result = run(*arguments)
        assert (result.returncode, message in result.stderr, len(result.stderr.splitlines())) == (2, True, 1), result
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_dvc_pulls_from_a_release(copy: Path, tmp_path: Path) -> None:
    """DVC itself takes the folder for a remote; without an object it complains."""
    shutil.copytree(copy / "runs", tmp_path / "runs")
    out = published(copy, "release")
    home = {"HOME": str(tmp_path), "DVC_NO_ANALYTICS": "1", "PYTHONPATH": ""}

    def dvc(*arguments: str) -> int:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, cwd=copy, env=os.environ | home, capture_output=True, check=False).returncode

    assert dvc("init", "-q") == 0
    assert dvc("remote", "add", "-d", "release", str(out)) == 0
    assert dvc("pull", "pretrain@ir-s0", "evaluate@ball-s1") == 0
    for name in ("pretrain/ir-s0", "evaluate/ball-s1"):
        inner = [path for path in (tmp_path / "runs/desk" / name).rglob("*") if path.is_file()]
        assert inner
        for path in inner:
            assert (copy / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()
    shutil.rmtree(out / "files")
    assert dvc("pull", "pretrain@ball-s0") != 0


@pytest.mark.slow
@pytest.mark.infra
def test_registry_round_trip(copy: Path, tmp_path: Path) -> None:
    """Pushed, pulled by digest and audited; a flipped byte in the registry and another image are refused."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing and os.environ.get("MIREPRO_REQUIRE_INFRA") != "1":
        pytest.skip(f"not installed: {', '.join(missing)}")
    tar, public = published(copy), tmp_path / "key.pub"
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as (address, blobs):
        pinned = release.push(tar, f"{address}/mirepro/release:1")
        assert "@sha256:" in pinned
        for name in (pinned, f"docker://{address}/mirepro/release:1"):
            report = audit(copy, remote=name, publisher_key=public)
            assert (report["verdict"], states(report)["signature"]) == ("REPRODUCED", "pass"), report["why"]
        with pytest.raises(UserError, match="check the address"):
            audit(copy, remote=f"docker://{address}/mirepro/other:1")
        layer = integrity.files.sha256(tar)
        path = next(blobs.glob(f"docker/registry/v2/blobs/sha256/{layer[:2]}/{layer}/data"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match="did not match"):
            audit(copy, remote=pinned)


def test_layout_is_an_image(copy: Path, tmp_path: Path) -> None:
    """Every blob has the digest that refers to it."""
    tar = published(copy)
    digest = registry.layout(tar, tmp_path / "image")
    index = json.loads((tmp_path / "image/index.json").read_text())
    assert [item["digest"] for item in index["manifests"]] == [digest]
    manifest = json.loads(registry._checked(tmp_path / "image", digest).read_text())
    for item in (manifest["config"], *manifest["layers"]):
        assert registry._checked(tmp_path / "image", item["digest"]).stat().st_size == item["size"]
    selftest.flip(tmp_path / "image/blobs/sha256" / digest.removeprefix("sha256:"))
    with pytest.raises(UserError, match="other bytes"):
        registry._checked(tmp_path / "image", digest)
