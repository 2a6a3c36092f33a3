"""`hf_pc.relaxation`: which runs of a node are which, and where a batch is padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ReformerConfig, ReformerModelWithLMHead, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_pc import PCConfig, PCModel
from hf_pc.energies import ENERGIES
from hf_pc.node import Node, Site, Strength
from hf_pc.relaxation import Relaxation


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


@pytest.mark.parametrize(
    ("shape", "logits", "masked"),
    [((2, 4, 3), False, True), ((2, 4), False, False), ((2, 5, 3), False, False), ((2, 4, 3, 5), False, False),
     ((8, 3), False, False), ((2, 3, 4, 6), True, True), ((2, 3, 4, 6), False, False), ((2, 4, 3, 5), True, False)],
)  # fmt: skip
def test_padding_is_found_in_states_of_its_own_shape(shape: tuple[int, ...], logits: bool, masked: bool) -> None:
    """[batch, sequence, width], and logits of attention, [batch, heads, queries, keys]; no other states hold any."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    strength = Strength(1.0, 1.0, {})
    relaxation = Relaxation(2, mask.sum(), strength, lambda relaxation, site, mu: mu)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    site = Site(Node("n", nn.Identity(), ENERGIES["gaussian"](), in_nats=logits), "n", values, strength, 2)
    for given, holds in ((torch.ones(2, 4), False), (mask[:, None, None], False), (None, False), (mask, masked)):
        relaxation.note_padding(given)
        expected = values.clone()
        if holds:
            expected[1, ..., 2:, :] = 0
        assert torch.equal(relaxation.without_padding(site, values), expected)


def test_nodes_that_no_signal_can_come_to_are_refused() -> None:
    """Reversible layers run without a graph, and again in the backward pass: states in them could never relax."""
    config = ReformerConfig(
        vocab_size=50, hidden_size=16, attention_head_size=8, num_attention_heads=2, feed_forward_size=16,
        attn_layers=["local", "local"], local_attn_chunk_length=4, axial_pos_embds=False, max_position_embeddings=16,
        is_decoder=True,
    )  # fmt: skip
    model = ReformerModelWithLMHead(config)
    ids = torch.randint(0, 50, (2, 8))
    pc = PCModel(model, PCConfig(sweeps=3, relative_std=0.2))
    with pytest.raises(ValueError, match="ran where no gradient is recorded, as in the reversible layers of Reformer"):
        pc.relax(input_ids=ids, labels=ids)
    pc.detach()
    around = PCModel(model, PCConfig(nodes="reformer.encoder", sweeps=3, relative_std=0.2))
    with torch.no_grad():  # in which relax() is allowed
        assert around.relax(input_ids=ids, labels=ids).relaxed_fraction > 0
