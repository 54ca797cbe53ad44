"""`stages.N.losses`: make an objective of each loss, and the adapters of its comparisons."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from probe_kd.data.datasets import Datasets
from probe_kd.engine.spec import Pair, Schedule, Share, Tap, Trace, Traces, value_at
from probe_kd.errors import LossError
from probe_kd.methods.dropping import TeacherDropping
from probe_kd.methods.fitting import refuse_moving_target
from probe_kd.methods.naming import compared_alone, name_teachers
from probe_kd.methods.objectives import Comparison, Objective
from probe_kd.methods.shares import task_of
from probe_kd.methods.targets import make_adapter
from probe_kd.recipe.keys import RESERVED, LossOptions, Recipe, StageOptions, schedule
from probe_kd.recipe.loss_names import is_custom, loss_of, losses_in
from probe_kd.recipe.sections.labels import with_class_weights
from probe_kd.recipe.sections.mistakes import Mistake, noting
from probe_kd.recipe.sections.models import in_body
from probe_kd.recipe.sections.pairs import AllPaired
from probe_kd.recipe.yaml_tree import KeyPath

_UNKNOWN = Pair(Tap(""), Tap(""))  # stands for pairs that could not be determined


@dataclass(frozen=True)
class Planned:
    """A comparison of one loss in one stage, with its adapter as text."""

    stage: str
    objective: Objective
    comparison: Comparison
    adapter: str


def make_objectives(
    recipe: Recipe, index: int, paired: AllPaired | None, body: str, datasets: Datasets | None = None
) -> tuple[list[Objective], list[Mistake]]:
    """The objectives of one stage. `body` is the prefix of the student's layers in `between`, if it is a graft.

    `paired` is None if no pairs could be determined. `datasets` give the numbers of class weights.
    """
    stage = recipe.stages[index]
    objectives: list[Objective] = []
    mistakes: list[Mistake] = []
    for name in stage.losses:
        pairs = paired.of(index, name).compared if paired else None
        compared = [_UNKNOWN] if pairs is None else pairs
        of_loss, more = _make_objective(recipe, index, name, compared, body, datasets)
        objectives += of_loss
        mistakes += more
    if not stage.losses:
        message = f"stage `{stage.name}` has no losses; give at least `losses: {{task: {{loss: cross_entropy}}}}`"
        mistakes.append((("stages", index), message))
    return objectives, mistakes


def _make_objective(
    recipe: Recipe, index: int, name: str, pairs: Sequence[Pair], body: str, datasets: Datasets | None
) -> tuple[list[Objective], list[Mistake]]:
    options: LossOptions = recipe.stages[index].losses[name]
    place: KeyPath = ("stages", index, "losses", name)
    mistakes: list[Mistake] = []
    if name in RESERVED:
        mistakes.append((place, f"a loss cannot be called `{name}`: the metrics have a column of that name"))
    if is_custom(options.loss) and loss_of(options) is None:
        return [], mistakes  # `import_losses` has said why
    objective: Objective | None = None
    with noting(mistakes, *place, *_key_to_blame(options)):
        arguments = with_class_weights(options, datasets)
        objective = _objective(recipe, name, options, pairs, body, arguments)
        objective.check_batch(recipe.data.batch_size)
    return [objective] if objective else [], mistakes


def resolve_teachers(
    recipe: Recipe,
    index: int,
    objectives: Sequence[Objective],
    traces: tuple[Trace | None, Traces | None],
    class_maps: Mapping[str, Sequence[int]],
) -> tuple[list[Objective], list[Mistake]]:
    """The objectives with the names of the teachers whose outputs they read, and with the teachers' weights."""
    student, teachers = traces
    if not recipe.teachers or student is None or teachers is None:
        return list(objectives), []
    weights = {name: teacher.weight for name, teacher in recipe.teachers.items()}
    outputs = {name: Tap.parse(teacher.output) for name, teacher in recipe.teachers.items()}
    resolved: list[Objective] = []
    mistakes: list[Mistake] = []
    for objective in objectives:
        given = recipe.stages[index].losses[objective.name].teacher is not None
        place: KeyPath = ("stages", index, "losses", objective.name, *(["teacher"] if given else []))
        with noting(mistakes, *place):
            resolved += name_teachers(
                [objective], student, teachers, class_maps=class_maps, weights=weights, outputs=outputs
            )
    return resolved, mistakes


