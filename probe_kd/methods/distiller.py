"""One training step as one module: the student, its adapters and the objectives, and the teacher beside them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from probe_kd.engine.probe import Probe
from probe_kd.engine.spec import InputSpec, Tap, Trace, Traces
from probe_kd.engine.surgery import freeze as freeze_layers
from probe_kd.engine.surgery import norms_in
from probe_kd.engine.tracing import trace
from probe_kd.errors import LossError, nearest
from probe_kd.methods.adapters import ImageView, Target
from probe_kd.methods.consistency import check_models, check_objectives, refuse_shared
from probe_kd.methods.dropping import TeacherDropping
from probe_kd.methods.fitting import fit_statistics, refuse_moving_target
from probe_kd.methods.inputs import (
    AsTraced,
    check_finite_images,
    check_gradients,
    check_images,
    check_type,
    explaining_one_image,
    input_of_traced,
    resolve_inputs,
    trace_teachers,
    view_of_teacher,
)
from probe_kd.methods.loss_modules import make_losses
from probe_kd.methods.naming import by_teacher, compared_alone, name_teachers, teachers_by_name
from probe_kd.methods.normalisation import fitted_norms
from probe_kd.methods.objectives import Comparison, Objective
from probe_kd.methods.outputs import tensor_at
from probe_kd.methods.shares import ShareWeights, has_shares
from probe_kd.methods.sharing import Sharing
from probe_kd.methods.targets import (
    CachedTargets,
    by_target,
    compared,
    expanded,
    make_adapters,
    module_key,
    targets_from,
    targets_of,
    teacher_sides,
)
from probe_kd.methods.teachers import (
    Block,
    FrozenTeacher,
    JointTeacher,
    NoTeacher,
    Teacher,
    TeacherFeatures,
    Teachers,
)
from probe_kd.methods.terms import Terms


# Longer than 200 lines: what people call is in one place, a quarter of it docstrings. Its methods are short and call
# the files above; they share the student, the teachers, and the adapters and losses of the objectives.
class Distiller(nn.Module):
    """One training step as a module: `distiller(images, target)` returns `{"loss", "output", and each objective by
    its name}`.

    This is the contract of `timm.task.TrainingTask`. `loss` is the weighted sum, and the objectives are unweighted.
    `output` is the student's output, or None if no objective reads it and the student may stop earlier. If the
    argument `output` names another tap (`head`, `[logits]`), that is always read and returned. With
    `cached_targets`, the result of `teacher_targets` for the same images, the teacher does not run.

    The module owns the student and the adapters: these are what an optimizer, DDP, `state_dict` and `train()` see.
    The teacher, None if no objective needs it, follows `.to(device)`, is put into eval mode by every step, runs under
    `no_grad`, and is otherwise hidden. A student that is the teacher, or shares a layer or parameter, is refused.

    `images` are normalised as `student_input` says. Each model sees them at its own size, and the teacher sees them
    normalised as `teacher_input` says. Both default to the model's timm config and to the size at which it was
    traced; images of another size are then refused. If only one of the models has a config, both inputs have to be
    given. `class_map` is the teacher's index of each class of the student, if their classes differ.

    `teacher` may be several teachers, `{"dino": model, "siglip": model}`, which are all frozen. Pairs and objectives
    then say whose layer they mean (`dino:blocks.11`, or `dino:` for its output), and one layer of the student may learn
    from several teachers. A loss of outputs that names no teacher learns from the mean of the probabilities of all that
    classify (see `MeanOfTeachers`). `teacher_input`, `teacher_trace`, `class_map` and `teacher_weight` are then
    mappings with the same names. A teacher's weight multiplies its pairs in every loss, and is its share of the mean. A
    teacher that no objective reads does not run (`unread_teachers`). With `teacher_dropping`, the `loss` of a training
    step leaves out the terms of some teachers, drawn by `seed` (see `TeacherDropping`). `set_epoch` seeds the draws
    anew: call it before every step if the step is compiled.

    `block` makes the teacher train too (Rocket Launching, Zhou et al. 2018, arXiv 1708.04106). The module then owns
    it as it owns the student. `block` is the gradient block, which says what a loss that compares both models may
    change:

    - `output`: nothing through the teacher's features, as in the authors' code;
    - `params`: through the teacher, only the parameters that it shares with the student, as in the text;
    - `trunk`: as `output`, and no loss of the student changes what is shared;
    - `off`: both models.

    `freeze` names layers of the student, by name or glob, that do not train until `close()`: their parameters get no
    gradient, and their batch norms keep their statistics.

    The modules of losses with parameters are in `losses`. Some need `num_images`, the number of training images, and
    the step's `index`, the number of each image among them.

    `sharing` says what the two models share, as returned by `share_convolutions`, `share_trunk` and `graft`. A weight
    or an option that is a `Schedule` changes when `set_epoch` is called. A weight that is a `Share` is measured by
    `measure_shares` before the first step. The hooks stay on until `close()`.

    If no gradient can reach a captured feature of the student, the step raises an error that names the tap. Everything
    is planned in the constructor, with traces if you pass them (for a model that trains: in training mode): layers that
    do not exist, never run, or cannot be compared raise TapError or AdapterError here and not in a step.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Mapping[str, nn.Module] | None,
        objectives: Objective | Iterable[Objective],
        *,
        student_input: InputSpec | None = None,
        teacher_input: InputSpec | Mapping[str, InputSpec] | None = None,
        student_trace: Trace | None = None,
        teacher_trace: Trace | Mapping[str, Trace] | None = None,
        class_map: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        teacher_weight: Mapping[str, float] | None = None,
        teacher_dropping: float = 0.0,
        seed: int = 0,
        block: Block | None = None,
        sharing: Sharing | None = None,
        freeze: Sequence[str] = (),
        output: str | Tap = "",
        num_images: int | None = None,
    ) -> None:
        super().__init__()
        teachers = teachers_by_name(teacher)
        check_models(student, teachers)
        self.objectives = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
        check_objectives(self.objectives, teachers, block, sharing)
        for name, model in teachers.items():
            refuse_shared(student, model, name, frozen=block is None)
        self.block, self.sharing = block, sharing
        self.student = student
        self.teacher = teachers[""] if block else None
        student_trace = student_trace or trace(student, student_input.size if student_input else None, training=True)
        resizes = student_input is not None
        student_input = student_input or InputSpec(student_trace.input_size)
        teacher_inputs = by_teacher("teacher_input", teacher_input, teachers)
        student_input, teacher_inputs = resolve_inputs(student, teachers, student_input, teacher_inputs)
        self.student_view = ImageView(student_input, student_input) if resizes else AsTraced(student_input.size)
        self._channels = student_input.size[0]
        self.output = Tap.parse(output)
        self._student_probe = self._probe_student(student_trace)
        self._run_student: Callable[[Tensor], dict[Tap, Tensor]] = self._student_probe
        self._teacher: Teacher = NoTeacher()
        self.adapters, self.losses, self.teacher_views = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self._targets: dict[str, Target] = {}
        if teachers and (block or any(objective.needs_teacher for objective in self.objectives)):
            given_traces = by_teacher("teacher_trace", teacher_trace, teachers)
            traces = trace_teachers(teachers, teacher_inputs, given_traces, student_input, training=bool(block))
            class_maps = by_teacher("class_map", class_map, teachers)
            weights: dict[str, float] = by_teacher("teacher_weight", teacher_weight, teachers)
            named = name_teachers(self.objectives, student_trace, traces, class_maps=class_maps, weights=weights)
            self.objectives = tuple(expanded(objective, student_trace, traces) for objective in named)
            self.adapters = make_adapters(self.objectives, student_trace, traces, class_maps)
            frozen = {} if block else teachers
            self.losses = make_losses(
                self.objectives, self.adapters, student_trace, traces, frozen=frozen, num_images=num_images
            )
            if block:
                refuse_moving_target(self.adapters)
            self._targets = targets_of(self.objectives, self.adapters, traces)
            self._teacher = self._make_teacher(teachers, traces, teacher_inputs, student_input)
        self.unread_teachers = tuple(name for name in teachers if name not in self._teacher.models)
        self.shares = ShareWeights(self.objectives) if has_shares(self.objectives) else None
        self._terms = self._make_terms(teacher_dropping, seed)
        self._frozen = [student.get_parameter(name) for name in freeze_layers(student, freeze)]
        self._frozen_norms = norms_in(student, freeze)
        self.train(self.training)
        # Last, when nothing can be refused any more: a constructor that raises leaves no hook behind.
        self._student_probe.attach()
        self._teacher.attach()

    def _make_terms(self, dropping: float, seed: int) -> Terms:
        return Terms(
            self.objectives,
            self.adapters,
            self.losses,
            block_gradient=not self._teacher.passes_gradient,
            dropping=TeacherDropping(compared_alone(self.objectives), dropping, seed) if dropping else None,
            shares=self.shares,
        )

    def _probe_student(self, student: Trace) -> Probe:
        named = [self.output] * (self.output != Tap(""))
        taps = dict.fromkeys([*(tap for objective in self.objectives for tap in objective.taps[0]), *named])
        return Probe(self.student, [replace(tensor_at(student, tap, "student"), tap=tap) for tap in taps])

    def _make_teacher(
        self,
        teachers: Mapping[str, nn.Module],
        traces: Traces,
        inputs: Mapping[str, InputSpec],
        student_input: InputSpec,
    ) -> Teacher:
        replayed = self.sharing.replayed if self.sharing else {}
        taps = dict.fromkeys(tap for objective in self.objectives for tap in objective.taps[1])
        taps = dict.fromkeys([*taps, *replayed.values()])
        frozen: list[FrozenTeacher] = []
        for name in dict.fromkeys(tap.model for tap in taps):
            own_input = inputs.get(name) or input_of_traced(teachers[name], student_input, traces.by_model[name])
            view = view_of_teacher(student_input, own_input, one_image=bool(replayed))
            self.teacher_views[module_key(name)] = view
            specs = [(tap.local, tensor_at(traces, tap, "teacher")) for tap in taps if tap.model == name]
            probe = Probe(teachers[name], [replace(spec, tap=tap) for tap, spec in specs])
            if self.block is not None:
                return JointTeacher(probe, view, self.student, self.block, replayed)
            targets = [key for key, target in self._targets.items() if target.teacher == name]
            frozen.append(FrozenTeacher(probe, view, targets, name))
        return frozen[0] if len(frozen) == 1 else Teachers(frozen)

    def set_epoch(self, epoch: float, epochs: int) -> None:
        """Set every weight and option that is a `Schedule` to its value after `epoch` of `epochs`."""
        parameter = next(self.student.parameters(), torch.empty(0))
        self._terms.set_epoch(epoch, epochs, like=parameter)
        if self._terms.dropping is not None:
            self._terms.dropping.begin(epoch, parameter.device)

    @property
    def weights(self) -> dict[str, float]:
        """The present weight of each objective by its name. Raises LossError for a `Share` that was not measured."""
        names = (objective.name for objective in self.objectives)
        return dict(zip(names, self._terms.weights, strict=True))

    def forward(
        self,
        images: Tensor,
        target: Tensor | None = None,
        cached_targets: CachedTargets | None = None,
        index: Tensor | None = None,
    ) -> dict[str, Tensor | None]:
        self._check(images)
        if torch.compiler.is_compiling() or len(images) > 1:
            return self._step(images, target, cached_targets, index)
        with explaining_one_image():
            return self._step(images, target, cached_targets, index)

    def features(
        self, images: Tensor, cached_targets: CachedTargets | None = None
    ) -> tuple[dict[Tap, Tensor], TeacherFeatures]:
        """Run the models, or the student alone with cached targets, and return the features of both by tap.

        Neither mode nor weights change: call `eval()` before, and compute under `no_grad`.
        """
        teacher = self._teacher.features(images, by_target(cached_targets, self._targets))
        with self._teacher.around_student(teacher.own):
            return self._run_student(self.student_view(images)), teacher

    def _step(
        self, images: Tensor, target: Tensor | None, cached_targets: CachedTargets | None, index: Tensor | None
    ) -> dict[str, Tensor | None]:
        teacher = self._teacher.features(images, by_target(cached_targets, self._targets))
        if self.block is None:  # before the student runs, so that features which are larger than what they become go
            sides = teacher_sides(self.objectives, self.adapters, teacher.compared, teacher.targets)
            teacher = TeacherFeatures(sides=sides)
        with self._teacher.around_student(teacher.own):
            student = self._run_student(self.student_view(images))
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and self.block != "trunk":
            check_gradients(student, self.student)
        drop = self.training and torch.is_grad_enabled()
        loss, terms = self._terms(student, teacher, target, index, drop=drop)
        return {"loss": loss, "output": student.get(self.output), **terms}

    def _check(self, images: Tensor) -> None:
        """Check types in every step, and values in every step on the CPU, but only in the first on a GPU."""
        check_images(images, self._channels)
        check_type(images, "student", self.student)
        for name, model in self._teacher.models.items():
            check_type(images, f"teacher {name}".strip(), model)
        readable = type(images) in (Tensor, nn.Parameter) and images.device.type != "meta"
        if torch.compiler.is_compiling() or not readable or (self._terms.checked and images.device.type != "cpu"):
            return
        check_finite_images(images)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that timm exempts from weight decay. `create_optimizer_v2(distiller)` calls this."""
        sides = {"student": self.student, "teacher": self.teacher}
        return {f"{side}.{name}" for side, model in sides.items() for name in getattr(model, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Return a function from a parameter's name to its layer, for timm's layer decay.

        The adapters count as the student's last layer.
        """
        layers: dict[str, float] = {}
        for side, model in (("teacher", self.teacher), ("student", self.student)):
            if model is not None:
                layers |= {f"{side}.{name}": layer for name, layer in _layers(model, coarse).items()}
        last = max((layer for name, layer in layers.items() if name.startswith("student.")), default=0)
        return lambda name: layers.get(name, last)

    @property
    def reads_index(self) -> bool:
        """Whether a loss reads the `index` of the images."""
        return any("index" in objective.resolved.also for objective in self.objectives)

    @property
    def shared(self) -> list[nn.Parameter]:
        """The parameters that both models share in joint training."""
        return self._teacher.shared

    @property
    def frozen_teachers(self) -> Mapping[str, nn.Module]:
        """The teachers that run and do not train, by name; a single one has an empty name. They are no submodules."""
        return self._teacher.models if self.block is None else {}

    @property
    def frozen_teacher(self) -> nn.Module | None:
        """The teacher, if there is one and it does not train; of several, see `frozen_teachers`."""
        models = list(self.frozen_teachers.values())
        return models[0] if len(models) == 1 else None

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the tensors that `teacher_targets` returns, in the same order.

        A name is that of a tap, or describes what an adapter computes from taps, if that is smaller. With several
        teachers, it begins with the name of the teacher.
        """
        return tuple(self._targets)

    def targets_of(self, teacher: str) -> dict[str, Target]:
        """The targets of one of several teachers, or of the single one by an empty name, by their names in `targets`.

        Names and shapes of a `Target` itself are without the teacher's name.
        """
        return {name: target for name, target in self._targets.items() if target.teacher == teacher}

    def teacher_targets(self, images: Tensor, teachers: Iterable[str] | None = None) -> list[Tensor]:
        """Run the frozen teachers and return one tensor for each of `targets`, for a later step's `cached_targets`.

        `teachers` are the names of those to run, of which the result has the targets alone, in the same order; default
        are all. A step with `cached_targets` runs neither the teacher nor the teacher's side of the adapters. If these
        are a mapping from names of targets, it may lack those of some teachers, which then run.
        """
        names = tuple(self._teacher.models if teachers is None else teachers)
        features: dict[Tap, Tensor] = {}
        for name in names:
            features |= self._teacher_named(name).features(images).compared
        targets = targets_from(self.objectives, self.adapters, features, names)
        return [targets[key] for key, target in self._targets.items() if target.teacher in names]

    def _teacher_named(self, name: str) -> Teacher:
        if name not in self._teacher.models:
            legal = ", ".join(self._teacher.models)
            raise LossError(f"no teacher {name!r} runs{nearest(name, self._teacher.models)}; those that do: {legal}")
        if isinstance(self._teacher, Teachers):
            return next(teacher for teacher in self._teacher.teachers if name in teacher.models)
        return self._teacher

    @torch.no_grad()
    def fit_targets(
        self,
        batches: Iterable[Tensor | Sequence[Any]],
        *,
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Fit the statistics of `normalize: fitted` and `phi_s` on the teacher's features of these images.

        `batches` are images as a step takes them, or sequences that begin with them. Call this once before the first
        step. The statistics are buffers of `adapters`, so `state_dict` holds them. It does nothing, and reads no batch,
        if no objective has statistics. `add_up` adds a tensor over all processes, if each has its own images.

        Raises AdapterError without images, and for a target that does not vary over them.
        """
        if fitted_norms(self.adapters):
            fit_statistics(self.objectives, self.adapters, map(self._teacher_features, batches), add_up)

    def _teacher_features(self, batch: Tensor | Sequence[Any]) -> Mapping[Tap, Tensor]:
        images = batch if isinstance(batch, Tensor) else batch[0]
        self._check(images)
        return self._teacher.features(images).compared

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the student.

        A frozen teacher and the batch norms in frozen layers stay in eval mode, or their statistics would drift.
        """
        super().train(mode)
        self._teacher.keep_in_eval()
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._teacher.apply(fn)
        return self

    def compile_models(self, *sides: Literal["student", "teacher"], **options: Any) -> None:
        """Compile how the models run inside a step. `options` are those of `torch.compile`.

        Compiling a model by itself would run all its layers, and change batch statistics above the last tap.
        """
        if "student" in sides:
            self._run_student = torch.compile(self._student_probe, **options)
        if "teacher" in sides:
            self._teacher.compile(**options)

    def close(self) -> None:
        """Remove the hooks from both models."""
        self._student_probe.close()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._teacher.close()

    @property
    def plan(self) -> list[tuple[str, Comparison, str]]:
        """The (objective, comparison, adapter) of every comparison, ready to print."""
        return [
            (objective.name, comparison, str(adapter))
            for objective, comparison, adapter in compared(self.objectives, self.adapters)
        ]


def _layers(model: nn.Module, coarse: bool) -> dict[str, float]:
    from timm.models import group_parameters

    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise LossError(f"{type(model).__name__} has no group_matcher, so timm knows no order of its layers")
    layers: dict[str, float] = group_parameters(model, matcher(coarse=coarse), reverse=True)
    return layers
