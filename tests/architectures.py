"""Tiny random models of every architecture that docs/models.md lists, and what holds of each.

`python tests/architectures.py` prints the page; a test holds it to what it prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    WhisperForConditionalGeneration,
    set_seed,
)

from hf_pc import PCConfig, PCModel
from hf_pc.placement import blocks

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
VOCABULARY, LENGTH = 48, 12
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
WIDE = {**LLAMA, "num_key_value_heads": 2}
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {"image_size": 16, "patch_size": 4, "num_labels": 3}

#: what each configuration takes beside the vocabulary and the special tokens
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": {**LLAMA, **MOE},
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "phi": WIDE,
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "smollm3": LLAMA,
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    },
    "gpt_neox": BERT,
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT,
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    "electra": {**BERT, "embedding_size": 16},
    "albert": {**BERT, "embedding_size": 8},
    "deberta": {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "modernbert": {**BERT, "global_attn_every_n_layers": 2},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "bart": {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2},
}  # fmt: skip
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {**BERT, **VISION},
    "swin": {**VISION, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
    "beit": {**BERT, **VISION},
}
WHISPER = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
           "max_source_positions": 10, "decoder_start_token_id": 1, "suppress_tokens": None,
           "begin_suppress_tokens": None}  # fmt: skip
KINDS: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "causal": (AutoModelForCausalLM, CAUSAL),
    "encoder": (AutoModelForMaskedLM, ENCODERS),
    "encoder-decoder": (AutoModelForSeq2SeqLM, SEQ2SEQ),
    "speech": (WhisperForConditionalGeneration, {"whisper": WHISPER}),
    "image": (AutoModelForImageClassification, IMAGES),
}
NAMES = {name: kind for kind, (_, configs) in KINDS.items() for name in configs}


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model in float64 without dropout, and a batch with padding and unequal numbers of labels."""
    set_seed(0)
    auto, configs = KINDS[NAMES[name]]
    text = {} if NAMES[name] == "image" else {"vocab_size": VOCABULARY, **ENDS}
    config = AutoConfig.for_model(name, **text, **configs[name])
    make: Callable[..., Any] = getattr(auto, "from_config", None) or auto._from_config
    if "num_experts_per_tok" in configs[name]:
        config._experts_implementation = "eager"  # the grouped product has no float64
    model = make(config, attn_implementation="eager").double().eval()
    return model, batch(NAMES[name])


def batch(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "image":
        pixels = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1])}
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[1, :4] = -100
    labels[2, 8:], mask[2, 8:] = -100, 0
    if kind == "speech":
        sound = torch.randn(3, 8, 20, generator=generator, dtype=torch.float64)
        return {"input_features": sound, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Facts:
    """What holds of one architecture; the columns of the page."""

    blocks: int
    presets: tuple[str, ...]
    attention: str
    difference: float
    rises: bool
    silent: tuple[str, ...]

    def row(self, name: str) -> str:
        """A line of the page."""
        silent = ", ".join(f"all but {part}" for part in self.silent) or "yes"
        cells = [f"`{name}`", str(self.blocks), ", ".join(self.presets), self.attention, "< 1e-10",
                 "yes" if not self.rises else "no", silent]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def facts(name: str) -> Facts:
    """Measure one architecture."""
    model, inputs = build(name)
    pc = PCModel(model, PCConfig(sweeps=1))
    pc.backprop_loss(inputs).backward()  # type: ignore[no-untyped-call]
    true = gradients(model)
    pc.accumulate_grad(**inputs)
    one = gradients(model)
    pc.detach()
    assert true.keys() == one.keys()
    size = max(float(g.norm()) for g in true.values())
    difference = max(float((one[key] - g).norm() / g.norm().clamp_min(1e-6 * size)) for key, g in true.items())
    presets = []
    for preset in ("block", "sublayer", "linear"):
        pc = PCModel(model, PCConfig(nodes=preset, sweeps=2, relative_std=0.2))
        pc.accumulate_grad(**inputs)
        found = gradients(model)
        pc.detach()
        if all(bool(g.isfinite().all()) for g in found.values()):
            presets.append(preset)
    return Facts(
        len(blocks(model)), tuple(presets), attention(model, inputs), difference, rises(model, inputs),
        tuple(sorted(key for key, p in model.named_parameters() if p.requires_grad and key not in one)),
    )  # fmt: skip


def attention(model: Any, inputs: dict[str, Tensor]) -> str:
    """ "yes", or why attention logits cannot be nodes."""
    try:
        pc = PCModel(model, PCConfig(attention_energy="categorical", relative_std=0.2, sweeps=2))
    except ValueError:
        return "no: it bypasses the attention interface"
    try:
        found = pc.relax(**inputs).energies
        return "yes" if any(key.endswith(".logits") for key in found) else "no: it has none"
    except ValueError as error:
        assert "never reached transformers' attention interface" in str(error)  # noqa: PT017
        return "no: it has none"
    finally:
        pc.detach()


def rises(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether the free energy of any sequence is higher after more sweeps, at a strong relaxation."""
    before = None
    for sweeps in (1, 2, 4, 8, 12):
        pc = PCModel(model, PCConfig(sweeps=sweeps, relative_std=1.5))
        now = pc.relax(**inputs).sequence_free_energy
        pc.detach()
        if before is not None and bool((now > before + 1e-9 * before.abs()).any()):
            return True
        before = now
    return False


INTRODUCTION = """# Models

Measured by the tests on tiny random models of each architecture, in float64, with padding and unequal numbers of
labels; `python tests/architectures.py` prints this page. Any other architecture works by structure: its blocks are
what transformers checkpoints one by one, else its longest list of equal modules and others of that class. Where
neither is found, the error says which pattern to give.

- blocks: nodes of the preset `block`. ALBERT has one layer that runs several times, each time with a state of its own.
- attention: whether attention logits can be nodes (`attention_energy`).
- T = 1: the largest relative difference, over parameters, of one sweep's gradient from backprop's.
- F never rises: over 12 sweeps at relative_std 1.5, for every sequence.
- signal: whether every parameter that is trained gets a gradient; those named get none from backprop either.

| model | blocks | presets | attention | T = 1 | F never rises | signal |
|---|---|---|---|---|---|---|
"""


def page() -> str:
    """docs/models.md."""
    return INTRODUCTION + "".join(facts(name).row(name) + "\n" for name in NAMES)


if __name__ == "__main__":
    print(page(), end="")
