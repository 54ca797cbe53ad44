"""What a run keeps of its data: the classes in their order, by which it is evaluated, exported and gone on with."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sklearn.datasets import load_digits

from probe_kd.cli import main
from probe_kd.data.record import DataRecord
from probe_kd.errors import DataError, RunError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.results.evaluation import evaluate
from probe_kd.results.export import export
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

RECIPE = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 16, 16]}}
data: {root: ROOT, test_split: test, input_size: [3, 32, 32], batch_size: 16, hflip: 0.0, on_error: skip, workers: 0}
stages:
  - epochs: 2
    keep: best
    losses: {task: {loss: cross_entropy}}
"""


def digits(root: Path) -> None:
    """Eight images of five classes for training, four and two for measuring; one file is empty."""
    from PIL import Image

    pixels, targets = load_digits(return_X_y=True)
    taken = dict.fromkeys(range(5), 0)
    for image, target in zip(pixels, targets.tolist(), strict=True):
        if taken.get(target, 99) < 14:
            split = "train" if taken[target] < 8 else "validation" if taken[target] < 12 else "test"
            folder = root / split / f"class{target}"
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((image.reshape(8, 8) * 15).astype("uint8"))
            picture.save(folder / f"{taken[target]}.png")
            taken[target] += 1
    (root / "train" / "class3" / "broken.png").write_bytes(b"")


def run(root: Path, folder: Path, **options: bool) -> None:
    display = Progress(Console(quiet=True), quiet=True)
    train(plan(parse(RECIPE.replace("ROOT", json.dumps(str(root))))), folder, display, **options)


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """(the images, the folder of a run on them)"""
    digits(tmp_path / "images")
    run(tmp_path / "images", tmp_path / "run")
    return tmp_path / "images", tmp_path / "run"


def test_a_quiet_run_tells_what_changes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, and nothing of it among the results; without `skip` an image that cannot be read names the key."""
    digits(tmp_path / "images")
    recipe = RECIPE.replace("ROOT", json.dumps(str(tmp_path / "images"))).replace("keep: best", "keep: last")
    teacher = "teacher: {model: resnet10t, model_kwargs: {channels: [8, 8, 16, 16]}, train: {epochs: 1}}\n"
    shutil.rmtree(tmp_path / "images" / "validation" / "class2")
    (tmp_path / "r.yaml").write_text(recipe + teacher)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["probe-kd", "train", "r.yaml", "--quiet"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    shown = capsys.readouterr()
    for says in (
        "note: 1 images of train_split cannot be read and are left out: 'class3/broken.png'",
        "note: val_split 'validation' has no images of 1 of the 5 classes: 'class2'",
        "note: no loss reads the teacher",
    ):
        assert shown.err.count(says) == 1
        assert says not in shown.out
    raising = ["r.yaml", "--set", "data.on_error=raise", "--set", "data.batch_size=41"]  # all images
    for command in (["check", *raising], ["train", *raising, "--out", "other"]):
        monkeypatch.setattr("sys.argv", ["probe-kd", *command])
        with pytest.raises(SystemExit):
            main()
        assert "broken.png cannot be read: it is empty; mend or delete it, or" in capsys.readouterr().err


def test_a_run_measures_two_splits_and_its_classes_are_kept(finished: tuple[Path, Path], tmp_path: Path) -> None:
    root, folder = finished
    summary: Any = json.loads((folder / "summary.json").read_text())
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (result,) = summary["results"]
    images = "curves are of val_split 'validation' (20 images), the final figures of test_split 'test' (10 images)"
    assert images in summary["measured_on"]
    assert summary["skipped_images"] == {"train_split": 1}
    assert all((float(row["accuracy"]) * 20).is_integer() and row["held_out_loss"] for row in rows)
    assert sum(result["images"]) == 10
    figures = {split: evaluate(folder, split=split, device="cpu") for split in ("test", "val")}  # type: ignore[arg-type]
    assert {split: found.images for split, found in figures.items()} == {"test": 10, "val": 20}
    assert figures["test"].scores[0].top1 == result["accuracy"]

    # A class leaves the data: the others keep their numbers. One comes: no model can know it.
    for split in ("train", "validation"):
        (root / split / "class0").rename(tmp_path / f"gone from {split}")
    assert evaluate(folder, device="cpu").scores[0].top1 == result["accuracy"]
    export(folder, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["label_names"][0] == "class0"
    (root / "test" / "class4").rename(root / "test" / "class9")
    with pytest.raises(RunError, match=r"has the class 'class9', which the run has not"):
        _evaluated(folder)
    assert DataRecord.read(folder) is not None
    (folder / "data.json").write_text((folder / "data.json").read_text().replace("class0", "classO"))
    with pytest.raises((DataError, RunError), match=r"data.json is damaged"):
        _evaluated(folder)


def _evaluated(folder: Path) -> None:
    try:
        evaluate(folder, device="cpu")
    except DataError:
        raise
    except Exception as refusal:  # a RecipeError has the place in the recipe too
        raise RunError(str(refusal)) from None


def test_data_that_have_moved_are_evaluated_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits(tmp_path / "images")
    with monkeypatch.context() as patched:
        patched.setattr("probe_kd.training.run.write_report", lambda *_: None)  # so that it is not finished
        patched.setattr("probe_kd.training.checkpoints.remove", lambda *_: None)
        run(tmp_path / "images", tmp_path / "run")
    before = evaluate(tmp_path / "run", device="cpu").scores
    (tmp_path / "images").rename(tmp_path / "new: place")
    assert evaluate(tmp_path / "run", device="cpu", root=tmp_path / "new: place").scores == before
    noise = export(tmp_path / "run", tmp_path / "by noise").images
    assert "random images" in noise
    assert "--root DIR" in noise
    done = export(tmp_path / "run", tmp_path / "by images", root=tmp_path / "new: place")
    assert done.images == "10 test images"
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        export(tmp_path / "run", tmp_path / "other", root=tmp_path / "nowhere")
    run(tmp_path / "new: place", tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the images, the folder of a run on them that has not ended)"""
    digits(tmp_path / "images")
    with monkeypatch.context() as patched:
        patched.setattr("probe_kd.training.run.write_report", lambda *_: None)
        patched.setattr("probe_kd.training.checkpoints.remove", lambda *_: None)
        run(tmp_path / "images", tmp_path / "run")
    return tmp_path / "images", tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda train: (train / "class1/2.png").unlink(), "'class1/2.png' is not there any more; it had 40 .*are 39 "),
        (lambda train: (train / "class1/2.png").rename(train / "class2/x.png"), "'class1/2.png' is not .*, 'class2/x."),
        (lambda train: (train / "class1/2.png").write_bytes(b""), r"'class1/2.png' has 0 bytes and had \d+"),
        (lambda train: shutil.copytree(train / "class1", train / "class9"), "now have a class 'class9'"),
        (lambda train: shutil.rmtree(train / "class4"), "have no class 'class4' any more"),
    ],
    ids=["gone", "moved", "broken", "new class", "no class"],
)
def test_a_run_does_not_go_on_with_other_images(begun: tuple[Path, Path], change: Any, says: str) -> None:
    root, folder = begun
    change(root / "train")
    for split in ("validation", "test"):
        if not (root / "train/class4").exists():
            shutil.rmtree(root / split / "class4")
    with pytest.raises(DataError, match=says):
        run(root, folder, resume=True)


