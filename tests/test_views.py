"""Batched views against torchvision's PIL pipeline, and their independence of the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mirepro import ops, rng, views
from mirepro.errors import UserError
from mirepro.params import ViewParams

PLAIN = ViewParams(crop=(1.0, 1.0), gray=0, jitter=(0, 0, 0, 0), flip=0)


def images(n: int = 6, side: int = 32) -> torch.Tensor:
    noise = rng.uniform(0, rng.Stream.TOY, 0, np.arange(n), 3 * 8 * 8).reshape(n, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(noise), size=side, mode="bicubic")
    return (smooth.clamp(0, 1) * 255).to(torch.uint8)


def plan(n: int, *steps: int, amount: float = 0.0, gray: bool = False, flip: bool = False) -> list[torch.Tensor]:
    """The same gray, order, amount and flip for n images."""
    order = torch.tensor([*steps, -1, -1, -1, -1][:4]).repeat(n, 1)
    return [torch.full((n,), gray), order, torch.full((n, 4), amount), torch.full((n,), flip)]


@pytest.mark.parametrize("augment", [ops.augment, views.composed])
def test_crop_and_resize_match_pil_within_its_rounding(augment):
    x = images(5)
    boxes = torch.tensor([[0, 0, 32, 32], [3, 5, 20, 11], [0, 16, 31, 9], [30, 30, 2, 2], [1, 2, 3, 30]])
    ours = augment(x, boxes, *plan(5), 24)
    for image, box, result in zip(x, boxes.tolist(), ours, strict=True):
        top, left, height, width = box
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        reference = np.asarray(pil.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
        assert np.abs(result.numpy() - reference).max() <= 1.5 / 255
        shifted = np.roll(reference, 1, 2)
        assert np.abs(result.numpy() - shifted).max() > 1.5 / 255


STEPS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.mark.parametrize("augment", [ops.augment, views.composed])
@pytest.mark.parametrize("step", range(4))
def test_jitter_steps_match_torchvision(augment, step):
    x = images()
    whole = torch.tensor([[0, 0, 32, 32]]).repeat(len(x), 1)
    for amount in (-0.37, 0.0, 0.21):
        factor = amount if step == 3 else 1 + amount
        result = augment(x, whole, *plan(len(x), step, amount=amount), 32)
        assert torch.allclose(result, STEPS[step](x.float() / 255, factor), atol=2e-3)
    result = augment(x, whole, *plan(len(x), step, amount=0.3), 32)
    assert not torch.allclose(result, x.float() / 255, atol=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 33), st.integers(0, 2**31))
def test_operator_and_torch_agree(n, side, size, seed):
    """Any sizes, boxes, steps and amounts; constant images have no hue."""
    g = np.random.default_rng(seed)
    noise = torch.from_numpy(g.integers(0, 256, (n, 3, side, side), dtype=np.uint8))
    x = torch.where(torch.from_numpy(g.random(n) < 0.2)[:, None, None, None], noise[:, :1, :1, :1], noise)
    corner = g.integers(0, side, (n, 2))
    boxes = torch.from_numpy(np.concatenate([corner, 1 + g.integers(0, side - corner)], 1))
    order = torch.from_numpy(np.stack([g.permutation(4) for _ in range(n)]) - 5 * (g.random((n, 4)) < 0.3)).clamp(
        min=-1
    )
    amount = torch.from_numpy(g.uniform(-0.5, 0.5, (n, 4))).float()
    gray, flip = (torch.from_numpy(g.random(n) < 0.4) for _ in range(2))
    arguments = (x, boxes, gray, order, amount, flip, size)
    ours, theirs = ops.augment(*arguments), views.composed(*arguments)
    assert ours.shape == theirs.shape == (n, 3, size, size)
    assert ours.min() >= 0
    assert ours.max() <= 1 + 1e-5
    assert torch.allclose(ours, theirs, atol=2e-4)
    other = views.composed(x, boxes, gray, order, amount, ~flip, size)
    assert size == 1 or torch.allclose(ours.flip(-1), other, atol=2e-4)


def test_threads_change_no_bit_of_a_view():
    x, index = images(7), torch.arange(7)
    one = views.batch(x, ViewParams(size=20), seed=3, epoch=1, index=index)
    torch.set_num_threads(3)
    try:
        assert torch.equal(views.batch(x, ViewParams(size=20), seed=3, epoch=1, index=index), one)
    finally:
        torch.set_num_threads(1)
    assert not torch.equal(views.batch(x, ViewParams(size=20), seed=4, epoch=1, index=index), one)


def _changed(**changes: object) -> tuple:
    names = ("images", "boxes", "gray", "order", "amount", "flip", "size")
    given = dict(zip(names, (images(2), torch.tensor([[0, 0, 32, 32], [4, 5, 28, 27]]), *plan(2), 8), strict=True))
    return tuple((given | changes).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 32, 32)}, "images: must be a CPU tensor of dtype uint8"),
        ({"images": torch.zeros(2, 1, 32, 32, dtype=torch.uint8)}, r"images: must have shape \(B, 3, S, S\)"),
        ({"images": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}, "need one row per image"),
        ({"boxes": torch.tensor([[0, 0, 32, 32], [4, 5, 29, 27]])}, "boxes: row 1 does not lie in the image"),
        ({"boxes": torch.tensor([[0, -1, 32, 32], [4, 5, 28, 27]])}, "boxes: row 0 does not lie in the image"),
        ({"order": torch.full((2, 4), 4)}, "order: row 0 holds no step"),
        ({"order": torch.full((2, 3), 1)}, r"need shape \(B, 4\)"),
        ({"amount": torch.full((2, 4), torch.nan)}, "amount: row 0 holds NaN"),
        ({"amount": torch.full((2, 4), 0.6)}, "amount: row 0 turns the hue"),
        ({"size": 0}, "size: must be at least 1"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    assert ops.augment(*_changed()).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=message):
        ops.augment(*_changed(**change))


def test_views_are_traced():
    library = torch.ops.mirepro.augment
    x, boxes, gray, order, amount, flip, size = _changed()
    torch.library.opcheck(library, (x, boxes, gray.long(), order, amount, flip.long(), size))


def test_lab_matches_a_reference_colour():
    red = views.lab(torch.tensor([1.0, 0, 0])[None, :, None, None]).flatten()
    assert red.tolist() == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    gray = views.lab(torch.full((1, 3, 1, 1), 0.5)).flatten()
    assert gray[1:].abs().max() < 0.05


def lab64(rgb: np.ndarray) -> np.ndarray:
    """sRGB `(..., 3)` -> CIE L*a*b*, float64: IEC 61966-2-1, its primaries and white, CIE 15."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xy = np.array([[0.64, 0.33], [0.30, 0.60], [0.15, 0.06], [0.3127, 0.3290]])
    xyz = np.stack([xy[:, 0] / xy[:, 1], np.ones(4), (1 - xy.sum(1)) / xy[:, 1]])  # at Y = 1
    primaries, white = xyz[:, :3], xyz[:, 3]
    t = linear @ (primaries * np.linalg.solve(primaries, white)).T / white
    delta = 6 / 29
    x, y, z = np.moveaxis(np.where(t > delta**3, np.cbrt(t), t / (3 * delta**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


CORNERS = np.array(np.meshgrid(*[[0.0, 1.0]] * 3)).reshape(3, 8).T
COLOURS = {
    "corners": CORNERS,
    "dark": 0.1 * rng.uniform(0, rng.Stream.TOY, 0, np.arange(300), 3).astype(np.float64),
    "any": rng.uniform(0, rng.Stream.TOY, 1, np.arange(2000), 3).astype(np.float64),
}


@pytest.mark.parametrize("name", COLOURS)
def test_l_and_ab_are_cie_lab_by_cmcs_constants(name):
    """L: mean 50, deviation 50; a: 6.025, 92.208; b: -6.6895, 101.1675."""
    rgb = COLOURS[name]
    inputs = views.modalities(torch.from_numpy(rgb).float()[:, :, None, None], ("L", "ab"))
    assert {m: value.shape for m, value in inputs.items()} == {"L": (len(rgb), 1, 1, 1), "ab": (len(rgb), 2, 1, 1)}
    found = torch.cat([inputs["L"], inputs["ab"]], 1)[..., 0, 0].double().numpy()
    wanted = (lab64(rgb) - [50, 6.025, -6.6895]) / [50, 92.208, 101.1675]
    assert np.abs(found - wanted).max() < 1e-3
    for other in ([50, 0, 0], [50, -6.6895, 6.025], [0, 6.025, -6.6895]):
        assert np.abs(found - (lab64(rgb) - other) / [50, 92.208, 101.1675]).max() > 1e-2, "control"


def test_rgb_is_standardised_by_imagenets_constants():
    x = images().float() / 255
    (found,) = views.modalities(x, ("rgb",)).values()
    mean, deviation = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert np.allclose(found.numpy(), (x.double().numpy() - mean) / deviation, atol=1e-5)
    assert not np.allclose(found.numpy(), (x.double().numpy() - 0.5) / deviation, atol=1e-2)


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
