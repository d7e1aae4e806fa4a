"""A job resumes, and is collected as a whole: a kill at any moment leaves all of it to collect again or nothing."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from mirepro import execution, files, stages
from mirepro.errors import UserError


class Killed(BaseException):
    """Stands for SIGKILL: nothing that catches exceptions catches it."""


def compute(state: Path, out: Path, fingerprint: str) -> dict[str, Any]:
    for name in ("weights", "bank"):
        (out / name).write_text(name)
    return {"value": 1}


JOB = execution.Job({}, (), compute, "metrics/a.json", "runs/a")


def placed(root: Path) -> dict[str, str]:
    """Everything in the folders of results, leftovers too."""
    found = [path for name in ("runs", "metrics") for path in (root / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_text() for path in found}


WHOLE = {"runs/a/weights": "weights", "runs/a/bank": "bank", "metrics/a.json": '{\n "value": 1\n}\n'}


@pytest.mark.parametrize("call", ["shutil.copytree", "shutil.copyfile", "shutil.rmtree", "os.replace", "os.fsync"])
def test_a_kill_at_any_call_while_collecting(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execution.execute(tmp_path, "a", JOB, collect=False)
    owner = getattr(execution, call.partition(".")[0])
    name = call.partition(".")[2]
    for survived in range(20):
        original, left = getattr(owner, name), [survived]

        def dying(*arguments: Any, original: Any = original, left: list[int] = left, **options: Any) -> Any:
            if not left[0]:
                if name == "rmtree" and Path(arguments[0]).is_dir():  # half-way through a folder's files
                    next(path for path in sorted(Path(arguments[0]).rglob("*")) if path.is_file()).unlink()
                raise Killed
            left[0] -= 1
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            try:
                execution.execute(tmp_path, "a", JOB)
            except Killed:
                pass
            else:
                break
        execution.execute(tmp_path, "a", JOB)
        assert placed(tmp_path) == WHOLE, survived
        for folder in ("runs", "metrics"):
            shutil.rmtree(tmp_path / folder)
        execution.execute(tmp_path, "a", JOB, collect=False)
    assert survived >= 1, "the call never happened"
    assert placed(tmp_path) == WHOLE
    assert not list((tmp_path / ".mirepro" / "work").iterdir())


@pytest.mark.parametrize("call", ["os.replace", "shutil.rmtree"])
def test_kept_work_stays_until_it_is_recorded(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(execution.KEEP, "1")
    done = execution.execute(tmp_path, "a", JOB)
    shutil.rmtree(tmp_path / "runs")  # as DVC does before it runs a stage that it has no record of
    again = execution.execute(tmp_path, "a", JOB)
    assert not done.collected
    assert again.collected
    assert placed(tmp_path) == WHOLE
    execution.release(tmp_path, {"another's"})
    assert execution.work_folder(tmp_path, done.fingerprint).is_dir()
    with monkeypatch.context() as patch:  # killed while it is removed
        owner, name = getattr(execution, call.partition(".")[0]), call.partition(".")[2]
        patch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            execution.release(tmp_path, {done.fingerprint})
    execution.release(tmp_path, {done.fingerprint})
    assert not list((tmp_path / ".mirepro" / "work").iterdir())


def test_work_in_use_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(execution.KEEP, "1")
    mark = execution.execute(tmp_path, "a", JOB).fingerprint
    work = execution.work_folder(tmp_path, mark)
    with FileLock(work.with_suffix(".lock"), is_singleton=False):
        execution.release(tmp_path, {mark})
        assert work.is_dir()
    execution.release(tmp_path, {mark})
    assert not work.exists()


def job(work: list[str], value: int = 1) -> execution.Job:
    """A job that counts its computations."""

    def compute(state: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        work.append(fingerprint)
        if len(work) == 1:
            (state / "checkpoint").write_text("half")
            raise KeyboardInterrupt
        assert (state / "checkpoint").read_text() == "half"
        (out / "weights").write_text(str(value))
        return {"value": value}

    return execution.Job({"value": value}, ("input",), compute, "metrics/a.json", "runs/a")


def test_interrupted_work_resumes(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("x")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "old").touch()
    work: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        execution.execute(tmp_path, "pretrain@a", job(work))
    done = execution.execute(tmp_path, "pretrain@a", job(work))
    assert not done.collected
    assert work == [done.fingerprint] * 2
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["weights"]
    assert not list((tmp_path / ".mirepro" / "work").iterdir())


def test_fingerprint_sees_everything(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("x")
    marks = [execution.fingerprint(tmp_path, "a", job([])), execution.fingerprint(tmp_path, "b", job([]))]
    marks.append(execution.fingerprint(tmp_path, "a", job([], 2)))
    (tmp_path / "input").write_text("y")
    marks.append(execution.fingerprint(tmp_path, "a", job([])))
    (tmp_path / "input").unlink()
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "f").write_text("x")
    marks.append(execution.fingerprint(tmp_path, "a", job([])))
    assert len(set(marks)) == len(marks)


def test_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "input").write_text("x")
    (tmp_path / ".mirepro").touch()  # a file where a folder has to be: refused for root too
    with pytest.raises(UserError, match="cannot write"):
        execution.execute(tmp_path, "a", job([]))


@pytest.mark.parametrize("lost", ["", "metrics/a.json", "runs/a"])
def test_a_stage_is_current_while_all_it_left_is_there(tmp_path: Path, lost: str) -> None:
    """Else its slot of a parallel reproduction would compute nothing, and DVC everything."""
    profile: Any = SimpleNamespace(root=tmp_path, name="desk")
    mark = execution.execute(tmp_path, "a", JOB).fingerprint  # type: ignore[union-attr]
    assert not stages.current(profile, "a", JOB), "nobody has recorded it"
    files.write_json(stages.provenance(profile) / "a.json", {"fingerprint": mark})
    if lost:
        os.replace(tmp_path / lost, tmp_path / "elsewhere")
    assert stages.current(profile, "a", JOB) == (not lost)
