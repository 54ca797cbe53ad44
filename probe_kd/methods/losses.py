"""The losses: pure functions of (student, teacher), each with its paper and equation.

One reduction for all: the *event* of one image (its classes, its channels and positions, its Gram matrix) is summed
or averaged, as `reduction` says, and the batch is averaged. There is no factor 1/2 and no other constant: where a
paper has one, it belongs to the weight. So `reduction="mean"` of a squared error is `F.mse_loss`, and `reduction="sum"`
is the paper's norm.

Every loss is computed in float32 at least (float64 stays) and outside autocast: bfloat16 captures lose the small
differences that a loss is made of, and a float16 Gram matrix overflows. The teacher is a target: no gradient flows
into it, except where a call says `block_gradient=False`, which every loss takes: where both models train together, the
gradient block of Rocket Launching (Zhou et al. 2018, arXiv 1708.04106, sec. 3.3) is a choice.

Every loss checks types and shapes at each call, and raises LossError. What needs the values (labels out of range, a
target that is no distribution, a result that is not finite) is checked at each call on the CPU; on another device
reading a value would make every step wait for it, so there the Distiller checks its first step (`check_values`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from inspect import Parameter, signature
from math import isfinite
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, get_args, get_origin

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe_kd.errors import LossError, nearest, nearest_truth

Reduction = Literal["sum", "mean"]
P = ParamSpec("P")


def _in_float32(function: Callable[P, Tensor], *, promote: bool = True) -> Callable[P, Tensor]:
    """Promote every tensor argument to float32 at least, and leave autocast. Without `promote`, only leave it.

    The tensors are positional only: one given by keyword would pass by here, and keep its type and its gradient.
    """

    @wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device: str = args[0].device.type  # type: ignore[attr-defined]
        # Where there is none to leave, the context is left out: entering one takes longer than a small kernel.
        outside = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with outside:
            return function(*(map(_promote, args) if promote else args), **kwargs)

    return computed


def _promote(value: Any) -> Any:
    if value.dtype == torch.float32 or not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check_reduction(reduction: Reduction) -> None:
    if reduction not in ("sum", "mean"):
        raise LossError(
            f"reduction {reduction!r}: expected 'sum' or 'mean' (over one image's event; the batch is averaged)"
        )


def _squared_error(student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
    """The squared differences of one image's event, summed or averaged; then the mean over the batch.

    torch's own kernel, since a difference, a square and two means written out hold five tensors of a feature's size at
    once on the way back, where it holds one, and take twice its time.
    """
    _check_reduction(reduction)
    if {student.dtype.itemsize, teacher.dtype.itemsize} in ({2}, {2, 4}):
        total: Tensor = _SquaresOfHalf.apply(student, teacher)
        return total / (student.numel() if reduction == "mean" else len(student))
    if reduction == "mean":  # events of one batch are of one size, so the mean of their means is that of all
        return F.mse_loss(student, teacher).clone()  # the number that torch gives still holds the squares' memory
    return F.mse_loss(student, teacher, reduction="sum") / len(student)


class _SquaresOfHalf(torch.autograd.Function):
    """The sum of squared differences, taken in float32, of two tensors of which one at least is in half precision.

    For the way back it keeps the two as they are, which is half of what promoting them first would keep.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        return student.to(torch.float32, copy=True).sub_(teacher).square_().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        student, teacher = ctx.saved_tensors
        difference = student.to(torch.float32, copy=True).sub_(teacher).mul_(2 * gradient)
        teachers = difference.neg().to(teacher.dtype) if ctx.needs_input_grad[1] else None
        return difference.to(student.dtype), teachers


