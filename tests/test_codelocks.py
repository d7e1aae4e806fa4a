"""Canonical syntax trees: what changes a lock, what does not, and equal hashes on other Pythons."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mirepro import codelocks, files
from mirepro.errors import UserError

SOURCE = '''
"""Module."""
import os

x: float = 1.5  # comment


class A(object):
    """Class."""

    def f(self, a, /, *b, c=None, **d) -> str:
        """Docstring."""
        y = {**d, "k": [1, 2j, b"z", ..., -0.0]}
        return f"{a!r:>{c}} and {y=} text" "more" + u"u"


async def g():
    try:
        with open("x") as f, open("y"):
            return [i async for i in f if i]
    except* OSError:
        pass
    match x:
        case {"a": [1, *_]} | A(f=2):
            lambda: (yield)
'''
GOLDEN = "7d5e86ff42d95d819f20887dbe24ef9a6e8cc36a716bbb0e9e27e8cf37522911"

SAME = {
    "comment": ("# comment", "# another"),
    "docstring": ('"""Docstring."""', '"""Other."""'),
    "no docstring": ('        """Docstring."""\n', ""),
    "blank lines": ("\n\n\n", "\n\n\n\n"),
    "quotes": ('"k"', "'k'"),
    "split text": ('text" "more"', 'textmore"'),
}
OTHER = {
    "number": ("1.5", "1.25"),
    "sign of zero": ("-0.0", "0.0"),
    "type of a number": ("[1, ", "[1.0, "),
    "name": ("y = {", "z = {"),
    "format": (":>{c}", ":<{c}"),
    "default": ("c=None", "c=0"),
}


def test_golden() -> None:
    assert codelocks.source_digest(SOURCE) == GOLDEN


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_golden_on_another_python(root: Path, version: str) -> None:
    command = _python(version)
    if command is None:
        pytest.skip(f"no Python {version} here")
    code = f"from mirepro import codelocks; print(codelocks.source_digest({SOURCE!r}))"
    result = subprocess.run([command, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == GOLDEN


def _python(version: str) -> str | None:
    names = [f"python{version}", *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for name in filter(None, map(shutil.which, names)):
        result = subprocess.run([name, "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
        if result.stdout.startswith(version + "."):
            return name
    return None


@pytest.mark.parametrize("case", SAME)
def test_what_does_not_count(case: str) -> None:
    old, new = SAME[case]
    assert old in SOURCE
    assert codelocks.source_digest(SOURCE.replace(old, new)) == GOLDEN


@pytest.mark.parametrize("case", OTHER)
def test_what_counts(case: str) -> None:
    old, new = OTHER[case]
    assert old in SOURCE
    assert codelocks.source_digest(SOURCE.replace(old, new, 1)) != GOLDEN


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A tiny package of the layout that the locks know."""
    texts = {
        "__init__.py": "",
        "ops.py": "from mirepro import reference",
        "reference.py": "",
        "params.py": "class Base: pass\nclass Mine(Base): pass\nclass Other: pass\ndef build(c): return c",
        "loop.py": "from mirepro import objectives, ops\nimport mirepro.sub.part\nfrom .params import Mine, build",
        "sub/__init__.py": "from mirepro import heavy",
        "sub/part.py": "from ..errors import X\nif TYPE_CHECKING:\n    from mirepro import heavy",
        "sub/page.html": "<p>",
        "errors.py": "X = 1",
        "heavy.py": "",
        "objectives/__init__.py": "from mirepro.objectives.base import O",
        "objectives/base.py": "O = 1",
        "objectives/ring.py": "from mirepro.objectives.ball import B",
        "objectives/ball.py": "from mirepro.objectives.base import O\nB = O",
        "ops_version.json": "{}",
    }
    for name, text in texts.items():
        files.write_text(tmp_path / "mirepro" / name, text)
    return tmp_path


def test_closure(package: Path) -> None:
    names = {name.removeprefix("mirepro.") for name in codelocks.lock(codelocks.Sources(package), "mirepro.loop")}
    expected = {"loop", "objectives", "objectives.base", "ops", "params", "sub.part", "errors", "mirepro/sub/page.html"}
    assert names == expected


