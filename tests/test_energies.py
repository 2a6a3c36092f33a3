"""Each energy against autograd and torch.distributions in float64, and at values where naive formulas break."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Laplace, Normal, kl_divergence

from hf_pc.energies import (
    ENERGIES,
    Energy,
    GaussianEnergy,
    LearnedVarianceEnergy,
    LogitEnergy,
    relative_precision,
    wide,
)

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


def fresh(name: str, mu: Tensor) -> Energy:
    """An energy that has met a prediction; a learned one has learned something."""
    energy = ENERGIES[name]()
    energy.load_state_dict({"log_std": torch.linspace(-0.5, 0.7, mu.shape[-1]).tolist()})
    energy.check(mu, "node")
    return energy


@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_energy_says_of_itself(name: str) -> None:
    """What uses no prediction needs none, the others do; E is zero at rest or says that it is not; logits are nats."""
    error, mu = draw()
    energy, p = fresh(name, mu), torch.full((), 1.7, dtype=torch.float64)
    for method in (energy.energy, energy.grad_state, energy.grad_prediction, energy.precondition):
        if energy.uses_prediction:
            assert not torch.allclose(method(error, mu, p), method(error, 2 * mu, p))
        else:
            assert torch.equal(method(error, mu, p), method(error, None, p))
    at_rest = energy.energy(torch.zeros_like(error), mu, p)
    assert at_rest.shape == mu.shape[:-1]
    assert bool((at_rest == 0).all()) is energy.zero_at_rest
    for method in (energy.grad_state, energy.grad_prediction):
        assert (method(torch.zeros_like(error), mu, p) == 0).all()
    assert energy.in_nats is (name in ("categorical", "bernoulli"))
    assert bool(energy.state_dict()) is (name == "learned_variance")


@pytest.mark.parametrize("name", FAMILIES)
def test_squares_are_in_units_of_the_curvature(name: str) -> None:
    """square(g) is g times the preconditioned g, summed over features, one number per token."""
    gradient, mu = draw(3)
    energy = fresh(name, mu)
    p = torch.rand(2, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    found = energy.square(gradient, mu, p)
    assert found.shape == (2, 3, 1)
    torch.testing.assert_close(found, (gradient * energy.precondition(gradient, mu, p)).sum(-1, keepdim=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_activity_leaves_out_what_is_masked(name: str) -> None:
    """Of logits what is under -1e4 is no activity, of states everything is; the rest is as it was."""
    mu = torch.tensor([[3.0, -1.1e4, -9.9e3, float("-inf")]])
    logits = name in ("categorical", "bernoulli")
    expected = torch.tensor([[3.0, 0.0, -9.9e3, 0.0]]) if logits else mu
    assert torch.equal(ENERGIES[name]().activity(mu), expected)


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_logits_are_divided_by_their_curvature(name: str) -> None:
    """p s (1 - s) of a Bernoulli, p s of a categorical, in float32 or wider, and a thousandth where that is more."""
    energy = ENERGIES[name]()
    assert isinstance(energy, LogitEnergy)
    mu = torch.tensor([[[0.0, 1.0, -9.0]]], dtype=torch.bfloat16).repeat(1, 2, 1)
    s = mu.float().softmax(-1) if name == "categorical" else mu.float().sigmoid() * (-mu.float()).sigmoid()
    torch.testing.assert_close(energy.curvature(mu), s)
    assert s[0, 0, 2] < 1e-3 < s[0, 0, 1]
    expected = 5.0 / (2 * torch.cat([s[..., :2], torch.full((1, 2, 1), 1e-3)], -1))
    torch.testing.assert_close(energy.precondition(torch.full((1, 2, 3), 5.0), mu, torch.tensor(2.0)), expected)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"learned_variance"}))
def test_most_energies_learn_nothing(name: str) -> None:
    """Without parameters of its own an energy observes and steps in vain, and restores anything."""
    error, mu = draw()
    energy, one = ENERGIES[name](), torch.ones((), dtype=torch.float64)
    before = energy.energy(error, mu, one)
    energy.observe(error, one)
    energy.step(lambda total: total)
    energy.load_state_dict({"log_std": [1.0]})
    assert energy.state_dict() == {}
    assert torch.equal(energy.energy(error, mu, one), before)


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


@pytest.mark.parametrize(
    ("mu", "x", "expected"),
    [([0.0, 0.0], [-800.0, 0.0], math.log(2)), ([-800.0, 0.0], [0.0, 0.0], 400 - math.log(2))],
)
def test_probabilities_that_vanish(mu: list[float], x: list[float], expected: float) -> None:
    """What is impossible in float64 on one side alone still counts: KL of (0, 1) or (1/2, 1/2) to the other."""
    below, above = (torch.tensor([values], dtype=torch.float64) for values in (mu, x))
    energy, one = ENERGIES["categorical"](), torch.ones((), dtype=torch.float64)
    assert float(energy.energy(above - below, below, one)) == pytest.approx(expected, rel=1e-12)
    difference = above.softmax(-1) - below.softmax(-1)
    torch.testing.assert_close(energy.grad_prediction(above - below, below, one), -difference)


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


@pytest.mark.parametrize("name", ["gaussian", "laplace", "bernoulli", "learned_variance"])
def test_preconditioning_is_newtons(name: str) -> None:
    """At e = 0 a preconditioned gradient is the gradient divided by the second derivative."""
    _, mu = draw(scale=0.5)
    energy, p = fresh(name, mu), torch.full((), 1.7, dtype=torch.float64)
    small = torch.full_like(mu, 1e-6)
    second = energy.grad_state(small, mu, p) / small
    torch.testing.assert_close(energy.precondition(torch.ones_like(mu), mu, p), 1 / second, rtol=1e-4, atol=0)


def test_categorical_width_one_is_refused() -> None:
    """One logit has no distribution: the error names the node and its width."""
    ENERGIES["categorical"]().check(torch.zeros(2, 2), "head")
    with pytest.raises(ValueError, match="'head' has width 1"):
        ENERGIES["categorical"]().check(torch.zeros(2, 3, 1), "head")


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


def test_learned_variance_over_batches_and_processes() -> None:
    """Batches and processes add up to one mean over tokens, taken at the given rate; a step starts anew."""
    errors = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.full((), 1.7, dtype=torch.float64)
    expected = torch.linspace(-0.5, 0.7, 3, dtype=torch.float64)
    expected = expected - 0.05 * (1 - 1.7 * (-2 * expected).exp() * errors.square()).mean((0, 1))
    for parts, processes in ((1, 1), (2, 1), (4, 3)):
        energy = fresh("learned_variance", errors)
        for part in errors.chunk(parts):
            energy.observe(part, p)
        energy.step(lambda total, count=processes: count * total)  # type: ignore[misc]
        torch.testing.assert_close(torch.tensor(energy.state_dict()["log_std"], dtype=torch.float64), expected)
        before = energy.state_dict()
        energy.step(lambda total: total)  # nothing was observed since
        energy.observe(torch.zeros_like(errors), p)  # no signal came to any token
        energy.step(lambda total: total)
        assert energy.state_dict() == before


def test_learned_variance_stays_within_its_limits() -> None:
    """log sigma ends at -2 and 2 however small and large the errors are; other states and widths are refused."""
    energy, one = LearnedVarianceEnergy(), torch.ones(())
    assert energy.state_dict() == {}
    energy.step(lambda total: total)
    errors = torch.tensor([[1e-6, 1e6]])
    energy.check(errors, "node")
    assert energy.state_dict() == {"log_std": [0.0, 0.0]}
    for _ in range(60):
        energy.observe(errors, one)
        energy.step(lambda total: total)
    assert energy.state_dict() == {"log_std": [-2.0, 2.0]}
    energy.load_state_dict(energy.state_dict())
    energy.load_state_dict({})
    assert energy.state_dict() == {"log_std": [-2.0, 2.0]}
    for wrong in ([2.1], [-2.1], ["1"], [True], 1.0):
        with pytest.raises(ValueError, match="numbers from -2 to 2 are needed"):
            energy.load_state_dict({"log_std": wrong})
    with pytest.raises(ValueError, match="'node' has width 3, its learned variance 2"):
        energy.check(torch.zeros(1, 3), "node")


def test_padding_teaches_no_variance() -> None:
    """Tokens that no signal came to are not counted: with and without them the learned sigma is the same."""
    found = []
    for padded in (False, True):
        energy = ENERGIES["learned_variance"]()
        error = torch.full((2, 3, 4), 0.5)
        error[..., 1] = 0.0  # one feature without an error is no padding
        energy.check(error, "node")
        energy.observe(torch.cat([error, torch.zeros(2, 5, 4)], 1) if padded else error, torch.ones(()))
        energy.step(lambda total: total)
        found.append(energy.state_dict())
    assert found[0] == found[1]
    assert found[0]["log_std"] == pytest.approx([-0.0375, -0.05, -0.0375, -0.0375])


def test_relative_precision_is_per_token() -> None:
    """1 / (relative_std RMS)^2 of each token, whatever the other tokens are."""
    _, mu = draw()
    found = relative_precision(mu, 0.2)
    torch.testing.assert_close(found, 1 / (0.04 * mu.square().mean(-1, keepdim=True)))
    torch.testing.assert_close(relative_precision(mu[:1], 0.2), found[:1])


def test_relative_precision_of_nothing_and_of_little_digits() -> None:
    """A prediction of zeros has a finite precision, 1 / (relative_std eps)^2; bfloat16 is measured in float32."""
    mu = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    found = relative_precision(mu, 0.5)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.full((1, 1), (0.5 * torch.finfo(torch.float32).eps) ** -2))
    for dtype, expected in ((torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert wide(torch.ones(1, dtype=dtype)).dtype == expected


def test_gaussian_squares_and_laplace_tails() -> None:
    """Far out a Laplace energy is u - 1 and its gradient sqrt(p); a Gaussian's is p e^2 / 2 however far."""
    error, p = torch.tensor([[1e3]], dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    laplace, gaussian = ENERGIES["laplace"](), ENERGIES["gaussian"]()
    assert float(laplace.energy(error, None, p)) == 2e3 - 1
    assert float(laplace.grad_state(error, None, p)) == 2.0
    assert float(laplace.grad_prediction(-error, None, p)) == 2.0
    assert float(gaussian.energy(error, None, p)) == pytest.approx(2e6)
    assert float(gaussian.grad_state(error, None, p)) == 4e3


def test_the_series_of_a_bernoulli() -> None:
    """Under its limit the series in the error has the closed form's value to float32's digits."""
    error = torch.tensor([[0.029, -0.029, 0.02]])
    mu = torch.tensor([[-0.5, 0.8, 1.5]])
    exact = kl_divergence(Bernoulli(logits=(mu.double() + error.double())), Bernoulli(logits=mu.double())).sum(-1)
    found = ENERGIES["bernoulli"]().energy(error, mu, torch.ones(()))
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["energy", "grad_state", "grad_prediction"])
def test_a_prediction_of_few_digits(name: str, method: str) -> None:
    """Errors are float32 beside a bfloat16 prediction: everything is computed in float32."""
    error, mu = (values.float() for values in draw())
    low, one = mu.bfloat16(), torch.ones(())
    energy = fresh(name, mu)
    found = getattr(energy, method)(error, low, one)
    assert found.dtype == torch.float32
    assert torch.equal(found, getattr(energy, method)(error, low.float(), one))


