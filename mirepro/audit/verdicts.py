"""The ladder of verdicts: pure functions from evidence and rule to a verdict, which a third party can compute again.

Statistics: two one-sided t tests (Schuirmann 1987) on fresh, disjoint seeds, of Welch and with the fresh seeds' spread
alone, with Holm's correction over the cells so tested; a prediction interval for further runs, of level alpha and,
corrected for many cells, alpha / cells. Re-runs of published seeds hardly leave it, since an original lies at most
(n - 1) / sqrt(n) standard deviations from the mean of its n; their own changes have to be within the margin too.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from mirepro import params
from mirepro.errors import UserError
from mirepro.report import statistics

EXACT, EQUIVALENT, CONSISTENT = "EXACT", "EQUIVALENT", "CONSISTENT"
INCONCLUSIVE, DIVERGED, MISSING, FAILED = "INCONCLUSIVE", "DIVERGED", "MISSING", "FAILED"
LADDER = (EXACT, EQUIVALENT, CONSISTENT, INCONCLUSIVE, DIVERGED, MISSING, FAILED)
"""From best to worst."""

MEANINGS = {
    EXACT: "the same bytes came out",
    EQUIVALENT: "fresh seeds have the same mean within the declared margin (two one-sided tests)",
    CONSISTENT: "a further run lies where the published values, re-runs where the declared band or margin, expect it",
    INCONCLUSIVE: "too few seeds, or no test applies",
    DIVERGED: "the result was not reproduced",
    MISSING: "something needed for the comparison is not there",
    FAILED: "the computation ended with an error",
}
TESTS = ("exact", "tost", "band")
FEW = 5
"""A prediction interval of fewer published seeds is labelled "low power"."""


@dataclass(frozen=True)
class Rule:
    """How a cell is judged: `exact`; `tost` within a margin at a level; `band`, a tolerance without a test."""

    test: str = "exact"
    margin: float | None = None
    alpha: float = 0.05


@dataclass(frozen=True)
class Evidence:
    """All that a verdict is computed from.

    Attributes:
        identical: Whether the compared bytes agree; None where nothing could be compared.
        same_key: Whether both sides have the same determinism key, so that equal bytes are promised.
        published: The committed values, one for each published seed.
        rerun: Values of re-runs with published seeds.
        originals: The committed values of exactly the seeds in `rerun`, in that order.
        fresh: Values of runs with seeds that the publisher did not use.
        step: Where the re-run left the committed one, in words.
        missing: What is not there; empty if nothing.
        failed: The error; empty if none.
        images: Test images behind an accuracy in percent, for its binomial noise.
        lost: Repeated runs with a value on one side only.
        repeated: How many of the cell's runs were run again.
        runs: How many it has; 0 where nothing was run again.
    """

    identical: bool | None
    same_key: bool = True
    published: tuple[float, ...] = ()
    rerun: tuple[float, ...] = ()
    originals: tuple[float, ...] = ()
    fresh: tuple[float, ...] = ()
    step: str = ""
    missing: str = ""
    failed: str = ""
    images: int | None = None
    lost: int = 0
    repeated: int = 0
    runs: int = 0


@dataclass(frozen=True)
class Verdict:
    """A verdict, the reason in plain words, and the numbers it was read from."""

    name: str
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)


def judge(cases: Sequence[tuple[Evidence, Rule]]) -> list[Verdict]:
    """One verdict per cell; the corrections count all the cells given."""
    tested = [place for place, (evidence, rule) in enumerate(cases) if _testable(evidence, rule)]
    p = {place: tost(cases[place][0].published, cases[place][0].fresh, _margin(cases[place][1])) for place in tested}
    adjusted = dict(zip(tested, statistics.holm([p[place]["p"] for place in tested]), strict=True))
    intervals = sum(_predictable(evidence, rule) for evidence, rule in cases)
    return [
        _verdict(evidence, rule, p.get(place), adjusted.get(place), max(intervals, 1), max(len(tested), 1))
        for place, (evidence, rule) in enumerate(cases)
    ]


def check_rule(rule: Rule, where: str) -> None:
    """Refuses a rule that judges nothing.

    Raises:
        UserError: Unknown test, a margin too many or too few, an impossible value.
    """
    if rule.test not in TESTS:
        raise UserError(f"{where}: test {rule.test!r} is unknown; known: {', '.join(TESTS)}")
    if (rule.margin is None) != (rule.test == "exact"):
        raise UserError(f"{where}: tost and band need a margin, exact takes none; correct the rule")
    if rule.margin is not None and not 0 < rule.margin < math.inf:
        raise UserError(f"{where}: margin {rule.margin} is impossible; use a positive number of the cell's unit")
    if not 0 < rule.alpha <= 0.1:
        raise UserError(f"{where}: alpha {rule.alpha} is impossible; use more than 0 and at most 0.1")


def _margin(rule: Rule) -> float:
    if rule.margin is None:
        raise ValueError(f"a rule of test {rule.test} needs a margin")
    return rule.margin


def _testable(evidence: Evidence, rule: Rule) -> bool:
    enough = len(evidence.published) >= 2 and len(evidence.fresh) >= 2
    return rule.test == "tost" and enough and not evidence.failed and not evidence.missing


def _predictable(evidence: Evidence, rule: Rule) -> bool:
    new = bool(evidence.fresh) or not _unpaired(evidence)
    open_question = evidence.identical is not True and not evidence.failed and not evidence.missing
    return rule.test == "tost" and open_question and new and not _testable(evidence, rule)


def _verdict(
    evidence: Evidence, rule: Rule, test: dict[str, Any] | None, holm: float | None, intervals: int, tests: int
) -> Verdict:
    if evidence.failed:
        return Verdict(FAILED, evidence.failed)
    if evidence.missing:
        return Verdict(MISSING, evidence.missing)
    fresh = None if test is None or holm is None else _fresh(rule, test, holm, tests)
    verdict = _identical(evidence, fresh) if evidence.identical else fresh or _other(evidence, rule, intervals)
    return _complete(evidence, verdict)


def _complete(evidence: Evidence, verdict: Verdict) -> Verdict:
    """Adds what one has to know beside a verdict: the first difference, the runs behind it, the test set's noise."""
    noise = {} if verdict.name == EXACT else binomial(evidence)
    words = [
        verdict.reason,
        f"First difference: {evidence.step}." if evidence.step else "",
        f"Runs repeated: {evidence.repeated} of {evidence.runs}." if evidence.runs else "",
        f"Drawing {evidence.images} test images alone gives ±{noise['test_set']['binomial_sd']:.2g} points (1 sd)."
        if noise else "",
    ]  # fmt: skip
    return replace(verdict, reason=" ".join(filter(None, words)), numbers=verdict.numbers | noise)


