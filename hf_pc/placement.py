"""Which modules of a model become PC nodes: presets found by structure, and patterns.

A block is what transformers marks with `GradientCheckpointingLayer`; a model without that marker is searched for its
longest list of equal modules and its like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from hf_pc.architecture import base_model, text_tower
from hf_pc.compilation import check_compilable
from hf_pc.config import NodeSpec, PCConfig
from hf_pc.energies import ENERGIES
from hf_pc.node import Node
from hf_pc.registry import Registry, nearest

Placement = Callable[[nn.Module], dict[str, nn.Module]]
PLACEMENTS: Registry[Placement] = Registry("nodes")
register_placement = PLACEMENTS.register
#: what holds modules and is not called itself
NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def _inside(name: str, outer: str) -> bool:
    return name.startswith(outer + ".") if outer else name != ""


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks of a model by name, in the order of its modules; empty if it has none.

    Of a model that puts images or sounds into its text (`text_tower`) those that see its text.
    """
    tower = text_tower(model)
    if tower is not None:
        return {f"{tower}.{name}": block for name, block in blocks(model.get_submodule(tower)).items()}
    marked: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(_inside(name, outer) for outer in marked):
            marked[name] = module
    return marked or _longest_list(model, 2) or _longest_list(model, 1)


def _longest_list(model: nn.Module, least: int) -> dict[str, nn.Module]:
    """The longest list of equal modules, and all others of the same class, as of further stages; of lists of one,
    which hold a shared layer, the innermost."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < max(least, len(found) + (least > 1)):
            continue
        if len(set(map(type, module))) == 1 and not isinstance(module[0], NEVER_CALLED):
            found = {f"{name}.{i}": child for i, child in enumerate(module)}
    if least == 1 or not found:
        return found
    kind = type(next(iter(found.values())))
    if kind.__module__.startswith("torch."):  # such a class says nothing of what its lists are
        return found
    alike: dict[str, nn.Module] = {}
    names = dict(model.named_modules())  # of what is in several lists the first
    for name, module in names.items():
        nested = any(_inside(name, outer) for outer in alike)
        if isinstance(module, nn.ModuleList) and {type(child) for child in module} == {kind} and not nested:
            alike |= {inner: child for i, child in enumerate(module) if (inner := f"{name}.{i}") in names}
    return alike


def _linear_like(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), (nn.Linear, Conv1D))  # itself, or what PEFT put into it


#: maps of relative positions (DeBERTa, the Conformers): they see no sequence, and so have no state
POSITIONS = ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj", "linear_pos")


def _running(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a module; where PEFT trains one whole, of its copies those in use."""
    copies = getattr(module, "modules_to_save", None)
    if not hasattr(module, "original_module") or not isinstance(copies, nn.ModuleDict):
        return list(module.named_children())
    active: list[str] = getattr(module, "active_adapters", list(copies))
    return [(f"modules_to_save.{name}", copies[name]) for name in active if name in copies]


