"""Images in real engines: through a registry, signed, in docker, and the project's own image built and tried."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from audited import Project, commit
from cluster import until
from registries import serve
from test_containers import REQUIRED, build, git, need

from mirepro.audit import images


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A registry on the loopback interface: its address and its folder."""
    need("docker-registry", "skopeo", "podman", "gpg")
    with serve(tmp_path) as found:
        yield found


class Trust:
    """A throw-away key, a folder of signatures, and a policy that wants that key's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "gpg"
        self.home.mkdir(parents=True, mode=0o700)
        (folder / "d").mkdir()
        where = f"file://{folder}/signatures"
        self.env = os.environ | {"GNUPGHOME": str(self.home)}
        (folder / "d/d.yaml").write_text(json.dumps({"default-docker": {"sigstore": where, "sigstore-staging": where}}))
        key = ["--batch", "--passphrase", "", "--quick-gen-key", "publisher@example.org", "default", "default", "never"]
        self.gpg(*key)
        self.gpg("--armor", "--output", str(folder / "key.asc"), "--export")
        requirement = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(folder / "key.asc")}
        (folder / "policy.json").write_text(json.dumps({"default": [requirement]}))

    def gpg(self, *arguments: str) -> None:
        subprocess.run(["gpg", *arguments], check=True, capture_output=True, env=self.env)

    def close(self) -> None:
        """Ends the key's agent."""
        subprocess.run(["gpgconf", "--kill", "all"], check=True, env=self.env)

    def copy(self, *arguments: str, policy: Path | None = None) -> str:
        """skopeo's complaint, empty where the copy succeeded."""
        judge = ["--insecure-policy"] if policy is None else ["--policy", str(policy)]
        command = ["skopeo", *judge, "--registries.d", self.folder / "d", "copy", "-q"]
        loopback = ["--src-tls-verify=false", "--dest-tls-verify=false"]
        result = subprocess.run([*command, *loopback, *arguments], capture_output=True, text=True, env=self.env)
        return result.stderr if result.returncode else ""


