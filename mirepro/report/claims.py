"""Judges the claims that were written down before the runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirepro import files, params
from mirepro.errors import UserError
from mirepro.report import metrics, statistics

PATH = Path(__file__).with_name("claims.yaml")
SUPPORTED, REJECTED, SEEDS = "supported", "not supported", "not enough seeds"


@dataclass(frozen=True)
class Claim:
    """`better` exceeds `than` on one column by more than -margin."""

    id: str
    table: str
    column: str
    better: str
    than: str
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise UserError(f"claims.{self.id}.margin: {self.margin} is impossible; use 0 for a strict advantage")
        if self.better == self.than:
            raise UserError(f"claims.{self.id}: {self.better} is compared with itself; name two rows")

    @property
    def text(self) -> str:
        """The claim in words."""
        if self.margin == 0:
            return f"{self.better} > {self.than}"
        return f"{self.better} ≥ {self.than} (within {self.margin:g} point{'s' * (self.margin != 1)})"


@dataclass(frozen=True)
class Claims:
    """The whole file: level after Holm, smallest number of paired seeds, the claims, and when these were written."""

    alpha: float
    seeds: int
    claims: tuple[Claim, ...]
    note: str = ""

    def __post_init__(self) -> None:
        names = [claim.id for claim in self.claims]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"claims.{twice[0]}: two claims share an id; rename one")
        if not 0 < self.alpha < 1 or self.seeds < 2:
            words = f"alpha {self.alpha:g}, seeds {self.seeds}"
            raise UserError(f"claims: {words}: alpha must lie in (0, 1) and seeds be at least 2; correct them")


def load(profile: str) -> Claims:
    """The claims of a profile: `claims.<profile>.yaml` beside this file, or else `claims.yaml`.

    They are part of the package, so that an audit judges by the judge's claims and not by the publisher's.
    """
    own = PATH.with_name(f"claims.{profile}.yaml")
    return read(own if own.is_file() else PATH)


def read(path: Path) -> Claims:
    """Reads and checks a claims file.

    Raises:
        UserError: Unknown or missing key, wrong type, impossible value, two claims of one id.
    """
    return params.build(Claims, params.read_yaml(path), path.name)


def judge(
    root: Path, profile: str, layout: Mapping[str, Any], claims: Claims, images: bool = True
) -> list[dict[str, Any]]:
    """One verdict per claim, in the file's order.

    Holm's family is the whole file: a claim that cannot be tested counts with p = 1.

    Args:
        root: Folder that holds metrics/ and, for `images`, runs/.
        profile: Name of the profile.
        layout: Its tables.
        claims: What is judged.
        images: Whether the interval over test images is made, which needs the answers per image; no verdict does.
    """
    rows = {table: metrics.records(root, profile, layout, table) for table in {c.table for c in claims.claims}}
    results = [_measure(root, profile, rows[claim.table], claim, images) for claim in claims.claims]
    adjusted = statistics.holm([r["p"] if r["n"] >= claims.seeds else 1.0 for r in results])
    for result, p in zip(results, adjusted, strict=True):
        enough = result["n"] >= claims.seeds
        result["p"], result["p_holm"] = (rounded(result["p"]), rounded(p)) if enough else (None, None)
        result["verdict"] = (SUPPORTED if p < claims.alpha else REJECTED) if enough else SEEDS
    return results


def rounded(value: float | None) -> float | None:
    """Six decimals: far coarser than what differs between CPUs' special functions."""
    return None if value is None else round(value, 6) + 0.0


def _measure(
    root: Path, profile: str, rows: dict[str, list[metrics.Record]], claim: Claim, answers: bool
) -> dict[str, Any]:
    pairs = _pairs(rows.get(claim.better, []), rows.get(claim.than, []), claim.column)
    differences = [a - b for _, _, a, b in pairs]
    limits = statistics.interval(differences) if differences else None
    images = _bootstrap(root, profile, pairs, claim) if answers else None
    return {
        "id": claim.id,
        "text": claim.text,
        "table": claim.table,
        "column": claim.column,
        "n": len(pairs),
        "difference": rounded(statistics.mean(differences)) if differences else None,
        "interval": [rounded(limit) for limit in limits] if limits else None,
        "bootstrap": [rounded(limit) for limit in images] if images else None,
        "p": statistics.one_sided(differences, claim.margin) if len(differences) > 1 else 1.0,
    }


Pair = tuple[metrics.Record, metrics.Record, float, float]


def _pairs(better: list[metrics.Record], than: list[metrics.Record], column: str) -> list[Pair]:
    """Runs of equal seed that both have a value; a control without a seed stands against every seed."""
    others = {item.seed: item for item in than}
    pairs: list[Pair] = []
    for item in better:
        other = others.get(item.seed, others.get(None))
        if other is None:
            continue
        a, b = metrics.value(item, column), metrics.value(other, column)
        if a is not None and b is not None:
            pairs.append((item, other, a, b))
    return pairs


def _bootstrap(root: Path, profile: str, pairs: list[Pair], claim: Claim) -> tuple[float, float] | None:
    if claim.table != "T1" or not pairs:
        return None
    better = [_correct(root, profile, item, claim.column) for item, _, _, _ in pairs]
    worse = [_correct(root, profile, other, claim.column) for _, other, _, _ in pairs]
    known = [answers for answers in better + worse if answers is not None]
    if len(known) < 2 * len(pairs):
        return None
    if len({len(answers) for answers in known}) > 1:
        raise UserError(f"claim {claim.id}: its rows were tested on different numbers of images; evaluate both again")
    return statistics.bootstrap(np.stack(known[: len(pairs)]), np.stack(known[len(pairs) :]))


def _correct(root: Path, profile: str, item: metrics.Record, column: str) -> NDArray[np.bool_] | None:
    """`(N,)` which test images a run or control got right; None when this column's answers are not recorded."""
    if item.seed is None:
        path, answers = metrics.controls_path(root, profile), item.answers
    else:
        path = root / "runs" / profile / "evaluate" / item.run / "test.json"
        answers = files.read_json(path)
    if column not in answers:
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(answers[column]), np.uint8))
    if len(bits) < answers["n"]:
        raise UserError(f"{path}: {column} holds {len(bits)} answers, expected {answers['n']}; evaluate again")
    return bits[: answers["n"]].astype(bool)
