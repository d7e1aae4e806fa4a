"""Input at 224 pixels against torchvision's usual loader, and its share of a step: `python -m benchmarks.pipeline`.

Images per second of one core's time, all in one process, files in the page cache. Here: squares of 256 pixels in mapped
shards, as the import writes them, decoded and augmented batch by batch. There: ImageFolder, PIL's transforms and a
DataLoader without workers (each would do the same on a core of its own), on the same squares and on the original files,
whose crops are those of whole images. `--photos FOLDER` takes JPEG files in place of generated ones.
"""

import argparse
import io
import itertools
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import harness
from benchmarks.views import images, pictures, torchvision_pil
from mirepro import params, views
from mirepro.data import images as stored
from mirepro.data import packing, shards
from mirepro.params import RunParams
from mirepro.pretrain import Trainer

SIDE, WIDTH, HEIGHT, QUALITY = 256, 500, 375, 90
"""Stored squares; size and quality of generated files: those of a usual photograph of ImageNet."""


def run(options: argparse.Namespace) -> RunParams:
    """ResNet-18 at 224 pixels with the full-scale profile's views; nothing scans the bank."""
    training = {"epochs": 1000, "batch": options.batch, "monitor": 0, "digest": 10**6}
    training |= {"encoder": {"arch": "resnet18", "width": 64, "stem": "imagenet", "dim": 128}}
    training |= {"views": {"size": 224, "crop": [0.2, 1.0], "gray": 0.2, "jitter": [0.4] * 4, "flip": 0.5}}
    plain = {"row": "ir", "seed": 0, "objective": "ir", "options": {"k": 4096}}
    return params.build(RunParams, plain | {"pretrain": training, "tier": "fast"}, "run")


def originals(folder: Path, count: int, photos: list[Path]) -> list[Path]:
    """`count` JPEG files in two class folders: photographs over and over, or generated ones where there are none."""
    files = [folder / str(number % 2) / f"{number:05d}.jpg" for number in range(count)]
    for path in files[:2]:
        path.parent.mkdir(parents=True)
    if photos:
        for path, photo in zip(files, itertools.cycle(photos), strict=False):
            shutil.copyfile(photo, path)
        return files
    for path, picture in zip(files, pictures(images(count, WIDTH)), strict=True):
        picture.crop((0, 0, WIDTH, HEIGHT)).save(path, quality=QUALITY)
    return files


def packed(folder: Path, files: list[Path]) -> shards.Split:
    """The files as shards of squares, through the import's own writer."""
    facts = [(path, path.stat().st_size) for path in files]
    items = [packing.Item(path.stem, int(path.parent.name), str(path), 0, n, 0, path.name) for path, n in facts]
    meta = {"title": "", "classes": ["0", "1"], "categories": [], "keypoints": {}}
    packing.pack(folder, "pipeline", {"train": items}, meta, side=SIDE)
    return shards.open(folder, "train")


def unpacked(folder: Path, split: shards.Split) -> Path:
    """The shards' squares as class folders."""
    for key, content, label in zip(split.keys, split.files, split.labels, strict=True):
        path = folder / str(label) / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def own_pass(split: shards.Split, run: RunParams, augment: bool = True) -> Callable[[], None]:
    """One pass over the shards in a random order."""
    pixels = stored.Images(split)

    def call() -> None:
        for index in torch.randperm(len(pixels)).split(run.pretrain.batch):
            batch = pixels[index]
            if augment:
                views.modalities(views.batch(batch, run.pretrain.views, seed=0, epoch=0, index=index), ("rgb",))

    return call


def torchvision_pass(folder: Path, run: RunParams) -> Callable[[], None]:
    """One pass over class folders as public code makes it."""
    data = ImageFolder(str(folder), torchvision_pil(run.pretrain.views))
    loader = DataLoader(data, run.pretrain.batch, shuffle=True)

    def call() -> None:
        for _ in loader:
            pass

    return call


def parts(split: shards.Split, run: RunParams) -> harness.Contenders:
    """A training step, and what of it is input."""
    trainer = Trainer(run, split, split)
    trainer.begin(0)
    batches = itertools.cycle(trainer.batches(0)[:-1])  # the last one of an epoch has diagnostics, too

    def view() -> Tensor:
        return trainer._view(trainer.images, next(batches), 0)

    return {
        "step": lambda: trainer.train_step(next(batches)),
        "reading, decoding and views": view,
        "reading and decoding": lambda: trainer.images[next(batches)],
    }


def pixels(path: Path) -> int:
    """Number of pixels of an image file."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return image.width * image.height


def main() -> None:
    """Parses, measures, prints a table, writes JSON."""
    parser = harness.parser(__doc__, count=512, batch=32, repeats=5, steps=3)
    parser.add_argument("--photos", type=Path, help="folder of JPEG files")
    options = parser.parse_args()
    harness.start(options)
    photos = sorted(options.photos.rglob("*.jpg")) if options.photos else []
    options.photos = len(photos)
    chosen, results = run(options), harness.Results(options)
    stored.MEMORY = 0  # read from the shards batch by batch, as ImageNet is
    with tempfile.TemporaryDirectory() as name:
        files = originals(Path(name) / "original", options.count, photos)
        split = packed(Path(name) / "data", files)
        contenders = {
            "mirepro": own_pass(split, chosen),
            "mirepro, reading and decoding alone": own_pass(split, chosen, augment=False),
            "torchvision, the same squares": torchvision_pass(unpacked(Path(name) / "squares", split), chosen),
            "torchvision, original files": torchvision_pass(Path(name) / "original", chosen),
        }
        passes = harness.measure(contenders, options.repeats)
        results.add(f"{options.count} images", passes)
        step = harness.measure(parts(split, chosen), options.steps)
        results.add(f"step of {options.batch} images", step)
        facts = {"bytes": statistics.mean(path.stat().st_size for path in files)}
        facts |= {"pixels": statistics.mean(map(pixels, files)), "stored_bytes": statistics.mean(map(len, split.files))}
    spent = {name: statistics.median(times.processor) for name, times in (passes | step).items()}
    rates = {name: 1000 * options.count / spent[name] for name in passes}
    shares = {name: spent[name] / spent["step"] for name in step}
    results.finish(images_per_second=rates, share_of_step=shares, mean_of_originals=facts)


if __name__ == "__main__":
    main()
