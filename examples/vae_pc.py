"""A variational autoencoder on digits, learned by backprop, and by PC with Gaussian and with Laplace energies.

    python examples/vae_pc.py --seeds 3

The second experiment of arXiv 2211.03481. The latent is Gaussian with a node on its mean and one on its log variance,
the output is Bernoulli, and the latent's divergence from its prior N(0, 1) is part of the free energy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from small import digits, over_seeds, plain, regime_of, report, shown
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_pc import NodeSpec, PCConfig
from hf_pc.output import BernoulliOutput


@dataclass
class Arguments:
    output_dir: str = field(default="runs/vae", metadata={"help": "Where table and figures go."})
    steps: int = field(default=600, metadata={"help": "Optimiser steps."})
    seeds: int = field(default=3, metadata={"help": "Initial weights and batches to average over."})
    sweeps: int = field(default=6, metadata={"help": "Passes per step."})
    relaxed_fraction: float = field(default=0.1, metadata={"help": "Share of the output error that relaxes."})
    latent: int = field(default=8, metadata={"help": "Width of the latent."})
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "sweeps", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1 is needed")


class VAE(nn.Module):
    """Pixels [batch, 64] to logits of the same shape, and the latent's divergence from its prior, nats, [batch]."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 128)
        self.mean, self.log_variance = nn.Linear(128, latent), nn.Linear(128, latent)
        self.decoder = nn.Linear(latent, 128)
        self.head = nn.Linear(128, 64)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.encoder(pixels))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden).clamp(-8, 8)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        return {"logits": self.decode(mean + (0.5 * log_variance).exp() * noise), "energy": divergence}

    def decode(self, latent: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.decoder(latent)))
        return logits


def measure(model: nn.Module, pixels: Tensor) -> dict[str, float]:
    """Nats per image: reconstruction from the latent's mean, and the bound with 8 samples of the latent."""
    output = BernoulliOutput()
    reconstruction = output.energy(model(pixels)["logits"], pixels).mean()
    model.train()
    torch.manual_seed(0)
    bound = torch.stack([output.total(model(pixels), pixels).mean() for _ in range(8)]).mean()
    model.eval()
    return {"reconstruction": float(reconstruction), "negative_elbo": float(bound)}


def save_images(folder: Path, models: dict[str, Any], pixels: Tensor, latent: int) -> None:
    """inputs.png: inputs and every method's reconstructions side by side; samples.png: draws from the prior."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    noise = torch.randn(10, latent, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rebuilt = {name: torch.sigmoid(model(pixels[:10])["logits"]) for name, model in models.items()}
        samples = {name: torch.sigmoid(model.decode(noise)) for name, model in models.items()}
    for file, rows in (("reconstructions.png", {"input": pixels[:10]} | rebuilt), ("samples.png", samples)):
        figure, axes = plt.subplots(len(rows), 10, figsize=(10, 1.1 * len(rows)), layout="constrained", squeeze=False)
        for line, (name, images) in zip(axes, rows.items(), strict=True):
            for axis, image in zip(line, images, strict=True):
                axis.imshow(image.view(8, 8).numpy(), cmap="gray", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        figure.savefig(folder / file, dpi=120)
        plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    pixels, _, test_pixels, _ = digits()
    nodes = [NodeSpec(name) for name in ("encoder", "mean", "log_variance", "decoder")]
    common: dict[str, Any] = {"nodes": nodes, "sweeps": args.sweeps, "output": "bernoulli"}
    common["relaxed_fraction"] = args.relaxed_fraction
    methods = {
        "backprop": None,
        "PC, Gaussian": PCConfig(energy="gaussian", **common),
        "PC, Laplace": PCConfig(energy="laplace", **common),
    }
    found = {
        name: over_seeds(
            lambda: VAE(args.latent), config, {"pixels": pixels, "labels": pixels},
            lambda model: measure(model, test_pixels), seeds=args.seeds, steps=args.steps,
            learning_rate=args.learning_rate, output="bernoulli", title=name,
        )
        for name, config in methods.items()
    }  # fmt: skip
    results = {name: plain(facts) for name, facts in found.items()}
    rows = [
        (name, shown(facts, "reconstruction", ".2f"), shown(facts, "negative_elbo", ".2f"), regime_of(facts))
        for name, facts in found.items()
    ]
    folder = Path(args.output_dir)
    columns = ("method", "reconstruction, nats", "-ELBO, nats", "relaxed_fraction, residual, regime")
    report(folder, "A variational autoencoder on digits: nats per test image", columns, rows, results)
    save_images(folder, {name: facts["model"] for name, facts in found.items()}, test_pixels, args.latent)
    return results


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