def check_dropping(recipe: Recipe, index: int, objectives: Sequence[Objective]) -> list[Mistake]:
    """Check that `teacher_dropping` has several teachers to choose from."""
    stage = recipe.stages[index]
    if stage.teacher_dropping is None or len(objectives) < len(stage.losses):
        return []
    mistakes: list[Mistake] = []
    with noting(mistakes, "stages", index, "teacher_dropping"):
        TeacherDropping(compared_alone(objectives), stage.teacher_dropping, recipe.seed)
    return mistakes


def check_shares(recipe: Recipe, index: int, objectives: Sequence[Objective]) -> list[Mistake]:
    """Check of which loss the weights are a share, and that `keep: best` compares losses of equal weights."""
    stage = recipe.stages[index]
    mistakes: list[Mistake] = []
    for position, objective in enumerate(objectives if len(objectives) == len(stage.losses) else ()):
        share = objective.weight
        if not isinstance(share, Share):
            continue
        place: KeyPath = ("stages", index, "losses", objective.name, "weight")
        with noting(mistakes, *place, *(["of"] if share.of else [])):
            task_of(objectives, position)
        if share.follow and stage.keep == "best":
            message = (
                "`follow` changes the weight, so `keep: best` would compare losses of unlike weights; leave one out"
            )
            mistakes.append(((*place, "follow"), message))
    return mistakes


def check_sides(recipe: Recipe, index: int, objectives: Sequence[Objective]) -> list[Mistake]:
    """Check that losses that read or train a teacher have one, and with `share` that both models are trained."""
    place: KeyPath = ("stages", index, "losses")
    mistakes: list[Mistake] = []
    for objective in objectives:
        name = objective.name
        if objective.needs_teacher and not recipe.teachers_by_name:
            message = f"loss `{name}` needs a teacher, and the recipe has no `teacher:`"
            mistakes.append(((*place, name), message))
        elif objective.of == "teacher" and recipe.share is None:
            message = f"loss `{name}` is `of: teacher`, which learns only where both train together; give `share`"
            mistakes.append(((*place, name), message))
        elif _copies_sharded_classifier(recipe, objective):
            message = (
                f"loss `{name}` keeps a copy of the teacher's classifier, which no process has whole with `shard`; "
                "leave one of the two out"
            )
            mistakes.append(((*place, name), message))
    if recipe.share and objectives:
        mistakes += _check_both_train(index, recipe.stages[index], objectives)
    return mistakes


def _copies_sharded_classifier(recipe: Recipe, objective: Objective) -> bool:
    names = {pair.teacher.model for pair in objective.pairs}
    sharded = [name for name, teacher in recipe.teachers_by_name.items() if teacher.shard]
    return "classifier" in objective.resolved.needs and any(name in names or names == {""} for name in sharded)


def _check_both_train(index: int, stage: StageOptions, objectives: Sequence[Objective]) -> list[Mistake]:
    place: KeyPath = ("stages", index, "losses")
    trained = {objective.of for objective in objectives}
    if "teacher" not in trained:
        message = (
            f"stage `{stage.name}` trains the teacher too, and has no loss for it; add "
            "`booster: {loss: cross_entropy, of: teacher}`"
        )
        return [(place, message)]
    if trained == {"teacher"}:
        return [(place, f"stage `{stage.name}` has no loss for the student; add `light: {{loss: cross_entropy}}`")]
    return []


def _objective(
    recipe: Recipe, name: str, options: LossOptions, pairs: Sequence[Pair], body: str, arguments: Mapping[str, Any]
) -> Objective:
    student_tap, teacher_tap = _taps(recipe, options)
    custom = loss_of(options) if is_custom(options.loss) else None
    return Objective(
        custom or options.loss,
        name,
        weight=schedule(options.weight),
        pairs=pairs,
        options=arguments,
        policy=options.policy,
        tokens=options.tokens,
        normalize=options.normalize,
        projector=options.projector,
        activation=options.activation,
        grid=options.grid,
        of=options.of,
        between=[[body + end for end in ends] for ends in options.between],
        student=in_body(student_tap, body),
        teacher=teacher_tap,
    )


