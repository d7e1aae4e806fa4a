"""The audit as a whole: source -> checks -> recomputation -> re-runs -> verdicts -> report, signed."""

import hashlib
import importlib.metadata
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirepro import determinism, environment, files
from mirepro.audit import (
    cells,
    conclusion,
    control,
    evidence,
    integrity,
    policy,
    recompute,
    release,
    relock,
    rerun,
    safe,
    sandbox,
    source,
    verdicts,
)  # fmt: skip
from mirepro.audit.evidence import Gathered
from mirepro.audit.integrity import FAIL, PASS, UNKNOWN, Audited, Check
from mirepro.audit.sandbox import OWN, Sandbox
from mirepro.errors import UserError

SCHEMA = "mirepro.audit/1"
WORK, MARK = "work", "work-of-mirepro-audit"
"""The work folder in an audit's, and the file in it without which a folder of this name is never removed."""
BLIND = (
    "A publisher who chose seeds, data or claims after seeing results is not found by repeating the same runs; fresh "
    "seeds (--seeds) and the policy's date in git are the remedies.",
    "Where the audited code is not this installation's, a result could be remembered by the code instead of computed; "
    "the report says which stages ran whose code.",
    "Digests in dvc.lock are md5, for which collisions can be made; sha256 of every file stands in the signed report.",
    "Test data that were used for choices cannot be seen in the files.",
)
"""What a malicious publisher could still do; part of every report."""


@dataclass(frozen=True)
class Options:
    """What the auditor asked for; see `mirepro audit --help`."""

    source: str
    out: Path
    level: int = 1
    select: tuple[str, ...] = ()
    profile: str = "desk"
    policy: Path | None = None
    publisher_key: Path | None = None
    remote: Path | str | None = None
    seeds: int = 0
    jobs: int = 1
    trust_code: bool = False


def default_out(source: str) -> Path:
    """Where the report goes: `audit-report` here, or beside the audited folder where here is inside it."""
    folder = Path(source).resolve()
    inside = folder.is_dir() and Path.cwd().is_relative_to(folder)
    return Path(os.path.relpath(folder.parent)) / "audit-report" if inside else Path("audit-report")


def check_options(options: Options) -> None:
    """Refuses what cannot be done, before anything is copied.

    Raises:
        UserError: Names the option.
    """
    if options.level not in (0, 1, 2, 3):
        raise UserError(f"--level: {options.level} is unknown; known: 0 verify, 1 tables, 2 evaluate, 3 retrain")
    if options.seeds and (options.level < 3 or options.seeds < 2):
        raise UserError(f"--seeds: {options.seeds}; at least 2 fresh seeds, with --level 3")
    if options.jobs < 1:
        raise UserError(f"--jobs: {options.jobs} is impossible; use 1 or more")
    folder, out = Path(options.source), options.out.resolve()
    if folder.is_dir() and out.is_relative_to(folder.resolve()):
        raise UserError(f"{options.out}: lies in the audited folder, which is never touched; choose another -o")
    _check_out(out, options.out)


def _check_out(out: Path, named: Path) -> None:
    """Refuses an output folder in which something else than an audit would be overwritten or removed."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{named}: is no folder; choose another -o")
    work = out / WORK
    ours = (work / MARK).is_file() and not work.is_symlink()
    if os.path.lexists(work) and not ours:
        raise UserError(f"{named / WORK}: is not of an audit, which would remove it; choose another -o")
    if out.exists() and any(out.iterdir()) and not (out / "report.json").is_file() and not ours:
        raise UserError(f"{named}: is not empty and holds no audit; choose another -o")


def audit(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Audits a source and returns the report's content; the work folder `<out>/work` goes when it is complete.

    Raises:
        UserError: The source or the policy cannot be read, or is hostile.
    """
    check_options(options)
    work = options.out.resolve() / WORK  # stages run in other folders
    copy = _fresh_copy(work)
    taken = source.take(options.source, copy)
    say(f"copied {taken.facts['location']}, commit {(taken.facts['commit'] or 'none')[:12]}")
    committed_locks = integrity.locks(copy, options.profile)
    remote = None if options.remote is None else release.receive(options.remote, _fresh_folder(work / "remote"))
    loaded = load_policy(options, taken)  # before anything of the remote is in the copy
    audited = _open(options, copy, remote)
    checks = [_policy_committed(options, taken, loaded), release.check(audited, options.publisher_key, remote)]
    checks += [*integrity.checks(audited, OWN, committed_locks), relock.check(audited)]
    facts = {"source": taken.facts | {"sha256": tree_digest(audited)}, "policy": policy.plain(loaded)}
    gathered = None
    controls = [control.byte(audited, work)]
    if options.level:
        gathered, seen = _gather(options, audited, loaded, checks, work, say)
        controls += seen
    report = assemble(options, audited, facts, checks, gathered, controls, work)
    shutil.rmtree(work)
    return report


