"""Tampers with copies of a result, one thing at a time, and shows that the audit catches each."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mirepro import diff, files, profiles
from mirepro.audit import integrity, levels, output, release, relock, source, statement
from mirepro.audit.levels import Options
from mirepro.errors import UserError

Findings = set[str]
Tampers = list[tuple[str, int, Callable[[Path], None]]]


@dataclass(frozen=True)
class Caught:
    """A tamper and what found it; empty if nothing did."""

    tamper: str
    by: str


@dataclass
class Bench:
    """Folders of a self-test.

    Attributes:
        work: Everything happens below it.
        base: A git checkout of the result, untouched.
        profile: The profile's name.
    """

    work: Path
    base: Path
    profile: str

    @property
    def keys(self) -> Path:
        """The private key of publisher and auditor alike."""
        return self.work / "key"

    def options(self, folder: Path, level: int) -> Options:
        """An audit of a folder with the publisher's key."""
        public = self.keys.with_name("key.pub")
        return Options(str(folder), self.work / "out", level, profile=self.profile, publisher_key=public)

    def findings(self, options: Options) -> Findings:
        """What an audit finds wrong, in words."""
        report = levels.audit(options, lambda line: None)
        found = {f"{c['name']}: {item}" for c in report["checks"] if c["status"] == integrity.FAIL
                 for item in c["items"] or [c["detail"]]}  # fmt: skip
        bad = ("DIVERGED", "MISSING", "FAILED")
        return found | {f"{c['table']}/{c['row']}/{c['column']}: {c['reason']}" for c in report["cells"]
                        if c["verdict"] in bad}  # fmt: skip

    def copy(self) -> Path:
        """A copy to tamper with."""
        folder = self.work / "tampered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base, folder, symlinks=True)
        return folder


def first(folder: Path, pattern: str) -> Path:
    """The first file of a pattern.

    Raises:
        UserError: There is none, so that the tamper cannot be tried.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder.name}/{pattern}: no such file; the self-test needs a complete result (runs, data)")
    return found[0]


def flip(path: Path) -> None:
    """Changes the lowest bit of a file's last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap(path: Path, pattern: str, new: "str | Callable[[re.Match[str]], str]") -> None:
    """Replaces the first match of a pattern.

    Raises:
        UserError: There is none, or what stands there is the replacement already.
    """
    before = path.read_text(encoding="utf-8")
    text = re.sub(pattern, new, before, count=1)
    if text == before:
        raise UserError(f"{path.name}: nothing like {pattern} to tamper with")
    path.write_text(text, encoding="utf-8")


def digit(match: "re.Match[str]") -> str:
    """Another hex digit."""
    return "0" if match[0] != "0" else "1"


def tampers(name: str) -> Tampers:
    """(what, level that must catch it, how) for the files of a result."""

    def metric(root: Path) -> None:
        path = first(root, f"metrics/{name}/evaluate/*.json")
        content = json.loads(path.read_text())
        column = next(c for c, entry in content["cells"].items() if entry["value"])
        content["cells"][column]["value"] *= 1.001
        files.write_json(path, content)

    def cell(root: Path) -> None:
        path = first(root, f"tables/{name}/T1.json")
        content = json.loads(path.read_text())
        entry = next(e for row in content["rows"] for e in row["cells"].values() if e["mean"])
        entry["mean"] += 0.1
        files.write_json(path, content)

    def manifest(root: Path) -> None:
        path = first(root, "data/*/manifest.json")
        swap(path, r'(?<="sha256": ")[0-9a-f]', digit)

    def lock(root: Path) -> None:
        path = profiles.load(root, name).path.with_name("dvc.lock")
        swap(path, r"(?<=md5: )[0-9a-f]", digit)

    def parameter(root: Path) -> None:
        values = profiles.load(root, name)
        swap(values.path, r"momentum: [0-9.]+", "momentum: 0.89")

    def code(root: Path) -> None:
        path = root / "mirepro" / "pretrain.py"
        path.write_text(path.read_text() + "\nSMUGGLED = 1\n")

    def page(root: Path) -> None:
        flip(first(root, f"reports/{name}/index.html"))

    def policy(root: Path) -> None:
        path = root / "audit.yaml"
        text = "schema: mirepro.audit-policy/1\nrules: [{test: band, margin: 50.0}]\n"
        path.write_text(text)

    def pickled(root: Path) -> None:
        first(root, f"runs/{name}/pretrain/*/*.safetensors").write_bytes(b"\x80\x04\x95" + b"\0" * 64)

    def link(root: Path) -> None:
        path = first(root, f"metrics/{name}/evaluate/*.json")
        path.unlink()
        path.symlink_to("/etc/hostname")

    def climb(root: Path) -> None:
        path = first(root, "data/*/manifest.json")
        path.write_text(re.sub(r'(?<="file": ")[^"]+', "../../../x.tar", path.read_text(), count=1))

    def image(root: Path) -> None:
        swap(root / integrity.IMAGES, r"(?<=sha256:)[0-9a-f]{8}", "01234567")

    def signature(root: Path) -> None:
        envelope = json.loads((root / release.FILE).read_text())
        envelope["signatures"][0]["sig"] = "A" + envelope["signatures"][0]["sig"][1:]
        files.write_json(root / release.FILE, envelope)

    return [
        ("a metric's value", 1, metric), ("a table's cell", 1, cell),
        ("one bit of a checkpoint", 0, lambda root: flip(first(root, f"runs/{name}/pretrain/*/encoder.safetensors"))),
        ("one bit of a data shard", 0, lambda root: flip(first(root, "data/*/shards/*.tar"))),
        ("a manifest's entry", 0, manifest), ("dvc.lock", 0, lock), ("a parameter", 0, parameter),
        ("code under a lock", 0, code), ("the report", 0, page), ("the policy, after the commit", 0, policy),
        ("a pickle in place of weights", 0, pickled), ("a link out of the folder", 0, link),
        ("a path out of the folder in a manifest", 0, climb), ("the publisher's signature", 0, signature),
        ("a container image's digest", 0, image),
    ]  # fmt: skip


