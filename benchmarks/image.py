"""What an image costs its user: `python -m benchmarks.image` after `containers/build` (skopeo, docker-registry).

Sends the built image to a registry on this machine, fetches it by digest into an empty store and audits from there,
without network: from the digest to the verdict. Other work on the machine is stated as its load.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mirepro import determinism, files
from tests.registries import serve
from tests.test_containers import build

ROOT = Path(__file__).resolve().parent.parent
PARTS = "/opt/venv/lib/python3.11/site-packages/* /opt/remote /opt/mirepro /usr"


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes how long a block took."""
    begin = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - begin, 1)
    print(f"{name}: {seconds[name]} s", file=sys.stderr, flush=True)


def send(layout: Path, target: str, address: str) -> None:
    """Copies the image into the registry as it is laid out."""
    copy = ["skopeo", "--insecure-policy", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false"]
    subprocess.run([*copy, f"oci:{layout}:{target}", f"docker://{address}/mirepro:{target}"], check=True)


def audit(run: Callable[..., str], words: Sequence[str]) -> str:
    """The audit's verdict; exit 1 where it is not REPRODUCED."""
    said = run("audit", *words)
    found = [line for line in said.splitlines() if "REPRODUCED" in line]
    return found[-1] if found else sys.exit(f"not reproduced:\n{said}")


def measure(store: Path, target: str, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Sizes, seconds and the verdict of an audit with these options."""
    lock = yaml.safe_load((store / "images.lock.yaml").read_text())
    image = lock["images"][target]
    seconds = {"build": float((store / target / "seconds").read_text())}
    load, environment = os.getloadavg()[0], build.engine(folder / "store")
    with serve(folder) as (address, _):
        reference = f"{address}/mirepro@{image['digest']}"
        with timed(seconds, "push"):
            send(store / target / build.LAYOUT, target, address)
        with timed(seconds, "pull"):
            build.run("podman", "pull", "-q", "--tls-verify=false", reference, env=environment)

    def run(*words: str) -> str:
        return build.run("podman", "run", "--rm", "--read-only", "--network=none", *words, env=environment)

    parts = run("--entrypoint=sh", reference, "-c", f"du -sm {PARTS} | sort -rn | head -n 12")
    with timed(seconds, "env"):
        run(reference, "env")
    with timed(seconds, "audit"):
        verdict = audit(partial(run, reference), words)
    build.drop(folder / "store")
    sizes = {path: int(size) for size, path in (line.split("\t") for line in parts.splitlines())}
    return {
        "target": target, "tree": lock["tree"], **image, "megabytes": sizes,
        "seconds": seconds, "audit": list(words), "verdict": verdict, "cpus": os.cpu_count(),
        "processor": determinism.cpu("model name"),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
    }  # fmt: skip


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / ".mirepro/containers", help="as given to containers/build")
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--select", nargs="*", default=[], help="tables and stages to repeat, as the audit has it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/image.json")
    options = parser.parse_args()
    words = ["--level", str(options.level), "--jobs", str(options.jobs)]
    words += [word for pattern in options.select for word in ("--select", pattern)]
    with tempfile.TemporaryDirectory(prefix="mirepro-image-", dir=options.store) as folder:
        found = measure(options.store.resolve(), options.target, words, Path(folder).resolve())
    files.write_json(options.out, found)
    print(options.out)


if __name__ == "__main__":
    main()
