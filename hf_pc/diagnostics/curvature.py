"""The largest curvature of the free energy in the errors: how far a relaxation is from running away.

A sweep moves e by -rate * (dF/de) / p, which is stable while rate * lambda_max < 2, lambda_max the largest
eigenvalue of the Hessian H of F in units of the precision, P^-1/2 H P^-1/2. A node alone has 1; what lies above it
adds. Published runs at a fixed step saw it grow from 22 to 31,000 before they collapsed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_pc.diagnostics.checks import check_whole_model
from hf_pc.model import PCModel
from hf_pc.rng import undrawn

#: over this a relaxation needs ever smaller steps
RUNAWAY = 20.0


def largest_curvature(pc: PCModel, inputs: Mapping[str, Any], iterations: int = 8, step: float = 1e-3) -> float:
    """lambda_max at the relaxed states of a batch, in units of the precision, by Lanczos iteration.

    Products with H are central differences of dF/de, two passes each: `iterations` cost 2 * iterations sweeps more
    than relaxing the batch. The estimate grows towards the truth from below.

    Args:
        pc: an attached PCModel.
        inputs: a batch with labels.
        step: of the differences, as a share of the length of the errors.

    Raises:
        ValueError: weights move while the batch relaxes, or the model is split over processes.
    """
    check_whole_model(pc)
    if pc.config.weight_update != "final":
        raise ValueError(
            f"weight_update={pc.config.weight_update!r} moves weights while it relaxes: nothing to probe at"
        )
    still = undrawn(p.device for p in pc.model.parameters())
    with torch.enable_grad(), still, pc.relaxed(inputs, learns=False) as relaxation:
        if not relaxation.sites:  # at T = 1 nothing has run yet
            pc.free_energy_gradients(inputs)
        sites = relaxation.sites
        if not sites:  # LayerDrop has left no node
            return 0.0
        at = [site.leaf.detach() for site in sites]
        roots = [site.precision.sqrt() for site in sites]

        def flat(parts: list[Tensor]) -> Tensor:
            return torch.cat([part.flatten().to(at[0].device) for part in parts])

        def parts_of(vector: Tensor) -> list[Tensor]:
            chunks = torch.split(vector, [leaf.numel() for leaf in at])
            return [chunk.view_as(leaf).to(leaf.device) for chunk, leaf in zip(chunks, at, strict=True)]

        scale = float(flat([e * root for e, root in zip(at, roots, strict=True)]).norm()) or 1.0

        def gradient(vector: Tensor, sign: float) -> Tensor:
            for site, leaf, root, part in zip(sites, at, roots, parts_of(vector), strict=True):
                site.leaf = (leaf + sign * step * scale * part / root).requires_grad_()
            found = pc.free_energy_gradients(inputs)
            return flat([g / root for g, root in zip(found, roots, strict=True)])

        def product(vector: Tensor) -> Tensor:
            return (gradient(vector, 1.0) - gradient(vector, -1.0)) / (2 * step * scale)

        generator = torch.Generator().manual_seed(0)
        start = torch.randn(sum(leaf.numel() for leaf in at), generator=generator, dtype=at[0].dtype)
        basis = [(start / start.norm()).to(at[0].device)]
        diagonal: list[float] = []
        off: list[float] = []
        for _ in range(min(iterations, len(start))):
            image = product(basis[-1])
            diagonal.append(float(image @ basis[-1]))
            for vector in basis:  # against all of them: rounding would bring old ones back
                image = image - (image @ vector) * vector
            length = float(image.norm())
            if not relaxation.agree(length >= 1e-6 * abs(diagonal[0])):  # all stop where one does
                break
            off.append(length)
            basis.append(image / length)
    below = torch.tensor(off[: len(diagonal) - 1], dtype=torch.float64)
    main = torch.tensor(diagonal, dtype=torch.float64)
    tridiagonal = torch.diag(main) + torch.diag(below, 1) + torch.diag(below, -1)
    return float(torch.linalg.eigvalsh(tridiagonal)[-1])
