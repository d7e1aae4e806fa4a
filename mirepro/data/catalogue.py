"""The data sets that a person has to fetch: where from, under which terms, and how they are imported."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mirepro.data import NAMES, shards
from mirepro.errors import UserError

Counts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        title: Its name.
        source: Where a person gets it.
        files: What to fetch there.
        terms: Licence or terms of use, as the source states them.
        gigabytes: Size of the import's result, about.
    """

    title: str
    source: str
    files: str
    terms: str
    gigabytes: float


ENTRIES = {
    "cifar10": Entry("CIFAR-10", "https://www.cs.toronto.edu/~kriz/cifar.html", "cifar-10-python.tar.gz",
                     "no licence stated; cite the technical report", 0.3),
    "cifar100": Entry("CIFAR-100", "https://www.cs.toronto.edu/~kriz/cifar.html", "cifar-100-python.tar.gz",
                      "no licence stated; cite the technical report", 0.3),
    "stl10": Entry("STL-10", "https://cs.stanford.edu/~acoates/stl10/", "stl10_binary.tar.gz",
                   "no licence stated; its images come from ImageNet, whose terms hold", 3.3),
    "imagenet": Entry("ImageNet (ILSVRC 2012)", "https://image-net.org/download-images.php, after registration",
                      "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz",
                      "ImageNet's terms of access: non-commercial research and education; not to be passed on", 55),
    "coco": Entry("COCO 2017", "https://cocodataset.org/#download",
                  "train2017.zip, val2017.zip, annotations_trainval2017.zip, unpacked into one folder",
                  "annotations CC BY 4.0; images under Flickr's terms of use", 20),
    "coco_mini": Entry("159 images of COCO 2017", "https://github.com/Obmutescence/COCO-MINI",
                       "the folders annotations, train2017, val2017",
                       "annotations CC BY 4.0; images under Flickr's terms of use, some non-commercial", 0.03),
    "voc": Entry("PASCAL VOC 07+12", "http://host.robots.ox.ac.uk/pascal/VOC/",
                 "VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar, VOCtrainval_11-May-2012.tar, unpacked",
                 "images under Flickr's terms of use", 2.8),
    "lvis": Entry("LVIS v1", "https://www.lvisdataset.org/dataset",
                  "lvis_v1_train.json, lvis_v1_val.json beside COCO's train2017/ and val2017/",
                  "annotations CC BY 4.0; images as COCO's", 20),
}  # fmt: skip


def load(kind: str, path: Path, folder: Path, side: int | None, jobs: int) -> Counts:
    """Imports a data set.

    Args:
        kind: A key of `ENTRIES`.
        path: What the person fetched.
        folder: The data set's folder.
        side: Side of the stored squares (ImageNet only); None: the reader's own.
        jobs: Processes (ImageNet only).

    Raises:
        UserError: Unknown kind, an option it does not have, and whatever its reader refuses.
    """
    if kind not in ENTRIES:
        raise UserError(f"data import: {kind!r} is unknown; known: {', '.join(ENTRIES)}")
    from mirepro.data import cifar, cifar100, coco, imagenet, lvis, stl10, voc

    if kind == "imagenet":
        return imagenet.import_imagenet(path, folder, imagenet.SIDE if side is None else side, jobs)
    if side is not None:
        raise UserError(f"data import {kind}: --side is for imagenet; other images keep their bytes")
    readers: dict[str, Callable[[Path, Path], Counts]] = {
        "cifar10": cifar.import_cifar10, "cifar100": cifar100.import_cifar100, "stl10": stl10.import_stl10,
        "coco": coco.import_coco, "coco_mini": coco.import_mini, "voc": voc.import_voc, "lvis": lvis.import_lvis,
    }  # fmt: skip
    return readers[kind](path, folder)


def states(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """For each data set: "intact", or what is missing and how a person gets it.

    Args:
        folder: The folder of all data sets.
        names: Which ones.

    Raises:
        UserError: A data set that is there is damaged, or a name is unknown.
    """
    return {name: _state(folder / name, name) for name in names}


def _state(folder: Path, name: str) -> str:
    present = (folder / "manifest.json").is_file()
    if name in NAMES and not any((folder / "shards").glob("*.tar")):
        return "rendered on first use"
    if present and any((folder / "shards").glob("*.tar")):
        shards.verify(folder)
        return "intact"
    if name not in ENTRIES:
        raise UserError(f"data {name!r}: no {folder}/manifest.json; known: {', '.join([*NAMES, *ENTRIES])}")
    entry = ENTRIES[name]
    lack = "its shards are missing" if present else "missing"
    return (f"{lack}; {entry.title}: get {entry.files} from {entry.source}; terms: {entry.terms}; then "
            f"`mirepro data import {name} PATH` ({entry.gigabytes:g} GB)")  # fmt: skip


def missing(state: str) -> bool:
    """Whether a state of `states` says that a person has to fetch something."""
    return "data import" in state
