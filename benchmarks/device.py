"""A training step at 224 pixels and the bank's scans at full scale, on a GPU: `python -m benchmarks.device`.

Per architecture and precision: images per second of a whole step (views included, images in memory) and the device
memory that it takes at most. `python -m benchmarks.rates --device FILE` makes rates for `mirepro plan` of the result.
`--device cpu` tries the program on a machine without a GPU; its numbers say nothing about one.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch

from benchmarks import harness
from benchmarks.bank import unit
from benchmarks.step import Images
from mirepro import determinism, ops, params
from mirepro.errors import UserError
from mirepro.launch import work
from mirepro.params import RunParams
from mirepro.pretrain import Trainer

ARCHITECTURES = ("resnet18", "resnet50")


def run(options: argparse.Namespace, arch: str, precision: str) -> RunParams:
    """A run with the full-scale profile's encoder and views; nothing of its objective scans the bank."""
    training = {"epochs": 1000, "batch": options.batch, "monitor": 0, "digest": 10**6, "device": options.device}
    training |= {"precision": precision, "encoder": {"arch": arch, "width": 64, "stem": "imagenet", "dim": options.dim}}
    training |= {"views": {"size": options.side, "crop": [0.2, 1.0], "gray": 0.2, "jitter": [0.4] * 4, "flip": 0.5}}
    plain = {"row": "ir", "seed": 0, "objective": "ir", "options": {"k": 4096}}
    return params.build(RunParams, plain | {"pretrain": training, "tier": options.tier}, "run")


def finished(device: str, call: Callable[[], object]) -> Callable[[], None]:
    """The call, and the wait for what it asked the device to do."""

    def both() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return both


def step(options: argparse.Namespace, images: Images, run: RunParams) -> tuple[harness.Times, dict[str, float]]:
    """Times of training steps, and what follows from them."""
    trainer = Trainer(run, images, images)  # type: ignore[arg-type]
    trainer.begin(0)
    batches = itertools.cycle(trainer.batches(0)[:-1])  # the last one of an epoch has diagnostics, too
    call = finished(options.device, lambda: trainer.train_step(next(batches)))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = harness.measure({"step": call}, options.steps)["step"]
    seconds = statistics.median(times.clock) / 1000
    counted = 3 * options.batch * work.encoder(run)[0]
    memory = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    return times, {"images_per_s": options.batch / seconds, "encoder": counted / seconds, "peak_bytes": memory}


def scans(options: argparse.Namespace) -> dict[str, tuple[Callable[[], object], float]]:
    """The draw from a ring and a clustering's assignment, each with its multiply-adds."""
    z, bank, centroids = (
        unit(count, options.dim, stream).to(options.device)
        for stream, count in enumerate((options.batch, options.rows, options.clusters))
    )
    drawn = {"seed": 0, "step": 0, "sample_index": torch.arange(len(z), device=options.device)}
    low, high = options.rows // 100, options.rows // 10
    return {
        "scan": (lambda: ops.region_sample(z, bank, low, high, 4096, **drawn), 1.0 * len(z) * bank.numel()),
        "assign": (lambda: ops.bank_assign(bank, centroids), 1.0 * len(centroids) * bank.numel()),
    }


def main() -> None:
    """Parses, measures, prints a table, writes JSON."""
    sizes = {"batch": 256, "side": 224, "images": 2048, "dim": 128, "rows": 1_281_167, "clusters": 30_000}
    parser = harness.parser(__doc__, **sizes, steps=20, repeats=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tier", choices=("exact", "fast"), default="exact")
    parser.add_argument("--arch", nargs="*", choices=ARCHITECTURES, default=ARCHITECTURES)
    options = parser.parse_args()
    try:
        determinism.check_device("--device", options.device, options.tier)
    except UserError as error:
        parser.error(str(error))
    harness.start(options)
    determinism.configure_torch(options.tier, options.threads)
    images, results, found = Images(options.images, options.side), harness.Results(options), {}
    for arch, precision in itertools.product(options.arch, ("float32", "bfloat16")):
        times, found[f"{arch}, {precision}"] = step(options, images, run(options, arch, precision))
        results.add(f"step of {options.batch} images, {arch}, {precision}", {"mirepro": times})
    rates = {"encoder": max(facts["encoder"] for name, facts in found.items() if name.endswith("float32"))}
    for name, (call, counted) in scans(options).items():
        times = harness.measure({name: finished(options.device, call)}, options.repeats)[name]
        results.add(name, {"mirepro": times})
        rates[name] = counted / (statistics.median(times.clock) / 1000)
    model = torch.cuda.get_device_name() if options.device == "cuda" else harness.processor()
    results.finish(model=model, rates=rates, steps=found)


if __name__ == "__main__":
    main()
