"""Fit the statistics by which adapters normalise their targets."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from probe_kd.engine.spec import Tap
from probe_kd.errors import AdapterError
from probe_kd.methods.normalisation import fitted_norms
from probe_kd.methods.objectives import Objective
from probe_kd.methods.targets import compared, unfitted_side


@torch.no_grad()
def fit_statistics(
    objectives: Sequence[Objective],
    adapters: nn.ModuleDict,
    feature_batches: Iterable[Mapping[Tap, Tensor]],
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Fit every normalisation of these adapters that has statistics, on the teacher's features of some images.

    Sums are in float64, so their order does not matter in float32. `add_up` adds a tensor over all processes. Raises
    AdapterError if there are no features, or if they do not vary.
    """
    fits = [
        (objective, comparison, adapter, norm, norm.empty_moments())
        for objective, comparison, adapter in compared(objectives, adapters)
        for norm in fitted_norms(adapter)
    ]
    for features in feature_batches:
        for objective, comparison, adapter, _, moments in fits:
            moments.add(unfitted_side(objective, comparison, adapter, features, {}))
    for *_, norm, moments in fits:
        total = moments if add_up is None else moments.mapped(add_up)
        if not total.count:
            raise AdapterError(f"no images to fit the statistics of '{norm.name}' on; give batches of training images")
        norm.fit(total)


def refuse_moving_target(adapters: nn.Module) -> None:
    """Raise AdapterError if an adapter has statistics, and its teacher trains with the student."""
    for norm in fitted_norms(adapters):
        raise AdapterError(
            f"normalize '{norm.kind}' of '{norm.name}' fits statistics once, and the features of a teacher that trains "
            "with the student change; take `normalize: layer` or `channel`"
        )
