"""The solver that draws errors: their distribution, what is learned from it, and where its noise comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles.linear import LinearChain
from test_invariants import batch, gradients, make, worst

from hf_pc import NodeSpec, PCConfig, PCModel

WIDTH, COPIES = 3, 100000
PRECISION, FACTOR = (2.0, 5.0), (1.0, 0.6)
X, Y = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64).unbind()
MANY = {"inputs": X.expand(COPIES, -1), "labels": Y.expand(COPIES, -1)}


def attach(model: LinearChain, factors: tuple[float, ...] = (1.0, 1.0), **settings: object) -> PCModel:
    nodes = [NodeSpec(f"blocks.{i}", precision=p, step_factor=factors[i]) for i, p in enumerate(PRECISION)]
    return PCModel(model, PCConfig(nodes=nodes, output="gaussian", solver="langevin", precision=1.0, **settings))  # type: ignore[arg-type]


def moments(model: LinearChain, sweeps: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the errors of all nodes in a row, after so many sweeps, the last of which moves none."""
    head, first = model.head.weight.detach().numpy(), model.matrices()
    jacobian = np.hstack([head @ first[1], head])
    r = Y.numpy() - head @ first[1] @ first[0] @ X.numpy()
    p, k = np.repeat(PRECISION, WIDTH), rate * np.repeat(FACTOR, WIDTH)
    # e' = e - k (e + (J' J e - J' r) / p) + sqrt(k (2 - k) / p) n
    forward = np.eye(2 * WIDTH) - (k * (np.eye(2 * WIDTH) + jacobian.T @ jacobian / p[:, None]).T).T
    mean, covariance = np.zeros(2 * WIDTH), np.zeros((2 * WIDTH, 2 * WIDTH))
    for _ in range(sweeps - 1):
        mean = forward @ mean + k * (jacobian.T @ r) / p
        covariance = forward @ covariance @ forward.T + np.diag(k * (2 - k) / p)
    return mean, covariance


@pytest.mark.parametrize(("sweeps", "rate"), [(1, 0.5), (2, 0.5), (2, 1.0), (3, 1.4), (12, 0.3)])
def test_errors_have_the_moments_of_the_chain(sweeps: int, rate: float) -> None:
    """Mean and covariance are those of the linear recursion, to five standard errors of 100,000 draws."""
    torch.manual_seed(0)
    model = LinearChain(layers=2, width=WIDTH)
    errors = torch.cat(
        [*attach(model, FACTOR, sweeps=sweeps, step_size=rate).relax(**MANY).errors.values()], 1
    ).numpy()
    mean, covariance = moments(model, sweeps, rate)
    spread = np.sqrt(np.diag(covariance))
    assert (np.abs(errors.mean(0) - mean) <= 5 * spread / COPIES**0.5).all()
    allowed = 5 * np.sqrt((np.outer(spread, spread) ** 2 + covariance**2) / COPIES)
    assert (np.abs(np.cov(errors.T) - covariance) <= allowed + 1e-12).all()


def test_what_is_learned_is_the_likelihoods_gradient() -> None:
    """On average the gradient is that of -log p(y), a Gaussian whose covariance the errors widen; not backprop's."""
    torch.manual_seed(0)
    model = LinearChain(layers=2, width=WIDTH)
    way = model.head.weight @ model.layers[1].weight
    covariance = torch.eye(WIDTH) + way @ way.T / PRECISION[0] + model.head.weight @ model.head.weight.T / PRECISION[1]
    mean = way @ model.layers[0].weight @ X
    likelihood = torch.distributions.MultivariateNormal(mean, covariance).log_prob(Y)
    (-likelihood / WIDTH).backward()
    expected = gradients(model)
    model.zero_grad()
    pc = attach(model, sweeps=25, step_size=0.2)
    pc.accumulate_grad(**MANY)
    found = gradients(model)
    model.zero_grad()
    pc.backprop_loss(MANY).backward()  # type: ignore[no-untyped-call]
    assert worst(found, expected) < 0.02
    assert worst(gradients(model), expected) > 0.2


