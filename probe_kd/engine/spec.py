"""The frozen values that everything else passes around: what to capture, what was seen there, what goes with what.

Nothing here imports torch, so that a recipe can be read and refused in milliseconds.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from math import cos, isfinite, pi
from operator import index
from typing import Any, Literal, Self

from probe_kd.errors import DataError, TapError, TraceError, nearest


class Layout(StrEnum):
    """The meaning of a feature's axes (timm's `Format`, and two more).

    `OTHER` is a tensor that is not a per-image feature: a scalar, a stack of windows, an attention matrix.
    """

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"
    NCL = "NCL"
    NC = "NC"
    OTHER = "other"


_TAP = re.compile(
    r"(?P<module>[^#@\[\]]*)(?:\#(?P<call>[0-9]{1,9}))?(?:@(?P<port>input|output))?(?P<items>(?:\[[^\[\]]+\])*)"
)
_TAP_FORM = "module[#call][@input][[item]], as in 'layer3', 'layer3@input', 'blocks.5#1', 'head[0]', or '' (the output)"


@dataclass(frozen=True)
class Tap:
    """One place in a model where a tensor can be read.

    `module` is the path in `named_modules()`. `""` is the model itself, so `Tap("")` is its output (the logits).
    `call` selects one of several calls of the same module, counted from 0; None means that there is only one.
    `items` select from a tuple or list (an int) or a dict (a str). At an input, the first item selects the
    argument, by position or keyword; without items, it is the first argument.

    `Tap.parse(str(tap)) == tap` for every valid tap. Raises TapError for any other text.
    """

    module: str
    port: Literal["output", "input"] = "output"
    call: int | None = None
    items: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.module, str) or re.search(r"[#@\[\]\s]", self.module):
            raise TapError(f"{self.module!r} is not a module path; expected a name without spaces, '#', '@', '[', ']'")
        if self.port not in ("output", "input"):
            raise TapError(f"port {self.port!r} of a tap: expected 'output' or 'input'")
        if self.call is not None and self.call < 0:
            raise TapError(f"call {self.call} of a tap: calls are counted from 0")
        if any(
            isinstance(item, str) and not re.fullmatch(r"[^\[\]\s]*[^\[\]\s0-9][^\[\]\s]*", item) for item in self.items
        ):
            raise TapError(
                f"items {self.items!r} of a tap: a key needs one character that is no digit, and no brackets"
            )
        if any(isinstance(item, int) and item < 0 for item in self.items):
            raise TapError(f"items {self.items!r} of a tap: positions are counted from 0")

    @classmethod
    def parse(cls, text: "str | Tap") -> Self:
        """Read the text form; a Tap passes unchanged, so that public functions can accept either."""
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise TapError(f"{text!r} is not a tap; expected text of the form {_TAP_FORM}")
        found = _TAP.fullmatch(text.strip())
        if found is None:
            raise TapError(f"{text!r} is not a tap; expected {_TAP_FORM}")
        items = re.findall(r"\[([^\[\]]+)\]", found["items"])
        return cls(
            module=found["module"],
            port="input" if found["port"] == "input" else "output",
            call=None if found["call"] is None else int(found["call"]),
            items=tuple(int(item) if re.fullmatch("[0-9]{1,9}", item) else item for item in items),
        )

    def __str__(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        port = "@input" if self.port == "input" else ""
        return f"{self.module}{call}{port}{''.join(f'[{item}]' for item in self.items)}"

    @property
    def is_output(self) -> bool:
        """Whether this is the model's own output (or an item of it): the logits, as a rule."""
        return self.module == "" and self.port == "output"


@dataclass(frozen=True)
class FeatureSpec:
    """The output of a tap, as seen in one dry forward.

    `shape` includes the batch. `grid` is (height, width) in positions, or None. `prefix_tokens` is the number of
    class, register and distillation tokens before the grid. `reduction` is the stride relative to the input: height
    of the image / height of the grid. `order` numbers all tensors of the forward in the order of their creation.
    `tensor` is equal for two taps that carry the same tensor with the same contents, such as a container and its
    last child. `activation` names the nonlinearity whose output the tensor is (`relu`, `gelu`, ...), and is empty
    for other tensors, which usually have both signs. `clone` means that a later in-place operation overwrites the
    tensor, so that a capture has to copy it.
    """

    tap: Tap
    layout: Layout
    shape: tuple[int, ...]
    channels: int = 0
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    reduction: float | None = None
    order: int = 0
    tensor: int = 0
    activation: str = ""
    calls: int = 1
    clone: bool = False

    @property
    def spatial(self) -> bool:
        """Whether there is a grid of positions to compare."""
        return self.grid is not None

    def describe(self) -> str:
        """The short form used in plans and tables: `tokens 14x14+1 192`, `map 28x28 512`, `vector 1000`."""
        grid = "" if self.grid is None else f" {self.grid[0]}x{self.grid[1]}"
        prefix = f"+{self.prefix_tokens}" if self.prefix_tokens else ""
        kinds = {Layout.NC: "vector", Layout.NLC: "tokens", Layout.NCL: "tokens", Layout.OTHER: "other"}
        if self.layout is Layout.OTHER:
            return f"other {'x'.join(map(str, self.shape[1:]))}"
        return f"{kinds.get(self.layout, 'map')}{grid}{prefix} {self.channels}"


