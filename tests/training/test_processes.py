"""Several processes: what two of them train is what one does with the same batches, and nothing hangs or is lost."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from conftest import GRAFT, NARROW, ROCKET, TINY, TRUNK, begin, record
from running import After, close, count, finish, planned, run, run_by_two, run_with, same, start
from safetensors.torch import load_file

from probe_kd.data.batches import Batches
from probe_kd.errors import RunError, Stopped
from probe_kd.training import checkpoints
from probe_kd.training.processes import own_accelerator


def test_a_process_of_the_tests_begins_with_what_runs_need() -> None:
    """If not, each of some forty takes seconds to import it, and nothing says so."""
    process = begin(exec, "import sys; sys.exit('probe_kd.training.run' not in sys.modules)")
    process.join()
    assert process.exitcode == 0


def halves(text: str) -> tuple[str, str]:
    """The recipe with batches for one process, and for two."""
    assert "batch_size: 64" in text
    return text, text.replace("batch_size: 64", "batch_size: 32")


@pytest.fixture
def alike(tmp_path: Path) -> str:
    """A student of layer norms, and a teacher from a file."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "teacher.safetensors")
    text = TINY.replace("  train: {epochs: 1}", f"  checkpoint: {tmp_path / 'teacher.safetensors'}")
    return text.replace("baseline: true\n", "") + "model_ema: {decay: 0.5}\n"


def test_two_processes_train_what_one_does_with_the_whole_batch(alike: str, tmp_path: Path) -> None:
    """Also the weight of a loss, which follows the gradients of all processes.

    The workers of both read from the cache what the one has asked of the teacher.
    """
    text = alike.replace("weight: 0.5", "weight: {share: 0.5, batches: 2, follow: true}")
    text = text.replace("model: resnet10t", f"model: resnet10t\n  cache: {tmp_path / 'cache'}")
    whole, half = halves(text.replace("hflip: 0.0", "hflip: 0.0\n  views: 2\n  workers: 1"))
    run(whole, tmp_path / "one")
    files = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert run_by_two(half, tmp_path / "two") == ["done", "done"]
    assert files == {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.safetensors")}, "all were there"
    close(tmp_path / "one", tmp_path / "two", 1e-4)
    one, two = (json.loads((tmp_path / run_ / "summary.json").read_text())["results"][-1] for run_ in ("one", "two"))
    assert one["measured_weights"]["task"]["soft"] == pytest.approx(two["measured_weights"]["task"]["soft"], rel=1e-4)
    assert (tmp_path / "two" / "student-ema.safetensors").exists()


def test_accumulated_batches_are_one_batch_also_where_they_do_not_divide_the_epoch(alike: str, tmp_path: Path) -> None:
    """359 images are 5 whole batches of 64, and 11 of 32: five pairs, and one alone that weighs as much."""
    whole, half = halves(alike)
    run(whole, tmp_path / "one")
    run(half.replace("    epochs:", "    grad_accum_steps: 2\n    epochs:"), tmp_path / "parts")
    ours, theirs = record(tmp_path / "parts"), record(tmp_path / "one")
    assert float(ours[0]["hint"]) == pytest.approx(float(theirs[0]["hint"]), rel=0.02)


@pytest.mark.parametrize("text", [ROCKET, TRUNK, GRAFT], ids=["weights", "trunk", "graft"])
def test_models_that_train_together_do_so_in_two_processes(text: str, tmp_path: Path) -> None:
    assert run_by_two(text, tmp_path / "run") == ["done", "done"]
    student, teacher = (load_file(tmp_path / "run" / f"{role}.safetensors") for role in ("student", "teacher"))
    assert all(tensor.isfinite().all() for tensor in (*student.values(), *teacher.values()))


def test_two_processes_that_are_stopped_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """Stopped after the last update of an epoch, when each has batch statistics of its own."""
    text = NARROW.replace("batch_size: 64", "batch_size: 12").replace("baseline: true\n", "") + "recovery_interval: 4\n"
    assert run_by_two(text, tmp_path / "whole") == ["done", "done"]
    processes, queue = start(run_with, text, tmp_path / "parts", {})
    while count(tmp_path / "parts") < 3:
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)  # one is enough: they ask each other
    assert sorted(finish(processes, queue)) == ["Stopped: stopped by SIGTERM"] * 2
    assert (tmp_path / "parts" / checkpoints.FOLDER).exists()
    assert run_by_two(text, tmp_path / "parts", resume=True) == ["done", "done"]
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_stops_processes_whose_epochs_are_short(tmp_path: Path) -> None:
    """Of one update: between two times of asking there may be an epoch, and no more."""
    text = SMALL.replace("batch_size: 16", "batch_size: 160").replace("epochs: 2", "epochs: 100000")
    processes, queue = start(run_with, text, tmp_path / "run", {})
    while count(tmp_path / "run") < 3:
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert sorted(finish(processes, queue)) == ["Stopped: stopped by SIGTERM"] * 2
    assert count(tmp_path / "run") < 100


