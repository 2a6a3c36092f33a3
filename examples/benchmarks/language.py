"""What the language benchmarks share: windows of text, training by PC or backprop, tuning, seeds, JSON lines."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from machine import processor
from options import natural, positive
from report import picture, show
from scipy import stats
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm
from trainings import kept
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import hf_pc
from hf_pc import PCConfig, PCModel, RelaxationOutput
from hf_pc.compilation import compile_parts
from hf_pc.measurements import regime
from hf_pc.output import Output
from hf_pc.placement import resolve
from hf_pc.recorder import WARM

#: what is reported of a training, the mean over its steps
REGIME = ("relaxed_fraction", "residual", "signal_bias", "refused", "sweeps")
#: arguments that one training's outcome does not depend on, but through its PCConfig, its text, its seed and rate
ELSEWHERE = frozenset((
    "train_file", "output_dir", "methods", "seeds", "first_seed", "learning_rates", "relaxed_fractions",
    "relative_stds", "sweeps", "state_sweeps", "strengths", "bias_limit", "anderson_depth", "tolerance", "cuda_graph",
))  # fmt: skip
Batch = dict[str, Tensor]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Text:
    """Token ids of training, validation and test text, each a stream; the number of different tokens."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


def fingerprint(text: Text) -> str:
    """The same for the same text and the same code, of hf_pc, of the benchmarks and of transformers."""
    parts: list[Any] = [text.train.numpy(), text.validation.numpy()]
    parts.append(f"{len(text.train)}, {text.vocabulary}, transformers {transformers.__version__}".encode())
    for folder in (Path(hf_pc.__file__).parent, Path(__file__).parent):
        parts += [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of what a language benchmark takes: of these options those that it has a default for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", type=Path, required=True, help="a text, UTF-8; its last tenth is held out")
    for name in ("steps", "batch", "layers", "hidden", "heads", "sequence", "sweeps", "seeds"):
        if name in defaults:
            parser.add_argument(f"--{name}", type=positive, default=defaults[name])
    if "seeds" in defaults:
        parser.add_argument("--first_seed", type=natural, default=0, help="the seeds count on from it")
    if "learning_rates" in defaults:
        parser.add_argument("--learning_rates", type=float, nargs="+", default=defaults["learning_rates"])
    if "methods" in defaults:
        parser.add_argument("--methods", nargs="+", default=defaults["methods"], help="some of them; default: all")
    if "compile" in defaults:
        parser.add_argument("--compile", action="store_true", help="compile the blocks, for PC and for backprop")
    if "cuda_graph" in defaults:
        parser.add_argument("--cuda_graph", action="store_true", help="record steps of PC as CUDA graphs")
    if "output_dir" in defaults:
        parser.add_argument(
            "--output_dir", type=Path, default=defaults["output_dir"], help="for table, figure and what is trained"
        )
    return parser


def split(args: argparse.Namespace) -> tuple[str, str, str]:
    """The first 90% of the text to train on, 5% to choose by, 5% to report."""
    if not args.train_file.is_file():
        raise ValueError(f"--train_file {args.train_file}: there is no such file")
    text = args.train_file.read_text(encoding="utf-8")
    first, second = int(0.9 * len(text)), int(0.95 * len(text))
    return text[:first], text[first:second], text[second:]


def gpt2(args: argparse.Namespace, vocabulary: int, seed: int, device: torch.device) -> GPT2LMHeadModel:
    set_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=args.sequence, n_embd=args.hidden, n_layer=args.layers, n_head=args.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(device)


def windows(stream: Tensor, length: int, batch: int, steps: int, seed: int) -> Iterator[Batch]:
    """Random windows of a stream, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(stream) - length + 1, (batch, 1), generator=generator)
        ids = stream[starts + torch.arange(length)]
        yield {"input_ids": ids, "labels": ids}


@torch.no_grad()
def loss_of(model: GPT2LMHeadModel, stream: Tensor, length: int) -> float:
    """Nats per token of a plain forward pass over a stream cut into sequences."""
    model.eval()
    output = Output.of(model)
    nats = tokens = 0.0
    rows = stream[: len(stream) // length * length].view(-1, length)
    if not len(rows):
        raise ValueError(f"the held-out text has {len(stream)} tokens, fewer than --sequence {length}")
    for ids in rows.split(64):
        ids = ids.to(model.device)
        batch, labels = output.split({"input_ids": ids, "labels": ids})
        nats += output.energy(model(**batch).logits, labels).sum().item()
        tokens += output.count(labels).item()
    return nats / tokens


def moved(model: GPT2LMHeadModel, optimizer: Optimizer) -> None:
    """A step of the optimizer, on clipped gradients, which it leaves at zero."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def gradient(
    model: GPT2LMHeadModel, pc: PCModel | None, batch: Batch, optimizer: Optimizer, output: Output
) -> tuple[RelaxationOutput | None, float]:
    """Fill every weight's `.grad` by PC or by backprop on `output`; PC's report, and the loss of a plain forward pass.

    Incremental PC moves the weights before that, in each relaxing sweep.
    """
    batch = {name: ids.to(model.device) for name, ids in batch.items()}

    def step(loss: Tensor) -> None:
        loss.backward()
        moved(model, optimizer)

    if pc is not None:
        found = pc.accumulate_grad(**batch, weight_step=step if pc.config.weight_update == "every_sweep" else None)
        pc.steer()
        return found, found.feedforward_energy
    inputs, labels = output.split(batch)
    loss = output.energy(model(**inputs).logits, labels).sum() / output.count(labels)
    loss.backward()
    return None, loss.item()


