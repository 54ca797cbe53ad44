"""The outputs that losses read: vectors, of the right number of classes; and which models classify.

What no loss reads is not checked. So a teacher without a classifier may teach by its features, and a backbone may learn
from them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import get_args

from probe_kd.engine.models import build_on_meta
from probe_kd.engine.spec import FeatureSpec, Side, Tap, Trace
from probe_kd.engine.tracing import trace_named
from probe_kd.errors import ProbeKDError
from probe_kd.methods.naming import localised
from probe_kd.methods.objectives import Objective
from probe_kd.methods.outputs import output_spec
from probe_kd.recipe.keys import ModelOptions, Recipe
from probe_kd.recipe.sections.mistakes import Mistake, noting, of_teacher
from probe_kd.recipe.sections.models import Models, in_body
from probe_kd.recipe.yaml_tree import KeyPath

Stages = Sequence[Sequence[Objective]]
_SHORTENED = ("soft_targets", "hard_labels")  # losses that need only the teacher's largest logits


@dataclass(frozen=True)
class _Read:
    """An output that a loss reads: at which tap of which side, and the key of the recipe that says so.

    `compared` is the tap of the other side that it is compared with; None if the loss reads labels. `multilabel` says
    that this loss reads a label for each class.
    """

    side: Side
    tap: Tap
    loss: str
    place: KeyPath
    compared: Tap | None = None
    multilabel: bool = False


def check_outputs(recipe: Recipe, models: Models, grown: Trace | None, stages: Stages) -> list[Mistake]:
    """Check the outputs that are read of the student and of each teacher, and those that the recipe names."""
    if not recipe.teachers:
        return _check_outputs(recipe, models, grown, stages)
    mistakes: list[Mistake] = []
    for name in recipe.teachers:
        of_one = _check_outputs(recipe.with_only(name), models.with_only(name), grown, _stages_of(stages, name))
        mistakes += of_teacher(name, of_one)
    return list(dict.fromkeys(mistakes))


def _stages_of(stages: Stages, name: str) -> Stages:
    """What one of several teachers takes part in, as if it was the only one."""
    parts = [[localised(objective, name) for objective in stage] for stage in stages]
    return [[part for part in stage if part is not None] for stage in parts]


def _check_outputs(recipe: Recipe, models: Models, grown: Trace | None, stages: Stages) -> list[Mistake]:
    """Check that every output that is read is one vector per image, of the data's classes if these are read.

    Also that every output which the recipe names exists, and that the losses can do with what `cache_top_k` keeps.
    """
    traces = {"student": grown or models.student, "teacher": models.teacher}
    mistakes: list[Mistake] = []
    for read in _outputs_read(recipe, stages):
        trace_ = traces[read.side]
        if trace_ is not None:
            with noting(mistakes, *read.place):
                spec = output_spec(trace_, read.tap, read.side)
                other = traces["teacher" if read.side == "student" else "student"]
                mistakes += _check_classes(recipe, models, read, spec, _spec(other, read.compared))
    mistakes += (
        _check_exits(recipe, models, stages)
        + _check_named(recipe, models)
        + _check_top_k(recipe, models.teacher, stages)
    )
    if recipe.teacher is not None and recipe.teacher.class_map is not None and models.teacher is not None:
        message = "`class_map`: the teacher has no classifier; leave `class_map` out"
        mistakes += [(("teacher", "class_map"), message)] * (not _has_classifier(models.teacher))
    first: dict[KeyPath, str] = {}
    for place, message in mistakes:  # what several losses read is refused once
        first.setdefault(place, message)
    return list(first.items())


def _outputs_read(recipe: Recipe, stages: Stages) -> Iterator[_Read]:
    for index, objectives in enumerate(stages):
        for objective in objectives:
            name, reads = objective.name, objective.resolved.reads
            for side in get_args(Side):
                tap: Tap = getattr(objective.outputs, side)
                place = _place(recipe, index, name, side)
                if reads == "outputs":
                    other = "teacher" if side == "student" else "student"
                    yield _Read(side, tap, name, place, getattr(objective.outputs, other))
                    if objective.reads_labels and side == "student":  # the teacher's may have a class map
                        yield _Read(side, tap, name, place)
                elif reads == "labels" and side == objective.of:
                    yield _Read(side, tap, name, place, multilabel=objective.resolved.multilabel)
    if recipe.teacher is not None and recipe.teacher.train is not None:
        place = ("teacher", "output" if recipe.teacher.output else "model")
        yield _Read("teacher", Tap.parse(recipe.teacher.output), "", place)


def _place(recipe: Recipe, index: int, name: str, side: Side) -> KeyPath:
    """The key that names the tap which a loss reads; the model, if none does."""
    loss, model = recipe.stages[index].losses[name], getattr(recipe, side)
    text = getattr(loss, side)
    if text is not None and not (recipe.teacher and Tap.parse(text).model and Tap.parse(text).local == Tap("")):
        return ("stages", index, "losses", name, side)
    return (side, "output") if model is not None and model.output else (side, "model")


def _spec(trace_: Trace | None, tap: Tap | None) -> FeatureSpec | None:
    """The spec of a tap that yields a vector; None for any other."""
    with suppress(ProbeKDError):
        return output_spec(trace_, tap, "") if trace_ is not None and tap is not None else None
    return None


def _check_classes(
    recipe: Recipe, models: Models, read: _Read, spec: FeatureSpec, compared: FeatureSpec | None
) -> list[Mistake]:
    """Check the width of an output that is read beside labels, or compared with an output of the data's classes."""
    classes, teacher = models.classes, recipe.teacher
    mapped = teacher is not None and teacher.class_map is not None
    of_classes = read.compared is None or (compared is not None and compared.channels == classes and not mapped)
    if read.multilabel and recipe.data.labels == "class" and classes == 2:
        return _check_one_output(read, spec)
    if not classes or spec.channels == classes or not of_classes:
        return []
    if read.place[-1] != "model":
        message = (
            f"the {read.side}'s tap '{read.tap}' yields {spec.channels} numbers, and {_reader(read)} reads {classes} "
            "classes there; name a tap of the classifier"
        )
        return [(read.place, message)]
    if read.side == "teacher":
        return [(read.place, _other_classes_of_teacher(models, read, spec.channels))]
    return [(("student", "model_kwargs"), _other_classes_of_student(recipe, models, read, spec.channels))]


