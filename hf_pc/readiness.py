"""Whether a batch can be relaxed now, with this model and in this way: what is looked at before, and as it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hf_pc.architecture import layer_drop
from hf_pc.config import PCConfig
from hf_pc.learning import Phase
from hf_pc.relaxation import Relaxation
from hf_pc.solvers import SOLVERS


def check_float32(model: nn.Module, config: PCConfig) -> None:
    """Raise ValueError if some weights are not in float32 though sweeps are to be in less."""
    lower = config.relaxation_dtype
    for name, parameter in model.named_parameters() if lower else ():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"relaxation_dtype={lower!r} needs weights in float32; {name!r} is in {parameter.dtype}: load the "
                "model with dtype=torch.float32, or leave relaxation_dtype out"
            )


def check_learnable(model: nn.Module) -> None:
    """Raise ValueError where every weight is frozen."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: there is nothing to learn")


def check_idle(attached: bool, relaxing: bool) -> None:
    """Raise RuntimeError unless a PCModel's nodes are on its model, and no batch relaxes."""
    if not attached:
        raise RuntimeError("this PCModel is detached: attach() it first")
    if relaxing:
        raise RuntimeError("this PCModel is relaxing a batch already: one batch at a time")


def check_mode(config: PCConfig, steps_weights: bool) -> None:
    """Raise an error where no batch can be relaxed in this way.

    Args:
        steps_weights: whether something moves the weights while states relax.

    Raises:
        ValueError: that is not what `weight_update` says, or `relaxation_dtype` meets autocast.
        RuntimeError: there are no gradients in inference mode.
    """
    update = config.weight_update
    if steps_weights == (update == "final"):
        raise ValueError(
            f"weight_update={update!r} moves the weights once the states have relaxed: weight_step is not allowed"
            if update == "final" else
            f"weight_update={update!r} moves weights while the states relax: use PCTrainer, or give weight_step"
        )  # fmt: skip
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "errors relax by gradients, which torch.inference_mode() switches off for good: leave it out (under "
            "torch.no_grad() they relax)"
        )
    if config.relaxation_dtype is not None and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise ValueError(
            f"relaxation_dtype={config.relaxation_dtype!r} is not allowed under autocast, where the learning "
            "pass has no more precision than the sweeps"
        )


def check_weight_hooks(parameters: Iterable[nn.Parameter], config: PCConfig, phases: Sequence[Phase]) -> None:
    """Raise ValueError where something steps weights as soon as a part of their gradient is there."""
    hooked = [p for p in parameters if getattr(p, "_post_accumulate_grad_hooks", None)]
    # transformers averages what replicas hold of a model that was sharded while it was loaded: twice is once
    if all(getattr(p, "_replicated_grad_hook_registered", False) for p in hooked):
        return
    found = (
        "a weight has a hook that runs once its gradient is accumulated, as of optimizers that step in the backward "
        "pass"
    )
    if config.cuda_graph:
        raise ValueError(f"{found}: PCConfig.cuda_graph=True would record what it does once; use another optimizer")
    if learns_in_parts(config, phases):
        raise ValueError(f"{found}; {in_parts(config)}")


def learns_in_parts(config: PCConfig, phases: Sequence[Phase]) -> bool:
    """Whether the gradient of a step comes in more than one backward pass."""
    return len(phases) > 1 or not SOLVERS[config.solver].one_backward


def in_parts(config: PCConfig) -> str:
    """Why there can be no optimizer that steps in the backward pass, and what to do."""
    return (
        f"solver={config.solver!r} and learning={config.learning!r} accumulate gradients in parts: use "
        "solver='error' with learning='plain', or an optimizer that steps afterwards"
    )


def check_reached(model: nn.Module, relaxation: Relaxation) -> None:
    """Raise ValueError if the sweeps so far have brought no signal to any node: none of them ever will."""
    dropped = model.training and layer_drop(model)  # every block behind the nodes, it may be
    if relaxation.sweeps and relaxation.sites and relaxation.share.top and not relaxation.top and not dropped:
        raise ValueError(
            f"no signal came to any node of {type(model).__name__}: its logits do not follow from them, or "
            "they run where no gradient is recorded, as in the reversible layers of Reformer; choose nodes that "
            "hold all of that part, or lie outside it"
        )
