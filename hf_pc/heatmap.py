"""The energy of every node over training as an image in TensorBoard."""

from __future__ import annotations

from typing import Any

from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerCallback

from hf_pc.checks import check_whole
from hf_pc.diagnostics.plots import energy_image


class EnergyHeatmap(TrainerCallback):
    """Draws all nodes' energies over time where the Trainer has a TensorBoard writer; elsewhere it does nothing.

    PCTrainer has one. The energies themselves are scalars of every log, whatever `report_to` names.

    Args:
        trainer: whose log is drawn.
        every: optimiser steps between two images; the last log of a training always gives one.

    Raises:
        ValueError: `every` is under 1.
    """

    def __init__(self, trainer: Any, every: int = 100) -> None:
        check_whole("EnergyHeatmap", "every", every, least=1)
        self.trainer = trainer
        self.every = every
        self._drawn = 0  # the step of the last image

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._drawn = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        due = state.global_step - self._drawn >= self.every or state.global_step >= state.max_steps
        if not due or not logs or "free_energy" not in logs:
            return
        for callback in self.trainer.callback_handler.callbacks:
            writer = callback.tb_writer if isinstance(callback, TensorBoardCallback) else None
            if writer is not None:
                image = energy_image(state.log_history)
                writer.add_image("energies", image, state.global_step, dataformats="HWC")
                self._drawn = state.global_step
