"""What a hostile or careless side of an audit must not do: write elsewhere, lose files, end in a traceback."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from audited import Project, commit

from mirepro import cli, determinism
from mirepro.audit import integrity, levels, output, policy, sandbox, source
from mirepro.audit.levels import Options
from mirepro.errors import UserError


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    shutil.copytree(project.root, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def audit(what: Path | str, out: Path, level: int = 0, **options: Any) -> dict[str, Any]:
    """The report of a quiet audit."""
    return levels.audit(Options(str(what), out, level, **options), lambda line: None)


def put(remote: Path, content: bytes, suffix: str = "") -> str:
    """Puts an object into a DVC remote; returns its md5."""
    md5 = hashlib.md5(content).hexdigest() + suffix
    path = remote / "files" / "md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def test_a_remote_brings_results_only(copy: Path, tmp_path: Path) -> None:
    """Outputs of the lock may name any path: code and a policy, taken for the committed one, would be written."""
    lock = yaml.safe_load((copy / "dvc.lock").read_text())
    shutil.rmtree(copy / "runs")
    (copy / "metrics" / "desk" / "toy.json").rename(tmp_path / "toy.json")
    policy = put(tmp_path / "remote", b"schema: mirepro.audit-policy/1\nrules: [{test: band, margin: 9.0}]\n")
    put(tmp_path / "remote", (tmp_path / "toy.json").read_bytes())
    lock["stages"]["toy"]["outs"] += [{"path": name, "md5": policy} for name in ("audit.yaml", "mirepro/x.py")]
    (copy / "dvc.lock").write_text(yaml.safe_dump(lock))
    commit(copy)
    report = audit(copy, tmp_path / "out", remote=tmp_path / "remote")
    assert report["policy"]["sha256"] is None
    assert report["materials"].keys() & {"audit.yaml", "mirepro/x.py", "metrics/desk/toy.json"} == {
        "metrics/desk/toy.json"
    }


def test_the_policy_is_read_before_the_remote_comes(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that a remote managed to write would be judged by, and called the committed one."""
    opened = levels._open

    def late(options: Options, copied: Path, remote: Path | None) -> Any:
        (copied / "audit.yaml").write_text("schema: mirepro.audit-policy/1\nrules: [{test: band, margin: 9.0}]\n")
        return opened(options, copied, remote)

    monkeypatch.setattr(levels, "_open", late)
    assert audit(copy, tmp_path / "out")["policy"]["sha256"] is None


def test_outputs_that_overlap(tmp_path: Path) -> None:
    """A file below a file and a name beyond the file system's limit were tracebacks."""
    remote, folder = tmp_path / "remote", tmp_path / "copy"
    file = put(remote, b"x")
    long = put(remote, json.dumps([{"md5": file, "relpath": "a" * 300}]).encode(), ".dir")
    for outputs in ([("runs/a", file), ("runs/a/b", file)], [("runs/a", file)] * 2, [("runs/c", long)]):
        shutil.rmtree(folder, ignore_errors=True)
        with pytest.raises(UserError, match="refused; names of the source overlap or are too long"):
            source.fetch(folder, remote, outputs)


