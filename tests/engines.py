"""Podman and docker with stores of their own, for tests."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import until
from copied import lacking
from test_containers import build, need


class Podman:
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


@pytest.fixture
def docker() -> Iterator[Callable[..., str]]:
    """docker's command line with a dockerd of its own, which ends with the test; root only.

    Skips for others, unless MIREPRO_REQUIRE_INFRA=1.
    """
    need("dockerd", "docker")
    if os.geteuid() != 0:
        lacking("root, for dockerd")
    folder = Path(tempfile.mkdtemp(prefix="docker-"))  # pytest's folders are too long for the names of its sockets
    address, pid = f"unix://{folder}/socket", folder / "pid"
    limits = [word for name in ("nofile=4096:4096", "nproc=30000:30000") for word in ("--default-ulimit", name)]
    where = [f"--data-root={folder}/root", f"--exec-root={folder}/exec", f"--pidfile={pid}", "-H", address]
    quiet = ["--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=overlay2"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["dockerd", *where, *quiet, *limits], stdout=log, stderr=log)

    def call(*words: str, code: int = 0) -> str:
        env = os.environ | {"DOCKER_HOST": address, "DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(folder)}
        done = subprocess.run(["docker", *words], env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == code, done.stdout + done.stderr + (folder / "log").read_text()[-2000:]
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


def send(layout: str, target: str) -> None:
    """Copies an OCI layout into a registry as it is, so that its digest stays."""
    copy = ["skopeo", "--insecure-policy", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false"]
    subprocess.run([*copy, f"oci:{layout}", f"docker://{target}"], check=True)
