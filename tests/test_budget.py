"""`mirepro plan`: counted work, rates that are missing, and predictions that follow the work."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mirepro import files, profiles
from mirepro.errors import UserError
from mirepro.launch import budget, detection_work, work
from mirepro.launch.work import Work

RATES = {"encoder": 1e9, "scan": 2e9, "assign": 4e9, "solve": None, "start": {"pretrain": 1.0}}


@pytest.fixture(scope="module")
def paper(root: Path) -> profiles.Profile:
    """The full-scale profile."""
    return profiles.load(root, "imagenet")


def test_resnet18_has_the_known_cost(paper: profiles.Profile) -> None:
    macs, weights, flat, pooled = work.encoder(paper.run("ir-s0"))
    assert macs == pytest.approx(1.814e9, rel=0.01)  # torchvision's ResNet-18 without its classifier
    assert weights == 11_176_512 + 513 * 128
    assert (flat, pooled) == (25_088, 512)


def test_work_grows_as_it_must(paper: profiles.Profile) -> None:
    sizes = work.data(paper.root, "imagenet")
    names = ("ir", "ring", "la", "cmc", "random", "moco", "moco_ring", "simclr")
    works = {name: work.pretraining(paper.run(f"{name}-s0"), sizes) for name in names}
    assert works["ir"].scan == works["random"].scan == 0
    assert works["ring"].scan == pytest.approx(200 * sizes.train**2 * 128, rel=1e-3)
    assert works["la"].scan == works["ring"].scan
    assert works["la"].assign == pytest.approx(199 * 10 * 6 * sizes.train * 30_000 * 128)
    assert works["ring"].assign == 0
    assert works["ir"].encoder > 590 * works["random"].encoder
    assert works["ir"].memory < 0.03 * 3 * 256**2 * sizes.train  # images that do not fit are read batch by batch
    small = replace(sizes, train=5000)
    assert work.pretraining(paper.run("ir-s0"), small).memory > 3 * 256**2 * small.train  # those that fit are kept
    assert works["moco"].encoder == pytest.approx(4 / 3 * works["ir"].encoder, rel=0.01)
    assert works["simclr"].encoder == pytest.approx(2 * works["ir"].encoder, rel=0.01)
    assert works["moco_ring"].scan == pytest.approx(200 * sizes.train * 65536 * 128, rel=1e-3)
    longer = replace(paper.run("ir-s0"), pretrain=replace(paper.run("ir-s0").pretrain, epochs=400))
    assert work.pretraining(longer, sizes).encoder == pytest.approx(2 * works["ir"].encoder, rel=0.01)


def test_work_counts_the_images_that_a_row_learns_from(root: Path) -> None:
    stl10 = profiles.load(root, "stl10")
    works = budget.works(stl10)
    free, seen = works["pretrain@ir-s0"], works["pretrain@supervised-s0"]
    assert free.encoder == pytest.approx(100_000 / 4500 * seen.encoder, rel=0.05)
    assert works["evaluate@ir-s0"].encoder == works["evaluate@supervised-s0"].encoder  # control: both from train


def test_a_split_that_is_not_there_is_one_line(root: Path) -> None:
    for name in ("desk", "cifar10"):  # with a manifest and, in a folder without data, without one
        with pytest.raises(UserError, match=rf"pretrain\.split: {name} has no split unlabelled"):
            work.data(root if name == "desk" else root / "nowhere", name, "unlabelled")
    assert work.data(root / "nowhere", "stl10", "unlabelled").train == 100_000  # control


def test_a_missing_rate_gives_no_number() -> None:
    assert budget.seconds(Work(3e9, 4e9, 2e9, 0, 0, 0), RATES, "pretrain") == 1 + 3 + 2 + 0.5
    assert budget.seconds(Work(3e9, 4e9, 0, 1.0, 0, 0), RATES, "pretrain") is None


def test_the_plan_names_every_row_and_says_what_it_leaves_out(paper: profiles.Profile) -> None:
    text = "\n".join(budget.lines(paper))
    for row in paper.rows:
        assert f"pretrain@{row} " in text
    assert "not measured" in text
    for name in ("detect@ir-mask ", "detect@cmc-keypoint ", "detect@random-voc ", "detect@ring-lvis "):
        assert name in text, name
    assert text.endswith("not predicted: controls, toy, the longer epochs of lvis (repeat-factor sampling)")


def test_a_given_rate_of_a_gpu_gives_its_hours_and_says_that_it_was_given(paper: profiles.Profile) -> None:
    shown = budget.lines(paper, 4e12)
    one = budget.works(paper)["pretrain@ir-s0"]
    macs = sum(getattr(one, part) for part in budget.PARTS)
    cells = next(line.split() for line in shown if line.startswith("pretrain@ir "))
    assert float(cells[3]) == pytest.approx(macs / 4e12 / 3600, rel=0.01)
    assert any("4e+12 multiply-adds a second throughout (given, not measured)" in line for line in shown)
    assert not any("not measured " in line for line in shown)  # control: a column of the other test
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(UserError, match="--gpu-rate"):
            budget.lines(paper, wrong)


def test_the_plan_sums_up_the_runs_of_every_table(root: Path) -> None:
    profile = profiles.load(root, "desk")
    shown = {line.split()[0]: line.split() for line in budget.lines(profile) if line.startswith("T")}
    assert shown.keys() == {name for name, table in profile.values["tables"].items() if table.get("rows")}
    runs = {run for row in profile.values["tables"]["T1"]["rows"].values() for run in row or []}
    assert int(shown["T1"][1]) == len(runs)
    rates = files.read_json(root / budget.RATES)["machines"]["CPU"]
    works = {name: one for name, one in budget.works(profile).items() if name.partition("@")[2] in runs}
    hours = sum(budget.seconds(one, rates, name.partition("@")[0]) or 0 for name, one in works.items()) / 3600
    assert float(shown["T1"][2]) == pytest.approx(hours, rel=0.01)
    assert float(shown["T2"][2]) < hours  # control


def test_detection_counts_the_parts_of_the_detector(paper: profiles.Profile) -> None:
    sizes, run, recipe = detection_work.SIZES["coco"], paper.run("ir-s0"), paper.recipe("coco")
    each = detection_work.cost(run.pretrain.encoder, ("rgb",), "box", recipe, sizes)
    macs = work.encoder(run)[0] - 512 * 128  # without the layer that embeds
    assert each.trunk == pytest.approx((512 / 224) ** 2 * macs, rel=0.01)
    heads = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * 5 * 81
    fewer = detection_work.cost(
        run.pretrain.encoder, ("rgb",), "box", replace(recipe, proposals=0, roi_samples=0), sizes
    )
    assert each.learnt - fewer.learnt == recipe.roi_samples * heads
    assert each.tested - fewer.tested == recipe.proposals * heads
    mask = detection_work.cost(run.pretrain.encoder, ("rgb",), "mask", recipe, sizes)
    assert mask.learnt > each.learnt


def test_detection_grows_with_epochs_rates_and_images(paper: profiles.Profile) -> None:
    sizes, run, recipe = detection_work.SIZES["voc"], paper.run("ir-s0"), paper.recipe("voc")

    def detector(**change: object) -> float:
        return detection_work.detection(run, "box", replace(recipe, **change), sizes).detector

    assert detector(epochs=2 * recipe.epochs) == pytest.approx(2 * detector(), rel=0.1)
    assert detector(lrs=(*recipe.lrs, 1.0)) > 1.1 * detector()
    assert detector(keypoint_epochs=100) == detector()  # control: that is another model's


def test_the_committed_check_is_close(root: Path) -> None:
    check = files.read_json(root / budget.RATES)["check"]
    for kind, facts in check.items():
        assert facts["runs"] >= (10 if kind == "detect" else 40)
        assert 0.75 < facts["median"] < 1.33


def test_memory_is_that_of_measured_runs(root: Path) -> None:
    """Peaks of single runs (ring-s0): 804 MB pretraining, 942 MB evaluation, with the libraries."""
    profile = profiles.load(root, "desk")
    works, libraries = budget.works(profile), files.read_json(root / budget.RATES)["libraries_gb"]
    for name, peak in (("pretrain@ring-s0", 0.804), ("evaluate@ring-s0", 0.942)):
        assert 0.7 < (works[name].memory / 1e9 + libraries) / peak < 1.4, works[name].memory


def test_disk_is_that_of_the_recorded_outputs(root: Path) -> None:
    """Every pretraining and evaluation of the desk profile against the sizes in dvc.lock."""
    lock = yaml.load((root / "dvc.lock").read_text(), yaml.CSafeLoader)["stages"]
    ratios = {}
    for name, one in budget.works(profiles.load(root, "desk")).items():
        if name.startswith("detect@"):
            continue
        ratios[name] = one.disk / sum(out["size"] for out in lock[name]["outs"] if out["path"].startswith("runs/"))
    assert len(ratios) == 130
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios
    evaluations = [ratio for name, ratio in ratios.items() if name.startswith("evaluate@")]
    assert not any(0.85 < 8 * ratio < 1.15 for ratio in evaluations)  # control: a byte an answer instead of a bit


def test_the_page_about_clusters_has_the_numbers_of_the_plan(paper: profiles.Profile) -> None:
    """Two digits of them; control: another rate."""

    def counted(rate: float) -> dict[str, list[float]]:
        cells = (line.replace(",", "").split() for line in budget.lines(paper, rate))
        found = {row[0]: [float(cell) for cell in row[1:]] for row in cells if row and re.fullmatch(r"T\d+", row[0])}
        return {name: [runs, *(float(f"{v:.2g}") for v in rest)] for name, (runs, *rest) in found.items()}

    def number(cell: str) -> float:
        digits = re.match(r"[\d.]+", cell.replace(",", ""))
        assert digits is not None
        return float(digits[0]) * (1e6 if "million" in cell else 1)

    plan, other, said = counted(4e12), counted(8e12), {}
    for line in (paper.root / "docs" / "slurm.md").read_text(encoding="utf-8").splitlines():
        label, *cells = line.strip("| ").split(" | ")
        if re.match(r"T\d+[ ,]", label):
            runs, gpu, core, disk = map(number, cells)
            said |= {name: pytest.approx([runs, core, gpu, disk]) for name in re.findall(r"T\d+", label)}
    assert said == plan
    assert said != other

    whole = "\n".join(budget.lines(paper, 4e12))
    page = (paper.root / "docs" / "slurm.md").read_text(encoding="utf-8")
    total = re.search(r"\((\S+) GPU hours and (\d+) GB in all\)", page)
    assert total is not None
    assert f"a GPU at 4e+12 multiply-adds a second throughout (given, not measured): {number(total[1]):.3g} h" in whole
    assert f"disk of the outputs: {total[2]} GB" in whole
