"""What one process computes of a chain of blocks: its blocks, and at the ends what comes before and after all.

The model's own forward is run only for what is not a block: with stand-ins for the blocks it shows the arguments that
they are called with (masks, rotary angles), the state that goes into the first, and makes logits of the last state.
The blocks themselves are called one by one, in any order: each works on a state, none on the output of another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_pc.distributed.chain import BEFORE, Call, Chain, hidden_of, with_hidden
from hf_pc.distributed.neighbours import Timeline
from hf_pc.reuse import replaced
from hf_pc.rng import RandomState


class Stage:
    """One process's part of a model; the parameters of the others are given up.

    Args:
        model: the whole model; what is not used here becomes tensors on "meta", without memory.
        chain: how it is cut.
        counts: blocks of each process.
        index: which process this is.

    Attributes:
        blocks: the blocks here, in order.
        names: of all parameters and persistent buffers of the model, in an order that all processes share.
        aliases: of those that are another one by another name, such as tied weights, that one's name.
        holders: of each the processes that use it; the first of them answers for it.
    """

    def __init__(self, model: nn.Module, chain: Chain, counts: Sequence[int], index: int, timeline: Timeline) -> None:
        self.model = model
        self.chain = chain
        self.timeline = timeline
        begin = sum(counts[:index])
        self.own = range(begin, begin + counts[index])
        self.blocks = list(chain.blocks.values())[begin : self.own.stop]
        self.first, self.last = index == 0, index == len(counts) - 1
        self.index = index
        processes = {BEFORE: 0, chain.after: len(counts) - 1}
        processes |= dict(enumerate(np.repeat(range(len(counts)), counts).tolist()))
        self.holders = {name: sorted({processes[p] for p in places}) for name, places in chain.places.items()}
        first_name: dict[int, str] = {}
        kept = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in chain.places}
        self.aliases = {name: first_name.setdefault(id(value), name) for name, value in kept.items()}
        self.aliases = {name: own for name, own in self.aliases.items() if name != own}
        self.names = [name for name in kept if name not in self.aliases]
        self._arguments: list[Call] = []
        self._random: RandomState
        self._drawn: list[RandomState] = []  # what each block found in its first call of the step
        self._skeletons: dict[str, nn.Module] = {}
        self._give_up()

    def uses(self, name: str) -> bool:
        """Whether a parameter is used here."""
        return self.index in self.holders[name]

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by name."""
        path, _, short = name.rpartition(".")
        value: Tensor = getattr(self.model.get_submodule(path), short)
        return value

    def _give_up(self) -> None:
        if not self.first:
            self._skeletons = {n: copy.deepcopy(module).to("meta") for n, module in self.chain.entrances.items()}
        for name in self.chain.places:
            if self.uses(name):
                continue
            path, _, short = name.rpartition(".")
            module = self.model.get_submodule(path)
            if short in module._parameters:
                module._parameters[short] = nn.Parameter(_empty(getattr(module, short)), requires_grad=False)
            else:
                module._buffers[short] = _empty(getattr(module, short))

    @contextmanager
    def _standing_in(self, block: Callable[[int, Any, Any], Any]) -> Iterator[None]:
        """Inside, the model's forward calls `block(i, args, kwargs)` for its blocks and makes up what is not here."""
        with ExitStack() as inside:
            for index, module in enumerate(self.chain.blocks.values()):
                stand_in = lambda *args, _i=index, **kwargs: block(_i, args, kwargs)  # noqa: E731
                inside.enter_context(replaced(module, stand_in))
            for name, skeleton in self._skeletons.items():
                stand_in = lambda *args, _s=skeleton, **kwargs: _made_up(_s, args, kwargs)  # noqa: E731
                inside.enter_context(replaced(self.chain.entrances[name], stand_in))
            yield

    def _passed_on(self, index: int, state: Tensor) -> Any:
        extras = self.chain.extras[index]
        return state if extras is None else (state, *[None] * extras)

    def enter(self, batch: Mapping[str, Any]) -> Tensor:
        """Learn the arguments of the blocks here; returns the state that goes into the first of them.

        Only the first process computes that state; elsewhere it is zeros of its shape.
        """
        self._arguments = []

        def block(index: int, args: Any, kwargs: Any) -> Any:
            state = hidden_of(args, kwargs)
            if index in self.own:
                self._arguments.append((args, kwargs))
            if index == self.own[-1]:
                raise _Entered
            return self._passed_on(index, state)

        with self.timeline.noted("before"), self._standing_in(block):
            try:
                self.model(**batch)
            except _Entered:
                entered: Tensor = hidden_of(*self._arguments[0])
                return entered
        raise RuntimeError("the last block of this process did not run")

    def begin_step(self, random: RandomState) -> None:
        """Dropout masks are drawn anew from these generators, those of each block in its first call."""
        self._random, self._drawn = random, []

    def _replay(self, position: int) -> None:
        """Whatever ran since, what runs at this position draws what it drew in its first call of the step."""
        if position == len(self._drawn):
            self._drawn.append(self._random.now())
        else:
            self._drawn[position].restore()

    def call(self, position: int, state: Tensor) -> Any:
        """Run the block at this position here on a state; its hook does the rest. Every call sees the same dropout."""
        self._replay(position)
        args, kwargs = with_hidden(*self._arguments[position], state)
        with self.timeline.noted(f"block {self.own[position]}"):
            output = self.blocks[position](*args, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output

    def leave(self, batch: Mapping[str, Any], state: Tensor) -> Any:
        """What the model's forward returns if this is the state after its last block."""

        def block(index: int, args: Any, kwargs: Any) -> Any:
            return self._passed_on(index, state if index == self.own[-1] else hidden_of(args, kwargs))

        self._replay(len(self.blocks))
        with self.timeline.noted("after"), self._standing_in(block):
            return self.model(**batch)


class _Entered(Exception):  # noqa: N818
    """The forward has come as far as this process needs it."""


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _made_up(skeleton: nn.Module, args: Any, kwargs: Any) -> Any:
    """Zeros in the shape that a module without weights would return; masks and angles follow from shapes alone."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    device = given[0].device if given else torch.device("cpu")
    to_meta = lambda value: value.to("meta") if isinstance(value, Tensor) else value  # noqa: E731
    output = skeleton(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    return tree_map(
        lambda value: torch.zeros(value.shape, dtype=value.dtype, device=device) if isinstance(value, Tensor)
        else value, output,
    )  # fmt: skip
