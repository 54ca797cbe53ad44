"""Shared by all losses: float32, the gradient block, reductions, sums in parts, and checks of types and shapes."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from probe_kd.errors import LossError, ProbeKDError
from probe_kd.methods.precision import widened

Reduction = Literal["sum", "mean"]
P = ParamSpec("P")


Compared = Tensor | tuple[Tensor, ...]  # one side of a comparison, or that side of all pairs


def outside_autocast(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run a function of tensors outside autocast."""

    @wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Tensor:  # P.args, made in a compiled step, would fail its guards
        device: str = flat(args[0])[0].device.type
        if not torch.is_autocast_enabled(device):  # entering a context takes longer than a small kernel
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return computed


def flat(side: Any) -> tuple[Tensor, ...]:
    """One side of a comparison as a tuple, whether it is one tensor or those of all pairs."""
    return side if isinstance(side, tuple) else (side,)


def promoted(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least; one of whole numbers as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


@torch.library.custom_op("probe_kd::copied", mutates_args=())
def _copied(values: Tensor) -> Tensor:
    return values.clone()


@_copied.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def before_written(values: Tensor) -> Tensor:
    """What was read from a buffer that the same step writes to later; it has no gradient.

    The backward of a compiled step may read it once more, although the buffer holds other values by then (torch 2.14).
    No compiler knows how to compute this copy again.
    """
    return _copied(values.detach()) if torch.compiler.is_compiling() else values


def is_number(value: Any) -> TypeGuard[float]:
    """Whether an option is a finite number; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # In a compiled step a schedule is a symbol, which would break the graph here. Its ends were checked.
    return torch.compiler.is_compiling() or isfinite(value)


def check_reduction(reduction: Reduction) -> None:
    if reduction not in ("sum", "mean"):
        raise LossError(
            f"reduction {reduction!r}: expected 'sum' or 'mean' (over one image's event; the batch is averaged)"
        )


def squared_error(student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
    """Sum or average the squared differences over each image's event, and average over the batch.

    This uses torch's own kernel, which holds one tensor of a feature's size in the backward. A difference, a square
    and two means hold five, and take twice the time.
    """
    check_reduction(reduction)
    if student.itemsize + teacher.itemsize in (4, 6):  # both in half precision, or one beside float32
        total: Tensor = _SquaresOfHalf.apply(student, teacher)
        return total / (student.numel() if reduction == "mean" else len(student))
    if reduction == "sum":
        return F.mse_loss(student, teacher, reduction="sum") / len(student)
    # Events of one batch are of one size, so the mean of their means is that of all. `F.mse_loss` calls this after a
    # broadcast, which takes a tenth of the time of some logits.
    value: Tensor = torch._C._nn.mse_loss(student, teacher, 1)  # type: ignore[arg-type]  # the stub is that of `F`
    if not has_values(value):
        return value.clone()  # the number that torch gives still holds the squares' memory
    value.untyped_storage().resize_(value.itemsize)  # as `clone`, without a node of its own in the backward
    return value


class _SquaresOfHalf(torch.autograd.Function):
    """The sum of squared differences, in float32, of two tensors of which at least one is in half precision.

    It saves both tensors for the backward as they are, which takes half the memory of promoting them first.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        squares = torch.empty_like(student, dtype=torch.float32)
        for part, own, other in in_cache(squares, student, teacher):
            part.copy_(own).sub_(other).square_()
        return squares.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        student, teacher = ctx.saved_tensors
        student_gradient = _differences(student, teacher, 2 * gradient, student.dtype)
        if not ctx.needs_input_grad[1]:
            return student_gradient, None
        return student_gradient, _differences(student, teacher, -2 * gradient, teacher.dtype)


def _differences(student: Tensor, teacher: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """(student - teacher) times a factor, computed in float32."""
    differences = torch.empty_like(student, dtype=dtype)
    for part, own, other in in_cache(differences, student, teacher):
        part.copy_(own.to(torch.float32, copy=True).sub_(other).mul_(factor))
    return differences


def in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some images at a time of each tensor, as many as the cache of a CPU holds; elsewhere all at once."""
    images, numbers = len(tensors[0]), tensors[0].numel()
    some = tensors[0].device.type == "cpu" and not torch.compiler.is_compiling()
    size = max(1, IN_CACHE * images // numbers) if some else images
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


IN_CACHE = 2**17  # numbers


def loss_function(function: Callable[P, Tensor], *, promote: bool = True) -> Callable[P, Tensor]:
    """Decorate a loss: compute it in float32, and detach all tensors but the first, the student's.

    The decorated loss also takes `block_gradient`; False does not detach. A function with `promote=False` gets its
    tensors as they are, and has to compute in float32 itself. A loss of all pairs takes a tuple of tensors for each
    side.
    """
    blocked = wraps(function)(_guarded(function, function.__name__, promote))
    blocked.loss_function = blocked  # type: ignore[attr-defined]  # `wraps` copies it to a function around this one
    return blocked


def call_loss(
    function: Callable[..., Any],
    name: str,
    student: Compared,
    *targets: Compared,
    options: Mapping[str, Any] | None = None,
    block_gradient: bool = True,
) -> Tensor:
    """Call a custom loss, a function or a module, as `loss_function` calls one of ours.

    Raises LossError if it raises, changes a tensor that it is given, or returns anything but one real number.
    """
    options = options or {}
    if getattr(function, "loss_function", None) is function:
        return _scalar(name, function(student, *targets, block_gradient=block_gradient, **options))

    def explained(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return _scalar(name, function(*args, **kwargs))
        versions = _versions(args)
        try:
            value = function(*args, **kwargs)
        except (ProbeKDError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of code that is not ours, of any type
            given = ", ".join(str(tuple(tensor.shape)) for side in args for tensor in flat(side))
            raise LossError(f"the loss {name!r} of {given} raised {described(error)}") from error
        _check_unchanged(name, args, versions)
        return _scalar(name, value)

    return _guarded(explained, name)(student, *targets, block_gradient=block_gradient, **options)


def _guarded(function: Callable[..., Any], name: str, promote: bool = True) -> Callable[..., Tensor]:
    """The function of checked tensors, in float32 and outside autocast, with a value that is checked too.

    The loss of some logits takes 200 microseconds, of which ten Python calls are a twentieth. So the usual case, single
    tensors on a CPU, goes through one loop and no calls.
    """

    def guarded(student: Any, *targets: Any, block_gradient: bool = True, **options: Any) -> Tensor:
        device, sides = "cpu", [student, *targets]
        for position, side in enumerate(sides):
            if type(side) not in _PLAIN or not side.is_cpu:
                check_tensors(name, student, targets)
                device = flat(student)[0].device.type
                sides = [_read(one, number > 0 and block_gradient, promote) for number, one in enumerate(sides)]
                break
            if side.dtype is not torch.float32:
                if not position and not side.is_floating_point():
                    check_tensors(name, student, targets)
                if promote:
                    side = sides[position] = promoted(side)
            if position and block_gradient and side.requires_grad:
                sides[position] = side.detach()
        if torch.is_autocast_enabled(device):  # entering a context takes longer than a small kernel
            with torch.autocast(device, enabled=False):
                value: Tensor = function(*sides, **options)
        else:
            value = function(*sides, **options)
        if has_values(value) and not isfinite(value.item()):  # on the host: a tensor's own takes several kernels
            check_finite(name, value, student, *targets)
        return value

    return guarded


def _read(side: Any, detached: bool, promote: bool) -> Any:
    """One side as a loss reads it: without its graph, and in float32."""
    if isinstance(side, tuple):
        return tuple(_read(tensor, detached, promote) for tensor in side)
    side = side.detach() if detached else side
    return promoted(side) if promote else side


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise LossError(f"the loss {name!r} returned a {type(value).__name__}; expected one number, as a torch.Tensor")
    if value.ndim or not value.is_floating_point():
        raise LossError(
            f"the loss {name!r} returned a tensor {tuple(value.shape)} of {value.dtype}; expected one real number: the "
            "mean over the batch, as `.mean()` gives"
        )
    return value


def _versions(sides: Sequence[Any]) -> list[int]:
    """How often each tensor was changed in place. A tensor made in inference mode does not count."""
    return [0 if tensor.is_inference() else tensor._version for side in sides for tensor in flat(side)]


def _check_unchanged(name: str, sides: Sequence[Any], versions: Sequence[int]) -> None:
    """Raise LossError if a loss has changed a tensor, which the other losses read too."""
    if _versions(sides) != versions:
        raise LossError(
            f"the loss {name!r} changes a tensor that it is given, which other losses read too; take a function that "
            "returns a new one (`mul` for `mul_`), or change a `.clone()`"
        )


def described(error: Exception) -> str:
    """The error, and the line of the caller's code that caused it."""
    all_frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in all_frames if "site-packages" not in frame.filename]  # torch only noticed it
    frames = own_frames or all_frames
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def check_tensors(loss: str, student: Compared, targets: Sequence[Compared]) -> None:
    for tensor in flat(student):
        if not isinstance(tensor, Tensor):
            raise LossError(f"{loss}: the student is a {type(tensor).__name__}; expected a torch.Tensor")
        if not tensor.is_floating_point():
            raise LossError(
                f"{loss}: the student's side {tuple(tensor.shape)} is {tensor.dtype}; expected real numbers"
            )
    device = tensor.device
    for target in targets:
        for tensor in flat(target):
            if not isinstance(tensor, Tensor):
                raise LossError(f"{loss}: the target is a {type(tensor).__name__}; expected a torch.Tensor")
            if tensor.device != device:
                raise LossError(f"{loss}: the student is on {device} and the target on {tensor.device}")


def has_values(tensor: Tensor) -> bool:
    """Whether the values can be read without waiting for a device, and outside of compilation, which has none."""
    return type(tensor) in _PLAIN and tensor.is_cpu and not torch.compiler.is_compiling()


_PLAIN = (Tensor, nn.Parameter)  # no fake tensor, as of a dry run


def check_finite(loss: str, value: Tensor, student: Compared, *targets: Compared) -> None:
    """Raise LossError for a loss that is not finite, unless the student's values are not: then its training diverged.

    A student that masks the same classes as its teacher has not diverged. If the loss is not defined for masked
    classes, LossError is raised too. On a GPU, this waits for the values.
    """
    if isfinite(value.item()):  # on the host: a tensor's own takes several kernels
        return
    of_student, of_targets = flat(student), [tensor for target in targets for tensor in flat(target)]
    diverged = not all(bool(tensor.isfinite().all()) for tensor in of_student)
    if diverged and not (value.isnan() and all(_masked_alike(tensor, *of_targets) for tensor in of_student)):
        return
    for target in of_targets:
        if not target.isfinite().all():
            number = target[~target.isfinite()][0].item()
            raise LossError(
                f"{loss} is {value.item()}: the teacher's side {tuple(target.shape)} holds {number}. Masked classes "
                "(-inf), whether or not the student masks them too, are for `soft_targets` without `standardize` and "
                "for `dist`; for others leave them out by a `class_map`"
            )
    largest = max(float(side.detach().abs().max()) for side in (*of_student, *of_targets))
    raise LossError(
        f"{loss} is {value.item()}: with numbers up to {largest:.0e} it is larger than {value.dtype} holds; "
        "standardise what it compares (`normalize: layer`), or try a smaller learning rate"
    )


def _masked_alike(student: Tensor, *targets: Tensor) -> bool:
    """Whether all of the student's values that are not finite are -inf, and some of them are -inf in a target too."""
    masked = student == -torch.inf
    alike = any(target.shape == student.shape and bool((masked & (target == -torch.inf)).any()) for target in targets)
    return alike and bool((masked | student.isfinite()).all())


def check_same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if not teacher.is_floating_point():
        raise LossError(f"{what}: the teacher's side {tuple(teacher.shape)} is {teacher.dtype}; expected real numbers")
    if student.shape != teacher.shape:
        raise LossError(
            f"{what}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape; "
            "bring them together with probe_kd.adapt(student_spec, teacher_spec)"
        )
    if student.ndim == 0 or student.numel() == 0:
        raise LossError(f"{what}: student {tuple(student.shape)} and teacher hold nothing to compare in a batch")


def check_rows(loss: str, student: Tensor) -> None:
    """Raise LossError unless the logits are (batch, classes): of maps and tokens, axis 1 may not be the classes."""
    if student.ndim == 2 and student.numel() > 0:
        return
    conversions = {3: "tokens: `logits.flatten(0, 1)`", 4: "maps: `logits.permute(0, 2, 3, 1).flatten(0, 2)`"}
    advice = (
        f"; make one row of each position first, for {conversions[student.ndim]}" if student.ndim in conversions else ""
    )
    raise LossError(f"{loss}: logits {tuple(student.shape)}; expected (batch, classes), one row an image{advice}")


def of_positions(
    student: Float[Tensor, "batch classes height width"],
) -> Float[Tensor, "positions classes"]:
    """Return the logits of every position of every image as a row."""
    return student.permute(0, 2, 3, 1).flatten(0, 2)


def dense_outputs(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps of logits as rows. Raises LossError for anything but two maps of one shape."""
    check_same_shape(student, teacher, loss)
    if student.ndim != 4:
        raise LossError(
            f"{loss}: logits {tuple(student.shape)}; `dense` expects (batch, classes, height, width), and is left out "
            "for one row an image"
        )
    return of_positions(student), of_positions(teacher)


def check_outputs(loss: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape == teacher.shape and student.ndim == 2 and student.numel() and teacher.is_floating_point():
        return  # in one call
    check_same_shape(student, teacher, loss)
    check_rows(loss, student)


def in_float64(temperature: float, *logits: Tensor) -> tuple[Tensor, ...]:
    """Convert the logits to float64 if T^2 is so large that rounding in float32 would dominate the loss.

    At T = 1e4 the probabilities differ by 1e-4 of themselves, and T^2 = 1e8 times the rounding of float32 is 10. Below
    20 it is less than 1e-4.
    """
    return tuple(map(widened, logits)) if temperature > 20 else logits


def softmax_divergence(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch. What the teacher masks adds 0."""
    if torch.compiler.is_compiling():  # which fuses the operations by itself
        return _divergence_of(student, teacher, temperature)
    value: Tensor = _SoftmaxDivergence.apply(student, teacher, temperature)
    return value


def _divergence_of(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return divergence(*(F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher)))


class _SoftmaxDivergence(torch.autograd.Function):
    """`softmax_divergence`, with two exponentials instead of five, and p - q as all that the backward needs."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        # The largest logits are 0, so that no large numbers cancel, and their probabilities are at least 1 / classes.
        own, other = (logits.sub(logits.amax(1, keepdim=True)).div_(temperature) for logits in (student, teacher))
        p, q = own.softmax(1), other.softmax(1)
        scales = q.amax(1).div_(p.amax(1)).log_().sum()
        if has_values(other) and other.amin() > -torch.inf:
            total = other.sub_(own).mul_(q).sum()
        else:
            masked = other == -torch.inf
            total = other.sub_(own).masked_fill_(masked, 0.0).mul_(q).sum()
        ctx.save_for_backward(student, teacher, p.sub_(q))
        ctx.temperature = temperature
        return (total + scales) / len(student)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, difference = ctx.saved_tensors
        if not ctx.needs_input_grad[1] and not torch.is_grad_enabled():
            return difference * (gradients[0] / (len(student) * ctx.temperature)), None, None
        with torch.enable_grad():  # of the teacher too, or to be differentiated once more
            value = _divergence_of(student, teacher, ctx.temperature)
        return *gradients_at(value, (student, teacher), ctx.needs_input_grad[:2], gradients[0]), None


def divergence(log_p: Float[Tensor, "batch classes"], log_q: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    """KL(q || p), averaged over the batch. A class with q = 0 (-inf) adds 0 log 0 = 0, whatever p is."""
    if has_values(log_q) and log_q.detach().amin() > -torch.inf:  # no class is masked
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    log_p = log_p.masked_fill(log_q == -torch.inf, 0.0)
    return F.kl_div(log_p, log_q.clamp_min(torch.finfo(log_q.dtype).min), reduction="batchmean", log_target=True)


def check_temperature(loss: str, temperature: float) -> None:
    if not is_number(temperature) or temperature <= 0:
        raise LossError(f"{loss}: temperature {temperature}; it has to be positive, and finite")


def power_of_two(numbers: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    """The power of two above each positive number, and 1 for zero. Dividing by it causes no rounding error."""
    numbers = numbers.detach().masked_fill(numbers == 0, 0.5)
    return numbers / torch.frexp(numbers).mantissa


def unit(rows: Float[Tensor, "rows n ..."]) -> Float[Tensor, "rows n ..."]:
    """Scale rows along axis 1 to length 1, without overflow or underflow of their squares. Rows of zeros stay zero.

    The gradient of zeros is that of the numbers themselves.
    """
    scaled = rows / power_of_two(rows.abs().amax(1, keepdim=True))
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    result: Tensor = scaled / length.masked_fill(length == 0, 1.0)
    return result


def unit_features(features: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """As `unit`, along `dim`, for whole features: the backward keeps nothing but the result."""
    scaled: Tensor = _Unit.apply(features, dim, None)
    return scaled


def unit_deviation(features: Float[Tensor, "..."], dim: Sequence[int]) -> Float[Tensor, "..."]:
    """Subtract the mean over `dim` and scale to length 1. Equal numbers become zeros, within rounding.

    The backward keeps nothing but the result. The gradient of equal numbers is that of the numbers over their length.
    """
    mean = features.mean(tuple(dim), keepdim=True)
    lengths = mean.detach().abs() * (features.numel() // mean.numel()) ** 0.5
    scaled: Tensor = _Unit.apply(features - mean, tuple(dim), lengths)
    return scaled


def check_first_derivative(name: str) -> None:
    """Raise LossError in a backward that is to be differentiated, where a constant is saved that is none."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise LossError(f"the gradient of {name} cannot be differentiated; leave out `create_graph`")


class _Unit(torch.autograd.Function):
    """Scale to length 1 along some axes. What is no longer than the rounding error of `of` is divided by that.

    What is shorter than 1e-30 counts as zeros, so that no gradient overflows.
    """

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, dim: int | tuple[int, ...], of: Tensor | None) -> Tensor:
        scale = power_of_two(numbers.abs().amax(dim, keepdim=True))
        scaled = numbers / scale
        length = scaled.square().sum(dim, keepdim=True).sqrt_().mul_(scale)
        least = torch.zeros_like(length) if of is None else of
        is_rounding = length <= (4 * torch.finfo(numbers.dtype).eps * least).clamp_min(1e-30)
        length = torch.where(is_rounding, least.masked_fill(least <= 1e-30, 1.0), length)
        scaled *= scale / length
        ctx.save_for_backward(scaled, length)
        ctx.dim = dim
        return scaled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        check_first_derivative("a loss of unit vectors")
        scaled, length = ctx.saved_tensors
        along = (gradients[0] * scaled).sum(ctx.dim, keepdim=True)
        return (gradients[0] - scaled * along) / length, None, None


SMALL = 2**20  # numbers that a matrix may hold, however small the features are


def in_parts(
    part: Callable[..., Tensor], split: Sequence[Tensor], whole: Sequence[Tensor], *, numbers: int, largest: int
) -> Tensor:
    """Add up `part(*rows, *whole)` over some rows of `split` at a time, of `numbers` each and `largest` together.

    The gradient of a part is computed with its value, so that no part is computed twice or stays in memory.
    """
    size = max(1, largest // numbers)
    if size >= len(split[0]):
        return part(*split, *whole)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _recomputed(part, size, split, whole)
    total: Tensor = _Parts.apply(part, size, len(split), *split, *whole)
    return total


def _recomputed(part: Callable[..., Tensor], size: int, split: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
    """The sum over all parts, each of which is computed once more in the backward."""
    parts = zip(*(torch.split(tensor, size) for tensor in split), strict=True)
    options: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(part, *rows, *whole, **options) for rows in parts]).sum()


class _Parts(torch.autograd.Function):
    """The sum of a function over parts, of which the gradients are known before the backward."""

    @staticmethod
    def forward(ctx: Any, part: Callable[..., Tensor], size: int, split: int, *tensors: Tensor) -> Tensor:
        needed = [place for place, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
        gradients = {place: torch.zeros_like(tensors[place]) for place in needed}
        values = []
        for start in range(0, len(tensors[0]), size):
            rows = [slice(start, start + size) if place < split else ... for place in range(len(tensors))]
            some = [tensor.detach()[which] for tensor, which in zip(tensors, rows, strict=True)]
            leaves = [some[place].requires_grad_() for place in needed]
            with torch.set_grad_enabled(bool(needed)):
                value = part(*some)
            values.append(value.detach())
            of_part = torch.autograd.grad(value, leaves) if needed else ()
            for place, gradient in zip(needed, of_part, strict=True):
                gradients[place][rows[place]] += gradient
        ctx.save_for_backward(*tensors, *(gradients.get(place) for place in range(len(tensors))))
        ctx.arguments = part, size, split
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        part, size, split = ctx.arguments
        count = len(ctx.saved_tensors) // 2
        tensors, known = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():  # to be differentiated once more
            total = _recomputed(part, size, tensors[:split], tensors[split:])
            return None, None, None, *gradients_at(total, tensors, ctx.needs_input_grad[3:], gradients[0])
        return None, None, None, *(None if whole is None else gradients[0] * whole for whole in known)


def gradients_at(
    value: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """The gradients of a value at the needed tensors, with a graph of their own if they are to be differentiated."""
    inputs = [tensor for tensor, needs in zip(tensors, needed, strict=True) if needs]
    given = iter(torch.autograd.grad(value, inputs, gradient, create_graph=torch.is_grad_enabled()))
    return [next(given) if needs else None for needs in needed]


def check_batch_norm(loss: str, student: Float[Tensor, "batch channels ..."]) -> None:
    """Raise LossError for features that a batch normalisation would make a figure of that means nothing.

    Those are a single number for each channel, which has no variance, and on the CPU numbers whose squares overflow.
    """
    if student.numel() <= student.shape[1]:
        raise LossError(
            f"{loss}: it standardises each channel over the batch, and {tuple(student.shape)} is one position of one "
            "image; give larger batches"
        )
    largest = max(map(abs, map(Tensor.item, student.detach().aminmax()))) if has_values(student) else 0.0
    if torch.finfo(student.dtype).max ** 0.5 / student.shape[1] < largest < torch.inf:
        raise LossError(
            f"{loss}: the student's side {tuple(student.shape)} has numbers up to {largest:.0e}, whose squares are "
            f"larger than {student.dtype} holds; try a smaller learning rate"
        )


def drawn(
    draw: Callable[..., Tensor], shape: Sequence[int], device: torch.device, *bounds: int, training: bool
) -> Tensor:
    """Draw random numbers by `torch.rand` or `torch.randint`; in evaluation, the same ones in every call.

    So two evaluations of one model agree, and the training between them does not depend on how often there was one.
    """
    generator = None if training else torch.Generator(device).manual_seed(0)
    return draw(*bounds, shape, generator=generator, device=device)


def gathered(rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "all_rows ..."]:
    """The rows of all processes, which have equally many, one after the other and without gradient.

    A buffer that each process would fill by itself would be overwritten by that of the first one (DDP broadcasts it
    before every step), and what the others saw would be lost.
    """
    rows = rows.detach()
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
