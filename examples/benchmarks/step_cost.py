"""What a step costs: predictive coding with T sweeps over backprop, in time and in peak memory.

    python examples/benchmarks/step_cost.py --model gpt2 --layers 8 --hidden 256 --sequence 128 --batch 8 \\
        --sweeps 1 2 5 --threads 1

Prints one JSON line per T. With --compile also what `compile=True` makes of a step's time, for both kinds of step;
with --cuda_graph also what `cuda_graph=True` does to compiled ones, for both kinds of step;
with --checkpointing also the memory of either kind with activation checkpointing, over that of backprop without. A
step is everything up to the gradient, with --optimizer also AdamW's part, which is the same for both. Time is the
median of interleaved pairs; memory is the own peak of each over the built model, on a CPU in a process of its own.

The limit (2T + 1) / 3 takes a sweep, a forward and a backward pass without the weights' gradients, for two thirds of a
step of backprop. `sweep_ratio` is what such a pass of the plain model takes on this machine, and `over_passes` what a
step of predictive coding costs beyond T - 1 of them and a step of backprop: the part that is its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from machine import processor
from options import positive
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from hf_pc import PCConfig, PCModel
from hf_pc.compilation import compile_parts
from hf_pc.cuda_graph import CudaGraph, Gradients, as_recorded
from hf_pc.measurements import relaxed_fraction
from hf_pc.output import Output
from hf_pc.placement import resolve
from hf_pc.recorder import WARM

BACKPROP, PASS = 0, -1  #: kinds of steps beside those of T sweeps
PLAIN, COMPILED, RECORDED = "", "_compiled", "_recorded"  #: how they are run; recorded ones are compiled as well

SETTING = ("model", "solver", "layers", "hidden", "sequence", "batch", "vocab", "threads", "mixed_precision",
           "optimizer", "seed")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    sizes = {"layers": 8, "hidden": 256, "sequence": 128, "batch": 8, "vocab": 1000, "threads": 1, "runs": 15}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=value)
    parser.add_argument("--solver", default="error", help="a solver; its share of backprop's memory differs")
    parser.add_argument("--sweeps", type=positive, nargs="+", default=[1, 2, 5])
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="as Accelerate has it")
    parser.add_argument("--optimizer", action="store_true", help="a step has AdamW's part too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="also time steps whose blocks are compiled")
    parser.add_argument("--cuda_graph", action="store_true", help="also time compiled steps that are CUDA graphs")
    parser.add_argument("--checkpointing", action="store_true", help="also measure memory with checkpointed blocks")
    parser.add_argument("--checkpointed", action="store_true", help=argparse.SUPPRESS)  # of the step to measure
    parser.add_argument("--measure-memory", type=int, help=argparse.SUPPRESS)  # sweeps of the one step to run; 0: BP
    return parser.parse_args()


def build(args: argparse.Namespace, device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    set_seed(args.seed)
    model: Any
    heads, ends = max(1, args.hidden // 64), {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if args.model == "gpt2":
        config = GPT2Config(
            vocab_size=args.vocab, n_positions=args.sequence, n_embd=args.hidden, n_layer=args.layers, n_head=heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ends,
        )  # fmt: skip
        with device:  # a billion weights are drawn there sooner
            model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=-(-args.hidden * 8 // 3 // 64) * 64,
            num_hidden_layers=args.layers, num_attention_heads=heads, max_position_embeddings=args.sequence, **ends,
        )  # fmt: skip
        with device:
            model = LlamaForCausalLM(config)
    ids = torch.randint(0, args.vocab, (args.batch, args.sequence), device=device)
    return model.to(device).train(), {"input_ids": ids, "labels": ids}


def backprop(model: Any, inputs: dict[str, torch.Tensor], output: Output) -> dict[str, float]:
    batch, labels = output.split(inputs)
    energy = output.energy(model(**batch).logits, labels)
    (energy.sum() / labels.ne(-100).sum()).backward()
    return {}


def frozen_pass(model: Any, inputs: dict[str, torch.Tensor], output: Output) -> dict[str, float]:
    """What no sweep can do without: forward, and back to what comes in, past weights that want no gradient."""
    batch, labels = output.split(inputs)
    vectors = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    energy = output.energy(model(inputs_embeds=vectors).logits, labels)
    torch.autograd.grad(energy.sum(), vectors)
    return {}


def predictive_coding(pc: PCModel, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    with pc.relaxed(inputs) as relaxation:
        loss = pc.learning_pass(inputs)[0]  # without the logits, which backprop has no more at this point
        (loss / relaxation.tokens).backward()
        sums = pc.observe(relaxation)
    pc.steer()
    # no more than these: it is inside what is timed
    return {"relaxed_fraction": relaxed_fraction(sums), "residual": float(sums["residual"] / sums["sequences"])}


def recorded_predictive_coding(pc: PCModel, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    report = pc.accumulate_grad(**inputs)
    pc.steer()
    return {"relaxed_fraction": report.relaxed_fraction, "residual": report.residual}


def recorded(model: Any, run: Callable[[], Any]) -> Callable[[], dict[str, float]]:
    """What `run` does on a GPU as a CUDA graph, whose gradients are handed on as a PCModel hands its own on."""
    for _ in range(2):
        run()
    model.zero_grad()
    weights, gradients, learning = list(model.parameters()), Gradients(), []
    gradients.prepare(weights)

    def recording() -> None:
        run()
        learning[:] = gradients.keep(weights)

    graph = CudaGraph(recording, weights[0].device)

    def step() -> dict[str, float]:
        graph.replay()
        gradients.add(learning)
        return {}

    return step


def stepper(
    model: Any, inputs: dict[str, torch.Tensor], sweeps: int, args: argparse.Namespace, how: str = PLAIN
) -> Callable[[], dict[str, float]]:
    """A step with `sweeps` sweeps, of BACKPROP or PASS, from cleared gradients; the model becomes its own."""
    if args.mixed_precision != "no":
        Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.cuda.is_available()).prepare_model(model)
    compiled = how != PLAIN
    config = None
    if sweeps > 0:
        config = PCConfig(
            relative_std=0.2, sweeps=sweeps, solver=args.solver, compile=compiled, cuda_graph=how == RECORDED
        )
    pc = PCModel(model, config) if config else None
    learn = recorded_predictive_coding if how == RECORDED else predictive_coding
    output = Output.of(model)
    if compiled and pc is None:
        compile_parts(resolve(model, PCConfig()), output, active=lambda: True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if args.optimizer and sweeps != PASS else None
    if sweeps == PASS:
        model.requires_grad_(False)
    plain: Callable[[], dict[str, float]] = partial(frozen_pass if sweeps == PASS else backprop, model, inputs, output)
    if how == RECORDED and pc is None:
        with as_recorded(inputs):
            plain = recorded(model, plain)

    def step() -> dict[str, float]:
        model.zero_grad()
        facts = plain() if pc is None else learn(pc, inputs)
        if optimizer is not None:
            optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return facts

    return step


def seconds(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts again from now


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory(args: argparse.Namespace, sweeps: int, checkpointed: bool = False) -> int:
    """Peak memory of a step over the built model; of a CPU, measured in a fresh process."""
    if torch.cuda.is_available():
        return measured_memory(args, sweeps, checkpointed)
    command = [sys.executable, __file__, *sys.argv[1:], "--measure-memory", str(sweeps)]
    command += ["--checkpointed"] if checkpointed else []
    # the allocator of Linux keeps what was freed unless told not to: resident memory is then what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def measured_memory(args: argparse.Namespace, sweeps: int, checkpointed: bool) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, inputs = build(args, device)
    if checkpointed:
        model.gradient_checkpointing_enable()
    gc.collect()
    reset_peak(device)
    before = peak_bytes(device)
    step = stepper(model, inputs, sweeps, args)
    for _ in range(2):  # the second meets the gradients of the first
        step()
    return peak_bytes(device) - before


def quotients(numerators: list[float], denominators: list[float]) -> list[float]:
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


Times = dict[tuple[int, str], list[float]]


def of_passes(times: Times, sweeps: int, how: str) -> dict[str, float]:
    """What a sweep's passes take of a step of backprop, and what the step takes beyond them and such a step."""
    passes = [
        (sweeps - 1) * one + step
        for one, step in zip(times[PASS, how], times[BACKPROP, how], strict=True)
    ]  # fmt: skip
    return {
        "sweep_ratio": round(statistics.median(quotients(times[PASS, how], times[BACKPROP, how])), 3),
        "over_passes": round(statistics.median(quotients(times[sweeps, how], passes)) - 1, 3),
    }


