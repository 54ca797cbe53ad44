"""k-NN and linear probes against scikit-learn, fitted directly."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from probe_kd.training import frozen_features
from probe_kd.training.frozen_features import STRENGTHS, Vectors, knn_accuracy, linear_accuracy


def digits(train: int, test: int, noise: float = 4.0) -> tuple[Vectors, Vectors]:
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))[: train + test]
    vectors = torch.from_numpy(images[order] + noise * rng.normal(size=(len(order), 64))).float()
    targets = torch.from_numpy(labels[order]).long()
    return Vectors(vectors[:train], targets[:train]), Vectors(vectors[train:], targets[train:])


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (5, 1e-3), (200, 0.07)])
def test_knn_is_scikit_learns_with_the_weights_of_the_paper(
    k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_features, "CHUNK", 37)
    train, test = digits(300, 400)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((distances.min(1, keepdims=True) - distances) / temperature)

    reference = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
    reference.fit(train.vectors.double().numpy(), train.labels.numpy())
    expected = reference.score(test.vectors.double().numpy(), test.labels.numpy())
    assert 0.5 < expected < 0.99
    assert knn_accuracy(train, test, k=k, temperature=temperature) == pytest.approx(expected, abs=1e-9)


def test_fewer_training_images_than_neighbours_all_vote() -> None:
    train, test = digits(8, 50)
    assert knn_accuracy(train, test, k=20) == knn_accuracy(train, test, k=8)


def test_a_class_without_training_images_is_never_right() -> None:
    train, test = digits(200, 200)
    seen = train.labels < 5
    few = Vectors(train.vectors[seen], train.labels[seen])
    assert knn_accuracy(few, test) <= (test.labels < 5).double().mean().item()
    assert linear_accuracy(few, test) <= (test.labels < 5).double().mean().item()


def test_the_linear_probe_is_scikit_learns_and_auto_takes_a_strength_that_held_out_images_choose() -> None:
    train, test = digits(300, 400)
    scale = StandardScaler().fit(train.vectors.double().numpy())
    sides = [scale.transform(part.vectors.double().numpy()) for part in (train, test)]
    scores = {
        C: LogisticRegression(C=C, max_iter=1000).fit(sides[0], train.labels).score(sides[1], test.labels)
        for C in STRENGTHS
    }
    assert {C: linear_accuracy(train, test, C=C) for C in STRENGTHS} == pytest.approx(scores)
    chosen = linear_accuracy(train, test, seed=1)
    assert chosen in scores.values()
    assert chosen > min(scores.values())
    assert chosen == linear_accuracy(train, test, seed=1)
    one_class = Vectors(train.vectors, torch.zeros_like(train.labels))
    assert linear_accuracy(one_class, test) == (test.labels == 0).double().mean().item()