SMALL = """\
student:
  model: vit_tiny_patch16_224
  model_kwargs: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}
data: {dataset: sklearn/digits, input_size: [3, 8, 8], batch_size: 16, hflip: 0.0, fraction: 0.2227}
stages:
  - epochs: 2
    losses: {task: {loss: cross_entropy}}
    optimizer: {opt: sgd, lr: 1.0e-30}
"""


def test_a_peer_that_is_killed_ends_the_other_in_words(tmp_path: Path) -> None:
    planned(SMALL)
    processes, queue = start(run_with, SMALL.replace("epochs: 2", "epochs: 2000"), tmp_path / "run", {})
    while not (tmp_path / "run" / "metrics.csv").exists():
        time.sleep(0.01)
    os.kill(processes[0].pid, signal.SIGKILL)
    assert queue.get(timeout=120).startswith("PeerLost: another of the 2 processes of this run has ended or was killed")
    processes[1].join(timeout=60)
    assert checkpoints.newest(tmp_path / "run", print) is not None


def test_another_number_of_processes_goes_on_at_the_same_image_or_is_refused(tmp_path: Path) -> None:
    """320 images, and weights that stay as they are: the mean loss of an epoch tells whether each was in it once."""
    run(SMALL, tmp_path / "whole")
    for updates in (3, 4):
        with pytest.raises(Stopped):
            run(SMALL, tmp_path / "run", After(lambda: os.kill(os.getpid(), signal.SIGTERM), updates=updates))
        said = run_by_two(SMALL, tmp_path / "run", resume=True)
        if updates == 3:
            assert (
                said
                == [
                    "RunError: 1 processes had done 3 batches each of epoch 1, which 2 cannot go on with at the "
                    "same image; resume with 1 processes, which may be stopped at the end of an epoch"
                ]
                * 2
            )
            shutil.rmtree(tmp_path / "run")
    assert said == ["done", "done"]
    for ours, theirs in zip(record(tmp_path / "run"), record(tmp_path / "whole"), strict=True):
        assert float(ours["task"]) == pytest.approx(float(theirs["task"]), rel=1e-5)


def test_processes_that_accelerate_does_not_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is with more processes than accelerate knows devices for."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for variables, says in (
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE says that this is one of 2 processes, and RANK is not there"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"2 processes were started \(WORLD_SIZE\), but accelerate counts 1"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "have to be whole numbers"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError, match=says), own_accelerator():
            pass


def test_fewer_images_than_a_batch_of_every_process_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Batches, "__len__", lambda _: 0)  # as it is in each of two processes with one batch
    with pytest.raises(RunError, match="320 training images are no whole batch of 16 for each of 1 processes; take a"):
        run(SMALL, tmp_path / "run")


def test_a_loss_that_is_no_number_ends_both(tmp_path: Path) -> None:
    text = NARROW.replace("weight: 0.5}", "weight: 0.5}\n    optimizer: {opt: sgd, lr: 1.0e+30}")
    for message in run_by_two(text, tmp_path / "run"):
        assert re.match(r"RunError: 'task'.* became (nan|inf) in epoch 1", message)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_a_way_of_training_that_cuts_models_up_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType
) -> None:
    """Accelerate takes them up on accelerators alone, so that here it is only said to be so."""
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(RunError, match=f"accelerate is set to {kind.value}, which cuts a model's parameters up"):
        run(TINY, tmp_path / "run")
    assert not (tmp_path / "run").exists()
