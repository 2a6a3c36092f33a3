"""Rules of learning at the equilibrium: what order of bias each leaves, and that the Trainer carries them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import NODES, X, Y, backprop
from oracles.linear import LinearChain
from test_invariants import batch, gradients, make, worst
from test_trainer import trained, trainer

from hf_pc import PCConfig, PCModel, RelaxationOutput
from hf_pc.learning import RULES, cancels_in_each_sequence, cost, phases_of, taken_to_zero
from hf_pc.measurements import summary
from hf_pc.trainer import BackpropTrainer

ORDER = {"plain": 1, "centred": 2, "extrapolated": 4, "one_sided": 4}


def config(learning: str, precision: float, strengths: list[float] | None = None) -> PCConfig:
    """Of a linear chain at its equilibrium."""
    settings: dict[str, Any] = {
        "nodes": NODES, "output": "gaussian", "learning": learning, "precision": precision, "strengths": strengths,
    }  # fmt: skip
    return PCConfig(**settings, sweeps=400, tolerance=1e-14)


def distance(learning: str, precision: float, strengths: list[float] | None = None) -> float:
    """Of the gradient at equilibrium to backprop's, on a linear chain, relative."""
    model = LinearChain()
    expected = backprop(model)
    PCModel(model, config(learning, precision, strengths)).accumulate_grad(inputs=X, labels=Y)
    return worst(gradients(model), expected)


def report(learning: str, precision: float) -> RelaxationOutput:
    return PCModel(LinearChain(), config(learning, precision)).accumulate_grad(inputs=X, labels=Y)


@pytest.mark.parametrize("learning", ORDER)
def test_order_of_the_bias(learning: str) -> None:
    """A rule's gradient differs from backprop's by O(1/p), O(1/p^2) or O(1/p^4): ten times stiffer, 10, 100, 10^4."""
    near, far = distance(learning, 100.0), distance(learning, 10.0)
    assert far / near == pytest.approx(10 ** ORDER[learning], rel=0.5)


@pytest.mark.parametrize("strengths", [[1, 0.25], [1.0, 0.4, 0.16], [1.0, 0.6, 0.3, 0.1, 0.05]], ids=str)
def test_order_of_the_bias_is_the_number_of_strengths(strengths: list[float]) -> None:
    """Of n strengths towards the labels the extrapolated gradient is O(1/p^n) from backprop's, wherever they lie."""
    near, far = distance("one_sided", 100.0, strengths), distance("one_sided", 10.0, strengths)
    assert far / near == pytest.approx(10 ** len(strengths), rel=0.6)


def test_strengths_further_apart_leave_less() -> None:
    """A direction keeps the product of b s / (1 + b s) over the strengths, which falls with each of them."""
    halves, further = ([ratio**k for k in range(4)] for ratio in (0.5, 0.4))
    assert distance("one_sided", 1.0, further) < 0.5 * distance("one_sided", 1.0, halves)
    assert distance("one_sided", 1.0, halves) == pytest.approx(distance("one_sided", 1.0), rel=1e-12)


@pytest.mark.parametrize("learning", ORDER)
def test_order_of_the_bias_at_the_last_node(learning: str) -> None:
    """signal_bias is of the rule's order as the whole gradient's distance is; of one phase it is relaxed_fraction."""
    found = [report(learning, precision) for precision in (10.0, 100.0)]
    assert found[0].signal_bias / found[1].signal_bias == pytest.approx(10 ** ORDER[learning], rel=0.5)
    assert (found[0].signal_bias == found[0].relaxed_fraction) == (learning == "plain")


