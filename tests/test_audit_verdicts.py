"""The ladder of verdicts against formulas written out here, against simulation, and every rung of it."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from mirepro.audit import evidence, verdicts
from mirepro.audit.cells import Cell, Part
from mirepro.audit.policy import Pattern, Policy
from mirepro.audit.recompute import Recomputed
from mirepro.audit.rerun import Rerun
from mirepro.audit.verdicts import Evidence, Rule
from mirepro.errors import UserError

TOST = Rule("tost", margin=3.0)


def welch(new: list[float], old: list[float], margin: float) -> float:
    """The larger p of both one-sided tests, from Welch's formulas and the t distribution alone."""
    a, b = np.var(new, ddof=1) / len(new), np.var(old, ddof=1) / len(old)
    freedom = (a + b) ** 2 / (a**2 / (len(new) - 1) + b**2 / (len(old) - 1))
    difference = np.mean(new) - np.mean(old)
    lower = stats.t.sf((difference + margin) / math.sqrt(a + b), freedom)
    upper = stats.t.cdf((difference - margin) / math.sqrt(a + b), freedom)
    return float(max(lower, upper))


@pytest.mark.parametrize("margin", [0.1, 1.0, 5.0])
def test_tost_is_the_more_careful_of_two(margin: float) -> None:
    """Welch's p where the published seeds scatter more, that of the fresh spread alone where they scatter less."""
    draw = np.random.default_rng(1)
    taken = set()
    for published, fresh, spread in ((2, 2, 2), (3, 5, 2), (10, 3, 2), (3, 5, 0.2), (5, 5, 0.5), (3, 3, 0.05)):
        old, new = draw.normal(0, 1, published).tolist(), draw.normal(0.3, spread, fresh).tolist()
        found = verdicts.tost(old, new, margin)
        each = {"welch": welch(new, old, margin), "fresh": alone(new, old, margin)}
        taken.add(max(each, key=lambda name: each[name]))
        assert found["p"] == pytest.approx(max(each.values()), rel=1e-9)
        wider = max(welch(new, old, margin * 1.01), alone(new, old, margin * 1.01))
        assert found["p"] != pytest.approx(wider, rel=1e-6)
        assert found["difference"] == pytest.approx(np.mean(new) - np.mean(old))
    assert taken == {"welch", "fresh"}


def alone(new: list[float], old: list[float], margin: float) -> float:
    """The larger p of both one-sided tests with the fresh seeds' spread alone, from the t distribution."""
    difference, error = np.mean(new) - np.mean(old), np.std(new, ddof=1) * math.sqrt(1 / len(new) + 1 / len(old))
    lower = stats.t.sf((difference + margin) / error, len(new) - 1)
    return float(max(lower, stats.t.cdf((difference - margin) / error, len(new) - 1)))


def test_tost_of_constants() -> None:
    assert verdicts.tost([1, 1], [1, 1], 0.5)["p"] == 0
    assert verdicts.tost([1, 1], [2, 2], 0.5) == {
        "p": 1.0, "p_outside": 0.0, "difference": 1.0, "published": 2, "fresh": 2,
    }  # fmt: skip


def test_power_by_simulation() -> None:
    """The quadrature against 20,000 simulated audits of equal laws, and the documented figures."""
    draw = np.random.default_rng(2)
    for margin, published, fresh in ((2.5, 3, 3), (2.0, 5, 3), (1.5, 10, 10)):
        old, new = draw.normal(size=(20_000, published)), draw.normal(size=(20_000, fresh))
        lower = stats.ttest_ind(new, old - margin, axis=1, equal_var=False, alternative="greater").pvalue
        upper = stats.ttest_ind(new, old + margin, axis=1, equal_var=False, alternative="less").pvalue
        difference = np.abs(new.mean(1) - old.mean(1))
        error = new.std(1, ddof=1) * math.sqrt(1 / fresh + 1 / published)
        both = (np.maximum(lower, upper) <= 0.05) & (difference + stats.t.ppf(0.95, fresh - 1) * error <= margin)
        rate = float(both.mean())
        assert abs(verdicts.power(margin, published, fresh) - rate) < 4 * math.sqrt(rate * (1 - rate) / 20_000)
        assert abs(verdicts.power(margin * 1.1, published, fresh) - rate) > 0.01
    assert [round(verdicts.power(m, 3, 3), 2) for m in (1.0, 2.0, 3.0)] == [0.01, 0.18, 0.54]


