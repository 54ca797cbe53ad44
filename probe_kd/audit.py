"""What every loss moves: the gradients on one real batch, before anything is trained."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from probe_kd.data import loader
from probe_kd.distiller import Distiller
from probe_kd.objectives import Objective
from probe_kd.planner import Plan
from probe_kd.report import Display, Reach
from probe_kd.train import TEACHER_ALONE, Journal, Run, accelerating


def audit(plan: Plan) -> tuple[list[Reach], list[str]]:
    """The gradient of every loss on one real batch, before anything is trained; and what is wrong with it.

    Wrong are a loss that moves nothing, a gradient that is not finite, and a parameter that no loss of any stage
    reaches although the student's answer depends on it.
    """
    with accelerating(plan.recipe) as accelerator:
        run = Run(plan, Path(), Display(Console(quiet=True), quiet=True), accelerator, Journal())
        return _audit(plan, run)


def _audit(plan: Plan, run: Run) -> tuple[list[Reach], list[str]]:
    found: list[Reach] = []
    missed: set[str] | None = None
    for subject in run.subjects():
        if subject.role in ("teacher", TEACHER_ALONE) and not plan.recipe.share:
            run.teacher = subject
        if subject.role != "student":
            continue
        batches = loader(plan.datasets.train, plan.recipe.data, run.images_for(subject), training=True)
        images, target, _ = next(iter(run.accelerator.prepare_data_loader(batches)))
        for phase in subject.phases:
            distiller = run.distiller(subject, phase)
            norms = distiller.train().audit(images, target)
            reached = {name for loss in norms.values() for name in loss}
            named = [name for name, _ in distiller.named_parameters() if name.startswith("student.")]
            missed = set(named) - reached if missed is None else missed - reached
            found += [reach for loss in norms for reach in _by_part(phase.name, loss, norms[loss], distiller)]
            distiller.close()
        answer = Distiller(subject.model, None, [Objective("cross_entropy")], student_input=subject.input)
        answer.to(run.accelerator.device)
        used = set(answer.train().audit(images, target)["cross_entropy"])
        answer.close()
        missed = (missed or set()) & used
    return found, _complaints(found, sorted(missed or ()))


def _by_part(stage: str, loss: str, norms: Mapping[str, float], distiller: Distiller) -> list[Reach]:
    parts: dict[str, list[str]] = {}
    shared = {id(parameter) for parameter in distiller.shared}
    for name, parameter in distiller.named_parameters():
        part = ".".join(name.split(".")[: 1 if name.startswith("adapters") else 2])
        part = part.replace("student.", "shared.") if id(parameter) in shared else part
        parts.setdefault(part, []).append(name)
    rows = [(part, [norms[name] for name in names if name in norms], len(names)) for part, names in parts.items()]
    kept = [row for row in rows if row[1]] or [("nothing", [0.0], 0)]
    return [Reach(stage, loss, part, len(some), total, math.hypot(*some)) for part, some, total in kept]


def _complaints(found: Sequence[Reach], missed: Sequence[str]) -> list[str]:
    says = []
    for stage, loss in dict.fromkeys((reach.stage, reach.loss) for reach in found):
        norms = [reach.norm for reach in found if (reach.stage, reach.loss) == (stage, loss)]
        if not all(map(math.isfinite, norms)):
            says.append(f"loss `{loss}` of stage `{stage}` has a gradient that is not finite")
        elif not any(norms):
            says.append(f"loss `{loss}` of stage `{stage}` moves nothing; leave it out, or compare what can be trained")
    if missed:
        names = ", ".join(missed[:6]) + (f" and {len(missed) - 6} more" if len(missed) > 6 else "")
        says.append(
            f"no loss of any stage trains {names}; add one that reads the student's answer, `cross_entropy` say"
        )
    return says
