"""Claims of every profile: its tables have their cells, and its runs the paired seeds that a verdict needs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirepro import profiles
from mirepro.profiles import Profile
from mirepro.report import claims, metrics, tables
from mirepro.report.claims import Claim

NAMES = profiles.names(Path(__file__).resolve().parent.parent)
CONVERGED = ("linear_flat", "linear_pool")


def seeds(profile: Profile, table: str, row: str) -> set[int]:
    """Seeds of the runs that a table lists for a row, where they are runs of that row and exist."""
    known: Mapping[str, Any] = profile.detect_runs if table in metrics.MODELS else profile.runs
    end = f"-{metrics.MODELS[table]}" if table in metrics.MODELS else ""
    listed = [known.get(f"{run}{end}") for run in metrics.rows_of(profile.values["tables"], table)[row]]
    return {entry.seed for entry in listed if entry is not None and entry.row == row}


def shown(profile: Profile, table: str, row: str, column: str) -> bool:
    """Whether the row will have a value in the column."""
    if row in metrics.CONTROLS:
        return table == "T1" and (column == "linear_flat" or column.startswith("knn_"))
    kinds = (profile.values["evaluate"].get("linear") or {}).get("converged", ("flat", "pool"))
    if column in CONVERGED and column.removeprefix("linear_") not in kinds:
        return False
    places = tables.places({table: profile.values["tables"].get(table)})
    return tables.published_as(table, column) in places.get(row, ())


def fault(profile: Profile, claim: Claim, wanted: int) -> str:
    """Why the profile's runs cannot decide a claim; empty where they can."""
    rows = [claim.better, claim.than]
    lost = [row for row in rows if not shown(profile, claim.table, row, claim.column)]
    if lost:
        return f"{lost[0]}: no such cell"
    paired = set.intersection(*(seeds(profile, claim.table, row) for row in rows if row not in metrics.CONTROLS))
    return "" if len(paired) >= wanted else f"{len(paired)} paired seeds"


@pytest.mark.parametrize("name", NAMES)
def test_a_profiles_runs_can_decide_its_claims(root: Path, name: str) -> None:
    profile, file = profiles.load(root, name), claims.load(name)
    faults = {claim.id: fault(profile, claim, file.seeds) for claim in file.claims}
    assert {key: why for key, why in faults.items() if why} == {}


def test_only_the_desk_has_no_claims_of_its_own() -> None:
    own = {path.name.split(".")[1] for path in claims.PATH.parent.glob("claims.*.yaml")}
    assert own == set(NAMES) - {"desk"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),  # control of the controls
        ({"better": "balls"}, "balls: no such cell"),
        ({"than": "ir_nce"}, "ir_nce: no such cell"),  # a row of T1, but of no detection table
        ({"than": "pixels"}, "pixels: no such cell"),
        ({"table": "T6"}, "ball: no such cell"),
        ({"column": "mask_AP_tuned"}, "ball: no such cell"),
        ({"better": "simclr"}, "3 paired seeds"),
        ({"table": "T8"}, "3 paired seeds"),
        ({"table": "T1", "column": "knn_200"}, ""),
        ({"table": "T1", "column": "knn_200", "than": "pixels"}, ""),
        ({"table": "T1", "column": "linear_author_flat", "than": "pixels"}, "pixels: no such cell"),
        ({"table": "T1", "column": "knn_200", "than": "ir_nce"}, "3 paired seeds"),
    ],
)
def test_an_undecidable_claim_is_caught(root: Path, change: dict[str, str], why: str) -> None:
    good = Claim("x", "T2", "box_AP_tuned", "ball", "ir")
    assert fault(profiles.load(root, "imagenet"), replace(good, **change), 5) == why


def test_runs_that_are_missing_or_of_another_row_count_for_nothing(root: Path) -> None:
    profile, claim = profiles.load(root, "imagenet"), Claim("x", "T2", "box_AP_tuned", "ball", "ir")
    fewer = {key: value for key, value in profile.values["detect_runs"].items() if key != "ball-s3-mask"}
    assert fault(replace(profile, values={**profile.values, "detect_runs": fewer}), claim, 5) == "4 paired seeds"
    others = {"T2": {"rows": {"ball": [f"ring-s{seed}" for seed in range(5)]}}}
    wrong = profiles.merge(profile.values, {"tables": others})
    assert fault(replace(profile, values=wrong), claim, 5) == "0 paired seeds"
    pooled = profiles.merge(profile.values, {"evaluate": {"linear": {"converged": ["pool"]}}})
    left_out = Claim("x", "T1", "linear_flat", "ball", "ir")
    assert fault(replace(profile, values=pooled), left_out, 5) == "ball: no such cell"