def test_seeds_needed() -> None:
    needed = verdicts.seeds_needed(1.0)
    assert needed is not None
    assert verdicts.power(1.0, needed, needed) >= verdicts.least_power() > verdicts.power(1.0, needed - 1, needed - 1)
    assert verdicts.seeds_needed(3.0) == 3
    assert verdicts.seeds_needed(0.01, most=50) is None


def test_prediction_covers() -> None:
    """95 % of the means of two further values lie inside; at three seeds one value needs 5 sd."""
    draw = np.random.default_rng(3)
    old, new = draw.normal(size=(20_000, 4)), draw.normal(size=(20_000, 2)).mean(1)
    half = verdicts.prediction(4, 2, 0.05) * old.std(1, ddof=1)
    assert abs((np.abs(new - old.mean(1)) <= half).mean() - 0.95) < 0.006
    assert verdicts.prediction(3, 1, 0.05) == pytest.approx(4.968, abs=1e-3)


def one(evidence: Evidence, rule: Rule = TOST) -> verdicts.Verdict:
    """The verdict of a single cell."""
    return verdicts.judge([(evidence, rule)])[0]


PUBLISHED = (10.0, 11.0, 12.0)


@pytest.mark.parametrize(
    ("evidence", "rule", "name", "words"),
    [
        (Evidence(True), Rule(), "EXACT", "same bytes"),
        (Evidence(True, same_key=False), Rule(), "EXACT", "although the determinism keys differ"),
        (Evidence(False), Rule(), "DIVERGED", "exactness"),
        (Evidence(False, step="step 48"), Rule(), "DIVERGED", "First difference: step 48"),
        (Evidence(False, same_key=False), Rule(), "INCONCLUSIVE", "names no test"),
        (Evidence(None), Rule(), "INCONCLUSIVE", "Nothing was compared"),
        (Evidence(True, missing="no checkpoint"), Rule(), "MISSING", "no checkpoint"),
        (Evidence(None, failed="killed", missing="x"), Rule(), "FAILED", "killed"),
        (Evidence(False, rerun=(10.2,), originals=(10.0,)), Rule("band", 0.5), "CONSISTENT", "No test"),
        (Evidence(False, rerun=(10.6,), originals=(10.0,)), Rule("band", 0.5), "DIVERGED", "more than"),
        (Evidence(False, fresh=(10.6,), originals=()), Rule("band", 0.5), "INCONCLUSIVE", "none was re-run"),
        (
            Evidence(False, rerun=(10.2,), originals=(10.0,), lost=1, repeated=2),
            Rule("band", 0.5),
            "INCONCLUSIVE",
            "1 of 2 repeated runs have a value on one side only",
        ),
        (Evidence(False, lost=1, repeated=1), Rule("band", 0.5), "INCONCLUSIVE", "on one side only"),
        (Evidence(False, lost=1, repeated=1), Rule(), "DIVERGED", "exactness"),
        (Evidence(False, published=PUBLISHED, rerun=(12.9,), originals=(10.0,)), TOST, "CONSISTENT", "low power"),
        (Evidence(False, published=PUBLISHED, rerun=(12.9,), originals=(10.0,)), TOST, "CONSISTENT", "hardly leave it"),
        (
            Evidence(False, published=PUBLISHED, rerun=(13.1,), originals=(10.0,)),
            TOST,
            "INCONCLUSIVE",
            "3.1, is more than the declared margin",
        ),
        (
            Evidence(False, published=PUBLISHED, rerun=(12.9,), originals=(10.0,), lost=1),
            TOST,
            "INCONCLUSIVE",
            "one side",
        ),
        (Evidence(False, published=PUBLISHED, rerun=(16.1,), originals=(10.0,)), TOST, "DIVERGED", "interval"),
        (Evidence(False, published=PUBLISHED, fresh=(15.9,)), TOST, "CONSISTENT", "low power"),
        (Evidence(False, published=PUBLISHED, fresh=(16.1,)), TOST, "DIVERGED", "prediction interval"),
        (Evidence(False, published=(10.0,), rerun=(10.1,), originals=(10.0,)), TOST, "INCONCLUSIVE", "no spread"),
        (Evidence(False, published=(1.0, 1.0), rerun=(1.1,), originals=(1.0,)), TOST, "INCONCLUSIVE", "do not vary"),
        (Evidence(True, repeated=1, runs=3), Rule(), "EXACT", "Runs repeated: 1 of 3."),
        (Evidence(None, published=PUBLISHED, fresh=(10.0, 11.0, 12.1)), TOST, "EQUIVALENT", "Holm over 1"),
        (Evidence(None, published=PUBLISHED, fresh=(20.0, 21.0, 22.0)), TOST, "DIVERGED", "outside ±3"),
        (Evidence(None, published=PUBLISHED, fresh=(10.0, 19.0, 12.0)), TOST, "INCONCLUSIVE", "neither"),
        (Evidence(True, published=PUBLISHED, fresh=(20.0, 21.0, 22.0)), TOST, "DIVERGED", "fresh seeds do not"),
        (Evidence(True, published=PUBLISHED, fresh=(10.0, 11.0, 12.1)), TOST, "EXACT", "EQUIVALENT"),
    ],
)
def test_every_rung(evidence: Evidence, rule: Rule, name: str, words: str) -> None:
    verdict = one(evidence, rule)
    assert (verdict.name, words in verdict.reason) == (name, True), verdict