def test_a_blob_that_lacks(copy: Path, tmp_path: Path) -> None:
    """A damaged repository was a traceback."""
    run = ["git", "-C", str(copy), "rev-parse", "HEAD:params.yaml"]
    blob = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    (copy / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(UserError, match=f"params.yaml: its content {blob} is not in the repository"):
        audit(f"{copy}@HEAD", tmp_path / "out")


def test_nothing_of_the_user_is_removed(copy: Path, tmp_path: Path) -> None:
    """An audit removes its work folder in the end; it would remove the user's of the same name."""
    thesis = tmp_path / "mine" / "work" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("x")
    with pytest.raises(UserError, match="mine/work: is not of an audit, which would remove it"):
        audit(copy, tmp_path / "mine")
    (tmp_path / "mine" / "report.json").write_text("{}")
    with pytest.raises(UserError, match="which would remove it"):
        audit(copy, tmp_path / "mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work").symlink_to(thesis.parent)
    (thesis.parent / levels.MARK).touch()
    with pytest.raises(UserError, match="which would remove it"):
        audit(copy, tmp_path / "out")
    with pytest.raises(UserError, match=r"thesis\.tex: is no folder; choose another -o"):
        audit(copy, thesis)
    assert thesis.read_text() == "x"


def test_an_interrupted_audit_is_continued(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work folder that a killed audit leaves is known as its own."""
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "checks", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            audit(copy, tmp_path / "out")
    assert (tmp_path / "out" / "work" / "copy").is_dir()
    assert audit(copy, tmp_path / "out")["verdict"] == "REPRODUCED"
    assert not (tmp_path / "out" / "work").exists()


def test_another_machine_continues_nothing(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages computed with AVX-512, by other libraries or without a sandbox would be reported as those of now."""
    audited = integrity.open_copy(copy, "desk")
    changes = {
        "nothing": lambda patch: None,
        "instructions": lambda patch: patch.setenv("MIREPRO_ISA", "none"),
        "MKL's": lambda patch: patch.setenv("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"),
        "processor": lambda patch: patch.setattr(determinism, "cpu", lambda field: "sse2"),
        "libraries": lambda patch: patch.setattr(determinism, "key", lambda tier, threads: {"torch": "0"}),
        "sandbox": lambda patch: patch.setattr(sandbox, "find", lambda trust: sandbox.Sandbox("other")),
        "operators": lambda patch: patch.setattr(levels, "OWN", operators(tmp_path / "own", b"other")),
    }
    operators(tmp_path / "own", b"these")
    monkeypatch.setattr(levels, "OWN", tmp_path / "own")
    places = {}
    for name, change in changes.items():
        with monkeypatch.context() as patch:
            change(patch)
            places[name] = levels._place(Options(str(copy), tmp_path / "out", 2), audited, tmp_path / "work")
    assert len(set(places.values())) == len(changes)
    assert not places["nothing"].exists()


def operators(own: Path, content: bytes) -> Path:
    """An installation with compiled operators."""
    (own / "mirepro").mkdir(parents=True, exist_ok=True)
    (own / "mirepro" / "_ops.so").write_bytes(content)
    return own


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400], ids=["infinite", "long"])
def test_numbers_that_cannot_be_written(copy: Path, tmp_path: Path, number: str) -> None:
    """Nothing could be written or computed with them: a traceback in place of a report."""
    path = copy / "metrics/desk/evaluate/ir-s0.json"
    content = json.loads(path.read_text())
    content["cells"]["knn_1"]["value"] = "NUMBER"
    path.write_text(json.dumps(content).replace('"NUMBER"', number))
    report = audit(copy, tmp_path / "out", 1)
    assert {cell["verdict"] for cell in report["cells"]} == {"MISSING"}
    assert "ir-s0.json: refused; not strict JSON" in report["cells"][0]["reason"]
    assert {check["name"]: check["status"] for check in report["checks"]}["metrics"] == "fail"
    output.write(tmp_path / "out", report, None)


@pytest.mark.parametrize("rule", [{"test": "tost"}, {"test": "band"}, {"test": "tost", "margin": 1.0, "alpha": 0.0}])
def test_rules_that_no_policy_may_have(rule: dict[str, Any]) -> None:
    """`mirepro verify` on a stranger's report was a traceback, or believed an interval of infinite width."""
    evidence = {"identical": False, "published": [1.0, 2.0], "fresh": [1.0, 2.0]}
    cell = {"table": "T1", "row": "a", "column": "b", "inputs": {"evidence": evidence, "rule": rule}}
    with pytest.raises(UserError, match=r"correct the rule|alpha 0\.0 is impossible"):
        output.recheck({"cells": [cell], "policy": {"content": {"schema": policy.SCHEMA}}})


@pytest.mark.parametrize(("command", "broken"), [("audit", "audit"), ("verify", "check")])
@pytest.mark.parametrize("shown", ["", "1"])
def test_last_resort(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str,
    broken: str, shown: str,
) -> None:  # fmt: skip
    """Python's own exit code 1 would say that the result diverged."""
    out = tmp_path / "out"
    output.write(out, audit(copy, out), None)

    def fail(*_: object) -> None:
        raise TypeError("two\nlines")

    monkeypatch.setattr(levels if command == "audit" else output, broken, fail)
    monkeypatch.setenv("MIREPRO_TRACEBACK", shown)
    words = [str(copy), "--level", "0", "-o", str(out)] if command == "audit" else [str(out)]
    monkeypatch.setattr(sys, "argv", ["mirepro", command, *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    *before, last = capsys.readouterr().err.splitlines()
    assert (ended.value.code, last) == (
        2, f"mirepro: {command}: unexpected TypeError: two lines; please report it"
    )  # fmt: skip
    assert any(line.startswith("Traceback") for line in before) == bool(shown)
    assert bool(before) == bool(shown)
