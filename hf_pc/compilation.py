"""`torch.compile` of what lies between nodes.

A hook cannot be compiled, so not the model is compiled but the forward of each node's module, whose hook runs outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hf_pc.node import Node


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


def compile_forwards(nodes: list[Node]) -> Callable[[], None]:
    """Compile the forward of every node's module; returns what undoes it."""
    compiled: dict[nn.Module, object] = {}
    for node in nodes:
        compiled[node.module] = node.module.__dict__.get("forward")
        node.module.forward = torch.compile(node.module.forward)  # type: ignore[method-assign]

    def undo() -> None:
        for module, own in compiled.items():
            if own is None:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign, assignment]

    return undo
