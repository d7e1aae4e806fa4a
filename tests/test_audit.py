"""Audits of a small result: every level, tampers, hostile sources, signed reports that others can check."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from audited import Project, commit

from mirepro import profiles
from mirepro.audit import (
    cells,
    conclusion,
    integrity,
    levels,
    output,
    page,
    release,
    rerun,
    sandbox,
    selftest,
    source,
    statement,
)
from mirepro.audit.levels import Options
from mirepro.errors import UserError


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    shutil.copytree(project.root, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def good(project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder, public key) of a signed audit of level 1."""
    out = tmp_path_factory.mktemp("audit")
    statement.new_keys(out / "keys" / "auditor")
    report = audit(project.root, out / "report", 1)
    output.write(out / "report", report, out / "keys" / "auditor")
    return out / "report", out / "keys" / "auditor.pub"


def audit(what: Path | str, out: Path, level: int = 0, **options: Any) -> dict[str, Any]:
    """The report of a quiet audit."""
    return levels.audit(Options(str(what), out, level, **options), lambda line: None)


def states(report: dict[str, Any]) -> dict[str, str]:
    """Checks by name."""
    return {check["name"]: check["status"] for check in report["checks"]}


def test_untouched_is_reproduced(good: tuple[Path, Path], project: Project) -> None:
    report = json.loads((good[0] / "report.json").read_text())
    assert (report["verdict"], report["exit_code"]) == ("REPRODUCED", 0)
    assert set(states(report).values()) == {"pass", "not checked"}
    assert [name for name, state in states(report).items() if state == "not checked"] == ["signature"]
    assert {cell["verdict"] for cell in report["cells"]} == {"EXACT"}
    assert {cell["level"] for cell in report["cells"]} == {1}
    assert [(control["level"], control["differs"]) for control in report["controls"]] == [(0, True), (1, True)]
    assert report["source"]["changed"] == []
    assert not list(project.root.glob(".mirepro"))


