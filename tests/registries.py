"""A real registry on the loopback interface for tests."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import until


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, Path]]:
    """Runs a registry, which takes a free port and names it in its log; its address and the folder of its blobs."""
    blobs, log = folder / "registry", folder / "registry.log"
    storage = {"filesystem": {"rootdirectory": str(blobs)}}
    settings = {"version": 0.1, "http": {"addr": "127.0.0.1:0"}, "storage": storage}
    (folder / "registry.yml").write_text(json.dumps(settings))
    with log.open("wb") as output:
        command = ["docker-registry", "serve", folder / "registry.yml"]
        server = subprocess.Popen(command, stdout=output, stderr=output)

    def address() -> str:
        assert server.poll() is None, log.read_text()
        found = re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text())
        return found[1] if found else ""

    try:
        until(address, 120, "the registry")
        yield address(), blobs
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