def _linears(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in _running(module):
        path = f"{prefix}.{name}" if prefix else name
        if not _linear_like(child):
            yield from _linears(child, path)
        elif name not in POSITIONS:
            yield path, child


@register_placement("block")
def _block(model: nn.Module) -> dict[str, nn.Module]:
    """The residual stream after each transformer block."""
    return blocks(model)


@register_placement("sublayer")
def _sublayer(model: nn.Module) -> dict[str, nn.Module]:
    """Attention and MLP branches: a block's composite children, or the last of its bare linear maps."""
    found: dict[str, nn.Module] = {}
    for name, block in blocks(model).items():
        bare: dict[str, nn.Module] = {}
        for path, child in _branches(block, name):
            if _linear_like(child):
                bare = {path: child}
            elif dict(_linears(child, path)):
                found[path] = child
        found.update(bare)
    return found


def _branches(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _branches(child, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", child


@register_placement("linear")
def _linear(model: nn.Module) -> dict[str, nn.Module]:
    """The paper's: every linear map inside the blocks, and those of the head but its last, which is the output."""
    inside: dict[str, nn.Module] = {}
    for name, block in blocks(model).items():
        inside.update(_linears(block, name))
    base = base_model(model)
    within = next(name for name, module in model.named_modules() if module is base)
    for name, head in base.named_children() if text_tower(model) is None else ():
        outer = f"{within}.{name}" if within else name
        if any(_inside(path, outer) for path in inside) or _linear_like(head):
            continue
        inside.update(list(_linears(head, outer))[:-1])
    return inside


def _matches(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _by_pattern(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    names = dict(model.named_modules())
    base = base_model(model)
    outer = next(name for name, module in names.items() if module is base)  # of PEFT, whose own patterns leave it out
    prefix = f"{outer}." if outer else ""
    found = {
        name: module for name, module in names.items()
        if name and (_matches(pattern, name) or _matches(pattern, name.removeprefix(prefix)))
    }  # fmt: skip
    tower = text_tower(model)
    for name, module in found.items():
        if tower is not None and name != tower and not _inside(name, tower):
            raise ValueError(
                f"nodes={pattern!r} matches {name!r}, and of {type(model).__name__} only what is in {tower!r} can be "
                "a node: a batch has as many images or sounds as it has, whichever sequences they are of"
            )
        if isinstance(module, NEVER_CALLED):
            raise ValueError(
                f"nodes={pattern!r} matches {name!r}, a {type(module).__name__}, which is never called: choose what "
                f"is in it, such as {name + '.0'!r}"
            )
    if not found:
        ends = {name.rsplit(".", 1)[-1] for name in names} | set(names)
        raise ValueError(
            f"nodes={pattern!r} is neither a preset ({', '.join(PLACEMENTS.names())}) nor a pattern that matches a "
            f"module of {type(model).__name__}; the nearest names are {nearest(pattern, ends - {''})}"
        )
    return found


def _by_name(model: nn.Module, name: str) -> dict[str, nn.Module]:
    if name not in PLACEMENTS:
        return _by_pattern(model, name)
    found = PLACEMENTS[name](model)
    if not found:
        raise ValueError(
            f"nodes={name!r} finds no transformer block in {type(model).__name__}: give patterns, such as "
            "nodes=['layers.0', 'layers.1']"
        )
    return found


def innermost(nodes: Sequence[Node]) -> nn.Module:
    """The module of the first node that has none inside: as a rule the one that fires first."""
    return next(node.module for node in nodes if not any(_inside(other.name, node.name) for other in nodes))


def _check_weights(model: nn.Module) -> None:
    """Raise ValueError if weights are no numbers that a gradient passes through."""
    base = base_model(model)
    method = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    quantised = method is not None or getattr(base, "is_quantized", False)
    if quantised and not getattr(method, "dequantize", False):
        raise ValueError(
            f"{type(base).__name__} was loaded with quantised weights ({type(method).__name__}), which predictive "
            "coding cannot relax through: load it in float32 or bfloat16"
        )
    for name, module in model.named_modules():
        own = next(
            (n for n, p in module.named_parameters(recurse=False) if not p.is_floating_point() or p.itemsize < 2), None
        )
        if own is not None or ".quantized." in type(module).__module__:
            what = type(module).__name__ if own is None else f"{own} of dtype {getattr(module, own).dtype}"
            raise ValueError(f"module {name!r} has quantised weights ({what}), which predictive coding cannot relax "
                             "through: load the model in float32 or bfloat16")  # fmt: skip


def time_first(model: nn.Module, name: str) -> bool | None:
    """Whether the states of a module are [sequence, batch, features], by what it or the innermost module around it
    says; None where none of them does.

    An attribute `time_first` says so, XLNet's blocks have it so, and torch's transformer layers and attention have it
    so without `batch_first`. Gemma 3n's blocks, though not what is in them, have their streams first instead.
    """
    if type(model.get_submodule(name)).__name__ == "Gemma3nTextDecoderLayer":
        return True
    path = name.split(".")
    around = (model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1))
    return next((told for module in around if (told := _says_time_first(module)) is not None), None)


def _says_time_first(module: nn.Module) -> bool | None:
    told: bool | None = getattr(module, "time_first", None)
    if told is None and isinstance(module, nn.MultiheadAttention):
        told = not module.batch_first
    elif told is None and isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        told = not module.self_attn.batch_first
    elif told is None and type(module).__name__ == "XLNetLayer":
        told = True
    return told


def resolve(model: nn.Module, config: PCConfig) -> list[Node]:
    """The nodes that a configuration puts on a model, in the order of its modules.

    Raises:
        ValueError: a pattern matches nothing, a preset finds nothing, two rules hit one module, `compile` meets a
            node inside a node, or the model's weights are quantised.
    """
    _check_weights(model)
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(f"{type(model).__name__} is compiled as a whole, which skips the hooks of nodes: compile the "
                         "forward of each block instead, or nothing")  # fmt: skip
    chosen: dict[str, Node] = {}
    specs = [NodeSpec(config.nodes)] if isinstance(config.nodes, str) else config.nodes or []
    for spec in specs:
        for name, module in _by_name(model, spec.pattern).items():
            if name in chosen:
                raise ValueError(f"module {name!r} matches {spec.pattern!r} and another of the nodes: one rule each")
            energy = ENERGIES[spec.energy or config.energy]()
            first = time_first(model, name)
            chosen[name] = Node(name, module, energy, spec.precision, spec.step_factor, time_first=first)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    nodes = sorted(chosen.values(), key=lambda node: order[node.name])
    if config.compile:
        check_compilable(nodes)
    return nodes