def test_level_0_has_a_control(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed bit has to be found; a check of digests that finds nothing makes the audit inconclusive."""
    report = audit(project.root, tmp_path / "good", 0)
    assert [(control["level"], control["differs"]) for control in report["controls"]] == [(0, True)]
    assert report["verdict"] == "REPRODUCED"
    blind = lambda audited, kind: levels.Check("outputs", "pass", "nothing looked at")  # noqa: E731
    monkeypatch.setattr(levels.integrity, "digests", blind)
    assert audit(project.root, tmp_path / "blind", 0)["verdict"] == "INCONCLUSIVE"


def test_nothing_is_written_to_the_source(project: Project, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in project.root.rglob("*")}
    audit(project.root, tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in project.root.rglob("*")} == before
    with pytest.raises(UserError, match="never touched"):
        audit(project.root, project.root / "report")


def test_folder_md5_is_dvcs(root: Path) -> None:
    """Against digests that DVC itself wrote."""
    lock = integrity.safe.read_yaml(root / "dvc.lock")
    (one,) = lock["stages"]["tables"]["outs"]
    clean = ["git", "diff", "--quiet", "HEAD", "--", "tables/desk", "dvc.lock"]
    if subprocess.run(clean, cwd=root, check=False).returncode:
        pytest.skip("tables/desk is being changed")
    found = {str(p.relative_to(root)): source.hashes(p) for p in (root / "tables" / "desk").iterdir()}
    assert source.folder_md5(found, "tables/desk") == one["md5"]
    found["tables/desk/T1.md"] = source.Hashes(0, "", "0" * 32)
    assert source.folder_md5(found, "tables/desk") != one["md5"]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Changes a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def test_tables_and_metrics_that_disagree(copy: Path, tmp_path: Path) -> None:
    """A changed cell and a changed metric are named; all other cells stay exact."""

    def cell(content: Any) -> None:
        content["rows"][0]["cells"]["knn_1"]["mean"] += 1

    edit(copy / "tables/desk/T1.json", cell)
    edit(copy / "metrics/desk/evaluate/ball-s1.json", lambda c: c["cells"]["linear_pool"].update(value=99.0))
    report = audit(copy, tmp_path / "out", 1)
    assert (report["verdict"], report["exit_code"]) == ("DIVERGED", 1)
    wrong = {(c["row"], c["column"]): c["reason"] for c in report["cells"] if c["verdict"] != "EXACT"}
    assert wrong.keys() == {("ir", "knn_1"), ("ball", "linear_pool")}
    assert "where the table says" in wrong["ball", "linear_pool"]
    assert states(report)["tables recomputed"] == "fail"


def test_missing_cells_and_metrics(copy: Path, tmp_path: Path) -> None:

    def shorten(content: Any) -> None:
        content["columns"].remove("knn_5")
        for row in content["rows"]:
            del row["cells"]["knn_5"]

    edit(copy / "tables/desk/T1.json", shorten)
    report = audit(copy, tmp_path / "out", 1)
    assert {c["verdict"] for c in report["cells"] if c["column"] == "knn_5"} == {"MISSING"}
    (copy / "metrics/desk/evaluate/ir-s0.json").unlink()
    report = audit(copy, tmp_path / "out", 1)
    assert {c["verdict"] for c in report["cells"]} == {"MISSING"}
    assert "ir-s0.json" in report["cells"][0]["reason"]


@pytest.mark.slow
def test_revision_and_remote(project: Project, copy: Path, tmp_path: Path) -> None:
    """A git revision lacks the runs; a signed release brings them, and a damaged object in it is refused."""
    statement.new_keys(tmp_path / "key")
    assert release.publish(copy, "desk", tmp_path / "key", tmp_path / "release") > 40
    commit(copy)
    for folder in ("runs", "data/desk/shards"):
        shutil.rmtree(copy / folder)
    report = audit(f"{copy}@HEAD", tmp_path / "out")
    assert report["source"]["kind"] == "git"
    assert (report["verdict"], states(report)["outputs"]) == ("INCONCLUSIVE", "not checked")
    report = audit(f"{copy}@HEAD", tmp_path / "out", 1)
    assert (report["verdict"], states(report)["claims"]) == ("REPRODUCED", "not checked"), report["why"]
    assert report["claims"]
    assert states(report)["tables recomputed"] == "pass"
    public = tmp_path / "key.pub"
    full = audit(f"{copy}@HEAD", tmp_path / "out", remote=tmp_path / "release", publisher_key=public)
    assert (full["verdict"], states(full)["signature"], states(full)["outputs"]) == ("REPRODUCED", "pass", "pass")
    statement.new_keys(tmp_path / "other")
    other = audit(f"{copy}@HEAD", tmp_path / "out", publisher_key=tmp_path / "other.pub")
    assert states(other)["signature"] == "fail"
    selftest.flip(max((tmp_path / "release" / "files").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size))
    with pytest.raises(UserError, match="damaged"):
        audit(f"{copy}@HEAD", tmp_path / "out", remote=tmp_path / "release")
    with pytest.raises(UserError, match="check the address"):
        audit(f"{copy}@nowhere", tmp_path / "out")


def test_a_folder_that_is_partly_there_was_not_changed(tmp_path: Path) -> None:
    """Git holds no runs, and an audit writes the receipts of the data into them."""
    (tmp_path / "runs/desk/data").mkdir(parents=True)
    (tmp_path / "runs/desk/data/desk.json").write_text("{}")
    lock = {
        "toy": {"outs": [{"path": "runs/desk/toy", "md5": "0" * 32 + ".dir"}]},
        "report": {"deps": [{"path": "runs/desk", "md5": "1" * 32 + ".dir"}]},
    }

    def inputs() -> str:
        audited = integrity.Audited(tmp_path, source.inventory(tmp_path), None, lock)  # type: ignore[arg-type]
        return integrity.digests(audited, "deps").status

    assert inputs() == "not checked"
    (tmp_path / "runs/desk/toy").mkdir()
    (tmp_path / "runs/desk/toy/banks.json").write_text("[]")
    assert inputs() == "fail"  # control: all of it is there, and it is another


def test_claims_without_answers(copy: Path, tmp_path: Path) -> None:
    """Where the answers per image are not there, everything but the intervals over images has to come out."""
    shutil.rmtree(copy / "runs")

    def seen() -> tuple[str, str, list[str]]:
        report = audit(copy, tmp_path / "out", 1)
        items = next(check["items"] for check in report["checks"] if check["name"] == "tables recomputed")
        assert states(report)["claims"] == "not checked"
        assert any(claim["n"] == 3 for claim in report["claims"])
        return report["verdict"], states(report)["tables recomputed"], items

    file = copy / "tables/desk/claims.json"
    good = file.read_text()
    assert json.loads(good)["claims"][5]["bootstrap"]
    assert seen() == ("REPRODUCED", "pass", [])
    edit(file, lambda content: content["claims"][5].update(verdict="supported", n=5))
    assert seen() == ("DIVERGED", "fail", ["tables/desk/claims.json: differs from what the metrics give"])
    for text in ("[]", good.replace('"bootstrap": [', '"bootstrap": [true,', 1)):
        file.write_text(text)
        assert seen()[:2] == ("DIVERGED", "fail")


def test_claims_of_the_policy(copy: Path, tmp_path: Path) -> None:
    """A declared claim has to come out supported; too few seeds decide nothing; an unknown row stops the audit."""
    shutil.rmtree(copy / "runs")  # verdicts need metrics only, and the report takes most of the time

    def verdict(better: str, seeds: int = 3, than: str = "ir") -> tuple[str, str]:
        claim = f"{{id: a, table: T1, column: linear_flat, better: {better}, than: {than}}}"
        text = f"schema: mirepro.audit-policy/1\nclaims: {{alpha: 0.05, seeds: {seeds}, claims: [{claim}]}}\n"
        (tmp_path / "policy.yaml").write_text(text)
        report = audit(copy, tmp_path / "out", 1, policy=tmp_path / "policy.yaml")
        assert output.recheck(report) == []
        return report["verdict"], report["why"]

    assert verdict("ball")[0] == "REPRODUCED"
    assert verdict("ir", than="ball") == ("DIVERGED", "claims with another verdict: a")
    assert verdict("ball", seeds=5) == ("INCONCLUSIVE", "not enough seeds for claims: a")
    with pytest.raises(UserError, match="claim a: T1/bal/linear_flat is no cell of the tables"):
        verdict("bal")


def test_publishing_what_does_not_fit(copy: Path, tmp_path: Path) -> None:
    statement.new_keys(tmp_path / "key")
    selftest.flip(copy / "runs/desk/pretrain/ir-s0/encoder.safetensors")
    with pytest.raises(UserError, match=r"outputs differ from dvc\.lock"):
        release.publish(copy, "desk", tmp_path / "key", tmp_path / "release")
    (copy / "params.yaml").write_text((copy / "params.yaml").read_text() + "# late\n")
    with pytest.raises(UserError, match=r"not committed: params\.yaml"):
        release.publish(copy, "desk", tmp_path / "key", tmp_path / "release")


def test_policy_of_the_source(copy: Path, tmp_path: Path) -> None:
    """A policy counts if it was committed; a margin that can show nothing stops the audit."""
    (copy / "audit.yaml").write_text("schema: mirepro.audit-policy/1\nrules: [{test: band, margin: 1.0}]\n")
    assert states(audit(copy, tmp_path / "out"))["policy"] == "fail"
    commit(copy)
    report = audit(copy, tmp_path / "out")
    assert states(report)["policy"] == "pass"
    assert report["policy"]["sha256"] == integrity.files.sha256(copy / "audit.yaml")
    strict = tmp_path / "strict.yaml"
    strict.write_text("schema: mirepro.audit-policy/1\nrules: [{column: knn_1, row: ir, test: tost, margin: 0.001}]\n")
    with pytest.raises(UserError, match="too narrow to show anything"):
        audit(copy, tmp_path / "out", 1, policy=strict)


HOSTILE = {
    "a link": lambda root: (root / "metrics/desk/x.json").symlink_to("/etc/passwd"),
    "a linked folder": lambda root: (root / "csrc").symlink_to("/etc"),
    "a pipe": lambda root: os.mkfifo(root / "metrics/desk/x.json"),
    "huge JSON": lambda root: os.truncate(root / "data/desk/manifest.json", 1 << 30),
    "deep JSON": lambda root: (root / "data/desk/manifest.json").write_text("[" * 100_000),
    "aliases": lambda root: (root / "params.yaml").write_text("a: &a [1]\nb: *a\n"),
    "a lock that climbs": lambda root: selftest.swap(root / "dvc.lock", r"path: metrics/desk/toy", "path: ../../toy"),
    "a run that climbs": lambda root: selftest.swap(root / "params.yaml", r"ir-s0:", "../../ir-s0:"),
    "a root that climbs": lambda root: selftest.swap(root / "params.yaml", r"root: \.", "root: ../../.."),
    "a lock whose inputs are a number":
        lambda root: selftest.swap(root / "dvc.lock", r"deps:\n.*\n.*\n.*\n", "deps: 5\n"),
    "a lock whose parameters are a list":
        lambda root: selftest.swap(root / "dvc.lock", r"params:\n.*\n +tier: portable\n", "params: [1]\n"),
    "a lock whose parameters are a list in a file": lambda root: selftest.swap(
        root / "dvc.lock", r"params:\n.*\n +tier: portable\n", "params: {params.yaml: [1]}\n"),
    "a lock whose parameter is a number":
        lambda root: selftest.swap(root / "dvc.lock", r"tier: portable\n", "5: portable\n"),
    "a data set that climbs": lambda root: selftest.swap(root / "params.yaml", r"- desk", "- ../desk"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sources_are_refused(copy: Path, tmp_path: Path, name: str) -> None:
    """Whatever is not refused ends in Python's own exit code 1, which says that the result diverged."""
    HOSTILE[name](copy)
    with pytest.raises(UserError, match=r"refused|no path"):
        audit(copy, tmp_path / "out")


def test_commands_of_the_source_are_never_run(copy: Path, tmp_path: Path) -> None:
    """A hostile command in dvc.yaml, DVC's configuration, git's hooks and filters do nothing, and are seen."""
    mark = tmp_path / "was-here"
    selftest.swap(copy / "dvc.yaml", r"cmd: mirepro stage toy.*", f"cmd: touch {mark}")
    (copy / ".dvc").mkdir()
    (copy / ".dvc" / "config").write_text(f"['remote \"x\"']\nurl = ssh://{mark}\n")
    for hook in ("post-checkout", "reference-transaction"):
        path = copy / ".git" / "hooks" / hook
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ntouch {mark}\n")
        path.chmod(0o755)
    with (copy / ".git" / "config").open("a") as file:
        file.write(f'[core]\nfsmonitor = "touch {mark}"\n[filter "x"]\nclean = touch {mark}\nsmudge = touch {mark}\n')
    (copy / ".gitattributes").write_text("* filter=x\n")
    report = audit(copy, tmp_path / "out", 1)
    assert states(report)["pipeline"] == "fail"
    audit(f"{copy}@HEAD", tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize("wish", ["GIT_NO_LAZY_FETCH", "GIT_ALLOW_PROTOCOL"])
def test_lazy_fetches_run_nothing(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    """git would fetch an object that lacks by the program which a partial clone's configuration names.

    Each of the two variables is enough, whatever the configuration allows; without both the command runs.
    """
    mark, git = tmp_path / "was-here", ["git", "-C", str(copy)]
    tree = subprocess.run([*git, "rev-parse", "HEAD:metrics"], capture_output=True, text=True, check=True).stdout
    (copy / ".git" / "objects" / tree[:2] / tree[2:].strip()).unlink()
    with (copy / ".git" / "config").open("a") as file:
        file.write(
            '[core]\nrepositoryformatversion = 1\n[extensions]\npartialClone = x\n[protocol "file"]\nallow = always\n'
            f'[remote "x"]\npromisor = true\nurl = file://{copy}\nuploadpack = touch {mark}; git-upload-pack\n'
        )
    run = subprocess.run

    def one(command: list[str], **options: Any) -> Any:
        options["env"] = {name: value for name, value in options["env"].items() if name in (wish, "PATH")}
        return run(command, **options)

    monkeypatch.setattr(source.subprocess, "run", one)
    for what in (copy, f"{copy}@HEAD"):
        with pytest.raises(UserError, match="git "):
            audit(what, tmp_path / "out")
    assert not mark.exists()
    monkeypatch.setattr(source.subprocess, "run", lambda command, **options: run(command, **options | {"env": None}))
    with pytest.raises(UserError, match="git "):
        audit(copy, tmp_path / "out")
    assert mark.exists()


def test_html_is_escaped(good: tuple[Path, Path]) -> None:
    report = json.loads((good[0] / "report.json").read_text())
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    for cell in report["cells"][:3]:
        cell |= {"row": evil, "column": evil, "reason": evil, "unit": evil}
    report["checks"][0] |= {"detail": evil, "items": [evil]}
    report["source"]["location"] = report["why"] = evil
    text = page.render(report, None)
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("&lt;script&gt;") > 5
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_page_lists_what_differs(good: tuple[Path, Path]) -> None:
    """Libraries of another version than the pinned one, claims, and for how many cells the paper has no value."""
    report = json.loads((good[0] / "report.json").read_text())
    name = next(iter(report["key"]["here"]["versions"]))
    report["key"]["pinned"] = {name: "0.0.1"}
    report["cells"][0]["paper"] = {"value": 1.0, "verdict": "CONSISTENT", "reason": "so"}
    text = page.render(report, None)
    assert re.search(f'<th scope="row">{name}</th><td>[^<]+</td><td>0.0.1</td>', text)
    assert f"n/a for {len(report['cells']) - 1} of {len(report['cells'])} cells" in text
    report["key"]["pinned"] = {name: report["key"]["here"]["versions"][name]}
    assert "No library of the key has another version" in page.render(report, None)
    report["key"]["pinned"] = {}
    assert "n/a: the source has no requirements.lock" in page.render(report, None)


def test_rules_that_fresh_seeds_do_not_serve_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("schema: mirepro.audit-policy/1\nrules: [{test: tost, margin: 3}]\n")
    loaded = levels.policy.load(tmp_path / "p.yaml", "")
    committed = [levels.cells.Cell((table, "ir", "knn_1"), {}, ()) for table in ("T1", "T6")]
    gathered: Any = SimpleNamespace(policy=loaded.policy, committed=committed)
    options = Options("x", tmp_path, 3, seeds=2)
    (check,) = levels._fresh_check(options, gathered)
    assert (check.status, check.items) == ("not checked", ["T6: 1 cells"])
    gathered.committed = committed[:1]
    assert levels._fresh_check(options, gathered)[0].status == "pass"
    assert levels._fresh_check(replace(options, seeds=0), gathered) == []


def test_detectors_are_trained_where_they_are_asked_for(root: Path) -> None:
    """Level 2 takes pinned weights, and nothing of a detector is pinned; the check says what it leaves out."""
    profile = profiles.load(root, "desk")
    committed = cells.collect(root, profile, cells.read(root / "tables" / "desk"))

    def kinds(level: int, *select: str) -> set[str]:
        return {stage.partition("@")[0] for stage in rerun.plan(profile, committed, level, select).stages}

    assert kinds(2) == {"evaluate", "controls", "toy"}
    assert kinds(2, "T2") == kinds(2, "detect@*") == {"detect"}
    assert kinds(3) == {"pretrain", "evaluate", "detect", "controls", "toy"}
    gathered = SimpleNamespace(committed=committed)
    (check,) = levels._detection_check(Options("", Path(), 2), gathered)
    assert (check.status, check.detail.split(":")[0]) == ("not checked", "14 stages train detectors")
    for options in (Options("", Path(), 2, select=("T1",)), Options("", Path(), 1), Options("", Path(), 3)):
        assert not levels._detection_check(options, gathered)  # control


def test_page_is_self_contained(good: tuple[Path, Path]) -> None:
    text = (good[0] / "report.html").read_text()
    for word in ("http://", "https://", '<link rel="stylesheet', "<script", "@import", "url("):
        assert word not in text, word
    assert "REPRODUCED" in text


def test_signed_report(good: tuple[Path, Path], tmp_path: Path) -> None:
    folder, key = good
    assert output.verify(folder, key)[0] == 0
    assert output.verify(folder / output.ENVELOPE, None)[0] == 2
    statement.new_keys(tmp_path / "other")
    assert output.verify(folder, tmp_path / "other.pub")[0] == 1
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / output.PAGE).unlink()
    assert output.verify(moved, key)[0] == 1


def test_independent_implementation_verifies(good: tuple[Path, Path], tmp_path: Path) -> None:
    """securesystemslib reads the envelope with the public key; another key or payload is refused."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    folder, public = good
    outer = json.loads((folder / output.ENVELOPE).read_text())
    name, payload = outer["signatures"][0]["keyid"], outer["payload"]

    def verify(payload: str, pem: str) -> None:
        key = SSlibKey(name, "ed25519", "ed25519", {"public": _raw(pem)})
        envelope = {"payloadType": outer["payloadType"], "payload": payload, "signatures": [{**outer["signatures"][0]}]}
        assert Envelope.from_dict(envelope).verify([key], 1) == {name: key}

    verify(payload, public.read_text())
    with pytest.raises(VerificationError):
        verify(("B" if payload[0] == "A" else "A") + payload[1:], public.read_text())
    statement.new_keys(tmp_path / "stranger")
    with pytest.raises(VerificationError):
        verify(payload, (tmp_path / "stranger.pub").read_text())


def _raw(pem: str) -> str:
    """The 32 bytes of an Ed25519 key in PEM, as hex."""
    import base64

    return base64.b64decode("".join(pem.splitlines()[1:-1]))[-32:].hex()


def test_envelope_by_hand(good: tuple[Path, Path]) -> None:
    """The signature over DSSE's encoding as its specification writes it."""
    import base64

    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    outer = json.loads((good[0] / output.ENVELOPE).read_text())
    body, kind = base64.b64decode(outer["payload"]), outer["payloadType"]
    signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind.encode(), str(len(body)).encode(), body])
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(_raw(good[1].read_text())))
    key.verify(base64.b64decode(outer["signatures"][0]["sig"]), signed)
    with pytest.raises(InvalidSignature):
        key.verify(base64.b64decode(outer["signatures"][0]["sig"]), signed + b" ")
    content = json.loads(body)
    assert content["_type"] == "https://in-toto.io/Statement/v1"
    assert {item["name"] for item in content["subject"]} == set(output.SIGNED)


