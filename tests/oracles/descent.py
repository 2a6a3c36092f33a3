"""Descent with a guarantee, of one sequence: what hf_pc.solvers.descent does, written out (numpy only).

F(e) = |r - J e|^2 / 2 + e P e / 2, e the errors of all nodes in a row and P diagonal. A full move is -P^-1 dF/de.
Where a move raised F it is taken back and the rate shrinks; otherwise the rate grows up to 1. Anderson acceleration of
the given depth, only at full rate. And steps of a fixed size, without a guarantee.
"""

from __future__ import annotations

import numpy as np

GROW, SHRINK, ROUNDING, RIDGE = 1.3, 0.4, 1e-12, 1e-7


def shares(turns: list[np.ndarray], direction: np.ndarray, p: np.ndarray) -> np.ndarray:
    """How much of each turn to take from a direction, so that least is left of it in units of p.

    A matrix of the turns as columns of length 1 has the normal equations; the ridge is on their diagonal.
    """
    used = [i for i, turn in enumerate(turns) if turn.any()]
    found = np.zeros(len(turns))
    if used:
        columns = np.stack([np.sqrt(p) * turns[i] for i in used], axis=1)
        lengths = np.linalg.norm(columns, axis=0)
        columns /= lengths
        normal = (columns.T @ columns + RIDGE / (1 - RIDGE) * np.eye(len(used))) * (1 - RIDGE)
        found[used] = np.linalg.solve(normal, columns.T @ (np.sqrt(p) * direction)) / lengths
    return found


def descend(
    jacobian: np.ndarray,
    r: np.ndarray,
    p: np.ndarray,
    sweeps: int,
    rate: float = 1.0,
    tolerance: float = 0.0,
    depth: int = 1,
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
    past: list[tuple[np.ndarray, np.ndarray]] = []  # how far each move went, and how it turned the direction
    for sweep in range(1, sweeps):
        step = direction
        if sweep > 1:
            before = best, direction
            if energy(e) <= lowest * (1 + ROUNDING):
                best, direction, lowest, rate = e, move(e), energy(e), min(1.0, rate * GROW)
            else:
                refused, rate = refused + 1, rate * SHRINK
            past = [*past, (best - before[0], direction - before[1])][-depth:] if depth else []
            step = direction
            if rate == 1 and depth:
                found = shares([turn for _, turn in past], direction, p)
                step = direction - sum(
                    share * (moved + turn) for share, (moved, turn) in zip(found, past, strict=True)
                )
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
