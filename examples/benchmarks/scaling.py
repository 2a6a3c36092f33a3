"""One model over several processes: time, memory, traffic and idle time of a step of the `state` solver.

    python examples/benchmarks/scaling.py --model llama --layers 8 --hidden 512 --batch 2 --sequence 64 \\
        --vocab 6656 --sweeps 160 --step_size 0.03 --runs 5 --processes 2 --output_dir runs/scaling

Prints one JSON line per number of processes, each process with one thread (the above takes 25 minutes; --processes 1
2 4 and fewer sweeps show how a split pays less where the signal is on its way down for most of a step). "speedup" is
the median of interleaved pairs with one process that has the whole model, in the same launch; "machine_speedup" is
what the processors give at most in the same turns: how many of those single steps they do at once, in the time of one
alone. With --weak the blocks grow with the processes (--layers is then per process). "predicted_seconds" is the model
of hf_pc.distributed.cost, from the times of one process's blocks; --predict 64 prints it for processes that are not
there, of a model with a block for each at least. Memory is each process's peak over what it had before it built the
model: weights, gradients, AdamW's state and activations. Leaves timeline_2.png and so on: who computed what when in
one step, and below it GPipe's schedule for backprop on the same split, from the same times.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from options import positive
from step_cost import build, peak_bytes, reset_peak
from timelines import costs_of, draw

from hf_pc import PCConfig, PCModel
from hf_pc.distributed import SplitPCModel
from hf_pc.distributed.cost import Costs, gpipe, step_seconds
from hf_pc.distributed.partition import fewest

Batch = dict[str, torch.Tensor]
CPU = torch.device("cpu")
SETTING = ("model", "layers", "hidden", "sequence", "batch", "vocab", "sweeps", "step_size", "seed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    sizes = {"layers": 8, "hidden": 256, "sequence": 128, "batch": 8, "vocab": 2048, "runs": 9, "sweeps": 10}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=value)
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--split", type=positive, nargs="+", help="blocks of each process; default: balanced")
    parser.add_argument("--predict", type=positive, nargs="*", default=[], help="numbers of processes to predict for")
    parser.add_argument("--weak", action="store_true", help="--layers blocks for each process")
    parser.add_argument("--step_size", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--worker", choices=["time", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)  # memory of the model in one process
    return parser.parse_args()


def configured(args: argparse.Namespace) -> PCConfig:
    return PCConfig(solver="state", sweeps=args.sweeps, relative_std=0.2, step_size=args.step_size)


def step(pc: PCModel, inputs: Batch) -> float:
    """Seconds of a step up to the gradients."""
    pc.model.zero_grad()
    began = time.perf_counter()
    pc.accumulate_grad(**inputs)
    return time.perf_counter() - began


def timed(args: argparse.Namespace) -> None:
    """In every process: interleaved steps of the whole model in process 0 and of the split one; a line from 0."""
    model, inputs = build(args, CPU)
    rank, count = dist.get_rank(), dist.get_world_size()
    whole = PCModel(copy.deepcopy(model), configured(args)) if count > 1 else None
    split = SplitPCModel(model, configured(args), split=args.split)
    singles, times, ratios, bounds = [], [], [], []
    for run in range(args.runs + 1):
        dist.barrier()
        single = step(whole, inputs) if whole is not None and rank == 0 else 0.0
        dist.barrier()
        crowd = torch.tensor(step(whole, inputs) if whole is not None else 0.0)  # the same, all processes at once
        dist.barrier()
        took = torch.tensor(step(split, inputs))
        single = single if count > 1 else float(took)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        dist.all_reduce(crowd)
        if run:
            singles, times, ratios = [*singles, single], [*times, float(took)], [*ratios, single / float(took)]
            bounds.append(count**2 * single / float(crowd) if whole is not None else 1.0)
    sent = split.neighbours.sent
    split.timeline.on = True
    dist.barrier()
    split.model.zero_grad()
    report = split.accumulate_grad(**inputs)
    events: list[Any] = [None] * count
    dist.all_gather_object(events, (split.timeline.events, split.neighbours.sent - sent))
    if rank:
        return
    timelines = [found[0] for found in events]
    begin = min(event[1] for line in timelines for event in line)
    end = max(event[2] for line in timelines for event in line)
    waited = [sum(e[2] - e[1] for e in line if e[0] == "wait") for line in timelines]
    line = {
        "seconds": statistics.median(times), "single_seconds": statistics.median(singles),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        "machine_speedup": round(statistics.median(bounds), 3),
        "split": split.split, "bytes_per_sweep": [found[1] // max(1, args.sweeps - 1) for found in events],
        "idle_share": [round(w / (end - begin), 3) for w in waited],
        "relaxed_fraction": round(report.relaxed_fraction, 5), "residual": round(report.residual, 5),
        "timelines": timelines,
    }  # fmt: skip
    print("LINE" + json.dumps(line), flush=True)


def built(args: argparse.Namespace) -> tuple[PCModel, Batch]:
    """The model as this process holds it, and a batch."""
    model, inputs = build(args, CPU)
    config = configured(args)
    return PCModel(model, config) if args.whole else SplitPCModel(model, config, split=args.split), inputs


def measured_memory(args: argparse.Namespace) -> None:
    """Peak bytes of two steps and AdamW's in every process, over what there was before the model; a line from 0."""
    small = argparse.Namespace(**{**vars(args), "layers": dist.get_world_size(), "hidden": 64, "split": None})
    step(*built(small))  # what libraries keep for themselves is there before it counts
    reset_peak(CPU)
    before = peak_bytes(CPU)
    pc, inputs = built(args)
    held = pc.model.parameters() if args.whole else pc.parameters()
    optimizer = torch.optim.AdamW(held, fused=True)  # the Trainer's default; the other's update needs copies
    reset_peak(CPU)
    for _ in range(2):
        step(pc, inputs)
        optimizer.step()
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak_bytes(CPU) - before)
    if dist.get_rank() == 0:
        print("LINE" + json.dumps(peaks), flush=True)