def test_objectives_bring_what_they_import(package: Path) -> None:
    names = set(codelocks.lock(codelocks.Sources(package), "mirepro.objectives.ring"))
    assert names == {f"mirepro.objectives.{name}" for name in ("ring", "ball", "base")}


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("params.py", "class Other: pass", "class Other: a = 1", False),
        ("params.py", "class Base: pass", "class Base: a = 1", True),
        ("params.py", "return c", "return c()", True),
        ("ops.py", "reference", "errors", False),
        ("ops_version.json", "{}", '{"a": 1}', True),
        ("sub/page.html", "<p>", "<b>", True),
        ("heavy.py", "", "a = 1", False),
        ("objectives/ring.py", "", "a = 1", False),
        ("objectives/base.py", "1", "2", True),
    ],
)
def test_what_changes_a_lock(package: Path, name: str, old: str, new: str, changes: bool) -> None:
    before = codelocks.lock(codelocks.Sources(package), "mirepro.loop")
    path = package / "mirepro" / name
    path.write_text(path.read_text().replace(old, new) if old else path.read_text() + "\n" + new)
    assert (codelocks.lock(codelocks.Sources(package), "mirepro.loop") != before) is changes


def test_syntax_error_names_the_file(package: Path) -> None:
    (package / "mirepro" / "errors.py").write_text("x = (")
    with pytest.raises(UserError, match=r"errors\.py:1: .*repair"):
        codelocks.lock(codelocks.Sources(package), "mirepro.loop")


def test_missing_objective_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codelocks, "ENTRIES", {"pretrain": "mirepro.loop"})
    monkeypatch.setattr(codelocks, "RUNNER", {})
    codelocks.write(package, "desk", ["ring"])
    assert sorted(p.name for p in (package / "locks/desk").rglob("*.json")) == ["pretrain.json", "ring.json"]
    codelocks.write(package, "desk", ["ball"])
    assert not (package / "locks/desk/objectives/ring.json").exists()
    with pytest.raises(UserError, match="'rink'"):
        codelocks.write(package, "desk", ["rink"])


def test_the_real_locks(root: Path) -> None:
    """The loop never sees objectives, detection, report or launcher; nothing heavy is imported to find that out."""
    sources = codelocks.Sources(root)
    locks = {stage: set(codelocks.lock(sources, entry)) for stage, entry in codelocks.ENTRIES.items()}
    objectives = {name for name in locks["pretrain"] if name.startswith("mirepro.objectives.")}
    assert objectives == {"mirepro.objectives.base", "mirepro.objectives.ir"}  # ir: NCE at equal f
    assert "mirepro.objectives.regions" in locks["toy"]
    assert "mirepro.ops" in locks["pretrain"]
    for stage, names in locks.items():
        assert not [name for name in names if name.startswith(("mirepro.stages", "mirepro.launch"))], stage
        assert ("mirepro.transfer.detection" in names) == (stage == "detect")
    code = "import sys; from mirepro import codelocks, stages, cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


RUNNER_EDITS = [
    ("determinism", "torch.set_num_threads(threads)", "torch.set_num_threads(threads + 1)", True),
    ("determinism", '"MKL_CBWR": "COMPATIBLE"', '"MKL_CBWR": "AVX2"', True),
    ("determinism", "above = [name for name", "above = [str(name) for name", True),  # what environment uses
    ("determinism", "differing = departures(tier, threads)", "differing = departures(tier, 1)", False),
    ("profiles", "result = dict(base)", "result = dict(overrides)", True),
    ("profiles", "dict(row.options or {}), merged", "{}, merged", True),
    ("profiles", "KEYS = (", "KEYS = (*(), ", False),
    ("params", "return float(value)", "return float(value) + 1", True),
]


@pytest.mark.parametrize(("module", "old", "new", "changes"), RUNNER_EDITS)
def test_the_runner_counts(root: Path, module: str, old: str, new: str, changes: bool) -> None:
    """What sets the libraries up or resolves parameters makes computing stages stale; the rest of it does not."""
    source = (root / "mirepro" / f"{module}.py").read_text()
    assert old in source
    edited = codelocks.Sources(root, {f"mirepro.{module}": codelocks.parsed(source.replace(old, new))})
    before = {stage: codelocks.stage_lock(codelocks.Sources(root), stage) for stage in ("toy", "pretrain")}
    after = {stage: codelocks.stage_lock(edited, stage) for stage in before}
    stale = {stage for stage in before if before[stage] != after[stage]}
    assert stale == (set(before) if changes else set())
    assert stale <= set(codelocks.COMPUTING)
