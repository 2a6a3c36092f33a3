"""Laws over configurations, shapes, masks, dtypes and node sets, drawn by hypothesis; together over 2,000 cases.

Linear chains in float64, where the laws are exact, and a GPT-2 of width 8, built once for each dtype.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.linear import LinearChain
from test_invariants import gradients
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_pc import NodeSpec, PCConfig, PCModel
from hf_pc.learning import RULES, phases_of
from hf_pc.report import RelaxationOutput

VOCABULARY, POSITIONS = 11, 7
ENERGIES = ("gaussian", "laplace", "categorical", "bernoulli", "learned_variance")
OUTPUTS = ("gaussian", "bernoulli", "categorical")
FLAG = st.booleans()
SOLVER = st.sampled_from(["error", "state"])
RULE = st.sampled_from(sorted(RULES))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def cases(count: int) -> Any:
    slow = [HealthCheck.too_slow]  # which other work on the machine makes it
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


def powers(low: int, high: int) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


linear_chain = functools.cache(LinearChain)


@dataclass
class Chain:
    """A linear chain with nodes of any energy on some of its layers, and a batch for it."""

    model: LinearChain
    nodes: list[NodeSpec]
    output: str
    inputs: dict[str, Tensor]

    def attach(self, **values: Any) -> PCModel:
        return PCModel(self.model, PCConfig(nodes=self.nodes, output=self.output, **values))

    def rows(self, chosen: Any) -> dict[str, Tensor]:
        return {name: value[chosen] for name, value in self.inputs.items()}


@st.composite
def chains(draw: Any, energies: tuple[str, ...] = ENERGIES) -> Chain:
    layers, width, rows, seed = (draw(st.integers(*span)) for span in ((1, 4), (2, 5), (1, 4), (0, 999)))
    rule = st.builds(NodeSpec, st.just("blocks"), st.sampled_from(energies), st.none() | powers(-3, 3))
    nodes = [replace(draw(rule), pattern=f"blocks.{i}") for i in range(layers) if i == seed % layers or draw(FLAG)]
    generator = torch.Generator().manual_seed(seed)
    x, y = draw(powers(-2, 2)) * torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    output = draw(st.sampled_from(OUTPUTS))
    labels = {"gaussian": y, "bernoulli": y.sigmoid(), "categorical": y.argmax(-1)}[output]
    return Chain(linear_chain(layers, width, draw(FLAG), seed % 3), nodes, output, {"inputs": x, "labels": labels})


def learned(pc: PCModel, inputs: dict[str, Tensor], items: int | None = None) -> dict[str, Tensor]:
    pc.model.zero_grad()
    torch.default_generator.manual_seed(0)
    pc.accumulate_grad(num_items_in_batch=items, **inputs)
    return gradients(pc.model)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> bool:
    """Whether gradients agree, relative to all of them: a weight's own may vanish."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    gap = math.sqrt(sum(float((found[n] - g).double().square().sum()) for n, g in expected.items()))
    return found.keys() == expected.keys() and gap <= tolerance * norm


def finite(out: RelaxationOutput) -> bool:
    figures = [out.free_energy, out.residual, out.relaxed_fraction, out.feedforward_energy, out.refused]
    figures += [*out.energies.values(), *out.displacement.values(), *out.sequence_free_energy.tolist()]
    return all(map(math.isfinite, figures))


@cases(200)
@given(st.lists(st.floats(1e-3, 0.95), min_size=1, max_size=9, unique=True), powers(-1, 1))
def test_strengths_are_refused_or_extrapolate(lower: list[float], scale: float) -> None:
    """Falling strengths are refused, as too close, too far apart or too many, or keep the first order in b and cancel
    all others up to their number; their configuration survives JSON."""
    strengths = [1.0, *sorted((min(0.99, scale * value) for value in lower), reverse=True)]
    try:
        config = PCConfig(learning="one_sided", strengths=strengths)
    except ValueError:
        return
    phases = phases_of("one_sided", config.strengths)
    assert sum(phase.share for phase in phases) == pytest.approx(1, rel=1e-9)
    for order in range(1, len(phases)):  # what is of this order in b cancels
        assert sum(phase.share * phase.strength**order for phase in phases) == pytest.approx(0, abs=1e-9)
    assert PCConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@cases(650)
@given(chains(("gaussian", "learned_variance")), RULE, FLAG, powers(-3, 3))
def test_one_sweep_is_backprop(chain: Chain, rule: str, relative: bool, strength: float) -> None:
    """At T = 1 Gaussian nodes of any precision leave backprop's gradient, whatever the rule and the output."""
    pc = chain.attach(sweeps=1, learning=rule, **{"relative_std" if relative else "precision": strength})
    found = learned(pc, chain.inputs)
    chain.model.zero_grad()
    pc.backprop_loss(chain.inputs).backward()
    assert same(found, gradients(chain.model), 1e-9)


@cases(600)
@given(chains(), SOLVER, RULE, st.integers(1, 7), powers(-3, 3), st.sampled_from([0.0, 0.1]))
def test_relaxation_never_ends_above_rest(
    chain: Chain, solver: str, rule: str, sweeps: int, std: float, tolerance: float
) -> None:
    """With step "auto" no sequence's free energy ends above that of rest, in any phase, and every figure is finite."""
    rule = rule if solver == "error" else "plain"
    torch.default_generator.manual_seed(0)  # labels that a model draws
    pc = chain.attach(solver=solver, learning=rule, sweeps=sweeps, relative_std=std, tolerance=tolerance)
    chain.model.zero_grad()
    for phase in pc.phases:
        with pc.relaxed(chain.inputs, phase=phase) as relaxation:
            pc.learning_pass(chain.inputs)[0].backward()
            now, rest = relaxation.free_energy(), relaxation.rest_energy()
            assert bool((now <= rest + 1e-10 * rest.abs()).all())
            pc.observe(relaxation)
    pc.steer()
    assert finite(pc.relax(**chain.inputs))
    assert all(bool(g.isfinite().all()) for g in gradients(chain.model).values())


