"""Level 0: does what was published fit together? Locks, digests, data manifests, code, tables, policy, signature."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirepro import codelocks, files, profiles
from mirepro.audit import images, safe, source
from mirepro.audit.source import Hashes
from mirepro.errors import UserError
from mirepro.profiles import Profile
from mirepro.report import metrics, tables

PASS, FAIL, UNKNOWN = "pass", "fail", "not checked"
SHOWN = 20
IMAGES = images.LOCK
IMAGE = re.compile(r"sha256:[0-9a-f]{64}")
SAMPLED_KINDS = {"pretrain": "runs", "evaluate": "runs", "detect": "detect_runs"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: pass, fail or not checked; `items` name what is wrong."""

    name: str
    status: str
    detail: str
    items: list[str] = field(default_factory=list)


def verdict(name: str, wrong: Iterable[str], good: str, bad: str) -> Check:
    """A check that fails when anything is wrong."""
    items = list(wrong)
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return Check(name, FAIL if items else PASS, bad if items else good, items[:SHOWN] + more)


@dataclass
class Audited:
    """What is audited: the copy, its files' digests, its profile and its lock, all read with care.

    Attributes:
        copy: The throw-away copy.
        found: Digests of its files.
        profile: The profile under audit.
        lock: The stages of its dvc.lock.
    """

    copy: Path
    found: dict[str, Hashes]
    profile: Profile
    lock: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The profile's name."""
        return self.profile.name

    def md5(self, path: str) -> str | None:
        """The digest, as DVC writes it, of a file or folder; None where there is none."""
        return self.found[path].md5 if path in self.found else source.folder_md5(self.found, path)

    def outputs(self) -> dict[str, str]:
        """`{path: md5}` of every output in the lock."""
        return {one["path"]: one["md5"] for stage in self.lock.values() for one in stage.get("outs") or []}


def open_copy(copy: Path, name: str) -> Audited:
    """Reads profile and lock of a copy.

    Raises:
        UserError: A file is missing, hostile or malformed, or the parameters contradict each other.
    """
    root = safe.read_yaml(copy / "params.yaml")
    folder = copy if root.get("profile") == name else copy / "profiles" / safe.inside(name, "--profile")
    values = safe.read_yaml(folder / "params.yaml")
    if values.get("root") not in (".", "../.."):
        raise UserError(f"{folder / 'params.yaml'}: root: {values.get('root')!r} is refused; it leaves the folder")
    profile = profiles.load(copy, name)
    for place, data in enumerate(_strings(values["datasets"], "datasets")):
        safe.inside(data, f"datasets[{place}]")
    for item in [*profile.runs, *profile.detect_runs, *(row.objective for row in profile.rows.values())]:
        safe.inside(item, "params.yaml")
    profile.check()
    lock = folder / "dvc.lock"
    return Audited(copy, source.inventory(copy), profile, _stages(safe.read_yaml(lock), lock))


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: expected a list of names")
    return value


