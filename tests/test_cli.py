"""The command line: one clear line for bad input, in processes of its own; profiles and stages behind it."""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from mirepro import cli, params, profiles
from mirepro.errors import UserError
from tests import forked


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`mirepro arguments` as a process, with this checkout's package."""
    source = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONPATH": source} | environment
    command = [sys.executable, "-m", "mirepro", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


Commands = dict[tuple[str, ...], CompletedProcess[str]]
BAD = {
    ("stage", "bogus"): "stage 'bogus': unknown; known: code",
    ("stage", "pretrain"): "stage pretrain: needs a key",
    ("stage", "toy", "x"): "stage toy: takes no key",
    ("stage", "pretrain", "nobody-s0"): "runs.nobody-s0: not in",
    ("stage", "code", "--profile", "mars"): "profile 'mars': no file",
    ("repro", "--jobs", "0"): "--jobs: 0 is impossible",
    ("bogus",): "No such command 'bogus'",
    ("stage",): "Missing argument",
}


@pytest.fixture(scope="module")
def commands(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """`mirepro arguments` for all of `BAD`, for help, and for `env` outside the repository."""
    places = {**dict.fromkeys([*BAD, ("--help",)], root), ("env",): tmp_path_factory.mktemp("outside")}
    cases = [(["mirepro", *arguments], {}, place) for arguments, place in places.items()]
    return dict(
        zip(places, forked.run("from mirepro.cli import main; main()", cases, "import mirepro.cli"), strict=True)
    )


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(commands: Commands, arguments: tuple[str, ...]) -> None:
    result = commands[arguments]
    assert result.returncode == 2
    assert BAD[arguments] in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_process_of_python_says_the_same(root: Path, commands: Commands) -> None:
    alone, fork = run("stage", "bogus", cwd=root), commands["stage", "bogus"]
    assert (alone.returncode, alone.stdout, alone.stderr) == (fork.returncode, fork.stdout, fork.stderr)


def test_outside_and_in_another_clone(tmp_path: Path, commands: Commands) -> None:
    assert "not inside the repository" in commands["env",].stderr
    (tmp_path / "mirepro").mkdir()
    (tmp_path / "mirepro" / "cli.py").touch()
    # -m would import the folder's own package, the installed command does not
    code = "from mirepro.cli import main; main()"
    source = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {"PYTHONPATH": source}
    command = [sys.executable, "-P", "-c", code, "env"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "activate" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_interpreter_without_the_packages(root: Path, tmp_path: Path) -> None:
    (tmp_path / "dvc.py").write_text("raise ModuleNotFoundError('No module named dvc', name='dvc')")
    code = "import sys; sys.argv = ['mirepro', 'repro', 'toy']; from mirepro.cli import main; main()"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("mirepro: dvc is not installed in")


def test_bare_path_is_one_line(root: Path) -> None:
    """What the stage `code` says when `dvc repro` runs without the environment activated."""
    first = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]["code"]["cmd"][0]
    command, env = ["/bin/sh", "-c", first], {"PATH": "/nowhere"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 127
    assert result.stderr.startswith("mirepro is not on the PATH")
    assert len(result.stderr.splitlines()) == 1


def test_help_and_env(root: Path, commands: Commands) -> None:
    assert "repro" in commands["--help",].stdout
    facts = yaml.safe_load(run("env", "--json", cwd=root).stdout)
    assert facts["torch"] == "2.14.1"


def desk(root: Path, tmp_path: Path, change: dict[str, Any]) -> profiles.Profile:
    """The desk profile with changed values."""
    values = profiles.merge(params.read_yaml(root / "params.yaml"), change)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    return profiles.load(tmp_path, "desk")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "epochs: unknown key"),
        ({"pretrain": {"epoch": 3}}, "pretrain.epoch: unknown key"),
        ({"pretrain": {"optim": {"lr": "big"}}}, "pretrain.optim.lr: expected float"),
        ({"rows": {"ring": {"option": {}}}}, "rows.ring.option: unknown key"),
        ({"rows": {"cmc": {"pretrain": {"encoder": {"widht": 3}}}}}, "rows.cmc.pretrain.encoder.widht: unknown key"),
        ({"rows": {"ring": {"pretrain": {"data": "scenes"}}}}, "rows.ring.pretrain.data: rows share"),
        ({"runs": {"ring-s0": {"seed": 0.5}}}, "runs.ring-s0.seed: expected int"),
        ({"runs": {"ring-s0": {"objective": "ball"}}}, "runs.ring-s0.objective: 'ball'"),
        ({"runs": {"ring-s9": {"row": "rink", "objective": "ring", "seed": 9}}}, "'rink' is not in rows"),
        ({"detect_runs": {"ring-s0-mask": {"model": "cube"}}}, "detect_runs.ring-s0-mask"),
        ({"datasets": ["desk"]}, "detect_runs.ball-s0-keypoint.data: 'scenes' is not in datasets"),
        ({"toy": {"bank": 2}}, "toy.bank: unknown key"),
    ],
)
def test_wrong_parameters_are_named(root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        desk(root, tmp_path, change).check()
    assert message in str(caught.value)


def test_profiles_are_valid(root: Path) -> None:
    for name in profiles.names(root):
        profiles.load(root, name).check()


def test_overrides_reach_the_run(root: Path, tmp_path: Path) -> None:
    profile = desk(root, tmp_path, {"rows": {"ring": {"pretrain": {"encoder": {"width": 5}}}}})
    assert profile.run("ring-s1").pretrain.encoder.width == 5
    assert profile.run("ring-s1").seed == 1
    assert profile.run("ring-s1").pretrain.encoder.arch == profile.run("ball-s1").pretrain.encoder.arch


def test_desk_has_the_promised_runs(root: Path) -> None:
    profile = profiles.load(root, "desk")
    rows = profile.values["tables"]["T1"]["rows"]
    assert {row for row, runs in rows.items() if len(runs) == 5} == {"ir", "ball", "ring", "la", "cmc", "random"}
    assert {len(runs) for runs in rows.values()} == {3, 5}
    assert len(profile.values["tables"]["T6"]["rows"]) == 8
    assert len(profile.values["tables"]["T7"]["rows"]) == 6
    named = {run for n in ("T1", "T6", "T7") for runs in profile.values["tables"][n]["rows"].values() for run in runs}
    assert named == set(profile.runs)


def test_targets_are_stages_of_the_chosen_profile(root: Path) -> None:
    desk, cifar10 = (profiles.load(root, name) for name in ("desk", "cifar10"))
    assert cli.targets(desk, ["toy", "controls"]) == ["toy", "controls"]
    assert cli.targets(cifar10, ["toy", "dvc.yaml:toy"]) == ["profiles/cifar10/dvc.yaml:toy", "dvc.yaml:toy"]