def test_one_sweep_is_backprop() -> None:
    """With no sweep to move in, nothing is drawn."""
    model = make("gpt2")
    PCModel(model, PCConfig(solver="langevin", relative_std=0.5, sweeps=1)).accumulate_grad(**batch())
    found = gradients(model)
    model.zero_grad()
    model(**batch()).loss.backward()
    assert worst(found, gradients(model)) < 1e-5


def drawn(seed: int = 0, steps: int = 1, **settings: object) -> dict[str, torch.Tensor]:
    """The errors of the last of several steps on a batch with dropout."""
    pc = PCModel(make("gpt2", dropout=0.1), PCConfig(solver="langevin", relative_std=0.5, **settings))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for _ in range(steps):
        found = pc.relax(**batch())
    return found.errors


def test_noise_is_new_in_each_sweep_and_each_step() -> None:
    """Masks are the same in all sweeps of a step; the noise is not, though one seed gives both."""
    once, again, later, other = drawn(), drawn(), drawn(steps=2), drawn(seed=1)
    longer, short = drawn(sweeps=9, step_size=0.01), drawn(sweeps=2, step_size=0.01)
    for name, error in once.items():
        assert torch.equal(error, again[name])
        assert not torch.allclose(error, later[name])
        assert not torch.allclose(error, other[name])
        # eight moves of the same noise would go eight times as far as one, of new noise the root of it
        assert 2.5 < float(longer[name].norm() / short[name].norm()) < 3.2


def test_the_automatic_rate_is_a_half() -> None:
    """step_size="auto" draws what 0.5 does; a rate of up to 2 is allowed where no node has a factor of its own."""
    found = [drawn(step_size=rate) for rate in ("auto", 0.5, 1.9)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_padding_is_not_drawn() -> None:
    """Where the mask is 0 no state moves."""
    mask = batch()["attention_mask"].bool()
    for error in drawn(sweeps=4).values():
        assert not error[~mask].any()
        assert error[mask].all()


def test_checkpointing_changes_nothing() -> None:
    """Blocks that run again in the backward pass see the errors that were drawn."""
    found = []
    for checkpointing in (False, True):
        model = make("gpt2")
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        PCModel(model, PCConfig(solver="langevin", relative_std=0.5, sweeps=4)).accumulate_grad(**batch())
        found.append(gradients(model))
    assert worst(*found) < 1e-5


@pytest.mark.parametrize("sweeps", [1, 4])
def test_a_step_factor_is_of_the_moves_alone(sweeps: int) -> None:
    """Where the prior leaves no room for errors the gradient is backprop's, however small or large the moves are."""
    model = make("gpt2")
    model(**batch()).loss.backward()
    expected = gradients(model)
    for factor in (0.5, 1.5):
        model.zero_grad()
        config = PCConfig(
            nodes=[NodeSpec(r".*h\.\d", step_factor=factor)], solver="langevin", relative_std=1e-5, sweeps=sweeps
        )
        pc = PCModel(model, config)
        pc.accumulate_grad(**batch())
        pc.detach()
        assert worst(gradients(model), expected) < 1e-3


def test_a_sequence_without_labels_has_no_residual() -> None:
    """Its errors are those of the prior; nothing of it enters the mean residual."""
    given = batch()
    given["labels"][1] = -100
    pc = PCModel(make("gpt2"), PCConfig(solver="langevin", relative_std=0.3))
    assert 0 < pc.relax(**given).residual < 1e3
    assert 0 < pc.accumulate_grad(**given).residual < 1e3


def test_each_device_has_its_own_noise() -> None:
    """Equal places of two devices get different draws, and another relaxation with the same seed the same."""
    pc = PCModel(make("gpt2"), PCConfig(solver="langevin", relative_std=0.3))
    with pc.relaxed(batch()) as relaxation:
        seed = relaxation.seed
        relaxation._generators.clear()
        first, second = (
            torch.rand(8, generator=relaxation.generator(torch.device(name))) for name in ("cpu", "cpu:0")
        )
    assert seed is not None
    assert torch.equal(first, torch.rand(8, generator=torch.Generator().manual_seed(seed)))
    assert not torch.allclose(first, second)
