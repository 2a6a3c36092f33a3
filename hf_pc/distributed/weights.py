"""Weights and gradients of a model that is spread over processes, where they are needed together."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_pc.distributed.neighbours import Neighbours
from hf_pc.distributed.stage import Stage


class Shared:
    """Parameters that several processes use, such as tied embeddings: their gradients are sums over these.

    Every process makes one, since the groups are made by all.
    """

    def __init__(self, stage: Stage, trained: Iterable[str]) -> None:
        trained = set(trained)
        self.stage = stage
        self.names = [name for name in stage.names if len(stage.holders[name]) > 1 and name in trained]
        several = sorted({tuple(stage.holders[name]) for name in self.names})
        self.groups = {ranks: dist.new_group(list(ranks)) for ranks in several}

    def parameters(self) -> list[nn.Parameter]:
        """Those that are used here."""
        return [self.stage.tensor(name) for name in self.names if self.stage.uses(name)]  # type: ignore[misc]

    def sum_gradients(self, neighbours: Neighbours) -> None:
        """Give every process that uses a parameter the sum of their gradients; called by all."""
        if not self.names:
            return
        tensors = [self.stage.tensor(name) for name in self.names]
        there = neighbours.sum(torch.tensor([float(t.grad is not None) for t in tensors], device=neighbours.device))
        for name, tensor, known in zip(self.names, tensors, there.tolist(), strict=True):
            if known and self.stage.uses(name):  # what no process has a gradient of stays without
                total = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                dist.all_reduce(total, group=self.groups[tuple(self.stage.holders[name])])
                tensor.grad = total


def clip_grad_norm(stage: Stage, neighbours: Neighbours, max_norm: float) -> float:
    """Scale the gradients so that their norm over all processes is at most `max_norm`; returns it as it was."""
    square = torch.zeros((), dtype=torch.float64, device=neighbours.device)
    gradients: list[Tensor] = []
    for name in stage.names:
        gradient = stage.tensor(name).grad if stage.uses(name) else None
        if gradient is not None:
            gradients.append(gradient)
            if stage.holders[name][0] == neighbours.index:
                square += torch.linalg.vector_norm(gradient).double().square()
    norm = math.sqrt(float(neighbours.sum(square)))
    factor = max_norm / (norm + 1e-6)
    if factor < 1 and gradients:
        torch._foreach_mul_(gradients, factor)
    return norm


@torch.no_grad()
def whole_state(stage: Stage, neighbours: Neighbours) -> dict[str, Tensor] | None:
    """The whole model's state_dict, in process 0, in the memory of the CPU; tied names share a tensor. None in the
    others; called by all."""
    whole: dict[str, Tensor] = {}
    for name in stage.names:
        source = stage.holders[name][0]
        if source == neighbours.index == 0:
            whole[name] = stage.tensor(name).detach().cpu()
        elif source == neighbours.index:
            dist.send(stage.tensor(name).detach().contiguous(), 0)
        elif neighbours.index == 0:
            received = torch.empty_like(stage.tensor(name), device=neighbours.device)
            dist.recv(received, source)
            whole[name] = received.cpu()
    if neighbours.index:
        return None
    return whole | {name: whole[own] for name, own in stage.aliases.items()}
