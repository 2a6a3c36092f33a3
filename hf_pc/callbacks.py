"""Trainer callbacks: steering once per optimiser step, the guard against non-finite energies, the progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from hf_pc.processes import gathered

logger = logging.getLogger(__name__)
#: what is named where every energy is finite
GRADIENT = "a gradient"


class SteeringCallback(TrainerCallback):
    """Moves the strength of the energies towards the target relaxed_fraction, after each optimiser step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.pc is not None:
            self.trainer.pc.steer(self.trainer.reduce_sums)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        quiet = args.logging_strategy == "no"
        if (
            state.global_step >= state.max_steps and not quiet
        ):  # the regime of the last steps is logged too, however short the run
            control.should_log = True
        return control


class NonFiniteGuard(TrainerCallback):
    """Skips the update of a step whose free energy or gradient is not finite; saves and stops if that persists."""

    def __init__(self, trainer: Any, patience: int) -> None:
        self.trainer = trainer
        self.patience = patience
        self.in_a_row = 0
        self._node: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_a_row, self._node = 0, None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._node = self._node or self.trainer.nonfinite_node

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        node = self._node or self.trainer.nonfinite_node
        self._node = None
        if node is None and self.trainer.accelerator.scaler is None:  # which takes care of overflows in fp16
            node = GRADIENT if overflow(p.grad for p in model.parameters()) else None
        anywhere = self.trainer.reduce_sums(torch.tensor([float(node is not None)], dtype=torch.float64))
        if not anywhere.item():
            self.in_a_row = 0
            return
        for parameter in model.parameters():
            parameter.grad = None
        self.in_a_row += 1
        where = _where(node)
        logger.warning("step %d: free energy or gradient of %s is not finite; no update", state.global_step + 1, where)
        if self.in_a_row >= self.patience:
            self.trainer.stopped_by = where

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.stopped_by is not None:
            control.should_save = control.should_training_stop = True
        return control


def overflow(gradients: Iterable[torch.Tensor | None]) -> bool:
    """Whether any is not finite; every device is waited for once."""
    finite: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        own = getattr(gradient, "to_local", lambda gradient=gradient: gradient)()  # a shard is asked alone
        if own is not None:
            finite.setdefault(own.device, []).append(own.isfinite().all())
    return not all(bool(torch.stack(flags).all()) for flags in finite.values())


def _where(node: str | None) -> str:
    """The node, and of several processes which: the same words on each. A gradient that all share says less."""
    nodes = gathered(node)
    if len(nodes) == 1:
        return repr(node)
    named = {rank: name for rank, name in enumerate(nodes) if name not in (None, GRADIENT)}
    return ", ".join(f"{name!r} on process {rank}" for rank, name in named.items()) or f"{GRADIENT!r} on all processes"


class PCProgressCallback(ProgressCallback):
    """transformers' progress bar, with loss and free energy behind it instead of a line per training log; other logs
    are printed as ever."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not state.is_world_process_zero or not logs:
            return
        if "loss" not in logs:
            super().on_log(args, state, control, logs, **kwargs)
        shown = {name: f"{logs[name]:.3f}" for name in ("loss", "free_energy", "eval_loss") if name in logs}
        if shown:
            self.training_bar.set_postfix(shown)
