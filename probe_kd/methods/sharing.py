"""What a student and a teacher that train together have in common.

Rocket Launching, Zhou et al. 2018 (arXiv 1708.04106).

Three forms. `share_convolutions`: the weights of convolutions and linear layers are one set of parameters, norms are
each model's own, and both run in full, as in the authors' code. `share_trunk`: the models begin with the same layers,
which run once. `graft`: the models are unlike, and the student's last layers grow on the teacher's first ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from probe_kd.engine.models import build_model, check_import
from probe_kd.engine.probe import Probe
from probe_kd.engine.spec import FeatureSpec, Layout, Tap, Trace
from probe_kd.engine.surgery import get, prune_after, replaying, share, share_weights, weight_layers
from probe_kd.engine.tracing import trace
from probe_kd.engine.weights import load_weights, read_header
from probe_kd.errors import TapError, WeightsError, nearest
from probe_kd.methods.adapters import Resize, ToMap

Pattern = Literal["bottom", "interval"]


@dataclass(frozen=True)
class Sharing:
    """What is shared, once it is: `names` are the student's modules with the teacher's.

    `replayed` are student modules that, in a step, give the teacher's tensor at a tap instead of computing it again.
    """

    form: Literal["weights", "trunk", "graft"]
    names: Mapping[str, str]
    replayed: Mapping[str, Tap] = field(default_factory=dict)

    def __str__(self) -> str:
        pairs = [one if one == other else f"{one} <- {other}" for one, other in self.names.items()]
        shown = ", ".join(pairs if len(pairs) < 8 else [*pairs[:6], "...", pairs[-1]])
        return f"{self.form}: {shown}"


def share_convolutions(
    student: nn.Module, teacher: nn.Module, modules: Pattern | Sequence[str] | Mapping[str, str]
) -> Sharing:
    """Share the weights of the named modules, of `{student name: teacher name}`, or of a pattern from the paper's
    code.

    `interval` shares every layer that both models have under one name and in one shape, except the classifier: the
    stem and the first blocks of every stage. `bottom` shares those before the first layer in which the models
    differ.

    Raises TapError if layers differ, or if a pattern finds nothing in common.
    """
    if isinstance(modules, str):
        if modules not in get_args(Pattern):
            raise TapError(
                f"share {modules!r}: expected 'interval', 'bottom', or names in a list or a mapping"
                + nearest(modules, get_args(Pattern))
            )
        names = {name: name for name in _in_common(student, teacher, whole=modules == "interval")}
        if not names:
            raise TapError(
                f"share '{modules}': {type(student).__name__} and {type(teacher).__name__} have no layer of one name "
                "and shape in common; name the modules, share nothing (form 'none'), or use form 'graft'"
            )
    else:
        names = dict(modules) if isinstance(modules, Mapping) else {name: name for name in modules}
    share_weights(student, teacher, names)
    return Sharing("weights", names)


def _in_common(student: nn.Module, teacher: nn.Module, *, whole: bool) -> list[str]:
    """Names in the order of the model; without `whole`, up to the first difference."""
    student_layers, teacher_layers = weight_layers(student), weight_layers(teacher)
    heads = _heads(student) | _heads(teacher)
    common = [name for name in student_layers if name in teacher_layers and id(student_layers[name]) not in heads]
    common = [name for name in common if _shapes(student_layers[name]) == _shapes(teacher_layers[name])]
    if whole:
        return common
    both = takewhile(
        lambda names: names[0] == names[1] and names[0] in common, zip(student_layers, teacher_layers, strict=False)
    )
    return [name for name, _ in both]


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def _heads(model: nn.Module) -> set[int]:
    """The layers of the classifier, or of several; of a model that does not tell, the last layer with weights."""
    if not hasattr(model, "get_classifier"):
        return {id(layer) for layer in [*weight_layers(model).values()][-1:]}
    found: Any = model.get_classifier()  # type: ignore[operator]
    heads = found if isinstance(found, tuple | list) else [found]
    return {id(layer) for head in heads if isinstance(head, nn.Module) for layer in head.modules()}


def share_trunk(student: nn.Module, teacher: nn.Module, at: Tap, teacher_at: Tap, seen: Trace, known: Trace) -> Sharing:
    """Make all layers up to and including `at` the teacher's own. They run once per step.

    Raises TapError, with the first difference, if the two trunks are not built alike.
    """
    student_layers, teacher_layers = trunk_units(seen, at), trunk_units(known, teacher_at)
    if len(student_layers) != len(teacher_layers):
        raise TapError(
            f"share 'trunk': up to '{at}' the student runs {', '.join(student_layers)}, and up to '{teacher_at}' the "
            f"teacher {', '.join(teacher_layers)}; cut both at the same layer, or use form 'graft'"
        )
    names = dict(zip(student_layers, teacher_layers, strict=True))
    if [name.count(".") for name in student_layers] != [name.count(".") for name in teacher_layers]:
        raise TapError(
            f"share 'trunk': the trunks lie in different containers, {student_layers} and {teacher_layers}; use form "
            "'graft'"
        )
    share(student, teacher, names)
    for own, other in dict(zip(_holders(student_layers), _holders(teacher_layers), strict=False)).items():
        _share_own(get(student, own), get(teacher, other), own)
    return Sharing("trunk", names, {name: Tap(other) for name, other in names.items()})


def trunk_units(seen: Trace, at: Tap) -> list[str]:
    """The largest modules that end with or before the one at a tap, in the order of the forward.

    Raises TapError for a tap that is no plain output of a module that runs once.
    """
    spec = seen[at]
    if spec.tap.port != "output" or spec.tap.items or spec.calls != 1 or not spec.tap.module or not spec.spatial:
        raise TapError(f"cut at '{at}': expected the output of a module that runs once and yields a map or tokens")
    return list(_units_before(seen, "", seen.modules[spec.tap.module].last))


def _units_before(seen: Trace, name: str, end: int) -> Iterator[str]:
    children = [seen.modules[child] for child in seen.modules[name].children if child in seen.modules]
    for child in sorted(children, key=lambda child: child.first):
        if child.calls and child.last <= end:
            yield child.name
        elif not child.calls or child.first < end:
            yield from _units_before(seen, child.name, end)


def _holders(units: Sequence[str]) -> list[str]:
    """The modules that hold the units, from the model itself down."""
    parents = {".".join(parts[:end]) for unit in units for parts in [unit.split(".")] for end in range(len(parts))}
    return sorted(parents)


def _share_own(own: nn.Module, other: nn.Module, name: str) -> None:
    """The parameters that stand in a container itself, such as a class token, where both have them."""
    for key, parameter in own.named_parameters(recurse=False):
        target = other._parameters.get(key)
        if target is not None and target.shape == parameter.shape:
            own.register_parameter(key, target)
        elif target is not None:
            raise TapError(
                f"share 'trunk': '{name or 'the student'}' has {key} {tuple(parameter.shape)}, and the teacher's is "
                f"{tuple(target.shape)}"
            )


class Graft(nn.Module):
    """A student that grows on the first layers of another model: trunk, adapter, and its own last layers.

    `graft(images)` answers as a model of its own. `trunk` gives the feature at the cut, `adapter` brings it into the
    layout, grid and width that the student's next layer takes, and `body` is the student without what it replaces.
    """

    def __init__(self, trunk: nn.Module, adapter: nn.Module, body: nn.Module, cut: str) -> None:
        super().__init__()
        self.trunk, self.adapter, self.body, self.cut = trunk, adapter, body, cut

    def forward(self, images: Tensor) -> Tensor:
        feature = self.adapter(self.trunk(images))
        with replaying({self.body.get_submodule(self.cut): feature}):
            answer: Tensor = self.body(images)
        return answer

    @property
    def pretrained_cfg(self) -> Any:
        """What images it expects: those of the model that its trunk is of."""
        return getattr(getattr(self.trunk, "model", None), "pretrained_cfg", {})

    @property
    def num_prefix_tokens(self) -> int:
        return getattr(self.body, "num_prefix_tokens", 0)

    def get_classifier(self) -> Any:
        return getattr(self.body, "get_classifier", nn.Identity)()

    def no_weight_decay(self) -> set[str]:
        parts = {"body": self.body, "trunk.model": getattr(self.trunk, "model", self.trunk)}
        exempt: dict[str, set[str]] = {part: getattr(m, "no_weight_decay", set)() for part, m in parts.items()}
        return {f"{part}.{name}" for part, names in exempt.items() for name in names} | {"adapter.prefix"}


class Prefix(nn.Module):
    """The first layers of a model, up to one whose output is the answer."""

    def __init__(self, model: nn.Module, feature: FeatureSpec) -> None:
        super().__init__()
        self.model = model
        self._probe = Probe(model, [feature])

    def forward(self, images: Tensor) -> Tensor:
        return self._probe(images)[self._probe.taps[0]]


class Idle(nn.Module):
    """Stands for a layer before the cut: costs nothing, and gives zeros of the shape that the model expects there."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, first: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        return first.new_zeros(len(first), *self.shape)

    def extra_repr(self) -> str:
        return "x".join(map(str, self.shape))


