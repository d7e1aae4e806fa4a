"""Training of a detector: one variant of the protocol, which goes on at any step."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from mirepro import rng
from mirepro.checkpoint import Checkpoint
from mirepro.data import images
from mirepro.errors import UserError
from mirepro.params import DetectParams
from mirepro.transfer import sampling
from mirepro.transfer.detection_data import Scenes
from mirepro.transfer.detection_model import Detector

_SAMPLING = 1 << 40  # sample number of the keys that seed torch's RoI sampling; images have smaller ones


@dataclass(frozen=True)
class Variant:
    """One training: learning rate, factor of the schedule, and whether the trunk stays as it is."""

    lr: float
    length: int = 1
    frozen: bool = False

    @property
    def name(self) -> str:
        """Name of its file in the resume folder."""
        return f"lr{self.lr:g}-x{self.length}{'-frozen' if self.frozen else ''}"


def set_mode(detector: Detector, training: bool, frozen: bool) -> None:
    """Training or evaluation mode; a frozen trunk keeps its running statistics and takes no gradient."""
    detector.train(training)
    trunk = detector.backbone.trunk
    trunk.train(training and not frozen)
    trunk.requires_grad_(not frozen)


@torch.no_grad()
def calibrate(detector: Detector, scenes: Scenes, batch: int) -> None:
    """Running statistics of the trunk's BatchNorm = averages over the training images, for every row alike."""
    norms = [m for m in detector.backbone.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    detector.backbone.trunk.train()
    for index in scenes.batches(batch):
        detector.maps(scenes.pictures(index))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class Feed:
    """Maps of the trunk for chosen images, mirrored where asked; those of a frozen trunk are kept where they fit."""

    def __init__(self, detector: Detector, scenes: Scenes, batch: int, frozen: bool) -> None:
        self.detector, self.scenes, self.frozen = detector, scenes, frozen
        self.kept: list[Tensor] | None = None
        if frozen:
            calibrate(detector, scenes, batch)
            set_mode(detector, False, True)
            one = self._compute(torch.tensor([0]), torch.tensor([False]))
            if 2 * len(scenes) * sum(level.nbytes for level in one) <= images.MEMORY:
                self.kept = self._all(batch)

    def _all(self, batch: int) -> list[Tensor]:
        """Maps of all images, then of all their mirror images."""
        parts = [
            self._compute(index, torch.full((len(index),), mirrored))
            for mirrored in (False, True)
            for index in self.scenes.batches(batch)
        ]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def _compute(self, index: Tensor, mirrored: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(not self.frozen):
            return self.detector.maps(self.scenes.pictures(index, mirrored))

    def maps(self, index: Tensor, mirrored: Tensor) -> list[Tensor]:
        """Images `(B,)` int64 and whether each is mirrored `(B,)` bool -> the maps that the FPN uses."""
        if self.kept is None:
            return self._compute(index, mirrored)
        return [maps[index + mirrored * len(self.scenes)] for maps in self.kept]


def rate(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first share `warmup` of the steps, then a linear fall to 0; in (0, 1]."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


class Training:
    """A variant in training, in place.

    Torchvision samples anchors and RoIs with torch's generator, which gets a key of its own for every step.

    Attributes:
        step: Steps that are done.
        steps: All of them.
    """

    def __init__(self, detector: Detector, scenes: Scenes, variant: Variant, params: DetectParams, seed: int) -> None:
        self.detector, self.scenes, self.variant, self.params, self.seed = detector, scenes, variant, params, seed
        self._factors, self._epochs = scenes.repeat_factors(params.repeat_threshold), params.epochs * variant.length
        self.step, self.steps = 0, sampling.steps(self._factors, params.batch, self._epochs, seed)
        set_mode(detector, True, variant.frozen)
        self._weights = [weight for weight in detector.parameters() if weight.requires_grad]
        decay = params.weight_decay
        self._optimiser = torch.optim.AdamW(self._weights, variant.lr, weight_decay=decay, fused=True)

    def run(self, after: Callable[[float], None] = lambda loss: None) -> None:
        """Takes the steps that are left.

        Args:
            after: Called after each of them with its loss.

        Raises:
            UserError: The loss is no number any more.
        """
        if self.step == self.steps:
            return
        params, frozen = self.params, self.variant.frozen
        feed = Feed(self.detector, self.scenes, params.batch, frozen)
        set_mode(self.detector, True, frozen)
        batches = sampling.batches(self._factors, params.batch, self._epochs, params.flip, self.seed)
        for _, index, mirrored in islice(batches, self.step, None):
            loss = self._loss(feed, index, mirrored)
            self._descend(loss)
            self.step += 1
            after(loss.item())

    def _loss(self, feed: Feed, index: Tensor, mirrored: Tensor) -> Tensor:
        torch.manual_seed(int(rng.words(self.seed, rng.Stream.TRANSFER, self.step, [_SAMPLING], 1)[0, 0]))
        chosen = zip(index.tolist(), mirrored.tolist(), strict=True)
        drawn = [self.scenes.target(image, mirror) for image, mirror in chosen]
        device = self.detector.device
        targets = [{name: value.to(device) for name, value in target.items()} for target in drawn]
        loss = torch.stack(list(self.detector.losses(feed.maps(index, mirrored), targets).values())).sum()
        if not torch.isfinite(loss):
            where = f"the loss is {loss.item()} at step {self.step} with lr {self.variant.lr}"
            raise UserError(f"detect: {where}; lower detect.lrs")
        return loss

    def _descend(self, loss: Tensor) -> None:
        scale = rate(self.step, self.steps, self.params.warmup)
        self._optimiser.param_groups[0]["lr"] = self.variant.lr * scale
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, self.params.clip)
        self._optimiser.step()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; after the last step the detector alone."""
        moments = enumerate(self._optimiser.state[weight] for weight in self._weights) if self.step < self.steps else ()
        return {f"detector.{name}": value for name, value in self.detector.state_dict().items()} | {
            f"optimiser.{i}.{name}": value for i, state in moments for name, value in state.items()
        }

    def resume(self, saved: Checkpoint | None) -> None:
        """Restores a checkpoint whose facts name its `step`; None starts anew."""
        if saved is None:
            return
        own = {name.removeprefix("detector."): value for name, value in saved.tensors.items() if name[0] == "d"}
        self.detector.load_state_dict(own)
        self.step = saved.facts["step"]
        for name, value in saved.tensors.items():
            group, _, rest = name.partition(".")
            if group == "optimiser":
                i, _, key = rest.partition(".")
                weight = self._weights[int(i)]
                # In the weight's memory layout, which the fused step takes both to have.
                like = torch.zeros_like(weight, requires_grad=False) if value.dim() else weight.new_zeros(())
                self._optimiser.state[weight][key] = like.copy_(value)
