"""The optimizer that moves states: a class of torch.optim, written as a name or with arguments."""

from __future__ import annotations

import ast
from typing import Any

import torch

#: wanted are dense tensors of any shape, and one gradient a step
UNFIT = ("Optimizer", "LBFGS", "SparseAdam", "Muon")


def parse_optimizer(text: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and the arguments of "Adam" or "SGD(momentum=0.9)"; the values are literals.

    Raises:
        ValueError: there is no such class, or it does not take these arguments.
    """
    try:
        parsed = ast.parse(text, mode="eval").body
        call = parsed if isinstance(parsed, ast.Call) else ast.Call(parsed, [], [])
        if not isinstance(call.func, ast.Name) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("a name, or a name with named arguments, is needed")
        name, arguments = call.func.id, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        cls = getattr(torch.optim, name, None)
        if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer) or name in UNFIT:
            raise ValueError(f"{name} is no class of torch.optim for dense tensors, such as 'SGD' or 'Adam'")
        if "lr" in arguments:
            raise ValueError("its learning rate is step_size")
        if arguments.get("maximize"):
            raise ValueError("maximize=True leads up the free energy")
        cls([torch.zeros(1)], lr=1.0, **arguments)  # type: ignore[call-arg]
    except (SyntaxError, TypeError, ValueError, LookupError, RuntimeError) as error:
        raise ValueError(f"PCConfig.state_optimizer={text!r} is not allowed: {error}") from None
    return cls, arguments
