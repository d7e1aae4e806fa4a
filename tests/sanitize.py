"""The operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m tests.sanitize [FOLDER]`.

The CPU operators are compiled anew with both sanitizers into a copy of package and tests, with operators that hold
deliberate mistakes beside them. The first finding ends the run: no mistake is reported and passed over.
"""

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_ops.py", "tests/test_ops_fuzz.py", "tests/test_ops_samples.py", "tests/test_first_pass.py",
         "tests/test_views.py")  # fmt: skip
FAULTS = {"beyond": "heap-buffer-overflow", "freed": "heap-use-after-free", "overflow": "signed integer overflow"}
"""Operators with a mistake, and what the sanitizers call it."""

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-w"]


def build(folder: Path) -> None:
    """Copies package and tests into an empty folder and compiles the instrumented operators there."""
    for name in ("mirepro", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_ops*.so"))
    for name in ("pyproject.toml", "portable.env"):
        shutil.copy(ROOT / name, folder / name)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    flags = [flag for flag in setup["FLAGS"] if not flag.startswith("-O")] + setup["STABLE"]
    include = [f"-I{path}" for path in [ROOT / "csrc", *cpp_extension.include_paths()]]
    sources = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/sanitizers/faults.cpp"]
    link = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    target = folder / "mirepro/_ops.abi3.so"
    command = ["g++", "-O1", *flags, *SANITIZE, "-fPIC", "-shared", *include, *map(str, sources), "-o", str(target)]
    subprocess.run([*command, *link], check=True)


def environment(folder: Path) -> dict[str, str]:
    """For a Python that loads the instrumented operators: the sanitizer's allocator has to come first.

    The interpreter keeps memory until it ends, so that leaks are not looked for.
    """
    shared = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
             for name in shared]  # fmt: skip
    return os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:strict_string_checks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MIREPRO_TIER": "fast",  # torch may come before the package
    }


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder that was built."""
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)


def call(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    """Runs an operator with a mistake."""
    code = f"import torch; from mirepro import ops; print(torch.ops.mirepro_faults.{fault}(torch.arange(5) + 1))"
    return run(folder, "-c", code)


def faults(folder: Path) -> list[str]:
    """Mistakes that were not caught."""
    runs = {name: call(folder, name) for name in FAULTS}
    return [name for name, done in runs.items() if done.returncode == 0 or FAULTS[name] not in done.stderr]


def tests(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the operators' tests."""
    present = [name for name in TESTS if (folder / name).is_file()]
    return run(folder, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-m", "not slow", *present)


def main() -> None:
    """Builds, shows that mistakes are caught, runs the tests."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if sys.argv[1:] else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        build(folder)
        missed = faults(folder)
        print(f"deliberate mistakes caught: {len(FAULTS) - len(missed)} of {len(FAULTS)}", *missed)
        done = tests(folder)
        print(done.stdout[-4000:], done.stderr[-8000:], sep="\n")
        sys.exit(bool(missed) or done.returncode)


if __name__ == "__main__":
    main()
