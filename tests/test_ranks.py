"""Any number of ranks gives the bits of one process: real processes that meet through gloo."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from cluster import free_port
from torch import nn

from mirepro import execution, ranks
from mirepro.errors import UserError
from mirepro.moments import Moments
from tests.test_pretrain import bytes_of, data, run, train

__all__ = ["data"]
OBJECTIVES = ("ring", "la", "cmc_ring", "supervised", "moco_ring", "simclr")
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SUBMITIT_EXECUTOR",
    "SLURM_STEP_NUM_TASKS",
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m")


def start(size: int, *arguments: object, program: str = "tests.ranks", **variables: str) -> list[subprocess.Popen[str]]:
    """`size` ranks of a program; one of them is a plain process."""
    port = free_port()
    command = [sys.executable, "-m", program, *map(str, arguments)]
    processes = []
    for rank in range(size):
        names = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
        env = os.environ | {name: str(value) for name, value in names.items()} | variables
        processes.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


def finish(processes: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; a hang fails."""
    try:
        texts = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def outputs(
    size: int, data: Path, work: Path, objectives: str, shards: int | str = 4, **variables: str
) -> dict[str, dict[str, bytes]]:
    """Everything that the runs wrote: weights and buffers, bank, history, chain, metrics."""
    for code, _, errors in finish(start(size, data, work, objectives, shards, **variables)):
        assert code == 0, errors
    found = {name: bytes_of(work / name / "out") for name in objectives.split(",")}
    expected = ["bank.safetensors", "chain.txt", "encoder.safetensors", "history.jsonl", "metrics.json"]
    assert all(sorted(files) == expected for files in found.values())
    return found


def test_two_ranks_equal_one_process_and_other_shards_differ(data, tmp_path):
    pair = outputs(2, data, tmp_path / "2", "ring")["ring"]
    del pair["metrics.json"]
    assert bytes_of(train(run("ring", shards=4), data, tmp_path / "4")) == pair
    assert bytes_of(train(run("ring", shards=2), data, tmp_path / "s"))["chain.txt"] != pair["chain.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_two_and_four_ranks_are_equal_to_the_byte(objective, data, tmp_path):
    alone = outputs(1, data, tmp_path / "1", objective)
    assert outputs(2, data, tmp_path / "2", objective) == alone
    assert outputs(4, data, tmp_path / "4", objective) == alone


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_shards_are_refused_by_every_rank(data, tmp_path):
    started = time.monotonic()
    for rank, (code, _, errors) in enumerate(finish(start(3, data, tmp_path, "ring", 4))):
        assert code == 2
        assert (
            errors.strip()
            == f"mirepro: rank {rank}: 3 ranks cannot share pretrain.shards 4 equally; start one of 1, 2, 4"
        )
    assert time.monotonic() - started < 300  # not ranks.TIMEOUT


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_at_once(data, tmp_path):
    processes = start(2, data, tmp_path, "ring", 4, MIREPRO_TEST_DIE="1:7")
    assert processes[1].wait(300) == -9
    died = time.monotonic()
    assert processes[0].wait(120) == 2
    assert time.monotonic() - died < 120 < ranks.TIMEOUT.total_seconds()
    (_, said, errors), _ = finish(processes)
    assert said == "resumed at 0\n"
    assert "rank 0: lost the other ranks" in errors
    assert "Traceback" not in errors
    resumed = finish(start(4, data, tmp_path, "ring", 4))  # with more ranks than before
    assert [code for code, *_ in resumed] == [0] * 4
    assert resumed[0][1] == "resumed at 5\n"
    assert bytes_of(tmp_path / "ring" / "out") == outputs(1, data, tmp_path / "whole", "ring")["ring"]


@pytest.mark.slow
def test_ranks_that_are_told_to_stop_leave_a_checkpoint_within_the_epoch(data, tmp_path):
    (code, said, _), (other, _, errors) = finish(start(2, data, tmp_path, "ring", 4, MIREPRO_TEST_STOP="0:6"))
    assert (code, said, other) == (9, "resumed at 0\n", 2)
    assert "rank 1: lost the other ranks" in errors
    assert finish(start(1, data, tmp_path, "ring", 4))[0][1] == "resumed at 8\n"
    assert bytes_of(tmp_path / "ring" / "out") == outputs(1, data, tmp_path / "whole", "ring")["ring"]


@pytest.mark.slow
def test_the_first_message_is_the_cause(data, tmp_path):
    command = [*TORCHRUN, "tests.ranks", str(data), str(tmp_path), "ring", "4"]
    done = subprocess.run(
        command, env=os.environ | {"MIREPRO_TEST_FAIL": "1:3"}, text=True, capture_output=True, timeout=300
    )
    assert done.returncode != 0
    assert done.stderr.index("ZeroDivisionError: the cause") < done.stderr.find("lost the other ranks") % 10**9
    assert not (tmp_path / "ring" / "out" / "encoder.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 2)])
@pytest.mark.parametrize("name", ["la", "moco_ring"])
def test_a_run_goes_on_with_another_number_of_ranks(name, before, after, data, tmp_path):
    whole = outputs(1, data, tmp_path / "whole", name)
    assert {code for code, *_ in finish(start(before, data, tmp_path, name, 4, 2))} == {0}
    assert not (tmp_path / name / "out" / "metrics.json").exists()
    rest = finish(start(after, data, tmp_path, name, 4))
    assert {code for code, *_ in rest} == {0}
    assert rest[0][1] == "resumed at 10\n"
    assert {name: bytes_of(tmp_path / name / "out")} == whole


@pytest.mark.slow
def test_two_ranks_that_share_the_bank_equal_one_process_and_whole_banks_differ(data, tmp_path):
    pair = outputs(2, data, tmp_path / "2", "ring", "4:4")["ring"]
    del pair["metrics.json"]
    assert bytes_of(train(run("ring", shards=4, bank_shards=4), data, tmp_path / "4")) == pair
    assert bytes_of(train(run("ring", shards=4), data, tmp_path / "0"))["bank.safetensors"] != pair["bank.safetensors"]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param("ball,la,cave,cave_numerator,cmc_ring", marks=pytest.mark.slow),
        pytest.param("ir,ring,cmc,ir_nce,moco_ring,simclr", marks=pytest.mark.full),
    ],
)
def test_ranks_that_share_the_bank_are_equal_to_the_byte(names, data, tmp_path):
    alone = outputs(1, data, tmp_path / "1", names, "4:4")
    assert outputs(2, data, tmp_path / "2", names, "4:4") == alone
    assert outputs(4, data, tmp_path / "4", names, "4:4") == alone


