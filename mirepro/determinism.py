"""Tiers, the environment they need before torch is imported, the determinism key, and step digests."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirepro.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TIERS = ("portable", "exact", "fast")
TIER = "MIREPRO_TIER"  # environment variable: the tier of a program that imports torch before this package


def environment(tier: str, threads: int) -> dict[str, str]:
    """Variables that must stand before torch and NumPy are imported.

    portable pins every library to its AVX2 variant, so that AVX-512 machines compute what Haswell computes; exact asks
    cuBLAS for fixed workspaces; fast sets the threads only.

    Raises:
        UserError: Unknown tier, or no thread.
    """
    if tier not in TIERS:
        raise UserError(f"tier: {tier!r} is unknown; known: {', '.join(TIERS)}")
    if threads < 1:
        raise UserError(f"threads: {threads} is impossible; use 1 or more")
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    values = {name: str(threads) for name in names} | {"MKL_DYNAMIC": "FALSE", "OMP_DYNAMIC": "FALSE"}
    if tier == "portable":
        values |= {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_CBWR": "COMPATIBLE",
            "OPENBLAS_CORETYPE": "Haswell",
            "NPY_DISABLE_CPU_FEATURES": _numpy_features(),
        }
    elif tier == "exact":
        values["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return values


def _numpy_features() -> str:
    """NumPy's dispatched features above AVX2 that this CPU has (naming an absent one makes NumPy warn)."""
    from numpy._core import _multiarray_umath as umath  # type: ignore[attr-defined]

    above = [name for name in umath.__cpu_dispatch__ if name.startswith(("AVX512", "X86_V4", "AVX10"))]
    disabled = os.environ.get("NPY_DISABLE_CPU_FEATURES", "").replace(",", " ").split()
    return ",".join(name for name in above if umath.__cpu_features__.get(name) or name in disabled)


def reexec_if_needed(tier: str, threads: int) -> None:
    """Starts this very command again with the tier's environment, unless it stands already.

    Raises:
        UserError: torch is imported already, so the variables would come too late.
    """
    differing = departures(tier, threads)
    if not differing:
        return
    if "torch" in sys.modules:
        raise UserError(f"tier {tier}: torch was imported in another environment; start through the `mirepro` command")
    changed = os.environ | {name: value for name, (value, _) in differing.items() if value is not None}
    kept = {name: value for name, value in changed.items() if name not in differing or differing[name][0] is not None}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kept)


def departures(tier: str, threads: int) -> dict[str, tuple[str | None, str | None]]:
    """Variables that stand otherwise than a tier wants: `{name: (wanted, standing)}`; None means unset.

    Raises:
        UserError: Unknown tier, or no thread.
    """
    wanted = dict.fromkeys(environment("portable", threads)) | environment(tier, threads)
    pairs = {name: (value, os.environ.get(name)) for name, value in wanted.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def guard() -> None:
    """Refuses a program that imported torch in another environment than its tier (`MIREPRO_TIER`, or portable) wants.

    The package calls this when it is imported after torch; any number of threads will do here.

    Raises:
        UserError: Tier portable, and a variable stands otherwise than it wants, or torch does not follow them.
    """
    if os.environ.get(TIER, "portable") != "portable":
        return
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    differing = departures("portable", int(threads) if threads.isdecimal() and threads != "0" else 1)
    if differing:
        name, (value, standing) = min(differing.items())
        raise UserError(
            f"{name}: {standing!r}, tier portable wants {value!r} before torch is imported; set the variables of "
            f"portable.env or start through the `mirepro` command, or give up exact results with {TIER}=fast"
        )
    _capability()


def _capability() -> None:
    """Checks that torch took its AVX2 kernels: the variables may have been set after its import."""
    import torch

    found = torch.backends.cpu.get_cpu_capability()
    if found != "AVX2":
        raise UserError(
            f"tier portable: torch computes with {found} instead of AVX2; the processor needs AVX2, and the variables "
            "of portable.env must stand before torch is imported (start through the `mirepro` command)"
        )


def configure_torch(tier: str, threads: int) -> None:
    """Threads and deterministic algorithms; call once, before the first tensor operation.

    Raises:
        UserError: Tier portable, and torch does not compute with AVX2.
    """
    import torch

    if tier == "portable":
        _capability()
    torch.set_num_threads(threads)
    if tier != "fast":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def check_device(key: str, name: str, tier: str, here: bool = True) -> None:
    """Refuses a device that a stage cannot compute on.

    Args:
        key: The parameter that names it, for messages.
        name: Its value.
        tier: The profile's.
        here: Whether this process is to compute there; else its GPU may be elsewhere.

    Raises:
        UserError: Unknown device, none here, or tier portable, which is the CPU's.
    """
    if name not in ("cpu", "cuda") or (name == "cuda" and tier == "portable"):
        raise UserError(f"{key}: {name!r} is impossible in tier {tier}; use cpu, or cuda in tier exact")
    if here and name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"{key}: torch finds no CUDA device here; use cpu, or another machine")


def key(tier: str, threads: int) -> dict[str, Any]:
    """What results depend on beside parameters, data and code: equal keys promise equal bits (not in tier fast)."""
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "scipy")}
    shared = {"tier": tier, "threads": threads, "versions": versions, "machine": platform.machine()}
    if tier == "portable":
        return shared | {"isa": "avx2"}
    found = gpus()
    return shared | {"cpu": cpu("model name")} | ({"gpus": found} if found else {})


def cpu(field: str) -> str:
    """A line of the first processor in /proc/cpuinfo, for example `model name` or `flags`."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith(field)), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def gpus() -> list[str]:
    """Models of the NVIDIA devices as the driver lists them; torch is not needed."""
    texts = [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("Model")]
    return [line.partition(":")[2].strip() for line in lines]


def digests(tensors: Mapping[str, "Tensor"]) -> dict[str, str]:
    """First 16 hex digits of each tensor's sha256 (bytes in C order)."""
    return {
        name: hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, value in sorted(tensors.items())
    }


def chain(previous: str, step: int, parts: Mapping[str, str]) -> str:
    """The next link of a chain of digests: sha256 of the previous link, the step and the tensors' digests."""
    text = "\n".join([previous, str(step), *(f"{name} {digest}" for name, digest in sorted(parts.items()))])
    return hashlib.sha256(text.encode()).hexdigest()