def _stages(content: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The lock's stages in a checked form."""
    stages = content.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise UserError(f"{path}: no stages; it is not DVC's lock")
    for name, stage in stages.items():
        where = f"{path}: {name}"
        recorded = stage.get("params") or {}
        if not isinstance(recorded, dict) or not all(isinstance(values or {}, dict) for values in recorded.values()):
            raise UserError(f"{where}: params: refused; expected values by file and key")
        if any(not isinstance(key, str) for values in recorded.values() for key in values or {}):
            raise UserError(f"{where}: params: refused; a key is no text")
        for kind in ("deps", "outs"):
            _entries(stage.get(kind) or [], f"{where}: {kind}")
    return stages


def _entries(listed: Any, where: str) -> None:
    """Checks the form of a stage's inputs or outputs."""
    if not isinstance(listed, list):
        raise UserError(f"{where}: refused; expected a list")
    for one in listed:
        if not isinstance(one, dict) or not isinstance(one.get("md5"), str):
            raise UserError(f"{where}: refused; an entry without path and md5")
        safe.inside(one.get("path"), where)
        source.digest(one["md5"].removesuffix(".dir"))


def checks(audited: Audited, own: Path, original_locks: Mapping[str, bytes]) -> list[Check]:
    """All checks that need no computation; see each function.

    Args:
        audited: What is audited; its locks are made anew by this.
        own: The root of the judge's installation.
        original_locks: The committed code locks, `{path: content}`.
    """
    return [
        stages_complete(audited), parameters_current(audited), digests(audited, "deps"), digests(audited, "outs"),
        code_current(audited, original_locks), pipeline_text(audited, own), data_intact(audited),
        metrics_readable(audited), tables_readable(audited), results_only(audited), images_current(audited),
    ]  # fmt: skip


def expected(profile: Profile) -> dict[str, str]:
    """`{stage: command}` of a profile, as its dvc.yaml resolves."""
    names = {"controls": None, "toy": None, "tables": None, "report": None}
    keyed = {f"data@{name}": name for name in profile.values["datasets"]}
    for kind, key in SAMPLED_KINDS.items():
        keyed |= {f"{kind}@{name}": name for name in getattr(profile, key)}
    plain = {kind: f"mirepro stage {kind} --profile {profile.name}" for kind in names}
    return plain | {
        stage: f"mirepro stage {stage.partition('@')[0]} {name} --profile {profile.name}"
        for stage, name in keyed.items()
    }


def stages_complete(audited: Audited) -> Check:
    """Every stage of the profile is in the lock with the command that the judge would run."""
    wanted = expected(audited.profile)
    wrong = [f"{stage}: never run" for stage in wanted if stage not in audited.lock]
    wrong += [f"{stage}: unknown stage" for stage in audited.lock if stage not in wanted and stage != "code"]
    for stage in wanted.keys() & audited.lock.keys():
        if audited.lock[stage].get("cmd") != wanted[stage]:
            wrong.append(f"{stage}: another command was run: {str(audited.lock[stage].get('cmd'))[:80]}")
    return verdict("stages", sorted(wrong), f"all {len(wanted)} stages were run", "dvc.lock is not of this pipeline")


def parameters_current(audited: Audited) -> Check:
    """The parameters recorded for each stage are those of params.yaml."""
    wrong = []
    for stage, content in audited.lock.items():
        for values in (content.get("params") or {}).values():
            for key, value in (values or {}).items():
                if _lookup(audited.profile.values, key) != value:
                    wrong.append(f"{stage}: {key} was {str(value)[:60]}")
    return verdict("parameters", wrong, "params.yaml is what the stages ran with", "params.yaml was changed afterwards")


def _lookup(values: Any, key: str) -> Any:
    """A dotted key; None where it does not exist. Keys may hold dots themselves."""
    if isinstance(values, Mapping):
        if key in values:
            return values[key]
        for place in (i for i, letter in enumerate(key) if letter == "."):
            if key[:place] in values:
                return _lookup(values[key[:place]], key[place + 1 :])
    return None


def digests(audited: Audited, kind: str) -> Check:
    """Inputs or outputs of every stage have the recorded md5; sha256 of all of them goes into the report.

    A folder of which some recorded outputs are not there is not there either; what is there of it is looked at alone.
    """
    wrong, absent, count = [], [], 0
    missing = [path for path in audited.outputs() if audited.md5(path) is None]
    for stage, content in audited.lock.items():
        for one in content.get(kind) or []:
            partial = any(path.startswith(f"{one['path']}/") for path in missing)
            actual = None if partial else audited.md5(one["path"])
            count += actual is not None
            if actual is None:
                absent.append(f"{stage}: {one['path']} is not there")
            elif actual != one["md5"]:
                wrong.append(f"{stage}: {one['path']} was changed")
    name = "inputs" if kind == "deps" else "outputs"
    result = verdict(name, wrong, f"{count} {name} have the recorded digests", f"{name} differ from dvc.lock")
    if result.status == PASS and absent:
        return Check(name, UNKNOWN, f"{count} {name} fit; {len(absent)} are not there (--remote)", absent[:SHOWN])
    return result


def locks(copy: Path, profile: str) -> dict[str, bytes]:
    """The code locks of a copy, `{path: content}`."""
    folder = copy / "locks" / profile
    paths = safe.walk(folder) if folder.is_dir() else ()
    return {str(path.relative_to(copy)): safe.regular(path, safe.JSON_BYTES) for path in paths}


def code_current(audited: Audited, original: Mapping[str, bytes]) -> Check:
    """The locks, made anew from the audited source code, are the committed ones."""
    objectives = sorted({run.objective for run in audited.profile.runs.values()})
    try:
        codelocks.write(audited.copy, audited.name, objectives)
    except (UserError, RecursionError, MemoryError) as error:
        return Check("code", FAIL, "the code cannot be read", [str(error) or "nested too deep"])
    made = locks(audited.copy, audited.name)
    wrong = [
        f"{path}: {module}" for path in sorted(made.keys() | original.keys())
        for module in _differing(original.get(path), made.get(path), path)
    ]  # fmt: skip
    return verdict("code", wrong, f"{len(made)} code locks were made anew and agree", "code under a lock was changed")


def _differing(old: bytes | None, new: bytes | None, name: str) -> Iterator[str]:
    """Modules whose hash differs between two locks."""
    if old == new:
        return
    a, b = (safe.parse_json(text, name) if text else {} for text in (old, new))
    both = isinstance(a, dict) and isinstance(b, dict)
    names = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)) if both else []
    yield from names or ["not in canonical form"]


def same_code(copy: Path, own: Path, profile: Profile) -> dict[str, bool]:
    """For each lock of the copy whether the judge's own code has the same hashes; files beside the code apart."""
    mine = codelocks.Sources(own)
    objectives = {f"objectives/{run.objective}" for run in profile.runs.values()}
    result = {}
    for name in [*codelocks.ENTRIES, *objectives]:
        theirs = safe.read_json(copy / "locks" / profile.name / f"{name}.json")
        beside = {pattern.format(profile=profile.name) for pattern in codelocks.TEXTS.get(name, ())}
        code = {module: value for module, value in theirs.items() if module not in beside}
        here = name in codelocks.ENTRIES or mine.path(f"mirepro.{name.replace('/', '.')}") is not None
        wanted = codelocks.stage_lock(mine, name) if here else None
        result[name] = wanted in (code, theirs)
    return result


