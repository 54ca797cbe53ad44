"""From a recipe to a plan: what it names is opened, traced, paired and adapted, and nothing is trained.

`plan` collects every problem before it raises one RecipeError, each at its line of the recipe.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from probe_kd.data.datasets import DataOptions, DataRecord, Datasets, open_datasets
from probe_kd.data.loading import loader
from probe_kd.engine.arguments import check_truths, optimizer_parameters
from probe_kd.engine.matching import expand, is_pattern, listed, match
from probe_kd.engine.models import (
    breaks_channels_last,
    build_on_meta,
    check_import,
    check_kwargs,
    checkpoint_gradients,
    classifiers,
    load_weights,
    read_weights,
    short,
)
from probe_kd.engine.spec import InputSpec, Pair, Schedule, Tap, Trace, value_at
from probe_kd.engine.surgery import in_pattern
from probe_kd.engine.tracing import trace
from probe_kd.errors import (
    DataError,
    LossError,
    ProbeKDError,
    Problem,
    RunError,
    TapError,
    TraceError,
    WeightsError,
    nearest,
)
from probe_kd.files.atomic import read_text, reason
from probe_kd.methods.adapters import check_class_map, check_logits
from probe_kd.methods.losses import LOSSES
from probe_kd.methods.objectives import Comparison, Objective
from probe_kd.methods.sharing import Sharing, graft, share_convolutions, share_trunk
from probe_kd.recipe.options import (
    RESERVED,
    AutoPairs,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    PairOptions,
    Recipe,
    SchedulerOptions,
    ShareOptions,
    Source,
    StageOptions,
    TeacherOptions,
    classifier_of,
    schedule,
)
from probe_kd.recipe.yaml_tree import Path_


@dataclass(frozen=True)
class Planned:
    """What one loss compares in one stage, and what brings the two together first."""

    stage: str
    objective: Objective
    comparison: Comparison
    adapter: str


@dataclass(frozen=True)
class Expansion:
    """What a pair of patterns stands for."""

    student: str
    teacher: str
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        return f"{self.student or 'output'}: {self.teacher or 'output'} is {', '.join(map(str, self.pairs))}"


@dataclass(frozen=True)
class Plan:
    """A recipe that has been checked against models and data: all that training needs, and nothing left to guess."""

    recipe: Recipe
    datasets: Datasets
    student: Trace
    teacher: Trace | None
    student_input: InputSpec
    teacher_input: InputSpec | None
    pairs: tuple[Pair, ...]
    objectives: tuple[tuple[Objective, ...], ...]  # of each stage
    comparisons: tuple[Planned, ...]
    class_map: tuple[int, ...] | None = None
    sharing: Sharing | None = None
    grown: Trace | None = None  # of the student as it is trained, where that is a graft
    expansions: tuple[Expansion, ...] = ()
    new_classifiers: tuple[str, ...] = ()  # in a sentence each, of models with weights

    @property
    def trained(self) -> Trace:
        """The student as it is trained."""
        return self.grown or self.student

    @property
    def remarks(self) -> list[str]:
        """What can be run as it stands, and is hardly what was meant."""
        asked = self.recipe.share or any(objective.needs_teacher for stage in self.objectives for objective in stage)
        if self.teacher is None or asked:
            return []
        does = "is trained" if self.recipe.teacher and self.recipe.teacher.train else "is loaded"
        return [
            f"no loss reads the teacher: it {does} and compared with, and teaches nothing; add "
            "`soft: {loss: soft_targets}`, say, or leave `teacher` out"
        ]

    @property
    def resolved(self) -> Recipe:
        """The recipe with what was found written out: the pairs, and the arguments that the models are built with."""
        recipe = self.recipe
        student = recipe.student.model_copy(update={"model_kwargs": dict(self.student.model_kwargs)})
        found: dict[str, Any] = {"student": student}
        if recipe.teacher is not None and self.teacher is not None:
            kwargs = dict(self.teacher.model_kwargs)
            found["teacher"] = recipe.teacher.model_copy(update={"model_kwargs": kwargs})
        found |= self._normalisation_of_folders(found)
        if self.pairs:
            body = "body." if self.grown else ""
            found["pairs"] = {str(pair.student).removeprefix(body): _written(pair) for pair in self.pairs}
        return recipe.model_copy(update=found)

    def _normalisation_of_folders(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The sections with the mean and std that the config of a `local-dir:` model says, since the folder may go."""
        sides = [("data", self.recipe.student, None if self.grown else self.student_input)]
        if self.recipe.teacher is not None:
            sides.append(("teacher", self.recipe.teacher, self.teacher_input))
        return {
            key: found.get(key, getattr(self.recipe, key)).model_copy(update={"mean": given.mean, "std": given.std})
            for key, options, given in sides
            if given is not None and options.model.startswith("local-dir:")
        }


def _written(pair: Pair) -> str | PairOptions:
    plain = pair.weight == 1 and not pair.adapter
    long = {"teacher": str(pair.teacher), "weight": pair.weight, **pair.adapter}
    return str(pair.teacher) if plain else PairOptions.model_validate(long)


