"""Trace a model in one dry forward, without weights and without compute.

Nothing here knows an architecture by name. A leaf such as a convolution or a linear layer says which axis of its
tensors holds the channels; every other tensor gets its layout from the leaves that made or read it.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from probe_kd.engine.models import build_on_meta
from probe_kd.engine.probe import watch, why_silent
from probe_kd.engine.spec import FeatureSpec, Layout, ModuleSpec, Tap, Trace
from probe_kd.errors import TraceError, short

# A batch that hardly any other axis has as its length, so that a tensor without a leading batch (a stack of windows, an
# attention matrix over heads) shows itself.
BATCH = 5
MAX_PREFIX = 16  # the zoo's largest is 10

Size = tuple[int, int, int]


def trace(
    model: str | nn.Module,
    input_size: int | Sequence[int] | None = None,
    *,
    training: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Trace:
    """Run a model once on the meta device and describe every tensor that enters or leaves a module.

    `model` is a timm name, `hf-hub:...`, `local-dir:...`, `transformers:...`, `open_clip:...`,
    `package.module:function`, or an `nn.Module`, which is not changed. `input_size` is (channels, height, width),
    (height, width) or one side; the default is the model's own. A named model with a fixed size is rebuilt for the
    requested size if it has an `img_size` argument. A module that cannot run on the meta device runs once on a batch of
    zeros, in eval mode.

    Raises TraceError if the model cannot be built, or does not accept the size.
    """
    if isinstance(model, nn.Module):
        return _trace_module(model, _resolve_size(input_size, model), training)
    kwargs = dict(model_kwargs or {})
    built = build_on_meta(model, kwargs)
    size = _resolve_size(input_size, built)
    try:
        return _trace_on_meta(built, size, training, model, kwargs)
    except Exception as refusal:
        if size == _resolve_size(None, built) or "img_size" in kwargs:
            why = short(refusal).rstrip(".") + _built_for(kwargs, size)
            raise TraceError(f"{model} does not run on an input of {_times(size)}: {why}") from refusal
        return _trace_resized(model, kwargs, size, training, refusal)


def _built_for(kwargs: Mapping[str, Any], size: Size) -> str:
    """Return the end of a sentence that names the `img_size` of the arguments, if there is one."""
    if "img_size" not in kwargs:
        return ""
    fits = size[1] if size[1] == size[2] else list(size[1:])
    return f". It is built with img_size={kwargs['img_size']}: build it with {fits}, or ask for images of its size"


def _trace_resized(model: str, kwargs: dict[str, Any], size: Size, training: bool, refusal: Exception) -> Trace:
    try:
        resized = {**kwargs, "img_size": size[1] if size[1] == size[2] else size[1:]}
        return _trace_on_meta(build_on_meta(model, resized), size, training, model, resized)
    except Exception:
        raise TraceError(f"{model} does not run on an input of {_times(size)}: {short(refusal)}") from refusal


def _trace_module(model: nn.Module, size: Size, training: bool) -> Trace:
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    refuse_lazy(model, name)
    try:
        return _trace_on_meta(_on_meta(model), size, training, name, {})
    except Exception as refusal:
        return _trace_for_real(model, size, name, refusal)


def _trace_on_meta(model: nn.Module, size: Size, training: bool, name: str, kwargs: Mapping[str, Any]) -> Trace:
    model.train(training)
    with torch.no_grad():
        return _observe(model, torch.empty(BATCH, *size, device="meta"), name, kwargs)


def _trace_for_real(model: nn.Module, size: Size, name: str, refusal: Exception) -> Trace:
    """Trace a model that reads tensor values or holds plain tensors on a device. Eval mode leaves it unchanged."""
    modes = {module: module.training for module in model.modules()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with torch.no_grad():
            return _observe(model, torch.zeros(BATCH, *size, device=device), name, {})
    except Exception:
        raise TraceError(f"{name} does not run on an input of {_times(size)}: {short(refusal)}") from refusal
    finally:
        for module, mode in modes.items():
            module.training = mode


def refuse_lazy(model: nn.Module, name: str) -> None:
    """Raise TraceError if a model has parameters without a size before its first forward."""
    for path, module in model.named_modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        if any(map(is_lazy, held)):
            raise TraceError(
                f"{path!r} of {name} is a {type(module).__name__}, which has no size before its first forward; run the "
                "model once on a batch of images first"
            )


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device: a deepcopy whose memo already maps every tensor to a meta tensor."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _resolve_size(input_size: int | Sequence[int] | None, model: nn.Module) -> Size:
    own = _own_size(model)
    if input_size is None:
        return own
    sides = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    if not 1 <= len(sides) <= 3 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise TraceError(f"input size {input_size!r}: expected (channels, height, width), (height, width) or one side")
    if len(sides) == 3:
        return sides[0], sides[1], sides[2]
    return own[0], sides[0], sides[-1]


def _own_size(model: nn.Module) -> Size:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels < channels:  # built with in_chans=1, which timm's config does not tell
        channels = first.in_channels
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built_for, tuple) and len(built_for) == 2:
        height, width = built_for
    return int(channels), int(height), int(width)


@dataclass
class _Observation:
    """One tensor at one tap of a forward."""

    module: str
    port: str
    call: int
    items: tuple[int | str, ...]
    tensor: Tensor
    version: int
    order: int


@dataclass
class _Log:
    observations: list[_Observation] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    open: list[tuple[str, int, int]] = field(default_factory=list)  # name, call, flops at the start
    axes: dict[int, int] = field(default_factory=dict)  # id of a tensor: its channel axis, 1 or -1
    axes_by_shape: dict[tuple[int, ...], int] = field(default_factory=dict)
    order: int = 0

    def record(self, module: str, port: str, call: int, value: Any, items: tuple[int | str, ...] = ()) -> None:
        if isinstance(value, Tensor):
            self.observations.append(_Observation(module, port, call, items, value, value._version, self.order))
            self.order += 1
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.record(module, port, call, item, (*items, key if isinstance(key, int) else str(key)))
        elif isinstance(value, tuple | list):
            for position, item in enumerate(value):
                self.record(module, port, call, item, (*items, position))
        elif is_dataclass(value) and not isinstance(value, type):
            for name in value.__dataclass_fields__:
                self.record(module, port, call, getattr(value, name), (*items, name))

    def close(self, name: str) -> tuple[int, int]:
        """Return (call, flops at its start) of the module that ends. Those still open inside it stopped early."""
        while True:
            opened, call, start = self.open.pop()
            if opened == name:
                return call, start

    def learn_axis(self, module: nn.Module, value: Any) -> None:
        axis = _channel_axis(module, value) if isinstance(value, Tensor) else None
        if axis is not None:
            self.axes[id(value)] = axis
            self.axes_by_shape[tuple(value.shape)] = axis


# Nonlinearities by the operation that computes them; a trailing `_` (in place) is left off.
_ACTIVATIONS = {
    "relu": "relu",
    "hardtanh": "relu6",
    "gelu": "gelu",
    "silu": "silu",
    "hardswish": "hardswish",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the flops of all operations, and records which tensors an activation produced.

    The flops come from torch's own formulas. `FlopCounterMode` is not used: it also tracks modules, and fails on the
    class tokens of CaiT.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.activations: dict[tuple[int, int], str] = {}  # (id of a tensor, version)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        if isinstance(output, Tensor):
            name = func._overloadpacket.__name__
            in_place = name.endswith("_")  # whose version is counted up only after this
            # Written for every operation, so that what a tensor of the same id was before is forgotten.
            self.activations[id(output), output._version + in_place] = self._activation(name.rstrip("_"), args)
        return output

    def _activation(self, name: str, args: Sequence[Any]) -> str:
        is_relu6 = name == "hardtanh" and tuple(args[1:]) == (0, 6)
        return _ACTIVATIONS.get(name, "") if is_relu6 or name != "hardtanh" else ""


def _observe(model: nn.Module, images: Tensor, name: str, kwargs: Mapping[str, Any]) -> Trace:
    log = _Log()
    operations = _Operations()

    def before(module_name: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        log.first.setdefault(module_name, log.order)
        log.open.append((module_name, log.calls[module_name], operations.flops))
        log.calls[module_name] += 1
        call = log.calls[module_name] - 1
        for position, value in enumerate(args):
            log.record(module_name, "input", call, value, (position,))
        for key, value in keywords.items():
            log.record(module_name, "input", call, value, (key,))
        log.learn_axis(module, args[0] if args else None)

    def after(module_name: str, module: nn.Module, _: Any, __: Any, output: Any) -> None:
        call, start = log.close(module_name)
        log.macs[module_name] += operations.flops - start
        log.record(module_name, "output", call, output)
        log.last[module_name] = log.order
        log.learn_axis(module, output)

    with operations, watch(model, before, after):
        model(images)
    builder = _SpecBuilder(log, images, getattr(model, "num_prefix_tokens", 0), operations.activations)
    specs = tuple(builder.build(observation) for observation in log.observations)
    _, channels, height, width = images.shape
    return Trace(name, (channels, height, width), model.training, specs, _modules(model, log), dict(kwargs))


def _modules(model: nn.Module, log: _Log) -> dict[str, ModuleSpec]:
    called = {name for name, count in log.calls.items() if count}
    return {
        name: ModuleSpec(
            name=name,
            kind=type(module).__name__,
            children=tuple(f"{name}.{child}".lstrip(".") for child, _ in module.named_children()),
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            macs=log.macs[name] // 2 // BATCH,
            calls=log.calls[name],
            first=log.first.get(name, -1),
            last=log.last.get(name, -1),
            silent="" if name in called else why_silent(model, name, called),
        )
        for name, module in model.named_modules()
    }


_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def _channel_axis(module: nn.Module, tensor: Tensor) -> int | None:
    """Return the channel axis of a layer's tensor, 1 or -1, or None if the layer does not determine it."""
    if tensor.ndim < 3:
        return None
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    if isinstance(module, nn.Linear):
        return -1
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        width = module.normalized_shape[0]
        if tensor.shape[1] != width or tensor.shape[-1] != width:
            return 1 if tensor.shape[1] == width else -1
        return 1 if type(module).__name__.endswith("2d") else -1
    return None


