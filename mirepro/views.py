"""Views as functions of (batch, keys): crop, gray, jitter, flip; RGB or L/ab. Batched, no generator state.

Every image gets the draws of torchvision's RandomResizedCrop, RandomGrayscale, ColorJitter and RandomHorizontalFlip
from the counter RNG. The difference to the PIL pipeline: values stay float between the steps, never rounded to bytes.
On the CPU a compiled operator takes all steps of an image at once; elsewhere torch takes them one by one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro import ops, rng
from mirepro.errors import UserError
from mirepro.params import ViewParams

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAB_MEAN, LAB_STD = (50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)
_RATIO = 0.28768207245178085  # log(4/3): the aspect ratio of a crop lies in [3/4, 4/3]
_ATTEMPTS = 10
_WHITE = (0.950456, 1.0, 1.088754)
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))


def check(params: ViewParams) -> None:
    """Refuses impossible augmentations with UserError."""
    low, high = params.crop
    if not 0 < low <= high <= 1:
        raise UserError(f"views.crop: {list(params.crop)} is impossible; use two areas with 0 < low <= high <= 1")
    for key, value in (("gray", params.gray), ("flip", params.flip), ("jitter[3]", 2 * params.jitter[3])):
        if not 0 <= value <= 1:
            raise UserError(f"views.{key}: out of range; use a probability (hue: at most 0.5)")
    if min(params.jitter) < 0 or params.size < 1:
        raise UserError("views.jitter, views.size: negative or zero; use jitter >= 0 and size >= 1")


def batch(images: Tensor, params: ViewParams, *, seed: int, epoch: int, index: Tensor, view: int = 0) -> Tensor:
    """One view of each image.

    Args:
        images: `(B, 3, S, S)` uint8, on the device that computes.
        params: What to draw; a zero switches a step off.
        seed: Seed of the run.
        epoch: Epoch (the step of the counter RNG).
        index: `(B,)` sample indices in their data set, on the CPU.
        view: Number of the view within the epoch, for protocols that need several.

    Returns:
        `(B, 3, size, size)` float32 in [0, 1].
    """
    draws = rng.uniform(seed, rng.Stream.VIEW, epoch, index.numpy() + (view << 40), 4 * _ATTEMPTS + 12)
    boxes = crop_boxes(draws[:, : 4 * _ATTEMPTS].reshape(len(draws), _ATTEMPTS, 4), params, images.shape[-1])
    rest, strength = torch.from_numpy(draws[:, 4 * _ATTEMPTS :]), torch.tensor(params.jitter)
    order = rest[:, 5:9].argsort(dim=1, stable=True)
    return _augment(
        images,
        torch.from_numpy(boxes),
        rest[:, 0] < params.gray,
        torch.where(strength[order] == 0, -1, order),
        (2 * rest[:, 1:5] - 1) * strength,
        rest[:, 9] < params.flip,
        params.size,
    )


def _augment(images: Tensor, *plan: Any) -> Tensor:
    return ops.augment(images, *plan) if images.device.type == "cpu" else composed(images, *plan)


def plain(images: Tensor, size: int) -> Tensor:
    """The image itself: `(B, 3, S, S)` uint8 -> `(B, 3, size, size)` float32 in [0, 1], antialiased."""
    n, side = len(images), images.shape[-1]
    if side == size:
        return images.float() / 255
    whole, none = torch.tensor([[0, 0, side, side]]).repeat(n, 1), torch.zeros(n, dtype=torch.bool)
    return _augment(images, whole, none, torch.full((n, 4), -1), torch.zeros(n, 4), none, size)


def crop_boxes(draws: NDArray[np.float32], params: ViewParams, side: int) -> NDArray[np.int64]:
    """RandomResizedCrop's boxes: the first of ten attempts that fits, else the whole image.

    Args:
        draws: `(B, 10, 4)` uniform draws: area, log aspect ratio, top, left.
        params: `crop` holds the range of areas.
        side: S of the square images.

    Returns:
        `(B, 4)` top, left, height, width in pixels.
    """
    u = draws.astype(np.float64)
    low, high = params.crop
    if low == high == 1:
        return np.tile(np.array([0, 0, side, side]), (len(u), 1))
    area = side * side * (low + (high - low) * u[..., 0])
    ratio = _exp((2 * u[..., 1] - 1) * _RATIO)
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    top, left = np.floor(u[..., 2] * (side - height + 1)), np.floor(u[..., 3] * (side - width + 1))
    boxes = np.stack([top, left, height, width], -1).astype(np.int64)
    chosen = boxes[np.arange(len(u)), fits.argmax(1)]
    chosen[~fits.any(1)] = (0, 0, side, side)
    return chosen


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp for |x| < 0.3 from + and * alone: the same bits on every CPU."""
    total = np.ones_like(x)
    for n in range(14, 0, -1):
        total = 1 + x * total / n
    return total


