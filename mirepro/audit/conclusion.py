"""From checks, cells, claims and negative controls to the overall verdict and its reason."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirepro.audit import recompute, verdicts
from mirepro.audit.evidence import Gathered
from mirepro.audit.integrity import FAIL, UNKNOWN, Audited, Check
from mirepro.report import claims

REPRODUCED, DIVERGED, INCONCLUSIVE = "REPRODUCED", "DIVERGED", "INCONCLUSIVE"
EXITS = {REPRODUCED: 0, DIVERGED: 1, INCONCLUSIVE: 2}
UNJUDGED = "claims judged"
"""The check that says why claims could not be judged."""


def conclude(
    level: int, checks: Sequence[Check], judged: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]],
    ordinal: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, str]:  # fmt: skip
    """The overall verdict and its reason: what failed or diverged is worse than anything undecided."""
    names = [cell["verdict"] for cell in judged]
    wrong = _wrong(checks, names, ordinal)
    if wrong:
        return DIVERGED, "; ".join(wrong)
    if not all(control["differs"] for control in controls):
        return INCONCLUSIVE, "a negative control did not differ, so equality shows nothing"
    undecided = _undecided(level, checks, names, ordinal)
    if undecided:
        return INCONCLUSIVE, undecided
    if not names:
        return REPRODUCED, "everything there fits together"
    again = sum(cell["level"] > 1 for cell in judged)
    return REPRODUCED, f"all {len(names)} cells" + (f", {again} of them by re-runs" if level > 1 else " recomputed")


def _wrong(checks: Sequence[Check], names: Sequence[str], ordinal: Sequence[Mapping[str, Any]]) -> list[str]:
    """What failed or diverged, in words."""
    failed = [check.name for check in checks if check.status == FAIL]
    count = names.count(verdicts.DIVERGED)
    other = [item["id"] for item in ordinal if recompute.claim_verdict(item) == verdicts.DIVERGED]
    return [
        *([f"failed checks: {', '.join(failed)}"] if failed else []),
        *([f"{count} of {len(names)} cells diverged"] if count else []),
        *([f"claims with another verdict: {', '.join(other)}"] if other else []),
    ]


def _undecided(level: int, checks: Sequence[Check], names: Sequence[str], ordinal: Sequence[Mapping[str, Any]]) -> str:
    """Why nothing is decided; empty if everything is."""
    open_ones = [name for name in names if name in (verdicts.INCONCLUSIVE, verdicts.MISSING, verdicts.FAILED)]
    if open_ones:
        return f"{len(open_ones)} of {len(names)} cells are {', '.join(dict.fromkeys(open_ones)).lower()}"
    unknown = [check.name for check in checks if check.status == UNKNOWN]
    if UNJUDGED in unknown:
        return "the claims could not be judged"
    few = [item["id"] for item in ordinal if recompute.claim_verdict(item) == verdicts.INCONCLUSIVE]
    if few:
        return f"not enough seeds for claims: {', '.join(few)}"
    absent = [name for name in unknown if name in ("inputs", "outputs")]
    if not level and absent:
        return f"{' and '.join(absent)} are not complete, so their digests could not be compared"
    return ""


def judge_claims(audited: Audited, gathered: Gathered, work: Path) -> tuple[list[dict[str, Any]], list[Check]]:
    """The ordinal claims from committed and re-run metrics beside the verdicts that they should have.

    The policy's own claims should be supported, the others have the committed verdict again.

    Returns:
        The claims, and a check that says why they could not be judged, if so.
    """
    own = gathered.policy.claims
    before = recompute.committed_claims(audited.copy / "tables" / audited.name / recompute.CLAIMS[0])
    place = ("table", "column", "text")
    verdict_of = {tuple(str(item.get(name)) for name in place): str(item.get("verdict")) for item in before.values()}
    root = work / "merged" if gathered.reruns else work / "tables"
    try:
        judged = recompute.judge_claims(root, audited.profile, own or claims.load(audited.name))
    except recompute.DAMAGED as error:
        words = str(error).replace(f"{root}/", "") or type(error).__name__
        return [], [Check(UNJUDGED, UNKNOWN, "the claims could not be judged", [words[:300]])]
    kept = ("id", "text", "column", "n", "difference", "p_holm", "verdict")
    committed = [verdict_of.get(tuple(item[name] for name in place)) for item in judged]
    return [
        {name: item[name] for name in kept} | {"committed": said, "wanted": recompute.wanted(bool(own), said)}
        for item, said in zip(judged, committed, strict=True)
    ], []