def test_crate(good: tuple[Path, Path]) -> None:
    """What RO-Crate 1.1 demands: descriptor, root data set, and an entity for everything that is referred to."""
    content = json.loads((good[0] / output.CRATE).read_text())
    assert content["@context"] == "https://w3id.org/ro/crate/1.1/context"
    entities = {item["@id"]: item for item in content["@graph"]}
    assert len(entities) == len(content["@graph"])
    descriptor = entities["ro-crate-metadata.json"]
    assert descriptor["conformsTo"]["@id"] == "https://w3id.org/ro/crate/1.1"
    root = entities[descriptor["about"]["@id"]]
    assert {"name", "description", "datePublished", "license", "author", "publisher"} <= root.keys()
    assert all((good[0] / part["@id"]).is_file() for part in root["hasPart"])

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from [value["@id"]] if set(value) == {"@id"} else []
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    known = entities.keys() | {"https://w3id.org/ro/crate/1.1"}
    assert set(references(content["@graph"])) <= known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(extra=1), "Additional properties"),
        (lambda c: c["cells"][0].update(verdict="FINE"), "FINE"),
        (lambda c: c.pop("limits"), "limits"),
        (lambda c: c.update(exit_code=7), "7"),
    ],
)
def test_schema(good: tuple[Path, Path], change: Callable[[Any], None], message: str) -> None:
    report = json.loads((good[0] / "report.json").read_text())
    output.check(report)
    change(report)
    with pytest.raises(UserError, match=message):
        output.check(report)


