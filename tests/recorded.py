"""A CUDA graph on a CPU: what `run` asks of it is noted, operation by operation, and asked again on the same memory.

As on a GPU nothing of Python is run again, results lie where the first run had them, asking for a number fails, and to
record leaves everything that was there before as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NUMBERS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # what was there and is written to, and how it was
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in NUMBERS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = [*args, *kwargs.values()]
        for argument, value in zip(func._schema.arguments, given, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            written |= func.overloadpacket.__name__ == "native_batch_norm" and argument.name.startswith("running")
            if written and isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._made:
                self.before.append((value.detach(), value.detach().clone()))
        result = func(*args, **kwargs)
        if not any(r.alias_info is not None for r in func._schema.returns):
            new = result if isinstance(result, (tuple, list)) else (result,)
            self._made |= {part.untyped_storage().data_ptr() for part in new if isinstance(part, Tensor)}
        self.asked.append((func, args, kwargs, result))
        return result


class Replay:
    """Takes the place of `hf_pc.cuda_graph.CudaGraph`."""

    count = 0

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        noting = _Noting()
        with noting, patch("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True):
            run()
        self._asked = noting.asked
        with torch.no_grad():
            for tensor, value in reversed(noting.before):
                tensor.copy_(value)

    def replay(self) -> None:
        Replay.count += 1
        with torch.no_grad():
            for func, args, kwargs, before in self._asked:
                if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
                    continue  # a view: its memory is another's
                self._again(func, args, kwargs, before)

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, before: Any) -> None:
        result = func(*args, **kwargs)
        olds = before if isinstance(before, (tuple, list)) else (before,)
        news = result if isinstance(result, (tuple, list)) else (result,)
        for old, new in zip(olds, news, strict=True):
            if isinstance(old, Tensor) and old is not new and old.numel():
                old.copy_(new)
