"""Half precision, logits of any size, sequences and batches of one: held against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_invariants import batch, gradients, make
from torch import Tensor

from hf_pc import PCConfig, PCModel
from hf_pc.learning import RULES
from hf_pc.measurements import relaxed_fraction, residual

CONFIG = {"sweeps": 3, "relative_std": 0.3}


def learned(model: Any, inputs: dict[str, Tensor], scale: float = 1.0, **values: Any) -> dict[str, Tensor]:
    """Gradients in float64, of a loss that was scaled on its way to `backward()`, as a gradient scaler does."""
    pc = PCModel(model, PCConfig(**{**CONFIG, **values}))
    for phase in pc.phases:
        with pc.relaxed(inputs, phase=phase) as relaxation:
            loss, _ = pc.learning_pass(inputs)
            (scale * loss / relaxation.tokens).backward()
            pc.observe(relaxation)
            assert bool(relaxation.free_energy().isfinite().all())
    pc.detach()
    return {name: gradient.double() / scale for name, gradient in gradients(model).items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    gap = sum(float((found[name] - gradient).square().sum()) for name, gradient in expected.items())
    return (gap / sum(float(gradient.square().sum()) for gradient in expected.values())) ** 0.5


@pytest.mark.parametrize(
    ("dtype", "scale", "rounding"), [(torch.bfloat16, 1.0, 0.03), (torch.float16, 1024.0, 0.004), (None, 1.0, 1e-5)]
)
@pytest.mark.parametrize("values", [{}, {"learning": "centred"}, {"energy": "laplace"}], ids=str)
def test_low_precision_learns_the_same(dtype: Any, scale: float, rounding: float, values: dict[str, Any]) -> None:
    """Weights in bfloat16, in float16 with a scaled loss and in float32 get float64's gradient, to their rounding."""
    expected = learned(make("gpt2").to(dtype or torch.float32).double(), batch(), **values)
    found = learned(make("gpt2").to(dtype or torch.float32), batch(), scale, **values)
    assert distance(found, expected) < rounding