@dataclass(frozen=True)
class Pair:
    """A student tap and the teacher tap that it learns from. The student comes first, as in `F.mse_loss(input,
    target)`.

    Taps may be given as text. `weight` multiplies the pair's share of a loss. `reason` says why `match` chose the
    pair. `adapter` overrides `policy`, `tokens`, `normalize`, `projector` and `activation` of the objective for
    this pair; a loss without such a choice ignores it.
    """

    student: Tap
    teacher: Tap
    weight: float = field(default=1.0, kw_only=True)
    reason: str = field(default="", kw_only=True, compare=False)
    adapter: Mapping[str, str] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "student", Tap.parse(self.student))
        object.__setattr__(self, "teacher", Tap.parse(self.teacher))

    def __str__(self) -> str:
        return f"{str(self.student) or 'output'} <- {str(self.teacher) or 'output'}"


@dataclass(frozen=True)
class Schedule:
    """A number that moves from `start` to `end` over so many epochs of a stage (default: all), and then stays
    there.

    FitNets (Romero et al. 2015, sec. 3.1) decreases the weight of the soft targets from 4 to 1.
    """

    start: float
    end: float
    epochs: float | None = None
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, epoch: float, epochs: int) -> float:
        """The value after so many epochs of a stage of `epochs`."""
        share = min(max(epoch / (self.epochs or epochs), 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - cos(pi * share)) / 2
        return self.start + (self.end - self.start) * share


def value_at(value: float | Schedule, epoch: float, epochs: int) -> float:
    return value.at(epoch, epochs) if isinstance(value, Schedule) else value


@dataclass(frozen=True)
class ModuleSpec:
    """One module as a dry forward saw it: what it is, what it holds, how often and when it ran.

    `parameters` counts its own and its children's; `macs` are multiply-accumulates for one image over all its calls.
    `first` and `last` are the orders at which its first call began and its last call ended, -1 where it never ran;
    `silent` then says why.
    """

    name: str
    kind: str
    children: tuple[str, ...] = ()
    parameters: int = 0
    macs: int = 0
    calls: int = 0
    first: int = -1
    last: int = -1
    silent: str = ""

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def depth(self) -> int:
        """0 for the model itself, 1 for its children."""
        return self.name.count(".") + 1 if self.name else 0


@dataclass(frozen=True)
class Trace:
    """The result of one dry forward of a model: a FeatureSpec for the input and output of every module call.

    `model` and `model_kwargs` are what the model is built from, `input_size` is (channels, height, width), and
    `training` is the traced mode. `trace["layer3"]` is the spec of one tap. It raises TapError, with the cause and
    the nearest valid taps, if there is none.
    """

    model: str
    input_size: tuple[int, int, int]
    training: bool
    specs: tuple[FeatureSpec, ...]
    modules: Mapping[str, ModuleSpec]
    model_kwargs: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def _by_tap(self) -> dict[Tap, FeatureSpec]:
        return {spec.tap: spec for spec in self.specs}

    @property
    def output(self) -> FeatureSpec:
        """The model's own output; the first item where it is a tuple. Raises TraceError where it is no tensor."""
        found = next((spec for spec in self.specs if spec.tap.is_output), None)
        if found is None:
            raise TraceError(f"{self.model} gives no tensor; expected logits")
        return found

    @property
    def parameters(self) -> int:
        return self.modules[""].parameters

    @property
    def macs(self) -> int:
        return self.modules[""].macs

    def __getitem__(self, tap: str | Tap) -> FeatureSpec:
        wanted = Tap.parse(tap)
        spec = self._by_tap.get(wanted)
        if spec is None and wanted.call == 0:  # '#0' of a module that is called once is that call
            spec = self._by_tap.get(Tap(wanted.module, wanted.port, None, wanted.items))
        if spec is None:
            raise TapError(self._explain(wanted))
        return spec

    def _explain(self, tap: Tap) -> str:
        module = self.modules.get(tap.module)
        if module is None:
            hint = (
                nearest(tap.module, self.modules) or f"; its top-level modules: {', '.join(self.modules[''].children)}"
            )
            return f"{self.model} has no module '{tap.module}'{hint}"
        if module.silent:
            return f"'{tap}' never fires: {module.silent}"
        if tap.call is None and module.calls > 1:
            first, last = (Tap(tap.module, tap.port, call, tap.items) for call in (0, module.calls - 1))
            return f"'{tap.module}' is called {module.calls} times in one forward; write which, '{first}' to '{last}'"
        legal = [str(spec.tap) for spec in self.specs if spec.tap.module == tap.module]
        return f"{self.model} yields no tensor at '{tap}'; its taps there: {', '.join(map(repr, legal[:8]))}"


def _size(given: Any) -> tuple[int, int, int]:
    """The size of an input, of whatever sequence has three whole numbers. Raises DataError."""
    try:
        sides = [index(side) for side in (given if hasattr(given, "__iter__") else [given])]
    except TypeError:
        sides = []
    if len(sides) == 3 and min(sides) > 0 and not any(isinstance(side, bool) for side in given):
        return sides[0], sides[1], sides[2]
    near = f"; did you mean (3, {sides[0]}, {sides[-1]})?" if len(sides) in (1, 2) and min(sides) > 0 else ""
    raise DataError(
        f"size {given!r} of an input: expected (channels, height, width), three whole numbers above 0, as in "
        f"(3, 224, 224){near}"
    )


def _numbers(given: Any, name: str) -> tuple[float, ...]:
    """The numbers of a mean or std: one, or one for each channel, also as a tensor with axes of 1 around them."""
    values = _squeezed(given)
    several = hasattr(values, "__iter__") and not isinstance(values, str | bytes | Mapping)
    found = tuple(map(_squeezed, values)) if several else () if values is None else (values,)
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in found):
        shown = " ".join(repr(given).split())[:60]
        raise DataError(
            f"{name} {shown} of an input: expected a number, or one for each channel, as in (0.5, 0.5, 0.5)"
        )
    return found


