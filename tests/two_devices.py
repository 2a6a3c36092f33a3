"""Devices on a machine that has one: tensors that say they live on "meta:0" or "meta:1" and compute on the CPU.

Inside `two_devices()` an operation on tensors of two devices fails as it does on two GPUs; explicit moves may cross,
and so may a number on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Placed(torch.Tensor):
    """A tensor on the CPU that claims to be elsewhere."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device
        )  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any], float64: bool = True) -> Any:
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    devices = {v.device for v in given if v.dim() or v.device.type != "cpu"} or {v.device for v in given}
    target = kwargs.get("device")
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if len(devices) > 1 and not moves:
        raise RuntimeError(f"{func} on tensors of several devices: {sorted(map(str, devices))}")
    kwargs = {name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()}
    inside = lambda value: value.inner if isinstance(value, Placed) else value  # noqa: E731
    output = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    if func._schema.is_mutable and given:
        return args[0]
    place = torch.device(target) if target is not None else next(iter(devices), torch.device("cpu"))
    place = given[0].device if func is torch.ops.aten.copy_.default else place
    if place.type != "meta":
        return output
    if not float64 and any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in tree_leaves(output)):
        raise TypeError(f"{func} makes float64 on {place}, which has none")
    return tree_map(lambda value: Placed(value, place) if isinstance(value, Tensor) else value, output)


class _Made(TorchDispatchMode):
    def __init__(self, float64: bool) -> None:
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, self.float64)


@contextmanager
def two_devices(*, float64: bool = True) -> Iterator[None]:
    """Inside, what is made on "meta:i" is real, and has no autocast; without `float64` it fails in that, as on MPS."""
    knows = torch.is_autocast_enabled
    with _Made(float64), patch("torch.is_autocast_enabled", lambda kind=None: kind != "meta" and knows(kind or "cpu")):
        yield


def place(module: nn.Module, device: str) -> None:
    """Move a module's parameters and buffers, and have its arguments follow, as a device map does."""
    target = torch.device(device)
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not isinstance(parameter.data, Placed):
                child._parameters[name] = nn.Parameter(Placed(parameter.data, target))
        for name, buffer in child._buffers.items():
            if buffer is not None and not isinstance(buffer, Placed):
                child._buffers[name] = Placed(buffer, target)
    follow = lambda value: value.to(target) if isinstance(value, Tensor) else value  # noqa: E731
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (tree_map(follow, args), tree_map(follow, kwargs)), with_kwargs=True
    )
