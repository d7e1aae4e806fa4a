"""An encoder made ready for inference: its features are those of the trained one, whatever blocks and widths it has."""

import pytest
import torch
from torch import nn

from mirepro import encoders
from mirepro.encoders import Ensemble
from mirepro.params import EncoderParams
from mirepro.transfer.frozen import freeze

CASES = [("resnet10", 16, "tiny"), ("resnet18", 4, "small"), ("resnet50", 11, "imagenet"), ("resnet10", 6, "tiny")]


def trained(arch: str, width: int, stem: str, modalities: tuple[str, ...]) -> Ensemble:
    """An ensemble whose BatchNorm layers have seen something."""
    model = Ensemble(EncoderParams(arch=arch, width=width, stem=stem, dim=8), modalities)
    encoders.initialise(model, 3)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, shift in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                assert tensor is not None
                tensor.data = torch.rand(tensor.shape, generator=generator) + shift
            assert module.running_var is not None
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


def maps(model: Ensemble, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """C5 of a few images `(5, F, h, w)`."""
    rgb = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.to(dtype).feature_map(rgb.to(dtype)).double()


@pytest.mark.parametrize("modalities", [("rgb",), ("L", "ab")])
@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_the_trained_encoder(case: tuple[str, int, str], modalities: tuple[str, ...]) -> None:
    oracle = maps(trained(*case, modalities), torch.float64)
    model = freeze(trained(*case, modalities))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    error = (maps(model) - oracle).abs().max() / oracle.abs().max()
    assert error < 2e-5
    assert maps(model).shape == oracle.shape


def test_control_another_running_mean_is_noticed() -> None:
    oracle = maps(trained(*CASES[0], ("rgb",)), torch.float64)
    model = trained(*CASES[0], ("rgb",))
    mean = model.trunk("rgb").stem[1].running_mean
    assert mean is not None
    mean[0] += 0.01
    assert (maps(freeze(model)) - oracle).abs().max() / oracle.abs().max() > 2e-5
