"""The author protocol: a linear layer by SGD on features of augmented views, which are computed batch by batch."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mirepro import checkpoint, rng, views
from mirepro.data.images import Images
from mirepro.params import EvaluateParams, LinearParams
from mirepro.progress import Bar
from mirepro.transfer.linear import Classifier, Standardiser

VIEW = 2
"""Number of the view among those of an image; pretraining takes 0 and 1."""
Features = Callable[[Tensor], dict[str, Tensor]]
"""RGB in [0, 1] `(b, 3, S, S)` on the device -> features `(b, F)` of each kind there."""


class Moments:
    """Mean and deviation of rows that come in parts (Chan, Golub and LeVeque 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)  # joins rows on any device

    def add(self, x: Tensor) -> None:
        """Counts rows `(n, F)`."""
        x, n = x.double(), len(x)
        mean = x.mean(0)
        shift, total = mean - self.mean, self.count + n
        self.squares = self.squares + (x - mean).square().sum(0) + shift.square() * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def standardiser(self) -> Standardiser:
        """Of all rows so far."""
        return Standardiser.of(self.mean, (self.squares / self.count).sqrt())


class Layer:
    """Weights and bias on standardised features, and their momentum.

    Args:
        standardise: What is done to the features.
        n_classes: Number of classes.
        params: Learning rate and momentum.
    """

    def __init__(self, standardise: Standardiser, n_classes: int, params: LinearParams) -> None:
        self.standardise, self._params = standardise, params
        mean = standardise.mean
        self.theta = [mean.new_zeros(len(mean), n_classes), mean.new_zeros(n_classes)]
        self.velocity = [torch.zeros_like(t) for t in self.theta]

    def step(self, features: Tensor, classes: Tensor) -> None:
        """One step on a batch `(b, F)` with classes `(b,)`."""
        x = self.standardise(features)
        onehot = nn.functional.one_hot(classes, len(self.theta[1])).float()
        residual = (torch.softmax(x @ self.theta[0] + self.theta[1], 1) - onehot) / len(x)
        gradients = (x.T @ residual, residual.sum(0))
        for t, v, gradient in zip(self.theta, self.velocity, gradients, strict=True):
            v.mul_(self._params.author_momentum).add_(gradient)
            t -= self._params.author_lr * v

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, to be restored in place."""
        names = ("mean", "scale", "weight", "bias", "weight_velocity", "bias_velocity")
        own = (self.standardise.mean, self.standardise.scale, *self.theta, *self.velocity)
        return dict(zip(names, own, strict=True))

    def classifier(self) -> Classifier:
        """The layer so far, on the CPU."""
        mean, scale, weight, bias = (t.cpu() for t in (self.standardise.mean, self.standardise.scale, *self.theta))
        return Classifier(Standardiser(mean, scale), weight, bias)


class Author:
    """A training of one layer for each kind of features.

    Args:
        features: Of a batch of views.
        images: The training images.
        classes: `(N,)` int64.
        n_classes: Number of classes.
        seed: Decides views and order.
        params: The protocol, and the device.
    """

    def __init__(
        self, features: Features, images: Images, classes: Tensor, n_classes: int, seed: int, params: EvaluateParams
    ) -> None:
        self._features, self._images, self._classes, self._n_classes = features, images, classes, n_classes
        self._seed, self._params, self._device = seed, params, torch.device(params.device)
        self.layers: dict[str, Layer] = {}
        self.step, self.per_epoch = 0, -(-len(images) // params.linear.author_batch)

    def train(self, work: Path, mark: str) -> dict[str, Classifier]:
        """Takes all steps; an interrupted training goes on from its checkpoint in a folder.

        Args:
            work: The folder, which survives a kill.
            mark: Names the run; a checkpoint of another one is refused.
        """
        self.resume(checkpoint.load(work, mark))
        clock, batch = checkpoint.Clock(), self._params.linear.author_batch
        total = self.per_epoch * self._params.linear.author_epochs
        with Bar("linear layer", total * batch, self.step * batch) as bar:
            for index in self._batches():
                self._take(index)
                bar.advance(batch)
                if self.step == total or clock.due(within=True):
                    with clock.writing():
                        checkpoint.save(work, mark, self.tensors(), {"step": self.step})
        return {kind: layer.classifier() for kind, layer in self.layers.items()}

    def _batches(self) -> Iterator[Tensor]:
        """Samples `(b,)` of each step that is left."""
        n, linear = len(self._images), self._params.linear
        for epoch in range(self.step // self.per_epoch, linear.author_epochs):
            order = torch.from_numpy(rng.permutation(self._seed, rng.Stream.TRANSFER, epoch, n))
            left = order.split(linear.author_batch)[self.step % self.per_epoch :]
            yield from self._images.ahead(left, lambda batch: batch)

    def _take(self, index: Tensor) -> None:
        if not self.layers:
            self.layers = self._standardised()
        found, classes = self._views(index, self.step // self.per_epoch), self._classes[index].to(self._device)
        for kind, layer in self.layers.items():
            layer.step(found[kind], classes)
        self.step += 1

    def _views(self, index: Tensor, epoch: int) -> dict[str, Tensor]:
        """Features of the samples' views in an epoch."""
        drawn = {"seed": self._seed, "epoch": epoch, "view": VIEW}
        pixels = self._images[index].to(self._device)
        return self._features(views.batch(pixels, self._params.views, index=index, **drawn))

    def _standardised(self) -> dict[str, Layer]:
        """Layers of zeros on features standardised by those of the first epoch."""
        moments: dict[str, Moments] = {}
        for index in torch.arange(len(self._images)).split(256):
            for kind, x in self._views(index, 0).items():
                moments.setdefault(kind, Moments()).add(x)
        linear = self._params.linear
        return {kind: Layer(own.standardiser(), self._n_classes, linear) for kind, own in moments.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds as tensors."""
        return {f"{kind}.{name}": value for kind, layer in self.layers.items() for name, value in layer.state().items()}

    def resume(self, saved: checkpoint.Checkpoint | None) -> None:
        """Restores a checkpoint; None starts anew."""
        if saved is None:
            return
        self.step = saved.facts["step"]
        for name in dict.fromkeys(name.partition(".")[0] for name in saved.tensors):
            mine = {key: value for key, value in saved.tensors.items() if key.startswith(f"{name}.")}
            own = {key.partition(".")[2]: value.to(self._device) for key, value in mine.items()}
            layer = Layer(Standardiser(own["mean"], own["scale"]), self._n_classes, self._params.linear)
            for key, value in layer.state().items():
                value.copy_(own[key])
            self.layers[name] = layer
