"""What an audit leaves: report.json, report.html, ro-crate-metadata.json and the signed statement over them."""

import errno
import math
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mirepro import files, params
from mirepro.audit import conclusion, integrity, levels, page, policy, recompute, safe, statement, verdicts
from mirepro.audit import evidence as judging
from mirepro.audit.verdicts import Evidence, Rule, Verdict
from mirepro.errors import UserError

REPORT, PAGE, CRATE, ENVELOPE = "report.json", "report.html", "ro-crate-metadata.json", "audit.dsse.json"
SIGNED = (REPORT, PAGE, CRATE)
RESULTS = {conclusion.REPRODUCED: "PASSED", conclusion.INCONCLUSIVE: "WARNED", conclusion.DIVERGED: "FAILED"}


@contextmanager
def last_resort(command: str) -> Iterator[None]:
    """Makes one line and exit code 2 of whatever a hostile source breaks; Python's own 1 would mean DIVERGED.

    MIREPRO_TRACEBACK=1 shows where.

    Raises:
        UserError: In place of any other exception but a package or disk space that lacks, which have their own words.
    """
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS):
            raise
        if os.environ.get("MIREPRO_TRACEBACK") == "1":
            traceback.print_exc()
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{command}: unexpected {type(error).__name__}: {words}; please report it") from error


@last_resort("audit")
def conduct(options: levels.Options, key: Path | None) -> int:
    """Audits, writes the report, prints the outcome; returns the exit code.

    Raises:
        UserError: The source, the policy or the key cannot be read.
    """
    if key is not None:
        statement.private_key(key)
    report = levels.audit(options)
    write(options.out, report, key)
    counts = ", ".join(f"{number} {name}" for name, number in report["counts"].items() if number)
    wrong = [f"{check['name']}: {item}" for check in report["checks"] if check["status"] == integrity.FAIL
             for item in [check["detail"], *check["items"][:3]]]  # fmt: skip
    print("\n".join([*wrong, f"{report['verdict']}: {report['why']}", *([counts] if counts else []),
                     f"report: {options.out / PAGE}"]))  # fmt: skip
    return int(report["exit_code"])


def write(out: Path, report: Mapping[str, Any], key: Path | None) -> None:
    """Writes all files of an audit; with a private key the statement is signed.

    Raises:
        UserError: The key cannot be read, or the folder cannot be written.
    """
    private = None if key is None else statement.private_key(key)
    check(report)
    files.write_json(out / REPORT, report)
    signer = None if private is None else statement.key_id(private.public_key())
    files.write_text(out / PAGE, page.render(report, signer))
    files.write_json(out / CRATE, crate(report))
    inner = statement.make(statement.subject(out, SIGNED), statement.AUDIT, predicate(report))
    files.write_json(out / ENVELOPE, statement.envelope(inner, private))


def predicate(report: Mapping[str, Any]) -> dict[str, Any]:
    """in-toto's Test Result: the overall verdict, and what was audited under which policy."""
    source, rules = report["source"], report["policy"]
    inputs = [{"name": "source", "digest": _commit(source) | {"sha256": source["sha256"]}}]
    inputs += [{"name": "policy", "digest": {"sha256": rules["sha256"]}}] if rules["sha256"] else []
    names: dict[str, list[str]] = {"passedTests": [], "warnedTests": [], "failedTests": []}
    for check in report["checks"]:
        kind = {integrity.PASS: "passedTests", integrity.FAIL: "failedTests"}.get(check["status"], "warnedTests")
        names[kind].append(f"level 0: {check['name']}")
    for name, count in report["counts"].items():
        if count:
            kind = {verdicts.DIVERGED: "failedTests", verdicts.FAILED: "failedTests"}.get(name, "warnedTests")
            good = name in (verdicts.EXACT, verdicts.EQUIVALENT, verdicts.CONSISTENT)
            names["passedTests" if good else kind].append(f"{count} cells {name}")
    return {"result": RESULTS[report["verdict"]], "configuration": inputs, **names}


def _commit(source: Mapping[str, Any]) -> dict[str, str]:
    return {"gitCommit": source["commit"]} if source["commit"] else {}


def crate(report: Mapping[str, Any]) -> dict[str, Any]:
    """RO-Crate 1.1 metadata: the report's files, and the audit as the action that made them.

    Format: https://www.researchobject.org/ro-crate/specification/1.1/
    """
    parts = [(REPORT, "application/json", "All verdicts with their inputs"), (PAGE, "text/html", "The same to read"),
             (ENVELOPE, "application/json", "Signed in-toto statement")]  # fmt: skip
    source = report["source"]
    audited = {"@id": "#source", "@type": "Dataset", "name": f"audited: {source['location']}",
               "version": source["commit"] or "no commit", "identifier": f"sha256:{source['sha256']}"}  # fmt: skip
    return {"@context": "https://w3id.org/ro/crate/1.1/context", "@graph": [
        {"@id": CRATE, "@type": "CreativeWork", "about": {"@id": "./"},
         "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"}},
        {"@id": "./", "@type": "Dataset", "name": f"Audit of {source['location']}: {report['verdict']}",
         "description": f"Level {report['level']}, profile {report['profile']}: {report['why']}",
         "datePublished": report["finished"], "license": {"@id": "https://creativecommons.org/publicdomain/zero/1.0/"},
         "author": {"@id": "#auditor"}, "publisher": {"@id": "#auditor"},
         "hasPart": [{"@id": name} for name, _, _ in parts], "mentions": [{"@id": "#audit"}, {"@id": "#source"}]},
        *({"@id": name, "@type": "File", "name": text, "encodingFormat": form} for name, form, text in parts),
        {"@id": "#audit", "@type": "CreateAction", "name": "mirepro audit", "endTime": report["finished"],
         "instrument": {"@id": "#mirepro"}, "object": {"@id": "#source"},
         "result": [{"@id": name} for name, _, _ in parts]},
        {"@id": "#auditor", "@type": "Organization", "name": f"The auditor, known by the signature of {ENVELOPE}"},
        {"@id": "#mirepro", "@type": "SoftwareApplication", "name": "mirepro", "version": report["judge"]["version"],
         "identifier": f"sha256:{report['judge']['sha256']}"},
        {"@id": "https://creativecommons.org/publicdomain/zero/1.0/", "@type": "CreativeWork", "name": "CC0 1.0"},
        audited,
    ]}  # fmt: skip


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return files.read_json(Path(__file__).with_name("report.schema.json"))


