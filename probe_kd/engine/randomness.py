"""Random numbers that are drawn once more."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class RandomState:
    """The random numbers that are drawn next, on the CPU and on a module's GPUs."""

    def __init__(self, module: nn.Module) -> None:
        places = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        self.devices = sorted({place.index for place in places if place.type == "cuda"})
        self.states = [torch.cuda.get_rng_state(device) for device in self.devices]
        self.state = torch.get_rng_state()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, they are drawn once more; what is drawn after it does not notice."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.state)
            for device, state in zip(self.devices, self.states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
