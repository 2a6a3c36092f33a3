"""What test_split.py starts in several processes: `split_processes.py SCENARIO FOLDER`. Every assertion is a law of
`SplitPCModel`; process 0 holds a PCModel of the whole model beside it to compare with."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from test_invariants import batch, make
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from hf_pc import PCConfig, PCModel
from hf_pc.distributed import SplitPCModel
from hf_pc.processes import at_once, gathered, same_everywhere

STATE = {"solver": "state", "relative_std": 0.5, "sweeps": 12}
#: architectures whose blocks are no chain, and what the error says of them
NO_CHAIN = {
    "t5": "encoder's last state", "bart": "encoder's last state", "whisper": "encoder's last state",
    "deberta": "shares something with weights", "deberta-v2": "shares something with weights",
    "albert": "several times", "swin": "changes the shape",
}  # fmt: skip


def distance(split: SplitPCModel, whole: PCModel, of: Callable[[torch.Tensor], Any]) -> float:
    """The largest relative difference between a parameter's values here and in the whole model; rounding of gradients
    that are zero but for it, such as those of OPT's key biases, aside."""
    worst = 0.0
    largest = max(float(of(p).norm()) for p in whole.model.parameters() if of(p) is not None)
    for name in split.stage.names:
        if not split.stage.uses(name) or name not in dict(whole.model.named_parameters()):
            continue
        mine, its = of(split.stage.tensor(name)), of(whole.model.get_parameter(name))
        if its is None:
            assert mine is None, name
        else:
            worst = max(worst, float((mine - its).norm() / its.norm().clamp_min(1e-5 * largest)))
    return worst


def step(pc: PCModel, optimizer: torch.optim.Optimizer, inputs: dict[str, Any], clip: Callable[[float], Any]) -> Any:
    optimizer.zero_grad()
    half = len(inputs["labels"]) // 2
    tokens = int(pc.output.count(pc.output.split(inputs)[1]))
    for part in (slice(0, half), slice(half, None)):  # two batches make one step
        found = pc.accumulate_grad(num_items_in_batch=tokens, **{k: v[part] for k, v in inputs.items()})
    clip(0.5)
    optimizer.step()
    pc.steer()
    return found


def compare(
    build: Callable[[], Any], inputs: dict[str, Any], settings: dict[str, Any], within: float = 1e-9, **options: Any
) -> None:
    whole = PCModel(build(), PCConfig(**settings))
    split = SplitPCModel(build(), PCConfig(**settings), **options)
    trained = [p for p in whole.model.parameters() if p.requires_grad]
    ours = torch.optim.SGD(split.parameters(), lr=0.1)
    theirs = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        found = step(split, ours, inputs, split.clip_grad_norm_)
        expected = step(whole, theirs, inputs, lambda most: torch.nn.utils.clip_grad_norm_(trained, most))
    assert distance(split, whole, lambda p: p.grad) < within
    assert distance(split, whole, lambda p: p.detach()) < within
    for name in ("free_energy", "feedforward_energy", "residual", "relaxed_fraction", "sweeps", "refused"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=within, abs=1e-12), name
    assert found.energies == pytest.approx(expected.energies, rel=within)
    assert list(found.energies) == list(expected.energies)
    with torch.no_grad():
        whole.model.eval()
        loss = float(whole.backprop_loss(inputs))
    assert split.evaluate([inputs]) == pytest.approx(loss, rel=within)
    for name, holders in split.stage.holders.items():
        assert (split.stage.tensor(name).device.type == "meta") == (split.neighbours.index not in holders), name
    held = sum(p.numel() for p in split.parameters())
    assert (held < sum(p.numel() for p in whole.model.parameters())) == (split.neighbours.count > 1)
    split.detach()
    whole.detach()


