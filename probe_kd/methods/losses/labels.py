"""Losses of a model's outputs and the labels."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import loss_function
from probe_kd.methods.losses.checks import check_rows, check_tensors, has_values, is_number, of_positions


@loss_function
def cross_entropy(
    student: Float[Tensor, "batch classes"] | Float[Tensor, "batch classes height width"],
    target: Int[Tensor, " batch"] | Float[Tensor, "batch classes"] | Int[Tensor, "batch height width"],
    /,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | Literal["balanced"] | None = None,
    ignore_index: int | None = None,
) -> Float[Tensor, ""]:
    """Compute the cross entropy -sum_i w_i y_i log softmax(z)_i, averaged over the batch.

    `target` is class indices, or one distribution per image, as Mixup and CutMix make them. `label_smoothing` mixes in
    the uniform distribution (Szegedy et al. 2016, sec. 7). `class_weights` are the weights w_i of the classes, by
    default 1 (`balanced_weights` has those that make up for rare classes). The batch is averaged by its size, and not
    by the sum of its weights as in torch, so that an image counts the same whatever others are in its batch. Raises
    LossError for any other target, such as several labels per image, which are not a distribution.

    A map of logits takes a map of class indices of its grid, as in segmentation, and the mean is over all positions.
    Class indices of `ignore_index` do not count, not even in the number by which the sum is divided; if none counts,
    the loss is 0.
    """
    if student.ndim == 4 and target.ndim == 3:
        _check_target_map(student.shape, target)
        student, target = of_positions(student), target.flatten()
    check_rows("cross_entropy", student)
    if target.dtype is not torch.int64 or target.shape != student.shape[:1]:
        check_target("cross_entropy", student.shape, target)
    if not 0 <= label_smoothing <= 1:
        raise LossError(f"cross_entropy: label_smoothing {label_smoothing}; expected a share between 0 and 1")
    plain = class_weights is None and ignore_index is None
    if has_values(target):
        if plain and target.dtype is torch.int64:
            return _of_labels(student, target, label_smoothing)
        check_values(student.shape[1], target, ignore_index)
    if not target.is_floating_point():
        target = target.long()
    if plain:
        return F.cross_entropy(student, target, label_smoothing=label_smoothing)
    weights = None
    if class_weights is not None:
        weights = student.new_tensor(_checked_weights(class_weights, student.shape[1]))
    if ignore_index is None or target.is_floating_point():
        total = F.cross_entropy(student, target, weights, label_smoothing=label_smoothing, reduction="sum")
        return total / len(student)
    total = F.cross_entropy(
        student, target, weights, label_smoothing=label_smoothing, reduction="sum", ignore_index=ignore_index
    )
    return total / (target != ignore_index).sum().clamp_min(1)


def _of_labels(
    student: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], label_smoothing: float
) -> Float[Tensor, ""]:
    """Torch checks each label of a CPU as it reads it, but for the one to ignore, -100 unless it is set to another."""
    try:
        return F.cross_entropy(student, labels, label_smoothing=label_smoothing, ignore_index=-(2**63))
    except IndexError:
        check_values(student.shape[1], labels)
        raise


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Return the class weights N / (C n_i) for C classes with n_i images of N, as scikit-learn's `balanced`.

    Classes without images have weight 0, and are not counted. So the mean weight of an image is 1.
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def _checked_weights(weights: Sequence[float] | str, classes: int) -> list[float]:
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise LossError(
            f"cross_entropy: class_weights {weights!r}; expected a number for each class (`balanced` is for recipes, "
            "which know the images; `balanced_weights` has its numbers)"
        )
    if len(weights) != classes:
        raise LossError(f"cross_entropy: class_weights has {len(weights)} numbers, and there are {classes} classes")
    legal = all(is_number(weight) and weight >= 0 for weight in weights)
    if not legal or not any(weights):
        raise LossError(f"cross_entropy: class_weights {list(weights)}; expected numbers from 0 on, and one above it")
    return [float(weight) for weight in weights]


def check_target(loss: str, logits: Sequence[int], target: Tensor) -> None:
    """Raise LossError if shape and type of the target are neither those of class indices nor of distributions."""
    expected = tuple(logits) if target.is_floating_point() else tuple(logits[:1])
    if target.dtype == torch.bool or target.is_complex() or tuple(target.shape) != expected:
        kind = "probabilities" if target.is_floating_point() else "class indices"
        raise LossError(
            f"{loss}: logits {tuple(logits)} with a target {tuple(target.shape)} of {target.dtype}; expected "
            f"{tuple(logits[:1])} class indices (whole numbers) or {tuple(logits)} probabilities"
            + (f", and {kind} are {expected}" if target.dtype != torch.bool else "")
        )


def _check_target_map(logits: Sequence[int], target: Tensor) -> None:
    """Raise LossError unless the target is a map of class indices at the grid of the logits."""
    batch, _, *grid = logits
    if tuple(target.shape) != (batch, *grid) or target.is_floating_point() or target.dtype == torch.bool:
        raise LossError(
            f"cross_entropy: logits {tuple(logits)} with a target {tuple(target.shape)} of {target.dtype}; expected "
            f"{(batch, *grid)} class indices, one for each position; bring the logits to the grid of the labels in the "
            "model, by `F.interpolate(logits, labels.shape[1:])`"
        )


def check_labels(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> None:
    """Check a target as `cross_entropy` does, including its values. Raises LossError for any other target."""
    check_tensors("cross_entropy", logits, [target])
    if logits.ndim == 4 and target.ndim == 3:
        _check_target_map(logits.shape, target)
        logits, target = of_positions(logits), target.flatten()
    check_rows("cross_entropy", logits)
    check_target("cross_entropy", logits.shape, target)
    check_values(logits.shape[1], target, ignore_index)


def check_values(classes: int, target: Tensor, ignore_index: int | None = None, loss: str = "cross_entropy") -> None:
    """Raise LossError for class indices out of range, and for rows that are not a distribution over the classes.

    On a GPU, this waits for the values.
    """
    if not target.is_floating_point():
        if target.min() >= 0 and target.max() < classes:
            return
        wrong = (target < 0) | (target >= classes)
        out_of_range = target[wrong if ignore_index is None else wrong & (target != ignore_index)]
        if len(out_of_range):
            raise LossError(f"{loss}: label {out_of_range[0].item()} of {classes} classes; expected 0 to {classes - 1}")
        return
    sums = target.sum(1, dtype=torch.promote_types(target.dtype, torch.float32))
    tolerance = 1e-3 if target.dtype in (torch.float32, torch.float64) else 2e-2
    rows = ((target < 0).any(1) | ~((sums - 1).abs() <= tolerance)).nonzero()
    if len(rows):
        row = int(rows[0])
        raise LossError(
            f"{loss}: row {row} of the target sums to {sums[row].item():.4g}, least "
            f"{target[row].min().item():.4g}; expected a distribution, which is not "
            "negative and sums to 1. Several labels an image are "
            "none: `target / target.sum(1, keepdim=True)` is one"
        )
