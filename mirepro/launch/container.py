"""The command that runs a job's Python inside a container image, and the end that both share."""

import os
import re
import shlex
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mirepro.site import Section

PREFIXES = ("SLURM_", "SUBMITIT_", "MIREPRO_", "OMP_", "MKL_", "OPENBLAS_", "NPY_", "CUDA_", "NCCL_", "GLOO_")
NAMES = ("SLURMD_NODENAME", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG")
PYTHON = "python3"
CLIENT = "MIREPRO_CLIENT"
"""Environment variable: process id of the podman that a job's container belongs to."""
SIGNAL = "USR2"
"""submitit's signal: the job's time is nearly over, or another job wants its place."""
PUSH = "push it to the registry, and let the nodes read that, or pull it on every node"
COMPLAINTS = {
    r"\b{runtime}\b\W+(command )?(not found|No such file or directory)": (
        "runtime", "install it on all nodes, or load its module in `setup`"
    ),
    "unrecognized option '--container-image": ("runtime", "pyxis has to be installed in Slurm; or set another one"),
    "initializing source docker://|manifest unknown|image not known": ("image", PUSH),
    r"Unable to handle \S+ uri|pyxis: failed to import docker image": ("image", PUSH),
    "invalid reference format": ("image", "write registry/name@sha256: and all 64 digits"),
    r"statfs \S+ no such file or directory|mount source \S+ doesn't exist": ("binds", "name what all nodes have"),
}  # fmt: skip
"""How podman, apptainer, pyxis and srun complain, the key that is at fault, and the remedy."""


@dataclass(frozen=True)
class Container:
    """An image with the runtime that starts it; the repository is bound at its own path.

    Attributes:
        root: The repository's root.
        section: Names image, runtime and further binds.
    """

    root: Path
    section: Section

    @property
    def binds(self) -> list[str]:
        """host:container pairs."""
        own = [str(self.root), *self.section.binds]
        return [bind if ":" in bind else f"{bind}:{bind}" for bind in own]

    @property
    def srun(self) -> tuple[str, ...]:
        """Arguments of srun, for a runtime that is a plugin of Slurm (pyxis with enroot)."""
        if self.section.runtime != "pyxis":
            return ()
        mounts = f"--container-mounts={','.join(self.binds)}"
        return (f"--container-image={enroot(str(self.section.image))}", mounts, f"--container-workdir={self.root}")

    def python(self) -> str:
        """The shell words that stand for the interpreter."""
        gpus, image = self.section.gpus > 0, str(self.section.image)
        if self.section.runtime == "pyxis":
            words = []
        elif self.section.runtime == "apptainer":
            reference = image if "://" in image else f"docker://{image}"
            binds = [word for bind in self.binds for word in ("--bind", bind)]
            words = ["apptainer", "exec", *(["--nv"] if gpus else []), "--pwd", str(self.root), *binds, reference]
        else:
            return self._podman(image, gpus)
        return shlex.join([*words, PYTHON])

    def _podman(self, image: str, gpus: bool) -> str:
        """The user of the job owns what it writes: root inside is that user in a rootless podman, and root for root.

        Slurm signals all processes of a step, among them the helper by which podman passes the signal before (CONT) on.
        A helper that dies of it ends all passing on; so helpers start with the signal blocked, where `env` can do that.
        """
        binds = [word for bind in self.binds for word in ("--volume", bind)]
        variables = [word for name in (*(f"{prefix}*" for prefix in PREFIXES), *NAMES) for word in ("--env", name)]
        device = ["--device", "nvidia.com/gpu=all"] if gpus else []
        words = ["podman", "run", "--rm", "--network=host", "--ipc=host", "--pid=host", "--user=0:0"]
        words += ["--workdir", str(self.root), *device, *binds, *variables, "--entrypoint", PYTHON, image]
        shield = f"env --block-signal={SIGNAL}"
        shielded = f"export {CLIENT}=$$; shield=$({shield} echo {shield} 2>/dev/null); exec $shield"
        return shlex.join(["sh", "-c", f'{shielded} {shlex.join(words)} "$@"', "podman"])


def enroot(image: str) -> str:
    """An image's name as enroot wants it, [REGISTRY#]IMAGE[:TAG], a digest in the place of the tag (src/docker.sh)."""
    name, at, digest = image.partition("@")
    host, slash, rest = name.partition("/")
    if slash and (host == "localhost" or "." in host or ":" in host):
        name = f"{host}#{rest}"
    return f"{name}:{digest}" if at else name


def complaint(section: Section, folder: Path, job: str) -> str:
    """The last complaint of a runtime in a job's logs, with key and remedy; empty where there is none."""
    logs = sorted(folder.glob(f"{job}_*_log.out")) if section.image else []
    for line in reversed("\n".join(path.read_text(errors="replace") for path in logs).splitlines()):
        for pattern, (key, remedy) in COMPLAINTS.items():
            if re.search(pattern.replace("{runtime}", section.runtime), line):
                return f"{key}: {line.strip()}; {remedy}"
    return ""


def unblock() -> None:
    """Takes the signal that this process inherited blocked from the podman that started it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.Signals[f"SIG{SIGNAL}"]])


def die_with_client() -> None:
    """Lets this process end with the podman that started it, where one did.

    A container is no child of its podman: where Slurm kills that, the job would go on, though it is over for Slurm.
    """
    if client := os.environ.get(CLIENT):
        threading.Thread(target=_watch, args=(client, _began(client)), daemon=True).start()


def _watch(client: str, began: str) -> None:
    while _began(client) == began != "":
        time.sleep(1.0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _began(process: str) -> str:
    """When a process started, which tells it from a later one of its number; empty where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