def _fresh_copy(work: Path) -> Path:
    """The empty folder of the copy in the work folder, which is marked as this program's own.

    Raises:
        UserError: It cannot be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / MARK).touch()
        for stale in work.glob("copy*"):
            shutil.rmtree(stale)
        (work / "copy").mkdir()
    except OSError as error:
        raise files.refusal(work, error) from error
    return work / "copy"


def _open(options: Options, copy: Path, remote: Path | None) -> Audited:
    audited = integrity.open_copy(copy, options.profile)
    if remote is not None:
        wanted = {path: md5 for path, md5 in audited.outputs().items() if audited.md5(path) is None}
        source.fetch(copy, remote, wanted.items())
    integrity.receipts(copy, audited.profile)
    return Audited(copy, source.inventory(copy), audited.profile, audited.lock)


def load_policy(options: Options, taken: source.Source) -> policy.Loaded:
    """The auditor's policy, else the source's, else `exact` throughout.

    Raises:
        UserError: It is malformed.
    """
    if options.policy is not None:
        return policy.load(options.policy, "the auditor's --policy")
    path = taken.copy / "audit.yaml"
    return policy.load(path if path.exists() else None, "audit.yaml of the source")


def _policy_committed(options: Options, taken: source.Source, loaded: policy.Loaded) -> Check:
    if options.policy is not None or loaded.sha256 is None:
        return Check("policy", PASS, loaded.origin)
    changed = taken.facts["changed"]
    if changed is None:
        return Check("policy", UNKNOWN, "the source is no git checkout; when its policy was declared is not known")
    if "audit.yaml" in changed:
        return Check("policy", FAIL, "audit.yaml is not the committed one", ["audit.yaml was changed after the commit"])
    return Check("policy", PASS, "audit.yaml is the committed one")


def tree_digest(audited: Audited) -> str:
    """One digest of all copied files."""
    lines = "".join(f"{name} {item.sha256}\n" for name, item in sorted(audited.found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def committed_key(audited: Audited) -> dict[str, str]:
    """Versions that the audited requirements.lock pins, for the determinism key; empty where it has none."""
    path = audited.copy / "requirements.lock"
    text = safe.regular(path, safe.JSON_BYTES).decode(errors="replace") if path.is_file() else ""
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([^\s;\\]+)", text, re.MULTILINE))
    names = determinism.key(audited.profile.tier, audited.profile.threads)["versions"]
    return {name: pinned[name] for name in names if name in pinned}


def _gather(
    options: Options, audited: Audited, loaded: policy.Loaded, checks: list[Check], work: Path,
    say: Callable[[str], None],
) -> tuple[Gathered, list[dict[str, Any]]]:  # fmt: skip
    """Levels 1 to 3, at most `jobs` things at a time: no re-run waits for what level 1 finds."""
    walls = sandbox.find(options.trust_code)
    committed = _committed(audited)
    key = determinism.key(audited.profile.tier, audited.profile.threads)
    promised = committed_key(audited) == key["versions"] and audited.profile.tier == "portable"
    gathered = Gathered(audited, committed, loaded.policy, promised, options.level)
    published = {cell.address: cell.values for cell in committed}
    policy.refuse(policy.check(loaded.policy, published, options.seeds or None), loaded.origin)
    say("level 1: tables, claims and report from the committed metrics")
    with rerun.processors(options.jobs, walls) as pool:
        first = pool.submit(_tables, audited, walls, work)
        controls = _again(options, gathered, walls, work, say, pool) if options.level >= 2 else []
        gathered.recomputed, seen = first.result()
    checks += gathered.recomputed.checks
    return gathered, seen + controls


def _tables(audited: Audited, walls: Sandbox, work: Path) -> tuple[recompute.Recomputed, list[dict[str, Any]]]:
    """Level 1 and its negative control."""
    found = recompute.recompute(audited, _fresh_folder(work / "tables"), walls)
    return found, [] if found.missing else [recompute.control(audited, _fresh_folder(work / "tables-control"))]


def _committed(audited: Audited) -> list[cells.Cell]:
    """The committed cells; without their runs where metrics are missing."""
    made = cells.read(audited.copy / "tables" / audited.name)
    try:
        return cells.collect(audited.copy, audited.profile, made)
    except (UserError, KeyError, TypeError, AttributeError):
        return [cells.Cell(address, content, ()) for address, content in cells.contents(made).items()]


def _fresh_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _again(
    options: Options, gathered: Gathered, walls: Sandbox, work: Path, say: Callable[[str], None], pool: Executor
) -> list[dict[str, Any]]:
    """Re-runs the chosen stages in a box that survives a kill, and the negative control."""
    audited, level = gathered.audited, options.level
    chosen = rerun.plan(audited.profile, gathered.committed, level, options.select, options.seeds)
    missing = {stage: rerun.missing(audited, stage, level) for stage in chosen.stages}
    gathered.missing = {stage: words for stage, words in missing.items() if words}
    chosen.chains = [chain for chain in chosen.chains if not any(stage in gathered.missing for stage in chain)]
    gathered.plan = chosen
    same = integrity.same_code(audited.copy, OWN, audited.profile)
    place = _place(options, audited, work)
    profile = rerun.prepare(audited, place / "box", chosen, level, same)
    runner = rerun.Runner(audited, place / "box", profile, walls, same, place / "done", say)
    say(f"level {level}: {len(chosen.stages)} stages; sandbox: {walls.kind}")
    runner.data(audited.profile.values["datasets"])
    perturbed = pool.submit(control.again, audited, _fresh_folder(work / "control"), chosen, level, runner)
    gathered.reruns = runner.run(chosen, options.jobs, pool)
    evidence.merge(gathered, place / "box", _fresh_folder(work / "merged"))
    return [perturbed.result()]


def _place(options: Options, audited: Audited, work: Path) -> Path:
    """The folder of re-runs for exactly these inputs on such a machine; those of other inputs are dropped."""
    inputs = [tree_digest(audited), own_digest(), options.level, options.profile, options.seeds, options.trust_code]
    limits = [os.environ.get(name) for name in sandbox.LIMITS]
    here = determinism.key(audited.profile.tier, audited.profile.threads)
    inputs += [here, determinism.cpu("flags"), limits, sandbox.find(options.trust_code).kind]
    name = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]
    for other in work.glob("again-*"):
        if other.name != f"again-{name}":
            shutil.rmtree(other)
    place = work / f"again-{name}"
    (place / "box").mkdir(parents=True, exist_ok=True)
    return place


def own_digest() -> str:
    """A digest of the judge's own package with its compiled operators."""
    kinds = (".py", ".so", ".json", ".yaml", ".j2", ".css")
    names = sorted(path for path in (OWN / "mirepro").rglob("*") if path.suffix in kinds)
    lines = "".join(f"{path.relative_to(OWN)} {files.sha256(path)}\n" for path in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def assemble(
    options: Options, audited: Audited, facts: Mapping[str, Any], checks: Sequence[Check], gathered: Gathered | None,
    controls: Sequence[Mapping[str, Any]], work: Path,
) -> dict[str, Any]:  # fmt: skip
    """The content of report.json."""
    judged = evidence.judge(gathered) if gathered else []
    ordinal, open_ones = conclusion.judge_claims(audited, gathered, work) if gathered else ([], [])
    checks = [*checks, *open_ones, *_fresh_check(options, gathered), *_detection_check(options, gathered)]
    overall, why = conclusion.conclude(options.level, checks, judged, controls, ordinal)
    tier, threads = audited.profile.tier, audited.profile.threads
    key = determinism.key(tier, threads)
    return {
        "schema": SCHEMA, "verdict": overall, "why": why, "exit_code": conclusion.EXITS[overall],
        "level": options.level, "profile": audited.name, "select": list(options.select), "seeds": options.seeds,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts,
        "judge": {
            "version": importlib.metadata.version("mirepro"), "sha256": own_digest(),
            "sandbox": sandbox.find(options.trust_code).words() if options.level >= 2 else "nothing was re-run",
        },
        "environment": {name: str(value) for name, value in environment.environment(OWN).items()},
        "key": {"here": key, "pinned": committed_key(audited), "same": bool(gathered and gathered.same_key)},
        "counts": {name: sum(cell["verdict"] == name for cell in judged) for name in verdicts.LADDER},
        "checks": [asdict(check) for check in checks], "cells": judged,
        "claims": ordinal,
        "stages": [asdict(result) for _, result in sorted(gathered.reruns.items())] if gathered else [],
        "controls": list(controls), "limits": list(BLIND),
        "materials": {name: item.sha256 for name, item in sorted(audited.found.items())},
    }  # fmt: skip


def _fresh_check(options: Options, gathered: Gathered | None) -> list[Check]:
    """Says which `tost` rules fresh seeds do not serve, where there are fresh seeds."""
    if not options.seeds or gathered is None:
        return []
    beyond = gathered.policy.beyond_fresh(cell.address for cell in gathered.committed)
    if not beyond:
        return [Check("fresh seeds", PASS, f"every tost rule is of cells of {policy.FRESH}, which fresh seeds measure")]
    words = f"only cells of {policy.FRESH} are measured with fresh seeds; others under tost cannot be EQUIVALENT"
    return [Check("fresh seeds", UNKNOWN, words, [f"{table}: {count} cells" for table, count in beyond.items()])]


def _detection_check(options: Options, gathered: Gathered | None) -> list[Check]:
    """Says so where detectors, which only the most patient ask for, stay as they were committed."""
    if options.level != 2 or options.select or gathered is None:
        return []
    parts = (part.stage for cell in gathered.committed for part in cell.parts)
    left = sorted({stage for stage in parts if stage.startswith("detect@")})
    words = f"{len(left)} stages train detectors: recomputed from their metrics only; --select 'detect@*', or level 3"
    return [Check("detections", UNKNOWN, words)] if left else []
