"""A command beside a Slurm of its own: finds it, and its exit code comes through."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.infra,
    pytest.mark.skipif(
        os.environ.get("MIREPRO_REQUIRE_INFRA") != "1" and bool(missing()), reason="needs slurm-wlm and munge"
    ),
]


def beside(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """What a command said beside the cluster."""
    command = [sys.executable, "-m", "tests.with_slurm", *words]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_the_command_finds_the_cluster_and_launches_through_it(root: Path) -> None:
    result = beside(root, "sh", "-c", "sinfo -h -o %D:%T -p main; echo $MIREPRO_LAUNCH; exit 3")
    assert result.stdout.split() == ["2:idle", "slurm"]
    assert result.returncode == 3


def test_no_command_is_refused(root: Path) -> None:
    result = beside(root)
    assert (result.returncode, result.stderr) == (2, "with_slurm: name a command\n")
