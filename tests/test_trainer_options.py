"""What a Trainer is given besides model and data: kept as a Trainer keeps it, or refused before training."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_invariants import make
from test_trainer import RELAXING, Poison, rows, trainer
from torch.utils.data import IterableDataset
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    ProgressCallback,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainerCallback,
)

from hf_pc import PCConfig, PCModel, PCTrainer, PCTrainerMixin, PCTrainingArguments, json_files
from hf_pc.architecture import positions
from hf_pc.callbacks import NonFiniteGuard
from hf_pc.commands.runs import history
from hf_pc.metrics import Regime
from hf_pc.refusals import check_first_batch, check_processes, refuse
from hf_pc.trainer import BackpropTrainer

MOVING = PCConfig(solver="state", sweeps=4, relative_std=0.3, step_size=0.3, weight_update="every_sweep")


def test_no_sweep_steps_along_what_is_not_finite(tmp_path: Path) -> None:
    """Weights that move at every sweep stay where they are in a step whose gradients are not finite."""
    run = trainer(tmp_path, MOVING, callbacks=[Poison({1})])  # which compares them
    run.train()
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_a_search_does_not_add_the_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default objective is eval_loss, or the sum of `compute_metrics`; one that is given is taken."""
    given = []
    monkeypatch.setattr(Trainer, "hyperparameter_search", lambda self, space, objective: given.append(objective))
    run = trainer(tmp_path)
    figures = run.evaluate() | {"epoch": 1.0}
    run.hyperparameter_search()
    run.hyperparameter_search(None, len)
    assert given[0](figures) == figures["eval_loss"]
    assert given[0](figures | {"eval_accuracy": 0.5}) == 0.5
    two = run.evaluate({"a": rows(4), "b": rows(6)})
    assert given[0](two) == pytest.approx(two["eval_a_loss"] + two["eval_b_loss"])
    assert given[1] is len


def test_the_best_perplexity_is_the_lowest(tmp_path: Path) -> None:
    """Unless it is said otherwise; of other metrics the highest, as transformers has it."""
    for settings, expected in (
        ({"metric_for_best_model": "eval_perplexity"}, False),
        ({"metric_for_best_model": "perplexity", "greater_is_better": True}, True),
        ({"metric_for_best_model": "accuracy"}, True),
    ):
        assert PCTrainingArguments(str(tmp_path), **settings).greater_is_better is expected


def test_what_only_the_trainer_knows_is_checked_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of `model_init`, arguments by place, a launcher's wish without arguments, a PCModel for a model."""
    args = PCTrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="nodes='nothing"):
        PCTrainer(args=args, model_init=lambda: make("gpt2"), pc_config=PCConfig(nodes="nothing.like.it"))
    with pytest.raises(ValueError, match="compute_loss_func is not supported"):
        PCTrainer(make("gpt2"), args, None, rows(), None, None, None, lambda *_: 0.0)
    with pytest.raises(ValueError, match=r"model=PCModel\(\.\.\.\) is not allowed"):
        PCTrainer(PCModel(make("gpt2"), RELAXING), args)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--dynamo_backend INDUCTOR"):
        PCTrainer(make("gpt2"))


@pytest.mark.parametrize("settings", [{"every_n_layers": 2}, {"use_reentrant": False, "every_n_layers": 2}])
def test_where_blocks_are_checkpointed_is_no_matter(tmp_path: Path, settings: dict[str, Any]) -> None:
    """transformers takes such checkpointing for non-reentrant, which is supported: weights learn the same."""
    ended = []
    for given in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}):
        run = trainer(tmp_path, max_steps=2, **given)
        run.train()
        ended.append([p.detach().clone() for p in run.model.parameters()])
    torch.testing.assert_close(ended[1], ended[0])


def test_noise_that_would_be_left_out_is_refused(tmp_path: Path) -> None:
    """NEFTune's noise is dropout's kin: without dropout it does nothing, which nobody asks for who asks for it."""
    with pytest.raises(ValueError, match=r"neftune_noise_alpha=5\.0 is not allowed with dropout='off'"):
        trainer(tmp_path, PCConfig(sweeps=3, dropout="off"), neftune_noise_alpha=5.0)


@pytest.mark.parametrize("cls", [PCTrainer, BackpropTrainer])
def test_a_flag_of_fused_losses_is_no_input(tmp_path: Path, cls: Any) -> None:
    """With use_liger_kernel a Trainer asks for no logits in evaluation; the output energy is computed from them."""
    run = trainer(tmp_path, RELAXING if cls is PCTrainer else None, cls)
    batch = {name: torch.tensor([row[name] for row in rows(2)]) for name in ("input_ids", "labels")}
    run.model.eval()
    plain, flagged = (run.compute_loss(run.model, batch | more) for more in ({}, {"skip_logits": True}))
    assert torch.equal(plain, flagged)


