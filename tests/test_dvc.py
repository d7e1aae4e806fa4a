"""What a killed DVC leaves: a cut dvc.lock is repaired from its own whole entries and the last commit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mirepro import profiles, stages
from mirepro.launch import dvc, parsed


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    """A quarter of the desk profile's dvc.lock: every fourth entry, in the order of their names."""
    head, *entries = dvc.HEAD.split((root / "dvc.lock").read_text())
    return head + "".join(sorted(entries)[::4])


@pytest.fixture
def lock(text: str, tmp_path: Path) -> Path:
    """A repository with that dvc.lock committed."""
    path = tmp_path / "dvc.lock"
    path.write_text(text)
    for command in (["init", "-q"], ["add", "dvc.lock"], ["commit", "-qm", "lock"]):
        name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *command], check=True)
    return path


def test_a_fork_collects_and_else_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(root: Path, profile: str, kind: str, key: str | None) -> bool:
        if key == "broken":
            raise ValueError
        (root / "collected").write_text(f"{profile} {kind} {key} {os.environ['OWN']} {os.getpid() != parent}")
        return key != "ir-s1"

    parent, ran = os.getpid(), list[str]()
    monkeypatch.setattr(profiles, "find_root", Path)
    monkeypatch.setattr(stages, "collect", collect)
    run = dvc.collecting(lambda _, cmd, **__: ran.append(cmd))
    options = {"cwd": str(tmp_path), "env": {"OWN": "variable"}}
    run(None, "mirepro stage pretrain ir-s0 --profile desk", **options)
    assert (tmp_path / "collected").read_text() == "desk pretrain ir-s0 variable True"
    run(None, "mirepro stage toy --profile desk", **options)
    assert (tmp_path / "collected").read_text() == "desk toy None variable True"
    assert ran == []
    others = [
        "mirepro stage pretrain ir-s1 --profile desk",
        "mirepro stage pretrain broken --profile desk",
        "mirepro stage tables --profile desk",
        "command -v mirepro",
    ]
    for command in others:
        run(None, command, **options)
    assert ran == others


