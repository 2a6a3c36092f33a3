"""Steering: the target that it approaches, the limit at which it lets go, and what it remembers."""

from __future__ import annotations

import pytest
import torch
from test_invariants import batch, make

from hf_pc import NodeSpec, PCConfig, PCModel
from hf_pc.steering import Steering


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
