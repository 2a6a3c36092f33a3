"""What is to be known of a transformers model beside its blocks: what is inside a PEFT model, what its mode, its
configuration and its adapters mean for a pass over a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

#: the adapters of PEFT whose virtual tokens are keys and values, and have no positions
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has a decoder that reads what an encoder made of other inputs."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


#: of functions that were asked about: a signature takes long to make
_PARAMETERS: WeakKeyDictionary[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The arguments that a function, or a method, can be given."""
    own = getattr(function, "__func__", function)
    if not isinstance(own, FunctionType):
        return inspect.signature(function).parameters
    if own not in _PARAMETERS:
        _PARAMETERS[own] = inspect.signature(function).parameters
    return _PARAMETERS[own]


def accepts(forward: Callable[..., Any], name: str) -> bool:
    """Whether a function can be given an argument of this name."""
    parameters = parameters_of(forward)
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def setting(model: nn.Module, name: str, default: Any) -> Any:
    """What the configuration of a model says; a model of images or sounds and text may have it with its text."""
    config: Any = getattr(base_model(model), "config", None)
    if (found := getattr(config, name, None)) is not None:
        return found
    return getattr(getattr(config, "get_text_config", lambda: config)(), name, default)


def _caches(model: nn.Module) -> bool:
    """Whether a model would keep keys and values, unless it is told not to. Classifiers with a text part say so
    themselves, and encoder-decoders have no such part."""
    own = getattr(getattr(base_model(model), "config", None), "use_cache", None)
    if own is None and not is_encoder_decoder(model) and "Classification" not in type(base_model(model)).__name__:
        own = setting(model, "use_cache", False)
    return bool(own)


def plainly(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that a model answers with a dictionary, and keeps no keys and values of."""
    batch, config = dict(inputs), getattr(model, "config", None)
    if _caches(model) and accepts(model.forward, "use_cache"):
        batch.setdefault("use_cache", False)
    if not batch.get("return_dict", getattr(config, "return_dict", True)) and accepts(model.forward, "return_dict"):
        batch["return_dict"] = True
    return batch


def positions(model: nn.Module) -> int | None:
    """How many tokens a model has positions for; None if it does not say, or has them without end."""
    config: Any = base_model(model).config
    for name in ("max_position_embeddings", "max_target_positions"):
        found = getattr(config.get_text_config(), name, None)
        if isinstance(found, int) and found > 0:  # XLNet says -1 of positions without end
            return found - _skipped(model, found)
    return None


def _skipped(model: nn.Module, count: int) -> int:
    """How many of `count` positions come before a sequence's first: those of RoBERTa count on from the padding's."""
    tables = (m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding))
    return max((t.padding_idx + 1 for t in tables if t.num_embeddings == count and t.padding_idx), default=0)


@contextmanager
def evaluating(model: nn.Module, enter: Callable[[nn.Module], object] = nn.Module.eval) -> Iterator[None]:
    """Inside, every module is in evaluation mode, or in the one that `enter` sets; behind it in that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        enter(model)
        yield
    finally:
        for module in training:
            module.training = True


def virtual_tokens(model: nn.Module) -> int:
    """How many positions an active prompt-learning adapter puts before a sequence; what it gives as keys and values
    has none."""
    adapter = getattr(model, "active_peft_config", None)
    if not getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "peft_type", None) in KEYS_AND_VALUES:
        return 0
    return int(adapter.num_virtual_tokens)  # type: ignore[union-attr]


def text_tower(model: nn.Module) -> str | None:
    """The name of the part that text goes through, in a model that puts images or sounds into it, as LLaVA does.

    A batch of such a model has as many images as it has, whichever sequences they are of. None for other models.
    """
    base = base_model(model)
    config = getattr(base, "config", None)
    placed = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    if is_encoder_decoder(model) or all(getattr(config, name, None) is None for name in placed):
        return None
    decoder: Any = getattr(base, "get_decoder", lambda: None)()
    return next((name for name, module in model.named_modules() if module is decoder and module is not base), None)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model's own activation checkpointing is switched on."""
    # a module asked for what it lacks looks for it among its parameters, buffers and children
    return any(vars(module).get("gradient_checkpointing", False) for module in model.modules())


def layer_drop(model: nn.Module) -> str | None:
    """The setting by which a model leaves out whole blocks while it trains, such as "layerdrop=0.1"; None if none."""
    config = getattr(model, "config", None)
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0):
            return f"{name}={getattr(config, name)}"
    return None


def auxiliary_loss(model: nn.Module, outputs: Any) -> Tensor | float:
    """A mixture of experts' router losses, weighted as its own forward does when it is given labels; else 0."""
    base: Any = base_model(model)
    total: Tensor | float = 0.0
    for kind in ("aux_loss", "z_loss"):
        names = (kind, f"encoder_{kind}", f"decoder_{kind}")
        if parts := [outputs[name] for name in names if outputs.get(name) is not None]:
            weight = setting(model, f"router_{kind}_coef", None)
            if weight is None:  # as of DBRX and JetMoE, which say so themselves
                weight = getattr(base, f"router_{kind}_coef", getattr(base, f"{kind}_coef", 0.0))
            total += weight * sum(parts)
    return total


def routes(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a pass over these inputs has a router loss, which reaches into every block."""
    return bool(inputs.get("output_router_logits", setting(model, "output_router_logits", False)))
