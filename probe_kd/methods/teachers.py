"""Teachers: where the targets of a step come from. A step calls `features(images)` and does not depend on the kind.

`NoTeacher` is used if there is no teacher. A `FrozenTeacher` runs, or its targets are read from a cache. `Teachers` are
several frozen teachers with names. A `JointTeacher` trains with the student.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from probe_kd.engine.probe import Probe
from probe_kd.engine.randomness import RandomState
from probe_kd.engine.spec import Tap
from probe_kd.engine.surgery import buffers_aside, detached, get, replaying
from probe_kd.errors import LossError
from probe_kd.methods.adapters import ImageView
from probe_kd.methods.targets import target_of

Block = Literal["output", "params", "trunk", "off"]
Features = Mapping[Tap, Tensor]


@dataclass(frozen=True)
class TeacherFeatures:
    """The teacher's features for a batch.

    The teacher's own losses read `own`, and the student is compared with `compared`. `targets` are cached targets by
    name. `sides` are the teacher's sides of all comparisons, if their adapters have run already: by the number of the
    objective, and of the comparison in it.
    """

    own: Features = field(default_factory=dict)
    compared: Features = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    sides: Mapping[tuple[int, int], Any] = field(default_factory=dict)


class Teacher(Protocol):
    """The interface of a teacher in a Distiller.

    `models` are the teachers that run, by name; a single one has an empty name. `shared` are the parameters that it
    shares with the student. If `passes_gradient` is True, losses that compare both models may train the teacher.
    """

    models: Mapping[str, nn.Module]
    shared: list[nn.Parameter]
    passes_gradient: bool

    def compile(self, **options: Any) -> None:
        """Compile how the model runs inside a step. `options` are those of `torch.compile`."""

    def attach(self) -> None: ...

    def close(self) -> None: ...

    def features(self, images: Tensor, cached: Mapping[str, Tensor] | None = None) -> TeacherFeatures:
        """The features of images that are normalised for the student, or read from the cached targets."""

    def around_student(self, own: Features) -> AbstractContextManager[None]:
        """A context in which the student runs."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to all tensors of a teacher that no module owns, as `nn.Module.to` does."""

    def keep_in_eval(self) -> None: ...


class NoTeacher:
    """Used if all objectives read only labels."""

    passes_gradient = False

    def __init__(self) -> None:
        self.models: Mapping[str, nn.Module] = {}
        self.shared: list[nn.Parameter] = []

    def compile(self, **options: Any) -> None:
        pass

    def attach(self) -> None:
        pass

    close = keep_in_eval = attach

    def features(self, images: Tensor, cached: Mapping[str, Tensor] | None = None) -> TeacherFeatures:
        return TeacherFeatures()

    def around_student(self, own: Features) -> AbstractContextManager[None]:
        return nullcontext()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        pass


class FrozenTeacher:
    """A teacher that stays in eval mode and runs under `no_grad`.

    No optimizer, DDP, `state_dict` or `train()` sees it. With a `name`, its features have taps that carry the name. It
    does not run in a step for which all of its `targets` are cached.
    """

    passes_gradient = False

    def __init__(self, probe: Probe, view: ImageView, targets: Collection[str], name: str = "") -> None:
        self.probe, self.view, self.targets = probe, view, targets
        self.models: Mapping[str, nn.Module] = {name: probe.model}
        self.taps = {replace(tap, model=name): tap for tap in probe.taps}
        self.shared: list[nn.Parameter] = []
        self.run: Callable[[Tensor], dict[Tap, Tensor]] = probe
        self._modules = list(probe.model.modules())

    def compile(self, **options: Any) -> None:
        self.run = torch.compile(self.probe, **options)

    def attach(self) -> None:
        self.probe.attach()

    def close(self) -> None:
        self.probe.close()

    def features(self, images: Tensor, cached: Mapping[str, Tensor] | None = None) -> TeacherFeatures:
        if cached is not None and all(name in cached for name in self.targets):
            features = {tap: cached[target_of(tap)] for tap in self.taps if target_of(tap) in cached}
            return TeacherFeatures(features, features, cached)
        self.keep_in_eval()
        # no_grad and not inference_mode: its tensors could not be saved for the student's backward
        with torch.no_grad():
            features = self.run(self.view(images))
        features = {tap: features[local] for tap, local in self.taps.items()}
        return TeacherFeatures(features, features)

    def around_student(self, own: Features) -> AbstractContextManager[None]:
        return nullcontext()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        self.probe.model._apply(function)  # type: ignore[no-untyped-call]

    def keep_in_eval(self) -> None:
        """Undo a `train()` of a module that contains the teacher: its running statistics would drift."""
        if not torch.compiler.is_compiling() and any(module.training for module in self._modules):
            for module in self._modules:
                module.training = False


