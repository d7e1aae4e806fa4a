"""The project's own image, built from its base with the real packages, as docs/containers.md has its users run it.

With a small result it is built once for all tests here; `make test-slow` builds the desk profile's twice.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import pytest
import yaml
from audited import Project, commit
from cluster import Cluster
from copied import lacking
from engines import Podman, docker, send
from registries import serve
from slurm_bench import cluster
from test_containers import REQUIRED, build, describe, faults, git, need

from mirepro.audit import images

__all__ = ["cluster", "docker"]

pytestmark = [pytest.mark.slow, pytest.mark.infra, pytest.mark.timeout(3600)]
once = pytest.mark.skipif(not REQUIRED, reason="builds a whole image; MIREPRO_REQUIRE_INFRA=1 wants it")
REPRODUCED = "REPRODUCED"


@dataclass(frozen=True)
class Built:
    """An image with its description, pulled from a registry.

    Attributes:
        checkout: The commit that it was built from.
        made: Folder of the build: lock, SBOM, provenance, and the image as the registry got it in `layout`.
        podman: Has pulled it by the digest of its lock.
    """

    checkout: Path
    made: Path
    podman: Podman

    @property
    def digest(self) -> str:
        """The digest that the lock names."""
        return digest(self.made)


def digest(made: Path) -> str:
    """The image's digest by the lock of a build."""
    return str(yaml.safe_load((made / "images.lock.yaml").read_text())["images"]["cpu"]["digest"])


def pulled(checkout: Path, made: Path, address: str, folder: Path) -> Built:
    """The image of a build, described, sent to a registry and fetched from there by its digest."""
    subprocess.run([sys.executable, checkout / "containers/describe", made], check=True)
    shutil.move(made / "cpu" / build.LAYOUT, made / "layout")
    build.drop(made / "cpu")
    send(f"{made}/layout:cpu", f"{address}/mirepro:cpu")
    podman = Podman(folder, f"{address}/mirepro@{digest(made)}")
    podman("pull", "-q", "--tls-verify=false", podman.image)
    podman("pull", "-q", "--tls-verify=false", f"{address}/mirepro@sha256:{'0' * 64}", code=125)
    return Built(checkout, made, podman)


SECRET = "-".join(("known", "to", "the", "host", "alone"))
"""Stands in the certificates and in the list of package sources; the image holds this file, so not as a word here."""
HOST, ELSEWHERE = ("-".join(("the", "image", "was", "built", end)) for end in ("here", "elsewhere"))
"""Host names of builds: long enough to be looked for in every file, which the machine's own need not be."""
NAMED = """
hostname "$1" && echo "$1" >"$2" || exit 1
if [ -e /etc/hostname ]; then mount --bind "$2" /etc/hostname || exit 1; fi
shift 2
exec "$@"
"""
"""Names the host for a command, in the file as well, which mmdebstrap copies into a base."""


def named(name: str, folder: Path) -> tuple[str | Path, ...]:
    """What stands before a command that is to see another host name; nothing for a user, who cannot give one."""
    return ("unshare", "--uts", "--mount", "sh", "-c", NAMED, "sh", name, folder / name) if os.geteuid() == 0 else ()


SOURCES = f"""# {SECRET}
deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian bookworm-updates main
deb http://deb.debian.org/debian-security bookworm-security main
"""