def test_corrections_count_cells() -> None:
    """What a single cell shows may not be enough among a hundred."""
    near = (Evidence(None, published=PUBLISHED, fresh=(10.0, 11.0, 12.1)), TOST)
    assert verdicts.judge([near])[0].name == "EQUIVALENT"
    far = [(Evidence(None, published=PUBLISHED, fresh=(10.0, 19.0, 12.0)), TOST)] * 20
    assert verdicts.judge([near, *far])[0].name == "INCONCLUSIVE"
    odd = (Evidence(False, published=PUBLISHED, fresh=(16.5,)), TOST)
    assert verdicts.judge([odd])[0].name == "DIVERGED"
    verdict = verdicts.judge([odd] * 20)[0]
    assert verdict.name == "INCONCLUSIVE"
    assert "20 cells allow" in verdict.reason
    assert verdict.numbers["interval"]["limit_corrected_sd"] == pytest.approx(
        stats.t.isf(0.05 / 40, 2) * math.sqrt(4 / 3)
    )


def test_binomial_noise() -> None:
    verdict = one(Evidence(False, published=(20.0, 20.0), images=400), Rule())
    assert verdict.numbers["test_set"]["binomial_sd"] == pytest.approx(100 * math.sqrt(0.2 * 0.8 / 400))
    assert "Drawing 400 test images alone gives ±2 points (1 sd)." in verdict.reason
    plain = one(Evidence(False, published=(20.0, 20.0)), Rule())
    assert (plain.numbers, "Drawing" in plain.reason) == ({}, False)


def test_moderately_wrong_reruns_of_published_seeds() -> None:
    """Re-runs that all moved by 3.5 sd stay inside the interval at n = 3, but are not consistent."""
    case = Evidence(False, published=PUBLISHED, rerun=(13.5, 14.5, 15.5), originals=PUBLISHED, repeated=3, runs=3)
    limit = verdicts.prediction(3, 3, 0.05)
    verdict = one(case, Rule("tost", 3.0))
    assert verdict.numbers["interval"]["distance_sd"] == pytest.approx(3.5)
    assert limit > 3.5
    assert verdict.name == "INCONCLUSIVE"
    assert verdict.numbers["paired"] == {"largest": 3.5, "margin": 3.0}
    assert one(case, Rule("tost", 3.6)).name == "CONSISTENT"


