"""DVC with writes that survive a kill, and the repair of what plain DVC leaves when it is killed while writing.

DVC truncates dvc.lock and then takes up to a second to fill it, once for every finished stage.
`python -m mirepro.launch.dvc ARGUMENTS` is `dvc ARGUMENTS` with temporary file and rename instead. It also parses each
YAML text once, and writes anew only the entries of dvc.lock that changed; the bytes are those of plain DVC.
"""

import fnmatch
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil  # comes with DVC
import yaml

from mirepro import files
from mirepro.launch.parsed import Parsed

HEAD = re.compile(r"^(?=  [^ ].*:$)", re.MULTILINE)  # before the line with a stage's name
COMMAND = re.compile(r"mirepro stage (?P<kind>\S+)(?: (?P<key>[^-\s]\S*))? --profile (?P<profile>\S+)")
LEFTOVER = f".{'?' * 22}.tmp"  # the copy that DVC was making when it was killed or the disk was full
KEPT = Path(".mirepro/parsed")
DVCS = ("dvc", __name__, "mirepro.launch.collector")  # words in the command line of a process that is DVC
RESULTS = ("metrics", "runs", "tables", "reports")  # folders into which DVC copies


def main() -> None:
    """DVC's command line."""
    with prepared() as dvc:
        sys.exit(dvc(sys.argv[1:]))


@contextmanager
def prepared() -> Iterator[Callable[[Sequence[str]], int]]:
    """DVC's command line as a function, safe and quick.

    This process gives way to jobs that compute, since a result can wait until it is collected.
    """
    os.nice(10)
    logging.raiseExceptions = False  # a log that a full disk does not take needs no traceback: the command says so
    from dvc.cli import main as dvc

    make_atomic()
    parsed = parser(Path.cwd())
    with parsing(parsed):
        make_quick(parsed)
        yield dvc


def make_atomic() -> None:
    """Lets DVC, in this process, replace its YAML files as a whole."""
    from dvc.utils.serialize import _common

    def dump(path: str, data: Any, dumper: Callable[..., Any], fs: object = None, **options: Any) -> None:
        text = io.StringIO()
        dumper(data, text, **options)
        files.write_text(path, text.getvalue())

    _common._dump_data = dump


def parser(root: Path) -> Parsed:
    """DVC's parser of YAML, but one that remembers.

    Args:
        root: The repository's root, which keeps long texts parsed.
    """
    from dvc.utils.serialize import _yaml

    folder = (root / KEPT).absolute()
    return Parsed(_yaml.parse_yaml, folder if folder.parent.is_dir() else None)


@contextmanager
def parsing(parsed: Parsed) -> Iterator[None]:
    """Lets DVC, in this process, parse each text once: it reads params.yaml for every stage, ten times to run one."""
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml

    def parse_once(text: str, path: str, typ: str = "safe") -> Any:
        return parsed(text, path) if typ == "safe" else parsed.parse(text, path, typ)

    _yaml.parse_yaml = strictyaml.parse_yaml = parse_once
    try:
        yield
    finally:
        _yaml.parse_yaml = strictyaml.parse_yaml = parsed.parse


def make_quick(parsed: Parsed) -> None:
    """Spares DVC, in this process, most of its writing of dvc.lock, commands that only collect, and long waits."""
    from dvc import dvcfile, lock
    from dvc.stage import run
    from dvc.utils.serialize import _yaml
    from tqdm import tqdm

    plain = dvcfile.modify_yaml

    @contextmanager
    def modify(path: str, fs: Any = None) -> Iterator[Any]:
        text = Path(path).read_text(encoding="utf-8") if Path(path).name == "dvc.lock" and Path(path).exists() else ""
        before = parsed(text, path) if text else {}
        if list(before) != ["schema", "stages"] or len(entries(text)) != len(before["stages"]):
            with plain(path, fs=fs) as data:
                yield data
            return
        data = parsed(text, path)
        yield data
        text = spliced(text, before["stages"], data, _yaml.dumps_yaml)
        files.write_text(path, text)
        entry_of = data["stages"] | {
            name: parsed.parse(_yaml.dumps_yaml({"stages": {name: entry}}), path)["stages"][name]
            for name, entry in data["stages"].items()
            if before["stages"].get(name) != entry
        }
        parsed.learn(text, path, before | {"stages": entry_of})

    lock.DEFAULT_TIMEOUT = 0.3  # a twentieth of a second between looks at the repository's lock instead of a half
    dvcfile.modify_yaml = modify
    run._run = collecting(run._run)
    tqdm.monitor_interval = 0  # no thread beside the one that forks


def collecting(plain: Callable[..., None]) -> Callable[..., None]:
    """DVC's way to run a command, except that a result that waits is collected by a fork of this process.

    The fork has its modules already, while the command takes a third of a second to start. Where it collects nothing,
    for whatever reason, the command runs.
    """
    from mirepro import stages

    def run(executable: str | None, cmd: str, **options: Any) -> None:
        words = COMMAND.fullmatch(cmd)
        if words is None or words["kind"] not in stages.JOBS or not _collected(words, options["cwd"], options["env"]):
            plain(executable, cmd, **options)

    return run


