"""Compiled extensions: the operators (torch's stable ABI, one binary for several torch and Python versions), their CUDA
kernels where nvcc and a CUDA torch are there (`MIREPRO_CUDA=0` leaves them out), and the build information (pybind11).
Build in place with `python setup.py build_ext --inplace`.
"""

import os
from pathlib import Path

CUDA_HOME = Path("/usr/local/cuda")
if "CUDA_HOME" not in os.environ and (CUDA_HOME / "bin/nvcc").exists():
    os.environ["CUDA_HOME"] = str(CUDA_HOME)  # torch would take the folder of an nvcc that is a wrapper script

import pybind11  # noqa: E402
import torch  # noqa: E402
from setuptools import Extension, setup  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# Contraction would fuse a*b+c by the compiler's whim and break bit equality; -march=native ties the file to one CPU.
# The two -fno-*-math-* flags drop floating-point exceptions and errno, which nobody reads; no value changes.
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def with_cuda() -> bool:
    """Whether the CUDA kernels are built: decided by the compilers, not by a GPU."""
    nvcc = Path(os.environ.get("CUDA_HOME", "/nowhere")) / "bin/nvcc"
    return os.environ.get("MIREPRO_CUDA", "") != "0" and torch.version.cuda is not None and nvcc.exists()


def extensions() -> list[Extension]:
    """The extension modules; none needs a GPU, and all but the CUDA kernels need no nvcc."""
    sources = [str(path) for path in sorted(Path("csrc/cpu").glob("*.cpp"))]
    operators = CppExtension(
        "mirepro._ops", ["csrc/ops.cpp", *sources], extra_compile_args=FLAGS + STABLE, py_limited_api=True
    )
    cuda = []
    if with_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        cuda.append(
            CUDAExtension(
                "mirepro._ops_cuda",
                ["csrc/ops_cuda.cu"],
                extra_compile_args={"nvcc": NVCC_FLAGS + STABLE},
                py_limited_api=True,
            )
        )
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else ""
    information = Extension(
        "mirepro._build_info",
        ["csrc/build_info.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*FLAGS, f'-DMIREPRO_CUDA_ARCH_LIST="{architectures}"'],
    )
    return [operators, *cuda, information]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True, no_python_abi_suffix=False)},
    )