def test_verdicts_are_computed_again(good: tuple[Path, Path]) -> None:
    report = json.loads((good[0] / "report.json").read_text())
    assert output.recheck(report) == []
    report["cells"][3]["inputs"]["evidence"]["identical"] = False
    assert "says EXACT, its inputs give DIVERGED" in output.recheck(report)[0]


def _band(report: Any) -> None:
    """A cell re-run under a rule that the policy does not have."""
    cell = report["cells"][3]
    cell["level"], cell["inputs"]["rule"] = 2, {"test": "band", "margin": 1.0, "alpha": 0.05}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["cells"][3].update(numbers={"band": {"largest": 0.0}}), "other numbers"),
        (_band, "another rule than the policy's"),
        (
            lambda r: r["cells"][3].update(paper={"value": 1.0, "verdict": "CONSISTENT", "reason": "so"}),
            "paper's value",
        ),
        (lambda r: r["claims"][3].update(wanted="supported"), "claims: measured against"),
        (lambda r: r["claims"][3].update(verdict="not supported"), "concludes REPRODUCED"),
    ],
)
def test_whatever_a_report_concludes_is_computed_again(
    good: tuple[Path, Path], change: Callable[[Any], None], words: str
) -> None:
    report = json.loads((good[0] / "report.json").read_text())
    change(report)
    output.check(report)
    assert words in output.recheck(report)[0]


