"""The documentation names tests, modules, files and messages that exist, and quotes what was measured."""

import ast
import json
import re
import statistics
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
FILE = re.compile(r"\b(?:tests|benchmarks|docs|mirepro|csrc)/[\w./-]*\w\.(?:py|json|md|cpp|h|cu|yaml)\b(?:::(\w+))?")
TEST = re.compile(r"`(?:[^`]*::)?(test_\w+)(\.\.\.)?`")
MODULE = re.compile(r"python -m ((?:benchmarks|tests|mirepro)[\w.]*)")


def missing(text: str) -> list[str]:
    """What a page names and the repository lacks."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    found = [match[0] for match in FILE.finditer(text) if not (ROOT / match[0].partition("::")[0]).exists()]
    for match in FILE.finditer(text):
        path = ROOT / match[0].partition("::")[0]
        if match[1] and path.exists() and not re.search(rf"^def {match[1]}\b", sources[path], re.MULTILINE):
            found.append(match[0])
    for name, prefix in TEST.findall(text):
        pattern = rf"^(?:async )?def {name}{'' if prefix else chr(92) + 'b'}"
        if not any(re.search(pattern, source, re.MULTILINE) for source in sources.values()):
            found.append(name)
    for module in MODULE.findall(text):
        base = ROOT.joinpath(*module.rstrip(".").split("."))
        if not base.with_suffix(".py").exists() and not (base / "__main__.py").exists():
            found.append(module)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "see tests/test_gone.py",
        "`tests/test_docs.py::test_gone`",
        "`test_nowhere_at_all...`",
        "python -m benchmarks.gone",
    ],
)
def test_control_a_wrong_name_is_seen(text: str) -> None:
    assert len(missing(text)) >= 1
    assert (
        missing("`tests/test_docs.py::test_what_a_page_names_exists`, `test_what_a_page...`, python -m mirepro") == []
    )


FOREIGN = (
    "Invalid account or account/partition combination", "Invalid qos specification", "QOSMax", "AssocMax",
    "Job violates accounting/QOS policy", "Invalid feature specification", "Invalid generic resource",
    "Requested node configuration is not available", "execve(): apptainer: No such file or directory", "CANCELLED by",
    "podman: not found", "unrecognized option '--container-image=", "Error: initializing source docker://",
    "Unable to handle docker://", "pyxis: failed to import docker image", "Error: statfs", "no such file or directory",
    "OUT_OF_MEMORY", "timed-out too many times",
)  # fmt: skip
"""Words of Slurm, submitit and the runtimes, which tests know."""
PLACES = re.compile(r"\.\.\.|: |'[^']*'|\b(?:\d+|[A-Zx])\b")
"""What stands in a quoted message for something else, or between its parts."""


@cache
def literals(folder: Path) -> str:
    """All texts of a folder's programs, one after the other."""
    paths = [path for path in folder.rglob("*.py") if path.name != "test_docs.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    found = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\n".join(text for text in found if isinstance(text, str))


def unknown(messages: list[str]) -> list[str]:
    """Parts of messages that neither this program says nor, in its tests, another one."""
    own, others = literals(ROOT / "mirepro"), literals(ROOT / "tests")
    lost = []
    for message in messages:
        foreign = [words for words in FOREIGN if words in message]
        for words in foreign:
            message = message.replace(words, "...")
        parts = [part.strip(" .:;(),") for part in PLACES.split(message)]
        lost += [part for part in parts if part not in own] + [words for words in foreign if words not in others]
    return lost


def quoted(text: str) -> list[str]:
    """The messages of the page's last table."""
    rows = [line.split(" | ")[0] for line in text.partition("## Messages")[2].splitlines() if line.startswith("| ")]
    return [message for row in rows[2:] for message in re.findall("`([^`]+)`", row)]


def test_quoted_messages_exist() -> None:
    messages = quoted((ROOT / "docs" / "slurm.md").read_text(encoding="utf-8"))
    assert len(messages) > 30
    assert unknown(messages) == []


@pytest.mark.parametrize(
    "message", ["the scheduler is silent", "time: ... is above the limit ...", "options.x: sbatch knows no such option"]
)
def test_control_a_message_that_nobody_says_is_seen(message: str) -> None:
    assert unknown([message]) != []


def test_overhead_is_what_was_measured() -> None:
    """The differences to plain sbatch, from the benchmark's files; all of them are under 3 s."""
    text = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| Zen [^|]*\| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for *said, name in rows:
        seconds = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["overhead"]["all"]
        slow, plain = seconds["command by the launcher"], seconds["command by sbatch"]
        each = [a - b for a, b in zip(slow, plain, strict=True)]
        found = (statistics.median(slow) - statistics.median(plain), min(each), max(each))
        assert [f"{value:.2f}" for value in found] == said, name
        assert max(each) < 3
        assert (max(slow) == 3.12) == (name == "2026-11-30-zen3-launch-together.json")
        assert sum(value > 3 for value in slow) == (max(slow) == 3.12)


def test_many_stages_took_what_the_page_says() -> None:
    """Of the newest 20 runs: their range in seconds and in times of the ideal, the median, none lost."""
    text = " ".join((ROOT / "docs" / "slurm.md").read_text(encoding="utf-8").split())
    figures = r"(\d+) to (\d+) s, ([\d.]+) to ([\d.]+) times the ideal 80 s, median ([\d.]+) \(`([^`]+)`\)"
    said = re.search(figures, text)
    assert said is not None
    runs = json.loads((ROOT / said[6]).read_text())["many"]
    assert len(runs) == 20
    assert {run["collected"] for run in runs} == {64}
    walls, ratios = ([run[key] for run in runs] for key in ("wall", "ratio"))
    assert [f"{min(walls):.0f}", f"{max(walls):.0f}"] == [said[1], said[2]]
    assert [f"{value:.2f}" for value in (min(ratios), max(ratios), statistics.median(ratios))] == [*said.groups()[2:5]]
    assert max(ratios) <= 1.3