@pytest.mark.slow
def test_control_other_blocks_and_a_changed_row_of_a_rank_show(data, tmp_path):
    four = outputs(2, data, tmp_path / "4", "ring", "4:4")["ring"]
    two = outputs(2, data, tmp_path / "2", "ring", "4:2")["ring"]
    assert two["bank.safetensors"] != four["bank.safetensors"]
    moved = outputs(2, data, tmp_path / "moved", "ring", "4:4", MIREPRO_TEST_MOVE="1:7")["ring"]
    assert moved["chain.txt"].splitlines()[:3] == four["chain.txt"].splitlines()[:3]
    assert moved["chain.txt"].splitlines()[3] != four["chain.txt"].splitlines()[3]


@pytest.mark.parametrize(
    "name", [pytest.param("la", marks=pytest.mark.slow), pytest.param("cmc", marks=pytest.mark.full)]
)
def test_a_run_goes_on_with_other_parts_of_the_bank(name, data, tmp_path):
    whole = outputs(1, data, tmp_path / "whole", name, "4:4")
    assert {code for code, *_ in finish(start(4, data, tmp_path, name, "4:4", 2))} == {0}
    rest = finish(start(2, data, tmp_path, name, "4:4"))
    assert rest[0][:2] == (0, "resumed at 10\n")
    assert {name: bytes_of(tmp_path / name / "out")} == whole


@pytest.mark.slow
def test_a_run_goes_on_within_an_epoch_with_other_parts_of_bank_and_clusters(data, tmp_path):
    processes = start(2, data, tmp_path, "la", "4:4", MIREPRO_TEST_DIE="1:9", MIREPRO_TEST_OFTEN="1")
    assert finish(processes, 120)[1][0] == -9
    assert finish(start(4, data, tmp_path, "la", "4:4"))[0][:2] == (0, "resumed at 8\n")
    assert bytes_of(tmp_path / "la" / "out") == outputs(1, data, tmp_path / "whole", "la", "4:4")["la"]


