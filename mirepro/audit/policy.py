"""`audit.yaml`: how each cell may be judged, declared before the audit; what it leaves open is judged `exact`."""

import fnmatch
import hashlib
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
FRESH = "T1"
"""The table whose cells fresh seeds measure."""


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
        verdicts.check_rule(self.rule, f"audit policy: rule {self.table}/{self.row}/{self.column}")

    @property
    def rule(self) -> verdicts.Rule:
        """How the cells are judged."""
        return verdicts.Rule(self.test, self.margin, self.alpha)

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
        return found[-1].rule if found else verdicts.Rule()

    def beyond_fresh(self, cells: Iterable[tuple[str, str, str]]) -> dict[str, int]:
        """How many cells of each table have a `tost` rule that fresh seeds cannot serve, which measure T1 only."""
        tables = [cell[0] for cell in cells if cell[0] != FRESH and self.rule(*cell).test == "tost"]
        return {table: tables.count(table) for table in sorted(set(tables))}


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
    """What is wrong with a policy for given tables: lines and claims about no cell, margins that no test can use.

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
    problems += [
        f"claim {claim.id}: {claim.table}/{row}/{claim.column} is no cell of the tables"
        for claim in (policy.claims.claims if policy.claims else ())
        for row in (claim.better, claim.than) if (claim.table, row, claim.column) not in cells
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
