"""The studies of forgetting: their tables, and tiny runs of vision."""

import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import forgetting
from benchmarks.forgetting import folders, readouts, vision
from benchmarks.forgetting.pages import publish
from flowdata.drift import inverted_images
from flowdata.study import HeadTask, Sizes
from flowdata.study import runs as study
from tests.pretend import pretend

# --- tables ----------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    pretend(tmp_path / "forgetting_pretend.jsonl")
    return tmp_path


def test_a_page_and_a_picture_are_written_beside_the_results(results):
    forgetting.main(["table", "--results", str(results)])
    assert (results / "forgetting_pretend.png").read_bytes()[:4] == b"\x89PNG"
    page = (results / "forgetting_pretend.md").read_text()
    assert "# Forgetting: vision, pretend" in page
    assert "| FLOW + l2 |" in page
    forgetting.main(["table", "--results", str(results)])
    assert (results / "forgetting_pretend.md").read_text() == page


def test_a_further_study_of_a_results_file_is_named_by_its_options(results):
    pretend(results / "forgetting_short.jsonl", names=("FLOW",), options={"target": "short"})
    further = {"target": "short", "images": 20}
    pretend(results / "forgetting_short.jsonl", names=("FLOW",), seeds=[0], options=further)
    names = {each.stem: each.name() for each in publish.read_studies(results)}
    assert names["forgetting_short"] == "short"
    assert names["forgetting_short_2"] == "short, images 20"


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(SystemExit, match="holds no runs"):
        forgetting.main(["table", "--results", str(tmp_path)])


@pytest.mark.parametrize("folder", ["drift", "evidence"])
def test_every_study_of_the_results_is_on_a_page(folder):
    for each in publish.read_studies(forgetting.RESULTS / folder):
        pages = [stem for stem, (can_tell, _) in publish.PAGES.items() if can_tell(each.records)]
        assert pages, each.stem
        for stem in pages:
            assert (forgetting.RESULTS / folder / f"{stem}.md").is_file(), each.stem


def test_unknown_methods_and_missing_assets_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no method 'magic'; there are standard"):
        forgetting.main(["vision", "--quick", "--methods", "magic"])
    with pytest.raises(SystemExit, match=r"holds no cifar10_resnet20\.safetensors"):
        forgetting.main(["vision", "--assets", str(tmp_path), "--results", str(tmp_path)])


# --- vision ----------------------------------------------------------------------------------

TINY = Sizes(images=160, epochs=1, batch=32, validation=60, test=200)
needs_assets = pytest.mark.skipif(not vision.ASSETS.is_dir(), reason="needs the shared assets")


@pytest.fixture(scope="module")
def digits():
    """The task without further readouts, which take longer than a tiny run."""
    return vision.task(vision.ASSETS, "digits", TINY, measures=lambda *_: lambda outcome: {})


@needs_assets
@pytest.mark.slow
def test_flow_forgets_less_than_standard_fine_tuning_and_the_probe_nothing(monkeypatch):
    quick = functools.partial(inverted_images, steps=2)  # the hundred of a study take a minute
    monkeypatch.setattr(readouts, "inverted_images", quick)
    digits = vision.task(vision.ASSETS, "digits", replace(TINY, images=320, epochs=2, test=300))
    runs = {name: digits.run(name, 0.003, 0) for name in ("linear probe", "standard", "FLOW")}
    kept = {name: run["retained"]["CIFAR-10 accuracy"] for name, run in runs.items()}
    learned = {name: run["target"]["accuracy"] for name, run in runs.items()}
    assert kept["linear probe"] > 75
    assert kept["standard"] < kept["FLOW"] - 5 < kept["linear probe"]
    assert learned["FLOW"] > 80
    assert digits.run("FLOW", 0.003, 0)["target"] == runs["FLOW"]["target"]  # the seed decides


def one_of_each_kind(names):
    """The first of those names that differ in a number alone."""
    return list({re.sub(r"\b[0-9.]+", "#", name): name for name in reversed(names)}.values())


@needs_assets
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", one_of_each_kind([n for n in {**vision.MAIN, **vision.EXTRA} if n != "standard"])
)
def test_every_method_has_a_working_row(digits, name):
    record = digits.run(name, 0.003, 1)
    assert record["target"]["accuracy"] > 50
    assert record["retained"]["CIFAR-10 accuracy"] > 15


@needs_assets
@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_like_any_other(digits):
    record = digits.run("standard", 1e4, 1)
    assert not record["target"]["accuracy"] >= 50
    assert math.isnan(record["retained"]["CIFAR-10 accuracy"])  # its logits are no numbers


def labels_of(part):
    return torch.stack([label for _, label in part])