@pytest.mark.parametrize("learning", RULES)
def test_bias_at_the_last_node(learning: str) -> None:
    """|sum of the phases' signals, each by its weight, less backprop's| / |backprop's|: at rest the signal is -p e."""
    model = LinearChain()
    head, p = model.head.weight.detach(), 2.0
    with torch.no_grad():
        expected = (model(X)["logits"] - Y) @ head
    pc = PCModel(model, config(learning, p))
    signs = torch.tensor([1.0, -1.0, 1.0]).double()[:, None] if pc.phases[0].mirrored else 1
    learned = torch.zeros_like(expected)
    for phase in pc.phases:
        with pc.relaxed({"inputs": X, "labels": Y}, phase=phase) as relaxation:
            pc.learning_pass({"inputs": X, "labels": Y})[0].backward()
            sums = pc.observe(relaxation)
            errors = relaxation.sites[-1].leaf.detach()
        if phase.feedforward:
            assert pc._own_labels is not None
            learned += (model(X)["logits"].detach() - pc._own_labels) @ head
        else:
            learned -= phase.weight * p * errors * signs
    bias = (learned - expected).norm() / expected.norm()
    assert float((sums["bias"] / (expected**2).sum()).sqrt()) == pytest.approx(float(bias), rel=1e-6)


@pytest.mark.parametrize(
    "settings", [{"solver": "state", "sweeps": 1}, {"solver": "state", "sweeps": 6}, {"solver": "lagrangian"},
                 {"step_size": 0.5}, {"energy": "laplace"}, {"learning": "centred", "energy": "bernoulli"}], ids=str,
)  # fmt: skip
def test_bias_is_that_of_the_last_node_s_module(settings: dict[str, Any]) -> None:
    """|its bias's gradient less backprop's| / |backprop's|, for one sequence: whatever its signal is made of."""
    model = LinearChain()
    model.layers[-1].bias = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    one = {"inputs": X[:1], "labels": Y[:1]}
    model.zero_grad()
    (0.5 * (model(X[:1])["logits"] - Y[:1]).square().sum()).backward()
    expected = model.layers[-1].bias.grad
    assert expected is not None
    model.zero_grad()
    pc = PCModel(model, PCConfig(**{"nodes": NODES, "output": "gaussian", "precision": 3.0, "sweeps": 4, **settings}))
    found = pc.accumulate_grad(**one, num_items_in_batch=1).signal_bias
    learned = model.layers[-1].bias.grad
    difference = expected if learned is None else learned - expected
    assert found == pytest.approx(float(difference.norm() / expected.norm()), rel=1e-6)
    assert math.isnan(pc.relax(**one).signal_bias)


def test_observing_a_step_of_one_phase() -> None:
    """`relaxed` without a phase is a whole plain step, whatever the rule: its figures are all there."""
    pc = PCModel(make("gpt2"), PCConfig(learning="one_sided", relaxed_fraction=0.1))
    with pc.relaxed(batch()) as relaxation:
        pc.learning_pass(batch())[0].backward()
        found = summary(pc.observe(relaxation))
    assert found["signal_bias"] == pytest.approx(found["relaxed_fraction"]) != 0


