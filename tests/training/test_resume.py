"""What a run survives: being killed at any point, damaged checkpoints, a full disk, signals, broken data."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import NARROW, ROCKET, apart, begin
from running import After, count, flip, run, same, stop, truncate

from probe_kd.errors import DataError, RunError, Stopped
from probe_kd.files.atomic import MANIFEST, digest_of
from probe_kd.training import checkpoints

# Small batches, so that there are points inside an epoch; dropout, mixing and augmentation, so that every generator is
# drawn from; accumulation that does not divide the epoch.
WILD = (
    NARROW.replace("num_heads: 2}", "num_heads: 2, drop_path_rate: 0.2, proj_drop_rate: 0.1}")
    .replace("batch_size: 64", "batch_size: 32\n  mixup: 0.4\n  reprob: 0.3\n  aa: rand-m3\n  holdout: 0.1")
    .replace("  - name: task\n    epochs: 2", "  - name: task\n    epochs: 2\n    keep: best\n    grad_accum_steps: 3")
)
WILD += "model_ema: {decay: 0.9}\nrecovery_interval: 2\ncheckpoint_hist: 3\n"
TOGETHER = ROCKET.replace("batch_size: 128", "batch_size: 64") + "recovery_interval: 1\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of this recipe that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def ran(text: str) -> Path:
        place = folder / str(len(list(folder.iterdir())))
        run(text, place)
        return place

    return ran


def killed_after(text: str, folder: Path, saves: int, delay: float) -> bool:
    """Resume the run in a process of its own, and kill it after so many checkpoints more. False if it ended before."""
    before = count(folder)
    process = begin(run, text, folder, resume=True)
    while process.is_alive() and count(folder) < before + saves:
        time.sleep(0.001)
    time.sleep(delay)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    return alive


@pytest.mark.parametrize(
    ("text", "saves"),
    [
        pytest.param(WILD, (4, 8), id="stages"),
        pytest.param(TOGETHER, (3, 5), id="rocket"),
        pytest.param(WILD, (1, 2, 3), id="stages, often", marks=pytest.mark.zoo),
        pytest.param(TOGETHER, (1, 2), id="rocket, often", marks=pytest.mark.zoo),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, whole: Callable[[str], Path], text: str, saves: tuple[int, ...]
) -> None:
    expected = whole(text)
    kills, chance = 0, random.Random(0)
    while killed_after(text, tmp_path / "parts", saves=chance.choice(saves), delay=chance.random() * 0.2):
        kills += 1
    assert kills >= 3
    same(tmp_path / "parts", expected)
    assert not (tmp_path / "parts" / checkpoints.FOLDER).exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after three epochs."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        run(NARROW, folder, After(stop, epochs=3))
    return folder


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "one bit", "lost"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "random_states_0.pkl", "journal.json", "manifest.json"])
def test_a_damaged_checkpoint_is_set_aside_aloud_and_the_one_before_it_taken(
    tmp_path: Path, stopped: Path, damage: Callable[[Path], None], name: str
) -> None:
    if (damage, name) == (flip, "manifest.json"):
        pytest.skip("one bit of a number of bytes, or of a digest, is one of the others")
    folder = shutil.copytree(stopped, tmp_path / "run")
    newest, before = sorted((folder / checkpoints.FOLDER).iterdir())[:-3:-1]
    damage(newest / name)
    display = After(stop, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        run(NARROW, folder, display, resume=True)
    assert len(display.said) == 2
    assert "going on with" in display.said[1]
    assert str(newest) in display.said[0]
    assert name in display.said[0] or "manifest" in display.said[0]
    assert newest.with_suffix(".damaged").exists()
    assert before.exists()
    for path in (folder / checkpoints.FOLDER).glob("[0-9]*"):
        (path / "journal.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged; --overwrite begins anew"):
        run(NARROW, folder, resume=True)


def test_checkpoints_are_as_many_as_wanted_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(WILD, folder, After(stop, epochs=2))
    names = sorted(path.name for path in (folder / checkpoints.FOLDER).iterdir())
    assert len(names) == 3
    assert [int(name) for name in names] == list(range(int(names[0]), int(names[0]) + 3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_update_writes_a_checkpoint_and_loses_nothing(
    tmp_path: Path, whole: Callable[[str], Path], number: int
) -> None:
    text = WILD.replace("recovery_interval: 2\n", "")
    expected = whole(text)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    display = After(lambda: os.kill(os.getpid(), number), updates=20)
    with pytest.raises(Stopped, match=signal.Signals(number).name):
        run(text, tmp_path / "parts", display)
    assert "stopping after this update" in display.said[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    newest = sorted((tmp_path / "parts" / checkpoints.FOLDER).iterdir())[-1]
    assert json.loads((newest / "journal.json").read_text())["step"] > 0
    run(text, tmp_path / "parts", resume=True)
    same(tmp_path / "parts", expected)


def test_training_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(NARROW, tmp_path / "run"))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "summary.json").exists()


def _run_with_little_room(text: str, folder: Path, queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # writing more than that fails, as on a full disk
    try:
        run(text, folder, resume=True)
    except RunError as refusal:
        queue.put(str(refusal))


def test_a_full_disk_ends_the_run_in_words_and_leaves_the_last_checkpoint(
    tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(NARROW, folder, After(stop, epochs=2))
    queue = apart.Queue()
    process = begin(_run_with_little_room, NARROW, folder, queue)
    message = queue.get(timeout=120)
    process.join()
    assert "cannot write a checkpoint" in message
    assert "go on with --resume" in message
    run(NARROW, folder, resume=True)
    same(folder, whole(NARROW))


def test_a_worker_that_dies_loses_nothing(tmp_path: Path, whole: Callable[[str], Path]) -> None:
    text = NARROW.replace("batch_size: 64", "batch_size: 32\n  workers: 1")

    def kill_workers() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]

    with pytest.raises(DataError, match=r"training images: .* A process that reads images has died.*data: {workers"):
        run(text, tmp_path / "parts", After(kill_workers, updates=2))
    run(text, tmp_path / "parts", resume=True)
    same(tmp_path / "parts", whole(text))


def test_resume_begins_where_there_is_nothing_and_says_so(tmp_path: Path) -> None:
    display = After(stop, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        run(NARROW, tmp_path / "run", display, resume=True)
    assert "beginning anew" in display.said[0]


def as_before(folder: Path) -> None:
    """A stopped run in the words of earlier versions: roles were subjects, and the baseline the student alone."""
    (former := folder / "baseline.safetensors").rename(folder / "student-alone.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["student-alone.safetensors"] = manifest["files"].pop(former.name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    newest = sorted((folder / checkpoints.FOLDER).iterdir())[-1]
    journal = newest / "journal.json"
    state = json.loads(journal.read_text())
    state["rows"] = [{"subject": row.pop("role").replace("baseline", "student alone"), **row} for row in state["rows"]]
    state["results"]["student alone"] = state["results"].pop("baseline") | {
        "role": "student alone",
        "weights": "student-alone.safetensors",
    }
    journal.write_text(json.dumps(state))
    files = json.loads((newest / MANIFEST).read_text())
    files[journal.name] = [journal.stat().st_size, digest_of(journal)]
    (newest / MANIFEST).write_text(json.dumps(files))


def test_a_run_that_an_earlier_version_began_goes_on_to_the_same_bits(
    tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(NARROW, tmp_path / "parts", After(stop, epochs=4))  # in the student's first stage
    as_before(tmp_path / "parts")
    run(NARROW, tmp_path / "parts", resume=True)
    (tmp_path / "parts" / "student-alone.safetensors").rename(tmp_path / "parts" / "baseline.safetensors")
    same(tmp_path / "parts", whole(NARROW))
