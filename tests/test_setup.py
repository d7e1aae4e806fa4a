"""The set-up inside `make repro` and `make test`: what a bare machine lacks is one line with the remedy."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setuptools
from torch.utils import cpp_extension

TOOLS = ("bash", "sh", "make", "df", "tail", "test", "grep", "sed", "find", "nproc", "touch", "expand", "env", "mkdir")
GOOD = "#!/bin/sh\nexit 0\n"


@pytest.fixture
def bare(root: Path, tmp_path: Path) -> Path:
    """A checkout and, in `bin`, the commands of a machine that has everything; nothing really installs."""
    for name in ("Makefile", "portable.env", "requirements.lock", "pyproject.toml", "setup.py"):
        shutil.copyfile(root / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    command(tmp_path, "g++", GOOD)
    # `python -m venv FOLDER` leaves itself there as FOLDER/bin/python.
    made = 'for to; do :; done; mkdir -p "$to/bin"; sed p -n "$0" > "$to/bin/python"; chmod +x "$to/bin/python"'
    venv = f'if [ "$2" = venv ]; then {made}; fi\n'
    command(tmp_path, "python3.11", f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n{venv}exit 0\n')
    (tmp_path / "bin" / "chmod").symlink_to(shutil.which("chmod") or "chmod")
    return tmp_path


def command(folder: Path, name: str, script: str) -> None:
    """A command of the machine."""
    path = folder / "bin" / name
    path.write_text(script)
    path.chmod(0o755)


def setup(folder: Path, target: str = "setup") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder)}
    return subprocess.run(["make", target], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_everything_is_there_and_a_second_call_installs_nothing(bare: Path) -> None:
    first = setup(bare)
    assert first.returncode == 0, first.stderr
    calls = (bare / "calls").read_text()
    assert "pip -qq --disable-pip-version-check install --require-hashes -r requirements.lock" in calls
    assert "install --no-build-isolation --no-deps -e ." in calls
    (bare / "calls").unlink()
    assert setup(bare).returncode == 0
    assert not (bare / "calls").exists()
    os.utime(bare / "requirements.lock", (2**33, 2**33))  # a newer lock is installed
    assert setup(bare).returncode == 0
    assert "--require-hashes" in (bare / "calls").read_text()


def test_an_environment_without_pip_is_made_anew(bare: Path) -> None:
    """As a kill in the middle of its making leaves it. Control: a whole one is kept."""
    assert setup(bare).returncode == 0
    python = bare / ".venv/bin/python"
    (bare / ".venv/packages.stamp").unlink()
    assert setup(bare).returncode == 0
    assert "--clear" not in (bare / "calls").read_text()
    (bare / ".venv/packages.stamp").unlink()
    python.write_text(python.read_text().replace("exit 0\n", 'case "$2" in pip) exit 1;; esac\n'))
    assert setup(bare).returncode == 0
    assert "-m venv --clear .venv" in (bare / "calls").read_text()


def _no_compiler(folder: Path) -> None:
    (folder / "bin" / "g++").unlink()


def _no_python(folder: Path) -> None:
    (folder / "bin" / "python3.11").unlink()


def _old_python(folder: Path) -> None:
    _no_python(folder)
    command(folder, "python3", "#!/bin/sh\nexit 1\n")


def _no_venv(folder: Path) -> None:
    command(folder, "python3.11", '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')


def _no_headers(folder: Path) -> None:
    script = (folder / "bin" / "python3.11").read_text()
    command(folder, "python3.11", script.replace("exit 0\n", 'case "$2" in *Python.h*) exit 1;; esac\n'))


def _full_disk(folder: Path) -> None:
    (folder / "bin" / "df").unlink()
    command(folder, "df", '#!/bin/sh\nprintf "Avail\\n11999999\\n"\n')


NO_PYTHON = (
    "Python 3.11 or 3.12 not found; apt-get install python3 python3-venv has one on Debian 12 and Ubuntu 24.04, "
    "elsewhere make PYTHON=..."
)
LACKS = {
    "no C++ compiler; apt-get install g++": _no_compiler,
    NO_PYTHON: _no_python,
    f"{NO_PYTHON} ": _old_python,
    "the venv module is missing; apt-get install python3.11-venv": _no_venv,
    "Python.h is missing; apt-get install python3.11-dev": _no_headers,
    "less than 12 GB of free disk here; free some space": _full_disk,
}


@pytest.mark.parametrize("target", ["repro", "test"])
@pytest.mark.parametrize("message", LACKS)
def test_what_is_missing_is_one_line(bare: Path, message: str, target: str) -> None:
    LACKS[message](bare)
    done = setup(bare, target)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert lines == [f"mirepro: {message.strip()}"]
    assert not (bare / ".venv").exists(), "found only after something had been installed"


def test_help_lists_the_targets(bare: Path) -> None:
    listed = [line.split()[1] for line in setup(bare, "help").stdout.splitlines()]
    assert {"setup", "repro", "status", "test", "test-slow", "lint", "bench"} <= set(listed)


GROUPED = """
import os, pathlib, pytest, time
{mark}
@pytest.mark.parametrize("number", range(12))
def test_where(number):
    time.sleep(0.1)
    pathlib.Path(os.environ["PYTEST_XDIST_WORKER"]).touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mark", "workers"), [('@pytest.mark.xdist_group("one")', 1), ("", 2)])
def test_a_group_of_tests_stays_on_one_worker(root: Path, tmp_path: Path, mark: str, workers: int) -> None:
    """The installed pytest and pytest-xdist fit together; the control has no group."""
    (tmp_path / "test_where.py").write_text(GROUPED.format(mark=mark))
    options = next(line for line in (root / "Makefile").read_text().splitlines() if line.startswith("PARALLEL"))
    command = [sys.executable, "-m", "pytest", "-q", *options.partition("=")[2].replace("$(JOBS)", "2").split()]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command, cwd=tmp_path, env=plain, check=True, capture_output=True)
    assert len(list(tmp_path.glob("gw*"))) == workers


def build_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> cpp_extension.BuildExtension:
    """The command that setup.py builds the extensions with."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    monkeypatch.setenv("MIREPRO_CUDA", "0")
    monkeypatch.chdir(root)
    runpy.run_path("setup.py", run_name="__main__")
    return asked["cmdclass"]["build_ext"](setuptools.Distribution())


def test_ninja_builds_the_extensions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for and found; without it torch falls back to distutils (the control)."""
    assert build_command(root, monkeypatch).use_ninja
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert not build_command(root, monkeypatch).use_ninja


def test_ninja_is_installed_with_the_requirements(root: Path) -> None:
    lock = (root / "requirements.lock").read_text()
    assert re.search(r"^ninja==[0-9.]+ \\\n    --hash=sha256:", lock, re.MULTILINE)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert "ninja" in project["build-system"]["requires"]
    assert any(one.startswith("ninja>=") for one in project["project"]["optional-dependencies"]["dev"])


def test_as_many_jobs_as_cores_where_the_tiers_variables_are_set(root: Path) -> None:
    """nproc answers OMP_NUM_THREADS, as the control shows."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def said(*command: str) -> int:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert said("make", "--no-print-directory", "--eval=jobs: ; @echo $(JOBS)", "jobs") == len(os.sched_getaffinity(0))
    assert said("nproc") == 1