@contextmanager
def compiled(model: GPT2LMHeadModel, wanted: bool) -> Iterator[Output]:
    """Inside, training runs the blocks as `torch.compile` makes them, as `PCConfig(compile=True)` does for PC, and the
    output's energy."""
    output = Output.of(model)
    undo = compile_parts(resolve(model, PCConfig()), output, lambda: model.training) if wanted else lambda: None
    try:
        yield output
    finally:
        undo()


def drawn(text: Text, args: argparse.Namespace, seed: int) -> Iterator[Batch]:
    """What most benchmarks train on: random windows of the training text."""
    return windows(text.train, args.sequence, args.batch, args.steps, seed)


def train(
    model: GPT2LMHeadModel, config: PCConfig | None, batches: Iterator[Batch], steps: int, rate: float, title: str,
    compiles: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """AdamW with warm-up and a cosine schedule, the same for every method; the regime PC learned in, and
    how far it relaxed and each node moved, in units of its activity, in the first batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = 0.1 if steps > 10 else 0.37  # a warm-up of one step exactly divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warm_up)
    pc = PCModel(model, config) if config else None
    facts: list[tuple[float, ...]] = []
    first: dict[str, Any] = {}
    losses: list[float] = []
    model.train()
    with compiled(model, compiles and pc is None) as output:
        for batch in tqdm(batches, total=steps, desc=title, leave=False):
            found, loss = gradient(model, pc, batch, optimizer, output)
            losses.append(loss)
            if found is not None:
                first = first or {"relaxed_fraction": found.relaxed_fraction, "displacement": found.displacement}
                facts.append(tuple(getattr(found, name) for name in REGIME))
            moved(model, optimizer)
            schedule.step()
    if pc is None:
        return {"losses": losses}
    pc.detach()
    means = {name: statistics.fmean(values) for name, values in zip(REGIME, zip(*facts, strict=True), strict=True)}
    return means | {
        "regime": regime(means["relaxed_fraction"], means["residual"]), "first_batch": first, "losses": losses
    }  # fmt: skip


def step_ratio(model: GPT2LMHeadModel, config: PCConfig, text: Text, args: argparse.Namespace, pairs: int) -> float:
    """Time of a PC step over a backprop step, clipping and AdamW included; the median of interleaved pairs."""
    ratios = []
    model.train()
    other = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.0) for one in (model, other)]  # they stay as they are
    pc = PCModel(model, config)
    with compiled(other, config.compile) as output:
        for batch in windows(text.train, args.sequence, args.batch, pairs + WARM + 1, 0):
            seconds = []
            for learner, chosen, optimizer in zip((model, other), (pc, None), optimizers, strict=True):
                began = time.perf_counter()
                gradient(learner, chosen, batch, optimizer, output)
                moved(learner, optimizer)
                if learner.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[0] / seconds[1])
    pc.detach()
    return statistics.median(ratios[WARM + 1 :])


def changed(config: PCConfig) -> dict[str, Any]:
    """The fields that are not the default's."""
    default = PCConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != default[name]}


def _mean(regimes: list[dict[str, Any]]) -> dict[str, Any]:
    """The regime over all seeds; nothing of backprop."""
    means = {
        name: statistics.fmean(facts[name] for facts in regimes) for name, value in regimes[0].items()
        if isinstance(value, float)
    }  # fmt: skip
    return means | {"regime": regime(means["relaxed_fraction"], means["residual"])} if means else {}


def chosen(methods: dict[str, PCConfig | None], names: list[str] | None) -> dict[str, PCConfig | None]:
    """The methods of these names, backprop first; all without names. Raises ValueError on an unknown one."""
    for name in names or []:
        if name not in methods:
            raise ValueError(f"--methods {name} is unknown; allowed: {', '.join(methods)}")
    return {name: config for name, config in methods.items() if name in (names or methods)}


