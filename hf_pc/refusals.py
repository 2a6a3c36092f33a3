"""What a PC run cannot do, said before it starts: on every process, so that none waits for another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import find_labels

from hf_pc.architecture import base_model, is_checkpointing, layer_drop
from hf_pc.batch_state import NO_CHECKPOINTING
from hf_pc.config import PCConfig
from hf_pc.learning import phases_of
from hf_pc.processes import at_once, process_count, process_index, same_everywhere
from hf_pc.readiness import in_parts, learns_in_parts

#: what question answering learns from
SPANS = ("start_positions", "end_positions")
#: settings of TrainingArguments that all processes must share, or one of them waits for passes that never come, or
#: has other weights than the others
SHARED = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "logging_steps", "logging_strategy", "eval_steps", "eval_strategy", "save_steps",
    "save_strategy", "load_best_model_at_end", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim",
    "weight_decay", "max_grad_norm", "curvature_steps", "nonfinite_patience",
)  # fmt: skip
#: kinds of parallelism that split a sequence or a layer, by what ParallelismConfig and DistributedConfig call them
SPLITS = {
    "tp_size": "tensor parallelism", "cp_size": "context parallelism", "sp_size": "sequence parallelism",
    "pp_size": "pipeline parallelism", "ep_size": "expert parallelism",
}  # fmt: skip


#: of the settings of activation checkpointing those that say where, not how; alone they mean non-reentrant
TRAINERS_OWN = ("every_n_layers", "offload", "selective")

#: optimizers of transformers that step in the backward pass
IN_BACKWARD = ("layerwise", "lomo")


def refuse(args: TrainingArguments, config: PCConfig, model: nn.Module | None) -> None:
    """Raise ValueError, naming the setting, on arguments that predictive coding cannot follow."""
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1  # which no one replicates
    if args.n_gpu > 1 and not spread:
        raise ValueError(
            f"{args.n_gpu} GPUs without a launcher mean DataParallel, whose replicas cannot relax: start with "
            "`accelerate launch` or torchrun, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    _refuse_weight_update(args, config)
    _refuse_reentrant(args, config, model)
    checkpoints = args.gradient_checkpointing or (model is not None and is_checkpointing(model))
    if config.dropout == "off" and checkpoints:
        raise ValueError(NO_CHECKPOINTING)
    if config.dropout == "off" and args.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} is not allowed with dropout='off', which leaves its "
            "noise out as well: use dropout='replay'"
        )
    _refuse_compilation(args)
    if _steps_in_backward(args) and learns_in_parts(config, phases_of(config.learning, config.strengths)):
        raise ValueError(
            f"optim={_optim(args)!r} is not allowed, as it steps in the backward pass; {in_parts(config)}"
        )
    if config.cuda_graph:
        _refuse_recording(args, checkpoints)
    if config.relaxation_dtype is not None and _mixed_precision(args) != "no":
        raise ValueError(
            f"relaxation_dtype={config.relaxation_dtype!r} is not allowed with bf16, fp16 or another mixed precision, "
            "in which all sweeps and the learning pass run alike: leave one of the two out"
        )
    drop = None if model is None else layer_drop(model)
    if args.world_size > 1 and drop:
        raise ValueError(
            f"{drop} is not supported with several processes: each would have nodes of its own; set it to 0"
        )
    if args.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(f"deepspeed={args.deepspeed!r} is not supported: DeepSpeed owns the backward pass; use FSDP2")
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("ACCELERATE_USE_MEGATRON_LM=true is not supported: Megatron-LM owns the training step")
    _refuse_splits(args, model)
    _refuse_sharding(args)
    if args.world_size > 1 and args.ddp_static_graph:
        raise ValueError(
            "ddp_static_graph=True is not supported: a refused sweep is run again, in a graph of its own; use False"
        )
    whole = args.per_device_train_batch_size
    if args.accelerator_config.split_batches and whole % args.world_size:
        raise ValueError(
            f"per_device_train_batch_size={whole} is not allowed with accelerator_config.split_batches=True: it is "
            f"split over {args.world_size} processes, so a multiple of {args.world_size} is needed"
        )


def _optim(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _steps_in_backward(args: TrainingArguments) -> bool:
    return any(kind in _optim(args) for kind in IN_BACKWARD)


def _mixed_precision(args: TrainingArguments) -> str:
    """That of the arguments, or of the launcher."""
    own = "fp16" if args.fp16 else "bf16" if args.bf16 else None
    return own or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _refuse_weight_update(args: TrainingArguments, config: PCConfig) -> None:
    if config.weight_update != "every_sweep":
        return
    if args.gradient_accumulation_steps > 1 or _mixed_precision(args) == "fp16":
        raise ValueError(
            "weight_update='every_sweep' moves the weights within a batch: it takes "
            "gradient_accumulation_steps=1 and no fp16"
        )
    curvature = getattr(args, "curvature_steps", None)
    if curvature:
        raise ValueError(f"curvature_steps={curvature} cannot be had with weight_update='every_sweep'")


def _refuse_reentrant(args: TrainingArguments, config: PCConfig, model: nn.Module | None) -> None:
    given: Any = args.gradient_checkpointing_kwargs if args.gradient_checkpointing else _checkpointing_of(model)
    how = {name: value for name, value in (given or {}).items() if name not in TRAINERS_OWN}
    if how and how.get("use_reentrant", True) and config.sweeps > 1:
        raise ValueError(
            f"gradient_checkpointing_kwargs={given} is not supported: such checkpointing finds no gradient of states; "
            "use {'use_reentrant': False}"
        )


def _checkpointing_of(model: nn.Module | None) -> Any:
    """The settings of the activation checkpointing that is switched on at a model; None if there are none."""
    for module in () if model is None else model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and (given := getattr(function, "keywords", None)):
            return given
    return None


def _refuse_compilation(args: TrainingArguments) -> None:
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(
            f"--dynamo_backend {backend} is not supported: a compiled model skips the hooks of nodes; "
            "PCConfig.compile=True compiles between them"
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True is not supported: a compiled model skips the hooks of the nodes; "
            "PCConfig.compile=True compiles between them"
        )


def _refuse_recording(args: TrainingArguments, checkpoints: bool) -> None:
    """What a step that is recorded as a CUDA graph cannot be."""
    reasons = {
        f"{args.world_size} processes, which exchange gradients inside a step": args.world_size > 1,
        f"the device {str(args.device)!r}, which has no CUDA graphs": args.device.type != "cuda",
        "fp16, whose losses are scaled by what the steps before gave: use bf16": _mixed_precision(args) == "fp16",
        "activation checkpointing, which reads the state of the generators": checkpoints,
        f"neftune_noise_alpha={args.neftune_noise_alpha}, as noise is drawn": bool(args.neftune_noise_alpha),
        f"optim={_optim(args)!r}, which steps inside what is recorded": _steps_in_backward(args),
        f"torch_empty_cache_steps={args.torch_empty_cache_steps}": args.torch_empty_cache_steps is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"PCConfig.cuda_graph=True is not allowed with {reason}")


def _refuse_splits(args: TrainingArguments, model: nn.Module | None) -> None:
    found: dict[str, Any] = {}
    if args.parallelism_config is not None:
        found |= {f"parallelism_config.{name}": getattr(args.parallelism_config, name, None) for name in SPLITS}
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        variables = {name: f"PARALLELISM_CONFIG_{name.upper()}" for name in SPLITS}
        found |= {variable: os.environ.get(variable) for variable in variables.values()}
    loaded = getattr(getattr(model, "config", None), "distributed_config", None)
    found |= {f"distributed_config.{name}": getattr(loaded, name, None) for name in SPLITS}
    for name, size in found.items():
        if size is not None and int(size) > 1:
            kind = SPLITS[name.lower().rpartition(".")[2].removeprefix("parallelism_config_")]
            raise ValueError(
                f"{name}={size} is not supported: {kind} splits what a node holds over processes; use 1, and FSDP2 "
                "for models that are too large for one device"
            )


def _refuse_sharding(args: TrainingArguments) -> None:
    if not args.fsdp and not _is_set("ACCELERATE_USE_FSDP"):
        return
    plugin: dict[str, Any] = args.fsdp_plugin_args or {}
    version = int(plugin.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        raise ValueError(
            f"fsdp version {version} is not supported: its flattened parameters hide the modules of the nodes; set "
            "fsdp_config={'version': 2}, or --fsdp_version 2 for `accelerate launch`"
        )
    if (args.fsdp_config or {}).get("xla"):  # type: ignore[union-attr]
        raise ValueError("fsdp_config['xla']=True is not supported: use FSDP2 of PyTorch")
    if str(args.distributed_state.distributed_type).endswith("MULTI_CPU"):  # type: ignore[union-attr]
        raise ValueError(
            f"fsdp={args.fsdp!r} on the CPU is not supported: Accelerate leaves it out there without a word, and "
            "every process would hold the whole model"
        )


def check_processes(args: TrainingArguments, config: PCConfig, train_dataset: Any, eval_dataset: Any = None) -> None:
    """Raise ValueError, on every process, where processes were given different things, or too little for each.

    Called when training starts, by every process.
    """
    rows = len(train_dataset) if has_length(train_dataset) else None
    several = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    evaluated = {name: len(data) if has_length(data) else None for name, data in several.items()}
    own = {f"PCConfig.{name}": value for name, value in config.to_dict().items()}
    own |= {f"args.{name}": getattr(args, name, None) for name in SHARED}
    own |= {"rows of train_dataset": rows, "rows of eval_dataset": evaluated}
    same_everywhere(own)
    count = process_count()
    if rows is not None and count > 1 and rows < count:
        raise ValueError(
            f"train_dataset has {rows} rows for {count} processes: at least {count} are needed, one for each"
        )
    even = args.accelerator_config.even_batches is not False
    split = args.accelerator_config.split_batches
    step = args.per_device_train_batch_size * (1 if split else count)
    if rows is not None and count > 1 and not even and not args.dataloader_drop_last and rows % step:
        raise ValueError(
            f"accelerator_config.even_batches=False leaves {count} processes with unequal numbers of batches of "
            f"{rows} rows, and one would wait for ever; use True, or dataloader_drop_last=True"
        )


def check_targets(model: nn.Module) -> None:
    """Raise ValueError where a class of transformers learns from other inputs than `labels`."""
    names = [name for name in find_labels(type(base_model(model))) if name in SPANS or name.endswith("labels")]
    if names and "labels" not in names:
        raise ValueError(
            f"{type(base_model(model)).__name__} learns from {', '.join(names)}; what is learned here is the output "
            "energy of `labels`, and no other target is supported"
        )


def check_first_batch(batch: Mapping[str, Any]) -> None:
    """Raise ValueError, on every process, where one of them is left without a sequence; called by every process.

    What an iterable data set holds is known no sooner; later batches are filled up from the first one.
    """
    labels = batch.get("labels")
    empty = isinstance(labels, Tensor) and labels.ndim > 0 and not len(labels)
    at_once(
        f"the first batch has no sequence for process {process_index()}: train_dataset needs at least "
        f"{process_count()} rows, one for each process" if empty else None
    )  # fmt: skip
