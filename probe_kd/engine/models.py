"""Build models by name."""

import importlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from probe_kd.engine.arguments import check_arguments, check_truths
from probe_kd.engine.foreign import build_foreign, check_foreign, foreign_files, library_of
from probe_kd.errors import RunError, TraceError, nearest, short
from probe_kd.files.atomic import irregular, read_text, reason

MAX_CALLS = 100_000  # of torch while a model of timm is built; its largest takes 11 thousand
SET_VALUES = {  # of a tensor whose shape stays, as initialisation does
    getattr(torch.Tensor, f"{name}_") for name in ("normal", "uniform", "erfinv", "clamp", "fill", "zero", "bernoulli")
}


def build_on_meta(name: str, model_kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the named model on the meta device, without weights or memory."""
    with torch.device("meta"):
        return build_model(name, model_kwargs)


def build_model(name: str, model_kwargs: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build the named model by timm, by another library, or by the function that `package.module:function` names.

    Raises TraceError for an unknown name, with the nearest ones, and for arguments that the model refuses or that do
    not belong to its architecture: arguments of timm's loader could download anything into any folder.
    """
    import timm  # 3.5 s: only where a model is built

    check_kwargs(name, model_kwargs)
    if library_of(name):
        factory: Callable[..., Any] = partial(build_foreign, name, pretrained=pretrained)
        arguments: dict[str, Any] = {"model_kwargs": model_kwargs}
    elif module_of(name):
        factory, arguments = import_object(name), dict(model_kwargs)
    else:
        factory, arguments = timm.create_model, {"model_name": name, "pretrained": pretrained, **model_kwargs}
    try:
        with nullcontext() if module_of(name) else _Bounded(), _quiet_hub():
            model = factory(**arguments)
    except Exception as refusal:
        if pretrained and _is_of_download(refusal):
            why = short(refusal).rstrip(".")
            raise TraceError(
                f"cannot download the weights of {name}: {why}; give the file with its weights as a checkpoint"
            ) from refusal
        shown_kwargs = ", ".join(f"{key}={value!r}" for key, value in model_kwargs.items())
        advice = _advice_on_arguments(name, factory, refusal)
        raise TraceError(f"cannot build {name}({shown_kwargs}): {short(refusal)}{advice}") from refusal
    if not isinstance(model, nn.Module):
        raise TraceError(f"{name} returned a {type(model).__name__}; expected an nn.Module")
    return model


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the log of huggingface_hub when the hub cannot be reached. The error that it raises says the same."""
    logger = logging.getLogger("huggingface_hub")
    former = logger.level
    if not logging.getLogger().isEnabledFor(logging.INFO):  # --verbose
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(former)


def check_kwargs(name: str, model_kwargs: Mapping[str, Any]) -> None:
    """Check that the named model accepts these arguments. Raises TraceError for the first that it does not."""
    import timm

    if library_of(name):
        check_foreign(name, model_kwargs)
    elif module_of(name):
        with suppress(ValueError, TypeError):  # a function without a readable signature
            check_truths(name, signature(import_object(name)).parameters, model_kwargs)
    else:
        _check_name(name, timm)
        architecture, saved = _saved_arguments(name)
        check_arguments(name, architecture, {**saved, **model_kwargs})


def _is_of_download(refusal: Exception) -> bool:
    """Whether a file of the hub or of a server could not be had."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return isinstance(
        refusal, HfHubHTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled | URLError | ConnectionError
    )


def _advice_on_arguments(name: str, factory: Callable[..., Any], refusal: Exception) -> str:
    """What to do about an argument that the model refuses; empty if the refusal is about something else."""
    text = str(refusal)
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", text):
        return nearest(unknown[1], signature(factory).parameters)
    if twice := re.search(r"multiple values for (?:keyword )?argument '(\w+)'", text):
        return f"; the name {name} says what `{twice[1]}` is: leave it out, or take another name"
    return ""