@pytest.mark.parametrize(
    "strengths", [[], [1.0], [0.5, 0.25], [1.0, 1.0], [1.0, 0.5, 0.7], [1.0, 0.0], [1.0, -0.5], [1.0, float("nan")],
                  [1.0, "0.5"], [True, 0.5], [float("inf"), 1.0], 0.5, "1", [0.9**k for k in range(9)],
                  [1 - 1e-4 * k for k in range(100000)]], ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_strengths_out_of_range(strengths: Any) -> None:
    """Strengths that do not fall from 1, or are no numbers: an error that names them and what is allowed."""
    with pytest.raises(ValueError, match=r"PCConfig\.strengths=.* is not allowed: a list of two to 8 Python numbers"):
        PCConfig(learning="one_sided", strengths=strengths)


@pytest.mark.parametrize("strengths", [[1, 0.99, 0.98, 0.97], [1, 1 - 1e-16], [1, 1 - 1e-7]], ids=str)
def test_strengths_too_close(strengths: list[float]) -> None:
    """Shares in the hundreds would multiply what each phase leaves: an error."""
    with pytest.raises(ValueError, match=r"too close together|under the one before"):
        PCConfig(learning="one_sided", strengths=strengths)


@pytest.mark.parametrize("strengths", [[1, 0.1, 0.01, 0.001], [1, 1e-8, 1e-9, 1e-12]], ids=str)
def test_strengths_too_far_apart(strengths: list[float]) -> None:
    """The first would weigh so little that a half precision loses its signal, which the regime is read from."""
    with pytest.raises(ValueError, match="too far apart"):
        PCConfig(learning="one_sided", strengths=strengths)


def test_strengths_belong_to_one_sided() -> None:
    """Given to another rule they would say nothing: an error."""
    with pytest.raises(ValueError, match=r"strengths=\[1, 0\.5\] needs learning='one_sided', not 'plain'"):
        PCConfig(strengths=[1, 0.5])


@pytest.mark.parametrize("learning", RULES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_sweep_is_backprop(learning: str, name: str) -> None:
    """At T = 1 every rule leaves backprop's gradient, dropout included: its phases share their masks."""
    found = []
    dropout = 0.0 if learning == "wake_sleep" else 0.1  # drawing labels moves the generator that masks come from
    for rule in ("plain", learning):
        model = make(name, dropout=dropout)
        torch.manual_seed(3)
        PCModel(model, PCConfig(sweeps=1, learning=rule)).accumulate_grad(**batch())
        found.append(gradients(model))
    assert worst(found[1], found[0]) < 1e-4


def test_wake_sleep_is_the_sum_of_its_parts() -> None:
    """The gradient at the labels, less that at drawn labels, plus backprop's at drawn labels."""
    inputs = batch()
    model = make("gpt2").double()
    pc = PCModel(model, PCConfig(relative_std=1.0, sweeps=6, learning="wake_sleep"))
    pc.accumulate_grad(**inputs)
    drawn = pc._own_labels
    assert drawn is not None
    assert torch.equal(drawn.eq(-100), pc.output.split(inputs)[1].eq(-100))
    pc.detach()
    parts = []
    for labels, sweeps in ((None, 6), (drawn, 6), (drawn, 1)):
        other = make("gpt2").double()
        config = PCConfig(relative_std=1.0, sweeps=sweeps)
        given = inputs if labels is None else {**inputs, "shift_labels": labels}
        PCModel(other, config).accumulate_grad(**given)
        parts.append(gradients(other))
    expected = {name: parts[0][name] - parts[1][name] + parts[2][name] for name in parts[0]}
    assert worst(gradients(model), expected) < 1e-9


def test_a_phase_that_starts_warm_ends_where_a_cold_one_does() -> None:
    """Starting away from the labels where the errors towards them point saves sweeps; the equilibrium is the same."""
    pc = PCModel(make("gpt2").double(), PCConfig(relative_std=1.0, sweeps=40, learning="centred"))
    inputs, found = batch(), []
    towards, away = pc.phases
    for phases in ((towards, away), (towards, type(away)(-1.0, -0.5))):
        for phase in phases:
            with pc.relaxed(inputs, phase=phase) as relaxation:
                pc.learning_pass(inputs)[0].backward()
        found.append([site.leaf.detach() for site in relaxation.sites])
        assert relaxation.sweeps == (38 if phases[1].warm else 40)
    for warm, cold in zip(*found, strict=True):
        torch.testing.assert_close(warm, cold, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("half", "both"), [("mirrored", "centred"), ("balanced", "extrapolated")])
def test_half_of_the_sequences_on_each_side(half: str, both: str) -> None:
    """Of a sequence given twice, one copy takes each side: that is the rule which takes both sides of every one.

    So it is where it comes alone in two batches, since the signs go on.
    """
    once = {name: value[:1] for name, value in batch().items()}
    twice = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in once.items()}
    found = []
    for rule, batches in ((both, [once]), (half, [twice]), (half, [once, once])):
        model = make("gpt2").double()
        pc = PCModel(model, PCConfig(relative_std=1.0, sweeps=40, learning=rule, tolerance=1e-12))  # type: ignore[arg-type]
        for given in batches:
            pc.accumulate_grad(**given, num_items_in_batch=len(batches) * given["labels"][:, 1:].numel())
        found.append(gradients(model))
    assert worst(found[1], found[0]) < 1e-6
    assert worst(found[2], found[0]) < 1e-6


@pytest.mark.parametrize("learning", ["centred", "extrapolated"])
def test_no_phase_ends_above_rest(learning: str) -> None:
    """However soft the errors, and wherever a phase begins, no sequence's free energy ends above that of rest."""
    pc = PCModel(make("gpt2"), PCConfig(relative_std=10.0, sweeps=3, learning=learning))  # type: ignore[arg-type]
    refused = 0.0
    for phase in pc.phases:
        with pc.relaxed(batch(), phase=phase) as relaxation:
            pc.learning_pass(batch())[0].backward()
        assert (relaxation.free_energy() <= relaxation.rest_energy() + 1e-4).all()
        refused += float(relaxation.refused) if phase.warm else 0.0
    assert refused > 0  # there was something to refuse


@pytest.mark.parametrize("learning", ["centred", "extrapolated", "balanced"])
def test_accumulation(tmp_path: Path, learning: str) -> None:
    """One batch of 8 and two of 4 train alike."""
    config = PCConfig(sweeps=3, relative_std=0.5, learning=learning)  # type: ignore[arg-type]
    whole = trained(tmp_path / "a", config, per_device_train_batch_size=8)
    halves = trained(tmp_path / "b", config, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert (whole - halves).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("learning", [rule for rule in RULES if rule != "plain"])
def test_training(tmp_path: Path, learning: str) -> None:
    """Under the Trainer the logged loss is the feedforward one, the target is held, all phases' sweeps are counted."""
    config = PCConfig(sweeps=4, relaxed_fraction=0.1, learning=learning)  # type: ignore[arg-type]
    run = trainer(tmp_path, config, max_steps=30, learning_rate=1e-4)
    run.train()
    bp = trainer(tmp_path, None, BackpropTrainer, max_steps=1, learning_rate=1e-4)
    bp.train()
    logs = [entry for entry in run.state.log_history if "relaxed_fraction" in entry]
    assert logs[0]["loss"] == pytest.approx(bp.state.log_history[0]["loss"], rel=1e-5)
    assert logs[-1]["relaxed_fraction"] == pytest.approx(0.1, rel=0.2)
    expected = {"centred": 4 + 2, "extrapolated": 4 + 2 + 2 + 2, "mirrored": 4, "balanced": 4 + 2,
                "one_sided": 4 + 3 * 2, "wake_sleep": 4 + 4 + 1}[learning]  # fmt: skip
    assert logs[-1]["energy/output"] == pytest.approx(logs[-1]["loss"], rel=0.1)  # of states on either side
    assert logs[-1]["sweeps"] == pytest.approx(expected, abs=0.5)


def test_rules_need_the_error_solver() -> None:
    """Several phases start from each other's errors, which other solvers do not keep: an error by name."""
    with pytest.raises(ValueError, match="learning='centred' needs solver='error'"):
        PCConfig(learning="centred", solver="state")
    with pytest.raises(ValueError, match="learning='sharp' is unknown"):
        PCConfig(learning="sharp")  # type: ignore[arg-type]


def test_own_labels_differ_from_step_to_step() -> None:
    """Every step draws labels anew, dropout or not, and the same after the same seed."""
    found: list[Any] = []
    for _ in range(2):
        pc = PCModel(make("gpt2"), PCConfig(learning="wake_sleep", relative_std=0.3))
        torch.manual_seed(5)
        for _ in range(2):
            pc.accumulate_grad(**batch())
            found.append(pc._own_labels)
        pc.detach()
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_phases_need_the_automatic_step() -> None:
    """With a fixed step the phases relax by unequal amounts, and their even orders would not cancel: an error."""
    with pytest.raises(ValueError, match=r"needs step_size='auto', not 0\.5"):
        PCConfig(learning="centred", step_size=0.5)


def test_an_overflow_in_one_phase_stays_there() -> None:
    """Where the first phase's gradients overflow, as under a loss scale, the next one starts at rest and is finite."""
    pc = PCModel(make("gpt2"), PCConfig(relative_std=0.5, sweeps=3, learning="centred"))
    for phase, scale in zip(pc.phases, (3e39, 1.0), strict=True):
        with pc.relaxed(batch(), phase=phase) as relaxation:
            (scale * pc.learning_pass(batch())[0]).backward()
            assert relaxation.free_energy().isfinite().all()


@pytest.mark.parametrize("learning", ["centred", "extrapolated", "one_sided", "wake_sleep"])
def test_variances_are_learned_from_the_first_phase(learning: str) -> None:
    """They are those of the errors that are reported, whatever other phases a rule has; errors of those count not."""
    found = []
    for rule in ("plain", learning):
        settings: dict[str, Any] = {"energy": "learned_variance", "learning": rule, "relative_std": 0.3}
        pc = PCModel(make("gpt2").double(), PCConfig(sweeps=4, **settings))
        pc.accumulate_grad(**batch())
        pc.steer()
        found.append(torch.tensor([node.energy.state_dict()["log_std"] for node in pc.nodes]))
    assert found[0].any()
    assert torch.equal(*found)


def test_rest_has_the_energy_of_its_variances() -> None:
    """Where no error has an energy, of a learned sigma, a warm phase is held against rest with it: nothing is refused
    that a cold one would take."""
    for log_std in (-0.5, 0.5):
        settings: dict[str, Any] = {"energy": "learned_variance", "learning": "centred", "relative_std": 0.3}
        pc = PCModel(make("gpt2"), PCConfig(sweeps=4, **settings))
        pc.accumulate_grad(**batch())
        for node in pc.nodes:
            node.energy.load_state_dict({"log_std": [log_std] * 32})
        found = pc.accumulate_grad(**batch())
        assert found.refused == 0
        with pc.relaxed(batch(), phase=pc.phases[0]) as cold:
            pc.learning_pass(batch())[0].backward()
        assert cold.feedforward_energy is not None
        assert (cold.rest_energy() - cold.signed(cold.feedforward_energy)).sign().mean() == (1 if log_std > 0 else -1)


@pytest.mark.parametrize(
    ("rule", "strengths", "expected"),
    [
        ("plain", None, lambda t: (2 * t + 1) / 3),
        ("mirrored", None, lambda t: (2 * t + 1) / 3),
        ("centred", None, lambda t: (4 * t - 2) / 3),
        ("balanced", None, lambda t: (4 * t - 2) / 3),
        ("one_sided", None, lambda t: (8 * t - 8) / 3),
        ("one_sided", [1.0, 0.2], lambda t: (4 * t - 2) / 3),
        ("wake_sleep", None, lambda t: (4 * t + 5) / 3),
    ],
)
def test_a_step_costs_its_passes(rule: str, strengths: list[float] | None, expected: Callable[[int], float]) -> None:
    """In steps of backprop, from three sweeps on, as the table of the guide has it; one plain sweep is one."""
    for sweeps in (3, 8):
        assert cost(phases_of(rule, strengths), sweeps) == pytest.approx(expected(sweeps))
    assert cost(phases_of("plain"), 1) == 1


def test_what_cancels_in_each_sequence() -> None:
    """Several phases of the whole batch and its own labels: in others the bias averages out, or is there to stay."""
    assert {rule for rule, phases in RULES.items() if cancels_in_each_sequence(phases)} == {
        "centred", "extrapolated", "one_sided"
    }  # fmt: skip
    assert cancels_in_each_sequence(taken_to_zero(1.0, 0.5))