class Teachers:
    """Several frozen teachers with names. In a step, those whose targets are cached do not run, and the others do."""

    passes_gradient = False

    def __init__(self, teachers: Sequence[FrozenTeacher]) -> None:
        self.teachers = teachers
        self.models: Mapping[str, nn.Module] = {
            name: model for teacher in teachers for name, model in teacher.models.items()
        }
        self.shared: list[nn.Parameter] = []

    def compile(self, **options: Any) -> None:
        for teacher in self.teachers:
            teacher.compile(**options)

    def attach(self) -> None:
        for teacher in self.teachers:
            teacher.attach()

    def close(self) -> None:
        for teacher in self.teachers:
            teacher.close()

    def features(self, images: Tensor, cached: Mapping[str, Tensor] | None = None) -> TeacherFeatures:
        features: dict[Tap, Tensor] = {}
        targets: dict[str, Tensor] = {}
        for teacher in self.teachers:
            of_teacher = teacher.features(images, cached)
            features |= of_teacher.compared
            targets |= of_teacher.targets
        return TeacherFeatures(features, features, targets)

    def around_student(self, own: Features) -> AbstractContextManager[None]:
        return nullcontext()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        for model in {id(model): model for model in self.models.values()}.values():
            model._apply(function)  # type: ignore[no-untyped-call]

    def keep_in_eval(self) -> None:
        for teacher in self.teachers:
            teacher.keep_in_eval()


class JointTeacher:
    """A teacher that trains with the student (Rocket Launching, Zhou et al. 2018); `block` limits its gradients.

    `replayed` maps modules of the student to the teacher's taps whose tensors they return instead of computing them.
    """

    def __init__(
        self, probe: Probe, view: ImageView, student: nn.Module, block: Block, replayed: Mapping[str, Tap]
    ) -> None:
        self.probe, self.view, self.student, self.block = probe, view, student, block
        self.models: Mapping[str, nn.Module] = {"": probe.model}
        self.run: Callable[[Tensor], dict[Tap, Tensor]] = probe
        self.passes_gradient = block in ("params", "off")
        self._replayed = {get(student, name): tap for name, tap in replayed.items()}
        student_ids = {id(parameter) for parameter in student.parameters()}
        parameters = list(probe.model.parameters())
        self.shared = [parameter for parameter in parameters if id(parameter) in student_ids]
        self._not_shared: Sequence[nn.Parameter] = [
            parameter for parameter in parameters if id(parameter) not in student_ids
        ]

    def compile(self, **options: Any) -> None:
        self.run = torch.compile(self.probe, **options)

    def attach(self) -> None:
        self.probe.attach()

    def close(self) -> None:
        self.probe.close()

    def features(self, images: Tensor, cached: Mapping[str, Tensor] | None = None) -> TeacherFeatures:
        if cached is not None:
            raise LossError("the teacher trains too, so what it gave before is not what it gives now")
        view, model = self.view(images), self.probe.model
        random = RandomState(model) if self.block == "params" else None
        own = self.run(view)
        if self.block == "off":
            return TeacherFeatures(own, own)
        if random is None:
            return TeacherFeatures(own, {tap: feature.detach() for tap, feature in own.items()})
        # The same forward once more, in which the teacher's own parameters are constants.
        with random.again(), buffers_aside(model), detached(model, self._not_shared):
            return TeacherFeatures(own, self.run(view))

    @contextmanager
    def around_student(self, own: Features) -> Iterator[None]:
        """Reuse what the teacher computed in the student; with block `trunk`, shared parameters are constants there."""
        blocked = self.block == "trunk"
        outputs = {module: own[tap].detach() if blocked else own[tap] for module, tap in self._replayed.items()}
        constants = detached(self.student, self.shared) if blocked else nullcontext()
        with replaying(outputs), constants:
            yield

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        pass  # the Distiller owns it

    def keep_in_eval(self) -> None:
        pass  # it trains
