"""FSDP2 through Accelerate, two processes on the CPU: one process's weights, sharded while states relax, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import HERE, together
from scenarios import build, full, learn
from test_invariants import make
from transformers import AutoModelForCausalLM

NAMES = ("balanced", "accumulated", "stopping", "every_sweep_stopping", "lora", "refusing")
Found = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What two processes that share one model find, by name and rank."""
    make("llama").save_pretrained(folder / "model")
    for ended in together(str(HERE / "train_sharded.py"), str(folder), logs=folder / "logs"):
        assert ended.code == 0, ended.output[-3000:]
    return lambda name, rank: torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_model_trains_as_a_whole_one(tmp_path: Path, name: str, found: Found) -> None:
    """One process of 8 sequences and two of 4 with a sharded model: the same weights and evaluation, also where states
    stop, sweeps are refused, weights move at every sweep or an adapter learns; metrics are the same on both."""
    one, first, second = learn(build(tmp_path, name, 1)), found(name, 0), found(name, 1)
    assert torch.equal(first["weights"], second["weights"])
    assert first["logs"] == second["logs"]
    assert (first["weights"] - one["weights"]).norm() / one["weights"].norm() < 1e-5
    assert (first["weights"] - one["weights"]).norm() / (one["weights"] - one["start"]).norm() < 1e-3
    assert first["eval"] == second["eval"] == pytest.approx(one["eval"], abs=1e-5)
    assert first["sweeps"] == second["sweeps"] == one["sweeps"]  # every pass is made by both
    if name in ("stopping", "every_sweep_stopping", "refusing"):
        assert first["outvoted"] + second["outvoted"] > 0


def test_a_model_sharded_when_it_was_loaded(tmp_path: Path, folder: Path, found: Found) -> None:
    """`from_pretrained(distributed_config=DistributedConfig(fsdp_size=2))` trains and saves as one process does."""
    one, first, second = (
        learn(build(tmp_path, "balanced", 1, model=make("llama"))),
        found("loaded", 0),
        found("loaded", 1),
    )
    assert torch.equal(first["weights"], second["weights"])
    assert (first["weights"] - one["weights"]).norm() / one["weights"].norm() < 1e-5
    assert first["eval"] == pytest.approx(one["eval"], abs=1e-5)
    saved = full(AutoModelForCausalLM.from_pretrained(folder / "loaded" / "checkpoint-5"))
    assert torch.equal(saved, first["weights"])


def test_weights_stay_sharded_while_states_relax(found: Found) -> None:
    """Between blocks no block is gathered, forwards and backwards; inside one that one alone. Gradients are reduced
    once per optimiser step, after the last phase of its last batch, and never while states relax."""
    for rank in (0, 1):
        seen = found("watched", rank)
        assert seen["inside"]
        assert set(seen["inside"]) == {1}
        for direction in ("forwards", "backwards"):
            assert len(seen[direction]) >= 12
            assert set(seen[direction]) == {0}
        groups = 3 + 2  # blocks, what the embedding shares with the head, the rest
        assert seen["reduced"] == [("learn", True, step) for step in (0, 1) for _ in range(groups)]
        whole = found("balanced", rank)["weights"].numel() - 50 * 32  # the head is the embedding
        assert seen["held"][0] == pytest.approx(whole / 2, rel=0.01)


def test_blocks_computed_again(found: Found) -> None:
    """FSDP's own activation checkpointing changes no weight."""
    once, again = found("balanced", 0), found("recomputed", 0)
    assert (once["weights"] - again["weights"]).norm() / once["weights"].norm() < 1e-6


def test_a_shard_that_is_not_finite(found: Found) -> None:
    """A NaN in one process's shard ends the run on all of them with the same words, the node's name among them."""
    assert found("poisoned", 0) == found("poisoned", 1)
    assert "'transformer.h.1' on process 0, 'transformer.h.1' on process 1" in found("poisoned", 0)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_checkpoints(folder: Path, kind: str, found: Found) -> None:
    """Both kinds of checkpoint resume to the bit and hold what PC needs; a full one loads with plain transformers."""
    assert torch.equal(found(f"resumed_{kind}", 0)["weights"], found(f"saved_{kind}", 0)["weights"])
    assert found(f"resumed_{kind}", 0)["logs"] == found(f"saved_{kind}", 0)["logs"]
    checkpoint = folder / kind / "checkpoint-6"
    assert {"pc_config.json", "pc_state.json", "trainer_state.json"} <= {path.name for path in checkpoint.iterdir()}
    if kind == "full":
        assert torch.equal(full(AutoModelForCausalLM.from_pretrained(checkpoint)), found("saved_full", 0)["weights"])
