"""The operators' tests are clean under AddressSanitizer and UndefinedBehaviorSanitizer; deliberate mistakes are not."""

import shutil
from pathlib import Path

import pytest

from tests import sanitize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of package and tests with instrumented operators."""
    built = tmp_path_factory.mktemp("sanitized")
    sanitize.build(built)
    return built


def test_deliberate_mistakes_are_caught(folder: Path) -> None:
    """The control."""
    assert sanitize.faults(folder) == []


def test_the_operators_tests_are_clean(folder: Path) -> None:
    done = sanitize.tests(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
