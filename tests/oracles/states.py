"""Relaxation of states by fixed steps, of a linear chain: what hf_pc.solvers.state and lagrangian do (numpy only).

x_l are the states, mu_l = M_l x_(l-1) predictions, e_l = x_l - mu_l. F = |y - H x_L|^2 / 2 + sum p_l |e_l|^2 / 2, and
PC-ALM adds sum lambda_l e_l. Every pass takes e_l from the states before it, then all states move at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Found:
    """States and errors of each node at the last pass, [batch, width]; the gradients of M_l and of H in it, of F.

    `residual` is |dF/dx| / |g| of each row, in units of the precisions; `energy` F.
    """

    states: list[np.ndarray]
    errors: list[np.ndarray]
    gradients: list[np.ndarray]
    residual: np.ndarray
    energy: np.ndarray


def relax(
    matrices: list[np.ndarray],
    head: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    precision: list[float],
    sweeps: int,
    step: float,
    multiplier_rate: float = 0.0,
    weight_rate: float = 0.0,
    momentum: float = 0.0,
) -> Found:
    """So many passes, the last of which only learns; with a weight_rate the weights move in the others too. With a
    momentum each move has so much of the one before it (heavy ball)."""
    layers, matrices = range(len(matrices)), [*matrices, head]
    states = [x]
    for matrix in matrices[:-1]:
        states.append(states[-1] @ matrix.T)
    multipliers = [np.zeros_like(state) for state in states[1:]]
    moves = [np.zeros_like(state) for state in states[1:]]
    for sweep in range(sweeps):
        errors = [states[i + 1] - states[i] @ matrices[i].T for i in layers]
        own = [precision[i] * errors[i] + multipliers[i] for i in layers]
        down = [*own, y - states[-1] @ matrices[-1].T]  # minus the gradient at what predicts each
        signals = [-down[i + 1] @ matrices[i + 1] for i in layers]
        slopes = [own[i] + signals[i] for i in layers]
        learned = [-d.T @ state for d, state in zip(down, states, strict=True)]
        if sweep == sweeps - 1:
            break
        moves = [momentum * moves[i] - step * slopes[i] / precision[i] for i in layers]
        states[1:] = [states[i + 1] + moves[i] for i in layers]
        multipliers = [multipliers[i] + multiplier_rate * precision[i] * errors[i] for i in layers]
        matrices = [m - weight_rate * g / y.size for m, g in zip(matrices, learned, strict=True)]
    squares = [sum((v[i] ** 2).sum(1) / precision[i] for i in layers) for v in (slopes, signals)]
    energy = (down[-1] ** 2).sum(1) / 2 + sum(precision[i] * (errors[i] ** 2).sum(1) / 2 for i in layers)
    return Found(states[1:], errors, learned, np.sqrt(squares[0] / squares[1]), energy)
