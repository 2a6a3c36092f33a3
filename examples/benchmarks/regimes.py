"""What the scripts on small data compare: backprop with predictive coding in three regimes, on a small GPT-2."""

from __future__ import annotations

from typing import Any

from hf_pc import PCConfig

#: a size at which each script takes minutes on one core
SIZE: dict[str, Any] = {
    "layers": 2, "hidden": 64, "heads": 4, "sequence": 32, "seeds": 5, "sweeps": 3, "methods": None,
    "learning_rates": [1e-3, 3e-3, 1e-2],
}  # fmt: skip


def methods(sweeps: int) -> dict[str, PCConfig | None]:
    """Backprop; plain learning at the default and at strong relaxation; the unbiased rule at the latter."""
    return {
        "backprop": None,
        "plain_0.03": PCConfig(relaxed_fraction=0.03, sweeps=sweeps),
        "plain_0.1": PCConfig(relaxed_fraction=0.1, sweeps=sweeps),
        "balanced_0.1": PCConfig(relaxed_fraction=0.1, sweeps=sweeps, learning="balanced"),
    }
