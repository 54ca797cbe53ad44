"""How well the vectors of a frozen model tell classes apart: by their nearest neighbours, and by a linear probe."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 1024  # images whose neighbours are searched at once
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of which `C: auto` takes the best
HELD_OUT = 0.2  # the share of the training images by which `C: auto` chooses
MOST_ITERATIONS = 1000


class Vectors(NamedTuple):
    """One vector per image, and the labels of the images on the CPU."""

    vectors: Float[Tensor, "images channels"]
    labels: Int[Tensor, " images"]


@torch.no_grad()
def knn_accuracy(train: Vectors, test: Vectors, *, k: int = 20, temperature: float = 0.07) -> float:
    """The share of the test images that a vote of their `k` nearest training images classifies correctly.

    Neighbours are the nearest by cosine, and each votes for its class with the weight `exp(cosine / temperature)`. Wu
    et al. 2018 (arXiv 1805.01978), sec. 3.4, as in the evaluation of DINO (Caron et al. 2021, arXiv 2104.14294). With
    fewer than `k` training images, all of them vote.
    """
    classes = int(train.labels.max()) + 1
    neighbours = F.normalize(train.vectors.float(), dim=1)
    predicted = []
    for chunk in torch.split(F.normalize(test.vectors.float(), dim=1), CHUNK):
        cosines, nearest = (side.cpu() for side in (chunk @ neighbours.T).topk(min(k, len(neighbours)), dim=1))
        # The largest weight is 1, so that no temperature is too small for exp.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), classes).scatter_add_(1, train.labels[nearest], weights)
        predicted.append(votes.argmax(1))
    return (torch.cat(predicted) == test.labels).double().mean().item()


def linear_accuracy(train: Vectors, test: Vectors, *, C: float | None = None, seed: int = 0) -> float:
    """The share of the test images that a logistic regression on the training images classifies correctly.

    The vectors are standardised by the mean and the standard deviation of the training images. `C` is scikit-learn's
    inverse strength of the L2 penalty. Without it, each of `STRENGTHS` is tried on a fifth of the training images,
    drawn by `seed`, and the best is fitted to all of them; of equal ones the stronger penalty.
    """
    features, labels = train.vectors.cpu().double().numpy(), train.labels.numpy()
    if C is None:
        C = _best_strength(features, labels, seed)
    return _fitted_score(features, labels, test.vectors.cpu().double().numpy(), test.labels.numpy(), C)


def _best_strength(features: np.ndarray, labels: np.ndarray, seed: int) -> float:
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, others = np.split(order, [round(HELD_OUT * len(order))])
    if not len(held_out) or len(np.unique(labels[others])) < 2:
        return 1.0
    sides = features[others], labels[others], features[held_out], labels[held_out]
    scores = [_fitted_score(*sides, strength) for strength in STRENGTHS]
    return STRENGTHS[int(np.argmax(scores))]


def _fitted_score(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray, strength: float
) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:  # which logistic regression refuses
        return float((test_labels == labels[0]).mean())
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=MOST_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few iterations, after which the figure is still that of a linear probe
        probe.fit(features, labels)
    return float(probe.score(test_features, test_labels))
