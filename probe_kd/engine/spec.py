"""Frozen values that the other modules share: taps, the features seen there, pairs, traces and inputs.

Nothing here imports torch, so that a recipe can be read and refused in milliseconds.
"""

import re
import warnings
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from math import cos, inf, isfinite, pi
from operator import index
from typing import Any, Literal, Self

from probe_kd.errors import DataError, LossError, TapError, TraceError, nearest

Side = Literal["student", "teacher"]


class Layout(StrEnum):
    """The meaning of a feature's axes (timm's `Format`, and four more; D is the frames of a video).

    `OTHER` is a tensor that is not a per-image feature: a scalar, a stack of windows, an attention matrix.
    """

    NCHW = "NCHW"
    NHWC = "NHWC"
    NLC = "NLC"
    NCL = "NCL"
    NC = "NC"
    NCDHW = "NCDHW"
    NDHWC = "NDHWC"
    OTHER = "other"


# A prefix without a name, as in ':a:b', is written where the name of a module could be read as that of a model.
_MODEL = r"(?:(?P<model>[^\W\d][\w-]*)?:)"
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""  # a literal of Python
_ITEM = rf"\[(?:{_QUOTED}|[^\[\]]+)\]"
_TAP = re.compile(
    rf"{_MODEL}?(?P<module>{_QUOTED}|[^#@\[\]]*)"
    rf"(?:\#(?P<call>[0-9]{{1,9}}))?(?:@(?P<port>input|output))?(?P<items>(?:{_ITEM})*)"
)
_TAP_FORM = (
    "module[#call][@input][[item]], as in 'layer3', 'layer3@input', 'blocks.5#1', 'head[0]', \"maps['0']\", or '' "
    "(the output)"
)
PATTERNS = ("glob", "re")  # what begins with `glob:` or `re:` is a pattern of layers, not a tap of a model of that name


