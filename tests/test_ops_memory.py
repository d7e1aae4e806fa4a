"""Memory of a query beside the bank, at the size of ImageNet: the process's own peak, as the kernel counts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 96  # MiB beside the bank, results included
QUERIES = {
    "top": "ops.neighbors(z, bank, 4096)",
    "ring": "ops.region_sample(z, bank, 12_811, 128_116, 4096, seed=1, step=1, sample_index=own)",
    "thresholds": "ops.region_thresholds(z, bank, 12_811, 128_116)",
    "mates left out": "ops.region_sample(z, bank, 12_811, 128_116, 4096, seed=1, step=1, sample_index=own, own=own, "
                      "labels=labels, exclude_mates=True)",
    "sums": "ops.region_logsumexp(z, bank, 12_811, 128_116, 0.07, own=own, labels=labels)",
    "sums' gradient": "sum(ops.region_logsumexp(leaf, bank, 0, 128_116, 0.07, own=own, labels=labels)).sum()"
                      ".backward()",
    "sampled loss": "ops.gather_nce(z, bank, index, 0.07)",
    "sampled loss' gradient": "ops.gather_nce(leaf, bank, index, 0.07).sum().backward()",
    "sampled scores' gradient": "ops.gather_dot(leaf, bank, index).sum().backward()",
    "clusters": "ops.bank_assign(bank, z)",
}  # fmt: skip
CONTROLS = ("z[:64] @ bank.T", "(leaf[:64] @ bank.T).logsumexp(1).sum().backward()")
SCRIPT = """
import ctypes, re, sys
from pathlib import Path

import torch
from mirepro import ops

torch.set_num_threads({threads})
bank, z = (torch.nn.init.normal_(torch.empty(n, 128)) for n in (1_281_167, 256))
for x in (bank, z):
    for rows in x.split(65_536):
        rows /= rows.norm(dim=1, keepdim=True)
own = torch.arange(256)
index = torch.randint(len(bank), (256, 4096))
leaf = z.clone().requires_grad_()
labels = torch.randint(1000, (3, len(bank)))
ops.region_sample(z, bank[:3000], 30, 300, 64, seed=1, step=1, sample_index=own)  # what is set up once
torch.ones(1, requires_grad=True).sum().backward()
ctypes.CDLL(None).malloc_trim(0)


def mebibytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


before = mebibytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
result = {query}
print(mebibytes("VmHWM") - before)
"""


def peak(query: str, threads: int) -> float:
    """MiB that a query needs beside queries, bank and what was there before, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.format(query=query, threads=threads)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout)


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", list(QUERIES))
def test_a_query_needs_little_memory_beside_the_bank(name: str, threads: int) -> None:
    assert peak(QUERIES[name], threads) <= LIMIT


@linux
@pytest.mark.slow
@pytest.mark.parametrize("query", CONTROLS)
def test_a_matrix_of_scores_of_a_quarter_of_the_queries_is_too_much(query: str) -> None:
    """The controls."""
    assert peak(query, 1) > LIMIT
