"""Model cards: what was trained, how, in which regime, against backprop, and how to load it without hf_pc."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import EvalResult

from hf_pc.config import PCConfig

TAGS = ["predictive-coding", "hf-pc"]
#: of each auto class, the task that the Hub knows it by
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}
TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"


def write_card(
    folder: Path, config: PCConfig, results: dict[str, Any], *, model_name: str, base_model: str | None, dataset: str,
    auto_class: str = "AutoModelForCausalLM",
) -> Path:  # fmt: skip
    """Write README.md for a finished run.

    Args:
        folder: where the checkpoint lies.
        results: the figures of all_results.json; pc_eval_loss, and pc_accuracy or pc_perplexity, at least.
        base_model: the checkpoint that was fine-tuned; None for a model trained from scratch.
        dataset: a name for the data it learned from.
        auto_class: one of `TASKS`, what loads the model.
    """
    task = TASKS[auto_class]
    metric = "accuracy" if "pc_accuracy" in results else "perplexity"
    data = ModelCardData(
        library_name="transformers",
        tags=TAGS,
        base_model=base_model,
        pipeline_tag=task,
        model_name=model_name,
        eval_results=[
            EvalResult(
                task_type=task, dataset_type="image" if task.startswith("image") else "text", dataset_name=dataset,
                metric_type=metric, metric_value=round(float(results[f"pc_{metric}"]), 4),
            )
        ],
    )  # fmt: skip
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), name=model_name, base=base_model, dataset=dataset, results=results,
        auto_class=auto_class, metric=metric, text=not task.startswith("image"),
        config=json.dumps(config.to_dict(), indent=2, sort_keys=True),
    )  # fmt: skip
    path = folder / "README.md"
    card.save(path)
    return path


def extend_card(path: Path, config: PCConfig, history: Sequence[dict[str, Any]]) -> None:
    """Add tags, settings and the last logged regime to a card that transformers wrote."""
    card = ModelCard.load(path)
    tags = list(card.data.tags or [])
    card.data.tags = tags + [tag for tag in TAGS if tag not in tags]
    last: dict[str, Any] = next((entry for entry in reversed(history) if "relaxed_fraction" in entry), {})
    facts = [f"- {k}: {last[k]:.4g}" for k in ("relaxed_fraction", "residual", "free_energy") if k in last]
    settings = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    heading = "\n## Predictive coding\n\n"
    body = card.text.split(heading)[0]
    card.text = body + heading + "\n".join(facts) + f"\n\n```json\n{settings}\n```\n"
    card.save(path)