class Onto(nn.Module):
    """A feature of one model in the layout, grid and width that a layer of another one takes; with learned tokens."""

    def __init__(self, given: FeatureSpec, wanted: FeatureSpec) -> None:
        super().__init__()
        if given.grid is None or wanted.grid is None:
            raise TapError(f"cut: '{given.tap}' and '{wanted.tap}' need positions")
        self.to_map = (
            nn.Identity() if given.layout is Layout.NCHW else ToMap(given.layout, given.grid, given.prefix_tokens)
        )
        self.resize = nn.Identity() if given.grid == wanted.grid else Resize(given.grid, wanted.grid)
        self.layout = wanted.layout
        self.project = nn.Conv2d(given.channels, wanted.channels, 1)
        self.prefix = nn.Parameter(0.02 * torch.randn(wanted.prefix_tokens, wanted.channels))

    def forward(self, feature: Tensor) -> Tensor:
        map_: Tensor = self.project(self.resize(self.to_map(feature)))
        if self.layout is Layout.NCHW:
            return map_
        if self.layout is Layout.NHWC:
            return map_.permute(0, 2, 3, 1)
        tokens = map_.flatten(2).transpose(1, 2)
        prefix = self.prefix.to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([prefix, tokens], 1)
        return tokens if self.layout is Layout.NLC else tokens.transpose(1, 2)


