"""`torch.compile` of what lies between nodes, and of the output energy behind the last.

A hook cannot be compiled, so not the model is compiled but the forward of each node's module, whose hook runs outside.
Compiled, a softmax over a vocabulary is one operation, and leaves no copy of the logits in float32.

What is compiled while weights are frozen is kept apart from what they learn through. torch 2.11, which does not always
look at a module's weights again, was seen to run one for the other: blocks had no gradient in the first step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from hf_pc.node import Node
from hf_pc.output import Output


def check_compilable(nodes: list[Node]) -> None:
    """Raise ValueError if a node lies inside another one's module."""
    modules = {id(node.module): node.name for node in nodes}
    for node in nodes:
        inner = [
            modules[id(child)] for child in node.module.modules() if child is not node.module and id(child) in modules
        ]
        if inner:
            raise ValueError(
                f"PCConfig.compile=True compiles the module of each node, but node {inner[0]!r} lies inside node "
                f"{node.name!r}: choose nodes='block', or compile=False"
            )


class Compiled:
    """Takes the place of a method: compiled while a batch relaxes or is learned, as it was otherwise.

    Evaluation and generation would only add graphs, of which torch allows few. What raises while it is first traced is
    never compiled: inputs are checked elsewhere.
    """

    def __init__(self, plain: Callable[..., Any], active: Callable[[], bool]) -> None:
        self.plain = plain
        self.compiled = torch.compile(plain)
        self.active = active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._now()(*args, **kwargs)

    def _now(self) -> Callable[..., Any]:
        """What is to run."""
        return self.compiled if self.active() else self.plain


class CompiledForward(Compiled):
    """Takes the place of a module's forward. A copy of the module gets a forward of its own, not compiled."""

    def __init__(self, module: nn.Module, active: Callable[[], bool], frozen: Callable[[], bool]) -> None:
        self.module = weakref.ref(module)
        super().__init__(module.forward, active)
        self.frozen = frozen
        self.relaxing = torch.compile(_twin(module.forward))

    def _now(self) -> Callable[..., Any]:
        return self.relaxing if self.active() and self.frozen() else super()._now()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self.module())]
        return MethodType(type(copied).forward, copied)


@cache
def _twin_code(code: CodeType, filename: str) -> CodeType:
    """The same for all modules of a class, so that they share what is compiled; equal code of other files is not."""
    return code.replace(co_name=f"{code.co_name}_frozen")


def _twin(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method as code of its own, for torch keeps what it compiles with the code."""
    if not isinstance(method, MethodType) or not isinstance(function := method.__func__, FunctionType):
        return method
    code = _twin_code(function.__code__, function.__code__.co_filename)
    twin = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return MethodType(twin, method.__self__)


def compile_parts(
    nodes: list[Node], output: Output, active: Callable[[], bool], frozen: Callable[[], bool] = lambda: False
) -> Callable[[], None]:
    """Compile the forward of every node's module and the output energy, to be used while `active()`; returns what
    undoes it.

    Args:
        frozen: whether no weight requires grad at present.
    """
    vars(output)["energy"] = Compiled(output.energy, active)  # a frozen dataclass
    before: dict[nn.Module, object] = {}
    for node in nodes:
        before[node.module] = node.module.__dict__.get("forward")
        node.module.forward = CompiledForward(node.module, active, frozen)  # type: ignore[method-assign]

    def undo() -> None:
        vars(output).pop("energy", None)
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign, assignment]

    return undo