@pytest.mark.full
def test_a_killed_rank_that_holds_rows_ends_the_others_and_the_run_goes_on(data, tmp_path):
    processes = start(2, data, tmp_path, "ring", "4:4", MIREPRO_TEST_DIE="1:7")
    (code, _, errors), (killed, *_) = finish(processes, 120)
    assert (code, killed) == (2, -9)
    assert errors.startswith("mirepro: rank 0: lost the other ranks")
    assert finish(start(4, data, tmp_path, "ring", "4:4"))[0][:2] == (0, "resumed at 5\n")
    assert bytes_of(tmp_path / "ring" / "out") == outputs(1, data, tmp_path / "whole", "ring", "4:4")["ring"]


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_banks_blocks_are_refused(data, tmp_path):
    for rank, (code, _, errors) in enumerate(finish(start(2, data, tmp_path, "ring", "4:3"))):
        assert code == 2
        words = "2 ranks cannot share pretrain.bank_shards 3 equally; start one of 1, 3"
        assert errors.strip() == f"mirepro: rank {rank}: {words}"


PARAMS = """
profile: desk
params: params.yaml
root: .
tier: portable
threads: 1
datasets: [desk, scenes]
pretrain: {data: desk, epochs: 3, batch: 16, shards: 4, monitor: 1, digest: 2, encoder: {width: 4, stem: tiny, dim: 8},
  views: {size: 16}}
rows: {ring: {objective: ring, options: {k: 5}}}
runs: {ring-s0: {row: ring, objective: ring, seed: 0}}
evaluate: {data: desk}
detect: {}
toy: {}
detect_runs: {ring-s0-mask: {run: ring-s0, row: ring, seed: 0, model: mask, data: scenes}}
tables: {T1: {rows: {ring: [ring-s0]}}}
"""


