"""A cache that is filled without training, stopped, moved and read by other runs."""

import json
import os
import re
import shutil
import signal
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from conftest import NARROW, Command
from pages import blocks
from PIL import Image
from running import After, Quiet, same
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from probe_kd.data.cache_keys import DEPENDS_ON, fingerprint
from probe_kd.data.loading import DataOptions, open_datasets, seed_of_view
from probe_kd.errors import Stopped
from probe_kd.methods.teachers import FrozenTeacher
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import parse
from probe_kd.training.filling import fill_caches
from probe_kd.training.run import train

COUNT, BATCH = 359, 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=10, channels=[8, 16, 24, 32]).state_dict(), path)
    return path


def recipe(weights: Path, cache: Path, *, more: str = "") -> Plan:
    """A hint in one epoch, which shows view 0, and a task in two, which show views 1 and 0."""
    text = NARROW.replace("  train: {epochs: 1}", f"  checkpoint: {weights}\n  cache: {cache}")
    text = text.replace("hflip: 0.0", f"hflip: 0.0\n  views: 2{more}").replace("baseline: true\n", "")
    return plan(parse(text))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches of which the teacher was asked; fewer images only measure shapes, or compare."""
    sizes = list[int]()
    features = FrozenTeacher.features

    def counted(self: FrozenTeacher, images: torch.Tensor, cached: Any = None) -> Any:
        sizes.extend([len(images)] * (cached is None and len(images) > 8))
        return features(self, images, cached)

    monkeypatch.setattr(FrozenTeacher, "features", counted)
    monkeypatch.setattr("probe_kd.training.run.check_student", lambda *_: None)  # its batch is no training step
    return sizes


def test_a_filled_cache_is_moved_and_a_run_reads_it_to_the_same_bits(
    weights: Path, tmp_path: Path, asked: list[int]
) -> None:
    """It is stopped on its way. What was done is not asked again, and no step of the run asks the teacher."""
    filled = recipe(weights, tmp_path / "filled")
    with pytest.raises(Stopped, match="SIGTERM"):
        fill_caches(filled, After(lambda: os.kill(os.getpid(), signal.SIGTERM), updates=4))
    assert 0 < len(asked) < 6
    shown = Quiet()
    fill_caches(filled, shown)
    assert asked == [BATCH] * (6 * 3)  # of each of view 0 twice, for two stages, and view 1
    assert any("  in all " in line for line in shown.said)
    fill_caches(filled, Quiet())
    assert len(asked) == 6 * 3, "all is there"

    shutil.move(tmp_path / "filled", tmp_path / "elsewhere" / "moved")
    asked.clear()
    said = Quiet()
    train(recipe(weights, tmp_path / "elsewhere" / "moved"), tmp_path / "run", said)
    assert not asked
    assert all(": 0 images asked" in line for line in said.said if "images asked" in line)
    asked.clear()
    train(recipe(weights, tmp_path / "own"), tmp_path / "other", Quiet())
    assert asked
    same(tmp_path / "run", tmp_path / "other")


@pytest.fixture(scope="module")
def filled(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    fill_caches(recipe(weights, folder), Quiet(), views=1)
    (key,) = folder.iterdir()
    return key


def test_any_tool_reads_a_file_as_the_docs_say(filled: Path) -> None:
    ((_, text),) = blocks("py")
    names: dict[str, Any] = {}
    exec(text.replace("teacher-cache/3f8a...", str(filled)), names)
    assert names["rows"].shape == (COUNT, 24, 1, 1)
    assert (
        names["about"].items()
        >= {"tap": "layer3", "view": "0", "key": filled.name, "rows_present": f"{COUNT:012d}"}.items()
    )
    assert int(names["about"]["view_seed"]) == seed_of_view(0, 0)
    assert names["about"]["teacher"] == json.loads((filled / DEPENDS_ON).read_text())["teacher"]
    assert sorted(path.name for path in filled.glob("*/*")) == ["000000.safetensors"] * 3


def test_a_cache_made_with_other_versions_or_elsewhere_is_told_and_one_for_another_student_is_read(
    weights: Path, filled: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled, cache / filled.name)
    said = Quiet()
    fill_caches(recipe(weights, cache, more="\n  mean: [0.1, 0.2, 0.3]"), said, views=1)
    assert "0 images asked" in said.said[-1]
    assert any("what the teacher gives here but for rounding" in line for line in said.said)
    depends = json.loads((filled / DEPENDS_ON).read_text())
    depends["versions"]["timm"], depends["device"] = "0.9", "cuda"
    (cache / filled.name).rename(cache / "other")
    (cache / "other" / DEPENDS_ON).write_text(json.dumps(depends))
    said = Quiet()
    fill_caches(recipe(weights, cache), said, views=1)
    (told,) = [line for line in said.said if "holds a cache of this teacher" in line]
    assert f"made with device cuda (here cpu), timm 0.9 (here {version('timm')}): it is not used" in told


def test_images_that_may_have_been_edited_are_told(weights: Path, tmp_path: Path) -> None:
    """One of 130 images of one size, which is neither among those whose pixels are in the key nor compared."""
    for number in range(130):
        file = tmp_path / "images" / "train" / str(number % 2) / f"{number:03d}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), number).save(file)
    images = f"root: {tmp_path / 'images'}\n  no_aug: true\n  val_split: none\n  holdout: 0.2\n  num_classes: 10"
    text = NARROW.replace("  train: {epochs: 1}", f"  checkpoint: {weights}\n  cache: {tmp_path / 'cache'}")
    text = text.replace("dataset: sklearn/digits", images).replace("  fraction: 0.25\n", "")
    text = text.replace("baseline: true\n", "").partition("  - name: task")[0]
    for edited in (False, False, True):
        said = Quiet()
        if edited:
            Image.new("L", (16, 16), 255).save(file)
            os.utime(file, (10**9, 10**9))
        fill_caches(plan(parse(text)), said)
        told = [line for line in said.said if "have other times than when the cache" in line]
        assert len(told) == edited
    assert "0 images asked" in said.said[-1]
    assert "delete that folder, unless they are a copy" in told[0]


def test_images_in_another_place_have_the_same_key(tmp_path: Path) -> None:
    images = load_digits().images
    for number in range(20):
        file = tmp_path / "here" / "train" / str(number % 2) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number].astype("uint8") * 15).save(file)
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "deeper", copy_function=shutil.copyfile)
    prints = set()
    for root in (tmp_path / "here", tmp_path / "there" / "deeper"):
        options = DataOptions(root=str(root), input_size=(3, 8, 8), val_split="none", holdout=0.1)
        prints.add(fingerprint(open_datasets(options).train).images)
    assert len(prints) == 1
    (tmp_path / "here" / "train" / "0" / "0.png").rename(tmp_path / "here" / "train" / "0" / "x.png")
    options = DataOptions(root=str(tmp_path / "here"), input_size=(3, 8, 8), val_split="none", holdout=0.1)
    assert fingerprint(open_datasets(options).train).images not in prints


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (("  cache: C\n", ""), [], "no teacher of the recipe has a `cache`"),
        (("checkpoint: W", "train: {epochs: 1}"), [], r"still to be trained .* --set teacher.train=null"),
        (("  views: 2\n", ""), [], "set `data: {views: 4}`"),
        (("", ""), ["--views", "3"], "the recipe shows 2 of each image"),
        (("", ""), ["DISK"], r"needs .*B more, and the disk of .* has 10 B free"),
    ],
)
def test_what_cannot_be_filled_is_refused_with_what_to_do(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    weights: Path,
    tmp_path: Path,
    change: tuple[str, str],
    options: list[str],
    message: str,
) -> None:
    text = NARROW.replace("  train: {epochs: 1}", "  checkpoint: W\n  cache: C").replace(
        "hflip: 0.0\n", "hflip: 0.0\n  views: 2\n"
    )
    (tmp_path / "r.yaml").write_text(text.replace(*change).replace("W", str(weights)))
    if "DISK" in options:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
        options = []
    result = command("cache", "r.yaml", *options)
    assert result.returncode == 2
    assert re.search(message, result.stderr), result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
