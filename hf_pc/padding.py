"""Which states of a batch are padding: those do not move, and are not measured.

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

#: what transformers calls the attention of a decoder to what its encoder made, and the maps there that see the latter
CROSS = frozenset(("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention"))
KEYS = frozenset(("k", "v", "k_proj", "v_proj", "key", "value"))


class Padding:
    """Which positions of a batch are real.

    Args:
        present: bool, [rows, sequence], true where what the model reads is real; of an encoder-decoder, what its
            decoder reads. None: all of it.
        encoded: the same of what an encoder reads.
        encoder: the modules whose states are of what the encoder reads.
    """

    def __init__(
        self, present: Tensor | None = None, encoded: Tensor | None = None, encoder: Collection[nn.Module] = ()
    ) -> None:
        self._present, self._encoded, self._encoder = _useful(present), _useful(encoded), encoder

    @classmethod
    def of(
        cls, model: nn.Module, batch: Mapping[str, Any], labels: Tensor, encoder: Collection[nn.Module] = ()
    ) -> Padding:
        """As the masks of a batch have it, [batch, sequence] or [batch, choices, sequence].

        Args:
            labels: aligned with the logits.
            encoder: as `encoder_of` says it of the model.
        """
        mask = _rows(batch.get("attention_mask"))
        before = virtual_tokens(model)
        if mask is not None and before:  # which an adapter puts there
            mask = F.pad(mask, (before, 0), value=True)
        if not encoder:  # one that is not known may be of a decoder that reads something else
            return cls() if is_encoder_decoder(model) else cls(mask)
        decoded = _rows(batch.get("decoder_attention_mask"))
        if decoded is None and labels.dim() == 2:
            decoded = labels.ne(IGNORED).flip(1).cumsum(1).flip(1) > 0
        return cls(decoded, mask, encoder)

    def at(self, site: Site) -> Tensor | None:
        """True where a site's states are real, broadcast against them; None: all are."""
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
    """The modules of an encoder-decoder whose states are of what its encoder reads: those of the encoder, and what
    makes keys and values of it for the decoder. None of another model, or of one that does not say."""
    base: Any = base_model(model)
    if not is_encoder_decoder(model) or not callable(getattr(base, "get_encoder", None)):
        return ()
    encoder = base.get_encoder()
    if encoder in (None, base):
        return ()
    paths = [(name.split("."), module) for name, module in model.named_modules()]
    across = {module for path, module in paths if not CROSS.isdisjoint(path) and not KEYS.isdisjoint(path)}
    return across | set(encoder.modules())


def _rows(mask: Any) -> Tensor | None:
    """A mask as [rows, sequence], true where there is no padding; None if it is no such mask."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3):
        return None
    return mask.flatten(0, -2).ne(0)


def _useful(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or known_to_hold(mask) else mask