def rules(folder: Path) -> None:
    """The gradient, the weights after clipped steps, and all that is reported are the single process's."""
    several: list[dict[str, Any]] = [
        {"step_size": 0.3}, {}, {"sweeps": 1}, {"solver": "lagrangian"}, {"tolerance": 0.2, "sweeps": 30},
        {"step_size": 0.1, "state_optimizer": "SGD(momentum=0.5)"}, {"relative_std": 20.0},
        {"relaxed_fraction": 0.01, "relative_std": None}, {"energy": "laplace"}, {"energy": "learned_variance"},
    ]  # fmt: skip
    for settings in several:
        compare(lambda: make("gpt2").double(), batch(), {**STATE, **settings})
    compare(lambda: make("llama").double(), batch(), STATE, split=[1, 2])

    def adapted() -> Any:
        torch.manual_seed(0)
        adapter = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        return get_peft_model(make("gpt2").double(), adapter)

    compare(adapted, batch(), STATE)


def all_architectures(folder: Path) -> None:
    """Whatever is a chain of blocks can be split; what is not is refused, on every process, with the reason."""
    done: list[str] = []
    for name in architectures.NAMES:
        inputs = architectures.build(name)[1]
        example = {k: v[:1] for k, v in inputs.items()}
        if name in NO_CHAIN:
            with pytest.raises(ValueError, match=NO_CHAIN[name]):
                SplitPCModel(architectures.build(name)[0], PCConfig(**STATE), example=example)
        else:
            built: Callable[[], Any] = lambda name=name: architectures.build(name)[0]  # noqa: E731
            # some compute a part in float32 whatever their dtype
            compare(built, inputs, {**STATE, "sweeps": 4}, within=1e-5, example=example)
            done.append(name)
    assert len(done) > 20


def middle(folder: Path) -> None:
    """A process between two others, with a single block, is one as well; each needs one."""
    compare(lambda: make("gpt2").double(), batch(), {**STATE, "step_size": 0.3})
    compare(lambda: make("gpt2").double(), batch(), STATE)
    with pytest.raises(ValueError, match="3 processes are too many for 2 blocks"):
        SplitPCModel(architectures.build("gpt2")[0], PCConfig(**STATE))


def dropout(folder: Path) -> None:
    """Every sweep of a step sees the same mask, in whichever order blocks are computed: F never rises."""
    before = None
    for sweeps in range(2, 7):
        torch.manual_seed(3)
        split = SplitPCModel(make("gpt2", dropout=0.2).double(), PCConfig(**{**STATE, "sweeps": sweeps}))
        torch.manual_seed(5)
        now = split.accumulate_grad(**batch()).sequence_free_energy
        assert before is None or bool((now <= before * (1 + 1e-12)).all())
        before = now
    repeated = [split.accumulate_grad(**batch()).free_energy for _ in range(2)]
    assert repeated[0] != repeated[1]  # another step draws another mask