def send(layout: str, target: str) -> None:
    """Copies an OCI layout into a registry as it is, so that its digest stays."""
    copy = ["skopeo", "--insecure-policy", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false"]
    subprocess.run([*copy, f"oci:{layout}", f"docker://{target}"], check=True)


def push(address: str, folder: Path) -> str:
    """Builds a tiny image, lays it out as the build does and sends that; its manifest digest."""
    environment = build.engine(folder / "store")
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY content /content\n")
    (folder / "content").write_text("of the image")
    command = ["podman", "build", "-q", "--timestamp", build.STAMP, "-t", "localhost/tiny", folder]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    digest, layout = folder / "digest", f"{folder}/layout:1"
    command = ["podman", "push", "-q", "--digestfile", digest, "localhost/tiny", f"oci:{layout}"]
    subprocess.run(command, check=True, env=environment)
    build.drop(folder / "store")
    send(layout, f"{address}/tiny:1")
    return digest.read_text()


@pytest.mark.slow
@pytest.mark.infra
def test_registry_round_trip(registry: tuple[str, Path], tmp_path: Path) -> None:
    address, blobs = registry
    digest = push(address, tmp_path)
    with closing(Trust(tmp_path / "publisher")) as publisher, closing(Trust(tmp_path / "stranger")) as stranger:
        layout = f"oci:{tmp_path}/layout:1"  # the release's line: sent and signed at once
        released = f"docker://{address}/tiny:released"
        assert not publisher.copy("--preserve-digests", "--sign-by", "publisher@example.org", layout, released)
        policy = publisher.folder / "policy.json"
        assert not publisher.copy("--remove-signatures", released, f"dir:{tmp_path}/released", policy=policy)
        shutil.rmtree(publisher.folder / "signatures")
        trade(address, blobs, digest, publisher, stranger)


def trade(address: str, blobs: Path, digest: str, publisher: Trust, stranger: Trust) -> None:
    """Signed, unsigned, signed by somebody else, under another name, and damaged."""
    tmp_path = publisher.folder
    policy = publisher.folder / "policy.json"
    image = f"docker://{address}/tiny@{digest}"
    assert "no signature exists" in publisher.copy(image, f"dir:{tmp_path}/unsigned", policy=policy)

    assert not publisher.copy("--sign-by", "publisher@example.org", image, f"docker://{address}/tiny:signed")
    signed = f"docker://{address}/tiny:signed"
    assert not publisher.copy("--remove-signatures", signed, f"dir:{tmp_path}/good", policy=policy)
    kept = hashlib.sha256((tmp_path / "good/manifest.json").read_bytes()).hexdigest()
    assert f"sha256:{kept}" == digest
    shutil.copytree(publisher.folder / "signatures", stranger.folder / "signatures")
    refused = stranger.copy("--remove-signatures", signed, f"dir:{tmp_path}/x", policy=stranger.folder / "policy.json")
    assert refused
    assert not publisher.copy("--remove-signatures", signed, f"docker://{address}/tiny:latest")
    assert publisher.copy(f"docker://{address}/tiny:latest", f"dir:{tmp_path}/retagged", policy=policy)

    layer = json.loads((tmp_path / "good/manifest.json").read_text())["layers"][0]["digest"].removeprefix("sha256:")
    blob = next(blobs.glob(f"docker/registry/v2/blobs/sha256/{layer[:2]}/{layer}/data"))
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    assert "did not match" in publisher.copy(image, f"dir:{tmp_path}/flipped").lower()


@pytest.fixture
def docker() -> Iterator[Callable[..., str]]:
    """docker's command line with a dockerd of its own, which ends with the test; root only."""
    need("dockerd", "docker", "g++")
    if os.geteuid() != 0:
        pytest.skip("dockerd needs root")
    folder = Path(tempfile.mkdtemp(prefix="docker-"))  # pytest's folders are too long for the names of its sockets
    address, pid = f"unix://{folder}/socket", folder / "pid"
    limits = [word for name in ("nofile=4096:4096", "nproc=30000:30000") for word in ("--default-ulimit", name)]
    where = [f"--data-root={folder}/root", f"--exec-root={folder}/exec", f"--pidfile={pid}", "-H", address]
    quiet = ["--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=overlay2"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["dockerd", *where, *quiet, *limits], stdout=log, stderr=log)

    def call(*words: str, code: int = 0) -> str:
        env = os.environ | {"DOCKER_HOST": address, "DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(folder)}
        done = subprocess.run(["docker", *words], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr + (folder / "log").read_text()[-2000:]
        return done.stdout.strip() if code == 0 else done.stderr.strip()

    try:
        until(lambda: (folder / "socket").exists() or server.poll() is not None, 120, "dockerd")
        yield call
    finally:
        server.terminate()
        try:
            server.wait(120)
        except subprocess.TimeoutExpired:
            server.kill()
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.infra
def test_docker_builds_runs_and_pulls_by_digest(
    docker: Callable[..., str], registry: tuple[str, Path], tmp_path: Path
) -> None:
    """What docker built comes back by its digest and runs; what podman pushed has the same digest for docker."""
    address, _ = registry
    folder = tmp_path / "seven"
    folder.mkdir()
    source = "int main() { return 7; }"
    subprocess.run(["g++", "-static", "-x", "c++", "-o", folder / "seven", "-"], input=source, text=True, check=True)
    (folder / "Dockerfile").write_text('FROM scratch\nCOPY seven /seven\nUSER 65532:65532\nENTRYPOINT ["/seven"]\n')
    docker("build", "-q", "-t", f"{address}/seven:1", str(folder))
    docker("run", "--rm", "--network=none", "--read-only", f"{address}/seven:1", code=7)
    docker("push", "-q", f"{address}/seven:1")
    pulled = docker("image", "inspect", "--format", "{{index .RepoDigests 0}}", f"{address}/seven:1")
    docker("image", "rm", "-f", docker("image", "inspect", "--format", "{{.Id}}", pulled))
    docker("run", "--pull=never", pulled, code=125)
    docker("pull", "-q", pulled)
    docker("run", "--rm", "--network=none", "--read-only", pulled, code=7)

    digest = push(address, tmp_path)
    docker("pull", "-q", f"{address}/tiny@{digest}")
    assert digest in docker("image", "inspect", "--format", "{{.RepoDigests}}", f"{address}/tiny@{digest}")
    assert "not found" in docker("pull", "-q", f"{address}/tiny@sha256:{'0' * 64}", code=1)


class Engine:
    """Podman with a store of its own, and the image it tries.

    Args:
        store: The store's folder.
        image: The image's name.
    """

    def __init__(self, store: Path, image: str) -> None:
        self.store, self.image, self.environment = store, image, build.engine(store)

    def __call__(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(["podman", *words], capture_output=True, text=True, env=self.environment, check=False)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run(self, *words: str, entry: str = "", code: int = 0) -> str:
        """A command in the image as the documentation runs it."""
        entrypoint = [f"--entrypoint={entry}"] if entry else []
        return self("run", "--rm", "--read-only", "--network=none", *entrypoint, self.image, *words, code=code)


def pulled(made: Path, address: str, folder: Path) -> Engine:
    """The image that a store's lock names, sent to a registry and fetched from there by that digest."""
    digest = yaml.safe_load((made / "images.lock.yaml").read_text())["images"]["cpu"]["digest"]
    send(f"{made}/cpu/{build.LAYOUT}:cpu", f"{address}/mirepro:cpu")
    build.drop(made / "cpu")
    engine = Engine(folder, f"{address}/mirepro@{digest}")
    engine("pull", "-q", "--tls-verify=false", engine.image)
    engine("pull", "-q", "--tls-verify=false", f"{address}/mirepro@sha256:{'0' * 64}", code=125)
    return engine


def is_sealed(engine: Engine, checkout: Path) -> None:
    """What the documentation promises about the image: who runs, what is there, what can be written, its labels."""
    engine.run("env")
    assert engine.run("-u", entry="id") == "65532"
    assert engine.run("-c", "command -v g++ cc gcc make; true", entry="sh") == ""
    assert engine.run("-c", "command -v git", entry="sh") == "/usr/bin/git"  # control
    engine.run("/opt/mirepro/x", entry="touch", code=1)
    engine.run("/tmp/x", entry="touch")
    labels = json.loads(engine("image", "inspect", "--format", "{{json .Labels}}", engine.image))
    assert labels["org.opencontainers.image.revision"] == images.tree(checkout)
    assert labels["org.opencontainers.image.version"] in (checkout / "pyproject.toml").read_text()
    host = [platform.node(), str(Path.home()), str(checkout)]
    history = engine("history", "--no-trunc", "--format", "json", engine.image)
    assert not [name for name in host if len(name) > 5 and name in history]
    command = ("--health-cmd", "mirepro env", "--health-interval=disable")
    sleeping = engine("run", "-d", "--network=none", *command, "--entrypoint=sleep", engine.image, "600")
    engine("healthcheck", "run", sleeping)
    engine("rm", "-f", "-t", "0", sleeping)


@pytest.mark.slow
@pytest.mark.infra
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not REQUIRED, reason="builds a whole image; MIREPRO_REQUIRE_INFRA=1 wants it")
def test_image_of_a_result_audits_it_from_a_registry(
    registry: tuple[str, Path], project: Project, root: Path, tmp_path: Path
) -> None:
    """From the base on, with the real packages and a small result; pulled by the digest of its lock; no network."""
    need("mmdebstrap")
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "-q", str(root), str(checkout))
    for name in ("metrics", "tables", "reports", "locks", "data"):
        shutil.rmtree(checkout / name)
    shutil.copytree(project.root, checkout, ignore=shutil.ignore_patterns(".git", "mirepro"), dirs_exist_ok=True)
    commit(checkout)
    words = ("--base", "mmdebstrap", "--store", tmp_path / "made")
    subprocess.run([sys.executable, checkout / "containers/build", *words], check=True)
    engine = pulled(tmp_path / "made", registry[0], tmp_path / "store")
    try:
        is_sealed(engine, checkout)
        assert "REPRODUCED" in engine.run("audit", "--level", "1")
    finally:
        build.drop(engine.store)


@pytest.mark.full
@pytest.mark.infra
@pytest.mark.timeout(7200)
def test_image_builds_equal_and_audits_the_desk_profile(registry: tuple[str, Path], root: Path, tmp_path: Path) -> None:
    """Twice from nothing, 30 GB of disk; SBOM and provenance; level 2 from the pulled image."""
    need("mmdebstrap")
    made = tmp_path / "made"
    words = ("--base", "mmdebstrap", "--twice", "--store", made)
    said = subprocess.run([sys.executable, root / "containers/build", *words], check=True, stdout=subprocess.PIPE)
    assert b"inputs and digest" in said.stdout
    subprocess.run([sys.executable, root / "containers/describe", made], check=True)
    listed = {one["name"] for one in json.loads((made / "sbom.cpu.cdx.json").read_text())["components"]}
    assert {"torch", "numpy", "libc6:amd64", "git"} <= listed
    engine = pulled(made, registry[0], tmp_path / "store")
    try:
        is_sealed(engine, root)
        assert "REPRODUCED" in engine.run("audit", "--level", "2", "--jobs", str(os.cpu_count()))
    finally:
        build.drop(engine.store)
