"""Each energy against autograd and torch.distributions in float64, and at values where naive formulas break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Laplace, Normal, kl_divergence

from hf_pc.energies import ENERGIES, LearnedVarianceEnergy, relative_precision

Family = Callable[[Tensor], Distribution]
FAMILIES: dict[str, Family] = {
    "gaussian": lambda x: Normal(x, torch.ones_like(x)),
    "laplace": lambda x: Laplace(x, torch.ones_like(x)),
    "categorical": lambda x: Categorical(logits=x),
    "bernoulli": lambda x: Bernoulli(logits=x),
    "learned_variance": lambda x: Normal(x, torch.ones_like(x)),
}


def draw(seed: int = 0, scale: float = 1.0, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, width)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def test_every_energy_is_tested() -> None:
    """The list of this file is the registry's."""
    assert set(FAMILIES) <= set(ENERGIES.names())


@pytest.mark.parametrize("name", FAMILIES)
def test_value_is_the_divergence(name: str) -> None:
    """E(x, mu) = p KL[X(x) || X(mu)], summed over features; its scale is the precision, for a Laplace 1/b^2."""
    error, mu = draw()
    energy = ENERGIES[name]()
    energy.check(mu, "node")
    one = torch.ones((), dtype=torch.float64)
    expected = kl_divergence(FAMILIES[name](mu + error), FAMILIES[name](mu))
    expected = expected if expected.dim() == 2 else expected.sum(-1)
    torch.testing.assert_close(energy.energy(error, mu, one), expected, rtol=1e-12, atol=1e-13)
    if name != "laplace":  # there p is inside
        precision = torch.full((2, 3, 1), 2.5, dtype=torch.float64)
        torch.testing.assert_close(energy.energy(error, mu, precision), 2.5 * expected, rtol=1e-12, atol=1e-13)
    else:
        wide = kl_divergence(Laplace(mu + error, 2.0), Laplace(mu, 2.0)).sum(-1)
        torch.testing.assert_close(energy.energy(error, mu, one / 4), wide, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.01, 1.0, 10.0]))
def test_gradients_are_autograds(name: str, seed: int, scale: float) -> None:
    """grad_state and grad_prediction are the derivatives of the energy, at any scale."""
    error, mu = draw(seed, scale)
    x = (mu + error).requires_grad_()
    mu = mu.clone().requires_grad_()
    energy = ENERGIES[name]()
    energy.check(mu, "node")
    precision = torch.full((2, 3, 1), 1.7, dtype=torch.float64)
    value = energy.energy(x - mu, mu, precision).sum()
    by_state, by_prediction = torch.autograd.grad(value, (x, mu))
    error = (x - mu).detach()
    torch.testing.assert_close(energy.grad_state(error, mu.detach(), precision), by_state, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        energy.grad_prediction(error, mu.detach(), precision), by_prediction, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(name: str, dtype: torch.dtype) -> None:
    """Logits of +-1e4 give finite energies and gradients, and no divergence is negative."""
    mu = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 0.0, -1e4]], dtype=dtype)
    for x in (mu, -mu, mu.flip(0), mu + 1e-3, torch.zeros_like(mu)):
        one = torch.ones((), dtype=dtype)
        energy = ENERGIES[name]()
        found = energy.energy(x - mu, mu, one)
        assert found.isfinite().all()
        assert (found >= 0).all()
        for gradient in (energy.grad_state(x - mu, mu, one), energy.grad_prediction(x - mu, mu, one)):
            assert gradient.isfinite().all()
            assert energy.precondition(gradient, mu, one).isfinite().all()


