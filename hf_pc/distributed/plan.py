"""How a model is cut over processes, or why it cannot be; said on every process."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_pc.architecture import base_model, layer_drop, plainly
from hf_pc.attachment import check_free
from hf_pc.config import PCConfig
from hf_pc.distributed.chain import Chain, trace
from hf_pc.distributed.partition import balanced, check_counts
from hf_pc.placement import blocks, resolve, time_first
from hf_pc.processes import at_once, process_count, same_everywhere
from hf_pc.solvers import SOLVERS
from hf_pc.solvers.state import StateSolver


def planned(
    model: nn.Module, config: PCConfig, split: Sequence[int] | None, example: Mapping[str, Any] | None
) -> tuple[Chain, list[int]]:
    """The chain that a model is, and how many of its blocks each process takes.

    Args:
        model, config, split, example: what `SplitPCModel` is given.

    Raises:
        ValueError: on every process, where it cannot be split (see `SplitPCModel`).
    """
    _check_group()
    at_once(_out_of_reach(model))
    same_everywhere({f"PCConfig.{name}": value for name, value in config.to_dict().items()} | {"split": split})
    same_everywhere(_signature(model))
    found = blocks(model)
    chain: Chain | None = None
    counts: list[int] = []
    failure = None
    try:
        _check_config(config)
        check_free(model)  # all that might refuse it later, when weights have been given up
        resolve(model, config)
        if drop := layer_drop(model):
            raise ValueError(f"{drop} cannot be split: processes would leave out different blocks; set it to 0")
        if first := next((name for name in found if time_first(model, name)), None):
            raise ValueError(
                f"{type(base_model(model)).__name__} cannot be split: the states of its block {first!r} are "
                "[sequence, batch, features]"
            )
        chain = trace(model, _example(model, example))
        counts = check_counts(split, len(found), process_count()) if split else balanced(model, chain)
    except ValueError as error:
        failure = str(error)
    at_once(failure)
    assert chain is not None
    return chain, counts


def fingerprint(tensor: Tensor) -> tuple[object, ...]:
    """Of a batch's tensor what two different ones are most unlikely to share."""
    flat = tensor.detach().flatten().double().nan_to_num(nan=math.pi)  # nothing equals nan
    places = torch.arange(1, len(flat) + 1, device=flat.device, dtype=torch.float64)
    return (tuple(tensor.shape), float(flat.sum()), float((flat * places.remainder(997)).sum()))


def _check_group() -> None:
    started = os.environ.get("WORLD_SIZE", "1")
    if process_count() == 1 and started != "1":
        raise ValueError(
            f"WORLD_SIZE={started}: a launcher started several processes, and they have no process group; call "
            "torch.distributed.init_process_group or accelerate.PartialState first"
        )


def _out_of_reach(model: nn.Module) -> str | None:
    """What is wrong where the process group carries nothing from the model's device; None where it does."""
    kind = next(model.parameters()).device.type
    if process_count() == 1 or f"{kind}:" in torch.distributed.get_backend_config():
        return None
    return (
        f"the model is on {kind!r}, where this process group carries nothing "
        f"({torch.distributed.get_backend_config()}): move it to the device of each process first"
    )


def _check_config(config: PCConfig) -> None:
    if not issubclass(SOLVERS[config.solver], StateSolver):
        raise ValueError(
            f"PCConfig.solver={config.solver!r} cannot be split: its sweeps go through all blocks in turn; use 'state'"
        )
    wanted = {"nodes": "block", "attention_energy": None, "weight_update": "final"}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"PCConfig.{name}={getattr(config, name)!r} cannot be split over processes: use {value!r}"
            )


def _signature(model: nn.Module) -> dict[str, object]:
    base = base_model(model)
    config = getattr(base, "config", None)
    settings = {} if config is None else config.to_dict()
    own: dict[str, object] = {"the model": type(base).__name__}
    own |= {f"config.{name}": value for name, value in settings.items() if "name_or_path" not in name}
    for name, parameter in model.named_parameters():
        kind = tuple(parameter.shape), str(parameter.dtype), parameter.requires_grad
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 1000)]  # of other weights these differ too
        own[f"parameter {name}"] = kind, fingerprint(some)
    return own


def _example(model: nn.Module, example: Mapping[str, Any] | None) -> dict[str, Any]:
    device = next(model.parameters()).device
    name = getattr(base_model(model), "main_input_name", "input_ids")
    if example is None and name != "input_ids":
        raise ValueError(f"example=None is for models of input_ids: give {name!r} of one example")
    if example is None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return plainly(model, {name: value for name, value in example.items() if name != "labels"})
