"""The signal at the top node: its change by relaxation, and how far what is learned there is from backprop's."""

from __future__ import annotations

import pytest
import torch

from hf_pc.measurements import relaxed_fraction
from hf_pc.top_signal import TopSignal

G = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # of length 5


def test_change_is_from_the_first_signal() -> None:
    """The first one noted is that at rest; a later one takes the place of the one before it."""
    signal = TopSignal()
    assert float(signal.change) == float(signal.reference) == 0.0
    for scale, change in ((1.0, 0.0), (0.5, 2.5), (0.8, 1.0)):
        signal.note(scale * G)
        assert float(signal.change) == pytest.approx(change**2)
        assert float(signal.reference) == 25.0


@pytest.mark.parametrize("ratio", [0.5, -1.0, 0.04])
def test_a_warm_phase_compares_with_the_first_one_at_rest(ratio: float) -> None:
    """At rest the signal is that of the first phase times the strength, without a pass to see it."""
    first = TopSignal()
    first.note(G)
    warm = TopSignal(first)
    warm.begin_where(first, ratio)
    assert float(warm.reference) == pytest.approx((5 * ratio) ** 2)
    warm.note(0.8 * ratio * G)
    assert relaxed_fraction({"change": warm.change, "reference": warm.reference}) == pytest.approx(0.2)


def test_a_warm_phase_of_one_that_saw_no_signal_begins_anew() -> None:
    first = TopSignal()
    warm = TopSignal(first)
    warm.begin_where(first, 0.5)
    warm.note(G)
    assert float(warm.reference) == 25.0


def test_bias_is_of_all_phases_together() -> None:
    """Weights times what each learned from, against the signal of a feedforward pass; none where nothing learned."""
    first = TopSignal()
    assert float(first.bias()) == 0.0
    first.note(G)
    assert float(first.bias()) == 0.0  # nothing learned
    first.note_learned(0.9 * G, 2.0)
    assert float(first.bias()) == pytest.approx((0.8 * 5) ** 2)
    second = TopSignal(first)
    second.note_learned(0.5 * G, -1.0)
    assert float(second.bias()) == pytest.approx((0.3 * 5) ** 2)
    alone = TopSignal()
    alone.note_learned(G, 1.0)
    assert float(alone.bias()) == 0.0  # no feedforward pass to compare with
