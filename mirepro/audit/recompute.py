"""Level 1: tables, claims and report made anew from the committed metrics, by the judge's own code."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirepro import files, profiles
from mirepro.audit import boxes, cells, integrity, safe, verdicts
from mirepro.audit.integrity import Audited, Check
from mirepro.audit.sandbox import Sandbox, Worker
from mirepro.errors import UserError
from mirepro.report import claims, tables

SECONDS = 900.0
CLAIMS = ("claims.json", "claims.md")
DAMAGED = (UserError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
"""What metrics of another form than the documented one raise."""


@dataclass
class Recomputed:
    """What level 1 found.

    Attributes:
        made: Tables from the committed metrics.
        checks: Comparison of files.
        missing: Why tables could not be made; empty if they were.
    """

    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    missing: str = ""


def recompute(audited: Audited, box: Path, sandbox: Sandbox) -> Recomputed:
    """Makes tables and report in a box that has neither, and compares them byte for byte."""
    profile = boxes.base(audited.copy, box, audited.profile, audited.profile.values["datasets"])
    name = profile.name
    boxes.put(audited.copy, box, [f"metrics/{name}", f"runs/{name}", "docs/deviations.md"])
    try:
        made = cells.make(box, profile)
    except DAMAGED as error:
        return Recomputed(missing=f"the tables cannot be made from the metrics: {_words(error, box)}")
    result = Recomputed(made)
    with Worker(sandbox, box, profile) as worker:
        _compare(audited, box, profile, worker, result)
    return result


def _compare(audited: Audited, box: Path, profile: profiles.Profile, worker: Worker, result: Recomputed) -> None:
    """Adds the checks of tables, claims and report."""
    made, name = result.made, profile.name
    outcome = worker.run("tables", SECONDS)
    if outcome.code:
        _write(made, box / "tables" / name)
        result.checks.append(_claims(audited, box, profile, _words(outcome.tail, box)))
    result.checks.append(_files(audited, box, made))
    result.checks.append(_page(audited, box, profile, worker, ready=not outcome.code))


def _write(made: Mapping[str, Any], folder: Path) -> None:
    """The tables without the claims."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, table in made.items():
        files.write_json(folder / f"{name}.json", table)
        files.write_text(folder / f"{name}.md", tables.markdown(table))


def _claims(audited: Audited, box: Path, profile: profiles.Profile, reason: str) -> Check:
    """Writes the claims where the answers per image are not there: their intervals over images are the committed ones.

    All else follows from the metrics, and is compared with the committed files as the tables are.
    """
    file, folder = claims.load(profile.name), f"tables/{profile.name}"
    try:
        judged = judge_claims(box, profile, file)
    except DAMAGED as error:
        return Check("claims", integrity.FAIL, "the metrics give no claims", [_words(error, box)])
    before = committed_claims(audited.copy / folder / CLAIMS[0])
    for item in judged:
        item["bootstrap"] = _span(before.get(item["id"], {}).get("bootstrap"))
    tables.write_claims(box / folder, file, judged)
    words = "recomputed but for the intervals over test images, which stand as committed"
    lacking = f"they need the answers per image in runs/{profile.name}/evaluate (--remote): {reason}"
    return Check("claims", integrity.UNKNOWN, words, [lacking])


def committed_claims(path: Path) -> dict[str, dict[str, Any]]:
    """The committed claims by id; empty where there is no such file, or one of another form."""
    try:
        content = safe.read_json(path)
    except UserError:
        return {}
    listed = content.get("claims") if isinstance(content, dict) else None
    items = listed if isinstance(listed, list) else []
    return {str(item.get("id")): item for item in items if isinstance(item, dict)}


def _span(value: Any) -> list[float] | None:
    """A committed interval of differences in percent; None where it is none."""
    plain = isinstance(value, list) and len(value) == 2 and all(type(limit) in (int, float) for limit in value)
    return value if plain and all(abs(limit) <= 100 for limit in value) else None


def _words(error: object, box: Path) -> str:
    """The last line of a complaint without the box's place."""
    text = str(error) or type(error).__name__
    return text.strip().splitlines()[-1].replace(f"{box}/", "")[:300]


