"""Models by name, and their weights on disk."""

import importlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probe_kd.engine.arguments import check_arguments, check_truths
from probe_kd.errors import TraceError, WeightsError, nearest
from probe_kd.files.atomic import put, read_text, reason
from probe_kd.files.run_folder import changed, damaged

MAX_CALLS = 100_000  # of torch while a model of timm is built; its largest takes 11 thousand


def build_on_meta(name: str, model_kwargs: Mapping[str, Any]) -> nn.Module:
    """The named model with neither weights nor memory."""
    with torch.device("meta"):
        return build_model(name, model_kwargs)


def build_model(name: str, model_kwargs: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """The named model: `timm.create_model`, or the function that `package.module:function` names.

    Raises TraceError for a name nobody knows, with the nearest ones, for arguments that the model refuses, and for
    those that are not of its architecture: what timm's loader takes could fetch anything into any folder.
    """
    import timm  # 3.5 s: only where a model is built

    check_kwargs(name, model_kwargs)
    if module_of(name):
        factory, arguments = _import_factory(name), dict(model_kwargs)
    else:
        factory, arguments = timm.create_model, {"model_name": name, "pretrained": pretrained, **model_kwargs}
    try:
        with nullcontext() if module_of(name) else _Bounded(), _quiet_hub():
            model = factory(**arguments)
    except Exception as refusal:
        given = ", ".join(f"{key}={value!r}" for key, value in model_kwargs.items())
        near = _nearest_argument(name, factory, refusal)
        raise TraceError(f"cannot build {name}({given}): {short(refusal)}{near}") from refusal
    if not isinstance(model, nn.Module):
        raise TraceError(f"{name} returned a {type(model).__name__}; expected an nn.Module")
    return model


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without what huggingface_hub logs of a hub that it does not reach, which the error that it raises says too."""
    logger = logging.getLogger("huggingface_hub")
    former = logger.level
    if not logging.getLogger().isEnabledFor(logging.INFO):  # --verbose
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(former)


def check_kwargs(name: str, model_kwargs: Mapping[str, Any]) -> None:
    """Whether the named model takes these arguments from anybody. Raises TraceError for the first that it does not."""
    import timm

    if module_of(name):
        with suppress(ValueError, TypeError):  # a function that does not tell its arguments
            check_truths(name, signature(_import_factory(name)).parameters, model_kwargs)
    else:
        _check_name(name, timm)
        architecture, saved = _saved_arguments(name)
        check_arguments(name, architecture, {**saved, **model_kwargs})


def _nearest_argument(name: str, factory: Callable[..., Any], refusal: Exception) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(refusal))
    if unknown is None:
        return ""
    return nearest(unknown[1], signature(factory).parameters)


class _Bounded(TorchFunctionMode):
    """Ends what would be built for hours: a model of a million layers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise TraceError(f"the model has more parts than any other (it takes over {MAX_CALLS} calls of torch)")
        return func(*args, **(kwargs or {}))


def _saved_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """The architecture that a name stands for, and the arguments that the config of a folder or of the hub adds.

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
    """The architecture and arguments that a model is built by without the folder that `local-dir:` names.

    Other names are as good elsewhere, and are left as they are.
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
    found = {**arguments, **saved, **model_kwargs}
    same = _shapes(build_on_meta(architecture, found)) == _shapes(model)
    return (architecture, found) if same else (name, dict(model_kwargs))


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
    """What timm reads of a folder's config.json, if it can be what an export wrote. Raises TraceError."""
    try:
        config = json.loads(read_text(folder / "config.json"))
        irregular = [file.name for file in folder.iterdir() if not (file.is_file() or file.is_dir())]
    except (OSError, ValueError, RecursionError) as refusal:
        raise TraceError(f"cannot build local-dir:{folder}: its config.json: {reason(refusal)}") from None
    if irregular:  # nobody waits for a FIFO
        raise TraceError(f"cannot build local-dir:{folder}: {irregular[0]!r} in it is no regular file")
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
    """The files in the folder that `local-dir:` names which timm reads; of other names there are none."""
    if not name.startswith("local-dir:"):
        return []
    folder = Path(name.partition(":")[2])
    kinds = (".safetensors", ".pth", ".pth.tar", ".bin") if pretrained else ()
    found = [file for file in folder.glob("*") if file.name.endswith(kinds)] if kinds else []
    return [folder / "config.json", *sorted(found)]


def module_of(name: str) -> str:
    """The module that a model's name would import, `package.module` of `package.module:function`; else empty."""
    return "" if name.startswith(_TIMM) or ":" not in name else name.partition(":")[0]


def packages(names: Iterable[str]) -> list[str]:
    """The packages that models of these names come from, other than timm."""
    return sorted({module_of(name).partition(".")[0] for name in names} - {""})


def check_import(name: str, allow_import: Sequence[str]) -> None:
    """Raises TraceError for a name whose module lies in none of the packages, or modules, that may be imported.

    For names that come out of a file: whoever types one himself has allowed it.
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
        known = f"; its weights: {', '.join(tags)}" if tags else "; it has no pretrained weights"
        raise TraceError(f"timm has no weights {tag!r} for {architecture}{nearest(tag, tags)}{known}")


def _import_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as refusal:  # the user's own code may fail in any way
        raise TraceError(f"cannot import {module_name!r} to build {name!r}: {short(refusal)}") from refusal
    factory: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(factory):
        legal = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TraceError(f"{module_name} has no function {attribute!r}{nearest(attribute, legal)}")
    return factory


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or what `torch.save` wrote, of timm or of a bare state dict.

    Nothing in it is run (`weights_only`). Raises WeightsError when it cannot be read, and where it lies in the folder
    of a run and is not what the run wrote.
    """
    from timm.models import load_state_dict

    _check_unchanged(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch remarks on pickles that it then refuses
            found = dict(load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True))
    except Exception as refusal:  # a pickle can fail in any way
        raise WeightsError(f"cannot read the checkpoint {str(path)!r}: {_refused(refusal)}") from refusal
    wrong = next((name for name, value in found.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        kind = type(found[wrong]).__name__
        raise WeightsError(f"the checkpoint {str(path)!r} is no state dict: {wrong!r} in it is a {kind}, and no tensor")
    return found


def _check_unchanged(path: str | Path) -> None:
    """Raises WeightsError where a file in the folder of a run is not what the run wrote."""
    if changed(Path(path)):
        raise WeightsError(damaged(Path(path)))


def check_state(folder: Path) -> None:
    """Whether all that accelerate has pickled into a checkpoint is data. Raises WeightsError otherwise.

    accelerate reads it with `weights_only` too, but passes over random numbers that it cannot read.
    """
    from accelerate.utils import load

    for file in sorted([*folder.glob("*.bin"), *folder.glob("*.pkl")]):
        try:
            load(file, map_location="cpu", weights_only=True, mmap=True)  # of the tensors, only where they lie
        except Exception as refusal:  # a pickle can fail in any way
            raise WeightsError(f"cannot go on from {str(file)!r}: {_refused(refusal)}") from refusal


def _refused(error: Exception) -> str:
    """torch goes on to say how to run what is in the file all the same."""
    if isinstance(error, UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        return (
            "it holds more than tensors and numbers" + (f", {found[1]} say" if found else "") + ", and could run code"
        )
    return short(error)


def breaks_channels_last(model: nn.Module) -> str:
    """The first layer whose backward writes past its memory where channels come last on a CPU; empty without one.

    Seen with torch 2.14.1 (AVX2, one thread, float32): a convolution of kernel 1 and stride 2 or more over fewer than 8
    channels, not grouped, corrupts the heap (docs/performance.md). 16 leaves room for wider vectors.
    """
    for name, layer in model.named_modules():
        narrow = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels < 16
        if narrow and set(layer.kernel_size) == {1} and max(layer.stride) > 1:
            return str(name)
    return ""


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Turn timm's gradient checkpointing on. Raises TraceError for a model that has none."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as refusal:
        raise TraceError(f"{name} has no gradient checkpointing; leave `grad_checkpointing` out") from refusal


Classifier = Literal["same", "new where other", "new"]


def load_weights(model: nn.Module, path: str | Path, classifier: Classifier = "same") -> list[str]:
    """Load a checkpoint, all of it and nothing else; on the meta device this only compares.

    The classifier may be that of other classes: `new where other` leaves it as the model began with it where the
    checkpoint has another or none, `new` always. Returns the names of what was left so.

    Raises WeightsError with the first differences: timm would build a teacher of another number of classes and leave
    its classifier random.
    """
    weights, expected = read_weights(path), model.state_dict()
    left = [] if classifier == "same" else _left_new(model, weights, always=classifier == "new")
    differences = [
        f"{name!r} is {_shape(weights, name)} in the checkpoint and {_shape(expected, name)} in the model"
        for name in dict.fromkeys([*expected, *weights])
        if _shape(weights, name) != _shape(expected, name) and name not in left
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise WeightsError(
            f"the checkpoint {str(path)!r} does not fit {type(model).__name__}: {'; '.join(differences[:3])}{more}"
        )
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict({**weights, **{name: expected[name] for name in left}})
    return left


def classifiers(model: nn.Module) -> list[str]:
    """The modules that a model classifies by, by name: one, or several as in a distilled DeiT.

    Raises WeightsError where nothing says which they are, as it is for a model that is not timm's.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    found = [named] if isinstance(named, str) else list(named)
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is not None:
        heads = get_classifier()
        held = {id(head) for head in (heads if isinstance(heads, tuple | list) else (heads,))}
        found += [name for name, module in model.named_modules() if name and id(module) in held]
    modules = dict(model.named_modules())
    found = [name for name in dict.fromkeys(found) if name in modules]
    if not found:
        raise WeightsError(f"{type(model).__name__} does not say which of its layers is the classifier")
    return found


def _left_new(model: nn.Module, weights: Mapping[str, Tensor], *, always: bool) -> list[str]:
    """The tensors of those classifiers that a checkpoint has otherwise than the model, or of all of them."""
    expected, left = model.state_dict(), list[str]()
    for head in classifiers(model):
        names = [name for name in expected if name.startswith(f"{head}.")]
        if always or any(_shape(weights, name) != _shape(expected, name) for name in names):
            left += names
    return list(dict.fromkeys(left))


def renew_classifier(model: nn.Module, fresh: nn.Module) -> None:
    """Give a model the classifier of another of its kind, which begins anew."""
    drawn = fresh.state_dict()
    new = {name: drawn[name] for name in _left_new(model, {}, always=True)}
    model.load_state_dict({**model.state_dict(), **new})


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, weights[name].shape)) or "a scalar" if name in weights else "absent"


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that a model holds, on the CPU, as safetensors takes them.

    It refuses memory that two names share, though timm asks for every name, and any order in memory but the usual one,
    so also channels last.
    """
    order = {"memory_format": torch.contiguous_format}
    return {name: tensor.detach().cpu().clone(**order) for name, tensor in model.state_dict().items()}


def save_weights(model: nn.Module, path: Path, about: Mapping[str, Any]) -> None:
    """Write safetensors that `timm.create_model(..., checkpoint_path=path)` loads, with `about` in its header."""
    from safetensors.torch import save

    header = {"format": "pt", **{key: json.dumps(value) for key, value in about.items()}}
    aside = path.with_suffix(".partial")
    aside.write_bytes(save(own_tensors(model), header))  # its own `save_file` lets nobody else read the file
    put(aside, path)


def read_header(path: str | Path) -> dict[str, Any]:
    """What `save_weights` wrote about the model. Raises WeightsError where the file is none of that kind."""
    from safetensors import safe_open

    _check_unchanged(path)
    try:
        with safe_open(str(path), "pt") as file:
            return {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
    except Exception as refusal:  # safetensors has errors of its own
        raise WeightsError(f"cannot read {str(path)!r}: {short(refusal)}") from refusal


def short(error: BaseException) -> str:
    """What an error of somebody else's says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
