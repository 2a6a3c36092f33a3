"""The `state` solver piece by piece: in whose memory weights' gradients are, and that nobody else's is scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import X, Y, attach
from oracles.linear import LinearChain
from test_invariants import batch, make
from torch import Tensor, nn

from hf_pc import PCConfig, PCModel


class OffsetChain(LinearChain):
    """Two offsets are added to every state: autograd gives them, and the state below, one and the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.ParameterList([nn.Parameter(torch.full_like(X, 0.1 * i)) for i in range(6)])

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        x = inputs
        for i, block in enumerate(self.blocks):
            x = block(x + self.layers[i](x) + self.offsets[2 * i] + self.offsets[2 * i + 1])
        return {"logits": self.head(x)}


def test_gradients_that_share_memory_are_scaled_once() -> None:
    """Piece by piece, weights to which autograd gives one tensor learn what one backward pass teaches them, and twice
    that from a second batch, in the memory of the first; the signals below stay what they are."""
    gradients, reports = [], []
    for piecewise in (True, False):
        model = OffsetChain()
        pc = attach(model, solver="state", sweeps=6, step_size=0.2)
        pc.solver.piecewise = piecewise  # type: ignore[attr-defined]
        reports.append(pc.accumulate_grad(inputs=X, labels=Y))
        once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        held = {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.grad is not None}
        assert len(set(held.values())) == len(held) == 10
        pc.accumulate_grad(inputs=X, labels=Y)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, 2 * once[name])
            assert parameter.grad.data_ptr() == held[name]
        gradients.append(once)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert reports[0].residual == pytest.approx(reports[1].residual)


class Buffered(torch.autograd.Function):
    """x plus a weight, whose gradient it says to be a buffer of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return x + weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return g, ctx.buffer, None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_that_nobody_else_holds_are_not_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, a weight's gradient stays in the memory that autograd gave it: no weight's is there twice."""
    seen, real = set(), torch.autograd.grad

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        seen.update(gradient.data_ptr() for gradient in found if gradient is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    model = make(name)
    pc = PCModel(model, PCConfig(solver="state", sweeps=8, relative_std=0.3, step_size=0.3))
    pc.accumulate_grad(**batch())
    inside = [p for n, p in model.named_parameters() if any(node.name in n for node in pc.nodes) and p.dim() == 2]
    assert inside
    assert all(p.grad is not None and p.grad.data_ptr() in seen for p in inside)


def test_gradients_that_others_hold_are_copied() -> None:
    """What a hook keeps, what a function keeps and what is expanded is not scaled where it is."""

    class Others(LinearChain):
        def __init__(self) -> None:
            super().__init__()
            self.buffer = torch.full((4,), 2.0, dtype=torch.float64)
            self.weight, self.stack = (
                nn.Parameter(torch.zeros(4).double()),
                nn.Parameter(torch.zeros(2, 3, 4).double()),
            )

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            x = self.blocks[0](Buffered.apply(self.layers[0](inputs), self.weight, self.buffer))  # type: ignore[no-untyped-call]
            x = self.blocks[1](self.layers[1](x) + self.stack.sum(0))
            return {"logits": self.head(self.blocks[2](self.layers[2](x)))}

    model, kept = Others(), []
    model.layers[1].weight.register_hook(lambda gradient: kept.append((gradient, gradient.clone())))
    model.layers[2].weight.register_hook(lambda gradient: kept.append((gradient.detach(), gradient.clone())))
    pc = attach(model, solver="state", sweeps=6, step_size=0.2)
    pc.solver.piecewise = True  # type: ignore[attr-defined]
    pc.accumulate_grad(inputs=X, labels=Y)
    torch.testing.assert_close(model.buffer, torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(model.weight.grad, model.buffer / Y.numel())
    assert kept
    assert all(torch.equal(gradient, before) for gradient, before in kept)
    assert model.stack.grad is not None
    torch.testing.assert_close(model.stack.grad[0], model.stack.grad[1])