def test_numbers_may_differ_in_their_last_digits() -> None:
    one = {"tost": {"p": 0.04, "cells": 3, "words": "x"}}
    assert output.close(one, {"tost": {"p": 0.04 * (1 + 1e-12), "cells": 3, "words": "x"}})
    for other in ({"p": 0.0401}, {"cells": 4}, {"words": "y"}, {"more": 1}):
        assert not output.close(one, {"tost": one["tost"] | other})


def test_keys(tmp_path: Path) -> None:
    statement.new_keys(tmp_path / "k")
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="never overwritten"):
        statement.new_keys(tmp_path / "k")
    with pytest.raises(UserError, match="not a private key"):
        statement.private_key(tmp_path / "k.pub")
    with pytest.raises(UserError, match="not a public key"):
        statement.public_key(tmp_path / "k")


def test_conclusion() -> None:
    good, bad = {"verdict": "EXACT", "level": 1}, {"verdict": "DIVERGED", "level": 2}
    check = integrity.Check("x", "fail", "")
    yes, no = {"differs": True}, {"differs": False}
    assert conclusion.conclude(1, [], [good], [yes]) == ("REPRODUCED", "all 1 cells recomputed")
    again = {"verdict": "EXACT", "level": 2}
    assert conclusion.conclude(2, [], [good, again], [yes])[1] == "all 2 cells, 1 of them by re-runs"
    assert conclusion.conclude(1, [], [good], [yes, no])[0] == "INCONCLUSIVE"
    assert conclusion.conclude(1, [], [good, {"verdict": "MISSING"}], [yes])[0] == "INCONCLUSIVE"
    assert conclusion.conclude(1, [], [good, bad, {"verdict": "MISSING"}], [yes])[0] == "DIVERGED"
    assert conclusion.conclude(1, [check], [good], [yes])[0] == "DIVERGED"
    claim = {"id": "a", "verdict": "supported", "wanted": "supported"}
    assert conclusion.conclude(1, [], [good], [yes], [claim])[0] == "REPRODUCED"
    assert conclusion.conclude(1, [], [good], [yes], [claim | {"verdict": "not supported"}])[0] == "DIVERGED"
    assert conclusion.conclude(1, [], [good], [yes], [claim | {"wanted": None}])[0] == "DIVERGED"
    assert conclusion.conclude(1, [], [good], [yes], [claim | {"verdict": "not enough seeds"}])[0] == "INCONCLUSIVE"
    unjudged = integrity.Check(conclusion.UNJUDGED, "not checked", "")
    assert conclusion.conclude(1, [unjudged], [good], [yes]) == ("INCONCLUSIVE", "the claims could not be judged")


