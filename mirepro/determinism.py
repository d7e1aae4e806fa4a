"""Tiers, the environment they need before torch is imported, the determinism key, and step digests."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mirepro.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TIERS = ("portable", "exact", "fast")


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
    disabled = os.environ.get("NPY_DISABLE_CPU_FEATURES", "").split()
    return " ".join(name for name in above if umath.__cpu_features__.get(name) or name in disabled)


def reexec_if_needed(tier: str, threads: int) -> None:
    """Starts this very command again with the tier's environment, unless it stands already.

    Raises:
        UserError: torch is imported already, so the variables would come too late.
    """
    wanted = environment(tier, threads)
    foreign = (environment("portable", threads).keys() - wanted.keys()) & os.environ.keys()
    if not foreign and all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    if "torch" in sys.modules:
        raise UserError(f"tier {tier}: torch was imported in another environment; start through the `mirepro` command")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kept | wanted)


def configure_torch(tier: str, threads: int) -> None:
    """Threads and deterministic algorithms; call once, before the first tensor operation."""
    import torch

    torch.set_num_threads(threads)
    if tier != "fast":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def key(tier: str, threads: int) -> dict[str, Any]:
    """What results depend on beside parameters, data and code: equal keys promise equal bits (not in tier fast)."""
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "scipy")}
    shared = {"tier": tier, "threads": threads, "versions": versions, "machine": platform.machine()}
    return shared | ({"isa": "avx2"} if tier == "portable" else {"cpu": _cpu_name()})


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


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
