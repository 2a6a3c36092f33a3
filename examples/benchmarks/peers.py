"""A step of predictive coding over the same library's step of backprop: hf_pc, FabricPC and pcx on one equal network.

    python examples/benchmarks/peers.py --peer_python fabricpc-venv/bin/python pcx-venv/bin/python

An MLP with tanh and biases, every hidden layer a node with Gaussian energy, squared error at the output, precision 1;
weights and batch are the same numbers everywhere. Prints one JSON line per library, coordinates, step size and T. Each
library runs in an interpreter of its own (FabricPC and pcx need different versions of JAX), and the repetitions of all
are interleaved, on one core. A library that no --peer_python can import gets a line that says so; jpc has no adapter,
as it could not be installed from PyPI when this was written.

A step is everything up to the gradients of the weights: a feedforward pass, T updates of the nodes, the gradients.
Each is what its library documents as the fast way: `PCModel.accumulate_grad`, where `sweeps` is T + 1 and torch runs
eagerly; FabricPC's `make_train_step`, jitted, with an optimiser that hands back the gradient and moves nothing; for
pcx the step of its tutorials, T updates unrolled under `pxf.jit`. So time_ratio compares torch with torch and JAX with
JAX, while step_ms tells what is faster. Times are the process's CPU time: with one thread that is what a clock shows
on an idle core, and what else the machine does enters less.

Equal T is not equal relaxation. An update of the states carries the output's error back by one layer, one of the
errors by all of them. So each line says how far T updates came: `relaxed`, the share of the way from the feedforward
free energy to its minimum, by the states that the weights learned from, which at the same coordinates, step and T is
equal in all libraries; and `gradient_cosine` with backprop's gradient, equal in state coordinates alone (with errors,
hf_pc's learning pass carries the output's error back once more, FabricPC learns from the errors as they are). With
step "auto", hf_pc's default, no sample's energy rises: a move that would raise it is refused, which costs a pass.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from options import natural, positive
from peer_libraries import BACKPROP, LIBRARIES, REST, Array, Problem


def interpreter(text: str) -> str:
    if not (os.path.isfile(text) and os.access(text, os.X_OK)):
        raise argparse.ArgumentTypeError(f"{text!r} is no interpreter: a file that can be run is needed")
    return os.path.abspath(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=interpreter, nargs="+", default=[], help="where peers are installed")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[784, 256, 256, 256, 10])
    parser.add_argument("--T", type=positive, nargs="+", default=[1, 8, 20], help="updates of the nodes in a step")
    for name, value in {"batch": 64, "runs": 31}.items():
        parser.add_argument(f"--{name}", type=positive, default=value)
    parser.add_argument("--step_size", type=float, default=0.1, help='of every update that is not "auto"')
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)  # the library that this process runs
    args = parser.parse_args(argv)
    args.T = list(dict.fromkeys(args.T))
    if len(args.sizes) < 3:
        parser.error(f"argument --sizes: {args.sizes} has no hidden layer: at least 3 sizes are needed")
    if args.runs < 2:
        parser.error(f"argument --runs: {args.runs} is not allowed: quartiles need at least 2")
    if not 0 < args.step_size < math.inf:
        parser.error(f"argument --step_size: {args.step_size} is not allowed: a number above 0 is needed")
    return args


def work(args: argparse.Namespace) -> None:
    """What a worker does: say what its steps find, then time each of them once for every line that it reads."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    if hasattr(os, "sched_setaffinity"):  # before a library counts the cores
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    build, backend, _ = LIBRARIES[args.worker]
    problem = Problem.of(args)
    steps, read = build(args, problem)
    facts: list[Any] = []
    backprop: Array = np.zeros(0, "f")
    for kind, step in steps.items():
        states, parts = read(step())
        gradient = np.concatenate([np.ravel(part) for part in parts])
        if kind == BACKPROP:  # which comes first
            backprop = gradient
        cosine = gradient @ backprop / np.linalg.norm(gradient) / np.linalg.norm(backprop)
        facts.append((kind, problem.free_energy([np.asarray(x) for x in states]), float(cosine)))
    packages = {name: version(name) for name in dict.fromkeys((args.worker, backend))}
    answer({"facts": facts, "versions": {"python": platform.python_version(), **packages}})
    for _ in sys.stdin:
        times = []
        for step in [steps[kind] for kind in steps if kind != REST]:
            step()  # what ran before has left the caches
            began = time.process_time()
            step()
            times.append(time.process_time() - began)
        answer(times)


def why_missing(library: str, python: str) -> str | None:
    """The last line of what an interpreter says that cannot import a library, or None."""
    module = LIBRARIES[library][2]
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it does not run"])[-1]


class Worker:
    """A process that runs one library."""

    def __init__(self, library: str, python: str, argv: list[str]) -> None:
        command = [python, os.path.abspath(__file__), *argv, "--worker", library]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.library = library
        self.first = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise RuntimeError(f"the process that runs {self.library} ended with status {status}: see above")
        return json.loads(line)

    def times(self) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.communicate()


def middle(values: list[float], digits: int) -> tuple[float, list[float]]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return round(median, digits), [round(low, digits), round(high, digits)]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.worker:
        work(args)
        return []
    lines: list[dict[str, Any]] = []

    def say(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)

    workers: list[Worker] = []
    try:
        for library in LIBRARIES:
            pythons = [sys.executable] if library == "hf_pc" else args.peer_python
            missing = [None] if library == "hf_pc" else [why_missing(library, python) for python in pythons]
            if None in missing:
                workers.append(Worker(library, pythons[missing.index(None)], argv))
            else:
                say({"library": library, "measured": False, "reason": missing or "no --peer_python was given"})
        rounds = [[worker.times() for worker in workers] for _ in range(args.runs)]
    finally:
        for worker in workers:
            worker.end()
    highest = Problem.of(args).free_energy([])
    lowest = min(energy for worker in workers for _, energy, _ in worker.first["facts"])
    for i, worker in enumerate(workers):
        times = [[1000 * t for t in column] for column in zip(*(found[i] for found in rounds), strict=True)]
        timed = [fact for fact in worker.first["facts"] if fact[0] != list(REST)]
        for ((coordinates, step_size, updates), energy, cosine), column in list(zip(timed, times, strict=True))[1:]:
            ratio, ratio_quartiles = middle([a / b for a, b in zip(column, times[0], strict=True)], 3)
            step, step_quartiles = middle(column, 3)
            say({
                "library": worker.library, "measured": True, "coordinates": coordinates, "step_size": step_size,
                "T": updates, "time_ratio": ratio, "time_ratio_quartiles": ratio_quartiles,
                "step_ms": step, "step_ms_quartiles": step_quartiles, "backprop_ms": middle(times[0], 3)[0],
                "relaxed": round((highest - energy) / (highest - lowest), 4) + 0.0,
                "gradient_cosine": round(cosine, 5), "sizes": args.sizes, "batch": args.batch, "runs": args.runs,
                "seed": args.seed, "threads": 1, "machine": f"{platform.machine()} cpu",
                "versions": worker.first["versions"],
            })  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
