"""`student` and `teacher`: trace both without weights, and check their weights, classes and inputs."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from probe_kd.data.record import DataRecord
from probe_kd.engine.foreign import library_of
from probe_kd.engine.models import build_on_meta, check_import, check_kwargs, checkpoint_gradients
from probe_kd.engine.sharding import why_unsupported
from probe_kd.engine.spec import InputSpec, Side, Tap, Trace, Traces
from probe_kd.engine.tracing import trace, trace_named
from probe_kd.engine.weights import classifiers, load_weights, read_weights
from probe_kd.errors import AdapterError, ProbeKDError, TapError, TraceError, WeightsError, nearest
from probe_kd.files.atomic import read_text, reason
from probe_kd.methods.adapters import check_class_map
from probe_kd.methods.outputs import output_spec
from probe_kd.recipe.keys import ModelOptions, Recipe, TeacherOptions, classifier_of
from probe_kd.recipe.loss_names import loss_of, losses_in
from probe_kd.recipe.sections.mistakes import Mistake, naming, noting, of_teacher


@dataclass(frozen=True)
class Models:
    """The traces of all models and the number of the data's classes; None for what could not be determined.

    `teachers` has the traces by name. That of a single teacher, without a name, is `teacher`.
    """

    student: Trace | None = None
    teachers: Mapping[str, Trace | None] = field(default_factory=dict)
    classes: int | None = None

    @property
    def teacher(self) -> Trace | None:
        return self.teachers.get("")

    @property
    def traces(self) -> Traces | None:
        """The traces of the teachers; None if there are none, or if one of them could not be made."""
        traces = {name: trace_ for name, trace_ in self.teachers.items() if trace_ is not None}
        return Traces(traces) if traces and len(traces) == len(self.teachers) else None

    def with_only(self, name: str) -> "Models":
        """The models with one of the teachers as `teacher`."""
        return Models(self.student, {"": self.teachers.get(name)}, self.classes)


def trace_models(recipe: Recipe, classes: int | None, allow_import: Sequence[str]) -> tuple[Models, list[Mistake]]:
    size, training = recipe.data.input_size, recipe.share is not None
    teachers: dict[str, Trace | None] = {}
    mistakes_of_teachers: list[Mistake] = []
    for name, teacher in recipe.teachers_by_name.items():
        of_data = (classes or None) if teacher.class_map is None or teacher.train else None
        own_size = teacher.input_size or size
        teachers[name], more = _trace("teacher", teacher, own_size, of_data, allow_import, training=training)
        mistakes_of_teachers += of_teacher(name, more)
    of_student = _outputs_without_labels(recipe, teachers) if classes == 0 else classes
    student, mistakes = _trace("student", recipe.student, size, of_student, allow_import, training=True)
    return Models(student, teachers, classes), mistakes + mistakes_of_teachers


def _outputs_without_labels(recipe: Recipe, teachers: Mapping[str, Trace | None]) -> int | None:
    """How many outputs the student gets where there are no classes; None for as many as it has by itself.

    As many as the teacher's, if a loss compares outputs; else none, unless they belong to its weights. Of several
    teachers, those come first that a loss names.
    """
    if _compares_outputs(recipe):
        losses = [loss for stage in recipe.stages for loss in stage.losses.values()]
        named = [Tap.parse(loss.teacher).model for loss in losses if loss.teacher]
        names = [name for name in dict.fromkeys([*named, *teachers]) if name in teachers]
        widths = [_width_of_teacher(recipe.teachers_by_name[name], teachers[name]) for name in names]
        return next((width for width in widths if width), None)
    of_timm = ":" not in recipe.student.model
    return 0 if of_timm and recipe.student.checkpoint is None else None


def _width_of_teacher(teacher: TeacherOptions, trace_: Trace | None) -> int | None:
    """The number of a teacher's outputs that are compared; None if it cannot be told."""
    if trace_ is None:
        return None
    with suppress(ProbeKDError):
        if teacher.class_map is not None:
            return len(_class_indices(teacher.class_map))
        return output_spec(trace_, Tap.parse(teacher.output), "teacher").channels
    return None


def _compares_outputs(recipe: Recipe) -> bool:
    losses = [loss_of(options) for _, options in losses_in(recipe)]
    return any(loss is not None and loss.reads == "outputs" for loss in losses)


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
    frozen = side == "teacher" and not getattr(model, "train", None)
    if classes is not None and not (frozen and (model.pretrained or library_of(model.model))):
        kwargs.setdefault("num_classes", classes)  # a frozen teacher that comes with a head keeps it
    if size[0] != 3:
        kwargs.setdefault("in_chans", size[0])
    mistakes = check_name(side, model, allow_import) or _wrong_kwargs(side, model)
    if mistakes:
        return None, mistakes
    with noting(mistakes, side, "model"):
        traced = trace_named(model.model, size, training=training, model_kwargs=kwargs)
        if model.grad_checkpointing:
            traced = _trace_checkpointing(traced)
        return traced, []
    return None, mistakes


