"""Linear Gaussian networks, whose free energy is quadratic in the errors: the equilibrium is a least-squares solution.

The states are x_l = W_l x_(l-1) + e_l (residual: (I + W_l) x_(l-1) + e_l) and the output is W_o x_L. Then the output's
error is r = y - (prediction) - sum_l J_l e_l, J_l the map from node l to the output, and
F = |r|^2 / 2 + sum_l p_l |e_l|^2 / 2 has its minimum at e = P^-1 J' S^-1 r0 with S = I + J P^-1 J', where F is
r0' S^-1 r0 / 2 (numpy only: nothing here comes from hf_pc).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class LinearChain(nn.Module):
    """`layers` linear maps of equal width, each a node, and a linear output; float64."""

    def __init__(self, layers: int = 3, width: int = 4, residual: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.residual = residual
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])
        self.blocks = nn.ModuleList([nn.Identity() for _ in range(layers)])
        self.head = nn.Linear(width, width, bias=False)
        self.double()

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        x = inputs
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x = block(x + layer(x) if self.residual else layer(x))
        return {"logits": self.head(x)}

    def matrices(self) -> list[np.ndarray]:
        eye = np.eye(self.head.in_features)
        weights = [layer.weight.detach().numpy() for layer in self.layers]
        return [eye + w if self.residual else w for w in weights]

    def equilibrium(self, x: Tensor, y: Tensor, precision: float) -> tuple[list[np.ndarray], np.ndarray]:
        """Errors of each node, [batch, width], and F of each row, [batch], at the minimum."""
        jacobian = self.head.weight.detach().numpy()
        jacobians = []
        for matrix in reversed(self.matrices()):
            jacobians.insert(0, jacobian)
            jacobian = jacobian @ matrix
        r0 = y.numpy() - x.numpy() @ jacobian.T
        s = np.eye(len(jacobian)) + sum(j @ j.T for j in jacobians) / precision
        solved = np.linalg.solve(s, r0.T).T
        return [solved @ j / precision for j in jacobians], 0.5 * (r0 * solved).sum(1)
