"""Metrics as `evaluate` modules that need no network: `Perplexity().compute(...)`, `Regime().compute(...)`."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate

from hf_pc.measurements import regime


class _Local(evaluate.Metric):
    """A metric whose two columns are numbers."""

    columns: tuple[str, str]
    summary: str

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("float64") for name in self.columns})
        return evaluate.MetricInfo(description=self.summary, citation="", features=features)


class Perplexity(_Local):
    """exp(sum of nats / number of label tokens), from a plain forward pass.

    `compute(predictions=..., references=...)`: the summed cross-entropy of each sequence in nats, and its number of
    label tokens. Returns `loss` in nats per token and `perplexity`. Raises ValueError if there are no tokens.
    """

    columns = ("predictions", "references")
    summary = "Perplexity per label token."

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        tokens = math.fsum(references)
        if tokens <= 0:
            raise ValueError(f"references add up to {tokens:g} label tokens: at least one is needed")
        loss = math.fsum(predictions) / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class Regime(_Local):
    """The regime of a run: means of `relaxed_fraction` and `residual`, and its name.

    `compute(predictions=..., references=...)`: the relaxed_fraction and the residual of each step or log. Raises
    ValueError if there are none.
    """

    columns = ("predictions", "references")
    summary = "How far a run relaxed: backprop-like, relaxing or equilibrium."

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        if not predictions:
            raise ValueError("predictions=[] is not allowed: at least one step is needed")
        fraction = math.fsum(predictions) / len(predictions)
        residual = math.fsum(references) / len(references)
        return {"relaxed_fraction": fraction, "residual": residual, "regime": regime(fraction, residual)}
