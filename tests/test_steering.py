"""Steering: the target that it approaches, the limit at which it lets go, and what it remembers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_invariants import batch, make

from hf_pc import NodeSpec, PCConfig, PCModel
from hf_pc.diagnostics import compare_with_backprop
from hf_pc.steering import LARGEST_STD, SMALLEST_ACTIVITY, SMALLEST_STD, Steering


def test_activity_is_carried_from_step_to_step() -> None:
    """In the second step sigma is relative_std times the RMS that the node's predictions had in the first, where
    the batch is no padding."""
    pc = PCModel(make("gpt2").double(), PCConfig(relative_std=0.3, sweeps=2))
    predictions = {}
    for node in pc.nodes:
        node.module.register_forward_hook(lambda m, a, out, n=node.name: predictions.setdefault(n, out.detach()))
    pc.detach()
    pc.model(**{k: v for k, v in batch().items() if k != "labels"})
    pc.attach()
    pc.accumulate_grad(**batch())
    pc.steer()
    with pc.relaxed(batch()) as relaxation:
        pc.learning_pass(batch())
        for site in relaxation.sites:
            rms = predictions[site.label][batch()["attention_mask"] == 1].square().mean().sqrt()
            assert site.precision == pytest.approx(1 / float(0.3 * rms) ** 2, rel=1e-9)
    other = PCModel(make("gpt2").double(), PCConfig(relative_std=0.3, sweeps=2))
    other.load_state_dict(pc.state_dict())
    assert other.steering.activity == pc.steering.activity


def test_steering_needs_a_target() -> None:
    """steer moves relative_std towards a relaxed_fraction target, and leaves a fixed one alone."""
    for config, moves in ((PCConfig(relaxed_fraction=0.2), True), (PCConfig(relative_std=0.2), False)):
        pc = PCModel(make("gpt2"), config)
        pc.accumulate_grad(**batch())
        before = pc.relative_std
        pc.steer()
        assert (pc.relative_std > before) is moves


@pytest.mark.parametrize(
    ("fraction", "bias", "expected"),
    [(0.25, 0.001, 2**0.25), (0.25, 0.01, 5**0.0625), (0.25, 0.05, 1.0), (0.25, 0.8, 2**-0.25), (1.0, 0.01, 2**-0.25),
     (1.0, 0.1, 2**-0.25), (0.5, 0.0, 1.0), (0.02, 0.8, 1.0), (0.01, 0.8, 2**0.25), (float("nan"), 0.8, 1.0),
     (0.25, float("nan"), 1.0), (0.25, float("inf"), 1.0)],
)  # fmt: skip
def test_steering_lets_go_of_the_target(fraction: float, bias: float, expected: float) -> None:
    """relative_std goes up by the fourth root of the target over what the batches of a step measured; with four phases
    at most by the sixteenth root of the limit over their bias, which is to leave a fraction of 0.02; not at all where
    either is no number."""
    steering = Steering(PCConfig(relaxed_fraction=0.5, learning="one_sided", bias_limit=0.05))
    squares = {"change": fraction**2, "reference": 1.0, "bias": bias**2}
    for _ in range(2):
        steering.observe({name: torch.tensor(3 * value, dtype=torch.float64) for name, value in squares.items()})
    steering.step(lambda total: total, steers=True)
    assert steering.relative_std / 0.2 == pytest.approx(expected, rel=1e-12)


def test_steering_without_anything_to_steer() -> None:
    """Nodes with precisions of their own leave relative_std alone."""
    rules = [NodeSpec(f"transformer.h.{i}", precision=1e4) for i in range(3)]
    pc = PCModel(make("gpt2"), PCConfig(nodes=rules))
    for _ in range(3):
        pc.accumulate_grad(**batch())
        pc.steer()
    assert pc.relative_std == 0.2


def test_steering_without_a_batch_changes_nothing() -> None:
    """A step of the optimizer that saw no batch leaves what is steered where it was."""
    pc = PCModel(make("gpt2"), PCConfig(relaxed_fraction=0.1))
    before = pc.state_dict()
    pc.steer()
    assert pc.state_dict() == before


def measured(fraction: float, **more: float) -> dict[str, torch.Tensor]:
    values = {"change": fraction**2, "reference": 1.0, **more}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@pytest.mark.parametrize(("fraction", "expected"), [(1e-5, 0.7), (0.0, 0.7), (1e5, -0.7), (0.05, 0.25 * math.log(10))])
def test_a_step_of_steering_is_bounded(fraction: float, expected: float) -> None:
    """However far the fraction is from its target, one step moves the logarithm of relative_std by 0.7 at most."""
    steering = Steering(PCConfig(relaxed_fraction=0.5))
    steering.observe(measured(fraction))
    steering.step(lambda total: total, steers=True)
    assert math.log(steering.relative_std / 0.2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("start", "fraction", "end"), [(9e5, 1e-9, 1e6), (1.1e-6, 1e9, 1e-6)])
def test_relative_std_stays_within_its_limits(start: float, fraction: float, end: float) -> None:
    """It ends at 1e6 and 1e-6 however long the target is out of reach, and so is a state that loads."""
    assert (SMALLEST_STD, LARGEST_STD) == (1e-6, 1e6)
    steering = Steering(PCConfig(relaxed_fraction=0.5))
    steering.relative_std = start
    for _ in range(3):
        steering.observe(measured(fraction))
        steering.step(lambda total: total, steers=True)
    assert steering.relative_std == end
    Steering(PCConfig(relaxed_fraction=0.5)).load_state_dict(steering.state_dict())


def test_steps_of_steering_are_of_their_own_batches() -> None:
    """What a step has taken up is forgotten: the next one goes by the batches after it, in fraction and activity."""
    steering = Steering(PCConfig(relaxed_fraction=0.5))
    for fraction, square in ((0.05, 4.0), (0.5, 36.0)):
        before = steering.relative_std
        steering.observe(measured(fraction, **{"prediction_square/n": square, "size/n": 4.0}))
        steering.step(lambda total: total, steers=True)
        assert steering.relative_std / before == pytest.approx((0.5 / fraction) ** 0.25, rel=1e-12)
        assert steering.activity == {"n": pytest.approx((square / 4) ** 0.5)}
    before = steering.relative_std
    steering.step(lambda total: total, steers=True)  # nothing was noted since
    assert steering.relative_std == before


@pytest.mark.parametrize(("rms", "taken"), [(1.5e-8, True), (0.9e-8, False), (0.0, False), (math.inf, False),
                                            (math.nan, False)])  # fmt: skip
def test_no_activity_is_taken_from_silence(rms: float, taken: bool) -> None:
    """A site that hardly predicts anything, or no number, keeps the activity that it had."""
    steering = Steering(PCConfig(relative_std=0.3))
    steering.activity = {"n": 2.0}
    steering.observe(measured(0.5, **{"prediction_square/n": 3 * rms**2, "size/n": 3.0}))
    steering.step(lambda total: total, steers=True)
    assert SMALLEST_ACTIVITY == 1e-8
    assert steering.activity == {"n": pytest.approx(rms if taken else 2.0)}


def test_a_probe_between_batch_and_step_is_not_steered_by() -> None:
    """compare_with_backprop learns a batch of its own: the step goes by what was noted before it alone."""
    found = []
    for probes in (False, True):
        pc = PCModel(make("gpt2"), PCConfig(relaxed_fraction=0.2))
        pc.accumulate_grad(**batch())
        if probes:
            compare_with_backprop(pc, {name: value[:2] for name, value in batch().items()})
        pc.steer()
        found.append(pc.state_dict())
    assert found[0] == found[1]
    assert found[0]["relative_std"] != 0.2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"state\.relative_std=None"),
        ({"relative_std": -1.0}, r"state\.relative_std=-1\.0"),
        ({"relative_std": 2 * LARGEST_STD}, r"state\.relative_std="),
        ({"relative_std": 0.3, "activity": {"n": -2.0}}, r"state\.activity\['n'\]=-2\.0"),
        ({"relative_std": 0.3, "activity": [1.0]}, r"state\.activity=\[1\.0\]"),
        ({"relative_std": 0.3, "energies": [1.0]}, r"state\.energies=\[1\.0\]"),
        ({"relative_std": 0.3, "energies": {"n": 1.0}}, r"state\.energies=\{'n': 1\.0\}"),
    ],
)
def test_a_state_that_is_none_is_named(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Steering(PCConfig(relaxed_fraction=0.2)).load_state_dict(state)


def test_two_sweeps_can_be_steered() -> None:
    """One relaxes nothing, so that its target is none."""
    assert Steering(PCConfig(relaxed_fraction=0.2, sweeps=1)).target is None
    assert Steering(PCConfig(relaxed_fraction=0.2, sweeps=2)).target == 0.2


@pytest.mark.parametrize("rows", [True, False, 2, -1, 0.5, "1", None])
def test_rows_of_a_state_are_0_or_1(rows: Any) -> None:
    """Nothing else loads, a truth value neither; what loads goes on with the sign it stood at."""
    steering = Steering(PCConfig(relative_std=0.3, learning="mirrored"))
    with pytest.raises(ValueError, match=r"state\.rows=.* is not allowed: 0 or 1 is needed"):
        steering.load_state_dict({"relative_std": 0.3, "rows": rows})
    steering.load_state_dict({"relative_std": 0.3, "rows": 1})
    assert steering.signs(3, torch.device("cpu")).tolist() == [-1, 1, -1]
    assert steering.state_dict() == {"relative_std": 0.3, "rows": 1}
    steering.load_state_dict({"relative_std": 0.3})
    assert steering.signs(3, torch.device("cpu")).tolist() == [1, -1, 1]
    assert steering.state_dict() == {"relative_std": 0.3}


@pytest.mark.parametrize(("settings", "expected"), [({"relaxed_fraction": 0.1}, 0.7), ({"relative_std": 0.3}, 0.3)])
def test_a_state_restores_what_was_learned_alone(settings: dict[str, float], expected: float) -> None:
    """relative_std comes back where it follows a target; one that is given stays as it is given."""
    steering = Steering(PCConfig(**settings))  # type: ignore[arg-type]
    steering.load_state_dict({"relative_std": 0.7})
    assert steering.relative_std == expected


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_signs_alternate_over_all_processes(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of rank, and on from batch to batch: the signs of all sequences are one series of +1, -1, ..."""
    monkeypatch.setattr("hf_pc.steering.process_count", lambda: processes)
    ranks = [Steering(PCConfig(relative_std=0.3, learning="mirrored")) for _ in range(processes)]
    signs: list[float] = []
    for batch_size in (3, 1, 2, 5):
        for rank, steering in enumerate(ranks):
            monkeypatch.setattr("hf_pc.steering.process_index", lambda rank=rank: rank)
            signs += steering.signs(batch_size, torch.device("cpu")).tolist()
            steering.count_rows(batch_size)
    assert signs == [(-1.0) ** k for k in range(11 * processes)]


@pytest.mark.parametrize(("sweeps", "reference"), [(1, 1.0), (2, 0.0)])
def test_without_relaxation_or_a_signal_there_is_nothing_to_go_by(sweeps: int, reference: float) -> None:
    """At T = 1 no error moves, and without a signal none has anywhere to go: relative_std stays."""
    steering = Steering(PCConfig(relaxed_fraction=0.5, sweeps=sweeps))
    before = steering.relative_std
    steering.observe(measured(0.0, reference=reference))
    steering.step(lambda total: total, steers=True)
    assert steering.relative_std == before
