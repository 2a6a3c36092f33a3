"""A checkpoint is whole or not there, and everything that a Trainer does with checkpoints still works."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from test_trainer import trainer

SAVING = {"save_strategy": "steps", "save_steps": 1}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


class DiskFullError(OSError):
    """The disk is full."""


def test_what_is_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    """A save that fails leaves the one before; the run resumes from there and clears away what was left."""
    run = trainer(tmp_path, **SAVING)
    save = run._save_rng_state

    def fail(folder: str) -> None:
        if run.state.global_step == 2:
            raise DiskFullError
        save(folder)

    run._save_rng_state = fail
    with pytest.raises(DiskFullError):
        run.train()
    assert names(tmp_path) == ["_unfinished", "checkpoint-1"]
    again = trainer(tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    for step in (1, 2, 3, 4):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["global_step"] == step


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    """save_total_limit keeps so many, the best among them, under the name that the state knows it by."""
    evaluating: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    run = trainer(tmp_path, save_total_limit=2, learning_rate=0.3, max_steps=5, **evaluating, **SAVING)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = f"checkpoint-{1 + losses.index(min(losses))}"
    assert run.state.best_model_checkpoint == str(tmp_path / best)
    assert names(tmp_path) == sorted({best, "checkpoint-5"} | ({"checkpoint-4"} if best == "checkpoint-5" else set()))
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / best)


def test_a_step_saved_before_is_replaced(tmp_path: Path) -> None:
    """Training again into the same folder replaces its checkpoints, one whole one by another."""
    for rate in (1e-3, 0.1):
        trainer(tmp_path, max_steps=1, learning_rate=rate, **SAVING).train()
        state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
        assert state["log_history"][0]["learning_rate"] == rate
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("share", [0.001, 0.5, 1.5])
def test_a_full_disk(tmp_path: Path, share: float) -> None:
    """No file can grow beyond a part of the weights' size: JSON, weights or optimizer are cut off in the middle. The
    error says what is whole, and the run resumes from there."""
    run = trainer(tmp_path, **SAVING)
    write = run._save_checkpoint
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args: Any) -> None:
        if run.state.global_step == 2:
            size = (tmp_path / "checkpoint-1" / "model.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), unlimited[1]))
        write(*args)

    run._save_checkpoint = limited
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)) as told:
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "the checkpoint of step 2 was not written" in "".join(told.value.__notes__)
    assert [name for name in names(tmp_path) if name.startswith("checkpoint")] == ["checkpoint-1"]
    again = trainer(tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


def test_what_is_being_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while an old checkpoint is removed leaves none of half its files."""
    run = trainer(tmp_path, save_total_limit=1, **SAVING)
    remove = shutil.rmtree

    def die(path: Any, **kwargs: Any) -> None:
        if (Path(path) / "checkpoint-1").exists():
            (Path(path) / "checkpoint-1" / "model.safetensors").unlink()
            raise KeyboardInterrupt
        remove(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert names(tmp_path) == ["_unfinished", "checkpoint-2"]


def test_killed_at_any_moment() -> None:
    """Killed three times, a run resumes from whole checkpoints and ends with the weights of one left alone."""
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "killed.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "3", "--steps", "4"], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["kills"] == 3
    assert last["identical"] == last["runs"] >= 1
    assert last["not_whole"] == 0


@pytest.mark.parametrize("text", ["[" * 5000, "null", '{"relative_std": NaN}', '{"relative_std": 0.2, "rows": 3}'])
def test_a_broken_state_cannot_be_resumed_from(tmp_path: Path, text: str) -> None:
    """A pc_state.json that is none of ours is an error that names the file, before any step."""
    run = trainer(tmp_path, max_steps=1, **SAVING)
    run.train()
    (tmp_path / "checkpoint-1" / "pc_state.json").write_text(text)
    with pytest.raises(ValueError, match=r"pc_state\.json"):
        trainer(tmp_path, max_steps=2, **SAVING).train(resume_from_checkpoint=True)
