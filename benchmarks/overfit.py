"""Whether the detection recipe learns on real input: trains on a few images, scores those same and held-out ones.

`mirepro data import coco_mini PATH`, then `python -m benchmarks.overfit data/coco_mini runs/desk/pretrain/ir-s0
runs/desk/pretrain/random-s0 --out benchmarks/results/overfit.json`. High numbers on the images that were trained on
prove that the recipe fits, nothing more; the held-out numbers beside them say what so few images teach. With `--all`
all images of train and val are learnt from, with crowds and with any number of objects: work for a GPU.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mirepro import determinism, encoders, files
from mirepro.data import shards
from mirepro.data.images import Images
from mirepro.params import DetectParams, HeadParams
from mirepro.transfer import detection, detection_data, detection_model
from mirepro.transfer.detection_data import Scenes
from mirepro.transfer.detection_training import Training, Variant, calibrate

SHOWN = ("AP", "AP50")


@dataclass(frozen=True)
class Trial:
    """One training: an encoder, a model, the images learnt from and those held out."""

    encoder: Path
    model: str
    params: DetectParams
    lr: float
    learnt: Scenes
    held_out: Scenes

    def run(self) -> dict[str, Any]:
        """Numbers before and after the training, in percent, on both sets of images."""
        detector = detection_model.build(
            encoders.load(self.encoder / "encoder.safetensors"),
            self.model, self.params, len(self.learnt.categories), len(self.learnt.sigmas),
        )  # fmt: skip
        detection_model.initialise(detector, 0)
        recall = detection.anchor_recall(detector, self.learnt, self.params)
        detector.to(self.params.device)
        begin = time.monotonic()
        result: dict[str, Any] = {"untrained": self._score(detector, self.learnt)}
        Training(detector, self.learnt, Variant(self.lr), self.params, 0).run()
        calibrate(detector, self.learnt, self.params.batch)
        result |= {"learnt": self._score(detector, self.learnt), "held_out": self._score(detector, self.held_out)}
        facts: dict[str, Any] = {"encoder": self.encoder.name, "model": self.model, "anchor_recall": recall}
        facts |= {"objects": sum(map(len, self.learnt.objects)), "held_out_images": len(self.held_out)}
        return facts | result | {"seconds": round(time.monotonic() - begin)}

    def _score(self, detector: detection_model.Detector, scenes: Scenes) -> dict[str, dict[str, float | None]]:
        found = detection.predict(detector, scenes, self.params.batch)
        stats = detection.score(scenes, found, self.model, self.params)
        return {task: {name: values[name] for name in SHOWN} for task, values in stats.items()}


@dataclass(frozen=True)
class Chosen:
    """Some of a split's images."""

    images: Images
    numbers: Tensor

    def __getitem__(self, index: Tensor) -> Tensor:
        """See `Images`."""
        return self.images[self.numbers[index]]


@dataclass(frozen=True)
class Joined:
    """The images of some splits, one after another."""

    parts: tuple[Scenes, ...]

    def __getitem__(self, index: Tensor) -> Tensor:
        """See `Images`."""
        places = [(part, i) for part in self.parts for i in range(len(part))]
        return torch.cat([part.images[torch.tensor([i])] for part, i in (places[int(number)] for number in index)])


def every(*parts: Scenes) -> Scenes:
    """All images of some splits."""
    return replace(parts[0], images=Joined(parts), objects=[found for part in parts for found in part.objects])


def simple(scenes: Scenes, count: int) -> Scenes:
    """The first images that hold one to four objects of the model's kind and no crowds."""
    fits = [
        i
        for i, found in enumerate(scenes.objects)
        if 1 <= len(found) <= 4 and not any(thing.get("iscrowd") for thing in found)
    ][:count]
    return replace(scenes, images=Chosen(scenes.images, torch.tensor(fits)), objects=[scenes.objects[i] for i in fits])


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Every model with every encoder."""
    params = DetectParams(
        device=options.device, size=options.size, batch=4, epochs=options.epochs, lrs=(options.lr,), oks_sigma=None,
        min_stride=4, anchors=(0.08, 0.25, 0.65), scales=(0.6, 1.0, 1.6), min_recall=0.5, proposals=60,
        proposals_before=200, roi_samples=64, keypoint=HeadParams(8, 64, 4), detections=30, sensitivity=(),
    )  # fmt: skip
    for model in options.models:
        train = detection_data.load(shards.open(options.data, "train"), model, options.size)
        val, test = (
            detection_data.load(shards.open(options.data, split), model, options.size, used=train.used)
            for split in ("val", "test")
        )
        learnt = every(train, val) if options.all else simple(train, options.images)
        for encoder in options.encoders:
            yield Trial(encoder, model, params, options.lr, learnt, test)


def main() -> None:
    """Parses, trains, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("encoders", type=Path, nargs="+", help="folders with encoder.safetensors")
    parser.add_argument("--models", choices=("mask", "keypoint"), nargs="+", default=("mask", "keypoint"))
    for name, default in (("images", 8), ("size", 128), ("epochs", 200), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--all", action="store_true", help="learn from all images of train and val")
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the detector is trained")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    determinism.check_device("--device", options.device, "exact")
    determinism.configure_torch("exact", options.threads)
    table = Table("encoder", "model", "task", "untrained AP50", "learnt AP50", "learnt AP", "held-out AP50", "s")
    done = []
    for trial in trials(options):
        done.append(result := trial.run())
        for task, learnt in result["learnt"].items():
            others = (result["untrained"][task]["AP50"], *learnt.values(), result["held_out"][task]["AP50"])
            before, ap, ap50, held_out = (f"{value or 0:.1f}" for value in others)
            head = (result["encoder"], result["model"], task)
            table.add_row(*head, before, ap50, ap, held_out, str(result["seconds"]))
    Console().print(table)
    if options.out:
        names = ("images", "all", "size", "epochs", "lr", "device", "threads")
        setting = {name: getattr(options, name) for name in names}
        files.write_json(options.out, {"setting": setting, "unit": "%", "trials": done})


if __name__ == "__main__":
    main()
