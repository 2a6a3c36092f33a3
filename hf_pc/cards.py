"""Model cards: what was trained, how, in which regime, against backprop, and how to load it without hf_pc."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import EvalResult
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, StrictUndefined

from hf_pc.auto_classes import TASKS
from hf_pc.config import PCConfig
from hf_pc.markup import escape, fenced, one_line
from hf_pc.measurements import AT_EQUILIBRIUM

TAGS = ["predictive-coding", "hf-pc"]
TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"
#: rows of the table of energies; of more nodes, as many are shown, evenly over depth
MOST_NODES = 24
#: the rows of the table of figures: title, name among the results, format
ROWS = (
    ("validation loss, nats per label", "eval_loss", ".4f"),
    ("perplexity", "perplexity", ".2f"),
    ("accuracy", "accuracy", ".4f"),
    ("seconds per step, median", "step_seconds", ".3g"),
)
REGIMES = {
    "backprop-like": "Its regime is backprop-like: relaxation changed little, and learning was close to backprop's.",
    "relaxing": f"The states had not come to rest when weights learned (residual over {AT_EQUILIBRIUM}).",
}
UNTESTED = "Nothing was done about errors and biases in the data: test it before you use it for anything."
#: what transformers writes of a model and of data that have no name, and what that means
UNNAMED = (
    (" is a fine-tuned version of [](https://huggingface.co/)", " was trained from scratch"),
    (" on the None dataset.", "."),
)
ONE_RUN = (
    "The figures are of one run with one seed; the learning rate, the same for both, need not be the best of either."
)


def write_card(
    folder: Path, config: PCConfig, results: Mapping[str, Any], *, model_name: str, base_model: str | None,
    dataset: str = "", dataset_id: str | None = None, auto_class: str = "AutoModelForCausalLM", notes: str = "",
) -> Path:  # fmt: skip
    """Write README.md for a checkpoint. Names and notes are shown as they are; they cannot become markup.

    Args:
        folder: where the checkpoint lies; a learning.png in it is shown.
        results: the figures of all_results.json: pc_eval_loss with pc_accuracy or pc_perplexity, and what else a
            comparison finds; empty for a model that was not evaluated.
        base_model: the checkpoint that was fine-tuned, a repository or a folder; None for a model from scratch, ""
            where that is not known.
        dataset: a name for the data it learned from.
        dataset_id: its repository, if it has one.
        auto_class: what of transformers loads the model, an auto class or a class of its own.
        notes: a paragraph of the user's.
    """
    name = one_line(model_name, "model")
    metric = next((found for found in ("accuracy", "perplexity") if f"pc_{found}" in results), None)
    adapter = (folder / "adapter_config.json").is_file()
    tokenizer = (folder / "tokenizer_config.json").is_file()
    settings = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    published = base_model if results.get("base_on_hub", True) else None
    data = _metadata(results, name, metric, published, one_line(dataset), dataset_id, auto_class, adapter)
    template = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    text = template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(), name=escape(name), base=escape(shown_base(base_model) or ""),
        scratch=bool(results) and base_model is None, dataset=escape(dataset), notes=escape(notes), metric=metric,
        config=config, solver=escape(config.solver),
        figure="learning.png" if (folder / "learning.png").is_file() else None, adapter=adapter,
        loading=fenced(_loading(auto_class, adapter, tokenizer), "python"),
        limits=_limits(config, results), settings=fenced(settings, "json"),
        command=fenced(one_line(str(results["command"])), "sh") if results.get("command") else None,
        **_figures(results), **_energies(results),
    )  # fmt: skip
    path = folder / "README.md"
    ModelCard(text).save(path)
    return path


def _metadata(
    results: Mapping[str, Any], name: str, metric: str | None, base_model: str | None, dataset: str,
    dataset_id: str | None, auto_class: str, adapter: bool,
) -> ModelCardData:  # fmt: skip
    task = TASKS.get(auto_class)
    given: dict[str, Any] = {}
    dataset_id = dataset_id if is_repository(dataset_id) else None
    if metric and task and math.isfinite(float(results[f"pc_{metric}"])):
        given["eval_results"] = [
            EvalResult(
                task_type=task, dataset_type=dataset_id or ("image" if task.startswith("image") else "text"),
                dataset_name=dataset or "its validation data", metric_type=metric,
                metric_value=round(float(results[f"pc_{metric}"]), 4),
            )
        ]  # fmt: skip
        given |= {"metrics": [metric], "model_name": name}
    return ModelCardData(
        library_name="peft" if adapter else "transformers", tags=list(TAGS), pipeline_tag=task,
        base_model=base_model if is_repository(base_model) else None,
        datasets=[dataset_id] if dataset_id else None, **given,
    )  # fmt: skip


def is_repository(name: str | None) -> bool:
    """Whether the Hub would take it for a repository; a folder of this machine means nothing there."""
    if not name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def shown_base(base_model: str | None) -> str | None:
    """A checkpoint's name as it may be published: its repository, or of a folder the last part."""
    if not base_model:
        return base_model
    return (base_model if is_repository(base_model) else Path(base_model).name) or "a checkpoint"


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        (title, format(float(results[f"pc_{key}"]), form),
         format(float(results[f"bp_{key}"]), form) if f"bp_{key}" in results else "")
        for title, key, form in ROWS if f"pc_{key}" in results
    ]  # fmt: skip
    ratio = results.get("step_time_ratio")
    regime = ""
    if "regime" in results:
        facts = [f"{key} {float(results[key]):{form}}" for key, form in
                 (("relaxed_fraction", ".3f"), ("residual", ".4f")) if key in results]  # fmt: skip
        regime = f"{escape(str(results['regime']))} ({', '.join(facts)})"
    return {"rows": rows, "compared": "bp_eval_loss" in results, "regime": regime,
            "ratio": None if ratio is None else f"{float(ratio):.2f}"}  # fmt: skip


