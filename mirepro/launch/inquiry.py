"""What a cluster says to a section of a site file without running anything: its partitions, and sbatch's own test."""

import dataclasses
import re
from typing import Any

from mirepro.errors import UserError
from mirepro.launch.scheduler import Request
from mirepro.launch.slurm import Slurm, command
from mirepro.site import Section, parse_minutes

KNOWN = "set one of those that `sacctmgr show associations user=$USER format=account,partition,qos` lists"
REFUSALS = {
    "invalid account|account not permitted": ("account", KNOWN),
    "invalid qos|qos not permitted": ("qos", KNOWN),
    "invalid partition|permitted to use this partition|partition.* not available": (
        "partition", "set one that `sinfo` lists and you may use"
    ),
    r"max\w*(wall|min)|time limit is invalid": ("time", "lower it; a stage with checkpoints goes on after a requeue"),
    r"max\w*node|node count": ("nodes", "lower it"),
    r"max\w*mem|memory": ("memory", "lower it"),
    "gres": ("gpus", "ask for what `sinfo --format='%P %G'` lists"),
    r"max\w*cpu|cpu count|more processors": ("cpus", "lower it, or `tasks` or `nodes`"),
    "invalid feature": ("options.constraint", "set one that `sinfo --format='%P %f'` lists"),
    "reservation is invalid": ("options.reservation", "set one that `scontrol show reservation` lists"),
    "invalid node name": ("options.nodelist", "name nodes that `sinfo --Node` lists"),
}  # fmt: skip
"""Parts of what sbatch says, the key that is at fault, and the remedy; the first part that fits counts."""
LEAST: dict[str, Any] = {"memory": None, "gpus": 0, "cpus": 1, "tasks": 1, "nodes": 1, "options": {}}
"""What any node has."""


def partition(section: Section, kind: str) -> None:
    """Compares a section with the partitions it names.

    Raises:
        UserError: The cluster has no such partition, or it allows less.
    """
    listing = _partitions()
    default = next((key for key, facts in listing.items() if facts.get("Default") == "YES"), None)
    wanted = section.partition or default
    if wanted is None:
        raise UserError(f"{kind}.partition: missing, and the cluster has no default; known: {', '.join(listing)}")
    for part in wanted.split(","):
        if part not in listing:
            raise UserError(f"{kind}.partition: {part!r} is unknown to the cluster; known: {', '.join(listing)}")
        facts = listing[part]
        if facts.get("State", "UP") != "UP":
            raise UserError(f"{kind}.partition: {part} is {facts['State']}; use another one")
        longest = facts.get("MaxTime", "UNLIMITED")
        if longest not in ("UNLIMITED", "INFINITE") and section.minutes > parse_minutes(longest):
            raise UserError(f"{kind}.time: {section.time} is over the limit {longest} of {part}; lower it")
        if section.nodes > int(facts.get("TotalNodes", section.nodes)):
            raise UserError(f"{kind}.nodes: {section.nodes}, and {part} has {facts['TotalNodes']}; lower it")


def _partitions() -> dict[str, dict[str, str]]:
    """The facts of every partition by its name."""
    listing = {}
    for line in command("scontrol", "--oneliner", "show", "partition").splitlines():
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        listing[facts["PartitionName"]] = facts
    return listing


def start(scheduler: Slurm, request: Request, kind: str) -> float | None:
    """When a job could start, in seconds since 1970, if sbatch gives an estimate; nothing is submitted.

    Raises:
        UserError: The job would be refused.
    """
    try:
        said = scheduler.test(request)
    except UserError as error:
        blamed = _blamed(scheduler, request) if "node configuration" in str(error) else ""
        raise UserError(refusal(request.section, kind, str(error), blamed)) from error
    found = re.search(r"to start at (\d+)", said)
    return float(found[1]) if found else None


def _blamed(scheduler: Slurm, request: Request) -> str:
    """The key that alone keeps the job from being accepted; empty where there is none."""
    for key, least in LEAST.items():
        section = dataclasses.replace(request.section, **{key: least})
        try:
            scheduler.test(dataclasses.replace(request, section=section))
        except UserError:
            continue
        return key
    return ""


def refusal(section: Section, kind: str, said: str, blamed: str = "") -> str:
    """One line for what sbatch refuses: the key, its value, the controller's words, and the remedy.

    Args:
        section: What was asked for.
        kind: The class of stages.
        said: sbatch's messages.
        blamed: The key at fault, where asking has shown it.
    """
    if option := re.search(r"unrecognized option '--([^'=]*)", said):
        return f"{kind}.options.{option[1]}: sbatch has no such option; see `man sbatch`, or leave it out"
    verdict = re.search(r"(error: \w+ )?allocation failure: .*", said)  # without what a plugin of the site talks before
    words = _bare(verdict[0] if verdict else said)
    alone = {"": (blamed, "lower it, or wait for more nodes; all the rest is accepted")} if blamed else {}
    for pattern, (key, remedy) in (alone or REFUSALS).items():
        if re.search(pattern, words, re.IGNORECASE):
            key = "options.gres" if key == "gpus" and not section.gpus else key
            name, _, inner = key.partition(".")
            value = section.options.get(inner) if inner else getattr(section, name)
            return f"{kind}.{key}: {'missing' if value is None else repr(value)}: {words}; {remedy}"
    return f"{kind}: sbatch: {_bare(said)}; compare the section with `sinfo --Node --long`"


def _bare(said: str) -> str:
    return re.sub("(sbatch|error|fatal|allocation failure): ", "", said)