def _check_exits(recipe: Recipe, models: Models, stages: Stages) -> list[Mistake]:
    """Check that the pairs of `ofa_exits` end at an output of the teacher that has the data's classes."""
    mistakes: list[Mistake] = []
    if models.teacher is None or recipe.teacher is None or not models.classes:
        return mistakes
    is_mapped = recipe.teacher.class_map is not None
    for index, objectives in enumerate(stages):
        for objective in (item for item in objectives if item.loss == "ofa_exits"):
            place: KeyPath = ("stages", index, "losses", objective.name)
            for pair in objective.pairs:
                message = _why_other_classes(models.classes, models.teacher, pair.teacher, is_mapped)
                mistakes += [(place, f"loss `{objective.name}` (ofa_exits) {message}")] * bool(message)
    return mistakes


def _why_other_classes(classes: int, teacher: Trace, tap: Tap, is_mapped: bool) -> str:
    """Why a tap of the teacher does not yield these classes; empty if it does, or does not exist."""
    spec, is_output = _spec(teacher, tap), tap.local == Tap("")
    if spec is not None and (spec.channels == classes or (is_output and is_mapped)):
        return ""
    with suppress(ProbeKDError):  # a tap that does not exist is a mistake of its own
        shape = "x".join(map(str, (spec or teacher[tap]).shape[1:]))
        if is_output:
            return (
                f"learns the data's {classes} classes, and the teacher's output yields {shape} numbers an image; give "
                "a `class_map` with its index of each of the data's classes"
            )
        return (
            f"learns the data's {classes} classes, and the teacher's tap '{tap}' yields {shape} numbers an image; pair "
            'the layers with its output, as in `pairs: {blocks.2: ""}`'
        )
    return ""


