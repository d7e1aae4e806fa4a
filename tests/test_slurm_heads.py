"""A reproduction on a real Slurm whose head is killed, again and again; GPUs, made-up ones, for the tasks of a job."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_jobs
import yaml
from cluster import Cluster, until
from miniature import Miniature
from slurm_bench import Bench, cluster, own, tidy

from mirepro.errors import UserError
from mirepro.launch.probe import probe

__all__ = ["cluster", "own", "tidy"]

pytestmark = [pytest.mark.slow, pytest.mark.infra]


class Held:
    """A miniature whose trainings last as long as its file `slow` does, reproduced by heads that get killed."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.copy, self.heads = Miniature(source, folder), 0
        place = '(data_folder.parent.parent / "slow").exists()'
        self.copy.edit("mirepro/pretrain.py", f"if {place}", f"while {place}")
        self.copy.edit("mirepro/pretrain.py", "time.sleep(600)", "time.sleep(0.1)")
        (self.copy.root / "slow").touch()

    def start(self) -> "subprocess.Popen[str]":
        """A head; what it says is in `said`."""
        self.heads += 1
        environment = self.copy.environment | {"MIREPRO_LAUNCH": "slurm"}
        command = [sys.executable, "-m", "mirepro", "repro", "--jobs", "4"]
        with self.said.open("w") as file:
            return subprocess.Popen(command, cwd=self.copy.root, env=environment, stdout=file, stderr=file, text=True)

    @property
    def said(self) -> Path:
        """The newest head's output."""
        return self.copy.root.parent / f"head{self.heads}"

    def kill(self, head: "subprocess.Popen[str]") -> None:
        """Without warning; what it had started on this machine ends with it."""
        head.kill()
        assert head.wait(60) == -signal.SIGKILL
        until(lambda: not self.helpers(), 60, "the end of what the head had started")

    def helpers(self) -> list[str]:
        """Processes of this copy that are no jobs'."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                here = (path / "cwd").readlink() == self.copy.root
                if here and b"SLURM_JOB_ID=" not in (path / "environ").read_bytes():
                    found.append((path / "cmdline").read_bytes().decode())
            except OSError:
                continue
        return [line for line in found if line]

    def entries(self) -> dict[str, list[str]]:
        """Jobs of every stage that the ledger knows."""
        found = {}
        for path in (self.copy.root / ".mirepro" / "jobs").glob("*.json"):
            entry = yaml.safe_load(path.read_text())
            found[entry["stage"]] = [attempt["job"] for attempt in entry["attempts"] + entry["past"]]
        return found

    def lock(self) -> dict[str, object]:
        """The stages of dvc.lock."""
        return dict(yaml.safe_load((self.copy.root / "dvc.lock").read_text())["stages"])


def queue(cluster: Cluster) -> list[str]:
    """Jobs that have not ended."""
    return sorted(cluster.run("squeue", "--noheader", "--format=%i").split())


def test_killed_heads_come_back_to_their_jobs(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    """One dies while two trainings compute, the next attached to them, one amid what follows one requeued by hand."""
    held = Held(root, tmp_path / "repo")
    head = held.start()
    started = held.copy.root / ".mirepro" / "work"
    until(lambda: len(list(started.glob("*/state/started"))) == 2, 120, "two trainings")
    until(lambda: len(queue(cluster)) == 2, 120, "the end of the other stages")
    trainings = {stage: jobs for stage, jobs in held.entries().items() if stage.startswith("pretrain")}
    held.kill(head)
    assert sorted(job for jobs in trainings.values() for job in jobs) == queue(cluster)
    head = held.start()
    for stage, (job,) in trainings.items():
        until(lambda line=f"{stage} is job {job}": line in held.said.read_text(), 120, "attaching again")
    held.kill(head)
    cluster.run("scontrol", "requeue", queue(cluster)[0])
    (held.copy.root / "slow").unlink()
    head = held.start()
    until(lambda: any(stage.startswith("evaluate") for stage in held.entries()), 200, "a stage that needs a training")
    held.kill(head)
    assert held.start().wait(300) == 0, held.said.read_text()
    assert all(len(attempts) == 1 for attempts in held.entries().values()), "something was submitted twice"
    assert held.entries().items() >= trainings.items()
    assert len(held.entries()) == 7
    plain = Miniature(root, tmp_path / "plain")
    (plain.root / "mirepro/pretrain.py").write_text((held.copy.root / "mirepro/pretrain.py").read_text())
    result = plain.run("repro", module="dvc", env=plain.environment | {"MIREPRO_LAUNCH": "inline"})
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load((plain.root / "dvc.lock").read_text())["stages"] == held.lock()


@pytest.mark.parametrize("own", [{"gpus": 2, "cpus": 4}], indirect=True)
def test_every_task_has_a_gpu_of_its_own(own: Cluster, tmp_path: Path) -> None:
    """Made-up ones, which Slurm hands out as it does real ones; a job without `gpus`, the control, gets none."""
    bench = Bench(tmp_path / "a", slurm_jobs.devices, nodes=2, tasks=2, gpus=2)
    bench.wait()
    until(lambda: len(list(bench.work.glob("rank*"))) == 4, 60, "the other ranks")
    given = {path.name: path.read_text() for path in bench.work.glob("rank*")}
    assert given == {"rank0": "0 0 0,1", "rank1": "0 1 0,1", "rank2": "1 0 0,1", "rank3": "1 1 0,1"}
    none = Bench(tmp_path / "b", slurm_jobs.devices)
    none.wait()
    assert (none.work / "rank0").read_text().split()[2] not in ("0", "1", "0,1")


@pytest.mark.parametrize("own", [{"gpus": 2, "cpus": 4}], indirect=True)
def test_gpus_of_the_cluster_are_checked(own: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "launch" / "here.toml"
    site.parent.mkdir()
    head = "poll = 0.5\nsettle = 0.5\n[pretrain]\ntasks = {0}\ngpus = {0}\n"
    site.write_text(head.format(2))
    said = [line for line in probe(tmp_path, "here") if line.startswith("pretrain: ")]
    assert [word in line for word, line in zip(("accepted", "ran on"), said, strict=True)] == [True, True]
    site.write_text(head.format(3))
    with pytest.raises(UserError, match=r"^pretrain\.gpus: 3: .*[Rr]equested node configuration is not"):
        list(probe(tmp_path, "here"))
