"""The `state` solver, the paper's own: states are leaves that cut the graph, and all nodes move at once.

Pinchetti et al., arXiv 2211.03481; Whittington and Bogacz 2017. A pass computes every prediction mu_l from the states
below it; the gradient of a state has its own node's energy and those of the nodes that it predicts, nothing else.
So a signal travels one node a sweep, and a network of L nodes needs L + 1 sweeps before its first weights learn. What
it has not reached yet is not computed (`hf_pc.reuse`).

Because a state stops the gradient, what lies between two nodes can be differentiated as soon as it has run, and
its graph is freed: activations of one block at a time. That holds where nodes cut the graph into separate pieces and
the solver sees the whole model. Where it does not (pieces that share part of a graph, a router's loss over all
blocks, a distributed wrapper that counts on one backward pass), the same signals go down in one pass at the end,
through `StateFunction`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_pc.dtypes import wide
from hf_pc.node import LEARN, RELAX, Boundary, Site
from hf_pc.relaxation import Relaxation
from hf_pc.solvers.base import Solver, register_solver
from hf_pc.solvers.descent import Descent

if TYPE_CHECKING:
    from hf_pc.config import PCConfig

#: what autograd calls a copy
COPIES = ("CloneBackward0", "ToCopyBackward0")
#: first rate of a sequence with step "auto": a chain of equal gains is stable under half a step
FIRST_RATE = 0.4


class StateFunction(torch.autograd.Function):
    """Forwards the state; backwards the state takes its gradient, and the module below the node's own signal."""

    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, state: Tensor, site: Site, relaxation: Relaxation, solver: StateSolver
    ) -> Tensor:
        ctx.site, ctx.relaxation, ctx.solver, ctx.dtype = site, relaxation, solver, mu.dtype
        ctx.set_materialize_grads(False)  # a state that no signal comes to is told by that
        return state.to(mu.dtype, copy=True)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, g: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        site, relaxation = ctx.site, ctx.relaxation
        gradient = None if g is None else wide(g)
        if not (ctx.needs_input_grad[0] and ctx.solver.sends(relaxation, site)):
            return None, gradient, None, None, None
        down = ctx.solver.signal(site)
        scale = relaxation.scale_of(site)
        if isinstance(scale, Tensor):
            down = down * scale
        return down.to(ctx.dtype), gradient, None, None, None


