"""The weights of models: read from a file that is not trusted, loaded, saved with a header."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
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
    """Read the tensors of a checkpoint: safetensors, or a file of `torch.save` with timm's keys or a plain state dict.

    No code in the file is run (`weights_only`). Raises WeightsError if it cannot be read, or if it lies in the folder
    of a run and differs from what the run wrote.
    """
    from timm.models import load_state_dict

    _check_unchanged(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch remarks on pickles that it then refuses
            state_dict = dict(load_state_dict(str(path), use_ema=True, device="cpu", weights_only=True))
    except Exception as refusal:  # a pickle can fail in any way
        raise WeightsError(f"cannot read the checkpoint {str(path)!r}: {_why_refused(refusal)}") from refusal
    not_tensor = next((name for name, value in state_dict.items() if not isinstance(value, Tensor)), None)
    if not_tensor is not None:
        kind = type(state_dict[not_tensor]).__name__
        raise WeightsError(
            f"the checkpoint {str(path)!r} is no state dict: {not_tensor!r} in it is a {kind}, and no tensor"
        )
    return state_dict


def _check_unchanged(path: str | Path) -> None:
    """Raise WeightsError if a file in the folder of a run differs from what the run wrote."""
    if changed(Path(path)):
        raise WeightsError(damaged(Path(path)))


def check_state(folder: Path) -> None:
    """Check that the pickles in a checkpoint of accelerate hold only data. Raises WeightsError otherwise.

    accelerate reads them with `weights_only` too, but skips random states that it cannot read.
    """
    from accelerate.utils import load

    for file in sorted([*folder.glob("*.bin"), *folder.glob("*.pkl")]):
        try:
            load(file, map_location="cpu", weights_only=True, mmap=True)  # of the tensors, only where they lie
        except Exception as refusal:  # a pickle can fail in any way
            raise WeightsError(f"cannot go on from {str(file)!r}: {_why_refused(refusal)}") from refusal


def _why_refused(error: Exception) -> str:
    """Return why a file was refused, without torch's advice on how to run its code anyway."""
    if isinstance(error, UnpicklingError):
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        return (
            "it holds more than tensors and numbers" + (f", {match[1]} say" if match else "") + ", and could run code"
        )
    return short(error)


def load_weights(model: nn.Module, path: str | Path, classifier: Classifier = "same") -> list[str]:
    """Load a complete checkpoint into a model. On the meta device, only compare names and shapes.

    `classifier="new where other"` keeps the model's initial classifier if the checkpoint has another or none, and
    `"new"` always keeps it. Returns the names of the tensors that keep their initial values.

    Raises WeightsError with the first differences. timm would instead build a teacher with another number of classes
    and a random classifier.
    """
    weights, expected = _of_tower(model, read_weights(path)), model.state_dict()
    new_names = [] if classifier == "same" else _new_classifier_names(model, weights, always=classifier == "new")
    differences = [
        f"{name!r} is {_shape(weights, name)} in the checkpoint and {_shape(expected, name)} in the model"
        for name in dict.fromkeys([*expected, *weights])
        if _shape(weights, name) != _shape(expected, name) and name not in new_names
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise WeightsError(
            f"the checkpoint {str(path)!r} does not fit {type(model).__name__}: {'; '.join(differences[:3])}{more}"
        )
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict({**weights, **{name: expected[name] for name in new_names}})
    return new_names


def _of_tower(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an image tower, if the checkpoint is of a whole model with a text tower."""
    prefix = (getattr(model, "pretrained_cfg", None) or {}).get("weights_prefix", "")
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if prefix and name.startswith(prefix)}
    return own or weights


def classifiers(model: nn.Module) -> list[str]:
    """Return the names of a model's classifiers: one, or several as in a distilled DeiT.

    Raises WeightsError if the model does not say which they are, as a model that is not timm's may not.
    """
    config_names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = [config_names] if isinstance(config_names, str) else list(config_names)
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is not None:
        heads = get_classifier()
        head_ids = {id(head) for head in (heads if isinstance(heads, tuple | list) else (heads,))}
        names += [name for name, module in model.named_modules() if name and id(module) in head_ids]
    modules = dict(model.named_modules())
    names = [name for name in dict.fromkeys(names) if name in modules]
    if not names:
        raise WeightsError(f"{type(model).__name__} does not say which of its layers is the classifier")
    return names


def backbone(model: nn.Module) -> list[str]:
    """Return the names of the layers and parameters that are not part of a classifier, the largest of each.

    Raises WeightsError if the model does not say which of its layers is the classifier.
    """
    heads = classifiers(model)

    def below(module: nn.Module, path: str) -> Iterator[str]:
        yield from (f"{path}{key}" for key, _ in module.named_parameters(recurse=False))
        for key, child in module.named_children():
            name = f"{path}{key}"
            if name in heads:
                continue
            if any(head.startswith(f"{name}.") for head in heads):
                yield from below(child, f"{name}.")
            elif child.state_dict():
                yield name

    return list(below(model, ""))


def _new_classifier_names(model: nn.Module, weights: Mapping[str, Tensor], *, always: bool) -> list[str]:
    """Return the tensors of the classifiers that differ in shape from the checkpoint; of all if `always`."""
    expected, new_names = model.state_dict(), list[str]()
    for head in classifiers(model):
        names = [name for name in expected if name.startswith(f"{head}.")]
        if always or any(_shape(weights, name) != _shape(expected, name) for name in names):
            new_names += names
    return list(dict.fromkeys(new_names))


def renew_classifier(model: nn.Module, fresh: nn.Module) -> None:
    """Replace the weights of a model's classifier by those of a freshly initialised model of the same architecture."""
    fresh_state = fresh.state_dict()
    classifier_state = {name: fresh_state[name] for name in _new_classifier_names(model, {}, always=True)}
    model.load_state_dict({**model.state_dict(), **classifier_state})


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, weights[name].shape)) or "a scalar" if name in weights else "absent"


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return contiguous copies of all tensors of a model on the CPU, as safetensors needs them.

    safetensors refuses tensors that share memory, though timm expects every name, and tensors that are not contiguous,
    such as channels-last ones.
    """
    order = {"memory_format": torch.contiguous_format}
    return {name: tensor.detach().cpu().clone(**order) for name, tensor in model.state_dict().items()}


def save_weights(model: nn.Module, path: Path, about: Mapping[str, Any]) -> None:
    """Write safetensors that `timm.create_model(..., checkpoint_path=path)` loads, with `about` in its header."""
    from safetensors.torch import save

    header = {"format": "pt", **{key: json.dumps(value) for key, value in about.items()}}
    aside = path.with_suffix(".partial")
    aside.write_bytes(
        save(own_tensors(model), header)
    )  # `save_file` of safetensors makes the file readable for its owner only
    put(aside, path)


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header that `save_weights` wrote. Raises WeightsError if the file has no such header."""
    from safetensors import safe_open

    _check_unchanged(path)
    try:
        with safe_open(str(path), "pt") as file:
            return {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
    except Exception as refusal:  # safetensors has errors of its own
        raise WeightsError(f"cannot read {str(path)!r}: {short(refusal)}") from refusal
