"""All losses by name, and what each of them reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from sys import float_info
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import nn

from probe_kd.errors import LossError, nearest, nearest_truth
from probe_kd.methods.losses.features import cwd, hint, ickd, pkd, smooth_l1, token_match
from probe_kd.methods.losses.labelled_outputs import OFAExits, dkd, nkd, ofa
from probe_kd.methods.losses.labels import cross_entropy
from probe_kd.methods.losses.learned import MGD, RSD, SRRL, VID
from probe_kd.methods.losses.maps import attention, gram_tokens, nst, patch_similarity
from probe_kd.methods.losses.matrices import fsp, gram
from probe_kd.methods.losses.memories import CRD, PatchSimilarityQueue
from probe_kd.methods.losses.multilabel import binary_cross_entropy, multilabel_soft_targets
from probe_kd.methods.losses.outputs import dist, hard_labels, logits, soft_targets
from probe_kd.methods.losses.relations import cc, pkt, rkd, sp
from probe_kd.methods.losses.review import ReviewKD

Reads = Literal["labels", "outputs", "features", "vectors", "maps", "grams", "flows", "all_pairs"]
Also = Literal["labels", "index"]


@dataclass(frozen=True)
class Loss:
    """A loss and the kind of tensors that it reads: `function(student, teacher, *, options)` returns one number.

    - `labels`: the student's logits and the target; with `multilabel`, the target is a multi-hot vector per image
    - `outputs`: the logits of both models
    - `features`: for each pair of layers, both features in one shape
    - `vectors`: for each pair, one vector per image of each model, each of its own width
    - `maps`: for each pair, both maps at one grid, each with its own channels
    - `grams`: for each pair, the matrix of each feature with itself
    - `flows`: for each pair, the matrix between the input and the output of the two modules
    - `all_pairs`: the features of all pairs at once, as two tuples of maps (or of vectors, where there are no
      positions), each of its own grid and width

    `also` names further arguments, which follow the teacher's in this order: `labels` are the target of the step, and
    `index` is the number of each image among the training images, and -1 for one that is held out, in evaluation.

    A loss with parameters or state is a class that inherits from `nn.Module`, or a function that returns a module and
    says so by `builds_module`. It is called with the FeatureSpecs of what the loss will see of both models (for
    `all_pairs`, with two tuples of them) and with the options, once for each comparison. The Distiller owns the module:
    an optimizer and a checkpoint see it, an export does not. A keyword `classifier` without a default is the teacher's
    classifier, a copy that does not train, and `num_images` the number of training images.

    A loss of features is taken to bring their values together, and their explained variance and cosine are measured.
    With `predicts=False` (a loss of correlations, or with layers of its own behind the adapter) they are not.

    The options are the keyword-only parameters. The tensors of a call are float32 at least, outside autocast, and those
    of the teacher are detached unless both models train together.

    Raises LossError for a value of `reads` or `also` that does not exist.
    """

    function: Callable[..., Any]
    reads: Reads
    multilabel: bool = False
    also: tuple[Also, ...] = ()
    builds_module: bool = False
    predicts: bool = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise LossError(f"a loss is a {type(self.function).__name__}; expected a function or a class of modules")
        if self.reads not in get_args(Reads):
            legal = ", ".join(get_args(Reads))
            near = nearest(str(self.reads), get_args(Reads))
            raise LossError(f"a loss reads {self.reads!r}{near}; expected one of {legal}")
        for position, name in enumerate(self.also):
            if name not in get_args(Also) or self.reads == name:
                raise LossError(f"a loss of {self.reads} cannot also read {name!r}; expected `labels` or `index`")
            if name in self.also[:position]:
                raise LossError(f"a loss reads {name!r} twice; name it once")
        if isinstance(self.function, nn.Module) and any(
            parameter.requires_grad for parameter in self.function.parameters()
        ):
            raise LossError(
                f"the loss {self.name!r} is a module that was built already, so its parameters would not train; give "
                "its class, or a function that builds it and has `builds_module = True`"
            )
        if isinstance(self.function, type):
            if not issubclass(self.function, nn.Module):
                raise LossError(f"the class {self.function.__name__} of a loss does not inherit from nn.Module")
            object.__setattr__(self, "builds_module", True)
        if self.builds_module and self.reads == "labels":
            raise LossError(
                f"the loss {self.name!r} of labels builds a module, for which there are no specs of two models; give a "
                "function of (logits, target)"
            )

    @property
    def name(self) -> str:
        return _name(self.function)

    @property
    def reads_layers(self) -> bool:
        """Whether the loss compares pairs of layers."""
        return self.reads not in ("labels", "outputs")

    @property
    def predicts_features(self) -> bool:
        """Whether the loss brings the values of two adapted features together."""
        return self.reads == "features" and self.predicts

    @property
    def reads_matrices(self) -> bool:
        """Whether the loss compares matrices, which are computed from the maps at both ends of a flow."""
        return self.reads in ("flows", "grams")

    @property
    def reads_several(self) -> bool:
        """Whether one comparison takes a tuple of features of each model."""
        return self.reads_matrices or self.reads == "all_pairs"

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the keyword-only parameters, without those that the Distiller fills in."""
        return tuple(name for name in self._keywords if name not in self.needs)

    @property
    def required(self) -> tuple[str, ...]:
        """The options without a default."""
        return tuple(name for name in self.options if self._keywords[name].default is Parameter.empty)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the Distiller fills in when it builds the module."""
        return tuple(name for name in ("classifier", "num_images") if self.builds_module and name in self._keywords)

    @property
    def _keywords(self) -> Mapping[str, Parameter]:
        parameters = _parameters(self.function).items()
        return {name: value for name, value in parameters if value.kind is Parameter.KEYWORD_ONLY}

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the loss is called with."""
        sides = ("logits", "target") if self.reads == "labels" else ("student", "teacher")
        return (*sides, *self.also)

    def check_call(self, name: str, function: Callable[..., Any] | None = None) -> None:
        """Raise LossError if the loss, or the `function` that it built, cannot be called with its `arguments`."""
        builds = self.builds_module and function is None
        arguments = ("student", "teacher") if builds else self.arguments
        try:
            keywords = self._keywords if function is None else ()
            _signature(function or self.function).bind(*arguments, **dict.fromkeys(keywords))
        except TypeError as error:
            means = ", specs of the student and of the teacher," if builds else ""
            raise LossError(
                f"the loss {name!r} is called with ({', '.join(arguments)}){means} and cannot be: {error}; its options "
                "come after a `*`"
            ) from None
        except ValueError:  # some functions that are written in C have no signature
            return

    def check_options(self, name: str, options: Mapping[str, Any], beside: Sequence[str] = ()) -> None:
        """Raise LossError for options that the function does not have, and suggest the nearest, also from `beside`."""
        existing = f"; it has {', '.join(self.options)}" if self.options else "; it has none"
        parameters = _parameters(self.function)
        existing += "".join(
            f" (an option comes after a `*`, and the parameter `{option}` does not)"
            for option in options
            if option in parameters and parameters[option].kind is Parameter.POSITIONAL_OR_KEYWORD
        )
        unknown = [option for option in options if option not in self.options]
        if unknown:
            hints = [f"{option!r}{nearest(option, (*self.options, *beside))}" for option in unknown]
            raise LossError(f"loss {name!r} has no option {'; and none '.join(hints)}{existing}")
        for option in self.required:
            if option not in options:
                raise LossError(f"loss {name!r} needs a value of its option `{option}`, which has no default")

    def check_values(self, name: str, options: Mapping[str, Any]) -> None:
        """Raise LossError for a value that is not of the option's type."""
        for option, value in options.items():
            expected = self.refusal(option, value)
            if expected:
                raise LossError(f"{name!r}: {option} is {value!r}; expected {expected}")

    def refusal(self, option: str, value: Any) -> str:
        """Describe the values that the option takes, if `value` is none of them; otherwise return "".

        Only booleans, numbers, text, None, Literals and unions of these are checked. (A string would silently count as
        a true boolean.) The function checks other types itself.
        """
        parameters = _parameters(self.function)
        return _refusal(value, parameters[option].annotation) if option in parameters else ""


