"""Drawing the same random numbers again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class RandomState:
    """The state of the random generators of the CPU and of a module's GPUs."""

    def __init__(self, module: nn.Module) -> None:
        places = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        self.devices = sorted({place.index for place in places if place.type == "cuda"})
        self.states = [torch.cuda.get_rng_state(device) for device in self.devices]
        self.state = torch.get_rng_state()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again inside the block. The numbers drawn after it do not change."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.state)
            for device, state in zip(self.devices, self.states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
