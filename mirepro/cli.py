"""The command line: every command parses, calls one function and prints."""

import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from mirepro import files, profiles, site
from mirepro.errors import UserError
from mirepro.launch import commands
from mirepro.launch.launcher import Detached, JobFailed

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=(
    "Exact reproduction of mutual-information contrastive representation learning."
))  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Import and check data sets.")
app.add_typer(data_app, name="data")
app.add_typer(commands.jobs_app, name="jobs")
app.add_typer(commands.launch_app, name="launch")
keys_app = typer.Typer(no_args_is_help=True, help="Keys that sign audits and releases.")
app.add_typer(keys_app, name="keys")

Key = Annotated[str | None, typer.Argument(help="a run or a data set, for stages that have several")]
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""

ProfileName = Annotated[str, typer.Option("--profile", help="a folder of profiles/, or desk")]


@app.command()
def stage(name: str, key: Key = None, profile: ProfileName = "desk") -> None:
    """Run one stage; the pipeline's commands call this."""
    from mirepro.launch import jobs

    jobs.run(profiles.find_root(), profile, name, key)


@app.command()
def repro(
    target: Annotated[
        list[str] | None, typer.Argument(help="stages such as pretrain@ir-s0, or groups of stages")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="stages at a time")] = os.cpu_count() or 1,
    profile: ProfileName = "desk",
    keep_going: Annotated[
        bool, typer.Option("--keep-going", "-k", help="after a failure, run what does not need it")
    ] = False,
    launch: Annotated[
        str | None, typer.Option(help=f"inline, local, slurm or a site [default: ${site.VARIABLE}]")
    ] = None,
) -> None:
    """Bring every stale stage up to date, several at a time."""
    from mirepro import environment, stages
    from mirepro.launch import waves

    chosen = profiles.load(profiles.find_root(), profile)
    if launch is not None:
        os.environ[site.VARIABLE] = launch
    try:
        count = waves.repro(chosen, targets(chosen, target or []), jobs, keep_going)
    except waves.StageFailed as failure:
        print(f"mirepro: {failure}", file=sys.stderr)
        raise typer.Exit(1) from failure
    page = chosen.root / "view" / chosen.name / "index.html"
    tracked = chosen.root / "reports" / chosen.name / "index.html"
    if not target and tracked.is_file() and (count or not page.is_file()):
        stages.report(chosen, environment.view(chosen))
    print(f"{count} stages ran; everything asked for is up to date" if count else "nothing was stale")
    if not target:
        print(f"report: {tracked}\nwith this machine's facts: {page}")


def targets(profile: profiles.Profile, names: Sequence[str]) -> list[str]:
    """DVC's addresses of stages of the profile."""
    prefix = "" if profile.pipeline == "dvc.yaml" else f"{profile.pipeline}:"
    return [name if ":" in name else prefix + name for name in names]


@app.command()
def status(profile: ProfileName = "desk") -> None:
    """Say which stages are stale, and why; changes of code are seen."""
    from mirepro import stages
    from mirepro.launch.plan import Pipeline

    chosen = profiles.load(profiles.find_root(), profile)
    stages.code(chosen)
    plan = Pipeline(chosen.root, [chosen.pipeline]).plan()
    for name in plan.stale:
        print(f"{name}: {plan.reasons.get(name, 'an earlier stage is stale')}")
    print(f"{len(plan.stale)} of {len(plan.needs)} stages are stale" if plan.stale else "nothing is stale")


@app.command()
def plan(
    profile: ProfileName = "desk",
    bank_rows: Annotated[int | None, typer.Option(help="a bank of so many rows: what its steps cost, instead")] = None,
    ranks: Annotated[int, typer.Option(help="that share the bank (pretrain.bank_shards)")] = 1,
    gpu_rate: Annotated[float | None, typer.Option(help="multiply-adds a second of a GPU, such as 4e12")] = None,
) -> None:
    """Predict hours, memory and disk of a profile's stages from measured rates."""
    from mirepro.launch import budget, spread

    chosen = profiles.load(profiles.find_root(), profile)
    if bank_rows is not None and gpu_rate is not None:
        raise UserError("--gpu-rate: says nothing about --bank-rows; leave one of them out")
    if bank_rows is None:
        print("\n".join(budget.lines(chosen, gpu_rate)))
    else:
        print("\n".join(spread.lines(chosen, bank_rows, ranks)))


