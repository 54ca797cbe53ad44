"""Check the arguments that build a model: names against an allow-list, and values against their types.

timm's `create_model` takes the arguments of the architecture together with those of its loader, among them addresses to
fetch weights from and folders to write them to. A recipe, a weights file or a folder from somebody else may give the
first and never the second.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from inspect import Parameter, getmodule, isclass, signature
from typing import Any, get_args

from probe_kd.errors import ProbeKDError, TraceError, nearest, nearest_truth

# What timm's models have in common. Some are in no signature, since helpers take them before the class is reached.
COMMON = frozenset(
    [
        "num_classes",
        "in_chans",
        "img_size",
        "global_pool",
        "output_stride",
        "drop_rate",
        "drop_path_rate",
        "act_layer",
        "norm_layer",
        "norm_eps",
        "bn_momentum",
        "bn_eps",
        "bn_tf",
        "features_only",
        "out_indices",
        "feature_cls",
        "use_naflex",
        "distilled",
        "pad_type",
    ]
)
PLACES = frozenset(("device", "dtype"))  # where a model lies is the run's to say
MAX_NUMBER = 10_000_000  # no model has more classes, channels or layers; a billion layers would be built until it ends


def check_arguments(name: str, architecture: str, arguments: Mapping[str, Any]) -> None:
    """Check that all arguments belong to the architecture and are plain values. Raises TraceError otherwise."""
    parameters: Mapping[str, Parameter] = {}
    if arguments.keys() - COMMON:
        parameters = architecture_parameters(architecture)
    for key, value in arguments.items():
        if key not in COMMON and key not in parameters:
            near = nearest(key, sorted({*parameters, *COMMON}))
            raise TraceError(
                f"`{key}` is no argument of the architecture of {name}{near}"
                + ("" if near else "; weights are named beside the model's name, by `pretrained` or `checkpoint`")
            )
        largest = max((abs(number) for number in _numbers(value)), default=0)
        if largest > MAX_NUMBER:
            raise TraceError(f"`{key}` of {name} is {largest}; expected no number above {MAX_NUMBER}")
    check_truths(name, parameters, arguments)


def check_truths(
    name: str,
    parameters: Mapping[str, Parameter],
    arguments: Mapping[str, Any],
    error: type[ProbeKDError] = TraceError,
) -> None:
    """Check that true-or-false arguments are booleans, and that numbers are not text. Raises `error`.

    Python takes any text for true, also `"false"`.
    """
    for key, value in arguments.items():
        if key in parameters and is_truth(parameters[key]) and value not in (True, False, None):
            raise error(f"`{key}` of {name} is {value!r}; expected true or false{nearest_truth(value)}")
        default = parameters[key].default if key in parameters else None
        if isinstance(value, str) and isinstance(default, int | float) and not isinstance(default, bool):
            raise error(f"`{key}` of {name} is the text {value!r}; expected a number, such as {default}")


def is_truth(parameter: Parameter) -> bool:
    """Whether a parameter is a boolean, by its annotation, or by its default if it has no annotation."""
    kind = parameter.annotation
    if kind is Parameter.empty:
        return isinstance(parameter.default, bool)
    if isinstance(kind, str):
        return kind.replace(" ", "") in ("bool", "Optional[bool]", "bool|None")
    return kind is bool or {*get_args(kind)} == {bool, type(None)}


def optimizer_parameters(name: str) -> Mapping[str, Parameter]:
    """Return the arguments of timm's optimizer of this name, and of the function that builds it."""
    from timm.optim import create_optimizer_v2, get_optimizer_class

    try:
        kind = get_optimizer_class(name.lower().rpartition("lookahead_")[2], bind_defaults=False)
        return {**signature(create_optimizer_v2).parameters, **signature(kind).parameters}
    except Exception:  # needs a GPU or a missing library: reported when it is built
        return {}


@lru_cache(maxsize=256)
def architecture_parameters(architecture: str) -> Mapping[str, Parameter]:
    """Return the arguments that timm passes to the class of a model and to its parts."""
    import timm
    import torch
    from timm.models import build_model_with_cfg

    with torch.device("meta"):
        model = timm.create_model(architecture)
    parameters = _class_parameters(type(model), architecture)
    loader = {*signature(timm.create_model).parameters, *signature(build_model_with_cfg).parameters}
    variadic = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    return {
        key: parameter
        for key, parameter in parameters.items()
        if key not in loader | PLACES and parameter.kind not in variadic
    }


def _class_parameters(kind: type, architecture: str) -> dict[str, Parameter]:
    """Return the parameters of a constructor, and, if it passes `**kwargs` on, of those that may receive them."""
    parameters: dict[str, Parameter] = {}
    open_ended = True
    for base in kind.__mro__:
        if not open_ended or base.__module__.startswith("torch."):
            break
        if "__init__" in vars(base):
            constructor = signature(base.__init__).parameters  # type: ignore[misc]
            parameters = {**constructor, **parameters}
            open_ended = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in constructor.values())
    parameters.pop("self", None)
    configs = [value.annotation for value in parameters.values() if is_dataclass(value.annotation)]
    for config in configs:  # whose fields are replaced one by one
        parameters |= dict(_config_parameters(config))
    if open_ended and not configs:
        parameters = {**dict(_module_parameters(kind, architecture)), **parameters}
    return parameters


def _config_parameters(config: Any, prefix: str = "") -> Iterable[tuple[str, Parameter]]:
    """Return the fields of a dataclass. Those of a nested one (`transformer_cfg` of MaxxViT) get its name as prefix."""
    for field in fields(config):
        name = prefix + field.name
        if is_dataclass(field.type) and field.name.endswith("_cfg"):
            yield from _config_parameters(field.type, name.removesuffix("cfg"))
        yield name, Parameter(name, Parameter.KEYWORD_ONLY, annotation=field.type)


def _module_parameters(kind: type, architecture: str) -> Iterable[tuple[str, Parameter]]:
    """Return the parameters of all classes in a model's file, and the keys of its table for this architecture."""
    for value in vars(getmodule(kind)).values():
        if isclass(value) and value.__module__ == kind.__module__ and "__init__" in vars(value):
            yield from list(signature(value.__init__).parameters.items())[1:]
        table = value.get(architecture) if isinstance(value, dict) else None
        for key in table if isinstance(table, dict) else ():
            yield key, Parameter(key, Parameter.KEYWORD_ONLY)


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value