def _collected(words: re.Match[str], folder: str, environment: Mapping[str, str]) -> bool:
    """Whether a fork has collected a stage's result; Ctrl-C waits for its end, some milliseconds."""
    import numpy  # noqa: F401  # here once, instead of in every fork

    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        child = os.fork()
        if child == 0:
            _collect(words, folder, environment)
        return os.waitpid(child, 0)[1] == 0
    except OSError as error:
        print(f"mirepro: no fork to collect in ({error.strerror})", file=sys.stderr)
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _collect(words: re.Match[str], folder: str, environment: Mapping[str, str]) -> NoReturn:
    """Body of the fork, which never returns to DVC's code."""
    code = 1
    try:
        from mirepro import profiles, stages

        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = 0 if stages.collect(profiles.find_root(), words["profile"], words["kind"], words["key"]) else 1
    except Exception as error:
        print(f"mirepro: not collected by a fork: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def spliced(text: str, before: Mapping[str, Any], data: Mapping[str, Any], dumps: Callable[[Any], str]) -> str:
    """The text of a dvc.lock with only its changed entries written anew.

    Args:
        text: Of the lock.
        before: Its entries.
        data: The new content; an entry keeps its place, a new one comes last.
        dumps: Writes a lock.
    """
    old = dict(zip(before, entries(text).values(), strict=True))
    head = HEAD.split(text)[0]
    fresh = {
        name: old[name] if before.get(name) == entry else HEAD.split(dumps({"stages": {name: entry}}))[1]
        for name, entry in data["stages"].items()
    }
    return head + "".join(fresh.values())


def mend(root: Path, pipeline: str) -> None:
    """Repairs or removes what a killed `dvc` left half-written; no other DVC may run meanwhile.

    Entries of dvc.lock that were not written yet are taken from the last commit: DVC compares them with the files, so
    an old one costs a repetition of its stage and nothing else.

    Args:
        root: The repository's root.
        pipeline: The profile's dvc.yaml, relative to the root; dvc.lock lies beside it.
    """
    claims = root / ".dvc" / "tmp" / "rwlock"
    if claims.is_file() and not _claimed(claims):
        claims.unlink()  # says which process reads or writes which path; a dead one's number may be another's by now
    # Not Path.rglob, which fails where a stage that outlived its DVC renames a folder meanwhile.
    for folder, _, names in (item for name in RESULTS for item in os.walk(root / name)):
        for name in fnmatch.filter(names, LEFTOVER):
            Path(folder, name).unlink(missing_ok=True)
    lock = root / Path(pipeline).with_name("dvc.lock")
    if not lock.is_file():
        return
    text = lock.read_text(encoding="utf-8", errors="replace")
    shown = ["git", "-C", str(root), "show", f"HEAD:{lock.relative_to(root)}"]
    committed = subprocess.run(shown, capture_output=True, text=True, check=False).stdout
    if is_whole(text) and not (committed.startswith(text) and committed != text):
        return
    names = list(entries(text))
    kept = entries(committed) | {name: entry for name, entry in entries(text).items() if name != names[-1]}
    print(f"{lock}: half-written by a killed dvc; repaired, {len(kept)} entries kept", file=sys.stderr)
    if kept:
        files.write_text(lock, "schema: '2.0'\nstages:\n" + "".join(kept.values()))
    else:
        lock.unlink()


def _claimed(claims: Path) -> bool:
    """Whether a DVC that is alive claims a path."""
    try:
        content = json.loads(claims.read_text(encoding="utf-8"))
        owners = [list(content.get("write", {}).values()), *content.get("read", {}).values()]
        return any(_is_dvc(owner["pid"]) for some in owners for owner in some)
    except (ValueError, AttributeError, KeyError, TypeError):
        return False


def _is_dvc(pid: int) -> bool:
    try:
        return any(Path(word).name in DVCS for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def is_whole(text: str) -> bool:
    """Whether the text of a dvc.lock was not cut.

    A cut at a line's end may still be YAML; what then lacks its end is the last entry, whose last key is `outs`. A cut
    between two outputs, or two entries, cannot be seen here. It loses no more than it seems: DVC runs a stage whose
    entry lacks an output, or which has none, and finds its finished work.
    """
    try:
        stages = yaml.load(text, yaml.CSafeLoader)["stages"]
        ends = all("cmd" in entry for entry in stages.values())
        last = list(stages.values())[-1]["outs"][-1]
    except (yaml.YAMLError, TypeError, KeyError, IndexError, AttributeError):
        return False
    directory = str(last.get("md5", "")).endswith(".dir")
    return ends and text.endswith("\n") and "md5" in last and "size" in last and ("nfiles" in last or not directory)


def entries(text: str) -> dict[str, str]:
    """The text of every stage's entry in a dvc.lock, by its first line."""
    parts = HEAD.split(text)[1:]
    return {part.partition("\n")[0]: part for part in parts}


if __name__ == "__main__":
    main()
