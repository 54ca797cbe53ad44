"""A Distiller inside other people's loops: timm's task, timm's optimizer, arguments that are of another kind."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from probe_kd import DistillationTask, Distiller, Objective, Probe, match, trace
from probe_kd.errors import LossError, MatchError, ProbeKDError, TapError

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 5}


def distil(seed: int = 0) -> Distiller:
    torch.manual_seed(seed)
    student = timm.create_model("vit_tiny_patch16_224", **VIT)
    teacher = timm.create_model("resnet10t", num_classes=5)
    pairs = match(trace(student, training=True), trace(teacher, 32), num_pairs=1)
    objectives = [Objective("cross_entropy"), Objective("soft_targets", weight=0.5), Objective("hint", pairs=pairs)]
    return Distiller(student, teacher, objectives)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(5, (4,), generator=generator)


def test_a_task_steps_as_a_hand_written_loop_does_and_keeps_a_plain_student(tmp_path: Path) -> None:
    task = DistillationTask(distil())
    other = copy.deepcopy(task.distiller)
    by_hand = create_optimizer_v2(other, opt="sgd", lr=0.1, weight_decay=0.1)
    average = ModelEmaV3(other.student, decay=0.5)
    task.setup_ema(decay=0.5)
    task.compile(backend="aot_eager")
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=0.1)
    for step in range(3):
        for run, method in ((task, optimizer), (other, by_hand)):
            run.train()
            run(*batch(step))["loss"].backward()
            method.step()
            method.zero_grad()
        task.update_ema(step + 1)
        average.update(other.student, step=step + 1)
    CheckpointSaver(task.get_eval_model(), optimizer, checkpoint_dir=str(tmp_path), task=task).save_checkpoint(0, 1.0)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    expected = {"state_dict": other.student, "state_dict_ema": average.module}
    for key, model in expected.items():
        plain = timm.create_model("vit_tiny_patch16_224", **VIT)
        plain.load_state_dict(saved[key])
        torch.testing.assert_close(plain.state_dict(), model.state_dict())
    anew = DistillationTask(distil(seed=1))
    assert resume_task_checkpoint(anew, str(tmp_path / "last.pth.tar")) == 1
    torch.testing.assert_close(anew.distiller.state_dict(), other.state_dict())
    evaluator = anew.create_evaluator()
    images, target = batch()
    evaluator.update(anew.get_eval_model()(images), target)
    clipped = task.get_clip_parameters(exclude_head=True)
    assert len(clipped) == len(list(other.parameters())) - 2


def test_ddp_wraps_the_student_and_its_adapters_and_not_the_teacher(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        task = DistillationTask(distil())
        own = {name: parameter.clone() for name, parameter in task.distiller.named_parameters()}
        before = task.get_checkpoint_state()
        task.prepare_distributed()
        assert {name for name, _ in task.get_trainable_module().module.named_parameters()} == own.keys()
        torch.testing.assert_close(task.get_checkpoint_state(), before)
        with task.no_sync():
            task(*batch())["loss"].backward()
        alone = distil()
        alone(*batch())["loss"].backward()
        for (name, given), expected in zip(task.distiller.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(given.grad, expected.grad, msg=name)
        assert all(parameter.grad is None for parameter in task.distiller.frozen_teacher.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_timm_exempts_and_slows_the_students_parameters_as_it_does_without_a_distiller() -> None:
    distiller = distil()
    options: dict[str, Any] = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.1, "layer_decay": 0.5}

    def treated(model: nn.Module) -> dict[int, tuple[float, float]]:
        optimizer = create_optimizer_v2(model, **options)
        return {
            id(parameter): (group["weight_decay"], group["lr_scale"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    whole, student = treated(distiller), treated(distiller.student)
    assert {key: whole[key] for key in student} == student
    assert whole[id(distiller.student.pos_embed)][0] == 0.0
    assert {whole[id(parameter)][1] for parameter in distiller.adapters.parameters()} == {1.0}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Probe("resnet18", [""]), TapError, "the model of a Probe is 'resnet18' (str); expected an nn.Module"),  # type: ignore[arg-type]
        (lambda: match(nn.Identity(), nn.Identity()), MatchError, "the student is Identity() (Identity); expected a"),  # type: ignore[arg-type]
        (lambda: Distiller("resnet18", None, []), LossError, "the student is 'resnet18' (str); expected an nn.Module"),  # type: ignore[arg-type]
        (lambda: Distiller(nn.Identity(), "a", []), LossError, "the teacher is 'a' (str); expected an nn.Module"),  # type: ignore[arg-type]
        (lambda: Distiller(nn.Identity(), None, ["hint"]), LossError, "an objective is 'hint' (str); expected an Obj"),  # type: ignore[list-item]
        (lambda: Objective("hint", pairs="auto"), LossError, "pairs 'auto': expected what `match("),  # type: ignore[arg-type]
        (lambda: Objective("hint", pairs=["layer1"]), LossError, "pair 'layer1': expected a Pair, or (student layer,"),  # type: ignore[list-item]
        (lambda: DistillationTask(nn.Identity()), LossError, "the distiller is Identity() (Identity); expected a Dist"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_arguments_of_another_kind_are_told(call: Any, error: type[ProbeKDError], says: str) -> None:
    with pytest.raises(error) as refusal:
        call()
    assert says in str(refusal.value)
