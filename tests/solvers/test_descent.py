"""Descent with a guarantee, against the same written out in numpy, and where a free energy is no number."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracles.descent import descend, fixed_steps
from oracles.linear import LinearChain

from hf_pc import NodeSpec, PCConfig, PCModel
from hf_pc.energies import ENERGIES
from hf_pc.measurements import first_nonfinite
from hf_pc.solvers.descent import Descent
from hf_pc.solvers.state import FIRST_RATE

ROWS, WIDTH = 4, 3
X, Y = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ONE_NODE = ([0.003], [0.05], [0.3], [2.0], [40.0])
TWO_NODES = ([0.02, 0.9], [1.5, 0.2], [0.3, 30.0])


def attach(model: LinearChain, precision: list[float], sweeps: int, **settings: object) -> PCModel:
    nodes = [NodeSpec(f"blocks.{i}", precision=value) for i, value in enumerate(precision)]
    return PCModel(model, PCConfig(nodes=nodes, output="gaussian", sweeps=sweeps, **settings))  # type: ignore[arg-type]


def problems(model: LinearChain, precision: list[float]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What the errors of all nodes do to the output, its error without them, and P: of each sequence by itself."""
    way, ways = model.head.weight.detach().numpy(), []
    for matrix in reversed(model.matrices()):
        ways.insert(0, way)
        way = way @ matrix
    p = np.repeat(precision, WIDTH)
    return [(np.hstack(ways), y - way @ x, p) for x, y in zip(X.numpy(), Y.numpy(), strict=True)]


def expected(model: LinearChain, precision: list[float], *given: float) -> list[tuple[np.ndarray, int]]:
    """Errors and refusals of each sequence by itself."""
    return [descend(*problem, *given) for problem in problems(model, precision)]


CASES = [("error", precision, depth) for precision in (*ONE_NODE, *TWO_NODES) for depth in (0, 1, 2, 4)]
CASES += [("error", precision, 6) for precision in (*ONE_NODE, *TWO_NODES)]  # moves taken back are long remembered
CASES += [("state", precision, depth) for precision in ONE_NODE for depth in (0, 1)]


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
@pytest.mark.parametrize(("solver", "precision", "depth"), CASES, ids=str)
def test_each_sequence_descends_on_its_own(solver: str, precision: list[float], tolerance: float, depth: int) -> None:
    """At every number of sweeps errors and refused moves are those of each sequence alone, whatever is refused.

    The state of a single node moves as its error does.
    """
    model = LinearChain(layers=len(precision), width=WIDTH)
    rate = 1.0 if solver == "error" else FIRST_RATE
    for sweeps in range(1, 9) if depth < 6 else (13, 14):
        found = expected(model, precision, sweeps, rate, tolerance, depth)
        pc = attach(model, precision, sweeps, solver=solver, tolerance=tolerance, anderson_depth=depth)
        with pc.relaxed({"inputs": X, "labels": Y}) as relaxation:
            pc.learning_pass({"inputs": X, "labels": Y})
            leaves = [site.leaf.detach() for site in relaxation.sites]
            errors = leaves if solver == "error" else [leaves[0] - X @ model.layers[0].weight.detach().T]
            np.testing.assert_allclose(torch.cat(errors, 1).numpy(), [e for e, _ in found], rtol=1e-7, atol=1e-9)
            assert relaxation.refused == sum(refused for _, refused in found)
            if not tolerance:
                assert relaxation.tried == ROWS * (sweeps - 1)
        pc.detach()


@pytest.mark.parametrize("step", [0.3, 1.0, 1.7])
def test_fixed_steps_of_errors(step: float) -> None:
    """With a number as step the errors of every node go down F by it in each sweep, whether F rises or not."""
    for sweeps in range(1, 6):
        model = LinearChain(layers=2, width=WIDTH)
        pc = attach(model, [1.5, 0.8], sweeps, step_size=step)
        found = pc.relax(inputs=X, labels=Y)
        steps = [fixed_steps(*problem, sweeps, step) for problem in problems(model, [1.5, 0.8])]
        np.testing.assert_allclose(torch.cat([*found.errors.values()], 1).numpy(), steps, rtol=1e-9, atol=1e-12)
        pc.detach()


