"""Rotations that give all channels of a distribution one variance."""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def balancing_rotation(variances: Float[np.ndarray, " n"]) -> Matrix:
    """An orthogonal matrix Q (n x n) for which Q diag(variances) Q^T has one number, their mean, on its diagonal.

    It is a Hadamard matrix over sqrt(n) if `hadamard` has one of order n. Each new channel then has the same share of
    every old one. For other orders it is a product of at most n - 1 rotations of two axes each, each of which sets one
    number of the diagonal (Bendel and Mickey 1978).
    """
    size = len(variances)
    matrix = hadamard(size)
    return _by_plane_rotations(variances) if matrix is None else matrix / np.sqrt(size)


def hadamard(order: int) -> Matrix | None:
    """A matrix of 1 and -1 with orthogonal rows; None if this construction has none of that order.

    The matrices are Paley's of both kinds over prime fields (Paley 1933), doubled by Sylvester's construction. They
    have the common widths of vision models, such as 192, 384, 768, 1152 and 1280.
    """
    if order in (1, 2):
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    if order < 1 or order % 4:
        return None
    if _is_prime(order - 1):
        return np.eye(order) + _bordered(order - 1, -1.0)
    if _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        conference = _bordered(order // 2 - 1, 1.0)
        signs: Matrix = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(order // 2), [[1, -1], [-1, -1]])
        return signs
    half = hadamard(order // 2)
    if half is None:
        return None
    doubled: Matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)
    return doubled


def _bordered(prime: int, below: float) -> Matrix:
    """Jacobsthal's matrix of a prime (whether i - j is a square), with a row of 1 above and a column of `below`."""
    numbers = np.arange(prime)
    character = np.where(np.isin(numbers, numbers**2 % prime), 1.0, -1.0)
    character[0] = 0.0
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:], matrix[1:, 0] = 1.0, below
    matrix[1:, 1:] = character[(numbers[:, None] - numbers[None]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _by_plane_rotations(variances: Float[np.ndarray, " n"]) -> Matrix:
    size, mean = len(variances), variances.mean()
    rotation, covariance = np.eye(size), np.diag(variances / mean if mean > 0 else np.ones(size))
    for _ in range(size - 1):
        low, high = int(covariance.diagonal().argmin()), int(covariance.diagonal().argmax())
        below, above = covariance[low, low] - 1, covariance[high, high] - 1
        if above <= 1e-15 or below >= -1e-15:
            break
        shared = covariance[low, high]
        tangent = (shared + np.sqrt(shared**2 - below * above)) / above
        cosine = 1 / np.sqrt(1 + tangent**2)
        plane = cosine * np.array([[1, -tangent], [tangent, 1]])
        covariance[[low, high]] = plane @ covariance[[low, high]]
        covariance[:, [low, high]] = covariance[:, [low, high]] @ plane.T
        rotation[[low, high]] = plane @ rotation[[low, high]]
    return rotation
