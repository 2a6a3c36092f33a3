"""Steps that are recorded as a CUDA graph: on a CPU, what is asked of it is noted and asked again (`recorded.py`)."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from recorded import Replay
from test_batch_state import resnet
from test_invariants import gradients, worst
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_pc import PCConfig, PCModel, PCTrainer, PCTrainingArguments
from hf_pc.recorder import MANY_CHANGES, MOST_FORMS, WARM, Recorder

SIZES = {"vocab_size": 13, "n_positions": 8, "n_embd": 16, "n_layer": 3, "n_head": 2}
BART: dict[str, Any] = {
    "vocab_size": 13, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt2(**more: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{**SIZES, **NO_DROPOUT, **more})).train()


def batches(count: int, rows: int = 3, length: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    drawn = torch.randint(0, 13, (count, rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known before it is computed."""
    for module in ("padding", "solvers.descent"):
        monkeypatch.setattr(f"hf_pc.{module}.known_to_hold", lambda flags: False)


def recording(model: torch.nn.Module, **settings: Any) -> PCModel:
    pc = PCModel(model, PCConfig(**settings, cuda_graph=True))
    pc._recorder = Recorder(Replay, kind="cpu")
    return pc


def trained(pc: PCModel, data: list[dict[str, torch.Tensor]], rate: float = 0.1) -> list[Any]:
    """Reports of SGD steps, with the gradients of each."""
    found = []
    for given in data:
        report = pc.accumulate_grad(**given)
        pc.steer()
        gradients = [None if p.grad is None else p.grad.clone() for p in pc.model.parameters()]
        found.append((report, gradients))
        with torch.no_grad():
            for p in pc.model.parameters():
                if p.grad is not None:
                    p -= rate * p.grad
                    p.grad = None
    return found


RULES = [
    {"sweeps": 1},
    {"sweeps": 4, "relaxed_fraction": 0.3},
    {"sweeps": 3, "precision": 30.0, "step_size": 0.5},
    {"sweeps": 5, "learning": "balanced", "relaxed_fraction": 0.2},
    {"sweeps": 5, "learning": "one_sided", "relaxed_fraction": 0.5, "bias_limit": 0.1, "anderson_depth": 3},
    {"sweeps": 4, "learning": "centred", "relative_std": 3.0},
    {"sweeps": 4, "energy": "laplace", "relaxed_fraction": 0.3},
]


