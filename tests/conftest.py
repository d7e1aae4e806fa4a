"""The portable tier's variables before numpy or torch are imported; slow tests after the fast ones."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for line in (ROOT / "portable.env").read_text().splitlines():
    name, value = line.split("=", 1)
    os.environ[name] = value
assert "torch" not in sys.modules, "torch was imported before the portable tier's variables were set"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs slow tests last, so that a mistake shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
