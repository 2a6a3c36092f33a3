"""PCTrainer keeps what users of Trainer rely on; one test for each feature."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_invariants import gradients, make, worst
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_pc import (
    PCConfig,
    PCModel,
    PCSeq2SeqTrainer,
    PCSeq2SeqTrainingArguments,
    PCTrainer,
    PCTrainerMixin,
    PCTrainingArguments,
)
from hf_pc.diagnostics import largest_curvature
from hf_pc.trainer import BackpropTrainer, NonFiniteEnergyError

RELAXING = PCConfig(sweeps=3, relaxed_fraction=0.05)


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    """Sequences with unequal numbers of label tokens."""
    made = []
    for i in range(count):
        ids = [(i * 7 + j * (i % 5 + 1)) % 50 for j in range(16)]
        made.append({"input_ids": ids, "labels": [-100] * (i % 6) + ids[i % 6 :]})
    return made


def trainer(folder: Path, config: PCConfig | None = RELAXING, cls: Any = PCTrainer, **options: Any) -> Any:
    name, dropout = options.pop("name", "gpt2"), options.pop("dropout", 0.0)
    keys = ("callbacks", "optimizers", "compute_loss_func", "model", "train_dataset")
    extra = {k: options.pop(k) for k in keys if k in options}
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
        "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    if config is not None:
        extra["pc_config"] = config
    extra.setdefault("model", make(name, dropout))
    extra.setdefault("train_dataset", rows())
    return cls(args=PCTrainingArguments(**{**defaults, **options}), eval_dataset=rows(10), **extra)


def weights(run: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def trained(folder: Path, *args: Any, **options: Any) -> torch.Tensor:
    run = trainer(folder, *args, **options)
    run.train()
    return weights(run)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_sweep_trains_as_backprop(tmp_path: Path, name: str) -> None:
    """At T = 1 the weights after four steps are backprop's, dropout included."""
    pc = trained(tmp_path / "pc", PCConfig(sweeps=1), name=name, dropout=0.1)
    bp = trained(tmp_path / "bp", None, BackpropTrainer, name=name, dropout=0.1)
    assert (pc - bp).norm() / bp.norm() < 1e-5


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Batches of 8 and two accumulated batches of 4 with unequal label counts train the same weights."""
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    whole = trained(tmp_path / "a", per_device_train_batch_size=8, **sgd)
    parts = trained(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2, **sgd)
    assert (whole - parts).norm() / whole.norm() < 1e-5


def test_clipping(tmp_path: Path) -> None:
    """With max_grad_norm c, one SGD step of rate 1 moves the weights by c at most."""
    before = torch.cat([p.detach().flatten() for p in make("gpt2").parameters()])
    options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "lr_scheduler_type": "constant"}
    after = trained(tmp_path, max_grad_norm=0.01, **options)
    assert 0.0099 < float((after - before).norm()) < 0.0101


def test_scheduler(tmp_path: Path) -> None:
    """The learning rate follows the schedule: linear to zero."""
    run = trainer(tmp_path)
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_bf16(tmp_path: Path) -> None:
    """Under bf16 autocast PC trains: errors stay float32, the loss is near that of float32."""
    losses = []
    for bf16 in (False, True):
        run = trainer(tmp_path / str(bf16), bf16=bf16, max_steps=12)
        run.train()
        losses.append(run.evaluate()["eval_loss"])
        assert all(entry["residual"] < 0.3 for entry in run.state.log_history if "residual" in entry)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("nodes", ["block", "linear"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, nodes: str) -> None:
    """Activation checkpointing trains the same weights, with nodes outside and inside the checkpointed blocks."""
    config = PCConfig(nodes=nodes, sweeps=3, relative_std=0.5)
    plain = trained(tmp_path / "a", config)
    model = make("gpt2")
    model.gradient_checkpointing_enable()
    checkpointed = trained(tmp_path / "b", config, model=model)
    assert (plain - checkpointed).norm() / plain.norm() < 1e-5


def test_evaluation_is_a_mean_over_tokens(tmp_path: Path) -> None:
    """eval_loss is the cross-entropy per label token of a plain forward pass, gpt2's position 0 not counted."""
    run = trainer(tmp_path, per_device_eval_batch_size=4)
    nats = tokens = 0.0
    model = run.model.eval()
    for row in rows(10):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        nats += F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum").item()
        tokens += labels[1:].ne(-100).sum().item()
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-5)