class _Bounded(TorchFunctionMode):
    """Stops the construction of a model that would take hours, such as one of a million layers.

    On the meta device, where a tensor has no values, it leaves out what only sets them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise TraceError(f"the model has more parts than any other (it takes over {MAX_CALLS} calls of torch)")
        if func in SET_VALUES and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _saved_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture of a named model, and the arguments in the config of its folder or hub repository.

    Raises TraceError for a config that cannot be read.
    """
    source, _, place = name.partition(":")
    if not place:
        return name.partition(".")[0], {}
    config = _local_config(Path(place)) if source == "local-dir" else _hub_config(name, place)
    saved = config.get("model_args") or {}
    if not isinstance(config.get("architecture"), str) or not isinstance(saved, dict):
        raise TraceError(f"the config.json of {name} names no architecture, or its `model_args` are no mapping")
    return config["architecture"].partition(".")[0], saved


def portable(name: str, model_kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the architecture and arguments that build a `local-dir:` model without its folder.

    Other names do not depend on a folder, and are returned unchanged.
    """
    if not name.startswith("local-dir:"):
        return name, dict(model_kwargs)
    architecture, saved = _saved_arguments(name)
    model = build_on_meta(name, model_kwargs)
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, *sides = config.get("input_size") or (3,)
    arguments = {**{key: config.get(key) for key in ("num_classes", "global_pool")}, "in_chans": channels}
    if config.get("fixed_input_size") and sides:  # what timm takes of a config (`_update_default_model_kwargs`)
        arguments["img_size"] = sides
    arguments = {
        key: value for key, value in arguments.items() if value is not None and (key, value) != ("in_chans", 3)
    }
    merged = {**arguments, **saved, **model_kwargs}
    same = _shapes(build_on_meta(architecture, merged)) == _shapes(model)
    return (architecture, merged) if same else (name, dict(model_kwargs))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _hub_config(name: str, place: str) -> dict[str, Any]:
    from timm.models import load_model_config_from_hf

    try:
        with _quiet_hub():
            _, architecture, saved = load_model_config_from_hf(place)
    except Exception as refusal:  # the hub, its files and the network fail in every way
        raise TraceError(f"cannot build {name}: {short(refusal)}") from refusal
    return {"architecture": architecture, "model_args": saved}


def _local_config(folder: Path) -> dict[str, Any]:
    """Read and check the config.json of a folder that timm or an export wrote. Raises TraceError if it is not valid."""
    try:
        config = json.loads(read_text(folder / "config.json"))
        others = irregular(folder)
    except (OSError, ValueError, RecursionError) as refusal:
        raise TraceError(f"cannot build local-dir:{folder}: its config.json: {reason(refusal)}") from None
    if others:  # nobody waits for a FIFO
        raise TraceError(f"cannot build local-dir:{folder}: {others[0]!r} in it is no regular file")
    inner = config.get("pretrained_cfg", config) if isinstance(config, dict) else None
    if not isinstance(inner, dict):
        raise TraceError(f"cannot build local-dir:{folder}: its config.json is no mapping with a `pretrained_cfg`")
    for key in ("input_size", "test_input_size", "mean", "std"):
        values = inner.get(key)
        kinds = int if key.endswith("size") else int | float
        if values is not None and not (
            isinstance(values, list) and len(values) in (1, 3) and all(isinstance(value, kinds) for value in values)
        ):
            raise TraceError(f"cannot build local-dir:{folder}: `{key}` in its config.json is {str(values)[:80]!r}")
    return dict(config)


def files_of(name: str, *, pretrained: bool) -> list[Path]:
    """Return the files that are read from the folder of a `local-dir:`, `transformers:` or `open_clip:` name.

    Empty for other names.
    """
    if library_of(name):
        return foreign_files(name, pretrained=pretrained)
    if not name.startswith("local-dir:"):
        return []
    folder = Path(name.partition(":")[2])
    kinds = (".safetensors", ".pth", ".pth.tar", ".bin") if pretrained else ()
    weight_files = [file for file in folder.glob("*") if file.name.endswith(kinds)] if kinds else []
    return [folder / "config.json", *sorted(weight_files)]


def device_of(name: str) -> torch.device:
    """The device of this name. Raises RunError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as refusal:  # torch's errors for devices are of many kinds
        raise RunError(f"device {name!r} cannot be used here: {short(refusal)}") from None
    return device


def module_of(name: str) -> str:
    """Return the module that a model's name imports: `package.module` of `package.module:function`, otherwise empty."""
    return "" if built_by_timm(name) or library_of(name) else name.partition(":")[0]


def built_by_timm(name: str) -> bool:
    """Return whether timm builds the model of this name."""
    return name.startswith(_TIMM) or ":" not in name


def packages(names: Iterable[str]) -> list[str]:
    """Return the packages, other than timm, that these models come from."""
    return sorted({module_of(name).partition(".")[0] for name in names} - {""})


def check_import(name: str, allow_import: Sequence[str]) -> None:
    """Raise TraceError if a name would import a module outside the allowed packages and modules.

    This is for names that come from a file. A user who types a name has allowed it.
    """
    module = module_of(name)
    allowed = [allow_import] if isinstance(allow_import, str) else allow_import
    if module and not any(module == package or module.startswith(f"{package}.") for package in allowed):
        package = module.partition(".")[0]
        raise TraceError(
            f"{name!r} would import {module!r} and run what is in it; if you trust it, add `--allow-import {package}` "
            f"to the command, or `allow_import=[{package!r}]` to the call"
        )


_TIMM = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's own prefixes


def _check_name(name: str, timm: Any) -> None:
    if name.startswith(_TIMM):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = nearest(architecture, timm.list_models())
        if tag and (not near or not tag.islower()):  # timm's names are in lower case
            module, _, function = name.rpartition(".")
            near += f"; a function or class of your own is written `{module}:{function}`"
        if Path(name).is_dir():
            near = f"; a folder that timm or `probe-kd export` wrote is called `local-dir:{name}`"
        raise TraceError(f"timm has no model {name!r}{near}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        available = f"; its weights: {', '.join(tags)}" if tags else "; it has no pretrained weights"
        raise TraceError(f"timm has no weights {tag!r} for {architecture}{nearest(tag, tags)}{available}")


def import_object(name: str, purpose: str = "build") -> Callable[..., Any]:
    """Import `package.module:name`, a function or a class. Call `check_import` before, for a name from a file.

    Raises TraceError if the module cannot be imported, or holds no such function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as refusal:  # the user's own code may fail in any way
        raise TraceError(f"cannot import {module_name!r} to {purpose} {name!r}: {short(refusal)}") from refusal
    value: Callable[..., Any] | None = getattr(module, attribute, None)
    if value is None or not (callable(value) or purpose != "build"):
        legal = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TraceError(f"{module_name} has no function {attribute!r}{nearest(attribute, legal)}")
    return value


def breaks_channels_last(model: nn.Module) -> str:
    """Return the first layer whose backward corrupts memory in channels-last format on a CPU, or an empty string.

    Seen with torch 2.14.1 (AVX2, one thread, float32): a convolution of kernel 1 and stride 2 or more over fewer than 8
    channels, not grouped, corrupts the heap (docs/performance.md). 16 leaves room for wider vectors.
    """
    for name, layer in model.named_modules():
        narrow = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels < 16
        if narrow and set(layer.kernel_size) == {1} and max(layer.stride) > 1:
            return str(name)
    return ""


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Enable timm's gradient checkpointing. Raises TraceError if the model does not support it."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as refusal:
        raise TraceError(f"{name} has no gradient checkpointing; leave `grad_checkpointing` out") from refusal


Classifier = Literal["same", "new where other", "new"]
