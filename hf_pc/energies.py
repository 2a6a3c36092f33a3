"""Energies of internal nodes: E(x, mu), the divergence between a node's state and its prediction.

Every energy works on the error e = x - mu and the prediction mu, because a small error beside a large prediction
would be lost in x. Values are nats, summed over the features of a token and over nothing else: [..., features] gives
[...]. Gradients have the shape of the state. Each energy is p KL[X(x) || X(mu)] of a distribution X with natural
parameter or mean x (Pinchetti et al. 2022, arXiv 2211.03481, section 3); p is the precision. The energies of output
nodes, where x is data, are in `hf_pc.output`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_pc.dtypes import wide, wide_dtype
from hf_pc.registry import Registry


class Energy(ABC):
    """One divergence between a state x = mu + e and its prediction mu, scaled by a precision p.

    `precision` broadcasts against the state: a number, or a tensor [..., 1] with one value per token.
    """

    #: whether the gradients need mu itself; the Gaussian's depend on the error alone
    uses_prediction: bool = True
    #: whether E is zero where x = mu
    zero_at_rest: bool = True
    #: whether E is p/2 |x - mu|^2: then a full step ends at -g/p, wherever it begins, and what goes down is g itself;
    #: each class says so anew, as one that changes a method of such a class is another energy. What it has for
    #: `grad_state`, for `precondition` in a step, and in a full last step for `grad_prediction` and `observe`, is then
    #: not called
    quadratic: bool = False
    #: whether the unit of the states is the nat, whatever the node's activity, so that relative_std counts in it
    in_nats: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.quadratic = cls.__dict__.get("quadratic", False)

    @abstractmethod
    def energy(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        """E(mu + e, mu), [...] for errors of shape [..., features], in nats per token."""

    @abstractmethod
    def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        """dE/dx at fixed mu."""

    @abstractmethod
    def grad_prediction(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        """dE/dmu at fixed x: the signal that a node's own weights learn from."""

    def gradient(self, error: Tensor, prediction: Tensor | None, precision: Tensor, signal: Tensor) -> Tensor:
        """dF/dx: dE/dx and the signal from above, g."""
        if self.quadratic:
            return torch.addcmul(signal, precision, error)
        return self.grad_state(error, prediction, precision) + signal

    def precondition(self, gradient: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        """The gradient divided by the curvature d2E/dx2 at e = 0, so that a full step minimises E plus a plane."""
        return gradient / precision

    def square(self, gradient: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        """|gradient|^2 in units of the curvature, per token, [..., 1]: nats, whatever the scale of the states."""
        return (gradient * self.precondition(gradient, prediction, precision)).sum(-1, keepdim=True)

    def activity(self, prediction: Tensor) -> Tensor:
        """What |mu| is measured on: the prediction without its masked features."""
        return prediction

    def check(self, prediction: Tensor, name: str) -> None:
        """Raise ValueError if a node with this prediction, [..., features], cannot have this energy."""

    def observe(self, error: Tensor, precision: Tensor) -> None:
        """Note the errors of a learned batch, [..., features]; for energies with parameters of their own."""

    def step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Learn from what was noted, once per optimiser step; `reduce` sums a tensor over processes."""

    def state_dict(self) -> dict[str, Any]:
        """What `step` has learned, ready for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


ENERGIES: Registry[type[Energy]] = Registry("energy")
register_energy = ENERGIES.register


@register_energy("gaussian")
class GaussianEnergy(Energy):
    """E = p/2 |x - mu|^2, p = 1/sigma^2 held fixed while the states relax (arXiv 2211.03481, eq. 3)."""

    uses_prediction = False
    quadratic = True

    def energy(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        # per token or one number, the precision is constant over the features that are summed
        squares: Tensor = torch.linalg.vector_norm(error, dim=-1, keepdim=True).square()
        weighted: Tensor = 0.5 * precision * squares
        return weighted.squeeze(-1)

    def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        return precision * error

    def grad_prediction(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        return -precision * error

    def square(self, gradient: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        squares: Tensor = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).square() / precision
        return squares


@register_energy("laplace")
class LaplaceEnergy(Energy):
    """KL of Laplace distributions of scale b = 1/sqrt(p): u + exp(-u) - 1 with u = |x - mu| / b, summed.

    Quadratic like a Gaussian of precision p near zero, linear far out: one large error costs little.
    """

    uses_prediction = False

    def energy(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        u = error.abs() * precision.sqrt()
        total: Tensor = (u + torch.expm1(-u)).sum(-1)
        return total

    def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        scale = precision.sqrt()
        return -scale * error.sign() * torch.expm1(-error.abs() * scale)

    def grad_prediction(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        return -self.grad_state(error, prediction, precision)


class LogitEnergy(Energy):
    """Of distributions whose parameters are logits: their unit is the nat, whatever the activity of the node."""

    in_nats = True
    #: logits under this stand for what cannot be
    MASKED = -1e4
    #: least curvature that preconditioning divides by, so that features of vanishing probability stay put
    CURVATURE_FLOOR = 1e-3

    @abstractmethod
    def curvature(self, prediction: Tensor) -> Tensor:
        """The diagonal of d2E/dx2 at e = 0 and p = 1, shaped as the state."""

    def activity(self, prediction: Tensor) -> Tensor:
        return torch.where(prediction > self.MASKED, prediction, 0)

    def precondition(self, gradient: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        assert prediction is not None
        return gradient / (precision * self.curvature(prediction).clamp_min(self.CURVATURE_FLOOR))


@register_energy("categorical")
class CategoricalEnergy(LogitEnergy):
    """p KL[s(x) || s(mu)], s the softmax over features (arXiv 2211.03481, section 3.2). Masked logits may be -inf."""

    def energy(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        assert prediction is not None
        ratio, below, state = self._compare(error, prediction)
        # both forms are sum s(x) log(s(x)/s(mu)) with sum s(x) - s(mu) = 0 added, so that no term is negative; the
        # first keeps its digits where x is near mu
        near = below * (ratio * ratio.clamp(max=1.0).exp() - torch.expm1(ratio.clamp(max=1.0)))
        divergence: Tensor = torch.where(ratio.abs() < 1, near, state * ratio - state + below).sum(-1)
        return divergence * self._per_token(precision)

    def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        assert prediction is not None
        ratio, _, state = self._compare(error, prediction)
        return precision * state * (ratio - (state * ratio).sum(-1, keepdim=True))

    def grad_prediction(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        assert prediction is not None
        ratio, below, state = self._compare(error, prediction)
        return -precision * torch.where(ratio.abs() < 1, below * torch.expm1(ratio.clamp(max=1.0)), state - below)

    def curvature(self, prediction: Tensor) -> Tensor:
        return wide(prediction).softmax(-1)

    def check(self, prediction: Tensor, name: str) -> None:
        if prediction.shape[-1] < 2:
            raise ValueError(
                f"node {name!r} has width {prediction.shape[-1]}: a categorical energy needs two features or more"
            )

    @staticmethod
    def _compare(error: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log s(x)/s(mu), which is zero where both are, s(mu) and s(x)."""
        prediction = prediction.to(error.dtype)
        log_below = prediction.log_softmax(-1)
        below = log_below.exp()
        # of what is masked no error counts; a probability that is zero for want of digits may be none in the state
        small = torch.where(log_below.isfinite(), error.abs(), 0).amax(-1, keepdim=True) < 1
        near = torch.log1p((below * torch.expm1(error.clamp(-1, 1))).sum(-1, keepdim=True).clamp_min(-0.99))
        # not e less its logarithm of a sum, which has no digits left where errors have run far
        far = (log_below + error).log_softmax(-1)
        ratio = torch.where(small, error - near, far - log_below)
        state = torch.where(small, log_below + ratio, far).exp()
        return torch.where((below > 0) | (state > 0), ratio, 0), below, state

    @staticmethod
    def _per_token(precision: Tensor) -> Tensor:
        return precision.squeeze(-1) if precision.dim() else precision


@register_energy("bernoulli")
class BernoulliEnergy(LogitEnergy):
    """p KL[s(x) || s(mu)] of independent Bernoulli variables, s the sigmoid of each feature, summed over features."""

    #: errors under this are expanded about mu, where the closed form would cancel; in float64 it does so later
    NEAR = 0.03
    NEAR_DOUBLE = 1e-4

    def energy(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        assert prediction is not None
        mu = prediction.to(error.dtype)
        x = mu + error
        far = torch.sigmoid(x) * error + F.logsigmoid(-x) - F.logsigmoid(-mu)
        # that cancels where x is near mu: there e^2 times the series of the integral of s'(mu + t e) t, t in [0, 1]
        near = self.NEAR_DOUBLE if error.dtype == torch.float64 else self.NEAR
        on = torch.sigmoid(mu)
        slope = on * torch.sigmoid(-mu)
        bend = slope * (1 - 2 * on)
        twist = slope * (1 - 6 * slope)
        series = error.square() * (slope / 2 + bend * error / 3 + twist * error.square() / 8)
        total: Tensor = (precision * torch.where(error.abs() < near, series, far)).sum(-1)
        return total

    def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        assert prediction is not None
        return precision * self.curvature(prediction.to(error.dtype) + error) * error

    def grad_prediction(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        assert prediction is not None
        mu = prediction.to(error.dtype)
        return precision * (torch.sigmoid(mu) - torch.sigmoid(mu + error))

    def curvature(self, prediction: Tensor) -> Tensor:
        values = wide(prediction)
        return torch.sigmoid(values) * torch.sigmoid(-values)


@register_energy("learned_variance")
class LearnedVarianceEnergy(Energy):
    """Gaussian whose log sigma is learned, one per feature: sum of p/2 (x - mu)^2 / sigma^2 + log sigma.

    sigma starts at 1, in units of 1/sqrt(p), and after each optimiser step goes down this energy's own gradient,
    1 - p (x - mu)^2 / sigma^2, averaged over tokens. A floor keeps it from the collapse in which ever smaller errors
    ask for an ever smaller sigma (arXiv 2211.03481, section 3.1, and FIELD's learned precision with a floor).
    """

    uses_prediction = False
    zero_at_rest = False
    RATE, LIMIT = 0.05, 2.0

    def __init__(self) -> None:
        self.log_std: Tensor | None = None  # [features]
        self._gradient: Tensor | None = None
        self._tokens = 0

    def check(self, prediction: Tensor, name: str) -> None:
        if self.log_std is None:
            self.log_std = torch.zeros(prediction.shape[-1], dtype=torch.float64)
        elif len(self.log_std) != prediction.shape[-1]:
            raise ValueError(
                f"node {name!r} has width {prediction.shape[-1]}, its learned variance {len(self.log_std)}"
            )

    def _scaled(self, precision: Tensor) -> Tensor:
        assert self.log_std is not None
        return precision * (-2 * self.log_std).exp().to(precision)

    def energy(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        assert self.log_std is not None
        total: Tensor = (0.5 * self._scaled(precision) * error.square()).sum(-1) + self.log_std.sum().to(error)
        return total

    def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        return self._scaled(precision) * error

    def grad_prediction(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        return -self._scaled(precision) * error

    def precondition(self, gradient: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        return gradient / self._scaled(precision)

    def observe(self, error: Tensor, precision: Tensor) -> None:
        live = error.ne(0).any(-1, keepdim=True)  # no signal came to the others: padding, or after the last label
        gradient = (live * (1 - self._scaled(precision) * error.square())).flatten(0, -2).sum(0).cpu().double()
        self._gradient = gradient if self._gradient is None else self._gradient + gradient
        self._tokens += int(live.sum())

    def step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        if self._gradient is None or self.log_std is None:
            return
        total = reduce(torch.cat([self._gradient, torch.tensor([float(self._tokens)], dtype=torch.float64)]))
        self._gradient, self._tokens = None, 0
        if not total[-1] or not bool(total.isfinite().all()):  # as where a loss was scaled too far: no step then
            return
        self.log_std = (self.log_std - self.RATE * total[:-1] / total[-1]).clamp(-self.LIMIT, self.LIMIT)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.log_std is None else {"log_std": self.log_std.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "log_std" in state:
            given, most = state["log_std"], self.LIMIT
            if not isinstance(given, list) or not all(type(v) in (int, float) and abs(v) <= most for v in given):
                raise ValueError(f"log_std={given!r} is not allowed: numbers from {-most:g} to {most:g} are needed")
            self.log_std = torch.tensor(given, dtype=torch.float64)


def relative_precision(prediction: Tensor, relative_std: float) -> Tensor:
    """1 / (relative_std * RMS(mu))^2, one value per token.

    Args:
        prediction: mu, [..., features].
    Returns:
        float32 (float64 for a float64 mu), [..., 1], detached.
    """
    norms: Tensor = torch.linalg.vector_norm(prediction.detach(), dim=-1, keepdim=True, dtype=wide_dtype(prediction))
    mean_square = norms.square() / prediction.shape[-1]
    floor = torch.finfo(torch.float32).eps ** 2  # a prediction of zeros: finite, and far under any real activity
    return (relative_std**2 * mean_square.clamp_min(floor)).reciprocal()