def _loss(function: Callable[P, Tensor], *, promote: bool = True) -> Callable[P, Tensor]:
    """A loss in float32 that detaches all but its first argument, the student, unless `block_gradient` is False.

    Without `promote` it gets its tensors as they are, and computes in float32 by itself.
    """
    computed = _in_float32(function, promote=promote)

    @wraps(function)
    def blocked(student: Tensor, *targets: Tensor, block_gradient: bool = True, **options: Any) -> Tensor:
        _check_tensors(function.__name__, student, targets)
        given = [target.detach() for target in targets] if block_gradient else targets
        value = computed(student, *given, **options)  # type: ignore[arg-type]
        if _has_values(value):
            check_finite(function.__name__, value, student, *targets)
        return value

    return blocked  # type: ignore[return-value]


def _check_tensors(loss: str, *given: Tensor | Sequence[Tensor]) -> None:
    student, others = given
    for side, tensor in (("student", student), *(("target", other) for other in others)):
        if not isinstance(tensor, Tensor):
            raise LossError(f"{loss}: the {side} is a {type(tensor).__name__}; expected a torch.Tensor")
    assert isinstance(student, Tensor)
    if not student.is_floating_point():
        raise LossError(f"{loss}: the student's side {tuple(student.shape)} is {student.dtype}; expected real numbers")
    for other in others:
        if other.device != student.device:
            raise LossError(f"{loss}: the student is on {student.device} and the target on {other.device}")


