"""PCModel: stopping early, fixed steps, saving, pushing, what it says of wrong uses."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_invariants import batch, make
from test_reuse import albert
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_pc import PCConfig, PCModel
from hf_pc.architecture import base_model
from hf_pc.auto_classes import loaded_by


@pytest.mark.parametrize("step_size", ["auto", 0.9])
def test_tolerance_stops_early(step_size: Any) -> None:
    """Relaxation ends once every sequence's residual is under the tolerance, and not at its feedforward start."""
    pc = PCModel(make("gpt2"), PCConfig(sweeps=50, relative_std=1.0, tolerance=0.01, step_size=step_size))
    out = pc.relax(**batch())
    assert 2 < out.sweeps < 15
    assert out.residual < 0.01


def test_a_sequence_does_not_feel_its_batch() -> None:
    """Errors of a sequence are the same alone and among others, early stop and automatic step included."""
    pc = PCModel(make("gpt2").double(), PCConfig(sweeps=20, relative_std=2.0, tolerance=0.01))
    for _ in range(2):  # in the first step, and with what it has left behind
        together = pc.relax(**batch())
        alone = pc.relax(**{name: value[1:2] for name, value in batch().items()})
        for name, error in alone.errors.items():
            assert torch.allclose(together.errors[name][1:2], error, atol=1e-10)
        pc.accumulate_grad(**batch())
        pc.steer()


def test_from_pretrained_restores_the_nodes(tmp_path: Path) -> None:
    """save_pretrained and from_pretrained keep weights, settings and nodes; without the file it fails."""
    pc = PCModel(make("gpt2"), PCConfig(nodes="linear", relative_std=0.3))
    pc.save_pretrained(tmp_path)
    loaded = PCModel.from_pretrained(tmp_path)
    assert loaded.config == pc.config
    assert [node.name for node in loaded.nodes] == [node.name for node in pc.nodes]
    assert loaded.relax(**batch()).free_energy == pytest.approx(pc.relax(**batch()).free_energy, rel=1e-6)
    (tmp_path / "pc_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"pc_config\.json"):
        PCModel.from_pretrained(tmp_path)


def test_from_pretrained_builds_the_class_that_was_saved(tmp_path: Path) -> None:
    """A masked language model comes back as one; where a configuration does not tell, it is a causal one."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    PCModel(BertForMaskedLM(BertConfig(vocab_size=50, intermediate_size=32, **sizes))).save_pretrained(tmp_path)
    loaded = PCModel.from_pretrained(tmp_path)
    assert type(loaded.model) is BertForMaskedLM
    assert not loaded.output.shifted
    kind = AutoModelForTokenClassification
    assert type(PCModel.from_pretrained(tmp_path, auto_class=kind).model) is BertForTokenClassification
    found = json.loads((tmp_path / "config.json").read_text())
    for names in (None, "Bert", 3, ["BertModel"], ["RoFormerModel"], ["FunnelBaseModel"], ["GPT2LMHeadModel"]):
        assert loaded_by(found | {"architectures": names}) is AutoModelForCausalLM
    for names in (["MyBert"], ["AutoModelForMaskedLM"], ["GPT2Config"]):
        with pytest.raises(ValueError, match=f"config.json names '{names[0]}', which transformers does not have"):
            loaded_by(found | {"architectures": names})
    for auto in (AutoModelForCausalLM, AutoModelForTokenClassification):
        code = {"AutoConfig": "own.Config", "AutoModelForNothing": "own.Other", auto.__name__: "own.Model"}
        assert loaded_by({"architectures": ["Own"], "auto_map": code}) is AutoModelForCausalLM
    assert loaded_by({"auto_map": {"AutoModelForTokenClassification": "own.M"}}) is AutoModelForTokenClassification
    assert loaded_by(None) is AutoModelForCausalLM
    with pytest.raises(ValueError, match="output_loading_info=True is not allowed"):
        PCModel.from_pretrained(tmp_path, output_loading_info=True)


@pytest.mark.parametrize("task", [None, "TOKEN_CLS"])
def test_an_adapter_is_loaded_into_what_it_was_made_for(tmp_path: Path, task: str | None) -> None:
    """Its task says the class of its base model, or that model's own configuration does."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind = BertForMaskedLM if task is None else BertForTokenClassification
    kind(BertConfig(vocab_size=50, intermediate_size=32, **sizes)).save_pretrained(tmp_path / "base")
    base = kind.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type=task, target_modules=["query"], init_lora_weights=False)
    pc = PCModel(get_peft_model(base, config), PCConfig(sweeps=2, relative_std=0.2))
    pc.save_pretrained(tmp_path / "adapter")
    loaded = PCModel.from_pretrained(tmp_path / "adapter")
    assert type(base_model(loaded.model)) is kind
    assert [node.name for node in loaded.nodes] == [node.name for node in pc.nodes]
    assert [n for n, p in loaded.model.named_parameters() if p.requires_grad] == [
        n for n, p in pc.model.named_parameters() if p.requires_grad
    ]  # fmt: skip
    ids = torch.arange(8)[None]
    for model in (pc.model, loaded.model):
        model.eval()
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, pc.model(input_ids=ids).logits)


