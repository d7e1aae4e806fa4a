"""Re-pinning of trainings: a small project under DVC, whose code is changed with and without effect."""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from audited import IMAGES, Project, commit, parameters

from mirepro import files, profiles
from mirepro.audit import integrity, levels, output, release, relock, statement
from mirepro.audit.levels import Options
from mirepro.data import desk, shards
from mirepro.errors import UserError

NAME = "pretrain@ball-s0"
EVIDENCE = f"relocks/desk/{NAME}.json"


class Trained:
    """A checkout whose trainings `ball-s0` and `random-s0` DVC has run."""

    def __init__(self, source: Path, root: Path) -> None:
        self.root = root
        shutil.copytree(source / "mirepro", root / "mirepro", ignore=shutil.ignore_patterns("__pycache__"))
        for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", "dvc.yaml"):
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, root / name)
        values = parameters(source)
        values["datasets"], values["tables"] = ["small"], {"T1": {"rows": {"ball": ["ball-s0"]}}}
        values["rows"]["random"] = {"objective": "random", "pretrain": {"epochs": 0}}
        values["runs"] = {f"{row}-s0": {"row": row, "objective": row, "seed": 0} for row in ("ball", "random")}
        for key in ("pretrain", "evaluate"):
            values[key]["data"] = "small"
        values["pretrain"]["epochs"] = 3
        (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        splits = {split: itertools.islice(desk.split(split), count) for split, count in IMAGES.items()}
        shards.write(root / "data" / "small", "small", splits, desk.META)
        command = root / "bin" / "mirepro"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mirepro "$@"\n')
        command.chmod(0o755)
        commit(root)
        self.dvc("repro", NAME, "pretrain@random-s0")
        commit(root)

    def call(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python -m module arguments` in the checkout with its own package."""
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PYTHONPATH": str(self.root), "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=self.root, env=environment, text=True, capture_output=True, check=False)

    def dvc(self, *arguments: str) -> str:
        """DVC's output."""
        done = self.call("mirepro.launch.dvc", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stale(self) -> set[str]:
        """Trainings that `mirepro status` calls stale."""
        lines = self.call("mirepro", "status").stdout.splitlines()
        return {line.partition(": ")[0] for line in lines if line.startswith("pretrain@")}

    def replace(self, name: str, old: str, new: str) -> None:
        """Edits a file."""
        text = (self.root / name).read_text()
        assert old in text
        (self.root / name).write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(root, tmp_path_factory.mktemp("trained") / "checkout")


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Trained:
    """A checkout of its own, with the same results."""
    twin = object.__new__(Trained)
    twin.root = tmp_path / "checkout"
    shutil.copytree(trained.root, twin.root, symlinks=True)
    return twin


def refactor(copy: Trained) -> None:
    """Another text for the same computation."""
    copy.replace("mirepro/settings.py", "return optim.lr * (progress / optim.warmup)",
                 "share = progress / optim.warmup\n        return optim.lr * share")  # fmt: skip


@pytest.mark.slow
def test_equal_code_is_pinned(copy: Trained) -> None:
    """A refactored loop makes trainings stale; re-pinned, their results are as they were and nothing is stale."""
    before = yaml.safe_load((copy.root / "dvc.lock").read_text())["stages"]
    refactor(copy)
    assert copy.stale() == {NAME, "pretrain@random-s0"}
    done = copy.call("mirepro", "relock", "pretrain@*", "--steps", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the first 8 of 18 steps" in done.stdout
    assert copy.stale() == set()
    assert f"Stage '{NAME}' didn't change" in copy.dvc("repro", NAME)
    after = yaml.safe_load((copy.root / "dvc.lock").read_text())["stages"]
    for part in ("cmd", "params", "outs"):
        assert before[NAME].get(part) == after[NAME].get(part)
    changed = [a["path"] for a, b in zip(before[NAME]["deps"], after[NAME]["deps"], strict=True) if a != b]
    assert changed == ["locks/desk/pretrain.json"]
    evidence = files.read_json(copy.root / EVIDENCE)
    assert (evidence["steps"], evidence["total"], list(evidence["digests"])) == (8, 18, ["2", "4", "6", "8"])
    assert evidence["modules"] == ["mirepro.settings"]
    assert evidence["before"]["locks/desk/pretrain.json"] != evidence["after"]["locks/desk/pretrain.json"]
    assert files.read_json(copy.root / "relocks/desk/pretrain@random-s0.json")["total"] == 0
    assert "nothing to do" in copy.call("mirepro", "relock", NAME).stdout


CHANGES: dict[str, tuple[str, str, str, str]] = {
    "another rate": ("mirepro/settings.py", "return optim.lr * 0.5 * (1 +", "return optim.lr * 0.51 * (1 +",
                     "first difference at step 2"),
    "another metric": ("mirepro/pretrain.py", "encoders.count(self.model)", "encoders.count(self.model) + 1",
                       "the metrics come out differently"),
    "another history": ("mirepro/pretrain.py", '"knn1_val": self.monitor.get("1-NN")', '"knn1_val": None',
                        "the recorded history of an epoch differs"),
    "another file": ("mirepro/pretrain.py", "bank.whole().cpu().contiguous()", "(2 * bank.whole()).cpu().contiguous()",
                     "bank.safetensors comes out differently"),
    "another parameter": ("params.yaml", "momentum: 0.9", "momentum: 0.8", "more than code has changed"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES)
def test_changed_results_are_refused(copy: Trained, case: str) -> None:
    """Whatever would compute something else keeps its old pin and stays stale, and nothing is written."""
    name, old, new, words = CHANGES[case]
    lock = (copy.root / "dvc.lock").read_bytes()
    copy.replace(name, old, new)
    done = copy.call("mirepro", "relock", NAME, "--steps", "6")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{NAME}: refused: " in done.stdout
    assert words in done.stdout
    assert (copy.root / "dvc.lock").read_bytes() == lock
    assert not (copy.root / EVIDENCE).exists()
    assert NAME in copy.stale()


@pytest.mark.parametrize(
    ("pattern", "steps", "words"),
    [("evaluate@*", 7, "names no training"), ("pretrain@x", 7, "names no training"), (NAME, 0, "use 1 or more")],
)
def test_mistakes(project: Project, pattern: str, steps: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        relock.relock(project.profile, [pattern], steps)


@pytest.fixture
def pinned(project: Project, tmp_path: Path) -> Project:
    """A published result with evidence of a re-pinned training, all of it fitting."""
    made = object.__new__(Project)
    made.root, made.real = tmp_path / "copy", False
    shutil.copytree(project.root, made.root, symlinks=True)
    made.profile = profiles.load(made.root, "desk")
    entry = relock.stages_of(made.profile)[NAME]
    after = {one["path"]: one["md5"] for one in entry["deps"]}
    outputs, metrics = (one["md5"] for one in entry["outs"])
    shown = {"2": "22222222", "4": "44444444"}
    evidence = relock.Evidence(relock.SCHEMA, NAME, {}, after, (), 4, 6, shown, outputs, metrics, {})
    files.write_json(made.root / EVIDENCE, asdict(evidence))
    commit(made.root)
    return made


def audit(copy: Path) -> integrity.Check:
    """The audit's word on evidence."""
    report = levels.audit(Options(str(copy), copy.parent / "out", 0), lambda line: None)
    output.write(copy.parent / "out", report, None)
    (found,) = (check for check in report["checks"] if check["name"] == "relocks")
    return integrity.Check(**found)


def test_audits_and_releases_hold_the_evidence(pinned: Project, project: Project) -> None:
    """The audit names what was re-pinned; the release signs it; one of other code is refused by both."""
    assert "no training was re-pinned" in audit(Path(shutil.copytree(project.root, pinned.root.parent / "bare"))).detail
    found = audit(pinned.root)
    assert found.status == "pass"
    assert "1 trainings were re-pinned" in found.detail
    assert found.items == [f"{NAME}: the first 4 of 6 steps, outputs and metrics are the recorded ones"]
    key, out = pinned.root.parent / "key", pinned.root.parent / "release"
    statement.new_keys(key)
    release.publish(pinned.root, "desk", key, out)
    _, inner = statement.read(out / release.FILE)
    assert EVIDENCE in {item["name"] for item in inner["subject"]}
    change(pinned.root, "after", {"locks/desk/pretrain.json": "0" * 32})
    commit(pinned.root)
    with pytest.raises(UserError, match="relocks: evidence"):
        release.publish(pinned.root, "desk", key, pinned.root.parent / "again")


def change(copy: Path, field: str, value: object) -> None:
    """Writes another value into the evidence."""
    content = files.read_json(copy / EVIDENCE)
    files.write_json(copy / EVIDENCE, content | {field: value})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("after", {"locks/desk/pretrain.json": "0" * 32}, "delete it if the stage was trained again"),
        ("outputs", "0" * 32, "other outputs"),
        ("metrics", "0" * 32, "other outputs"),
        ("digests", {"2": "22222222", "4": "44444445"}, "digests"),
        ("digests", {"2": "22222222"}, "digests"),
        ("digests", {}, "digests"),
        ("steps", 6, "digests"),
        ("steps", "many", "steps"),
        ("stage", "pretrain@ball-s1", "not the evidence"),
        ("schema", "x", "not the evidence"),
        ("signed", True, "unknown key"),
    ],
)
def test_evidence_that_does_not_fit(pinned: Project, field: str, value: object, words: str) -> None:
    change(pinned.root, field, value)
    found = audit(pinned.root)
    assert found.status == "fail"
    assert words in found.items[0]


def test_a_damaged_chain(pinned: Project) -> None:
    """Hostile digests are one line."""
    pinned.write("runs/desk/pretrain/ball-s0/chain.txt", '{"step": "x", "chain": [], "tensors": 3}\n')
    pinned.lock()
    outputs = [one["md5"] for one in relock.stages_of(pinned.profile)[NAME]["outs"]]
    change(pinned.root, "outputs", outputs[0])
    assert "damaged" in audit(pinned.root).items[0]