def _has_values(tensor: Tensor) -> bool:
    """Whether the values can be read without waiting for a device, or for the compiler, which has none."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_finite(loss: str, value: Tensor, student: Tensor, *targets: Tensor) -> None:
    """LossError for a value that is not finite, unless the student's numbers are not: then its training diverged.

    A student that masks the classes that its teacher masks has not diverged: where the loss has no value for them, that
    is an error too. Reads the value, for which a GPU has to be waited for.
    """
    if value.isfinite() or not (student.isfinite().all() or (value.isnan() and _masked_alike(student, *targets))):
        return
    for target in targets:
        if not target.isfinite().all():
            number = target[~target.isfinite()][0].item()
            raise LossError(
                f"{loss} is {value.item()}: the teacher's side {tuple(target.shape)} holds {number}. Masked classes "
                "(-inf), whether or not the student masks them too, are for `soft_targets` without `standardize` and "
                "for `dist`; for others leave them out by a `class_map`"
            )
    largest = max(float(side.abs().max()) for side in (student, *targets))
    raise LossError(
        f"{loss} is {value.item()}: with numbers up to {largest:.0e} it is larger than {value.dtype} holds; "
        "standardise what it compares (`normalize: layer`), or try a smaller learning rate"
    )


def _masked_alike(student: Tensor, *targets: Tensor) -> bool:
    """Whether all that is not finite of the student is -inf, and some of it is so in a target too."""
    masked = student == -torch.inf
    alike = any(it.shape == student.shape and bool((masked & (it == -torch.inf)).any()) for it in targets)
    return alike and bool((masked | student.isfinite()).all())


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if not teacher.is_floating_point():
        raise LossError(f"{what}: the teacher's side {tuple(teacher.shape)} is {teacher.dtype}; expected real numbers")
    if student.shape != teacher.shape:
        raise LossError(
            f"{what}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape; "
            "bring them together with probe_kd.adapt(student_spec, teacher_spec)"
        )
    if student.ndim == 0 or student.numel() == 0:
        raise LossError(f"{what}: student {tuple(student.shape)} and teacher hold nothing to compare in a batch")


def _check_logits(loss: str, student: Tensor) -> None:
    """The classes are axis 1 of two; of maps and tokens a softmax over axis 1 would be a number, and another loss."""
    if student.ndim == 2 and student.numel() > 0:
        return
    flat = {3: "tokens: `logits.flatten(0, 1)`", 4: "maps: `logits.permute(0, 2, 3, 1).flatten(0, 2)`"}
    how = f"; make one row of each position first, for {flat[student.ndim]}" if student.ndim in flat else ""
    raise LossError(f"{loss}: logits {tuple(student.shape)}; expected (batch, classes), one row an image{how}")


def _check_outputs(loss: str, student: Tensor, teacher: Tensor) -> None:
    _same_shape(student, teacher, loss)
    _check_logits(loss, student)


def _power_of_two(numbers: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    """The power of two above each of these positive numbers, 1 for zero: a division by it rounds nothing."""
    numbers = numbers.detach().masked_fill(numbers == 0, 0.5)
    return numbers / torch.frexp(numbers).mantissa


def _in_float64(temperature: float, *logits: Tensor) -> tuple[Tensor, ...]:
    """The logits in float64 where the temperature is so high that T^2 makes the rounding of float32 the loss.

    At T = 1e4 the probabilities differ by 1e-4 of themselves, and T^2 = 1e8 times the rounding of float32 is 10. Below
    20 it is less than 1e-4. (Apple's GPUs have no float64.)
    """
    return tuple(it.double() if temperature > 20 and it.device.type != "mps" else it for it in logits)


@_loss
def cross_entropy(
    student: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    /,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """-sum_i y_i log softmax(z)_i, summed over the classes and averaged over the batch.

    `target` is class indices, or one distribution per image as Mixup and CutMix make them. `label_smoothing` mixes in
    the uniform distribution (Szegedy et al. 2016, sec. 7). Raises LossError for a target that is neither: several
    labels an image, say, which are no distribution.
    """
    _check_logits("cross_entropy", student)
    _check_target(student.shape, target)
    if not 0 <= label_smoothing <= 1:
        raise LossError(f"cross_entropy: label_smoothing {label_smoothing}; expected a share between 0 and 1")
    if _has_values(target):
        check_values(student.shape[1], target)
    if not target.is_floating_point():
        target = target.long()
    return F.cross_entropy(student, target, label_smoothing=label_smoothing)


def _check_target(logits: Sequence[int], target: Tensor) -> None:
    """LossError for a target whose shape or type is neither that of class indices nor of distributions."""
    kind = "probabilities" if target.is_floating_point() else "class indices"
    expected = tuple(logits) if target.is_floating_point() else tuple(logits[:1])
    if target.dtype == torch.bool or target.is_complex() or tuple(target.shape) != expected:
        raise LossError(
            f"cross_entropy: logits {tuple(logits)} with a target {tuple(target.shape)} of {target.dtype}; expected "
            f"{tuple(logits[:1])} class indices (whole numbers) or {tuple(logits)} probabilities"
            + (f", and {kind} are {expected}" if target.dtype != torch.bool else "")
        )


def check_labels(logits: Tensor, target: Tensor) -> None:
    """All that `cross_entropy` asks of a target, the values too. LossError where it is another."""
    _check_tensors("cross_entropy", logits, [target])
    _check_logits("cross_entropy", logits)
    _check_target(logits.shape, target)
    check_values(logits.shape[1], target)


def check_values(classes: int, target: Tensor) -> None:
    """LossError for class indices out of range, and for rows that are no distribution over the classes.

    Reads the values, for which a GPU has to be waited for.
    """
    if not target.is_floating_point():
        wrong = target[(target < 0) | (target >= classes)]
        if len(wrong):
            raise LossError(f"cross_entropy: label {wrong[0].item()} of {classes} classes; expected 0 to {classes - 1}")
        return
    sums = target.sum(1, dtype=torch.promote_types(target.dtype, torch.float32))
    loose = 1e-3 if target.dtype in (torch.float32, torch.float64) else 2e-2
    rows = ((target < 0).any(1) | ~((sums - 1).abs() <= loose)).nonzero()
    if len(rows):
        row = int(rows[0])
        raise LossError(
            f"cross_entropy: row {row} of the target sums to {sums[row].item():.4g}, least "
            f"{target[row].min().item():.4g}; expected a distribution, which is not "
            "negative and sums to 1. Several labels an image are "
            "none: `target / target.sum(1, keepdim=True)` is one"
        )


@_loss
def soft_targets(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(v/T) || softmax(z/T)), summed over the classes and averaged over the batch.

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), sec. 2; z are the student's logits, v the teacher's. The KL
    divergence stands for the paper's cross entropy, from which it differs by a constant, so that it is 0 at equality.
    T^2 keeps the gradient's size when T changes. There is no `reduction`: a mean over the classes, which many
    implementations take, divides the paper's loss by their number once too often.

    `standardize` takes the z-score of each image's logits first, so that a student need not reach the teacher's scale
    (Sun et al. 2024, arXiv 2403.01427, with a temperature of about 2 and a weight of about 9). Equal logits, as of a
    classifier that starts at zero, have z-scores of 0. A class that the teacher masks by -inf counts for nothing.
    """
    _check_outputs("soft_targets", student, teacher)
    _check_temperature("soft_targets", temperature)
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    dtype = student.dtype
    student, teacher = _in_float64(temperature, student, teacher)
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    # A class that the teacher masks (-inf) adds 0 log 0 = 0, whatever the student says of it.
    log_p = log_p.masked_fill(log_q == -torch.inf, 0.0)
    log_q = log_q.clamp_min(torch.finfo(log_q.dtype).min)
    return (temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)).to(dtype)