def test_push_uploads_model_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """push_to_hub creates the repository and uploads weights, config.json, pc_config.json and card in one commit."""
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id: str, name: str, revision: str | None) -> bool:
            return False

        def upload_folder(self, folder_path: str, **kwargs: Any) -> str:
            seen.update(kwargs, files={path.name for path in Path(folder_path).iterdir()})
            return "commit"

    monkeypatch.setattr("hf_pc.hub.HfApi", Api)
    assert PCModel(make("gpt2"), PCConfig()).push_to_hub("user/model", token="t") == "commit"
    assert seen["repo_id"] == "user/model"
    assert seen["token"] == "t"
    assert {"model.safetensors", "config.json", "pc_config.json", "README.md"} <= seen["files"]


def test_attached_models_are_noticed_by_their_parts() -> None:
    """Part of an attached model is attached; a PCModel that nobody holds any more lets its model go."""
    model = make("gpt2")
    pc = PCModel(model, PCConfig())
    with pytest.raises(ValueError, match="has PC nodes already"):
        PCModel(model.transformer, PCConfig())
    del pc
    gc.collect()
    PCModel(model, PCConfig()).detach()


def test_nodes_are_put_on_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of them fails the model is as it was; a PCModel that is gone takes its nodes along, copies or not."""
    model = make("gpt2")
    pc = PCModel(model, PCConfig())
    pc.detach()
    monkeypatch.setattr(pc.nodes[1], "attach", lambda visit: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pc.attach()
    assert not any(module._forward_hooks for module in model.modules())
    monkeypatch.undo()
    pc.attach()
    copied = copy.copy(pc)
    del pc
    gc.collect()
    with pytest.raises(RuntimeError, match="detached"):
        copied.relax(**batch())
    PCModel(model, PCConfig()).detach()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [("transformer.h", "never called"), ("lm_head_, nothing", "nearest"), ("transformer.wte", None)],
)
def test_nodes_that_never_run(nodes: str, message: str | None) -> None:
    """A list of modules is no node: the error says so before any pass."""
    if message is None:
        assert PCModel(make("gpt2"), PCConfig(nodes=nodes)).nodes
        return
    with pytest.raises(ValueError, match=message):
        PCModel(make("gpt2"), PCConfig(nodes=nodes))


def test_presets_combine_and_expressions_keep_their_commas() -> None:
    """Several presets and patterns may be given; a comma inside a regular expression does not part them."""
    both = PCModel(make("gpt2"), PCConfig(nodes="block,linear"))
    assert len(both.nodes) == 3 * (1 + 4)
    both.detach()
    assert len(PCModel(make("gpt2"), PCConfig(nodes=r"transformer\.h\.\d{1,2}")).nodes) == 3


def test_wrong_uses_are_named() -> None:
    """detach() while relaxing, learning_pass outside, a compiled model, no label tokens: errors that say so."""
    model, inputs = make("gpt2"), batch()
    pc = PCModel(model, PCConfig())
    with pytest.raises(RuntimeError, match="afterwards"), pc.relaxed(inputs):
        pc.detach()
    with pytest.raises(RuntimeError, match="inside"):
        pc.learning_pass(inputs)
    with pytest.raises(ValueError, match="num_items_in_batch=0"):
        pc.accumulate_grad(**inputs, num_items_in_batch=0)
    pc.detach()
    with pytest.raises(ValueError, match="compiled"):
        PCModel(torch.compile(model, backend="eager"), PCConfig())
    quantised = torch.ao.quantization.quantize_dynamic(make("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"module '.*' has quantised weights"):
        PCModel(quantised, PCConfig())
    assert not any(module._forward_hooks for module in quantised.modules())
    eighths = make("llama")
    eighths.lm_head.weight.data = eighths.lm_head.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"module 'lm_head' has quantised weights .*torch\.float8_e4m3fn"):
        PCModel(eighths, PCConfig())
    loaded = make("llama")
    for dequantize in (False, True):
        method = SimpleNamespace(dequantize=dequantize)
        loaded.hf_quantizer = SimpleNamespace(quantization_config=method)
        with nullcontext() if dequantize else pytest.raises(ValueError, match="was loaded with quantised weights"):
            PCModel(loaded, PCConfig()).detach()
    integers = make("gpt2")
    del integers.transformer.h[1].mlp.c_fc.weight
    integers.transformer.h[1].mlp.c_fc.weight = torch.nn.Parameter(torch.ones(32, 128).to(torch.int8), False)
    with pytest.raises(ValueError, match=r"'transformer\.h\.1\.mlp\.c_fc' has quantised weights .*torch\.int8"):
        PCModel(integers, PCConfig())


def test_plain_inputs_work() -> None:
    """Under no_grad, with int32 labels and with return_dict=False a batch relaxes as ever."""
    pc, inputs = PCModel(make("gpt2"), PCConfig(relative_std=0.3)), batch()
    expected = pc.relax(**inputs).free_energy
    with torch.no_grad():
        found = pc.relax(**{**inputs, "labels": inputs["labels"].int()}, return_dict=False)
    assert found.free_energy == expected
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        pc.relax(**inputs)
    assert pc.relax(**inputs).free_energy == expected


def test_sequences_without_labels_are_left_out_of_the_residual() -> None:
    """A row that nothing is asked of has no residual: the mean is over the others, 1 before errors move."""
    inputs = batch()
    inputs["labels"][1:] = -100
    assert PCModel(make("gpt2"), PCConfig(sweeps=1)).accumulate_grad(**inputs).residual == pytest.approx(1.0)


def test_saving_keeps_what_steering_learned(tmp_path: Path) -> None:
    """relative_std comes back with the checkpoint, learned variances too."""
    pc = PCModel(make("gpt2"), PCConfig(energy="learned_variance", relative_std=0.3))
    for _ in range(3):
        pc.accumulate_grad(**batch())
        pc.steer()
    pc.save_pretrained(tmp_path)
    assert PCModel.from_pretrained(tmp_path).state_dict() | {"energies": 0} == pc.state_dict() | {"energies": 0}
    assert pc.state_dict()["energies"]


class Odd(nn.Module):
    """A model with one module that computes what it is told to."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(4, 4), nn.Identity()
        self.part.forward = change  # type: ignore[method-assign]

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        found = self.part(self.first(inputs))
        return {"logits": found if isinstance(found, Tensor) else found["x"]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: {"x": x}, TypeError, r"node 'part' \(Identity\) returns dict, which holds no tensor first"),
        (lambda x: x[:2], ValueError, r"node 'part' has an output of shape \(2, 4\), whose first dimension is no"),
    ],
)
def test_what_no_node_can_be(change: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    """A module that returns no tensor, or does not keep sequences apart, is named."""
    pc = PCModel(Odd(change), PCConfig(nodes="part", output="gaussian"))
    with pytest.raises(error, match=message):
        pc.relax(inputs=torch.zeros(3, 4), labels=torch.zeros(3, 4))
    pc.detach()


class Beside(nn.Module):
    """Two layers, and one that fires last and has no way to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.pooler = nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        x = self.layers[1](self.layers[0](x).tanh())
        return SequenceClassifierOutput(logits=x, hidden_states=(self.pooler(x),))


@pytest.mark.parametrize("solver", ["error", "state"])
def test_the_top_node_is_the_one_that_the_output_follows(solver: str) -> None:
    """A node behind it that feeds no output is none to steer by; errors that start at zero stay so there, while a
    state lags behind its prediction, and holds back those below a little."""
    found = []
    for nodes in ("layers.0,layers.1", "layers.0,layers.1,pooler"):
        set_seed(0)
        model = Beside().double()
        pc = PCModel(model, PCConfig(nodes=nodes, relaxed_fraction=0.1, solver=solver, sweeps=6))
        for _ in range(20):
            out = pc.accumulate_grad(x=torch.randn(6, 8).double(), labels=torch.arange(6))
            pc.steer()
        found.append((out.relaxed_fraction, out.signal_bias, pc.relative_std))
    assert found[0][0] > 0.05
    assert found[1] == pytest.approx(found[0], rel=1e-12 if solver == "error" else 0.2)


def test_a_node_that_runs_later_alone_is_named() -> None:
    """A module that the first pass of a step left out cannot be a node of the next."""
    calls: list[int] = []

    class Sometimes(Beside):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
            calls.append(0)
            return SequenceClassifierOutput(logits=self.layers[0](self.pooler(x) if len(calls) > 1 else x))

    pc = PCModel(Sometimes(), PCConfig(nodes="layers.0,pooler", relative_std=0.5))
    with pytest.raises(RuntimeError, match=r"node 'pooler' ran more often than in the first pass .*\(0 times\)"):
        pc.relax(x=torch.randn(6, 8), labels=torch.arange(6))


def test_every_run_of_a_module_is_reported() -> None:
    """States have the names of their errors: of ALBERT's one block three."""
    report = PCModel(albert(), PCConfig(relative_std=0.5)).relax(**batch())
    assert list(report.states) == list(report.errors) == list(report.displacement)
    assert len(report.states) == 3
    assert isinstance(report.sweeps, int)


def test_the_loss_of_a_forward_pass_takes_what_relaxing_takes() -> None:
    """`backprop_loss` sets what `relax` sets: a tuple is not asked for, and no cache."""
    pc = PCModel(make("gpt2"))
    given = pc.backprop_loss({**batch(), "return_dict": False})
    assert float(given) == pytest.approx(pc.relax(**batch()).feedforward_energy, rel=1e-6)


def test_passes_agree_on_shapes() -> None:
    """A module that computes another shape in a later sweep is an error that names it."""
    lengths = iter([4, 3])
    pc = PCModel(Odd(lambda x: x[:, : next(lengths)]), PCConfig(nodes="part", output="gaussian"))
    with pytest.raises(RuntimeError, match=r"node 'part' computed shape \(3, 3\) after \(3, 4\) in the same step"):
        pc.relax(inputs=torch.zeros(3, 4), labels=torch.zeros(3, 4))
    pc.detach()


def test_a_node_that_never_runs_is_named() -> None:
    """A pass that no node took part in has nothing to relax: an error that names them."""
    model = Odd(lambda x: x)
    model.unused = nn.Linear(4, 4)  # type: ignore[assignment]
    pc = PCModel(model, PCConfig(nodes="unused", output="gaussian"))
    with pytest.raises(ValueError, match="none of the nodes ran in a pass over Odd: 'unused'"):
        pc.relax(inputs=torch.zeros(3, 4), labels=torch.zeros(3, 4))
    pc.detach()


def test_a_model_without_blocks_is_asked_for_patterns() -> None:
    """The presets look for transformer blocks; where there are none the error says what to give instead."""
    with pytest.raises(ValueError, match="nodes='block' finds no transformer block in Odd: give patterns"):
        PCModel(Odd(lambda x: x), PCConfig(output="gaussian"))


def test_the_logits_are_gone_while_weights_learn() -> None:
    """The largest tensor of a language model is let go before the backward pass of the learning sweep."""
    model = make("gpt2")
    logits: list[weakref.ref[Tensor]] = []
    kept: list[bool] = []
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(weakref.ref(output)))
    model.transformer.h[0].ln_1.weight.register_hook(lambda gradient: kept.append(logits[-1]() is not None))
    PCModel(model, PCConfig(sweeps=3, relative_std=0.5)).accumulate_grad(**batch())
    assert kept == [False]