def evidence_tampers(name: str) -> Tampers:
    """The same for the evidence of a training that was re-pinned after a change of its code."""

    def evidence(root: Path) -> tuple[Path, dict[str, Any]]:
        found = {path: files.read_json(path) for path in sorted((root / relock.FOLDER / name).glob("*.json"))}
        return next((path, content) for path, content in found.items() if content["digests"])

    def other(root: Path, stage: str) -> str:
        row = stage.rpartition("-")[0]
        known = [f"pretrain@{run}" for run in profiles.load(root, name).runs]
        return min((one for one in known if one != stage), key=lambda one: one.rpartition("-")[0] != row)

    def late(root: Path) -> None:
        path, content = evidence(root)
        files.write_json(path, content | {"modules": ["mirepro.harmless"]})

    def moved(root: Path) -> None:
        _, content = evidence(root)
        files.write_json(relock.path(root, name, other(root, content["stage"])), content)

    def renamed(root: Path) -> None:
        _, content = evidence(root)
        stage = other(root, content["stage"])
        files.write_json(relock.path(root, name, stage), content | {"stage": stage})

    def digest(root: Path) -> None:
        path, content = evidence(root)
        step, link = min(content["digests"].items(), key=lambda item: int(item[0]))
        content["digests"][step] = re.sub(r"[0-9a-f]$", digit, link)
        files.write_json(path, content)

    return [
        ("relock evidence, after the signing", 0, late), ("relock evidence of another stage", 0, moved),
        ("relock evidence of another stage, renamed throughout", 0, renamed),
        ("a digest of the first steps in relock evidence", 0, digest),
    ]  # fmt: skip


def forgery(root: Path, name: str) -> None:
    """A checkpoint replaced consistently: dvc.lock fits again, so that only a signature can tell."""
    path = first(root, f"runs/{name}/pretrain/*/encoder.safetensors")
    before = source.hashes(path).md5
    folder = str(path.parent.relative_to(root))
    listed = {str(p.relative_to(root)): source.hashes(p) for p in sorted(path.parent.iterdir())}
    old = source.folder_md5(listed, folder)
    flip(path)
    listed[str(path.relative_to(root))] = source.hashes(path)
    lock = profiles.load(root, name).path.with_name("dvc.lock")
    new = source.folder_md5(listed, folder)
    lock.write_text(lock.read_text().replace(str(old), str(new)).replace(before, source.hashes(path).md5))


def run(what: Path, profile: str, work: Path) -> list[Caught]:
    """Tries every tamper on copies of a folder; each must add a finding to those of the untouched result.

    Raises:
        UserError: The result is incomplete.
    """
    bench = prepare(what, profile, work)
    before = {level: bench.findings(bench.options(bench.base, level)) for level in (0, 1)}
    result = []
    for words, level, tamper in [*tampers(profile), *evidence_tampers(profile)]:
        folder = bench.copy()
        tamper(folder)
        result.append(Caught(words, _found(bench, folder, level, before[level])))
    folder = bench.copy()
    forgery(folder, profile)
    result.append(Caught("a checkpoint and dvc.lock, consistently", _found(bench, folder, 0, before[0])))
    return result + _reports(bench)


def prepare(what: Path, profile: str, work: Path) -> Bench:
    """The untouched result that copies are made of: a signed, committed copy with something for every tamper.

    Raises:
        UserError: The result is incomplete.
    """
    bench = Bench(work, work / "base", profile)
    bench.base.mkdir(parents=True)
    source.take(str(what), bench.base)
    statement.new_keys(bench.keys)
    (bench.base / release.FILE).unlink(missing_ok=True)
    _name_image(bench.base)
    _repin(bench.base, profile)
    sign(bench, bench.base)
    _commit(bench.base)
    return bench