def masks(folder: Path) -> None:
    """Sweeps of a step share a mask; no two blocks do, nor two steps; and random numbers that were alike on all
    processes before a step are so after it."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes, num_labels=16)).train()
    split = SplitPCModel(model, PCConfig(**{**STATE, "sweeps": 4}), split=[2, 2])
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    done: list[Any] = []
    watched = {str(i): block.output.dropout for i, block in zip(split.stage.own, split.stage.blocks, strict=True)}
    watched |= {"head": model.dropout} if split.stage.last else {}
    for name, module in watched.items():
        module.register_forward_hook(
            lambda m, args, out, _n=name: seen.setdefault((len(done), _n), []).append(out == 0)
        )
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.arange(4)}
    for _ in range(3):
        done.append(split.accumulate_grad(**inputs))
    assert min(len(drawn) for drawn in seen.values()) >= 2  # the first block of all runs at rest and to learn
    assert all(torch.equal(mask, drawn[0]) for drawn in seen.values() for mask in drawn)
    everyone = gathered({key: drawn[0] for key, drawn in seen.items()})
    found = [mask for own in everyone for mask in own.values()]
    assert len(found) == 3 * 5
    assert not any(torch.equal(a, b) for a, b in combinations(found, 2))
    same_everywhere({"what comes next": float(torch.rand(()))})


def wavefront(folder: Path) -> None:
    """No block runs in a relaxing sweep before the signal has come to it, on whichever process it is."""
    split = SplitPCModel(make("gpt2").double(), PCConfig(**{**STATE, "sweeps": 6}))
    calls: dict[int, int] = {}
    for index, block in zip(split.stage.own, split.stage.blocks, strict=True):
        block.mlp.register_forward_hook(lambda *given, _i=index: calls.update({_i: calls.get(_i, 0) + 1}))
    split.accumulate_grad(**batch())
    assert calls == {index: [2, 5, 6][index] for index in split.stage.own}


def saving(folder: Path) -> None:
    """What is saved is the whole model, for plain transformers, PEFT, and any number of processes."""
    config = PCConfig(**STATE)
    split = SplitPCModel(make("gpt2"), config)
    optimizer = torch.optim.AdamW(split.parameters(), lr=1e-2)
    for _ in range(3):
        split.accumulate_grad(**batch())
        optimizer.step()
        optimizer.zero_grad()
        split.steer()
    loss = split.evaluate([batch()])
    split.save_pretrained(folder / "whole")
    plain = AutoModelForCausalLM.from_pretrained(folder / "whole")
    again = PCModel(plain, config)
    assert float(again.backprop_loss(batch())) == pytest.approx(loss, rel=1e-6)
    again.detach()
    assert distance(split, PCModel(plain, config), lambda p: p.detach()) == 0
    loaded = SplitPCModel.from_pretrained(folder / "whole")
    assert loaded.evaluate([batch()]) == pytest.approx(loss, rel=1e-6)
    assert loaded.steering.activity == split.steering.activity
    adapter = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    torch.manual_seed(0)
    tuned = SplitPCModel(get_peft_model(make("gpt2"), adapter), config)
    loss = tuned.evaluate([batch()])
    tuned.save_pretrained(folder / "adapter")
    back = PCModel(PeftModel.from_pretrained(make("gpt2"), folder / "adapter"), config)
    back.model.eval()
    assert float(back.backprop_loss(batch())) == pytest.approx(loss, rel=1e-6)
    (folder / "a file").touch()
    with pytest.raises((FileExistsError, RuntimeError), match="a file is a file: a folder is needed"):
        split.save_pretrained(folder / "a file")
    with pytest.raises((TypeError, RuntimeError), match="object is not callable"):  # whatever goes wrong there
        split._from_first(None)  # type: ignore[arg-type]
    variances = PCConfig(**STATE, energy="learned_variance")
    learned, whole = SplitPCModel(make("gpt2"), variances), PCModel(make("gpt2"), variances)
    for pc in (learned, whole):
        pc.accumulate_grad(**batch())
        pc.steer()
    expected = whole.state_dict()["energies"]
    found = learned.state_dict()["energies"]
    assert found.keys() == expected.keys()
    assert all(found[n]["log_std"] == pytest.approx(expected[n]["log_std"], abs=1e-5) for n in expected)


def refusals(folder: Path) -> None:
    """What cannot be done is said on every process, and nobody waits for ever."""
    rank = dist.get_rank()
    with pytest.raises(ValueError, match=r"PCConfig.sweeps differs between processes: 4 on process 0, 5 on process 1"):
        SplitPCModel(make("gpt2"), PCConfig(solver="state", sweeps=4 + rank))
    with pytest.raises(ValueError, match="the model differs between processes"):
        SplitPCModel(make(["gpt2", "llama"][rank]), PCConfig(**STATE))
    for config, message in (
        (PCConfig(), "solver='error' cannot be split"),
        (PCConfig(**STATE, nodes="linear"), "nodes='linear' cannot be split"),
        (PCConfig(**STATE, attention_energy="categorical"), "attention_energy='categorical' cannot be split"),
        (PCConfig(**STATE, step_size=0.3, weight_update="every_sweep"), "weight_update='every_sweep' cannot be"),
    ):
        with pytest.raises(ValueError, match=message):
            SplitPCModel(make("gpt2"), config)
    other = make("gpt2")
    other.lm_head.weight.data[3] += rank
    with pytest.raises(ValueError, match=r"parameter transformer.wte.weight differs between processes"):
        SplitPCModel(other, PCConfig(**STATE))
    other = make("llama")
    other.config.rope_theta = 100.0 + rank
    with pytest.raises(ValueError, match=r"config.rope_theta differs between processes: 100.0 on process 0, 101.0 on"):
        SplitPCModel(other, PCConfig(**STATE))
    other.config.rope_theta, other.config.layerdrop = 100.0, 0.1
    with pytest.raises(ValueError, match=r"layerdrop=0.1 cannot be split"):
        SplitPCModel(other, PCConfig(**STATE))
    with pytest.raises(ValueError, match=r"split differs between processes: \[1, 2\] on process 0, \[2, 1\] on"):
        SplitPCModel(make("gpt2"), PCConfig(**STATE), split=[1 + rank, 2 - rank])
    with pytest.raises(ValueError, match=r"split=\[3, 1\] is not allowed: 2 numbers .* add up to the 3 blocks"):
        SplitPCModel(make("gpt2"), PCConfig(**STATE), split=[3, 1])
    split = SplitPCModel(make("gpt2"), PCConfig(**STATE))
    with pytest.raises(ValueError, match="'input_ids' of the batch differs between processes"):
        split.accumulate_grad(**{**batch(), "input_ids": (batch()["input_ids"] + rank) % 50})
    with pytest.raises(ValueError, match=r"num_items_in_batch differs between processes: 10.0 on process 0, 11.0 on"):
        split.accumulate_grad(**batch(), num_items_in_batch=10 + rank)
    with pytest.raises(ValueError, match="'input_ids' of the batch differs between processes: None on process 0"):
        split.evaluate([batch()] * (1 + rank))
    with pytest.raises(ValueError, match="'labels' of the batch differs between processes"):
        split.evaluate([batch() if rank else {"input_ids": batch()["input_ids"]}])
    for name, at, error, message in (
        ("input_ids", 0, IndexError, "index out of range"), ("labels", 1, ValueError, "label 50 is out of range"),
    ):  # fmt: skip
        outside = {**batch(), name: torch.full((4, 16), 50)}
        for run in (split.accumulate_grad, lambda **inputs: split.evaluate([inputs])):
            with pytest.raises(error if rank == at else RuntimeError, match=message) as raised:
                run(**outside)
            assert rank == at or str(raised.value).startswith(f"process {at} failed: {error.__name__}: ")
    split.accumulate_grad(**batch())
    before = {name: p.grad.clone() for name, p in split.model.named_parameters() if p.grad is not None}
    with pytest.raises(ValueError, match="every label of the batch is ignored"):
        split.accumulate_grad(**{**batch(), "labels": torch.full((4, 16), -100)})
    assert all(torch.equal(split.model.get_parameter(name).grad, kept) for name, kept in before.items())
    if rank == 0:  # on one process alone
        with pytest.raises(ValueError, match="is not allowed"):
            PCConfig(sweeps=0)
    with pytest.raises(ValueError, match="only on process 1"):
        _fail_on(split, 1)
    assert split.accumulate_grad(**batch()).sweeps == 12  # and after all that it works


def _fail_on(split: SplitPCModel, rank: int) -> None:
    at_once("only on process 1" if split.neighbours.index == rank else None)


def death(folder: Path) -> None:
    """A process that dies in the middle of a step ends the others."""
    split = SplitPCModel(make("gpt2"), PCConfig(**STATE))
    split.accumulate_grad(**batch())
    (folder / f"alive-{split.neighbours.index}").touch()
    if split.neighbours.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    split.accumulate_grad(**batch())
    (folder / "survived").touch()


SCENARIOS = {
    f.__name__: f for f in (rules, all_architectures, middle, dropout, masks, wavefront, saving, refusals, death)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for scenario in sys.argv[1].split(","):
        SCENARIOS[scenario](Path(sys.argv[2]))
    dist.destroy_process_group()
