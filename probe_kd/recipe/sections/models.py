"""`student` and `teacher`: both are traced without weights, and their weights, classes and inputs are checked."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from probe_kd.data.record import DataRecord
from probe_kd.engine.models import build_on_meta, check_import, check_kwargs, checkpoint_gradients
from probe_kd.engine.spec import InputSpec, Tap, Trace
from probe_kd.engine.tracing import trace
from probe_kd.engine.weights import classifiers, load_weights, read_weights
from probe_kd.errors import TraceError, WeightsError, nearest
from probe_kd.files.atomic import read_text, reason
from probe_kd.methods.adapters import check_class_map, check_logits
from probe_kd.methods.losses.table import LOSSES
from probe_kd.recipe.keys import ModelOptions, Recipe, TeacherOptions, classifier_of
from probe_kd.recipe.sections.mistakes import Mistake, noting

Side = Literal["student", "teacher"]


@dataclass(frozen=True)
class Models:
    """The traces of both models, as far as they could be made, and how many classes the data have, where known."""

    student: Trace | None
    teacher: Trace | None
    classes: int | None


def trace_models(recipe: Recipe, classes: int | None, allow_import: Sequence[str]) -> tuple[Models, list[Mistake]]:
    size, teacher = recipe.data.input_size, recipe.teacher
    student, mistakes = _trace("student", recipe.student, size, classes, allow_import, training=True)
    if teacher is None:
        return Models(student, None, classes), mistakes
    of_data = classes if teacher.class_map is None or teacher.train else None
    known, others = _trace(
        "teacher", teacher, teacher.input_size or size, of_data, allow_import, training=recipe.share is not None
    )
    return Models(student, known, classes), mistakes + others


def _trace(
    side: Side,
    model: ModelOptions,
    size: tuple[int, int, int],
    classes: int | None,
    allow_import: Sequence[str],
    *,
    training: bool,
) -> tuple[Trace | None, list[Mistake]]:
    kwargs = dict(model.model_kwargs)
    if classes is not None and not (side == "teacher" and model.pretrained and not getattr(model, "train", None)):
        kwargs.setdefault("num_classes", classes)  # a pretrained teacher keeps its head, if it is not trained on
    if size[0] != 3:
        kwargs.setdefault("in_chans", size[0])
    mistakes = check_name(side, model, allow_import) or _wrong_kwargs(side, model)
    if mistakes:
        return None, mistakes
    with noting(mistakes, side, "model"):
        found = trace(model.model, size, training=training, model_kwargs=kwargs)
        if model.grad_checkpointing:
            found = _trace_checkpointing(found)
        _check_output(found, side)
        return found, []
    return None, mistakes


def check_name(side: Side, model: ModelOptions, allow_import: Sequence[str]) -> list[Mistake]:
    mistakes: list[Mistake] = []
    with noting(mistakes, side, "model"):
        check_import(model.model, allow_import)
        check_kwargs(model.model, {})
    return mistakes


def _wrong_kwargs(side: Side, model: ModelOptions) -> list[Mistake]:
    """Each argument that the model does not take, at its own line."""
    mistakes: list[Mistake] = []
    for name, value in model.model_kwargs.items():
        with noting(mistakes, side, "model_kwargs", name):
            check_kwargs(model.model, {name: value})
    return mistakes


def _trace_checkpointing(found: Trace) -> Trace:
    """The trace of a model that runs its layers as gradient checkpointing does. Raises TraceError where it cannot."""
    model = build_on_meta(found.model, found.model_kwargs)
    checkpoint_gradients(model, found.model)
    seen = trace(model, found.input_size, training=found.training)
    return replace(seen, model=found.model, model_kwargs=found.model_kwargs)


def _check_output(trace_: Trace, side: Side) -> None:
    """The losses read one tensor, of one row of classes an image. Raises TraceError or AdapterError."""
    outputs = [spec.tap for spec in trace_.specs if spec.tap.is_output]
    if outputs != [Tap("")]:
        given = f"gives several tensors ({', '.join(map(str, outputs))})" if outputs else "gives no tensor"
        raise TraceError(
            f"the {side} {trace_.model} {given}; a loss reads one: wrap it in a module that returns the logits"
        )
    check_logits(trace_.output, side)


def check_student(recipe: Recipe, models: Models) -> list[Mistake]:
    student, classes = models.student, models.classes
    if student is None or classes is None or student.output.channels == classes:
        return []
    message = (
        f"the student's classifier has {student.output.channels} classes and the data {classes}; leave "
        "`num_classes` out"
    )
    if recipe.student.checkpoint or recipe.student.pretrained:
        message += ", and give `new_classifier: true` where its weights have others"
    return [(("student", "model_kwargs"), message)]


def check_teacher(recipe: Recipe, models: Models) -> list[Mistake]:
    teacher, trace_, classes = recipe.teacher, models.teacher, models.classes
    if teacher is None:
        return []
    mistakes = _check_cache(recipe, teacher, trace_)
    if recipe.share and teacher.train:
        message = "with `share` the stages train the teacher too, alone and with the student; leave `train` out"
        mistakes.append((("teacher", "train"), message))
    if not (teacher.pretrained or teacher.checkpoint or teacher.train or recipe.share):
        message = "the teacher has random weights; give `pretrained: true`, a `checkpoint`, or `train: {epochs: ...}`"
        mistakes.append((("teacher", "model"), message))
    if trace_ and classes is not None and trace_.output.channels != classes and teacher.class_map is None:
        message = (
            f"the teacher's classifier has {trace_.output.channels} classes and the data {classes}; give a "
            "`class_map` with its index of each of the data's classes, or `train: {epochs: ...}`, which gives "
            "it a new classifier and trains it on these data"
        )
        mistakes.append((("teacher", "model"), message))
    return mistakes


def _check_cache(recipe: Recipe, teacher: TeacherOptions, trace_: Trace | None) -> list[Mistake]:
    whys = []
    if teacher.cache and (why := _unwritable(Path(teacher.cache))):
        whys.append(("cache", why))
    if trace_ and teacher.cache_top_k and teacher.cache_top_k > trace_.output.channels:
        whys.append(("cache_top_k", f"the teacher has {trace_.output.channels} logits, got {teacher.cache_top_k}"))
    if teacher.cache and recipe.share:
        whys.append(("cache", "the teacher trains too, so what it gave before is not what it gives now"))
    if teacher.cache and recipe.data.mixes:
        whys.append(("cache", "mixup and cutmix make a new image of every two, which no cache has seen"))
    if teacher.cache_top_k and not teacher.cache:
        whys.append(("cache_top_k", "it says what a cache keeps; give the folder as `cache` too"))
    if teacher.cache_top_k:
        losses = [item for stage in recipe.stages for item in stage.losses.items()]
        whys += [
            ("cache_top_k", f"loss `{name}` ({loss.loss}) needs all logits; only soft_targets does not")
            for name, loss in losses
            if loss.loss in LOSSES and LOSSES[loss.loss].reads == "outputs" and loss.loss != "soft_targets"
        ]
    return [(("teacher", key), f"`{key}`: {why}") for key, why in whys]


def _unwritable(folder: Path) -> str:
    """Why a folder cannot be made or written, as far as that is seen without trying; else empty."""
    try:
        there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    except (OSError, ValueError) as refusal:  # a path that no system takes
        return f"no folder can be called {str(folder)[:80]!r}: {reason(refusal)}"
    if not there.is_dir():
        return f"{str(there)!r} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{str(there)!r} cannot be written"


def check_weights(
    recipe: Recipe, side: Side, trace_: Trace | None, record: DataRecord | None
) -> tuple[list[str], list[Mistake]]:
    """A sentence for a classifier that is new, and what is wrong with the weights that the recipe names.

    The weights of a model that the run of `record` trained are its own, wherever they came from.
    """
    model: ModelOptions | None = getattr(recipe, side)
    if model is None:
        return [], []
    told, mistakes = _check_new_classifier(recipe, side, model, trace_)
    if model.checkpoint is None:
        return told, mistakes
    if record is not None and (side == "student" or recipe.share or getattr(model, "train", None)):
        return told, mistakes
    path = Path(model.checkpoint)
    if not path.is_file():
        near = nearest(path.name, [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else [])
        mistakes.append(((side, "checkpoint"), f"there is no checkpoint {model.checkpoint!r}{near}"))
    elif trace_ is not None:
        with noting(mistakes, side, "checkpoint"):
            told += _new_classifier(side, trace_, _try_checkpoint(recipe, side, model, trace_), path.name)
    return told, mistakes


def _try_checkpoint(recipe: Recipe, side: Side, model: ModelOptions, trace_: Trace) -> list[str]:
    """The names of the classifier's weights that are left new. Raises WeightsError for weights that do not fit."""
    assert model.checkpoint is not None
    meta = build_on_meta(trace_.model, trace_.model_kwargs)
    try:
        return load_weights(meta, model.checkpoint, classifier_of(model))
    except WeightsError as refusal:
        raise WeightsError(f"{refusal}{_of_other_classes(recipe, side, model, meta)}") from None


