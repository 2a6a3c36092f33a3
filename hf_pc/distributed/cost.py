"""What a step of a split model costs on R processes: a model to predict with, and GPipe's schedule beside it.

A step of T sweeps is one feedforward pass, which goes through the processes in turn, T - 2 relaxing sweeps and one
that learns, in which all of them work at once and the slowest sets the time. A signal comes down one block a sweep,
and blocks that none has reached are left out: of L blocks, what comes after the last counting as one more, of the last
process, sweep t runs those from L + 2 - t on.

    t(R) = sum_l f_l + sum_(t = 2 .. T - 1) max_r sum_(l in r, l > L + 1 - t) b_l + max_r sum_(l in r) w_l

with f, b and w the seconds of a block's forward pass, relaxing sweep (forwards, and backwards to its input) and
learning sweep (backwards to its weights too). Messages pass while blocks compute and are left out, which holds while a
process has three blocks or more. T is to be larger than the number of blocks; a split gains most where it is several
times that, as states at rest need, since the processes below are idle while the signal is above them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: what, begin, end
Event = tuple[str, float, float]


@dataclass(frozen=True)
class Costs:
    """Seconds of each block, in order, and of what comes after the last, in the three kinds of pass."""

    forward: Sequence[float]
    relax: Sequence[float]
    learn: Sequence[float]


def step_seconds(costs: Costs, counts: Sequence[int], sweeps: int, cores: int | None = None) -> float:
    """Seconds of one step of `sweeps` sweeps on as many processes as there are `counts`, blocks of each.

    Args:
        cores: fewer than processes share their time; None gives each process its own.

    Raises:
        ValueError: there are fewer than two sweeps, or the counts are not those of the blocks.
    """
    if sweeps < 2:
        raise ValueError(f"sweeps={sweeps} is not allowed: from 2 on states move")
    if sum(counts) != len(costs.forward) - 1:
        raise ValueError(f"counts={list(counts)} do not add up to the {len(costs.forward) - 1} blocks")

    def together(seconds: Sequence[float]) -> float:
        ends = [sum(counts[: rank + 1]) for rank in range(len(counts))]
        shares = [sum(seconds[end - count : end]) for end, count in zip(ends, counts, strict=True)]
        shares[-1] += seconds[-1]
        crowded = sum(shares) / cores if cores else 0.0
        return max(*shares, crowded) if len(shares) > 1 else shares[0]

    blocks = len(costs.relax) - 1
    relaxing = [
        together([seconds if block > blocks - sweep else 0.0 for block, seconds in enumerate(costs.relax)])
        for sweep in range(2, sweeps)
    ]
    return sum(costs.forward) + sum(relaxing) + together(costs.learn)


def gpipe(costs: Costs, counts: Sequence[int], micro_batches: int) -> list[list[Event]]:
    """GPipe's schedule of a backprop step on the same split: the events of every process, from 0 on, in seconds.

    Forward passes of all micro-batches go up, then their backward passes come down (Huang et al. 2019, figure 2).
    """
    ends = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    spans = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    last = len(costs.forward) - 1
    forward = [sum(costs.forward[i] for i in span) / micro_batches for span in spans]
    whole = [sum(costs.learn[i] for i in span) / micro_batches for span in spans]
    forward[-1] += costs.forward[last] / micro_batches
    whole[-1] += costs.learn[last] / micro_batches
    events: list[list[Event]] = [[] for _ in counts]
    free = [0.0] * len(counts)

    def run(rank: int, what: str, ready: float, seconds: float) -> float:
        begin = max(free[rank], ready)
        free[rank] = begin + seconds
        events[rank].append((what, begin, free[rank]))
        return free[rank]

    for micro in range(micro_batches):
        ready = 0.0
        for rank in range(len(counts)):
            ready = run(rank, f"forward {micro}", ready, forward[rank])
    for micro in reversed(range(micro_batches)):
        ready = 0.0
        for rank in reversed(range(len(counts))):
            ready = run(rank, f"backward {micro}", ready, whole[rank] - forward[rank])
    return events