def _repin(folder: Path, name: str) -> None:
    """Made-up evidence, which fits, that one training was re-pinned, so that its tampers can be tried."""
    pattern = f"runs/{name}/pretrain/*/chain.txt"
    chain = max([first(folder, pattern), *folder.glob(pattern)])  # not the first, whose checkpoint `forgery` replaces
    stage = f"pretrain@{chain.parent.name}"
    links = {str(link["step"]): link["chain"] for link in diff.read(chain)}
    entry = relock.stages_of(profiles.load(folder, name))[stage]
    after = {one["path"]: one["md5"] for one in entry["deps"] if one["path"].startswith("locks/")}
    outputs = {one["path"].partition("/")[0]: one["md5"] for one in entry["outs"]}
    steps = max(int(step) for step in links)
    evidence = relock.Evidence(relock.SCHEMA, stage, {}, after, (), steps, steps, links,
                               outputs["runs"], outputs["metrics"], {})  # fmt: skip
    files.write_json(relock.path(folder, name, stage), asdict(evidence))


def _name_image(folder: Path) -> None:
    """A made-up lock of images where the result has none, so that its tamper can be tried."""
    path = folder / integrity.IMAGES
    if not path.exists():
        files.write_text(path, f"images: {{cpu: {{digest: 'sha256:{'5' * 64}'}}}}\nfiles: {{}}\n")


def sign(bench: Bench, folder: Path) -> None:
    """Signs a result as its publisher would."""
    audited = integrity.open_copy(folder, bench.profile)
    integrity.receipts(folder, audited.profile)
    audited = replace(audited, found=source.inventory(folder))
    files.write_json(folder / release.FILE, release.make(audited, bench.keys))


def _commit(folder: Path) -> None:
    (folder / ".gitignore").write_text("/runs/\n/data/*/shards/\n")
    source.git("init", "-q", folder=folder)
    source.git("add", "-A", folder=folder)
    who = ["-c", "user.name=selftest", "-c", "user.email=selftest@localhost"]
    source.git(*who, "commit", "-q", "-m", "result", folder=folder)


def _found(bench: Bench, folder: Path, level: int, before: Findings) -> str:
    """The first new finding other than the publisher's signature, else that one; a refusal counts too."""
    try:
        fresh = sorted(bench.findings(bench.options(folder, level)) - before, key=lambda w: (w.startswith("sign"), w))
    except UserError as error:
        return f"refused: {str(error).replace(str(bench.work), '').strip('/')}"
    return fresh[0] if fresh else ""


def _reports(bench: Bench) -> list[Caught]:
    """Tampers with a finished, signed audit."""
    out = bench.work / "audit"
    report = levels.audit(replace(bench.options(bench.base, 1), out=out), lambda line: None)
    output.write(out, report, bench.keys)
    public = bench.keys.with_name("key.pub")
    if output.verify(out, public)[0]:
        raise UserError("self-test: an untouched report is not verified")
    stranger = bench.work / "stranger"
    statement.new_keys(stranger)

    def verdict(folder: Path) -> None:
        swap(folder / output.REPORT, r'"verdict": "EXACT"', '"verdict": "DIVERGED"')

    def resigned(folder: Path) -> None:
        output.write(folder, json.loads((folder / output.REPORT).read_text()), stranger)

    def lying(folder: Path) -> None:
        content = json.loads((folder / output.REPORT).read_text())
        _lie(content)
        output.write(folder, content, bench.keys)

    def envelope(folder: Path) -> None:
        swap(folder / output.ENVELOPE, r'(?<="sig": ").', lambda match: "B" if match[0] == "A" else "A")

    result = []
    for words, tamper in (
        ("the audit's report.json", verdict), ("the audit's page", lambda f: flip(f / output.PAGE)),
        ("the audit, signed by a stranger", resigned), ("the audit's signature", envelope),
        ("a verdict that its inputs do not give, signed by the auditor", lying),
    ):  # fmt: skip
        folder = bench.work / "report"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(out, folder)
        tamper(folder)
        result.append(Caught(words, _refuted(folder, public)))
    return result


def _lie(content: dict[str, Any]) -> None:
    """A cell's evidence says that the bytes differ, its verdict that they agree."""
    content["cells"][0]["inputs"]["evidence"]["identical"] = False


def _refuted(folder: Path, public: Path) -> str:
    try:
        code, lines = output.verify(folder, public)
    except UserError as error:
        return f"refused: {error}"
    return next((line for line in lines if line.startswith("WRONG")), "") if code else ""


def conduct(what: Path, profile: str) -> int:
    """Runs the self-test in a temporary folder and prints the list; 0 if everything was caught, else 1."""
    with tempfile.TemporaryDirectory(prefix="mirepro-selftest-") as work:
        result = run(what, profile, Path(work))
    for item in result:
        print(f"{'caught' if item.by else 'MISSED'}  {item.tamper}: {item.by[:160] or 'nothing noticed it'}")
    missed = sum(not item.by for item in result)
    print(f"{len(result) - missed} of {len(result)} tampers were caught")
    return 1 if missed else 0