def test_progress_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bar, users' own beside it, and a line for each evaluation."""

    class Own(ProgressCallback):
        pass

    run = trainer(tmp_path, callbacks=[Own()], disable_tqdm=False, eval_strategy="steps", eval_steps=2)
    kinds = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert [kind for kind in kinds if kind in ("Own", "ProgressCallback", "PCProgressCallback")] == [
        "Own", "PCProgressCallback",
    ]  # fmt: skip
    run.remove_callback(Own)
    run.train()
    assert capsys.readouterr().out.count("'eval_perplexity'") == 2


def test_what_is_found_offline_is_looked_up_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`local_files_only` reaches every file that is read."""
    PCModel(make("gpt2"), RELAXING).save_pretrained(tmp_path)
    from transformers.utils import hub

    asked: dict[str, Any] = {}
    real = hub.cached_file

    def noted(path: Any, name: str, **kw: Any) -> Any:
        asked[name] = kw.get("local_files_only")
        return real(path, name, **kw)

    for module in (hub, json_files):
        monkeypatch.setattr(module, "cached_file", noted)
    PCModel.from_pretrained(tmp_path, local_files_only=True)
    assert {asked[name] for name in ("pc_config.json", "pc_state.json", "config.json")} == {True}


def test_a_push_from_save_pretrained_is_refused(tmp_path: Path) -> None:
    """It would be without the two files of a PCModel; nothing is written."""
    with pytest.raises(ValueError, match=r"push_to_hub=True is not allowed: PCModel\.push_to_hub"):
        PCModel(make("gpt2"), RELAXING).save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


def test_push_to_hub_takes_its_arguments_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of `Trainer.push_to_hub`."""
    seen = []
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **kwargs: seen.append(kwargs))
    trainer(tmp_path, hub_model_id="me/it").push_to_hub("words", False, "a token", "branch")
    assert seen == [{"commit_message": "words", "blocking": False, "token": "a token", "revision": "branch"}]


def test_positions_that_padding_takes() -> None:
    """RoBERTa's positions count on from its padding's: so many fewer tokens fit, and no more."""
    model = RobertaForMaskedLM(
        RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=34)
    )  # fmt: skip
    assert positions(model) == 32
    model(input_ids=torch.full((1, 32), 5))
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=torch.full((1, 33), 5))


def test_a_resumed_run_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    """Of a run's folder and its last checkpoint what was written last; a checkpoint left over from before is not."""
    for folder, step, written in ((tmp_path, 2, 1_000), (tmp_path / "checkpoint-4", 4, 2_000)):
        folder.mkdir(exist_ok=True)
        state = folder / "trainer_state.json"
        state.write_text(json.dumps({"global_step": step, "log_history": [{"step": step, "loss": 1.0}]}))
        os.utime(state, (written, written))
    assert history(tmp_path)[-1]["step"] == 4
    os.utime(tmp_path / "trainer_state.json", (3_000, 3_000))
    assert history(tmp_path)[-1]["step"] == 2


def test_a_regime_of_nothing() -> None:
    """No step has no regime."""
    with pytest.raises(ValueError, match="at least one step"):
        Regime()._compute([], [])


def test_the_launchers_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflows of a gradient are its scaler's matter, whoever chose fp16; with `every_sweep` it is refused."""
    run = trainer(tmp_path, nonfinite_patience=1)
    monkeypatch.setattr(run.accelerator, "scaler", object())
    guard = next(c for c in run.callback_handler.callbacks if isinstance(c, NonFiniteGuard))
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), float("nan"))
    guard.on_pre_optimizer_step(run.args, run.state, run.control, model=torch.nn.ParameterList([parameter]))
    assert guard.in_a_row == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="no fp16"):
        refuse(PCTrainingArguments(str(tmp_path), use_cpu=True), MOVING, None)


def test_an_optimizer_is_told_of_training_before_states_relax(tmp_path: Path) -> None:
    """One that keeps averaged weights for evaluation puts back the others, as in a Trainer's own step."""
    told: list[str] = []

    class Averaged(torch.optim.SGD):
        def train(self) -> None:
            told.append("train")

        def eval(self) -> None:
            told.append("eval")

    model = make("gpt2")
    run = trainer(tmp_path, model=model, optimizers=(Averaged(model.parameters(), lr=0.1), None), max_steps=1)
    model.register_forward_pre_hook(lambda *args: told.append("pass") if model.training else None)
    run.train()
    assert "pass" in told
    assert told[told.index("pass") - 1] == "train"


