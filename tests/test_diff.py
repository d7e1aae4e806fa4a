"""`mirepro diff` names the first step and the tensor that differ there, or says that there is no difference."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mirepro.bank import MemoryBank
from mirepro.cli import app
from mirepro.diff import diff
from mirepro.errors import UserError
from tests.test_pretrain import data, run, train

__all__ = ["data"]


@pytest.fixture(scope="module")
def usual(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a digest at every step; each of its 3 epochs has 5."""
    return train(run(digest=1), data, tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("step", [1, 4, 15])
def test_one_bank_row_changed_at_a_step_is_found(
    usual: Path, data: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = MemoryBank.update, []

    def update(self: MemoryBank, index: torch.Tensor, *arguments: object) -> None:
        original(self, index, *arguments)  # type: ignore[arg-type]
        seen.append(index)
        if len(seen) == step:  # by one unit in the last place
            self.rows[0, 0] = torch.nextafter(self.rows[0, 0], torch.tensor(2.0))

    monkeypatch.setattr(MemoryBank, "update", update)
    other = train(run(digest=1), data, tmp_path)
    assert diff(usual, other) == f"first difference at step {step}: bank.rgb"
    links = [json.loads(line) for line in (other / "chain.txt").read_text().splitlines()]
    assert len(links) == len(seen) == 15


def test_another_seed_differs_at_once_and_everywhere(usual: Path, data: Path, tmp_path: Path) -> None:
    found = diff(usual, train(run(seed=1, digest=1), data, tmp_path)) or ""
    assert found.startswith("first difference at step 1: bank.rgb, ")
    assert int(re.findall(r" and (\d+) more tensors$", found)[0]) > 10


def test_the_command_says_identical_or_exits_with_1(usual: Path, data: Path, tmp_path: Path) -> None:
    again, other = (train(run(digest=1, epochs=n), data, tmp_path / str(n)) for n in (3, 2))
    same = CliRunner().invoke(app, ["diff", str(usual), str(again)])
    assert (same.exit_code, same.output) == (0, "identical\n")
    changed = CliRunner().invoke(app, ["diff", str(usual), str(other)])
    assert changed.exit_code == 1
    assert re.match(r"first difference at step 2: encoders\.rgb\.", changed.output)  # another schedule of lr


def test_lengths_steps_and_damage_are_told(usual: Path, tmp_path: Path) -> None:
    lines = (usual / "chain.txt").read_text().splitlines(keepends=True)
    short, sparse, damaged = tmp_path / "short.txt", tmp_path / "sparse.txt", tmp_path / "damaged.txt"
    short.write_text("".join(lines[:7]))
    sparse.write_text("".join(lines[1::2]))
    damaged.write_text("".join(lines)[:-20])
    assert diff(usual, short) == "equal for 7 records, then one run goes on: 15 and 7 records"
    assert diff(usual, sparse) == "the chains record other steps: 1 and 2"
    for path, message in ((damaged, "damaged digest chain"), (tmp_path, "no digest chain")):
        with pytest.raises(UserError, match=message):
            diff(usual, path)


def test_a_change_between_two_digests_is_found_in_the_link(usual: Path, tmp_path: Path) -> None:
    """A link covers the links before it, so that the digests of equal tensors do not hide an earlier difference."""
    links = [json.loads(line) for line in (usual / "chain.txt").read_text().splitlines()]
    links[3]["chain"] = "0" * 64
    path = tmp_path / "chain.txt"
    path.write_text("".join(json.dumps(link) + "\n" for link in links))
    assert diff(usual, path) == "first difference at step 4: before this step"
