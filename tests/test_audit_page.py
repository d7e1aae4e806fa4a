"""The audit's page: every reason is readable without a click."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from mirepro.audit import page


def cell(row: str, verdict: str, reason: str) -> dict[str, str]:
    return {"row": row, "column": "knn_1", "verdict": verdict, "reason": reason}


def test_reasons_are_listed_once_worst_first() -> None:
    cells = [cell("a", "EXACT", "same"), cell("b", "DIVERGED", "step 4"), cell("c", "EXACT", "same"),
             cell("d", "DIVERGED", "step 4"), cell("e", "DIVERGED", "step 6"), cell("f", "FAILED", "kill")]  # fmt: skip
    found = [(group["verdict"], group["reason"], group["cells"], group["count"]) for group in page.grouped(cells)]
    assert found[0] == ("FAILED", "kill", ["f / knn_1"], 1)
    assert ("DIVERGED", "step 4", ["b / knn_1", "d / knn_1"], 2) in found
    assert found[-1] == ("EXACT", "same", [], 2)
    assert sum(count for *_, count in found) == len(cells)
    assert page.grouped(cells[:1]) != page.grouped(cells[1:2])


def test_differences_of_the_environment() -> None:
    """One line for each library of another version; equal and unknown ones have none."""
    here = {"tier": "portable", "versions": {"torch": "2.1", "numpy": "2.0", "scipy": "1.0"}}
    assert page.departures({"here": here, "pinned": {"torch": "2.2", "numpy": "2.0"}}) == [("torch", "2.1", "2.2")]
    assert page.departures({"here": here, "pinned": {}}) == []


def test_everything_the_package_reads_is_installed(root: Path) -> None:
    """No file beside the code is left out of a wheel."""
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mirepro"]
    package = root / "mirepro"
    names = [str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()]
    beside = [name for name in names if not name.endswith(".py") and "__pycache__" not in name]
    assert "audit/report.schema.json" in beside
    assert [name for name in beside if not any(fnmatch(name, pattern) for pattern in patterns)] == []
