"""What no error can change is computed once per step.

The first node's module sees the batch and no state, so in every relaxing sweep of a step it computes the same. The
first sweep's output is kept and given again; the learning pass computes it anew, since its weights learn. Where
several phases learn, only the last does: what the others teach the module is the sum of their signals at its node,
which waits there for it (`Site.waiting`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_pc.rng import RandomState


class FirstPrediction:
    """Runs the first node's module once per step.

    Args:
        model: the whole model; its devices have the generators.
        guess: what is taken for the module until a pass has shown which node fires first; None if the first module
            here sees states, and so computes anew in every sweep.
    """

    def __init__(self, model: nn.Module, guess: nn.Module | None) -> None:
        self._model = model
        self._module = guess
        self._kept: tuple[Any, RandomState] | None = None
        self._ran = self._mistaken = False

    def forget(self) -> None:
        """Begin a step."""
        self._kept, self._mistaken = None, False

    def begin_pass(self) -> None:
        self._ran = False

    def serves_learning(self) -> bool:
        """Whether what is kept may stand in for the module in a learning pass: nothing else of it is learned from."""
        if self._kept is None or getattr(self._module, "gradient_checkpointing", False):
            return False  # a checkpointed module is run again in the backward pass, by then as itself
        output = self._kept[0]
        return not isinstance(output, tuple) or not any(isinstance(part, Tensor) for part in output[1:])

    def found(self, module: nn.Module | None) -> None:
        """Learn whose output came first in the pass that has just ended; None if that is no module's."""
        if module is not self._module:
            self._module, self._kept, self._mistaken = module, None, True

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Inside, a call whose output is known returns it, and leaves the generators where they would be."""
        module = self._module
        # what is compiled with its hooks is not to be replaced
        if module is None or getattr(module, "_compiled_call_impl", None) is not None:
            yield
            return
        compute, own = module.forward, module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            first, self._ran = not self._ran, True  # a shared module runs again in the pass, on states
            if not first or self._mistaken:
                return compute(*args, **kwargs)
            if self._kept is None:
                output = compute(*args, **kwargs)
                if _repeats(args, kwargs, output):
                    self._kept = output, RandomState(p.device for p in self._model.parameters())
                return output
            output, random = self._kept
            random.restore()
            return output

        module.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign]


def _repeats(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether a call can be answered from memory: it returned plain tensors, and had nothing to write to."""
    given = [*args, *kwargs.values()]
    parts = output if isinstance(output, tuple) else (output,)
    mutable = any(not isinstance(value, (Tensor, tuple, bool, int, float, str, type(None))) for value in given)
    return not mutable and all(part is None or (isinstance(part, Tensor) and not part.requires_grad) for part in parts)
