"""What of a model runs before its blocks, in them and after them: the cuts along which processes can share it.

A model can be split where its blocks are a chain: each runs once, in order, on nothing of the model's but the output
of the one before and what no weight takes part in (masks, rotary angles). One small forward pass shows whether that
is so, and which parameters belong where; what is no chain is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_pc.architecture import base_model, evaluating, is_encoder_decoder
from hf_pc.placement import blocks

#: positional and named arguments
Call = tuple[tuple[Any, ...], dict[str, Any]]
#: the place of what runs before the first block; block i has place i, and what runs after L blocks has place L
BEFORE = -1


@dataclass(frozen=True)
class Chain:
    """A model cut into what comes before, the blocks, and what comes after.

    Attributes:
        blocks: the blocks by name, in the order they run.
        entrances: modules with parameters that run wholly before the first block, the outermost of them, by name.
        places: of each parameter and persistent buffer, by name, where it is used; tied ones have several places.
        extras: how many values each block returns behind its state; None where it returns the state alone.
    """

    blocks: dict[str, nn.Module]
    entrances: dict[str, nn.Module]
    places: dict[str, frozenset[int]]
    extras: list[int | None]

    @property
    def after(self) -> int:
        """The place of what runs after the last block."""
        return len(self.blocks)


@dataclass
class _Seen:
    """What one forward pass has shown so far: place begins at BEFORE, is i inside block i, i + 0.5 behind it."""

    place: float = BEFORE
    state: Tensor | None = None
    extras: list[int | None] = field(default_factory=list)
    started: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)


def trace(model: nn.Module, batch: Mapping[str, Any]) -> Chain:
    """Cut a model along its blocks.

    Args:
        batch: what its forward takes, without labels; one sequence is enough.

    Raises:
        ValueError: the blocks are no chain; the message says why.
    """
    kind = type(base_model(model)).__name__
    if is_encoder_decoder(model):
        raise ValueError(f"{kind} cannot be split: every block of its decoder reads the encoder's last state")
    found = blocks(model)
    if not found:
        raise ValueError(f"{kind} cannot be split: no transformer block was found in it")
    if len(set(map(id, found.values()))) < len(found):
        raise ValueError(f"{kind} cannot be split: some of its blocks are one and the same module")
    seen = _Seen()
    names = list(found)
    handles = []
    for index, block in enumerate(found.values()):
        handles += _watch_block(seen, kind, names, index, block)
    outside = {
        name: module for name, module in model.named_modules()
        if not any(name == own or name.startswith(own + ".") for own in names)
    }  # fmt: skip
    for name, module in outside.items():
        handles += _watch(seen, name, module)
    whole = _logits(model, batch, handles)
    if len(seen.extras) != len(found):
        raise ValueError(f"{kind} cannot be split: {len(seen.extras)} of its {len(found)} blocks ran in a pass")
    if any(seen.extras):
        alone = [block.register_forward_hook(_state_alone) for block in found.values()]
        if not torch.equal(_logits(model, batch, alone), whole):
            raise ValueError(f"{kind} cannot be split: its blocks hand on more than their state")
    places = _places(kind, model, names, outside, seen)
    return Chain(found, _entrances(outside, seen), places, seen.extras)


def _logits(model: nn.Module, batch: Mapping[str, Any], handles: list[Any]) -> Tensor:
    """Logits of a pass in evaluation mode; the hooks are removed after it."""
    try:
        with evaluating(model), torch.enable_grad():  # what needs a gradient is to be seen
            outputs = model(**batch)
            if "logits" not in outputs:
                kind = type(base_model(model)).__name__
                raise ValueError(
                    f"{kind} returns no logits, which labels are compared with: a class with a head is needed"
                )
            logits: Tensor = outputs["logits"].detach()
            return logits
    finally:
        for handle in handles:
            handle.remove()


def _state_alone(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0], *[None] * (len(output) - 1)) if isinstance(output, (tuple, list)) else output


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Of a block's arguments the state that it works on."""
    return args[0] if args else kwargs.get("hidden_states")


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with another state in them."""
    return ((state, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": state})


def _watch_block(seen: _Seen, kind: str, names: list[str], index: int, block: nn.Module) -> list[Any]:
    def refuse(why: str) -> ValueError:
        return ValueError(f"{kind} cannot be split at block {names[index]!r}: {why}")

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if seen.place != (BEFORE if index == 0 else index - 0.5):
            raise refuse("blocks run in another order than they are listed in, or several times")
        state = hidden_of(args, kwargs)
        if not isinstance(state, Tensor):
            raise refuse("its first argument is no tensor")
        if seen.state is not None and (state.data_ptr() != seen.state.data_ptr() or state.shape != seen.state.shape):
            raise refuse("the model changes the state between blocks")
        others = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value is not state)
        if any(value.requires_grad for value in others):
            raise refuse("it shares something with weights, such as a position bias, with other blocks")
        seen.place, seen.state = index, state

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        state, *rest = output if isinstance(output, (tuple, list)) else (output,)
        if not isinstance(state, Tensor) or seen.state is None or state.shape != seen.state.shape:
            raise refuse("it changes the shape of the state")
        seen.extras.append(len(rest) if isinstance(output, (tuple, list)) else None)
        seen.place, seen.state = index + 0.5, state

    return [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after, with_kwargs=True),
    ]


def _watch(seen: _Seen, name: str, module: nn.Module) -> list[Any]:
    def before(module: nn.Module, args: Any) -> None:
        seen.started.setdefault(name, seen.place)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.ended[name] = seen.place

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _places(
    kind: str, model: nn.Module, names: list[str], outside: Mapping[str, nn.Module], seen: _Seen
) -> dict[str, frozenset[int]]:
    """Where each parameter and persistent buffer is used; one that no module's call shows counts for everywhere."""
    last = len(names)
    everywhere = frozenset(range(BEFORE, last + 1))
    used: dict[int, set[int]] = {}
    labels: dict[str, int] = {}
    for name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False))
        if not own:
            continue
        if name in outside:
            start, end = seen.started.get(name), seen.ended.get(name)
            here = everywhere if start is None or end is None else {_outer(start, last), _outer(end, last)}
            if any(BEFORE < place < last for place in here) and here != everywhere:
                raise ValueError(f"{kind} cannot be split: {name!r} runs between its blocks")
        else:
            here = {next(i for i, own in enumerate(names) if name == own or name.startswith(own + "."))}
        for short, value in own:
            labels[f"{name}.{short}" if name else short] = id(value)
            used.setdefault(id(value), set()).update(here)
    kept = model.state_dict(keep_vars=True)  # the buffers that are not saved are made anew with the model
    return {name: frozenset(used[label]) for name, label in labels.items() if name in kept}


def _outer(place: float, last: int) -> int:
    """The place of something outside the blocks that was seen at this point of a pass."""
    return last if place == last - 0.5 else int(place) if place == BEFORE else max(0, min(last - 1, round(place)))


def _entrances(outside: Mapping[str, nn.Module], seen: _Seen) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in outside.items():
        if any(name.startswith(outer + ".") for outer in found):
            continue
        if seen.ended.get(name) == BEFORE and any(True for _ in module.parameters()):
            found[name] = module
    return found
