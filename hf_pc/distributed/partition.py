"""How many blocks each process takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_pc.distributed.chain import Chain
from hf_pc.processes import process_count


def check_counts(split: Sequence[int], layers: int, processes: int) -> list[int]:
    """Raise ValueError unless `split` gives each process a block or more, and all of them away."""
    counts = list(split)
    if len(counts) != processes or sum(counts) != layers or any(count < 1 for count in counts):
        raise ValueError(
            f"split={counts} is not allowed: {processes} numbers of at least 1 that add up to the {layers} blocks "
            "are needed"
        )
    return counts


def balanced(model: nn.Module, chain: Chain) -> list[int]:
    """Blocks of each process, such that the slowest has as little to compute in a relaxing sweep as can be.

    A weight costs two multiplications a token there, forwards and backwards. What comes before the first node is
    computed once per step and costs nothing in a sweep; what comes after the last block belongs to the last process.
    """
    layers, processes = len(chain.blocks), process_count()
    if processes > layers:
        raise ValueError(f"{processes} processes are too many for {layers} blocks: at least one block each is needed")
    costs = [float(sum(p.numel() for p in block.parameters())) for block in chain.blocks.values()]
    costs[0] = 0.0
    # of tied embeddings both uses are one parameter; the lookup multiplies nothing
    after = [places for places in chain.places.values() if layers in places and not places & set(range(layers))]
    head = sum(p.numel() for n, p in model.named_parameters() if chain.places[n] in after)
    costs[-1] += float(head)
    return fewest(costs, processes)


def fewest(costs: list[float], parts: int) -> list[int]:
    """Cut a line of costs into consecutive parts so that the dearest is as cheap as can be."""
    low, high = max(costs), sum(costs)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _filled(costs, parts, middle) else (middle, high)
    found = _filled(costs, parts, high * (1 + 1e-9))
    assert found is not None
    return found


def _filled(costs: list[float], parts: int, limit: float) -> list[int] | None:
    """Parts of at most `limit`, each as full as it goes while one is left for every later part; None if they are too
    few."""
    counts: list[int] = []
    start = 0
    for part in range(parts):
        end, total = start, 0.0
        most = len(costs) - (parts - part - 1)
        while end < most and (total + costs[end] <= limit or end == start):
            total += costs[end]
            end += 1
        counts.append(end - start)
        start = end
    return counts if start == len(costs) else None
