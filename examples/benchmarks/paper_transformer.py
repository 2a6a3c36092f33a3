"""The transformer experiment of arXiv 2211.03481: one block, width 128, sequences of 32, 8001 BPE tokens.

    python examples/benchmarks/paper_transformer.py --train_file text.txt --seeds 3

Prints one JSON line per method and seed, and one with mean and spread per method. Nodes are the paper's (preset
"linear" and the attention logits). Each method takes the learning rate, of the same few, that does best on validation
text with seed 0. Perplexity is that of a plain forward pass over held-out text. Published: backprop 162.6, KL energies
175.9, Gaussian energies 590.1.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_pc import PCConfig, PCModel
from hf_pc.output import Output
from hf_pc.relaxation import regime

VOCABULARY = 8001


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", type=Path, required=True, help="a text, UTF-8; its last tenth is held out")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--sequence", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--sweeps", type=int, default=4)
    parser.add_argument("--relaxed_fraction", type=float, default=0.05)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="some of them; default: all")
    args = parser.parse_args(argv)
    if not args.train_file.is_file():
        parser.error(f"--train_file {args.train_file}: there is no such file")
    return args


def methods(args: argparse.Namespace) -> dict[str, PCConfig | None]:
    """Backprop; KL and Gaussian attention logits, steered to one regime and at the paper's precision of 1."""
    common: dict[str, Any] = {"nodes": "linear", "sweeps": args.sweeps}
    steered = common | {"relaxed_fraction": args.relaxed_fraction}
    paper = common | {"precision": 1.0}
    return {
        "backprop": None,
        "pc_kl": PCConfig(attention_energy="categorical", **steered),
        "pc_gaussian": PCConfig(attention_energy="gaussian", **steered),
        "pc_kl_precision_1": PCConfig(attention_energy="categorical", **paper),
        "pc_gaussian_precision_1": PCConfig(attention_energy="gaussian", **paper),
    }


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of training, validation and test text, [sequences, length]; the tokenizer saw the first alone."""
    text = args.train_file.read_text(encoding="utf-8")
    cuts = int(0.9 * len(text)), int(0.95 * len(text))
    parts = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([parts[0]], vocab_size=args.vocabulary, show_progress=False)
    ids = [torch.tensor(bpe.encode(part).ids) for part in parts]
    rows = [part[: len(part) // args.sequence * args.sequence].view(-1, args.sequence) for part in ids]
    if not all(len(part) for part in rows):
        raise ValueError(f"--train_file {args.train_file} is too short: a tenth of it must fill a sequence")
    return rows[0], rows[1], rows[2]


def build(args: argparse.Namespace, seed: int) -> GPT2LMHeadModel:
    set_seed(seed)
    config = GPT2Config(
        vocab_size=args.vocabulary, n_positions=args.sequence, n_embd=args.hidden, n_layer=args.layers, n_head=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def sample(rows: Tensor, args: argparse.Namespace, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        ids = rows[torch.randint(0, len(rows), (args.batch,), generator=generator)]
        yield {"input_ids": ids, "labels": ids}


@torch.no_grad()
def loss_of(model: GPT2LMHeadModel, rows: Tensor) -> float:
    """Nats per token of a plain forward pass."""
    model.eval()
    output = Output.of(model)
    nats = tokens = 0.0
    for ids in rows.split(64):
        batch, labels = output.split({"input_ids": ids, "labels": ids})
        nats += output.energy(model(**batch).logits, labels).sum().item()
        tokens += output.count(labels).item()
    return nats / tokens


def train(
    model: GPT2LMHeadModel, config: PCConfig | None, rows: Tensor, args: argparse.Namespace, seed: int, rate: float,
    title: str,
) -> dict[str, Any]:  # fmt: skip
    """AdamW with warm-up and a cosine schedule, the same for every method; the regime PC learned in."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=args.steps, pct_start=0.1)
    pc = PCModel(model, config) if config else None
    output = Output.of(model)
    facts: list[tuple[float, float, float]] = []
    model.train()
    for batch in tqdm(sample(rows, args, seed), total=args.steps, desc=title, leave=False):
        optimizer.zero_grad()
        if pc is not None:
            found = pc.accumulate_grad(**batch)
            pc.steer()
            facts.append((found.relaxed_fraction, found.residual, found.refused))
        else:
            inputs, labels = output.split(batch)
            (output.energy(model(**inputs).logits, labels).sum() / output.count(labels)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if pc is None:
        return {}
    pc.detach()
    fraction, residual, refused = (statistics.fmean(values) for values in zip(*facts, strict=True))
    return {"relaxed_fraction": fraction, "residual": residual, "refused": refused,
            "regime": regime(fraction, residual)}  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    chosen = methods(args)
    for name in args.methods or []:
        if name not in chosen:
            raise ValueError(f"--methods {name} is unknown; allowed: {', '.join(chosen)}")
    rows, validation, test = load(args)
    setting = {n: getattr(args, n) for n in ("steps", "batch", "layers", "hidden", "sequence", "vocabulary", "sweeps")}
    setting["machine"] = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    lines: list[dict[str, Any]] = []
    for name in args.methods or chosen:
        tried: dict[float, tuple[float, dict[str, Any], GPT2LMHeadModel]] = {}
        for rate in args.learning_rates:
            model = build(args, 0)
            facts = train(model, chosen[name], rows, args, 0, rate, f"{name} at {rate:g}")
            tried[rate] = (loss_of(model, validation), facts, model)
        rate = min(tried, key=lambda r: tried[r][0] if math.isfinite(tried[r][0]) else math.inf)
        perplexities = []
        for seed in range(args.seeds):
            if seed == 0:
                _, facts, model = tried[rate]
            else:
                model = build(args, seed)
                facts = train(model, chosen[name], rows, args, seed, rate, f"{name}, seed {seed}")
            perplexities.append(math.exp(min(700.0, loss_of(model, test))))
            line = {"method": name, "seed": seed, "learning_rate": rate, "test_perplexity": perplexities[-1], **facts}
            print(json.dumps(line), flush=True)
        spread = statistics.stdev(perplexities) if args.seeds > 1 else None
        tuned = {f"{r:g}": round(tried[r][0], 4) for r in tried}
        lines.append({"method": name, "mean": statistics.fmean(perplexities), "spread": spread,
                      "validation_loss_by_rate": tuned, **facts, **setting})  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