def _squeezed(given: Any) -> Any:
    """A number, or a list, of an array or tensor; without the lists that hold one list or number and nothing else."""
    value = given.tolist() if hasattr(given, "tolist") else given
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list | int | float):
        value = value[0]
    return value


@dataclass(frozen=True)
class InputSpec:
    """The images that a model expects: (channels, height, width), and the mean and standard deviation of the
    normalisation.

    One value of `mean` and `std` applies to all channels. Without them, they are taken from the model's timm
    config. Images in [0, 1] without normalisation are `InputSpec(size, 0.0, 1.0)`.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.size))
        for name in ("mean", "std"):
            values = _numbers(getattr(self, name), name)
            object.__setattr__(self, name, values)
            if values and len(values) not in (1, self.size[0]):
                raise DataError(f"{name} {values} of an input: expected 1 or {self.size[0]} values, one per channel")
            if not all(map(isfinite, values)):
                raise DataError(f"{name} {values} of an input: expected finite numbers")
        if any(value <= 0 for value in self.std):
            raise DataError(f"std {self.std} of an input: every value has to be positive")

    @property
    def complete(self) -> bool:
        """Whether it says how images are normalised, and not only how large they are."""
        return bool(self.mean and self.std)

    def filled(self, model: object) -> Self:
        """With the model's own mean and std, as its timm config has them, in the place of those that were not given."""
        config = getattr(model, "pretrained_cfg", None) or {}
        if self.complete or not (config.get("mean") and config.get("std")):
            return self
        own = type(self).of(model, self.size)
        return replace(self, mean=self.mean or own.mean, std=self.std or own.std)

    def or_plain(self) -> Self:
        """With mean 0 and std 1 in the place of those that were not given: images in [0, 1]."""
        return replace(self, mean=self.mean or (0.0,), std=self.std or (1.0,))

    def covering(self, other: "InputSpec") -> Self:
        """The same, but as high and as wide as the larger of both: what each then takes its own view of."""
        channels, height, width = self.size
        return replace(self, size=(channels, max(height, other.size[1]), max(width, other.size[2])))

    @classmethod
    def of(cls, model: object, size: tuple[int, int, int] | None = None) -> Self:
        """From timm's `pretrained_cfg` on the model; images in [0, 1], not normalised, where it has none."""
        config = getattr(model, "pretrained_cfg", None) or {}
        size = size or tuple(config.get("input_size") or (3, 224, 224))
        mean, std = tuple(config.get("mean") or (0.0,)), tuple(config.get("std") or (1.0,))
        if size[0] == 1 and len(mean) == 3:  # a grey image is normalised as the mean of its three equal channels
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        return cls(size, mean, std)
