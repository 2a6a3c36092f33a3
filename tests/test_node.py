"""The node by itself: its strength, its hook, and the sums that a site keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_invariants import batch, make
from torch import Tensor, nn

from hf_pc import PCConfig, PCModel
from hf_pc.energies import ENERGIES
from hf_pc.node import LossScale, Node, Site, Strength

MU = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))


def node(energy: str = "gaussian", **settings: Any) -> Node:
    return Node("n", nn.Identity(), ENERGIES[energy](), **settings)


def site(mu: Tensor = MU, **settings: Any) -> Site:
    return Site(node(**settings), "n", mu, Strength(2.0, 1.0, {}), batch=6)


@pytest.mark.parametrize("own", [None, 7.0])
@pytest.mark.parametrize("common", [None, 3.0])
@pytest.mark.parametrize("activity", [{}, {"n": 1.5, "n-1": 9.0}], ids=str)
@pytest.mark.parametrize("nats", [False, True])
@pytest.mark.parametrize("label", ["n", "n-1"])
def test_strength(own: float | None, common: float | None, activity: dict[str, float], nats: bool, label: str) -> None:
    """A node's own precision, else that of all, else relative_std: in nats by itself, otherwise in units of the site's
    activity of the step before, or as long as there is none, of each token's."""
    tokens = MU.double().numpy()
    expected = (
        own or common or (0.5**-2 if nats else None)
        or ((0.5 * activity[label]) ** -2 if activity else 1 / (0.25 * (tokens**2).mean(-1, keepdims=True)))
    )  # fmt: skip
    found = Strength(common, 0.5, activity).of(node(precision=own, in_nats=nats), label, MU)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found.dtype == torch.float32
    by_energy = Strength(common, 0.5, activity).of(node("categorical", precision=own), label, MU)
    np.testing.assert_allclose(by_energy.numpy(), own or common or 4.0, rtol=1e-6)


@pytest.mark.parametrize("batch", [6, 3, 2])
def test_sums_and_columns_keep_sequences_apart(batch: int) -> None:
    """Sums are in float64 and of one sequence each, whose rows follow each other; a column is the inverse of that."""
    large = MU * 1e4
    values = large.double().numpy().reshape(batch, -1)
    sums = site().per_sequence(large, batch)
    np.testing.assert_allclose(sums.numpy(), values.sum(1), rtol=1e-12)
    np.testing.assert_allclose(site().norm(large, batch).numpy(), (values**2).sum(1) ** 0.5, rtol=1e-6)
    assert sums.dtype == torch.float64
    assert site().norm(large.bfloat16(), batch).dtype == torch.float32
    column = site().column(sums)
    assert column.shape == (6, 1, 1)
    assert column.dtype == torch.float32
    np.testing.assert_allclose(column.flatten().numpy(), np.repeat(sums.numpy(), 6 // batch), rtol=1e-6)
    assert site().column(sums > 0).dtype == torch.bool
    assert site(MU.double()).column(sums).dtype == torch.float64


def test_a_site_knows_what_its_states_pass_through() -> None:
    """Under autocast that is autocast's dtype, whatever the residual stream is in; otherwise that of the states."""
    assert site().dtype == torch.float32
    assert site(MU.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert site().dtype == torch.float16
    assert site(MU.bfloat16()).error.dtype == torch.float32


def test_a_step_is_the_energys_own() -> None:
    """-dF/dx over the precision, times a rate and the node's factor, which are 1 unless they are given."""
    torch.testing.assert_close(site().step(MU), -MU / 2)
    torch.testing.assert_close(site().step(MU, 0.5), -MU / 4)
    torch.testing.assert_close(site(step_factor=0.3).step(MU), -0.3 * MU / 2)
    by_logits = site(energy="categorical")
    by_logits.prediction = MU
    own = by_logits.node.energy.precondition(MU, MU, torch.tensor(2.0))
    assert not torch.allclose(own, MU / 2)
    torch.testing.assert_close(by_logits.step(MU, 0.5), -0.5 * own)


def test_an_energy_is_shown_what_is_learned() -> None:
    """One with parameters of its own learns from every batch that weights learn from, and from no other."""
    pc = PCModel(make("gpt2"), PCConfig(energy="learned_variance", relative_std=0.3))
    energies: list[Any] = [node.energy for node in pc.nodes]
    pc.relax(**batch())
    pc.steer()
    assert all(energy.log_std.eq(0).all() for energy in energies)
    pc.accumulate_grad(**batch())
    pc.steer()
    assert all(energy.log_std.ne(0).all() for energy in energies)


def test_what_an_energy_cannot_take_is_refused() -> None:
    """A site asks its energy whether it can be that of such predictions."""
    with pytest.raises(ValueError, match="'n'"):
        site(torch.randn(6, 5, 1), energy="categorical")


class Pair(NamedTuple):
    hidden: Tensor
    other: int


class Returns(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, 3), lambda x: [x, 3, None], lambda x: Pair(x, 3)],
    ids=["tensor", "tuple", "list", "named tuple"],
)
def test_the_hook_replaces_what_comes_first(wrap: Any) -> None:
    """The state takes the place of mu in whatever carried it; where nothing relaxes the output is untouched."""
    module = Returns(wrap)
    seen = []
    handle = Node("n", module, ENERGIES["gaussian"]()).attach(lambda n, mu: seen.append(mu) or mu + 1)  # type: ignore[func-returns-value]
    found = module(MU)
    handle.remove()
    first = found if isinstance(found, Tensor) else found[0]
    assert torch.equal(first, MU + 1)
    assert type(found) is type(wrap(MU))
    if not isinstance(found, Tensor):
        assert list(found[1:]) == list(wrap(MU)[1:])
    assert seen[0] is MU
    Node("n", module, ENERGIES["gaussian"]()).attach(lambda n, mu: None)
    again = module(MU)
    assert (again if isinstance(again, Tensor) else again[0]) is MU


@pytest.mark.parametrize("output", [(), [], {}, (3,), None, "text"], ids=str)
def test_a_module_without_a_tensor_is_no_node(output: Any) -> None:
    """What returns no tensor first raises TypeError and is named, with what it returned."""
    module = Returns(lambda x: output)
    Node("layers.3", module, ENERGIES["gaussian"]()).attach(lambda n, mu: mu)
    with pytest.raises(TypeError, match=rf"node 'layers\.3' \(Returns\) returns {type(output).__name__}"):
        module(MU)


def test_loss_scale_is_the_identity_that_notes_the_factor() -> None:
    """What a loss is multiplied by on its way to `backward()` is told, and goes on down."""
    told: list[Tensor] = []
    energy = torch.tensor(3.0, requires_grad=True)
    loss = LossScale.apply(energy, told.append)  # type: ignore[no-untyped-call]
    assert loss == energy
    (2 * loss / 5).backward()
    assert told == [pytest.approx(0.4)]
    assert energy.grad == pytest.approx(0.4)
