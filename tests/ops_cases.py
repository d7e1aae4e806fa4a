"""Golden cases of the operators. `python -m tests.ops_cases` rewrites tests/golden/ops.json.

An operator whose digest changed needs a higher version first, so that results computed before are known to be stale.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro import files, ops, rng

ROOT = Path(__file__).parents[1]


def unit(n: int, d: int, seed: int) -> NDArray[np.float32]:
    """`(n, d)` float32 unit rows from the counter RNG; + - * / and sqrt in a fixed order only."""
    x = rng.uniform(seed, rng.Stream.DATA, 0, np.arange(n), d).astype(np.float64) - 0.5
    square = np.zeros(n)
    for column in x.T:
        square += column * column
    return (x / np.sqrt(square)[:, None]).astype(np.float32)


def outputs(device: str = "cpu") -> dict[str, list[Tensor]]:
    """The outputs of every operator on the bank, gradients included, on one fixed problem."""
    z = torch.from_numpy(unit(37, 19, 1)).to(device).requires_grad_()
    bank, own = torch.from_numpy(unit(2000, 19, 2)).to(device), torch.arange(37, device=device) * 5
    labels = torch.from_numpy(rng.mulhi(rng.words(3, 1, 0, np.arange(3), 2000), 12)).to(device)
    draws = {"seed": 5, "step": 6, "sample_index": own, "own": own, "labels": labels}
    mates = ops.region_sample(z, bank, 20, 200, 50, exclude_mates=True, **draws)  # type: ignore[arg-type]
    distinct = ops.region_sample(z, bank, 20, 200, 50, exclude_own=True, replacement=False, **draws)  # type: ignore[arg-type]
    index = torch.cat([own[:, None], mates], 1)
    dot, nce = ops.gather_dot(z, bank, index), ops.gather_nce(z, bank, index, 0.07)
    sums = ops.region_logsumexp(z, bank, 20, 200, 0.07, own=own, labels=labels)
    updated = bank.clone()
    ops.bank_update_(updated, own % 50, z.detach(), 0.5)
    return {
        "neighbors": list(ops.neighbors(z, bank, 100)),
        "region_thresholds": [ops.region_thresholds(z, bank, 20, 200)],
        "region_size": [ops.region_size(z, bank, 20, 200, own=own, labels=labels, exclude_mates=True)],
        "region_sample": [mates, distinct],
        "region_logsumexp": [*sums, *(_gradient(part, z) for part in sums)],
        "gather_nce": [nce, _gradient(nce, z)],
        "gather_dot": [dot, _gradient(dot, z)],
        "bank_update_": [updated],
        "bank_assign": [ops.bank_assign(bank, z.detach())],
    }


def views() -> list[Tensor]:
    """Views of 12 images in all orders of the jitter's steps, enlarged and made smaller."""
    images = torch.from_numpy(rng.words(7, 1, 0, np.arange(12), 3 * 37 * 37)[:, : 3 * 37 * 37].astype(np.uint8))
    draws = rng.uniform(8, 1, 0, np.arange(12), 16)
    corner = (draws[:, :2] * 30).astype(np.int64)
    boxes = torch.from_numpy(np.concatenate([corner, 1 + (draws[:, 2:4] * (37 - corner)).astype(np.int64)], 1))
    order = torch.from_numpy(draws[:, 4:8].argsort(1, kind="stable"))
    amount = torch.from_numpy(draws[:, 8:12] - np.float32(0.5))
    gray, flip = torch.from_numpy(draws[:, 12] < 0.3), torch.from_numpy(draws[:, 13] < 0.5)
    plan = (images.view(12, 3, 37, 37), boxes, gray, order, amount, flip)
    return [ops.augment(*plan, size) for size in (5, 64)]


def _gradient(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), z, retain_graph=True)[0]


def digests(device: str = "cpu") -> dict[str, str]:
    """sha256 over the bytes of the outputs of each operator on the bank."""
    return {name: _sha256(tensors) for name, tensors in outputs(device).items()}


def every() -> dict[str, str]:
    """The same of all operators, on the CPU."""
    return digests() | {"augment": _sha256(views())}


def _sha256(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def main() -> None:
    """Rewrites the golden file with the versions of mirepro/ops_version.json."""
    versions = json.loads((ROOT / "mirepro/ops_version.json").read_text())
    golden = {name: {"version": versions[name], "sha256": digest} for name, digest in every().items()}
    files.write_json(ROOT / "tests/golden/ops.json", golden)


if __name__ == "__main__":
    main()
