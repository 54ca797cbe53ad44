"""What losses are given, checked: types, shapes, options, and a value that is not finite."""

from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.errors import LossError

Reduction = Literal["sum", "mean"]
Compared = Tensor | tuple[Tensor, ...]  # one side of a comparison, or that side of all pairs
PLAIN = (Tensor, nn.Parameter)  # no fake tensor, as of a dry run


def flat(side: Any) -> tuple[Tensor, ...]:
    """One side of a comparison as a tuple, whether it is one tensor or those of all pairs."""
    return side if isinstance(side, tuple) else (side,)


def has_values(tensor: Tensor) -> bool:
    """Whether the values can be read without waiting for a device, and outside of compilation, which has none."""
    return type(tensor) in PLAIN and tensor.is_cpu and not torch.compiler.is_compiling()


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


def check_temperature(loss: str, temperature: float) -> None:
    if not is_number(temperature) or temperature <= 0:
        raise LossError(f"{loss}: temperature {temperature}; it has to be positive, and finite")


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


def check_outputs(loss: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape == teacher.shape and student.ndim == 2 and student.numel() and teacher.is_floating_point():
        return  # in one call
    check_same_shape(student, teacher, loss)
    check_rows(loss, student)


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