def _check_one_output(read: _Read, spec: FeatureSpec) -> list[Mistake]:
    """Check that a loss of labels for each class, where images have one of two classes, reads one output."""
    if spec.channels == 1:
        return []
    message = (
        f"loss `{read.loss}` reads one output that tells two classes, and the {read.side} yields {spec.channels}; give "
        "it one (`model_kwargs: {num_classes: 1}`), or take `cross_entropy`"
    )
    place = (read.side, "model_kwargs") if read.place[-1] == "model" else read.place
    return [(place, message)]


def _reader(read: _Read) -> str:
    return f"loss `{read.loss}`" if read.loss else "`train`"


def _other_classes_of_student(recipe: Recipe, models: Models, read: _Read, width: int) -> str:
    if not _has_classifier(models.student):
        return (
            f"the student has no classifier, and {_reader(read)} reads {models.classes} classes where it yields "
            f"{width} numbers; leave `num_classes` out"
        )
    message = f"the student's classifier has {width} classes and the data {models.classes}; leave `num_classes` out"
    if recipe.student.checkpoint or recipe.student.pretrained:
        message += ", and give `new_classifier: true` where its weights have others"
    return message


def _other_classes_of_teacher(models: Models, read: _Read, width: int) -> str:
    if not _has_classifier(models.teacher):
        return (
            f"the teacher has no classifier, and {_reader(read)} reads {models.classes} classes where it yields "
            f"{width} numbers; "
            + (
                "leave the loss out, and let it teach by its features (`hint`)"
                if read.loss
                else "leave `num_classes` out, or leave `train` out and let it teach by its features (`hint`)"
            )
        )
    return (
        f"the teacher's classifier has {width} classes and the data {models.classes}; give a `class_map` with its "
        "index of each of the data's classes, or `train: {epochs: ...}`, which gives it a new classifier and trains "
        "it on these data"
    )


def _has_classifier(trace_: Trace | None) -> bool:
    """Whether a model ends in a classifier, as far as it says so: timm's have `num_classes`, 0 for a backbone."""
    if trace_ is None:
        return False
    classes = trace_.model_kwargs.get("num_classes")
    if classes is None:
        classes = getattr(build_on_meta(trace_.model, trace_.model_kwargs), "num_classes", None)
    return classes != 0


def _check_named(recipe: Recipe, models: Models) -> list[Mistake]:
    """Check that the `output` of a model, if it names a tap, yields a vector in training and in evaluation."""
    mistakes: list[Mistake] = []
    for side in get_args(Side):
        options, trace_ = getattr(recipe, side), getattr(models, side)
        if options is not None and options.output and trace_ is not None:
            with noting(mistakes, side, "output"):
                output_spec(trace_, Tap.parse(options.output), side)
                _measured_output(options, trace_, side)
    return mistakes


def _check_top_k(recipe: Recipe, teacher: Trace | None, stages: Stages) -> list[Mistake]:
    options = recipe.teacher
    if options is None or options.cache_top_k is None:
        return []
    objectives = [objective for stage in stages for objective in stage]
    shortened = {
        objective.outputs.teacher: None for objective in objectives if objective.resolved.reads == "outputs"
    } or {Tap.parse(options.output): None}
    reasons = [
        f"loss `{objective.name}` ({objective.loss_name}) needs all logits; only {' and '.join(_SHORTENED)} do not"
        for objective in objectives
        if {*objective.taps[1]} & {*shortened} and objective.needs_teacher and objective.loss not in _SHORTENED
    ]
    reasons += [
        f"the teacher has {spec.channels} logits, got {options.cache_top_k}"
        for spec in (_spec(teacher, tap) for tap in shortened)
        if spec is not None and options.cache_top_k > spec.channels
    ]
    return [(("teacher", "cache_top_k"), f"`cache_top_k`: {reason}") for reason in reasons]


