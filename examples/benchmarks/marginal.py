"""What each way to learn comes near: backprop's gradient, or that of the model's marginal likelihood.

    python examples/benchmarks/marginal.py --train_file text.txt --relaxed_fractions 0.1 0.3 0.5

A PC model is a generative one: its states are its predictions plus Gaussian errors, and the likelihood of labels is
the mean over errors of what the output says, p(y) = E_e exp(-L(e)). Its gradient is estimated by importance sampling
around the equilibrium, on a GPT-2 so small that this is exact to the printed "sampling_error"; backprop's is the
gradient of L(0). Prints one JSON line per target of relaxed_fraction and rule of `hf_pc.learning`, and for the solver
langevin at the relative_std of the same target: distances of the mean gradient to both, over the norm of backprop's;
their cosines; the noise, the root mean square over small batches of what a gradient differs from that mean, over the
norm of the mean; the regime; and the three losses, L(0), -log p(y) and F, nats per token. The mean of wake_sleep and
langevin is over several draws for each batch, their noise that of single draws.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from gradient_bias import by_backprop, gradient_of, learn, steered_to
from language import Batch, arguments
from options import positive
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel

from hf_pc import PCConfig, PCModel
from hf_pc.learning import RULES

DEFAULTS = {"steps": 1000, "batch": 8, "layers": 2, "hidden": 16, "heads": 2, "sequence": 8, "sweeps": 30}
#: what is random: its mean is taken over several draws
DRAWN = ("wake_sleep", "langevin")


def _added(error: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + error


@contextmanager
def with_errors(model: GPT2LMHeadModel, errors: list[Tensor]) -> Iterator[None]:
    """Each block's output, plus its error."""
    with ExitStack() as hooks:
        for block, error in zip(model.transformer.h, errors, strict=True):
            add = partial(_added, error)
            hooks.callback(block.register_forward_hook(add).remove)
        yield


def likelihood(
    model: GPT2LMHeadModel, pc: PCModel, batch: Batch, samples: int, generator: torch.Generator
) -> tuple[Tensor, float, float]:
    """Of a batch: the gradient of -log p(y), nats per token; -log p(y) itself; F at the equilibrium.

    Errors are drawn around those of the equilibrium, with the spread that the model gives them.
    """
    found = pc.relax(**batch)
    labels = batch["labels"][:, 1:]
    marginal = 0.0
    for row, ids in enumerate(batch["input_ids"]):
        errors, weight = [], torch.zeros(samples, dtype=torch.float64)
        for error, precision in zip(found.errors.values(), precisions(pc), strict=True):
            middle = error[row].double()
            spread = torch.randn(samples, *middle.shape, generator=generator, dtype=torch.float64) / precision.sqrt()
            errors.append(middle + spread)
            weight -= precision * ((spread * middle).sum((1, 2)) + middle.square().sum() / 2)
        with with_errors(model, errors):
            logits = model(input_ids=ids.expand(samples, -1)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[row].expand(samples, -1), reduction="none"
        ).sum(1)
        weight -= loss.detach()
        marginal -= float(weight.logsumexp(0)) - math.log(samples)
        (weight.softmax(0) * loss).sum().div(labels.numel()).backward()  # type: ignore[no-untyped-call]
    return gradient_of(model), marginal / labels.numel(), found.free_energy


def config_of(method: str, strength: dict[str, float], args: argparse.Namespace) -> PCConfig:
    """The configuration of a method at a `precision` or a `relative_std`."""
    if method == "langevin":
        return PCConfig(solver="langevin", sweeps=args.langevin_sweeps, **strength)  # type: ignore[arg-type]
    return PCConfig(learning=method, sweeps=args.sweeps, **strength)  # type: ignore[arg-type]


def precisions(pc: PCModel) -> list[Tensor]:
    """1 / sigma^2 of each node: given, or as its activity in the batches that the model was steered on makes it."""
    if pc.config.precision is not None:
        return [torch.tensor(pc.config.precision, dtype=torch.float64) for _ in pc.nodes]
    activity = pc.steering.activity
    return [torch.tensor((pc.relative_std * activity[node.name]) ** -2, dtype=torch.float64) for node in pc.nodes]


