"""YAML texts that were parsed before, kept as JSON: DVC parses its files in every process and after every stage."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST = 16  # texts that a process remembers
WORTH = 10_000  # characters of a text whose parsing takes longer than reading it


class Parsed:
    """A parser that remembers; a file holds the last text of each path, by its hash.

    Args:
        parse: Text and path -> plain data.
        folder: Where to keep them between processes; None keeps nothing.

    Attributes:
        parse: The parser that does not.
    """

    def __init__(self, parse: Callable[..., Any], folder: Path | None) -> None:
        self.parse, self._folder = parse, folder
        self._known: dict[str, bytes] = {}

    def __call__(self, text: str, path: str) -> Any:
        """The data, a copy of its own."""
        mark = _mark(text)
        if mark not in self._known:
            kept = self._read(mark, path)
            self._known[mark] = kept if kept is not None else self.learn(text, path, self.parse(text, path))
        data = pickle.loads(self._known[mark])
        while len(self._known) > MOST:
            del self._known[next(iter(self._known))]
        return data

    def learn(self, text: str, path: str, data: Any) -> bytes:
        """Remembers what a text is parsed to; returns it pickled."""
        mark, known = _mark(text), pickle.dumps(data)
        self._known[mark] = known
        if self._folder is not None and len(text) > WORTH:
            with suppress(TypeError, ValueError, OSError):  # dates and the like; a full disk
                self._write(self._file(path), json.dumps([mark, data], allow_nan=False), data)
        return known

    def _write(self, file: Path, content: str, data: Any) -> None:
        if json.loads(content)[1] != data:
            return  # numbers as keys
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(content, encoding="utf-8")
        os.replace(fresh, file)  # no fsync: half a file is no JSON, and only costs the parsing

    def _read(self, mark: str, path: str) -> bytes | None:
        if self._folder is None:
            return None
        try:
            kept, data = json.loads(self._file(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return None
        return pickle.dumps(data) if kept == mark else None

    def _file(self, path: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{_mark(str(path))[:16]}.json"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
