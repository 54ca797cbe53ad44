"""A trace read as an anatomy: the stages and blocks of its encoder, and the decoder after them.

Nothing here knows an architecture by name. The facts of the trace are in `structure.py`, and each reading is a file:
the encoder, its units, the trunk of these, and what of the trunk ends a stage or is a block.
"""

from functools import cached_property

from probe_kd.engine.anatomy.block_chain import block_chain
from probe_kd.engine.anatomy.decoder import decoder_ends
from probe_kd.engine.anatomy.encoder import find_encoder, share_without_grid
from probe_kd.engine.anatomy.stage_ends import other_end, stage_ends
from probe_kd.engine.anatomy.strides import SAME_STRIDE, stride_of
from probe_kd.engine.anatomy.structure import Structure
from probe_kd.engine.anatomy.trunk import find_trunk
from probe_kd.engine.spec import FeatureSpec, Trace


class Anatomy:
    """What `match` asks of a trace. Each reading is made when it is asked for first, and then kept."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._structure = Structure(trace)
        self._encoder = find_encoder(self._structure)
        self._trunk = find_trunk(self._structure, self._encoder)

    @cached_property
    def ends(self) -> list[FeatureSpec]:
        """The last unit of every stage, or what the encoder returns of the stage."""
        return stage_ends(self._structure, self._encoder, self._trunk)

    @cached_property
    def other_end(self) -> FeatureSpec | None:
        """The end of the last stage in another reading, before or after a last convolution that widens."""
        return other_end(self._structure, self._encoder, self._trunk, self.ends[-1]) if self._trunk else None

    @cached_property
    def chain(self) -> list[FeatureSpec]:
        """The blocks that every stage repeats, first to last."""
        return block_chain(self._structure, self._trunk, self.ends)

    @cached_property
    def decoder(self) -> list[FeatureSpec]:
        """The last feature at each stride after the encoder, first to last, without the layer that gives the output."""
        return decoder_ends(self._structure, self._encoder, self._trunk)

    @cached_property
    def share_without_grid(self) -> float:
        """The share of the encoder's compute, 0..1, in layers that yield no feature with positions."""
        return share_without_grid(self._structure, self._encoder)

    @cached_property
    def isotropic(self) -> bool:
        """Whether (nearly) all blocks work at one stride."""
        if len(self.chain) < 2:
            return False
        last = stride_of(self.chain[-1])
        return all(stride_of(spec) * SAME_STRIDE > last for spec in self.chain)

    def depth(self, spec: FeatureSpec) -> float:
        """Return the relative depth of a feature, 0..1, in blocks, or in tensors of the forward if there are none."""
        chain = self.chain
        if len(chain) > 1:
            return sum(block.order <= spec.order for block in chain) / len(chain)
        end = self.ends[-1].order if self.ends else self.trace.output.order
        return min((spec.order + 1) / (end + 1), 1.0)
