"""Which stages are stale, and what each waits for; asked of DVC inside this process."""

import logging
import os
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from mirepro.errors import UserError
from mirepro.launch.dvc import make_atomic, parser, parsing


@dataclass(frozen=True)
class Plan:
    """The stages of a reproduction in an order that respects dependencies.

    Attributes:
        needs: For each stage the stages it reads from; keys are DVC's addresses.
        stale: The stages that have to run, or whose inputs may change because an earlier one runs.
        reasons: For each stage that is stale by itself, why.
    """

    needs: dict[str, set[str]]
    stale: list[str]
    reasons: dict[str, str]


def is_code(address: str) -> bool:
    """Whether a stage is a profile's `code`, which runs every time."""
    return address.rpartition(":")[2] == "code"


class Pipeline:
    """DVC's graph of the targets and everything they need.

    Args:
        root: The repository's root.
        targets: DVC targets: a stage, a group of stages, or a dvc.yaml.

    Raises:
        UserError: DVC refuses the pipeline or a target.
    """

    def __init__(self, root: Path, targets: Sequence[str]) -> None:
        os.environ.setdefault("DVC_NO_ANALYTICS", "1")
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.repo.reproduce import collect_stages, plan_repro

        self._root, self._parsed = root, parser(root)
        try:
            with chdir(root), parsing(self._parsed):  # DVC's addresses are relative to the working directory
                self._repo = Repo(str(root), _wait_for_lock=True)
                graph = self._repo.index.graph
                order = plan_repro(graph, collect_stages(self._repo, targets))
                self._stages = {stage.addressing: stage for stage in order}
                self.needs = {s.addressing: {n.addressing for n in graph.successors(s)} for s in order}
        except DvcException as error:
            raise UserError(" ".join(str(error).split()) + "; `mirepro status` lists the stages") from error

    def plan(self) -> Plan:
        """Judges every stage; `code` is left out, because it runs every time."""
        reasons: dict[str, str] = {}
        stale: list[str] = []
        with chdir(self._root), parsing(self._parsed), self._repo.lock:
            for name, stage in self._stages.items():
                if is_code(name):
                    continue
                if stage.changed():
                    reasons[name] = _reason(stage)
                if name in reasons or not self.needs[name].isdisjoint(stale):
                    stale.append(name)
        return Plan(self.needs, stale, reasons)

    def differences(self, address: str) -> list[tuple[str, str]]:
        """(path, what happened to it) of everything in which a stage differs from its entry in dvc.lock."""
        with chdir(self._root), self._repo.lock:
            entries = self._stages[address].status().get(address, [])
        changes = [("stage", entry) if isinstance(entry, str) else entry for entry in entries]
        return [
            pair for entry in changes for pair in
            ([entry] if isinstance(entry, tuple) else [item for what in entry.values() for item in _flat(what)])
        ]  # fmt: skip

    def commit(self, addresses: Sequence[str]) -> None:
        """Records stages in dvc.lock as they stand, without running them."""
        make_atomic()
        logging.getLogger("dvc").setLevel(logging.WARNING)
        with chdir(self._root):
            for address in addresses:
                self._repo.commit(address, force=True)


def _reason(stage: object) -> str:
    """What changed, in DVC's words, on one line."""
    entries = stage.status().get(stage.addressing, [])  # type: ignore[attr-defined]
    parts = []
    for entry in entries:
        if not isinstance(entry, dict):
            parts.append(str(entry))
            continue
        for kind, changes in entry.items():
            names = [f"{path} {what}" for path, what in _flat(changes)]
            parts.append(f"{kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
    return "; ".join(parts) or "never run"


def _flat(changes: dict[str, object]) -> list[tuple[str, str]]:
    """DVC nests parameters one level deeper: {file: {key: state}}."""
    result = []
    for path, what in changes.items():
        result += [(str(k), str(v)) for k, v in what.items()] if isinstance(what, dict) else [(path, str(what))]
    return result
