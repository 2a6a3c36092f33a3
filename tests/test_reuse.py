"""What no error can change is computed once per step, and nothing is different for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import architectures
import pytest
import torch
from test_invariants import batch, gradients, make, worst
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertForMaskedLM, MixtralConfig, MixtralForCausalLM, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_pc import PCConfig, PCModel
from hf_pc.diagnostics import largest_curvature
from hf_pc.relaxation import Relaxation
from hf_pc.reuse import FirstPrediction
from hf_pc.rng import RandomState


def mixtral(layers: int = 2) -> Any:
    set_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers}
    rest = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**sizes, **rest)).train()


def albert() -> Any:
    set_seed(0)
    sizes = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 32}
    return AlbertForMaskedLM(AlbertConfig(**sizes, num_hidden_layers=3, num_attention_heads=2)).train()


def test_a_router_whose_loss_would_be_left_out_is_refused() -> None:
    """Where weights move at every sweep, all but the last update would leave it out."""
    pc = PCModel(mixtral(), PCConfig(solver="state", weight_update="every_sweep"))
    with pytest.raises(ValueError, match="every_sweep' is not allowed with output_router_logits=True"):
        pc.accumulate_grad(**batch(), weight_step=lambda loss: None)


MODELS = {"gpt2": lambda: make("gpt2", dropout=0.1), "mixtral": mixtral, "albert": albert}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", [{}, {"nodes": "sublayer"}, {"solver": "state"}, {"learning": "wake_sleep"}])
def test_gradients_are_the_same_to_the_bit(
    name: str, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, a router, shared layers, drawn labels: with and without reuse every gradient has the same bits.

    But for what lies before parts of a block: it gets the same summands, from one graph or two, in another order.
    """
    found = []
    for reuse in (True, False):
        if not reuse:
            monkeypatch.setattr("hf_pc.reuse._repeats", lambda *given, learns: False)
        model = MODELS[name]()
        pc = PCModel(model, PCConfig(sweeps=4, relative_std=0.5, **setting))
        pc.accumulate_grad(**batch())
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert worst(*found) < 1e-6
    assert setting.get("nodes") or all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("learning", ["centred", "extrapolated", "balanced"])
