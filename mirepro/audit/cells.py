"""Table cells: which runs and stages stand behind each, and their values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirepro.audit import safe
from mirepro.errors import UserError
from mirepro.profiles import Profile
from mirepro.report import metrics, published, tables

Address = tuple[str, str, str]


@dataclass(frozen=True)
class Part:
    """One run's share of a cell: its name, the stage that measured it, and the measured entry (None: no such)."""

    run: str
    stage: str
    entry: Any

    @property
    def value(self) -> float | None:
        """The number, None where it was not measured."""
        return self.entry.get("value") if isinstance(self.entry, Mapping) else None


@dataclass(frozen=True)
class Cell:
    """A cell of a table, its content, and the shares of its runs.

    Attributes:
        address: (table, row, column).
        content: `{mean, std, n, unit, protocol, published}`.
        parts: One for each run.
    """

    address: Address
    content: Mapping[str, Any]
    parts: tuple[Part, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """Measured values in the order of the runs."""
        return tuple(value for part in self.parts if (value := part.value) is not None)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The tables of a folder by name.

    Raises:
        UserError: One is malformed.
    """
    found = {path.stem: safe.read_json(path) for path in sorted(folder.glob("T*.json"))}
    for table in found.values():
        tables.check(table)
    return found


def contents(made: Mapping[str, Mapping[str, Any]]) -> dict[Address, Mapping[str, Any]]:
    """All cells' contents by address.

    Raises:
        UserError: Two rows of a table share a name.
    """
    result: dict[Address, Mapping[str, Any]] = {}
    for name, table in made.items():
        rows = [row["row"] for row in table["rows"]]
        if len(set(rows)) != len(rows):
            raise UserError(f"table {name}: two rows share a name; regenerate the tables")
        result |= {(name, row["row"], column): row["cells"][column] for row in table["rows"] for column in row["cells"]}
    return result


def make(root: Path, profile: Profile) -> dict[str, dict[str, Any]]:
    """Tables from the metrics in `root`, by the judge's own code; nothing is written.

    Raises:
        UserError: A metrics file is missing or malformed.
    """
    _readable(root / "metrics" / profile.name)
    layout = profile.values["tables"]
    values = published.read(root / "published" / f"{profile.name}.csv")
    made = {name: tables.make(root, profile.name, layout, name, values) for name in tables.TITLES}
    return {name: table for name, table in made.items() if table is not None}


def collect(root: Path, profile: Profile, made: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """The cells of tables with the shares of their runs, read from the metrics in `root`.

    Raises:
        UserError: A metrics file is missing or malformed.
    """
    _readable(root / "metrics" / profile.name)
    layout = profile.values["tables"]
    cells = []
    memo: dict[str, dict[str, Any]] = {}
    for address, content in contents(made).items():
        table, row, column = address
        runs = metrics.rows_of(layout, table).get(row, []) if table != "T5" else []
        if table == "T5":
            parts: tuple[Part, ...] = (Part("toy", "toy", _toy(content)),)
        elif not runs:
            parts = (Part(row, "controls", _control(root, profile, row, column, memo)),)
        else:
            parts = tuple(_part(root, profile, table, run, column, memo) for run in runs)
        cells.append(Cell(address, content, parts))
    return cells


def _readable(folder: Path) -> None:
    """Reads metrics with suspicion, as `mirepro.report` does not, which takes them for its own.

    Raises:
        UserError: One is no strict JSON; a number beyond all bounds could not be judged or written.
    """
    for path in safe.walk(folder) if folder.is_dir() else ():
        safe.read_json(path)


def _toy(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": content["mean"]}


def _control(root: Path, profile: Profile, row: str, column: str, memo: dict[str, dict[str, Any]]) -> Any:
    rows = _load(root / "metrics" / profile.name / "controls.json", memo).get("rows", {})
    found = rows.get(row, {})
    return found.get("cells", found).get(column)


def _part(root: Path, profile: Profile, table: str, run: str, column: str, memo: dict[str, dict[str, Any]]) -> Part:
    """A run's entry of a column: a detector's, else the evaluation's, else the pretraining's."""
    folder = root / "metrics" / profile.name
    if table in metrics.MODELS:
        name = f"{run}-{metrics.MODELS[table]}"
        entry = metrics.detected(_load(folder / "detect" / f"{name}.json", memo)).get(column)
        return Part(run, f"detect@{name}", None if _absent(entry) else entry)
    evaluated = _load(folder / "evaluate" / f"{run}.json", memo).get("cells", {})
    if column in evaluated:
        return Part(run, f"evaluate@{run}", evaluated[column])
    path = folder / "pretrain" / f"{run}.json"
    trained = _load(path, memo).get("cells", {}) if path.is_file() else {}
    return Part(run, f"pretrain@{run}", trained.get(column))


def _absent(entry: Any) -> bool:
    """COCO writes -1 where there is no such ground truth."""
    value = entry.get("value") if isinstance(entry, Mapping) else None
    return value is None or value < 0


def _load(path: Path, memo: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if str(path) not in memo:
        memo[str(path)] = metrics.read(path)
    return memo[str(path)]
