"""Stages as Slurm jobs inside containers, by image digest: signals, bits, locks and ends are those of jobs outside."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import slurm_jobs
import yaml
from cluster import Cluster, until
from miniature import Miniature
from slurm_bench import HERE, Bench, cluster, living
from test_containers import build, need

from mirepro.launch import container
from mirepro.launch.container import Container
from mirepro.launch.launcher import JobFailed
from mirepro.launch.probe import probe
from mirepro.site import Section
from tests.test_pretrain import bytes_of, data, run, train

__all__ = ["cluster", "data"]

pytestmark = [pytest.mark.slow, pytest.mark.infra]


@dataclass(frozen=True)
class Image:
    """An image in a store of its own, and what a site file's section says about it."""

    reference: str
    binds: tuple[str, ...]

    @property
    def section(self) -> dict[str, Any]:
        """Keys of a site file's section."""
        return {"image": self.reference, "binds": self.binds, "runtime": "podman"}

    @property
    def toml(self) -> str:
        """The same as a site file writes it."""
        return f"image = '{self.reference}'\nbinds = {list(self.binds)}\n"


@pytest.fixture(scope="module")
def image(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """An image without Slurm's commands; its Python and libraries are this machine's, bound read-only."""
    need("podman", "runc")
    folder = tmp_path_factory.mktemp("image")
    environment = build.engine(folder / "store")
    (folder / "tmp").mkdir()
    (folder / "tmp" / "keep").touch()
    path = f"ENV PATH={sys.prefix}/bin PYTHONPATH={HERE.parent}:{HERE} HOME=/tmp PYTHONDONTWRITEBYTECODE=1"
    (folder / "Dockerfile").write_text(f"FROM scratch\nCOPY tmp /tmp/\n{path}\n")
    podman = {"env": environment, "check": True, "capture_output": True, "text": True}
    subprocess.run(["podman", "build", "-q", "--timestamp", build.STAMP, "-t", "localhost/python", folder], **podman)
    command = ["podman", "image", "inspect", "--format", "{{.Digest}}", "localhost/python"]
    digest = subprocess.run(command, **podman).stdout.strip()
    system = [name for name in ("/usr", "/lib", "/lib64", "/bin", "/etc") if Path(name).exists()]
    shared = dict.fromkeys([*system, sys.base_prefix, sys.prefix, str(HERE.parent)])
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("CONTAINERS_STORAGE_CONF", "CONTAINERS_CONF"):
            monkeypatch.setenv(name, environment[name])
        yield Image(f"localhost/python@{digest}", tuple(f"{path}:{path}:ro" for path in shared))
    until(lambda: not cluster.run("squeue", "--noheader"), 120, "an empty queue")  # its jobs' containers use the store
    build.drop(folder / "store")


def test_time_limit_requeues_and_resumes_in_a_container(cluster: Cluster, image: Image, tmp_path: Path) -> None:
    """The signal reaches the process through podman, its wish to be requeued the scheduler through the batch script."""
    bench = Bench(tmp_path, slurm_jobs.count, 500, 0.3, time=2, grace=90, **image.section)
    bench.wait()
    jobs, firsts = zip(*bench.runs(), strict=True)
    assert len(firsts) > 1
    assert len(set(jobs)) == 1, "resubmitted instead of requeued"
    assert int(firsts[1]) > 0, "began from nothing"
    assert "Calling checkpoint method" in bench.handle.log.read_text()
    assert (bench.work / "where").read_text() == "podman"


LISTENS = """
import signal, sys, time
from pathlib import Path
from mirepro.launch import container
heard = Path(sys.argv[1])
signal.signal(signal.SIGUSR2, lambda *_: heard.write_text("USR2"))
container.unblock()
heard.write_text("")
end = time.monotonic() + 120
while heard.read_text() != "enough" and time.monotonic() < end:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("shielded", [True, pytest.param(False, id="control")])
def test_a_signal_to_podmans_helpers_is_not_lost(image: Image, tmp_path: Path, shielded: bool) -> None:
    """Slurm's CONT and USR2 come one after the other, the second while a helper of podman passes on the first."""
    heard, command = tmp_path / "heard", Container(tmp_path, Section(**image.section)).python()
    command = command if shielded else command.replace("exec $shield", "exec")
    with subprocess.Popen(f"exec {command} -c '{LISTENS}' {heard}", shell=True, start_new_session=True) as podman:
        until(heard.exists, 60, "the container's start")
        lost = False
        for _ in range(5):  # one may pass the first on before it is hit
            heard.write_text("")
            _signal(podman.pid)
            with suppress(AssertionError):
                until(heard.read_text, 5, "the signal")
            lost = lost or not heard.read_text()
            if lost:
                break
        heard.write_text("enough")
        podman.wait(60)
    assert lost != shielded


def _signal(podman: int) -> None:
    """Sends CONT to podman, USR2 to the helper that this starts, and USR2 to podman."""
    helpers, end = set[int](), time.monotonic() + 60
    while not helpers and time.monotonic() < end:  # a busy machine may look away for the whole life of one
        before, again = _children(podman), time.monotonic() + 1
        os.kill(podman, signal.SIGCONT)
        while not helpers and time.monotonic() < again:
            helpers = _children(podman) - before
    assert helpers
    for process in (*helpers, podman):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR2)


