"""The CUDA operators against the CPU ones, bit for bit: on a GPU where there is one, and everywhere by running the
same kernels as plain C++ (csrc/cuda/emulate.h), threads forwards and backwards. What was compiled is looked at too.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from mirepro import _build_info, ops, rng
from mirepro.errors import UserError
from tests import ops_cases, test_ops

ROOT = Path(__file__).parents[1]
OBJECT = ROOT / "mirepro/_ops_cuda.abi3.so"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="session")  # fast and slow tests share it: operators cannot be registered twice
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels compiled as C++, registered as operators of the CPU in a namespace of their own."""
    compiler, path = shutil.which("g++"), tmp_path_factory.mktemp("emulation") / "_ops_emulated.so"
    if compiler is None:
        pytest.skip("no g++")
    flags = ["-O1", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared", "-Wall", "-Werror"]
    include = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    define = ["-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    library = Path(torch.__file__).parent / "lib"
    link = [f"-L{library}", "-ltorch_cpu", "-ltorch", "-lc10"]
    source = ["-x", "c++", str(ROOT / "csrc/ops_cuda.cu"), "-x", "none"]
    subprocess.run([compiler, *flags, *define, *include, *source, "-o", str(path), *link], check=True)
    torch.ops.load_library(str(path))
    ops._register_fakes("mirepro_emulated")
    ops._register_gradients("mirepro_emulated")
    return torch.ops.mirepro_emulated


Backend = Callable[[Callable[[str], Any]], Any]


@pytest.fixture(params=["forwards", "backwards", pytest.param("cuda", marks=gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Calls a function of a device with `mirepro.ops` on CUDA, or with the emulation in its place."""
    if request.param == "cuda":
        yield lambda function: function("cuda")
        return
    emulated = request.getfixturevalue("emulation")
    monkeypatch.setenv("MIREPRO_EMULATION", "reverse" if request.param == "backwards" else "")

    def run(function: Callable[[str], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_ops", emulated)
            return function("cpu")

    yield run


def equal_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    """Same shapes, types and bytes; -0 is not 0."""
    return len(got) == len(want) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.detach().cpu().contiguous().numpy().tobytes() == b.detach().contiguous().numpy().tobytes()
        for a, b in zip(got, want, strict=True)
    )


def test_golden_cases(backend: Backend) -> None:
    assert backend(ops_cases.digests) == ops_cases.digests()


def rank_problems() -> dict[str, tuple[Tensor, Tensor, int, int]]:
    """Queries, bank and ranks: ties, tiny and odd sizes, whole banks, more rows than the sample of the brackets."""
    unit, lattice = test_ops.unit, test_ops.lattice
    return {
        "one row": (unit(2, 3), unit(1, 3, 1), 0, 1),
        "last rank": (unit(3, 17), unit(130, 17, 1), 129, 130),
        "whole bank": (lattice(5, 16, 3), lattice(193, 16, 4), 0, 193),
        "ties": (lattice(70, 5, 1), lattice(700, 5, 2), 100, 400),
        "one dimension": (lattice(3, 1, 5), lattice(1500, 1, 6), 700, 1400),
        "constant": (lattice(3, 8, 1), torch.full((3000, 8), 0.25), 1000, 1001),
        "by class": (lattice(4, 8, 1), lattice(96, 8, 3).repeat_interleave(40, 0), 30, 1300),
    }


def rank_outputs(problem: tuple[Tensor, Tensor, int, int], device: str) -> list[Tensor]:
    """Every operator over ranks, with and without exclusions."""
    z, bank = problem[0].to(device), problem[1].to(device)
    lo, hi = problem[2:]
    own = torch.arange(len(z), device=device) * 7 % len(bank)
    labels = torch.from_numpy(rng.mulhi(rng.words(3, 2, 0, np.arange(2), len(bank)), 4)).to(device)
    result = [*ops.neighbors(z, bank, hi), ops.region_thresholds(z, bank, lo, hi)]
    result += ops.region_logsumexp(z, bank, lo, hi, 0.3)
    z.requires_grad_()
    sums = ops.region_logsumexp(z, bank, lo, hi, 0.01, own=own, labels=labels)
    result += [*sums, torch.autograd.grad(sum(part.sum() for part in sums), z)[0]]
    for exclude in ({}, {"exclude_own": True}, {"exclude_mates": True}):
        more: dict[str, Any] = {"own": own, "labels": labels, **exclude}
        result.append(ops.region_size(z, bank, lo, hi, **more))
        more |= {"seed": 8, "step": 3, "sample_index": own * 2**33}
        result.append(ops.region_sample(z, bank, lo, hi, 23, **more))
        fewest = max(1, min(20, int(result[-2].min())))
        result.append(ops.region_sample(z, bank, lo, hi, fewest, replacement=False, **more))
    return result


@pytest.mark.parametrize("sigmas", ["", pytest.param("0", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(rank_problems()))
def test_ranks(backend: Backend, name: str, sigmas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With brackets of no width the sample misleads, and bisection has to find the ranks."""
    monkeypatch.setenv("MIREPRO_CUDA_SIGMAS", sigmas)
    problem = rank_problems()[name]
    want = rank_outputs(problem, "cpu")
    assert equal_bits(backend(lambda device: rank_outputs(problem, device)), want)


def gather_outputs(b: int, n: int, d: int, k: int, device: str) -> list[Tensor]:
    """Gathers, their gradients, update and assignment."""
    z, bank = test_ops.unit(b, d).to(device).requires_grad_(), test_ops.unit(n, d, 1).to(device)
    index = torch.from_numpy(rng.mulhi(rng.words(4, 3, 0, np.arange(b), k), n)).to(device)
    result = []
    for tau in (0.07, 0.01, 1e6):
        ce = ops.gather_nce(z, bank, index, tau)
        result += [ce, torch.autograd.grad(ce.sum(), z)[0], ops.gather_nce(z.detach(), bank, index, tau)]
    dot = ops.gather_dot(z, bank, index)
    result += [dot, torch.autograd.grad(dot.square().sum(), z)[0]]
    for momentum in (0.0, 0.5, 1.0):
        updated = bank.clone()
        ops.bank_update_(updated, index[:, 0], z, momentum)
        result.append(updated)
    return [*result, ops.bank_assign(bank, z), ops.bank_assign(bank, bank[: n // 2 + 1])]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 40, 16, 15), (5, 300, 33, 129), (2, 9, 70, 300), (9, 270, 130, 17)]
)
def test_gathers_update_and_assignment(backend: Backend, shape: tuple[int, int, int, int]) -> None:
    want = gather_outputs(*shape, device="cpu")
    assert equal_bits(backend(lambda device: gather_outputs(*shape, device=device)), want)


@pytest.mark.parametrize("name", list(test_ops.bad_calls()))
def test_bad_input_is_a_value_error_that_names_it(backend: Backend, name: str) -> None:
    def call(device: str) -> None:
        function, message = test_ops.bad_calls(device)[name]
        with pytest.raises(ValueError, match=message):
            function()

    backend(call)


def test_no_queries(backend: Backend) -> None:
    def call(device: str) -> list[tuple[int, ...]]:
        z, bank = torch.zeros(0, 4, device=device), torch.ones(9, 4, device=device)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        outputs = [*ops.neighbors(z, bank, 3), ops.region_thresholds(z, bank, 1, 3)]
        outputs += [ops.region_sample(z, bank, 1, 3, 2, seed=1, step=1, sample_index=none), ops.bank_assign(z, bank)]
        return [tuple(t.shape) for t in outputs]

    assert backend(call) == [(0, 3), (0, 3), (0, 2), (0, 2), (0,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_current_stream_and_every_device() -> None:
    """Inputs written on a side stream are seen there, and tensors of another device are worked on where they lie."""
    want = ops_cases.digests()
    for device in range(torch.cuda.device_count()):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # work that ignores the stream would read before the inputs are there
            assert ops_cases.digests(f"cuda:{device}") == want


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_query_needs_little_memory_beside_the_bank() -> None:
    z = torch.nn.functional.normalize(torch.randn(256, 128, device="cuda"), dim=1)
    bank = torch.nn.functional.normalize(torch.randn(1_281_167, 128, device="cuda"), dim=1)
    own = torch.arange(256, device="cuda")
    calls: list[Callable[[], Any]] = [
        lambda: ops.neighbors(z, bank, 4096),
        lambda: ops.region_sample(z, bank, 12_811, 128_116, 4096, seed=1, step=1, sample_index=own),
    ]
    for call in calls:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before <= 120 * 2**20  # 96 MiB and the results


SHIFT = """
#include <cstdio>

#include "cuda/emulate.h"

__global__ void shift(const int* in, int* out) {
  __shared__ int copy[8];
  copy[threadIdx.x] = in[threadIdx.x];
#ifdef BARRIER
  __syncthreads();
#endif
  out[threadIdx.x] = copy[(threadIdx.x + 1) % 8];
}

int main() {
  int in[8] = {1, 2, 3, 4, 5, 6, 7, 8}, out[8];
  mirepro::emulation::run(1, 8, [&] { shift(in, out); });
  for (int x : out) std::printf("%d", x);
}
"""


@pytest.mark.parametrize("order", ["", "reverse"])
def test_the_emulation_notices_a_missing_barrier(order: str, tmp_path: Path) -> None:
    """The control: a kernel without its barrier goes wrong."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    source, program = tmp_path / "shift.cpp", tmp_path / "shift"
    source.write_text(SHIFT)
    shown = []
    for flag in ("-DBARRIER", "-DNONE"):
        command = [compiler, "-std=c++20", flag, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        environment = {**os.environ, "MIREPRO_EMULATION": order}
        shown.append(subprocess.run([program], env=environment, capture_output=True, text=True, check=True).stdout)
    assert shown[0] == "23456781"
    assert shown[1] != shown[0]


def test_libraries_to_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="build them"):
        ops._libraries(tmp_path, True)
    (tmp_path / "_ops_cuda.abi3.so").touch()
    with pytest.raises(UserError, match="build them"):  # the CUDA kernels alone are not the operators
        ops._libraries(tmp_path, True)
    (tmp_path / "_ops.abi3.so").touch()
    assert [path.name for path in ops._libraries(tmp_path, True)] == ["_ops.abi3.so", "_ops_cuda.abi3.so"]
    assert [path.name for path in ops._libraries(tmp_path, False)] == ["_ops.abi3.so"]
    (tmp_path / "_ops_cuda.abi3.so").unlink()
    assert [path.name for path in ops._libraries(tmp_path, True)] == ["_ops.abi3.so"]


@pytest.mark.parametrize(
    ("nvcc", "switch", "cuda", "built"),
    [(True, "", "13.0", True), (True, "0", "13.0", False), (False, "", "13.0", False), (True, "1", None, False)],
)
def test_what_setup_builds(
    nvcc: bool, switch: str, cuda: str | None, built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    if nvcc:
        (tmp_path / "bin/nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MIREPRO_CUDA", switch)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    names = [extension.name for extension in runpy.run_path("setup.py")["extensions"]()]
    assert ("mirepro._ops_cuda" in names) == built
    assert {"mirepro._ops", "mirepro._build_info"} <= set(names)


def compiled() -> Path:
    """The shared object; skips where no nvcc could have built it."""
    if NVCC is None or torch.version.cuda is None or os.environ.get("MIREPRO_CUDA") == "0":
        pytest.skip("no nvcc, no CUDA torch, or MIREPRO_CUDA=0")
    assert _build_info.cuda_arch_list()
    assert OBJECT.is_file()
    return OBJECT


def cuobjdump(option: str) -> str:
    """Output of cuobjdump, the toolkit's or the one that triton brings."""
    path = compiled()
    triton = Path(torch.__file__).parents[1] / "triton/backends/nvidia/bin/cuobjdump"
    tool = shutil.which("cuobjdump") or shutil.which(str(triton))
    if tool is None:
        pytest.skip("no cuobjdump")
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout


def test_compiled_for_every_architecture() -> None:
    machine_code = cuobjdump("--list-elf")
    assert "sm_80" in machine_code
    assert "sm_90" in machine_code
    assert "sm_90" in cuobjdump("--list-ptx")


def test_compiled_arithmetic_is_the_canonical_one() -> None:
    """IEEE operations that round to nearest; fused only where the source says so (float32); no float atomics."""
    code = cuobjdump("-ptx")
    used = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rcp|ex2|lg2|rsqrt)\.[a-z0-9.]*f(?:32|64)\b", code))
    assert used <= {f"{name}.rn.f{bits}" for name in ("add", "sub", "mul", "div", "sqrt") for bits in (32, 64)} | {
        "fma.rn.f32"
    }
    assert "fma.rn.f32" in used
    assert not re.search(r"\.(ftz|approx)\b", code)
    assert not re.search(r"\b(atom|red)\.\S*\.f(16|32|64)", code)


def test_kernels_register_for_cuda_without_a_gpu() -> None:
    """Loads as it would beside a driver; every operator then has a CUDA kernel."""
    code = (
        "import torch; from mirepro import ops; "
        f"torch.ops.load_library({str(compiled())!r}) if not torch.cuda.is_available() else None; "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        f"print(all(has('mirepro::' + n, 'CUDA') for n in {[*ops_cases.outputs(), 'gather_dot_backward']}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"]
