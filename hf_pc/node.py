"""The PC node: one autograd function that carries the method, and the hook that puts it into a module.

In error coordinates a node's state is x = mu + e, mu being what its module computes. The node replaces the module's
output mu by x; its backward receives g = d(everything above)/dx and

- hands the error its free energy gradient, dE/dx + g;
- relaxing: sends down dF/dmu at fixed e, so that the errors of the nodes below get the gradient of F too;
- learning: takes the sweep's last step, e' = e - step * (dE/dx + g), and sends down dE/dmu(mu + e', mu), the signal
  of the node's own energy. The weights below learn from it, and it alone reaches them.

For a Gaussian node both signals are -p e' = g when the step is 1/p: from zero errors that is backprop (arXiv
2211.03481, eq. 5; Goemaere et al., arXiv 2505.20137, for the error coordinates).

A loss that is scaled between the output energy and `backward()` (division by the token count, mixed precision,
data parallel averaging) scales g too. `LossScale` reads that factor off the backward pass, so that an energy and the
g it is compared with are always in the same units, nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_pc.dtypes import sum_dtype, wide, wide_dtype
from hf_pc.energies import Energy, relative_precision
from hf_pc.learning import Phase

RELAX, LEARN = "relax", "learn"


class Node:
    """A module whose output is a PC node.

    Args:
        name: the module's name in the model.
        module: the module itself.
        energy: the divergence between the node's state and its prediction.
        precision: 1 / sigma^2 for this node alone; None leaves it to the configuration.
        step_factor: how large this node's steps are beside those of the others.
        in_nats: relative_std counts in nats, 1 / sqrt(precision), and not in the activity of each token.
        time_first: the module's states are [sequence, batch, features]; None where nothing says so or not.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        energy: Energy,
        precision: float | None = None,
        step_factor: float = 1.0,
        in_nats: bool = False,
        time_first: bool | None = None,
    ) -> None:
        self.in_nats = in_nats
        self.name = name
        self.module = module
        self.energy = energy
        self.precision = precision
        self.step_factor = step_factor
        self.time_first = time_first

    def batch_first(self, states: Tensor) -> Tensor:
        """What the module computes, with the batch first; its own inverse."""
        return states.transpose(0, 1) if self.time_first else states

    def attach(self, visit: Callable[[Node, Tensor], Tensor | None]) -> Any:
        """Let `visit(node, mu)` replace the module's output; None leaves it as it is. Returns the hook's handle.

        It comes before the hooks by which transformers collects hidden states, which the first forward pass leaves on
        blocks: a head that reads those is to read states.
        """
        handle = self.module.register_forward_hook(_Hook(self, visit))
        hooks = self.module._forward_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("transformers.")]:
            hooks[key] = hooks.pop(key)
        return handle


class _Hook:
    """A node's hook. A copy of the module, or a pickle, has one that does nothing."""

    def __init__(self, node: Node, visit: Callable[[Node, Tensor], Tensor | None]) -> None:
        self.node = node
        self.visit = visit

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        mu = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(mu, Tensor):
            raise TypeError(
                f"node {self.node.name!r} ({type(module).__name__}) returns {type(output).__name__}, which holds no "
                "tensor first: choose a module that returns a tensor or a tuple that begins with one"
            )
        state = self.visit(self.node, self.node.batch_first(mu))
        if state is None:
            return None
        state = self.node.batch_first(state)
        if output is mu:
            return state
        rest = output[1:]
        return type(output)(state, *rest) if hasattr(output, "_fields") else type(output)((state, *rest))

    def __reduce__(self) -> tuple[type[_Idle], tuple[()]]:
        return _Idle, ()


