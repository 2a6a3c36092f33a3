"""Solvers against the closed form of linear Gaussian networks, and against what their method says of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chains import X, Y, attach, backprop
from oracles.linear import LinearChain
from test_invariants import batch, gradients, make, worst
from torch import Tensor, nn
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_pc import NodeSpec, PCConfig, PCModel
from hf_pc.placement import resolve

SOLVERS = {
    "error": {"solver": "error", "sweeps": 300},
    "error, fixed step": {"solver": "error", "sweeps": 600, "step_size": 0.3},
    "state": {"solver": "state", "sweeps": 3000},
    "state, fixed step": {"solver": "state", "sweeps": 1500, "step_size": 0.3},
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("settings", SOLVERS)
def test_equilibrium_is_least_squares(settings: str, residual: bool) -> None:
    """`error` and `state` reach the closed form's errors to 1e-6 and its energy r S^-1 r / 2, and rest there."""
    model = LinearChain(residual=residual)
    errors, energy = model.equilibrium(X, Y, precision=1.5)
    found = attach(model, **SOLVERS[settings]).relax(inputs=X, labels=Y)
    for expected, error in zip(errors, found.errors.values(), strict=True):
        np.testing.assert_allclose(error.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found.sequence_free_energy.numpy(), energy, rtol=1e-9)
    assert found.residual < 1e-5


@pytest.mark.parametrize(
    ("name", "step"), [("SGD", 0.3), ("SGD(momentum=0.8)", 0.1), ("Adam", 0.02), ("RMSprop(alpha=0.99)", 0.001)]
)
def test_a_torch_optimizer_moves_the_states(name: str, step: float) -> None:
    """Any class of torch.optim reaches the same equilibrium, as near as its own steps let it come."""
    model = LinearChain()
    errors, _ = model.equilibrium(X, Y, precision=1.5)
    pc = attach(model, solver="state", sweeps=2000, step_size=step, state_optimizer=name)
    found = pc.relax(inputs=X, labels=Y)
    for expected, error in zip(errors, found.errors.values(), strict=True):
        np.testing.assert_allclose(error.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("solver", ["error", "state"])
@pytest.mark.parametrize("residual", [False, True])
def test_weights_learn_from_the_equilibrium(solver: str, residual: bool) -> None:
    """The gradient of each weight is that of its own node's energy at the equilibrium: -p e x' of the state below."""
    model = LinearChain(residual=residual)
    errors, _ = model.equilibrium(X, Y, precision=1.5)
    attach(model, solver=solver, sweeps=3000, tolerance=1e-9).accumulate_grad(inputs=X, labels=Y)
    below = X.numpy()
    for layer, matrix, error in zip(model.layers, model.matrices(), errors, strict=True):
        assert layer.weight.grad is not None
        np.testing.assert_allclose(layer.weight.grad.numpy(), -1.5 * error.T @ below / Y.numel(), atol=1e-7)
        below = below @ matrix.T + error


def test_weights_learn_by_the_step_that_errors_take() -> None:
    """A single sweep of a fixed step of a half: each node passes on half of the signal that backprop would."""
    model = LinearChain()
    expected = backprop(model)
    attach(model, solver="error", sweeps=1, step_size=0.5).accumulate_grad(inputs=X, labels=Y)
    for i, layer in enumerate(model.layers):
        torch.testing.assert_close(layer.weight.grad, expected[f"layers.{i}.weight"] * 0.5 ** (3 - i))
    torch.testing.assert_close(model.head.weight.grad, expected["head.weight"])


@pytest.mark.parametrize("step", ["auto", 0.3])
def test_what_no_tolerance_asks_for_is_not_measured(step: Any) -> None:
    """Between the first and the last sweep gradients are moved along and not measured: asking for them is an error."""
    pc = attach(LinearChain(), sweeps=3, step_size=step)
    with pc.relaxed({"inputs": X, "labels": Y}) as relaxation:
        with pytest.raises(RuntimeError, match="without a tolerance only those at rest and the last"):
            relaxation.residual()
        loss, _ = pc.learning_pass({"inputs": X, "labels": Y})
        loss.backward()
        assert 0 < float(relaxation.residual().max()) < 1


@pytest.mark.parametrize("solver", ["error", "state"])
def test_a_fixed_step_ends_at_rest(solver: str) -> None:
    """With a tolerance it stops once every sequence's residual is under it, and not a sweep before."""
    sweeps = []
    never = 1e-300
    for tolerance in (0.3, 0.03, never):
        settings = {"solver": solver, "sweeps": 200, "step_size": 0.3, "tolerance": tolerance}
        pc = attach(LinearChain(), **settings)
        with pc.relaxed({"inputs": X, "labels": Y}) as relaxation:
            residual = relaxation.residual().max()
            sweeps.append(relaxation.sweeps)
        pc.detach()
        assert residual < tolerance or tolerance == never
        if tolerance != never:
            shorter = attach(LinearChain(), **settings | {"sweeps": relaxation.sweeps, "tolerance": never})
            with shorter.relaxed({"inputs": X, "labels": Y}) as relaxation:
                assert relaxation.residual().max() >= tolerance
            shorter.detach()
    assert sweeps[0] < sweeps[1] < sweeps[2] == 199


def test_state_carries_a_signal_one_node_a_sweep() -> None:
    """After T sweeps, exactly the T - 1 nodes nearest to the output have left their predictions."""
    layers = 5
    for sweeps in range(1, layers + 3):
        model = LinearChain(layers=layers)
        found = attach(model, solver="state", sweeps=sweeps, step_size=0.1).relax(inputs=X, labels=Y)
        moved = [bool(error.abs().max() > 0) for error in found.errors.values()]
        assert moved == [node >= layers - (sweeps - 1) for node in range(layers)]


@pytest.mark.parametrize("residual", [False, True])
def test_lagrangian_reaches_backprops_gradient(residual: bool) -> None:
    """At PC-ALM's fixed point x = mu and every weight has backprop's gradient, which plain PC's is not."""
    model = LinearChain(residual=residual)
    expected = backprop(model)
    found = attach(model, solver="lagrangian", sweeps=3000, step_size=0.2).accumulate_grad(inputs=X, labels=Y)
    assert max(found.displacement.values()) < 1e-6
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-9)
    other = LinearChain(residual=residual)
    attach(other, solver="state", sweeps=500).accumulate_grad(inputs=X, labels=Y)
    assert other.layers[0].weight.grad is not None
    assert not torch.allclose(other.layers[0].weight.grad, expected["layers.0.weight"], rtol=0.1)