@app.command()
def published(
    profile: ProfileName = "desk",
    pdf: Annotated[list[Path] | None, typer.Option(help="the papers' PDFs; repeatable")] = None,
) -> None:
    """Check the values transcribed from the papers: places, numbers, provenance, digests of the PDFs."""
    from mirepro.report import published, tables

    chosen = profiles.load(profiles.find_root(), profile)
    path = chosen.root / "published" / f"{profile}.csv"
    done, lines = published.check(path, tables.places(chosen.values["tables"]), pdf or ())
    print(f"{path.relative_to(chosen.root)}: {done} of {lines} values transcribed")


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False, profile: ProfileName = "desk"
) -> None:
    """Show versions, processor, commit, and the determinism key with everything behind it."""
    from mirepro import environment

    chosen = profiles.load(profiles.find_root(), profile)
    facts = environment.environment(chosen.root) | environment.exactness(chosen)
    print(json.dumps(facts, indent=1) if as_json else "\n".join(environment.lines(facts)))


@app.command()
def diff(run_a: Path, run_b: Path) -> None:
    """Name the first step at which two pretraining runs differ; exit 1 if they do."""
    from mirepro.diff import diff

    difference = diff(run_a, run_b)
    print(difference or "identical")
    raise typer.Exit(1 if difference else 0)


@data_app.command("import")
def import_data(
    kind: Annotated[str, typer.Argument(help="cifar10, cifar100, stl10, imagenet, coco, coco_mini, voc or lvis")],
    path: Path,
    out: Annotated[Path | None, typer.Option(help="folder of the data set [default: data/KIND]")] = None,
    side: Annotated[int | None, typer.Option(help="imagenet: side of the stored squares; 0 keeps the bytes")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="imagenet: processes")] = os.cpu_count() or 1,
) -> None:
    """Turn a data set that you fetched into shards with a manifest."""
    root = profiles.find_root()
    from mirepro.data import catalogue

    folder = out or root / "data" / kind
    manifest = folder / "manifest.json"
    before = manifest.read_bytes() if manifest.is_file() else None
    for split, counts in catalogue.load(kind, path, folder, side, jobs).items():
        print(f"{split}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    if before is not None and manifest.read_bytes() != before:
        print(f"{manifest}: differs from the one before; results of that data are stale (`git diff`, `mirepro status`)")


@data_app.command()
def check(
    name: Annotated[str | None, typer.Argument(help="a data set [default: all that are here]")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="all data sets of a profile")] = None,
) -> None:
    """Compare shards with their manifests; say what is missing, where to get it, and under which terms."""
    from mirepro.data import catalogue

    root = profiles.find_root()
    here = sorted(path.parent.name for path in (root / "data").glob("*/manifest.json"))
    names = [name] if name else profiles.load(root, profile).values["datasets"] if profile else here
    states = catalogue.states(root / "data", names)
    for item, state in states.items():
        print(f"{item}: {state}")
    lacking = [item for item, state in states.items() if catalogue.missing(state)]
    if lacking:
        raise UserError(f"missing: {', '.join(lacking)}; import them as said above")


@app.command()
def audit(
    source: Annotated[
        str, typer.Argument(envvar="MIREPRO_AUDIT_SOURCE", help="a folder, FOLDER@REVISION, or a git URL[@REVISION]")
    ] = "",
    level: Annotated[int, typer.Option(help="0 verify, 1 recompute tables, 2 evaluate again, 3 train again")] = 1,
    select: Annotated[
        list[str] | None,
        typer.Option(help="what to run again: T1, 'detect@*', ...; else all, at level 2 all but detections"),
    ] = None,
    profile: ProfileName = "desk",
    policy: Annotated[Path | None, typer.Option(help="judge by this file, not by the source's audit.yaml")] = None,
    publisher_key: Annotated[Path | None, typer.Option(help="public key that must have signed the release")] = None,
    remote: Annotated[
        str | None,
        typer.Option(
            envvar="MIREPRO_AUDIT_REMOTE",
            help="what git lacks: a release (folder, tar or docker://HOST/NAME@DIGEST), or a folder of a DVC remote",
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="private key that signs the report; `mirepro keys new`")] = None,
    seeds: Annotated[int, typer.Option(help="at level 3: fresh seeds for each row")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="stages at a time")] = 1,
    trust_code: Annotated[bool, typer.Option(help="run the audited code without a sandbox")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", envvar="MIREPRO_AUDIT_OUT", help="folder of the report; audit-report here, or beside SOURCE"
        ),
    ] = None,
    self_test: Annotated[bool, typer.Option(help="tamper with copies and show that each tamper is caught")] = False,
) -> None:
    """Audit published results: a verdict for every table cell. Exit 0 reproduced, 1 diverged, 2 not decided."""
    from mirepro.audit import levels, output, selftest

    if self_test:
        raise typer.Exit(selftest.conduct(Path(source) if source else profiles.find_root(), profile))
    if not source:
        raise UserError("audit: no source; give a folder, FOLDER@REVISION or a git URL")
    out = out or levels.default_out(source)
    what = (source, out, level, tuple(select or ()), profile, policy, publisher_key, remote, seeds, jobs, trust_code)
    raise typer.Exit(output.conduct(levels.Options(*what), key))