def test_callbacks_see_the_regime(tmp_path: Path) -> None:
    """Every log reaches callbacks with free energy, energy per node, residual, relaxed_fraction, sweeps, refusals."""
    seen: list[dict[str, float]] = []

    class Listener(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer(tmp_path, callbacks=[Listener()]).train()
    for logs in (entry for entry in seen if "loss" in entry):
        parts = sum(value for name, value in logs.items() if name.startswith("energy/"))
        assert logs["free_energy"] == pytest.approx(parts)
        assert logs["sweeps"] == 3
        assert {"residual", "relaxed_fraction", "displacement", "refused"} <= logs.keys()


def test_a_short_run_is_logged(tmp_path: Path) -> None:
    """A run shorter than logging_steps still logs its regime, at its last step."""
    run = trainer(tmp_path, logging_steps=500)
    run.train()
    assert [entry["step"] for entry in run.state.log_history if "relaxed_fraction" in entry] == [4]


def test_relaxed_fraction_is_held(tmp_path: Path) -> None:
    """Steering brings the relaxed fraction to its target."""
    run = trainer(tmp_path, PCConfig(sweeps=3, relaxed_fraction=0.05), max_steps=40)
    run.train()
    last = [e["relaxed_fraction"] for e in run.state.log_history if "relaxed_fraction" in e][-10:]
    assert sum(last) / len(last) == pytest.approx(0.05, rel=0.2)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The energies reach TensorBoard as scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer(tmp_path / "run", report_to=["tensorboard"]).train()
    found = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    tags: set[str] = set()
    for folder in found:
        events = EventAccumulator(str(folder))
        events.Reload()
        tags.update(events.Tags()["scalars"])
    assert {"train/free_energy", "train/relaxed_fraction"} <= tags


def test_load_best_model_at_end(tmp_path: Path) -> None:
    """The weights at the end are those of the checkpoint with the lowest eval_loss."""
    saving = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path, load_best_model_at_end=True, learning_rate=0.05, max_steps=6, **saving)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("config", [RELAXING, PCConfig(solver="langevin", relative_std=0.3)], ids=["error", "drawn"])
def test_resume_is_exact(tmp_path: Path, config: PCConfig) -> None:
    """Interrupted after two steps and resumed, with dropout and steering or draws, the weights are the same bits."""
    saving = {"config": config, "save_strategy": "steps", "save_steps": 2, "dropout": 0.1}
    whole = trained(tmp_path / "a", **saving)
    resumed = trainer(tmp_path / "b", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(whole, weights(resumed))


def test_checkpoint_is_plain_and_says_how_it_learned(tmp_path: Path) -> None:
    """A saved run loads with plain transformers, gives the same logits and holds pc_config.json."""
    run = trainer(tmp_path)
    run.train()
    run.save_model()
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, run.model.eval()(ids).logits)
    saved = json.loads((tmp_path / "pc_config.json").read_text())
    assert PCConfig.from_dict(saved) == RELAXING