@pytest.mark.parametrize("solver", ["state", "lagrangian"])
def test_one_backward_pass_or_many(solver: str) -> None:
    """Differentiating piece by piece gives the gradients and the report of one backward pass at the end."""
    gradients, reports = [], []
    for piecewise in (True, False):
        model = LinearChain()
        pc = attach(model, solver=solver, sweeps=6, step_size=0.2)
        pc.solver.piecewise = piecewise  # type: ignore[attr-defined]
        reports.append(pc.accumulate_grad(inputs=X, labels=Y))
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert reports[0].residual == pytest.approx(reports[1].residual)
    assert reports[0].relaxed_fraction == pytest.approx(reports[1].relaxed_fraction)


def test_step_factor_slows_one_node() -> None:
    """A node's step_factor scales its own steps and no other's."""
    rules = [NodeSpec(r"blocks\.[01]"), NodeSpec("blocks.2", step_factor=0.5)]
    slow = attach(LinearChain(), nodes=rules, solver="state", sweeps=2, step_size=0.2).relax(inputs=X, labels=Y)
    usual = attach(LinearChain(), solver="state", sweeps=2, step_size=0.2).relax(inputs=X, labels=Y)
    torch.testing.assert_close(slow.errors["blocks.2"], usual.errors["blocks.2"] * 0.5)


def test_auto_never_raises_the_free_energy_in_states() -> None:
    """With step "auto" more sweeps never mean more free energy, whatever the precision."""
    for precision in (0.01, 1.0, 100.0):
        before = None
        for sweeps in (1, 2, 3, 5, 8, 13):
            pc = attach(LinearChain(residual=True), solver="state", sweeps=sweeps, precision=precision)
            now = pc.relax(inputs=X, labels=Y).sequence_free_energy
            assert before is None or bool((now <= before * (1 + 1e-12)).all())
            before = now


