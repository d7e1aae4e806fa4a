"""A profile: its params.yaml, checked as a whole, and the runs it resolves to."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mirepro import params
from mirepro.errors import UserError
from mirepro.params import DetectParams, PretrainParams, RunParams

T = TypeVar("T")

KEYS = (
    "profile", "params", "root", "tier", "threads", "datasets", "pretrain", "rows", "runs", "evaluate", "detect",
    "detect_runs", "toy", "tables",
)  # fmt: skip


@dataclass(frozen=True)
class RowParams:
    """A row of the tables: its objective with options, and what it overrides of `pretrain`."""

    objective: str
    options: Mapping[str, Any] | None = None
    pretrain: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunEntry:
    """A run: a row with a seed; the objective stands here too because DVC's templates cannot look it up."""

    row: str
    objective: str
    seed: int


@dataclass(frozen=True)
class DetectEntry:
    """A detection run on a pretrained run and a data set; `model` is box, mask or keypoint."""

    run: str
    row: str
    seed: int
    model: str
    data: str


@dataclass(frozen=True)
class Profile:
    """The values of a profile's params.yaml and where they stand.

    Attributes:
        root: The repository's root.
        path: The parameter file.
        values: Its content; see `load`.
    """

    root: Path
    path: Path
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The profile's name: a folder in metrics/, runs/, tables/, reports/ and locks/."""
        return str(self.values["profile"])

    @property
    def tier(self) -> str:
        """The tier of exactness."""
        return params.convert(str, self.values["tier"], "tier")

    @property
    def threads(self) -> int:
        """CPU threads of one stage."""
        return params.convert(int, self.values["threads"], "threads")

    @property
    def pipeline(self) -> str:
        """The profile's dvc.yaml, relative to the root."""
        return str(self.path.with_name("dvc.yaml").relative_to(self.root))

    def build(self, cls: type[T], key: str) -> T:
        """A top-level key as its dataclass."""
        return params.build(cls, self.values[key], key)

    @cached_property
    def rows(self) -> dict[str, RowParams]:
        """All rows."""
        return self._entries("rows", RowParams)

    @cached_property
    def runs(self) -> dict[str, RunEntry]:
        """All pretraining runs."""
        return self._entries("runs", RunEntry)

    @cached_property
    def detect_runs(self) -> dict[str, DetectEntry]:
        """All detection runs."""
        return self._entries("detect_runs", DetectEntry)

    def _entries(self, key: str, cls: type[T]) -> dict[str, T]:
        values = self.values[key]
        if not isinstance(values, Mapping):
            raise UserError(f"{key}: expected a mapping of keys, got {values!r}")
        return {str(name): params.build(cls, value, f"{key}.{name}") for name, value in values.items()}

    def entry(self, key: str, name: str) -> Any:
        """One of `runs` or `detect_runs`.

        Raises:
            UserError: The profile has no such entry.
        """
        entries = getattr(self, key)
        if name not in entries:
            raise UserError(f"{key}.{name}: not in {self.path}; known: {', '.join(sorted(entries)) or 'none'}")
        return entries[name]

    def run(self, name: str) -> RunParams:
        """A run with its row's objective, options and overrides resolved.

        Raises:
            UserError: Unknown run, row or key, wrong type, or an entry that contradicts its row.
        """
        entry = self.entry("runs", name)
        if entry.row not in self.rows:
            raise UserError(f"runs.{name}.row: {entry.row!r} is not in rows; known: {', '.join(self.rows)}")
        row = self.rows[entry.row]
        if row.objective != entry.objective:
            raise UserError(f"runs.{name}.objective: {entry.objective!r}, its row says {row.objective!r}; correct one")
        self.build(PretrainParams, "pretrain")
        overrides = row.pretrain or {}
        if "data" in overrides:
            raise UserError(f"rows.{entry.row}.pretrain.data: rows share the data set; set pretrain.data instead")
        merged = params.build(PretrainParams, merge(self.values["pretrain"], overrides), f"rows.{entry.row}.pretrain")
        return RunParams(
            entry.row, entry.seed, entry.objective, dict(row.options or {}), merged, self.tier, self.threads
        )

    def recipe(self, data: str) -> DetectParams:
        """`detect` with what `detect.sets` says otherwise for a data set.

        Raises:
            UserError: Unknown key or wrong type.
        """
        values = dict(self.values["detect"] or {})
        sets = params.convert(dict[str, dict[str, Any]], values.pop("sets", None) or {}, "detect.sets")
        params.build(DetectParams, values, "detect")
        for name in sorted(sets.keys() - set(self.values["datasets"])):
            raise UserError(f"detect.sets.{name}: not in datasets; known: {', '.join(self.values['datasets'])}")
        return params.build(DetectParams, merge(values, sets.get(data, {})), f"detect.sets.{data}")

    def check(self) -> None:
        """Resolves everything, so that a typo anywhere is said before any stage runs.

        Raises:
            UserError: See `run`; also data sets that are not listed, or detection on an unknown run.
        """
        for name in self.runs:
            self.run(name)
        for name, entry in self.detect_runs.items():
            if self.entry("runs", entry.run).row != entry.row or entry.model not in ("box", "mask", "keypoint"):
                raise UserError(f"detect_runs.{name}: row or model is wrong; model is box, mask or keypoint")
        self.build(params.EvaluateParams, "evaluate")
        self.build(params.ToyParams, "toy")
        used = {key: (self.values[key] or {}).get("data") for key in ("pretrain", "evaluate")}
        used |= {f"detect_runs.{name}": entry.data for name, entry in self.detect_runs.items()}
        for key, data in used.items():
            if data not in self.values["datasets"]:
                raise UserError(f"{key}.data: {data!r} is not in datasets; known: {', '.join(self.values['datasets'])}")
        for data in self.values["datasets"]:
            self.recipe(data)


