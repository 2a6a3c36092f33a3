"""The model that a command is about, and inputs for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_pc.auto_classes import loaded_by
from hf_pc.refusals import check_targets


def add_model_arguments(parser: argparse.ArgumentParser, *, any_class: bool = True) -> None:
    parser.add_argument("model", help="a folder or a Hub repository")
    parser.add_argument("--nodes", default="block", help="preset or pattern, several separated by commas")
    if any_class:
        parser.add_argument("--auto_class", help="class of transformers to build; default: its own")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def model_class(args: argparse.Namespace, config: Any) -> Any:
    """What loads a model: `args.auto_class`, or the class that a checkpoint with this configuration was saved from.

    Raises ValueError if `args.auto_class` is none of transformers'.
    """
    if args.auto_class is None:
        return loaded_by(config.to_dict())
    found = getattr(transformers, args.auto_class, None)
    if not args.auto_class.startswith("AutoModel") or found is None:
        raise ValueError(f"--auto_class {args.auto_class!r} is no AutoModel class of transformers")
    return found


def read_config(args: argparse.Namespace) -> Any:
    """The configuration of a checkpoint. Raises OSError if there is no such model, ValueError if it is an adapter."""
    refuse_adapter(args)
    return transformers.AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)


def from_config(args: argparse.Namespace, config: Any) -> Any:
    """The model of a configuration, with random weights."""
    built = model_class(args, config)
    if issubclass(built, transformers.PreTrainedModel):
        return built._from_config(config)  # as the auto classes do, in the dtype of the configuration
    return built.from_config(config, trust_remote_code=args.trust_remote_code)


def refuse_adapter(args: argparse.Namespace) -> None:
    """Raise ValueError if the model is an adapter, whose base model may be anywhere."""
    if (Path(args.model) / "adapter_config.json").is_file():
        raise ValueError(f"{args.model} is an adapter: give its base model, or the folder of the merged model")


def without_weights(args: argparse.Namespace) -> Any:
    """The model for its shapes alone: nothing is allocated. Raises OSError if there is no such model."""
    config = read_config(args)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"  # the other kernels know no meta tensors
    with torch.device("meta"):
        return from_config(args, config)


def smallest_input(model: Any) -> dict[str, Tensor]:
    """Two tokens, or one image."""
    return random_input(model, batch=1, sequence=2)


def random_input(model: Any, batch: int, sequence: int) -> dict[str, Tensor]:
    """Random tokens [batch, sequence], images or sounds, from a generator of its own.

    Raises:
        ValueError: the model takes something else.
    """
    config, device = model.config, model.device
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = [size, size] if isinstance(size, int) else list(size)
        pixels = torch.randn(batch, getattr(config, "num_channels", 3), *sides, generator=generator)
        return {"pixel_values": pixels.to(device)}
    sounds = _sounds(config, model.main_input_name, sequence)
    if model.main_input_name != "input_ids" and sounds is None:
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name!r}: this command knows none to try")
    inputs: dict[str, Tensor] = {}
    if sounds is not None:
        inputs[model.main_input_name] = torch.randn(batch, *sounds, generator=generator).to(device)
    if sounds is None or config.is_encoder_decoder:
        choices = (2,) if "MultipleChoice" in type(model).__name__ else ()
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (batch, *choices, sequence), generator=generator).to(device)
        inputs |= {"input_ids": ids} if sounds is None else {}
        inputs |= {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    return inputs


def _sounds(config: Any, name: str, sequence: int) -> list[int] | None:
    """The shape of one input of a model of sounds: a waveform, or a spectrogram of the length that it takes."""
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return [config.num_mel_bins, 2 * config.max_source_positions]
    if name == "input_values" and hasattr(config, "conv_stride"):
        length = sequence
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            length = (length - 1) * stride + kernel
        return [length]
    if name == "input_values" and hasattr(config, "num_mel_bins"):
        return [config.max_length, config.num_mel_bins]
    return None


def random_batch(model: Any, batch: int, sequence: int) -> dict[str, Tensor]:
    """`random_input` with labels of the kind that the model's own loss takes."""
    check_targets(model)
    inputs = random_input(model, batch, sequence)
    decoded = inputs.pop("decoder_input_ids", None)
    kind = type(model).__name__
    end = getattr(model.config, "eos_token_id", None)
    if "SequenceClassification" in kind and model.config.is_encoder_decoder and isinstance(end, int):
        ids = inputs["input_ids"]  # such a model reads what it says off the one end of each sequence
        ids[ids == end] = next(other for other in range(3) if other not in (end, model.config.pad_token_id))
        ids[:, -1] = end
    if "MultipleChoice" in kind:
        return inputs | {"labels": torch.arange(batch, device=model.device) % 2}
    if "TokenClassification" in kind:
        return inputs | {"labels": inputs["input_ids"] % model.config.num_labels}
    if "Classification" in kind:
        classes = model.config.num_labels
        labels = torch.arange(batch) % classes
        if model.config.problem_type == "multi_label_classification":
            labels = torch.nn.functional.one_hot(labels, classes).float()
        elif classes == 1 or model.config.problem_type == "regression":
            labels = labels.float() if classes == 1 else torch.zeros(batch, classes)
        return inputs | {"labels": labels.to(model.device)}
    labels = inputs.get("input_ids", decoded)
    if labels is None:
        raise ValueError(f"{kind}: this command knows no labels for it")
    return inputs | {"labels": labels.clone()}