@pytest.mark.parametrize("share", [0.0, 0.0003, 0.01, 0.33, 0.5, 0.77, 0.9999])
def test_a_cut_lock_is_made_whole(lock: Path, text: str, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    lock.write_text(text[: int(share * len(text))])
    dvc.mend(lock.parent, "dvc.yaml")
    assert lock.read_text() == text
    assert "half-written by a killed dvc; repaired" in capsys.readouterr().err


def _cut(text: str, line: str) -> str:
    """The text up to and with the first such line behind its first third."""
    place = text.index(f"\n{line}", len(text) // 3)
    return text[: text.index("\n", place + 1) + 1]


# Most cuts behind such a line leave YAML of the right form; the last three come after `outs:`.
LINES = ("  pretrain@", "    cmd: ", "    deps:", "    - path: locks", "            lr:", "        tier:", "    outs:")
LINES_OF_OUTPUTS = ("    - path: runs", "      size: ", "      nfiles: ")


@pytest.mark.parametrize("line", LINES + LINES_OF_OUTPUTS)
def test_a_cut_at_a_line_end_is_seen(lock: Path, text: str, line: str) -> None:
    lock.write_text(_cut(text, line))
    dvc.mend(lock.parent, "dvc.yaml")
    assert lock.read_text() == text


@pytest.mark.parametrize("line", LINES)
def test_entries_written_before_the_cut_win(lock: Path, line: str) -> None:
    text = lock.read_text().replace("nfiles: 21", "nfiles: 22", 1)
    assert text != lock.read_text()
    lock.write_text(_cut(text, line))
    dvc.mend(lock.parent, "dvc.yaml")
    assert lock.read_text() == text


def test_half_a_copy_is_removed_and_nothing_else(lock: Path) -> None:
    folder = lock.parent / "metrics" / "desk"
    folder.mkdir(parents=True)
    for name in (".vdlxo4sJyBbSqfAsBodKAw.tmp", ".vdlxo4sJyBbSqfAs.tmp", "a.tmp", "ir.json"):
        (folder / name).write_bytes(b"")
    dvc.mend(lock.parent, "dvc.yaml")
    assert sorted(path.name for path in folder.iterdir()) == [".vdlxo4sJyBbSqfAs.tmp", "a.tmp", "ir.json"]


def test_a_whole_lock_is_left_alone(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock.write_text(lock.read_text().replace("nfiles: 21", "nfiles: 22", 1))
    before = lock.stat().st_mtime_ns
    dvc.mend(lock.parent, "dvc.yaml")
    assert lock.stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", LINES)
def test_without_a_commit_the_whole_entries_stay(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "dvc.lock").write_text(_cut(text, line))
    dvc.mend(tmp_path, "dvc.yaml")
    kept = yaml.load((tmp_path / "dvc.lock").read_text(), yaml.CSafeLoader)["stages"]
    whole = yaml.load(text, yaml.CSafeLoader)["stages"]
    assert 10 < len(kept) < len(whole)
    assert all(whole[name] == entry for name, entry in kept.items())
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  code:\n    cm")
    dvc.mend(tmp_path, "dvc.yaml")
    assert not (tmp_path / "dvc.lock").exists()


def test_claims_of_the_dead_are_dropped_and_those_of_a_dvc_at_work_kept(tmp_path: Path) -> None:
    claims = tmp_path / ".dvc" / "tmp" / "rwlock"
    claims.parent.mkdir(parents=True)
    command = [sys.executable, "-c", "input()", "dvc"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as living:
        contents = {
            "": False,
            '{"write": {"a": {"pid": 1': False,
            json.dumps({"write": {"a": {"pid": os.getpid(), "cmd": "dvc repro"}}}): False,  # a number used again
            json.dumps({"read": {"a": [{"pid": living.pid, "cmd": "dvc repro"}]}}): True,
        }
        for content, kept in contents.items():
            claims.write_text(content)
            dvc.mend(tmp_path, "dvc.yaml")
            assert claims.exists() is kept, content
        living.communicate(b"\n")


KILLED = """
import os, sys
from dvc.utils.serialize import dump_yaml, modify_yaml
from mirepro.launch.dvc import make_atomic
if sys.argv[1] == "atomic":
    make_atomic()
out = {"path": "a", "md5": "0", "size": 1}
data = {"stages": {f"stage{i}": {"cmd": "x", "outs": [out]} for i in range(500)}}
dump_yaml("dvc.lock", data)
import ruamel.yaml.emitter as emitter
original, count = emitter.Emitter.expect_block_mapping_key, [0]
def dying(self, *arguments, **options):
    count[0] += 1
    if count[0] > 1500:
        os._exit(9)
    return original(self, *arguments, **options)
emitter.Emitter.expect_block_mapping_key = dying
with modify_yaml("dvc.lock") as content:
    content["stages"]["stage0"]["cmd"] = "y"
"""


@pytest.mark.parametrize("how", ["atomic", "plain"])
def test_dying_while_writing_the_lock(tmp_path: Path, how: str) -> None:
    """The control is DVC as it is: there the file is cut."""
    env = os.environ | {"PYTHONPATH": str(Path(dvc.__file__).parent.parent.parent)}
    assert subprocess.run([sys.executable, "-c", KILLED, how], cwd=tmp_path, env=env).returncode == 9
    assert dvc.is_whole((tmp_path / "dvc.lock").read_text()) == (how == "atomic")


QUICK = """
import sys
from pathlib import Path
from dvc import dvcfile
from mirepro.launch import dvc
if sys.argv[1] == "quick":
    from dvc.utils.serialize._yaml import parse_yaml as plain
    Path(".mirepro").mkdir(exist_ok=True)
    dvc.make_atomic()
    parsed = dvc.parser(Path.cwd())
    remembering = dvc.parsing(parsed)
    remembering.__enter__()
    dvc.make_quick(parsed)
def change(entry):
    with dvcfile.modify_yaml("dvc.lock") as data:
        data.update({"schema": "2.0"})
        data["stages"] = data.get("stages", {})
        data["stages"].update(entry)
names = sys.argv[2:]
long = {"text": "word " * 40, "float": 1e-07, "list": [1, 2.5, None, True], "empty": {}, "odd: key": "it's"}
for name in (names[0], names[7], names[-1], "new@stage", "a: b"):
    out = {"path": "runs/x", "hash": "md5", "md5": "0" * 32, "size": 1}
    change({name: {"cmd": f"mirepro {name}", "params": {"params.yaml": long}, "outs": [out]}})
change({})
if sys.argv[1] == "quick":
    from dvc.utils.serialize import _yaml
    text = Path("dvc.lock").read_text()
    kept = _yaml.parse_yaml(text, "dvc.lock")
    assert kept == plain(text, "dvc.lock"), "what was learnt while writing"
    assert any(Path(".mirepro/parsed").iterdir())
"""


@pytest.mark.slow
def test_quick_writes_have_the_bytes_of_plain_dvc(lock: Path, root: Path) -> None:
    """Entries changed at the front, in the middle and at the end, new ones, and a lock that has none yet."""
    before = (root / "dvc.lock").read_bytes()
    names = list(yaml.load(before, yaml.CSafeLoader)["stages"])
    env = os.environ | {"PYTHONPATH": str(Path(dvc.__file__).parent.parent.parent)}
    for start in (before, b"schema: '2.0'\nstages:\n" + before.split(b"stages:\n")[1], b"# mine\n" + before):
        texts = {}
        for how in ("plain", "quick"):
            lock.write_bytes(start)
            subprocess.run([sys.executable, "-c", QUICK, how, *names], cwd=lock.parent, env=env, check=True)
            texts[how] = lock.read_text()
        assert texts["quick"] == texts["plain"]
        assert len(dvc.entries(texts["quick"])) == len(names) + 2


def test_a_kept_text_is_what_parsing_would_give(tmp_path: Path) -> None:
    """Read by another process; after another writer, a half-written file and for data that JSON lacks it is parsed."""
    text, asked = "a: 1e-07\nb: [x, null, 2.0]\n" + "# long\n" * 2000, []

    def parse(text: str, path: str) -> dict[str, object]:
        asked.append(path)
        return yaml.safe_load(text) | {"number": 1.0, "tuple": () if path == "odd" else []}

    def again(text: str, path: str) -> dict[str, object]:
        return parsed.Parsed(parse, tmp_path / "kept")(text, path)

    first = again(text, "lock")
    first["number"] = 2
    assert again(text, "lock") == parse(text, "lock")
    assert asked == ["lock"] * 2
    assert type(again(text, "lock")["number"]) is float
    again(text + "c: 1", "lock")
    assert len(asked) == 3
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text(file.read_text()[:100])
    assert again(text + "c: 1", "lock")["c"] == 1
    assert len(asked) == 4
    assert again(text, "odd") == again(text, "odd")
    assert asked[4:] == ["odd"] * 2, "control"


def test_only_changed_entries_are_written_anew(text: str) -> None:
    """Control: an entry that counts as unchanged keeps its text, whatever a new writing would make of it."""
    before = yaml.load(text, yaml.CSafeLoader)["stages"]
    first, second = list(before)[:2]
    data = {"stages": before | {second: {"cmd": "new"}}}
    spliced = dvc.spliced(text, before, data, lambda lock: yaml.safe_dump(lock, sort_keys=False))
    old, new = dvc.entries(text), dvc.entries(spliced)
    assert new[f"  {second}:"] == f"  {second}:\n    cmd: new\n"
    assert {name: entry for name, entry in new.items() if second not in name} == {
        name: entry for name, entry in old.items() if second not in name
    }
    assert first in spliced