def test_what_was_measured_is_sent_alone() -> None:
    """Each figure has storage of its own: another process is sent no more than the number."""
    inputs = batch()
    pc = PCModel(make("gpt2"), PCConfig(sweeps=3, relative_std=0.5))
    with pc.relaxed(inputs) as relaxation:
        pc.learning_pass(inputs)[0].backward()
        sums = pc.observe(relaxation)
    assert {value.untyped_storage().nbytes() for value in sums.values()} == {8}


@pytest.mark.parametrize("attached", [True, False])
def test_copies_are_plain_models(tmp_path: Path, attached: bool) -> None:
    """A copy or a pickle of the model, made while nodes are on it, has none: an average of weights, say."""
    pc = PCModel(make("gpt2"), PCConfig(relative_std=0.5))
    copied = copy.deepcopy(pc.model)
    torch.save(pc.model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    if not attached:
        pc.detach()
    pc_logits = pc.model(batch()["input_ids"]).logits
    for other in (copied, loaded, copy.deepcopy(copied)):
        assert torch.equal(other(batch()["input_ids"]).logits, pc_logits)
        again = PCModel(other, PCConfig(relative_std=0.5))
        assert len(again.relax(**batch()).errors) == 3
        again.detach()
    if attached:
        assert len(pc.relax(**batch()).errors) == 3