@needs_assets
def test_noise_shuffles_a_third_of_the_training_labels_and_no_others():
    clean, noisy = (
        vision.task(vision.ASSETS, target, TINY).split(3) for target in ("digits", "noisy_digits")
    )
    shuffled = labels_of(noisy.train) != labels_of(clean.train)
    assert shuffled[::3].float().mean() > 0.7
    assert not shuffled[1::3].any()
    assert not shuffled[2::3].any()
    assert torch.equal(labels_of(noisy.scored), labels_of(noisy.train))
    assert torch.equal(labels_of(noisy.train).bincount(), labels_of(clean.train).bincount())
    assert torch.equal(labels_of(noisy.validation), labels_of(clean.validation))
    assert torch.equal(labels_of(noisy.test), labels_of(clean.test))


@needs_assets
@pytest.mark.slow
def test_the_command_runs_a_set_given_by_path_and_writes_its_table(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    images = rng.integers(0, 100, (200, 20, 20)) + 100 * labels[:, None, None]
    np.savez(tmp_path / "own.npz", images=images.astype(np.uint8), labels=labels)
    command = ["vision", "--quick", "--targets", f"shades={tmp_path / 'own.npz'}"]
    command += ["--methods", "standard", "FLOW", "--results", str(tmp_path)]
    forgetting.main(command)
    assert "forgetting_shades.md" in capsys.readouterr().out
    records = study.read_records(tmp_path / "forgetting_shades.jsonl")
    assert [(r["method"], r["seed"]) for r in records] == [
        (name, seed) for seed in (0, 1) for name in ("standard", "FLOW")
    ]
    assert all(record["target"]["accuracy"] > 90 for record in records)
    forgetting.main(command)
    assert study.read_records(tmp_path / "forgetting_shades.jsonl") == records


# --- on a user's own model and data ----------------------------------------------------------


def test_the_study_runs_on_a_model_of_ones_own_in_one_script(tmp_path, capsys):
    from examples import measure_forgetting

    assert len(Path(measure_forgetting.__file__).read_text().splitlines()) < 100
    given = ["--methods", "standard", "FLOW", "FLOW, sampler", "--rates", "0.1", "--seeds", "2"]
    given += ["--epochs", "5", "--output", str(tmp_path / "mine")]
    page = measure_forgetting.main(given)
    assert page in capsys.readouterr().out
    records = study.read_records(tmp_path / "mine.jsonl")
    kept = {(r["method"], r["seed"]): r["retained"]["old accuracy"] for r in records}
    assert len(kept) == 6
    assert all(kept["FLOW", seed] > kept["standard", seed] + 2 for seed in (0, 1))
    assert (tmp_path / "mine.png").read_bytes()[:4] == b"\x89PNG"
    assert "| FLOW | standard |" in (tmp_path / "mine.md").read_text()
    assert "| blind |" in page
    assert "| by drift, new task |" in page


# --- the paper's image folders ---------------------------------------------------------------


class TinyBody(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


def shades(folder, classes, images):
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(0, 60, (30, 40, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}/{number}.png")


def test_image_folders_are_learned_by_one_command(tmp_path):
    for part in ("train", "test"):
        shades(tmp_path / "new" / part, 3, 20)
    shades(tmp_path / "old", 2, 5)
    command = ["--imagenet", str(tmp_path / "old"), "--targets", f"shades={tmp_path / 'new'}"]
    command += ["--methods", "standard", "FLOW", "FLOW, sampler", "LoRA", "--rates", "0.01"]
    command += ["--seeds", "1", "--epochs", "2", "--batch", "16", "--pixels", "24"]
    command += ["--workers", "0", "--results", str(tmp_path)]
    network = nn.Sequential(TinyBody(), nn.Linear(8, 2))
    records = folders.main(command, network)
    assert [record["method"] for record in records] == ["standard", "FLOW", "FLOW, sampler", "LoRA"]
    assert all(record["target"]["accuracy"] > 80 for record in records)
    assert (tmp_path / "forgetting_resnet18_shades.jsonl").exists()


def test_images_are_cut_from_the_middle_or_at_random(tmp_path):
    shades(tmp_path, 1, 1)
    plain, augmented = (folders.Images(tmp_path, 16, augment=flag) for flag in (False, True))
    assert plain[0][0].shape == (3, 16, 16)
    assert torch.equal(plain[0][0], plain[0][0])
    assert len({augmented[0][0].sum().item() for _ in range(8)}) > 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no images: give it one folder for each class"):
        folders.Images(tmp_path / "empty", 16)


def test_an_old_head_that_is_no_linear_layer_is_refused():
    network = nn.Sequential(TinyBody(), nn.ReLU())
    with pytest.raises(TypeError, match=r"old must end in an nn\.Linear, got ReLU"):
        HeadTask(network, [], "old", 3, None, Sizes())
