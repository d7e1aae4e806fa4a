"""Small images in real engines: through a registry, signed, in docker."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from engines import Podman, docker, send
from registries import serve
from test_containers import build, need

__all__ = ["docker"]

HERE = Path(__file__).resolve().parent


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
        settings = {"default-docker": {"lookaside": where, "lookaside-staging": where}}
        (folder / "d/d.yaml").write_text(json.dumps(settings))
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
    assert "Invalid GPG signature" in refused
    assert not publisher.copy("--remove-signatures", signed, f"docker://{address}/tiny:latest")
    retagged = publisher.copy(f"docker://{address}/tiny:latest", f"dir:{tmp_path}/retagged", policy=policy)
    assert "tiny:signed is not accepted" in retagged
    assert not publisher.copy(image, f"dir:{tmp_path}/whole")

    layer = json.loads((tmp_path / "good/manifest.json").read_text())["layers"][0]["digest"].removeprefix("sha256:")
    blob = next(blobs.glob(f"docker/registry/v2/blobs/sha256/{layer[:2]}/{layer}/data"))
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    assert "did not match" in publisher.copy(image, f"dir:{tmp_path}/flipped").lower()


def documented(kind: str, **named: str) -> str:
    """The only block of a kind under "Publish" in the documentation, its names in capitals replaced."""
    text = (HERE.parent / "docs/containers.md").read_text().partition("## Publish")[2]
    (block,) = re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)
    for name, value in named.items():
        assert name in block
        block = block.replace(name, value)
    return block


@contextmanager
def website(folder: Path) -> Iterator[str]:
    """A plain web server of a folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.infra
def test_auditor_pulls_what_the_publisher_signed(registry: tuple[str, Path], tmp_path: Path) -> None:
    """The documented settings: signatures go to a folder, a web server shows it, podman takes them from there.

    Controls: the folder without this signature, and an image of which the policy says nothing.
    """
    address, _ = registry
    digest, image = push(address, tmp_path), f"{address}/mirepro"
    staged, web = tmp_path / "signatures", tmp_path / "web"
    web.mkdir()
    home = tmp_path / "home"
    settings = home / ".config/containers"
    (settings / "registries.d").mkdir(parents=True)
    with closing(Trust(tmp_path / "publisher")) as publisher, website(web) as url:
        names = {"REGISTRY": address, "https://PUBLISHER": url, "/srv": str(tmp_path)}
        (settings / "registries.d/mirepro.yaml").write_text(documented("yaml", **names))
        key = {"/etc/containers/mirepro.asc": str(publisher.folder / "key.asc")}
        (settings / "policy.json").write_text(documented("json", REGISTRY=address, **key))
        shutil.copy(settings / "registries.d/mirepro.yaml", publisher.folder / "d/d.yaml")
        layout = f"oci:{tmp_path}/layout:1"
        signed = ("--preserve-digests", "--sign-by", "publisher@example.org", layout, f"docker://{image}:0.1.0-cpu")
        assert not publisher.copy(*signed)
        podman = Podman(tmp_path / "auditor", f"{image}@{digest}")
        podman.environment |= {"HOME": str(home)}
        podman.environment.pop("XDG_CONFIG_HOME", None)
        pull = ("pull", "-q", "--tls-verify=false")
        assert "no signature exists" in complaint(podman, *pull, podman.image)
        shutil.copytree(staged, web / "signatures")
        podman(*pull, podman.image)
        podman("image", "rm", podman.image)
        podman(*pull, f"{image}:0.1.0-cpu")
        assert "rejected by policy" in complaint(podman, *pull, f"{address}/tiny@{digest}")
        build.drop(podman.store)


def complaint(podman: Podman, *words: str) -> str:
    """What podman says where it refuses."""
    done = subprocess.run(["podman", *words], capture_output=True, text=True, env=podman.environment, check=False)
    assert done.returncode == 125, done.stdout
    return done.stderr


@pytest.mark.parametrize(("required", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_docker_for_a_user_is_skipped_or_fails(
    required: str, outcome: type, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped where nobody asked for it, failed where the run wants all; no dockerd is started."""
    need("dockerd", "docker")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("MIREPRO_REQUIRE_INFRA", required)
    with pytest.raises(outcome, match="needs root, for dockerd"):
        request.getfixturevalue("docker")


@pytest.mark.slow
@pytest.mark.infra
def test_docker_builds_runs_and_pulls_by_digest(
    docker: Callable[..., str], registry: tuple[str, Path], tmp_path: Path
) -> None:
    """What docker built comes back by its digest and runs; what podman pushed has the same digest for docker."""
    need("g++")
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
