"""Which states of a batch are padding: none of them moves, and none is measured.

A model says it of its inputs, by an attention mask. An encoder-decoder says it of what its encoder reads; of what its
decoder reads only where it is given a mask for that. Else it is told by the labels: behind the last one of a sequence
a decoder computes what nothing is compared with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hf_pc.architecture import base_model, is_encoder_decoder, virtual_tokens
from hf_pc.checks import known_to_hold
from hf_pc.node import Site
from hf_pc.output import IGNORED


class Padding:
    """Where a batch is none.

    Args:
        present: bool, [rows, sequence], of what the model reads; of an encoder-decoder, of what its decoder reads.
            None: everywhere.
        encoded: the same of what an encoder reads.
        encoder: the modules that this is of.
    """

    def __init__(
        self, present: Tensor | None = None, encoded: Tensor | None = None, encoder: Collection[nn.Module] = ()
    ) -> None:
        self._present, self._encoded, self._encoder = _useful(present), _useful(encoded), encoder

    @classmethod
    def of(
        cls, model: nn.Module, batch: Mapping[str, Any], labels: Tensor, encoder: Collection[nn.Module] = ()
    ) -> Padding:
        """That of a batch, which its masks tell, [batch, sequence], or [batch, choices, sequence].

        Args:
            labels: aligned with the logits.
            encoder: as `encoder_of` says it of the model.
        """
        mask = _rows(batch.get("attention_mask"))
        before = virtual_tokens(model)
        if mask is not None and before:  # which an adapter puts there
            mask = F.pad(mask, (before, 0), value=True)
        if not encoder:
            return cls(mask)
        decoded = _rows(batch.get("decoder_attention_mask"))
        if decoded is None and labels.dim() == 2:
            decoded = labels.ne(IGNORED).flip(1).cumsum(1).flip(1) > 0
        return cls(decoded, mask, encoder)

    def at(self, site: Site) -> Tensor | None:
        """Where a site's states are none, bool, broadcast against them; None: everywhere."""
        mask, shape = self._encoded if site.node.module in self._encoder else self._present, site.shape
        if mask is None or len(shape) < 2:
            return None
        if site.node.in_nats:  # logits of attention, [rows, heads, queries, keys]
            return mask[:, None, :, None].to(site.error.device) if (shape[0], shape[2]) == mask.shape else None
        if len(shape) > 2 and shape[:2] == mask.shape:
            return mask.view(*mask.shape, *[1] * (len(shape) - 2)).to(site.error.device)
        if len(shape) == 2 and shape[0] == mask.numel():  # [rows * sequence, features]
            return mask.reshape(-1, 1).to(site.error.device)
        return None


def encoder_of(model: nn.Module) -> Collection[nn.Module]:
    """The modules of an encoder-decoder's encoder; none of another model."""
    base: Any = base_model(model)
    if not is_encoder_decoder(model) or not callable(getattr(base, "get_encoder", None)):
        return ()
    encoder = base.get_encoder()
    return set() if encoder in (None, base) else set(encoder.modules())


def _rows(mask: Any) -> Tensor | None:
    """A mask as [rows, sequence], true where there is no padding; None if it is no such mask."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3):
        return None
    return mask.flatten(0, -2).ne(0)


def _useful(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or known_to_hold(mask) else mask
