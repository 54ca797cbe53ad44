"""The stride of a feature, and when two strides are one."""

from collections.abc import Iterable
from itertools import pairwise

from probe_kd.engine.spec import FeatureSpec

# Two strides are one stage unless they differ by more than this: convolutions without padding cut a few positions off.
SAME_STRIDE = 1.4


def stride_of(spec: FeatureSpec) -> float:
    return spec.reduction or 1.0


def is_same_stride(some: float, other: float) -> bool:
    return max(some, other) < SAME_STRIDE * min(some, other)


def is_near(spec: FeatureSpec, other: FeatureSpec) -> bool:
    """Whether two features have one stride."""
    return is_same_stride(stride_of(spec), stride_of(other))


def count_strides(specs: Iterable[FeatureSpec]) -> int:
    strides = sorted({stride_of(spec) for spec in specs})
    return sum(new > SAME_STRIDE * old for old, new in pairwise([0.0, *strides]))
