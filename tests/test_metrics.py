"""Metrics against their definitions."""

from __future__ import annotations

import math

import pytest

from hf_pc.metrics import Perplexity, Regime


def test_perplexity_weighs_tokens() -> None:
    """Perplexity is exp of all nats over all tokens, not a mean of means."""
    result = Perplexity().compute(predictions=[6.0, 1.0], references=[2, 5])
    assert result["perplexity"] == pytest.approx(math.e)
    with pytest.raises(ValueError, match="at least one"):
        Perplexity().compute(predictions=[1.0], references=[0])


@pytest.mark.parametrize(
    ("fraction", "residual", "name"),
    [(0.0, 1.0, "backprop-like"), (0.1, 0.2, "relaxing"), (0.1, 0.01, "equilibrium")],
)
def test_regime_names(fraction: float, residual: float, name: str) -> None:
    """The regime is named from the means of relaxed_fraction and residual."""
    assert Regime().compute(predictions=[fraction] * 2, references=[residual] * 2)["regime"] == name
