"""One training step against plain torch and torchvision: `python -m benchmarks.step [--stem imagenet] [--threads 2]`.

ResNet-18, 32 x 32 pixels, batch 128, a bank of 50,000 rows, negatives from the ring of 1 to 10 %, views included.
Both sides train the same network with the same precision and layout. The plain step takes its views from a DataLoader
with as many workers as cores and orders the ring by mm + topk; the loss reads the scores from that matrix, or gathers
rows and multiplies (bmm). Contenders alternate in blocks; a block's loader is warm, and idle while the others run.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from benchmarks.views import torchvision_pil
from mirepro import encoders, params, pretrain, rng, settings
from mirepro.params import RunParams

SIDE, K, TAU, WARM = 32, 4096, 0.07, 2
AHEAD = 4  # batches that a loader prepares ahead, at least


@dataclass
class Images:
    """Random images in memory, as a split and as its pixels."""

    size: int
    side: int = SIDE
    pixels: np.ndarray = field(init=False)
    classes: tuple[str, ...] = ("a", "b")

    def __post_init__(self) -> None:
        words = rng.words(0, rng.Stream.TOY, 0, np.arange(self.size), 3 * self.side**2 // 4)
        self.pixels = words.astype("<u4").view(np.uint8).reshape(self.size, 3, self.side, self.side)
        self.labels = np.arange(self.size) % 2

    def __len__(self) -> int:
        return self.size

    def image(self, index: int, _: object = None) -> np.ndarray:
        return self.pixels[index]

    def images(self, _: object) -> np.ndarray:
        return self.pixels


def run(options: object) -> RunParams:
    """The run whose step is measured."""
    encoder = {"arch": "resnet18", "width": 64, "stem": options.stem, "dim": 128}  # type: ignore[attr-defined]
    training = {"epochs": 1000, "batch": options.batch, "monitor": 0, "digest": 10**6, "encoder": encoder}  # type: ignore[attr-defined]
    training["precision"] = options.precision  # type: ignore[attr-defined]
    plain = {"row": "ring", "seed": 0, "objective": "ring", "options": {"k": K, "outer": 0.1, "inner": 0.1}}
    return params.build(RunParams, plain | {"pretrain": training, "tier": "fast"}, "run")


class Pictures(Dataset[tuple[Tensor, int]]):
    """PIL images through torchvision's transforms."""

    def __init__(self, images: Images, order: list[int], run: RunParams) -> None:
        self.images, self.order, self.transform = images, order, torchvision_pil(run.pretrain.views)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        number = self.order[place]
        return self.transform(Image.fromarray(self.images.pixels[number].transpose(1, 2, 0))), number


class Plain:
    """The step as public code writes it, of the same network."""

    def __init__(self, run: RunParams, size: int, gather: bool) -> None:
        self.model = encoders.Ensemble(run.pretrain.encoder)
        encoders.initialise(self.model, 0)
        optim = run.pretrain.optim
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay
        )
        self.bank = torch.nn.functional.normalize(torch.randn(size, run.pretrain.encoder.dim))
        self.kind, self.gather = settings.PRECISIONS[run.pretrain.precision], gather
        self.low, self.high = size // 100, size // 10

    def step(self, x: Tensor, index: Tensor) -> None:
        """Forward, loss over the positive and K draws from the ring, backward, weights, bank."""
        with torch.autocast("cpu", self.kind or torch.bfloat16, enabled=self.kind is not None):
            z = self.model({"rgb": x})["rgb"]
        z = torch.nn.functional.normalize(z.float())
        scores = (z.detach() if self.gather else z) @ self.bank.T
        order = scores.detach().topk(self.high).indices[:, self.low :]
        drawn = order.gather(1, torch.randint(self.high - self.low, (len(x), K)))
        chosen = torch.cat([index[:, None], drawn], 1)
        f = torch.bmm(self.bank[chosen], z[:, :, None])[:, :, 0] if self.gather else scores.gather(1, chosen)
        loss = torch.nn.functional.cross_entropy(f / TAU, torch.zeros(len(x), dtype=torch.int64))
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.bank[index] = torch.nn.functional.normalize(0.5 * self.bank[index] + 0.5 * z.detach())


def timed(steps: Iterator[None], count: int) -> float:
    """Milliseconds per step of `count` steps after some for warming up."""
    for _ in range(WARM):
        next(steps)
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    return 1000 * (time.perf_counter() - started) / count


def plain_block(plain: Plain, data: Images, run: RunParams, workers: int, count: int) -> float:
    """A block of plain steps; what the loader has prepared beyond them is waited for."""
    batch = run.pretrain.batch
    order = np.random.default_rng(0).permutation(data.size)[: (count + WARM + AHEAD) * batch].tolist()
    loader = iter(DataLoader(Pictures(data, order, run), batch, num_workers=workers))
    time.sleep(0.2)  # the workers get ahead, as they are in a long run

    def steps() -> Iterator[None]:
        for x, index in loader:
            plain.step(x, index)
            yield

    stepping = steps()
    milliseconds = timed(stepping, count)
    for _ in loader:
        pass
    return milliseconds


def own_steps(trainer: pretrain.Trainer, indices: Iterator[Tensor]) -> Iterator[None]:
    for index in indices:
        trainer.train_step(index)
        yield


def main() -> None:
    """Parses, measures, prints a table, writes JSON."""
    parser = harness.parser(__doc__, batch=128, rows=50_000, steps=5, rounds=4, workers=torch.get_num_threads())
    parser.add_argument("--stem", choices=tuple(encoders.STEMS), default="imagenet")
    parser.add_argument("--precision", choices=tuple(settings.PRECISIONS)[:2], default="float32")
    parser.add_argument("--layout", choices=("contiguous_format", "channels_last"), default="contiguous_format")
    options = parser.parse_args()
    harness.start(options)
    chosen, data = run(options), Images(options.rows)
    trainer = pretrain.Trainer(chosen, data, data)  # type: ignore[arg-type]
    trainer.begin(0)
    indices = iter([index for epoch in range(9) for index in trainer.batches(epoch)])
    plains = {
        f"torch, {name}": Plain(chosen, data.size, gather)
        for name, gather in (("mm + topk", False), ("mm + topk, gather + bmm", True))
    }
    for model in (trainer.model, *(plain.model for plain in plains.values())):
        model.to(memory_format=getattr(torch, options.layout))
    results = harness.Results(options)
    times = {name: harness.Times() for name in ("mirepro", *plains)}
    for _ in range(options.rounds):
        times["mirepro"].clock.append(timed(own_steps(trainer, indices), options.steps))
        for name, plain in plains.items():
            times[name].clock.append(plain_block(plain, data, chosen, options.workers, options.steps))
    results.add(f"step, stem {options.stem}, {options.precision}, {options.layout}", times)
    best = min(statistics.median(times[name].clock) for name in plains)
    results.finish(times_best_torch=best / statistics.median(times["mirepro"].clock))


if __name__ == "__main__":
    main()