def check(report: Mapping[str, Any]) -> None:
    """Refuses a report that is not of the documented form.

    Raises:
        UserError: Names the place in the report.
    """
    import jsonschema

    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(report))
    if problem is not None:
        raise UserError(f"{REPORT}: {problem.json_path}: {problem.message[:200]}; not a report, or a changed one")


@last_resort("verify")
def verify(path: Path, key: Path | None) -> tuple[int, list[str]]:
    """Checks an audit's statement: signature, files beside it, and every verdict from its own inputs.

    Args:
        path: audit.dsse.json or its folder; a release statement is checked against the folder it lies in.
        key: The auditor's public key.

    Returns:
        Exit code (0 good, 1 wrong, 2 could not be decided) and lines to print.

    Raises:
        UserError: The file is no statement.
    """
    path = path / ENVELOPE if path.is_dir() else path
    outer, inner = statement.read(path)
    lines, wrong, unknown = [], statement.differing(inner, path.parent), False
    lines.append(f"files: {len(inner['subject'])} named, {len(wrong)} wrong")
    if not wrong and inner["predicateType"] == statement.AUDIT:
        report = safe.read_json(path.parent / REPORT)
        check(report)
        wrong += recheck(report)
        if inner["predicate"] != predicate(report):
            wrong.append("the statement says something else than the report")
        lines.append(f"verdicts: {len(report['cells'])} computed again from their inputs")
        lines.append(f"verdict: {report['verdict']} ({report['why']})")
    if key is None:
        unknown = True
        lines.append("signature: not checked (no --key)")
    elif statement.signed_by(outer, statement.public_key(key)):
        lines.append(f"signature: good, by {key.name}")
    else:
        wrong.append(f"signature: not by {key.name}" if outer["signatures"] else "signature: there is none")
    return 1 if wrong else 2 if unknown else 0, lines + [f"WRONG {line}" for line in wrong]


def recheck(report: Mapping[str, Any]) -> list[str]:
    """Computes every verdict, the counts and the conclusion again from the report's own inputs and policy.

    Raises:
        UserError: Inputs or policy are not of the documented form.
    """
    declared = params.build(policy.Policy, report["policy"]["content"], "policy")
    cases = [verdicts.from_inputs(cell["inputs"]) for cell in report["cells"]]
    found = verdicts.judge(cases)
    wrong = [
        f"{cell['table']}/{cell['row']}/{cell['column']}: {words}"
        for cell, case, verdict in zip(report["cells"], cases, found, strict=True)
        for words in _contradictions(cell, case, verdict, declared)
    ]
    wanted = [recompute.wanted(declared.claims is not None, item["committed"]) for item in report["claims"]]
    if wanted != [item["wanted"] for item in report["claims"]]:
        wrong.append("claims: measured against other verdicts than the policy's")
    counts = {name: sum(verdict.name == name for verdict in found) for name in verdicts.LADDER}
    checks = [integrity.Check(**item) for item in report["checks"]]
    overall = conclusion.conclude(report["level"], checks, report["cells"], report["controls"], report["claims"])
    if counts != report["counts"] or overall != (report["verdict"], report["why"]):
        wrong.append(f"the report concludes {report['verdict']}, its cells, claims and checks give {overall[0]}")
    return wrong if report["exit_code"] == conclusion.EXITS[overall[0]] else [*wrong, "the exit code is another one"]


def _contradictions(
    cell: Mapping[str, Any], case: tuple[Evidence, Rule], verdict: Verdict, declared: policy.Policy
) -> list[str]:
    """What a cell says that its inputs and the policy do not give; a level 1 comparison is exact under any policy."""
    (evidence, rule), stated = case, declared.rule(cell["table"], cell["row"], cell["column"])
    published = None if cell["paper"] is None else cell["paper"]["value"]
    paper = judging.paper(published, cell["committed"]["mean"], evidence.published, stated)
    found = {
        f"says {cell['verdict']}, its inputs give {verdict.name}":
            (cell["verdict"], cell["reason"]) != (verdict.name, verdict.reason),
        "its inputs give other numbers": not close(cell["numbers"], verdict.numbers),
        "judged by another rule than the policy's": rule != (stated if cell["level"] > 1 else Rule()),
        "its inputs say something else of the paper's value": cell["paper"] != paper,
    }  # fmt: skip
    return [words for words, wrong in found.items() if wrong]


def close(one: Any, other: Any) -> bool:
    """Equality of plain values but for what special functions of other CPUs do to the last digits."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)