def _files(audited: Audited, box: Path, made: Mapping[str, Any]) -> Check:
    """Every file under tables/ against the recomputed one, both ways."""
    folder = f"tables/{audited.name}"
    committed = {path.name for path in (audited.copy / folder).glob("*") if path.is_file()}
    compared = committed | {f"{name}.{suffix}" for name in made for suffix in ("json", "md")} | set(CLAIMS)
    wrong = []
    for name in sorted(compared):
        theirs, ours = audited.copy / folder / name, box / folder / name
        if not theirs.is_file() or not ours.is_file():
            wrong.append(f"{folder}/{name}: {'not committed' if ours.is_file() else 'not a result of the metrics'}")
        elif theirs.read_bytes() != ours.read_bytes():
            wrong.append(f"{folder}/{name}: differs from what the metrics give")
    good = f"{len(compared)} files under {folder} came out byte for byte"
    return integrity.verdict("tables recomputed", wrong, good, "tables are not what the committed metrics give")


def _page(audited: Audited, box: Path, profile: profiles.Profile, worker: Worker, ready: bool) -> Check:
    """The report's bytes, which depend on banks, histories and data as well."""
    name = f"reports/{profile.name}/index.html"
    theirs = audited.copy / name
    if not ready or not theirs.is_file():
        return Check("report recomputed", integrity.UNKNOWN, "its inputs or the report are not there")
    for data in profile.values["datasets"]:
        if not (box / "data" / data / "shards").is_dir():
            outcome = worker.run(f"data@{data}", SECONDS)
            if outcome.code:
                return Check("report recomputed", integrity.UNKNOWN, f"data set {data}: {_words(outcome.tail, box)}")
    outcome = worker.run("report", SECONDS)
    if outcome.code:
        return Check("report recomputed", integrity.UNKNOWN, f"could not be made: {_words(outcome.tail, box)}")
    same = (box / name).read_bytes() == theirs.read_bytes()
    wrong = [] if same else [f"{name}: differs from what metrics, runs and data give"]
    return integrity.verdict("report recomputed", wrong, f"{name} came out byte for byte", "the report is another one")


def control(audited: Audited, box: Path) -> dict[str, Any]:
    """Negative control: one measured value is changed a little; a recomputed cell must change."""
    profile = boxes.base(audited.copy, box, audited.profile, [])
    boxes.put(audited.copy, box, [f"metrics/{profile.name}"])
    before = cells.contents(cells.make(box, profile))
    for path in sorted((box / "metrics" / profile.name / "evaluate").glob("*.json")):
        content = safe.read_json(path)
        for column, entry in sorted(content.get("cells", {}).items()):
            if isinstance(entry.get("value"), float):
                entry["value"] = entry["value"] * (1 + 1e-6) + 1e-6
                path.write_text(files.dump_json(content))
                after = cells.contents(cells.make(box, profile))
                differing = sorted("/".join(key) for key in before if before[key] != after.get(key))
                what = f"{path.relative_to(box)}: {column} changed by a millionth"
                return {"level": 1, "what": what, "differs": bool(differing), "where": differing[:5]}
    return {"level": 1, "what": "no measured value to change", "differs": False, "where": []}


def judge_claims(root: Path, profile: profiles.Profile, file: claims.Claims) -> list[dict[str, Any]]:
    """Verdicts on the ordinal claims from the metrics in `root`.

    Raises:
        UserError: Metrics are missing.
    """
    return claims.judge(root, profile.name, profile.values["tables"], file, images=False)


def claim_verdict(item: Mapping[str, Any]) -> str:
    """A judged claim against the verdict that it should have."""
    if item["verdict"] == item["wanted"]:
        return verdicts.EXACT
    return verdicts.INCONCLUSIVE if item["verdict"] == claims.SEEDS else verdicts.DIVERGED


def wanted(own: bool, committed: str | None) -> str | None:
    """The verdict that a claim should have: the policy's own are supported, the others as they were committed."""
    return claims.SUPPORTED if own else committed
