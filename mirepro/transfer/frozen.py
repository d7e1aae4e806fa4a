"""A trained encoder made ready for nothing but inference."""

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mirepro.encoders import Ensemble, Trunk


def freeze(model: Ensemble) -> Ensemble:
    """Folds each BatchNorm into the convolution before it, and lays all maps out channels last; for inference only.

    Args:
        model: An ensemble in evaluation mode; it is changed.

    Returns:
        The same ensemble, with the same features up to rounding.
    """
    for module in list(model.modules()):
        if isinstance(module, Trunk):
            module.aligned = True  # what needs whole vectors of channels is the gradient
        for (first, convolution), (second, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(convolution, norm))
                setattr(module, second, nn.Identity())
    return model.requires_grad_(False)