def _measured_output(options: ModelOptions, trace_: Trace, side: Side) -> FeatureSpec:
    """The output on which a model is measured, as it is in eval mode: of several, the first, unless one is named.

    A model whose output is plain in training is traced once more only if it is not timm's. Raises the errors of
    `output_spec`.
    """
    tap = Tap.parse(options.output)
    plain = tap == Tap("") and ":" not in trace_.model and any(spec.tap == tap for spec in trace_.specs)
    seen = trace_
    if trace_.training and not plain:
        seen = trace_named(trace_.model, trace_.input_size, model_kwargs=dict(trace_.model_kwargs))
    if tap == Tap("") and not any(spec.tap == tap for spec in seen.specs):
        tap = seen.output.tap
    return output_spec(seen, tap, side)


def roles_that_classify(
    recipe: Recipe, models: Models, grown: Trace | None, stages: Stages, class_maps: Mapping[str, Sequence[int]]
) -> dict[str, Tap]:
    """The roles of the models whose accuracy means something, and the outputs that it is measured on.

    The roles are `student`, `teacher`, or `teacher NAME` of several.
    """
    if not recipe.teachers:
        sides = _sides_that_classify(recipe, models, grown, stages, class_maps.get(""))
        return {side: output for side, output in sides.items()}  # noqa: C416 - of roles, which are any text
    roles: dict[str, Tap] = {}
    for name in recipe.teachers:
        alone = recipe.with_only(name), models.with_only(name)
        sides = _sides_that_classify(*alone, grown, _stages_of(stages, name), class_maps.get(name))
        roles |= {role_of_teacher(name) if side == "teacher" else side: output for side, output in sides.items()}
    return roles


def role_of_teacher(name: str) -> str:
    """The role of a teacher in a run, as in `teacher dino`; a single one has no name."""
    return f"teacher {name}".strip()


def _sides_that_classify(
    recipe: Recipe, models: Models, grown: Trace | None, stages: Stages, class_map: Sequence[int] | None
) -> dict[Side, Tap]:
    """The sides whose accuracy means something, and the outputs that it is measured on.

    Labels are classes, and the output of the model is a vector of these. The teacher classifies if it is trained on the
    labels, or has weights with a classifier; the student if a loss reads labels, or compares its classes with those of
    such a teacher: features that are as many as the classes are none.
    """
    classes, teacher = models.classes, recipe.teacher
    if not classes:
        return {}
    widths = {classes, 1} if classes == 2 and recipe.data.labels == "class" else {classes}  # one output tells two
    trains = teacher is not None and (teacher.train is not None or recipe.share is not None)
    has_classes = trains or _has_classifier(models.teacher)
    sides: dict[Side, Tap] = {}
    measured = _measured(recipe.student, models.student, "student")
    if models.student is not None and measured is not None and measured.channels in widths:
        trained, output = grown or models.student, in_body(Tap.parse(recipe.student.output), "body." if grown else "")
        objectives = [objective for stage in stages for objective in stage]
        if not has_classes:
            objectives = [objective for objective in objectives if objective.resolved.reads == "labels"]
        if any(_reads_classes(objective, trained, output, widths) for objective in objectives):
            sides["student"] = measured.tap
    measured = _measured(teacher, models.teacher, "teacher")
    if teacher is not None and measured is not None:
        width = measured.channels if class_map is None else len(class_map)
        if width in widths and has_classes:
            sides["teacher"] = measured.tap
    return sides


def _measured(options: ModelOptions | None, trace_: Trace | None, side: Side) -> FeatureSpec | None:
    """The output on which a model is measured; None if it is no vector."""
    with suppress(ProbeKDError):
        return _measured_output(options, trace_, side) if options is not None and trace_ is not None else None
    return None


def _reads_classes(objective: Objective, student: Trace, output: Tap, widths: set[int]) -> bool:
    """Whether a loss reads the student's classes: beside labels, beside the teacher's, or as the layer of a pair."""
    if objective.resolved.reads == "labels":
        return objective.of == "student"
    specs = [spec for spec in (_spec(student, tap) for tap in objective.taps[0]) if spec is not None]
    if objective.resolved.reads == "outputs":
        return any(spec.channels in widths for spec in specs)
    measured = _spec(student, output)
    return measured is not None and any(spec.tensor == measured.tensor for spec in specs)