@pytest.mark.parametrize("solver", ["state", "lagrangian"])
def test_states_learn_the_same_in_float32(solver: str) -> None:
    """Errors that are differences of states have fewer digits: in float32 enough of them."""
    found, expected = (learned(make("gpt2").to(dtype), batch(), solver=solver) for dtype in (None, torch.float64))
    assert distance(found, expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_learns_the_same(dtype: torch.dtype) -> None:
    """Under autocast, with the loss scaled, the gradient is float64's to the rounding of the states."""
    expected = learned(make("gpt2").double(), batch())
    with torch.autocast("cpu", dtype=dtype):
        found = learned(make("gpt2"), batch(), 256.0)
    assert distance(found, expected) < 0.03


def fitted() -> Any:
    """A model that backprop has fitted to the batch, so that a rounded logit counts for more than a move."""
    model = make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.ones(())
    while loss > 0.1:
        model.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("values", [{"sweeps": 4}, {"learning": "one_sided", "sweeps": 5}], ids=str)
def test_relaxation_in_lower_precision(dtype: str, values: dict[str, Any]) -> None:
    """Only sweeps between the first and the last run in it; the gradient is that of relaxing in float32 to the
    rounding of the errors."""
    model = make("gpt2")
    seen: list[list[torch.dtype]] = [[], []]
    for name, dtypes in zip(("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"), seen, strict=True):
        model.get_submodule(name).register_forward_hook(lambda m, a, output, to=dtypes: to.append(output.dtype))
    found = learned(model, batch(), **values, relaxation_dtype=dtype)
    expected = learned(make("gpt2"), batch(), **values)
    assert 0 < distance(found, expected) < 0.004
    rule = RULES[values.get("learning", "plain")]
    assert seen[0] == [torch.float32]  # the first block runs once, and learns through that
    kinds = []
    for phase in rule:
        at_rest = [] if phase.warm else [torch.float32]
        lower = [getattr(torch, dtype)] * (values["sweeps"] - 2)
        kinds += [*at_rest, *(lower[:-1] if phase.warm else lower), torch.float32]
    assert seen[1] == kinds


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("learning", ["plain", "centred", "one_sided"])
def test_rounding_refuses_no_move(dtype: str, learning: str) -> None:
    """On a fitted batch, relaxed weakly or strongly, sequences relax as in float32 and the regime is read as there."""
    for relative_std in (0.05, 1.0):
        reports, found = [], []
        for lower in (None, dtype):
            model = fitted()
            config = PCConfig(learning=learning, sweeps=5, relative_std=relative_std, relaxation_dtype=lower)  # type: ignore[arg-type]
            reports.append(PCModel(model, config).accumulate_grad(**batch()))
            found.append({name: gradient.double() for name, gradient in gradients(model).items()})
        full, less = reports
        assert less.refused == full.refused == 0
        assert less.feedforward_energy == full.feedforward_energy > full.free_energy
        assert less.relaxed_fraction == pytest.approx(full.relaxed_fraction, rel=0.01)
        assert less.residual < full.residual + 5 * torch.finfo(getattr(torch, dtype)).eps
        assert distance(found[1], found[0]) < 0.01


@pytest.mark.parametrize("less", [0.1, 0.9])
def test_the_last_pass_is_compared_with_rest_alone(less: float) -> None:
    """However far sweeps in half precision understate their loss, errors stand that are better than none."""
    model = make("gpt2")
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    model.lm_head.register_forward_hook(lambda m, a, out: less * out if torch.is_autocast_enabled("cpu") else None)
    pc = PCModel(model, PCConfig(sweeps=4, relative_std=0.3, relaxation_dtype="bfloat16"))
    found = pc.accumulate_grad(**batch())
    assert found.refused == 0
    assert found.sweeps == 4  # the last was not made again
    assert found.free_energy < found.feedforward_energy


def test_lower_precision_needs_more_to_be_lower_than() -> None:
    """Weights that are not in float32, and autocast around the step, are refused by name."""
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match="relaxation_dtype='bfloat16' needs weights in float32"):
            PCModel(make("gpt2").to(dtype), PCConfig(relaxation_dtype="bfloat16"))
    pc = PCModel(make("gpt2"), PCConfig(relaxation_dtype="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="not allowed under autocast"):
        pc.accumulate_grad(**batch())


@pytest.mark.parametrize("solver", ["error", "state"])
@pytest.mark.parametrize("sure", [False, True])
def test_logits_of_ten_thousand(solver: str, sure: bool) -> None:
    """With logits of +-1e4, right or wrong, energies and gradients are finite and float64's to float32's rounding."""
    made = []
    for dtype in (torch.float64, torch.float32):
        model = make("gpt2").to(dtype)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # not the embedding's
        inputs = batch()
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            model.lm_head.weight.mul_(1e4 / logits.abs().max())
        if sure:  # every label is what the model says already: there is nothing to learn
            said = torch.cat([inputs["input_ids"][:, :1], logits.argmax(-1)[:, :-1]], 1)
            inputs["labels"] = said.where(inputs["labels"] != -100, -100)
        made.append(learned(model, inputs, solver=solver, relative_std=1e-3))
    assert all(bool(gradient.isfinite().all()) for gradient in made[1].values())
    size = max(float(gradient.abs().max()) for gradient in made[0].values())
    gap = max(float((made[1][name] - gradient).abs().max()) for name, gradient in made[0].items())
    assert gap < 1e-3 * size + 1e-6


@pytest.mark.parametrize("solver", ["error", "state", "lagrangian"])
def test_one_token_and_one_sequence(solver: str) -> None:
    """A single sequence of a single token learns from a label given beside it, in float32 as in float64; a shifted
    label that is not there is an error."""
    ids = torch.tensor([[7]])
    pc = PCModel(make("gpt2"), PCConfig(**CONFIG, solver=solver))
    with pytest.raises(ValueError, match="every label of the batch is ignored"):
        pc.accumulate_grad(input_ids=ids, labels=ids)
    pc.detach()
    inputs = {"input_ids": ids, "labels": ids, "shift_labels": torch.tensor([[3]])}
    found, expected = (
        learned(make("gpt2"), inputs, solver=solver),
        learned(make("gpt2").double(), inputs, solver=solver),
    )
    assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("values", [{}, {"attention_energy": "categorical"}, {"solver": "state"}], ids=str)
def test_a_sequence_that_is_masked_altogether(values: dict[str, Any]) -> None:
    """Of a sequence without any token to see nothing is learned: the gradient is that of the others."""
    inputs = batch()
    hidden = {name: value.clone() for name, value in inputs.items()}
    hidden["attention_mask"][1], hidden["labels"][1] = 0, -100
    others = {name: value[[0, 2, 3]] for name, value in inputs.items()}
    for dtype, rounding in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        found = learned(make("gpt2").to(dtype), hidden, **values)
        assert distance(found, learned(make("gpt2").double(), others, **values)) < rounding


@pytest.mark.parametrize("depth", [1, 3])
def test_autocast_around_a_step_moves_errors_as_one_around_the_model(depth: int) -> None:
    """Whatever the step is wrapped in, errors move in float32: only what the model computes is in half precision."""
    found = []
    for around in ("model", "step"):
        model = make("gpt2")
        if around == "model":
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "step"):
            found.append(learned(model, batch(), sweeps=5, relative_std=5.0, anderson_depth=depth))
    assert distance(*found) == 0


def test_what_all_but_vanishes_leaves_finite_ratios() -> None:
    """Squares of a signal that is nearly gone may be no normal numbers: its ratios are finite all the same."""
    gone = torch.tensor([1e-310, 0.0, 4.0], dtype=torch.float64)
    found = residual(torch.ones_like(gone), gone)
    torch.testing.assert_close(found, torch.tensor([1e155, 0.0, 0.5], dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert relaxed_fraction({"change": gone[2], "reference": gone[0]}) == pytest.approx(2e155, rel=1e-6)
    assert relaxed_fraction({"change": gone[2], "reference": gone[1]}) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_relaxing_sweeps_measure_half_precision_in_float32(dtype: torch.dtype) -> None:
    """What arrives at the top node in half precision is squared and summed in float32, not to the three digits that
    it has."""
    pc = PCModel(make("gpt2").to(dtype), PCConfig(sweeps=2, precision=3.0))
    with pc.relaxed(batch()) as relaxation:
        top = relaxation.top
        assert top is not None
        signal = relaxation.top_signal._at_rest
        assert signal is not None
        squares = signal.double().square().flatten(1).sum(1)
        torch.testing.assert_close(relaxation.top_signal.reference, squares.sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(top.signal_square, squares / 3, rtol=1e-5, atol=0)
