"""What a step of a Distiller costs beside the same step written by hand.

python benchmarks/step.py [--quick] [--device cuda]
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import measure
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe_kd import Distiller, InputSpec, Objective, Pair

TEMPERATURE = 4.0
WEIGHTS = {"soft": 0.5, "hint": 1.0, "fsp": 1e-4}
LOSSES = {"hint": ("hint",), "soft targets": ("soft",), "FSP": ("fsp",), "all": ("soft", "hint", "fsp")}


@dataclass(frozen=True)
class Case:
    """Two models, and the layers of them that belong together: student first."""

    student: str
    teacher: str
    pairs: Mapping[str, str]
    size: int = 96
    batch: int = 16
    depth: int | None = None  # of vision transformers, both

    def models(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        made = []
        for name in (self.student, self.teacher):
            sized: dict[str, Any] = {"img_size": self.size} if name.startswith("vit") else {}
            sized |= {"depth": self.depth} if self.depth else {}
            made.append(timm.create_model(name, num_classes=100, drop_path_rate=0.0, **sized))
        return made[0].train(), made[1].eval().requires_grad_(False)

    def data(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        return images.to(device), torch.randint(0, 100, (self.batch,), generator=generator).to(device)

    def lower(self) -> "Case":
        """Only the lower half of its pairs."""
        names = list(self.pairs.items())
        return replace(self, pairs=dict(names[: (len(names) + 1) // 2]))

    def __str__(self) -> str:
        return f"{self.student} <- {self.teacher}"


RESNETS = Case("resnet18", "resnet34", {f"layer{stage}": f"layer{stage}" for stage in (1, 2, 3, 4)})
FROM_CONVNEXT = Case("vit_tiny_patch16_224", "convnext_nano", {f"blocks.{3 * n + 2}": f"stages.{n}" for n in range(4)})
FROM_VIT = Case("resnet18", "vit_tiny_patch16_224", {f"layer{n + 1}": f"blocks.{3 * n + 2}" for n in range(4)})
CASES = (RESNETS, FROM_CONVNEXT, FROM_VIT)
QUICK = (Case("resnet10t", "resnet10t", {"layer1": "layer1", "layer4": "layer4"}, size=64, batch=2),)


TASK = Objective("cross_entropy", "task")
SOFT = Objective("soft_targets", "soft", weight=WEIGHTS["soft"], options={"temperature": TEMPERATURE})


def distiller_of(case: Case, losses: Sequence[str], *, task: bool = True) -> Distiller:
    pairs = [Pair(*names) for names in case.pairs.items()]
    known = {
        "soft": SOFT,
        "hint": Objective("hint", pairs=pairs, weight=WEIGHTS["hint"]),
        "fsp": Objective("fsp", pairs=pairs, weight=WEIGHTS["fsp"]),
    }
    return built(case, [TASK] * task + [known[loss] for loss in losses])


def built(case: Case, objectives: Sequence[Objective]) -> Distiller:
    given = InputSpec((3, case.size, case.size), 0.0, 1.0)
    return Distiller(*case.models(), objectives, student_input=given, teacher_input=given).train()


class ByHand:
    """The same step as one would write it for these two models: hooks, and nothing that a plan has to know.

    It takes the adapters' weights of the distiller that it is compared with, and models with the same weights.
    """

    def __init__(self, case: Case, losses: Sequence[str], like: Distiller) -> None:
        self.losses, self.pairs = losses, list(case.pairs.items())
        self.student, self.teacher = case.models()
        self.student.load_state_dict(like.student.state_dict())
        self.teacher.load_state_dict(like.frozen_teacher.state_dict())  # type: ignore[union-attr]
        device = next(like.student.parameters()).device
        self.student.to(device)
        self.teacher.to(device)
        self.adapters = copy.deepcopy(like.adapters)
        self.seen: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        if {"hint", "fsp"} & set(losses):
            for model, seen, names in zip(
                (self.student, self.teacher), self.seen, zip(*self.pairs, strict=True), strict=True
            ):
                for name in names:
                    model.get_submodule(name).register_forward_hook(_keep(seen, name))

    def parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *self.adapters.parameters()]

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            told = self.teacher(images)
        logits = self.student(images)
        loss = F.cross_entropy(logits, target)
        if "soft" in self.losses:
            log_p, log_q = ((z.float() / TEMPERATURE).log_softmax(1) for z in (logits, told))
            soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
            loss = loss + WEIGHTS["soft"] * TEMPERATURE**2 * soft
        if "hint" in self.losses:
            loss = loss + WEIGHTS["hint"] * self._hints()
        if "fsp" in self.losses:
            loss = loss + WEIGHTS["fsp"] * self._flows()
        self.seen[0].clear()
        self.seen[1].clear()
        return loss

    def _hints(self) -> Tensor:
        total = torch.zeros((), device=next(self.student.parameters()).device)
        for (ours, theirs), adapter in zip(self.pairs, self.adapters["hint_"].children(), strict=True):
            mine, target = _map(self.seen[0][ours][1]), _map(self.seen[1][theirs][1])
            side = min(mine.shape[-1], target.shape[-1])
            mine, target = _pool(mine, side), _pool(target, side)
            total = total + F.mse_loss(adapter.student_steps[-1](mine).float(), target.float())
        return total

    def _flows(self) -> Tensor:
        total = torch.zeros((), device=next(self.student.parameters()).device)
        for (ours, theirs), adapter in zip(self.pairs, self.adapters["fsp_"].children(), strict=True):
            with torch.autocast(total.device.type, enabled=False):
                mine, target = _matrix(*self.seen[0][ours]), _matrix(*self.seen[1][theirs])
                if adapter.parameter_count:
                    first, second = adapter.parameters()
                    mine = first @ mine @ second.T
                total = total + F.mse_loss(mine, target, reduction="sum") / len(mine)
        return total


def _keep(seen: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (args[0], output)

    return hook


def _map(feature: Tensor) -> Tensor:
    """Of these models' features, tokens are those with three axes, the class token first."""
    if feature.ndim == 4:
        return feature
    batch, length, width = feature.shape
    side = int((length - 1) ** 0.5)
    return feature[:, 1:].transpose(1, 2).reshape(batch, width, side, side)


