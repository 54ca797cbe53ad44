"""Gradients by objective and parameter, weights that are shares of them, and training only what a loss reaches."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe_kd.engine.randomness import RandomState
from probe_kd.engine.surgery import buffers_aside
from probe_kd.errors import LossError
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.shares import ShareWeights, complaint_about, unmeasured
from probe_kd.methods.targets import CachedTargets

Gradients = Sequence[Tensor | None]


def gradient_norms(
    distiller: Distiller, images: Tensor, target: Tensor | None = None, index: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Return `{objective: {parameter: gradient norm}}` of the unweighted objectives.

    A parameter that an objective does not reach is left out. Parameters are named as by `named_parameters()`. The
    gradients, the buffers and the state of the random numbers do not change. `index` is that of a step.
    """
    parameters = {name: parameter for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    norms: dict[str, dict[str, float]] = {}
    with RandomState(distiller).again(), buffers_aside(distiller), unmeasured(distiller.shares):
        result = distiller(images, target, index=index)
        for objective in distiller.objectives:
            term = result[objective.name]
            assert term is not None
            gradients = _gradients(term, list(parameters.values()))
            pairs = zip(parameters, gradients, strict=True)
            norms[objective.name] = {name: float(gradient.norm()) for name, gradient in pairs if gradient is not None}
    return norms


def _gradients(term: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """The gradient at each parameter; None where the term does not reach it."""
    if not term.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)


def measure_shares(distiller: Distiller, batches: Iterable[Tensor | Sequence[Any]]) -> dict[str, float]:
    """Measure the weights that are a `Share`, and return them by the names of their objectives.

    `batches` are the arguments of a step: `(images, target)`, or images alone. Each weight takes the first so many as
    its `Share` says, so it may be an endless loader. Call this before the first step, in the precision (`autocast`) of
    the steps. It does nothing, and reads no batch, if no weight is a `Share`. Gradients, buffers and the state of the
    random numbers do not change. With several processes, each has its own batches, and gradients are averaged over all
    before their norms are taken. The weights are kept in `state_dict`.

    Raises LossError if a loss reaches no parameter of the task, and for gradients that are zero or not finite.
    """
    shares = distiller.shares
    if shares is None:
        return {}
    most = max(share.batches for share in shares.shares.values())
    # One context for all batches: what a loss remembers of the batches before (a queue, say) is there for the next.
    with _without_effect(distiller):
        norms = [_share_norms(distiller, shares, *_arguments(batch)) for batch in islice(batches, most)]
    if not norms:
        raise LossError("no batches to measure the weights on that are shares of a gradient; give training batches")
    first = [norms[: share.batches] for share in shares.shares.values()]
    means = [torch.stack([of_batch[row] for of_batch in own]).mean(0) for row, own in enumerate(first)]
    shares.store(torch.stack(means))
    return shares.by_name


def follow_shares(
    distiller: Distiller,
    step: int,
    images: Tensor,
    target: Tensor | None = None,
    cached_targets: CachedTargets | None = None,
    index: Tensor | None = None,
) -> None:
    """Go on measuring the weights whose `Share` says `follow`, on the images of a step that is to be taken.

    `step` is the number of steps of the stage so far. It measures in one of every `batches` steps, before the step, and
    changes nothing but those weights. Raises the errors of `measure_shares`.
    """
    shares = distiller.shares
    if shares is None or not step:
        return
    due = {
        row: share.batches
        for row, share in enumerate(shares.shares.values())
        if share.follow and step % share.batches == 0
    }
    if due:
        with _without_effect(distiller):
            norms = _share_norms(distiller, shares, images, target, cached_targets, index)
        average = shares.norms.clone()
        for row, batches in due.items():
            average[row] += (norms[row] - average[row]) / batches
        shares.store(average)


def _arguments(batch: Tensor | Sequence[Any]) -> Sequence[Any]:
    return (batch,) if isinstance(batch, Tensor) else batch


def _share_norms(
    distiller: Distiller,
    shares: ShareWeights,
    images: Tensor,
    target: Tensor | None = None,
    cached_targets: CachedTargets | None = None,
    index: Tensor | None = None,
) -> Float[Tensor, "shares 2"]:
    """The norms of the task's and of its own gradient on one batch, for each weight that is a share."""
    result: Mapping[str, Any] = distiller(images, target, cached_targets, index)
    terms = {name: term for name, term in result.items() if name not in ("loss", "output")}
    # Gradients in float16 vanish without a factor, as of torch's GradScaler, and overflow by one that is too large.
    scales = [2.0**power for power in (16, 12, 8, 4, 0)] if _in_float16(distiller, images) else [1.0]
    norms = torch.empty(0)
    for scale in scales:
        norms = _norms_of_terms({name: scale * term for name, term in terms.items()}, distiller) / scale
        if norms.isfinite().all():
            break
    return norms


@contextmanager
def _without_effect(distiller: Distiller) -> Iterator[None]:
    """Let steps run that leave buffers and the state of the random numbers as they were."""
    with RandomState(distiller).again(), buffers_aside(distiller), unmeasured(distiller.shares), not_compiled():
        yield


def _in_float16(distiller: Distiller, images: Tensor) -> bool:
    device = images.device.type
    by_autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    return by_autocast or any(parameter.dtype is torch.float16 for parameter in distiller.student.parameters())


def not_compiled() -> AbstractContextManager[Any]:
    """Run compiled modules as they are, where they would be compiled once more: in another mode, or for another batch.

    Compiled graphs also give their buffers away, and allow a single backward.
    """
    # The import takes seconds, and nothing is compiled without it.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _norms_of_terms(terms: Mapping[str, Tensor], distiller: Distiller) -> Float[Tensor, "shares 2"]:
    shares, weights = distiller.shares, distiller.weights
    assert shares is not None
    parameters = [parameter for parameter in distiller.student.parameters() if parameter.requires_grad]
    of_tasks: dict[tuple[int, ...], Gradients] = {}
    rows: list[Tensor] = []
    for index, task in shares.tasks.items():
        if task not in of_tasks:
            names = [shares.names[position] for position in task]
            parts = [weights[name] * terms[name] for name in names]
            of_tasks[task] = _gradients(sum(parts[1:], start=parts[0]), parameters)
        own = _gradients(terms[shares.names[index]], parameters)
        rows.append(_norms(list(zip(of_tasks[task], own, strict=True)), shares, index))
    return torch.stack(rows)


def _norms(
    sides: Sequence[tuple[Tensor | None, Tensor | None]], shares: ShareWeights, index: int
) -> Float[Tensor, "2"]:
    """The norms of two gradients over the parameters that both reach, averaged over the processes before."""
    both = [(task, own) for task, own in sides if task is not None and own is not None]
    if not both:
        raise LossError(complaint_about(shares.names[index], shares.task(index), []))
    vectors = [torch.cat([gradient.flatten().float() for gradient in side]) for side in zip(*both, strict=True)]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return torch.stack([torch.linalg.vector_norm(vector) for vector in vectors])
    for vector in vectors:
        torch.distributed.all_reduce(vector)
        vector /= torch.distributed.get_world_size()
    norms = torch.stack([torch.linalg.vector_norm(vector) for vector in vectors])
    torch.distributed.broadcast(norms, 0)  # the same to the bit also where processes have unlike devices
    return norms


@contextmanager
def training_only(module: nn.Module, names: Collection[str]) -> Iterator[list[nn.Parameter]]:
    """Freeze all parameters but those of the given names inside the context, and yield these.

    Names are those of `named_parameters()`. Parameters that are frozen already stay frozen.
    """
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    frozen = [parameter for name, parameter in trainable if name not in names]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield [parameter for name, parameter in trainable if name in names]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
