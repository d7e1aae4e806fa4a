"""ResNet trunks on torchvision's blocks, a linear head, and the ensemble of one encoder per modality."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from mirepro import files, rng, views
from mirepro.errors import UserError
from mirepro.params import EncoderParams, build, plain

ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
STEMS = {"small": 1, "tiny": 2, "imagenet": 4}
CHANNELS = {"rgb": 3, "L": 1, "ab": 2}


def _stem(kind: str, channels: int, width: int) -> nn.Sequential:
    """small: 3x3 stride 1; tiny: 3x3 stride 2; imagenet: 7x7 stride 2 and max pooling (He et al. 2016)."""
    large = kind == "imagenet"
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 7 if large else 3, 1 if kind == "small" else 2, 3 if large else 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(3, 2, 1)] if large else []))


class Trunk(nn.Module):
    """A ResNet without its classifier.

    Attributes:
        strides: Pixels per cell of C2..C5.
        channels: Widths of C2..C5.
    """

    def __init__(self, arch: str, width: int, stem: str, channels: int = 3) -> None:
        super().__init__()
        block, depths = ARCHITECTURES[arch]
        self.stem = _stem(stem, channels, width)
        self.strides = [STEMS[stem] * 2**level for level in range(4)]
        self.channels = [width * 2**level * block.expansion for level in range(4)]
        self.aligned = width % 8 == 0
        inner = width
        for level, depth in enumerate(depths):
            planes, stride = width * 2**level, 1 if level == 0 else 2
            layer = []
            for i in range(depth):
                layer.append(block(inner, planes, stride if i == 0 else 1, _shortcut(block, inner, planes, stride, i)))
                inner = planes * block.expansion
            self.add_module(f"layer{level + 1}", nn.Sequential(*layer))

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, C, S, S)` -> the maps C2..C5, `(B, channels[i], S / strides[i], S / strides[i])`."""
        layout = self.layout(x.device)
        x = self.stem(x.contiguous(memory_format=layout)).contiguous(memory_format=layout)  # one channel has no layout
        maps = []
        for level in range(1, 5):
            x = self.get_submodule(f"layer{level}")(x)
            maps.append(x)
        return maps

    def layout(self, device: torch.device) -> torch.memory_format:
        """How the maps lie in memory: channels last on the CPU, where oneDNN convolves them in a fifth less time.

        Only for whole vectors of 8 channels: with fewer than 8, oneDNN's AVX2 kernels write past the end of a gradient.
        """
        return torch.channels_last if device.type == "cpu" and self.aligned else torch.contiguous_format


def _shortcut(
    block: type[BasicBlock] | type[Bottleneck], inner: int, planes: int, stride: int, i: int
) -> nn.Module | None:
    outer = planes * block.expansion
    if i > 0 or (stride == 1 and inner == outer):
        return None
    return nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))


