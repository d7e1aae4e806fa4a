"""Whether the detection recipe learns on real input: trains on a few images and scores those same images.

`python -m benchmarks.overfit data/coco runs/desk/pretrain/ir-s0 --model mask` (after `mirepro data import coco PATH`).
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from mirepro import determinism


def chosen(scenes, count: int):  # type: ignore[no-untyped-def]
    """The first images that hold one to four objects of the model's kind without crowds."""
    fits = [
        i
        for i, found in enumerate(scenes.objects)
        if 1 <= len(found) <= 4 and not any(thing.get("iscrowd") for thing in found)
    ][:count]
    targets = tuple([side[i] for i in fits] for side in scenes.targets)
    return replace(scenes, images=scenes.images[fits], objects=[scenes.objects[i] for i in fits], targets=targets)


def main() -> None:
    """Parses, trains, prints AP50 before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("pretrained", type=Path, help="folder with encoder.safetensors")
    parser.add_argument("--model", choices=("mask", "keypoint"), default="mask")
    for name, default in (("images", 8), ("size", 128), ("epochs", 200), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=0.004)
    arguments = parser.parse_args()
    determinism.configure_torch("exact", arguments.threads)
    from mirepro import encoders
    from mirepro.data import shards
    from mirepro.params import DetectParams, HeadParams
    from mirepro.transfer import detection, detection_data, detection_model

    params = DetectParams(
        size=arguments.size, batch=4, epochs=arguments.epochs, lrs=(arguments.lr,) * 3, oks_sigma=None, min_stride=4,
        anchors=(0.08, 0.25, 0.65), scales=(0.6, 1.0, 1.6), proposals=60, proposals_before=200, roi_samples=64,
        keypoint=HeadParams(8, 64, 4), detections=30,
    )  # fmt: skip
    scenes = chosen(
        detection_data.load(shards.open(arguments.data, "train"), arguments.model, params.size), arguments.images
    )
    detector = detection_model.build(
        encoders.load(arguments.pretrained / "encoder.safetensors"),
        arguments.model,
        params,
        len(scenes.categories),
        len(scenes.sigmas),
    )
    detection_model.initialise(detector, 0)
    recall = detector.anchor_recall([target["boxes"] for target in scenes.targets[0]])
    print(f"{len(scenes.images)} images, {sum(map(len, scenes.objects))} objects, anchor recall {recall:.2f}")
    started = time.monotonic()
    for label in ("untrained", "trained"):
        if label == "trained":
            detection.train(detector, scenes, detection.Variant(arguments.lr), params, 0)
            detection.calibrate(detector, scenes.images, params.batch)
        found = detection.predict(detector, scenes.images, params.batch)
        stats = detection.score(scenes, found, arguments.model, params)
        print(
            label,
            {task: f"AP50 {values['AP50'] or 0:.1f}, AP {values['AP'] or 0:.1f}" for task, values in stats.items()},
        )
    print(f"{time.monotonic() - started:.0f} s on {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
