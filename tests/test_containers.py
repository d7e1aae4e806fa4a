"""What enters an image: its context and digest, the lock that names both, and what target cpu leaves out."""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from mirepro.audit import images
from mirepro.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = os.environ.get("MIREPRO_REQUIRE_INFRA") == "1"


def load(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"containers_{name}", str(ROOT / "containers" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(f"containers_{name}", loader))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


build, describe, stand_ins = load("build"), load("describe"), load("stand_ins")


def need(*tools: str) -> None:
    """Skips where tools are missing, unless the run asked for them."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing and not REQUIRED:
        pytest.skip(f"not installed: {', '.join(missing)}")
    assert not missing, f"not installed: {', '.join(missing)}"


@pytest.mark.parametrize(("required", "outcome"), [(False, pytest.skip.Exception), (True, AssertionError)])
def test_missing_tools_are_named(required: bool, outcome: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped, or failed where the run wants them; control: tools that are there."""
    monkeypatch.setattr(sys.modules[__name__], "REQUIRED", required)
    with pytest.raises(outcome, match="not installed: podmam, skopoe"):
        need("git", "podmam", "skopoe")
    need("git")


def git(folder: Path, *arguments: str, umask: int = 0o022) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, umask=umask)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with a lock that pins one file and one folder under runs/."""
    root = tmp_path / "one"
    (root / "runs/a").mkdir(parents=True)
    (root / "containers").mkdir()
    (root / "runs/a/weights").write_bytes(b"weights")
    (root / "runs/b.json").write_text("{}")
    digest = hashlib.md5(b"weights").hexdigest()
    listing = json.dumps([{"md5": digest, "relpath": "weights"}]).encode()
    outs = [{"path": "runs/a", "md5": hashlib.md5(listing).hexdigest() + ".dir"}]
    outs += [{"path": "runs/b.json", "md5": hashlib.md5(b"{}").hexdigest()}, {"path": "tables/x", "md5": "0" * 32}]
    (root / "dvc.lock").write_text(json.dumps({"stages": {"s": {"outs": outs}}}))
    for name, text in {
        "requirements.lock": "x",
        "run": "#!",
        ".gitignore": "/runs/\n",
        images.LOCK: "old",
        images.RELEASE: "{}",
    }.items():
        (root / name).write_text(text)
    (root / "run").chmod(0o755)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "x")
    return root


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes()) for path in paths}


def test_context_is_the_same_for_every_checkout(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "two"
    other.parent.mkdir()
    git(tmp_path, "clone", "-q", str(checkout), str(other), umask=0o077)
    (other / "untracked").write_text("of the build host")
    build.context(checkout, checkout, tmp_path / "first")
    before = os.umask(0o077)
    build.context(other, checkout, tmp_path / "second")
    os.umask(before)
    first = state(tmp_path / "first")
    assert first == state(tmp_path / "second")
    assert images.tree(checkout) == images.tree(other)
    assert not {f"source/{name}" for name in images.LATER} & set(first)
    assert first["source/run"][0] & 0o777 == 0o755
    assert sum(name.startswith("remote/files/md5/") for name in first) == 3
    (other / "run").write_text("#! changed")
    git(other, "commit", "-qam", "y")
    build.context(other, checkout, tmp_path / "third")
    assert first != state(tmp_path / "third")


@pytest.mark.parametrize("name", images.LATER)
def test_tree_leaves_out_only_what_is_made_from_the_digest(checkout: Path, name: str) -> None:
    before = images.tree(checkout)
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).write_text("new")
    git(checkout, "add", name)
    git(checkout, "commit", "-qm", "lock")
    assert images.tree(checkout) == before
    (checkout / "requirements.lock").write_text("y")
    git(checkout, "commit", "-qam", "packages")
    assert images.tree(checkout) != before


def locked(checkout: Path) -> None:
    """Commits a lock of images for the checkout's commit."""
    hashes = {name: hashlib.sha256((checkout / name).read_bytes()).hexdigest() for name in ("requirements.lock", "run")}
    text = json.dumps({"tree": images.tree(checkout), "files": hashes, "images": {}})
    (checkout / images.LOCK).write_text(text)
    git(checkout, "commit", "-qam", "images")


