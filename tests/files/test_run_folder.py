"""The folder of a run: one writer, nothing deleted that no run wrote, everything that is read again known by digest."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from running import After, Quiet, flip, planned, run, stop, truncate
from safetensors.torch import load_file, save_file

from probe_kd import cli
from probe_kd.errors import RecipeError, RunError, TraceError, WeightsError
from probe_kd.files.run_folder import LOCK, Manifest, claim, is_abandoned, record
from probe_kd.results.comparison import compare, measure_layers
from probe_kd.results.evaluation import evaluate
from probe_kd.results.export import export
from probe_kd.training.folder import check_folder
from probe_kd.training.progress import Progress

ALONE = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 8]}}
data: {dataset: sklearn/digits, input_size: [3, 8, 8], batch_size: 512, hflip: 0.0, fraction: 0.2}
stages: [{epochs: 1, losses: {task: {loss: cross_entropy}}}]
"""
TAUGHT = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 8]}}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 8, 16, 16]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 8, 8], batch_size: 512, hflip: 0.0, fraction: 0.2}
stages: [{epochs: 2, losses: {soft: {loss: soft_targets}}}]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(ALONE, folder)
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its teacher, in the student."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(KeyboardInterrupt):
        run(TAUGHT, folder, After(stop, epochs=2))
    assert (folder / "teacher.safetensors").is_file()
    return folder