def test_a_trial_that_diverges_ends_alone(tmp_path: Path) -> None:
    """In a search of hyperparameters a run whose free energy stays non-finite ends, and the next one begins."""
    run = trainer(tmp_path, callbacks=[Poison({0, 1, 2, 3, 4, 5})], max_steps=6)
    run.hp_search_backend = "optuna"
    assert run.train().global_step == 3
    assert bool(torch.tensor(run.evaluate()["eval_loss"]).isfinite())


def test_trackers_take_the_names_of_shared_modules(tmp_path: Path) -> None:
    """A block that runs several times has a name for each run, of the characters that MLflow allows."""
    config = AlbertConfig(
        vocab_size=50, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    run = trainer(tmp_path, model=AlbertForMaskedLM(config), max_steps=1)
    run.train()
    energies = [name for entry in run.state.log_history for name in entry if name.startswith("energy/")]
    assert sum("albert_layers.0" in name for name in energies) == 3
    assert all(re.fullmatch(r"[/\w.\- ]*", name) for name in energies)
    assert not any(other.startswith(f"{name}/") for name in energies for other in energies)  # a file in a file


def test_operations_are_those_of_all_sweeps(tmp_path: Path) -> None:
    """total_flos is what a Trainer counts for its passes, times what a step costs over backprop's."""
    counted = []
    for config, cls in ((None, BackpropTrainer), (PCConfig(sweeps=4), PCTrainer)):
        run = trainer(tmp_path, config, cls, max_steps=1)
        run.train()
        counted.append(run.state.total_flos)
    assert counted[1] / counted[0] == pytest.approx(3)


@pytest.mark.parametrize("optim", ["adalomo", "galore_adamw_layerwise"])
@pytest.mark.parametrize("settings", [{"learning": "balanced"}, {"solver": "state"}])
def test_optimizers_that_step_in_the_backward_pass(tmp_path: Path, optim: str, settings: dict[str, Any]) -> None:
    """A gradient that comes in parts would be followed part by part."""
    args = PCTrainingArguments(str(tmp_path), use_cpu=True, optim=optim)
    with pytest.raises(ValueError, match=f"optim='{optim}' is not allowed, as it steps in the backward pass; solver="):
        refuse(args, PCConfig(**settings), None)
    refuse(args, PCConfig(), None)


def test_logs_that_are_no_training_logs_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluations under any name, the user's own logs and the summary at the end; of training logs the bar alone."""
    run = trainer(tmp_path, max_steps=2, disable_tqdm=False)

    class Logs(TrainerCallback):
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            run.evaluate(rows(4), metric_key_prefix="other")
            run.log({"mine": 3.0})

    run.add_callback(Logs())
    run.train()
    said = capsys.readouterr().out
    assert all(name in said for name in ("other_loss", "'mine'", "train_runtime"))
    assert "grad_norm" not in said


class Endless(IterableDataset[dict[str, Any]]):
    """Rows without end."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.cycle(rows())


def test_data_whose_length_cannot_be_asked_for(tmp_path: Path) -> None:
    """Two data sets without a length, added up, have one that raises."""
    run = trainer(tmp_path, max_steps=2, train_dataset=Endless() + Endless())
    run.train()
    assert run.state.global_step == 2


def test_an_input_that_a_batch_has_none_of_is_no_missing_sequence(tmp_path: Path) -> None:
    """As images of a batch of text alone; it is by its labels that a batch is known to be empty."""
    check_first_batch({"labels": torch.zeros(2, 3), "pixel_values": torch.zeros(0, 3, 4, 4)})
    with pytest.raises(ValueError, match="the first batch has no sequence"):
        check_first_batch({"labels": torch.zeros(0, 3)})


def classifier() -> BertForSequenceClassification:
    """Of three classes."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes))


def classes() -> list[dict[str, Any]]:
    return [{"input_ids": [i, i + 1, 3], "labels": i % 3} for i in range(8)]


@pytest.mark.parametrize("cls", [PCTrainer, BackpropTrainer])
def test_a_model_that_returns_tuples(tmp_path: Path, cls: Any) -> None:
    """It trains, is compared with its own loss and is evaluated as one that returns dictionaries."""
    ended = []
    for told in (True, False):
        model = classifier()
        model.config.return_dict = told
        run = trainer(tmp_path, RELAXING if cls is PCTrainer else None, cls, model=model, train_dataset=classes())
        run.train()
        assert run._compared
        ended.append(run.evaluate(classes())["eval_loss"])
    assert ended[0] == pytest.approx(ended[1], rel=1e-6)


@pytest.mark.parametrize("cls", [PCTrainer, BackpropTrainer])
def test_arguments_of_a_step_and_of_an_evaluation_by_name_and_by_place(tmp_path: Path, cls: Any) -> None:
    """A subclass that overrides both for both sides of a comparison calls them as transformers does."""

    class Own(cls):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            return super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)

    run = trainer(tmp_path, RELAXING if cls is PCTrainer else None, Own)
    run.train()
    found = run.evaluation_loop(run.get_eval_dataloader(), "here", None, None, "there").metrics
    assert {"there_loss", "there_perplexity"} <= set(found)
    assert not any(name.startswith("eval_") for name in found)


