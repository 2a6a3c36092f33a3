"""Real processes on the CPU: the same weights as one process, the same words about what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import HERE, Ended, together
from scenarios import SCENARIOS, build, learn, logs
from test_invariants import batch, make

from hf_pc import PCConfig, PCModel
from hf_pc.processes import changes_buffers
from hf_pc.rng import RandomState

JOB = str(HERE / "train_processes.py")
Found = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process finds."""
    found = {name: learn(build(folder / "alone" / name, name, 1)) for name in SCENARIOS}
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    return found | {"saved": learn(build(folder / "one", "balanced", 1, **saving))}


@pytest.fixture(scope="module")
def ended(folder: Path, alone: dict[str, Any]) -> list[Ended]:
    """How two processes end, the first of which is killed after all else, while it writes a checkpoint."""
    return together(JOB, str(folder), logs=folder / "logs")


@pytest.fixture(scope="module")
def found(folder: Path, ended: list[Ended]) -> Found:
    """What they find, by name and rank."""
    assert (folder / "collectives-1.pt").exists(), ended[1].output[-3000:]
    return lambda name, rank: torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Between the weights that two runs end with, relative to their norm."""
    return float((found["weights"] - expected["weights"]).norm() / expected["weights"].norm())


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(name: str, alone: dict[str, Any], found: Found) -> None:
    """One process of 8 sequences and two of 4, with unequal label counts: the same weights, metrics and evaluation;
    the two agree to the bit."""
    one, first, second = alone[name], found(name, 0), found(name, 1)
    assert torch.equal(first["weights"], second["weights"])
    assert first["logs"] == second["logs"]
    assert distance(first, one) < 1e-5
    moved = (one["weights"] - one["start"]).norm()
    assert (first["weights"] - one["weights"]).norm() / moved < 1e-3
    assert first["eval"] == second["eval"] == pytest.approx(one["eval"], abs=1e-5)
    for logged, expected in zip(first["logs"], one["logs"], strict=True):
        assert logged == pytest.approx(expected, rel=1e-3, abs=2e-3)


def test_processes_relax_on_their_own(found: Found) -> None:
    """The scenarios are what they are called: early stops and refusals at different sweeps on the two processes."""
    first, second = found("stopping", 0), found("stopping", 1)
    assert first["sweeps"] != second["sweeps"]
    assert min(first["sweeps"]) < 12
    for name in ("refusing", "refusing_known"):
        first, second = found(name, 0), found(name, 1)
        assert first["stood"] != second["stood"]
    first, second = found("every_sweep_stopping", 0), found("every_sweep_stopping", 1)
    assert first["sweeps"] == second["sweeps"]
    assert min(first["sweeps"]) < 16
    assert first["outvoted"] + second["outvoted"] > 0


def test_another_number_of_processes_resumes(folder: Path, alone: dict[str, Any], found: Found) -> None:
    """A run of one process goes on as two, and one of two as one, on the same curve."""
    whole = alone["saved"]
    assert distance(found("saved", 0), whole) < 1e-5
    assert distance(found("resumed", 0), whole) < 1e-5
    assert torch.equal(found("resumed", 0)["weights"], found("resumed", 1)["weights"])
    resumed = learn(build(folder / "of_two", "balanced", 1, max_steps=6), str(folder / "two" / "checkpoint-3"))
    assert distance(resumed, whole) < 1e-5
    for logged, expected in zip(resumed["logs"], whole["logs"], strict=True):
        assert logged == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_every_process_says_what_is_wrong(found: Found) -> None:
    """Settings that differ, too few rows, batches that cannot be shared: ValueError on every process, none waits.
    Where one meets numbers that are not finite, the run ends on both, which name the node and the process."""
    expected = {
        "config": "PCConfig.sweeps differs between processes: 3 on process 0, 4 on process 1",
        "rows": "train_dataset has 1 rows for 2 processes",
        "length": "rows of train_dataset differs between processes: 16 on process 0, 17 on process 1",
        "split": "per_device_train_batch_size=1 is not allowed with accelerator_config.split_batches=True",
        "uneven": "accelerator_config.even_batches=False leaves 2 processes with unequal numbers of batches of 9 rows",
        "static": "ddp_static_graph=True is not supported",
        "poisoned": "'transformer.h.1' on process 1 is not finite",
    }
    for rank in (0, 1):
        said = found("refused", rank)
        assert said.keys() == expected.keys()
        assert all(part in said[name] for name, part in expected.items())


def test_one_synchronisation_per_step(found: Found) -> None:
    """No collective while states relax; one all-reduce of the gradient for each optimiser step of two accumulated
    batches with two phases. (Once, after the first step, DistributedDataParallel settles the order of its buckets.)"""
    for rank in (0, 1):
        counted = found("collectives", rank)
        assert counted["relaxing"] == [[]] * 12
        first, second, third = (counted["learning"][i : i + 4] for i in (0, 4, 8))
        assert first == third == [[], [], [], ["allreduce"]]
        assert [[call for call in calls if call != "broadcast"] for calls in second] == third


def test_a_process_that_dies_ends_the_run(folder: Path, ended: list[Ended]) -> None:
    """A process killed while it writes a checkpoint: the other ends in bounded time and says so; what is half written
    is no checkpoint, and the run goes on from the last whole one to where it would have come."""
    dead, lost = ended
    assert dead.code == -9
    assert lost.code not in (0, None)
    assert "LostProcessError: process 1 of 2 lost another one" in lost.output
    assert lost.seconds - dead.seconds < 20
    run = folder / "dying"
    assert (run / "_unfinished" / "checkpoint-4" / "model.safetensors").is_file()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = build(run, "balanced", 1, max_steps=6, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert not (run / "_unfinished").exists()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    undisturbed = build(folder / "undisturbed", "balanced", 1, max_steps=6)
    undisturbed.train()
    for logged, expected in zip(logs(resumed), logs(undisturbed), strict=True):
        assert logged == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_checkpoint_loads_without_hf_pc(tmp_path: Path) -> None:
    """Where hf_pc cannot be imported, plain transformers loads the checkpoint and gives the same logits."""
    model = make("gpt2").eval()
    PCModel(model, PCConfig()).save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.pt")
    code = (
        "import sys; sys.modules['hf_pc'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"folder = {str(tmp_path)!r}\n"
        "expected = torch.load(folder + '/expected.pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(folder).eval()\n"
        "assert torch.equal(model(expected['ids']).logits, expected['logits'])"
    )
    (ended,) = together("-c", code, logs=tmp_path / "logs", count=1)
    assert ended.code == 0, ended.output[-3000:]


@pytest.mark.parametrize(("version", "expected"), [("2.12.1", True), ("2.13.0+cpu", False)])
def test_a_wrapper_that_copies_buffers(monkeypatch: pytest.MonkeyPatch, version: str, expected: bool) -> None:
    """As DistributedDataParallel does: before torch 2.13 no graph can be kept over its forward pass."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    assert changes_buffers(SimpleNamespace(will_sync_module_buffers=lambda: True)) is expected
    assert not changes_buffers(SimpleNamespace(will_sync_module_buffers=lambda: False))
    assert not changes_buffers(torch.nn.Linear(1, 1))


def test_where_a_batch_lies_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are offloaded are on the CPU, and dropout draws where the batch is: both generators are kept."""
    kept: list[set[torch.device]] = []

    class Noted(RandomState):
        def __init__(self, devices: Any, numpy: bool) -> None:
            kept.append(set(devices))
            super().__init__([], numpy)

    monkeypatch.setattr("hf_pc.model.RandomState", Noted)
    model = make("gpt2")
    forward = model.forward
    model.forward = lambda elsewhere=None, **inputs: forward(**inputs)
    elsewhere = torch.zeros(2, device="meta")  # a device that every machine has
    PCModel(model, PCConfig()).accumulate_grad(**batch(), elsewhere=elsewhere)
    assert kept == [{torch.device("cpu"), torch.device("meta")}]