def test_claims_that_cannot_be_judged(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error among the claims is told, and leaves the audit undecided."""

    def damaged(*_: Any) -> None:
        raise KeyError("cells")

    monkeypatch.setattr(levels.recompute, "judge_claims", damaged)
    report = audit(project.root, tmp_path / "out", 1)
    assert (report["verdict"], report["claims"]) == ("INCONCLUSIVE", [])
    assert states(report)[conclusion.UNJUDGED] == "not checked"


@pytest.mark.slow
def test_command_line(project: Project, root: Path, tmp_path: Path) -> None:
    """Exit codes and single lines of the commands."""

    def run(*arguments: str, folder: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "mirepro", *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    assert run("keys", "new", "auditor").returncode == 0
    result = run("audit", str(project.root), "--level", "0", "--key", "auditor", "-o", "out")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "report: out/report.html")
    result = run("audit", str(project.root), "-o", "again")
    lines = [line.strip() for line in result.stdout.splitlines()]
    tables = [json.loads(path.read_text()) for path in (project.root / "tables/desk").glob("*.json")]
    cells = sum(len(row["cells"]) for table in tables for row in table.get("rows", []))
    assert (result.returncode, f"{cells} EXACT" in lines) == (0, True), result.stdout
    result = run("verify", "out", "--key", "auditor.pub")
    assert (result.returncode, "signature: good" in result.stdout) == (0, True)
    inside = shutil.copytree(project.root, tmp_path / "audited")
    result = run("audit", ".", "--level", "0", folder=inside)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "report: ../audit-report/report.html")
    for arguments, message in (
        (("audit", "nowhere"), "no such folder"), (("audit", ".", "-o", "x"), "lies in the audited folder"),
        (("audit", str(project.root), "--level", "9"), "--level: 9"), (("verify", "nowhere"), "no such file"),
        (("audit", str(project.root), "--seeds", "3"), "with --level 3"),
    ):  # fmt: skip
        result = run(*arguments)
        assert (result.returncode, message in result.stderr, len(result.stderr.splitlines())) == (2, True, 1), result


PROBE = """
import os, pathlib, socket, sys
place = pathlib.Path(sys.argv[1])
for name, act in {
    "home": lambda: pathlib.Path.home().joinpath("secret").read_text(),
    "network": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), 1),
    "outside": lambda: place.joinpath("secret").read_text(),
    "system": lambda: pathlib.Path("/usr/x").write_text("x"),
    "box": lambda: pathlib.Path("made").write_text("x"),
}.items():
    try:
        act()
        print(name, "possible")
    except OSError as error:
        print(name, "refused")
