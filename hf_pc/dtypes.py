"""In what precision numbers are kept: errors, and sums over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

#: kinds of devices that know no float64
WITHOUT_FLOAT64 = {"mps"}


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What the errors of a node with this prediction are kept in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which errors are kept, see `wide_dtype`."""
    return tensor.to(wide_dtype(tensor))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Inside, autocast lowers nothing on a device; some sums of products would be."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


@contextmanager
def lowered(devices: Iterable[torch.device], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, autocast computes in `dtype` on devices of these kinds; None lowers nothing."""
    with ExitStack() as inside:
        for kind in {device.type for device in devices} if dtype is not None else ():
            inside.enter_context(torch.autocast(kind, dtype))
        yield


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over tokens are kept in on a device: float64, or float32 where it has no other."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def exact(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which sums are kept where it is, see `sum_dtype`."""
    return tensor.to(sum_dtype(tensor.device))
