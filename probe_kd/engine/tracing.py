"""Trace a model in one dry forward, without weights and without compute.

Nothing here knows an architecture by name. A leaf such as a convolution or a linear layer says which axis of its
tensors holds the channels; every other tensor gets its layout from the leaves that made or read it.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from math import log2, prod, sqrt
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from probe_kd.engine.models import build_on_meta
from probe_kd.engine.probe import item_of, watch, why_silent
from probe_kd.engine.spec import FeatureSpec, Layout, ModuleSpec, Tap, Trace
from probe_kd.errors import TraceError, short

# The first is a batch that hardly any other axis has as its length, so that a tensor without a leading batch (a stack
# of windows, an attention matrix over heads) shows itself. The others are for models that take no batch of 5.
BATCHES = (5, 7, 24, 1, 2, 4, 8, 16, 32)
MAX_PREFIX = 16  # the zoo's largest is 10

MOST_REMEMBERED = 64
_remembered: dict[tuple[Any, str], Trace] = {}

Size = tuple[int, ...]  # (channels, height, width), or of a video (channels, frames, height, width)


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
    (height, width) or one side; the default is the model's own. A video is (channels, frames, height, width), or frames
    and channels in the order of the model; its maps are averaged over the frames where they are compared. A named model
    with a fixed size is rebuilt for the requested size if it has an `img_size` argument. A module that cannot run on
    the meta device runs once on a batch of zeros, in eval mode.

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


def trace_named(
    model: str,
    input_size: int | Sequence[int] | None = None,
    *,
    training: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Trace:
    """`trace` of a model by its name. What timm registers under a plain name is traced once in a process.

    For those that plan many runs of the same models: a tuning study, or a test. Files, hubs and other modules may
    change, so their models are traced anew.
    """
    import timm

    architecture = model.partition(".")[0]
    if ":" in model or not timm.is_model(architecture):
        return trace(model, input_size, training=training, model_kwargs=model_kwargs)
    function = timm.models.model_entrypoint(architecture)  # another one may be registered under the name
    key = (function, repr((model, input_size, training, sorted((model_kwargs or {}).items()))))
    remembered = _remembered.get(key)
    if remembered is None:
        own = copy.deepcopy(dict(model_kwargs or {}))  # the caller's may change
        remembered = trace(model, input_size, training=training, model_kwargs=own)
        if len(_remembered) >= MOST_REMEMBERED:
            _remembered.clear()
        _remembered[key] = remembered
    return remembered


def _built_for(kwargs: Mapping[str, Any], size: Size) -> str:
    """Return the end of a sentence that names the `img_size` of the arguments, if there is one."""
    if "img_size" not in kwargs:
        return ""
    fits = _sides(size)
    return f". It is built with img_size={kwargs['img_size']}: build it with {fits}, or ask for images of its size"


def _sides(size: Size) -> int | list[int]:
    """Return the side of a square image, or height and width."""
    return size[-1] if size[-2] == size[-1] else list(size[-2:])


def _trace_resized(model: str, kwargs: dict[str, Any], size: Size, training: bool, refusal: Exception) -> Trace:
    try:
        sides = _sides(size)
        resized = {**kwargs, "img_size": sides if isinstance(sides, int) else tuple(sides)}
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
        return _observe_a_batch(model, size, torch.device("meta"), name, kwargs)


def _trace_for_real(model: nn.Module, size: Size, name: str, refusal: Exception) -> Trace:
    """Trace a model that reads tensor values or holds plain tensors on a device. Eval mode leaves it unchanged."""
    modes = {module: module.training for module in model.modules()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with torch.no_grad():
            return _observe_a_batch(model, size, device, name, {})
    except Exception:
        raise TraceError(f"{name} does not run on an input of {_times(size)}: {short(refusal)}") from refusal
    finally:
        for module, mode in modes.items():
            module.training = mode


def _observe_a_batch(model: nn.Module, size: Size, device: torch.device, name: str, kwargs: Mapping[str, Any]) -> Trace:
    """Observe a forward of the first batch that the model takes. Raises what it raises at the first of all."""
    batches = BATCHES if device.type == "meta" else [batch for batch in BATCHES if batch <= BATCHES[0]]
    refusals: list[Exception] = []
    ambiguous: list[Trace] = []
    for batch in batches:
        try:
            traced = _observe(model, torch.zeros(batch, *size, device=device), name, kwargs)
        except Exception as refusal:
            refusals.append(refusal)
            continue
        if ambiguous:  # the second says whether the batch comes second
            return traced if any(spec.batch_axis for spec in traced.specs) else ambiguous[0]
        if not _is_ambiguous(traced, batch):
            return traced
        ambiguous.append(traced)
    if ambiguous:
        return ambiguous[0]
    raise refusals[0]


def _is_ambiguous(traced: Trace, batch: int) -> bool:
    """Whether a sequence happens to be as long as the batch, so that either could be the first axis."""
    return any(len(spec.shape) == 3 and spec.shape[:2] == (batch, batch) for spec in traced.specs)


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
    if not 1 <= len(sides) <= 4 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise TraceError(f"input size {input_size!r}: expected (channels, height, width), (height, width) or one side")
    if len(sides) >= 3:
        return sides
    return own[0], sides[0], sides[-1]


def _own_size(model: nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size") or _size_inside(model) or (3, 224, 224)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels < channels:  # built with in_chans=1, which timm's config does not tell
        channels = first.in_channels
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built_for, tuple) and len(built_for) == 2:
        height, width = built_for
    return int(channels), int(height), int(width)


def _size_inside(model: nn.Module) -> tuple[int, int, int] | None:
    """Return the size of images that the first module says which says any: in its config, or as `image_size`."""
    for module in model.modules():
        timm_config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        if isinstance(timm_config, Mapping) and timm_config.get("input_size"):
            return tuple(timm_config["input_size"])
        config = getattr(module, "config", None)
        for holder in (getattr(config, "vision_config", None), config, module):
            sides = _pair_of(getattr(holder, "image_size", None))
            channels = getattr(holder, "num_channels", 3)
            if sides is not None:
                return channels if isinstance(channels, int) else 3, *sides
    return None


def _pair_of(size: object) -> tuple[int, int] | None:
    """Return (height, width) of a number or of two; None for anything else."""
    sides = (size, size) if isinstance(size, int) else size
    if (
        isinstance(sides, tuple | list)
        and len(sides) == 2
        and all(isinstance(side, int) and side > 0 for side in sides)
    ):
        return sides[0], sides[1]
    return None


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
    from_image: bool


@dataclass
class _Log:
    operations: "_Operations"
    observations: list[_Observation] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    open: list[tuple[str, int, int]] = field(default_factory=list)  # name, call, flops at the start
    axes_by_shape: dict[tuple[int, ...], int] = field(default_factory=dict)
    order: int = 0

    def record(self, module: str, port: str, call: int, value: Any, items: tuple[int | str, ...] = ()) -> None:
        if isinstance(value, Tensor):
            from_image = id(value) in self.operations.from_image
            observation = _Observation(module, port, call, items, value, value._version, self.order, from_image)
            self.observations.append(observation)
            self.order += 1
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.record(module, port, call, item, (*items, item_of(key)))
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
            self.operations.axes[id(value)] = axis
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


# Operations whose result has the form of a tensor, but none of its numbers.
_FACTORIES = {
    *(f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")),
    *(f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "empty_strided")),
}
_SELECTIONS = {"gather", "index", "index_select"}  # of tokens, in any order
_RESHAPES = {"view", "_unsafe_view", "reshape"}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the flops of all operations, and records which tensors an activation produced and which tokens are where.

    `from_image` has the ids of tensors that were computed from the images. `concatenated` maps the length of an axis to
    the lengths of (other tokens, tokens of the image, other tokens) that were concatenated to it, and `flattened` the
    length of an axis to the sides of the map that was flattened to it. `selected` are the numbers of tokens that were
    picked from more of them, and so have no grid.

    The flops come from torch's own formulas. `FlopCounterMode` is not used: it also tracks modules, and fails on the
    class tokens of CaiT.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.axes: dict[int, int] = {}  # id of a tensor that enters or leaves a layer: its channel axis, 1 or -1
        self.activations: dict[tuple[int, int], str] = {}  # (id of a tensor, version)
        self.from_image = {id(images)}
        self.batch = images.shape[0]
        self.concatenated: dict[int, tuple[int, int, int]] = {}
        self.flattened: dict[int, tuple[int, ...]] = {}
        self.selected: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Read before the operation, which may overwrite its input.
        uses_image = any(id(tensor) in self.from_image for tensor in _tensors((args, kwargs)))
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        name = func._overloadpacket.__name__
        if isinstance(output, Tensor):
            self._see_tokens(name, args, kwargs or {}, output)
        in_place = name.endswith("_")  # whose version is counted up only after this
        mark = self.from_image.add if uses_image and name not in _FACTORIES else self.from_image.discard
        # Written for every operation, so that what a tensor of the same id was before is forgotten.
        for tensor in _tensors(output):
            mark(id(tensor))
            self.activations[id(tensor), tensor._version + in_place] = self._activation(name.rstrip("_"), args)
        return output

    def _activation(self, name: str, args: Sequence[Any]) -> str:
        is_relu6 = name == "hardtanh" and tuple(args[1:]) == (0, 6)
        return _ACTIVATIONS.get(name, "") if is_relu6 or name != "hardtanh" else ""

    def _see_tokens(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        if output.ndim == 3 and name in _SELECTIONS and id(args[0]) in self.from_image:
            if output.shape[1] < args[0].shape[1] and int(output.shape[1]) not in self._lengths_of_images():
                self.selected.add(int(output.shape[1]))
        elif output.ndim == 3 and name == "cat":
            self._see_concatenation(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0), output)
        elif output.ndim == 3 and name in _RESHAPES and id(args[0]) in self.from_image:
            self._see_flattening(tuple(args[0].shape), tuple(output.shape), self.axes.get(id(args[0])))

    def _see_concatenation(self, parts: Sequence[Tensor], axis: int, output: Tensor) -> None:
        lengths = [int(part.shape[axis]) for part in parts]
        of_image = [index for index, part in enumerate(parts) if id(part) in self.from_image]
        patches = [index for index in of_image if lengths[index] in self._lengths_of_images()] or of_image
        if len(patches) != 1 or len(parts) < 2:
            return
        if lengths[patches[0]] in self.selected:
            return
        before, own, after = sum(lengths[: patches[0]]), lengths[patches[0]], sum(lengths[patches[0] + 1 :])
        first, own, last = self.concatenated.get(own, (0, own, 0))
        self.concatenated[int(output.shape[axis])] = before + first, own, last + after

    def _lengths_of_images(self) -> set[int]:
        return {*self.flattened, *self.concatenated, *(own for _, own, _ in self.concatenated.values())}

    def _see_flattening(self, before: tuple[int, ...], after: tuple[int, ...], axis: int | None) -> None:
        """Learn the sides of a map, whose channels are at `axis`, from the first reshaping to a sequence of its length.

        A tensor of six axes is an image that was cut to patches: (batch, rows, columns, height, width, channels).
        """
        if len(before) < 4 or before[0] != self.batch or after[0] != self.batch:
            return
        channels_first = axis == 1 and before[1] == after[1] and before[2:]
        channels_last = axis == -1 and before[-1] == after[2] and before[1:-1]
        patches = len(before) == 6 and before[1] * before[2] == after[1] and before[1:3]
        sides = channels_first or channels_last or patches
        if sides and 2 <= len(sides) <= 3:
            self.flattened.setdefault(prod(sides), sides)


def _tensors(values: Any) -> Iterator[Tensor]:
    """List the tensors in the arguments or the outputs of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _observe(model: nn.Module, images: Tensor, name: str, kwargs: Mapping[str, Any]) -> Trace:
    operations = _Operations(images)
    log = _Log(operations)

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
    builder = _SpecBuilder(log, images, _prefix_tokens_of(model))
    specs = tuple(builder.build(observation) for observation in log.observations)
    channels, *_, height, width = map(int, images.shape[1:])
    modules = _modules(model, log, len(images))
    config: Any = getattr(model, "pretrained_cfg", None)
    config = dict(config) if isinstance(config, Mapping) else {}
    return Trace(name, (channels, height, width), model.training, specs, modules, dict(kwargs), config)