class _Idle:
    """What a hook becomes in a copy: no PCModel is attached to that."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        return None


@dataclass(frozen=True)
class Strength:
    """How strongly errors are penalised in one batch, the same for every sequence of it.

    Args:
        precision: that of every node without its own, or None for `relative_std`.
        relative_std: sigma as a multiple of each node's activity.
        activity: the RMS of each site's predictions in the optimiser step before. Where there is none yet, in the
            first step, each token's own RMS stands in: another batch statistic would let sequences feel each other.
        held: precisions of sites that are known on the device alone, scalars, by the sites' labels.
    """

    precision: float | None
    relative_std: float
    activity: Mapping[str, float]
    held: Mapping[str, Tensor] = field(default_factory=dict)

    def number(self, node: Node, label: str) -> float | None:
        """The precision of a site, where it is one number; None where each token has its own."""
        fixed = node.precision if node.precision is not None else self.precision
        if fixed is None and (node.in_nats or node.energy.in_nats):
            fixed = self.relative_std**-2
        elif fixed is None and label in self.activity:
            fixed = (self.relative_std * self.activity[label]) ** -2
        return fixed

    def of(self, node: Node, label: str, mu: Tensor) -> Tensor:
        """The precision of a site: a scalar, or [..., 1] per token."""
        if label in self.held:
            return self.held[label].to(wide_dtype(mu))
        fixed = self.number(node, label)
        if fixed is None:
            return relative_precision(mu, self.relative_std)
        return torch.full((), fixed, dtype=wide_dtype(mu), device=mu.device)


@dataclass
class Boundary:
    """A state that belongs to another process: a leaf that predicts what follows here, and the signal it gets back."""

    leaf: Tensor
    signal: Tensor | None = None


class Site:
    """One firing of a node in one batch: its error, and what the passes measure there.

    A module that runs several times in one pass (shared layers) has as many sites. `leaf` is what the solver moves,
    the error or the state; `error` is x - mu at the last pass, `prediction` mu where the energy needs it. Sums are per
    sequence, [batch], in `sum_dtype`: `energy` in nats; `gradient_square` and `signal_square` are |dF/dx|^2 and
    |g|^2 in units of the energy's curvature. `prediction_norm` is the root of a sum of squares, in `wide` precision.
    """

    def __init__(self, node: Node, label: str, mu: Tensor, strength: Strength, batch: int) -> None:
        self.node = node
        self.label = label
        self.shape = mu.shape
        device = mu.device.type
        #: what the module computes in; a residual stream stays float32 under autocast
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else mu.dtype
        self.error = mu.new_zeros((), dtype=wide_dtype(mu)).expand(mu.shape)  # at rest: one zero for all
        self.leaf: Tensor
        self.prediction: Tensor | None = None
        # of phases that others follow: the errors after the first move from rest, and after the last
        self.first_move: Tensor | None = None
        self.last_move: Tensor | None = None
        self.waiting: Tensor | None = None  # signals to this node's module of phases that did not run it to learn
        self.rest_move: Tensor | None = None  # of a phase that begins elsewhere: where one move from rest would lead
        self.reached = False  # whether a signal has come here in any pass
        # of solvers that differentiate piece by piece: g so far in this pass, and a Lagrange multiplier
        self.signal: Tensor | None = None
        self.multiplier: Tensor
        node.energy.check(mu, node.name)
        self.precision = strength.of(node, label, mu)
        self.energy: Tensor
        self.rest_energy: Tensor  # the energy of no error, such as the logarithm of a learned sigma
        # shared, and so never written to
        self.zeros = torch.zeros(batch, dtype=sum_dtype(mu.device), device=mu.device)
        self.prediction_norm: Tensor
        self.size: int | Tensor  # how many numbers that is the sum over
        self.gradient_square: Tensor
        self.signal_square: Tensor

    def step(self, gradient: Tensor, rate: float = 1.0) -> Tensor:
        """A step against `gradient`, to be added to the state: at rate 1, and without a factor of the node's own, to
        the minimum of its energy plus a plane of that slope."""
        energy, rate = self.node.energy, rate * self.node.step_factor
        if energy.quadratic:  # in one pass over memory
            return gradient / (self.precision / -rate)
        return -rate * energy.precondition(gradient, self.prediction, self.precision)

    def column(self, values: Tensor) -> Tensor:
        """[batch] spread over the leading dimension of a state: a column that broadcasts against the error."""
        # a float64 column would make float64 errors
        dtype = self.error.dtype if values.is_floating_point() else values.dtype
        rows = values.to(self.error.device, dtype)
        if len(rows) != self.shape[0]:
            rows = rows.repeat_interleave(self.shape[0] // len(rows))
        return rows.view(-1, *[1] * (len(self.shape) - 1))

    def per_sequence(self, values: Tensor, batch: int) -> Tensor:
        """Sums over all but the batch, [batch]. `values` has the state's leading dimensions."""
        return values.reshape(batch, -1).sum(1, dtype=sum_dtype(values.device))

    def weighted(self, values: Tensor, batch: int) -> Tensor:
        """Several values of each token, [n, ...], times the precision: the sums of each sequence, [n, batch]."""
        precision = self.precision.squeeze(-1) if self.precision.dim() else self.precision
        return (values * precision).reshape(len(values), batch, -1).sum(2, dtype=sum_dtype(values.device))

    def norm(self, values: Tensor, batch: int) -> Tensor:
        """The root of the sum of squares over all but the batch, [batch]; no copy in `wide` precision is made."""
        norms: Tensor = torch.linalg.vector_norm(values.reshape(batch, -1), dim=1, dtype=wide_dtype(values))
        return norms


