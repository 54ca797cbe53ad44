"""One training step as one module: the student, its adapters and the objectives, with the teacher at their side."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from probe_kd.engine.probe import Probe
from probe_kd.engine.spec import InputSpec, Schedule, Tap, Trace, value_at
from probe_kd.engine.surgery import detached, get, replaying
from probe_kd.engine.tracing import refuse_lazy, trace
from probe_kd.errors import LossError, TraceError, demand
from probe_kd.methods.adapters import Adapter, Answer, ImageView
from probe_kd.methods.losses.common import check_finite
from probe_kd.methods.losses.labels import check_labels
from probe_kd.methods.objectives import Comparison, Objective
from probe_kd.methods.sharing import Sharing

Block = Literal["output", "params", "trunk", "off"]


class Distiller(nn.Module):
    """One training step as a module: `distiller(images, target)` returns `{"loss", "output", and each objective by
    its name}`.

    This is the contract of `timm.task.TrainingTask`. `loss` is the weighted sum, and the objectives are unweighted.
    `output` is the student's logits, or None if no objective needs them and the student stopped earlier. With
    `told`, the result of `ask` for the same images, the teacher does not run.

    The module owns the student and the adapters: these are what an optimizer, DDP, `state_dict` and `train()` see.
    The teacher follows `.to(device)`, stays in eval mode, runs under `no_grad`, and is otherwise hidden. It may be
    None if no objective needs it.

    `images` are normalised as `student_input` says. Each model sees them at its own size, and the teacher sees them
    normalised as `teacher_input` says. Both default to the model's timm config and to the size at which it was
    traced; images of another size are then refused. If only one of the models has a config, both inputs have to be
    given. `class_map` is the teacher's index of each class of the student, if their classes differ.

    `block` makes the teacher train too (Rocket Launching, Zhou et al. 2018, arXiv 1708.04106). The module then owns
    it as it owns the student. `block` is the gradient block, which says what a loss that compares both models may
    change:

    - `output`: nothing through the teacher's features, as in the authors' code;
    - `params`: through the teacher, only the parameters that it shares with the student, as in the text;
    - `trunk`: as `output`, and no loss of the student changes what is shared;
    - `off`: both models.

    `sharing` says what the two models share, as returned by `share_convolutions`, `share_trunk` and `graft`.

    A weight or an option that is a `Schedule` changes when `set_epoch` is called. The hooks stay on both models
    until `close()`.

    A frozen teacher does not change: every step puts it into eval mode. A student that is the teacher, or shares a
    layer or a parameter with it, is refused. If no gradient can reach a captured feature of the student, the step
    raises an error that names the tap.

    Pass traces if you have them (for a model that trains: in training mode). Everything is planned in the
    constructor: layers that do not exist, never run, or cannot be compared raise TapError or AdapterError here and
    not in a step.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        objectives: Objective | Iterable[Objective],
        *,
        student_input: InputSpec | None = None,
        teacher_input: InputSpec | None = None,
        student_trace: Trace | None = None,
        teacher_trace: Trace | None = None,
        class_map: Sequence[int] | None = None,
        block: Block | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        super().__init__()
        for side, model in (("student", student), ("teacher", nn.Identity() if teacher is None else teacher)):
            demand(model, nn.Module, f"the {side}", LossError, "an nn.Module, as timm.create_model(name) gives")
            refuse_lazy(model, f"the {side}")
        self.objectives = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
        _check(self.objectives, teacher, block, sharing)
        _refuse_shared(student, teacher, frozen=block is None)
        self.block, self.sharing = block, sharing
        self.student = student
        self.teacher = teacher if block else None
        seen = student_trace or trace(student, student_input.size if student_input else None, training=True)
        given, wanted = _inputs(student, teacher, student_input or InputSpec(seen.input_size), teacher_input)
        self.student_view = ImageView(given, given) if student_input else _AsTraced(given.size)
        self._channels = given.size[0]
        taps = dict.fromkeys(tap for objective in self.objectives for tap in objective.taps[0])
        self._student_probe = Probe(student, [seen[tap] for tap in taps])
        self._teacher_probe: Probe | None = None
        self.adapters = nn.ModuleDict()
        self._answers: dict[str, Answer] = {}
        self._frozen: list[nn.Module] = []  # the modules of a teacher that does not train
        self._checked = False  # whether values on another device than the CPU were looked at, in the first step
        self.shared: list[nn.Parameter] = []  # that both models have
        if teacher is not None and (block or any(objective.needs_teacher for objective in self.objectives)):
            known = teacher_trace or _trace_teacher(teacher, teacher_input, given, training=bool(block))
            self._bring_teacher(teacher, wanted or _own_input(teacher, given, known), given, known)
            self.adapters = make_adapters(self.objectives, seen, known, class_map)
            self._answers = answers(self.objectives, self.adapters, known)
        self.set_epoch(0, 1)
        # Last, when nothing can be refused any more: a constructor that raises leaves no hook behind.
        for probe in filter(None, (self._student_probe, self._teacher_probe)):
            probe.attach()

    def _bring_teacher(self, teacher: nn.Module, wanted: InputSpec, given: InputSpec, known: Trace) -> None:
        replayed = self.sharing.replayed if self.sharing else {}
        if replayed and (wanted.mean, wanted.std, wanted.size) != (given.mean, given.std, given.size):
            raise LossError(
                f"a shared trunk sees one image: the student expects {given} and the teacher {wanted}; give both the "
                "same size, mean and std"
            )
        self.teacher_view = ImageView(given, wanted)
        taps = dict.fromkeys(tap for objective in self.objectives for tap in objective.taps[1])
        taps.update(dict.fromkeys(replayed.values()))
        self._teacher_probe = Probe(teacher, [known[tap] for tap in taps])
        self._replayed = {get(self.student, name): tap for name, tap in replayed.items()}
        mine = {id(parameter) for parameter in self.student.parameters()}
        theirs = list(teacher.parameters())
        self.shared = [parameter for parameter in theirs if id(parameter) in mine] if self.block else []
        self._own = [parameter for parameter in theirs if id(parameter) not in mine] if self.block else []
        self._frozen = [] if self.block else list(teacher.modules())
        self.train(self.training)

    def set_epoch(self, epoch: float, epochs: int) -> None:
        """Move every weight and option that is a `Schedule` to where it is after `epoch` of `epochs`."""
        self._weights = [value_at(objective.weight, epoch, epochs) for objective in self.objectives]
        self._options = [
            {name: value_at(value, epoch, epochs) for name, value in objective.options.items()}
            for objective in self.objectives
        ]

    @property
    def scheduled(self) -> bool:
        """Whether `set_epoch` changes anything."""
        values = [value for objective in self.objectives for value in (objective.weight, *objective.options.values())]
        return any(isinstance(value, Schedule) for value in values)

    def forward(
        self, images: Tensor, target: Tensor | None = None, told: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor | None]:
        _check_images(images, self._channels)
        self._check_numbers(images)
        if torch.compiler.is_compiling() or len(images) > 1:
            return self._step(images, target, told)
        try:
            return self._step(images, target, told)
        except ValueError as refusal:  # torch's, of a norm whose map is 1x1 where one image is alone
            if "more than 1 value per channel" not in str(refusal):
                raise
            raise LossError(
                "the images are a batch of one, and a batch norm in training has one value for each channel of it, "
                "whose variance is 0: give batches of 2 at least (`batch_size`, or `DataLoader(..., "
                "drop_last=True)`), larger images, or call eval() on the norm"
            ) from None

    def _step(self, images: Tensor, target: Tensor | None, told: Sequence[Tensor] | None) -> dict[str, Tensor | None]:
        kept: dict[str, Tensor] = {}
        if told is None:
            theirs, known = self._ask_teacher(images)
        else:
            kept = self._recall(told)
            theirs = known = self._as_features(kept)
        with self._shared_as_it_is(theirs):
            ours = self._student_probe(self.student_view(images))
        self._check_gradients(ours)
        result: dict[str, Tensor | None] = {}
        terms = []
        for index, objective in enumerate(self.objectives):
            if objective.resolved.reads == "labels":
                answer = ours if objective.of == "student" else theirs
                term = self._labels(index, answer[Tap("")], target)
            else:
                term = self._comparisons(index, ours, known, kept)
            result[objective.name] = term
            terms.append(_weighted(self._weights[index], term))
        if not torch.compiler.is_compiling():
            self._checked = True
        return {"loss": _total(terms), "output": ours.get(Tap("")), **result}

    def _check_gradients(self, features: Mapping[Tap, Tensor]) -> None:
        """LossError for features of the student that no gradient can pass, though some of the student trains."""
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or self.block == "trunk":
            return
        lost = [str(tap) or "output" for tap, feature in features.items() if not feature.requires_grad]
        if lost and any(parameter.requires_grad for parameter in self.student.parameters()):
            raise LossError(
                f"no gradient reaches the student through {', '.join(map(repr, lost))}: all before it is frozen, or it "
                "was computed without gradients (reentrant checkpointing: `use_reentrant=False`; `no_grad`; `detach`). "
                "Train what leads to it, or tap another layer; with all of the student frozen, adapters alone learn"
            )

    def _check_numbers(self, images: Tensor) -> None:
        """LossError for images of another type than a model that sees them, and, where it can be read, for NaN.

        A GPU has to be waited for to read it, so there it is the first step that looks.
        """
        models = {"student": self.student}
        if self._teacher_probe is not None:
            models["teacher"] = self._teacher_probe.model
        for side, model in models.items():
            _check_type(images, side, model)
        readable = type(images) in (Tensor, nn.Parameter) and images.device.type != "meta"
        if torch.compiler.is_compiling() or not readable or (self._checked and images.device.type != "cpu"):
            return
        wrong = ~images.isfinite()
        if wrong.any():
            row = int(wrong.flatten(1).any(1).nonzero()[0])
            raise LossError(
                f"image {row} of the batch holds {images[wrong][0].item()}, and every loss of it would be no number; "
                "expected finite numbers. Look at how it is read and normalised (a std of 0, say)"
            )

    def _checks_values(self, tensor: Tensor) -> bool:
        """Whether values are to be looked at that the losses themselves do not: in the first step on a GPU."""
        return not self._checked and tensor.device.type not in ("cpu", "meta") and not torch.compiler.is_compiling()

    def no_weight_decay(self) -> set[str]:
        """The models' parameters that timm exempts from weight decay, as `create_optimizer_v2(distiller)` asks."""
        sides = {"student": self.student, "teacher": self.teacher}
        return {f"{side}.{name}" for side, model in sides.items() for name in getattr(model, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """A parameter's layer in its model, for timm's layer decay; the adapters count as the student's last."""
        layers: dict[str, float] = {}
        for side, model in (("teacher", self.teacher), ("student", self.student)):
            if model is not None:
                layers |= {f"{side}.{name}": layer for name, layer in _layers(model, coarse).items()}
        last = max((layer for name, layer in layers.items() if name.startswith("student.")), default=0)
        return lambda name: layers.get(name, last)

    @property
    def frozen_teacher(self) -> nn.Module | None:
        """The teacher that runs beside this module, where it does not train."""
        return self._teacher_probe.model if self._teacher_probe and self.block is None else None

    @property
    def answers(self) -> tuple[str, ...]:
        """What `ask` gives, in its order: a tap's name, or what is made of some, where that is smaller to keep."""
        return tuple(self._answers)

    def ask(self, images: Tensor) -> list[Tensor]:
        """What a frozen teacher gives for these images, one tensor for each of `answers`; `forward` takes it as `told`.

        A step that is told what the teacher gave before runs neither the teacher nor the teacher's side of adapters.
        """
        features, _ = self._ask_teacher(images)
        found = {str(tap): feature for tap, feature in features.items()}
        for objective, comparison, adapter in compared(self.objectives, self.adapters):
            if adapter.answer is not None:
                found[adapter.answer.name] = _target(objective, comparison, adapter, features, found)
        return [found[name] for name in self.answers]

    def _recall(self, told: Sequence[Tensor]) -> dict[str, Tensor]:
        if self.block is not None:
            raise LossError("the teacher trains too, so what it gave before is not what it gives now")
        return dict(zip(self.answers, told, strict=True))

    def _as_features(self, kept: Mapping[str, Tensor]) -> dict[Tap, Tensor]:
        taps = self._teacher_probe.taps if self._teacher_probe else ()
        return {tap: kept[str(tap)] for tap in taps if str(tap) in kept}

    def _ask_teacher(self, images: Tensor) -> tuple[dict[Tap, Tensor], dict[Tap, Tensor]]:
        """What the teacher gives, and what of it the student is compared with."""
        if self._teacher_probe is None:
            return {}, {}
        view = self.teacher_view(images)
        if self.block is None:
            self._keep_in_eval()
            # no_grad and not inference_mode: its tensors could not be saved for the student's backward
            with torch.no_grad():
                features = self._teacher_probe(view)
            return features, features
        teacher = self._teacher_probe.model
        random = _Random(teacher) if self.block == "params" else None
        features = self._teacher_probe(view)
        if self.block in ("output", "trunk"):
            return features, {tap: feature.detach() for tap, feature in features.items()}
        if random is None:
            return features, features
        # The same forward once more, in which the teacher's own parameters are constants.
        with random.again(), _buffers_aside(teacher), detached(teacher, self._own):
            return features, self._teacher_probe(view)

    @contextmanager
    def _shared_as_it_is(self, theirs: Mapping[Tap, Tensor]) -> Iterator[None]:
        """Around the student's forward: what the teacher has computed is not computed again, and the block is kept."""
        if self._teacher_probe is None or self.block is None:
            yield
            return
        blocked = self.block == "trunk"
        answers = {module: theirs[tap].detach() if blocked else theirs[tap] for module, tap in self._replayed.items()}
        constants = detached(self.student, self.shared) if blocked else nullcontext()
        with replaying(answers), constants:
            yield

    def _labels(self, index: int, output: Tensor, target: Tensor | None) -> Tensor:
        objective = self.objectives[index]
        if target is None:
            raise LossError(f"'{objective.name}' compares with labels, and the step got no target")
        if isinstance(objective.loss, str) and self._checks_values(output):
            check_labels(output, target)
        return objective.resolved.function(output, target, **self._options[index])

    def _comparisons(
        self, index: int, ours: Mapping[Tap, Tensor], theirs: Mapping[Tap, Tensor], kept: Mapping[str, Tensor]
    ) -> Tensor:
        objective, options = self.objectives[index], self._options[index]
        if self.block in ("params", "off") and isinstance(objective.loss, str):  # one of our own detaches otherwise
            options = {**options, "block_gradient": False}
        terms = []
        for _, comparison, adapter in compared([objective], self.adapters):
            taken = comparison.features("student", ours, matrices=objective.resolved.reads_matrices)
            sides = adapter.student_steps(taken), _target(objective, comparison, adapter, theirs, kept)
            term = objective.resolved.function(*sides, **options)
            if self._checks_values(term):
                check_finite(objective.name, term, *sides)
            terms.append(_weighted(comparison.weight, term))
        return _total(terms)

    def audit(self, images: Tensor, target: Tensor | None = None) -> dict[str, dict[str, float]]:
        """The norm of the gradient that each objective, unweighted, gives to each parameter that it reaches.

        Names are those of `named_parameters()`. Neither gradients, buffers nor random numbers are changed.
        """
        named = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        found: dict[str, dict[str, float]] = {}
        with _Random(self).again(), _buffers_aside(self):
            result = self(images, target)
            for objective in self.objectives:
                term = result[objective.name]
                assert term is not None
                gradients: Sequence[Tensor | None] = [None] * len(named)
                if term.requires_grad:
                    gradients = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
                pairs = zip(named, gradients, strict=True)
                found[objective.name] = {name: float(g.norm()) for name, g in pairs if g is not None}
        return found

    @contextmanager
    def training_only(self, names: Collection[str]) -> Iterator[list[nn.Parameter]]:
        """Inside, of what trains only these of `named_parameters()` do, those that `audit` names say. Gives them."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        resting = [parameter for name, parameter in named if name not in names]
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield [parameter for name, parameter in named if name in names]
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """Sets the student's mode; a frozen teacher stays in eval, or its running statistics would drift."""
        super().train(mode)
        self._keep_in_eval()
        return self

    def _keep_in_eval(self) -> None:
        """A frozen teacher, which `train()` of a module around both may have reached."""
        if not torch.compiler.is_compiling() and any(module.training for module in self._frozen):
            for module in self._frozen:
                module.training = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._teacher_probe is not None and self.block is None:
            self._teacher_probe.model._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def close(self) -> None:
        """Take the hooks off both models."""
        self._student_probe.close()
        if self._teacher_probe is not None:
            self._teacher_probe.close()

    @property
    def plan(self) -> list[tuple[str, Comparison, str]]:
        """(objective, comparison, adapter) for everything that is compared, ready to print."""
        return [
            (objective.name, comparison, str(adapter))
            for objective, comparison, adapter in compared(self.objectives, self.adapters)
        ]


def make_adapters(
    objectives: Iterable[Objective], student: Trace, teacher: Trace, class_map: Sequence[int] | None = None
) -> nn.ModuleDict:
    """The adapters of every objective, in the order of their comparisons: what `Distiller.adapters` is.

    Raises AdapterError where nothing brings two features together, TapError where no layer is.
    """
    found = {
        _key(objective.name): nn.ModuleList(
            objective.adapter(comparison, student, teacher, class_map) for comparison in objective.comparisons
        )
        for objective in objectives
    }
    return nn.ModuleDict(found)


def compared(objectives: Iterable[Objective], adapters: nn.ModuleDict) -> list[tuple[Objective, Comparison, Adapter]]:
    """Every comparison with its objective and its adapter, of those that `make_adapters` made."""
    found: list[tuple[Objective, Comparison, Adapter]] = []
    for objective in objectives:
        key = _key(objective.name)
        made: Any = adapters[key].children() if key in adapters else ()
        found += [(objective, *both) for both in zip(objective.comparisons, made, strict=True)]
    return found


def answers(objectives: Iterable[Objective], adapters: nn.ModuleDict, teacher: Trace) -> dict[str, Answer]:
    """By name, what a teacher that is frozen is asked for by these objectives, and what may be kept of it."""
    found: dict[str, Answer] = {}
    for _, comparison, adapter in compared(objectives, adapters):
        raw = [Answer(str(pair.teacher), tuple(teacher[pair.teacher].shape[1:])) for pair in comparison.pairs]
        found |= {answer.name: answer for answer in ([adapter.answer] if adapter.answer else raw)}
    return found


def _target(
    objective: Objective,
    comparison: Comparison,
    adapter: Adapter,
    theirs: Mapping[Tap, Tensor],
    kept: Mapping[str, Tensor],
) -> Tensor:
    """The teacher's side of a comparison: what was kept of it, or else made of the features now."""
    if adapter.answer is not None and adapter.answer.name in kept:
        return kept[adapter.answer.name]
    taken = comparison.features("teacher", theirs, matrices=objective.resolved.reads_matrices)
    target: Tensor = adapter.teacher_steps(taken)
    return target


def _weighted(weight: float, term: Tensor) -> Tensor:
    return term if weight == 1 else weight * term  # forth and back, a product by one is two kernels for nothing


def _total(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], start=terms[0])


class _AsTraced(nn.Module):
    """Images of the size that the student was traced at, and no other: the teacher's view would not be the same."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.size:
            raise LossError(
                f"the images are {'x'.join(map(str, images.shape[1:]))}, and the student was traced at "
                f"{'x'.join(map(str, self.size))}; give student_input=InputSpec({tuple(images.shape[1:])}, mean, std)"
            )
        return images


class _Random:
    """The random numbers that are drawn next, on the CPU and on a module's GPUs."""

    def __init__(self, module: nn.Module) -> None:
        places = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        self.devices = sorted({place.index for place in places if place.type == "cuda"})
        self.states = [torch.cuda.get_rng_state(device) for device in self.devices]
        self.state = torch.get_rng_state()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, they are drawn once more; what is drawn after it does not notice."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.state)
            for device, state in zip(self.devices, self.states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def _buffers_aside(module: nn.Module) -> Iterator[None]:
    """Inside, a forward changes copies of the buffers: running statistics are not counted twice.

    Copies stand in for the buffers, and are not copied back, since autograd refuses a buffer that was written again.
    """
    places = [
        (part, key, buffer) for part in module.modules() for key, buffer in part._buffers.items() if buffer is not None
    ]
    copies = {id(buffer): buffer.clone() for _, _, buffer in places}
    for part, key, buffer in places:
        part._buffers[key] = copies[id(buffer)]
    try:
        yield
    finally:
        for part, key, buffer in places:
            part._buffers[key] = buffer


def _check(
    objectives: Sequence[Objective], teacher: nn.Module | None, block: Block | None, sharing: Sharing | None
) -> None:
    for objective in objectives:
        demand(objective, Objective, "an objective", LossError, 'an Objective, such as Objective("soft_targets")')
    if not objectives:
        raise LossError("a Distiller needs at least one objective")
    names = [_key(objective.name)[:-1] for objective in objectives]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise LossError(f"two objectives are named {', '.join(map(repr, double))}; give each a name of its own")
    needy = [objective.name for objective in objectives if objective.needs_teacher]
    if teacher is None and (needy or block):
        raise LossError(f"{', '.join(map(repr, needy)) or 'block'} need a teacher, and there is none")
    if block is not None and block not in get_args(Block):
        raise LossError(f"block {block!r}: expected one of {', '.join(map(repr, get_args(Block)))}")
    if block is None and (sharing or any(objective.of == "teacher" for objective in objectives)):
        raise LossError(
            "the teacher is frozen, so it neither shares nor learns; give a gradient `block` to train it too"
        )
    if block is not None and not any(objective.of == "teacher" for objective in objectives):
        raise LossError(
            "the teacher trains too, and no objective is its own; add one of the labels with `of='teacher'`"
        )


def _inputs(
    student: nn.Module, teacher: nn.Module | None, given: InputSpec, wanted: InputSpec | None
) -> tuple[InputSpec, InputSpec | None]:
    """How images are normalised for both: as was said, or as timm's config on the model says.

    Raises LossError where one of them says it and the other does not: what the teacher then saw would be a guess.
    """
    ours = given.filled(student)
    theirs = (wanted or InputSpec(given.size)).filled(teacher)
    if teacher is not None and ours.complete != theirs.complete:
        side, model = ("student", student) if theirs.complete else ("teacher", teacher)
        raise LossError(
            f"nothing says how images are normalised for the {side}, {type(model).__name__}, which has no timm config, "
            f"and for the other model it is known; give {side}_input=InputSpec({given.size}, mean, std), with 0.0 and "
            "1.0 for images in [0, 1]"
        )
    return ours.or_plain(), wanted and theirs.or_plain()


def _own_input(teacher: nn.Module, given: InputSpec, known: Trace) -> InputSpec:
    own = InputSpec(known.input_size).filled(teacher)
    return own if own.complete else InputSpec(known.input_size, given.mean, given.std)


def _refuse_shared(student: nn.Module, teacher: nn.Module | None, *, frozen: bool) -> None:
    """LossError for one model in both places, and for what a student has in common with a frozen teacher."""
    if student is teacher:
        raise LossError("the student and the teacher are one object; give copy.deepcopy(model) as one of them")
    if teacher is None or not frozen:
        return
    theirs = {_place(tensor): name for name, tensor in _tensors(teacher)}
    for name, tensor in _tensors(student):
        if _place(tensor) in theirs:
            raise LossError(
                f"'{name}' of the student is '{theirs[_place(tensor)]}' of the teacher, which is frozen, and would be "
                "trained with the student; give the student a copy (copy.deepcopy), or train both by a gradient `block`"
            )
    modules = {id(module): name for name, module in teacher.named_modules()}
    for name, module in student.named_modules():
        if id(module) in modules and "drop" in type(module).__name__.lower():
            raise LossError(
                f"'{name}' of the student is '{modules[id(module)]}' of the teacher; give it one of its own"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _place(tensor: Tensor) -> tuple[str, int]:
    """Where it lies in memory: two parameters may be one there. On the meta device nothing does."""
    if tensor.device.type == "meta" or not tensor.numel():
        return "object", id(tensor)
    return str(tensor.device), tensor.data_ptr()


def _check_type(images: Tensor, side: str, model: nn.Module) -> None:
    """LossError for floats that no parameter of the model has, unless autocast brings them together."""
    if any(parameter.dtype == images.dtype for parameter in model.parameters()):
        return
    found = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    if found != images.dtype and (
        torch.float64 in (found, images.dtype) or not torch.is_autocast_enabled(images.device.type)
    ):
        mend = {torch.float32: "images.float()", torch.float64: "images.double()"}.get(found, f"images.to({found})")
        raise LossError(
            f"the images are {images.dtype}, and the {side} is not, but {found}; give `{mend}`"
            + (f", or bring both models to one type (`distiller.to({images.dtype})`)" if side == "teacher" else "")
            + (f", under `torch.autocast` to compute in {images.dtype}" if images.dtype.itemsize == 2 else "")
        )


def _check_images(images: Tensor, channels: int) -> None:
    """LossError for what is no batch of normalised images of so many channels."""
    if not isinstance(images, Tensor):
        raise LossError(
            f"the images are a {type(images).__name__}; expected a torch.Tensor (torch.from_numpy(...).float())"
        )
    if not images.is_floating_point():
        raise LossError(
            f"the images are {images.dtype}; expected floats, normalised: `((images / 255) - mean) / std` of pixels"
        )
    if images.ndim != 4 or images.shape[1] != channels or not images.numel():
        raise LossError(
            f"the images are {'x'.join(map(str, images.shape))}; expected batch x {channels} x height x width. Grey "
            "images are not taken as three channels: give `images.expand(-1, 3, -1, -1)`, or a student_input of one"
        )


def _trace_teacher(teacher: nn.Module, wanted: InputSpec | None, given: InputSpec, *, training: bool) -> Trace:
    if wanted is not None:
        return trace(teacher, wanted.size, training=training)
    try:
        return trace(teacher, given.size[1:], training=training)
    except TraceError:
        return trace(teacher, training=training)  # built for one size, which is not the student's


def _layers(model: nn.Module, coarse: bool) -> dict[str, float]:
    from timm.models import group_parameters

    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise LossError(f"{type(model).__name__} has no group_matcher, so timm knows no order of its layers")
    found: dict[str, float] = group_parameters(model, matcher(coarse=coarse), reverse=True)
    return found


def _key(name: str) -> str:
    """A module name cannot hold a dot, and must not hide an attribute of ModuleDict."""
    return f"{name.replace('.', '_')}_"
