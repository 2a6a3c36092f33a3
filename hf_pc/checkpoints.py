"""Checkpoints that are whole or not there: written beside where they belong, then renamed.

A `checkpoint-N` is what a run is resumed from and what is pushed, so a process that dies while it writes must not
leave half of one under that name. What it leaves is in a folder that a Trainer takes for no checkpoint and does not
push, and the next save clears it away.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, sort_checkpoints

from hf_pc.config import PC_CONFIG_NAME, PCConfig
from hf_pc.json_files import read_json_file
from hf_pc.model import PCModel
from hf_pc.saving import STATE_NAME, write_state
from hf_pc.steering import check_state

logger = logging.getLogger(__name__)
_TrainerPart: Any = Trainer if TYPE_CHECKING else object

#: the underscore keeps it out of what a Trainer pushes
UNFINISHED = "_unfinished"


class CheckpointMixin(_TrainerPart):
    """Saves and resumes what a PC run has beside a Trainer's checkpoint, and makes checkpoints all or nothing."""

    pc_config: PCConfig
    pc: PCModel | None
    _restored: dict[str, Any] | None
    _writing: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return folder if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        if self.is_local_process_zero():  # each machine may have a disk of its own
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)  # of a run that ended while it wrote
        self.accelerator.wait_for_everyone()
        self._writing = run / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            self._finish_checkpoint()
        except Exception as error:
            if self._writing is not None:  # what fails behind it is a push
                error.add_note(
                    f"the checkpoint of step {self.state.global_step} was not written; those in {run} are whole"
                )
            raise
        finally:
            self._writing = None
        limit = self.args.save_total_limit or 0
        if self.args.should_save and limit > 0:
            self._rotate(run, limit)

    def _rotate(self, run: Path, limit: int) -> None:
        """Keep so many checkpoints, as the Trainer does; what goes is no checkpoint from when it begins to go."""
        found = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True)]
        kept = {found[-1]} | {path for path in found if path == Path(self.state.best_model_checkpoint or "")}
        leaving = [path for path in found if path not in kept][: max(0, len(found) - max(limit, len(kept)))]
        for path in leaving:
            (run / UNFINISHED).mkdir(exist_ok=True)
            path.rename(run / UNFINISHED / path.name)
        if leaving:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        whole = self._finish_checkpoint() or Path(checkpoint_folder)
        pushes = False
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:  # others know of no push
            done = self.push_in_progress is None or self.push_in_progress.is_done()
            pushes = done or self.args.hub_always_push
        for name in (PC_CONFIG_NAME, STATE_NAME) if pushes else ():
            if (whole / name).is_file():  # the Trainer copies the files of transformers and PEFT alone
                shutil.copy(whole / name, self.args.output_dir)
        super()._push_from_checkpoint(str(whole))

    def _finish_checkpoint(self) -> Path | None:
        """Give the checkpoint its name, once every process has written its part; None where it has it already."""
        if self._writing is None:
            return None
        name = f"checkpoint-{self.state.global_step}"
        written, whole = self._writing / name, self._writing.parent / name
        best = whole.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == whole or best.is_dir():  # the Trainer looked for it among what is being written
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self._save_pc(written)  # of a sharded checkpoint the Trainer calls no `_save`
            self.state.save_to_json(str(written / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            _move(written, whole)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and written.exists():  # a machine with a disk of its own
            with suppress(FileNotFoundError):  # or one that has not heard yet of what another did on a disk they share
                _move(written, whole)
        self.accelerator.wait_for_everyone()
        self._writing = None
        return whole

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            self._save_pc(Path(output_dir or self.args.output_dir))

    def _save_pc(self, folder: Path) -> None:
        self.pc_config.save_pretrained(folder)
        state = self._restored if self.pc is None else self.pc.state_dict()
        if state is not None:
            write_state(folder, state)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        try:
            state = None if best is None else _state_in(best)
            if state is not None and self.pc is not None:
                self.pc.load_state_dict(state)
            elif state is not None:
                self._restored = state
        except ValueError as error:  # no reason to lose what was trained
            logger.warning("the steering of the best model cannot be read, so the last one is kept: %s", error)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = _state_in(resume_from_checkpoint)
        if state is not None:
            self._restored = state


def _state_in(folder: str) -> dict[str, Any] | None:
    """What steering and the energies had learned; None where a plain Trainer saved. Raises ValueError if malformed."""
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = read_json_file(path)
        check_state(state)
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed from: {error}") from error
    return state


def _move(written: Path, whole: Path) -> None:
    moving = written.rename(written.parent / "moving")
    if whole.exists():  # this step was saved before
        whole.rename(written.parent / "replaced")
    moving.rename(whole)
    shutil.rmtree(written.parent, ignore_errors=True)
