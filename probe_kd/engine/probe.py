"""Reading tensors inside a model while it runs. No other file of this package registers a forward hook."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probe_kd.engine.sharding import end_forward
from probe_kd.engine.spec import FeatureSpec, Tap
from probe_kd.errors import TapError, demand, nearest

Before = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


# The hooks, the store and the recording window of a forward are one state, and must change together.
class Probe:
    """Runs a model and returns the tensors at its taps.

        probe = Probe(model, ["layer3", "layer4@input", ""])
        features = probe(images)                 # {Tap("layer3"): Tensor, ...}

    One call runs the model and returns the features, so they are never stale. A Probe is not an `nn.Module`: a module
    that holds a probe does not register the model's parameters.

    The hooks are on the model only while the probe runs, so copies, pickles and averages of the model have no hooks.
    The exception is `attach()`, which `torch.compile` needs: a hook added after the first compiled call never fires.

    The first call in each mode (`train`, `eval`) is a rehearsal. It runs the whole model, checks every tap, and finds
    the taps that a later in-place operation overwrites. Later calls clone only those. Taps given as `FeatureSpec`s of a
    trace need no rehearsal, and their tensors have the batch first.

    If `stop_early` is true, every later forward ends at the last tap, unless a tap needs the model's own output. This
    also holds for a compiled probe.

    Raises TapError immediately for a module that does not exist. The rehearsal raises TapError for a module that is
    never called, for a module that is called several times if the tap has no call index, and for a value that is not a
    tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: str | Tap | FeatureSpec | Iterable[str | Tap | FeatureSpec],
        *,
        stop_early: bool = True,
    ) -> None:
        demand(model, nn.Module, "the model of a Probe", TapError, "an nn.Module, as timm.create_model(name) gives")
        tap_list = [taps] if isinstance(taps, str | Tap | FeatureSpec) else list(taps)
        specs = [item for item in tap_list if isinstance(item, FeatureSpec)]
        self.model = model
        self.taps = tuple(
            dict.fromkeys(item.tap if isinstance(item, FeatureSpec) else Tap.parse(item) for item in tap_list)
        )
        self.stop_early = stop_early
        self._clones = {spec.tap for spec in specs if spec.clone}
        self._batch_axes = {spec.tap: spec.batch_axis for spec in specs if spec.batch_axis}
        self._rehearsed = {True, False} if len(specs) == len(tap_list) else set[bool]()
        self._rehearsing = False
        self._watched = False  # whether a rehearsal saw the version of every capture
        self._recording = False
        self._may_stop = False
        self._compiled = False  # whether this call of the probe is compiled as a whole
        self._missing = 0
        self._store: dict[Tap, Tensor | None] = dict.fromkeys(self.taps)
        self._versions: dict[Tap, tuple[Tensor, int]] = {}
        self._handles: list[RemovableHandle] = []
        self._attached = False  # not read off the handles: torch.compile cannot look at those
        _refuse_unhookable(model)
        self._hooks = _plan_hooks(self, dict(model.named_modules(remove_duplicate=False)))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Tap, Tensor]:
        if torch.compiler.is_compiling():
            return self._run_compiled(args, kwargs)
        if self.model.training not in self._rehearsed:
            return _rehearse(self, args, kwargs)
        with self._hooked():
            return self._run(args, kwargs)

    def attach(self) -> Self:
        """Register the hooks on the model until `close()`. `torch.compile` needs this before its first call."""
        if not self._attached:
            self._handles = [handle for hook in self._hooks for handle in hook.register()]
            self._attached = True
        return self

    def close(self) -> None:
        """Remove the hooks from the model. Calling it again has no effect."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._attached = False

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle has its own hooks on its own model, and the results of the rehearsals of this probe.
        rehearsal = set(self._clones), set(self._rehearsed), dict(self._batch_axes)
        return _rebuild, (self.model, self.taps, self.stop_early, *rehearsal, self._attached)

    def __repr__(self) -> str:
        return f"Probe({type(self.model).__name__}, [{', '.join(repr(str(tap)) for tap in self.taps)}])"

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        if self._attached:
            yield
            return
        self.attach()
        try:
            yield
        finally:
            self.close()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Tap, Tensor]:
        self._open(may_stop=self.stop_early and not self._rehearsing)
        self._compiled = False
        try:
            with suppress(_AllCaptured):
                self._forward(args, kwargs)
            self._refuse_overwritten()
        finally:
            captured = self._close_window()
            end_forward(self.model)
        return _complete(captured)

    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Tap, Tensor]:
        if self._hooks and not self._attached:
            raise TapError(
                "this probe runs under torch.compile without its hooks: call probe.attach() before compiling"
            )
        self._open(may_stop=self.stop_early and self.model.training in self._rehearsed)
        self._compiled = True
        with suppress(
            _AllCaptured
        ):  # raised and caught inside the compiled code, so that the layers above are in no graph
            self._forward(args, kwargs)
        return _complete(self._close_window())

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tap in self.taps:
            if _at_root(tap) and tap.port == "input":
                self.record(tap, pick_argument(tap, args, kwargs))
        self._stop_if_done()
        output = self.model(*args, **kwargs)
        for tap in self.taps:
            if _at_root(tap) and tap.port == "output":
                self.record(tap, pick(tap, output, tap.items))

    def _open(self, *, may_stop: bool) -> None:
        for tap in self.taps:
            self._store[tap] = None
        for hook in self._hooks:
            hook.count = 0
        self._versions.clear()
        self._missing = len(self.taps)
        self._may_stop = may_stop
        self._recording = True

    def _close_window(self) -> dict[Tap, Tensor | None]:
        self._recording = False
        captured = dict(self._store)
        for tap in self.taps:
            self._store[tap] = None
        self._versions.clear()
        return captured

    def record(self, tap: Tap, tensor: Tensor) -> None:
        if self._store[tap] is not None and not self._rehearsing:
            raise TapError(f"'{tap.module}' was called again in one forward; write '{tap.module}#0' for the first call")
        # Not rehearsed yet: in the rehearsal itself, or in a compiled forward that had none.
        clone = tap in self._clones or self.model.training not in self._rehearsed
        if not torch.compiler.is_compiling() and not tensor.is_inference():  # both keep no version to compare
            self._versions.setdefault(tap, (tensor, tensor._version))
        axis = self._batch_axes.get(tap)
        self._store[tap] = (tensor.clone() if clone else tensor) if axis is None else tensor.movedim(axis, 0).clone()
        self._missing -= 1

    def _stop_if_done(self) -> None:
        # No exception leaves a layer that was compiled by itself.
        if self._missing == 0 and self._may_stop and (self._compiled or not torch.compiler.is_compiling()):
            raise _AllCaptured

    def _refuse_overwritten(self) -> None:
        overwritten = {tap for tap, (tensor, version) in self._versions.items() if tensor._version != version}
        if self._rehearsing:
            self._clones |= overwritten
            self._watched = len(self._versions) == len(self.taps)
        elif overwritten - self._clones:
            names = ", ".join(repr(str(tap)) for tap in overwritten - self._clones)
            raise TapError(
                f"{names}: an in-place operation overwrote the captured tensor, which it did not do in the dry run; "
                "build a new Probe in the mode (train or eval) and with the input that you now use"
            )


def _plan_hooks(probe: Probe, modules: Mapping[str, nn.Module]) -> "list[_Hook]":
    for tap in probe.taps:
        if tap.module not in modules:
            raise TapError(_unknown(probe.model, tap, modules))
        if _at_root(tap) and tap.call:
            raise TapError(f"'{tap}': the model itself runs once; write '{Tap('', tap.port, None, tap.items)}'")
    inner = [tap for tap in probe.taps if not _at_root(tap)]
    tapped = {id(modules[tap.module]): modules[tap.module] for tap in inner}
    return [_Hook(probe, module, [tap for tap in inner if modules[tap.module] is module]) for module in tapped.values()]


def _rehearse(probe: Probe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Tap, Tensor]:
    """Run the whole model and clone every capture, because it is not yet known which ones are overwritten later."""
    calls: Counter[str] = Counter()
    names = _names_by_identity(probe.model)

    def count(_: str, module: nn.Module, *__: Any) -> None:
        calls.update(names[id(module)])

    probe._rehearsing = True
    try:
        with probe._hooked(), watch(probe.model, before=count):
            return _run_rehearsal(probe, args, kwargs, calls)
    finally:
        probe._rehearsing = False


def _run_rehearsal(
    probe: Probe, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Counter[str]
) -> dict[Tap, Tensor]:
    try:
        captured = probe._run(args, kwargs)
    except _Missing:
        raise TapError("\n".join(_complaints(probe, calls))) from None
    complaints = _complaints(probe, calls)
    if complaints:
        raise TapError("\n".join(complaints))
    if probe._watched:
        probe._rehearsed.add(probe.model.training)
    return captured


def _complaints(probe: Probe, calls: Mapping[str, int]) -> list[str]:
    inner = (tap for tap in probe.taps if not _at_root(tap))
    return [text for text in (explain_calls(probe.model, tap, calls) for tap in inner) if text]


def _complete(captured: dict[Tap, Tensor | None]) -> dict[Tap, Tensor]:
    missing = [str(tap) for tap, tensor in captured.items() if tensor is None]
    if missing:
        raise _Missing(f"captured nothing at {', '.join(map(repr, missing))}: the module did not run in this forward")
    return {tap: tensor for tap, tensor in captured.items() if tensor is not None}


def _rebuild(
    model: nn.Module,
    taps: tuple[Tap, ...],
    stop_early: bool,
    clones: set[Tap],
    rehearsed: set[bool],
    batch_axes: dict[Tap, int],
    attached: bool,
) -> Probe:
    probe = Probe(model, taps, stop_early=stop_early)
    probe._clones, probe._rehearsed, probe._batch_axes = clones, rehearsed, batch_axes
    return probe.attach() if attached else probe


class _AllCaptured(BaseException):
    """Leaves the forward at the last tap. A BaseException, so that no model mistakes it for an error of its own."""


class _Missing(TapError):
    pass


class _Hook:
    """The hook of one module for one probe: before its forward for the inputs, after it for the output.

    Inputs are taken before the module runs, because it may overwrite them (`nn.ReLU(inplace=True)`).
    """

    def __init__(self, probe: Probe, module: nn.Module, taps: Sequence[Tap]) -> None:
        self.probe = probe
        self.module = module
        self.inputs = [tap for tap in taps if tap.port == "input"]
        self.outputs = [tap for tap in taps if tap.port == "output"]
        self.count = 0

    def register(self) -> list[RemovableHandle]:
        return [
            self.module.register_forward_pre_hook(self, with_kwargs=True),
            self.module.register_forward_hook(self, with_kwargs=True),
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        probe = self.probe
        if not probe._recording:  # a module shared with another model runs there too, and a copy never records
            return
        call = self.count
        for tap in self.outputs if output else self.inputs:
            if tap.call is None or tap.call == call:
                value = pick(tap, output[0], tap.items) if output else pick_argument(tap, args, kwargs)
                probe.record(tap, value)
        if output:
            self.count += 1
        probe._stop_if_done()

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        # A deepcopy or pickle of an attached model must not write into this probe: its hook does nothing.
        return _make_nothing, ()


def _nothing(*_: Any) -> None:
    return None


def _make_nothing() -> Callable[..., None]:
    return _nothing


@contextmanager
def watch(model: nn.Module, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Call `before` and `after` around every module call of `model`, including its own.

    Both get the name of the module, the module and its inputs; `after` also gets its output.
    """
    handles: list[RemovableHandle] = []
    _refuse_unhookable(model)
    for name, module in model.named_modules():
        if before is not None:
            handles.append(module.register_forward_pre_hook(_named(before, name), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(_named(after, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(callback: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda *values: callback(name, *values)


def pick(tap: Tap, value: Any, items: Sequence[int | str]) -> Tensor:
    """Return the tensor that `items` select from a tuple, list, dict or dataclass.

    Raises TapError with the available items if there is no tensor.
    """
    for item in items:
        value = _step(tap, value, item)
    if isinstance(value, Tensor):
        return value
    inside = [replace(tap, items=(*tap.items, item_of(key))) for key in _keys(value)]
    raise TapError(
        f"'{tap}' yields {_describe(value)}, not a tensor"
        + (f"; write one of {', '.join(repr(str(item)) for item in inside[:6])}" if inside else "")
    )


def _step(tap: Tap, value: Any, item: int | str) -> Any:
    keys = _keys(value)
    named = [key for key in keys if item_of(key) == item] or [key for key in keys if str(key) == str(item)]
    if not named:
        legal = ", ".join(map(str, keys)) or "none"
        raise TapError(f"'{tap}': no item [{item}] in {_describe(value)}; items there: {legal}")
    return value[named[0]] if isinstance(value, tuple | list | Mapping) else getattr(value, str(item))


def item_of(key: Any) -> int | str:
    """Return the item of a tap that selects a key: small numbers and text as they are, and all others by their text."""
    is_position = isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 10**9
    return key if is_position else str.__str__(key) if isinstance(key, str) else str(key)


def _keys(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value)
    if isinstance(value, tuple | list):
        return list(range(len(value)))
    return list(getattr(value, "__dataclass_fields__", ()))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, tuple | list | Mapping):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"


def reader(model: nn.Module, tap: Tap) -> Callable[[Tensor], Tensor]:
    """Return a function from images to the tensor at one tap. The model's own output needs no hooks.

    Raises TapError for a module that does not exist; the function, for a tap that yields no tensor.
    """
    if not _at_root(tap) or tap.port == "input":
        probe = Probe(model, tap)
        return lambda images: probe(images)[tap]

    def read_output(images: Tensor) -> Tensor:
        try:
            return pick(tap, model(images), tap.items)
        finally:
            end_forward(model)

    return read_output


def pick_argument(tap: Tap, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return an argument of a module call: the first one, or the one that the tap's first item selects."""
    if not tap.items:
        first = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
        if first is None:
            raise TapError(f"'{tap}': the module is called without any argument")
        return pick(tap, first, ())
    key, *rest = tap.items
    if isinstance(key, int) and key < len(args):
        return pick(tap, args[key], rest)
    if isinstance(key, str) and key in kwargs:
        return pick(tap, kwargs[key], rest)
    legal = ", ".join(f"[{name}]" for name in [*range(len(args)), *kwargs])
    raise TapError(f"'{tap}': the module is not called with an argument [{key}]; its arguments: {legal or 'none'}")


def explain_calls(model: nn.Module, tap: Tap, calls: Mapping[str, int]) -> str:
    """Explain why a tap is not defined in a forward with these call counts. Empty if it is defined."""
    times = calls.get(tap.module, 0)
    if times == 0:
        return f"'{tap}' never fires: {why_silent(model, tap.module, {name for name, count in calls.items() if count})}"
    if tap.call is None and times > 1:
        first, last = Tap(tap.module, tap.port, 0, tap.items), Tap(tap.module, tap.port, times - 1, tap.items)
        return f"'{tap.module}' is called {times} times in one forward; write which, '{first}' to '{last}'"
    if tap.call is not None and tap.call >= times:
        last = Tap(tap.module, tap.port, None if times == 1 else times - 1, tap.items)
        return f"'{tap}': '{tap.module}' is called {times} time{'s' * (times > 1)} in one forward; the last is '{last}'"
    return ""


def why_silent(model: nn.Module, name: str, called: Collection[str]) -> str:
    """Explain why a module did not run in a forward that ran `called`, and name the nearest of those."""
    module = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList):
        cause = f"a {type(module).__name__} only holds its children and is never called"
    elif getattr(parent, "fused_attn", False):
        cause = (
            "fused attention computes it inside one kernel (timm.layers.set_fused_attn(False) makes it a module call)"
        )
    elif any(other.startswith(f"{name}.") for other in called):
        cause = "its children are called one by one, but the module itself is not"
    else:
        cause = f"this {type(module).__name__} takes no part in the forward"
    near = _nearest_called(name, called)
    return cause + (f"; the nearest module that is called is '{near}'" if near else "")


def _nearest_called(name: str, called: Collection[str]) -> str:
    """Return the last called child, otherwise a called sibling, otherwise a called ancestor."""
    for scope in (name, *_ancestors(name)):
        inside = [other for other in called if other.startswith(f"{scope}.") or not scope]
        if scope == name and inside:
            shallowest = min(other.count(".") for other in inside)
            return _natural_sort([other for other in inside if other.count(".") == shallowest])[-1]
        if scope in called and scope:
            return scope
        if inside:
            return _natural_sort(inside)[-1]
    return ""


def _natural_sort(names: Iterable[str]) -> list[str]:
    return sorted(
        names, key=lambda name: [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
    )


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _names_by_identity(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _unknown(model: nn.Module, tap: Tap, modules: Mapping[str, nn.Module]) -> str:
    hint = (
        nearest(tap.module, modules)
        or f"; its top-level modules: {', '.join(name for name, _ in model.named_children())}"
    )
    return f"{type(model).__name__} has no module '{tap.module}'{hint}"


def _at_root(tap: Tap) -> bool:
    return tap.module == ""


def _refuse_unhookable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TapError(
            "a TorchScript model runs outside Python, where no hook fires; give the nn.Module it was made from"
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise TapError(
            "this model is compiled already, and a hook added now would never fire; build the Probe on the eager "
            "model, attach() it, and compile the function that calls the probe"
        )