def test_any_trainer_subclass(tmp_path: Path) -> None:
    """The mixin works on a Trainer subclass, whose own overrides still run."""

    class Counting(Trainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class CountingPC(PCTrainerMixin, Counting):
        pass

    run = trainer(tmp_path, cls=CountingPC)
    run.train()
    assert run.steps == 4
    assert any("free_energy" in entry for entry in run.state.log_history)


class Poison(TrainerCallback):
    """Puts a NaN into a weight of the second block before some steps, and takes it out afterwards."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.kept = steps, None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weight = model.transformer.h[1].ln_1.weight.data
        if state.global_step in self.steps:
            self.kept = self.weight.clone()
            self.before = [p.detach().clone() for p in model.parameters() if p.data_ptr() != self.weight.data_ptr()]
            self.weight[0] = float("nan")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.kept is not None:
            now = [p for p in model.parameters() if p.data_ptr() != self.weight.data_ptr()]
            assert all(torch.equal(a, b) for a, b in zip(self.before, now, strict=True))
            self.weight.copy_(self.kept)
            self.kept = None


def test_a_nonfinite_step_leaves_the_weights(tmp_path: Path) -> None:
    """A step whose free energy is not finite changes no weight, and training goes on."""
    after = trained(tmp_path, callbacks=[Poison({1})])
    assert bool(after.isfinite().all())


def test_persistent_nonfinite_energy_stops_the_run(tmp_path: Path) -> None:
    """Three such steps in a row save a checkpoint and end the run with an error that names the node."""
    run = trainer(tmp_path, callbacks=[Poison({0, 1, 2, 3, 4, 5})], max_steps=6)
    with pytest.raises(NonFiniteEnergyError, match=r"transformer\.h\.1"):
        run.train()
    assert run.state.global_step == 3
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"compute_loss_func": lambda *a, **k: None}, "compute_loss_func"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """What predictive coding cannot do raises an error that names it, before training."""
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several GPUs without a launcher are refused."""
    monkeypatch.setattr(PCTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="DataParallel"):
        trainer(tmp_path)


def test_labels_are_needed(tmp_path: Path) -> None:
    """A batch without labels is an error that says so; with every label ignored, of a PCModel, which is given one."""
    ids = rows(4)[0]["input_ids"]
    with pytest.raises(ValueError, match="without labels"):
        trainer(tmp_path, train_dataset=[{"input_ids": ids}] * 4).train()
    with pytest.raises(ValueError, match="every label of the batch is ignored"):
        PCModel(make("gpt2")).accumulate_grad(input_ids=torch.tensor([ids]), labels=torch.full((1, 16), -100))


@pytest.mark.parametrize("solver", ["state", "lagrangian"])
def test_weights_move_at_every_sweep(tmp_path: Path, solver: str) -> None:
    """Incremental PC: T optimizer steps per batch, the first T - 1 while the states relax; it trains and resumes."""
    config = PCConfig(solver=solver, sweeps=5, relative_std=0.3, weight_update="every_sweep")
    run = trainer(tmp_path, config, max_steps=12)
    steps = []
    run.create_optimizer()
    run.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    before = run.evaluate()["eval_loss"]
    run.train()
    assert len(steps) == 12 * 5
    assert run.evaluate()["eval_loss"] < before


def test_weights_move_at_every_sweep_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    """accumulate_grad with weight_step leaves the weights that PCTrainer does, and asks for it by name."""
    config = PCConfig(solver="state", sweeps=5, relative_std=0.3, weight_update="every_sweep")
    options = {"train_dataset": rows(4), "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 1e-5}
    run = trainer(tmp_path, config, max_steps=1, **options)
    mine, start = copy.deepcopy(run.model), copy.deepcopy(run.model)
    run.train()
    pc = PCModel(mine.train(), config)
    optimizer = torch.optim.SGD(mine.parameters(), lr=1e-5)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    inputs = {name: torch.tensor([row[name] for row in rows(4)]) for name in ("input_ids", "labels")}
    with pytest.raises(ValueError, match=r"weight_update=.every_sweep. .* give weight_step"):
        pc.accumulate_grad(**inputs)
    pc.accumulate_grad(**inputs, weight_step=step)
    optimizer.step()
    moves = [torch.cat([(p - q).flatten() for p, q in zip(m.parameters(), start.parameters(), strict=True)])
             for m in (mine, run.model)]  # fmt: skip
    assert (moves[0] - moves[1]).norm() < 1e-3 * moves[1].norm()
    with pytest.raises(ValueError, match=r"weight_update=.final. .* weight_step is not allowed"):
        PCModel(make("gpt2"), PCConfig()).accumulate_grad(**inputs, weight_step=step)


def test_every_sweep_needs_single_batches(tmp_path: Path) -> None:
    """Accumulation cannot go with weights that move within a batch: an error before training."""
    config = PCConfig(solver="state", weight_update="every_sweep")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1"):
        trainer(tmp_path / "none", config, gradient_accumulation_steps=2)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("solver", ["state", "lagrangian"])
def test_accumulation_with_states(tmp_path: Path, solver: str) -> None:
    """One batch of 8 and two of 4 train alike with every solver."""
    config = PCConfig(solver=solver, sweeps=5, relative_std=0.3)
    sgd = {"optim": "sgd", "learning_rate": 0.1}  # Adam makes steps of rounding where a gradient is zero
    whole = trained(tmp_path / "a", config, per_device_train_batch_size=8, **sgd)
    halves = trained(tmp_path / "b", config, per_device_train_batch_size=4, gradient_accumulation_steps=2, **sgd)
    assert (whole - halves).norm() / whole.norm() < 1e-6


@pytest.mark.parametrize(("solver", "rule"), [("error", "plain"), ("state", "plain"), ("error", "extrapolated")])
def test_a_step_that_drops_every_block(tmp_path: Path, solver: str, rule: Any) -> None:
    """With LayerDrop a step without any block learns as backprop does; others drop the same blocks in all sweeps."""
    config = BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0,
                        encoder_layerdrop=0.5, decoder_layerdrop=0.5, pad_token_id=0)  # fmt: skip
    set_seed(0)
    model = BartForConditionalGeneration(config).train()
    pc = PCModel(model, PCConfig(solver=solver, sweeps=4, relative_std=0.3, learning=rule))
    dropped = []
    for seed in range(12):
        ids = torch.randint(1, 50, (2, 6))
        inputs = {"input_ids": ids, "labels": ids}
        model.zero_grad()
        torch.manual_seed(seed)
        found = pc.accumulate_grad(**inputs)
        dropped.append(not found.errors)
        pc.steer()
        if dropped[-1]:
            learned = gradients(model)
            model.zero_grad()
            torch.manual_seed(seed)
            pc.backprop_loss(inputs).backward()
            assert worst(learned, gradients(model)) < 1e-5
            assert rule != "plain" or found.sweeps == 2  # one that met no node, and one that learned
            torch.manual_seed(seed)
            assert largest_curvature(pc, inputs) == 0.0
    assert set(dropped) == {True, False}
    assert pc.relative_std == pytest.approx(0.3)


def test_nothing_to_learn(tmp_path: Path) -> None:
    """A model whose weights are all frozen is an error by name, before any folder is made."""
    model = make("gpt2").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of GPT2LMHeadModel requires a gradient"):
        trainer(tmp_path / "none", model=model)
    assert not (tmp_path / "none").exists()


def test_layer_drop_over_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that drop different layers would have different nodes: an error by name, before any folder is made."""
    model = make("gpt2")
    model.config.layerdrop = 0.1
    monkeypatch.setattr(PCTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"layerdrop=0\.1 is not supported with several processes"):
        trainer(tmp_path / "none", model=model)
    assert not (tmp_path / "none").exists()


def test_dropout_off(tmp_path: Path) -> None:
    """With dropout="off" no pass of a step drops anything, though the Trainer calls train(); evaluation is as ever."""
    off = PCConfig(sweeps=3, relative_std=0.3, dropout="off")
    dropping = trainer(tmp_path / "a", off, dropout=0.5)
    dropping.train()
    assert dropping.model.training
    never = trained(tmp_path / "b", off, dropout=0.0)
    assert torch.equal(weights(dropping), never)


def test_a_nonfinite_gradient_changes_nothing(tmp_path: Path) -> None:
    """A gradient that is not finite though every energy is stops the update as a non-finite energy does."""
    run = trainer(tmp_path, nonfinite_patience=2)
    run.model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weights(run)
    with pytest.raises(NonFiniteEnergyError, match="a gradient"):
        run.train()
    assert torch.equal(weights(run), before)


def test_training_again_keeps_what_steering_learned(tmp_path: Path) -> None:
    """A second train() starts with the relative_std that the first one ended with."""
    run = trainer(tmp_path, max_steps=6)
    run.train()
    learned = run.pc.relative_std
    run.train()
    logged = [entry["relative_std"] for entry in run.state.log_history if "relative_std" in entry]
    assert abs(logged[0] / learned - 1) < 0.5 < abs(logged[0] / 0.2 - 1)


def test_a_loss_of_ones_own_is_refused(tmp_path: Path) -> None:
    """compute_loss would never be called, and a mixin after the Trainer would do nothing: both are errors."""

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    class Mixed(PCTrainerMixin, Own):
        pass

    with pytest.raises(ValueError, match=r"Own\.compute_loss"):
        trainer(tmp_path / "none", cls=Mixed)
    assert not (tmp_path / "none").exists()
    with pytest.raises(TypeError, match="before the Trainer"):
        type("Wrong", (Trainer, PCTrainerMixin), {})


def test_a_router_counts_once(tmp_path: Path) -> None:
    """A mixture of experts' router loss has the weight of one batch, accumulated or not."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}

    def router(**options: Any) -> torch.Tensor:
        set_seed(0)
        model = MixtralForCausalLM(
            MixtralConfig(**sizes, **heads, output_router_logits=True, router_aux_loss_coef=100.0)
        )
        run = trainer(tmp_path, PCConfig(sweeps=1), model=model, max_steps=1, optim="sgd", learning_rate=1e-4,
                      train_dataset=rows(1) * 8, **options)  # fmt: skip
        run.train()
        return weights(run)

    whole = router(per_device_train_batch_size=8)
    halves = router(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-7)


def test_evaluation_by_generation(tmp_path: Path) -> None:
    """PCSeq2SeqTrainer trains, scores what it generates, and reports the loss per label token beside it."""
    set_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    data = [{"input_ids": row["input_ids"], "labels": row["labels"][-6:]} for row in rows(8)]
    args = PCSeq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, predict_with_generate=True, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", per_device_eval_batch_size=4,
    )  # fmt: skip
    run = PCSeq2SeqTrainer(
        model, args, pc_config=RELAXING, train_dataset=data, eval_dataset=data,
        compute_metrics=lambda found: {"length": float(found.predictions.shape[1])},
    )  # fmt: skip
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_length"] > 1
    with torch.no_grad():
        batch = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
        expected = model.eval()(**batch).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)