def tuned(
    run: Callable[[int, float], Found], loss: Callable[[Found], float], args: argparse.Namespace
) -> tuple[float, dict[float, float], Iterator[Found]]:
    """The best of `args.learning_rates` with the first seed, the loss of each, and what the best finds with all seeds.

    Args:
        run: trains with a seed and a rate, one after another as the seeds are asked for.
        loss: what to choose by; infinite where it is no number.
    """
    tried = {rate: run(args.first_seed, rate) for rate in args.learning_rates}
    losses = {rate: loss(found) for rate, found in tried.items()}
    losses = {rate: value if math.isfinite(value) else math.inf for rate, value in losses.items()}
    best = min(losses, key=lambda rate: losses[rate])
    others = range(args.first_seed + 1, args.first_seed + args.seeds)
    return best, losses, chain([tried[best]], (run(seed, best) for seed in others))


def gap(losses: list[float], backprop: list[float]) -> dict[str, Any] | None:
    """Nats per token over backprop with the same seeds: the mean, and Student's 95% interval of it."""
    gaps = [mine - its for mine, its in zip(losses, backprop, strict=True)]
    if len(gaps) < 2 or losses == backprop:
        return None
    half = stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    middle = statistics.fmean(gaps)
    return {"nats": middle, "interval": [middle - half, middle + half]}


def compare(
    methods: dict[str, PCConfig | None], text: Text, args: argparse.Namespace, pairs: int = 10,
    batches: Callable[[Text, argparse.Namespace, int], Iterator[Batch]] = drawn,
) -> list[dict[str, Any]]:  # fmt: skip
    """Tune each method's learning rate on validation text at the first seed, train with every seed, print JSON lines.

    Trainings are kept in `args.output_dir`: broken off and started again, a benchmark goes on where it was.

    Returns:
        One line per method: mean and spread of the test perplexity, the gap to backprop with the same seeds, the
        regime, the time of a step over backprop's.

    Args:
        batches: what to train on, given text, arguments and seed.

    Raises:
        ValueError: `args.methods` names a method that there is not.
    """
    methods = chosen(methods, args.methods)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[float]]] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = {n: getattr(args, n) for n in ("steps", "batch", "layers", "hidden", "heads", "sequence")}
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    setting["machine"] = f"{processor(device)}, torch {torch.__version__}{threads}"
    same = fingerprint(text)
    lines: list[dict[str, Any]] = []
    baseline: list[float] = []

    def trained(name: str, seed: int, rate: float) -> tuple[GPT2LMHeadModel, dict[str, Any]]:
        model = gpt2(args, text.vocabulary, seed, device)
        given = batches(text, args, seed)
        title = f"{name}, seed {seed}, {rate:g}"
        compiles = getattr(args, "compile", False)
        facts = train(model, methods[name], given, args.steps, rate, title, compiles)
        return model, facts | {"validation_loss": loss_of(model, text.validation, args.sequence)}

    def run(name: str, seed: int, rate: float) -> tuple[GPT2LMHeadModel, dict[str, Any]]:
        config = methods[name]
        depends = {key: value for key, value in vars(args).items() if key not in ELSEWHERE}
        depends |= {"machine": setting["machine"], "text and code": same, "seed": seed, "rate": rate}
        depends["config"] = config.to_dict() if config else None
        folder = args.output_dir / "trainings" / f"{name}, seed {seed}, {rate:g}"
        model, facts = kept(folder, depends, partial(trained, name, seed, rate))
        return model.to(device), facts

    for name in methods:
        rate, losses, found = tuned(partial(run, name), lambda trained: float(trained[1]["validation_loss"]), args)
        perplexities, regimes = [], []
        config = methods[name]
        settings = {"settings": changed(config)} if config else {}
        for seed, (model, facts) in enumerate(found, args.first_seed):
            curves.setdefault(name, []).append(facts.pop("losses"))
            validation = facts.pop("validation_loss")
            regimes.append(facts)
            perplexities.append(math.exp(min(700.0, loss_of(model, text.test, args.sequence))))
            line = {
                "method": name, "seed": seed, "learning_rate": rate, "test_perplexity": perplexities[-1],
                "validation_loss": validation, **facts, **settings, **setting,
            }  # fmt: skip
            print(json.dumps(line), flush=True)
        baseline = perplexities if config is None else baseline
        lines.append({
            "method": name, "mean": statistics.fmean(perplexities),
            "over_backprop": gap([*map(math.log, perplexities)], [*map(math.log, baseline)]) if baseline else None,
            "spread": statistics.stdev(perplexities) if args.seeds > 1 else None, **_mean(regimes),
            "validation_loss_by_rate": {f"{r:g}": round(loss, 4) for r, loss in losses.items()},
            **settings,
            "step_time_ratio": step_ratio(model, config, text, args, pairs) if config else 1.0, **setting,
        })  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    results = "".join(json.dumps(line) + "\n" for line in lines)
    (args.output_dir / "results.jsonl").write_text(results, encoding="utf-8")
    picture(args.output_dir / "learning.png", lines, curves)
    show(lines)
    return lines
