"""A batch of a linear Gaussian network, its nodes, and what backprop finds there."""

from __future__ import annotations

from typing import Any

import torch
from oracles.linear import LinearChain
from torch import Tensor

from hf_pc import NodeSpec, PCConfig, PCModel

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
NODES = [NodeSpec(r"blocks\.\d+")]


def attach(model: LinearChain, **settings: Any) -> PCModel:
    return PCModel(model, PCConfig(**{"nodes": NODES, "output": "gaussian", "precision": 1.5, **settings}))


def backprop(model: LinearChain) -> dict[str, Tensor]:
    model.zero_grad()
    (0.5 * (model(X)["logits"] - Y).square().sum() / Y.numel()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