def test_what_is_skipped_at_resume_is_named(begun: tuple[Path, Path]) -> None:
    """Another file that cannot be read now, as many as before: of a run from before, which kept no digests."""
    root, folder = begun
    known = DataRecord.read(folder)
    assert known is not None
    says = r"'class0/0.png' of train_split could be read then, and cannot be now; 'class3/broken.png' .* and can be now"
    with pytest.raises(DataError, match=says):
        replace(known, contents={}).refuse_others(
            replace(known, contents={}, skipped={"train_split": ("class0/0.png",)}), folder
        )
    (folder / "data.json").unlink()
    with pytest.raises(DataError, match=r"put it back from a copy of the run, or begin the run anew by --overwrite"):
        run(root, folder, resume=True)


def test_other_test_images_are_measured_and_told(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, folder = finished
    assert evaluate(folder, device="cpu").notes == ()
    shutil.copytree(root, tmp_path / "copied")
    (tmp_path / "copied/train/class1/2.png").unlink()
    assert evaluate(folder, device="cpu", root=tmp_path / "copied").notes == ()  # of these nothing was measured
    (tmp_path / "copied/test/class1/12.png").unlink()
    says = "these are not the images of the run (10 images then): of test_split 'test', 'class1/12.png' is not there"
    found = evaluate(folder, device="cpu", root=tmp_path / "copied")
    assert (found.images, [note.partition(" any")[0] for note in found.notes]) == (9, [says])
    exported = export(folder, tmp_path / "exported", root=tmp_path / "copied")
    assert exported.images.startswith("9 test images (not those of the run: of test_split 'test', 'class1/12.png' is")
    monkeypatch.setattr("sys.argv", ["probe-kd", "eval", str(folder), "--root", str(tmp_path / "copied")])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "9 images (test)" in shown
    assert f"note: {says}" in shown


@pytest.mark.parametrize("split", ["test", "held_out", "train"])
def test_images_that_may_have_been_trained_on_are_not_measured_as_held_out(
    tmp_path: Path, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The division follows from all training images; without digests, in a run of before, all is as it was."""
    digits(tmp_path / "images")
    text = RECIPE.replace("test_split: test", "val_split: none, holdout: 0.25").replace("epochs: 2", "epochs: 1")
    text = text.replace("ROOT", json.dumps(str(tmp_path / "images")))
    train(plan(parse(text)), tmp_path / "run", Progress(Console(quiet=True), quiet=True))
    before = evaluate(tmp_path / "run", split=split, device="cpu")
    shutil.copytree(tmp_path / "images", tmp_path / "copied")
    assert evaluate(tmp_path / "run", split=split, device="cpu", root=tmp_path / "copied") == before
    shutil.copy(tmp_path / "images/test/class0/13.png", tmp_path / "images/train/class0/new.png")
    with pytest.raises(DataError, match=r"of train_split 'train', 'class0/new.png' is new. Which images are held out"):
        evaluate(tmp_path / "run", split=split, device="cpu")
    known = DataRecord.read(tmp_path / "run")
    assert known is not None
    monkeypatch.setattr("probe_kd.results.evaluation.DataRecord.read", lambda _: replace(known, contents={}))
    assert evaluate(tmp_path / "run", split=split, device="cpu").notes == ()