@pytest.mark.parametrize("settings", RULES, ids=lambda s: "-".join(map(str, s.values())))
def test_recorded_steps_are_the_steps(settings: dict[str, Any]) -> None:
    """Gradients, reports and steering of recorded steps, of other batches and weights, are those of steps without."""
    data = batches(WARM + 4)
    plain = PCModel(gpt2(), PCConfig(**settings))
    expected = trained(plain, data)
    pc = recording(gpt2(), **settings)
    found = trained(pc, data)
    assert pc._recorder is not None
    assert [form.plain is not None for form in pc._recorder._forms.values()] == [True]
    for (report, mine), (wanted, others) in zip(found, expected, strict=True):
        for one, other in zip(mine, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        for name in ("free_energy", "feedforward_energy", "residual", "relaxed_fraction", "signal_bias"):
            assert getattr(report, name) == pytest.approx(getattr(wanted, name), rel=1e-3, abs=1e-6, nan_ok=True), name
        torch.testing.assert_close(report.sequence_free_energy, wanted.sequence_free_energy, rtol=1e-4, atol=1e-4)
    assert pc.relative_std == pytest.approx(plain.relative_std, rel=1e-3)
    assert pc.steering.activity == pytest.approx(plain.steering.activity, rel=1e-3)
    assert pc.steering.rows == plain.steering.rows


def test_a_last_pass_that_does_not_stand_is_run_again() -> None:
    """Where the free energy rises in the last pass, what is learned is the same as without a recording."""
    settings: dict[str, Any] = {"sweeps": 2, "relative_std": 40.0, "anderson_depth": 0}
    data = batches(WARM + 3)
    expected = trained(PCModel(gpt2(), PCConfig(**settings)), data)
    pc = recording(gpt2(), **settings)
    before = Replay.count
    found = trained(pc, data)
    assert Replay.count - before == 4  # of three steps the first alone takes it for granted that the pass is accepted
    assert pc._recorder is not None
    assert [form.careful is not None for form in pc._recorder._forms.values()] == [True]
    for (report, mine), (wanted, others) in zip(found, expected, strict=True):
        assert report.refused == wanted.refused > 0
        for one, other in zip(mine, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_add_up_and_are_the_weights_own() -> None:
    """Several batches make one step, and what a step left in `.grad` no later one changes."""
    data = batches(WARM + 2)
    model, plain = gpt2(), gpt2()
    pc, other = recording(model, sweeps=3, relative_std=0.5), PCModel(plain, PCConfig(sweeps=3, relative_std=0.5))
    for one in (pc, other):
        for given in data[:WARM]:
            one.accumulate_grad(**given)
            one.steer()
        one.model.zero_grad()
        one.accumulate_grad(**data[-2], num_items_in_batch=50)
    kept = [p.grad for p in model.parameters()]
    before = [g.clone() for g in kept if g is not None]
    model.zero_grad()
    pc.accumulate_grad(**data[-1], num_items_in_batch=40)
    assert all(torch.equal(g, b) for g, b in zip((g for g in kept if g is not None), before, strict=True))
    pc.accumulate_grad(**data[-2], num_items_in_batch=50)
    other.accumulate_grad(**data[-1], num_items_in_batch=40)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_each_step_is_a_mean_over_its_own_number_of_tokens() -> None:
    """That of all batches of an optimiser step, as a Trainer gives it."""
    data = batches(WARM + 3)
    found = []
    for recorded in (False, True):
        settings: dict[str, Any] = {"sweeps": 3, "precision": 20.0}
        pc = recording(gpt2(), **settings) if recorded else PCModel(gpt2(), PCConfig(**settings))
        norms = []
        for items, given in enumerate(data, start=21):
            pc.model.zero_grad()
            pc.accumulate_grad(**given, num_items_in_batch=torch.tensor(items))
            norms.append(torch.cat([p.grad.flatten() for p in pc.model.parameters() if p.grad is not None]).norm())
        found.append(torch.stack(norms))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_of_other_batches_is_masked(kind: str, padded: bool) -> None:
    """A mask that hides nothing is left out; any other is read anew by each step that is played."""
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, pad_token_id=0,
    )  # fmt: skip
    settings: dict[str, Any] = {"sweeps": 3, "relative_std": 0.5}
    found = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train() if kind == "llama" else gpt2()
        pc = recording(model, **settings) if recorded else PCModel(model, PCConfig(**settings))
        data = batches(WARM + 2)
        for i, given in enumerate(data):
            mask = torch.ones(3, 8, dtype=torch.long)
            if padded:
                mask[0, 8 - 1 - i :] = 0
            labels = torch.where(mask == 0, -100, given["labels"])
            pc.model.zero_grad()
            report = pc.accumulate_grad(input_ids=given["input_ids"], labels=labels, attention_mask=mask)
            pc.steer()
        found.append((report.free_energy, [p.grad for p in pc.model.parameters()]))
    (one, gradients), (other, others) = found
    assert one == pytest.approx(other, rel=1e-4)
    for first, second in zip(gradients, others, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_several_sequences_in_a_row_are_kept_apart() -> None:
    """Positions that a batch brings are read anew by each step, and what they separate is masked."""
    found = []
    for recorded in (False, True):
        settings: dict[str, Any] = {"sweeps": 3, "precision": 20.0}
        pc = recording(gpt2(), **settings) if recorded else PCModel(gpt2(), PCConfig(**settings))
        energies = []
        for i, given in enumerate(batches(WARM + 3)):
            positions = torch.cat([torch.arange(i + 1), torch.arange(7 - i)]).expand(3, 8)
            energies.append(pc.accumulate_grad(**given, position_ids=positions).free_energy)
            pc.model.zero_grad()
        found.append(energies)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_masks_that_a_model_makes_itself_are_recorded() -> None:
    """BART makes one of ones for its decoder where none is given; the batch's own, of ones too, is left out."""
    found = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = BartForConditionalGeneration(BartConfig(**BART)).train()
        settings: dict[str, Any] = {"sweeps": 3, "relative_std": 0.5, "dropout": "off"}
        pc = recording(model, **settings) if recorded else PCModel(model, PCConfig(**settings))
        inputs = batches(1)[0]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for _ in range(WARM + 2):
            model.zero_grad()
            pc.accumulate_grad(**inputs)
            pc.steer()
        found.append(gradients(model))
    assert worst(found[1], found[0]) < 1e-4


@pytest.mark.parametrize("name", ["t5", "mamba", "modernbert", "swin", "mixtral"])
def test_any_architecture_may_be_recorded(name: str) -> None:
    """Encoders and decoders, states instead of attention, windows of an image; of experts those not run in a loop."""
    found = []
    for recorded in (False, True):
        model, inputs = build(name)
        if name == "mixtral":
            model.config._experts_implementation = "batched_mm"
        settings: dict[str, Any] = {"sweeps": 3, "relative_std": 0.5, "dropout": "off"}
        pc = recording(model.train(), **settings) if recorded else PCModel(model.train(), PCConfig(**settings))
        before = Replay.count
        for _ in range(WARM + 1):
            model.zero_grad()
            pc.accumulate_grad(**inputs)
            pc.steer()
        assert (Replay.count > before) == recorded
        found.append(gradients(model))
    assert worst(found[1], found[0]) < 1e-9


def test_running_statistics_count_a_batch_once() -> None:
    """Also where a last pass is not accepted, and another recording takes the step."""
    inputs: dict[str, Any] = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    plain, model = resnet(), resnet()
    pc = recording(model, sweeps=2, relative_std=60.0, anderson_depth=0)
    refused = 0.0
    for _ in range(WARM + 2):
        plain(pixel_values=inputs["pixel_values"])
        refused = pc.accumulate_grad(**inputs).refused
        pc.steer()
    assert refused > 0
    for (name, one), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_forms_share_one_autocast() -> None:
    """What autocast keeps of the weights is no part of a recording, nor is it kept for the next."""
    found = []
    long, short = batches(WARM + 3), batches(WARM + 3, rows=2, length=5)
    for recorded in (False, True):
        settings: dict[str, Any] = {"sweeps": 3, "relative_std": 0.5}
        pc = recording(gpt2(), **settings) if recorded else PCModel(gpt2(), PCConfig(**settings))
        gradient = []
        for pair in zip(long, short, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                for part in pair:
                    pc.accumulate_grad(**part)
            pc.steer()
            gradient = [p.grad.clone() for p in pc.model.parameters() if p.grad is not None]
            with torch.no_grad():
                for p in pc.model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        found.append(torch.cat([g.flatten() for g in gradient]))
    assert float((found[1] - found[0]).norm()) < 1e-3 * float(found[0].norm())


def test_a_recorded_model_is_given_up_at_once() -> None:
    """No cycle keeps nodes, and the memory of recordings, until garbage is collected."""
    model = gpt2()
    pc = recording(model, sweeps=2, relative_std=0.5)
    trained(pc, batches(WARM + 1))
    recorder = weakref.ref(pc._recorder)
    gc.disable()
    try:
        del pc
        assert recorder() is None
        PCModel(model, PCConfig())  # which would raise if nodes of the other were left
    finally:
        gc.enable()


def test_forms_and_weights_have_recordings_of_their_own() -> None:
    """Batches of another shape are learned without one until it is recorded; with frozen weights all begin anew."""
    pc = recording(gpt2(), sweeps=2, relative_std=0.5)
    assert pc._recorder is not None
    data = [*batches(WARM + 1), *batches(WARM + 1, rows=2)]
    trained(pc, data)
    assert [form.plain is not None for form in pc._recorder._forms.values()] == [True, True]
    pc.model.transformer.wte.requires_grad_(False)
    trained(pc, data[:1])
    assert [form.plain is not None for form in pc._recorder._forms.values()] == [False]
    assert pc.model.transformer.wte.weight.grad is None
    trained(pc, data[: WARM + 1])
    pc.model.transformer.kept = torch.zeros(2)  # as tables of positions that grow with the sequences
    trained(pc, data[:1])
    assert [form.plain is not None for form in pc._recorder._forms.values()] == [False]


def test_tensors_that_change_all_the_time_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Such a model learns as it does without recordings, and is told so once."""
    pc = recording(gpt2(), sweeps=2, relative_std=0.5)
    before = Replay.count
    for given in batches(MANY_CHANGES + 3):
        pc.model.transformer.h[1].table = torch.zeros(2)
        trained(pc, [given])
    assert Replay.count == before
    assert [r.getMessage() for r in caplog.records if "for the 5th time" in r.getMessage()] == [
        "PCConfig.cuda_graph=True: steps are recorded anew for the 5th time, as a module has other tensors, or is in "
        "another mode: 'transformer.h.1'. Where that happens all the time, steps run normally"
    ]


def test_only_so_many_forms_are_recorded(caplog: pytest.LogCaptureFixture) -> None:
    pc = recording(gpt2(), sweeps=2, relative_std=0.5)
    for rows in range(1, MOST_FORMS + 3):
        pc.accumulate_grad(**batches(1, rows=rows)[0])
    assert pc._recorder is not None
    assert len(pc._recorder._forms) == MOST_FORMS
    assert len([r for r in caplog.records if "batches of more than 16 forms" in r.getMessage()]) == 1


def test_forms_may_take_turns() -> None:
    """What is known of one form, such as the shape of its logits, is not taken for another's."""
    settings: dict[str, Any] = {"sweeps": 3, "relative_std": 0.5}
    long, short = batches(WARM + 3), batches(WARM + 3, rows=2, length=5)
    data = [given for pair in zip(long, short, strict=True) for given in pair]
    pc = recording(gpt2(), **settings)
    found, expected = trained(pc, data), trained(PCModel(gpt2(), PCConfig(**settings)), data)
    assert pc._recorder is not None
    assert [form.plain is not None for form in pc._recorder._forms.values()] == [True, True]
    for (report, mine), (wanted, others) in zip(found, expected, strict=True):
        assert report.free_energy == pytest.approx(wanted.free_energy, rel=1e-4)
        for one, other in zip(mine, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    pc.detach()
    assert pc._recorder is None


def test_labels_out_of_range_are_named_before_a_step_is_played() -> None:
    pc = recording(gpt2(), sweeps=2, relative_std=0.5)
    data = batches(WARM + 1)
    trained(pc, data)
    wrong = copy.deepcopy(data[0])
    wrong["labels"][0, 3] = 13
    with pytest.raises(ValueError, match="label 13 is out of range: 0 to 12"):
        pc.accumulate_grad(**wrong)


def test_what_cannot_be_recorded_is_named() -> None:
    """Dropout, inputs that are no tensors, code that asks for numbers; afterwards the model is as it was."""
    given = batches(1)[0]
    with pytest.raises(ValueError, match=r"draws random numbers.*dropout='off'"):
        recording(gpt2(resid_pdrop=0.1), sweeps=2, relative_std=0.5).accumulate_grad(**given)
    trained(recording(gpt2(resid_pdrop=0.1), sweeps=2, relative_std=0.5, dropout="off"), batches(WARM + 1))
    with pytest.raises(ValueError, match="'past_key_values' is a list"):
        recording(gpt2(), sweeps=2, relative_std=0.5).accumulate_grad(**given, past_key_values=[])
    with pytest.raises(ValueError, match="on one CUDA device, not on cpu"):
        PCModel(gpt2(), PCConfig(cuda_graph=True)).accumulate_grad(**given)
    with pytest.raises(ValueError, match=r"energy that learns by itself, as that of node 'transformer\.h\.0'"):
        recording(gpt2(), sweeps=2, relative_std=0.5, energy="learned_variance").accumulate_grad(**given)

    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 1e30 else x * 1.0

    model = gpt2()
    model.transformer.drop = Asks()
    pc = recording(model, sweeps=2, relative_std=0.5)
    trained(pc, batches(WARM))
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph.*use PCConfig\.cuda_graph=False"):
        pc.accumulate_grad(**given)
    assert pc.relaxation is None
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "state"}, "needs solver='error', not 'state'"),
        ({"learning": "wake_sleep"}, "not 'wake_sleep'"),
        ({"tolerance": 0.1}, "needs tolerance=0, not 0.1"),
        ({"attention_energy": "categorical"}, "needs attention_energy=None"),
    ],
)
def test_settings_that_decide_or_draw_in_a_step_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PCConfig(cuda_graph=True, **settings)
    with pytest.raises(ValueError, match=r"PCConfig\.cuda_graph=1 is not allowed"):
        PCConfig(cuda_graph=1)  # type: ignore[arg-type]


