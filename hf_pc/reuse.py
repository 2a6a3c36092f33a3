"""What no error can change is computed once per step.

The first node's module sees the batch and no state, so in every sweep of a step it computes the same. The first
sweep's output is kept and given again: to relaxing sweeps as a number, to the learning pass with its graph, through
which its weights learn; until it has run, the weights are therefore not frozen. Where several phases learn, only the
last has that graph: what the others teach the module is the sum of their signals at its node, which waits there for
it (`Site.waiting`). It is computed anew to learn where a solver differentiates piece by piece, where the backward pass
would run it again (activation checkpointing), and where a weight or a buffer was written to in between.

Where states cut the graph, a signal comes down one node a sweep. Nodes that none has reached yet see what they saw at
rest and predict the states that they have, so that relaxing sweeps leave them out: of all runs in the first L sweeps
over a chain of L nodes half. (Nodes inside blocks are reached at once, by way of the residual stream.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_pc.architecture import is_checkpointing
from hf_pc.node import RELAX, Node
from hf_pc.relaxation import Relaxation
from hf_pc.rng import RandomState


class RunsAgain(Exception):  # noqa: N818
    """The first node's module lies in what activation checkpointing runs again in the backward pass."""


class FirstPrediction:
    """Runs the first node's module once per step.

    Args:
        model: the whole model.
        guess: what is taken for the module until a pass has shown which node fires first; None if the first module
            here sees states, and so computes anew in every sweep.
    """

    def __init__(self, model: nn.Module, guess: nn.Module | None) -> None:
        self._model = model
        self._module = guess
        self._kept: tuple[Any, RandomState] | None = None
        self._tensors: list[Tensor] = []  # of the model, as a step found them
        self._versions: list[int] = []  # of these, when it was kept
        self._ran = self._mistaken = self._runs_again = False

    def forget(self) -> None:
        """Begin a step."""
        self._kept, self._mistaken = None, False
        self._tensors = []

    def begin_pass(self) -> None:
        self._ran = False

    def may_learn(self) -> bool:
        """Whether the first sweep may keep the module's graph."""
        module = self._module
        # a hook on its gradient would be called by the learning pass with what the first sweep has found
        hooked = module is not None and (module._backward_hooks or module._backward_pre_hooks)
        if module is None or not _replaceable(module) or hooked:
            return False
        self._runs_again = self._runs_again or is_checkpointing(self._model)  # which may be switched on at any time
        return not self._runs_again

    def serves_learning(self) -> bool:
        """Whether what is kept may stand in for the module in a learning pass: nothing else of it is learned from."""
        return self._kept is not None and not self._runs_again and _alone(self._kept[0])

    def learns(self) -> bool:
        """Whether what is kept has the graph that its weights learn through."""
        if self._kept is None or not self.serves_learning():
            return False
        return any(part.requires_grad for part in _tensors(self._kept[0])) and self._versions == self._written()

    def _written(self) -> list[int]:
        """How often each tensor of the model has been written to."""
        self._tensors = self._tensors or list(chain(self._model.parameters(), self._model.buffers()))
        return [0 if tensor.is_inference() else tensor._version for tensor in self._tensors]

    def spend(self) -> None:
        """A learning pass has taken the graph: what is kept is the numbers alone."""
        if self._kept is not None:
            self._kept = _detached(self._kept[0]), self._kept[1]

    def found(self, module: nn.Module | None) -> None:
        """Learn whose output came first in the pass that has just ended; None if that is no module's."""
        if module is not self._module:
            self._module, self._kept, self._mistaken = module, None, True

    @contextmanager
    def reused(
        self, random: RandomState, *, graph: bool = False, computed: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Inside, a call whose output is known returns it, and leaves the generators where they would be.

        Args:
            random: of these generators.
            graph: return it with its graph.
            computed: called when the module has run for the first time; until then its weights may require grad.

        Raises:
            RunsAgain: the backward pass would run it again, with what went before it in a block, and would find other
                weights frozen than this pass does; from then on none may require grad.
        """
        module = self._module
        if module is None or not _replaceable(module):
            yield
            return
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            first, self._ran = not self._ran, True  # a shared module runs again in the pass, on states
            if not first or self._mistaken:
                return compute(*args, **kwargs)
            if self._kept is None:
                if _checkpointed() and not self._runs_again:
                    self._runs_again = True
                    if computed is not None:
                        raise RunsAgain
                output = compute(*args, **kwargs)
                if computed is not None:
                    computed()
                if _repeats(args, kwargs, output, learns=computed is not None and not self._runs_again):
                    kept = output if _alone(output) else _detached(output)
                    self._kept = kept, random.now()
                    self._versions = self._written()
                return output
            output, behind = self._kept
            behind.restore()
            return output if graph else _detached(output)

        with replaced(module, forward):
            yield


@contextmanager
def unreached_left_out(nodes: Sequence[Node], relaxation: Relaxation, random: RandomState) -> Iterator[None]:
    """Inside, in relaxing sweeps a module whose node still rests returns its state, and leaves the generators `random`
    where they would be."""
    with ExitStack() as inside:
        for node in nodes:
            if _replaceable(node.module):
                inside.enter_context(replaced(node.module, _once_reached(node, relaxation, random)))
        yield


def _once_reached(node: Node, relaxation: Relaxation, random: RandomState) -> Callable[..., Any]:
    compute = node.module.forward
    found: list[tuple[Any, RandomState]] = []  # at rest: what came out, without memory, and the generators behind it

    def forward(*args: Any, **kwargs: Any) -> Any:
        if relaxation.at_rest:
            output = compute(*args, **kwargs)
            if _repeats(args, kwargs, output, learns=True) and _alone(output):
                found[:] = [(_each(lambda part: part.new_empty(()), output), random.now())]
            return output
        site = relaxation.resting(node) if found and relaxation.mode == RELAX else None
        if site is None:
            return compute(*args, **kwargs)
        form, behind = found[0]
        behind.restore()
        return _each(lambda part: node.batch_first(site.leaf.detach()).to(part.dtype), form)

    return forward


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module's forward is another one."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def _replaceable(module: nn.Module) -> bool:
    """What is compiled with its hooks is not to be replaced."""
    return getattr(module, "_compiled_call_impl", None) is None


def _checkpointed() -> bool:
    """Whether this is a module's first run of two: what it saves is replaced, or, the older way, not noted at all."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _repeats(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, learns: bool) -> bool:
    """Whether a call can be answered from memory: it returned plain tensors, and had nothing to write to.

    Frozen weights give a graph only where a node inside does; where they learn, `FirstPrediction.found` tells.
    """
    given = [*args, *kwargs.values()]
    mutable = any(not isinstance(value, (Tensor, tuple, bool, int, float, str, type(None))) for value in given)
    plain = type(output) is tuple and all(part is None or isinstance(part, Tensor) for part in output)
    if mutable or not (plain or isinstance(output, Tensor)):
        return False
    return learns or not any(part.requires_grad for part in _tensors(output))


def _tensors(output: Any) -> list[Tensor]:
    return [part for part in (output if isinstance(output, tuple) else (output,)) if part is not None]


def _alone(output: Any) -> bool:
    """Whether nothing but the node's own tensor comes out."""
    return len(_tensors(output)) == 1


def _detached(output: Any) -> Any:
    return _each(Tensor.detach, output)


def _each(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """An output with another tensor in place of each."""
    if isinstance(output, Tensor):
        return change(output)
    return tuple(None if part is None else change(part) for part in output)