@pytest.mark.parametrize("masked", [float("-inf"), torch.finfo(torch.float32).min])
def test_masked_logits(masked: float) -> None:
    """A masked logit has probability zero in state and prediction: it changes neither energy nor gradient."""
    error, mu = (values.float() for values in draw())
    energy, one = ENERGIES["categorical"](), torch.ones(())
    open_error, open_mu = error[..., :3], mu[..., :3]
    closed = torch.cat([open_mu, torch.full((2, 3, 2), masked)], -1)
    padded = torch.cat([open_error, torch.zeros(2, 3, 2)], -1)
    torch.testing.assert_close(energy.energy(padded, closed, one), energy.energy(open_error, open_mu, one))
    for method in ("grad_state", "grad_prediction"):
        found = getattr(energy, method)(padded, closed, one)
        torch.testing.assert_close(found[..., :3], getattr(energy, method)(open_error, open_mu, one))
        assert (found[..., 3:] == 0).all()


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.05, 1.0])
@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_small_errors_keep_their_digits(name: str, size: float) -> None:
    """In float32 the divergence of small errors at large logits is right to 0.3%, where its closed form is noise."""
    error, mu = draw(width=64)
    error, mu = error * size, mu * 3
    exact = kl_divergence(FAMILIES[name](mu + error), FAMILIES[name](mu))
    exact = exact if exact.dim() == 2 else exact.sum(-1)
    found = ENERGIES[name]().energy(error.float(), mu.float(), torch.ones(()))
    torch.testing.assert_close(found.double(), exact, rtol=3e-3, atol=0)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "bernoulli"])
def test_preconditioning_is_newtons(name: str) -> None:
    """At e = 0 a preconditioned gradient is the gradient divided by the second derivative."""
    _, mu = draw(scale=0.5)
    energy, p = ENERGIES[name](), torch.full((), 1.7, dtype=torch.float64)
    small = torch.full_like(mu, 1e-6)
    second = energy.grad_state(small, mu, p) / small
    torch.testing.assert_close(energy.precondition(torch.ones_like(mu), mu, p), 1 / second, rtol=1e-4, atol=0)


def test_categorical_width_one_is_refused() -> None:
    """One logit has no distribution: the error names the node and its width."""
    with pytest.raises(ValueError, match="'head' has width 1"):
        ENERGIES["categorical"]().check(torch.zeros(2, 1), "head")


def test_learned_variance_goes_to_the_errors() -> None:
    """Stepping on errors of fixed spread moves sigma to that spread, and the energy is -log N without its constant."""
    energy, one = LearnedVarianceEnergy(), torch.ones((), dtype=torch.float64)
    spread = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    errors = spread * torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy.check(errors, "node")
    for _ in range(200):
        energy.observe(errors, one)
        energy.step(lambda total: total)
    assert energy.log_std is not None
    torch.testing.assert_close(energy.log_std.exp(), errors.square().mean(0).sqrt(), rtol=1e-3, atol=0)
    expected = -Normal(torch.zeros(3, dtype=torch.float64), energy.log_std.exp()).log_prob(errors).sum(-1)
    constant = 1.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(energy.energy(errors, None, one), expected - constant)
    restored = LearnedVarianceEnergy()
    restored.load_state_dict(energy.state_dict())
    assert torch.equal(restored.log_std, energy.log_std)  # type: ignore[arg-type]


def test_padding_teaches_no_variance() -> None:
    """Tokens that no signal came to are not counted: with and without them the learned sigma is the same."""
    found = []
    for padded in (False, True):
        energy = ENERGIES["learned_variance"]()
        error = torch.full((2, 3, 4), 0.5)
        energy.check(error, "node")
        energy.observe(torch.cat([error, torch.zeros(2, 5, 4)], 1) if padded else error, torch.ones(()))
        energy.step(lambda total: total)
        found.append(energy.state_dict())
    assert found[0] == found[1]
    assert found[0]["log_std"][0] < 0


def test_relative_precision_is_per_token() -> None:
    """1 / (relative_std RMS)^2 of each token, whatever the other tokens are."""
    _, mu = draw()
    found = relative_precision(mu, 0.2)
    torch.testing.assert_close(found, 1 / (0.04 * mu.square().mean(-1, keepdim=True)))
    torch.testing.assert_close(relative_precision(mu[:1], 0.2), found[:1])