def test_some_moves_are_refused_and_some_not() -> None:
    """The cases above hold both: else they would say nothing of what follows a refusal."""
    refused = [expected(LinearChain(layers=len(p), width=WIDTH), p, 8)[0][1] for p in (*ONE_NODE, *TWO_NODES)]
    assert 0 in refused
    assert len(set(refused)) > 2


def test_a_second_learning_pass_stands() -> None:
    """Only the pass that follows the last move is judged: learning again from the same errors runs once."""
    pc = attach(LinearChain(layers=1, width=WIDTH), [0.05], 4)
    with pc.relaxed({"inputs": X, "labels": Y}) as relaxation:
        pc.learning_pass({"inputs": X, "labels": Y})
        before, leaf = relaxation.sweeps, relaxation.sites[0].leaf.detach().clone()
        pc.learning_pass({"inputs": X, "labels": Y})
        assert relaxation.sweeps == before + 1
        assert torch.equal(relaxation.sites[0].leaf, leaf)


def test_a_sequence_that_is_no_number_is_left_to_the_guard() -> None:
    """No move of it is refused, and the others descend as without it."""
    model = LinearChain(layers=1, width=WIDTH)
    broken = X.clone()
    broken[1] = torch.nan
    reports = []
    for inputs, labels in ((broken, Y), (X[[0, 2, 3]], Y[[0, 2, 3]])):
        pc = attach(model, [0.05], 5)
        with pc.relaxed({"inputs": inputs, "labels": labels}) as relaxation:
            pc.learning_pass({"inputs": inputs, "labels": labels})
            reports.append((relaxation.refused, relaxation.sites[0].leaf.detach()))
            assert first_nonfinite(relaxation.sums()) == ("blocks.0" if inputs is broken else None)
        pc.detach()
    assert reports[0][0] == reports[1][0] > 0
    torch.testing.assert_close(reports[0][1][[0, 2, 3]], reports[1][1])


@pytest.mark.parametrize("energy", ["gaussian", "laplace"])
@pytest.mark.parametrize("step", [0.7, 1.0, 1.6])
def test_weights_learn_where_the_last_move_leads(step: float, energy: str) -> None:
    """What they learn from is dE/dmu at the errors that one sweep more would start from."""
    model = LinearChain(layers=1, width=WIDTH)
    for sweeps in (1, 3):
        nodes = [NodeSpec("blocks.0", precision=0.8, energy=energy)]
        settings = {"nodes": nodes, "output": "gaussian", "step_size": step}
        after = PCModel(model, PCConfig(sweeps=sweeps + 1, **settings))  # type: ignore[arg-type]
        (error,) = after.relax(inputs=X, labels=Y).errors.values()
        after.detach()
        pc = PCModel(model, PCConfig(sweeps=sweeps, **settings))  # type: ignore[arg-type]
        model.zero_grad()
        pc.accumulate_grad(inputs=X, labels=Y)
        pc.detach()
        down = ENERGIES[energy]().grad_prediction(error, None, torch.tensor(0.8, dtype=torch.float64))
        expected = down.T @ X / Y.numel()
        torch.testing.assert_close(model.layers[0].weight.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "lower", "within", "beyond"),
    [
        (torch.float64, None, 1e-13, 1e-11), (torch.float32, None, 1e-7, 1e-5), (torch.float16, None, 1e-5, 1e-3),
        (torch.bfloat16, None, 1e-4, 5e-3), (torch.float32, torch.bfloat16, 5e-3, 0.1),
        (torch.float32, torch.float16, 5e-4, 0.02),
    ],
)  # fmt: skip
def test_a_rise_beyond_rounding_is_refused(
    dtype: torch.dtype, lower: torch.dtype | None, within: float, beyond: float
) -> None:
    """Of what a pass is computed in: each sequence by itself, against the best that it has met."""
    best = torch.tensor([2.0, 2.0, -2.0, 2.0], dtype=torch.float64)
    rises = torch.tensor([within, beyond, beyond, -beyond], dtype=torch.float64)
    energies = iter([best, best + rises * best.abs(), best])
    relaxation: Any = SimpleNamespace(
        sites=[SimpleNamespace(dtype=dtype)], lower=lower, free_energy=lambda: next(energies), tried=0, refused=0
    )
    descent = Descent(relaxation, 0.0, 0)
    assert descent.judge().all()
    assert descent.judge().tolist() == [True, False, False, True]
    assert (relaxation.tried, int(relaxation.refused)) == (4, 2)
    assert descent.judge().tolist() == [True, True, True, False]