def check_name(side: Side, model: ModelOptions, allow_import: Sequence[str]) -> list[Mistake]:
    mistakes: list[Mistake] = []
    with noting(mistakes, side, "model"):
        check_import(model.model, allow_import)
        check_kwargs(model.model, {})
    return mistakes


def _wrong_kwargs(side: Side, model: ModelOptions) -> list[Mistake]:
    """The arguments that the model does not take, each at its line."""
    mistakes: list[Mistake] = []
    for name, value in model.model_kwargs.items():
        with noting(mistakes, side, "model_kwargs", name):
            check_kwargs(model.model, {name: value})
    return mistakes


def _trace_checkpointing(plain: Trace) -> Trace:
    """Trace a model again with gradient checkpointing. Raises TraceError if it does not support that."""
    model = build_on_meta(plain.model, plain.model_kwargs)
    checkpoint_gradients(model, plain.model)
    checkpointed = trace(model, plain.input_size, training=plain.training)
    return replace(checkpointed, model=plain.model, model_kwargs=plain.model_kwargs)


def check_teachers(recipe: Recipe) -> list[Mistake]:
    mistakes: list[Mistake] = []
    if recipe.teacher and recipe.teachers:
        mistakes.append((("teacher",), "the recipe has `teachers` too; move this one there, with a name"))
    if recipe.teachers and recipe.share:
        message = "`share` trains one teacher with the student, and `teachers` names several; give one as `teacher`"
        mistakes.append((("share",), message))
    first: dict[str, str] = {}
    for name in recipe.teachers_by_name:
        other = first.setdefault(name.casefold(), name)
        if other != name:
            message = (
                f"the names '{other}' and '{name}' differ only in case, and on some disks their files would be one"
            )
            mistakes.append((("teachers", name), message))
        mistakes += of_teacher(name, _check_teacher(recipe, recipe.teachers_by_name[name]))
    return mistakes


def _check_teacher(recipe: Recipe, teacher: TeacherOptions) -> list[Mistake]:
    mistakes = [*_check_cache(recipe, teacher), *_check_shard(recipe, teacher)]
    if recipe.share and teacher.train:
        message = "with `share` the stages train the teacher too, alone and with the student; leave `train` out"
        mistakes.append((("teacher", "train"), message))
    if not (teacher.pretrained or teacher.checkpoint or teacher.train or recipe.share):
        message = "the teacher has random weights; give `pretrained: true`, a `checkpoint`, or `train: {epochs: ...}`"
        mistakes.append((("teacher", "model"), message))
    if recipe.data.labels == "none" and teacher.class_map is not None and not _compares_outputs(recipe):
        message = "there are no classes (`data: {labels: none}`), and no loss compares outputs; leave `class_map` out"
        mistakes.append((("teacher", "class_map"), message))
    if recipe.data.labels == "none" and teacher.train:
        message = (
            "a teacher is trained on labels, and `data: {labels: none}` has none; give its weights as `checkpoint`"
        )
        mistakes.append((("teacher", "train"), message))
    return mistakes


def _check_cache(recipe: Recipe, teacher: TeacherOptions) -> list[Mistake]:
    reasons = []
    if teacher.cache and (why := _unwritable(Path(teacher.cache))):
        reasons.append(("cache", why))
    if teacher.cache and recipe.share:
        reasons.append(("cache", "the teacher trains too, so what it gave before is not what it gives now"))
    if teacher.cache and recipe.data.mixes:
        reasons.append(("cache", "mixup and cutmix make a new image of every two, which no cache has seen"))
    if teacher.cache_top_k and not teacher.cache:
        reasons.append(("cache_top_k", "it says what a cache keeps; give the folder as `cache` too"))
    return [(("teacher", key), f"`{key}`: {why}") for key, why in reasons]


def _check_shard(recipe: Recipe, teacher: TeacherOptions) -> list[Mistake]:
    """Refuse to shard a teacher where it trains, or where not every process runs it at the same time."""
    if not teacher.shard:
        return []
    unsupported = why_unsupported()
    reasons = [unsupported] if unsupported else []
    if recipe.share:
        reasons.append("with `share` the teacher trains too, and only a frozen one can be divided; leave one out")
    if teacher.cache:
        reasons.append(
            "all processes run a sharded teacher together, and each has other images in the cache; leave one out, or "
            "fill the cache where the teacher fits into one device (`probe-kd cache`) and train without `shard`"
        )
    target = recipe.torchcompile.target if recipe.torchcompile else None
    if target in ("step", "teacher"):
        reasons.append("compiled code cannot gather its layers one by one; give `torchcompile: {target: student}`")
    return [(("teacher", "shard"), f"`shard`: {reason}") for reason in reasons]


