"""BatchNorm's running statistics, folded from per-shard moments in shard order, whichever process computed them."""

import torch
from torch import Tensor, nn


class Moments:
    """Takes the running statistics of a model's BatchNorm layers out of their hands while it trains.

    A layer with momentum 1 leaves the moments of its last batch in its buffers, where `take` reads them; `fold` then
    does what the layer would have done: `running <- (1 - m) running + m moment`.

    Args:
        model: The model; its layers keep momentum 1.
        momentum: m, the weight of the new moment (torch's default).
    """

    def __init__(self, model: nn.Module, momentum: float = 0.1) -> None:
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
        self.momentum = momentum
        for norm in self.norms:
            norm.momentum = 1.0

    def take(self) -> Tensor:
        """Means and variances of all C channels `(2, C)`: the running ones, or a shard's own just after it."""
        return torch.stack([torch.cat(list(buffers)) for buffers in self._buffers()])

    def fold(self, running: Tensor, moments: Tensor, counted: int) -> None:
        """Sets the buffers to what they are after all shards.

        The sums are rounded as torch's own CPU kernel rounds them: for the variance multiply and add are fused.

        Args:
            running: `(2, C)` as `take` returned it before the first shard.
            moments: `(S, 2, C)` in shard order.
            counted: Shards that the layers have counted themselves.
        """
        for mean, variance in moments:
            kept = (1 - self.momentum) * running
            running = torch.stack([kept[0] + self.momentum * mean, kept[1].add(variance, alpha=self.momentum)])
        sizes = [norm.num_features for norm in self.norms]
        for buffers, values in zip(self._buffers(), running, strict=True):
            for buffer, value in zip(buffers, values.split(sizes), strict=True):
                buffer.data.copy_(value)  # past autograd: in training the backward pass reads the batch's own moments
        for norm in self.norms:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked += len(moments) - counted

    def _buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        means = [norm.running_mean for norm in self.norms if norm.running_mean is not None]
        return means, [norm.running_var for norm in self.norms if norm.running_var is not None]