def _identical(evidence: Evidence, fresh: Verdict | None) -> Verdict:
    """Equal bytes; fresh seeds can still show that the published ones are no fair sample."""
    if fresh is not None and fresh.name == DIVERGED:
        return replace(fresh, reason=f"The published seeds give the same bytes, but fresh seeds do not: {fresh.reason}")
    key = "" if evidence.same_key else " although the determinism keys differ"
    beside = f" Fresh seeds: {fresh.name}. {fresh.reason}" if fresh else ""
    return Verdict(EXACT, f"The same bytes came out{key}.{beside}", fresh.numbers if fresh else {})


def _other(evidence: Evidence, rule: Rule, intervals: int) -> Verdict:
    """Bytes differ and fresh seeds were not tested."""
    if evidence.identical is None and not (evidence.rerun or evidence.fresh):
        return Verdict(INCONCLUSIVE, "Nothing was compared.")
    if rule.test == "exact":
        return _exact(evidence)
    if rule.test == "tost" and evidence.fresh:
        return _interval(evidence, evidence.fresh, rule, intervals)
    unpaired = _unpaired(evidence)
    if unpaired:
        return Verdict(INCONCLUSIVE, unpaired)
    if rule.test == "band":
        return _band(evidence, _margin(rule))
    return _paired(evidence, _interval(evidence, evidence.rerun, rule, intervals), _margin(rule))


def _exact(evidence: Evidence) -> Verdict:
    if evidence.same_key:
        return Verdict(DIVERGED, "The bytes differ under the same determinism key, and the policy asks for exactness.")
    return Verdict(INCONCLUSIVE, "The bytes differ, the determinism keys differ too, and the policy names no test.")


def _unpaired(evidence: Evidence) -> str:
    """Why re-runs cannot stand beside their originals; empty if they can."""
    if evidence.lost:
        return f"{evidence.lost} of {evidence.repeated} repeated runs have a value on one side only; no test applies."
    if not evidence.rerun or len(evidence.rerun) != len(evidence.originals):
        return "Re-runs of published seeds are compared with their originals, and none was re-run."
    return ""


