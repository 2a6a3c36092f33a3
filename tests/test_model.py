"""PCModel: stopping early, fixed steps, steering, saving, pushing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_invariants import batch, make

from hf_pc import PCConfig, PCModel
from hf_pc.energies import ENERGIES


def test_gaussian_energy_against_autograd() -> None:
    """In float64 both gradients are autograd's, for one precision and for one per token."""
    energy = ENERGIES["gaussian"]()
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mu = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for precision in (torch.tensor(0.7).double(), torch.rand(3, 4, 1, dtype=torch.float64) + 0.1):
        gaussian = -torch.distributions.Normal(mu, precision.rsqrt().expand_as(mu)).log_prob(x)
        grads = torch.autograd.grad(gaussian.sum(), (x, mu))
        error = (x - mu).detach()
        assert torch.allclose(energy.grad_state(error, None, precision), grads[0])
        assert torch.allclose(energy.grad_prediction(error, None, precision), grads[1])
        expected = 0.5 * (precision * error.square()).sum(-1)
        assert torch.allclose(energy.energy(error, None, precision), expected)


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
    together = pc.relax(**batch())
    alone = pc.relax(**{name: value[1:2] for name, value in batch().items()})
    for name, error in alone.errors.items():
        assert torch.allclose(together.errors[name][1:2], error, atol=1e-10)


def test_steering_needs_a_target() -> None:
    """steer moves relative_std towards a relaxed_fraction target, and leaves a fixed one alone."""
    for config, moves in ((PCConfig(relaxed_fraction=0.2), True), (PCConfig(relative_std=0.2), False)):
        pc = PCModel(make("gpt2"), config)
        pc.accumulate_grad(**batch())
        before = pc.relative_std
        pc.steer()
        assert (pc.relative_std > before) is moves


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


def test_push_uploads_model_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """push_to_hub creates the repository and uploads weights, config.json and pc_config.json in one commit."""
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: str, **kwargs: Any) -> str:
            seen.update(kwargs, files={path.name for path in Path(folder_path).iterdir()})
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert PCModel(make("gpt2"), PCConfig()).push_to_hub("user/model", token="t") == "commit"
    assert seen["repo_id"] == "user/model"
    assert seen["token"] == "t"
    assert {"model.safetensors", "config.json", "pc_config.json"} <= seen["files"]