@pytest.fixture
def project(root, data, tmp_path) -> Path:
    """A small repository with the whole package."""
    shutil.copytree(root / "mirepro", tmp_path / "mirepro", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("desk", "scenes"):
        shutil.copytree(data, tmp_path / "data" / name)
    (tmp_path / "params.yaml").write_text(PARAMS)
    mirepro(tmp_path, sys.executable, "-m", "mirepro", "stage", "code")
    return tmp_path


def mirepro(project: Path, *command: str) -> None:
    """Runs a command in the small repository, without the tier's variables: the command line has to set them."""
    own = {line.split("=")[0] for line in (Path(__file__).parent.parent / "portable.env").read_text().splitlines()}
    env = {name: value for name, value in os.environ.items() if name not in own} | {"PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=env, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr


def results(project: Path) -> dict[str, bytes]:
    """Outputs and metrics, which are removed; nothing else may be left behind."""
    found = {}
    for folder in ("runs", "metrics"):
        paths = [path for path in (project / folder).rglob("*") if path.is_file()]
        found |= {str(path.relative_to(project)): path.read_bytes() for path in paths}
        shutil.rmtree(project / folder)
    assert not any((project / ".mirepro" / "work").iterdir())
    return found


@pytest.mark.slow
def test_stages_under_torchrun_equal_those_of_one_process(project):
    for stage in ("pretrain", "evaluate"):
        mirepro(project, sys.executable, "-m", "mirepro", "stage", stage, "ring-s0")
    alone = results(project)
    assert {"metrics/desk/pretrain/ring-s0.json", "metrics/desk/evaluate/ring-s0.json"} < set(alone)
    for stage in ("pretrain", "evaluate"):
        mirepro(project, *TORCHRUN, "mirepro", "stage", stage, "ring-s0")
    assert results(project) == alone


SUBMIT = """
import sys
from submitit import LocalExecutor
from submitit.helpers import CommandFunction

if __name__ == "__main__":
    executor = LocalExecutor("jobs")
    executor.update_parameters(tasks_per_node=2, timeout_min=6)
    job = executor.submit(CommandFunction([sys.executable, "-m", "mirepro", "stage", "pretrain", "ring-s0"]))
    job.results()
"""


@pytest.mark.slow
def test_submitits_tasks_are_ranks(project):
    mirepro(project, sys.executable, "-m", "mirepro", "stage", "pretrain", "ring-s0")
    alone = results(project)
    mirepro(project, sys.executable, "-c", SUBMIT)
    assert results(project) == alone


@pytest.fixture
def bare():
    with mock.patch.dict(os.environ):
        clear()
        yield os.environ


def clear() -> None:
    for name in VARIABLES:
        os.environ.pop(name, None)


def test_rank_and_size_come_from_the_launcher(bare):
    assert ranks.identity() == (0, 1)
    for name, value in {"EXECUTOR": "local", "LOCAL_NTASKS": "2", "LOCAL_GLOBALID": "1", "LOCAL_JOB_ID": "7"}.items():
        bare[f"SUBMITIT_{name}"] = value
    assert ranks.identity() == (1, 2)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    bare["RANK"] = "3"
    with pytest.raises(UserError, match="RANK: 3 of 2 ranks"):
        ranks.identity()
    clear()
    slurm = {"STEP_NUM_TASKS": "4", "NTASKS": "4", "PROCID": "2", "LOCALID": "0", "JOB_ID": "9", "JOB_NUM_NODES": "2"}
    for name, value in (slurm | {"JOB_NODELIST": "n[1-2]", "NODEID": "1"}).items():
        bare[f"SLURM_{name}"] = value
    assert ranks.identity() == (2, 4)
    assert os.environ["MASTER_ADDR"] == "n1"


def test_only_pretraining_is_shared_and_other_ranks_write_nothing(bare, tmp_path):
    computed = []

    def compute(work, out, fingerprint):
        computed.append(str(work))
        return {}

    for shared in (True, False):
        job = execution.Job({"shared": shared}, (), compute, f"metrics/{shared}.json", shared=shared)
        bare |= {"RANK": "1", "WORLD_SIZE": "2"}
        assert execution.execute(tmp_path, "x", job) is None
    assert computed == [os.devnull]
    assert not any(tmp_path.iterdir())
    clear()
    assert execution.execute(tmp_path, "x", job) is not None
    assert (tmp_path / "metrics" / "False.json").is_file()


class Rehearsal(ranks.World):
    """A world whose ranks run one after the other: `rows` are what all of them sent in the first round."""

    rows: list[torch.Tensor]

    def gather(self, rows):
        self.rows.append(rows)
        return torch.cat(self.rows[-self.size :])


@pytest.mark.parametrize(("shards", "size"), [(4, 2), (4, 4), (6, 2), (6, 3), (8, 2), (12, 4), (5, 5), (1, 1)])
def test_gradients_are_summed_in_the_same_tree(shards, size):
    draw = torch.Generator().manual_seed(shards)
    parts = [[torch.randn(3, 5, generator=draw) * 10**i, torch.randn(7, generator=draw)] for i in range(shards)]
    expected = ranks.tree_sum(parts)
    Rehearsal.rows = []
    own = shards // size
    found = [Rehearsal(rank, size).total(parts[rank * own : (rank + 1) * own]) for rank in range(size)][-1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_control_subtrees_of_three_shards_are_another_tree():
    parts = [[torch.tensor([value])] for value in (1e8, 1.0, 1.0, -1e8, 1.0, 1.0)]
    halves = [ranks.tree_sum(parts[:3]), ranks.tree_sum(parts[3:])]
    assert not torch.equal(ranks.tree_sum(halves)[0], ranks.tree_sum(parts)[0])


@pytest.mark.parametrize("shape", [(64, 24, 8, 8), (16, 33, 5, 5), (64, 64)])
def test_folded_statistics_are_torchs_own(shape):
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    own, folded, turned = (kind(shape[1]).train() for _ in range(3))
    moments, others = Moments(nn.Sequential(folded)), Moments(nn.Sequential(turned))
    draw = torch.Generator().manual_seed(0)
    for _ in range(10):
        batch = torch.randn(shape, generator=draw) * 3 + 1
        running, taken = moments.take(), []
        for shard in batch.chunk(4):
            assert torch.equal(own(shard), folded(shard))
            taken.append(moments.take())
        others.fold(others.take(), torch.stack(taken[::-1]), 0)
        moments.fold(running, torch.stack(taken), 4)
        for name, value in own.state_dict().items():
            assert torch.equal(value, folded.state_dict()[name]), name
    assert own.num_batches_tracked == turned.num_batches_tracked == 40
    assert not torch.equal(own.running_mean, turned.running_mean)  # the control: shards in another order
