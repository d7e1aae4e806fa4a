"""What `mirepro launch check` makes of sbatch's and the container runtimes' messages, without a cluster."""

import time
from pathlib import Path
from typing import Any

import pytest

from mirepro.launch.container import complaint
from mirepro.launch.inquiry import refusal
from mirepro.launch.probe import forecast, shape
from mirepro.site import Section

DIGEST = "registry.example.org/mirepro@sha256:0123"
POLICY = "allocation failure: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("section", "said", "line"),
    [
        (
            {"account": "moon"},
            "allocation failure: Invalid account or account/partition combination specified",
            "pretrain.account: 'moon': Invalid account or account/partition combination specified; "
            "set one of those that `sacctmgr show associations user=$USER format=account,partition,qos` lists",
        ),
        ({}, "allocation failure: Invalid account or account/partition combination specified", "account: missing: "),
        ({"qos": "moon"}, "allocation failure: Invalid qos specification", "pretrain.qos: 'moon': Invalid qos"),
        (
            {"qos": "q"},
            "allocation failure: Job's QOS not permitted to use this partition (gpu allows long not q)",
            "pretrain.qos: 'q': Job's QOS",
        ),
        ({"partition": "x"}, "allocation failure: User's group not permitted to use this partition", "partition: 'x'"),
        ({"time": "9:00:00"}, f"sbatch: error: QOSMaxWallDurationPerJobLimit {POLICY}", "pretrain.time: '9:00:00'"),
        ({"nodes": 40}, f"sbatch: error: AssocMaxNodePerJobLimit {POLICY}", "pretrain.nodes: 40: AssocMaxNode"),
        (
            {"nodes": 40},
            "sbatch: Account: x sbatch: Memory: good allocation failure: Node count specification invalid",
            "nodes: 40: Node",
        ),
        ({"cpus": 99}, f"sbatch: error: QOSMaxCpuPerJobLimit {POLICY}", "pretrain.cpus: 99: QOSMaxCpu"),
        ({"memory": "9T"}, "allocation failure: Memory required by task is not available", "pretrain.memory: '9T': "),
        ({"gpus": 8}, f"sbatch: error: QOSMaxGRESPerJob {POLICY}", "pretrain.gpus: 8: QOSMaxGRES"),
        ({"options": {"gres": "a:1"}}, "allocation failure: Invalid generic resource (gres) specification", "'a:1'"),
        (
            {"options": {"moon": 3}},
            "sbatch: unrecognized option '--moon=3' Try \"sbatch --help\" for more information",
            "pretrain.options.moon: sbatch has no such option; see `man sbatch`, or leave it out",
        ),
        (
            {},
            "allocation failure: Requested node configuration is not available",
            "pretrain: sbatch: Requested node configuration is not available; compare the section with `sinfo",
        ),
        ({}, f"sbatch: error: QOSMaxSubmitJobPerUserLimit {POLICY}", "pretrain: sbatch: QOSMaxSubmitJob"),
    ],
)
def test_refusals_name_key_value_and_remedy(section: dict[str, Any], said: str, line: str) -> None:
    found = refusal(Section(**section), "pretrain", f"sbatch: {said}")
    assert line in found
    assert "; " in found
    assert "allocation failure" not in found


@pytest.mark.parametrize(
    ("runtime", "log", "line"),
    [
        ("podman", "env: ‘podman’: No such file or directory", "runtime: env: ‘podman’: No such file"),
        ("podman", "podman: 1: exec: podman: not found", "runtime: podman: 1: exec: podman: not found; install it"),
        ("apptainer", "slurmstepd: error: execve(): apptainer: No such file or directory", "runtime: "),
        ("pyxis", "srun: unrecognized option '--container-image=x'", "runtime: "),
        ("podman", "Error: initializing source docker://x: reading manifest y: manifest unknown", "image: Error: init"),
        ("apptainer", "FATAL:   Unable to handle docker://x uri: failed to get checksum", "image: FATAL: "),
        ("pyxis", "slurmstepd: error: pyxis: failed to import docker image", "image: "),
        ("podman", "Error: invalid reference format", "image: Error: invalid reference format; write registry/name@"),
        ("podman", "Error: statfs /nowhere: no such file or directory", "binds: Error: statfs /nowhere"),
    ],
)
def test_complaints_of_container_runtimes(tmp_path: Path, runtime: str, log: str, line: str) -> None:
    (tmp_path / "7_0_log.out").write_text("submitit INFO\n")
    section = Section(image=DIGEST, runtime=runtime)
    assert complaint(section, tmp_path, "7") == ""
    (tmp_path / "7_1_log.out").write_text(f"first\n  {log}\nsrun: error: n1: task 0: Exited with exit code 2\n")
    assert complaint(section, tmp_path, "7").startswith(line)
    assert "; " in complaint(section, tmp_path, "7")
    assert complaint(section, tmp_path, "8") == ""
    assert complaint(Section(), tmp_path, "7") == ""


def test_lines_for_people() -> None:
    assert shape(Section(nodes=2, tasks=4, time="1-12")) == "2 nodes, 4 tasks each, 1 day, 12:00:00"
    assert shape(Section(time=90)) == "1 node, 1 task, 1:30:00"
    assert forecast(None) == ""
    assert forecast(time.time() + 10) == "; could start within 5 minutes"
    assert forecast(0.0 + time.mktime((2100, 1, 2, 3, 4, 0, 0, 0, 0))) == "; could start at 2100-01-02 03:04"
