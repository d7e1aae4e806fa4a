"""Torchvision's Faster, Mask and Keypoint R-CNN with an FPN over a pretrained trunk; every size is a parameter.

Three of torchvision's defaults are wrong here and are set otherwise: anchors and the RoI pooling's canonical scale
follow the image size, BatchNorm trains everywhere (torchvision freezes it when weights are given), no download.
Images arrive at their final size and the trunk normalises them itself, so torchvision's resizing transform is bypassed.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mirepro import rng
from mirepro.errors import UserError
from mirepro.params import DetectParams

ASPECTS = (0.5, 1.0, 2.0)
COMPARED = 16
"""Boxes compared with all anchors at a time: all of COCO's at once would take above 100 GB; 16 fit a core's cache."""
PREDICTORS = ("cls_logits", "bbox_pred", "cls_score", "mask_fcn_logits")
"""Last layers start small (standard deviation .01), as in torchvision's RPN."""


class Trunk(Protocol):
    """What the detector needs of a pretrained model: maps C2..C5 with their strides and widths."""

    strides: list[int]
    channels: list[int]

    def pyramid(self, rgb: Tensor) -> list[Tensor]:
        """RGB in [0, 1] `(B, 3, S, S)` -> C2..C5."""
        ...


class Backbone(nn.Module):
    """The used maps of a trunk, and the FPN over them.

    Attributes:
        out_channels: Width of every output map (torchvision reads it).
        names: Keys of the maps that RoI pooling reads.
    """

    def __init__(self, trunk: nn.Module, params: DetectParams, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        strides, channels = list(trunk.strides), list(trunk.channels)  # type: ignore[arg-type]
        self.trunk, self.out_channels = trunk, params.fpn
        self.levels = [i for i, stride in enumerate(strides) if stride >= params.min_stride][: len(params.anchors)]
        missing = len(params.anchors) - len(self.levels)
        if not self.levels or missing > 1:
            raise UserError(
                f"detect.anchors: {len(params.anchors)} levels, but the trunk has strides {strides} and only those "
                f">= detect.min_stride = {params.min_stride} (and one pooled level) count; give fewer anchors"
            )
        for name in _unused(trunk, self.levels[-1]):
            trunk.set_submodule(name, nn.Identity())
        self.names = [str(i) for i in range(len(self.levels))]
        extra = LastLevelMaxPool() if missing else None
        self.fpn = FeaturePyramidNetwork([channels[i] for i in self.levels], params.fpn, extra, norm)

    def maps(self, images: Tensor) -> list[Tensor]:
        """RGB in [0, 1] `(B, 3, S, S)` -> the trunk's maps that the FPN uses."""
        pyramid = self.trunk.pyramid(images)  # type: ignore[operator]
        return [pyramid[i] for i in self.levels]

    def fuse(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Maps of the trunk -> maps of the FPN, all of width `out_channels`."""
        return self.fpn(OrderedDict(zip(self.names, maps, strict=True)))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """RGB in [0, 1] `(B, 3, S, S)` -> maps of the FPN."""
        return self.fuse(self.maps(images))


def _unused(trunk: nn.Module, last: int) -> list[str]:
    """Names of the residual stages above C2..C5 number `last` (from 0), whose maps nobody reads."""
    stages = {f"layer{level + 1}" for level in range(last + 1, 4)}
    return [name for name, _ in trunk.named_modules() if name.rpartition(".")[2] in stages]


class MaskPredictor(MaskRCNNPredictor):
    """Torchvision's, in an order of computation that a CPU likes.

    The deconvolution's channels lie together in memory: oneDNN's gradient then takes a fifth of the time, for whole
    vectors of 8 channels (see `encoders.Trunk.layout`). The logits, few and odd in number, are a matrix product.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(R, C, H, W)` -> logits `(R, categories + 1, 2 H, 2 W)`."""
        aligned = x.device.type == "cpu" and x.shape[1] % 8 == 0
        x = x.contiguous(memory_format=torch.channels_last) if aligned else x
        x, last = self.relu(self.conv5_mask(x)), self.mask_fcn_logits
        return nn.functional.linear(x.permute(0, 2, 3, 1), last.weight.flatten(1), last.bias).permute(0, 3, 1, 2)


class Detector(nn.Module):
    """Losses and predictions of a torchvision R-CNN from the maps of the trunk (a frozen one's may be kept)."""

    def __init__(self, rcnn: FasterRCNN, size: int) -> None:
        super().__init__()
        self.rcnn, self.size = rcnn, size

    @property
    def backbone(self) -> Backbone:
        """Trunk and FPN."""
        backbone = self.rcnn.backbone
        assert isinstance(backbone, Backbone)
        return backbone

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def maps(self, images: Tensor) -> list[Tensor]:
        """RGB in [0, 1] `(B, 3, S, S)` on any device -> the trunk's maps that the FPN uses."""
        return self.backbone.maps(images.to(self.device))

    def _images(self, maps: Sequence[Tensor]) -> ImageList:
        n = len(maps[0])
        return ImageList(maps[0].new_zeros(n, 3, self.size, self.size), [(self.size, self.size)] * n)

    def losses(self, maps: Sequence[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Torchvision's losses in training mode; they draw their samples from torch's global generator."""
        images, features = self._images(maps), self.backbone.fuse(maps)
        proposals, rpn = self.rcnn.rpn(images, features, targets)
        _, heads = self.rcnn.roi_heads(features, proposals, images.image_sizes, targets)
        return rpn | heads

    def predict(self, maps: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes (x1, y1, x2, y2), scores, labels (from 1), and masks `(n, 1, S, S)` or keypoints `(n, K, 3)`."""
        images, features = self._images(maps), self.backbone.fuse(maps)
        proposals, _ = self.rcnn.rpn(images, features)
        found, _ = self.rcnn.roi_heads(features, proposals, images.image_sizes)
        return self.rcnn.transform.postprocess(found, images.image_sizes, images.image_sizes)

    def anchor_recall(self, boxes: list[Tensor]) -> float:
        """Share of boxes `(n, 4)` per image that some anchor overlaps with IoU >= .5."""
        with torch.no_grad():
            maps = self.backbone(torch.zeros(1, 3, self.size, self.size))
        images = ImageList(torch.zeros(1, 3, self.size, self.size), [(self.size, self.size)])
        anchors = self.rcnn.rpn.anchor_generator(images, list(maps.values()))[0]
        parts = torch.cat(boxes).split(COMPARED)
        best = torch.cat([box_iou(part, anchors).amax(1) for part in parts])
        return (best >= 0.5).float().mean().item()


def norm_layer(batch: int) -> Callable[[int], nn.Module]:
    """BatchNorm, or GroupNorm where fewer than 8 images make batch statistics too noisy."""
    return nn.BatchNorm2d if batch >= 8 else lambda width: nn.GroupNorm(math.gcd(8, width), width)


def _pool(backbone: Backbone, params: DetectParams, resolution: int) -> MultiScaleRoIAlign:
    """Pools an object of `canonical` x image size from the second used map, half of that from the first."""
    strides = [backbone.trunk.strides[i] for i in backbone.levels]  # type: ignore[index]
    level = round(math.log2(strides[min(1, len(strides) - 1)]))
    scale = max(1, round(params.canonical * params.size))
    return MultiScaleRoIAlign(backbone.names, resolution, params.sampling, canonical_scale=scale, canonical_level=level)


def build(trunk: nn.Module, model: str, params: DetectParams, categories: int, keypoints: int) -> Detector:
    """A detector with untrained FPN and heads; fill them with `initialise`.

    Args:
        trunk: A module with the attributes of `Trunk`; it becomes part of the detector.
        model: "box", "mask" or "keypoint".
        params: Sizes.
        categories: Number of object categories without the background.
        keypoints: Keypoints per object.

    Raises:
        UserError: More anchor levels than the trunk has maps.
    """
    norm = norm_layer(params.batch)
    backbone = Backbone(trunk, params, norm)
    sides = tuple(tuple(share * params.size * scale for scale in params.scales) for share in params.anchors)
    anchors = AnchorGenerator(sides, (ASPECTS,) * len(sides))
    width, hidden = params.fpn, params.box_hidden
    common: dict[str, Any] = {
        "min_size": params.size, "max_size": params.size, "image_mean": [0.0] * 3, "image_std": [1.0] * 3,
        "rpn_anchor_generator": anchors, "rpn_head": RPNHead(width, anchors.num_anchors_per_location()[0]),
        "rpn_pre_nms_top_n_train": params.proposals_before, "rpn_pre_nms_top_n_test": params.proposals_before,
        "rpn_post_nms_top_n_train": params.proposals, "rpn_post_nms_top_n_test": params.proposals,
        "rpn_batch_size_per_image": params.rpn_samples, "box_batch_size_per_image": params.roi_samples,
        "box_positive_fraction": params.roi_positive,
        "box_roi_pool": _pool(backbone, params, params.box_pool),
        "box_head": TwoMLPHead(width * params.box_pool**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, categories + 1),
        "box_score_thresh": params.score, "box_detections_per_img": params.detections,
    }  # fmt: skip
    if model == "box":
        return Detector(FasterRCNN(backbone, **common), params.size)
    sizes = params.mask if model == "mask" else params.keypoint
    pool = _pool(backbone, params, sizes.pool)
    head = MaskRCNNHeads(width, [sizes.width] * sizes.layers, 1, norm)
    if model == "mask":
        predictor = MaskPredictor(sizes.width, sizes.width, categories + 1)
        rcnn = MaskRCNN(backbone, mask_roi_pool=pool, mask_head=head, mask_predictor=predictor, **common)
    else:
        last = KeypointRCNNPredictor(sizes.width, keypoints)
        last.up_scale = params.heatmap
        rcnn = KeypointRCNN(backbone, keypoint_roi_pool=pool, keypoint_head=head, keypoint_predictor=last, **common)
    return Detector(rcnn, params.size)


@torch.no_grad()
def initialise(detector: Detector, seed: int) -> None:
    """Initial weights of FPN and heads from the counter RNG: He normal (fan in), predictors .01, biases 0.

    The trunk keeps its weights. A tensor's values depend on the seed, its number and its position only.
    """
    number = 1 << 20  # apart from the encoder's tensors
    for name, module in detector.named_modules():
        if name.startswith("rcnn.backbone.trunk") or not isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            continue
        number += 1
        weight, last = module.weight, name.rsplit(".", 1)[-1] in PREDICTORS
        fan = weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else weight[:, 0].numel() // 4
        values = rng.normal(seed, rng.Stream.WEIGHT, 0, [number], weight.numel())
        values *= 0.01 if last else math.sqrt(2 / fan)
        weight.copy_(torch.from_numpy(values.astype(np.float32)).view(weight.shape))
        if module.bias is not None:
            module.bias.zero_()