def find_root() -> Path:
    """The repository that holds the working directory; it has to be the one this command was installed from.

    Raises:
        UserError: No repository here, or another one's command.
    """
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "mirepro" / "cli.py").is_file()), None)
    own = Path(__file__).resolve().parent.parent
    if root is None:
        raise UserError(f"{here}: not inside the repository; change to its folder, for example {own}")
    if own != root.resolve():
        raise UserError(f"{sys.argv[0]} belongs to {own}, not to {root}; run `. .venv/bin/activate` in {root}")
    return root


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `overrides` in place of its own."""
    result = dict(base)
    for key, value in overrides.items():
        inner = result.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[key] = merge(inner, value) if both else value  # type: ignore[arg-type]
    return result


def load(root: Path, name: str) -> Profile:
    """Reads a profile: the root's params.yaml if it bears that name, else profiles/<name>/params.yaml.

    Raises:
        UserError: No such profile, or unknown or missing top-level keys.
    """
    path = root / "params.yaml"
    values = params.read_yaml(path)
    if values.get("profile") != name:
        path = root / "profiles" / name / "params.yaml"
        if not path.is_file():
            raise UserError(f"profile {name!r}: no file {path}; known: {', '.join(names(root))}")
        values = params.read_yaml(path)
    for key in values:
        if key not in KEYS:
            raise UserError(f"{path}: {key}: unknown key; known: {', '.join(KEYS)}")
    for key in KEYS:
        if key not in values:
            raise UserError(f"{path}: {key}: missing key")
    if values["profile"] != name:
        raise UserError(f"{path}: profile: expected {name!r}, got {values['profile']!r}")
    return Profile(root, path, values)


def names(root: Path) -> list[str]:
    """All profiles, the root's own first."""
    own = str(params.read_yaml(root / "params.yaml").get("profile"))
    return [own, *sorted(path.parent.name for path in root.glob("profiles/*/params.yaml"))]