def _pool(map_: Tensor, side: int) -> Tensor:
    if map_.shape[-1] == side:
        return map_
    if map_.shape[-1] % side == 0:
        return F.adaptive_avg_pool2d(map_, side)
    wide = map_.float()  # antialiasing has no half precision everywhere
    return F.interpolate(wide, (side, side), mode="bilinear", antialias=True, align_corners=False).to(map_.dtype)


def _matrix(first: Tensor, second: Tensor) -> Tensor:
    first, second = _map(first).float(), _map(second).float()
    side = min(first.shape[-1], second.shape[-1])
    first, second = (map_ if map_.shape[-1] == side else F.adaptive_max_pool2d(map_, side) for map_ in (first, second))
    return first.flatten(2) @ second.flatten(2).transpose(1, 2) / side**2


def half(device: str) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()


def step_of(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], device: str = "cpu", *, update: bool = True
) -> measure.Arm:
    """Forward, losses, backward and update as one call; on a GPU in bfloat16."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        with half(device):
            value = loss()
        value.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad()

    return step


def agree(first: tuple[Tensor, Sequence[nn.Parameter]], second: tuple[Tensor, Sequence[nn.Parameter]]) -> None:
    """AssertionError unless both give the same loss and the same gradients, parameter by parameter."""
    torch.testing.assert_close(first[0], second[0], rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss, list(parameters)) for loss, parameters in (first, second)]
    for ours, theirs in zip(*gradients, strict=True):
        # A norm's share of what is left where gradients cancel is rounding: measured by the tensor, not by the number.
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5, (ours.shape, float((ours - theirs).norm()))


def arms_of(case: Case, losses: Sequence[str], device: str, *, update: bool = True) -> dict[str, measure.Arm]:
    distiller = distiller_of(case, losses).to(device)
    hands = [ByHand(case, losses, distiller) for _ in range(2)]
    images, target = case.data(device)
    ours = list(distiller.parameters())
    agree((distiller(images, target)["loss"], ours), (hands[0].loss(images, target), hands[0].parameters()))
    arms = {
        name: step_of(lambda hand=hand: hand.loss(images, target), hand.parameters(), device, update=update)  # type: ignore[misc]
        for name, hand in zip(("by hand", "by hand, again"), hands, strict=True)
    }
    return {**arms, "Distiller": step_of(lambda: distiller(images, target)["loss"], ours, device, update=update)}


def synchronisations(arm: measure.Arm) -> int:
    """How often a step makes the processor wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            arm()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def row(case: Case, name: str, rounds: int, device: str) -> tuple[object, ...]:
    arms = arms_of(case, LOSSES[name], device)
    samples = measure.interleaved(arms, rounds, device=device)
    waits = [f"{synchronisations(arms[arm])}" for arm in ("by hand", "Distiller")] if device != "cpu" else []
    return (
        str(case),
        name,
        *measure.time_cells(samples, "Distiller", to="by hand"),
        samples.ratio("by hand, again", to="by hand"),
        *measure.memory_cells(arms, "Distiller", to="by hand", device=device),
        *waits,
    )


def overhead(case: Case, rounds: int, device: str) -> tuple[object, ...]:
    """At a size where the models take little, what a Distiller adds stands out of the noise."""
    small = replace(case, size=32, batch=2)
    samples = measure.interleaved(arms_of(small, ("soft", "hint"), device, update=False), rounds, device=device)
    more = (samples.surplus(arm, to="by hand") for arm in ("Distiller", "by hand, again"))
    return str(small), f"{samples.milliseconds('by hand'):.0f}", *more


def main() -> None:
    wishes = measure.options(__doc__).parse_args()
    cases = QUICK if wishes.quick else CASES
    rounds = wishes.rounds or (1 if wishes.quick else 12)
    rows = [row(case, name, rounds, wishes.device) for case in cases for name in LOSSES]
    waits = ("waits by hand", "waits, Distiller") if wishes.device != "cpu" else ()
    print(
        measure.section(
            "A step, beside the same step written by hand",
            measure.command(),
            f"One row is one step (forward, losses with the labels' among them, backward, AdamW) at {cases[0].size} "
            f"pixels and {cases[0].batch} images, over {rounds} rounds: milliseconds by hand, then the time of the "
            "Distiller as a multiple of it (median and quartiles of the rounds), the same of a second copy of the loop "
            "by hand, which is the noise, MiB of tensors at the peak by hand, and the Distiller's as a multiple. Both "
            "were shown to give the same loss and the same gradients first.",
            ("student <- teacher", "losses", "ms", "Distiller", "noise", "MiB", "peak memory", *waits),
            rows,
        )
    )
    many = 1 if wishes.quick else 15 * rounds
    rows = [overhead(case, many, wishes.device) for case in cases]
    print(
        measure.section(
            "What a Distiller adds to a step, whatever the models are",
            measure.command(),
            "Forward, labels, soft targets, four hints and backward, of 2 images at 32 pixels: milliseconds by "
            "hand, and how many more a Distiller and a second copy of the loop by hand take, median (quartiles) of "
            f"{many} rounds. Around models that take longer it has no more to do.",
            ("student <- teacher", "ms", "Distiller, ms more", "noise, ms more"),
            rows,
        )
    )


if __name__ == "__main__":
    main()