@pytest.fixture(scope="module")
def built(project: Project, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """From the base on, with the real packages and a small result."""
    need("mmdebstrap", "podman", "skopeo", "docker-registry")
    folder = tmp_path_factory.mktemp("image")
    checkout, made = folder / "checkout", folder / "made"
    git(folder, "clone", "-q", str(root), str(checkout))
    for name in ("metrics", "tables", "reports", "locks", "data"):
        shutil.rmtree(checkout / name)
    shutil.copytree(project.root, checkout, ignore=shutil.ignore_patterns(".git", "mirepro"), dirs_exist_ok=True)
    commit(checkout)
    trusted = os.environ.get("SSL_CERT_FILE") or certifi.where()
    (folder / "ca.crt").write_text(f"{SECRET}\n{Path(trusted).read_text()}")
    (folder / "sources.list").write_text(SOURCES)
    secrets = ("--ca", folder / "ca.crt", "--apt", folder / "sources.list")
    words = (sys.executable, checkout / "containers/build", "--base", "mmdebstrap", "--store", made, *secrets)
    subprocess.run([*named(HOST, folder), *words], check=True)
    with serve(folder) as (address, _):
        image = pulled(checkout, made, address, folder / "store")
        yield image
        build.drop(image.podman.store)


TIMED = """
import pathlib
found = [path for path in pathlib.Path("/opt").rglob("*.pyc") if path.read_bytes()[4:8] != bytes([1, 0, 0, 0])]
print(len(found), *found[:3])
"""
"""Byte code that is valid by the time of its source: not the same in two builds, and stale in the image (PEP 552)."""


TOOLS = ("g++", "c++", "cc", "gcc", "gcc-12", "cpp", "clang", "make", "as", "ld", "ninja", "git")
"""Compilers and what belongs to them, and a control."""


def is_sealed(built: Built) -> None:
    """What the documentation promises about the image: who runs, what is there, what can be written, its labels."""
    podman = built.podman
    podman.run("env")
    assert podman.run("-u", entry="id") == "65532"
    found = podman.run("-c", f"for name in {' '.join(TOOLS)}; do command -v $name; done; true", entry="sh")
    assert found == "/usr/bin/git", "of these the image has none but the control"
    binaries = podman.run(
        "/opt/venv", "-path", "*/torch/bin/protoc*", "-o", "-name", "ptxas*", "-o", "-name", "nvcc", entry="find"
    )
    assert binaries == ""
    podman.run("/opt/mirepro/x", entry="touch", code=1)
    podman.run("/tmp/x", entry="touch")
    for read_only, code in ((["--read-only"], 1), ([], 0)):  # also for root, who may write where that is not said
        podman("run", "--rm", *read_only, "--user=0", "--entrypoint=touch", podman.image, "/opt/mirepro/x", code=code)
    assert podman.run("/sys/class/net", entry="ls") == "lo"
    assert podman.run("-c", TIMED, entry="/opt/venv/bin/python") == "0"
    (told,) = json.loads(podman("image", "inspect", podman.image))
    labels = {name.rpartition(".")[2]: value for name, value in told["Labels"].items()}
    project = tomllib.loads((built.checkout / "pyproject.toml").read_text())["project"]
    assert (labels["revision"], labels["version"]) == (images.tree(built.checkout), project["version"])
    assert labels["licenses"] == "NOASSERTION"
    assert not told["Config"].get("ExposedPorts")
    history = podman("history", "--no-trunc", "--format", "json", podman.image)
    assert not [name for name in (*host(built.checkout), str(Path.home())) if name in history]
    for command, code in (("mirepro env", 0), ("false", 1)):
        health = ("--health-cmd", command, "--health-interval=disable")
        sleeping = podman("run", "-d", "--network=none", *health, "--entrypoint=sleep", podman.image, "600")
        podman("healthcheck", "run", sleeping, code=code)
        podman("rm", "-f", "-t", "0", sleeping)


def host(checkout: Path) -> list[str]:
    """What only the host that built an image knows."""
    name = HOST if os.geteuid() == 0 else platform.node()
    assert len(name) > 9, f"host name {name}: too short to be looked for; as root the test gives the build a longer one"
    return [name, str(checkout), SECRET]


def is_clean(checkout: Path, files: Path) -> None:
    """None of the image's files names the host that built it, its certificates or its sources."""
    words = [word for name in host(checkout) for word in ("-e", name)]
    found = subprocess.run(["grep", "-rlF", *words, files], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    control = ["grep", "-rlF", "MIREPRO_AUDIT_SOURCE", files / "opt/mirepro"]
    assert "containers/Dockerfile" in subprocess.run(control, capture_output=True, text=True, check=True).stdout


def test_a_host_name_is_seen_by_a_build_and_found_in_its_files(tmp_path: Path) -> None:
    """The controls of what is said about the image's files."""
    if os.geteuid() != 0:
        lacking("root, who alone may name a host")
    shown = subprocess.run(
        [*named(HOST, tmp_path), "sh", "-c", "hostname; cat /etc/hostname"], capture_output=True, text=True, check=True
    )
    assert set(shown.stdout.split()) == {HOST}
    assert platform.node() != HOST
    files = tmp_path / "files"
    (files / "opt/mirepro/containers").mkdir(parents=True)
    (files / "opt/mirepro/containers/Dockerfile").write_text("MIREPRO_AUDIT_SOURCE")
    is_clean(tmp_path, files)
    for word in (HOST, SECRET, str(tmp_path)):
        (files / "planted").write_bytes(b"\0" + word.encode() + b"\0")
        with pytest.raises(AssertionError, match="planted"):
            is_clean(tmp_path, files)


def test_what_a_later_layer_deletes_is_found(tmp_path: Path) -> None:
    """A secret that one layer brings and the next takes away; controls: a layer without it, one without our files."""
    blobs = tmp_path / "layout/blobs/sha256"
    blobs.mkdir(parents=True)

    def layer(number: int, name: str, text: str) -> None:
        (tmp_path / "file").write_text(text)
        words = ("tar", "-czf", blobs / str(number), "-C", tmp_path, f"--transform=s/file/{name}/", "file")
        subprocess.run(words, check=True)

    layer(1, "Dockerfile", "MIREPRO_AUDIT_SOURCE")
    layer(2, ".wh.secret", "")
    layer(3, "secret", "nothing")
    are_clean(tmp_path, tmp_path / "layout")
    layer(3, "secret", f"x{SECRET}x")
    with pytest.raises(AssertionError, match="'3'"):
        are_clean(tmp_path, tmp_path / "layout")
    layer(3, HOST, "a name alone")
    with pytest.raises(AssertionError, match="'3'"):
        are_clean(tmp_path, tmp_path / "layout")
    (blobs / "1").unlink()
    (blobs / "3").unlink()
    with pytest.raises(AssertionError, match="control"):
        are_clean(tmp_path, tmp_path / "layout")


def are_clean(checkout: Path, layout: Path) -> None:
    """Nor does a layer below, whose deleted files stay in it though `is_clean` cannot see them, or the settings."""

    def holds(blob: Path, words: list[str]) -> bool:
        sought = [word for name in words for word in ("-e", name)]
        with blob.open("rb") as file, subprocess.Popen(["gzip", "-dcf"], stdin=file, stdout=subprocess.PIPE) as raw:
            return subprocess.run(["grep", "-aqF", *sought], stdin=raw.stdout, check=False).returncode == 0

    blobs = sorted((layout / "blobs/sha256").iterdir())
    assert [blob.name for blob in blobs if holds(blob, host(checkout))] == []
    assert any(holds(blob, ["MIREPRO_AUDIT_SOURCE"]) for blob in blobs), "control: our own files are seen"


def is_of_the_schema(built: Built, whole: dict[str, Any]) -> None:
    """The SBOM as the schema of the tool that made it has it; control: a component without a name."""
    bad = whole | {"components": [{"type": "library", "version": "1"}]}
    for content, code in ((whole, 0), (bad, 1)):
        path = built.made / "judged.json"
        path.write_text(json.dumps(content))
        path.chmod(0o644)
        shown = ("-v", f"{built.made}/tool:/tool:ro", "-v", f"{path}:/sbom.json:ro")
        line = ("run", "--rm", "--read-only", "--network=none", *shown, "--entrypoint=/opt/venv/bin/python")
        built.podman(*line, built.podman.image, "-c", describe.JUDGE, code=code)


def is_described(built: Built) -> None:
    """SBOM and provenance beside the image: what is in it, and only that; what it was made from."""
    whole = json.loads((built.made / "sbom.cpu.cdx.json").read_text())
    listed = whole["components"]
    assert not faults(whole)
    is_of_the_schema(built, whole)
    names = {one["name"] for one in listed}
    assert {"torch", "numpy", "libc6:amd64", "git"} <= names
    assert not {"pytest", "cyclonedx-bom", "g++"} & names  # of the build, of the tool that lists, of neither
    partial = {one["name"] for one in listed if any(p["name"] == "mirepro:files" for p in one.get("properties", ()))}
    assert {"torch", "triton", "nvidia-cublas"} <= partial
    assert not {"numpy", "scipy", "dvc", "torchvision"} & partial
    debs = yaml.safe_load((built.made / "images.lock.yaml").read_text())["debs"]
    assert {"git", "libc6", "g++", "python3-venv"} <= {name.partition("=")[0] for name in debs}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in debs.values())
    here = {f"{one['name'].partition(':')[0]}={one['version']}" for one in listed if "deb" in one.get("purl", "")}
    assert here <= debs.keys()
    statement = json.loads((built.made / "provenance.json").read_text())
    assert statement["subject"] == [{"name": "cpu", "digest": {"sha256": built.digest.removeprefix("sha256:")}}]
    inputs = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert images.tree(built.checkout) in [one["digest"]["sha256"] for one in inputs]


METRIC = "metrics/desk/evaluate/ir-s0.json"


def one_changed(checkout: Path, folder: Path, more: float) -> Path:
    """A copy of a run's metrics with more in one value, for the image's user, whatever the umask here."""
    content = json.loads((checkout / METRIC).read_text())
    content["cells"]["knn_1"]["value"] += more
    path = folder / "metric.json"
    path.write_text(json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    path.chmod(0o644)
    return path


def diverging(report: Path) -> dict[tuple[str, str, str], str]:
    """Cells of a report that were not reproduced, with the reasons."""
    cells = json.loads(report.read_text())["cells"]
    return {(c["table"], c["row"], c["column"]): c["reason"] for c in cells if c["verdict"] == "DIVERGED"}


def is_refuted_where_it_is_wrong(built: Built, folder: Path) -> None:
    """A changed metric over the image's own is found at level 1, and its cell named; control: the same value.

    Fails where the audit of the image looks at something else than the image's files, or its exit code is lost.
    """
    for more, code in ((0.0, 0), (1.0, 1)):
        out = folder / f"report-{code}"
        out.mkdir()
        changed = f"{one_changed(built.checkout, folder, more)}:/opt/mirepro/{METRIC}:ro"
        line = ("run", "--rm", "--read-only", "--network=none", "-v", changed, "-v", f"{out}:/tmp/audit:U")
        said = built.podman(*line, built.podman.image, "audit", "--level", "1", code=code)
        wrong = diverging(out / "report.json")
        if more:
            assert f"outputs: evaluate@ir-s0: {METRIC} was changed" in said
            assert "DIVERGED: failed checks: " in said
            assert f"; {len(wrong)} of " in said
            assert "where the table says" in wrong["T1", "ir", "knn_1"]
            assert [address for address in wrong if address[0] == "T1"] == [("T1", "ir", "knn_1")]
        else:
            assert f"{REPRODUCED}: all" in said
            assert not wrong


@once
def test_image_audits_its_result_from_a_registry(built: Built, tmp_path: Path) -> None:
    """The report goes to a folder of the host."""
    is_sealed(built)
    is_described(built)
    podman, out = built.podman, tmp_path / "report"
    out.mkdir()
    line = ("run", "--rm", "--read-only", "--network=none", "-v", f"{out}:/tmp/audit:U", podman.image)
    assert f"{REPRODUCED}: all" in podman(*line, "audit", "--level", "1")
    assert REPRODUCED in (out / "report.html").read_text()
    is_refuted_where_it_is_wrong(built, tmp_path)


@once
def test_docker_pulls_it_by_digest_and_audits(built: Built, docker: Callable[..., str]) -> None:
    """The line of the documentation, in a dockerd of its own, which knows health checks of its own format only."""
    docker("pull", "-q", built.podman.image)
    line = ("run", "--rm", "--read-only", "--network=none", "--tmpfs", "/tmp:exec", built.podman.image)
    assert REPRODUCED in docker(*line, "audit", "--level", "1")


@once
def test_slurm_runs_it_by_podman_and_as_its_own_container(built: Built, cluster: Cluster, tmp_path: Path) -> None:
    """The two lines of the documentation that need a Slurm and nothing that Debian lacks."""
    need("umoci", "runc")
    podman = built.podman
    stores = [f"{name}={podman.environment[name]}" for name in ("CONTAINERS_STORAGE_CONF", "CONTAINERS_CONF")]
    line = ("podman", "run", "--rm", "--network=none", podman.image, "audit", "--level", "1")
    assert REPRODUCED in cluster.run("srun", "-N1", "env", *stores, *line)
    bundle = tmp_path / "bundle"
    subprocess.run(["umoci", "unpack", "--image", f"{built.made}/layout:cpu", bundle], check=True, capture_output=True)
    line = ("srun", "--export=NONE", f"--container={bundle}", "/opt/venv/bin/mirepro")
    assert REPRODUCED in cluster.run(*line, "audit", "--level", "1")
    is_clean(built.checkout, bundle / "rootfs")
    are_clean(built.checkout, built.made / "layout")


@once
def test_desk_stages_in_it_give_the_committed_lock(
    built: Built, cluster: Cluster, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training, its evaluation and the toy as jobs of Slurm: the image's Python and operators give git's lock."""
    checkout, podman = tmp_path / "checkout", built.podman
    git(tmp_path, "clone", "-q", str(root), str(checkout))
    inside = podman("create", podman.image)
    podman("cp", f"{inside}:/opt/mirepro/mirepro", tmp_path / "inside")
    podman("rm", inside)
    for extension in [*(root / "mirepro").glob("*.so"), *(tmp_path / "inside").glob("*.so")]:
        shutil.copy(extension, checkout / "mirepro")  # the image's operators, whichever Python the head runs
    (checkout / "launch/here.toml").write_text(f"poll = 0.5\n[all]\nimage = '{podman.image}'\nruntime = 'podman'\n")
    for name in ("CONTAINERS_STORAGE_CONF", "CONTAINERS_CONF"):
        monkeypatch.setenv(name, podman.environment[name])
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    for stage in ("evaluate@ir-s0", "toy"):
        words = ("repro", "--launch", "here", stage)
        subprocess.run([sys.executable, "-m", "mirepro", *words], cwd=checkout, check=True)
    jobs = checkout / ".mirepro/jobs"
    assert len(list(jobs.glob("*/*/*_log.out"))) == 3, "the training, its evaluation, the toy"
    scripts = [path.read_text() for path in jobs.glob("*/*/*.sh")]
    assert scripts
    assert all("podman run" in script and podman.image in script for script in scripts)
    changed = subprocess.run(["git", "diff", "--stat"], cwd=checkout, check=True, capture_output=True, text=True)
    assert changed.stdout == ""


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_image_builds_equal_and_audits_the_desk_profile(root: Path, tmp_path: Path) -> None:
    """Twice from nothing, and from another clone under another host name and umask; 40 GB of disk; level 2."""
    if os.geteuid() != 0:
        lacking("root, who alone may name a host")
    need("mmdebstrap", "podman", "skopeo", "docker-registry")
    made, there, clone = tmp_path / "made", tmp_path / "there", tmp_path / "another" / "clone"
    words = (sys.executable, "containers/build", "--base", "mmdebstrap")
    subprocess.run([*named(HOST, tmp_path), *words, "--twice", "--store", made], check=True, cwd=root)
    clone.parent.mkdir()
    git(tmp_path, "clone", "-q", str(root), str(clone), umask=0o077)
    other = (*named(ELSEWHERE, tmp_path), *words, "--artefacts", root, "--store", there)
    subprocess.run(other, check=True, cwd=clone, umask=0o077)
    assert digest(there) == digest(made)
    build.drop(there / "cpu")
    with serve(tmp_path) as (address, _):
        built = pulled(root, made, address, tmp_path / "store")
        locks = [yaml.safe_load(path.read_text()) for path in (root / images.LOCK, made / "images.lock.yaml")]
        assert build.differences(*locks, "cpu")[1:] != ["all inputs that are recorded are the same"]
        is_sealed(built)
        is_described(built)
        assert REPRODUCED in built.podman.run("audit", "--level", "2", "--jobs", str(os.cpu_count()))
        is_refuted_where_it_is_wrong(built, tmp_path)
        build.drop(built.podman.store)