def composed(
    images: Tensor, boxes: Tensor, gray: Tensor, order: Tensor, amount: Tensor, flip: Tensor, size: int
) -> Tensor:
    """`ops.augment` step by step in torch, for other devices than the CPU; equal up to rounding."""
    gray, order, amount, flip = (values.to(images.device) for values in (gray, order, amount, flip))
    x = resize(images.float() / 255, boxes, size)
    x = torch.where(gray[:, None, None, None], luma(x).expand_as(x), x)
    x = jitter(x, order, amount)
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


def resize(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resize of a box of each image, as PIL does on a cropped image.

    Args:
        x: `(B, 3, S, S)` float32.
        boxes: `(B, 4)` int64: top, left, height, width.
        size: Side of the result.

    Returns:
        `(B, 3, size, size)`.
    """
    boxes = boxes.to(x.device)
    rows = _weights(boxes[:, 0], boxes[:, 2], x.shape[-1], size)
    columns = _weights(boxes[:, 1], boxes[:, 3], x.shape[-1], size)
    n, c, side, _ = x.shape
    wide = torch.bmm(x.reshape(n, c * side, side), columns.transpose(1, 2))
    tall = torch.bmm(rows, wide.view(n, c, side, size).permute(0, 2, 1, 3).reshape(n, side, c * size))
    return tall.view(n, size, c, size).permute(0, 2, 1, 3).contiguous()


def _weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """`(B, size, S)` triangle filters of the crop [start, start + length)."""
    scale = length.float()[:, None, None] / size
    support = scale.clamp(min=1)
    pixel = torch.arange(side, device=start.device)[None, None, :]
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    weight = (1 - ((pixel + 0.5 - centre) / support).abs()).clamp(min=0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(-1, keepdim=True)


def luma(x: Tensor) -> Tensor:
    """`(B, 3, S, S)` -> `(B, 1, S, S)`, ITU-R 601 weights as torchvision rounds them."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def jitter(x: Tensor, order: Tensor, amount: Tensor) -> Tensor:
    """ColorJitter: brightness, contrast, saturation and hue, in each image's own order.

    Args:
        x: `(B, 3, S, S)` in [0, 1].
        order: `(B, 4)` int64: the step of each place, -1 for none.
        amount: `(B, 4)` how much of each step: factors less 1, and turns of the hue.
    """
    for place in range(4):
        for number, step in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = (order[:, place] == number).nonzero()[:, 0]
            if len(chosen) > 0:
                x = x.index_copy(0, chosen, step(x[chosen], amount[chosen, number, None, None, None]))
    return x


def _brightness(x: Tensor, amount: Tensor) -> Tensor:
    return (x * (1 + amount).clamp(min=0)).clamp(0, 1)


def _contrast(x: Tensor, amount: Tensor) -> Tensor:
    mean = luma(x).mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * (1 + amount).clamp(min=0)).clamp(0, 1)


def _saturation(x: Tensor, amount: Tensor) -> Tensor:
    gray = luma(x)
    return (gray + (x - gray) * (1 + amount).clamp(min=0)).clamp(0, 1)


def _hue(x: Tensor, amount: Tensor) -> Tensor:
    """Rotates the hue by `amount` turns through HSV, as torchvision does."""
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = torch.remainder(sector + 6 * amount[:, 0], 6)
    channels = [value - chroma * _wedge(torch.remainder(turned + n, 6)) for n in (5, 3, 1)]
    return torch.stack(channels, 1)


def _wedge(k: Tensor) -> Tensor:
    return torch.minimum(k, 4 - k).clamp(0, 1)


def modalities(rgb: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Normalised network inputs per modality.

    Args:
        rgb: `(B, 3, S, S)` in [0, 1].
        names: ("rgb",) or ("L", "ab").

    Returns:
        rgb `(B, 3, S, S)` with ImageNet's mean and deviation; L `(B, 1, S, S)`, ab `(B, 2, S, S)` (CMC's author code).
    """
    if tuple(names) == ("rgb",):
        return {"rgb": _standardise(rgb, IMAGENET_MEAN, IMAGENET_STD)}
    values = _standardise(lab(rgb), LAB_MEAN, LAB_STD)
    return {"L": values[:, :1], "ab": values[:, 1:]}


def _standardise(x: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(deviation)[:, None, None]


def lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> CIE L*a*b* under D65, `(B, 3, S, S)` (L in [0, 100])."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=1e-6).pow(2.4), rgb / 12.92)
    r, g, b = linear.unbind(1)
    xyz = [(row[0] * r + row[1] * g + row[2] * b) / white for row, white in zip(_XYZ, _WHITE, strict=True)]
    x, y, z = (torch.where(t > 0.008856, t.clamp(min=1e-6).pow(1 / 3), 7.787 * t + 16 / 116) for t in xyz)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