def plan(source: Source, *, allow_import: Sequence[str] = (), record: DataRecord | None = None) -> Plan:
    """Check a recipe against its models and data.

    Functions of your own that it names as models are imported and called only where `allow_import` names their package
    or module. The classes have the numbers that the `record` of a former run says, where one is given. Raises
    RecipeError with all problems that do not hide each other.
    """
    return _Planner(source, allow_import, record).plan()


class _Planner:
    def __init__(self, source: Source, allow_import: Sequence[str], record: DataRecord | None = None) -> None:
        self.source = source
        self.record = record
        self.allow_import = allow_import
        self.recipe = source.recipe
        self.problems: list[Problem] = []
        self.new_classifiers: list[str] = []
        self.unknown = set[Pair]()  # pairs of layers that are not there, so that no adapter is looked for
        self.entries: dict[str, list[Pair]] = {}  # what each line of `pairs` stands for

    @contextmanager
    def at(self, *where: str | int) -> Iterator[None]:
        """Turn an error inside into a problem of this place of the recipe, and go on."""
        try:
            yield
        except ProbeKDError as refusal:
            self.problems.append(self.source.problem(where, str(refusal)))

    def stop_if_problems(self) -> None:
        if self.problems:
            raise self.source.error(self.problems)

    def plan(self) -> Plan:
        recipe = self.recipe
        datasets = self._datasets()
        classes = datasets.num_classes if datasets else None
        student = self._trace("student", recipe.student, recipe.data.input_size, classes, training=True)
        teacher = self._trace_teacher(classes)
        self._check_teacher(teacher, classes)
        if student is not None and classes is not None and student.output.channels != classes:
            message = (
                f"the student's classifier has {student.output.channels} classes and the data {classes}; leave "
                "`num_classes` out"
            )
            if recipe.student.checkpoint or recipe.student.pretrained:
                message += ", and give `new_classifier: true` where its weights have others"
            self.problems.append(self.source.problem(("student", "model_kwargs"), message))
        # Without data nobody knows how many classes there are, and what does not fit 1000 would be no mistake.
        self._check_checkpoint("student", student if datasets else None)
        self._check_checkpoint("teacher", teacher if datasets else None)
        self._check_warmup(datasets)
        self._check_baseline()
        self._check_layout(student, teacher)
        self._check_stages(student)
        class_map = self._class_map(student if datasets else None, teacher)
        grown, sharing = self._join(student, teacher)
        pairs = self._pairs(student, teacher, grown)
        body = "body." if grown else ""
        compared = None if pairs is None else [pair for pair in pairs if pair.weight]
        objectives = [self._objectives(index, compared, body) for index in range(len(recipe.stages))]
        self._check_use(objectives)
        known = (
            objectives if datasets else [[it for it in stage if it.resolved.reads != "outputs"] for stage in objectives]
        )
        found = () if pairs is None else self._comparisons(known, grown or student, teacher, class_map)
        comparisons = tuple(found)
        for side, trace_, read in (
            ("data", student, self._student_input),
            ("teacher", teacher, self._teacher_input),
        ):
            with self.at(side):
                if trace_ is not None:
                    read(trace_)
        self._check_inputs(student, teacher)
        self._check_images()
        self.stop_if_problems()
        assert datasets is not None
        assert student is not None
        return Plan(
            recipe=recipe,
            datasets=datasets,
            student=student,
            teacher=teacher,
            student_input=self._input_of_student(student, teacher),
            teacher_input=self._teacher_input(teacher) if teacher else None,
            pairs=pairs or (),
            objectives=tuple(tuple(stage) for stage in objectives),
            comparisons=comparisons,
            class_map=class_map,
            sharing=sharing,
            grown=grown,
            expansions=tuple(self._expansions()),
            new_classifiers=tuple(self.new_classifiers),
        )

    def _datasets(self) -> Datasets | None:
        data = self.recipe.data
        try:
            return open_datasets(data, self.record)
        except DataError as refusal:
            key = refusal.key or ("dataset" if data.dataset else "root")
            self.problems.append(self.source.problem(("data", key), str(refusal)))
        return None

    def _expansions(self) -> Iterator[Expansion]:
        for ours, entry in self.entries.items():
            given = self.recipe.pairs[ours] if isinstance(self.recipe.pairs, dict) else ours
            theirs = given.teacher if isinstance(given, PairOptions) else given
            if is_pattern(ours) or is_pattern(theirs):
                yield Expansion(ours, theirs, tuple(entry))

    def _trace(
        self, key: str, model: ModelOptions, size: tuple[int, int, int], classes: int | None, *, training: bool
    ) -> Trace | None:
        kwargs = dict(model.model_kwargs)
        if classes is not None and not (key == "teacher" and model.pretrained and not getattr(model, "train", None)):
            kwargs.setdefault("num_classes", classes)  # a pretrained teacher keeps its head, if it is not trained on
        if size[0] != 3:
            kwargs.setdefault("in_chans", size[0])
        with self.at(key, "model"):
            check_import(model.model, self.allow_import)
            if not self._takes(key, model):
                return None
            found = trace(model.model, size, training=training, model_kwargs=kwargs)
            if model.grad_checkpointing:
                found = _trace_checkpointing(found)
            _check_output(found, key)
            return found
        return None

    def _takes(self, key: str, model: ModelOptions) -> bool:
        """Whether the model takes its arguments; each that it does not is a problem of its own line."""
        before = len(self.problems)
        check_kwargs(model.model, {})
        for name, value in model.model_kwargs.items():
            with self.at(key, "model_kwargs", name):
                check_kwargs(model.model, {name: value})
        return len(self.problems) == before

    def _trace_teacher(self, classes: int | None) -> Trace | None:
        teacher = self.recipe.teacher
        if teacher is None:
            return None
        return self._trace(
            "teacher",
            teacher,
            teacher.input_size or self.recipe.data.input_size,
            classes if teacher.class_map is None or teacher.train else None,
            training=self.recipe.share is not None,
        )

    def _check_teacher(self, trace_: Trace | None, classes: int | None) -> None:
        teacher = self.recipe.teacher
        if teacher is None:
            return
        self._check_cache(teacher, trace_)
        if self.recipe.share and teacher.train:
            message = "with `share` the stages train the teacher too, alone and with the student; leave `train` out"
            self.problems.append(self.source.problem(("teacher", "train"), message))
        if not (teacher.pretrained or teacher.checkpoint or teacher.train or self.recipe.share):
            message = (
                "the teacher has random weights; give `pretrained: true`, a `checkpoint`, or `train: {epochs: ...}`"
            )
            self.problems.append(self.source.problem(("teacher", "model"), message))
        if trace_ is None or classes is None:
            return
        if trace_.output.channels != classes and teacher.class_map is None:
            message = (
                f"the teacher's classifier has {trace_.output.channels} classes and the data {classes}; give a "
                "`class_map` with its index of each of the data's classes, or `train: {epochs: ...}`, which gives "
                "it a new classifier and trains it on these data"
            )
            self.problems.append(self.source.problem(("teacher", "model"), message))

    def _check_cache(self, teacher: TeacherOptions, trace_: Trace | None) -> None:
        whys = []
        if teacher.cache and (why := _unwritable(Path(teacher.cache))):
            whys.append(("cache", why))
        if trace_ and teacher.cache_top_k and teacher.cache_top_k > trace_.output.channels:
            whys.append(("cache_top_k", f"the teacher has {trace_.output.channels} logits, got {teacher.cache_top_k}"))
        if teacher.cache and self.recipe.share:
            whys.append(("cache", "the teacher trains too, so what it gave before is not what it gives now"))
        if teacher.cache and self.recipe.data.mixes:
            whys.append(("cache", "mixup and cutmix make a new image of every two, which no cache has seen"))
        if teacher.cache_top_k and not teacher.cache:
            whys.append(("cache_top_k", "it says what a cache keeps; give the folder as `cache` too"))
        if teacher.cache_top_k:
            for stage in self.recipe.stages:
                for name, loss in stage.losses.items():
                    reads = LOSSES[loss.loss].reads if loss.loss in LOSSES else ""
                    if reads == "outputs" and loss.loss != "soft_targets":
                        whys.append(
                            ("cache_top_k", f"loss `{name}` ({loss.loss}) needs all logits; only soft_targets does not")
                        )
        for key, why in whys:
            self.problems.append(self.source.problem(("teacher", key), f"`{key}`: {why}"))

    def _check_checkpoint(self, key: str, trace_: Trace | None) -> None:
        model: ModelOptions | None = getattr(self.recipe, key)
        if model is None:
            return
        self._check_classifier(key, model, trace_)
        if model.checkpoint is None:
            return
        if self.record is not None and (key == "student" or self.recipe.share or getattr(model, "train", None)):
            return  # a run that is there has weights of its own, and does not depend on where they came from
        path = Path(model.checkpoint)
        if not path.is_file():
            near = nearest(path.name, [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else [])
            message = f"there is no checkpoint {model.checkpoint!r}{near}"
            self.problems.append(self.source.problem((key, "checkpoint"), message))
        elif trace_ is not None:
            with self.at(key, "checkpoint"):
                meta = build_on_meta(trace_.model, trace_.model_kwargs)
                try:
                    left = load_weights(meta, path, classifier_of(model))
                except WeightsError as refusal:
                    raise WeightsError(f"{refusal}{self._of_other_classes(key, model, meta)}") from None
                self._tell_new(key, trace_, left, path.name)

    def _of_other_classes(self, key: str, model: ModelOptions, meta: nn.Module) -> str:
        """What can be done about a checkpoint that differs in its classifier alone; empty for any other."""
        assert model.checkpoint is not None
        try:
            left = load_weights(meta, model.checkpoint, "new where other")
            found = [read_weights(model.checkpoint).get(name) for name in left]
        except WeightsError:
            return ""
        classes = next((len(tensor) for tensor in found if tensor is not None and tensor.ndim), 0)
        new = "`new_classifier: true` lets all else be the checkpoint's and a new classifier be trained"
        if key == "student" or self.recipe.share:
            return f"; {new}"
        new = (
            "`train: {epochs: ...}` gives it a new classifier of the data's classes (always, by `new_classifier: true`)"
        )
        if not classes:
            return f"; {new}"
        as_it_is = f"`model_kwargs: {{num_classes: {classes}}}` keeps the checkpoint's own {classes} classes"
        if getattr(model, "class_map", None) is None:
            as_it_is += ", with a `class_map` of its index of each of the data's classes"
            return f"; {as_it_is}; or {new}"
        return f"; {as_it_is}, which the `class_map` then is of"

    def _check_classifier(self, key: str, model: ModelOptions, trace_: Trace | None) -> None:
        if not model.new_classifier:
            return
        if not (model.checkpoint or model.pretrained):
            message = "`new_classifier`: the model has no weights, so that all of it is new; leave it out"
            self.problems.append(self.source.problem((key, "new_classifier"), message))
        elif key == "teacher" and not (getattr(model, "train", None) or self.recipe.share):
            message = "a new classifier of a teacher that is not trained answers at random; give `train: {epochs: ...}`"
            self.problems.append(self.source.problem((key, "new_classifier"), message))
        elif model.pretrained and not model.checkpoint and trace_ is not None:
            with self.at(key, "new_classifier"):
                names = classifiers(build_on_meta(trace_.model, trace_.model_kwargs))
                self._tell_new(key, trace_, names, "timm")

    def _tell_new(self, key: str, trace_: Trace, left: Sequence[str], source: str) -> None:
        if left:
            modules = ", ".join(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in left))
            self.new_classifiers.append(
                f"the {key} gets a new classifier ({modules}) of {trace_.output.channels} classes; all else is that of "
                f"{source}"
            )

    def _class_map(self, student: Trace | None, teacher: Trace | None) -> tuple[int, ...] | None:
        options = self.recipe.teacher
        given = options.class_map if options else None
        if given is None or options is None:
            return None
        if options.train or self.recipe.share:
            message = "a teacher that is trained here has the data's classes; leave `class_map` out"
            self.problems.append(self.source.problem(("teacher", "class_map"), message))
            return None
        with self.at("teacher", "class_map"):
            found = _read_class_map(given) if isinstance(given, str) else given
            if student is not None and teacher is not None:
                check_class_map(found, student.output.channels, teacher.output.channels)
            return tuple(found)
        return None

    def _check_optimizers(self) -> None:
        """timm's names, which only timm knows."""
        from timm.optim import list_optimizers

        known = list_optimizers()
        for where, stage in self._trained_stages():
            if stage.optimizer.opt.lower() not in known:
                message = f"timm has no optimizer {stage.optimizer.opt!r}{nearest(stage.optimizer.opt, known)}"
                self.problems.append(self.source.problem((*where, "optimizer", "opt"), message))
            else:
                with self.at(*where, "optimizer", *(["opt_args"] if stage.optimizer.opt_args else [])):
                    _try_optimizer(stage.optimizer)
            for key, message in _misfits(stage.scheduler, stage.epochs):
                self.problems.append(self.source.problem((*where, "scheduler", key), message))

    def _trained_stages(self) -> list[tuple[Path_, Any]]:
        """Everything that has an optimizer, with its place in the recipe."""
        stages: list[tuple[Path_, Any]] = [(("stages", index), stage) for index, stage in enumerate(self.recipe.stages)]
        if self.recipe.teacher and self.recipe.teacher.train:
            stages.append((("teacher", "train"), self.recipe.teacher.train))
        return stages

    def _check_warmup(self, datasets: Datasets | None) -> None:
        """A stage whose every update lies in the warm-up is not trained, and its figures would not say so."""
        if datasets is None:
            return
        images, batch = len(datasets.train), self.recipe.data.batch_size  # type: ignore[arg-type]
        batches = images // batch if images > batch else 1
        for where, stage in self._trained_stages():
            updates = -(-batches // getattr(stage, "grad_accum_steps", 1))
            warmup = stage.scheduler.warmup_epochs
            if 0 < warmup < stage.epochs and warmup * updates > stage.epochs * updates - 1:
                message = (
                    f"all {stage.epochs * updates} updates ({images} images, {batch} a batch) lie in the warm-up of "
                    f"{warmup:g} epochs, at next to no learning rate; set `warmup_epochs: 0`, more `epochs`, or a "
                    "smaller `data.batch_size`"
                )
                self.problems.append(self.source.problem((*where, "scheduler", "warmup_epochs"), message))

    def _check_trackers(self) -> None:
        if not self.recipe.trackers:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known, there = list(LOGGER_TYPE_TO_CLASS), [str(tracker) for tracker in get_available_trackers()]
        for index, name in enumerate(self.recipe.trackers):
            if name not in known:
                message = f"accelerate has no tracker {name!r}{nearest(name, known)}; it has {', '.join(known)}"
            elif name not in there:
                message = f"tracker {name!r} is not installed here; `pip install {name}`"
            else:
                continue
            self.problems.append(self.source.problem(("trackers", index), message))

    def _check_compile(self) -> None:
        import torch._dynamo

        options = self.recipe.torchcompile
        if options is None:
            return
        known = torch._dynamo.list_backends(exclude_tags=())
        if options.backend not in known:
            message = f"torch.compile has no backend {options.backend!r}{nearest(options.backend, known)}"
            self.problems.append(self.source.problem(("torchcompile", "backend"), message))
        modes = list(torch._inductor.list_mode_options())
        if options.mode is not None and options.mode not in modes:
            message = (
                f"torch.compile has no mode {options.mode!r}{nearest(options.mode, modes)}; it has {', '.join(modes)}"
            )
            self.problems.append(self.source.problem(("torchcompile", "mode"), message))
        accumulates = any(stage.grad_accum_steps > 1 for stage in self.recipe.stages)
        graphs = torch._inductor.list_mode_options().get(options.mode or "", {}).get("triton.cudagraphs")
        if accumulates and graphs:
            message = (
                f"mode {options.mode!r} replays CUDA graphs, which write every batch's gradients into the same memory, "
                "so `grad_accum_steps` would add up the wrong ones; take another mode, or a larger `batch_size`"
            )
            self.problems.append(self.source.problem(("torchcompile", "mode"), message))
        share = self.recipe.share
        if share is not None and (share.form in ("trunk", "graft") or share.block in ("params", "trunk")):
            message = (
                f"with `share: {{form: {share.form}, block: {share.block}}}` layers give what they gave before, or are "
                "constants for a while, which compiled code does not notice; leave `torchcompile` out"
            )
            self.problems.append(self.source.problem(("torchcompile",), message))
        if options.target == "teacher" and self.recipe.teacher is None:
            self.problems.append(self.source.problem(("torchcompile", "target"), "there is no teacher to compile"))

    def _check_layout(self, *traces: Trace | None) -> None:
        """`channels_last: true` where torch would corrupt the heap: refused, since the run would end without a word."""
        if not self.recipe.channels_last or torch.cuda.is_available():
            return
        for side, trace_ in zip(("student", "teacher"), traces, strict=True):
            layer = breaks_channels_last(build_on_meta(trace_.model, trace_.model_kwargs)) if trace_ else ""
            if layer:
                message = (
                    f"with channels last on a CPU the backward of {layer!r} of the {side}, a convolution of kernel 1 "
                    "and stride 2 over few channels, corrupts memory in torch 2.14; leave `channels_last` out"
                )
                self.problems.append(self.source.problem(("channels_last",), message))

    def _check_stages(self, student: Trace | None) -> None:
        self._check_optimizers()
        self._check_compile()
        self._check_trackers()
        for index, stage in enumerate(self.recipe.stages):
            if stage.keep == "best" and not (self.recipe.data.holdout or len(self.recipe.data.splits) == 3):
                message = (
                    "`keep: best` chooses by images that give no final figure; give `data: {holdout: 0.1}`, or both "
                    "`val_split` and `test_split`"
                )
                self.problems.append(self.source.problem(("stages", index, "keep"), message))
            self._check_weights(index, stage)
            names = _parameter_names(student) if student and stage.optimizer.lr_scale else []
            for pattern in stage.optimizer.lr_scale if names else ():
                with self.at("stages", index, "optimizer", "lr_scale", pattern):
                    if not any(in_pattern(name, pattern) for name in names):
                        near = nearest(pattern, _modules_of(names))
                        raise TapError(f"no parameter of the student matches {pattern!r}{near}")

    def _check_weights(self, index: int, stage: StageOptions) -> None:
        where: Path_ = ("stages", index, "losses")
        weights = [schedule(loss.weight) for loss in stage.losses.values()]
        if weights and not any(value_at(weight, epoch, 1) for weight in weights for epoch in (0, 1)):
            message = f"every loss of stage `{stage.name}` weighs 0, so that it trains nothing"
            self.problems.append(self.source.problem(where, message))
        for name, loss in stage.losses.items():
            with suppress(LossError):  # told where the loss is made
                for key, value in {"weight": schedule(loss.weight), **loss.options}.items():
                    if isinstance(value, Schedule) and (value.epochs or 0) > stage.epochs:
                        message = (
                            f"a schedule of {value.epochs:g} epochs does not end in the {stage.epochs} of its stage"
                        )
                        self.problems.append(self.source.problem((*where, name, key, "epochs"), message))

    def _check_images(self) -> None:
        try:
            _try_images(self.recipe.data)
        except DataError as refusal:
            self.problems.append(self.source.problem(("data", *_to_blame(self.recipe.data)), str(refusal)))

    def _join(self, student: Trace | None, teacher: Trace | None) -> tuple[Trace | None, Sharing | None]:
        """What is shared, tried on models without weights; and the trace of a graft."""
        share = self.recipe.share
        if share is None:
            return None, None
        if self.recipe.teacher is None:
            self.problems.append(self.source.problem(("share",), "there is no `teacher:` to share with"))
        if student is None or teacher is None:
            return None, None
        with self.at("share"):
            models = [build_on_meta(side.model, side.model_kwargs) for side in (student, teacher)]
            joined, sharing = join(share, models[0], models[1], student, teacher)
            grown = trace(joined, teacher.input_size, training=True) if share.form == "graft" else None
            return grown and replace(grown, model=f"{student.model} on {teacher.model}"), sharing
        return None, None

    def _check_inputs(self, student: Trace | None, teacher: Trace | None) -> None:
        share = self.recipe.share
        if share is None or share.form != "trunk" or student is None or teacher is None or self.problems:
            return
        ours, theirs = self._student_input(student), self._teacher_input(teacher)
        if ours != theirs:
            message = (
                f"a shared trunk sees one image, and the student expects {ours} and the teacher {theirs}; give `mean` "
                "and `std` of `data`, and `mean`, `std` and `input_size` of `teacher`, so that they agree"
            )
            self.problems.append(self.source.problem(("share",), message))

    def _check_baseline(self) -> None:
        losses = [loss.loss for stage in self.recipe.stages for loss in stage.losses.values()]
        if self.recipe.baseline and not any(loss in LOSSES and LOSSES[loss].reads == "labels" for loss in losses):
            message = "the student alone has no loss to train on: no stage has one that reads labels (`cross_entropy`)"
            self.problems.append(self.source.problem(("baseline",), message))

    def _input_of_student(self, student: Trace, teacher: Trace | None) -> InputSpec:
        """A graft begins with the teacher's layers, so it sees what the teacher sees."""
        grafted = self.recipe.share is not None and self.recipe.share.form == "graft"
        return self._teacher_input(teacher) if grafted and teacher else self._student_input(student)

    def _student_input(self, student: Trace) -> InputSpec:
        data = self.recipe.data
        return _input_spec(student, data.input_size, data.mean, data.std)

    def _teacher_input(self, teacher: Trace) -> InputSpec:
        options = self.recipe.teacher
        assert options is not None
        return _input_spec(teacher, teacher.input_size, options.mean, options.std)

    def _pairs(self, student: Trace | None, teacher: Trace | None, grown: Trace | None) -> tuple[Pair, ...] | None:
        """None where they cannot be known: then a loss without pairs is not its own mistake."""
        wanted = self.recipe.pairs
        if not wanted:
            return ()
        if self.recipe.teacher is None:
            self.problems.append(self.source.problem(("pairs",), "there is no `teacher:` with layers to pair"))
        if student is None or teacher is None:
            return None
        if isinstance(wanted, AutoPairs):
            with self.at("pairs"):
                found = match(student, teacher, level=wanted.level, num_pairs=wanted.num_pairs)
                return found if grown is None else _above_the_cut(found, grown)
            return None
        for ours, given in wanted.items():
            options = given if isinstance(given, PairOptions) else PairOptions(teacher=given)
            self.entries[ours] = list(self._entry(ours, options, student, teacher, grown))
        pairs = [pair for entry in self.entries.values() for pair in entry]
        taken: dict[Tap, str] = {}
        for ours, entry in self.entries.items():
            for pair in entry:
                if pair.student in taken:
                    message = f"{str(pair.student)!r} is in two pairs: `{taken[pair.student]}` has it too"
                    self.problems.append(self.source.problem(("pairs", ours), message))
                taken.setdefault(pair.student, ours)
        return tuple(pairs) or None

    def _entry(
        self, ours: str, options: PairOptions, student: Trace, teacher: Trace, grown: Trace | None
    ) -> Iterator[Pair]:
        """The pairs of one line of `pairs`; none where its layers are not there and not even named."""
        theirs, body = options.teacher, "body." if grown else ""
        found: list[Sequence[Tap]] = []
        for trace_, text, inside in ((grown or student, ours, body), (teacher, theirs, "")):
            with self.at("pairs", ours):
                taps = expand(trace_, text, inside)
                kept = [tap for tap in taps if not grown or inside == "" or not _is_idle(grown, tap)]
                if not kept:
                    raise TapError(f"{ours!r}: the graft puts the teacher's layers in the place of these")
                found.append(kept)
        how: dict[str, Any] = {"weight": options.weight, "adapter": options.adapter}
        if len(found) < 2:  # a loss may name it, and that is no second mistake
            with suppress(TapError):
                pair = Pair(Tap.parse(ours), Tap.parse(theirs), **how)
                self.unknown.add(pair := _in_body(pair) if grown else pair)
                yield pair
            return
        if len(found[0]) != len(found[1]):
            sides = [
                f"{text!r} finds {len(taps)}: {listed(taps)}" for text, taps in zip((ours, theirs), found, strict=True)
            ]
            message = f"both sides of a pair have to find equally many layers; {'; and '.join(sides)}"
            self.problems.append(self.source.problem(("pairs", ours), message))
            return
        yield from (Pair(*taps, **how) for taps in zip(*found, strict=True))

    def _check_use(self, stages: list[list[Objective]]) -> None:
        """Of pairs that are written down, whether they are in a loss, and their choices mean something there."""
        if sum(map(len, stages)) < sum(len(stage.losses) for stage in self.recipe.stages):
            return  # a loss that could not be read might have them
        objectives = [objective for stage in stages for objective in stage]
        for ours, entry in self.entries.items():
            users = [it for it in objectives if any(set(entry) & set(of.pairs) for of in it.comparisons)]
            known = set[str]().union(*(objective.adaptable for objective in users))
            if entry and entry[0].weight and not users:
                message = f"no loss compares {entry[0]}; take it out, or write `weight: 0` to have it measured only"
                self.problems.append(self.source.problem(("pairs", ours), message))
            for key in entry[0].adapter if entry and users else ():
                if key not in known:
                    message = (
                        f"`{key}` means nothing to the losses that compare this pair ({_names(users)}); leave it out"
                    )
                    self.problems.append(self.source.problem(("pairs", ours, key), message))

    def _objectives(self, index: int, pairs: Sequence[Pair] | None, body: str) -> list[Objective]:
        stage = self.recipe.stages[index]
        found: list[Objective] = []
        if not stage.losses:
            message = f"stage `{stage.name}` has no losses; give at least `losses: {{task: {{loss: cross_entropy}}}}`"
            self.problems.append(self.source.problem(("stages", index), message))
        for name, options in stage.losses.items():
            if name in RESERVED:
                message = f"a loss cannot be called `{name}`: the metrics have a column of that name"
                self.problems.append(self.source.problem(("stages", index, "losses", name), message))
            with self.at("stages", index, "losses", name, *_place_of_mistake(options)):
                found.append(_objective(name, options, [_UNKNOWN] if pairs is None else pairs, body))
                found[-1].check_batch(self.recipe.data.batch_size)
            last = found[-1] if found and found[-1].name == name else None
            if last and last.needs_teacher and self.recipe.teacher is None:
                message = f"loss `{name}` needs a teacher, and the recipe has no `teacher:`"
                self.problems.append(self.source.problem(("stages", index, "losses", name), message))
            elif last and last.of == "teacher" and self.recipe.share is None:
                message = f"loss `{name}` is `of: teacher`, which learns only where both train together; give `share`"
                self.problems.append(self.source.problem(("stages", index, "losses", name), message))
        if self.recipe.share and found and not any(objective.of == "teacher" for objective in found):
            message = (
                f"stage `{stage.name}` trains the teacher too, and has no loss for it; add "
                "`booster: {loss: cross_entropy, of: teacher}`"
            )
            self.problems.append(self.source.problem(("stages", index, "losses"), message))
        if self.recipe.share and found and all(objective.of == "teacher" for objective in found):
            message = f"stage `{stage.name}` has no loss for the student; add `light: {{loss: cross_entropy}}`"
            self.problems.append(self.source.problem(("stages", index, "losses"), message))
        return found

    def _comparisons(
        self,
        stages: list[list[Objective]],
        student: Trace | None,
        teacher: Trace | None,
        class_map: Sequence[int] | None,
    ) -> Iterator[Planned]:
        if student is None or teacher is None:
            return
        for index, objectives in enumerate(stages):
            for objective in objectives:
                where: Path_ = ("stages", index, "losses", objective.name)
                for comparison in objective.comparisons:
                    if self.unknown & set(comparison.pairs):
                        continue
                    # Without memory: only what it would be is wanted here, and the widths are the recipe's.
                    with self.at(*(self._own_line(comparison) or where)), torch.device("meta"):
                        adapter = objective.adapter(comparison, student, teacher, class_map)
                        yield Planned(self.recipe.stages[index].name, objective, comparison, str(adapter))

    def _own_line(self, comparison: Comparison) -> Path_:
        """The line of `pairs` that says how this is brought together; none where the loss says it."""
        pair = comparison.pairs[-1]
        return next((("pairs", key) for key, entry in self.entries.items() if pair.adapter and pair in entry), ())


_UNKNOWN = Pair(Tap(""), Tap(""))  # stands for pairs that could not be read


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


def join(
    share: ShareOptions, student: nn.Module, teacher: nn.Module, seen: Trace, known: Trace
) -> tuple[nn.Module, Sharing | None]:
    """Let two models have in common what the recipe says. Returns the student to train; the given one is changed.

    Raises TapError where they cannot.
    """
    if share.form == "none":
        return student, None
    if share.form == "weights":
        return student, share_convolutions(student, teacher, share.modules or "interval")
    ours, theirs = share.cut
    if share.form == "trunk":
        return student, share_trunk(student, teacher, ours, theirs, seen, known)
    return graft(student, teacher, ours, theirs, seen, known)


def _place_of_mistake(options: LossOptions) -> list[str]:
    """Of a loss that will be refused: the key where that is seen."""
    if options.loss not in LOSSES:
        return ["loss"]
    known = LOSSES[options.loss]
    given = (options.model_extra or {}).items()
    unfit = (key for key, value in given if not isinstance(value, Mapping) and known.refusal(key, value))
    return [*(key for key, _ in given if key not in known.options), *unfit][:1]


def _misfits(options: SchedulerOptions, epochs: int) -> Iterator[tuple[str, str]]:
    """(key, message) of what of a schedule would never be reached in so many epochs."""
    if options.warmup_epochs >= epochs:
        yield (
            "warmup_epochs",
            f"{options.warmup_epochs:g} epochs of warm-up leave nothing of {epochs} epochs",
        )
    if options.sched == "step" and options.decay_epochs >= epochs:
        yield (
            "decay_epochs",
            f"a step every {options.decay_epochs:g} epochs is never taken in {epochs}; see `decay_epochs`",
        )
    if options.sched == "multistep" and min(options.decay_milestones, default=epochs) >= epochs:
        yield "decay_milestones", f"no milestone of {options.decay_milestones} lies within the {epochs} epochs"


def _names(objectives: Sequence[Objective]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(objective.name for objective in objectives))


def _is_idle(grown: Trace, tap: Tap) -> bool:
    """Whether the graft put nothing in the place of a layer, since the teacher's have done its work."""
    return grown.modules[tap.module].kind == "Idle"


def _in_body(pair: Pair) -> Pair:
    return replace(pair, student=replace(pair.student, module=f"body.{pair.student.module}"))


def _above_the_cut(pairs: Sequence[Pair], grown: Trace) -> tuple[Pair, ...]:
    """Of the pairs of the plain student, those whose layers are still there in the graft."""
    moved = [_in_body(pair) for pair in pairs]
    kinds = {name: module.kind for name, module in grown.modules.items()}
    return tuple(pair for pair in moved if kinds.get(pair.student.module, "Idle") != "Idle")


def _trace_checkpointing(found: Trace) -> Trace:
    """The trace of a model that runs its layers as gradient checkpointing does. Raises TraceError where it cannot."""
    model = build_on_meta(found.model, found.model_kwargs)
    checkpoint_gradients(model, found.model)
    seen = trace(model, found.input_size, training=found.training)
    return replace(seen, model=found.model, model_kwargs=found.model_kwargs)


def _parameter_names(trace_: Trace) -> list[str]:
    return [name for name, _ in build_on_meta(trace_.model, trace_.model_kwargs).named_parameters()]


def _modules_of(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([name.rpartition(".")[0] for name in names] + list(names)))


def _check_output(trace_: Trace, key: str) -> None:
    """The losses read one tensor, of one row of classes an image. Raises TraceError or AdapterError."""
    outputs = [spec.tap for spec in trace_.specs if spec.tap.is_output]
    if outputs != [Tap("")]:
        given = f"gives several tensors ({', '.join(map(str, outputs))})" if outputs else "gives no tensor"
        raise TraceError(
            f"the {key} {trace_.model} {given}; a loss reads one: wrap it in a module that returns the logits"
        )
    check_logits(trace_.output, key)


def _try_optimizer(options: OptimizerOptions) -> None:
    """One update of a few numbers, so that what an optimizer does not take is told before training."""
    from timm.optim import create_optimizer_v2

    weights = [nn.Parameter(torch.ones(shape, device="cpu")) for shape in ((2,), (2, 2), (2, 2, 3, 3))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    rates = {"lr": options.lr, "weight_decay": options.weight_decay, "momentum": options.momentum}
    check_truths(f"optimizer `{options.opt}`", optimizer_parameters(options.opt), options.opt_args, RunError)
    try:
        create_optimizer_v2([{"params": weights}], opt=options.opt, **rates, **options.opt_args).step()
    except Exception as refusal:  # timm's, torch's and other libraries' optimizers have their own words
        given = ", ".join(f"{key}={value!r}" for key, value in options.opt_args.items())
        raise RunError(f"optimizer `{options.opt}` does not take {given or 'these values'}: {short(refusal)}") from None


def _try_images(options: DataOptions) -> None:
    """The transforms of training on one grey image, since timm reads `aa` and others when it makes them."""
    size = (options.input_size[0], 32, 32)
    images: Any = [(Image.new("L" if size[0] == 1 else "RGB", (32, 32), 128), 0)]
    try:
        next(iter(loader(images, options.model_copy(update={"workers": 0}), InputSpec(size).or_plain(), training=True)))
    except Exception as refusal:  # timm's and torchvision's have their own words
        raise DataError(f"the images cannot be transformed as `data` says: {short(refusal)}") from None


def _to_blame(options: DataOptions) -> list[str]:
    """Of transforms that are refused: the first key without which they are not, if it is one alone."""
    usual = DataOptions(input_size=options.input_size)
    for key in ("aa", "ratio", "scale", "color_jitter", "crop_pct", "reprob"):
        with suppress(DataError):
            _try_images(options.model_copy(update={key: getattr(usual, key)}))
            return [key]
    return []


def _unwritable(folder: Path) -> str:
    """Why a folder cannot be made or written, as far as that is seen without trying; else empty."""
    try:
        there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    except (OSError, ValueError) as refusal:  # a path that no system takes
        return f"no folder can be called {str(folder)[:80]!r}: {reason(refusal)}"
    if not there.is_dir():
        return f"{str(there)!r} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{str(there)!r} cannot be written"


def _read_class_map(path: str) -> list[int]:
    try:
        found = json.loads(read_text(Path(path)))
    except (OSError, ValueError, RecursionError) as refusal:
        raise WeightsError(f"cannot read the class map {path!r}: {reason(refusal)}") from None
    if not isinstance(found, list) or not all(type(index) is int for index in found):
        raise WeightsError(f"the class map {path!r} is not a JSON list of whole numbers")
    return found


def _input_spec(
    trace_: Trace, size: tuple[int, int, int], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> InputSpec:
    """The recipe's numbers, else those of timm's config for this model."""
    own = InputSpec.of(build_on_meta(trace_.model, trace_.model_kwargs), size)
    return InputSpec(size, mean or own.mean, std or own.std)
