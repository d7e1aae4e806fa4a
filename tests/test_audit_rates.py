"""Error rates of the ladder of verdicts, in small; the full simulation is `python -m benchmarks.verdicts`."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import verdicts as rates
from benchmarks.verdicts import Setting
from mirepro import files
from mirepro.audit import verdicts

EDGE = Setting("tost", "normal", 3, 1.0)
DRAWS = 300
LIMIT = 0.05 + 2 * (0.05 * 0.95 / DRAWS) ** 0.5


def test_false_equivalence() -> None:
    """At the margin at most alpha of the audits pass; with another alpha, or no margin, more do."""
    assert rates.simulate(EDGE, DRAWS).rates["EQUIVALENT"] <= LIMIT
    assert rates.simulate(EDGE, DRAWS, alpha=0.2).rates["EQUIVALENT"] > LIMIT
    assert rates.unbounded(EDGE, DRAWS) > LIMIT


def test_the_ladder_itself_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong test in the audit breaks the bound."""
    right = verdicts.tost
    monkeypatch.setattr(verdicts, "tost", lambda old, new, margin: right(old, new, 3 * margin))
    assert rates.simulate(EDGE, 100).rates["EQUIVALENT"] > 0.5


def test_false_alarms() -> None:
    """A re-run of the same law is an alarm in 5 % of audits; with a narrower interval, or after a shift, in more."""
    still = Setting("interval", "normal", 3, 0.0)
    assert rates.simulate(still, DRAWS).rates["DIVERGED"] <= LIMIT
    assert rates.two_sigma(still, DRAWS) > LIMIT
    assert rates.simulate(Setting("interval", "normal", 3, 2.0), DRAWS).rates["DIVERGED"] > 0.4


def test_many_cells() -> None:
    still = Setting("interval", "normal", 3, 0.0)
    assert rates.family(still, "DIVERGED", 40) <= 0.05 + 2 * (0.05 * 0.95 / 40) ** 0.5
    assert rates.family(still, "DIVERGED", 40, corrected=False) > 0.4


@pytest.mark.parametrize(("change", "words"), [({"rate": 0.2}, "exceeds"), ({"controls_fail": False}, "a control")])
def test_problems_are_named(change: dict[str, Any], words: str) -> None:
    good = {"what": "x", **vars(EDGE), "rate": 0.04, "limit": 0.06, "holds": True, "controls_fail": True}
    bad = good | change
    bad["holds"] = bad["rate"] <= bad["limit"]
    assert rates.problems([good]) == []
    assert words in rates.problems([good, bad])[0]


def test_documented_rates(root: Path) -> None:
    """The tables of docs/audit.md are those of the stored simulation, every bound of which holds."""
    stored = files.read_json(root / "benchmarks/results/verdicts.json")
    assert rates.problems(stored["bounds"]) == []
    text = (root / "docs/audit.md").read_text()
    lines = documented(stored)
    assert [line for line in lines if line not in text] == []
    stored["power"][0]["computed"] += 0.1
    assert documented(stored) != lines


def documented(stored: dict[str, Any]) -> list[str]:
    """Rows of the documentation's tables."""
    lines = []
    for one in stored["rates"]:
        if one["shift"] == 0:
            same = [other for other in stored["rates"] if all(other[k] == one[k] for k in ("test", "law", "seeds"))]
            passed = [f"{100 * (other['EQUIVALENT'] + other['CONSISTENT']):.0f}" for other in same]
            alarms = [f"{100 * other['DIVERGED']:.0f}" for other in same]
            cells = [f"{a} / {b}" for a, b in zip(passed, alarms, strict=True)]
            lines.append(f"| {one['test']} | {one['law']} | {one['seeds']} | {' | '.join(cells)} |")
    for seeds in rates.SEEDS:
        found = [f"{100 * one['computed']:.0f}" for one in stored["power"] if one["seeds"] == seeds]
        lines.append(f"| {seeds} | {' | '.join(found)} |")
    return lines
