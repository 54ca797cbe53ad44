"""The vector of an image: what the classifier of a model reads, or the output of a model without one."""

from contextlib import suppress

from torch import nn

from probe_kd.engine.spec import FeatureSpec, Tap, Trace
from probe_kd.engine.weights import classifiers
from probe_kd.errors import TapError, WeightsError

_NAMES = ("classifier", "fc", "head")  # of the classifiers of models that do not say which layer theirs is


def embedding_spec(model: nn.Module, traced: Trace, *, tap: str | None = None, output: str | Tap = "") -> FeatureSpec:
    """Return the layer whose mean over positions is the vector of an image.

    That is `tap` if it is given. Otherwise it is the input of the classifier, as timm's config names it, or of the
    linear layer called `classifier`, `fc` or `head` that gives the `output`. For a model without a classifier, and for
    one whose classifier is not seen to read a tensor, it is the output itself. Raises TapError for a tap that does not
    exist.
    """
    if tap is not None:
        return traced[Tap.parse(tap)]
    output_spec = traced[output] if str(output) else traced.output
    for name in _classifiers(model) or _linear_classifier(model, traced, output_spec):
        with suppress(TapError):
            return traced[Tap(name, "input")]
    return output_spec


def _classifiers(model: nn.Module) -> list[str]:
    """The classifiers that the model names, without those that were removed (`num_classes=0`)."""
    try:
        names = classifiers(model)
    except WeightsError:
        return []
    return [name for name in names if not isinstance(model.get_submodule(name), nn.Identity)]


def _linear_classifier(model: nn.Module, traced: Trace, output: FeatureSpec) -> list[str]:
    """The linear layer that gives the output, if its name is that of a classifier and not of a projection."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_named_classifier(name) and _gives(traced, name, output)
    ]


def _is_named_classifier(name: str) -> bool:
    *parents, own = name.split(".")
    return own in _NAMES or (own.isdigit() and parents[-1:] == ["classifier"])


def _gives(traced: Trace, name: str, output: FeatureSpec) -> bool:
    with suppress(TapError):
        return traced[Tap(name)].tensor == output.tensor
    return False
