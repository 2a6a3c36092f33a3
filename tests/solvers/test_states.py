"""The solvers that move states, sweep by sweep, against the same written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles.linear import LinearChain
from oracles.states import Found, relax
from test_invariants import batch, make
from torch import Tensor

from hf_pc import NodeSpec, PCConfig, PCModel

PRECISION = [0.7, 3.0, 1.6]
ROWS, WIDTH = 3, 4
X, Y = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def attach(model: LinearChain, sweeps: int, **settings: Any) -> PCModel:
    nodes = [NodeSpec(f"blocks.{i}", precision=value) for i, value in enumerate(PRECISION)]
    return PCModel(model, PCConfig(**{"nodes": nodes, "output": "gaussian", "sweeps": sweeps, **settings}))


def expected(model: LinearChain, sweeps: int, step: float, **rates: float) -> Found:
    return relax(
        model.matrices(), model.head.weight.detach().numpy(), X.numpy(), Y.numpy(), PRECISION, sweeps, step, **rates
    )


def check(model: LinearChain, pc: PCModel, oracle: Found, weight_step: Any = None) -> None:
    report = pc.accumulate_grad(inputs=X, labels=Y, weight_step=weight_step)
    for name, error, state in zip(pc.nodes, oracle.errors, oracle.states, strict=True):
        np.testing.assert_allclose(report.errors[name.name].numpy(), error, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(report.states[name.name].numpy(), state, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(report.sequence_free_energy.numpy(), oracle.energy, rtol=1e-9)
    assert report.residual == pytest.approx(oracle.residual.mean())
    assert report.sweeps == pc.config.sweeps
    weights = [*(layer.weight for layer in model.layers), model.head.weight]
    for weight, gradient in zip(weights, oracle.gradients, strict=True):
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad  # no signal may have come so far
        np.testing.assert_allclose(found.numpy(), gradient / Y.numel(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("piecewise", [True, False])
@pytest.mark.parametrize(("solver", "rate"), [("state", 0.0), ("lagrangian", 0.5)])
def test_every_sweep(solver: str, rate: float, piecewise: bool) -> None:
    """At any number of sweeps states, errors, energies, residual and gradients are those of the written-out method.

    Both ways of differentiating, nodes of unequal precision; multipliers follow the errors of the pass before.
    """
    for sweeps in range(1, 7):
        model = LinearChain(layers=len(PRECISION), width=WIDTH)
        pc = attach(model, sweeps, solver=solver, step_size=0.3)
        pc.solver.piecewise = piecewise  # type: ignore[attr-defined]
        check(model, pc, expected(model, sweeps, 0.3, multiplier_rate=rate))


def test_sweeps_under_autocast_see_the_weights_that_moved() -> None:
    """Autocast keeps a copy of each weight that learns: a step of the weights makes it an old one."""
    found = []
    for moves in (0.0, 1.0):
        model = make("gpt2")
        config = PCConfig(solver="state", sweeps=3, relative_std=0.3, step_size=0.0001, weight_update="every_sweep")
        optimizer = torch.optim.SGD(model.parameters(), lr=moves)

        def step(loss: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with torch.autocast("cpu", torch.bfloat16):
            found.append(PCModel(model, config).accumulate_grad(**batch(), weight_step=step).free_energy)
    assert abs(found[0] - found[1]) > 0.01


def test_the_automatic_step_of_the_lagrangian_is_fixed() -> None:
    """Its objective has a saddle, which no guard on a free energy could hold: "auto" is 0.4."""
    model = LinearChain(layers=len(PRECISION), width=WIDTH)
    check(model, attach(model, 5, solver="lagrangian"), expected(model, 5, 0.4, multiplier_rate=0.5))


@pytest.mark.parametrize("piecewise", [True, False])
@pytest.mark.parametrize(("solver", "rate"), [("state", 0.0), ("lagrangian", 0.5)])
def test_weights_that_move_with_the_states(solver: str, rate: float, piecewise: bool) -> None:
    """Incremental PC: in each sweep the weights step down the gradients of that sweep, per label as the loss is."""
    model = LinearChain(layers=len(PRECISION), width=WIDTH)
    oracle = expected(model, 5, 0.3, multiplier_rate=rate, weight_rate=0.2)
    pc = attach(model, 5, solver=solver, step_size=0.3, weight_update="every_sweep")
    pc.solver.piecewise = piecewise  # type: ignore[attr-defined]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def step(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    check(model, pc, oracle, step)


@pytest.mark.parametrize(("optimizer", "momentum"), [("SGD", 0.0), ("SGD(momentum=0.8)", 0.8)])
def test_sgd_is_the_fixed_step_with_momentum(optimizer: str, momentum: float) -> None:
    """torch.optim.SGD moves the states as the solver itself does, whatever the precisions, and remembers its moves."""
    for sweeps in (2, 5):
        model = LinearChain(layers=len(PRECISION), width=WIDTH)
        pc = attach(model, sweeps, solver="state", step_size=0.3, state_optimizer=optimizer)
        check(model, pc, expected(model, sweeps, 0.3, momentum=momentum))


def test_adam_moves_in_standard_deviations() -> None:
    """Its first step has the length of the learning rate in each coordinate, in units of 1 / sqrt(precision)."""
    model = LinearChain(layers=len(PRECISION), width=WIDTH)
    pc = attach(model, 2, solver="state", step_size=0.01, state_optimizer="Adam(eps=1e-30)")
    top = list(pc.relax(inputs=X, labels=Y).errors.values())[-1]  # the only one that a signal reaches in a sweep
    torch.testing.assert_close(top.abs(), torch.full_like(top, 0.01 * PRECISION[-1] ** -0.5))


@pytest.mark.parametrize(("optimizer", "factor"), [("Adam(eps=1e-30)", 0.25), ("SGD(momentum=0.8)", 0.25)])
def test_an_optimizers_moves_have_the_nodes_factor(optimizer: str, factor: float) -> None:
    """Also those of an optimizer that divides by the size of what it is given."""
    model, found = LinearChain(layers=1, width=WIDTH), []
    for own in (1.0, factor):
        nodes = [NodeSpec("blocks.0", precision=2.0, step_factor=own)]
        settings: dict[str, Any] = {"solver": "state", "step_size": 0.01, "state_optimizer": optimizer}
        pc = PCModel(model, PCConfig(nodes=nodes, output="gaussian", sweeps=2, **settings))
        found.append(pc.relax(inputs=X, labels=Y).errors["blocks.0"])
        pc.detach()
    torch.testing.assert_close(found[1], factor * found[0])