class Encoder(nn.Module):
    """g(x): trunk, average pooling, one linear layer (and BatchNorm where `norm` asks for it), L2 normalisation."""

    def __init__(self, params: EncoderParams, channels: int = 3) -> None:
        super().__init__()
        self.trunk = Trunk(params.arch, params.width, params.stem, channels)
        linear = nn.Linear(self.trunk.channels[-1], params.dim)
        self.head = nn.Sequential(linear, nn.BatchNorm1d(params.dim, affine=False)) if params.norm else linear

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """`(B, C, S, S)` -> C2..C5."""
        return self.trunk(x)

    def feature_map(self, x: Tensor) -> Tensor:
        """`(B, C, S, S)` -> C5 `(B, F, h, w)`."""
        return self.trunk(x)[-1]

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, S, S)` -> z `(B, dim)`, rows of length 1."""
        return nn.functional.normalize(self.head(self.feature_map(x).mean((2, 3))))


class Ensemble(nn.Module):
    """One encoder per modality: `rgb`, or `L` and `ab` (CMC)."""

    def __init__(self, params: EncoderParams, modalities: Sequence[str] = ("rgb",)) -> None:
        super().__init__()
        check(params)
        self.params, self.modalities = params, tuple(modalities)
        self.encoders = nn.ModuleDict({name: Encoder(params, CHANNELS[name]) for name in modalities})
        trunks = [self.trunk(name) for name in self.modalities]
        self.strides = trunks[0].strides
        self.channels = [sum(widths) for widths in zip(*(trunk.channels for trunk in trunks), strict=True)]

    @property
    def device(self) -> torch.device:
        """Where the weights stand."""
        return next(self.parameters()).device

    def encoder(self, modality: str) -> Encoder:
        """The encoder of one modality."""
        encoder = self.encoders[modality]
        assert isinstance(encoder, Encoder)
        return encoder

    def trunk(self, modality: str) -> Trunk:
        """The trunk of one modality."""
        return self.encoder(modality).trunk

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalised inputs per modality `(B, C, S, S)` -> embeddings per modality `(B, dim)`."""
        return {name: self.encoder(name)(inputs[name]) for name in self.modalities}

    def embed(self, rgb: Tensor) -> dict[str, Tensor]:
        """RGB in [0, 1] `(B, 3, S, S)` -> embeddings per modality `(B, dim)`."""
        return self(views.modalities(rgb, self.modalities))

    def pyramid(self, rgb: Tensor) -> list[Tensor]:
        """RGB in [0, 1] `(B, 3, S, S)` -> C2..C5, the modalities' channels concatenated."""
        inputs = views.modalities(rgb, self.modalities)
        levels = zip(*(self.encoder(name).pyramid(inputs[name]) for name in self.modalities), strict=True)
        return [torch.cat(maps, 1) for maps in levels]

    def feature_map(self, rgb: Tensor) -> Tensor:
        """RGB in [0, 1] `(B, 3, S, S)` -> C5 `(B, F, h, w)`."""
        return self.pyramid(rgb)[-1]


def check(params: EncoderParams) -> None:
    """Refuses unknown architectures and impossible sizes with UserError."""
    for key, known in (("arch", ARCHITECTURES), ("stem", STEMS)):
        if getattr(params, key) not in known:
            raise UserError(f"encoder.{key}: {getattr(params, key)!r} is unknown; known: {', '.join(known)}")
    for key in ("width", "dim"):
        if getattr(params, key) < 1:
            raise UserError(f"encoder.{key}: {getattr(params, key)} is impossible; use a positive number")


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Initial weights from the counter RNG: He normal (fan out) for convolutions, 1/sqrt(fan in) for linear layers.

    A tensor's values depend on the seed, its number and its position only (He et al. 2015; torchvision's ResNet).
    """
    for number, (name, module) in enumerate(model.named_modules()):
        del name
        if isinstance(module, nn.Conv2d):
            _fill(module.weight, seed, number, math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size))))
        elif isinstance(module, nn.Linear):
            _fill(module.weight, seed, number, 1 / math.sqrt(module.in_features))
            module.bias.zero_()


def _fill(weight: Tensor, seed: int, number: int, scale: float) -> None:
    values = rng.normal(seed, rng.Stream.WEIGHT, 0, [number], weight.numel()) * scale
    weight.copy_(torch.from_numpy(values.astype(np.float32)).view(weight.shape))


def count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters())


def save(path: Path, ensemble: Ensemble) -> None:
    """Writes weights as safetensors; one metadata key holds the parameters as sorted JSON."""
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in ensemble.state_dict().items()}
    meta = json.dumps({"encoder": plain(ensemble.params), "modalities": list(ensemble.modalities)}, sort_keys=True)
    files.write_bytes(path, to_safetensors(tensors, {"mirepro": meta}))


def load(path: Path) -> Ensemble:
    """Reads an ensemble in evaluation mode.

    Raises:
        UserError: The file is missing, damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["mirepro"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run its pretraining stage first") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not an encoder written by mirepro ({error}); pretrain again") from error
    ensemble = Ensemble(build(EncoderParams, meta["encoder"], str(path)), meta["modalities"])
    ensemble.load_state_dict(tensors)
    return ensemble.eval()