def _taps(recipe: Recipe, options: LossOptions) -> tuple[Tap, Tap]:
    """The taps that a loss reads: those that it names, else the outputs of the models that it reads."""
    loss = loss_of(options)
    reads = loss.reads if loss else ""
    by_default = {"outputs": ("student", "teacher"), "labels": (options.of,)}.get(reads, ())
    texts = {"student": options.student, "teacher": options.teacher}
    models = {"student": recipe.student, "teacher": recipe.teacher}
    for side in by_default:
        model = models[side]
        if texts[side] is None and model is not None:
            texts[side] = model.output
    return Tap.parse(texts["student"] or ""), Tap.parse(texts["teacher"] or "")


def _key_to_blame(options: LossOptions) -> list[str]:
    """The key of a loss that causes its error; empty if no single one does."""
    loss = loss_of(options)
    if loss is None:
        return ["loss"]
    given = (options.model_extra or {}).items()
    refused = (key for key, value in given if not isinstance(value, Mapping) and loss.refusal(key, value))
    return [*(key for key, _ in given if key not in loss.options), *refused][:1]


def check_loss_weights(index: int, stage: StageOptions) -> list[Mistake]:
    place: KeyPath = ("stages", index, "losses")
    mistakes: list[Mistake] = []
    weights = [schedule(loss.weight) for loss in stage.losses.values()]
    if weights and not any(value_at(weight, epoch, 1) for weight in weights for epoch in (0, 1)):
        mistakes.append((place, f"every loss of stage `{stage.name}` weighs 0, so that it trains nothing"))
    for name, loss in stage.losses.items():
        with suppress(LossError):  # reported where the objective is made
            for key, value in {"weight": schedule(loss.weight), **loss.options}.items():
                if isinstance(value, Schedule) and (value.epochs or 0) > stage.epochs:
                    message = f"a schedule of {value.epochs:g} epochs does not end in the {stage.epochs} of its stage"
                    mistakes.append(((*place, name, key, "epochs"), message))
    return mistakes


def check_baseline(recipe: Recipe) -> list[Mistake]:
    losses = [loss_of(options) for _, options in losses_in(recipe)]
    if not recipe.baseline or any(loss is not None and loss.reads == "labels" for loss in losses):
        return []
    if recipe.data.labels == "none":
        message = "the baseline learns from labels alone, and `data: {labels: none}` has none; leave `baseline` out"
        return [(("baseline",), message)]
    message = "the baseline has no loss to train on: no stage has one that reads labels (`cross_entropy`)"
    return [(("baseline",), message)]


def find_adapters(
    recipe: Recipe,
    stages: Sequence[Sequence[Objective]],
    traces: tuple[Trace | None, Traces | None],
    paired: AllPaired,
    class_maps: Mapping[str, Sequence[int]],
) -> tuple[list[Planned], list[Mistake]]:
    """The adapter of every comparison, as text. Empty if models or pairs could not be determined."""
    student, teacher = traces
    planned: list[Planned] = []
    mistakes: list[Mistake] = []
    if student is None or teacher is None or not paired.is_known:
        return planned, mistakes
    for index, objectives in enumerate(stages):
        for objective in objectives:
            of_loss = paired.of(index, objective.name)
            for comparison in objective.comparisons:
                if of_loss.unknown & {*comparison.pairs}:
                    continue
                place = of_loss.line_of(comparison) or ("stages", index, "losses", objective.name)
                # The meta device needs no memory, however wide the layers are. Only the adapter's text is needed.
                with noting(mistakes, *place), torch.device("meta"):
                    adapter = make_adapter(objective, comparison, student, teacher, class_maps)
                    if recipe.share:
                        refuse_moving_target(adapter)
                    planned.append(Planned(recipe.stages[index].name, objective, comparison, str(adapter)))
    return planned, mistakes