@cases(500)
@given(chains(), SOLVER | st.just("lagrangian"), st.integers(1, 5), powers(-2, 1))
def test_batches_add_up(chain: Chain, solver: str, sweeps: int, std: float) -> None:
    """One batch, its rows in another order, and its rows one at a time leave the same gradient."""
    pc = chain.attach(solver=solver, sweeps=sweeps, relative_std=std)
    whole = learned(pc, chain.inputs)
    rows = len(chain.inputs["labels"])
    assert same(learned(pc, chain.rows(list(reversed(range(rows))))), whole, 1e-7)
    pc.model.zero_grad()
    for row in range(rows):
        pc.accumulate_grad(num_items_in_batch=chain.inputs["labels"].numel(), **chain.rows([row]))
    assert same(gradients(pc.model), whole, 1e-7)


@functools.cache
def gpt2(dtype: torch.dtype) -> Any:
    set_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 8, "n_layer": 2, "n_head": 2}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)).to(dtype).train()


PLACES: tuple[Any, ...] = ("block", "sublayer", "linear", ["transformer.h.0"], ["h.1.mlp", "transformer.wte"])


@st.composite
def configurations(draw: Any, least: int = 1) -> PCConfig:
    """Any that fits a GPT-2, but for the lagrangian's and torch's own steps, which promise nothing of F."""
    solver = draw(SOLVER)
    return PCConfig(
        nodes=draw(st.sampled_from(PLACES)), energy=draw(st.sampled_from(ENERGIES)), solver=solver,
        attention_energy=draw(st.sampled_from([None, None, "gaussian", "categorical"])),
        learning=draw(RULE) if solver == "error" else "plain",
        sweeps=draw(st.integers(least, 4)), relative_std=draw(powers(-3, 2)),
        dropout=draw(st.sampled_from(["replay", "off"])),
    )  # fmt: skip


@st.composite
def texts(draw: Any) -> dict[str, Tensor]:
    """Sequences with holes anywhere: a position that is masked is no label, and predicts none."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, POSITIONS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    mask = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    mask[0, :2] = True  # one label at least
    labels = ids.where(mask & mask.roll(1, 1), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@cases(120)
@given(configurations(), texts(), st.integers(1, 9))
def test_what_is_masked_changes_nothing(config: PCConfig, text: dict[str, Tensor], shift: int) -> None:
    """Whatever stands at masked positions, and in whichever order the sequences come, the gradient is the same, and
    so is what the next step begins with."""
    if config.learning in ("mirrored", "balanced", "wake_sleep"):  # by their sides, or by what is drawn
        config.learning = "centred"
    pc = PCModel(gpt2(torch.float64), config)
    try:
        expected = learned(pc, text)
        pc.steering.pause()
        hidden = text["attention_mask"] == 0
        other = torch.where(hidden, (text["input_ids"] + shift) % VOCABULARY, text["input_ids"])
        activities = []
        for given_ids in (text["input_ids"], other):
            assert same(learned(pc, text | {"input_ids": given_ids}), expected, 1e-7)
            pc.steering.step(lambda total: total, steers=False)
            activities.append(pc.steering.activity)
            pc.steering.activity = {}
        assert activities[1] == pytest.approx(activities[0], rel=1e-9)
        order = list(reversed(range(len(other))))
        assert same(learned(pc, {name: value[order] for name, value in text.items()}), expected, 1e-7)
    finally:
        pc.detach()


@cases(120)
@given(configurations(), texts(), st.sampled_from(DTYPES), st.booleans())
def test_detached_it_is_what_it_was(config: PCConfig, text: dict[str, Tensor], dtype: Any, fails: bool) -> None:
    """After steps, one of which may fail, all figures were finite and the detached model is bit for bit the same."""
    model = gpt2(dtype)
    asked = {name: value for name, value in text.items() if name != "labels"}
    before, weights = model(**asked).logits, [p.clone() for p in model.parameters()]
    pc = PCModel(model, config)
    try:
        out = pc.accumulate_grad(**text)
        pc.steer()
        assert finite(out)
        assert finite(pc.relax(**text))
        assert all(bool(g.isfinite().all()) for g in gradients(model).values())
        assert torch.equal(model(**asked).logits, before) or config.attention_energy
        if fails:
            with pytest.raises(IndexError):
                pc.accumulate_grad(**text | {"input_ids": text["input_ids"] + VOCABULARY})
    finally:
        pc.detach()
        model.zero_grad()
    assert torch.equal(model(**asked).logits, before)
    assert all(torch.equal(p, w) and p.requires_grad for p, w in zip(model.parameters(), weights, strict=True))
    assert all(module.training and not _changed(module) for module in model.modules())


def _changed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._backward_hooks or "forward" in vars(module))


@cases(120)
@given(configurations(2), texts())
def test_more_sweeps_never_mean_more_free_energy(config: PCConfig, text: dict[str, Tensor]) -> None:
    """On a transformer too, wherever its nodes are and whatever their energy: T sweeps end no higher than T - 1."""
    found = []
    for sweeps in (config.sweeps - 1, config.sweeps):
        config.sweeps = sweeps
        pc = PCModel(gpt2(torch.float64), config)
        found.append(pc.relax(**text).sequence_free_energy)
        pc.detach()
    assert bool((found[1] <= found[0] + 1e-9 * found[0].abs()).all())