def other_values(file: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


def as_before_manifests(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("damage", [flip, truncate, other_values, Path.unlink])
def test_a_damaged_teacher_is_not_gone_on_with(half: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    shutil.copytree(half, tmp_path / "run")
    damage(tmp_path / "run" / "teacher.safetensors")
    with pytest.raises((RunError, WeightsError), match=r"teacher.safetensors is (damaged, or was repl|gone).*--over"):
        run(TAUGHT, tmp_path / "run", resume=True)
    (tmp_path / "run" / "teacher.safetensors").unlink(missing_ok=True)
    check_folder(tmp_path / "run", resume=False, overwrite=True)  # the mend that the message names


def test_a_run_is_not_resumed_with_another_file_under_the_name_that_the_recipe_gives(tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = timm.create_model("resnet10t", num_classes=10, channels=[8, 8, 16, 16]).state_dict()
    save_file(weights, tmp_path / "teacher.safetensors")
    text = TAUGHT.replace("train: {epochs: 1}", f"checkpoint: {tmp_path / 'teacher.safetensors'}")
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "run", After(stop, epochs=1))
    other_values(tmp_path / "teacher.safetensors")
    with pytest.raises(RunError, match=r"teacher.safetensors is not the file that .*run was begun with"):
        run(text, tmp_path / "run", resume=True)
    save_file(weights, tmp_path / "teacher.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "run", After(stop, epochs=1), resume=True)


def test_a_run_is_measured_with_the_files_that_it_was_trained_with_and_no_others(tmp_path: Path) -> None:
    """A folder of timm's and a file of classes; the student's own weights, which the run has replaced, may go."""
    torch.manual_seed(1)
    folder, classes, began = tmp_path / "teacher", tmp_path / "classes.json", tmp_path / "began.safetensors"
    timm.models.save_for_hf(
        timm.create_model("resnet10t", num_classes=12, channels=[8, 8, 16, 16]), folder, safe_serialization=True
    )
    save_file(timm.create_model("resnet10t", num_classes=10, channels=[8, 8, 8, 8]).state_dict(), began)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = {"channels": [8, 8, 16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    classes.write_text(json.dumps([*range(2, 12)]))
    text = TAUGHT.replace("epochs: 2", "epochs: 1").replace("8, 8]}}\nt", f"8, 8]}}, checkpoint: {began}}}\nt")
    teacher = f"{{model: 'local-dir:{folder}', pretrained: true, class_map: {classes}}}"
    text = "\n".join(f"teacher: {teacher}" if line.startswith("teacher") else line for line in text.splitlines())
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "half", After(stop, epochs=1))
    run(text, tmp_path / "run")
    plan, began_with = planned(text), began.read_bytes()
    began.unlink()
    assert evaluate(tmp_path / "run").scores[-1].role == "teacher"
    began.write_bytes(began_with)
    for file, change in (
        (folder / "model.safetensors", other_values),
        (folder / "config.json", edit),
        (classes, lambda file: file.write_text(json.dumps([*range(10)]))),
        (tmp_path / "run" / "recipe.yaml", edit),
        (tmp_path / "run" / "data.json", edit),
    ):
        kept = file.read_bytes()
        change(file)
        says = rf"{file} (is not the file that .*run was begun with: its contents|is damaged, or was changed)"
        for read in (lambda: evaluate(tmp_path / "run"), lambda: measure_layers(plan, tmp_path / "run")):
            with pytest.raises((RunError, RecipeError, TraceError), match=says):
                read()
        if file.parent == folder:
            with pytest.raises(RunError, match=rf"{file} is not the file that .*half was begun with"):
                run(text, tmp_path / "half", resume=True)
        file.write_bytes(kept)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RunError, match=r"model.safetensors is not the file .*: it is gone"):
        run(text, tmp_path / "half", resume=True)


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json", "metrics.csv", "layers.json"])
def test_a_table_that_was_edited_is_not_shown(done: Path, name: str) -> None:
    if name == "layers.json":
        (done / name).write_text(json.dumps({"images": 1, "student": [], "teacher": [], "cka": [], "pairs": []}))
        record(done, [name])
    assert compare([done]).groups
    file = done / name
    file.write_text(file.read_text().replace("images", "image") + "\n")
    with pytest.raises(RunError, match=f"{name} is damaged, or was changed since the run wrote it.*leave this run out"):
        compare([done])


@pytest.mark.parametrize("name", ["summary.json", "recipe.yaml", "data.json", "manifest.json"])
def test_a_finished_run_that_lacks_a_table_is_not_measured_or_shown_as_if_it_were_whole(done: Path, name: str) -> None:
    (done / name).write_text("{}") if name == "manifest.json" else (done / name).unlink()
    if name != "data.json":  # of the images, nothing is compared
        with pytest.raises(RunError, match=name):
            compare([done])
    if name != "summary.json":  # which `eval` finds anew
        with pytest.raises(RunError, match=name):
            evaluate(done)


def test_weights_of_no_numbers_are_not_measured(done: Path, tmp_path: Path) -> None:
    weights = load_file(done / "student.safetensors")
    weights["fc.weight"][:, 0] = float("nan")
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(RunError, match=r"the outputs of student \(.*broken.safetensors\) are no numbers"):
        evaluate(done, weights=tmp_path / "broken.safetensors")


def test_a_file_that_is_replaced_while_the_run_goes_on_is_not_read(tmp_path: Path) -> None:
    began = tmp_path / "began.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=10, channels=[8, 8, 8, 8]).state_dict(), began)
    text = TAUGHT.replace("8, 8]}}\nt", f"8, 8]}}, checkpoint: {began}}}\nt")
    with pytest.raises(RunError, match=r"began.safetensors is not the file .* changed while the run went on"):
        run(text, tmp_path / "run", After(lambda: other_values(began), epochs=1))


def test_what_fails_in_an_update_and_in_a_tracker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("of somebody else")

    for place, says in (
        ("probe_kd.training.loop.Loop._step", r"an update of student in epoch 1 fails: of somebody else. The last"),
        ("accelerate.Accelerator.log", "a tracker fails: of somebody else"),
        ("accelerate.Accelerator.load_state", r"checkpoint .* does not fit what the recipe builds now: of somebody"),
    ):
        monkeypatch.setattr(place, fail)
        with pytest.raises(RunError, match=says):
            run(ALONE, tmp_path / "run", resume=True)
        monkeypatch.undo()


def test_a_run_whose_manifest_is_lost_goes_on_aloud_and_can_be_stopped_again(half: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    as_before_manifests(folder)
    for said in (1, 0):
        display = After(stop, updates=1)
        with pytest.raises(KeyboardInterrupt):
            run(TAUGHT, folder, display, resume=True)
        assert sum("has no manifest.json" in text for text in display.said) == said
    other_values(folder / "teacher.safetensors")
    with pytest.raises(RunError, match=r"teacher.safetensors is damaged, or was replaced"):
        run(TAUGHT, folder, resume=True)


def test_damaged_weights_are_neither_measured_nor_exported(done: Path, tmp_path: Path) -> None:
    other_values(done / "student.safetensors")
    for read in (lambda: evaluate(done), lambda: export(done, tmp_path / "exported")):
        with pytest.raises(WeightsError, match=r"student.safetensors is damaged, or was replaced"):
            read()


def test_a_recipe_that_somebody_wrote_is_never_deleted(tmp_path: Path) -> None:
    """Also where it is the very recipe that is run, and where it holds what a run would write."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for text in (f"# mine\n{ALONE}", ALONE, "mine too", ""):
        (folder / "recipe.yaml").write_text(text)
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(RunError, match=r"recipe.yaml was written by no run"):
                run(ALONE, folder, **options)
        assert contents(folder) == {"recipe.yaml": text.encode()}


def edit(file: Path) -> None:
    file.write_text(f"# what I learnt from it\n{file.read_text()}")


OWN = {
    "a recipe that was edited": (lambda folder: edit(folder / "recipe.yaml"), r"recipe.yaml was changed since a run"),
    "weights of another": (lambda folder: other_values(folder / "student.safetensors"), "is damaged, or was replaced"),
    "weights that it did not write": (
        lambda folder: shutil.copy(folder / "student.safetensors", folder / "teacher.safetensors"),
        r"holds more than a run writes \(teacher.safetensors\)",
    ),
    "a text": (lambda folder: (folder / "thesis.tex").write_text("years"), r"holds more than .*thesis.tex"),
    "a folder": (lambda folder: (folder / "notes").mkdir(), r"holds more than .*notes"),
    "a link to a folder": (lambda folder: (folder / "checkpoints").symlink_to("/"), r"holds more than .*checkpoints"),
    "a link to a file": (
        lambda folder: (folder / "report.html").symlink_to(folder / "metrics.csv"),
        r"holds more than .*report.html",
    ),
    "a table that was edited": (
        lambda folder: edit(folder / "metrics.csv"),
        r"metrics.csv is damaged, or was replaced",
    ),
    "curves of another": (
        lambda folder: (folder / "curves.png").write_bytes(b"mine"),
        r"curves.png is damaged, or was replaced",
    ),
    "a summary that was edited": (lambda folder: edit(folder / "summary.json"), r"summary.json is damaged"),
    "a manifest of something else": (lambda folder: (folder / "manifest.json").write_text("{}"), "cannot be known"),
}


@pytest.mark.parametrize("change", OWN)
def test_overwrite_deletes_only_what_a_run_wrote(done: Path, change: str) -> None:
    own, says = OWN[change]
    own(done)
    before = contents(done)
    with pytest.raises(RunError, match=says):
        run(ALONE, done, overwrite=True)
    assert contents(done) == before


def test_overwrite_takes_what_runs_left_also_of_before_there_were_manifests(done: Path) -> None:
    for change in (lambda _: None, as_before_manifests):
        change(done)
        run(ALONE, done, overwrite=True)
        assert (done / "summary.json").is_file()
    as_before_manifests(done)
    edit(done / "recipe.yaml")
    with pytest.raises(RunError, match=r"recipe.yaml was written by no run"):
        run(ALONE, done, overwrite=True)


def test_a_recipe_that_reads_from_the_folder_does_not_overwrite_it(done: Path) -> None:
    text = ALONE.replace("[8, 8, 8, 8]}}", f"[8, 8, 8, 8]}}, checkpoint: {done / 'student.safetensors'}}}")
    with pytest.raises(RunError, match=r"the recipe reads .*student.safetensors, which lies in the folder of results"):
        run(text, done, overwrite=True)
    assert (done / "student.safetensors").is_file()


def test_weights_without_a_checkpoint_are_not_begun_anew_by_resume(half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(RunError, match=r"no checkpoint in .* but teacher.safetensors is there; --overwrite"):
        run(TAUGHT, tmp_path / "run", resume=True)


def test_a_link_is_followed_and_kept(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "run")  # not there yet
    for options in ({}, {"overwrite": True}):
        run(ALONE, link, **options)
        assert link.is_symlink()
        assert (tmp_path / "disk" / "run" / "student.safetensors").is_file()
    with pytest.raises(RunError, match="finished"):
        run(ALONE, link, resume=True)


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda folder: folder.rename(f"{folder}.moved")])
def test_a_folder_that_vanishes_ends_the_run_in_words(tmp_path: Path, gone: Callable[[Path], Any]) -> None:
    with pytest.raises(RunError, match="was deleted, moved or replaced while the run was writing it"):
        run(ALONE.replace("epochs: 1", "epochs: 3"), tmp_path / "run", After(lambda: gone(tmp_path / "run"), epochs=1))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_vanishes_while_a_checkpoint_is_written_is_told_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(aside: Path, _: int) -> None:
        shutil.rmtree(aside.parent.parent)
        raise FileNotFoundError(2, "No such file or directory", str(aside))

    monkeypatch.setattr("probe_kd.training.checkpoints.commit", commit)
    with pytest.raises(RunError, match="was deleted, moved or replaced while the run was writing it"):
        run(ALONE, tmp_path / "run")


def test_a_first_checkpoint_that_cannot_be_written_tells_of_none_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probe_kd.training.checkpoints.commit", commit)
    with pytest.raises(RunError, match=r"checkpoint to .*run: .*No space left on device. Make room"):
        run(ALONE, tmp_path / "run")


def test_a_folder_that_another_run_has_taken_over_is_not_written(tmp_path: Path) -> None:
    def replaced() -> None:
        shutil.rmtree(tmp_path / "run")
        run(ALONE, tmp_path / "run")

    with pytest.raises(RunError, match="was deleted, moved or replaced"):
        run(ALONE.replace("epochs: 1", "epochs: 3"), tmp_path / "run", After(replaced, epochs=1))
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 2


HOLDER = """
import os, pathlib, sys, time
from probe_kd.files.run_folder import claim
claim(pathlib.Path(sys.argv[1]), print)
worker = os.fork()  # as a loader has them, which live on for a while when their parent is killed
if worker:
    print(worker, flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_two_runs_never_write_one_folder(done: Path, options: dict[str, bool]) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDER, done], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    worker = int(other.stdout.readline())
    before = contents(done)
    with pytest.raises(RunError, match=rf"being written by another run \(process {other.pid} on .*--out"):
        run(ALONE, done, **options)
    assert contents(done) == before
    other.kill()
    other.wait()
    claim(done, print).release()  # the lock has died with the process
    os.kill(worker, signal.SIGKILL)


def test_a_claim_is_one_of_a_process_and_leaves_nothing(tmp_path: Path) -> None:
    first = claim(tmp_path / "new" / "run", print)
    with pytest.raises(RunError, match=rf"process {os.getpid()} on"):
        claim(tmp_path / "new" / "run", print)
    assert not is_abandoned(tmp_path / "new" / "run")
    first.release()
    assert list(tmp_path.iterdir()) == []
    claim(tmp_path / "new" / "run", print).release()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("probe_kd.files.run_folder.fcntl.flock", refuse)
    display = Quiet()
    run(ALONE, tmp_path / "run", display)
    assert [text for text in display.said if "cannot be locked (No locks available)" in text]


def test_what_lies_in_the_way_is_told_before_the_models_are_traced(
    tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, with a model that would only be refused by the plan."""
    (tmp_path / "r.yaml").write_text(ALONE.replace("resnet10t", "resnet11t"))
    (tmp_path / "file").write_text("")
    for out, more, says in (
        ("run", [], "is not empty"),
        ("file", [], "cannot write to file: it is a file"),
        ("file/under", [], "cannot write to file/under"),
        ("new", [], "timm has no model 'resnet11t'"),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["probe-kd", "train", "r.yaml", "--out", out, *more])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert not (done / LOCK).exists()


def test_the_manifest_names_what_the_run_wrote(finished: Path) -> None:
    manifest = Manifest.read(finished)
    assert manifest is not None
    tables = {"metrics.csv", "summary.csv", "curves.png", "summary.json"}
    assert manifest.files.keys() == {"recipe.yaml", "data.json", "student.safetensors", *tables}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in manifest.files.values())
    assert json.loads((finished / "manifest.json").read_text())["written_by"] == "probe-kd"


@pytest.mark.parametrize("name", [LOCK, "checkpoints/notes.txt", "report.html", "layers.json", "trackers/mine"])
def test_what_somebody_wrote_under_a_name_of_a_run_is_kept(name: str, done: Path) -> None:
    file = done / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(RunError, match=r"will not be overwritten|holds more than a run writes"):
        run(ALONE, done, overwrite=True)
    assert file.read_text() == "precious"


@pytest.mark.parametrize("name", ["mine", "notes.json", "folder/journal.json", "journal.json.old"])
def test_what_somebody_put_into_a_checkpoint_is_kept(name: str, half: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    newest = max((folder / "checkpoints").iterdir())
    aside = newest.with_name("000099.partial")
    shutil.copytree(newest, aside)
    (aside / "manifest.json").unlink()
    check_folder(folder, resume=False, overwrite=True)
    for place, options in ((newest, {"overwrite": True}), (aside, {"resume": True})):
        file = place / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("precious")
        shown = place.relative_to(folder) / name.partition("/")[0]
        with pytest.raises(RunError, match=rf"holds more than a run writes \({shown}\)"):
            run(TAUGHT, folder, **options)
        assert file.read_text() == "precious"
        shutil.rmtree(file.parent) if file.parent != place else file.unlink()


def test_what_trackers_wrote_may_be_overwritten(done: Path) -> None:
    (done / "trackers").mkdir()
    (done / "trackers" / "events").write_text("")
    recipe = (done / "recipe.yaml").read_text()
    assert "trackers: []" in recipe
    (done / "recipe.yaml").write_text(recipe.replace("trackers: []", "trackers: [tensorboard]"))
    record(done, ["recipe.yaml"])
    check_folder(done, resume=False, overwrite=True)


def test_a_lock_behind_a_link_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="was written by no run"):
        claim(tmp_path / "run", print)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize(
    ("out", "says"),
    [("loop", "it is a link that goes round, or to nothing"), ("/dev/null", "it is a device or a pipe")],
)
def test_what_stands_in_the_place_of_a_folder_is_called_what_it_is(tmp_path: Path, out: str, says: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RunError, match=f"cannot write to .*{out}: {says}; choose another --out"):
        claim(tmp_path / out, print)


def test_a_disk_that_is_full_as_a_run_begins_is_told(tmp_path: Path) -> None:
    """Not even the name of the lock's owner fits on it."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, former[1]))
        with pytest.raises(RunError, match=r"cannot write to .*run: File too large; .*--out"):
            claim(tmp_path / "run", print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert not (tmp_path / "run").exists()
    claim(tmp_path / "run", print).release()


@pytest.mark.parametrize(("number", "says"), [(28, "No space left"), (13, "Permission denied"), (30, "Read-only")])
def test_a_lock_that_cannot_be_made_is_no_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("probe_kd.files.run_folder.os.open", refuse)
    with pytest.raises(RunError, match=f"cannot write to .*run: {says}"):
        claim(tmp_path / "run", print)
    assert not (tmp_path / "run").exists()


def test_a_lock_that_cannot_be_deleted_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    claimed = claim(tmp_path / "run", print)
    monkeypatch.setattr(Path, "unlink", refuse)
    claimed.release()
    monkeypatch.undo()
    claim(tmp_path / "run", print).release()  # the lock itself is given back


def test_a_run_whose_words_nobody_reads_any_more_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `probe-kd train ... | head`, where rich points stdout at nothing, and exits."""

    def closed(*_: Any, **__: Any) -> None:
        raise SystemExit(1)

    console = Console(file=io.StringIO())
    monkeypatch.setattr(console, "print", closed)
    run(ALONE, tmp_path / "run", Progress(console))
    assert (tmp_path / "run" / "summary.json").is_file()