"""


def test_sandbox(tmp_path: Path) -> None:
    """No network, no home, nothing outside, a read-only system; a plain process can do all of it."""
    import socket

    if sandbox.find(False).kind != sandbox.BUBBLEWRAP:
        pytest.skip("bubblewrap is not installed or may not be used here")
    (tmp_path / "box").mkdir()
    (tmp_path / "secret").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        probe = [sys.executable, "-c", PROBE, str(tmp_path), str(server.getsockname()[1])]
        walls = sandbox._walls(str(shutil.which("bwrap")), [tmp_path / "box"])
        inside = [*walls, "--chdir", str(tmp_path / "box"), "--setenv", "HOME", str(tmp_path), "--", *probe]
        found = subprocess.run(inside, capture_output=True, text=True, check=True).stdout.split("\n")
        env = os.environ | {"HOME": str(tmp_path)}
        free = subprocess.run(probe, capture_output=True, text=True, check=True, cwd=tmp_path / "box", env=env).stdout
    refused = {line.split()[0] for line in found if "refused" in line}
    assert refused == {"home", "network", "outside", "system"}
    assert "box possible" in found
    assert all(f"{word} possible" in free for word in ("home", "network", "outside"))


def test_foreign_code_needs_a_sandbox(project: Project, tmp_path: Path) -> None:
    nowhere = sandbox.Sandbox(sandbox.NONE)
    with pytest.raises(UserError, match="--trust-code"):
        sandbox.execute(nowhere, tmp_path, project.profile, "toy", own=False)
    assert replace(nowhere, trusted=True).trusted


RELOCKS = {
    "relock evidence, after the signing": r"signature: relocks/desk/pretrain@ir-s2\.json",
    "relock evidence of another stage": r"relocks: relocks/desk/pretrain@ir-s0\.json: not the evidence of a stage",
    "relock evidence of another stage, renamed throughout":
        r"relocks: relocks/desk/pretrain@ir-s0\.json: of other outputs than the recorded ones",
    "a digest of the first steps in relock evidence":
        r"relocks: relocks/desk/pretrain@ir-s2\.json: digests that are not those of the training",
}  # fmt: skip
"""What finds each tamper with the evidence of a re-pinned training."""


def test_tampers_with_evidence(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is caught for its own reason; the control is an audit that believes evidence, where only signatures tell."""
    bench = selftest.prepare(project.root, "desk", tmp_path / "work")

    def caught() -> dict[str, str]:
        before = bench.findings(bench.options(bench.base, 0))
        assert not before
        found = {}
        for words, level, tamper in selftest.evidence_tampers("desk"):
            folder = bench.copy()
            tamper(folder)
            found[words] = selftest._found(bench, folder, level, before)
        return found

    found = caught()
    assert {words: bool(re.match(RELOCKS[words], by)) for words, by in found.items()} == dict.fromkeys(RELOCKS, True)
    monkeypatch.setattr(selftest.relock, "_contradiction", lambda *_: "")
    assert all(by.startswith("signature: relocks/") for by in caught().values())


