"""`mirepro launch check` against a real Slurm: what it refuses, in one line, and what its probe reports."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from miniature import Miniature
from slurm_bench import cluster, own, tidy

from mirepro.errors import UserError
from mirepro.launch.probe import probe

__all__ = ["cluster", "own", "tidy"]

pytestmark = [pytest.mark.slow, pytest.mark.infra]
DIGEST = f"localhost/none@sha256:{'0' * 64}"
Check = Callable[[str], list[str]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Checks the text of a site file."""
    site = tmp_path / "launch" / "here.toml"
    site.parent.mkdir()

    def run(text: str) -> list[str]:
        site.write_text(f"poll = 0.5\nsettle = 0.5\n{text}")
        return list(probe(tmp_path, "here"))

    return run


def refused(check: Check, text: str) -> str:
    """The one line of a refusal."""
    with pytest.raises(UserError) as caught:
        check(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_accepted(cluster: Cluster, check: Check) -> None:
    first, accepted, ran = check("[all]\npartition = 'main'\ntime = 30\noptions = {nice = 5}\n")
    assert first.startswith("here: slurm on mir")
    kinds = "pretrain, evaluate, controls, detect, toy"
    assert accepted == f"{kinds}: 1 node, 1 task, 0:30:00: accepted; could start within 5 minutes"
    assert re.fullmatch(rf"{kinds}: job \d+ ran on n[12] \(1 task\), back in [\d.]+ s", ran)


def test_every_rank_reports(cluster: Cluster, check: Check) -> None:
    lines = check("[pretrain]\nnodes = 2\ntasks = 2\ntime = 60\n")
    assert lines[1] == "pretrain: 2 nodes, 2 tasks each, 1:00:00: accepted; could start within 5 minutes"
    assert "toy: 1 node, 1 task, 1:00:00: accepted" in lines[2]
    assert re.fullmatch(r"pretrain: job \d+ ran on n1, n2 \(4 tasks\), back in [\d.]+ s", lines[3])
    assert "(1 task)" in lines[4]


def test_a_probe_that_would_wait_is_made_smaller(cluster: Cluster, check: Check) -> None:
    busy = ("--nodelist=n1", "--exclusive", "--time=50", "--output=/dev/null", "--chdir=/", "--wrap=sleep 900")
    job = cluster.run("sbatch", "--parsable", *busy)
    lines = check("[pretrain]\nnodes = 2\ntasks = 2\n")
    cluster.run("scancel", job)
    start = r"could start at \d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(rf"pretrain: 2 nodes, 2 tasks each, 1:00:00: accepted; {start}", lines[1])
    small = rf"; a smaller probe, because 2 nodes, 2 tasks each, 0:01:00 would have to wait; {start}"
    assert re.fullmatch(rf"pretrain: job \d+ ran on n2 \(1 task\), back in [\d.]+ s{small}", lines[3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pretrain]\npartition = 'moon'", "pretrain.partition: 'moon' is unknown to the cluster; known: main"),
        ("[toy]\ntime = '2:00:00'", "toy.time: 2:00:00 is over the limit 01:00:00 of main; lower it"),
        ("[pretrain]\nnodes = 3", "pretrain.nodes: 3, and main has 2; lower it"),
        ("[all]\noptions = {moon = 3}", "pretrain.options.moon: sbatch has no such option"),
        ("[all]\noptions = {constraint = 'sun'}", "pretrain.options.constraint: 'sun': Invalid feature specification"),
        ("[all]\noptions = {reservation = 'moon'}", "pretrain.options.reservation: 'moon': Requested reservation is"),
        ("[all]\noptions = {nodelist = 'n7'}", "pretrain.options.nodelist: 'n7': Invalid node name"),
        ("[all]\noptions = {gres = 'gpu:9'}", "pretrain.options.gres: 'gpu:9': Invalid generic resource (gres)"),
        ("[all]\ngpus = 1", "pretrain.gpus: 1: Invalid generic resource (gres)"),
        ("[all]\nmemory = '9T'", "pretrain.memory: '9T': Requested node configuration is not available; lower"),
        ("[all]\ncpus = 64", "pretrain.cpus: 64: Requested node configuration is not available; lower"),
        ("[toy]\ncpus = 64\nmemory = '9T'", "toy: sbatch: Requested node configuration is not available; compare"),
        ("[pretrain]\ntasks = 64", "pretrain.tasks: 64: Requested node configuration is not available; lower it"),
    ],
)
def test_refused(cluster: Cluster, check: Check, text: str, message: str) -> None:
    assert refused(check, text).startswith(message)


ENFORCED = {"accounts": True, "extra": "AccountingStorageEnforce=associations,limits,qos"}


@pytest.mark.parametrize("own", [ENFORCED], indirect=True)
def test_accounts(own: Cluster, check: Check) -> None:
    own.run("sacctmgr", "-i", "add", "qos", "brief", "MaxWall=10", "Flags=DenyOnLimit")
    own.run("sacctmgr", "-i", "add", "qos", "foreign")
    own.run("sacctmgr", "-i", "modify", "user", "root", "set", "qos=normal,brief")
    assert "ran on" in check("[all]\naccount = 'root'\nqos = 'normal'\n")[2]
    remedy = "set one of those that `sacctmgr show associations"
    for text, key, words in (
        ("account = 'moon'", "pretrain.account: 'moon'", "Invalid account or account/partition combination specified"),
        ("qos = 'moon'", "pretrain.qos: 'moon'", "Invalid qos specification"),
        ("qos = 'foreign'", "pretrain.qos: 'foreign'", "Invalid qos specification"),
    ):
        assert refused(check, f"[all]\n{text}\n").startswith(f"{key}: {words}; {remedy}")
    assert refused(check, "[all]\nqos = 'brief'\ntime = 30").startswith("pretrain.time: 30: QOSMaxWall")
    assert "accepted" in check("[all]\nqos = 'brief'\ntime = 10\n")[1]


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("apptainer", "pretrain.runtime: .*apptainer: No such file or directory; install it on all nodes"),
        ("pyxis", "pretrain.runtime: srun: unrecognized option '--container-image=.*'; pyxis has to be installed"),
    ],
)
def test_no_such_runtime(cluster: Cluster, check: Check, runtime: str, message: str) -> None:
    assert re.match(message, refused(check, f"[all]\nimage = '{DIGEST}'\nruntime = '{runtime}'\n"))


def test_the_command(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    miniature = Miniature(root, tmp_path / "repo")
    (miniature.root / "launch").mkdir()
    for text, code, out, error in (
        ("[all]\ntime = 30", 0, "accepted", ""),
        ("[pretrain]\npartition = 'moon'", 2, "slurm on mir", "pretrain.partition: 'moon' is unknown to the cluster"),
        ("[pretrain]\nnodes = 3", 2, "", "here: nodes, tasks: 3 ranks cannot share pretrain.shards 1 equally"),
    ):
        (miniature.root / "launch" / "here.toml").write_text(f"{text}\n")
        result = miniature.run("launch", "check", "here")
        assert result.returncode == code, result.stderr
        assert out in result.stdout
        assert len(result.stderr.splitlines()) == (code > 0)
        assert error in result.stderr
