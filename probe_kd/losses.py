"""The losses: pure functions of (student, teacher), each with its paper and equation.

One reduction for all: the *event* of one image (its classes, its channels and positions, its Gram matrix) is summed
or averaged, as `reduction` says, and the batch is averaged. There is no factor 1/2 and no other constant: where a
paper has one, it belongs to the weight. So `reduction="mean"` of a squared error is `F.mse_loss`, and `reduction="sum"`
is the paper's norm.

Every loss is computed in float32 at least (float64 stays) and outside autocast: bfloat16 captures lose the small
differences that a loss is made of, and a float16 Gram matrix overflows. The teacher is a target: no gradient flows
into it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any, Literal, ParamSpec

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probe_kd.errors import LossError, nearest

Reduction = Literal["sum", "mean"]
Flow = tuple[Float[Tensor, "batch m h1 w1"], Float[Tensor, "batch n h2 w2"]]
P = ParamSpec("P")


def _in_float32(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Promote every tensor argument, detach all but the first (the student), and leave autocast.

    The tensors are positional only: one given by keyword would pass by here, and keep its gradient and its type.
    """

    @wraps(loss)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        student, *targets = args
        arguments = [_promote(student), *(_detach(_promote(target)) for target in targets)]
        with torch.autocast(_device_of(student), enabled=False):
            return loss(*arguments, **kwargs)

    return computed


def _promote(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_promote(item) for item in value)
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value


def _detach(value: Any) -> Any:
    return tuple(_detach(item) for item in value) if isinstance(value, tuple) else value.detach()


def _device_of(value: Any) -> str:
    return _device_of(value[0]) if isinstance(value, tuple | list) else str(value.device.type)


def _reduce(event: Tensor, reduction: Reduction) -> Tensor:
    """Sum or average all axes but the first, then average the first."""
    if reduction not in ("sum", "mean"):
        raise LossError(
            f"reduction {reduction!r}: expected 'sum' or 'mean' (over one image's event; the batch is averaged)"
        )
    flat = event.flatten(1)
    return (flat.sum(1) if reduction == "sum" else flat.mean(1)).mean()


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise LossError(
            f"{what}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape; "
            "bring them together with probe_kd.adapt(student_spec, teacher_spec)"
        )


@_in_float32
def cross_entropy(
    student: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    /,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """-sum_i y_i log softmax(z)_i, summed over the classes and averaged over the batch.

    `target` is class indices, or one distribution per image as Mixup and CutMix make them. `label_smoothing` mixes in
    the uniform distribution (Szegedy et al. 2016, sec. 7).
    """
    soft = target.is_floating_point()
    if (soft and target.shape != student.shape) or (not soft and target.shape != student.shape[:1]):
        raise LossError(
            f"cross_entropy: logits {tuple(student.shape)} with a target {tuple(target.shape)}; expected "
            f"{tuple(student.shape[:1])} class indices or {tuple(student.shape)} probabilities"
        )
    return F.cross_entropy(student, target, label_smoothing=label_smoothing)


@_in_float32
def soft_targets(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(v/T) || softmax(z/T)), summed over the classes and averaged over the batch.

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), sec. 2; z are the student's logits, v the teacher's. The KL
    divergence stands for the paper's cross entropy, from which it differs by a constant, so that it is 0 at equality.
    T^2 keeps the gradient's size when T changes. There is no `reduction`: a mean over the classes, which many
    implementations take, divides the paper's loss by their number once too often.
    """
    _same_shape(student, teacher, "soft_targets")
    if temperature <= 0:
        raise LossError(f"soft_targets: temperature {temperature}; it has to be positive")
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


@_in_float32
def logits(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    center: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """||z - v||^2 of the pre-softmax logits.

    Ba and Caruana 2014 (arXiv 1312.6184), eq. 1, which has 1/2 before the sum: weight 0.5 with `reduction="sum"`.
    `center` takes the mean over the classes from both, to which a softmax is blind; then 1/(2 C) of the sum over C
    classes is the limit of `soft_targets` for a high temperature (Hinton et al. 2015, sec. 2.1).
    """
    _same_shape(student, teacher, "logits")
    if center:
        student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    return _reduce((student - teacher).square(), reduction)


@_in_float32
def hint(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    /,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """||u_h - r(v_g)||^2 between a teacher's hint and the student's guided feature after its regressor.

    FitNets, Romero et al. 2015 (arXiv 1412.6550), eq. 3, which has 1/2 before the sum: weight 0.5 with
    `reduction="sum"`. The mean is the default, since the sum grows with the size of the map.
    """
    _same_shape(student, teacher, "hint")
    return _reduce((student - teacher).square(), reduction)


@_in_float32
def fsp(student: Flow, teacher: Flow, /, *, reduction: Reduction = "sum") -> Float[Tensor, ""]:
    """||G(student) - G(teacher)||_F^2 of the Gram matrices between a block's input and its output.

    FSP, Yim et al. 2017 (CVPR), eq. 1 and 2: G = sum over positions of F1 F2^T / (h w), of m x n channels; squared, and
    summed over the matrix. Where the block downsamples, the larger map is max-pooled to the smaller, as in the paper.
    Student and teacher need the same channels, not the same spatial size.
    """
    _two_maps(student, "student")
    _two_maps(teacher, "teacher")
    ours, theirs = flow_matrix(*student), flow_matrix(*teacher)
    _same_shape(ours, theirs, "fsp")
    return _reduce((ours - theirs).square(), reduction)


def _two_maps(flow: Any, side: str) -> None:
    seen = [tuple(map_.shape) for map_ in flow] if isinstance(flow, tuple) else [tuple(flow.shape)]
    if [len(shape) for shape in seen] != [4, 4] or seen[0][0] != seen[1][0]:
        raise LossError(
            f"fsp: a flow is two maps (batch, channels, height, width) of one batch, the input and the output of a "
            f"block; the {side}'s is {', '.join(map(str, seen))}"
        )


def flow_matrix(
    first: Float[Tensor, "batch m h1 w1"], second: Float[Tensor, "batch n h2 w2"]
) -> Float[Tensor, "batch m n"]:
    """The FSP matrix of two maps (Yim et al. 2017, eq. 1)."""
    height, width = (min(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True))
    first, second = (_max_pool(map_, (height, width)).flatten(2) for map_ in (first, second))
    return first @ second.transpose(1, 2) / (height * width)


def _max_pool(map_: Tensor, size: tuple[int, int]) -> Tensor:
    return map_ if tuple(map_.shape[2:]) == size else F.adaptive_max_pool2d(map_, size)


Reads = Literal["labels", "outputs", "features", "flows"]


@dataclass(frozen=True)
class Loss:
    """A loss and what it reads.

    `labels`: the student's logits and the target; `outputs`: both models' logits; `features`: the features of a pair;
    `flows`: the (input, output) of a pair's two modules.
    """

    function: Callable[..., Tensor]
    reads: Reads

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """LossError for an option that the function does not have, with the nearest that it has."""
        legal = [
            key for key, value in signature(self.function).parameters.items() if value.kind is Parameter.KEYWORD_ONLY
        ]
        for option in options:
            if option not in legal:
                known = f"; it has {', '.join(legal)}" if legal else "; it has none"
                raise LossError(f"loss {name!r} has no option {option!r}{nearest(option, legal)}{known}")


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross_entropy": Loss(cross_entropy, "labels"),
        "soft_targets": Loss(soft_targets, "outputs"),
        "logits": Loss(logits, "outputs"),
        "hint": Loss(hint, "features"),
        "fsp": Loss(fsp, "flows"),
    }
)