@pytest.mark.slow
def test_self_test(project: Project, tmp_path: Path) -> None:
    """Every tamper is caught, and by the check that is there for it."""
    found = {item.tamper: item.by for item in selftest.run(project.root, "desk", tmp_path / "work")}
    assert all(found.values()), found
    assert found.keys() > RELOCKS.keys()
    assert all(re.match(start, found[name]) for name, start in RELOCKS.items()), found
    words = {
        "a metric's value": "T1/", "a table's cell": "T1/", "one bit of a checkpoint": "inputs: evaluate@",
        "one bit of a data shard": "data: ", "a manifest's entry": "data: ", "dvc.lock": "outputs: ",
        "a parameter": "parameters: ", "code under a lock": "code: ", "the report": "outputs: report",
        "the policy, after the commit": "policy: ", "the publisher's signature": "signature: ",
        "a checkpoint and dvc.lock, consistently": "signature: dvc.lock",
    }  # fmt: skip
    assert {name: found[name].startswith(start) for name, start in words.items()} == dict.fromkeys(words, True)


def test_a_tamper_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    """A signature that begins with the character put in its place was reported as a tamper that nobody noticed."""
    path = tmp_path / "audit.dsse.json"
    path.write_text('"sig": "+a"')
    with pytest.raises(UserError, match="nothing like"):
        selftest.swap(path, '"sig": ".', '"sig": "+')
    selftest.swap(path, '"sig": ".', '"sig": "A')
    assert path.read_text() == '"sig": "Aa"'


def test_self_test_notices_nothing_where_nothing_was_done(project: Project, tmp_path: Path) -> None:
    bench = selftest.Bench(tmp_path, tmp_path / "base", "desk")
    shutil.copytree(project.root, bench.base)
    statement.new_keys(bench.keys)
    selftest.sign(bench, bench.base)
    before = bench.findings(bench.options(bench.base, 0))
    folder = bench.copy()
    assert selftest._found(bench, folder, 0, before) == ""
    selftest.flip(folder / "runs/desk/pretrain/ir-s0/encoder.safetensors")
    assert selftest._found(bench, folder, 0, before) != ""
