"""Losses and their gradients against the papers' equations, in numpy's float64, for random sizes, options and scales.

The gradient is compared along a random direction, with the difference of the equation's own values, so that nothing of
torch is in the reference. Losses that are newer have their equations in the file of their own tests.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from golden_losses import draw, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from probe_kd.methods.losses.matrices import flow_matrix
from probe_kd.methods.losses.table import LOSSES

Array = NDArray[np.float64]


def log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def of_images(event: Callable[..., float]) -> Callable[..., float]:
    """The mean over the images of what is computed for each of them alone."""
    return lambda *sides, **options: float(np.mean([event(*image, **options) for image in zip(*sides, strict=True)]))


def reduced(numbers: Array, reduction: str) -> float:
    return float(numbers.sum() if reduction == "sum" else numbers.mean())


@of_images
def soft_targets(z: Array, v: Array, temperature: float) -> float:
    log_p, log_q = log_softmax(z / temperature), log_softmax(v / temperature)
    return temperature**2 * float((np.exp(log_q) * (log_q - log_p)).sum())


@of_images
def hard_labels(z: Array, v: Array, label_smoothing: float) -> float:
    log_p = log_softmax(z)
    return float(-(1 - label_smoothing) * log_p[v.argmax()] - label_smoothing * log_p.mean())


@of_images
def logits(z: Array, v: Array, center: bool, reduction: str) -> float:
    means = (z.mean(), v.mean()) if center else (0.0, 0.0)
    return reduced(((z - means[0]) - (v - means[1])) ** 2, reduction)


@of_images
def multilabel_soft_targets(z: Array, v: Array, temperature: float, reduction: str) -> float:
    terms = []
    for sign in (1, -1):  # the class, and its absence
        log_p, log_q = (-np.logaddexp(0, -sign * side / temperature) for side in (v, z))
        terms.append(np.exp(log_p) * (log_p - log_q))
    return temperature**2 * reduced(terms[0] + terms[1], reduction)


@of_images
def cross_entropy(z: Array, y: Any, label_smoothing: float) -> float:
    log_p = log_softmax(z)
    return float(-(1 - label_smoothing) * log_p[y] - label_smoothing * log_p.mean())


@of_images
def binary_cross_entropy(z: Array, y: Array, pos_weight: float, label_smoothing: float, reduction: str) -> float:
    y = y * (1 - label_smoothing) + label_smoothing / 2
    return reduced(pos_weight * y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z), reduction)


@of_images
def hint(s: Array, t: Array, reduction: str) -> float:
    return reduced((s - t) ** 2, reduction)


@of_images
def attention(s: Array, t: Array, form: str) -> float:
    ours, theirs = ((side**2).sum(0).ravel() for side in (s, t))
    difference = ours / np.linalg.norm(ours) - theirs / np.linalg.norm(theirs)
    return float(np.linalg.norm(difference) if form == "paper" else np.mean(difference**2))


def rows_of(map_: Array) -> Array:
    return map_.reshape(len(map_), -1).T


@of_images
def token_match(s: Array, t: Array, cosine: float, smooth_l1: float, beta: float) -> float:
    u, v, distance = rows_of(s), rows_of(t), np.abs(s - t)
    cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    smooth = np.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2)
    return float(cosine * (1 - cosines).mean() + smooth_l1 * smooth.mean())


@of_images
def patch_similarity(s: Array, t: Array, temperature: float) -> float:
    units = [rows_of(side) / np.linalg.norm(rows_of(side), axis=1, keepdims=True) for side in (s, t)]
    log_p, log_q = (log_softmax(side @ side.T / temperature) for side in units)
    return float((np.exp(log_q) * (log_q - log_p)).sum(1).mean())


def matrix(first: Array, second: Array) -> Array:
    """Yim et al. 2017, eq. 1, with the larger grid halved by its maxima."""
    factor = first.shape[2] // second.shape[2]
    cells = first.reshape(*first.shape[:2], second.shape[2], factor, second.shape[3], factor)
    return np.einsum("bmhw,bnhw->bmn", cells.max((3, 5)), second) / second[0, 0].size


def matrices(student: Any, teacher: Any, relative: bool, reduction: str) -> float:
    ours, theirs = (matrix(*side) if isinstance(side, tuple) else matrix(side, side) for side in (student, teacher))
    if relative:
        return float(((ours - theirs) ** 2).sum() / len(ours) / theirs.var(0, ddof=1).sum())
    return float(np.mean([reduced(difference**2, reduction) for difference in ours - theirs]))


REDUCTIONS = st.sampled_from(["sum", "mean"])
SMOOTHINGS = st.sampled_from([0.0, 0.1])
MATRICES = st.fixed_dictionaries({"relative": st.booleans(), "reduction": REDUCTIONS})
REFERENCES: dict[str, tuple[Callable[..., float], st.SearchStrategy[dict[str, Any]]]] = {
    "cross_entropy": (cross_entropy, st.fixed_dictionaries({"label_smoothing": SMOOTHINGS})),
    "binary_cross_entropy": (
        binary_cross_entropy,
        st.fixed_dictionaries(
            {"pos_weight": st.floats(0.5, 4), "label_smoothing": SMOOTHINGS, "reduction": REDUCTIONS}
        ),
    ),
    "soft_targets": (soft_targets, st.fixed_dictionaries({"temperature": st.floats(0.5, 30)})),
    "hard_labels": (hard_labels, st.fixed_dictionaries({"label_smoothing": SMOOTHINGS})),
    "multilabel_soft_targets": (
        multilabel_soft_targets,
        st.fixed_dictionaries({"temperature": st.floats(0.5, 30), "reduction": REDUCTIONS}),
    ),
    "logits": (logits, st.fixed_dictionaries({"center": st.booleans(), "reduction": REDUCTIONS})),
    "hint": (hint, st.fixed_dictionaries({"reduction": REDUCTIONS})),
    "attention": (attention, st.fixed_dictionaries({"form": st.sampled_from(["paper", "code"])})),
    "token_match": (
        token_match,
        st.fixed_dictionaries({"cosine": st.floats(0, 1), "smooth_l1": st.floats(0.1, 1), "beta": st.floats(0.3, 3)}),
    ),
    "patch_similarity": (patch_similarity, st.fixed_dictionaries({"temperature": st.floats(0.05, 2)})),
    "fsp": (matrices, MATRICES),
    "gram": (matrices, MATRICES),
}


def shapes(name: str, batch: int, width: int, grid: tuple[int, int]) -> list[Any]:
    """The inputs of a loss, as in golden files. The teacher has other channels and another grid where it may."""
    match LOSSES[name].reads:
        case "labels":
            rows = [batch, width + 1]
            return [rows, {"multi_hot": rows} if LOSSES[name].multilabel else {"labels": rows[:1], "below": width + 1}]
        case "outputs":
            return [[batch, width + 1]] * 2
        case "features":
            return [[batch, width + 1, *grid]] * 2
        case "maps":
            return [[batch, width, *grid], [batch, width + 2, *grid]]
        case "grams":
            return [[batch, width, *grid], [batch, width, 3, 3]]
    halved = [[batch, width, 2 * grid[0], 2 * grid[1]], [batch, width + 1, *grid]]
    return [{"tuple": halved}, {"tuple": [[batch, width, 3, 3], [batch, width + 1, 3, 3]]}]


def seen(name: str, side: Any) -> Any:
    """What the loss reads: the matrices of maps."""
    if LOSSES[name].reads_matrices:
        return flow_matrix(*side) if isinstance(side, tuple) else flow_matrix(side, side)
    return side


def scaled(given: Any, scale: float) -> Any:
    if isinstance(given, tuple):
        return tuple(scaled(part, scale) for part in given)
    return scale * given if given.is_floating_point() else given


def as_arrays(given: Any) -> Any:
    return tuple(map(as_arrays, given)) if isinstance(given, tuple) else given.detach().numpy()


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_value_and_gradient_are_those_of_the_equation(name: str, data: st.DataObject) -> None:
    reference, options_of = REFERENCES[name]
    options, seed = data.draw(options_of), data.draw(st.integers(0, 999))
    grid = data.draw(st.tuples(st.integers(1, 4), st.integers(2, 4)))
    inputs = shapes(name, data.draw(st.integers(2, 5)), data.draw(st.integers(2, 6)), grid)
    scale = data.draw(st.sampled_from([0.05, 1.0, 4.0]))
    numbers = stream(seed)
    student, target = (draw(numbers, drawn) for drawn in inputs)
    student, target = scaled(student, scale), target if LOSSES[name].multilabel else scaled(target, scale)
    leaves = [part.requires_grad_() for part in (student if isinstance(student, tuple) else (student,))]
    value = LOSSES[name].function(*(seen(name, side) for side in (student, target)), **options)
    of_equation = partial(reference, **options)
    assert value.item() == pytest.approx(of_equation(as_arrays(student), as_arrays(target)), rel=1e-9, abs=1e-12)
    directions = [scale * draw(numbers, list(leaf.shape)) for leaf in leaves]
    gradients = torch.autograd.grad(value, leaves)
    along = float(sum((gradient * step).sum() for gradient, step in zip(gradients, directions, strict=True)))
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = tuple(leaf.detach() + sign * step * way for leaf, way in zip(leaves, directions, strict=True))
        ends.append(of_equation(as_arrays(moved if isinstance(student, tuple) else moved[0]), as_arrays(target)))
    assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-7 * max(1.0, abs(value.item())))
