"""All losses by name, and what each of them reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from math import isfinite
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from probe_kd.errors import LossError, nearest, nearest_truth
from probe_kd.methods.losses.features import cwd, hint, ickd, pkd, smooth_l1, token_match
from probe_kd.methods.losses.labels import cross_entropy
from probe_kd.methods.losses.maps import attention, gram_tokens, nst, patch_similarity
from probe_kd.methods.losses.matrices import fsp, gram
from probe_kd.methods.losses.multilabel import binary_cross_entropy, multilabel_soft_targets
from probe_kd.methods.losses.outputs import dist, hard_labels, logits, soft_targets

Reads = Literal["labels", "outputs", "features", "maps", "grams", "flows"]


@dataclass(frozen=True)
class Loss:
    """A loss function and the kind of tensors that it reads.

    - `labels`: the student's logits and the target; with `multilabel`, the target is a multi-hot vector per image
    - `outputs`: the logits of both models
    - `features`: for each pair of layers, both features in one shape
    - `maps`: for each pair, both maps at one grid, each with its own channels
    - `grams`: for each pair, the matrix of each feature with itself
    - `flows`: for each pair, the matrix between the input and the output of the two modules
    """

    function: Callable[..., Tensor]
    reads: Reads
    multilabel: bool = False

    @property
    def reads_layers(self) -> bool:
        """Whether the loss compares pairs of layers."""
        return self.reads not in ("labels", "outputs")

    @property
    def reads_matrices(self) -> bool:
        """Whether the loss compares matrices, which are computed from the maps at both ends of a flow."""
        return self.reads in ("flows", "grams")

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the function's keyword-only parameters."""
        parameters = signature(self.function).parameters.items()
        return tuple(name for name, value in parameters if value.kind is Parameter.KEYWORD_ONLY)

    def check_options(self, name: str, options: Mapping[str, Any], beside: Sequence[str] = ()) -> None:
        """Raise LossError for options that the function does not have, and suggest the nearest, also from `beside`."""
        existing = f"; it has {', '.join(self.options)}" if self.options else "; it has none"
        unknown = [option for option in options if option not in self.options]
        if unknown:
            hints = [f"{option!r}{nearest(option, (*self.options, *beside))}" for option in unknown]
            raise LossError(f"loss {name!r} has no option {'; and none '.join(hints)}{existing}")

    def check_values(self, name: str, options: Mapping[str, Any]) -> None:
        """Raise LossError for a value that is not of the option's type."""
        for option, value in options.items():
            expected = self.refusal(option, value)
            if expected:
                raise LossError(f"{name!r}: {option} is {value!r}; expected {expected}")

    def refusal(self, option: str, value: Any) -> str:
        """Describe the values that the option takes, if `value` is none of them; otherwise return "".

        Only booleans, numbers and Literals are checked. (A string would silently count as a true boolean.) The function
        checks other types itself.
        """
        parameters = signature(self.function).parameters
        return _refusal(value, parameters[option].annotation) if option in parameters else ""


def _refusal(value: Any, annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        words = get_args(annotation)
        near = nearest(value, words) if isinstance(value, str) else ""
        return "" if value in words else f"{' or '.join(map(repr, words))}{near}"
    if annotation is bool:
        return "" if isinstance(value, bool) else f"true or false{nearest_truth(value)}"
    if annotation in (int, float):
        kinds = (int,) if annotation is int else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and isfinite(value)
        return "" if fits else "a whole number" if annotation is int else "a finite number"
    return ""


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross_entropy": Loss(cross_entropy, "labels"),
        "binary_cross_entropy": Loss(binary_cross_entropy, "labels", multilabel=True),
        "soft_targets": Loss(soft_targets, "outputs"),
        "hard_labels": Loss(hard_labels, "outputs"),
        "multilabel_soft_targets": Loss(multilabel_soft_targets, "outputs"),
        "logits": Loss(logits, "outputs"),
        "dist": Loss(dist, "outputs"),
        "hint": Loss(hint, "features"),
        "fsp": Loss(fsp, "flows"),
        "gram": Loss(gram, "grams"),
        "attention": Loss(attention, "maps"),
        "token_match": Loss(token_match, "features"),
        "patch_similarity": Loss(patch_similarity, "maps"),
        "smooth_l1": Loss(smooth_l1, "features"),
        "pkd": Loss(pkd, "features"),
        "cwd": Loss(cwd, "features"),
        "ickd": Loss(ickd, "features"),
        "nst": Loss(nst, "maps"),
        "gram_tokens": Loss(gram_tokens, "maps"),
    }
)
