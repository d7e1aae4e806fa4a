"""A real registry on the loopback interface for tests."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, Path]]:
    """Runs a registry; its address and the folder of its blobs."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    blobs = folder / "registry"
    settings = {"version": 0.1, "http": {"addr": address}, "storage": {"filesystem": {"rootdirectory": str(blobs)}}}
    (folder / "registry.yml").write_text(json.dumps(settings))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(["docker-registry", "serve", folder / "registry.yml"], **quiet)
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", int(address.split(":")[1])), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    try:
        yield address, blobs
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
