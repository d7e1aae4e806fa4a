"""Batched views against torchvision's transforms: `python -m benchmarks.views [--batch 128]`.

Images per second of one thread: crop with antialiased resize, gray, jitter with hue, flip, normalisation. Before that
the views are compared with PIL's, step by step with the same draws.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from benchmarks import harness
from mirepro import rng, views
from mirepro.params import ViewParams

TOLERANCE = {"mean": 2.0, "99 %": 8.0}
"""Levels of 255: PIL rounds down to bytes after each step and keeps hues in 256 steps; these views stay float."""


def images(count: int, side: int) -> Tensor:
    """`(count, 3, side, side)` uint8: smooth colours with grain."""
    rough = rng.uniform(0, rng.Stream.TOY, 0, np.arange(count), 3 * 8 * 8).reshape(count, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(rough), size=side, mode="bicubic")
    grain = rng.uniform(0, rng.Stream.TOY, 1, np.arange(count), 3 * side * side).reshape(count, 3, side, side)
    return ((0.9 * smooth + 0.1 * torch.from_numpy(grain)).clamp(0, 1) * 255).to(torch.uint8)


def pictures(batch: Tensor) -> list[Image.Image]:
    """The same as PIL images."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch]


def pil_view(image: Image.Image, box: list[int], rest: list[float], params: ViewParams) -> Image.Image:
    """One view by PIL and torchvision's functions of PIL images, from the draws of `views.batch`."""
    top, left, height, width = box
    image = F.resized_crop(image, top, left, height, width, [params.size, params.size])
    if rest[0] < params.gray:
        image = F.rgb_to_grayscale(image, 3)
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for number in np.argsort(rest[5:9], kind="stable"):
        amount = (2 * rest[1 + number] - 1) * params.jitter[number]
        image = steps[number](image, amount if number == 3 else max(0.0, 1 + amount))
    return F.hflip(image) if rest[9] < params.flip else image


def differences(batch: Tensor, params: ViewParams, other: int = 0) -> dict[str, float]:
    """Levels of 255 between these views and PIL's: mean and 99th percentile; PIL's draws are those of seed `other`."""
    index = torch.arange(len(batch))
    ours = views.batch(batch, params, seed=0, epoch=0, index=index)
    attempts = 4 * views._ATTEMPTS
    draws = rng.uniform(other, rng.Stream.VIEW, 0, index.numpy(), attempts + 12)
    boxes = views.crop_boxes(draws[:, :attempts].reshape(len(draws), -1, 4), params, batch.shape[-1])
    rows = zip(pictures(batch), boxes.tolist(), draws[:, attempts:].tolist(), strict=True)
    theirs = np.stack([np.asarray(pil_view(*row, params)) for row in rows]).transpose(0, 3, 1, 2)
    levels = np.abs(255 * ours.numpy() - theirs)
    return {"mean": float(levels.mean()), "99 %": float(np.percentile(levels, 99))}


def close(levels: dict[str, float]) -> bool:
    """Whether differences are within the tolerance."""
    return all(levels[name] <= most for name, most in TOLERANCE.items())


def torchvision_pil(params: ViewParams) -> Callable[[Image.Image], Tensor]:
    """The usual pipeline of public code."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(params.size, params.crop),
            v2.RandomGrayscale(params.gray),
            v2.ColorJitter(*params.jitter),
            v2.RandomHorizontalFlip(params.flip),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(views.IMAGENET_MEAN, views.IMAGENET_STD),
        ]
    )


def contenders(batch: Tensor, params: ViewParams) -> harness.Contenders:
    """One batch of normalised views."""
    pil, transform, index = pictures(batch), torchvision_pil(params), torch.arange(len(batch))

    def ours() -> Tensor:
        return views.modalities(views.batch(batch, params, seed=0, epoch=0, index=index), ("rgb",))["rgb"]

    return {
        "mirepro": ours,
        "torchvision on PIL images": lambda: torch.stack([transform(image) for image in pil]),
        "torchvision on tensors": lambda: torch.stack([transform(image) for image in batch]),  # type: ignore[arg-type]
    }


def main() -> None:
    """Compares, measures, prints a table, writes JSON."""
    options = harness.parser(__doc__, batch=128, repeats=5).parse_args()
    harness.start(options)
    results = harness.Results(options)
    found: dict[str, object] = {}
    for side, size in ((32, 32), (96, 64), (256, 224)):
        params = ViewParams(size=size)
        batch = images(options.batch if side < 200 else options.batch // 4, side)
        levels = found[f"{side} -> {size}"] = differences(batch, params)
        if not close(levels):
            raise SystemExit(f"views of {side} pixels differ from PIL's by {levels} levels; allowed: {TOLERANCE}")
        times = harness.measure(contenders(batch, params), options.repeats)
        results.add(f"{side} -> {size} pixels", times)
        found[f"{side} -> {size} images per second"] = {n: 1000 * len(batch) / t.least() for n, t in times.items()}
    results.finish(views=found)


if __name__ == "__main__":
    main()