def test_lock_says_which_tree_it_was_written_for(checkout: Path) -> None:
    """A later commit is told apart from the one that the images were built from, with the inputs that changed."""
    built = images.tree(checkout)[:12]
    locked(checkout)
    assert images.outdated(checkout) == ""
    (checkout / "other").write_text("a developer's")
    git(checkout, "add", "other")
    git(checkout, "commit", "-qm", "z")
    here = images.tree(checkout)[:12]
    assert images.outdated(checkout) == (
        f"built from tree {built}, this commit is tree {here} (the same locks and Dockerfile)"
    )
    (checkout / "run").write_text("#! changed")
    git(checkout, "commit", "-qam", "y")
    assert "(other: run)" in images.outdated(checkout)
    locked(checkout)
    assert images.outdated(checkout) == ""
    (checkout / images.LOCK).unlink()
    with pytest.raises(UserError, match=r"images.lock.yaml: is missing; `containers/build --base mmdebstrap --twice`"):
        images.outdated(checkout)


def test_check_says_it_in_one_line() -> None:
    """`containers/build --check` in this checkout: equal, or which trees; no build, no traceback."""
    result = subprocess.run([sys.executable, ROOT / "containers/build", "--check"], capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert said.count("\n") == 1
    assert ("built from" if (ROOT / images.LOCK).exists() else "is missing") in said
    assert result.returncode == ("this commit's tree" not in said)


@pytest.mark.parametrize("content", [b"weightz", None])
def test_artefacts_are_what_the_lock_pins(checkout: Path, tmp_path: Path, content: bytes | None) -> None:
    path = checkout / "runs/a/weights"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit, match="not what dvc"):
        build.context(checkout, checkout, tmp_path / "context")


def test_dockerfile_pins_its_base_and_runs_as_nobody() -> None:
    text = (ROOT / "containers/Dockerfile").read_text()
    assert "ARG BASE=" in text
    assert len(text.split("ARG BASE=")[1].split()[0].partition("@sha256:")[2]) == 64
    assert "USER 65532:65532" in text
    script = (ROOT / "containers/install").read_text()
    installed = [line for line in script.splitlines() if "pip install" in line]
    assert ["--require-hashes -r requirements.lock" in line or "--no-deps" in line for line in installed] == [True] * 2


SITE_PACKAGES = Path(sysconfig.get_path("platlib"))


def trimmed() -> list[str]:
    """The patterns that target cpu removes from site-packages and target cuda keeps."""
    script = (ROOT / "containers/install").read_text()
    only = re.search(r"= cpu \]; then\n(.*?)\nfi", script, re.DOTALL)
    command = re.search(r"rm -rf ((?:.*\\\n)*.*)", only[1] if only else "")
    assert command
    return command[1].replace("\\\n", " ").split()


