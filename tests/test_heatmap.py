"""Energies in TensorBoard: scalars in every log, and the heat map of all nodes as an image."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import trainer
from transformers import TrainerCallback

from hf_pc import PCConfig
from hf_pc.heatmap import EnergyHeatmap


def test_tensorboard_gets_scalars_and_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node has a scalar per log, and an image is there for the end of a training shorter than `every`."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(
        tmp_path / "run", PCConfig(relaxed_fraction=0.05), max_steps=4, logging_steps=2, report_to=["tensorboard"]
    )
    run.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    energies = [tag for tag in board.Tags()["scalars"] if tag.startswith("train/energy/")]
    assert len(energies) == 3 + 1  # three blocks and the output
    assert [event.step for event in board.Scalars(energies[0])] == [2, 4]
    assert [event.step for event in board.Images("energies")] == [4]
    pixels = imread(io.BytesIO(board.Images("energies")[0].encoded_image_string))
    assert pixels.std() > 0.05  # a picture, not an empty sheet


def test_images_come_every_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`every` is counted in optimiser steps since the last image."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(tmp_path / "run", PCConfig(), max_steps=6, logging_steps=1, report_to=["tensorboard"])
    run.remove_callback(EnergyHeatmap)
    run.add_callback(EnergyHeatmap(run, every=2))
    run.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.step for event in board.Images("energies")] == [2, 4, 6]
    with pytest.raises(ValueError, match="every=0 is not allowed"):
        EnergyHeatmap(run, every=0)


def test_another_tracker_gets_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any callback that takes logs sees the energies; without a TensorBoard writer nothing is drawn."""
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: object, state: object, control: object, logs: object = None, **kwargs: object) -> None:
            assert isinstance(logs, dict)
            seen.append(dict(logs))

    monkeypatch.setattr("hf_pc.heatmap.energy_image", lambda history: pytest.fail("nobody asked for an image"))
    run = trainer(tmp_path, PCConfig(), max_steps=2, logging_steps=1)
    run.add_callback(Tracker())
    run.train()
    assert sum("energy/output" in logs for logs in seen) == 2