def pieces(name: str, piecewise: bool, **settings: Any) -> tuple[dict[str, Tensor], PCModel]:
    model, inputs = make(name), batch()
    pc = PCModel(
        model, PCConfig(**{"solver": "state", "sweeps": 4, "relative_std": 0.3, "step_size": 0.3, **settings})
    )
    pc.solver.piecewise = piecewise  # type: ignore[attr-defined]
    for _ in range(2):
        pc.accumulate_grad(**inputs)
    return gradients(model), pc


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("nodes", ["block", "sublayer", "linear"])
def test_piece_by_piece_on_transformers(name: str, nodes: str) -> None:
    """On any preset the gradients that piecewise differentiation accumulates are those of one backward pass."""
    assert worst(pieces(name, True, nodes=nodes)[0], pieces(name, False, nodes=nodes)[0]) < 1e-5


def test_shared_graphs_fall_back_to_one_backward_pass() -> None:
    """T5's position bias is shared by its blocks: the solver notices, goes on in one piece, and loses nothing."""
    set_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
    found = []
    for piecewise in (True, False):
        set_seed(0)
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))
        pc = PCModel(model, PCConfig(solver="state", sweeps=6, relative_std=0.3))
        pc.solver.piecewise = piecewise  # type: ignore[attr-defined]
        pc.accumulate_grad(input_ids=batch()["input_ids"], labels=batch()["input_ids"][:, :8].contiguous())
        assert not pc.solver.piecewise  # type: ignore[attr-defined]
        found.append(gradients(model))
    assert worst(found[0], found[1]) < 1e-5


