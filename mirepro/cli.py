"""The command line: every command parses, calls one function and prints."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from mirepro import profiles
from mirepro.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=(
    "Exact reproduction of mutual-information contrastive representation learning."
))  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Import and check data sets.")
app.add_typer(data_app, name="data")

Key = Annotated[str | None, typer.Argument(help="a run or a data set, for stages that have several")]
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""

ProfileName = Annotated[str, typer.Option("--profile", help="a folder of profiles/, or desk")]


def find_root() -> Path:
    """The repository that holds the working directory; it has to be the one this command was installed from.

    Raises:
        UserError: No repository here, or another one's command.
    """
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "mirepro" / "cli.py").is_file()), None)
    own = Path(__file__).resolve().parent.parent
    if root is None:
        raise UserError(f"{here}: not inside the repository; change to its folder, for example {own}")
    if own != root.resolve():
        raise UserError(f"{sys.argv[0]} belongs to {own}, not to {root}; run `. .venv/bin/activate` in {root}")
    return root


@app.command()
def stage(name: str, key: Key = None, profile: ProfileName = "desk") -> None:
    """Run one stage; the pipeline's commands call this."""
    from mirepro import stages

    stages.run(find_root(), profile, name, key)


@app.command()
def repro(
    target: Annotated[str | None, typer.Argument(help="a stage such as pretrain@ir-s0, or a group of stages")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="stages at a time")] = os.cpu_count() or 1,
    profile: ProfileName = "desk",
) -> None:
    """Bring every stale stage up to date, several at a time."""
    from mirepro import environment, stages
    from mirepro.launch import waves

    chosen = profiles.load(find_root(), profile)
    try:
        count = waves.repro(chosen, targets(chosen, target), jobs)
    except waves.StageFailed as failure:
        print(f"mirepro: {failure}", file=sys.stderr)
        raise typer.Exit(1) from failure
    page = chosen.root / "view" / chosen.name / "index.html"
    tracked = chosen.root / "reports" / chosen.name / "index.html"
    if target is None and tracked.is_file() and (count or not page.is_file()):
        stages.report(chosen, environment.view(chosen))
    print(f"{count} stages ran; everything asked for is up to date" if count else "nothing was stale")
    if target is None:
        print(f"report: {tracked}\nwith this machine's facts: {page}")


def targets(profile: profiles.Profile, target: str | None) -> list[str]:
    """DVC's address of a stage of the profile."""
    if target is None:
        return []
    return [target if profile.pipeline == "dvc.yaml" or ":" in target else f"{profile.pipeline}:{target}"]


@app.command()
def status(profile: ProfileName = "desk") -> None:
    """Say which stages are stale, and why; changes of code are seen."""
    from mirepro import stages
    from mirepro.launch.plan import Pipeline

    chosen = profiles.load(find_root(), profile)
    stages.code(chosen)
    plan = Pipeline(chosen.root, [chosen.pipeline]).plan()
    for name in plan.stale:
        print(f"{name}: {plan.reasons.get(name, 'an earlier stage is stale')}")
    print(f"{len(plan.stale)} of {len(plan.needs)} stages are stale" if plan.stale else "nothing is stale")


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Show versions, processor and commit."""
    from mirepro import environment

    facts = environment.environment(find_root())
    print(json.dumps(facts, indent=1) if as_json else "\n".join(f"{name}: {value}" for name, value in facts.items()))


@app.command()
def diff(run_a: Path, run_b: Path) -> None:
    """Name the first step at which two pretraining runs differ; exit 1 if they do."""
    from mirepro.diff import diff

    difference = diff(run_a, run_b)
    print(difference or "identical")
    raise typer.Exit(1 if difference else 0)


@data_app.command("import")
def import_data(
    kind: Annotated[str, typer.Argument(help="cifar10 or coco")],
    path: Path,
    out: Annotated[Path | None, typer.Option(help="folder of the data set [default: data/KIND]")] = None,
) -> None:
    """Turn CIFAR-10 or COCO into shards with a manifest."""
    root = find_root()
    from mirepro.data import cifar, coco

    importers: dict[str, Any] = {"cifar10": cifar.import_cifar10, "coco": coco.import_coco}
    if kind not in importers:
        raise UserError(f"data import: {kind!r} is unknown; known: {', '.join(importers)}")
    for split, counts in importers[kind](path, out or root / "data" / kind).items():
        print(f"{split}: {', '.join(f'{count} {what}' for what, count in counts.items())}")


@data_app.command()
def check(name: Annotated[str | None, typer.Argument(help="a data set [default: all]")] = None) -> None:
    """Compare shards with their manifests."""
    from mirepro.data import shards

    folder = find_root() / "data"
    found = [name] if name else sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    for item in found:
        shards.verify(folder / item)
        print(f"{item}: intact")


def main() -> None:
    """Entry point: bad input is one line and exit 2, Ctrl-C one line and exit 130."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        complain(str(error), 2)
    except TyperException as error:
        complain(f"{error.format_message() or 'no command.'} Try `mirepro --help`.", 2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "mirepro":
            raise
        complain(f"{error.name} is not installed in {sys.executable}; run `make setup`, then `. .venv/bin/activate`", 2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        complain("interrupted; the same command continues", INTERRUPTED)
    sys.exit(code)


def complain(message: str, code: int) -> None:
    """Prints one line to stderr and exits."""
    print(f"mirepro: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