def _energies(results: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(results.get("energies") or {})
    energies = sorted(found.items(), key=lambda item: item[0] == "output")  # which is above all nodes
    count = min(len(energies), MOST_NODES)
    chosen = [energies[round(i * (len(energies) - 1) / max(count - 1, 1))] for i in range(count)]
    return {"energies": [(escape(node), f"{float(value):.3g}") for node, value in chosen],
            "left_out": len(energies) - count}  # fmt: skip


def _limits(config: PCConfig, results: Mapping[str, Any]) -> list[str]:
    limits = [REGIMES[results["regime"]]] if results.get("regime") in REGIMES else []
    if config.sweeps == 1:
        limits.append("At one sweep predictive coding is backprop.")
    return [*([ONE_RUN] if "bp_eval_loss" in results else []), *limits, UNTESTED]


def _loading(auto_class: str, adapter: bool, tokenizer: bool) -> str:
    library, loader = "transformers", auto_class
    if adapter:
        import peft

        own = f"AutoPeftModel{auto_class.removeprefix('AutoModel')}"
        library, loader = "peft", own if hasattr(peft, own) else "AutoPeftModel"
    lines = [f"from {library} import {loader}", "", f'model = {loader}.from_pretrained("PATH_OR_REPOSITORY")']
    if tokenizer:
        lines[0] += "\nfrom transformers import AutoTokenizer" if adapter else ", AutoTokenizer"
        lines.append('tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY")')
    return "\n".join(lines)


def extend_card(path: Path, config: PCConfig, history: Sequence[Mapping[str, Any]] = (), auto_class: str = "") -> None:
    """Add tags, results, settings and the last logged regime to a card that transformers or PEFT wrote.

    Args:
        history: the log of the training; its last evaluation is a result where the card has none.
        auto_class: what of transformers loads the model, which says the task of such a result.
    """
    card = ModelCard.load(path)
    tags = list(card.data.tags or [])
    card.data.tags = tags + [tag for tag in TAGS if tag not in tags]
    found: Mapping[str, Any] = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    metric = next((name for name in ("accuracy", "perplexity") if f"eval_{name}" in found), None)
    if metric and not card.data.eval_results:
        results = {f"pc_{metric}": found[f"eval_{metric}"]}
        own = _metadata(results, card.data.model_name or path.parent.name, metric, None, "", None, auto_class, False)
        if own.eval_results:
            card.data.eval_results, card.data.model_name = own.eval_results, own.model_name
            card.data.metrics = card.data.metrics or own.metrics
    last: Mapping[str, Any] = next((entry for entry in reversed(history) if "relaxed_fraction" in entry), {})
    facts = [f"- {k}: {last[k]:.4g}" for k in ("relaxed_fraction", "residual", "free_energy") if k in last]
    settings = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    heading = "\n## Predictive coding\n\n"
    body = card.text.split(heading)[0]
    for wrong, right in UNNAMED:
        body = body.replace(wrong, right)
    card.text = body + heading + "\n".join(facts) + f"\n\n```json\n{settings}\n```\n"
    card.save(path)
