"""Compiled extensions: the operators (torch's stable ABI, one binary for several torch and Python versions) and the
build information (pybind11). Build in place with `python setup.py build_ext --inplace`.
"""

from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# Contraction would fuse a*b+c by the compiler's whim and break bit equality; -march=native ties the file to one CPU.
# The two -fno-*-math-* flags drop floating-point exceptions and errno, which nobody reads; no value changes.
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]


def extensions() -> list[Extension]:
    """The two extension modules; neither needs nvcc or a GPU."""
    sources = [str(path) for path in sorted(Path("csrc/cpu").glob("*.cpp"))]
    operators = CppExtension(
        "mirepro._ops", ["csrc/ops.cpp", *sources], extra_compile_args=FLAGS + STABLE, py_limited_api=True
    )
    information = Extension(
        "mirepro._build_info", ["csrc/build_info.cpp"], include_dirs=[pybind11.get_include()], extra_compile_args=FLAGS
    )
    return [operators, information]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True, no_python_abi_suffix=False)},
)
