"""What sums of measurements say: means, the name of the regime, and where something is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_pc.measurements import (
    add_sums,
    first_nonfinite,
    on_cpu,
    regime,
    relaxed_fraction,
    residual,
    signal_bias,
    summary,
)


def sums(**changed: float) -> dict[str, Tensor]:
    """Of two nodes and the output, two sequences with three label tokens; by name with _ for /."""
    values = {
        "tokens": 3.0, "sequences": 2.0, "batches": 1.0, "sweeps": 4.0, "tried": 6.0, "refused": 3.0, "residual": 0.5,
        "change": 1.0, "reference": 4.0, "bias": 9.0, "free_energy": 6.0, "nonfinite": 0.0, "energy/output": 3.0,
        "energy/low": 1.5, "energy/high": 1.5, "error_square/low": 1.0, "error_square/high": 4.0,
        "prediction_square/low": 4.0, "prediction_square/high": 0.0,
    }  # fmt: skip
    values |= {name.replace("__", "/"): value for name, value in changed.items()}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_means_are_sums_over_what_they_count() -> None:
    """Energies are over label tokens, residuals over sequences, sweeps over batches, refusals over moves."""
    found = summary(sums())
    assert found["free_energy"] == 2.0
    assert found["energies"] == {"output": 1.0, "low": 0.5, "high": 0.5}
    assert (found["residual"], found["sweeps"], found["refused"]) == (0.25, 4.0, 0.5)
    assert (found["relaxed_fraction"], found["signal_bias"]) == (0.5, 1.5)
    assert found["displacement"] == {"low": 0.5, "high": 0.0}  # no activity, no displacement


def test_nothing_measured_is_nothing_relaxed() -> None:
    assert relaxed_fraction({"change": 1.0, "reference": 0.0}) == 0.0
    assert math.isnan(signal_bias({"change": 1.0, "reference": 4.0}))
    assert summary(sums(tried=0.0, sequences=0.0))["refused"] == 0.0


def test_the_first_node_that_is_not_finite() -> None:
    """In the order of the forward pass; predictions before energies, which spread; the output last."""
    assert first_nonfinite(sums()) is None
    assert first_nonfinite(sums(energy__output=math.nan)) == "output"
    assert first_nonfinite(sums(energy__output=math.nan, energy__high=math.inf)) == "high"
    assert first_nonfinite(sums(energy__low=math.inf, energy__high=math.nan)) == "low"
    assert first_nonfinite(sums(energy__low=math.inf, prediction_square__high=math.inf)) == "high"
    assert first_nonfinite(sums(error_square__low=math.nan)) is None  # which the energy says


@pytest.mark.parametrize(
    ("relaxed", "left", "name"),
    [
        (0.019, 0.0, "backprop-like"), (0.019, 1.0, "backprop-like"), (0.02, 0.049, "equilibrium"),
        (0.02, 0.05, "relaxing"), (0.5, 0.05, "relaxing"), (0.5, 0.0, "equilibrium"),
    ],
)  # fmt: skip
def test_regimes_end_where_they_say(relaxed: float, left: float, name: str) -> None:
    """Backprop-like is under 0.02, an equilibrium under 0.05."""
    assert regime(relaxed, left) == name


def test_a_residual_is_a_ratio_of_roots() -> None:
    """0 where no signal comes; squares that would overflow as a ratio do not."""
    tiny, huge = 1e-300, 1e300
    squares = torch.tensor([[4.0, 1.0, huge], [16.0, 0.0, tiny]], dtype=torch.float64)
    torch.testing.assert_close(residual(*squares), torch.tensor([0.5, 0.0, 1e300], dtype=torch.float64))


def test_scalars_on_the_cpu_are_their_own() -> None:
    """float64, in order, and none a view of all, which would travel to other processes with it."""
    found = on_cpu({"one": torch.tensor(2), "two": torch.tensor(0.5), "three": torch.tensor(True)})
    assert list(found) == ["one", "two", "three"]
    assert [float(value) for value in found.values()] == [2.0, 0.5, 1.0]
    for value in found.values():
        assert value.dtype == torch.float64
        assert value.untyped_storage().nbytes() == 8


def test_sums_add_up() -> None:
    total: dict[str, Tensor] = {}
    for value in (1.0, 2.0):
        add_sums(total, {"a": torch.tensor(value), **({"b": torch.tensor(5.0)} if value == 2 else {})})
    assert {name: float(value) for name, value in total.items()} == {"a": 3.0, "b": 5.0}