@pytest.mark.parametrize("size", [1e10, 1e17, 1e20, 1e100])
def test_errors_of_any_size_leave_probabilities(size: float) -> None:
    """dE/dmu of a categorical node is a difference of two distributions, however far the errors have run."""
    direction, error = draw()
    for mu in (direction, size * direction):
        down = ENERGIES["categorical"]().grad_prediction(size * error, mu, torch.tensor(1.0, dtype=torch.float64))
        reached = torch.nn.functional.one_hot((mu + size * error).argmax(-1), mu.shape[-1])
        torch.testing.assert_close(down, mu.softmax(-1) - reached, rtol=1e-9, atol=1e-9)


def test_what_changes_a_quadratic_energy_is_not_quadratic() -> None:
    """The shortcuts of p/2 |x - mu|^2 are those of the class that says so, not of one that is made from it."""

    class Clipped(GaussianEnergy):
        def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
            return precision * error.clamp(-0.1, 0.1)

    error, signal = draw()
    precision = torch.tensor(2.0, dtype=torch.float64)
    assert [cls().quadratic for cls in (GaussianEnergy, Clipped, LearnedVarianceEnergy)] == [True, False, False]
    for energy in (GaussianEnergy(), Clipped()):
        found = energy.gradient(error, None, precision, signal)
        torch.testing.assert_close(found, energy.grad_state(error, None, precision) + signal)


def test_learned_variance_takes_no_step_that_is_no_number() -> None:
    """Errors that are not finite, as of a loss scaled too far, leave sigma as it was; the next step counts."""
    energy = LearnedVarianceEnergy()
    energy.check(torch.zeros(1, 3), "n")
    precision = torch.tensor(1.0, dtype=torch.float64)
    for value in (math.inf, math.nan):
        energy.observe(torch.full((2, 3), value, dtype=torch.float64), precision)
        energy.step(lambda total: total)
        assert energy.state_dict() == {"log_std": [0.0, 0.0, 0.0]}
    energy.observe(torch.full((2, 3), 2.0, dtype=torch.float64), precision)
    energy.step(lambda total: total)
    assert min(energy.state_dict()["log_std"]) > 0
