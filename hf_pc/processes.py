"""Which of how many processes this is, and what they have to agree on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: what the backends of torch.distributed say where the other end is gone
_GONE = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")


class LostProcessError(RuntimeError):
    """Another process of the run ended or cannot be reached."""


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_index() -> int:
    """The rank; 0 without a process group."""
    return torch.distributed.get_rank() if _several() else 0


def process_count() -> int:
    """The world size; 1 without a process group."""
    return torch.distributed.get_world_size() if _several() else 1


def gathered(value: Any) -> list[Any]:
    """What every process gives here, in order of rank; each value has to be picklable."""
    values = [value] * process_count()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def at_once(failure: str | None) -> None:
    """Raise ValueError on every process where any of them has something to complain about; called by all."""
    told = {text: None for text in gathered(failure) if text}
    if told:
        raise ValueError("; ".join(told))


def same_everywhere(values: Mapping[str, object]) -> None:
    """Raise ValueError on every process, naming the value, unless all have the same ones; called by all."""
    given: list[Mapping[str, object]] = gathered(dict(values))
    for name in {name: None for own in given for name in own}:
        found = [own.get(name) for own in given]
        if any(value != found[0] for value in found):
            said = ", ".join(f"{value!r} on process {rank}" for rank, value in enumerate(found))
            raise ValueError(f"{name} differs between processes: {said}; one value for all of them is needed")


@contextmanager
def by_all(device: torch.device) -> Iterator[None]:
    """What fails inside on one process ends it on all: the others raise RuntimeError, which says where and why.

    Entered by all; an exception that leaves other processes waiting for messages inside cannot be told to them.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not everywhere(error is None, device):
        told = gathered(error and f"process {process_index()} failed: {type(error).__name__}: {error}")
        raise error or RuntimeError("; ".join(text for text in told if text))


def everywhere(holds: bool, device: torch.device) -> bool:
    """Whether something holds on every process."""
    if process_count() == 1:
        return holds
    vote = torch.tensor([float(holds)], device=device)
    torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN)
    return bool(vote.item())


def changes_buffers(forward: Any) -> bool:
    """Whether a distributed wrapper copies the first process's buffers into a model before a pass, so that no graph of
    the model can be kept over that: before torch 2.13 autograd takes the copy for a change."""
    syncs = getattr(forward, "will_sync_module_buffers", None)
    return torch.__version__ < "2.13" and callable(syncs) and bool(syncs())


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is sharded by FSDP2: then every pass gathers its parameters, on all processes at once."""
    if not _several():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def reducing(model: Any, when: bool) -> Iterator[None]:
    """Inside, backward passes through a sharded model sum gradients over processes, or leave them where they are."""
    model.set_requires_gradient_sync(when)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def naming_the_lost(folder: str) -> Iterator[None]:
    """Turn what a backend says of a lost connection into LostProcessError.

    Args:
        folder: where the checkpoints of the run are.
    """
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in _GONE)
        if process_count() == 1 or isinstance(error, LostProcessError) or not gone:
            raise
        raise LostProcessError(
            f"process {process_index()} of {process_count()} lost another one, which ended or cannot be reached; its "
            f"own output says why. The last whole checkpoint in {folder} can be resumed from"
        ) from error