def _fresh(rule: Rule, test: dict[str, Any], holm: float, tests: int) -> Verdict:
    """Three ways: inside the margin, outside it, or not decided."""
    margin = _margin(rule)
    numbers = {"tost": test | {"p_holm": holm, "cells": tests, "margin": margin, "alpha": rule.alpha}}
    counts = f"{test['published']} published and {test['fresh']} fresh seeds, difference {test['difference']:+.4g}"
    if holm <= rule.alpha:
        words = f"within ±{margin:g} (TOST, p {holm:.3g} after Holm over {tests})"
        return Verdict(EQUIVALENT, f"{counts}: {words}.", numbers)
    if min(1.0, test["p_outside"] * tests) <= rule.alpha:
        return Verdict(DIVERGED, f"{counts}: outside ±{margin:g} (p {test['p_outside']:.3g}).", numbers)
    return Verdict(INCONCLUSIVE, f"{counts}: neither inside nor outside ±{margin:g} was shown.", numbers)


def _band(evidence: Evidence, band: float) -> Verdict:
    largest = _largest(evidence)
    numbers = {"band": {"largest": largest, "band": band}}
    if largest <= band:
        words = f"The largest change of a re-run, {largest:.4g}, is within the declared band ±{band:g}."
        return Verdict(CONSISTENT, f"{words} No test is behind it.", numbers)
    return Verdict(DIVERGED, f"A re-run changed by {largest:.4g}, more than the declared band ±{band:g}.", numbers)


def _largest(evidence: Evidence) -> float:
    return max(abs(new - old) for new, old in zip(evidence.rerun, evidence.originals, strict=True))


def _paired(evidence: Evidence, verdict: Verdict, margin: float) -> Verdict:
    """Inside the interval, where re-runs of published seeds lie almost always, only a small change is consistent."""
    if verdict.name != CONSISTENT:
        return verdict
    largest = _largest(evidence)
    numbers = verdict.numbers | {"paired": {"largest": largest, "margin": margin}}
    words = f"{verdict.reason} Re-runs of published seeds hardly leave it; the largest change of one, {largest:.4g}, is"
    if largest <= margin:
        return Verdict(CONSISTENT, f"{words} within the declared margin ±{margin:g}.", numbers)
    return Verdict(INCONCLUSIVE, f"{words} more than the declared margin ±{margin:g}.", numbers)


def _interval(evidence: Evidence, new: Sequence[float], rule: Rule, cells: int) -> Verdict:
    """Further runs against the prediction interval of the published seeds."""
    published = evidence.published
    spread = statistics.deviation(published)
    if not spread:
        few = len(published) < 2
        reason = "One published value has no spread to compare with" if few else "The published values do not vary"
        return Verdict(INCONCLUSIVE, f"{reason}, so a re-run can be neither consistent nor divergent.")
    half = {level: prediction(len(published), len(new), level) for level in (rule.alpha, rule.alpha / cells)}
    distance = (statistics.mean(new) - statistics.mean(published)) / spread
    limit, wide = half[rule.alpha], half[rule.alpha / cells]
    numbers = {"interval": {
        "new": len(new), "published": len(published), "distance_sd": distance, "limit_sd": limit,
        "limit_corrected_sd": wide, "alpha": rule.alpha, "cells": cells,
    }}  # fmt: skip
    power = " (low power)" if len(published) < FEW else ""
    kind = "fresh run" if evidence.fresh else "re-run"
    where = f"The {kind} lies {abs(distance):.2g} sd from the mean of {len(published)} published seeds"
    if abs(distance) <= limit:
        return Verdict(CONSISTENT, f"{where}, inside the prediction interval of ±{limit:.2g} sd{power}.", numbers)
    if abs(distance) <= wide:
        words = f"outside ±{limit:.2g} sd, but inside ±{wide:.2g} sd, which {cells} cells allow"
        return Verdict(INCONCLUSIVE, f"{where}, {words}{power}.", numbers)
    return Verdict(DIVERGED, f"{where}, outside the prediction interval of ±{wide:.2g} sd for {cells} cells.", numbers)


