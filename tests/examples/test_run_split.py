"""The example of a split model, alone in its process: what it leaves, and that it goes on where it was. That several
processes learn the same is for test_split.py to show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]
import run_split_pc  # noqa: E402
import scaling  # noqa: E402

SMALL = ["--config_overrides", "n_layer=2,n_embd=16,n_head=2,n_positions=32", "--block_size", "32"]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(300)) + "\n")
    return ["--train_file", str(path), *SMALL, "--max_steps", "4", "--batch_size", "4", "--sweeps", "4"]


def test_a_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after a save and started again, a run ends where the uninterrupted one does."""
    whole = run_split_pc.main([*flags, "--save_steps", "4", "--output_dir", str(tmp_path / "whole")])
    save = run_split_pc.save
    left = tmp_path / "parts" / "last.partial"  # by a run of more processes that ended while it wrote
    left.mkdir(parents=True)
    (left / "process_1_of_2.pt").touch()

    def interrupted(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    parts = [*flags, "--save_steps", "2", "--output_dir", str(tmp_path / "parts")]
    monkeypatch.setattr(run_split_pc, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_split_pc.main(parts)
    monkeypatch.setattr(run_split_pc, "save", save)
    (left.parent / "last").rename(left.parent / "last.before")  # as if killed between the two renames of a save
    found = run_split_pc.main(parts)
    assert found == pytest.approx(whole, rel=1e-5)
    last = tmp_path / "parts" / "last"
    assert [path.name for path in last.glob("process_*")] == ["process_0_of_1.pt"]
    assert json.loads((last / "progress.json").read_text())["step"] == 4
    assert AutoModelForCausalLM.from_pretrained(last).config.n_layer == 2
    assert AutoTokenizer.from_pretrained(last)("line")["input_ids"]
    assert {path.name for path in left.parent.glob("last*")} == {"last"}


def test_a_run_of_another_model_is_refused(tmp_path: Path, flags: list[str]) -> None:
    """A folder goes on with what it began with: a model, or a text, that is given later would not be used."""
    out = ["--output_dir", str(tmp_path / "out"), "--save_steps", "4"]
    run_split_pc.main([*flags, *out])
    other = tmp_path / "other.txt"
    other.write_text((tmp_path / "text.txt").read_text())
    without = [flag for flag in flags if flag not in SMALL[:2]]
    with pytest.raises(ValueError, match="holds a run with --model_name_or_path None, not M: take another folder"):
        run_split_pc.main([*without, *out, "--model_name_or_path", "M"])
    with pytest.raises(ValueError, match=r"holds a run with --train_file .*text\.txt, not .*other\.txt"):
        run_split_pc.main([*flags, *out, "--train_file", str(other)])
    with pytest.raises(ValueError, match="--logging_steps 0"):
        run_split_pc.main([*flags, *out, "--logging_steps", "0"])


def test_a_checkpoint_of_other_processes_is_refused(tmp_path: Path, flags: list[str]) -> None:
    """The optimizer's state of two processes cannot be taken up by one: the error says how many there were."""
    run = [*flags, "--save_steps", "4", "--output_dir", str(tmp_path / "out")]
    run_split_pc.main(run)
    last = tmp_path / "out" / "last"
    (last / "process_0_of_1.pt").rename(last / "process_0_of_2.pt")
    with pytest.raises(ValueError, match="was saved by 2 processes, not by 1"):
        run_split_pc.main(run)


def test_scaling_on_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line has speed, traffic, idle share, memory and the cost model's prediction; a timeline is drawn."""
    size = ["--layers", "4", "--hidden", "32", "--sequence", "16", "--batch", "2", "--vocab", "64", "--runs", "2"]
    given = ["--processes", "2", "--predict", "4", *size, "--sweeps", "6", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["scaling.py", *given])
    scaling.main()
    measured, predicted = map(json.loads, capsys.readouterr().out.splitlines())
    assert measured["processes"] == 2
    assert sum(measured["split"]) == 4
    # a state of 2 sequences of 16 by 32 numbers goes up in every sweep, and a signal down in all but the first
    state = 2 * 16 * 32 * 4
    assert measured["bytes_per_sweep"] == [6 * state // 5, state]
    assert all(0 <= share < 1 for share in measured["idle_share"])
    assert len(measured["memory_ratio"]) == 2
    assert 0 < measured["relaxed_fraction"] < 1
    assert 0 < measured["residual"] < 1
    assert predicted["processes"] == 4
    assert predicted["predicted_speedup"] > 1
    assert (tmp_path / "timeline_2.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_of_less_than_a_batch(tmp_path: Path, flags: list[str]) -> None:
    """There would never be a batch: an error, of the text that --max_train_samples leaves."""
    with pytest.raises(ValueError, match="--batch_size 4 is over the 3 sequences of the training text"):
        run_split_pc.main(
            [*flags, "--batch_size", "4", "--max_train_samples", "3", "--output_dir", str(tmp_path / "run")]
        )
