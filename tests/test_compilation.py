"""`compile=True`: the modules of nodes compiled, their hooks left as they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from test_invariants import batch, gradients, make, worst

from hf_pc import PCConfig, PCModel
from hf_pc.compilation import compile_parts
from hf_pc.output import CategoricalOutput


@pytest.mark.parametrize("solver", ["error", "state"])
def test_compiled_blocks_learn_the_same(solver: str) -> None:
    """Gradients are those of the model as it is, over several steps; afterwards nothing compiled is left on it."""
    found = []
    for compiled in (False, True):
        model = make("gpt2").double()
        pc = PCModel(model, PCConfig(sweeps=3, relative_std=0.3, solver=solver, compile=compiled))
        assert ("forward" in vars(pc.nodes[0].module)) == compiled
        assert ("energy" in vars(pc.output)) == compiled
        for _ in range(2):
            report = pc.accumulate_grad(**batch())
            pc.steer()
        found.append((gradients(model), report.residual))
        pc.detach()
        assert "forward" not in vars(pc.nodes[0].module)
        assert "energy" not in vars(pc.output)
    assert worst(found[1][0], found[0][0]) < 1e-9
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)


def test_labels_are_checked_before_the_compiled_energy() -> None:
    """What is wrong with labels is the same error as without, and the next batch learns."""
    pc = PCModel(make("gpt2"), PCConfig(compile=True))
    given = batch()
    with pytest.raises(ValueError, match="label 1000000 is out of range"):
        pc.accumulate_grad(**given | {"labels": torch.full_like(given["labels"], 1_000_000)})
    with pytest.raises(ValueError, match="do not fit logits"):
        pc.accumulate_grad(**given | {"labels": given["labels"][:, :4]})
    found = pc.accumulate_grad(**given).free_energy
    pc.detach()
    assert found == pytest.approx(PCModel(pc.model, PCConfig()).accumulate_grad(**given).free_energy, rel=1e-4)


def test_an_output_with_fields_of_its_own_is_compiled() -> None:
    """Outputs are frozen dataclasses; what the compiled energy replaces is back after `detach`."""

    @dataclass(frozen=True)
    class Sharper(CategoricalOutput):
        factor: float = 2.0

        def energy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().energy(self.factor * logits, labels)

    output = Sharper(shifted=True)
    undo = compile_parts([], output, lambda: True)
    logits, labels = torch.randn(2, 3, 4), torch.zeros(2, 3).long()
    found = output.energy(logits, labels)
    undo()
    assert "energy" not in vars(output)
    torch.testing.assert_close(found, CategoricalOutput().energy(2 * logits, labels))


def test_what_cannot_be_compiled_is_named() -> None:
    """A node inside another one's module, and attention logits, would be skipped by compiled code: errors."""
    model = make("gpt2")
    with pytest.raises(ValueError, match=r"node 'transformer\.h\.0\.mlp' lies inside node 'transformer\.h\.0'"):
        PCModel(model, PCConfig(nodes=["block", "transformer.h.0.mlp"], compile=True))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="excludes attention_energy='gaussian'"):
        PCConfig(compile=True, attention_energy="gaussian")


def test_a_compiled_model_generates() -> None:
    """Attached and compiled, it generates what it does without."""
    model = make("gpt2").eval()
    ids = batch()["input_ids"][:1, :4]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    pc = PCModel(model, PCConfig(compile=True))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    pc.detach()


def test_a_copy_of_a_compiled_model_is_its_own() -> None:
    """A deep copy, as for a moving average, computes with its own weights and is not compiled."""
    model = make("gpt2").eval()
    pc = PCModel(model, PCConfig(compile=True))
    copied = copy.deepcopy(model)
    pc.detach()
    with torch.no_grad():
        for parameter in copied.transformer.h.parameters():
            parameter.zero_()
        for parameter in model.transformer.h.parameters():
            parameter.zero_()
    ids = batch()["input_ids"]
    assert torch.equal(copied(ids).logits, model(ids).logits)
