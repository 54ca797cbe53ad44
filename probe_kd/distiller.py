"""One training step as one module: the student, its adapters and the objectives, with the teacher at their side."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from probe_kd.adapters import Adapter, ImageView, Normalize, Policy, Tokens, adapt
from probe_kd.errors import LossError, TraceError, nearest
from probe_kd.losses import LOSSES, Loss
from probe_kd.probe import Probe
from probe_kd.spec import FeatureSpec, InputSpec, Pair, Tap, Trace
from probe_kd.tracing import trace

_OUTPUT = Pair(Tap(""), Tap(""))


@dataclass(frozen=True)
class Objective:
    """One term of the loss: a loss function, the pairs it compares, its weight.

    `loss` is a name in `LOSSES`, or a `Loss` of your own. `name` is the key in the Distiller's result, the loss's own
    name by default. `pairs` are needed by losses that read features (`hint`) or flows (`fsp`: the input and the output
    of each paired module); each contributes its weight times its loss, and the sum is taken over the pairs. `options`
    are the loss function's keyword arguments; `policy`, `tokens`, `normalize` are those of `adapt`.

    Raises LossError for a loss, an option or a missing pair.
    """

    loss: str | Loss
    name: str = ""
    weight: float = field(default=1.0, kw_only=True)
    pairs: Sequence[Pair] = field(default=(), kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    policy: Policy = field(default="auto", kw_only=True)
    tokens: Tokens = field(default="drop", kw_only=True)
    normalize: Normalize = field(default="none", kw_only=True)
    resolved: Loss = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            known = ", ".join(LOSSES)
            raise LossError(f"there is no loss {self.loss!r}{nearest(self.loss, LOSSES)}; the losses: {known}")
        own = self.loss if isinstance(self.loss, str) else self.loss.function.__name__
        object.__setattr__(self, "resolved", LOSSES[self.loss] if isinstance(self.loss, str) else self.loss)
        object.__setattr__(self, "name", self.name or own)
        object.__setattr__(self, "pairs", tuple(self.pairs))
        if self.name in ("loss", "output"):
            raise LossError(f"an objective cannot be named {self.name!r}: the result has that key already")
        self.resolved.check_options(own, self.options)
        if self.resolved.reads in ("features", "flows") and not self.pairs:
            raise LossError(
                f"{own!r} compares layers, and there are no pairs; name them, or let match find them (`pairs: auto`)"
            )

    def adapter(self, student: FeatureSpec, teacher: FeatureSpec) -> Adapter:
        """What brings the features of one of `tap_pairs` together. Raises AdapterError where nothing can."""
        policy, flows = self.policy, self.resolved.reads == "flows"
        if flows and policy == "auto" and student.channels == teacher.channels:
            policy = "never"  # the paper compares the Gram matrices as they are
        return adapt(
            student,
            teacher,
            policy=policy,
            tokens=self.tokens,
            normalize=self.normalize,
            resize=not flows,
            bias=not flows,
        )

    def tap_pairs(self) -> tuple[Pair, ...]:
        """All (student tap, teacher tap) that are captured for this objective, in the order of its adapters."""
        reads = self.resolved.reads
        if reads == "labels":
            return ()
        if reads == "outputs":
            return (_OUTPUT,)
        if reads == "features":
            return tuple(self.pairs)
        return tuple(
            Pair(Tap(pair.student.module, port, pair.student.call), Tap(pair.teacher.module, port, pair.teacher.call))
            for pair in self.pairs
            for port in ("input", "output")
        )


class Distiller(nn.Module):
    """`distiller(images, target)` is one step: `{"loss", "output", and each objective by its name}`.

    This is the contract of `timm.task.TrainingTask`. `loss` is the weighted sum, the objectives are unweighted,
    `output` is the student's logits, or None where no objective needs them and the student stopped below.

    The student and the adapters are what this module owns: what an optimizer, DDP, `state_dict` and `train()` see. The
    teacher follows `.to(device)`, stays in eval mode, runs under `no_grad`, and is otherwise invisible.

    `images` are normalised as `student_input` says, and may be larger: each model sees them at its own size. The
    teacher sees them normalised as `teacher_input` says. Both default to the mean and standard deviation in timm's
    config on the model; the student's size then is that of the images, and so is the teacher's, unless it is built for
    another. The teacher may be None where no objective needs it.

    Traces may be given where they were already made (of the student: in training mode). Everything is planned here:
    layers that do not exist, never fire, or cannot be compared raise TapError or AdapterError now and not in a step.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        objectives: Iterable[Objective],
        *,
        student_input: InputSpec | None = None,
        teacher_input: InputSpec | None = None,
        student_trace: Trace | None = None,
        teacher_trace: Trace | None = None,
    ) -> None:
        super().__init__()
        self.objectives = tuple(objectives)
        _check_names(self.objectives, teacher)
        self._tap_pairs = [objective.tap_pairs() for objective in self.objectives]
        self.student = student
        seen = student_trace or trace(student, student_input.size if student_input else None, training=True)
        given = student_input or InputSpec.of(student, seen.input_size)
        pairs = list(chain.from_iterable(self._tap_pairs))
        needs_output = any(objective.resolved.reads == "labels" for objective in self.objectives)
        taps = dict.fromkeys(chain((pair.student for pair in pairs), [Tap("")] * needs_output))
        self.student_view = ImageView(given, given) if student_input else nn.Identity()
        self._student_probe = Probe(student, [seen[tap] for tap in taps]).attach()
        self._teacher_probe: Probe | None = None
        self.adapters = nn.ModuleDict()
        if teacher is not None and pairs:
            known = teacher_trace or _trace_teacher(teacher, teacher_input, given)
            wanted = teacher_input or InputSpec.of(teacher, known.input_size)
            self.teacher_view = ImageView(given, wanted)
            specs = [known[tap] for tap in dict.fromkeys(pair.teacher for pair in pairs)]
            self._teacher_probe = Probe(teacher.eval(), specs).attach()
            for objective in self.objectives:
                adapters = [
                    objective.adapter(seen[pair.student], known[pair.teacher]) for pair in objective.tap_pairs()
                ]
                self.adapters[_key(objective.name)] = nn.ModuleList(adapters)

    def forward(self, images: Tensor, target: Tensor | None = None) -> dict[str, Tensor | None]:
        ours = self._student_probe(self.student_view(images))
        theirs = self._ask_teacher(images)
        result: dict[str, Tensor | None] = {}
        loss: Tensor | float = 0.0
        for objective, pairs in zip(self.objectives, self._tap_pairs, strict=True):
            term = self._term(objective, pairs, ours, theirs, target)
            result[objective.name] = term
            loss = loss + objective.weight * term
        assert isinstance(loss, Tensor)
        return {"loss": loss, "output": ours.get(Tap("")), **result}

    def _ask_teacher(self, images: Tensor) -> dict[Tap, Tensor]:
        if self._teacher_probe is None:
            return {}
        # no_grad and not inference_mode: its tensors could not be saved for the student's backward
        with torch.no_grad():
            return self._teacher_probe(self.teacher_view(images))

    def _term(
        self,
        objective: Objective,
        pairs: tuple[Pair, ...],
        ours: Mapping[Tap, Tensor],
        theirs: Mapping[Tap, Tensor],
        target: Tensor | None,
    ) -> Tensor:
        loss, options = objective.resolved, objective.options
        if loss.reads == "labels":
            if target is None:
                raise LossError(f"'{objective.name}' compares with labels, and the step got no target")
            return loss.function(ours[Tap("")], target, **options)
        features: list[tuple[Any, Any]] = [
            adapter(ours[pair.student], theirs[pair.teacher])
            for pair, adapter in zip(pairs, self._adapters_of(objective), strict=True)
        ]
        if loss.reads == "flows":  # input and output of a block alternate
            features = [((a, c), (b, d)) for (a, b), (c, d) in zip(features[::2], features[1::2], strict=True)]
        weights = [pair.weight for pair in objective.pairs] if loss.reads != "outputs" else [1.0]
        terms = [
            weight * loss.function(student, teacher, **options)
            for weight, (student, teacher) in zip(weights, features, strict=True)
        ]
        return torch.stack(terms).sum()

    def train(self, mode: bool = True) -> Self:
        """Sets the student's mode; the teacher stays in eval, or its running statistics would drift."""
        super().train(mode)
        if self._teacher_probe is not None:
            self._teacher_probe.model.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._teacher_probe is not None:
            self._teacher_probe.model._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def close(self) -> None:
        """Take the hooks off both models."""
        self._student_probe.close()
        if self._teacher_probe is not None:
            self._teacher_probe.close()

    @property
    def plan(self) -> list[tuple[str, Pair, str]]:
        """(objective, pair, adapter) for everything that is compared, ready to print."""
        return [
            (objective.name, pair, str(adapter))
            for objective, pairs in zip(self.objectives, self._tap_pairs, strict=True)
            for pair, adapter in zip(pairs, self._adapters_of(objective), strict=True)
        ]

    def _adapters_of(self, objective: Objective) -> list[nn.Module]:
        key = _key(objective.name)
        return list(self.adapters[key].children()) if key in self.adapters else []


def _check_names(objectives: Sequence[Objective], teacher: nn.Module | None) -> None:
    if not objectives:
        raise LossError("a Distiller needs at least one objective")
    names = [objective.name for objective in objectives]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise LossError(f"two objectives are named {', '.join(map(repr, double))}; give each a name of its own")
    needy = [objective.name for objective in objectives if objective.tap_pairs()]
    if teacher is None and needy:
        raise LossError(f"{', '.join(map(repr, needy))} need a teacher, and there is none")


def _trace_teacher(teacher: nn.Module, wanted: InputSpec | None, given: InputSpec) -> Trace:
    if wanted is not None:
        return trace(teacher, wanted.size)
    try:
        return trace(teacher, given.size[1:])
    except TraceError:
        return trace(teacher)  # built for one size, which is not the student's


def _key(name: str) -> str:
    """A module name cannot hold a dot, and must not hide an attribute of ModuleDict."""
    return f"{name.replace('.', '_')}_"
