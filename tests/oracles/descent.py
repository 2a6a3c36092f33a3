"""Descent with a guarantee, of one sequence: what hf_pc.solvers.descent does, written out (numpy only).

F(e) = |r - J e|^2 / 2 + e P e / 2, e the errors of all nodes in a row and P diagonal. A full move is -P^-1 dF/de.
Where a move raised F it is taken back and the rate shrinks; otherwise the rate grows up to 1. Anderson acceleration of
depth one, only at full rate. And steps of a fixed size, without a guarantee.
"""

from __future__ import annotations

import numpy as np

GROW, SHRINK, ROUNDING = 1.3, 0.4, 1e-12


def descend(
    jacobian: np.ndarray, r: np.ndarray, p: np.ndarray, sweeps: int, rate: float = 1.0, tolerance: float = 0.0
) -> tuple[np.ndarray, int]:
    """The errors after so many sweeps, the last of which only judges, and how many moves were refused."""

    def energy(e: np.ndarray) -> float:
        return float(0.5 * ((r - jacobian @ e) ** 2).sum() + 0.5 * (p * e**2).sum())

    def signal(e: np.ndarray) -> np.ndarray:
        return -jacobian.T @ (r - jacobian @ e)

    def move(e: np.ndarray) -> np.ndarray:
        return -e - signal(e) / p

    def rests(e: np.ndarray) -> bool:
        size = np.linalg.norm(np.sqrt(p) * move(e)) / np.linalg.norm(signal(e) / np.sqrt(p))
        return bool(size < tolerance)

    best = e = np.zeros_like(p)
    direction, lowest, refused = move(e), energy(e), 0
    for sweep in range(1, sweeps):
        if sweep > 1:
            before, turned = (best, direction), 0.0
            if energy(e) <= lowest * (1 + ROUNDING):
                best, direction, lowest, rate = e, move(e), energy(e), min(1.0, rate * GROW)
            else:
                refused, rate = refused + 1, rate * SHRINK
            turn = direction - before[1]
            if rate == 1 and turn.any():
                turned = float(turn @ (p * direction) / (turn @ (p * turn)))
            step = direction + turned * (before[0] + before[1] - best - direction)
        else:
            step = direction
        e = best if rests(best) else best + rate * step
    if sweeps > 1 and energy(e) > lowest * (1 + ROUNDING):
        e, refused = best, refused + 1
    return e, refused


def fixed_steps(jacobian: np.ndarray, r: np.ndarray, p: np.ndarray, sweeps: int, step: float) -> np.ndarray:
    """The errors after so many sweeps, the last of which moves none, of plain steps of this size."""
    e = np.zeros_like(p)
    for _ in range(sweeps - 1):
        e = e - step * (e - jacobian.T @ (r - jacobian @ e) / p)
    return e
