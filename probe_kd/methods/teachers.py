"""Teachers: where the targets of a step come from. Each gives `features(images)`, and the step asks no more of it.

`NoTeacher` stands for none; a `FrozenTeacher` runs, or a cache stands for it; a `JointTeacher` trains with the student.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from probe_kd.engine.probe import Probe
from probe_kd.engine.randomness import RandomState
from probe_kd.engine.spec import Tap
from probe_kd.engine.surgery import buffers_aside, detached, get, replaying
from probe_kd.errors import LossError
from probe_kd.methods.adapters import ImageView

Block = Literal["output", "params", "trunk", "off"]
Features = Mapping[Tap, Tensor]


@dataclass(frozen=True)
class TeacherFeatures:
    """What a teacher gives for a batch.

    Its own losses read `own`, and the student is compared with `compared`. `targets` are the teacher's sides of
    comparisons, by name, as a cache stored them.
    """

    own: Features = field(default_factory=dict)
    compared: Features = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """What a Distiller needs of a teacher. Losses that compare both models may train one that `passes_gradient`.

    `model` is None where there is none, and `shared` are the parameters that a student has too.
    """

    model: nn.Module | None
    shared: list[nn.Parameter]
    passes_gradient: bool

    def compile(self, **options: Any) -> None:
        """How the model runs inside a step; `options` are those of `torch.compile`."""

    def attach(self) -> None: ...

    def close(self) -> None: ...

    def features(self, images: Tensor, cached: Mapping[str, Tensor] | None = None) -> TeacherFeatures:
        """For images as the student sees them, or from what was stored for them."""

    def around_student(self, own: Features) -> AbstractContextManager[None]:
        """What holds while the student runs."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move what no module owns, as `nn.Module.to` does."""

    def keep_in_eval(self) -> None: ...


class NoTeacher:
    """For objectives that read nothing but labels."""

    passes_gradient = False

    def __init__(self) -> None:
        self.model: nn.Module | None = None
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
    """Stays in eval mode and runs under `no_grad`. No optimizer, DDP, `state_dict` or `train()` sees it."""

    passes_gradient = False

    def __init__(self, probe: Probe, view: ImageView) -> None:
        self.probe, self.view = probe, view
        self.model: nn.Module | None = probe.model
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
        if cached is not None:
            features = {tap: cached[str(tap)] for tap in self.probe.taps if str(tap) in cached}
            return TeacherFeatures(features, features, cached)
        self.keep_in_eval()
        # no_grad and not inference_mode: its tensors could not be saved for the student's backward
        with torch.no_grad():
            features = self.run(self.view(images))
        return TeacherFeatures(features, features)

    def around_student(self, own: Features) -> AbstractContextManager[None]:
        return nullcontext()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        self.probe.model._apply(function)  # type: ignore[no-untyped-call]

    def keep_in_eval(self) -> None:
        """`train()` of a module around both models may have reached it, and running statistics would drift."""
        if not torch.compiler.is_compiling() and any(module.training for module in self._modules):
            for module in self._modules:
                module.training = False


class JointTeacher:
    """Trains with the student (Rocket Launching, Zhou et al. 2018); `block` says which gradients reach it.

    `replayed` are the student's modules that give what a tap of the teacher gave instead of computing.
    """

    def __init__(
        self, probe: Probe, view: ImageView, student: nn.Module, block: Block, replayed: Mapping[str, Tap]
    ) -> None:
        self.probe, self.view, self.student, self.block = probe, view, student, block
        self.model: nn.Module | None = probe.model
        self.run: Callable[[Tensor], dict[Tap, Tensor]] = probe
        self.passes_gradient = block in ("params", "off")
        self._replayed = {get(student, name): tap for name, tap in replayed.items()}
        of_student = {id(parameter) for parameter in student.parameters()}
        parameters = list(probe.model.parameters())
        self.shared = [parameter for parameter in parameters if id(parameter) in of_student]
        self._not_shared: Sequence[nn.Parameter] = [it for it in parameters if id(it) not in of_student]

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
        """What the teacher has computed is not computed again, and the student moves no shared parameter of a trunk."""
        blocked = self.block == "trunk"
        outputs = {module: own[tap].detach() if blocked else own[tap] for module, tap in self._replayed.items()}
        constants = detached(self.student, self.shared) if blocked else nullcontext()
        with replaying(outputs), constants:
            yield

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        pass  # the Distiller owns it

    def keep_in_eval(self) -> None:
        pass  # it trains