def launch(args: argparse.Namespace, processes: int, *extra: str) -> Any:
    """What process 0 of a run prints, parsed."""
    flags = [f"--{name}={getattr(args, name)}" for name in (*SETTING, "runs")]
    if args.split and processes == len(args.split):
        flags += ["--split", *map(str, args.split)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               __file__, *flags, *extra]  # fmt: skip
    # the allocator of Linux keeps what was freed unless told not to
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if "time" in extra:
        del environment["MALLOC_MMAP_THRESHOLD_"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return next(json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("LINE"))


def predicted(costs: Costs, processes: int, layers: int) -> dict[str, Any]:
    """What a step costs on processes with a core each, of a model of so many blocks like those measured, with sweeps
    enough for a signal to reach the first; and what GPipe's of backprop does."""
    repeated = Costs(*(
        [kind[0], *[statistics.median(kind[1:-1])] * (layers - 1), kind[-1]]
        for kind in (costs.forward, costs.relax, costs.learn)
    ))  # fmt: skip
    counts = fewest([*repeated.relax[:-2], repeated.relax[-2] + repeated.relax[-1]], processes)
    seconds, alone = (step_seconds(repeated, split, layers + 2) for split in (counts, [layers]))
    even = fewest([*repeated.learn[:-2], repeated.learn[-2] + repeated.learn[-1]], processes)
    backprop = max(event[2] for line in gpipe(repeated, even, 4 * processes) for event in line)
    return {"processes": processes, "layers": layers, "sweeps": layers + 2, "predicted_seconds": seconds,
            "predicted_speedup": alone / seconds, "predicted_gpipe_seconds": backprop,
            "backprop_seconds_in_one_process": sum(repeated.learn)}  # fmt: skip


def main() -> None:
    args = parse()
    if args.worker:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        (timed if args.worker == "time" else measured_memory)(args)
        dist.destroy_process_group()
        return
    if args.split and len(args.split) not in args.processes:
        raise ValueError(f"--split {args.split} is of {len(args.split)} processes, which --processes {args.processes} "
                         "does not name")  # fmt: skip
    args.output_dir.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()} cpu, {os.cpu_count()} cores, torch {torch.__version__}, one thread each"
    layers, costs = args.layers, None
    for processes in args.processes:
        args.layers = layers * processes if args.weak else layers
        alone = launch(args, 1, "--worker", "time") if costs is None or args.weak else None
        costs = costs_of(alone["timelines"][0], args, alone["seconds"]) if alone else costs
        assert costs is not None
        found = launch(args, processes, "--worker", "time") if processes > 1 or alone is None else alone
        memory = launch(args, processes, "--worker", "memory")
        whole = launch(args, 1, "--worker", "memory", "--whole")[0]
        timelines = found.pop("timelines")
        if processes > 1:
            draw(args.output_dir / f"timeline_{processes}.png", timelines, costs, found["split"])
        shown = {**{n: getattr(args, n) for n in SETTING}, "processes": processes, "weak": args.weak, **found,
                 "predicted_seconds": step_seconds(costs, found["split"], args.sweeps, os.cpu_count()),
                 "memory_ratio": [round(m / whole, 3) for m in memory], "machine": machine}  # fmt: skip
        print(json.dumps(shown), flush=True)
    for processes in args.predict:
        assert costs is not None
        print(json.dumps(predicted(costs, processes, max(layers, processes))))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