class LossScale(torch.autograd.Function):
    """Identity on the summed output energy; its backward notes d(loss)/d(energy) for the nodes below."""

    @staticmethod
    def forward(ctx: Any, energy: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.note = note
        return energy.view_as(energy)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.note(scale.detach())
        return scale, None


class Sweep(Protocol):
    """What a node's backward pass goes by: the `hf_pc.relaxation.Relaxation` whose pass it belongs to."""

    sites: list[Site]
    mode: str
    phase: Phase
    measures: bool
    steps_last: bool
    defers: bool
    step_size: float

    @property
    def at_rest(self) -> bool: ...

    def scale_of(self, site: Site) -> Tensor | float: ...

    def measure(self, site: Site, signal: Tensor, gradient: Tensor) -> None: ...

    def note_learned(self, site: Site, signal: Tensor) -> None: ...


class NodeFunction(torch.autograd.Function):
    """x = mu + e forwards; the module docstring says what goes backwards. Errors stay in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, error: Tensor, site: Site, sweep: Sweep) -> Tensor:
        ctx.site, ctx.sweep = site, sweep
        ctx.dtype = mu.dtype
        ctx.save_for_backward(error)
        # a copy where x = mu: a view could not be changed in place by what reads the node, as Falcon does
        # otherwise added in the precision of the errors and rounded once; on a GPU without a copy of either in between
        return mu.clone() if sweep.at_rest else torch.add(mu, error, out=torch.empty_like(mu))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        site: Site = ctx.site
        sweep: Sweep = ctx.sweep
        site.reached = True
        (error,) = ctx.saved_tensors
        mu = site.prediction
        energy: Energy = site.node.energy
        scale = sweep.scale_of(site)
        scaled = isinstance(scale, Tensor)  # a relaxing sweep's loss is the energy itself
        signal = g / scale if scaled else wide(g)  # a column's precision is that of the errors
        # at rest x = mu, where every divergence and both its gradients are zero
        gradient = signal if sweep.at_rest else energy.gradient(error, mu, site.precision, signal)
        if sweep.measures:
            sweep.measure(site, signal, gradient)
        if sweep.mode == LEARN and sweep.steps_last:
            down = _learned_signal(site, sweep, error, signal, gradient)
        elif mu is None or sweep.at_rest:  # what learns without a step learns from g: at rest, backprop's gradient
            down = signal
        else:
            down = gradient + energy.grad_prediction(error, mu, site.precision)
        if sweep.mode == LEARN:
            sweep.note_learned(site, down)
        down = g if down is signal else (down * scale if scaled else down).to(ctx.dtype)
        if sweep.mode == LEARN and site is sweep.sites[0]:
            down = down if site.waiting is None else down + site.waiting
            site.waiting = down if sweep.defers else None
        return down if ctx.needs_input_grad[0] else None, gradient if sweep.mode == RELAX else None, None, None


def _learned_signal(site: Site, sweep: Sweep, error: Tensor, signal: Tensor, gradient: Tensor) -> Tensor:
    """Take the last step; what the module below learns from there, dE/dmu."""
    energy = site.node.energy
    if energy.quadratic and sweep.step_size * site.node.step_factor == 1:
        if sweep.phase.followed:
            site.last_move = site.step(signal, sweep.step_size)
        return signal
    target = error + site.step(gradient, sweep.step_size)
    if sweep.phase.followed:
        site.last_move = target
    if sweep.phase.first:  # the errors that are reported; those of other strengths have another variance
        energy.observe(target, site.precision)
    return energy.grad_prediction(target, site.prediction, site.precision)