def graft(
    student: nn.Module, teacher: nn.Module, at: Tap, teacher_at: Tap, seen: Trace, known: Trace
) -> tuple[Graft, Sharing]:
    """Return a student whose layers up to `at` are the teacher's up to `teacher_at`. The given student must not be
    used afterwards.

    Raises TapError if the cut is not a map or tokens of one module.
    """
    replaced, kept = trunk_units(seen, at), trunk_units(known, teacher_at)
    cut, given = seen[at], known[teacher_at]
    for name in replaced:
        shape = next((spec.shape for spec in seen.specs if spec.tap == Tap(name)), None)
        if shape is None:
            raise TapError(f"cut at '{at}': '{name}' before it yields no single tensor; cut elsewhere")
        get(student, name.rpartition(".")[0]).add_module(name.rpartition(".")[2], Idle(shape[1:]))
    trunk = Prefix(prune_after(teacher, kept), given)
    grown = Graft(trunk, Onto(given, cut), student, cut.tap.module)
    names = {f"trunk.model.{name}": name for name in kept}
    return grown, Sharing("graft", names, {"trunk": given.tap})


def load_student(path: str | Path, *, allow_import: Sequence[str] = ()) -> nn.Module:
    """Load the student that a run has saved, in eval mode: a plain timm model, or a `Graft`, which timm cannot
    build.

    A file may name any function as its model. It is imported and called only if `allow_import` names its package or
    module.

    Raises WeightsError for a file that was not written by a run of this package, and TraceError if the model cannot
    be built.
    """
    about = read_header(path)
    try:
        sides = [about["graft"][side] for side in ("student", "teacher")] if "graft" in about else [about]
        named = [(str(side["model"]), dict(side["model_kwargs"])) for side in sides]
        cuts = [(side["input_size"], Tap.parse(side["at"])) for side in sides] if "graft" in about else []
    except (KeyError, TypeError, ValueError, TapError) as refusal:
        raise WeightsError(
            f"{str(path)!r} does not tell which model it is of; it was not written by probe-kd"
        ) from refusal
    for name, _ in named:
        check_import(name, allow_import)
    models = [build_model(name, kwargs) for name, kwargs in named]
    student = models[0]
    if cuts:
        traces = [
            trace(name, size, training=True, model_kwargs=kwargs)
            for (name, kwargs), (size, _) in zip(named, cuts, strict=True)
        ]
        student, _ = graft(models[0], models[1], cuts[0][1], cuts[1][1], traces[0], traces[1])
    load_weights(student, path)
    return student.eval()
