"""Results do not depend on hash seed, locale, time zone, checkout path, working directory, listing order or cores.

Each setting is shown to reach the process (a fact about it differs), and another seed of the run to change the results.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("independence.py")


def run(root: Path, folder: Path, *arguments: str, cores: int = 0, **environment: str) -> dict[str, Any]:
    """Facts and digests of the program in a process of its own; `cores` restricts it to so many."""
    restrict: Callable[[], None] | None = None
    if cores:
        restrict = lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # noqa: E731
    folder.mkdir()
    command = [sys.executable, "-P", str(PROGRAM), str(folder), *(arguments or ["0"])]
    standing = {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | standing | environment, capture_output=True, text=True, check=False,
        preexec_fn=restrict,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def usual(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(root, tmp_path_factory.mktemp("usual") / "work")


def other_locale() -> str:
    """A locale with other letters or another decimal sign where one is installed, else plain C."""
    known = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout.split()
    wanted = ("tr_TR", "de_DE", "fr_FR")
    return next((name for name in known if name.startswith(wanted)), "C")


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hash seed": ("hash", {"PYTHONHASHSEED": "4711"}),
    "locale": ("locale", {"LC_ALL": other_locale(), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "time zone": ("time", {"TZ": "XYZ-13:30"}),
    "number of cores": ("cores", {"cores": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_settings_of_the_process(root: Path, tmp_path: Path, usual: dict[str, Any], case: str) -> None:
    fact, change = CASES[case]
    if case == "number of cores" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core here")
    found = run(root, tmp_path / "work", **change)
    assert found["facts"][fact] != usual["facts"][fact], "the setting did not reach the process"
    assert found["digests"] == usual["digests"]


def test_path_of_the_checkout_and_of_the_work(root: Path, tmp_path: Path, usual: dict[str, Any]) -> None:
    copy = tmp_path / "another päth" / "deeper"
    for name in ("mirepro", "docs"):  # the code locks cover the deviations too
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    found = run(copy, tmp_path / "elsewhere, too")
    assert found["facts"]["path"] != usual["facts"]["path"]
    assert found["digests"] == usual["digests"]


def test_order_of_files_on_disk(root: Path, tmp_path: Path, usual: dict[str, Any]) -> None:
    found = run(root, tmp_path / "work", "0", "reversed")
    assert found["facts"]["listing"] != usual["facts"]["listing"]
    assert found["digests"] == usual["digests"]


def test_another_seed_differs(root: Path, tmp_path: Path, usual: dict[str, Any]) -> None:
    """The control: digests that never differ would prove nothing."""
    found = run(root, tmp_path / "work", "1")
    differing = {name for name, digest in found["digests"].items() if usual["digests"][name] != digest}
    assert {"ring/out/encoder.safetensors", "ring/out/bank.safetensors", "cave/metrics.json"} <= differing
    assert "data/manifest.json" not in differing
    assert found["facts"] == usual["facts"]