def test_state_and_error_agree_on_a_transformer() -> None:
    """Relaxed to the end, both solvers give a GPT-2 the same free energy and the same gradients."""
    found = []
    for settings in ({"solver": "state", "sweeps": 600}, {"solver": "error", "sweeps": 100}):
        model = make("gpt2").double()
        for table in (model.transformer.wte, model.transformer.wpe):  # at its initial 0.02 the first layer norm
            table.weight.data *= 20  # multiplies by 35, and states would take thousands of sweeps
        pc = PCModel(model, PCConfig(precision=30.0, **settings))
        report = pc.accumulate_grad(**batch())
        assert report.residual < 1e-4
        found.append((report.free_energy, gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert worst(found[0][1], found[1][1]) < 1e-3


@pytest.mark.parametrize("nodes", ["h.0.mlp", "transformer.h.0"])
@pytest.mark.parametrize("sweeps", [2, 4])
def test_nodes_that_share_a_graph_with_the_head(nodes: str, sweeps: int) -> None:
    """A node inside a block leaves part of its graph to what is above: the solver takes one backward pass."""
    for attention in (None, "categorical"):
        model = make("gpt2")
        config = PCConfig(nodes=nodes, attention_energy=attention, solver="state", sweeps=sweeps, relative_std=0.3)
        pc = PCModel(model, config)
        assert pc.accumulate_grad(**batch()).free_energy > 0
        pc.detach()


@pytest.mark.parametrize("solver", ["error", "state"])
def test_errors_stay_in_the_dtype_of_the_states(solver: str) -> None:
    """Rates and shares are kept per sequence in float64; the errors they move stay float32."""
    pc = PCModel(make("gpt2"), PCConfig(solver=solver, relative_std=1.5, sweeps=5, tolerance=1e-3))
    with pc.relaxed(batch()) as relaxation:
        assert {site.leaf.dtype for site in relaxation.sites} == {torch.float32}


@pytest.mark.parametrize(("step", "factor"), [(0.5, 0.5), (0.5, 2.0), (1.0, 0.5), (2.0, 0.25), (0.7, 1.0)])
def test_weights_learn_by_the_step_of_their_own_node(step: float, factor: float) -> None:
    """A single sweep of a fixed step: a node passes on step times its step_factor of the signal that comes to it."""
    model = LinearChain()
    expected = backprop(model)
    nodes = [NodeSpec(r"blocks\.\d+", step_factor=factor)]
    attach(model, nodes=nodes, solver="error", sweeps=1, step_size=step).accumulate_grad(inputs=X, labels=Y)
    for i, layer in enumerate(model.layers):
        torch.testing.assert_close(layer.weight.grad, expected[f"layers.{i}.weight"] * (step * factor) ** (3 - i))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_warm_phase_starts_where_the_series_points(factor: float) -> None:
    """At b e0 + b^2 (e1 - e0), e0 the first move from rest towards the labels and e1 the errors after the last step.

    (What learns by part of a step sends another signal down: there the top node alone is held against more sweeps.)
    """
    nodes = [NodeSpec(r"blocks\.\d+", step_factor=factor)]
    settings: dict[str, Any] = {"nodes": nodes, "precision": 30.0, "anderson_depth": 0}
    moves = []
    for sweeps in (2, 4):  # one move from rest, three
        pc = attach(LinearChain(), sweeps=sweeps, **settings)
        moves.append(pc.relax(inputs=X, labels=Y).errors)
        pc.detach()
    for learning in ("centred", "extrapolated"):
        pc = attach(LinearChain(), sweeps=3, learning=learning, **settings)
        for phase in pc.phases:
            with pc.relaxed({"inputs": X, "labels": Y}, phase=phase) as relaxation:
                b = phase.strength
                for site in relaxation.sites[0 if factor == 1 else -1 :] if phase.warm else ():
                    e0, e1 = (errors[site.label] for errors in moves)
                    expected = b * e0 + b**2 * (e1 - e0)
                    torch.testing.assert_close(site.leaf.detach(), expected, rtol=1e-9, atol=1e-14)
                pc.learning_pass({"inputs": X, "labels": Y})[0].backward()


@pytest.mark.parametrize("step", ["auto", 1.0])
def test_one_sweep_is_one_pass(step: Any) -> None:
    """Where no error has moved there is nothing to confirm: the model runs once, and says so."""
    model = make("gpt2")
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *given: calls.append(0))
    assert PCModel(model, PCConfig(sweeps=1, step_size=step)).accumulate_grad(**batch()).sweeps == 1
    assert len(calls) == 1


class Aside(nn.Module):
    """What `aside` computes goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.way, self.aside, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        self.aside(x)
        return SequenceClassifierOutput(logits=self.head(self.way(x).tanh()))


@pytest.mark.parametrize("solver", ["error", "state"])
@pytest.mark.parametrize("step", ["auto", 0.3])
def test_a_node_without_a_way_to_the_output_rests(step: Any, solver: Any) -> None:
    """No signal comes to it: it stays at its prediction, and the others relax as without it. Alone it is refused."""
    found = []
    for nodes in ("way,aside", "way"):
        set_seed(0)
        inputs = {"x": torch.randn(5, 4), "labels": torch.arange(5) % 3}
        config = PCConfig(nodes=nodes, solver=solver, step_size=step, precision=1.0)
        found.append(PCModel(Aside(), config).relax(**inputs).errors)
    beside, alone = found
    assert bool((beside["aside"] == 0).all())
    assert bool((beside["way"] != 0).any())
    torch.testing.assert_close(beside["way"], alone["way"])
    with pytest.raises(ValueError, match="no signal came to any node of Aside: its logits do not follow from them"):
        PCModel(Aside(), replace(config, nodes="aside")).relax(**inputs)


def weighted_sum() -> tuple[Any, dict[str, Tensor]]:
    """A model whose head reads a weighted sum of what all layers compute, and a batch."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4, layerdrop=0.0,
        num_conv_pos_embedding_groups=2, use_weighted_layer_sum=True, num_labels=3, classifier_proj_size=8,
    )  # fmt: skip
    model = Wav2Vec2ForSequenceClassification(config).double().eval()
    return model, {"input_values": torch.randn(2, 100).double(), "labels": torch.tensor([0, 2])}


@pytest.mark.parametrize("sweeps", [2, 6])
def test_a_head_that_reads_what_blocks_read(sweeps: int) -> None:
    """Where the head shares a part of the graph with a block gradients are those of one backward pass."""
    model, given = weighted_sum()
    names = [node.name for node in resolve(model, PCConfig())]
    found = []
    for nodes in ("block", names):
        pc = PCModel(model, PCConfig(nodes=nodes, solver="state", precision=3.0, sweeps=sweeps))
        for _ in range(2):
            model.zero_grad()
            pc.accumulate_grad(**given)
        found.append(gradients(model))
        pc.detach()
    assert worst(*found) < 1e-9


@pytest.mark.parametrize("solver", ["error", "state"])
def test_a_head_that_reads_layers_reads_their_states(solver: str) -> None:
    """transformers collects what layers compute by hooks that the first forward pass leaves behind: whether there was
    one before nodes came is no matter."""
    found = []
    for before in (False, True):
        model, given = weighted_sum()
        if before:
            model(**given)
        PCModel(model, PCConfig(solver=solver, precision=3.0, sweeps=4)).accumulate_grad(**given)
        found.append(gradients(model))
    assert worst(*found) < 1e-9
