"""Probes against closed forms: the curvature of linear networks, and gradients that are backprop's or are not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import NODES, X, Y
from oracles.linear import LinearChain
from test_invariants import batch, gradients, make
from test_trainer import trainer

from hf_pc import PCConfig, PCModel
from hf_pc.diagnostics import compare_with_backprop, largest_curvature
from hf_pc.relaxation import Share


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("precision", [0.5, 5.0])
def test_curvature_is_the_largest_eigenvalue(residual: bool, precision: float) -> None:
    """On a linear chain P^-1/2 H P^-1/2 is I + J'J / p: Lanczos finds its largest eigenvalue."""
    model = LinearChain(residual=residual)
    jacobian, jacobians = model.head.weight.detach().numpy(), []
    for matrix in reversed(model.matrices()):
        jacobians.append(jacobian)
        jacobian = jacobian @ matrix
    stacked = np.concatenate(jacobians, axis=1)
    expected = 1 + np.linalg.eigvalsh(stacked @ stacked.T)[-1] / precision
    pc = PCModel(model, PCConfig(nodes=NODES, output="gaussian", precision=precision, sweeps=4))
    found = largest_curvature(pc, {"inputs": X, "labels": Y}, iterations=20)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_the_curvature_where_no_signal_has_come_down(sweeps: int) -> None:
    """Of states that hardly move it is the same in every sweep, those that the first sweeps leave out counted too."""
    found = []
    for given in (sweeps, 10):
        config = PCConfig(solver="state", sweeps=given, step_size=1e-6, relative_std=0.5)
        found.append(largest_curvature(PCModel(make("gpt2").double(), config), batch(), iterations=4))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_probe_changes_nothing() -> None:
    """Neither probe leaves a gradient, moves a weight or disturbs what relaxes next."""
    model, inputs = make("gpt2"), batch()
    pc = PCModel(model, PCConfig(relative_std=1.0, sweeps=4))
    before = pc.accumulate_grad(**inputs)
    held = gradients(model)
    assert largest_curvature(pc, inputs) > 1
    compare_with_backprop(pc, inputs)
    assert all((gradients(model)[name] == grad).all() for name, grad in held.items())
    assert pc.relax(**inputs).free_energy == before.free_energy


def test_distance_to_backprop() -> None:
    """One sweep has cosine 1 and ratio 1 everywhere; strong relaxation has not, and least near the input."""
    model, inputs = make("gpt2"), batch()
    pc = PCModel(model, PCConfig(sweeps=1))
    for facts in compare_with_backprop(pc, inputs).values():
        assert facts["norm_ratio"] == pytest.approx(1.0, abs=1e-3) or facts["cosine"] == 0
    pc.detach()
    pc = PCModel(model, PCConfig(relative_std=2.0, sweeps=20))
    found = compare_with_backprop(pc, inputs, group=lambda name: ".".join(name.split(".")[:3]))
    assert found["transformer.h.0"]["cosine"] < 0.99
    assert 0 < found["transformer.h.2"]["norm_ratio"] != pytest.approx(1.0, abs=1e-3)


def test_the_trainer_logs_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """curvature_steps=2 logs the curvature at steps 0 and 2, and warns over the threshold; training is unchanged."""
    monkeypatch.setattr("hf_pc.trainer.RUNAWAY", 1.0)
    plain, probed = (trainer(tmp_path / str(n), **({"curvature_steps": n} if n else {})) for n in (0, 2))
    plain.train()
    with caplog.at_level(logging.WARNING, logger="hf_pc.trainer"):
        probed.train()
    assert len([entry for entry in probed.state.log_history if "curvature" in entry]) == 2
    assert "largest curvature" in caplog.text
    assert all((a == b).all() for a, b in zip(plain.model.parameters(), probed.model.parameters(), strict=True))


@pytest.mark.parametrize(("learning", "warns"), [("one_sided", True), ("balanced", False), ("plain", False)])
def test_the_trainer_warns_of_bias(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, learning: Any, warns: bool
) -> None:
    """Each log has the signal_bias; over the threshold it is warned of where phases should cancel in each sequence."""
    monkeypatch.setattr("hf_pc.trainer.RUNAWAY_BIAS", 1e-9)
    run = trainer(tmp_path, PCConfig(relaxed_fraction=0.1, learning=learning), max_steps=2)
    with caplog.at_level(logging.WARNING, logger="hf_pc.trainer"):
        run.train()
    assert len([entry for entry in run.state.log_history if entry.get("signal_bias", 0) > 0]) == 2
    assert ("do not cancel" in caplog.text) == warns


def test_a_part_of_a_model_cannot_be_probed() -> None:
    """Of a model over several processes each would measure its own part."""
    pc = PCModel(make("gpt2"), PCConfig(relative_std=0.5))
    pc.share = type("Two", (Share,), {"count": 2})()
    for probe in (largest_curvature, compare_with_backprop):
        with pytest.raises(ValueError, match="is split over 2 processes"):
            probe(pc, batch())


def test_a_probe_leaves_the_order_of_signs() -> None:
    """Where sequences take signs in turn, the next batch begins where it would have begun; nothing is drawn."""
    pc = PCModel(make("gpt2", 0.1).train(), PCConfig(relative_std=0.5, learning="balanced"))
    odd = {name: value[:3] for name, value in batch().items()}
    before = torch.get_rng_state()
    compare_with_backprop(pc, odd)
    assert pc.steering.rows == 0
    assert torch.equal(torch.get_rng_state(), before)
