"""A model over several devices, as `device_map="auto"` spreads it: states live where their block does."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from test_invariants import batch, gradients, make, worst
from torch.utils._python_dispatch import TorchDispatchMode
from two_devices import place, two_devices

from hf_pc import PCConfig, PCModel
from hf_pc.diagnostics import compare_with_backprop, largest_curvature

SETTINGS: list[dict[str, Any]] = [
    {"relative_std": 0.5, "sweeps": 4}, {"relative_std": 0.5, "sweeps": 4, "step_size": 0.3, "tolerance": 0.1},
    {"solver": "state", "relative_std": 0.5, "sweeps": 6}, {"solver": "lagrangian", "sweeps": 6},
    {"relaxed_fraction": 0.05, "learning": "balanced"}, {"relaxed_fraction": 0.05, "learning": "wake_sleep"},
    {"relative_std": 30.0, "sweeps": 6}, {"solver": "state", "relative_std": 30.0, "sweeps": 6},
]  # fmt: skip


def untied() -> Any:
    model = make("gpt2").double()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def learned(model: Any, inputs: dict[str, torch.Tensor], settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    pc = PCModel(model, PCConfig(**settings))
    pc.accumulate_grad(**inputs)
    pc.steer()
    return pc.accumulate_grad(**inputs)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_two_devices_learn_as_one(settings: dict[str, Any]) -> None:
    """With the first block on one device and the rest on another, gradients and figures are those of one device."""
    whole, model = untied(), untied()
    expected = learned(whole, batch(), settings)
    with two_devices():
        parts = model.transformer
        for module in (parts.wte, parts.wpe, parts.h[0]):
            place(module, "meta:0")
        for module in (*parts.h[1:], parts.ln_f, model.lm_head):
            place(module, "meta:1")
        found = learned(model, {name: value.to("meta:0") for name, value in batch().items()}, settings)
        assert [str(state.device) for state in found.states.values()] == ["meta:0", "meta:1", "meta:1"]
        assert [str(error.device) for error in found.errors.values()] == ["meta:0", "meta:1", "meta:1"]
        pc = PCModel(model, PCConfig(relative_std=0.5, sweeps=4))
        curvature = largest_curvature(pc, {name: value.to("meta:0") for name, value in batch().items()}, 2)
        pc.detach()
        mine = {n: p.grad.inner for n, p in model.named_parameters()}
    assert worst(mine, gradients(whole)) < 1e-9
    expected_curvature = largest_curvature(PCModel(whole, PCConfig(relative_std=0.5, sweeps=4)), batch(), 2)
    assert curvature == pytest.approx(expected_curvature, rel=1e-6)
    for name in ("free_energy", "residual", "relaxed_fraction", "refused", "sweeps"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-12)


@contextmanager
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """A model in float32 on a device that has no float64, and a batch there."""
    model = untied().float()
    monkeypatch.setattr("hf_pc.dtypes.WITHOUT_FLOAT64", {"meta"})
    with two_devices(float64=False):
        place(model, "meta:0")
        yield model, {name: value.to("meta:0") for name, value in batch().items()}


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_a_device_without_float64(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums are kept in float32, and nothing is in float64, gradients and figures are those of float64 sums."""
    whole = untied().float()
    expected = learned(whole, batch(), settings)
    with without_float64(monkeypatch) as (model, inputs):
        found = learned(model, inputs, settings)
        mine = {n: p.grad.inner for n, p in model.named_parameters()}
    assert worst(mine, gradients(whole)) < 1e-3
    for name in ("free_energy", "residual", "relaxed_fraction"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-2, abs=1e-5)


def test_probes_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curvature and distance to backprop are those of float64."""
    config = PCConfig(relative_std=0.5, sweeps=4)
    whole = PCModel(untied().float(), config)
    with without_float64(monkeypatch) as (model, inputs):
        pc = PCModel(model, config)
        curvature, apart = largest_curvature(pc, inputs, 2), compare_with_backprop(pc, inputs)
        pc.detach()
    assert curvature == pytest.approx(largest_curvature(whole, batch(), 2), rel=1e-3)
    for name, facts in compare_with_backprop(whole, batch()).items():
        assert apart[name] == pytest.approx(facts, rel=1e-3)


@pytest.mark.parametrize("solver", ["error", "state"])
def test_hooks_of_accelerate_stay(solver: str) -> None:
    """On a model that accelerate dispatched, its hooks go on moving inputs, and the gradients are those without."""
    whole, model = make("gpt2"), make("gpt2")
    settings = {"solver": solver, "relative_std": 0.5, "sweeps": 5}
    learned(whole, batch(), settings)
    names = ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"]
    where = dict.fromkeys((*names, *(f"transformer.h.{i}" for i in range(3))), "cpu")
    dispatched = dispatch_model(model, device_map=where, force_hooks=True)
    assert hasattr(dispatched.transformer.h[1], "_hf_hook")
    learned(dispatched, batch(), settings)
    assert worst(gradients(dispatched), gradients(whole)) == 0


class HostReads(TorchDispatchMode):
    """Where numbers of tensors were read, by hf_pc, not by what it calls; a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            calls = [c for c in traceback.extract_stack() if "hf_pc/" in c.filename or "transformers/" in c.filename]
            if "hf_pc/" in calls[-1].filename:
                self.places.append(calls[-1].line or "")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learning", ["plain", "balanced", "one_sided"])
def test_a_gpu_is_waited_for_at_the_ends_of_a_phase(learning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flags are not at hand no sweep asks for them, and nothing else is different for it.

    What is left is the range of the labels once a step, and whether the last sweep of a phase stands.
    """
    found = []
    for at_hand in (True, False):
        if not at_hand:
            for module in ("padding", "solvers.descent"):
                monkeypatch.setattr(f"hf_pc.{module}.known_to_hold", lambda flags: False)
        model = make("gpt2")
        pc = PCModel(model, PCConfig(sweeps=5, relative_std=1.0, learning=learning))  # type: ignore[arg-type]
        with HostReads() as reads:
            for phase in pc.phases:
                with pc.relaxed(batch(), phase=phase) as relaxation:
                    (pc.learning_pass(batch())[0] / relaxation.tokens).backward()
        found.append(gradients(model))
    assert worst(*found) < 1e-6
    assert len(reads.places) == 1 + len(pc.phases), reads.places
