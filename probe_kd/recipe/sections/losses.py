"""`stages.N.losses`: each loss is made an objective, and what brings its two sides together is looked for."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from probe_kd.engine.spec import Pair, Schedule, Tap, Trace, value_at
from probe_kd.errors import LossError
from probe_kd.methods.losses.table import LOSSES
from probe_kd.methods.objectives import Comparison, Objective
from probe_kd.recipe.keys import RESERVED, LossOptions, Recipe, StageOptions, schedule
from probe_kd.recipe.sections.mistakes import Mistake, noting
from probe_kd.recipe.sections.pairs import Paired
from probe_kd.recipe.yaml_tree import Path_

_UNKNOWN = Pair(Tap(""), Tap(""))  # stands for pairs that could not be read


@dataclass(frozen=True)
class Planned:
    """What one loss compares in one stage, and what brings the two together first."""

    stage: str
    objective: Objective
    comparison: Comparison
    adapter: str


def make_objectives(
    recipe: Recipe, index: int, pairs: Sequence[Pair] | None, body: str
) -> tuple[list[Objective], list[Mistake]]:
    """The objectives of one stage. `body` stands before the student's layers in `between`, where that is a graft."""
    stage = recipe.stages[index]
    objectives: list[Objective] = []
    mistakes: list[Mistake] = []
    for name in stage.losses:
        made, others = _make_objective(recipe, index, name, [_UNKNOWN] if pairs is None else pairs, body)
        objectives += made
        mistakes += others
    if not stage.losses:
        message = f"stage `{stage.name}` has no losses; give at least `losses: {{task: {{loss: cross_entropy}}}}`"
        mistakes.append((("stages", index), message))
    return objectives, mistakes


def _make_objective(
    recipe: Recipe, index: int, name: str, pairs: Sequence[Pair], body: str
) -> tuple[list[Objective], list[Mistake]]:
    options: LossOptions = recipe.stages[index].losses[name]
    where: Path_ = ("stages", index, "losses", name)
    mistakes: list[Mistake] = []
    if name in RESERVED:
        mistakes.append((where, f"a loss cannot be called `{name}`: the metrics have a column of that name"))
    objective: Objective | None = None
    with noting(mistakes, *where, *_place_of_mistake(options)):
        objective = _objective(name, options, pairs, body)
        objective.check_batch(recipe.data.batch_size)
    return [objective] if objective else [], mistakes


def check_sides(recipe: Recipe, index: int, objectives: Sequence[Objective]) -> list[Mistake]:
    """Whether there is a teacher for the losses of a stage that read one or train it."""
    where: Path_ = ("stages", index, "losses")
    mistakes: list[Mistake] = []
    for objective in objectives:
        name = objective.name
        if objective.needs_teacher and recipe.teacher is None:
            message = f"loss `{name}` needs a teacher, and the recipe has no `teacher:`"
            mistakes.append(((*where, name), message))
        elif objective.of == "teacher" and recipe.share is None:
            message = f"loss `{name}` is `of: teacher`, which learns only where both train together; give `share`"
            mistakes.append(((*where, name), message))
    if recipe.share and objectives:
        mistakes += _check_both_train(index, recipe.stages[index], objectives)
    return mistakes


def _check_both_train(index: int, stage: StageOptions, objectives: Sequence[Objective]) -> list[Mistake]:
    where: Path_ = ("stages", index, "losses")
    of = {objective.of for objective in objectives}
    if "teacher" not in of:
        message = (
            f"stage `{stage.name}` trains the teacher too, and has no loss for it; add "
            "`booster: {loss: cross_entropy, of: teacher}`"
        )
        return [(where, message)]
    if of == {"teacher"}:
        return [(where, f"stage `{stage.name}` has no loss for the student; add `light: {{loss: cross_entropy}}`")]
    return []


def _objective(name: str, options: LossOptions, pairs: Sequence[Pair], body: str) -> Objective:
    return Objective(
        options.loss,
        name,
        weight=schedule(options.weight),
        pairs=pairs,
        options=options.options,
        policy=options.policy,
        tokens=options.tokens,
        normalize=options.normalize,
        projector=options.projector,
        activation=options.activation,
        of=options.of,
        between=[[body + end for end in ends] for ends in options.between],
    )


def _place_of_mistake(options: LossOptions) -> list[str]:
    """Of a loss that will be refused: the key where that is seen."""
    if options.loss not in LOSSES:
        return ["loss"]
    known = LOSSES[options.loss]
    given = (options.model_extra or {}).items()
    unfit = (key for key, value in given if not isinstance(value, Mapping) and known.refusal(key, value))
    return [*(key for key, _ in given if key not in known.options), *unfit][:1]


def check_loss_weights(index: int, stage: StageOptions) -> list[Mistake]:
    where: Path_ = ("stages", index, "losses")
    mistakes: list[Mistake] = []
    weights = [schedule(loss.weight) for loss in stage.losses.values()]
    if weights and not any(value_at(weight, epoch, 1) for weight in weights for epoch in (0, 1)):
        mistakes.append((where, f"every loss of stage `{stage.name}` weighs 0, so that it trains nothing"))
    for name, loss in stage.losses.items():
        with suppress(LossError):  # told where the loss is made
            for key, value in {"weight": schedule(loss.weight), **loss.options}.items():
                if isinstance(value, Schedule) and (value.epochs or 0) > stage.epochs:
                    message = f"a schedule of {value.epochs:g} epochs does not end in the {stage.epochs} of its stage"
                    mistakes.append(((*where, name, key, "epochs"), message))
    return mistakes


def check_baseline(recipe: Recipe) -> list[Mistake]:
    losses = [loss.loss for stage in recipe.stages for loss in stage.losses.values()]
    if not recipe.baseline or any(loss in LOSSES and LOSSES[loss].reads == "labels" for loss in losses):
        return []
    message = "the baseline has no loss to train on: no stage has one that reads labels (`cross_entropy`)"
    return [(("baseline",), message)]


def find_adapters(
    recipe: Recipe,
    stages: Sequence[Sequence[Objective]],
    traces: tuple[Trace | None, Trace | None],
    paired: Paired,
    class_map: Sequence[int] | None,
) -> tuple[list[Planned], list[Mistake]]:
    """What brings the two sides of every comparison together, by its text; nothing where the pairs are not known."""
    student, teacher = traces
    planned: list[Planned] = []
    mistakes: list[Mistake] = []
    if student is None or teacher is None or paired.pairs is None:
        return planned, mistakes
    for index, objectives in enumerate(stages):
        for objective in objectives:
            for comparison in objective.comparisons:
                if paired.unknown & {*comparison.pairs}:
                    continue
                where = paired.line_of(comparison) or ("stages", index, "losses", objective.name)
                # Without memory: only what it would be is asked here, and the widths are the recipe's.
                with noting(mistakes, *where), torch.device("meta"):
                    adapter = objective.adapter(comparison, student, teacher, class_map)
                    planned.append(Planned(recipe.stages[index].name, objective, comparison, str(adapter)))
    return planned, mistakes
