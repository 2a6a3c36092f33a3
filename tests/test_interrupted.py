"""Exceptions at any moment, threads, several trainers and long runs leave nothing behind."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.linear import LinearChain
from test_invariants import batch, gradients, make
from test_trainer import RELAXING, trainer, weights
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback

from hf_pc import NodeSpec, PCConfig, PCModel


class Interrupt(TorchFunctionMode):
    """Raises KeyboardInterrupt in place of the n-th operation of torch, the cleaning up itself apart."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.met = at, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.Tensor.requires_grad_, torch.set_rng_state):
            if self.met == self.at:
                self.met += 1
                raise KeyboardInterrupt
            self.met += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "settings",
    [
        {"learning": "centred"},
        {"solver": "state"},
        {"nodes": "linear", "dropout": "off"},
        {"learning": "wake_sleep"},
        {"solver": "langevin"},
    ],
    ids=str,
)
def test_interrupted_anywhere(settings: dict[str, Any]) -> None:
    """KeyboardInterrupt at any of 40 moments of a step: evaluation is what it was, and the next step, bit for bit."""
    model, inputs = make("gpt2", dropout=0.1), batch()
    pc = PCModel(model, PCConfig(sweeps=2, relative_std=0.5, **settings))

    def step(mode: Any = None) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        with mode or nullcontext():
            pc.accumulate_grad(**inputs)
        return gradients(model)

    def evaluated() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=inputs["input_ids"]).logits
        model.train()
        return logits

    before, expected = evaluated(), step()
    counted = Interrupt(None)
    step(counted)
    assert counted.met > 200
    for at in range(0, counted.met * 9 // 10, counted.met // 44):
        with pytest.raises(KeyboardInterrupt):
            step(Interrupt(at))
        assert pc.relaxation is None
        assert all(p.requires_grad for p in model.parameters())
        assert all(module.training and "forward" not in vars(module) for module in model.modules())
        assert torch.equal(evaluated(), before)
        pc.steering.pause()
    found = step()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_an_exception_in_training_leaves_the_model_detached(tmp_path: Path) -> None:
    """Whatever ends a run, the Trainer leaves no hook on the model, and may train it again."""
    run = trainer(tmp_path)

    class Stop(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None: ...
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    run.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(Stop)
    hook = run.model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        run.train()
    hook.remove()
    assert not any(module._forward_hooks for module in run.model.modules())
    assert all(p.requires_grad for p in run.model.parameters())
    run.train()
    assert run.state.global_step == 4


def test_two_trainers_in_one_process(tmp_path: Path) -> None:
    """A run within another one, between two of its steps: both end with the weights they have alone."""
    alone = [trainer(tmp_path / name, name=name) for name in ("gpt2", "llama")]
    for run in alone:
        run.train()
    inner = trainer(tmp_path / "inner", name="llama")

    class Between(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                inner.train()

    outer = trainer(tmp_path / "outer", name="gpt2", callbacks=[Between()])
    outer.train()
    assert torch.equal(weights(outer), weights(alone[0]))
    assert torch.equal(weights(inner), weights(alone[1]))


def test_another_thread() -> None:
    """A PCModel works in any thread, one at a time: a second one meanwhile is an error, and changes nothing."""
    pc, inputs = PCModel(make("gpt2"), RELAXING), batch()
    expected = pc.relax(**inputs).free_energy
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(pc.relax(**inputs).free_energy)
        except RuntimeError as error:
            found.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    in_a_thread()
    with pc.relaxed(inputs):
        in_a_thread()
        loss, _ = pc.learning_pass(inputs)
        loss.backward()
    assert found[0] == expected
    assert "one batch at a time" in found[1]
    assert pc.relax(**inputs).free_energy == expected


@pytest.mark.parametrize("energy", [None, "categorical"])
def test_nested_attachment(energy: str | None) -> None:
    """A model that holds nodes anywhere takes no others, on other modules of it or around it; its own stay right."""
    model, inputs = make("gpt2"), batch()
    pc = PCModel(model, PCConfig(nodes=["h.0"], attention_energy=energy, relative_std=0.3))
    expected = pc.relax(**inputs).free_energy
    for other in (model, torch.nn.ModuleList([model])):
        with pytest.raises(ValueError, match="has PC nodes already"):
            PCModel(other, PCConfig(nodes=["h.1"], attention_energy=energy if other is model else None))
    assert pc.relax(**inputs).free_energy == expected


def test_nothing_is_kept_from_step_to_step() -> None:
    """After 100 steps and after 500 there are as many objects and tensors, failed steps among them."""
    x, y = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pc = PCModel(LinearChain(), PCConfig(nodes=[NodeSpec(r"blocks\.\d")], output="gaussian", sweeps=2))
    counts = []
    for step in range(500):
        if step in (100, 499):
            pc.model.zero_grad()
            gc.collect()
            objects = gc.get_objects()
            counts.append((len(objects), sum(isinstance(kept, torch.Tensor) for kept in objects)))
            del objects
        if step % 10 == 0:
            with pytest.raises(RuntimeError):
                pc.accumulate_grad(inputs=x[:, :2], labels=y)
        pc.accumulate_grad(inputs=x, labels=y)
        pc.steer()
    assert counts[1][1] == counts[0][1]
    assert abs(counts[1][0] - counts[0][0]) < 100
