"""Sharing weights, a trunk or a graft between a student and a teacher that train together.

Rocket Launching, Zhou et al. 2018 (arXiv 1708.04106).

There are three forms:

- `share_convolutions`: both models use the same weights of convolutions and linear layers. Each has its own norms, and
  both run in full, as in the authors' code.
- `share_trunk`: both models begin with the same layers, which run once.
- `graft`: for models of different architectures. The student's last layers run on top of the teacher's first layers.
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
    """What two models share: `names` maps the student's shared modules to the teacher's.

    `replayed` maps modules of the student to the teacher's taps whose tensors they return in a step instead of
    computing them again.
    """

    form: Literal["weights", "trunk", "graft"]
    names: Mapping[str, str]
    replayed: Mapping[str, Tap] = field(default_factory=dict)

    def __str__(self) -> str:
        pairs = [
            student_name if student_name == teacher_name else f"{student_name} <- {teacher_name}"
            for student_name, teacher_name in self.names.items()
        ]
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
    """The names of layers that both models have, in the order of the student; without `whole`, up to a difference."""
    student_layers, teacher_layers = weight_layers(student), weight_layers(teacher)
    heads = _heads(student) | _heads(teacher)
    common = [name for name in student_layers if name in teacher_layers and id(student_layers[name]) not in heads]
    common = [name for name in common if _shapes(student_layers[name]) == _shapes(teacher_layers[name])]
    if whole:
        return common
    prefix = takewhile(
        lambda names: names[0] == names[1] and names[0] in common, zip(student_layers, teacher_layers, strict=False)
    )
    return [name for name, _ in prefix]


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def _heads(model: nn.Module) -> set[int]:
    """The ids of all classifier layers; of a model without `get_classifier`, of its last layer with weights."""
    if not hasattr(model, "get_classifier"):
        return {id(layer) for layer in [*weight_layers(model).values()][-1:]}
    classifier: Any = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple | list) else [classifier]
    return {id(layer) for head in heads if isinstance(head, nn.Module) for layer in head.modules()}


def share_trunk(student: nn.Module, teacher: nn.Module, at: Tap, teacher_at: Tap, seen: Trace, known: Trace) -> Sharing:
    """Make the student's layers up to and including `at` the teacher's up to `teacher_at`. They run once per step.

    `seen` is the trace of the student and `known` that of the teacher. Raises TapError, with the first difference, if
    the two trunks are not built alike.
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
    for student_holder, teacher_holder in zip(_holders(student_layers), _holders(teacher_layers), strict=False):
        _share_own(get(student, student_holder), get(teacher, teacher_holder), student_holder)
    return Sharing("trunk", names, {name: Tap(teacher_name) for name, teacher_name in names.items()})


def trunk_units(model_trace: Trace, at: Tap) -> list[str]:
    """List the largest modules that end at or before a tap, in the order of the forward.

    Raises TapError unless the tap is the output of a module that runs once.
    """
    spec = model_trace[at]
    if spec.tap.port != "output" or spec.tap.items or spec.calls != 1 or not spec.tap.module or not spec.spatial:
        raise TapError(f"cut at '{at}': expected the output of a module that runs once and yields a map or tokens")
    return list(_units_before(model_trace, "", model_trace.modules[spec.tap.module].last))


def _units_before(model_trace: Trace, name: str, end: int) -> Iterator[str]:
    children = [
        model_trace.modules[child] for child in model_trace.modules[name].children if child in model_trace.modules
    ]
    for child in sorted(children, key=lambda child: child.first):
        if child.calls and child.last <= end:
            yield child.name
        elif not child.calls or child.first < end:
            yield from _units_before(model_trace, child.name, end)


def _holders(units: Sequence[str]) -> list[str]:
    """The containers of the units, from the model itself down."""
    parents = {".".join(parts[:end]) for unit in units for parts in [unit.split(".")] for end in range(len(parts))}
    return sorted(parents)


def _share_own(student_module: nn.Module, teacher_module: nn.Module, name: str) -> None:
    """Share the parameters that a container holds itself, such as a class token, if both models have them."""
    for key, parameter in student_module.named_parameters(recurse=False):
        teacher_parameter = teacher_module._parameters.get(key)
        if teacher_parameter is not None and teacher_parameter.shape == parameter.shape:
            student_module.register_parameter(key, teacher_parameter)
        elif teacher_parameter is not None:
            raise TapError(
                f"share 'trunk': '{name or 'the student'}' has {key} {tuple(parameter.shape)}, and the teacher's is "
                f"{tuple(teacher_parameter.shape)}"
            )


