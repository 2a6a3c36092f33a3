"""Energies of internal nodes: E(x, mu), the divergence between a node's state and its prediction.

Every energy works on the error e = x - mu and the prediction mu, because a small error beside a large prediction
would be lost in x. Values are nats, summed over the features of a token and over nothing else: [..., features] gives
[...]. Gradients have the shape of the state. Source: Pinchetti et al. 2022, arXiv 2211.03481, section 3; the output
node's energy, the cross-entropy of the labels, is in `hf_pc.output`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hf_pc.registry import Registry


class Energy(ABC):
    """One divergence between a state x = mu + e and its prediction mu, scaled by a precision p.

    `precision` broadcasts against the state: a number, or a tensor [..., 1] with one value per token.
    """

    #: whether the gradients need mu itself; the Gaussian's depend on the error alone
    uses_prediction: bool = True

    @abstractmethod
    def energy(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        """E(mu + e, mu), [...] for errors of shape [..., features], in nats per token."""

    @abstractmethod
    def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        """dE/dx at fixed mu."""

    @abstractmethod
    def grad_prediction(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        """dE/dmu at fixed x: the signal that a node's own weights learn from."""


ENERGIES: Registry[type[Energy]] = Registry("energy")
register_energy = ENERGIES.register


@register_energy("gaussian")
class GaussianEnergy(Energy):
    """E = p/2 |x - mu|^2, p = 1/sigma^2 held fixed while the states relax (arXiv 2211.03481, eq. 3)."""

    uses_prediction = False

    def energy(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        # per token or one number, the precision is constant over the features that are summed
        squares: Tensor = torch.linalg.vector_norm(error, dim=-1, keepdim=True).square()
        weighted: Tensor = 0.5 * precision * squares
        return weighted.squeeze(-1)

    def grad_state(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        return precision * error

    def grad_prediction(self, error: Tensor, prediction: Tensor | None, precision: Tensor) -> Tensor:
        return -precision * error


def relative_precision(prediction: Tensor, relative_std: float) -> Tensor:
    """1 / (relative_std * RMS(mu))^2, one value per token.

    The scale is each token's own, so that neither its neighbours nor the batch it is in changes what it learns.

    Args:
        prediction: mu, [..., features].
    Returns:
        float32 (float64 for a float64 mu), [..., 1], detached.
    """
    values = wide(prediction.detach())
    mean_square: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square() / values.shape[-1]
    floor = torch.finfo(torch.float32).eps ** 2  # a prediction of zeros: finite, and far under any real activity
    return (relative_std**2 * mean_square.clamp_min(floor)).reciprocal()


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which errors are kept: float32, or float64 for float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
