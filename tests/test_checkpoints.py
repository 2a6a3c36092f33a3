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
from transformers import Trainer

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


def test_no_limit_removes_nothing(tmp_path: Path) -> None:
    """A save_total_limit under 1 is none, as of a Trainer."""
    trainer(tmp_path, save_total_limit=-1, **SAVING).train()
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


def test_the_best_is_kept_however_its_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain Trainer's state says "./out/checkpoint-1" where the folder's own name is "out/checkpoint-1"."""
    monkeypatch.chdir(tmp_path)
    run = trainer(Path("out"), **SAVING)
    for step in (1, 2, 3):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    run.state.best_model_checkpoint = "./out/checkpoint-1"
    run._rotate(Path("out"), 2)
    assert len(names(tmp_path / "out")) == 2
    assert "checkpoint-1" in names(tmp_path / "out")


def test_the_best_of_an_earlier_save_is_recorded(tmp_path: Path) -> None:
    """A checkpoint that an evaluation behind it finds to be the best is the best from the next save on."""
    run = trainer(tmp_path, max_steps=2, **SAVING)
    run.train()
    run.state.best_global_step, run.state.global_step = 1, 3
    run._save_checkpoint(run.model, None)
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    run.state.best_global_step = run.state.global_step = 4
    run._save_checkpoint(run.model, None)
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_a_process_that_does_not_push_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes one alone has a repository; the others push nothing, and know of no push."""
    run = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(run, "is_world_process_zero", lambda: False)
    assert not hasattr(run, "push_in_progress")
    run._push_from_checkpoint(str(tmp_path / "checkpoint-1"))


def test_a_push_that_fails_leaves_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of the checkpoint is true: it was there before the push."""
    run = trainer(tmp_path, **SAVING)

    def fail(*args: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", fail)
    run.args.push_to_hub, run.push_in_progress = True, None
    monkeypatch.setattr(run, "init_hf_repo", lambda *args, **kwargs: None)
    with pytest.raises(ConnectionError) as failed:
        run.train()
    assert not getattr(failed.value, "__notes__", [])
    assert names(tmp_path) == ["checkpoint-1"]


def test_what_another_machine_has_moved_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that several machines share one of them may not see yet that a checkpoint has its name."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: "_unfinished" in str(path) or exists(path))
    trainer(tmp_path, **SAVING).train()
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert all(list((tmp_path / name).iterdir()) for name in names(tmp_path))


def test_a_finished_run_that_is_resumed_keeps_its_steering(tmp_path: Path) -> None:
    """Without a step there is no PCModel; what was restored is saved with the weights, and goes on in the next run."""
    whole: dict[str, Any] = {"num_train_epochs": 1, "max_steps": -1, "save_strategy": "epoch"}
    trainer(tmp_path, **whole).train()
    run = trainer(tmp_path, **whole)
    run.train(resume_from_checkpoint=True)
    assert run.pc is None
    run.save_model(str(tmp_path / "saved"))
    state = json.loads((tmp_path / "checkpoint-6" / "pc_state.json").read_text())
    assert json.loads((tmp_path / "saved" / "pc_state.json").read_text()) == state
    run.args.max_steps = 1
    seen = []
    run._probe = lambda pc, inputs: seen.append(pc.relative_std)
    run.train()
    assert seen == [state["relative_std"]]


def test_a_save_that_fails_at_its_end_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is written and it has not got its name: that is no checkpoint."""
    run = trainer(tmp_path, **SAVING)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if run.state.global_step == 2:
            raise DiskFullError
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DiskFullError) as told:
        run.train()
    assert "the checkpoint of step 2 was not written" in "".join(told.value.__notes__)
    assert names(tmp_path) == ["_unfinished", "checkpoint-1"]


@pytest.mark.parametrize(("always", "copied"), [(False, False), (True, True)])
def test_settings_go_with_the_weights_of_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: bool, copied: bool
) -> None:
    """While a push is under way the next one is left out, of weights and of steering, unless it is to be made."""

    class Busy:
        def is_done(self) -> bool:
            return False

    run = trainer(tmp_path, max_steps=1, hub_always_push=always, **SAVING)
    run.train()
    run.push_in_progress = Busy()
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *args: None)
    run._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "pc_state.json").is_file() is copied
