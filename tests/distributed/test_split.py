"""One model over several processes: what holds of it is in split_processes.py; here the processes are started."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pairs import ENV, together
from split_processes import STATE, compare
from test_invariants import batch, make

from hf_pc import PCConfig, PCModel
from hf_pc.distributed import SplitPCModel
from hf_pc.distributed.chain import BEFORE, trace
from hf_pc.distributed.cost import Costs, gpipe, step_seconds
from hf_pc.distributed.partition import check_counts, fewest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("processes", "scenarios"),
    [(2, "rules,dropout,masks,wavefront,saving,refusals"), (2, "all_architectures"), (3, "middle")],
)
def test_several_processes(processes: int, scenarios: str, tmp_path: Path) -> None:
    """What each scenario of split_processes.py states holds on every process."""
    command = str(HERE / "split_processes.py"), scenarios, str(tmp_path)
    for ended in together(*command, logs=tmp_path / "logs", count=processes, timeout=250):
        assert ended.code == 0, ended.output[-3000:]


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    """Killed in the middle of a run, one process ends the other within seconds, and the launcher says which it was."""
    began = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(HERE / "split_processes.py"), "death", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=250)
    assert {path.name for path in tmp_path.iterdir()} == {"alive-0", "alive-1"}
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "-9" in done.stderr
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_process_is_a_pcmodel(name: str) -> None:
    """Without a process group everything is here, and equal to PCModel."""
    compare(lambda: make(name).double(), batch(), STATE)


def test_a_chain_knows_what_runs_where() -> None:
    """Tied embeddings belong to both ends, positions to the first, the last norm to the end, each block to itself."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    model = make("gpt2")
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # noqa: E731
    before = hooks()
    chain = trace(model, {"input_ids": ids, "use_cache": False})
    assert chain.places["transformer.wte.weight"] == chain.places["lm_head.weight"] == {BEFORE, 3}
    assert chain.places["transformer.wpe.weight"] == {BEFORE}
    assert chain.places["transformer.ln_f.bias"] == {3}
    assert all(
        chain.places[f"transformer.h.{i}.{n}"] == {i}
        for i in range(3)
        for n in dict(model.transformer.h[0].named_parameters())
    )
    assert hooks() == before


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [([0, 2, 2, 2, 2, 2, 2, 3], 2, [5, 3]), ([1, 1, 1, 1], 4, [1, 1, 1, 1]), ([5, 1, 1, 1, 1], 2, [1, 4]),
     ([0, 1, 9], 3, [1, 1, 1]), ([1, 1, 1, 1, 4], 2, [4, 1])],
)  # fmt: skip
def test_the_dearest_part_is_as_cheap_as_can_be(costs: list[float], parts: int, expected: list[int]) -> None:
    """Consecutive parts, none empty, with the least maximum of the sums."""
    found = fewest([float(c) for c in costs], parts)
    sums = lambda counts: max(sum(costs[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(parts))  # noqa: E731
    assert sum(found) == len(costs)
    assert min(found) >= 1
    assert sums(found) == sums(expected)


def test_a_launcher_without_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several processes would train a model of its own, and nobody would be told."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2: a launcher started several processes, and they have no"):
        SplitPCModel(make("gpt2"), PCConfig(solver="state"))


@pytest.mark.parametrize("split", [[3], [2, 2], [3, 0], [4, -1]])
def test_a_wrong_split_is_refused(split: list[int]) -> None:
    """A split is as many numbers of at least one as there are processes, and gives all blocks away."""
    with pytest.raises(ValueError, match=r"split=\[.* is not allowed: 2 numbers of at least 1 that add up to the 3"):
        check_counts(split, 3, 2)


def test_cost_of_a_step() -> None:
    """One process pays for every block that a signal has come to; R equal ones for all in the first pass, and for the
    slowest share after."""
    costs = Costs([1.0] * 4 + [0.5], [2.0] * 4 + [1.0], [3.0] * 4 + [1.5])
    assert step_seconds(costs, [4], 10) == 4.5 + (3 + 5 + 7 + 5 * 9) + 13.5
    assert step_seconds(costs, [2, 2], 10) == 4.5 + (3 + 5 + 6 * 5) + 7.5
    assert step_seconds(costs, [1, 1, 1, 1], 10, cores=2) == 4.5 + (3 + 3 + 3.5 + 5 * 4.5) + 6.75
    with pytest.raises(ValueError, match="do not add up to the 4 blocks"):
        step_seconds(costs, [2, 1], 10)
    with pytest.raises(ValueError, match="sweeps=1 is not allowed"):
        step_seconds(costs, [4], 1)


def test_gpipe_has_its_bubble() -> None:
    """With R equal stages and M micro-batches GPipe takes 1 + (R - 1) / M times its share of the work."""
    costs = Costs([1.0] * 4 + [0.0], [2.0] * 4 + [0.0], [3.0] * 4 + [0.0])
    for processes, micro in ((2, 4), (4, 8)):
        events = gpipe(costs, [4 // processes] * processes, micro)
        end = max(event[2] for line in events for event in line)
        assert end == pytest.approx(12 / processes * (1 + (processes - 1) / micro))
        for line in events:
            assert all(a[2] <= b[1] + 1e-12 for a, b in pairwise(line))


def test_what_is_refused_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any weight is given up: a model that has nodes already, and one that has no head."""

    def fail(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr("hf_pc.distributed.split.Stage", fail)
    model = make("gpt2")
    pc = PCModel(model, PCConfig())
    with pytest.raises(ValueError, match="has PC nodes already"):
        SplitPCModel(model, PCConfig(**STATE))
    pc.detach()
    with pytest.raises(ValueError, match="GPT2Model returns no logits"):
        SplitPCModel(model.transformer, PCConfig(**STATE))
