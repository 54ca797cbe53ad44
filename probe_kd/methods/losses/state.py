"""What losses with a state need: buffers read before they are written, random numbers, rows of all processes."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed


@torch.library.custom_op("probe_kd::copied", mutates_args=())
def _copied(values: Tensor) -> Tensor:
    return values.clone()


@_copied.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def before_written(values: Tensor) -> Tensor:
    """What was read from a buffer that the same step writes to later; it has no gradient.

    The backward of a compiled step may read it once more, although the buffer holds other values by then (torch 2.14).
    No compiler knows how to compute this copy again.
    """
    return _copied(values.detach()) if torch.compiler.is_compiling() else values


def drawn(
    draw: Callable[..., Tensor], shape: Sequence[int], device: torch.device, *bounds: int, training: bool
) -> Tensor:
    """Draw random numbers by `torch.rand` or `torch.randint`; in evaluation, the same ones in every call.

    So two evaluations of one model agree, and the training between them does not depend on how often there was one.
    """
    generator = None if training else torch.Generator(device).manual_seed(0)
    return draw(*bounds, shape, generator=generator, device=device)


def gathered(rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "all_rows ..."]:
    """The rows of all processes, which have equally many, one after the other and without gradient.

    A buffer that each process would fill by itself would be overwritten by that of the first one (DDP broadcasts it
    before every step), and what the others saw would be lost.
    """
    rows = rows.detach()
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