class Graft(nn.Module):
    """A student on top of the first layers of another model: trunk, adapter, and its own last layers.

    `graft(images)` returns the student's output. `trunk` computes the feature at the cut, `adapter` converts it to the
    layout, grid and width that the student's next layer takes, and `body` is the student without the layers that the
    trunk replaces.
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
        """The timm config of the trunk's model, which says how images are normalised."""
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
    """The first layers of a model; returns the output of the last of them."""

    def __init__(self, model: nn.Module, feature: FeatureSpec) -> None:
        super().__init__()
        self.model = model
        self._probe = Probe(model, [feature])

    def forward(self, images: Tensor) -> Tensor:
        return self._probe(images)[self._probe.taps[0]]


class Idle(nn.Module):
    """A placeholder for a layer before the cut: returns zeros of the shape that the layer would return."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, first: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        return first.new_zeros(len(first), *self.shape)

    def extra_repr(self) -> str:
        return "x".join(map(str, self.shape))


class Onto(nn.Module):
    """Convert a feature of one model to the layout, grid and width of another model's, with learned prefix tokens."""

    def __init__(self, source: FeatureSpec, target: FeatureSpec) -> None:
        super().__init__()
        if source.grid is None or target.grid is None:
            raise TapError(f"cut: '{source.tap}' and '{target.tap}' need positions")
        if target.frames > 1 or target.suffix_tokens or target.layout in (Layout.NCDHW, Layout.NDHWC):
            raise TapError(f"cut at '{target.tap}': no step makes frames, or tokens after the grid; cut elsewhere")
        self.to_map = nn.Identity() if source.layout is Layout.NCHW else ToMap.of(source)
        self.resize = nn.Identity() if source.grid == target.grid else Resize(source.grid, target.grid)
        self.layout = target.layout
        self.project = nn.Conv2d(source.channels, target.channels, 1)
        self.prefix = nn.Parameter(0.02 * torch.randn(target.prefix_tokens, target.channels))

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

    `seen` is the trace of the student and `known` that of the teacher. Raises TapError if the cut is not a map or
    tokens of one module.
    """
    replaced, trunk_names = trunk_units(seen, at), trunk_units(known, teacher_at)
    cut_spec, trunk_spec = seen[at], known[teacher_at]
    for name in replaced:
        shape = next((spec.shape for spec in seen.specs if spec.tap == Tap(name) and not spec.batch_axis), None)
        if shape is None:
            raise TapError(
                f"cut at '{at}': '{name}' before it yields no single tensor with the batch first; cut elsewhere"
            )
        get(student, name.rpartition(".")[0]).add_module(name.rpartition(".")[2], Idle(shape[1:]))
    trunk = Prefix(prune_after(teacher, trunk_names), trunk_spec)
    grafted = Graft(trunk, Onto(trunk_spec, cut_spec), student, cut_spec.tap.module)
    names = {f"trunk.model.{name}": name for name in trunk_names}
    return grafted, Sharing("graft", names, {"trunk": trunk_spec.tap})


def load_student(path: str | Path, *, allow_import: Sequence[str] = ()) -> nn.Module:
    """Load the student that a run has saved, in eval mode: a plain timm model, or a `Graft`, which timm cannot
    build.

    A file may name any function as its model. It is imported and called only if `allow_import` names its package or
    module.

    Raises WeightsError for a file that was not written by a run of this package, and TraceError if the model cannot
    be built.
    """
    header = read_header(path)
    try:
        sides = [header["graft"][side] for side in ("student", "teacher")] if "graft" in header else [header]
        specs = [(str(side["model"]), dict(side["model_kwargs"])) for side in sides]
        cuts = [(side["input_size"], Tap.parse(side["at"])) for side in sides] if "graft" in header else []
    except (KeyError, TypeError, ValueError, TapError) as refusal:
        raise WeightsError(
            f"{str(path)!r} does not tell which model it is of; it was not written by probe-kd"
        ) from refusal
    for name, _ in specs:
        check_import(name, allow_import)
    models = [build_model(name, kwargs) for name, kwargs in specs]
    student = models[0]
    if cuts:
        traces = [
            trace(name, size, training=True, model_kwargs=kwargs)
            for (name, kwargs), (size, _) in zip(specs, cuts, strict=True)
        ]
        student, _ = graft(models[0], models[1], cuts[0][1], cuts[1][1], traces[0], traces[1])
    load_weights(student, path)
    return student.eval()
