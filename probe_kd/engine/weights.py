"""The weights of models: read from a file that is not trusted, loaded, saved with a header."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from probe_kd.engine.models import Classifier
from probe_kd.errors import WeightsError, short
from probe_kd.files.atomic import put
from probe_kd.files.run_folder import changed, damaged


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