@register_solver("state")
class StateSolver(Solver):
    """Parallel relaxation of states; with `optimizer` they are moved by a class of torch.optim.

    With step "auto" each sequence's free energy never rises; an optimizer needs a number, its learning rate in units
    of 1/precision (SGD), or of the standard deviation 1/sqrt(precision) (Adam and others that normalise).
    """

    takes_optimizer = moves_weights = by_node = True

    def __init__(self, config: PCConfig) -> None:
        super().__init__(config)
        #: differentiate each piece as soon as it has run: blocks cut the graph, parts of a block do not; unlearned
        #: where blocks, or a block and the head, turn out to share a part of it
        self.piecewise = config.nodes == "block" and config.attention_energy is None
        #: by kind of pass, the sites of whose pieces it is known that the head shares no part
        self._known: set[tuple[str, str]] = set()
        #: of the others that have run in this pass, what their pieces are computed by
        self._asked: dict[tuple[str, str], set[Any]] = {}

    def sends(self, relaxation: Relaxation, site: Site) -> bool:
        """Whether a node sends a signal down: not while it rests, but that weights learn zeros from it."""
        return relaxation.mode == LEARN or not relaxation.rests(site)

    # what a node's energy says; PC-ALM adds its multipliers here

    def signal(self, site: Site) -> Tensor:
        """What the module below learns from, dF/dmu."""
        return site.node.energy.grad_prediction(site.error, site.prediction, site.precision)

    def own_gradient(self, site: Site) -> Tensor:
        """dF/dx of the node's own part of F."""
        return site.node.energy.grad_state(site.error, site.prediction, site.precision)

    def moved(self, relaxation: Relaxation) -> None:
        """Called after the states have moved."""

    def join(self, relaxation: Relaxation, site: Site, mu: Tensor) -> Tensor:
        if relaxation.at_rest:
            site.leaf = wide(mu.detach()).clone().requires_grad_()
        if site is relaxation.sites[0]:
            self._asked = {}  # of a pass that did not come to its end
        # what is predicted of padding moves with the states that it reads, and no label says where to
        site.error = relaxation.without_padding(site, site.leaf.detach() - wide(mu.detach()))
        if not (self.piecewise and relaxation.pieces):
            state: Tensor = StateFunction.apply(mu, site.leaf, site, relaxation, self)  # type: ignore[no-untyped-call]
            return state
        if mu.requires_grad and not relaxation.at_rest and self.sends(relaxation, site):
            self._differentiate(relaxation, site, mu)
        return site.leaf.to(mu.dtype, copy=True)

    def _differentiate(self, relaxation: Relaxation, site: Site, mu: Tensor) -> None:
        """Send the signal of one node through the piece of graph below it, which is freed."""
        below: list[Site | Boundary] = list(relaxation.sites[: relaxation.sites.index(site)])
        if relaxation.boundary is not None:
            below.insert(0, relaxation.boundary)
        weights = relaxation.weights if relaxation.mode == LEARN else []
        inputs = [s.leaf for s in below] + weights
        if not inputs:
            return
        piece = relaxation.mode, site.label
        if piece not in self._known and not relaxation.share.apart:
            self._asked[piece] = _graph(mu)
        found = list(torch.autograd.grad(mu, inputs, self.signal(site).to(mu.dtype), allow_unused=True))
        for lower, gradient in zip(below, found, strict=False):
            if gradient is not None:
                lower.signal = gradient if lower.signal is None else lower.signal + gradient
        for weight in reversed(weights):
            gradient = found.pop()
            if gradient is not None:
                relaxation.hold(weight, gradient if _unshared(gradient) else gradient.clone())

    def gradients(self, relaxation: Relaxation, output_energy: Tensor) -> list[Tensor]:
        return self._taken(relaxation, self.found_gradients(relaxation, output_energy))

    def close(self, relaxation: Relaxation) -> None:
        self._closed(relaxation)

    def _closed(self, relaxation: Relaxation) -> list[Tensor]:
        """dF/dx of every site, from a pass in LEARN mode whose `backward()` has been called."""
        found = [
            None if site.leaf.grad is None else site.leaf.grad / relaxation.scale_of(site) for site in relaxation.sites
        ]
        for site in relaxation.sites:
            site.leaf.grad = None
            site.node.energy.observe(site.error, site.precision)
        gradients = self._taken(relaxation, found)
        if relaxation.top is not None:
            relaxation.note_learned(relaxation.top, self.signal(relaxation.top))
        return gradients

    def _taken(self, relaxation: Relaxation, found: Sequence[Tensor | None]) -> list[Tensor]:
        gradients = []
        for site, g in zip(relaxation.sites, found, strict=True):
            site.reached |= g is not None or site.signal is not None
        for site, g in zip(relaxation.sites, found, strict=True):
            signals = [signal for signal in (g, site.signal) if signal is not None]
            site.signal = None
            signal = sum(signals[1:], signals[0]) if signals else torch.zeros_like(site.error)
            signal = relaxation.without_padding(site, signal)
            gradients.append(self.own_gradient(site) + signal)
            relaxation.measure(site, signal, gradients[-1])
        return gradients

    def takes_again(self, relaxation: Relaxation, output_energy: Tensor) -> bool:
        if not self._asked:
            return False
        head = _graph(output_energy)
        shared = any(not piece.isdisjoint(head) for piece in self._asked.values())
        self._known.update(self._asked)
        self._asked = {}
        if shared:  # as where logits are a weighted sum of all states and of what the first block reads
            self.piecewise = False
        return shared

    def recover(self, relaxation: Relaxation, error: RuntimeError) -> bool:
        if not self.piecewise or "second time" not in str(error):
            return False
        self.piecewise = False
        return True

    def relax(
        self, relaxation: Relaxation, forward: Callable[[], Tensor], weight_step: Callable[[Tensor], None] | None
    ) -> Callable[[], bool]:
        mover = _Mover.of(self, relaxation)
        for _ in range(self.sweeps - 1):
            relaxation.begin(RELAX if weight_step is None else LEARN)
            energy = forward()
            if weight_step is None:
                gradients = self.gradients(relaxation, energy)
            else:
                weight_step(relaxation.loss(energy))
                torch.clear_autocast_cache()  # of the weights as they were
                gradients = self._closed(relaxation)
            mover.move(gradients)
            self.moved(relaxation)
            if self.converged(relaxation):
                break
        mover.settle()
        return mover.confirm


def _graph(tensor: Tensor) -> set[Any]:
    """The functions that a tensor is computed by, back to leaves. Those and copies of them, of a state or of a weight
    under autocast, are left out: they keep nothing for the backward pass, and may be gone through twice."""
    found: set[Any] = set()
    ahead: list[Any] = [tensor.grad_fn]
    while ahead:
        function = ahead.pop()
        if function is None or function in found or hasattr(function, "variable"):
            continue
        before = [other for other, _ in function.next_functions]
        if function.name() in COPIES and all(hasattr(other, "variable") for other in before):
            continue
        found.add(function)
        ahead += before
    return found


