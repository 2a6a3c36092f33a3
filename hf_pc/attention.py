"""Attention logits as nodes, through transformers' attention interface (arXiv 2211.03481, section 4.3).

While attached, a model's attention runs through `attention_forward`: eager attention whose logits are a node, one
distribution over keys for each query and head. A model that bypasses the interface is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_pc.architecture import base_model, text_tower
from hf_pc.dtypes import wide
from hf_pc.energies import ENERGIES, LogitEnergy
from hf_pc.node import Node

#: what attached models have as `_attn_implementation`
IMPLEMENTATION = "hf_pc_attention"
Visit = Callable[[Node, Tensor], Tensor | None]
_OWNERS: weakref.WeakKeyDictionary[nn.Module, AttentionNodes] = weakref.WeakKeyDictionary()


class AttentionNodes:
    """The attention logits of a model as nodes, one for each module that calls the attention interface.

    Args:
        model: a transformers or PEFT model.
        energy: the name of a registered energy, such as "categorical" or "gaussian".

    Raises:
        ValueError: the architecture does not use the attention interface.
    """

    def __init__(self, model: nn.Module, energy: str) -> None:
        self.model = model
        self.energy = energy
        self.nodes: dict[str, Node] = {}
        self.states: dict[str, Any] = {}  # of energies whose nodes are yet to be met
        base = base_model(model)
        able = getattr(base, "_can_set_attn_implementation", None)
        if able is None or not able():
            raise ValueError(
                f"attention_energy={energy!r} cannot be had on {type(base).__name__}: its attention does not go "
                "through transformers' attention interface"
            )

    def attach(self, visit: Visit) -> None:
        """Route the model's attention through `attention_forward`."""
        base: Any = base_model(self.model)
        self._visit = visit
        self._names = {module: name for name, module in self.model.named_modules()}
        self._before = [(config, config._attn_implementation) for config in _configs(base)]
        base.set_attn_implementation(IMPLEMENTATION)
        tower = text_tower(self.model)
        for module in (self.model if tower is None else self.model.get_submodule(tower)).modules():
            _OWNERS[module] = self

    def detach(self) -> None:
        """Give the model its own attention back."""
        for config, implementation in self._before:
            config._attn_implementation_internal = implementation
        for module in self._names:
            _OWNERS.pop(module, None)

    def check(self) -> None:
        """Raise ValueError if a whole pass has met no attention."""
        if not self.nodes:
            raise ValueError(
                f"attention_energy={self.energy!r} cannot be had on {type(base_model(self.model)).__name__}: a pass "
                "over it never reached transformers' attention interface"
            )

    def join(self, module: nn.Module, logits: Tensor) -> Tensor:
        name = f"{self._names[module]}.logits"
        if name not in self.nodes:
            # logits are nats whatever their energy; a scale taken over keys would depend on padding and on the future
            self.nodes[name] = Node(name, module, ENERGIES[self.energy](), in_nats=True)
            self.nodes[name].energy.load_state_dict(self.states.get(name, {}))
        state = self._visit(self.nodes[name], logits)
        return logits if state is None else state


def _configs(base: Any) -> list[Any]:
    found = {id(module.config): module.config for module in base.modules() if hasattr(module, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention with its logits as a node.

    Args:
        query: [batch, heads, queries, width]; key and value: [batch, key-value heads, keys, width].
        attention_mask: added to the logits, broadcast to [batch, heads, queries, keys].

    Returns:
        [batch, queries, heads, width] and the probabilities, [batch, heads, queries, keys].
    """
    if any(found is not None for found in (getattr(module, "sinks", None), kwargs.get("sinks"), kwargs.get("s_aux"))):
        raise ValueError(f"{type(module).__name__} has attention sinks, which cannot be a node yet")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        logits = logits + position_bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    owner = _OWNERS.get(module)
    # a distribution is one over the keys that may be seen; a Gaussian knows no impossible value
    masked_first = owner is None or issubclass(ENERGIES[owner.energy], LogitEnergy)
    if attention_mask is not None and masked_first:
        logits = logits + attention_mask
    elif attention_mask is not None:  # but what is impossible moves nothing either
        logits = logits.masked_fill(attention_mask < LogitEnergy.MASKED, 0)
    if owner is not None:
        logits = owner.join(module, logits)
    if attention_mask is not None and not masked_first:
        logits = logits + attention_mask
    probabilities = wide(logits).softmax(-1).to(value.dtype)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