def of_other(times: Times, sweeps: int, how: str) -> dict[str, Any]:
    """The same of steps that are compiled, or recorded, over backprop's that are so too; what that gains either."""
    ratios = quotients(times[sweeps, how], times[BACKPROP, how])
    kinds = (("pc", sweeps), ("backprop", BACKPROP))
    return {
        f"time_ratio{how}": round(statistics.median(ratios), 3),
        **{f"{name}{how}": value for name, value in of_passes(times, sweeps, how).items()},
        f"{how[1:]}_over_not": {
            name: round(statistics.median(quotients(times[kind, how], times[kind, PLAIN])), 3) for name, kind in kinds
        },
        f"milliseconds{how}": {name: round(1000 * statistics.median(times[kind, how]), 2) for name, kind in kinds},
    }


def main() -> None:
    args = parse()
    if args.cuda_graph and not torch.cuda.is_available():
        sys.exit("error: --cuda_graph needs a CUDA GPU")
    torch.set_num_threads(args.threads)
    if args.measure_memory is not None:
        print(measured_memory(args, args.measure_memory, args.checkpointed))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, inputs = build(args, device)
    others = [how for how, wanted in ((COMPILED, args.compile), (RECORDED, args.cuda_graph)) if wanted]
    kinds = [(sweeps, how) for how in (PLAIN, *others) for sweeps in (BACKPROP, PASS, *dict.fromkeys(args.sweeps))]
    steps = {kind: stepper(copy.deepcopy(model), inputs, kind[0], args, kind[1]) for kind in kinds}
    facts = {kind: step() for kind, step in steps.items() for _ in range(WARM + 1 if kind[1] == RECORDED else 2)}
    times: Times = {kind: [] for kind in kinds}
    for _ in range(args.runs):
        for kind in kinds:
            times[kind].append(seconds(steps[kind]))
    steps.clear()
    backprop_bytes = memory(args, BACKPROP)
    for sweeps in dict.fromkeys(args.sweeps):
        ratios = quotients(times[sweeps, PLAIN], times[BACKPROP, PLAIN])
        ratio, limit = statistics.median(ratios), (2 * sweeps + 1) / 3
        line = {
            **{n: getattr(args, n) for n in SETTING},
            "sweeps": sweeps, "time_ratio": round(ratio, 3), "time_ratio_quartiles":
            [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]] if len(ratios) > 1 else None,
            "limit": round(limit, 3), "over_limit": round(ratio / limit - 1, 3),
            **of_passes(times, sweeps, PLAIN),
            "memory_ratio": round(memory(args, sweeps) / backprop_bytes, 3),
            "backprop_gib": round(backprop_bytes / 2**30, 2),
            **({"memory_ratio_checkpointed": {
                name: round(memory(args, kind, checkpointed=True) / backprop_bytes, 3)
                for name, kind in (("pc", sweeps), ("backprop", BACKPROP))
            }} if args.checkpointing else {}),
            **{name: round(value, 5) for name, value in facts[sweeps, PLAIN].items()},
            **{name: value for how in others for name, value in of_other(times, sweeps, how).items()},
            "milliseconds": {
                name: round(1000 * statistics.median(times[kind, PLAIN]), 2)
                for name, kind in (("pc", sweeps), ("backprop", BACKPROP))
            },
            "machine": f"{processor(device)}, torch {torch.__version__}", "runs": args.runs,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