def _children(process: int) -> set[int]:
    """Processes that one process has started and not yet waited for."""
    lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    return {int(word) for text in lists for word in text.split()}


@pytest.mark.parametrize("watched", [True, False])
def test_cancelled_job_leaves_no_container(
    cluster: Cluster, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    """Control: without the watch on podman the computation goes on when Slurm has killed that."""
    if not watched:
        monkeypatch.setattr(container, "CLIENT", "NOBODY_LOOKS_AT")
    bench = Bench(tmp_path, slurm_jobs.hold, **image.section)
    bench.running()
    assert living(bench)
    cluster.run("scancel", bench.handle.job)
    with pytest.raises(JobFailed, match="cancelled"):
        bench.wait()
    if watched:
        until(lambda: not living(bench), 60, "the end of the container")
    else:
        time.sleep(3.0)
        assert living(bench)
    (bench.work / "go").touch()
    until(lambda: not living(bench), 60, "the end of the container")


def test_another_digest_does_not_run(cluster: Cluster, image: Image, tmp_path: Path) -> None:
    wrong = image.section | {"image": f"localhost/python@sha256:{'0' * 64}"}
    bench = Bench(tmp_path, slurm_jobs.finish, **wrong)
    bench.launcher.site = dataclasses.replace(bench.site, retries=0)
    with pytest.raises(JobFailed, match=r"without a result.*; image: Error: .*; push it to the registry, "):
        bench.wait()
    assert "0" * 64 in bench.handle.log.read_text()


def test_check_runs_its_probe_in_the_image(cluster: Cluster, image: Image, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "here.toml").write_text(f"poll = 0.5\n[all]\n{image.toml}[pretrain]\nnodes = 2\n")
    lines = list(probe(tmp_path, "here"))
    assert "ran on n1, n2 (2 tasks in the container), back in " in lines[3]
    assert "(1 task in the container)" in lines[4]


def test_ranks_in_containers_give_the_bits_of_one_process_outside(cluster, image, data, tmp_path):
    folders = (*image.binds, str(data))
    bench = Bench(tmp_path / "jobs", slurm_jobs.train, data, nodes=2, **image.section | {"binds": folders})
    bench.wait(600)
    until(lambda: len(list(bench.handle.log.parent.glob("*_result.pkl"))) == 2, 120, "the other rank's end")
    alone = bytes_of(train(run("ring", shards=4), data, tmp_path / "alone"))
    assert bytes_of(bench.work / "ring" / "out").items() >= alone.items()


def test_pipeline_in_containers_gives_the_same_lock(cluster: Cluster, image: Image, root: Path, tmp_path: Path) -> None:
    locks = []
    for name in ("inline", "here"):
        miniature = Miniature(root, tmp_path / name)
        (miniature.root / "launch").mkdir()
        (miniature.root / "launch" / "here.toml").write_text(f"poll = 0.5\n[all]\ntime = 5\n{image.toml}")
        result = miniature.run("repro", "--jobs", "4", "--launch", name)
        assert result.returncode == 0, result.stderr
        locks.append(yaml.safe_load((miniature.root / "dvc.lock").read_text())["stages"])
        logs = list((miniature.root / ".mirepro" / "jobs").glob("*/*/*_log.out"))
        assert len(logs) == {"inline": 0, "here": 7}[name]
    assert locks[0] == locks[1]


def test_slurm_runs_the_image_as_its_own_container(cluster: Cluster, image: Image, tmp_path: Path) -> None:
    """`srun --container` of a bundle that umoci unpacks from the image, without network, as the documentation says."""
    need("umoci")
    layout, bundle = tmp_path / "layout", tmp_path / "bundle"
    subprocess.run(["podman", "push", "-q", image.reference, f"oci:{layout}:cpu"], check=True)
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:cpu", bundle], check=True, capture_output=True)
    made = json.loads((bundle / "config.json").read_text())
    made["mounts"] += [mounted(bind) for bind in image.binds]
    (bundle / "config.json").write_text(json.dumps(made))
    code = "import os, torch; print(torch.ones(2).sum().item(), os.environ['PATH'], os.listdir('/sys/class/net'))"
    command = (f"--container={bundle}", f"{sys.prefix}/bin/python", "-c", code)
    own = f"2.0 {sys.prefix}/bin ['lo']"
    assert cluster.run("srun", "--export=NONE", *command) == own
    assert cluster.run("srun", *command) != own, "control: the submitter's variables hide the image's"
    made["linux"]["namespaces"] = [one for one in made["linux"]["namespaces"] if one["type"] != "network"]
    (bundle / "config.json").write_text(json.dumps(made))
    assert "['lo']" not in cluster.run("srun", "--export=NONE", *command), "control: a bundle with the host's network"


def mounted(bind: str) -> dict[str, Any]:
    """A read-only bind as an OCI bundle writes it."""
    source, target, _ = bind.split(":")
    return {"source": source, "destination": target, "type": "bind", "options": ["rbind", "ro"]}