@dataclass(frozen=True)
class Tap:
    """One place in a model where a tensor can be read.

    `module` is the path in `named_modules()`. `""` is the model itself, so `Tap("")` is its output (the logits).
    `call` selects one of several calls of the same module, counted from 0; None means that there is only one.
    `items` select from a tuple or list (an int) or a dict (an int or str). At an input, the first item selects the
    argument, by position or keyword; without items, it is the first argument. `model` is the name of the teacher, if
    there are several: `dino:blocks.11`, or `dino:` for its output.

    In text, a key that could be read as something else is quoted as Python writes it: `maps['0']` is the key "0" and
    `maps[0]` the position or the number 0, `out['a]b']`, `out['']`. So is a path with spaces or one of `#@[]`.

    `Tap.parse(str(tap)) == tap` for every valid tap. Raises TapError for any other text.
    """

    module: str
    port: Literal["output", "input"] = "output"
    call: int | None = None
    items: tuple[int | str, ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        check_model_name(self.model)
        if not isinstance(self.module, str):
            raise TapError(f"{self.module!r} is not a module path; expected text, as in 'blocks.5'")
        if self.port not in ("output", "input"):
            raise TapError(f"port {self.port!r} of a tap: expected 'output' or 'input'")
        if self.call is not None and self.call < 0:
            raise TapError(f"call {self.call} of a tap: calls are counted from 0")
        if any(isinstance(item, int) and not 0 <= item < _MOST for item in self.items):
            raise TapError(f"items {self.items!r} of a tap: positions are counted from 0, and have at most 9 digits")

    @classmethod
    def parse(cls, text: "str | Tap") -> Self:
        """Parse the text form of a tap. A Tap is returned unchanged, so that functions can accept either.

        Raises TapError if the text is not a tap.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise TapError(f"{text!r} is not a tap; expected text of the form {_TAP_FORM}")
        match = _TAP.fullmatch(text.strip())
        if match is None:
            raise TapError(f"{text!r} is not a tap; expected {_TAP_FORM}")
        items = [item[1:-1] for item in re.findall(_ITEM, match["items"])]
        return cls(
            module=_unquoted(match["module"]),
            port="input" if match["port"] == "input" else "output",
            call=None if match["call"] is None else int(match["call"]),
            items=tuple(int(item) if re.fullmatch("[0-9]{1,9}", item) else _unquoted(item) for item in items),
            model=match["model"] or "",
        )

    def __str__(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        port = "@input" if self.port == "input" else ""
        module = _path_text(self.module)
        prefix = ":" if self.model or re.match(_MODEL, module) else ""
        return f"{self.model}{prefix}{module}{call}{port}{''.join(f'[{_item_text(item)}]' for item in self.items)}"

    @property
    def local(self) -> "Tap":
        """The tap without the name of its model, as the model's own Probe and Trace know it."""
        return replace(self, model="") if self.model else self

    @property
    def label(self) -> str:
        """The tap in words for plans: an output is `output`, or `dino output` of one of several teachers."""
        output = f"{self.model} output".strip()
        return output if self.local == Tap("") else str(self)

    @property
    def is_output(self) -> bool:
        """Whether this is the output of the model itself, or an item of it. Usually these are the logits."""
        return self.module == "" and self.port == "output"


_MOST = 10**9  # positions below are read as numbers


def _path_text(module: str) -> str:
    return repr(module) if re.search(r"[#@\[\]\s]", module) or module[:1] in ("'", '"') else module


def _item_text(item: int | str) -> str:
    """Return an item as a tap writes it: a key in quotes if it could be read as a number, or ends the item."""
    plain = isinstance(item, int) or re.fullmatch(r"[^\[\]\s'\"]*[^\[\]\s0-9'\"][^\[\]\s'\"]*", item)
    return str(item) if plain else repr(item)


def _unquoted(text: str) -> str:
    """Return what a literal of Python stands for, and other text as it is. Raises TapError for a wrong escape."""
    if text[:1] not in ("'", '"'):
        if re.search(r"\s", text):
            raise TapError(f"{text!r} in a tap has spaces; expected it in quotes, as in {text!r}")
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return str(literal_eval(text))
    except (ValueError, SyntaxError, Warning):
        raise TapError(f"{text} in a tap: expected text in quotes as Python writes it, as in {text[1:-1]!r}") from None


def check_model_name(name: str) -> None:
    """Raise TapError unless a name can stand before the colon of a tap, as in `dino:blocks.11`."""
    if name in PATTERNS:
        raise TapError(f"'{name}:' begins a pattern, which a recipe's `pairs` takes; here name one layer")
    if name and not re.fullmatch(r"[^\W\d][\w-]*", name):
        raise TapError(
            f"{name!r} cannot be the name of a teacher: expected letters, digits, '_' and '-', a letter first, as in "
            "'dino'"
        )


@dataclass(frozen=True)
class FeatureSpec:
    """The output of a tap, as seen in one dry forward.

    `shape` includes the batch, which comes first. A Probe that is given this spec returns it so; `batch_axis` is where
    the model has it, 1 in a transformer of (tokens, batch, channels). `grid` is (height, width) in positions, or None.
    `prefix_tokens` is the number of class, register and distillation tokens before the grid, `suffix_tokens` of those
    after it, and `frames` the number of grids, one for each frame of a video. `reduction` is the stride relative to the
    input: height of the image / height of the grid. `order` numbers all tensors of the forward in the order of their
    creation. `tensor` is equal for two taps that carry the same tensor with the same contents, such as a container and
    its last child. `activation` names the nonlinearity whose output the tensor is (`relu`, `gelu`, ...), and is empty
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
    suffix_tokens: int = 0
    frames: int = 1
    batch_axis: int = 0

    @property
    def spatial(self) -> bool:
        """Whether the feature has a grid of positions."""
        return self.grid is not None

    def describe(self) -> str:
        """Return the short form used in plans and tables: `tokens 14x14+1 192`, `map 28x28 512`, `vector 1000`."""
        frames = f"{self.frames}x" if self.frames > 1 else ""
        grid = "" if self.grid is None else f" {frames}{self.grid[0]}x{self.grid[1]}"
        others = self.prefix_tokens + self.suffix_tokens
        prefix = f"+{others}" if others else ""
        kinds = {Layout.NC: "vector", Layout.NLC: "tokens", Layout.NCL: "tokens", Layout.OTHER: "other"}
        if self.layout is Layout.OTHER:
            return f"other {'x'.join(map(str, self.shape[1:]))}"
        return f"{kinds.get(self.layout, 'map')}{grid}{prefix} {self.channels}"


@dataclass(frozen=True)
class Pair:
    """A student tap and the teacher tap that it learns from. The student comes first, as in `F.mse_loss(input,
    target)`.

    Taps may be given as text. `weight` multiplies the pair's share of a loss. `reason` says why `match` chose the
    pair. `adapter` overrides `policy`, `tokens`, `normalize`, `projector`, `activation` and `grid` of the objective
    for this pair; a loss without such a choice ignores it.
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
        return f"{self.student.label} <- {self.teacher.label}"


@dataclass(frozen=True)
class Schedule:
    """A number that changes from `start` to `end` over `epochs` epochs of a stage, and then stays at `end`.

    By default it changes over all epochs of the stage.

    FitNets (Romero et al. 2015, sec. 3.1) decreases the weight of the soft targets from 4 to 1.
    """

    start: float
    end: float
    epochs: float | None = None
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, epoch: float, epochs: int) -> float:
        """Return the value after `epoch` epochs of a stage that has `epochs` epochs."""
        share = min(max(epoch / (self.epochs or epochs), 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - cos(pi * share)) / 2
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Share:
    """A weight that makes the gradient of a loss a share of the task's: `Share(0.3)` makes its norm 0.3 of the task's.

    The norms are those of the gradients at the student's parameters that both reach, averaged over the first `batches`
    batches of a stage, before its first step: weight = share * |g_task| / |g_loss|. The task is the weighted sum of the
    student's losses of labels, or without any, the first loss of outputs; `of` names another loss instead. The weight
    then stays as it is. With `follow`, one batch in every `batches` is measured during the stage too, and enters an
    exponential average of the norms with the weight 1 / `batches`.

    Weights from ratios of gradient norms are also those of GradNorm (Chen et al. 2018, arXiv 1711.02257), which moves
    them by how fast each loss falls, and of VQGAN (Esser et al. 2021, arXiv 2012.09841), at one layer and every step.

    Raises LossError for a share that is not positive and finite, and for less than one batch.
    """

    share: float
    of: str = field(default="", kw_only=True)
    batches: int = field(default=10, kw_only=True)
    follow: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < inf:
            raise LossError(f"share {self.share!r} of the task's gradient: expected a number above 0, as in Share(0.3)")
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1:
            raise LossError(f"batches {self.batches!r} of a share: expected a whole number above 0, as in 10")

    def __str__(self) -> str:
        return f"share {self.share:g}" + (f" of {self.of}" if self.of else "")


def value_at(value: float | Schedule | Share, epoch: float, epochs: int) -> float:
    """The value of a number after `epoch` of `epochs`. A `Share`, which has none before it is measured, counts as 1."""
    if isinstance(value, Share):
        return 1.0
    return value.at(epoch, epochs) if isinstance(value, Schedule) else value


@dataclass(frozen=True)
class ModuleSpec:
    """One module in a dry forward: its class, its size, how often it ran and when.

    `parameters` includes the parameters of its children. `macs` are the multiply-accumulates for one image over all its
    calls. `first` and `last` are the orders at which its first call began and its last call ended. They are -1 if it
    never ran, and `silent` then says why.
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
    `training` is the traced mode. `pretrained_cfg` is the model's, as timm has it; empty if it has none.
    `trace["layer3"]` is the spec of one tap. It raises TapError, with the cause and the nearest valid taps, if there is
    none.
    """

    model: str
    input_size: tuple[int, int, int]
    training: bool
    specs: tuple[FeatureSpec, ...]
    modules: Mapping[str, ModuleSpec]
    model_kwargs: Mapping[str, object] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def _by_tap(self) -> dict[Tap, FeatureSpec]:
        return {spec.tap: spec for spec in self.specs}

    @property
    def output(self) -> FeatureSpec:
        """The output of the model; its first item if it is a tuple. Raises TraceError if it is not a tensor."""
        output = next((spec for spec in self.specs if spec.tap.is_output), None)
        if output is None:
            raise TraceError(f"{self.model} gives no tensor; expected logits")
        return output

    @property
    def parameters(self) -> int:
        return self.modules[""].parameters

    @property
    def macs(self) -> int:
        return self.modules[""].macs

    def __getitem__(self, tap: str | Tap) -> FeatureSpec:
        parsed = Tap.parse(tap)
        if parsed.model:
            raise TapError(_of_no_name(parsed, self.model))
        spec = self._by_tap.get(parsed)
        if spec is None and parsed.call == 0:  # '#0' of a module that is called once is that call
            spec = self._by_tap.get(Tap(parsed.module, parsed.port, None, parsed.items))
        if spec is None:
            raise TapError(self._explain(parsed))
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


@dataclass(frozen=True)
class Traces:
    """The traces of teachers by name: `traces["dino:blocks.11"]` is the spec of one tap, which carries the name too.

    A single teacher may have the empty name. Raises TapError for a tap of no teacher, and for what its trace refuses.
    """

    by_model: Mapping[str, Trace]

    def __getitem__(self, tap: str | Tap) -> FeatureSpec:
        named = self.named(Tap.parse(tap))
        spec = self.by_model[named.model][named.local if named.model else named]
        return replace(spec, tap=replace(spec.tap, model=named.model)) if named.model else spec

    def named(self, tap: Tap) -> Tap:
        """Return the tap with the name of its teacher, which it may leave out if there is only one.

        Raises TapError for the name of no teacher, and for a tap without a name if there are several teachers.
        """
        names = tuple(self.by_model)
        if tap.model in names:
            return tap
        if names == ("",):
            raise TapError(_of_no_name(tap, self.by_model[""].model))
        if tap.model:
            raise TapError(f"'{tap}': there is no teacher '{tap.model}'{nearest(tap.model, names)}{_listed(names)}")
        if len(names) == 1:
            return replace(tap, model=names[0])
        owners = [name for name, trace in self.by_model.items() if tap.module in trace.modules] or names
        legal = " or ".join(repr(str(replace(tap, model=name))) for name in owners[:3])
        raise TapError(f"'{tap}' does not say whose layer it is{_listed(names)}; write {legal}")


def _of_no_name(tap: Tap, model: str) -> str:
    return f"'{tap}' names the model '{tap.model}', and {model} is a single one without a name; write '{tap.local}'"


def _listed(names: Sequence[str]) -> str:
    return f"; the teachers: {', '.join(names)}" if names else "; there is no teacher"


def _size(value: Any) -> tuple[int, int, int]:
    """Convert a sequence of three whole numbers to the size of an input. Raises DataError for anything else."""
    try:
        sides = [index(side) for side in (value if hasattr(value, "__iter__") else [value])]
    except TypeError:
        sides = []
    if len(sides) == 3 and min(sides) > 0 and not any(isinstance(side, bool) for side in value):
        return sides[0], sides[1], sides[2]
    near = f"; did you mean (3, {sides[0]}, {sides[-1]})?" if len(sides) in (1, 2) and min(sides) > 0 else ""
    raise DataError(
        f"size {value!r} of an input: expected (channels, height, width), three whole numbers above 0, as in "
        f"(3, 224, 224){near}"
    )


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    """Convert a mean or std to a tuple of one number, or one per channel. Axes of size 1 are dropped."""
    squeezed = _squeezed(value)
    several = hasattr(squeezed, "__iter__") and not isinstance(squeezed, str | bytes | Mapping)
    numbers = tuple(map(_squeezed, squeezed)) if several else () if squeezed is None else (squeezed,)
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        shown = " ".join(repr(value).split())[:60]
        raise DataError(
            f"{name} {shown} of an input: expected a number, or one for each channel, as in (0.5, 0.5, 0.5)"
        )
    return numbers


def _squeezed(array: Any) -> Any:
    """Convert an array or tensor to a number or list, and unwrap lists that hold a single list or number."""
    value = array.tolist() if hasattr(array, "tolist") else array
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
        """Whether both mean and std are set."""
        return bool(self.mean and self.std)

    def filled(self, model: object) -> Self:
        """Return a copy in which missing mean and std are those of the timm config of the model, or of its trace."""
        config = getattr(model, "pretrained_cfg", None) or {}
        if self.complete or not (config.get("mean") and config.get("std")):
            return self
        own = type(self).of(model, self.size)
        return replace(self, mean=self.mean or own.mean, std=self.std or own.std)

    def or_plain(self) -> Self:
        """Return a copy in which a missing mean is 0 and a missing std is 1: images in [0, 1]."""
        return replace(self, mean=self.mean or (0.0,), std=self.std or (1.0,))

    def covering(self, other: "InputSpec") -> Self:
        """Return a copy with the larger height and width of both inputs. Each model then takes its own view."""
        channels, height, width = self.size
        return replace(self, size=(channels, max(height, other.size[1]), max(width, other.size[2])))

    @classmethod
    def of(cls, model: object, size: tuple[int, int, int] | None = None) -> Self:
        """Return the input of a model, or of a trace, from its timm `pretrained_cfg`.

        Without one: images in [0, 1], not normalised.
        """
        config = getattr(model, "pretrained_cfg", None) or {}
        size = size or tuple(config.get("input_size") or (3, 224, 224))
        mean, std = tuple(config.get("mean") or (0.0,)), tuple(config.get("std") or (1.0,))
        if size[0] == 1 and len(mean) == 3:  # a grey image is normalised as the mean of its three equal channels
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        return cls(size, mean, std)
