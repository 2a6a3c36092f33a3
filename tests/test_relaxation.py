"""`hf_pc.relaxation`: which runs of a node are which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_invariants import batch, make
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, ReformerConfig, ReformerModelWithLMHead, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_pc import PCConfig, PCModel, RelaxationOutput


class Again(nn.Module):
    """A block that runs twice in the first pass, and so many times more in each that follows."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.inner, self.more, self.passes = nn.Linear(4, 4), more, 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        for _ in range(2 + (self.more if self.passes else 0)):
            x = x + self.inner(x).tanh()
        self.passes += 1
        return SequenceClassifierOutput(logits=x)


@pytest.mark.parametrize("more", [1, 2])
def test_one_run_more_than_at_rest_is_refused(more: int) -> None:
    """A node that fires more often in a later pass, be it once, has no site to fire at: that is said."""
    set_seed(0)
    pc = PCModel(Again(more), PCConfig(nodes="inner", relative_std=0.5, sweeps=3))
    with pytest.raises(RuntimeError, match=r"node 'inner' ran more often than in the first pass .*\(2 times\)"):
        pc.relax(x=torch.randn(5, 4), labels=torch.arange(5) % 4)


def reformer(positions: int) -> ReformerModelWithLMHead:
    sizes: dict[str, Any] = {"hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2}
    config = ReformerConfig(
        vocab_size=50, feed_forward_size=16, attn_layers=["local", "local"], local_attn_chunk_length=4,
        axial_pos_embds=False, max_position_embeddings=positions, is_decoder=True, **sizes,
    )  # fmt: skip
    return ReformerModelWithLMHead(config)


def test_nodes_that_no_signal_can_come_to_are_refused() -> None:
    """Reversible layers run without a graph, and again in the backward pass: states in them could never relax."""
    model = reformer(16)
    ids = torch.randint(0, 50, (2, 8))
    pc = PCModel(model, PCConfig(sweeps=3, relative_std=0.2))
    with pytest.raises(ValueError, match=r"no signal came to any node of Reformer.* as in the reversible layers"):
        pc.relax(input_ids=ids, labels=ids)
    pc.detach()
    around = PCModel(model, PCConfig(nodes="reformer.encoder", sweeps=3, relative_std=0.2))
    with torch.no_grad():  # in which relax() is allowed
        assert around.relax(input_ids=ids, labels=ids).relaxed_fraction > 0


def test_nodes_that_the_logits_do_not_follow_from_are_refused() -> None:
    """They would leave learning to backprop without a word; beside nodes that logits follow from they do no harm."""
    model = make("gpt2")
    aside = model.aside = nn.Linear(32, 32)
    model.transformer.wte.register_forward_hook(lambda module, args, output: (aside(output), None)[1])

    def learned(**settings: Any) -> RelaxationOutput:
        pc = PCModel(model, PCConfig(relative_std=0.2, **settings))
        try:
            return pc.accumulate_grad(**batch())
        finally:
            pc.detach()

    with pytest.raises(ValueError, match="no signal came to any node of GPT2LMHeadModel: its logits do not follow"):
        learned(nodes="aside", sweeps=3)
    assert learned(nodes="aside", sweeps=1).relaxed_fraction == 0
    assert learned(nodes=["aside", "transformer.h.1"], sweeps=3).relaxed_fraction > 0


def test_parts_without_a_graph_do_no_harm_beside_others() -> None:
    """A forward that makes a first guess without one, and a lower part that runs without one, relax above it."""

    class Recycling(GPT2LMHeadModel):
        def forward(self, input_ids: Any, **inputs: Any) -> Any:
            with torch.no_grad():
                guess = super().forward(input_ids, **inputs)["logits"].argmax(-1)
            return super().forward(torch.where(input_ids == 0, guess, input_ids), **inputs)

    whole = PCModel(Recycling(make("gpt2").config).eval(), PCConfig(sweeps=3, relative_std=0.2))
    assert whole.accumulate_grad(**batch()).relaxed_fraction > 0
    model = make("gpt2")
    first = model.transformer.h[0]
    first.forward = torch.no_grad()(first.forward)
    assert PCModel(model, PCConfig(sweeps=3, relative_std=0.2)).accumulate_grad(**batch()).relaxed_fraction > 0