def test_signals_that_wait_add_up(name: str, learning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What several phases teach the first module is learned in one pass: the same gradients but for rounding."""
    found = []
    for reuse in (True, False):
        if not reuse:
            monkeypatch.setattr("hf_pc.reuse._repeats", lambda *given, learns: False)
        model = MODELS[name]() if name == "mixtral" else MODELS[name]().double()  # whose kernels know no float64
        pc = PCModel(model, PCConfig(sweeps=4, relative_std=0.5, learning=learning))  # type: ignore[arg-type]
        for _ in range(2):
            pc.accumulate_grad(**batch())
        found.append(gradients(model))
    assert worst(*found) < (1e-4 if name == "mixtral" else 1e-9)


CHECKPOINTED: list[dict[str, Any]] = [
    {}, {"learning": "balanced"}, {"learning": "balanced", "nodes": "sublayer"}, {"nodes": "linear"}, {"nodes": "mlp"},
    {"attention_energy": "categorical"}, {"solver": "state"}, {"solver": "state", "nodes": "linear"},
    {"nodes": r".*\.0,.*\.1,.*\.0\.mlp"},
]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("setting", CHECKPOINTED, ids=str)
def test_checkpointed_blocks_learn_in_every_phase(name: str, setting: dict[str, Any]) -> None:
    """What the backward pass runs again cannot wait, and finds the weights frozen that the forward pass found so: with
    activation checkpointing nothing is different, wherever in a block the nodes are, and in a second step either.
    (Llama's norms compute in float32.)"""
    found = []
    for checkpointing in (True, False):
        model = make(name).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        pc = PCModel(model, PCConfig(sweeps=4, relative_std=0.5, **setting))
        for _ in range(2):
            pc.accumulate_grad(**batch())
        found.append(gradients(model))
    assert worst(*found) < (1e-9 if name == "gpt2" else 1e-6)


@pytest.mark.parametrize(
    ("setting", "times"),
    [({"learning": rule}, 1) for rule in ("plain", "centred", "extrapolated", "balanced")]
    + [({"learning": "wake_sleep"}, 3), ({"solver": "state"}, 2)],
)
def test_the_first_block_runs_once(setting: dict[str, Any], times: int) -> None:
    """In five sweeps the first block runs at rest, and learns through that; nothing is kept after the step.

    A solver that learns piece by piece runs it once more, and so do the phases of wake_sleep, which learn one by one.
    """
    model = make("gpt2")
    pc = PCModel(model, PCConfig(sweeps=5, relative_std=0.5, **setting))
    calls: list[int] = []
    model.transformer.h[0].mlp.register_forward_hook(lambda *given: calls.append(0))
    pc.accumulate_grad(**batch())
    assert len(calls) == times
    assert all(p.requires_grad for p in model.parameters())
    assert pc._first_prediction._kept is None
    assert "forward" not in vars(model.transformer.h[0])


BY_NODE: list[dict[str, Any]] = [
    {}, {"step_size": 0.3}, {"solver": "lagrangian"}, {"step_size": 0.01, "state_optimizer": "Adam"},
    {"nodes": "sublayer"}, {"nodes": "linear"}, {"attention_energy": "categorical"}, {"energy": "laplace"},
]  # fmt: skip


@pytest.mark.parametrize("name", [*MODELS, "t5"])
@pytest.mark.parametrize("setting", BY_NODE, ids=str)
def test_what_no_signal_has_reached_need_not_run(
    name: str, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, solvers that move states find the same bits as where every module runs in every sweep."""
    found = []
    for always in (False, True):
        if always:
            monkeypatch.setattr(Relaxation, "rests", lambda self, site: False)
        model, inputs = architectures.build(name) if name == "t5" else (MODELS[name](), batch())
        pc = PCModel(model.train(), PCConfig(**{"solver": "state", "sweeps": 6, "relative_std": 0.5, **setting}))
        out = pc.accumulate_grad(**inputs)
        found.append(gradients(model) | {"energy": out.sequence_free_energy, "after": torch.rand(3)})
        assert out.residual > 0.01
        assert all("forward" not in vars(module) for module in model.modules())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("piecewise", [False, True])
@pytest.mark.parametrize("solver", ["state", "lagrangian"])
def test_blocks_run_from_the_sweep_that_the_signal_comes_in(solver: str, piecewise: bool, checkpointing: bool) -> None:
    """Of three blocks, in six sweeps: all at rest and to learn; the top one in the four between, the next in three.
    The first is kept, but with activation checkpointing, whose inputs require a gradient: in two."""
    model = make("gpt2").train()
    calls = [0, 0, 0]

    def count(block: int) -> None:
        calls[block] += 1

    for index, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda *given, _i=index: count(_i))
    if checkpointing:
        model.gradient_checkpointing_enable()
    pc = PCModel(model, PCConfig(solver=solver, sweeps=6, relative_std=0.5, step_size=0.3))
    pc.solver.piecewise = piecewise  # type: ignore[attr-defined]
    pc.accumulate_grad(**batch())
    assert calls == [4 if checkpointing else 2, 5, 6]


def test_a_graph_is_kept_to_learn_from_alone() -> None:
    """The first block has one where weights learn; to relax, or to probe the curvature, it has none."""
    model = make("gpt2")
    with_graph: list[bool] = []
    model.transformer.h[0].register_forward_hook(lambda m, a, output: with_graph.append(output.grad_fn is not None))
    pc = PCModel(model, PCConfig(relative_std=0.3))
    pc.relax(**batch())
    largest_curvature(pc, batch())
    assert with_graph
    assert not any(with_graph)
    pc.accumulate_grad(**batch())
    assert any(with_graph)


def test_a_module_that_may_write_to_its_arguments_runs_every_time() -> None:
    """A call with a container to write to is not answered from memory."""

    class Writes(nn.Module):
        calls = 0

        def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:
            self.calls += 1
            return x

    for given, calls in (({}, 1), ({"cache": {}}, 3)):
        module = Writes()
        first = FirstPrediction(module, module)
        with first.reused(RandomState([], numpy=False)):
            for _ in range(3):
                first.begin_pass()
                module(torch.ones(1), **given)
        assert module.calls == calls


class Backwards(nn.Module):
    """Registers what runs last first."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.late(self.early(x).tanh()))


def test_nodes_that_fire_out_of_order() -> None:
    """Where the first node to fire is not the first of the model, what is kept is never another one's."""
    set_seed(0)
    model = Backwards().double()
    inputs = {"x": torch.randn(5, 4, dtype=torch.float64), "labels": torch.arange(5) % 3}
    config = PCConfig(nodes="late,early", sweeps=60, precision=1.0)
    pc = PCModel(model, config)
    for _ in range(2):  # the second step knows which is first
        assert pc.relax(**inputs).residual < 1e-8


def test_a_router_in_the_first_block_alone() -> None:
    """What is gathered inside the first block is there in every pass: its router's loss is not lost."""
    model = mixtral(layers=1)
    out = PCModel(model, PCConfig(sweeps=4, relative_std=0.5)).accumulate_grad(**batch())
    assert out.residual < 0.1
    assert all(p.grad is not None for name, p in model.named_parameters() if "gate" in name)


def test_nothing_is_kept_after_an_exception() -> None:
    """An exception in the first of several phases leaves neither the kept output nor the phase's errors."""
    pc = PCModel(make("gpt2"), PCConfig(sweeps=3, relative_std=0.5, learning="centred"))
    with pytest.raises(MemoryError), pc.relaxed(batch(), phase=pc.phases[0]):
        raise MemoryError
    assert pc._first_prediction._kept is None
    assert pc._before is None


class Stem(nn.Module):
    """A stem with a buffer that it writes to and learns beside, then two blocks, checkpointed or not."""

    def __init__(self, writes: bool, checkpointed: bool) -> None:
        super().__init__()
        self.writes, self.checkpointed = writes, checkpointed
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("scale", torch.ones(4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        assert isinstance(self.scale, Tensor)
        if self.writes:
            self.scale.mul_(0.9)
        x = x / self.scale * self.weight
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x).tanh()
        return SequenceClassifierOutput(logits=x)


@pytest.mark.parametrize(("writes", "checkpointed"), [(True, False), (False, True)])
def test_a_first_run_that_may_not_stand_is_made_again(
    writes: bool, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers written to in every pass and checkpointing that no flag tells of: the gradients of a run of its own."""
    found = []
    for reuse in (True, False):
        if not reuse:
            monkeypatch.setattr(FirstPrediction, "may_learn", lambda self: False)
        set_seed(0)
        model = Stem(writes, checkpointed).double()
        inputs = {"x": torch.randn(5, 4, dtype=torch.float64), "labels": torch.arange(5) % 4}
        PCModel(model, PCConfig(nodes=r"blocks\.\d+", precision=1.0, sweeps=4)).accumulate_grad(**inputs)
        found.append(gradients(model))
    assert worst(*found) < 1e-12


class Repeated(nn.Module):
    """One block that runs three times in a pass, each time checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def block(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        for _ in range(3):
            x = checkpoint(self.block, x, use_reentrant=False)
        return SequenceClassifierOutput(logits=x)


def test_runs_of_one_node_are_not_mistaken_for_each_other() -> None:
    """Which of several runs the backward pass repeats is not to be told: that is said, and nothing is learned."""
    model = Repeated()
    pc = PCModel(model, PCConfig(nodes="inner", relative_std=0.5))
    with pytest.raises(RuntimeError, match=r"node 'inner' ran more often than in the first pass .*\(3 times\)"):
        pc.accumulate_grad(x=torch.randn(5, 4), labels=torch.arange(5) % 4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_hook_on_the_first_block_is_of_the_learning_pass() -> None:
    """A user's full backward hook is called with what this backward pass brings."""
    seen: list[list[Tensor]] = []
    for block in (0, 1):
        model = make("gpt2").double()
        sweeps: list[Tensor] = []
        model.transformer.h[block].register_full_backward_hook(lambda m, i, o, kept=sweeps: kept.append(o[0].detach()))
        PCModel(model, PCConfig(sweeps=3, relative_std=0.5)).accumulate_grad(**batch())
        seen.append(sweeps)
    sizes = [float(norms[-1].norm()) for norms in seen]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.5)


def test_learning_again_inside_one_relaxation() -> None:
    """After a step of the optimizer the errors stand as they are, and nothing is put back."""
    model = make("gpt2")
    pc = PCModel(model, PCConfig(sweeps=3, relative_std=30.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pc.relaxed(batch()) as relaxation:
        kept = []
        for _ in range(3):
            (pc.learning_pass(batch())[0] / relaxation.tokens).backward()
            kept.append([site.leaf.detach().clone() for site in relaxation.sites])
            optimizer.step()
    torch.testing.assert_close(kept[1:], kept[:1] * 2, rtol=0, atol=0)


class Pair(NamedTuple):
    hidden: Tensor
    other: Tensor


@pytest.mark.parametrize(
    ("wrap", "calls"),
    [(lambda x: x, 1), (lambda x: (x,), 1), (lambda x: (x, None), 1), (lambda x: (x, x + 1), 1), (lambda x: [x], 3),
     (lambda x: (x, [x]), 3), (lambda x: (x, 3), 3), (lambda x: Pair(x, x), 3), (lambda x: {"x": x}, 3)],
    ids=["tensor", "tuple", "with None", "two", "list", "nested", "with a number", "named tuple", "dictionary"],
)  # fmt: skip
def test_plain_outputs_alone_are_answered_from_memory(wrap: Callable[[Tensor], Any], calls: int) -> None:
    """A tensor, or a tuple of nothing but tensors and None; in whatever it comes, it comes as from the module."""

    class Wraps(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            return wrap(x)

    module, x = Wraps(), torch.ones(1)
    first = FirstPrediction(module, module)
    with first.reused(RandomState([], numpy=False)):
        for _ in range(3):
            first.begin_pass()
            found = module(x)
            assert type(found) is type(wrap(x))
            assert str(found) == str(wrap(x))
    assert module.calls == calls


@pytest.mark.parametrize("nodes", ["late,early", "early,late"])
def test_nodes_that_fire_out_of_order_learn(nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was taken for the first node and is not leaves no output behind that another pass would learn from."""
    found = []
    for reuse in (True, False):
        if not reuse:
            monkeypatch.setattr("hf_pc.reuse._repeats", lambda *given, learns: False)
        set_seed(0)
        model = Backwards().double()
        inputs = {"x": torch.randn(5, 4, dtype=torch.float64), "labels": torch.arange(5) % 3}
        pc = PCModel(model, PCConfig(nodes=nodes, sweeps=4, precision=1.0))
        for _ in range(2):  # the second step knows which is first
            pc.accumulate_grad(**inputs)
        found.append(gradients(model))
    assert worst(*found) < 1e-12


def test_a_buffer_of_inference_mode_learns_as_any() -> None:
    """How often such a tensor was written to is not noted: it counts as not written to."""
    found = []
    for inference in (False, True):
        model = make("gpt2")
        with torch.inference_mode(inference):
            model.register_buffer("extra", torch.ones(2))
        assert model.extra.is_inference() is inference
        PCModel(model, PCConfig(sweeps=3, relative_std=0.5)).accumulate_grad(**batch())
        found.append(gradients(model))
    assert worst(*found) == 0


class Beside(nn.Module):
    """A block that computes something else beside its state; a signal comes back from it, or none."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.linear, self.detached = nn.Linear(4, 4), detached

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.linear(x)
        return x.tanh(), (x.detach() if self.detached else x).square()


class Gathers(nn.Module):
    """Its output depends on what all blocks computed beside their states."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Beside(detached) for _ in range(3)])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        beside = torch.zeros_like(x)
        for block in self.blocks:
            x, other = block(x)
            beside = beside + other
        return SequenceClassifierOutput(logits=x + beside)


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("setting", [{}, {"solver": "state"}, {"learning": "centred"}], ids=str)
def test_what_comes_beside_a_state_is_no_state(
    setting: dict[str, Any], detached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a block returns two tensors the second is always its own, and teaches in every phase."""
    found = []
    for reuse in (True, False):
        if not reuse:
            monkeypatch.setattr("hf_pc.reuse._repeats", lambda *given, learns: False)
        set_seed(0)
        model = Gathers(detached).double()
        inputs = {"x": torch.randn(5, 4, dtype=torch.float64), "labels": torch.arange(5) % 4}
        pc = PCModel(model, PCConfig(nodes=r"blocks\.\d+", sweeps=3, precision=1.0, **setting))
        report = pc.accumulate_grad(**inputs)
        found.append(gradients(model) | {"energy": report.sequence_free_energy})
    assert worst(*found) < 1e-12


@pytest.mark.parametrize("solver", ["error", "state"])
def test_a_forward_of_its_own_is_put_back(solver: Any) -> None:
    """A block whose forward another library has wrapped keeps that one, and it is called in every step."""
    model, calls = make("gpt2"), []
    wrapped = []
    for block in model.transformer.h:

        def forward(*args: Any, _own: Any = block.forward, **kwargs: Any) -> Any:
            calls.append(0)
            return _own(*args, **kwargs)

        block.forward = forward
        wrapped.append(forward)
    pc = PCModel(model, PCConfig(solver=solver, sweeps=4, relative_std=0.5))
    found = []
    for _ in range(2):
        pc.accumulate_grad(**batch())
        found.append(len(calls))
        assert [vars(block)["forward"] for block in model.transformer.h] == wrapped
    assert found[1] == 2 * found[0]
