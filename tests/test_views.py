"""Batched views against torchvision's PIL pipeline, and their independence of the batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mirepro import rng, views
from mirepro.errors import UserError
from mirepro.params import ViewParams

PLAIN = ViewParams(crop=(1.0, 1.0), gray=0, jitter=(0, 0, 0, 0), flip=0)


def images(n: int = 6, side: int = 32) -> torch.Tensor:
    noise = rng.uniform(0, rng.Stream.TOY, 0, np.arange(n), 3 * 8 * 8).reshape(n, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(noise), size=side, mode="bicubic")
    return (smooth.clamp(0, 1) * 255).to(torch.uint8)


def test_crop_and_resize_match_pil_within_its_rounding():
    x = images(5)
    boxes = torch.tensor([[0, 0, 32, 32], [3, 5, 20, 11], [0, 16, 31, 9], [30, 30, 2, 2], [1, 2, 3, 30]])
    ours = views.resize(x.float() / 255, boxes, 24)
    for image, box, result in zip(x, boxes.tolist(), ours, strict=True):
        top, left, height, width = box
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        reference = np.asarray(pil.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
        assert np.abs(result.numpy() - reference).max() <= 1.5 / 255
        shifted = np.roll(reference, 1, 2)
        assert np.abs(result.numpy() - shifted).max() > 1.5 / 255


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (views._brightness, F.adjust_brightness),
        (views._contrast, F.adjust_contrast),
        (views._saturation, F.adjust_saturation),
        (views._hue, F.adjust_hue),
    ],
)
def test_jitter_steps_match_torchvision(ours, theirs):
    x = images().float() / 255
    for amount in (-0.37, 0.0, 0.21):
        factor = amount if theirs is F.adjust_hue else 1 + amount
        result = ours(x, torch.full((len(x), 1, 1, 1), amount))
        assert torch.allclose(result, theirs(x, factor), atol=2e-3)
    assert not torch.allclose(ours(x, torch.full((len(x), 1, 1, 1), 0.3)), x, atol=2e-3)


def test_lab_matches_a_reference_colour():
    red = views.lab(torch.tensor([1.0, 0, 0])[None, :, None, None]).flatten()
    assert red.tolist() == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    gray = views.lab(torch.full((1, 3, 1, 1), 0.5)).flatten()
    assert gray[1:].abs().max() < 0.05


def test_a_view_depends_on_seed_epoch_and_sample_only():
    x, params = images(), ViewParams()
    index = torch.arange(6) + 40
    together = views.batch(x, params, seed=1, epoch=2, index=index)
    alone = views.batch(x[3:4], params, seed=1, epoch=2, index=index[3:4])
    assert torch.equal(together[3:4], alone)
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}, {"seed": 1, "epoch": 2, "view": 1}):
        assert not torch.equal(together, views.batch(x, params, index=index, **other))


def test_every_step_can_be_switched_off():
    x, index = images(), torch.arange(6)
    assert torch.equal(views.batch(x, PLAIN, seed=0, epoch=0, index=index), x.float() / 255)
    gray = views.batch(
        x, ViewParams(crop=(1.0, 1.0), gray=1, jitter=(0, 0, 0, 0), flip=0), seed=0, epoch=0, index=index
    )
    assert torch.equal(gray[:, 0], gray[:, 2])
    flipped = views.batch(
        x, ViewParams(crop=(1.0, 1.0), gray=0, jitter=(0, 0, 0, 0), flip=1), seed=0, epoch=0, index=index
    )
    assert torch.equal(flipped, (x.float() / 255).flip(-1))


def test_crops_have_torchvisions_distribution():
    params, n = ViewParams(crop=(0.2, 1.0)), 4000
    draws = rng.uniform(0, rng.Stream.VIEW, 0, np.arange(n), 40).reshape(n, 10, 4)
    ours = views.crop_boxes(draws, params, 32)
    torch.manual_seed(0)
    theirs = np.array([list(v2.RandomResizedCrop(32, (0.2, 1.0)).make_params([torch.zeros(3, 32, 32)]).values())[:4]
                       for _ in range(n)])  # fmt: skip
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.6
    assert (ours[:, 0] + ours[:, 2]).max() <= 32


@pytest.mark.parametrize(
    "change", [{"crop": (0.0, 1.0)}, {"crop": (0.5, 0.2)}, {"gray": 2.0}, {"flip": -1.0}, {"size": 0}]
)
def test_impossible_views_are_refused(change):
    with pytest.raises(UserError, match=r"views\."):
        views.check(ViewParams(**change))
