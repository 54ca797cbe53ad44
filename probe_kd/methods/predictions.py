"""What the logits of a classifier say: a class, or a probability for each class."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor


def class_logits(logits: Float[Tensor, "batch outputs"]) -> Float[Tensor, "batch classes"]:
    """Return one logit for each class. One output stands for two classes: 0, and itself.

    Its sigmoid is the softmax of these, and a positive number is the second class.
    """
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def average_precisions(
    logits: Float[Tensor, "images classes"], target: Float[Tensor, "images classes"]
) -> list[float | None]:
    """Return the average precision of every class, in 0..1; None for a class that no image has.

    This is torchmetrics' `MultilabelAveragePrecision` without thresholds: the sum of the precisions at each image
    that has the class, in the order of the logits. Only the order of the logits of a class counts.
    """
    from torchmetrics.functional.classification import binary_average_precision

    # As ranks: a sigmoid would make large logits equal, and torchmetrics takes one of any numbers outside of 0..1.
    shares = _ranks(logits) / len(logits)
    present = (target > 0).any(0).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that all images have
        return [
            float(binary_average_precision(shares[:, index], (target[:, index] > 0).long())) if has_images else None
            for index, has_images in enumerate(present)
        ]


def _ranks(logits: Float[Tensor, "images classes"]) -> Float[Tensor, "images classes"]:
    """The rank of each image in each class, in 0 to images - 1. Equal logits have equal ranks."""
    ranks = torch.empty(logits.shape, dtype=torch.float64)
    for index, column in enumerate(logits.T):
        numbers: Int[Tensor, " images"] = torch.unique(column, return_inverse=True)[1]
        ranks[:, index] = numbers.double().cpu()
    return ranks


def mean_average_precision(precisions: list[float | None]) -> float | None:
    """Return the mean over the classes that have images; None if none has."""
    values = [value for value in precisions if value is not None]
    return sum(values) / len(values) if values else None