@app.command()
def relock(
    stages: Annotated[list[str], typer.Argument(help="trainings, for example pretrain@ir-s0 or 'pretrain@*'")],
    steps: Annotated[int, typer.Option(help="steps to compute again, up to the next digest")] = 100,
    profile: ProfileName = "desk",
) -> None:
    """Keep trainings whose changed code computes the same: first steps, outputs, metrics. Exit 1 if one is refused."""
    from mirepro.audit import relock as evidence

    chosen = profiles.load(profiles.find_root(), profile)
    refused = evidence.relock(chosen, stages, steps)
    raise typer.Exit(1 if refused else 0)


@app.command()
def publish(
    out: Annotated[Path, typer.Argument(help="the release: a new folder, or a file that ends in .tar")],
    key: Annotated[Path, typer.Option(help="private key that signs the release; `mirepro keys new`")],
    profile: ProfileName = "desk",
    push: Annotated[str | None, typer.Option(help="put it into a registry too: HOST/NAME:TAG")] = None,
) -> None:
    """Freeze a committed result: a signed list of all its files, and its artefacts as a DVC remote."""
    from mirepro.audit import registry, release

    root = profiles.find_root()
    if push is not None:
        registry.address(push)
    count = release.publish(root, profile, key, out)
    print(f"{count} files signed: {out}\nthe list, to be committed: {root / release.FILE}")
    if push is not None:
        print(f"pushed: {release.push(out, push)}")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="audit.dsse.json, its folder, or release.dsse.json in its checkout")],
    key: Annotated[Path | None, typer.Option(help="public key that must have signed it")] = None,
) -> None:
    """Check a signed audit: signature, files, every verdict from its inputs. Exit 0 good, 1 wrong, 2 not decided."""
    from mirepro.audit import output

    code, lines = output.verify(file, key)
    print("\n".join(lines))
    raise typer.Exit(code)


@keys_app.command("new")
def new_keys(file: Annotated[Path, typer.Argument(help="the private key; the public one goes to FILE.pub")]) -> None:
    """Make a pair of Ed25519 keys."""
    from mirepro.audit import statement

    name = statement.new_keys(file)
    print(f"private key: {file} (keep it to yourself)\npublic key: {file}.pub\nid: {name}")


def main() -> None:
    """Entry point: bad input is one line and exit 2, a failed job exit 1, Ctrl-C one line and exit 130."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        complain(str(error), 2)
    except JobFailed as error:
        complain(str(error), 1)
    except Detached as error:
        complain(str(error), INTERRUPTED)
    except TyperException as error:
        complain(f"{error.format_message() or 'no command.'} Try `mirepro --help`.", 2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "mirepro":
            raise
        complain(f"{error.name} is not installed in {sys.executable}; run `make setup`, then `. .venv/bin/activate`", 2)
    except OSError as error:
        complain(str(unusable(error)), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        complain("interrupted; the same command continues", INTERRUPTED)
    sys.exit(code)


def unusable(error: OSError) -> UserError:
    """What a file or folder that cannot be read or written is to the user.

    Raises:
        OSError: The given one, where neither a path nor the disk is at fault: a bug, whose traceback is wanted.
    """
    disk = error.errno in (errno.ENOSPC, errno.EROFS)
    if error.filename is None and not disk:
        raise error
    path = Path(str(error.filename or Path.cwd()))
    if disk:
        return files.refusal(path, error)
    return UserError(f"{path}: {error.strerror}; check that it is there and that you may read and write it")


def complain(message: str, code: int) -> None:
    """Prints one line to stderr and exits."""
    print(f"mirepro: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
