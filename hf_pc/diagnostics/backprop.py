"""How near PC's gradient is to backprop's: cosine and ratio of norms, per parameter or group of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_pc.diagnostics.checks import check_whole_model
from hf_pc.dtypes import exact
from hf_pc.model import PCModel
from hf_pc.rng import undrawn


def compare_with_backprop(
    pc: PCModel, inputs: Mapping[str, Any], group: Callable[[str], str] = lambda name: name
) -> dict[str, dict[str, float]]:
    """Cosine and norm ratio (PC over backprop) of the two gradients of a batch, and backprop's norm, per group.

    A cosine over the whole model hides the input side, whose gradients are small; group by depth.
    Gradients that the model holds are kept. The model should be in evaluation mode or without dropout.

    Args:
        pc: an attached PCModel.
        inputs: a batch with labels.
        group: a parameter's name to its group's; as given, each parameter is its own.

    Raises:
        ValueError: the model is split over processes.
    """
    check_whole_model(pc)
    named = [(name, p) for name, p in pc.model.named_parameters() if p.requires_grad]
    held = [p.grad for _, p in named]

    def gradients(fill: Callable[[], Any]) -> list[Tensor]:
        for _, p in named:
            p.grad = None
        fill()
        return [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]

    seen, noted = pc.steering.pause(), [(node.energy, vars(node.energy).copy()) for node in pc.nodes]
    try:
        with undrawn(p.device for p in pc.model.parameters()):
            learned = gradients(lambda: pc.accumulate_grad(**inputs))
            true = gradients(lambda: pc.backprop_loss(inputs).backward())  # type: ignore[no-untyped-call]
    finally:
        pc.steering.resume(seen)
        for energy, before in noted:
            vars(energy).update(before)
        for (_, p), grad in zip(named, held, strict=True):
            p.grad = grad
    sums: dict[str, Tensor] = {}
    for (name, _), a, b in zip(named, learned, true, strict=True):
        a, b = exact(a.flatten()), exact(b.flatten())
        row = torch.stack([a @ b, a @ a, b @ b])
        sums[group(name)] = sums.get(group(name), torch.zeros_like(row)) + row
    found = {}
    for name, (dot, aa, bb) in sums.items():
        tiny = torch.finfo(dot.dtype).tiny
        norms = aa.sqrt() * bb.sqrt()  # the product of the squares may leave float32
        cosine, ratio = dot / norms.clamp_min(tiny), (aa / bb.clamp_min(tiny)).sqrt()
        found[name] = {"cosine": float(cosine), "norm_ratio": float(ratio), "backprop_norm": float(bb.sqrt())}
    return found