def _unwritable(folder: Path) -> str:
    """Why a folder cannot be made or written, as far as can be told without trying; else empty."""
    try:
        existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    except (OSError, ValueError) as refusal:  # a path that no system takes
        return f"no folder can be called {str(folder)[:80]!r}: {reason(refusal)}"
    if not existing.is_dir():
        return f"{str(existing)!r} is no folder"
    return "" if os.access(existing, os.W_OK | os.X_OK) else f"{str(existing)!r} cannot be written"


def check_all_weights(recipe: Recipe, models: Models, record: DataRecord | None) -> tuple[list[str], list[Mistake]]:
    """A sentence for each new classifier, and the mistakes in the weights that the recipe names."""
    sentences, mistakes = check_weights(recipe, "student", models.student, record)
    for name in recipe.teachers_by_name:
        of_one, more = check_weights(recipe.with_only(name), "teacher", models.teachers.get(name), record)
        sentences += [naming(name, sentence) for sentence in of_one]
        mistakes += of_teacher(name, more)
    return sentences, mistakes


def check_weights(
    recipe: Recipe, side: Side, trace_: Trace | None, record: DataRecord | None
) -> tuple[list[str], list[Mistake]]:
    """A sentence for each new classifier, and the mistakes in the weights that the recipe names.

    A model that the run of `record` trained has its weights from that run, so its `checkpoint` is not read.
    """
    model: ModelOptions | None = getattr(recipe, side)
    if model is None:
        return [], []
    sentences, mistakes = _check_new_classifier(recipe, side, model, trace_)
    if model.checkpoint is None:
        return sentences, mistakes
    if record is not None and (side == "student" or recipe.share or getattr(model, "train", None)):
        return sentences, mistakes
    path = Path(model.checkpoint)
    if not path.is_file():
        hint = nearest(path.name, [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else [])
        mistakes.append(((side, "checkpoint"), f"there is no checkpoint {model.checkpoint!r}{hint}"))
    elif trace_ is not None:
        with noting(mistakes, side, "checkpoint"):
            sentences += _describe_new_classifier(side, trace_, _try_checkpoint(recipe, side, model, trace_), path.name)
    return sentences, mistakes


def _try_checkpoint(recipe: Recipe, side: Side, model: ModelOptions, trace_: Trace) -> list[str]:
    """Names of the classifier's weights that stay new. Raises WeightsError for weights that do not fit."""
    assert model.checkpoint is not None
    meta = build_on_meta(trace_.model, trace_.model_kwargs)
    try:
        return load_weights(meta, model.checkpoint, classifier_of(model))
    except WeightsError as refusal:
        raise WeightsError(f"{refusal}{_advice_on_other_classes(recipe, side, model, meta)}") from None


def _advice_on_other_classes(recipe: Recipe, side: Side, model: ModelOptions, meta: nn.Module) -> str:
    """Advice for a checkpoint that differs only in its classifier; empty for any other."""
    assert model.checkpoint is not None
    try:
        new_names = load_weights(meta, model.checkpoint, "new where other")
        tensors = [read_weights(model.checkpoint).get(name) for name in new_names]
    except WeightsError:
        return ""
    classes = next((len(tensor) for tensor in tensors if tensor is not None and tensor.ndim), 0)
    new_classifier = "`new_classifier: true` lets all else be the checkpoint's and a new classifier be trained"
    if side == "student" or recipe.share:
        return f"; {new_classifier}"
    new_classifier = (
        "`train: {epochs: ...}` gives it a new classifier of the data's classes (always, by `new_classifier: true`)"
    )
    if not classes:
        return f"; {new_classifier}"
    own_classes = f"`model_kwargs: {{num_classes: {classes}}}` keeps the checkpoint's own {classes} classes"
    if getattr(model, "class_map", None) is None:
        own_classes += ", with a `class_map` of its index of each of the data's classes"
        return f"; {own_classes}; or {new_classifier}"
    return f"; {own_classes}, which the `class_map` then is of"


def _check_new_classifier(
    recipe: Recipe, side: Side, model: ModelOptions, trace_: Trace | None
) -> tuple[list[str], list[Mistake]]:
    place = (side, "new_classifier")
    if not model.new_classifier:
        return [], []
    if not (model.checkpoint or model.pretrained):
        return [], [(place, "`new_classifier`: the model has no weights, so that all of it is new; leave it out")]
    if side == "teacher" and not (getattr(model, "train", None) or recipe.share):
        message = "a new classifier of a teacher that is not trained answers at random; give `train: {epochs: ...}`"
        return [], [(place, message)]
    if trace_ is not None and trace_.model_kwargs.get("num_classes") == 0:
        return [], [(place, "`new_classifier`: the model has none (`num_classes: 0`); leave one of both out")]
    if model.checkpoint or trace_ is None:
        return [], []
    mistakes: list[Mistake] = []
    with noting(mistakes, *place):
        names = classifiers(build_on_meta(trace_.model, trace_.model_kwargs))
        source = "timm" if ":" not in model.model else model.model
        return _describe_new_classifier(side, trace_, names, source), []
    return [], mistakes


def _describe_new_classifier(side: Side, trace_: Trace, names: Sequence[str], source: str) -> list[str]:
    modules = ", ".join(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in names))
    sentence = (
        f"the {side} gets a new classifier ({modules}) of {trace_.output.channels} classes; all else is that of "
        f"{source}"
    )
    return [sentence] * bool(names)