def _parameters(function: Callable[..., Any]) -> Mapping[str, Parameter]:
    try:
        return _signature(function).parameters
    except ValueError:  # some functions that are written in C have no signature
        return {}


def _signature(function: Callable[..., Any]) -> Signature:
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        return signature(called, eval_str=True)
    except Exception:  # annotations that exist for type checkers alone, which may raise anything when evaluated
        return signature(called)


def as_loss(value: Any, reads: Any = None) -> Loss:
    """Convert a custom loss: a Loss, or a function or class whose `reads` is given, or is its attribute.

    `reads` is one of the kinds of `Loss`, or a list that begins with one and goes on with what the loss `also` reads,
    as in `[outputs, labels]`. The attributes `multilabel`, `builds_module` and `predicts` of the function are
    those of `Loss`.

    Raises LossError if nothing says what the loss reads, or if that does not exist.
    """
    if isinstance(value, Loss):
        if reads is not None and _kinds(reads) != (value.reads, *value.also):
            raise LossError(f"reads {reads!r}, and the Loss says {[value.reads, *value.also]}; leave `reads` out")
        return value
    reads = getattr(value, "reads", None) if reads is None else reads
    if reads is None:
        legal = ", ".join(get_args(Reads))
        raise LossError(f"nothing says what the loss {_name(value)!r} reads; give `reads`, one of {legal}")
    kind, *also = _kinds(reads)
    defaults = {"multilabel": False, "builds_module": False, "predicts": True}
    flags = {name: bool(getattr(value, name, default)) for name, default in defaults.items()}
    return Loss(value, kind, also=tuple(also), **flags)  # type: ignore[arg-type]