class _SpecBuilder:
    """Builds FeatureSpecs from the log of a forward. The log is complete, so later layers can explain earlier ones."""

    def __init__(
        self, log: _Log, images: Tensor, prefix_tokens: int, activations: Mapping[tuple[int, int], str]
    ) -> None:
        self.log = log
        self.activations = activations
        self.size = (int(images.shape[2]), int(images.shape[3]))
        self.prefix_tokens = prefix_tokens if isinstance(prefix_tokens, int) else 0
        self.grids: list[tuple[int, int]] = []  # of the maps seen so far, the latest last
        self.contents: dict[tuple[int, int], int] = {}  # (id of a tensor, version): a running number
        self.log.axes[id(images)] = 1

    def build(self, observation: _Observation) -> FeatureSpec:
        tensor = observation.tensor
        layout = self._layout(tensor)
        channels, grid, prefix = self._read(layout, tensor)
        if layout in (Layout.NCHW, Layout.NHWC) and grid is not None and self._fits(grid):
            self.grids = [other for other in self.grids if other != grid] + [grid]
        return FeatureSpec(
            tap=self._tap(observation),
            layout=layout,
            shape=tuple(int(side) for side in tensor.shape),
            channels=channels,
            grid=grid,
            prefix_tokens=prefix,
            reduction=self.size[0] / grid[0] if grid else None,
            order=observation.order,
            tensor=self.contents.setdefault((id(tensor), observation.version), len(self.contents)),
            activation=self.activations.get((id(tensor), observation.version), ""),
            calls=self.log.calls[observation.module],
            clone=tensor._version != observation.version,
        )

    def _tap(self, observation: _Observation) -> Tap:
        call = observation.call if self.log.calls[observation.module] > 1 else None
        items = () if observation.port == "input" and observation.items == (0,) else observation.items
        return Tap(observation.module, "input" if observation.port == "input" else "output", call, items)

    def _layout(self, tensor: Tensor) -> Layout:
        shape = tuple(tensor.shape)
        if not 2 <= len(shape) <= 4 or shape[0] != BATCH or not tensor.is_floating_point():
            return Layout.OTHER
        if len(shape) == 2:
            return Layout.NC
        axis = self.log.axes.get(id(tensor))
        if len(shape) == 4:
            axis = axis or self._axis_by_grid(shape)
            return {1: Layout.NCHW, -1: Layout.NHWC}.get(axis or 0, Layout.OTHER)
        axis = axis or self.log.axes_by_shape.get(shape) or (-1 if self._tokens(shape[1]) else 1)
        return Layout.NLC if axis == -1 else Layout.NCL

    def _axis_by_grid(self, shape: tuple[int, ...]) -> int | None:
        first, last = shape[2:] in self.grids, shape[1:3] in self.grids
        if first and last:
            return self.log.axes_by_shape.get(shape, 1)
        return 1 if first else -1 if last else None

    def _read(self, layout: Layout, tensor: Tensor) -> tuple[int, tuple[int, int] | None, int]:
        """Return (channels, grid, prefix tokens)."""
        shape = [int(side) for side in tensor.shape]
        if layout is Layout.NCHW:
            return shape[1], (shape[2], shape[3]), 0
        if layout is Layout.NHWC:
            return shape[3], (shape[1], shape[2]), 0
        if layout is Layout.NC:
            return shape[1], None, 0
        if layout is Layout.OTHER:
            return 0, None, 0
        length, channels = (shape[1], shape[2]) if layout is Layout.NLC else (shape[2], shape[1])
        grid, prefix = self._tokens(length) or (None, length if length <= MAX_PREFIX else 0)
        return channels, grid, prefix

    def _tokens(self, length: int) -> tuple[tuple[int, int], int] | None:
        """Return (grid, prefix tokens) for a number of tokens: an earlier grid with the fewest prefix tokens."""
        candidates = [(grid, length - grid[0] * grid[1]) for grid in reversed(self.grids)]
        fitting = [(grid, prefix) for grid, prefix in candidates if prefix in (0, self.prefix_tokens)]
        fitting += sorted(
            ((grid, prefix) for grid, prefix in candidates if 0 < prefix <= MAX_PREFIX), key=lambda item: item[1]
        )
        if fitting and fitting[0][0] != (1, 1):
            return fitting[0]
        for prefix in dict.fromkeys((0, self.prefix_tokens, 1, 2)):
            grid = self._grid_of(length - prefix)
            if grid is not None:
                return grid, prefix
        return None

    def _grid_of(self, positions: int) -> tuple[int, int] | None:
        """Return the grid with this number of positions that has the aspect ratio of the image."""
        if positions < 2:
            return None
        height = round(sqrt(positions * self.size[0] / self.size[1]))
        for candidate in (height, height + 1, height - 1):
            if candidate > 0 and positions % candidate == 0 and self._fits((candidate, positions // candidate)):
                return candidate, positions // candidate
        return None

    def _fits(self, grid: tuple[int, int]) -> bool:
        """Whether a single stride maps the image to this grid, up to one position that a convolution may cut."""
        height, width = self.size
        if grid[0] > height or grid[1] > width:
            return False
        stride = sqrt(height * width / (grid[0] * grid[1]))
        return abs(height / stride - grid[0]) <= 1 and abs(width / stride - grid[1]) <= 1


def _times(size: Size) -> str:
    return "x".join(map(str, size))