def _prefix_tokens_of(model: nn.Module) -> tuple[int, ...]:
    """Return the numbers of prefix tokens that the model, a module in it or a config may mean, the most likely first.

    `num_prefix_tokens` is all of them. `num_register_tokens` leaves out the class token.
    """
    holders = [holder for module in model.modules() for holder in (module, getattr(module, "config", None))]
    numbers = [
        number for holder in holders for number in [getattr(holder, "num_prefix_tokens", None)] if _is_count(number)
    ]
    registers = [getattr(holder, key, None) for holder in holders for key in ("num_register_tokens", "num_reg_tokens")]
    numbers += [count + extra for count in registers if _is_count(count) for extra in (1, 0)]
    return tuple(dict.fromkeys(int(number) for number in numbers))


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _modules(model: nn.Module, log: _Log, batch: int) -> dict[str, ModuleSpec]:
    called = {name for name, count in log.calls.items() if count}
    return {
        name: ModuleSpec(
            name=name,
            kind=type(module).__name__,
            children=tuple(f"{name}.{child}".lstrip(".") for child, _ in module.named_children()),
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            macs=log.macs[name] // 2 // batch,
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


class _Reading(NamedTuple):
    """What the axes of a tensor hold: see FeatureSpec."""

    channels: int = 0
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    suffix_tokens: int = 0
    frames: int = 1


class _SpecBuilder:
    """Builds FeatureSpecs from the log of a forward. The log is complete, so later layers can explain earlier ones."""

    def __init__(self, log: _Log, images: Tensor, prefix_tokens: Sequence[int]) -> None:
        self.log = log
        self.operations = log.operations
        self.batch = len(images)
        self.size = (int(images.shape[-2]), int(images.shape[-1]))
        self.prefix_tokens = tuple(prefix_tokens)
        self.grids: list[tuple[int, int]] = []  # of the maps seen so far, the latest last
        self.contents: dict[tuple[int, int], int] = {}  # (id of a tensor, version): a running number
        if images.ndim == 4:
            self.operations.axes[id(images)] = 1

    def build(self, observation: _Observation) -> FeatureSpec:
        tensor = observation.tensor
        shape, batch_axis = self._batch_first(observation)
        layout = self._layout(tensor, shape)
        reading = self._read(layout, shape)
        if layout in _MAPS and reading.grid is not None and self._fits(reading.grid):
            self.grids = [other for other in self.grids if other != reading.grid] + [reading.grid]
        return FeatureSpec(
            tap=self._tap(observation),
            layout=layout,
            shape=shape,
            **reading._asdict(),
            reduction=self.size[0] / reading.grid[0] if reading.grid else None,
            order=observation.order,
            tensor=self.contents.setdefault((id(tensor), observation.version), len(self.contents)),
            activation=self.operations.activations.get((id(tensor), observation.version), ""),
            calls=self.log.calls[observation.module],
            clone=tensor._version != observation.version,
            batch_axis=batch_axis,
        )

    def _tap(self, observation: _Observation) -> Tap:
        call = observation.call if self.log.calls[observation.module] > 1 else None
        items = () if observation.port == "input" and observation.items == (0,) else observation.items
        return Tap(observation.module, "input" if observation.port == "input" else "output", call, items)

    def _batch_first(self, observation: _Observation) -> tuple[tuple[int, ...], int]:
        """Return the shape with the batch as its first axis, and which axis that is in the tensor."""
        shape = tuple(int(side) for side in observation.tensor.shape)
        is_second = len(shape) == 3 and shape[1] == self.batch != shape[0] and observation.from_image
        return ((shape[1], shape[0], shape[2]), 1) if is_second else (shape, 0)

    def _layout(self, tensor: Tensor, shape: tuple[int, ...]) -> Layout:
        if not 2 <= len(shape) <= 5 or shape[0] != self.batch or not tensor.is_floating_point():
            return Layout.OTHER
        if len(shape) == 2:
            return Layout.NC
        axis = self.operations.axes.get(id(tensor))
        if shape != tuple(tensor.shape):
            return Layout.NLC
        if len(shape) >= 4:
            axis = axis or self._axis_by_grid(shape)
            first, last = _MAPS[:2] if len(shape) == 4 else _MAPS[2:]
            return {1: first, -1: last}.get(axis or 0, Layout.OTHER)
        axis = axis or self.log.axes_by_shape.get(shape) or (-1 if self._tokens(shape[1]) else 1)
        return Layout.NLC if axis == -1 else Layout.NCL

    def _axis_by_grid(self, shape: tuple[int, ...]) -> int | None:
        if len(shape) == 5 and not any(len(other) == 5 for other in self.log.axes_by_shape):
            return None  # no video: a stack of maps
        first, last = shape[-2:] in self.grids, shape[-3:-1] in self.grids
        if first and last:
            return self.log.axes_by_shape.get(shape, 1)
        return 1 if first else -1 if last else None

    def _read(self, layout: Layout, shape: tuple[int, ...]) -> _Reading:
        match layout:
            case Layout.NCHW | Layout.NCDHW:
                return _Reading(shape[1], (shape[-2], shape[-1]), frames=1 if len(shape) == 4 else shape[2])
            case Layout.NHWC | Layout.NDHWC:
                return _Reading(shape[-1], (shape[-3], shape[-2]), frames=1 if len(shape) == 4 else shape[1])
            case Layout.NC:
                return _Reading(shape[1])
            case Layout.OTHER:
                return _Reading()
        length, channels = (shape[1], shape[2]) if layout is Layout.NLC else (shape[2], shape[1])
        tokens = self._tokens(length) or _Reading(prefix_tokens=length if length <= MAX_PREFIX else 0)
        return tokens._replace(channels=channels)

    def _tokens(self, length: int) -> _Reading | None:
        """Return the grid in a number of tokens, from what is known best to what is only likely.

        First what was seen to be concatenated, then a grid of an earlier map with the prefix tokens that the model
        names or few others, then a map that was flattened to this length, then a grid of the image's aspect ratio.
        """
        if length in self.operations.selected:
            return None
        return (
            self._concatenated(length)
            or self._of_known_grid(length)
            or self._flattened(length)
            or self._of_aspect_ratio(length)
        )

    def _concatenated(self, length: int) -> _Reading | None:
        if length not in self.operations.concatenated:
            return None
        prefix, own, suffix = self.operations.concatenated[length]
        known = next((grid for grid in reversed(self.grids) if grid[0] * grid[1] == own and grid != (1, 1)), None)
        if known is not None:
            return _Reading(grid=known, prefix_tokens=prefix, suffix_tokens=suffix)
        reading = self._flattened(own) or _Reading(grid=self._grid_of(own))
        if reading.grid is None:
            return None
        return reading._replace(prefix_tokens=prefix, suffix_tokens=suffix)

    def _of_known_grid(self, length: int) -> _Reading | None:
        candidates = [(grid, length - grid[0] * grid[1]) for grid in reversed(self.grids)]
        fitting = [(grid, prefix) for grid, prefix in candidates if prefix in (0, *self.prefix_tokens)]
        fitting += sorted(
            ((grid, prefix) for grid, prefix in candidates if 0 < prefix <= MAX_PREFIX), key=lambda item: item[1]
        )
        if fitting and fitting[0][0] != (1, 1):
            return _Reading(grid=fitting[0][0], prefix_tokens=fitting[0][1])
        return None

    def _flattened(self, length: int) -> _Reading | None:
        sides = self.operations.flattened.get(length)
        if sides is None or sides[-2] > self.size[0] or sides[-1] > self.size[1] or 1 in sides[-2:]:
            return None
        return _Reading(grid=(sides[-2], sides[-1]), frames=sides[0] if len(sides) == 3 else 1)

    def _of_aspect_ratio(self, length: int) -> _Reading | None:
        for prefix in dict.fromkeys((*self.prefix_tokens, 0, 1, 2)):
            grid = self._grid_of(length - prefix)
            if grid is not None and grid[0] * self.size[1] == grid[1] * self.size[0] and self._is_scaled(grid):
                return _Reading(grid=grid, prefix_tokens=prefix)
        for prefix in dict.fromkeys((0, *self.prefix_tokens, 1, 2)):
            grid = self._grid_of(length - prefix)
            if grid is not None and self._is_scaled(grid):
                return _Reading(grid=grid, prefix_tokens=prefix)
        return None

    def _is_scaled(self, grid: tuple[int, int]) -> bool:
        """Whether a grid is one that was seen, shrunk or enlarged by a power of 2; true where none was seen.

        Tokens that were grouped or dropped have a number that says nothing of positions.
        """
        seen = [other for other in self.grids if other not in (self.size, (1, 1))]
        seen += [(sides[-2], sides[-1]) for sides in self.operations.flattened.values()]
        return not seen or any(_scales(other, grid) or _scales(grid, other) for other in seen)

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


def _scales(fine: tuple[int, int], coarse: tuple[int, int]) -> bool:
    """Whether both sides of a grid are those of a finer one divided by a power of 2, both rounded up or down."""
    factor = 2 ** max(round(log2(fine[0] / coarse[0])), 0)
    return coarse in (tuple(side // factor for side in fine), tuple(-(-side // factor) for side in fine))


_MAPS = (Layout.NCHW, Layout.NHWC, Layout.NCDHW, Layout.NDHWC)


def _times(size: Size) -> str:
    return "x".join(map(str, size))
