"""Stages as jobs: what is sent to a launcher."""

from functools import partial
from pathlib import Path

from mirepro import execution, site, stages
from mirepro.launch.launcher import Launcher, Ticket
from mirepro.launch.task import compute
from mirepro.profiles import Profile


def chosen(root: Path) -> Launcher | None:
    """The launcher that MIREPRO_LAUNCH names; None for `inline`.

    Raises:
        UserError: No such site, or its file is wrong.
    """
    where = site.chosen(root, stages.JOBS)
    return None if where is None else Launcher(root, where)


def run(root: Path, profile_name: str, kind: str, key: str | None) -> None:
    """Runs one stage through the chosen launcher; see `stages.run`."""
    launcher = chosen(root)

    def launch(profile: Profile, kind: str, key: str | None, mark: str) -> None:
        assert launcher is not None
        launcher.run(_ticket(profile, kind, key, mark))

    stages.run(root, profile_name, kind, key, launch if launcher else None)


def ticket(profile: Profile, kind: str, key: str | None) -> Ticket | None:
    """What a launcher needs to compute a stage; None where the last run had the same fingerprint.

    Raises:
        UserError: Whatever the stage refuses.
    """
    name, job = stages.described(profile, kind, key)
    if stages.current(profile, name, job):
        return None
    return _ticket(profile, kind, key, execution.fingerprint(profile.root, name, job))


def _ticket(profile: Profile, kind: str, key: str | None, mark: str) -> Ticket:
    call = partial(compute, profile.root, profile.name, kind, key, mark)
    name = f"{kind}@{key}" if key else kind
    return Ticket(name, kind, mark, execution.work_folder(profile.root, mark), call, profile.threads)