def test_class_labels_in_a_column(tmp_path: Path) -> None:
    """[batch, 1], as rows of lists of one label are put together, is what [batch] is."""
    found = []
    for column in (False, True):
        data = [{**row, "labels": [row["labels"]] if column else row["labels"]} for row in classes()]
        run = trainer(tmp_path, model=classifier(), train_dataset=data)
        run.train()
        found.append(run.evaluate(data)["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("filtered", [True, False])
def test_sequences_without_a_finite_loss_in_evaluation(tmp_path: Path, filtered: bool) -> None:
    """`logging_nan_inf_filter` leaves them out of eval_loss, as transformers does; without it they are seen."""
    run = trainer(tmp_path, logging_nan_inf_filter=filtered)
    expected = run.evaluate(rows(10)[1:])["eval_loss"]
    plain, first = run._output_energy, rows(1)[0]["input_ids"]

    def broken(model: Any, inputs: Any) -> Any:
        energy, outputs = plain(model, inputs)
        wrong = (inputs["input_ids"] == torch.tensor(first)).all(1)
        return torch.where(wrong, torch.nan, energy), outputs

    run._output_energy = broken
    found = run.evaluate(rows(10))["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-6) if filtered else math.isnan(found)


def test_trainers_that_take_something_else_first(tmp_path: Path) -> None:
    """What is given by name reaches the Trainer by name."""

    class First(Trainer):
        def __init__(self, sampler: str, *rest: Any, **kwargs: Any) -> None:
            super().__init__(*rest, **kwargs)
            self.sampler = sampler

    class Named(Trainer):
        def __init__(self, *, sampler: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.sampler = sampler

    args = PCTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    for kind in (First, Named):
        run = type("Own", (PCTrainerMixin, kind), {})(model=make("gpt2"), args=args, sampler="mine")
        assert (run.sampler, run.args) == ("mine", args)


@pytest.mark.parametrize("sweeps", [1, 3])
def test_a_training_step_with_a_loss_of_its_own(tmp_path: Path, sweeps: int) -> None:
    """One that never asks for the output energy would learn something else: that is said in the first step."""

    class Own(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return torch.as_tensor(loss.detach())

    config = PCConfig(sweeps=sweeps, relative_std=0.3, tolerance=0.01 if sweeps > 1 else 0.0)
    run = trainer(tmp_path, config, type("Mine", (PCTrainerMixin, Own), {}))
    with pytest.raises(ValueError, match="the training_step of Mine computes a loss of its own"):
        run.train()


def test_a_mean_over_one_batch_is_not_added_up_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes average their gradients: only a loss that is divided by the tokens of all of them is added up."""
    run = trainer(tmp_path, None, BackpropTrainer)
    ids = torch.tensor([row["input_ids"] for row in rows(4)])
    inputs = {"input_ids": ids, "labels": ids}
    tokens = torch.tensor(ids[:, 1:].numel())
    run.model.train()
    alone = run.compute_loss(run.model, inputs).item()
    monkeypatch.setattr(type(run.accelerator), "num_processes", property(lambda self: 2))
    assert run.compute_loss(run.model, inputs).item() == pytest.approx(alone)
    assert run.compute_loss(run.model, inputs, num_items_in_batch=tokens).item() == pytest.approx(2 * alone)


@pytest.mark.parametrize("averages", [True, False])
def test_hooks_that_average_what_replicas_hold(averages: bool) -> None:
    """transformers puts them on weights that a model sharded while it was loaded has whole on each process: to average
    parts of a gradient one by one is no harm, as it is to step along them."""
    model = make("gpt2")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: None)
        parameter._replicated_grad_hook_registered = averages
    pc = PCModel(model, PCConfig(learning="balanced", relative_std=0.3))
    ids = torch.tensor([row["input_ids"] for row in rows(2)])
    with nullcontext() if averages else pytest.raises(ValueError, match="runs once its gradient is accumulated"):
        pc.accumulate_grad(input_ids=ids, labels=ids)


def test_data_to_evaluate_on_is_compared_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows, of each set by its name, and the settings that say what each process learns and when it evaluates."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr("hf_pc.refusals.same_everywhere", seen.update)
    args = PCTrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.25)
    check_processes(args, PCConfig(), rows(6), {"a": rows(4), "b": Endless()})
    assert seen["rows of train_dataset"] == 6
    assert seen["rows of eval_dataset"] == {"a": 4, "b": None}
    assert seen["args.learning_rate"] == 0.25
    check_processes(args, PCConfig(), rows(6), rows(3))
    assert seen["rows of eval_dataset"] == {"": 3}