def cosine(first: Tensor, second: Tensor) -> float:
    return float(first @ second / (first.norm() * second.norm()))


def compared(mean: Tensor, gradients: list[Tensor], backprop: Tensor, marginal: Tensor) -> dict[str, float]:
    """A rule's mean gradient beside the two, over the norm of backprop's, and its noise, over its own."""
    unit = backprop.norm()
    noise = torch.stack([(gradient - mean).norm() for gradient in gradients]).square().mean().sqrt() / mean.norm()
    return {
        "to_backprop": float((mean - backprop).norm() / unit), "to_marginal": float((mean - marginal).norm() / unit),
        "cosine_to_backprop": cosine(mean, backprop), "cosine_to_marginal": cosine(mean, marginal),
        "norm": float(mean.norm() / unit), "noise": float(noise),
    }  # fmt: skip


def measure(
    model: GPT2LMHeadModel, target: float, args: argparse.Namespace, batches: list[Batch]
) -> list[dict[str, Any]]:
    """The lines of one target of relaxed_fraction."""
    steered = steered_to(target, model, PCConfig(sweeps=args.sweeps), batches)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {"backprop": [], "marginal": []}
    losses: dict[str, list[float]] = {"mean_pass": [], "marginal": [], "free_energy": []}
    halves: list[Tensor] = []
    steered.attach()
    for batch in tqdm(batches, desc=f"likelihood at {target:g}", leave=False):
        loss = steered.backprop_loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        found["backprop"].append(gradient_of(model))
        first, second = (likelihood(model, steered, batch, args.samples, generator) for _ in range(2))
        found["marginal"].append((first[0] + second[0]) / 2)
        halves.append((first[0] - second[0]) / 2)
        for name, value in zip(losses, (loss.item(), (first[1] + second[1]) / 2, first[2]), strict=True):
            losses[name].append(value)
    steered.detach()
    common: dict[str, Any] = {"target": target, "sequences": len(batches) * args.batch, "seed": 0, "draws": args.draws}
    common["machine"] = f"{platform.machine()} cpu, torch {torch.__version__}"
    common["losses"] = {name: statistics.fmean(values) for name, values in losses.items()}
    lines = []
    regimes: dict[str, dict[str, float]] = {}
    for method in args.methods:
        torch.manual_seed(0)  # of what is drawn
        pc = PCModel(model, config_of(method, {"relative_std": steered.relative_std}, args))
        pc.load_state_dict(steered.state_dict())
        draws = args.draws if method in DRAWN else 1
        repeated = [batch for batch in batches for _ in range(draws)]
        found[method], regimes[method] = learn(pc, tqdm(repeated, desc=f"{method} at {target:g}", leave=False))
        pc.detach()
    means = {name: torch.stack(gradients).mean(0) for name, gradients in found.items()}
    sampling = float(torch.stack(halves).mean(0).norm() / means["backprop"].norm())
    for name, gradients in found.items():
        facts = compared(means[name], gradients, means["backprop"], means["marginal"])
        lines.append({"gradient": name, **facts, **regimes.get(name, {}), "sampling_error": sampling, **common})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, **DEFAULTS)
    parser.add_argument("--learning_rate", type=float, default=6e-3)
    parser.add_argument("--relaxed_fractions", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*RULES, "langevin"],
        default=["plain", "centred", "one_sided", "wake_sleep", "langevin"],
    )
    parser.add_argument("--langevin_sweeps", type=positive, default=4)
    parser.add_argument("--batches", type=positive, default=8)
    parser.add_argument("--samples", type=positive, default=2048, help="of the errors, twice, for each sequence")
    parser.add_argument("--draws", type=positive, default=16, help="of labels for wake_sleep, of errors for langevin")
    args = parser.parse_args(argv)
    for target in args.relaxed_fractions:
        PCConfig(relaxed_fraction=target)  # what it refuses is refused before the model is trained
    model, batches = by_backprop(args, torch.float64)
    return [line for target in args.relaxed_fractions for line in measure(model, target, args, batches)]


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