@_loss
def logits(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    center: bool = False,
    standardize: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """||z - v||^2 of the pre-softmax logits.

    Ba and Caruana 2014 (arXiv 1312.6184), eq. 1, which has 1/2 before the sum: weight 0.5 with `reduction="sum"`.
    `center` takes the mean over the classes from both, to which a softmax is blind; then 1/(2 C) of the sum over C
    classes is the limit of `soft_targets` for a high temperature (Hinton et al. 2015, sec. 2.1; Kim et al. 2021, arXiv
    2105.08919). `standardize` also divides by the standard deviation over the classes (Sun et al. 2024).
    """
    _check_outputs("logits", student, teacher)
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    elif center:
        student, teacher = _centre(student), _centre(teacher)
    return _squared_error(student, teacher, reduction)


@partial(_loss, promote=False)
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
    return _squared_error(student, teacher, reduction)


def _check_temperature(loss: str, temperature: float) -> None:
    if not isinstance(temperature, int | float) or not 0 < temperature < torch.inf:
        raise LossError(f"{loss}: temperature {temperature}; it has to be positive, and finite")


class _Damped(torch.autograd.Function):
    """The same numbers, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


def _damped(rows: Float[Tensor, "rows n"], share: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows n"]:
    """Rows whose gradient is multiplied by `share` where that is less than 1, and not 0.

    A loss that divides a row by its deviation has a gradient that grows without end as the row becomes flat, which is
    how a classifier that starts at (or near) zero begins. Then the first steps are all that an optimizer with a memory,
    as AdamW, ever sees. The value is the formula's; the gradient keeps its direction, and grows no further.
    """
    if not rows.requires_grad:
        return rows
    damped: Tensor = _Damped.apply(rows, torch.where(share > 0, share.clamp_max(1), 1.0))
    return damped


_FLAT = 0.5  # the deviation of an image's logits below which the gradient of their z-scores is damped


def _standardize(logits: Float[Tensor, "batch classes"], eps: float = 1e-7) -> Float[Tensor, "batch classes"]:
    """The z-scores of each row; zeros for equal logits, which have none, with the gradient of logits / _FLAT."""
    freedom = min(1, logits.shape[1] - 1)
    with torch.no_grad():
        deviation = logits.std(1, correction=freedom, keepdim=True)
        equal = deviation <= _rounding(logits).clamp_min(16 * torch.finfo(logits.dtype).tiny ** 0.5)
    logits = _damped(logits, deviation.masked_fill(equal, 0.0) / _FLAT)
    deviation, mean = torch.std_mean(logits, 1, correction=freedom, keepdim=True)
    # eps is a share of a deviation that is small itself.
    divisor = (deviation + eps * (100 * deviation).clamp_max(1)).masked_fill(equal, _FLAT)
    return _without_value(logits - mean, equal) / divisor


def _rounding(rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows 1"]:
    """What numbers of this size differ by where they are equal."""
    return 4 * torch.finfo(rows.dtype).eps * rows.abs().amax(1, keepdim=True)


def _centre(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    centred = logits - logits.mean(1, keepdim=True)
    return _without_value(centred, centred.detach().abs().amax(1, keepdim=True) <= _rounding(logits.detach()))


def _without_value(centred: Float[Tensor, "rows n"], equal: Tensor) -> Float[Tensor, "rows n"]:
    """Rows of equal numbers are zero after their mean is taken out, and not its rounding; their gradient stays."""
    return torch.where(equal, centred - centred.detach(), centred)


@_loss
def dist(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Float[Tensor, ""]:
    """T^2 times inter (1 - r over an image's classes) + intra (1 - r over a class's images); r is Pearson's.

    DIST, Huang et al. 2022 (arXiv 2205.10536), eq. 6 to 10, on probabilities at temperature T; `inter` and `intra` are
    its beta and gamma. A strong teacher's order of the classes is asked for, and not its numbers. The second part
    compares the images of a batch with each other, so it needs two at least. Equal probabilities, as of a classifier
    that starts at zero, go with nothing: their r is 0.
    """
    _check_outputs("dist", student, teacher)
    _check_temperature("dist", temperature)
    if intra and len(student) < 2:
        raise LossError(
            "dist: `intra` compares the images of a batch with each other, and this one has a single image; give "
            "larger batches, or `intra: 0`"
        )
    dtype = student.dtype
    student, teacher = _in_float64(temperature, student, teacher)
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    value = inter * (1 - _pearson(p, q, temperature)).mean()
    if intra:
        value = value + intra * (1 - _pearson(p.T, q.T, temperature)).mean()
    return (temperature**2 * value).to(dtype)


def _pearson(
    a: Float[Tensor, "rows n"], b: Float[Tensor, "rows n"], temperature: float, eps: float = 1e-8
) -> Float[Tensor, " rows"]:
    return F.cosine_similarity(_centred(a, temperature, eps), _centred(b, temperature, eps), dim=1, eps=eps)


def _centred(rows: Float[Tensor, "rows n"], temperature: float, eps: float) -> Float[Tensor, "rows n"]:
    """The rows without their mean, each scaled to about 1, which no correlation notices, but `eps` would.

    The gradient of flat rows is damped, those of a deviation below 1.5 of their mean at T = 1 (less where there are so
    few numbers that it cannot be reached). Equal numbers are zeros, with the gradient of numbers / their length.
    """
    with torch.no_grad():
        centred = rows - rows.mean(1, keepdim=True)
        largest = centred.abs().amax(1, keepdim=True)
        equal = largest <= _rounding(rows)
        variation = rows.std(1, correction=0, keepdim=True) / rows.mean(1, keepdim=True)
        flat = min(1.5, (rows.shape[1] - 1) ** 0.5 / 2) / temperature
        scale = torch.where(equal, rows.norm(dim=1, keepdim=True) / eps, _power_of_two(largest))
    rows = _damped(rows, variation.masked_fill(equal, 0.0) / max(flat, eps))
    centred = rows - rows.mean(1, keepdim=True)
    return _without_value(centred, equal) / scale.masked_fill(scale == 0, 1.0)


@_loss
def fsp(
    student: Float[Tensor, "batch m n"],
    teacher: Float[Tensor, "batch m n"],
    /,
    *,
    relative: bool = False,
    reduction: Reduction = "sum",
) -> Float[Tensor, ""]:
    """||G(student) - G(teacher)||_F^2 of two FSP matrices, as `flow_matrix` makes them.

    FSP, Yim et al. 2017 (CVPR), eq. 2. `relative` divides by the variance of the teacher's matrices over the batch,
    sum over the matrix of Var(G_ij): then 1 is the loss of a student that knows the mean matrix and nothing else, and
    1 minus the loss is the share of the variance that is explained. The paper's form grows with the fourth power of the
    activations, and the matrix after a ReLU is for the most part constant. `relative` needs two images at least;
    teacher's matrices that do not vary at all are their own measure.
    """
    return _matrices("fsp", student, teacher, relative, reduction)


@_loss
def gram(
    student: Float[Tensor, "batch channels channels"],
    teacher: Float[Tensor, "batch channels channels"],
    /,
    *,
    relative: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """||G(student) - G(teacher)||_F^2 of the Gram matrices of a map with itself.

    The style loss of Gatys et al. 2016 (CVPR), eq. 4, between two networks: theirs has 1/4 before the mean. `relative`
    is that of `fsp`.
    """
    return _matrices("gram", student, teacher, relative, reduction)


def _matrices(loss: str, student: Tensor, teacher: Tensor, relative: bool, reduction: Reduction) -> Tensor:
    _same_shape(student, teacher, loss)
    if student.ndim != 3:
        raise LossError(f"{loss}: matrices {tuple(student.shape)}; expected (batch, m, n), as `flow_matrix` makes them")
    if not relative:
        return _squared_error(student, teacher, reduction)
    _check_reduction(reduction)  # a share of the variance is the same in either
    if relative is not True:
        raise LossError(f"{loss}: relative {relative!r}: expected true or false")
    if len(teacher) < 2:
        raise LossError(f"{loss}: `relative` divides by the variance over a batch, and this one has a single image")
    variance, square = teacher.var(0).sum(), teacher.square().sum() / len(teacher)
    rounding = (4 * torch.finfo(teacher.dtype).eps) ** 2 * square
    divisor = torch.where(variance > rounding, variance, torch.where(square > 0, square, 1.0))
    return _squared_error(student, teacher, "sum") / divisor


@_in_float32
def flow_matrix(
    first: Float[Tensor, "batch m h1 w1"], second: Float[Tensor, "batch n h2 w2"], /
) -> Float[Tensor, "batch m n"]:
    """G = sum over positions of F1 F2^T / (h w): the FSP matrix of two maps (Yim et al. 2017, eq. 1).

    Where the grids differ, as in a block that downsamples, the larger is max-pooled to the smaller, as in the paper.
    """
    if not first.ndim == second.ndim == 4 or len(first) != len(second) or not first.numel() * second.numel():
        raise LossError(
            "flow_matrix: expected two maps (batch, channels, height, width) of one batch, the input and the output of "
            f"a block, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    first, second = (positions(map_) for map_ in to_one_grid(first, second))
    return (first.transpose(1, 2) @ second).div_(first.shape[1])  # in place: no second matrix


def to_one_grid(*maps: Float[Tensor, "batch _ _ _"]) -> list[Tensor]:
    """Each map max-pooled to the least height and width among them."""
    size = tuple(min(map_.shape[axis] for map_ in maps) for axis in (2, 3))
    return [map_ if tuple(map_.shape[2:]) == size else F.adaptive_max_pool2d(map_, size) for map_ in maps]


def positions(map_: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch positions channels"]:
    """The map as rows of channels, which is a view of it.

    Where channels come last in memory they do so in the gradient: a product of matrices would give the other order, and
    each layer on the way back then pays for the conversion.
    """
    rows = map_.permute(0, 2, 3, 1).flatten(1, 2)
    if not rows.is_contiguous():
        return rows
    # To one matrix and back: two views, but a gradient in another order has to be copied to be viewed so.
    return rows.flatten(0, 1).view(rows.shape)


@_loss
def attention(
    student: Float[Tensor, "batch c1 height width"],
    teacher: Float[Tensor, "batch c2 height width"],
    /,
    *,
    form: Literal["paper", "code"] = "paper",
) -> Float[Tensor, ""]:
    """The distance of two attention maps Q = sum over channels of A^2, each divided by its norm.

    Zagoruyko and Komodakis 2017 (arXiv 1612.03928), eq. 2. `paper`: ||Q_S - Q_T||_2, the norm itself, whose weight is
    beta/2. `code`: the authors' published code, the mean over positions of the squared difference, whose weight is beta
    (1000 with its defaults). The two networks' channels need not agree, their grids must.
    """
    same = student.ndim == teacher.ndim == 4 and student.shape[::2] == teacher.shape[::2]
    if not same or student.shape[3] != teacher.shape[3] or not student.numel() * teacher.numel():
        raise LossError(
            f"attention: expected two maps (batch, channels, height, width) of one batch and grid, got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    ours, theirs = (_unit(map_.square().mean(1).flatten(1)) for map_ in (student, teacher))
    if form == "code":
        return (ours - theirs).square().mean()
    if form != "paper":
        raise LossError(f"attention: form {form!r}; expected 'paper' or 'code'")
    distance: Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    return distance.mean()


def _unit(rows: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """Rows of length 1, of numbers whose own squares would be too large or too small; zeros stay."""
    return F.normalize(rows / _power_of_two(rows.abs().amax(1, keepdim=True)), dim=1)


Reads = Literal["labels", "outputs", "features", "maps", "grams", "flows"]


@dataclass(frozen=True)
class Loss:
    """A loss and what it reads.

    `labels`: logits and the target; `outputs`: both models' logits. Of every pair of layers, `features`: both features
    in one shape; `maps`: both at one grid, each with its own channels; `grams`: the matrix of each feature with itself;
    `flows`: the matrix between the input and the output of the two modules.
    """

    function: Callable[..., Tensor]
    reads: Reads

    @property
    def reads_layers(self) -> bool:
        """Whether it compares pairs of layers."""
        return self.reads not in ("labels", "outputs")

    @property
    def reads_matrices(self) -> bool:
        """Whether it compares matrices, which are made of the maps at both ends of a flow."""
        return self.reads in ("flows", "grams")

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        parameters = signature(self.function).parameters.items()
        return tuple(name for name, value in parameters if value.kind is Parameter.KEYWORD_ONLY)

    def check_options(self, name: str, options: Mapping[str, Any], beside: Sequence[str] = ()) -> None:
        """LossError for options that the function does not have, with the nearest that it has, or that stand beside."""
        known = f"; it has {', '.join(self.options)}" if self.options else "; it has none"
        wrong = [option for option in options if option not in self.options]
        if wrong:
            hints = [f"{option!r}{nearest(option, (*self.options, *beside))}" for option in wrong]
            raise LossError(f"loss {name!r} has no option {'; and none '.join(hints)}{known}")

    def check_values(self, name: str, options: Mapping[str, Any]) -> None:
        """LossError for a value that is not of the option's type."""
        for option, value in options.items():
            expected = self.refusal(option, value)
            if expected:
                raise LossError(f"{name!r}: {option} is {value!r}; expected {expected}")

    def refusal(self, option: str, value: Any) -> str:
        """What is expected instead of the value: a truth, a number, one of a few words; empty where it will do.

        Other types are the function's own matter. A word where a truth is expected would do as a truth, and silently.
        """
        known = signature(self.function).parameters
        return _refusal(value, known[option].annotation) if option in known else ""


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
        "soft_targets": Loss(soft_targets, "outputs"),
        "logits": Loss(logits, "outputs"),
        "dist": Loss(dist, "outputs"),
        "hint": Loss(hint, "features"),
        "fsp": Loss(fsp, "flows"),
        "gram": Loss(gram, "grams"),
        "attention": Loss(attention, "maps"),
    }
)