def _unshared(gradient: Tensor) -> bool:
    """Whether a gradient is a plain tensor that fills its memory, and only the caller's variable refers to either.

    Autograd gives several inputs one tensor where it can; a hook may have kept it; it may be a buffer of the function
    that it went through.
    """
    plain = type(gradient) is Tensor and gradient.layout == torch.strided
    if not plain or gradient.untyped_storage().nbytes() != gradient.nbytes:
        return False
    whole = gradient.is_contiguous() or (gradient.dim() == 2 and gradient.t().is_contiguous())
    alone = _ALONE[gradient._is_view()]
    return whole and all(now <= known for now, known in zip(_references(gradient), alone, strict=True))


def _references(tensor: Tensor) -> tuple[int, int, int, int]:
    """How many refer to a tensor in Python, to what is behind it, to its memory, and to what it is a view of."""
    behind: int = tensor._use_count()  # type: ignore[attr-defined]
    memory: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]
    base = tensor._base
    return sys.getrefcount(tensor), behind, memory, 0 if base is None else sys.getrefcount(base)


@torch.no_grad()
def _alone(view: bool) -> tuple[int, int, int, int]:
    """The same of a tensor that nobody else holds, asked as `_unshared` asks: it differs between versions."""
    gradient = torch.zeros(1, 1).t() if view else torch.zeros(1, 1)
    return (lambda gradient: _references(gradient))(gradient)


#: of a tensor with memory of its own, and of a view of all of another that only the view refers to
_ALONE = {view: _alone(view) for view in (False, True)}


class _Mover:
    """Moves the states a fixed step against their gradients."""

    def __init__(self, relaxation: Relaxation, step: float) -> None:
        self.relaxation = relaxation
        self.step = step

    @staticmethod
    def of(solver: StateSolver, relaxation: Relaxation) -> _Mover:
        if solver.step_size == "auto":
            return _Descending(relaxation, solver.tolerance, solver.depth)
        if solver.optimizer is not None:
            return _Optimizing(relaxation, float(solver.step_size), solver.optimizer)
        return _Mover(relaxation, float(solver.step_size))

    def move(self, gradients: list[Tensor]) -> None:
        for site, gradient in zip(self.relaxation.sites, gradients, strict=True):
            site.leaf = (site.leaf.detach() + site.step(gradient, self.step)).requires_grad_()

    def settle(self) -> None:
        """No more moves are to come."""

    def confirm(self) -> bool:
        return True


class _Descending(_Mover):
    """Never lets a sequence's free energy rise."""

    def __init__(self, relaxation: Relaxation, tolerance: float, depth: int) -> None:
        super().__init__(relaxation, FIRST_RATE)
        self.tolerance = tolerance
        self.depth = depth
        self.descent: Descent | None = None

    def move(self, gradients: list[Tensor]) -> None:
        self.descent = self.descent or Descent(self.relaxation, self.tolerance, self.depth, self.step)
        self.descent.move(self.descent.judge(), gradients)

    def settle(self) -> None:
        if self.descent is not None:
            self.descent.settle()

    def confirm(self) -> bool:
        return self.descent is None or self.descent.confirm()


class _Optimizing(_Mover):
    """Moves the states by a torch optimizer, in units of each node's standard deviation 1/sqrt(precision)."""

    def __init__(
        self, relaxation: Relaxation, step: float, kind: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    ) -> None:
        super().__init__(relaxation, step)
        self.kind = kind
        self.optimizer: torch.optim.Optimizer | None = None

    def move(self, gradients: list[Tensor]) -> None:
        sites = self.relaxation.sites
        if self.optimizer is None:
            self.start = [site.leaf.detach() for site in sites]
            self.moved = [torch.zeros_like(leaf) for leaf in self.start]
            cls, arguments = self.kind
            self.optimizer = cls(self.moved, lr=self.step, **arguments)  # type: ignore[call-arg]
        for site, moved, gradient in zip(sites, self.moved, gradients, strict=True):
            # without the node's factor, which most optimizers would divide out again
            moved.grad = site.step(gradient, -1 / site.node.step_factor) * site.precision.sqrt()
        self.optimizer.step()
        for site, start, moved in zip(sites, self.start, self.moved, strict=True):
            move = site.node.step_factor * moved / site.precision.sqrt()
            site.leaf = (start + move).requires_grad_()
