"""`audit.yaml`: how each cell may be judged, declared before the audit; what it leaves open is judged `exact`."""

import fnmatch
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirepro import params
from mirepro.audit import verdicts
from mirepro.audit.safe import read_yaml
from mirepro.errors import UserError
from mirepro.report import statistics
from mirepro.report.claims import Claims

SCHEMA = "mirepro.audit-policy/1"


@dataclass(frozen=True)
class Pattern:
    """A line of the policy: shell patterns for table, row and column, and how the cells they name are judged."""

    test: str
    table: str = "*"
    row: str = "*"
    column: str = "*"
    margin: float | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        where = f"audit policy: rule {self.table}/{self.row}/{self.column}"
        if self.test not in verdicts.TESTS:
            raise UserError(f"{where}: test {self.test!r} is unknown; known: {', '.join(verdicts.TESTS)}")
        if (self.margin is None) != (self.test == "exact"):
            raise UserError(f"{where}: tost and band need a margin, exact takes none; correct the rule")
        if self.margin is not None and not 0 < self.margin < math.inf:
            raise UserError(f"{where}: margin {self.margin} is impossible; use a positive number of the cell's unit")
        if not 0 < self.alpha <= 0.1:
            raise UserError(f"{where}: alpha {self.alpha} is impossible; use more than 0 and at most 0.1")

    def matches(self, table: str, row: str, column: str) -> bool:
        """Whether the line speaks of a cell."""
        pairs = ((table, self.table), (row, self.row), (column, self.column))
        return all(fnmatch.fnmatchcase(name, pattern) for name, pattern in pairs)


@dataclass(frozen=True)
class Policy:
    """Lines in their order, of which the last that matches a cell counts, and the ordinal claims (None: no claims).

    `claims` has the form of mirepro/report/claims.yaml: `{alpha, seeds, claims: [{id, table, column, better, than}]}`.
    """

    schema: str
    rules: tuple[Pattern, ...] = ()
    claims: Claims | None = None

    def rule(self, table: str, row: str, column: str) -> verdicts.Rule:
        """The rule of a cell."""
        found = [pattern for pattern in self.rules if pattern.matches(table, row, column)]
        return verdicts.Rule(found[-1].test, found[-1].margin, found[-1].alpha) if found else verdicts.Rule()


@dataclass(frozen=True)
class Loaded:
    """A policy with the file it came from and its hash."""

    policy: Policy
    origin: str
    sha256: str | None


def load(path: Path | None, origin: str) -> Loaded:
    """Reads a policy; None stands for the default, `exact` for every cell.

    Raises:
        UserError: Unknown or missing key, wrong type, impossible value.
    """
    if path is None:
        return Loaded(Policy(SCHEMA), "default: exact for every cell", None)
    values = read_yaml(path)
    policy = params.build(Policy, values, path.name)
    if policy.schema != SCHEMA:
        raise UserError(f"{path}: schema: expected {SCHEMA}, got {policy.schema!r}")
    return Loaded(policy, origin, hashlib.sha256(path.read_bytes()).hexdigest())


def check(policy: Policy, cells: Mapping[tuple[str, str, str], Iterable[float]], fresh: int | None = None) -> list[str]:
    """What is wrong with a policy for given tables: lines that name no cell, and margins that no test can use.

    Args:
        policy: The policy.
        cells: The published values of each cell by (table, row, column).
        fresh: Seeds the audit will run afresh; None takes as many as were published.

    Returns:
        One sentence for each problem.
    """
    problems = [
        f"rule {p.table}/{p.row}/{p.column} names no cell of the tables"
        for p in policy.rules if not any(p.matches(*cell) for cell in cells)
    ]  # fmt: skip
    for cell, published in cells.items():
        values = list(published)
        rule = policy.rule(*cell)
        problem = too_narrow(values, rule, fresh) if rule.test == "tost" and values else ""
        problems += [f"{'/'.join(cell)}: {problem}"] if problem else []
    return problems


def too_narrow(values: list[float], rule: verdicts.Rule, fresh: int | None = None) -> str:
    """Why a margin can show nothing: below 3 published standard deviations at three seeds; empty if it can."""
    spread = statistics.deviation(values)
    if rule.margin is None or not spread:
        return "" if spread is not None else "tost needs at least two published seeds; use band or exact"
    margin, count = rule.margin / spread, len(values)
    if verdicts.power(round(margin, 9), count, max(2, fresh or count), rule.alpha) >= verdicts.least_power():
        return ""
    needed = verdicts.seeds_needed(round(margin, 9), rule.alpha)
    remedy = f"{needed} seeds on both sides would do" if needed else "no practical number of seeds would do"
    return f"margin {rule.margin:g} is {margin:.2g} published sd at n = {count}, too narrow to show anything; {remedy}"


def refuse(problems: list[str], origin: str, most: int = 5) -> None:
    """Raises the first problems as one error.

    Raises:
        UserError: There are problems.
    """
    if problems:
        more = f" (and {len(problems) - most} more)" if len(problems) > most else ""
        raise UserError(f"{origin}: {'; '.join(problems[:most])}{more}; correct the policy before the audit")


def plain(loaded: Loaded) -> dict[str, Any]:
    """The policy for the report."""
    return {"origin": loaded.origin, "sha256": loaded.sha256, "content": params.plain(loaded.policy)}