def _of_other_classes(recipe: Recipe, side: Side, model: ModelOptions, meta: nn.Module) -> str:
    """What can be done about a checkpoint that differs in its classifier alone; empty for any other."""
    assert model.checkpoint is not None
    try:
        left = load_weights(meta, model.checkpoint, "new where other")
        found = [read_weights(model.checkpoint).get(name) for name in left]
    except WeightsError:
        return ""
    classes = next((len(tensor) for tensor in found if tensor is not None and tensor.ndim), 0)
    new = "`new_classifier: true` lets all else be the checkpoint's and a new classifier be trained"
    if side == "student" or recipe.share:
        return f"; {new}"
    new = "`train: {epochs: ...}` gives it a new classifier of the data's classes (always, by `new_classifier: true`)"
    if not classes:
        return f"; {new}"
    as_it_is = f"`model_kwargs: {{num_classes: {classes}}}` keeps the checkpoint's own {classes} classes"
    if getattr(model, "class_map", None) is None:
        as_it_is += ", with a `class_map` of its index of each of the data's classes"
        return f"; {as_it_is}; or {new}"
    return f"; {as_it_is}, which the `class_map` then is of"


def _check_new_classifier(
    recipe: Recipe, side: Side, model: ModelOptions, trace_: Trace | None
) -> tuple[list[str], list[Mistake]]:
    where = (side, "new_classifier")
    if not model.new_classifier:
        return [], []
    if not (model.checkpoint or model.pretrained):
        return [], [(where, "`new_classifier`: the model has no weights, so that all of it is new; leave it out")]
    if side == "teacher" and not (getattr(model, "train", None) or recipe.share):
        message = "a new classifier of a teacher that is not trained answers at random; give `train: {epochs: ...}`"
        return [], [(where, message)]
    if model.checkpoint or trace_ is None:
        return [], []
    mistakes: list[Mistake] = []
    with noting(mistakes, *where):
        names = classifiers(build_on_meta(trace_.model, trace_.model_kwargs))
        return _new_classifier(side, trace_, names, "timm"), []
    return [], mistakes


