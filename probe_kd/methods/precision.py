"""float64 where the device has it. Apple's GPUs (`mps`) do not, and raise a TypeError for every such tensor."""

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def widened(tensor: Tensor) -> Tensor:
    """In float64 if the device has it, and otherwise as it is."""
    return tensor.double() if has_float64(tensor.device) else tensor


def exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU if the device has none."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def exact_zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Zeros to add up in, in float64, on the CPU if the device has none."""
    return torch.zeros(shape, dtype=torch.float64, device=device if has_float64(device) else "cpu")
