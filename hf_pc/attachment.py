"""The nodes of a PCModel on its model: hooks, attention and compiled parts, put there and removed together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_pc.attention import AttentionNodes
from hf_pc.node import Node

#: modules that are nodes of some PCModel
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Attachment:
    """Nodes on a model until `remove` is called, or nobody holds this any more.

    Args:
        model: what the nodes' modules are part of.
        attention: nodes on attention logits, if there are any.
        visit: a method, called with a node and what its module computed, that says what to go on with, None for the
            same; hooks do not keep its owner alive that nobody else does.
        compiles: compiles parts of the model, and returns what undoes that; None compiles nothing.

    Raises:
        ValueError: the model has nodes already.
    """

    def __init__(
        self,
        model: nn.Module,
        nodes: Sequence[Node],
        attention: AttentionNodes | None,
        visit: Callable[[Node, Tensor], Tensor | None],
        compiles: Callable[[], Callable[[], None]] | None,
    ) -> None:
        if any(module in _ATTACHED for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has PC nodes already: detach() the PCModel that put them there")
        weak = weakref.WeakMethod(visit)
        call: Callable[[Node, Tensor], Tensor | None] = lambda node, mu: (  # noqa: E731
            None if (alive := weak()) is None else alive(node, mu)
        )
        handles = [node.attach(call) for node in nodes]
        if attention:
            attention.attach(call)
        undo = compiles() if compiles else None
        modules = [node.module for node in nodes]
        _ATTACHED.update(modules)
        self.remove = weakref.finalize(self, _remove, handles, modules, attention, undo)


def _remove(
    handles: Sequence[RemovableHandle],
    modules: Sequence[nn.Module],
    attention: AttentionNodes | None,
    undo: Callable[[], None] | None,
) -> None:
    for handle in handles:
        handle.remove()
    for module in modules:
        _ATTACHED.discard(module)
    if attention:
        attention.detach()
    if undo:
        undo()