def matches(patterns: list[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(SITE_PACKAGES.glob(pattern))]


def wanting(removed: list[Path]) -> set[str]:
    """Libraries that stay as they are though one that they name as needed goes."""
    gone, replaced = {path.name for path in removed}, {SITE_PACKAGES / name for name in stand_ins.LIBRARIES}
    every = [*SITE_PACKAGES.glob("torch/lib/*.so*"), *SITE_PACKAGES.glob("nvidia/*/lib/*.so*")]
    stay = [path for path in every if path not in removed and path not in replaced]
    listed = {
        path.name: subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout for path in stay
    }
    assert listed
    return {name for name, text in listed.items() if gone & set(re.findall(r"NEEDED.*\[(.*)\]", text))}


def test_what_was_measured_is_of_the_image_in_the_lock(root: Path) -> None:
    """Sizes and times that the documentation points to; from the digest to the verdict within eight minutes."""
    measured = json.loads((root / images.MEASURED).read_text())
    lock = yaml.safe_load((root / images.LOCK).read_text())
    assert (measured["tree"], measured["digest"]) == (lock["tree"], lock["images"][measured["target"]]["digest"])
    assert measured["audit"][:2] == ["--level", "2"]
    assert measured["verdict"].startswith("REPRODUCED: all ")
    assert sum(measured["seconds"][part] for part in ("pull", "env", "audit")) < 480


def test_apptainer_starts_what_the_image_starts() -> None:
    """Its run script leaves out the image's entry point, so both have to name the same folder and command."""
    recipe, image = (ROOT / "containers/apptainer.def").read_text(), (ROOT / "containers/Dockerfile").read_text()
    folder = re.search(r"^WORKDIR (\S+)$", image, re.MULTILINE)
    assert folder is not None
    assert 'ENTRYPOINT ["mirepro"]' in image
    assert "ENV PATH=/opt/venv/bin:" in image
    assert f'cd {folder[1]} && exec /opt/venv/bin/mirepro "$@"' in recipe
    assert f"From: .mirepro/containers/cpu/{build.LAYOUT}:cpu" in recipe


@pytest.mark.skipif(shutil.which("apptainer") is None, reason="apptainer, of which Debian 12 has no package")
@pytest.mark.skipif(not (ROOT / ".mirepro/containers/cpu/image").exists(), reason="no image: containers/build")
@pytest.mark.slow
def test_apptainer_builds_from_the_image(tmp_path: Path) -> None:
    subprocess.run(["apptainer", "build", tmp_path / "m.sif", "containers/apptainer.def"], cwd=ROOT, check=True)
    subprocess.run(["apptainer", "test", tmp_path / "m.sif"], check=True)


def test_targets_differ_in_libraries_that_torch_loads_by_name_only() -> None:
    """Every pattern still names something in the locked packages; control: removing what torch needs is noticed."""
    need("readelf")
    patterns = trimmed()
    assert len(patterns) > 5
    for pattern in patterns:
        assert matches([pattern]), f"{pattern}: names nothing in the installed packages"
    assert wanting(matches(patterns)) == set()
    assert "libtorch_cuda.so" in wanting(matches([*patterns, "nvidia/cudnn/lib/libcudnn*"]))


PROGRAM = """
#include <stdio.h>
int multiply(int, int);
int (*kept)(int, int) = multiply;
int main(int count, char **words) { puts("started"); fflush(stdout); return count > 1 ? kept(6, 7) : 0; }
"""


def test_stand_in_satisfies_the_loader_and_stops_a_call(tmp_path: Path) -> None:
    """With names, versions and soname of the original; control: without its names the program does not even start."""
    need("gcc", "nm")

    def gcc(text: str, *words: str) -> None:
        done = subprocess.run(["gcc", *words, "-x", "c", "-"], input=text, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    (tmp_path / "a.map").write_text("LIB_2 { multiply; };\n")
    shared = ("-shared", "-fPIC", "-Wl,-soname,liba.so.2", "-o", "liba.so.2")
    gcc("int multiply(int a, int b) { return a * b; }", "-Wl,--version-script=a.map", *shared)
    gcc(PROGRAM, "-o", "program", "-Wl,-rpath,$ORIGIN", "-L.", "-Wl,--no-as-needed", "-l:liba.so.2")

    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run([tmp_path / "program", *words], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert run("call") == (42, "started\n", "")
    stand_ins.replace(tmp_path / "liba.so.2")
    assert stand_ins.exported(tmp_path / "liba.so.2") == {"LIB_2": ["multiply"]}
    assert run() == (0, "started\n", "")
    code, output, complaint = run("call")
    assert (code, output) == (-signal.SIGABRT, "started\n")
    assert complaint == "liba.so.2: left out of the image for CPUs; take target cuda\n"
    gcc("", *shared)
    assert run()[:2] == (127, "")


@pytest.mark.slow
def test_torch_computes_the_same_with_stand_ins(tmp_path: Path) -> None:
    """The packages without what the image lacks, on this machine; control: a library without names."""
    need("gcc", "nm")
    for name in ("torch", "nvidia"):
        shutil.copytree(SITE_PACKAGES / name, tmp_path / name, copy_function=linked, symlinks=True)
    text = "import torch; torch.manual_seed(0); x = torch.randn(99, 99); print(torch.__file__, (x @ x).sum().item())"

    def compute(**more: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | more
        return subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, env=environment, check=False
        )

    before = (SITE_PACKAGES / stand_ins.LIBRARIES[0]).stat().st_size
    saved = sum(stand_ins.replace(tmp_path / name) for name in stand_ins.LIBRARIES)
    assert saved > 1 << 30
    for path in matches(trimmed()):
        inner = tmp_path / path.relative_to(SITE_PACKAGES)
        shutil.rmtree(inner) if inner.is_dir() else inner.unlink(missing_ok=True)
    full, small = compute(), compute(PYTHONPATH=str(tmp_path))
    assert small.returncode == 0, small.stderr
    assert small.stdout.startswith(str(tmp_path))
    assert small.stdout.split()[1] == full.stdout.split()[1]
    assert (SITE_PACKAGES / stand_ins.LIBRARIES[0]).stat().st_size == before
    library = tmp_path / stand_ins.LIBRARIES[0]
    empty = ["gcc", "-shared", f"-Wl,-soname,{library.name}", "-o", library, "-x", "c", os.devnull]
    subprocess.run(empty, check=True)
    assert "undefined symbol: cublas" in compute(PYTHONPATH=str(tmp_path)).stderr


def linked(source: str, target: str) -> None:
    """A second name of a file, or a copy where that is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


LISTED = {
    "tree": "1" * 64, "base": {"reference": f"debian@sha256:{'2' * 64}"}, "files": {"dvc.lock": "3" * 64},
    "tool": "podman version 4.3.1", "timestamp": 1700000000, "debian": {"libc6:amd64": "2.36-9+deb12u10"},
    "debs": {"g++=4:12.2.0-3": "5" * 64},
    "images": {"cpu": {"digest": f"sha256:{'4' * 64}", "bytes": 1, "compressed": 1}},
}  # fmt: skip


def test_provenance_names_image_and_every_input() -> None:
    """An in-toto statement: the subject is what a registry calls the image; each input of the lock stands in it."""
    made = describe.provenance(LISTED)
    assert made["subject"] == [{"name": "cpu", "digest": {"sha256": "4" * 64}}]
    inputs = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {one["name"]: one["digest"]["sha256"][0] for one in inputs} == {
        "dvc.lock": "3", "g++=4:12.2.0-3.deb": "5", "source tree": "1", "base image": "2",
    }  # fmt: skip
    own = describe.provenance(LISTED | {"base": {"reference": "mmdebstrap", "digest": f"sha256:{'5' * 64}"}})
    assert own["predicate"]["buildDefinition"]["resolvedDependencies"][-1]["digest"] == {"sha256": "5" * 64}


PURL = re.compile(r"pkg:deb/debian/([a-z0-9.-]|%[0-9A-F]{2})+@([A-Za-z0-9.:~-]|%[0-9A-F]{2})+\?distro=bookworm")


def test_packages_that_are_not_whole_say_so() -> None:
    """Control: another package."""
    listed = {"components": [{"name": "nvidia-nccl-cu13"}, {"name": "numpy"}]}
    describe.mark(listed, {"nvidia-nccl-cu13": "of 9 files 8 left out, 1 replaced or changed"})
    assert [len(one.get("properties", ())) for one in listed["components"]] == [1, 0]


def faults(listed: dict[str, Any]) -> list[str]:
    """What CycloneDX asks of the components that are added here, beyond what its schema can say."""
    references = [one["bom-ref"] for one in listed["components"]]
    twice = {f"{name}: twice" for name in references if references.count(name) > 1}
    own = [one for one in listed["components"] if one["bom-ref"].startswith("debian-")]
    return [*sorted(twice), *(one["purl"] for one in own if not PURL.fullmatch(one["purl"]))]


def test_debian_components_have_their_own_names_and_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema itself judges where the image is described; control: a name twice, a plus sign as it is."""
    packages = LISTED["debian"] | {"libstdc++6:amd64": "12.2.0-14+deb12u1", "git": "1:2.39.5-0+deb12u3~x"}

    def made() -> dict[str, Any]:
        listed = {"components": [{"bom-ref": "torch==2", "name": "torch", "purl": "pkg:pypi/torch@2"}]}
        describe.add_debian(listed, packages)
        return listed

    listed = made()
    assert [one["purl"].removesuffix("?distro=bookworm") for one in listed["components"][1:]] == [
        "pkg:deb/debian/git@1:2.39.5-0%2Bdeb12u3~x",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10",
        "pkg:deb/debian/libstdc%2B%2B6@12.2.0-14%2Bdeb12u1",
    ]
    assert faults(listed) == []
    describe.add_debian(listed, {"git": "1"})
    assert faults(listed) == ["debian-git: twice"]
    monkeypatch.setattr(describe, "quote", lambda text, safe="": text)
    assert [fault.partition("@")[0] for fault in faults(made())] == [
        f"pkg:deb/debian/{name}" for name in ("git", "libc6", "libstdc++6")
    ]


def test_lock_keeps_the_other_target_of_the_same_inputs_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "images.lock.yaml"
    assert build.merged(LISTED, path) == LISTED
    path.write_text(json.dumps(LISTED | {"images": {"cuda": {"digest": "x"}}}))
    assert set(build.merged(LISTED, path)["images"]) == {"cpu", "cuda"}
    assert capsys.readouterr().out == ""
    assert set(build.merged(LISTED | {"tree": "9" * 64}, path)["images"]) == {"cpu"}
    assert capsys.readouterr().out == f"{path}: without cuda now, which had another tree; build that again\n"


def test_build_with_another_digest_names_what_is_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Debian's packages with both versions, in the image or in a building stage; control: the same digest."""
    (tmp_path / "containers").mkdir()
    (tmp_path / images.LOCK).write_text(json.dumps(LISTED))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.compare(LISTED, "cpu")
    assert capsys.readouterr().out == f"{images.LOCK}: the same digest of cpu\n"
    assert build.compare(LISTED | {"images": {"cuda": {"digest": "x"}}}, "cuda")
    assert capsys.readouterr().out == "", "the lock names no such image"

    other = {"images": {"cpu": {"digest": "sha256:5"}}}
    assert not build.compare(LISTED | other, "cpu")
    assert capsys.readouterr().out.endswith("all inputs that are recorded are the same\n")
    assert build.compare(LISTED | other | {"tree": "9" * 64}, "cpu"), "of another tree it must have another digest"
    capsys.readouterr()
    newer = {"debian": {"libc6:amd64": "2.36-9+deb12u14"}, "debs": {"g++=4:12.2.0-4": "6" * 64}}
    build.compare(LISTED | other | newer, "cpu")
    assert capsys.readouterr().out.splitlines() == [
        f"{images.LOCK}: another digest of cpu: sha256:{'4' * 64} -> sha256:5",
        f"{images.LOCK}: Debian's g++: 4:12.2.0-3 ({'5' * 12}) -> 4:12.2.0-4 ({'6' * 12})",
        f"{images.LOCK}: Debian's libc6: 2.36-9+deb12u10 -> 2.36-9+deb12u14",
    ]
    assert build.differences(LISTED, LISTED | other | {"tool": "podman version 5"}, "cpu")[1:] == [
        "tool: podman version 4.3.1 -> podman version 5"
    ]
    old = {name: value for name, value in LISTED.items() if name != "debs"}
    assert build.differences(old, LISTED | other, "cpu")[1:] == ["all inputs that are recorded are the same"]


@pytest.mark.parametrize("tree", ["1" * 64, "9" * 64])
@pytest.mark.parametrize("made", [LISTED["images"]["cpu"]["digest"], "sha256:5"])
def test_locked_refuses_another_digest_of_the_same_tree(
    made: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls: the lock's own digest, and another tree."""
    (tmp_path / "containers").mkdir()
    (tmp_path / images.LOCK).write_text(json.dumps(LISTED))
    lock = LISTED | {"tree": tree, "images": {"cpu": {"digest": made}}}
    values = {"ROOT": tmp_path, "build": lambda *_: made, "context": lambda *_: None, "inputs": lambda *_: lock}
    for name, value in values.items():
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(build.images, "tree", lambda root: tree)
    monkeypatch.setattr(sys, "argv", ["build", "--locked", "--store", str(tmp_path)])
    umask = os.umask(0o022)
    try:
        if made == "sha256:5" and tree == LISTED["tree"]:
            with pytest.raises(SystemExit, match="another image than the lock's, from the same tree"):
                build.main()
        else:
            build.main()
    finally:
        os.umask(umask)


@pytest.mark.parametrize("again", ["sha256:1", "sha256:2"])
def test_builds_that_differ_are_refused(again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two builds; the control is an equal one, whose inputs and digest are written."""
    made = iter(["sha256:1", again])
    monkeypatch.setattr(build, "build", lambda *_: next(made))
    monkeypatch.setattr(build, "context", lambda *_: None)
    monkeypatch.setattr(build, "inputs", lambda *_: LISTED)
    monkeypatch.setattr(sys, "argv", ["build", "--twice", "--store", str(tmp_path)])
    umask = os.umask(0o022)
    try:
        if again == "sha256:1":
            build.main()
        else:
            with pytest.raises(SystemExit, match="the two builds differ"):
                build.main()
    finally:
        os.umask(umask)
    assert (tmp_path / "images.lock.yaml").exists() == (again == "sha256:1")


NEWER = {"g++=4:12.2.0-4": "6" * 64}


@pytest.mark.parametrize(
    ("debs", "named"), [(LISTED["debs"], []), (NEWER, ["12.2.0-3", "12.2.0-4"]), ({}, ["12.2.0-3"])]
)
def test_locked_refuses_other_debian_packages(
    debs: dict[str, str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer ones, and one that is missing; control: those of the lock."""
    (tmp_path / "containers").mkdir()
    (tmp_path / images.LOCK).write_text(json.dumps(LISTED))
    store = tmp_path / "store"
    for name, value in (("ROOT", tmp_path), ("build", lambda *_: "sha256:1"), ("context", lambda *_: None)):
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(build, "inputs", lambda *_: LISTED | {"debs": debs})
    monkeypatch.setattr(build.images, "tree", lambda root: "1" * 64)
    monkeypatch.setattr(sys, "argv", ["build", "--locked", "--store", str(store)])
    store.mkdir()
    umask = os.umask(0o022)
    try:
        if named:
            with pytest.raises(SystemExit, match="other Debian packages than the lock's") as refused:
                build.main()
            lines = str(refused.value).splitlines()[1:]
            assert [line.partition(": ")[0] for line in lines] == [f"g++=4:{version}" for version in named]
        else:
            build.main()
    finally:
        os.umask(umask)
    assert (store / "images.lock.yaml").exists() == (not named)
    (tmp_path / images.LOCK).write_text(json.dumps(LISTED | {"debs": {}}))
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("built although there is nothing to compare with"))
    with pytest.raises(SystemExit, match="names no Debian packages; build without --locked first"):
        build.main()


def test_targets_are_the_same_but_for_the_packages() -> None:
    text = (ROOT / "containers/Dockerfile").read_text()
    cuda, cpu = (re.search(rf"^FROM runtime AS {name}\n((?:.+\n)+)", text, re.MULTILINE)[1] for name in ("cuda", "cpu"))
    assert cuda != cpu
    assert cuda.replace("made-cuda", "made-cpu") == cpu
    made = re.findall(r"^FROM tools AS made-(\w+)\nRUN (.+) \1\n", text, re.MULTILINE)
    assert {name for name, _ in made} == {"cpu", "cuda"}
    assert len({words for _, words in made}) == 1