def gathered(again: list[float | None], extra: int = 0) -> evidence.Gathered:
    """A cell of two runs, both run again, and further cells that the committed table lacks."""
    content = {"mean": 10.5, "std": 0.7, "n": 2, "unit": "AP", "protocol": "p", "published": None}
    parts = [Part(f"ir-s{seed}", f"evaluate@ir-s{seed}", {"value": 10.0 + seed}) for seed in range(2)]
    new = [replace(part, entry={"value": value}) for part, value in zip(parts, again, strict=True)]
    cells = {"AP": content} | {f"column{place}": content for place in range(extra)}
    address = ("T2", "ir", "AP")
    return evidence.Gathered(
        SimpleNamespace(), [Cell(address, content, tuple(parts))],
        Policy("x", (Pattern("band", margin=0.5),)), same_key=True, level=2,
        recomputed=Recomputed({"T2": {"rows": [{"row": "ir", "cells": cells}]}}),
        reruns={part.stage: Rerun(part.stage, True, 1.0) for part in parts},
        again={address: Cell(address, content, tuple(new))},
    )  # fmt: skip


def test_a_rerun_without_a_value_decides_nothing() -> None:
    """A run whose value is gone must not drop out of the comparison of the others."""
    (cell,) = evidence.judge(gathered([10.1, 11.1]))
    assert (cell["verdict"], "Runs repeated: 2 of 2." in cell["reason"]) == ("CONSISTENT", True)
    (cell,) = evidence.judge(gathered([10.1, None]))
    assert (cell["verdict"], cell["inputs"]["evidence"]["lost"]) == ("INCONCLUSIVE", 1)


def test_cells_have_one_order() -> None:
    found = [cell["column"] for cell in evidence.judge(gathered([10.1, 11.1], extra=9))]
    assert found == ["AP", *sorted(found[1:])]


PAPER = [
    ((None, 11.0, PUBLISHED, Rule()), None),
    ((12.0, None, PUBLISHED, Rule()), None),
    ((12.0, 11.0, PUBLISHED, Rule("tost", 1.5)), ("CONSISTENT", "within the declared ±1.5")),
    ((13.0, 11.0, PUBLISHED, Rule("band", 1.5)), ("DIVERGED", "beyond the declared ±1.5")),
    ((12.0, 11.0, (11.0,), Rule()), ("INCONCLUSIVE", "fewer than two seeds")),
    ((15.9, 11.0, PUBLISHED, Rule()), ("CONSISTENT", "inside the prediction interval ±4.97 of 3 seeds")),
    ((16.1, 11.0, PUBLISHED, Rule()), ("DIVERGED", "outside the prediction interval")),
]


@pytest.mark.parametrize(("arguments", "wanted"), PAPER)
def test_values_of_the_paper(arguments: tuple, wanted: tuple[str, str] | None) -> None:
    found = evidence.paper(*arguments)
    if found is None or wanted is None:
        assert found is wanted
    else:
        assert (found["value"], found["verdict"], wanted[1] in found["reason"]) == (arguments[0], wanted[0], True)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"test": "tost"}, "need a margin"),
        ({"test": "x"}, "is unknown"),
        ({"test": "band", "margin": -1.0}, "impossible"),
    ],
)
def test_rules_that_judge_nothing_are_refused(rule: dict[str, object], message: str) -> None:
    values = verdicts.inputs(Evidence(True), Rule())
    assert verdicts.from_inputs(values) == (Evidence(True), Rule())
    with pytest.raises(UserError, match=message):
        verdicts.from_inputs(values | {"rule": rule})


def test_recomputed_from_json() -> None:
    """A third party reads inputs and gets the verdict again; other inputs give another one."""
    cases = [(Evidence(False, published=PUBLISHED, rerun=(12.0,), originals=(11.0,)), TOST), (Evidence(True), Rule())]
    texts = [json.dumps(verdicts.inputs(*case)) for case in cases]
    again = [verdicts.from_inputs(json.loads(text)) for text in texts]
    assert again == cases
    assert verdicts.judge(again) == verdicts.judge(cases)
    changed = verdicts.from_inputs(json.loads(texts[0].replace("12.0]", "99.0]", 1).replace("[12.0", "[99.0")))
    assert verdicts.judge([changed])[0] != verdicts.judge(cases[:1])[0]