def _kinds(reads: Any) -> tuple[str, ...]:
    if isinstance(reads, list | tuple) and reads:
        return tuple(reads)
    return (reads,)


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def _refusal(value: Any, annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        refusals = [_refusal(value, member) for member in get_args(annotation)]
        return " or ".join(refusals) if all(refusals) else ""
    if annotation in (None, NoneType):
        return "" if value is None else "null"
    if annotation is str:
        return "" if isinstance(value, str) else "text"
    if get_origin(annotation) is Literal:
        words = get_args(annotation)
        near = nearest(value, words) if isinstance(value, str) else ""
        return "" if value in words else f"{' or '.join(map(repr, words))}{near}"
    if annotation is bool:
        return "" if isinstance(value, bool) else f"true or false{nearest_truth(value)}"
    if annotation in (int, float):
        kinds = (int,) if annotation is int else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= float_info.max
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
        "dkd": Loss(dkd, "outputs", also=("labels",)),
        "nkd": Loss(nkd, "outputs", also=("labels",)),
        "ofa": Loss(ofa, "outputs", also=("labels",)),
        "ofa_exits": Loss(OFAExits, "vectors", also=("labels",)),
        "hint": Loss(hint, "features"),
        "fsp": Loss(fsp, "flows"),
        "gram": Loss(gram, "grams"),
        "attention": Loss(attention, "maps"),
        "token_match": Loss(token_match, "features"),
        "patch_similarity": Loss(patch_similarity, "maps"),
        "patch_similarity_queue": Loss(PatchSimilarityQueue, "features", predicts=False),
        "vid": Loss(VID, "features"),
        "mgd": Loss(MGD, "features", predicts=False),
        "srrl": Loss(SRRL, "features", predicts=False),
        "rsd": Loss(RSD, "vectors"),
        "crd": Loss(CRD, "vectors", also=("index",)),
        "review": Loss(ReviewKD, "all_pairs"),
        "smooth_l1": Loss(smooth_l1, "features"),
        "pkd": Loss(pkd, "features", predicts=False),
        "cwd": Loss(cwd, "features", predicts=False),
        "ickd": Loss(ickd, "features", predicts=False),
        "nst": Loss(nst, "maps"),
        "gram_tokens": Loss(gram_tokens, "maps"),
        "rkd": Loss(rkd, "vectors"),
        "sp": Loss(sp, "vectors"),
        "pkt": Loss(pkt, "vectors"),
        "cc": Loss(cc, "vectors"),
    }
)
