"""Small networks with different activations on digits: backprop, PC with Gaussian energies, PC with KL energies.

    python examples/toy_pc.py --seeds 3

The first experiment of arXiv 2211.03481: Gaussian energies do well where activations are Gaussian enough; where a
layer is a distribution (a softmax inside the network), its energy must be that distribution's divergence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from small import digits, over_seeds, plain, regime_of, report, shown
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_pc import NodeSpec, PCConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}
#: the distribution whose parameter each activation turns into a mean
DIVERGENCES = {
    "relu": "learned_variance",
    "tanh": "learned_variance",
    "sigmoid": "bernoulli",
    "softmax": "categorical",
}


@dataclass
class Arguments:
    output_dir: str = field(default="runs/toy", metadata={"help": "Where table and figure go."})
    steps: int = field(default=400, metadata={"help": "Optimiser steps."})
    seeds: int = field(default=3, metadata={"help": "Initial weights and batches to average over."})
    sweeps: int = field(default=10, metadata={"help": "Passes per step."})
    precision: float = field(default=1.0, metadata={"help": "Of every node; the paper's is 1."})
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "sweeps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1 is needed")


class MLP(nn.Module):
    """64 pixels, two hidden layers of 4 groups of 16, ten classes; a softmax is one over each group."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.first, self.second = (nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (4, 16))) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        hidden = self.activation(self.first(pixels)).flatten(1)
        hidden = self.activation(self.second(hidden)).flatten(1)
        return {"logits": self.head(hidden)}


def methods(activation: str, args: Arguments) -> dict[str, PCConfig | None]:
    """Backprop, PC with Gaussian energies, and PC with the divergence that fits the activation."""
    common = {"sweeps": args.sweeps, "precision": args.precision}
    nodes = [NodeSpec("first"), NodeSpec("second")]
    return {
        "backprop": None,
        "PC, Gaussian": PCConfig(nodes=nodes, energy="gaussian", **common),  # type: ignore[arg-type]
        "PC, KL": PCConfig(nodes=nodes, energy=DIVERGENCES[activation], **common),  # type: ignore[arg-type]
    }


def plot(path: Path, results: dict[str, dict[str, dict[str, float]]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    names = list(next(iter(results.values())))
    for i, name in enumerate(names):
        at = [j + (i - 1) * 0.25 for j in range(len(results))]
        accuracy = [100 * found[name]["accuracy"] for found in results.values()]
        spread = [100 * found[name].get("accuracy_spread", 0.0) for found in results.values()]
        axes.bar(at, accuracy, 0.25, yerr=spread, label=name, capsize=3)
    axes.set(xticks=range(len(results)), xticklabels=list(results), ylabel="test accuracy, %", ylim=(0, 105))
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    pixels, labels, test_pixels, test_labels = digits()

    def measure(model: nn.Module) -> dict[str, float]:
        logits = model(test_pixels)["logits"]
        loss = nn.functional.cross_entropy(logits, test_labels)
        return {"accuracy": float((logits.argmax(1) == test_labels).double().mean()), "test_loss": float(loss)}

    results: dict[str, dict[str, dict[str, float]]] = {}
    rows = []
    for activation in ACTIVATIONS:
        results[activation] = {}
        for name, config in methods(activation, args).items():
            found = over_seeds(
                lambda activation=activation: MLP(activation), config, {"pixels": pixels, "labels": labels}, measure,
                seeds=args.seeds, steps=args.steps, learning_rate=args.learning_rate, output="categorical",
                title=f"{activation}, {name}",
            )  # fmt: skip
            results[activation][name] = plain(found)
            accuracy, loss = shown(found, "accuracy"), shown(found, "test_loss")
            rows.append((activation, name, accuracy, loss, regime_of(found)))
    folder = Path(args.output_dir)
    columns = ("activation", "method", "test accuracy", "test loss, nats", "relaxed_fraction, residual, regime")
    report(folder, "Networks on digits", columns, rows, results)
    plot(folder / "toy.png", results)
    return results


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
