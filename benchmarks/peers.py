"""What the same distillation costs in torchdistill and in timm.task.

python benchmarks/peers.py [--quick] [--device cuda]
"""

import logging
from collections.abc import Sequence
from typing import Any

import measure
import torch
from step import CASES, QUICK, SOFT, TASK, TEMPERATURE, WEIGHTS, Case, agree, built, half, step_of
from timm.task import FeatureDistillationTask, LogitDistillationTask
from torch import Tensor, nn
from torchdistill.core.distillation import DistillationBox

from probe_kd import Distiller, Loss, Objective, Pair
from recipes import at, labels_term, soft_term, term

# What the models' heads take: timm.task compares it, after the pooling.
PRELOGITS = {"resnet": "fc@input", "convnext": "head.fc@input", "vit": "head@input"}


def column_norms(student: Tensor, teacher: Tensor, /) -> Tensor:
    """torchdistill's FSP: the norms of the matrix's columns and not their squares."""
    return (student - teacher).norm(dim=1).sum() / len(student)


def torchdistill_terms(case: Case, loss: str) -> dict[str, Any]:
    """Its configuration of one loss, over pairs of one width."""
    pairs = case.pairs.items()
    if loss == "task":
        return labels_term()
    if loss == "soft":
        return soft_term(TEMPERATURE, WEIGHTS["soft"])
    if loss == "hint":
        return {
            f"hint {mine}": term(
                "MSELoss", {}, WEIGHTS["hint"], wrapped={"input": at(mine), "target": at(his, from_teacher=True)}
            )
            for mine, his in pairs
        }
    ends = {
        mine: {
            f"{side}_{end}": {"io": io, "path": name}
            for side, name in (("student", mine), ("teacher", his))
            for end, io in (("first", "input"), ("second", "output"))
        }
        for mine, his in pairs
    }
    return {"fsp": term("FSPLoss", {"fsp_pairs": ends}, WEIGHTS["fsp"])}


def torchdistill_box(case: Case, losses: Sequence[str], like: Distiller, device: str) -> DistillationBox:
    student, teacher = case.models()
    student.load_state_dict(like.student.state_dict())
    teacher.load_state_dict(like.frozen_teacher.state_dict())  # type: ignore[union-attr]
    sides: list[dict[str, Any]] = []
    for names in (list(case.pairs), list(case.pairs.values())):
        taps = {"output": names} if "hint" in losses else {"input": names, "output": names} if "fsp" in losses else {}
        sides.append({"forward_proc": "forward_batch_only", "forward_hook": taps})
    terms: dict[str, Any] = {}
    for loss in losses[1:] if "soft" in losses else losses:
        terms |= torchdistill_terms(case, loss)
    config = {
        "num_epochs": 1,
        "student": sides[0],
        "teacher": {**sides[1], "requires_grad": False},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-5}},
    }
    box = DistillationBox(teacher, student, {}, config, torch.device(device), None, False, 1)
    box.pre_epoch_process()
    return box


def beside_torchdistill(case: Case, losses: Sequence[str], device: str) -> dict[str, measure.Arm]:
    pairs = [Pair(*names) for names in case.pairs.items()]
    flows = Loss(column_norms, "flows")
    known = {
        "task": TASK,
        "soft": SOFT,
        "hint": Objective("hint", pairs=pairs, weight=WEIGHTS["hint"], policy="never"),
        "fsp": Objective(flows, "fsp", pairs=pairs, weight=WEIGHTS["fsp"], policy="never"),
    }
    distiller = built(case, [known[loss] for loss in losses]).to(device)
    box = torchdistill_box(case, losses, distiller, device)
    images, target = case.data(device)
    reached = _reached(distiller(images, target)["loss"], distiller.student)
    theirs = [parameter for name, parameter in box.student_model.named_parameters() if name in reached]
    mine = [parameter for name, parameter in distiller.student.named_parameters() if name in reached]
    agree((distiller(images, target)["loss"], mine), (box.forward_process(images, target), theirs))

    def peer() -> None:
        with half(device):
            loss = box.forward_process(images, target)
        box.post_forward_process(loss)

    return {"ours": step_of(lambda: distiller(images, target)["loss"], mine, device), "peer": peer}