def test_a_trainer_records_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights, losses and what is logged are those of a run without, with accumulated and clipped gradients."""
    monkeypatch.setattr("hf_pc.refusals._refuse_recording", lambda *_: None)
    monkeypatch.setattr("hf_pc.model.Recorder", partial(Recorder, Replay, "cpu"))
    rows = [{"input_ids": ids, "labels": ids} for ids in batches(1, rows=40)[0]["input_ids"]]
    runs = []
    for recorded in (False, True):
        args = PCTrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        settings: dict[str, Any] = {"learning": "balanced", "sweeps": 4, "relaxed_fraction": 0.2}
        before = Replay.count
        trainer = PCTrainer(gpt2(), args, train_dataset=rows, pc_config=PCConfig(**settings, cuda_graph=recorded))
        trainer.train()
        assert (Replay.count > before) == recorded
        runs.append((trainer.state.log_history, list(trainer.model.parameters())))
    (logs, weights), (others, same) = runs
    for log, other in zip(logs[:-1], others[:-1], strict=True):
        assert log == pytest.approx(other, rel=2e-3, abs=1e-5)
    for one, two in zip(weights, same, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_a_trainer_refuses_what_cannot_be_recorded(tmp_path: Path) -> None:
    for more, message in (({}, "the device 'cpu'"), ({"gradient_checkpointing": True}, "the device 'cpu'")):
        args = PCTrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **more)
        with pytest.raises(ValueError, match=rf"PCConfig\.cuda_graph=True is not allowed with {message}"):
            PCTrainer(gpt2(), args, train_dataset=batches(1), pc_config=PCConfig(cuda_graph=True))
