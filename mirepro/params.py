"""params.yaml <-> frozen dataclasses: unknown key, wrong type or impossible value is an error naming the key."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mirepro.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class EncoderParams:
    """A ResNet trunk and one linear layer to `dim` [code: resnet18, width 64, stem imagenet, dim 128].

    `norm` puts a BatchNorm without parameters between the layer and the L2 normalisation, which the code has not:
    embeddings are centred from the first step, which short schedules need [measured].
    """

    arch: str = "resnet10"
    width: int = 16
    stem: str = "small"
    dim: int = 64
    norm: bool = False


@dataclass(frozen=True)
class OptimParams:
    """SGD and its schedule: constant, step (x.1 at each milestone, as fractions of the run) or cosine.

    [code: lr .03, momentum .9, weight decay 1e-4; presets constant, and step at .6 and .8 of 200 epochs.]
    """

    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "constant"
    milestones: tuple[float, ...] = (0.6, 0.8)
    warmup: float = 0.0


@dataclass(frozen=True)
class ViewParams:
    """Augmentations in their order [code]: crop, gray, jitter, flip; a zero switches one off. Values: [code]."""

    size: int = 32
    crop: tuple[float, float] = (0.2, 1.0)
    gray: float = 0.2
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
    flip: float = 0.5


@dataclass(frozen=True)
class PretrainParams:
    """What all rows share: paired seeds mean equal views, order and initial weights for every objective.

    `device` is cpu, or cuda (tiers exact and fast), where a rank takes the device of its local number. `bank_shards` 0
    keeps the whole bank on every rank; V >= 1 spreads it over the ranks in V blocks, for banks that one device cannot
    hold: results depend on V, and not on the number of ranks, which has to divide V. `split` is train, or unlabelled
    where the data have images without labels for pretraining (STL-10).
    """

    data: str = "desk"
    split: str = "train"
    device: str = "cpu"
    epochs: int = 10
    batch: int = 128
    shards: int = 1
    bank_shards: int = 0
    precision: str = "float32"
    monitor: int = 1
    digest: int = 20
    encoder: EncoderParams = field(default_factory=EncoderParams)
    optim: OptimParams = field(default_factory=OptimParams)
    views: ViewParams = field(default_factory=ViewParams)


@dataclass(frozen=True)
class RunParams:
    """One pretraining run: a row of the tables with a seed."""

    row: str
    seed: int
    objective: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pretrain: PretrainParams = field(default_factory=PretrainParams)
    tier: str = "portable"
    threads: int = 1


@dataclass(frozen=True)
class LinearParams:
    """Linear evaluation: L2 values tried on val; the author protocol's SGD [code: lr .01, momentum .9, 100 epochs].

    The regressions run to convergence on the `converged` features, flat or pool, which are held at once; SGD's are not.
    """

    converged: tuple[str, ...] = ("flat", "pool")
    l2: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)
    iterations: int = 200
    tolerance: float = 1e-4
    author_epochs: int = 5
    author_lr: float = 0.01
    author_momentum: float = 0.9
    author_batch: int = 128


@dataclass(frozen=True)
class EvaluateParams:
    """Transfer to classification; `anchors` images get a picture of their neighbourhood.

    A neighbour votes with e^{score / tau} [code: k_nn 200, tau .07]. `device` is cpu, or cuda (tiers exact and fast),
    which makes views and features and trains the author protocol's layer there; the rest is the CPU's.
    """

    data: str = "desk"
    device: str = "cpu"
    k_nn: tuple[int, ...] = (1, 5, 20, 200)
    tau: float = 0.07
    anchors: int = 6
    gallery: int = 8
    linear: LinearParams = field(default_factory=LinearParams)
    views: ViewParams = field(default_factory=ViewParams)


@dataclass(frozen=True)
class ToyParams:
    """The Gaussian toy of table T5: (dimensions, correlation) cases over independent banks."""

    cases: tuple[tuple[int, float], ...] = ((5, 0.5), (20, 0.5))
    banks: int = 6
    rows: int = 8192
    anchors: int = 1500
    redraws: int = 8
    seed: int = 0


@dataclass(frozen=True)
class HeadParams:
    """A mask or keypoint head: cells per side of a pooled object, channels and number of 3x3 convolutions."""

    pool: int
    width: int
    layers: int


@dataclass(frozen=True)
class DetectParams:
    """Detection with small heads for small images (torchvision's sizes: fpn 256, box_pool 7, box_hidden 1024, ...).

    Masks train for `epochs`, keypoints, the harder task, for `keypoint_epochs`; the long schedule has `long` times as
    many. `flip` is the share of mirrored training images (0 for scenes that never come mirrored). `warmup` is the share
    of the steps with a rising learning rate, `clip` the largest norm of a gradient. Anchors are shares of the image's
    side, one per level of the pyramid, each also times `scales`; where less than the share `min_recall` of val's boxes
    overlaps one with IoU >= .5, the stage refuses to train. RoI pooling takes an object of `canonical` x side from the
    second level. `heatmap` enlarges the keypoint head's maps after their deconvolution. `oks_sigma` holds for every
    keypoint (null: the data's own, as for COCO); `sensitivity` are factors of it at which keypoint AP is stated too.
    `repeat_threshold` is the share of training images below which those with a category are repeated (repeat-factor
    sampling; .001 for LVIS, 0 repeats none). `device` is cpu, or cuda (tiers exact and fast).
    """

    device: str = "cpu"
    size: int = 64
    batch: int = 8
    epochs: int = 3
    keypoint_epochs: int = 4
    long: int = 2
    lrs: tuple[float, ...] = (0.002, 0.004, 0.008)
    fixed_lr: float = 0.004
    weight_decay: float = 1e-4
    clip: float = 5.0
    warmup: float = 0.1
    flip: float = 0.5
    repeat_threshold: float = 0.0
    min_stride: int = 4
    anchors: tuple[float, ...] = (0.3, 0.42)
    scales: tuple[float, ...] = (1.0,)
    min_recall: float = 0.95
    canonical: float = 0.56
    fpn: int = 40
    box_pool: int = 4
    box_hidden: int = 128
    mask: HeadParams = field(default_factory=lambda: HeadParams(7, 32, 1))
    keypoint: HeadParams = field(default_factory=lambda: HeadParams(5, 48, 3))
    heatmap: int = 2
    sampling: int = 1
    proposals_before: int = 20
    proposals: int = 12
    rpn_samples: int = 32
    roi_samples: int = 12
    roi_positive: float = 0.5
    score: float = 0.02
    detections: int = 15
    oks_sigma: float | None = 0.05
    sensitivity: tuple[float, ...] = (0.5, 2.0)


def build(cls: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """Builds a frozen dataclass from plain values.

    Args:
        cls: The dataclass.
        values: Plain YAML values; None counts as empty.
        where: Dotted path of the mapping, for messages.

    Raises:
        UserError: Unknown key (with the nearest known one), missing key, wrong type.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}.{key}: unknown key; known: {', '.join(sorted(fields))}")
    for name, item in fields.items():
        default = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if default and name not in values:
            raise UserError(f"{where}.{name}: missing key")
    return cls(**{key: convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """Checks one plain value against a type hint; tuples come from lists, floats accept integers.

    Raises:
        UserError: The value has another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin in (dict, Mapping, typing.get_origin(Mapping[str, Any])):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping, got {value!r}")
        return {key: convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected a list, got {value!r}")
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(hints) != len(value):
        raise UserError(f"{where}: expected {len(hints)} values, got {len(value)}")
    return tuple(convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        UserError: The file is missing, is not YAML, or is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the command from the repository's root") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys")
    return values


def plain(value: Any) -> Any:
    """Dataclasses and tuples as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