def test_a_strength_that_is_given_stays_given(tmp_path: Path) -> None:
    """A run that is resumed with another relative_std goes on with that one."""
    kept: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, PCConfig(relative_std=0.3), max_steps=2, **kept).train()
    run = trainer(tmp_path, PCConfig(relative_std=0.05), **kept)
    run.train(resume_from_checkpoint=True)
    assert run.pc.relative_std == 0.05


def test_model_init_begins_anew(tmp_path: Path) -> None:
    """Every `train()` has a model and a steering of its own; without it training goes on where it was."""
    run = trainer(tmp_path, PCConfig(relaxed_fraction=0.2))
    run.model_init = lambda: make("gpt2")
    logs = []
    for _ in range(2):
        run.train()
        logs.append([(log["loss"], log["relative_std"]) for log in run.state.log_history if "loss" in log])
    assert logs[0] == logs[1]


def test_frozen_models_of_model_init_are_refused(tmp_path: Path) -> None:
    """As those that are given, though no sooner than in the first step."""
    run = trainer(tmp_path)
    run.model_init = lambda: make("gpt2").requires_grad_(False)
    with pytest.raises(ValueError, match="there is nothing to learn"):
        run.train()


def test_the_best_model_comes_with_its_own_steering(tmp_path: Path) -> None:
    """`load_best_model_at_end` loads what steering had learned by then, and saves it beside the weights."""
    run = trainer(tmp_path, learning_rate=0.1, eval_strategy="steps", eval_steps=1, save_strategy="steps",
                  save_steps=1, load_best_model_at_end=True)  # fmt: skip
    run.train()
    run.save_model()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"  # else this says nothing
    assert (tmp_path / "pc_state.json").read_text() == (best / "pc_state.json").read_text()


