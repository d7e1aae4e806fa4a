"""The documentation names tests, modules and files that exist."""

import re
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