def tost(published: Sequence[float], fresh: Sequence[float], margin: float) -> dict[str, Any]:
    """Two one-sided tests of |mean(fresh) - mean(published)| < margin, and the test of the opposite.

    Each p value is the larger of two: Welch's, and that of the t test whose error comes from the fresh seeds' spread
    alone. The policy check accepts a margin because the published spread is small against it; among the audits that it
    lets through Welch's error is too small. The fresh spread knows nothing of that choice.

    Args:
        published: At least two values.
        fresh: At least two values of other seeds.
        margin: In the unit of the values.

    Returns:
        `difference`, `p` (of equivalence), `p_outside` (of a difference beyond the margin), and the counts.
    """
    old, new = statistics.deviation(published) or 0.0, statistics.deviation(fresh) or 0.0
    difference = statistics.mean(fresh) - statistics.mean(published)
    counts = {"difference": difference, "published": len(published), "fresh": len(fresh)}
    if not old and not new:
        inside = abs(difference) < margin
        return counts | {"p": 0.0 if inside else 1.0, "p_outside": 1.0 if inside else 0.0}
    first, second = old**2 / len(published), new**2 / len(fresh)
    freedom = (first + second) ** 2 / (first**2 / (len(published) - 1) + second**2 / (len(fresh) - 1))
    pairs = [_one_sided(difference, margin, math.sqrt(first + second), freedom)]
    if new:
        error = new * math.sqrt(1 / len(published) + 1 / len(fresh))
        pairs.append(_one_sided(difference, margin, error, len(fresh) - 1))
    p, outside = (max(values) for values in zip(*pairs, strict=True))
    return counts | {"p": p, "p_outside": outside}


def _one_sided(difference: float, margin: float, error: float, freedom: float) -> tuple[float, float]:
    """p of a difference inside the margin, the larger of both sides, and of one outside it, the smaller."""
    from scipy.special import stdtr

    t = np.array([difference + margin, margin - difference]) / error
    return float(stdtr(freedom, -t).max()), float(stdtr(freedom, t).min())


def prediction(published: int, new: int, alpha: float) -> float:
    """Half width, in published standard deviations, of the interval for the mean of `new` further values."""
    from scipy.special import stdtrit

    return float(stdtrit(published - 1, 1 - alpha / 2) * math.sqrt(1 / published + 1 / new))


def binomial(evidence: Evidence) -> dict[str, Any]:
    """Standard deviation, in points, that drawing the test images alone gives an accuracy in percent."""
    from scipy import stats

    values = evidence.published or evidence.rerun
    if not evidence.images or not values:
        return {}
    share = min(max(statistics.mean(values) / 100, 0.0), 1.0)
    noise = float(stats.binom.std(evidence.images, share)) / evidence.images * 100
    return {"test_set": {"images": evidence.images, "binomial_sd": noise}}


@cache
def power(margin: float, published: int, fresh: int, alpha: float = 0.05, grid: int = 256) -> float:
    """Probability that `tost` finds two equal normal distributions equivalent.

    Midpoint rule over both sample variances, the larger of both tests' limits, then the normal law of the difference.

    Args:
        margin: In standard deviations.
        published: Published seeds.
        fresh: Fresh seeds.
        alpha: Level of each one-sided test.
        grid: Points for each variance.
    """
    from scipy import stats

    middle = (np.arange(grid) + 0.5) / grid
    first = (stats.chi2.ppf(middle, published - 1) / (published - 1) / published)[:, None]
    second = (stats.chi2.ppf(middle, fresh - 1) / (fresh - 1) / fresh)[None, :]
    freedom = (first + second) ** 2 / (first**2 / (published - 1) + second**2 / (fresh - 1))
    both = np.sqrt(1 / published + 1 / fresh)
    alone = stats.t.ppf(1 - alpha, fresh - 1) * np.sqrt(second * fresh) * both
    room = margin - np.maximum(stats.t.ppf(1 - alpha, freedom) * np.sqrt(first + second), alone)
    inside = 2 * stats.norm.cdf(room / both) - 1
    return float(np.where(room > 0, inside, 0).mean())


def least_power() -> float:
    """What a margin must offer: the power of 3 standard deviations at three seeds on both sides, 54 %."""
    return power(3.0, 3, 3)


def seeds_needed(margin: float, alpha: float = 0.05, most: int = 500) -> int | None:
    """The smallest number of seeds on both sides with enough power for a margin in sd; None beyond `most`."""
    low, high = 2, most
    if power(margin, most, most, alpha) < least_power():
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(margin, middle, middle, alpha) >= least_power() else (middle + 1, high)
    return low


def inputs(evidence: Evidence, rule: Rule) -> dict[str, Any]:
    """Evidence and rule as plain JSON values, from which `from_inputs` makes them again."""
    return {"evidence": asdict(evidence), "rule": asdict(rule)}


def from_inputs(values: dict[str, Any]) -> tuple[Evidence, Rule]:
    """The inverse of `inputs`.

    Raises:
        UserError: Unknown key, wrong type, or a rule that judges nothing.
    """
    rule = params.build(Rule, values.get("rule"), "rule")
    check_rule(rule, "rule")
    return params.build(Evidence, values.get("evidence"), "evidence"), rule
