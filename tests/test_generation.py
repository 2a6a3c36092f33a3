"""A model generates before, during and after training by predictive coding, as the plain model does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from test_invariants import make
from test_trainer import trainer
from transformers import TrainerCallback

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def generate(model: Any) -> torch.Tensor:
    made: torch.Tensor = model.generate(IDS, max_new_tokens=6, do_sample=False)
    return made


def test_generation(tmp_path: Path) -> None:
    """Attached nodes leave generation, its cache included, to the weights as they are at that step."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Generates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            plain = make("gpt2")
            plain.load_state_dict(copy.deepcopy(model.state_dict()))
            pairs.append((generate(model.eval()), generate(plain.eval())))
            model.train()

    model = make("gpt2").eval()
    before = generate(model)
    run = trainer(tmp_path, model=model, callbacks=[Generates()], learning_rate=0.05)
    run.train()
    plain = make("gpt2")
    plain.load_state_dict(model.state_dict())
    pairs.append((generate(model.eval()), generate(plain.eval())))
    assert len(pairs) == 5
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert any(not torch.equal(mine, before) for mine, _ in pairs)  # there was something to see
