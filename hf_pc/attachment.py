"""The nodes of a PCModel on its model: hooks, attention and compiled parts, put there and removed together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from hf_pc.attention import AttentionNodes
from hf_pc.node import Node

#: modules that are nodes of some PCModel
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_free(model: nn.Module) -> None:
    """Raise ValueError if some PCModel is attached to the model."""
    if any(module in _ATTACHED for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has PC nodes already: detach() the PCModel that put them there")


class Attachment:
    """Nodes on a model until `remove` is called, or the owner of `visit` is gone.

    Args:
        model: what the nodes' modules are part of.
        attention: nodes on attention logits, if there are any.
        visit: a bound method, called with a node and what its module computed, that says what to go on with, None
            for the same. Hooks refer to it weakly: they do not keep its owner alive.
        compile_parts: compiles parts of the model, and returns what undoes that; None compiles nothing.

    Raises:
        ValueError: the model has nodes already.
    """

    def __init__(
        self,
        model: nn.Module,
        nodes: Sequence[Node],
        attention: AttentionNodes | None,
        visit: Callable[[Node, Tensor], Tensor | None],
        compile_parts: Callable[[], Callable[[], None]] | None,
    ) -> None:
        check_free(model)
        weak = weakref.WeakMethod(visit)
        call: Callable[[Node, Tensor], Tensor | None] = lambda node, mu: (  # noqa: E731
            None if (alive := weak()) is None else alive(node, mu)
        )
        with ExitStack() as attached:  # undone where a part of it fails
            for node in nodes:
                attached.callback(node.attach(call).remove)
                _ATTACHED.add(node.module)
                attached.callback(_ATTACHED.discard, node.module)
            if attention:
                attention.attach(call)
                attached.callback(attention.detach)
            if compile_parts:
                attached.callback(compile_parts())
            undo = attached.pop_all()
        self._finalizer = weakref.finalize(visit.__self__, undo.close)  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Take the nodes off the model. Does nothing if they are gone already."""
        self._finalizer()

    @property
    def alive(self) -> bool:
        """Whether the nodes are on the model."""
        return self._finalizer.alive
