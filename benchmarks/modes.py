"""What a step gains by ending early, by torch.compile, and by channels that lie last in memory.

python benchmarks/modes.py [--quick] [--device cuda]
"""

import time
from collections.abc import Sequence

import measure
import torch
from step import FROM_CONVNEXT, QUICK, RESNETS, Case, agree, distiller_of, step_of
from torch import nn

from probe_kd import Distiller


def whole(distiller: Distiller) -> Distiller:
    """Both models run to their ends, as they would under plain hooks."""
    for probe in (distiller._student_probe, distiller._teacher.probe):  # type: ignore[attr-defined]
        probe.stop_early = False
    return distiller


def reached(distiller: Distiller, case: Case, device: str) -> list[nn.Parameter]:
    """What the losses move: as in a recipe, the optimizer has nothing else."""
    parameters = list(distiller.parameters())
    gradients = torch.autograd.grad(distiller(*case.data(device))["loss"], parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def arm(distiller: Distiller, case: Case, device: str) -> measure.Arm:
    images, target = case.data(device)
    return step_of(lambda: distiller(images, target)["loss"], reached(distiller, case, device), device)


def same_weights(made: Sequence[Distiller], case: Case, device: str) -> None:
    """All of them begin alike, and are shown to compute the same."""
    images, target = case.data(device)
    first = made[0].to(device)
    for other in made[1:]:
        other.to(device).load_state_dict(first.state_dict())
        agree(
            (first(images, target)["loss"], reached(first, case, device)),
            (other(images, target)["loss"], reached(other, case, device)),
        )


def early(case: Case, loss: str, rounds: int, device: str) -> tuple[object, ...]:
    case = case.lower()
    made = [distiller_of(case, [loss], task=False), whole(distiller_of(case, [loss], task=False))]
    same_weights(made, case, device)
    arms = dict(zip(("early", "whole"), (arm(distiller, case, device) for distiller in made), strict=True))
    samples = measure.interleaved(arms, rounds, device=device)
    return (
        str(case),
        f"{loss} alone at {', '.join(case.pairs)}",
        *measure.time_cells(samples, "early", to="whole"),
        *measure.memory_cells(arms, "early", to="whole", device=device),
    )


def compiled(case: Case, losses: Sequence[str], rounds: int, device: str) -> tuple[object, ...]:
    made = [distiller_of(case, losses) for _ in range(2)]
    same_weights(made, case, device)
    arms = {"eager": arm(made[0], case, device)}
    made[1].compile()
    images, target = case.data(device)
    started = time.perf_counter()
    step = step_of(lambda: made[1](images, target)["loss"], list(made[1].parameters()), device)
    step()
    took = time.perf_counter() - started
    samples = measure.interleaved({**arms, "compiled": step}, rounds, device=device)
    return (str(case), " + ".join(losses), *measure.time_cells(samples, "compiled", to="eager"), f"{took:.0f}")


def same_when_last(case: Case, losses: Sequence[str], device: str) -> None:
    """In float64: in float32, what a batch norm leaves of the gradient before it is little more than rounding."""
    made = [distiller_of(case, losses).to(device).double() for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    made[1].to(memory_format=torch.channels_last)
    images, target = case.data(device)
    shown = images.double(), images.double().contiguous(memory_format=torch.channels_last)
    first, second = (one(seen, target)["loss"] for one, seen in zip(made, shown, strict=True))
    agree((first, list(made[0].parameters())), (second, list(made[1].parameters())))


def last(case: Case, losses: Sequence[str], rounds: int, device: str) -> tuple[object, ...]:
    made = [distiller_of(case, losses) for _ in range(2)]
    same_weights(made, case, device)
    made[1].to(memory_format=torch.channels_last)
    images, target = case.data(device)
    moved = images.contiguous(memory_format=torch.channels_last)
    arms = {
        "contiguous": arm(made[0], case, device),
        "last": step_of(lambda: made[1](moved, target)["loss"], list(made[1].parameters()), device),
    }
    same_when_last(case, losses, device)
    samples = measure.interleaved(arms, rounds, device=device)
    return (
        str(case),
        " + ".join(losses),
        *measure.time_cells(samples, "last", to="contiguous"),
        *measure.memory_cells(arms, "last", to="contiguous", device=device),
    )


STAGES = {f"stages.{n}": f"stages.{n}" for n in range(4)}
CONVNEXTS = Case("convnext_atto", "convnext_nano", STAGES)
MOBILES = Case("mobilenetv3_small_100", "resnet34", {"blocks.1": "layer2", "blocks.3": "layer3", "blocks.5": "layer4"})


def main() -> None:
    wishes = measure.options(__doc__).parse_args()
    device, rounds = wishes.device, wishes.rounds or (1 if wishes.quick else 8)
    sized = f"at {RESNETS.size} pixels and {RESNETS.batch} images, over {rounds} rounds" if not wishes.quick else "tiny"
    early_cases = QUICK if wishes.quick else (RESNETS, FROM_CONVNEXT)
    print(
        measure.section(
            "A stage of hints or flows alone ends both forwards at the last layer that is read",
            measure.command(),
            f"One row is one step, {sized}: milliseconds and MiB at the peak with both models run to their ends, and "
            "the time and the peak of the step that ends early as multiples of it. Same loss, same gradients.",
            ("student <- teacher", "losses", "ms", "early", "MiB", "peak memory"),
            [early(case, loss, rounds, device) for case in early_cases for loss in ("hint", "fsp")],
        )
    )
    print(
        measure.section(
            "Channels last",
            measure.command(),
            f"One row is one step, {sized}: milliseconds and MiB at the peak as torch lays tensors out by default, and "
            "with `channels_last: true` as a multiple. Same loss, same gradients.",
            ("student <- teacher", "losses", "ms", "channels last", "MiB", "peak memory"),
            [
                last(case, losses, rounds, device)
                for case in (QUICK if wishes.quick else (RESNETS, CONVNEXTS, MOBILES))
                for losses in (("soft",), ("soft", "hint", "fsp"))
            ],
        )
    )
    if wishes.quick:  # the compiler takes a minute, and tests/methods/test_distiller.py has what it computes
        return
    print(
        measure.section(
            "A compiled step",
            measure.command(),
            f"One row is one step, {sized}: milliseconds without the compiler (inductor), the compiled step as a "
            "multiple, and the seconds of the first compiled step, which hold the compiler's.",
            ("student <- teacher", "losses", "ms", "compiled", "first step, s"),
            [compiled(case, ("soft", "hint"), rounds, device) for case in (RESNETS, FROM_CONVNEXT)],
        )
    )


if __name__ == "__main__":
    main()