def read_class_maps(recipe: Recipe, models: Models) -> tuple[dict[str, tuple[int, ...]], list[Mistake]]:
    """The class maps by the name of the teacher."""
    class_maps: dict[str, tuple[int, ...]] = {}
    mistakes: list[Mistake] = []
    for name in recipe.teachers_by_name:
        class_map, more = _read_class_map_of(recipe.with_only(name), models.with_only(name))
        mistakes += of_teacher(name, more)
        if class_map is not None:
            class_maps[name] = class_map
    return class_maps, mistakes


def _read_class_map_of(recipe: Recipe, models: Models) -> tuple[tuple[int, ...] | None, list[Mistake]]:
    options, place = recipe.teacher, ("teacher", "class_map")
    if options is None or options.class_map is None:
        return None, []
    if options.train or recipe.share:
        return None, [(place, "a teacher that is trained here has the data's classes; leave `class_map` out")]
    mistakes: list[Mistake] = []
    with noting(mistakes, *place):
        indices = _class_indices(options.class_map)
        if models.teacher is not None and models.classes is not None:
            _check_class_map(indices, models.teacher, Tap.parse(options.output), models.classes)
        return tuple(indices), []
    return None, mistakes


def _check_class_map(indices: Sequence[int], teacher: Trace, output: Tap, classes: int) -> None:
    """Check a class map against the teacher's output; where that yields no vector, what reads it is refused."""
    try:
        spec = output_spec(teacher, output, "teacher")
    except (AdapterError, TapError, TraceError):
        return
    check_class_map(indices, classes, spec.channels)


def _class_indices(class_map: str | list[int]) -> list[int]:
    return _read_class_map(class_map) if isinstance(class_map, str) else class_map


def _read_class_map(path: str) -> list[int]:
    try:
        indices = json.loads(read_text(Path(path)))
    except (OSError, ValueError, RecursionError) as refusal:
        raise WeightsError(f"cannot read the class map {path!r}: {reason(refusal)}") from None
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise WeightsError(f"the class map {path!r} is not a JSON list of whole numbers")
    return indices


def in_body(tap: Tap, body: str) -> Tap:
    """The tap of a student in the graft that is trained; `body` is the prefix of its layers, empty without a graft."""
    return replace(tap, module=body + tap.module) if tap.module else tap


def check_inputs(recipe: Recipe, models: Models) -> list[Mistake]:
    """Check that mean and std of the images fit the models."""
    mistakes: list[Mistake] = []
    with noting(mistakes, "data"):
        if models.student is not None:
            input_of_student(recipe, models.student)
    for name, trace_ in models.teachers.items():
        of_one: list[Mistake] = []
        with noting(of_one, "teacher"):
            if trace_ is not None:
                input_of_teacher(recipe.with_only(name), trace_)
        mistakes += of_teacher(name, of_one)
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
    """The input of a model: mean and std of the recipe, else of the model's config.

    Raises TraceError if a model of another library has no such config.
    """
    if library_of(trace_.model) and not (mean and std) and not InputSpec(size).filled(trace_).complete:
        raise TraceError(
            f"{trace_.model} has no preprocessor_config.json, which says how images are normalised; give `mean` and "
            "`std`, with [0.0] and [1.0] for images in [0, 1]"
        )
    own = InputSpec.of(trace_, size)
    return InputSpec(size, mean or own.mean, std or own.std)