def pipeline_text(audited: Audited, own: Path) -> Check:
    """The audited dvc.yaml is the judge's; its commands are never run, whatever they say."""
    theirs = audited.profile.path.with_name("dvc.yaml")
    if theirs.is_file() and theirs.read_bytes() == (own / "dvc.yaml").read_bytes():
        return Check("pipeline", PASS, "dvc.yaml is the judge's own")
    return Check("pipeline", FAIL, "dvc.yaml is missing or differs from the judge's; its commands were not run")


def data_intact(audited: Audited) -> Check:
    """Shards have the sha256 of their manifest."""
    wrong, absent, count = [], [], 0
    for name in audited.profile.values["datasets"]:
        for path, sha256 in shards(audited.copy, name):
            if path not in audited.found:
                absent.append(path)
            elif audited.found[path].sha256 != sha256:
                wrong.append(f"{path}: another sha256")
            count += path in audited.found
    if absent and not wrong:
        detail = f"{len(absent)} shards are not there; rendered data are made anew"
        return Check("data", UNKNOWN, detail, absent[:SHOWN])
    return verdict("data", wrong, f"{count} shards fit their manifests", "data differ from their manifests")


def shards(copy: Path, name: str) -> list[tuple[str, str]]:
    """(path, sha256) of a data set's shards.

    Raises:
        UserError: The manifest is missing, malformed, or names a path elsewhere.
    """
    manifest = copy / "data" / name / "manifest.json"
    content = safe.read_json(manifest)
    try:
        listed = [shard for part in content["splits"].values() for shard in part["shards"]]
        named = [(shard["file"], shard["sha256"]) for shard in listed]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: not a manifest ({error!r})") from error
    for file, _ in named:
        if "/" in safe.inside(file, str(manifest)):
            raise UserError(f"{manifest}: {file!r} is refused; a shard is a plain file name")
    return [(f"data/{name}/shards/{file}", sha256) for file, sha256 in named]


def metrics_readable(audited: Audited) -> Check:
    """Metrics files are strict JSON of the known schema."""
    wrong = []
    names = [name for name in audited.found if name.startswith(f"metrics/{audited.name}/")]
    for name in names:
        try:
            content = safe.read_json(audited.copy / name)
            if not isinstance(content, dict) or content.get("schema", metrics.SCHEMA) != metrics.SCHEMA:
                wrong.append(f"{name}: another schema")
        except UserError as error:
            wrong.append(str(error))
    wrong += [] if names else [f"metrics/{audited.name}: no file"]
    return verdict("metrics", wrong, f"{len(names)} metrics files are well formed", "metrics files are malformed")


def tables_readable(audited: Audited) -> Check:
    """Tables have the documented form."""
    wrong = []
    names = sorted(audited.copy.glob(f"tables/{audited.name}/T*.json"))
    for path in names:
        try:
            tables.check(safe.read_json(path))
        except UserError as error:
            wrong.append(str(error))
    wrong += [] if names else [f"tables/{audited.name}: no table"]
    return verdict("tables", wrong, f"{len(names)} tables are well formed", "tables are malformed")


def results_only(audited: Audited) -> Check:
    """Outputs are of kinds that cannot hold code; pickles are refused unseen."""
    wrong = []
    for name in audited.found:
        if name.startswith(("runs/", "metrics/", "tables/", "reports/")):
            try:
                safe.harmless(audited.copy / name)
            except UserError as error:
                wrong.append(str(error).replace(f"{audited.copy}/", ""))
    return verdict("kinds of files", wrong, "no output can hold code", "outputs that could hold code")


def images_current(audited: Audited) -> Check:
    """The lock of the container images names digests, and was written for these very files."""
    if IMAGES not in audited.found:
        return Check("images", PASS, "no container image is named")
    content = safe.read_yaml(audited.copy / IMAGES)
    named, built = content.get("images"), content.get("files")
    if not isinstance(named, dict) or not isinstance(built, dict) or not named:
        return Check("images", FAIL, f"{IMAGES} is malformed")
    digests = {name: image.get("digest") if isinstance(image, dict) else None for name, image in named.items()}
    wrong = [f"{name}: no digest" for name, text in digests.items() if not IMAGE.fullmatch(str(text))]
    here = {name: audited.found[name].sha256 for name in built if name in audited.found}
    wrong += [f"{name}: the images were built with another one" for name in built if here.get(name) != built[name]]
    return verdict("images", wrong, f"{len(named)} images were built with these files", "images of something else")


def receipts(copy: Path, profile: Profile) -> None:
    """Writes the receipts of the data sets, which git does not hold and which follow from the manifests."""
    for name in profile.values["datasets"]:
        path = copy / "runs" / profile.name / "data" / f"{name}.json"
        manifest = copy / "data" / name / "manifest.json"
        if not path.exists() and manifest.is_file():
            files.write_json(path, {"data": name, "manifest": files.sha256(manifest)})