@pytest.mark.parametrize("cls", [PCTrainer, BackpropTrainer])
def test_steps_without_labels_are_gone_through(tmp_path: Path, caplog: pytest.LogCaptureFixture, cls: Any) -> None:
    """Nothing is learned from them, the run goes on, and says so once."""
    data = [{"input_ids": row["input_ids"], "labels": [-100] * 16} for row in rows(8)]
    run = trainer(tmp_path, RELAXING if cls is PCTrainer else None, cls, train_dataset=data, weight_decay=0.0)
    before = weights(run).clone()
    run.train()
    assert torch.equal(weights(run), before)
    assert caplog.text.count("every label is ignored") == 1
    assert [log["loss"] for log in run.state.log_history if "loss" in log] == [0.0] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature_steps": 1.5}, "curvature_steps=1.5 is not allowed: a whole number"),
        ({"curvature_steps": "5"}, "curvature_steps='5' is not allowed: a whole number"),
        ({"nonfinite_patience": 0}, "nonfinite_patience=0 is not allowed: a whole number of at least 1"),
    ],
)
def test_own_arguments_are_whole_numbers(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Those that PCTrainingArguments adds."""
    with pytest.raises(ValueError, match=message):
        PCTrainingArguments(str(tmp_path), **settings)


@pytest.mark.parametrize("given", ["block", [1], 3, PCConfig], ids=str)
def test_what_is_no_configuration(tmp_path: Path, given: Any) -> None:
    """Neither a PCConfig, nor its dictionary, nor None: an error that shows it, from the trainer and from PCModel."""
    with pytest.raises(ValueError, match="a PCConfig, its dictionary or None is needed"):
        trainer(tmp_path, given)
    with pytest.raises(ValueError, match="a PCConfig, its dictionary or None is needed"):
        PCModel(make("gpt2"), given)
    assert PCModel(make("gpt2"), {"sweeps": 2}).config.sweeps == 2


def test_train_takes_a_trial_by_place(tmp_path: Path) -> None:
    """As the Trainer's does."""
    assert trainer(tmp_path, max_steps=1).train(None, None).global_step == 1
