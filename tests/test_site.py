"""Site files: keys, mistakes, times."""

import re
from pathlib import Path

import pytest

from mirepro import site, stages
from mirepro.errors import UserError
from mirepro.site import Section, parse_minutes


def load(tmp_path: Path, text: str) -> site.Site:
    """A site file's text as a site."""
    (tmp_path / "launch").mkdir(exist_ok=True)
    (tmp_path / "launch" / "lab.toml").write_text(text)
    return site.load(tmp_path, "lab", stages.JOBS)


def test_example_is_right_and_names_every_key(root: Path) -> None:
    place = site.load(root, "example", stages.JOBS)
    assert set(place.sections) == set(stages.JOBS)
    assert place.section("pretrain").minutes == 240
    text = (root / "launch" / "example.toml").read_text()
    for cls in (Section, site.Site):
        for name in cls.__dataclass_fields__.keys() - {"name", "sections"}:
            assert re.search(rf"\b{name} = |\[{name}", text) or name in ("nodes", "tasks"), name


def test_sections_start_from_all(tmp_path: Path) -> None:
    own = "[pretrain]\ngpus = 2\ntasks = 2\ntime = 30\n"
    place = load(tmp_path, f"poll = 2\n[all]\ntime = '2:00:00'\nmemory = '4G'\n{own}")
    assert (place.section("toy").minutes, place.section("toy").gpus) == (120, 0)
    assert (place.section("pretrain").minutes, place.section("pretrain").memory) == (30, "4G")
    assert place.poll == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pol = 3", "pol: unknown key; did you mean 'poll'"),
        ("[pretrian]", "pretrian: unknown section; did you mean 'pretrain'"),
        ("[all]\npartitions = 'x'", "all: partitions: unknown key; did you mean 'partition'"),
        ("[all]\nzzz = 1", "all: zzz: unknown key; known: account, binds"),
        ("[all]\ngpus = 'two'", "gpus: expected int, got 'two'"),
        ("[all]\ngpus = -1", "gpus: -1 is impossible"),
        ("[all]\ngpus = 8", "gpus: 8 is impossible; use 0, or 1: one for each of a node's tasks"),
        ("[all]\ntime = 'noon'", "time: 'noon' is no time"),
        ("[all]\ntime = 1", "grace: 60 is impossible"),
        ("[all]\nmemory = 'much'", "memory: 'much' is impossible"),
        ("[all]\nimage = 'mirepro:latest'", "image: 'mirepro:latest' is impossible; use a digest"),
        ("[all]\nruntime = 'docker'", "runtime: 'docker' is impossible; use podman or apptainer or pyxis"),
        ("[all]\noptions = {partition = 'x'}", "options.partition: set by the launcher"),
        ("[all]\noptions = {exclusive = false}", "options.exclusive: expected text, a number or true, got False"),
        ("[all]\nnodes = 2", "evaluate.nodes: 2 is impossible, such a stage is one task; set it in [pretrain]"),
        ("[evaluate]\ntasks = 2", "evaluate.tasks: 2 is impossible, such a stage is one task; set it in [pretrain]"),
        ("executor = 'pbs'", "executor: 'pbs' is impossible; use slurm or local"),
        ("retries = -1", "retries: -1 is impossible"),
        ("x = ", "not valid TOML"),
    ],
)
def test_mistakes_name_file_key_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "lab.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


FOREIGN = [
    "image = 'a@sha256:0'", "nodes = 2", "partition = 'x'", "account = 'x'", "qos = 'x'", "cpus = 2", "memory = '4G'",
    "runtime = 'pyxis'", "binds = ['/data']", "options = {nice = 5}",
]  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN)
def test_jobs_of_this_machine_refuse_what_they_would_ignore(tmp_path: Path, text: str) -> None:
    """Control: the same section is right on a cluster."""
    key, own = text.partition(" = ")[0], f"[pretrain]\n{text}\n"
    assert load(tmp_path, own).executor == "slurm"
    with pytest.raises(UserError, match=rf"lab\.toml: pretrain\.{key}: .* means nothing to jobs of this machine; "):
        load(tmp_path, f"executor = 'local'\n{own}")


def test_jobs_of_this_machine_take_what_they_heed(tmp_path: Path) -> None:
    """The test above names all other keys."""
    heeded = {"gpus": "2", "tasks": "2", "time": "'3:00:00'", "grace": "30", "setup": "['true']"}
    lines = "\n".join(f"{key} = {value}" for key, value in heeded.items())
    assert load(tmp_path, f"executor = 'local'\n[pretrain]\n{lines}\n").section("pretrain").tasks == 2
    assert heeded.keys() == site.HEEDED_HERE
    assert heeded.keys() | {text.partition(" = ")[0] for text in FOREIGN} == vars(Section()).keys()


def test_unknown_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path, "")
    with pytest.raises(UserError, match=r"no file .*moon.toml; known: inline, slurm, local, lab"):
        site.load(tmp_path, "moon", stages.JOBS)
    monkeypatch.setenv(site.VARIABLE, "inline")
    assert site.chosen(tmp_path, stages.JOBS) is None
    monkeypatch.setenv(site.VARIABLE, "local")
    chosen = site.chosen(tmp_path, stages.JOBS)
    assert chosen is not None
    assert chosen.executor == "local"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [(90, 90), ("90", 90), ("90:30", 91), ("1:30:00", 90), ("1-12", 2160), ("1-12:30", 2190), ("2-00:00:01", 2881)],
)
def test_times_as_slurm_writes_them(text: str | int, minutes: int) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "1:2:3:4", "-5", "1h"])
def test_no_times(text: str) -> None:
    with pytest.raises(UserError, match="is no time"):
        parse_minutes(text)