def _reached(loss: Tensor, student: nn.Module) -> set[str]:
    named = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def beside_timm(case: Case, kind: str, device: str) -> dict[str, measure.Arm]:
    """`soft`: its LogitDistillationTask; `hint`: its FeatureDistillationTask, one hint at what the heads take."""
    if kind == "soft":
        other = SOFT
    else:
        taps = [
            next(tap for family, tap in PRELOGITS.items() if family in name) for name in (case.student, case.teacher)
        ]
        widths = [model.head_hidden_size for model in case.models()]
        policy = "never" if widths[0] == widths[1] else "auto"  # timm projects only where it must
        other = Objective("hint", pairs=[tuple(taps)], weight=WEIGHTS["hint"], policy=policy)
    distiller = built(case, [TASK, other]).to(device)
    student, teacher = case.models()
    student.load_state_dict(distiller.student.state_dict())
    given = {"criterion": nn.CrossEntropyLoss(), "task_loss_weight": 1.0, "verbose": False}
    if kind == "soft":
        peer = LogitDistillationTask(
            student, teacher, distill_loss_weight=WEIGHTS["soft"], temperature=TEMPERATURE, device=device, **given
        )
    else:
        peer = FeatureDistillationTask(student, teacher, distill_loss_weight=WEIGHTS["hint"], device=device, **given)
    peer.to(device).train()
    if list(distiller.adapters.parameters()):
        peer.trainable_module.projection.load_state_dict(_projector(distiller).state_dict())
    theirs, mine = list(peer.trainable_module.parameters()), list(distiller.parameters())
    # One normalisation for both models, as our InputSpecs say: timm still compares the two, and changes nothing.
    peer.student_mean, peer.student_std = peer.teacher.mean_kd, peer.teacher.std_kd
    images, target = case.data(device)
    agree((distiller(images, target)["loss"], mine), (peer(images, target)["loss"], theirs))
    return {
        "ours": step_of(lambda: distiller(images, target)["loss"], mine, device),
        "peer": step_of(lambda: peer(images, target)["loss"], theirs, device),
    }


def _projector(distiller: Distiller) -> nn.Module:
    return next(module for module in distiller.adapters.modules() if isinstance(module, nn.Linear))


def row(case: Case, peer: str, what: str, arms: dict[str, measure.Arm], rounds: int, device: str) -> tuple[object, ...]:
    samples = measure.interleaved(arms, rounds, device=device)
    return (
        peer,
        str(case),
        what,
        *measure.time_cells(samples, "peer", to="ours"),
        *measure.memory_cells(arms, "peer", to="ours", device=device),
    )


def rows(cases: Sequence[Case], rounds: int, device: str) -> list[tuple[object, ...]]:
    found = []
    alike = cases[0]  # torchdistill compares features as they are, so only models of equal widths
    for losses in (("task", "soft"), ("task", "hint"), ("task", "fsp")):
        arms = beside_torchdistill(alike, losses, device)
        found.append(row(alike, "torchdistill", " + ".join(losses), arms, rounds, device))
    for losses in (("hint",), ("fsp",)):
        arms = beside_torchdistill(alike.lower(), losses, device)
        found.append(row(alike, "torchdistill", f"{losses[0]} alone, lower pairs", arms, rounds, device))
    for case in cases[1:]:
        arms = beside_torchdistill(case, ("task", "soft"), device)
        found.append(row(case, "torchdistill", "task + soft", arms, rounds, device))
    for case in cases:
        for kind in ("soft", "hint"):
            arms = beside_timm(case, kind, device)
            found.append(row(case, "timm.task", f"task + {kind}", arms, rounds, device))
    return found


def main() -> None:
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    wishes = measure.options(__doc__).parse_args()
    cases = QUICK if wishes.quick else CASES
    rounds = wishes.rounds or (1 if wishes.quick else 10)
    print(
        measure.section(
            "The same step in torchdistill and in timm.task",
            measure.command(),
            f"One row is one step at {cases[0].size} pixels and {cases[0].batch} images, over {rounds} rounds: "
            "milliseconds of a Distiller, the peer's time as a multiple of it (median and quartiles; above 1 is slower "
            "than ours), MiB of tensors at the Distiller's peak, and the peer's as a multiple. Both gave the same loss "
            "and the same gradients first. torchdistill has no adapters for tokens or other widths, so its hints and "
            "flows are of two ResNets without projectors, and its FSP is the norms of the columns, which the "
            "Distiller then takes too. timm.task has one hint, at what the heads take. `alone, lower pairs` is a stage "
            "of hints or flows at the lower half of the stages, where the Distiller ends both forwards at the last "
            "layer that is read and torchdistill runs both models as a whole.",
            ("peer", "student <- teacher", "losses", "ms", "peer", "MiB", "peer's memory"),
            rows(cases, rounds, wishes.device),
        )
    )


if __name__ == "__main__":
    main()
