"""The results in git: the detectors have learnt, and the toy agrees with its references."""

import math
from pathlib import Path
from typing import Any

import pytest

from mirepro import files
from tests.test_toy import REFERENCES

LEAST = {"T2": ("box", 30.0), "T3": ("mask", 25.0), "T4": ("keypoint", 30.0)}  # AP50, percent
REFERENCE_ERROR = 0.004  # the references' standard errors are .001 to .004 nats


@pytest.mark.parametrize("table", LEAST)
def test_detectors_on_the_supervised_encoder_have_learnt(root: Path, table: str) -> None:
    """With a learning rate chosen on val, in either schedule; control: on an encoder that stays frozen."""
    kind, least = LEAST[table]
    (row,) = (row for row in files.read_json(root / f"tables/desk/{table}.json")["rows"] if row["row"] == "supervised")
    found = {way: row["cells"][f"{kind}_AP50_{way}"] for way in ("tuned", "long", "frozen")}
    assert {cell["unit"] for cell in found.values()} == {"%"}
    assert all("; test" in cell["protocol"] for cell in found.values())
    low = {way for way, cell in found.items() if cell["mean"] is None or cell["mean"] < least}
    assert low == {"frozen"}


def far(cases: list[dict[str, Any]], shift: float = 0.0) -> set[tuple[int, str]]:
    """Estimates that are not within 3 standard errors of their references."""
    return {
        (case["d"], case["name"])
        for case in cases
        if abs(case["value"] + shift - REFERENCES[case["d"]][case["name"]])
        > 3 * math.sqrt(REFERENCE_ERROR**2 + case["se"] ** 2)
    }


def test_toy_estimates_are_within_three_errors_of_their_references(root: Path) -> None:
    document = files.read_json(root / "metrics/desk/toy.json")
    cases = document["detail"]["cases"]
    every = {(d, name) for d, values in REFERENCES.items() for name in values}
    assert {(case["d"], case["name"]) for case in cases} == every
    assert far(cases) == set()
    assert far(cases, 0.1) == far(cases, -0.1) == every, "control"
    for case in cases:
        assert case["mi"] == pytest.approx(-case["d"] / 2 * math.log(1 - case["rho"] ** 2))
        assert document["cells"][f"d{case['d']}.{case['name']}"]["value"] == case["value"]