def _new_classifier(side: Side, trace_: Trace, names: Sequence[str], source: str) -> list[str]:
    modules = ", ".join(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in names))
    told = (
        f"the {side} gets a new classifier ({modules}) of {trace_.output.channels} classes; all else is that of "
        f"{source}"
    )
    return [told] * bool(names)


def read_class_map(recipe: Recipe, models: Models) -> tuple[tuple[int, ...] | None, list[Mistake]]:
    options, where = recipe.teacher, ("teacher", "class_map")
    if options is None or options.class_map is None:
        return None, []
    if options.train or recipe.share:
        return None, [(where, "a teacher that is trained here has the data's classes; leave `class_map` out")]
    mistakes: list[Mistake] = []
    with noting(mistakes, *where):
        found = _read_class_map(options.class_map) if isinstance(options.class_map, str) else options.class_map
        if models.student is not None and models.teacher is not None and models.classes is not None:
            check_class_map(found, models.student.output.channels, models.teacher.output.channels)
        return tuple(found), []
    return None, mistakes


def _read_class_map(path: str) -> list[int]:
    try:
        found = json.loads(read_text(Path(path)))
    except (OSError, ValueError, RecursionError) as refusal:
        raise WeightsError(f"cannot read the class map {path!r}: {reason(refusal)}") from None
    if not isinstance(found, list) or not all(type(index) is int for index in found):
        raise WeightsError(f"the class map {path!r} is not a JSON list of whole numbers")
    return found


def check_inputs(recipe: Recipe, models: Models) -> list[Mistake]:
    """Whether the numbers that normalise the images fit the models."""
    mistakes: list[Mistake] = []
    with noting(mistakes, "data"):
        if models.student is not None:
            input_of_student(recipe, models.student)
    with noting(mistakes, "teacher"):
        if models.teacher is not None:
            input_of_teacher(recipe, models.teacher)
    return mistakes


def input_of_student(recipe: Recipe, student: Trace) -> InputSpec:
    data = recipe.data
    return _input_spec(student, data.input_size, data.mean, data.std)


def input_of_teacher(recipe: Recipe, teacher: Trace) -> InputSpec:
    assert recipe.teacher is not None
    return _input_spec(teacher, teacher.input_size, recipe.teacher.mean, recipe.teacher.std)


def _input_spec(
    trace_: Trace, size: tuple[int, int, int], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> InputSpec:
    """The recipe's numbers, else those of timm's config for this model."""
    own = InputSpec.of(build_on_meta(trace_.model, trace_.model_kwargs), size)
    return InputSpec(size, mean or own.mean, std or own.std)
