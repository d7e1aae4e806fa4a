"""What `mirepro launch check` makes of the container runtimes' messages, without a cluster."""

from pathlib import Path

import pytest

from mirepro.launch.container import complaint
from mirepro.site import Section

DIGEST = "registry.example.org/mirepro@sha256:0123"

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
