"""A copy of the repository's code and parameters, and its `mirepro` as a process; nothing in it is a fake."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from mirepro import params, profiles
from tests import forked

KEPT = ("params.yaml", "data/desk/manifest.json", "data/scenes/manifest.json")
MODULES = "mirepro.cli, mirepro.launch.jobs, mirepro.pretrain, mirepro.transfer.evaluate, mirepro.transfer.detection"
"""What a command may import; in a fork it is there already."""


class Copy:
    """The copy, which has neither rendered data nor results.

    Args:
        source: The real repository.
        root: Folder to fill.
    """

    def __init__(self, source: Path, root: Path) -> None:
        self.root = root
        shutil.copytree(source / "mirepro", root / "mirepro", ignore=shutil.ignore_patterns("__pycache__"))
        for name in KEPT:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, root / name)

    def run(self, *arguments: str, before: tuple[str, ...] = ()) -> CompletedProcess[str]:
        """`mirepro arguments` as a process; `before` is a command that starts it."""
        command = [*before, sys.executable, "-m", "mirepro", *arguments]
        environment = os.environ | {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)

    def fork(self, cases: Mapping[str, tuple[str, list[str]]]) -> dict[str, CompletedProcess[str]]:
        """`mirepro arguments` with a text as params.yaml, in forks of one process that has imported torch.

        Args:
            cases: `(params.yaml, arguments)`; they run one after the other.
        """
        first = f"import sys; sys.path.insert(0, {str(self.root)!r}); import {MODULES}"
        code = "import mirepro.cli; open('params.yaml', 'w').write(sys.argv.pop(1)); mirepro.cli.main()"
        todo: list[forked.Case] = [(["mirepro", text, *words], {}, self.root) for text, words in cases.values()]
        return dict(zip(cases, forked.run(code, todo, first), strict=True))

    def changed(self, change: Mapping[str, Any]) -> str:
        """params.yaml with other values."""
        return yaml.safe_dump(profiles.merge(params.read_yaml(self.root / "params.yaml"), change))

    @contextmanager
    def read_only(self) -> Iterator[tuple[str, ...]]:
        """Takes all write permissions of folders away; gives the command before one that is to feel it."""
        folders = [self.root, *(path for path in self.root.rglob("*") if path.is_dir())]
        modes = {folder: folder.stat().st_mode for folder in folders}
        try:
            for folder in folders:
                folder.chmod(0o555)
            yield bound()
        finally:
            for folder, mode in modes.items():
                folder.chmod(mode)


def bound() -> tuple[str, ...]:
    """A command whose program heeds permissions: root alone does not.

    Skips where root cannot be made to, unless MIREPRO_REQUIRE_INFRA=1.
    """
    if os.geteuid() != 0:
        return ()
    command = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    if shutil.which("setpriv") is None or subprocess.run([*command, "true"], check=False).returncode != 0:
        lacking("setpriv of util-linux, and the capability SETPCAP")
    return command


def lacking(what: str) -> None:
    """Skips a test that needs something; fails where MIREPRO_REQUIRE_INFRA=1 says that all has to be there."""
    reason = f"needs {what}"
    pytest.fail(reason) if os.environ.get("MIREPRO_REQUIRE_INFRA") == "1" else pytest.skip(reason)
