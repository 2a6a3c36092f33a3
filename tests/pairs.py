"""Starts real processes that share a run, without a launcher between them and the test: each has its own output."""

from __future__ import annotations

import atexit
import os
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from preloaded import Preloaded

HERE = Path(__file__).parent
ROOT = HERE.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
       "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}  # fmt: skip


@dataclass
class Ended:
    """Exit code (minus the signal), what it said, and after how many seconds it ended."""

    code: int
    output: str
    seconds: float


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@cache
def preloaded() -> Preloaded:
    """What starts them, from the first of them on."""
    started = Preloaded(ENV)
    atexit.register(started.__exit__)
    return started


def together(*command: str, logs: Path, count: int = 2, timeout: float = 200) -> list[Ended]:
    """Run `python command...` as so many processes of one group, on the CPU, and wait for all of them.

    Args:
        logs: a folder for what they say.
        timeout: seconds, after which those that still run are killed and the test fails.
    """
    logs.mkdir(parents=True, exist_ok=True)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    files = [logs / f"{rank}.log" for rank in range(count)]
    running = []
    for rank, path in enumerate(files):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        environment = {**ENV, **group, **own}
        path.write_text("")
        running.append(preloaded().start(*command, environment=environment, cwd=Path.cwd(), out=path, err=path))
    began, ends = time.monotonic(), {}
    try:
        while len(ends) < count and time.monotonic() - began < timeout:
            ends |= {
                r: time.monotonic() - began for r, p in enumerate(running) if r not in ends and p.poll() is not None
            }
            time.sleep(0.05)
        said = [file.read_text()[-1500:] for file in files]
        assert len(ends) == count, f"processes {set(range(count)) - set(ends)} hang: {said}"
    finally:
        for process in running:
            process.kill()
    return [Ended(p.wait(), f.read_text(), ends[r]) for r, (p, f) in enumerate(zip(running, files, strict=True))]
