"""What every probe asks of a model first."""

from __future__ import annotations

from hf_pc.model import PCModel


def check_whole_model(pc: PCModel) -> None:
    """Raise ValueError if each process has a part of the model alone: what is measured is of all of it."""
    if pc.share.count > 1:
        raise ValueError(
            f"{type(pc).__name__} is split over {pc.share.count} processes: probe a PCModel that has the whole model"
        )
