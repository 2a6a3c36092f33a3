"""What a user chooses: `PCConfig`, `NodeSpec`, and their JSON file `pc_config.json`."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_pc.checks import LARGEST, check_choice, check_known, check_scale, check_string, check_whole
from hf_pc.json_files import read_json
from hf_pc.registry import Registry

PC_CONFIG_NAME = "pc_config.json"
DEFAULT_RELAXED_FRACTION = 0.03
DROPOUT_POLICIES = ("replay", "off")


def _split(text: str) -> list[str]:
    """The parts between commas, but for those inside brackets, which belong to a regular expression."""
    ends, depth = [-1], 0
    for i, character in enumerate(text):
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        if character == "," and not depth:
            ends.append(i)
    return [text[start + 1 : end] for start, end in zip(ends, [*ends[1:], len(text)], strict=True)]


@dataclass(frozen=True)
class NodeSpec:
    """One rule of placement: modules whose name matches `pattern` become nodes.

    Args:
        pattern: as PEFT's `target_modules`: a module's full name, the end of it after a dot ("mlp.down_proj"), or
            a regular expression that matches the whole name.
        energy: the name of a registered energy; None takes `PCConfig.energy`.
        precision: 1 / sigma^2 of this node's energy; None takes the strength of the PCConfig.
        step_factor: how large this node's steps are beside those of the others.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    pattern: str
    energy: str | None = None
    precision: float | None = None
    step_factor: float = 1.0

    def __post_init__(self) -> None:
        check_string("NodeSpec", "pattern", self.pattern)
        if self.energy is not None:
            check_string("NodeSpec", "energy", self.energy)
        if self.precision is not None:
            check_scale("NodeSpec", "precision", self.precision)
        check_scale("NodeSpec", "step_factor", self.step_factor)

    @classmethod
    def parse(cls, value: object) -> NodeSpec:
        """A NodeSpec from itself, a pattern, or its dictionary."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, dict):
            check_known("NodeSpec", value, cls)
            if "pattern" not in value:
                raise ValueError(f"NodeSpec {value!r} lacks the field 'pattern'")
            return cls(**value)
        raise ValueError(f"PCConfig.nodes holds {value!r}: a pattern, a NodeSpec or its dictionary is needed")


@dataclass
class PCConfig:
    """How a model is relaxed and learns (Pinchetti et al. 2022, arXiv 2211.03481).

    One of `precision`, `relative_std` and `relaxed_fraction` says how strongly errors are penalised; with
    none given, `relaxed_fraction` is 0.03.

    Args:
        nodes: a preset ("block", "sublayer", "linear"), a pattern, or a list of presets, patterns and `NodeSpec`s.
        energy: the energy of internal nodes, the name of a registered energy.
        attention_energy: an energy of the attention logits, "categorical" or "gaussian"; None makes them no nodes.
        learning: what the weights learn from (see `hf_pc.learning`): "plain", the relaxed states; "centred",
            relaxations towards and away from the labels; "extrapolated", two such pairs; "mirrored" and
            "balanced", the same with half of the sequences on each side, at half the cost; "one_sided", several
            strengths towards the labels, for strong relaxation; "wake_sleep", the relaxed states less those of the
            model's own labels. All but "plain" need the solver "error".
        strengths: of "one_sided", the factors on the output energy, from 1 down; None is 1, 1/2, 1/4, 1/8. Each costs
            a relaxation; n of them leave an error of order n in 1/precision.
        output: the output node's energy: "categorical", "gaussian", "bernoulli", or "auto" for what the model's
            own loss does with labels.
        precision: 1 / sigma^2, the same for every node.
        relative_std: sigma as a multiple of the RMS of the node's predictions in the optimiser step before; in the
            first step, of each token's own.
        relaxed_fraction: a target for how far relaxation changes the output's gradient at the last node, relative to
            it. A controller steers `relative_std` to hold it, once per optimiser step.
        bias_limit: the most `signal_bias` that this controller lets stand (see `RelaxationOutput`): over it errors are
            penalised more, whatever relaxed_fraction asks for. For "centred", "extrapolated" and "one_sided", whose
            phases cancel in each sequence; None lets any stand. Strong relaxation needs it, about 0.05.
        solver: the name of a registered solver.
        sweeps: passes over the network per relaxation, T >= 1, the learning pass included; a rule of `learning` with
            several phases relaxes several times. T = 1 is backprop for Gaussian nodes of the `error` solver at step 1
            or "auto" (with a Gaussian output, of half the squared error).
        step_size: "auto" (each sequence's free energy never rises; 0.4 of `lagrangian`, 0.5 of `langevin`) or a number
            in units of 1/precision.
        anderson_depth: moves that the acceleration of step "auto" remembers, 0 (none) to 10. With five
            sweeps or more, three or four bring strong relaxation nearer to rest (solver "error"); each beyond the
            first is kept as two copies of the errors.
        state_optimizer: a class of torch.optim, "Adam" or "SGD(momentum=0.9)", that moves the states of the `state`
            and `lagrangian` solvers; `step_size` is its learning rate. None steps down the gradient.
        weight_update: "final" (weights learn once the states have relaxed) or "every_sweep" (incremental PC, arXiv
            2212.00720: weights move with the states, by the Trainer's optimizer; solvers "state" and "lagrangian").
        tolerance: residual under which a sequence is at rest and moves no more (with step "auto"); the relaxation
            ends once all are. 0 never stops early.
        dropout: "replay" (each sweep of a step sees the same mask) or "off" (no dropout while training by PC: all but
            norms with running statistics is in evaluation mode, in which transformers checkpoints no activations).
        relaxation_dtype: "bfloat16" or "float16": sweeps between the first and the last run under `torch.autocast` in
            it (solvers "error" and "langevin", weights in float32; errors stay in float32). None relaxes as it learns.
        compile: `torch.compile` the forward of each node's module and the output energy; not with attention logits or
            nodes inside nodes.
        cuda_graph: record each step as one CUDA graph, which takes a GPU that one process has for itself and a model
            that draws no random numbers (see `hf_pc.cuda_graph`).

    Raises:
        ValueError: an unknown name, an impossible combination or a value out of range; the message names the
            field, its value and what is allowed.
    """

    # unions are ordered as HfArgumentParser reads them: the command line gives text for both fields
    nodes: list[NodeSpec] | str | None = field(
        default="block", metadata={"help": "Presets (block, sublayer, linear) or patterns, separated by commas."}
    )
    energy: str = field(default="gaussian", metadata={"help": "Energy of internal nodes."})
    attention_energy: str | None = field(
        default=None, metadata={"help": "Energy of attention logits: categorical or gaussian."}
    )
    learning: Literal["plain", "centred", "extrapolated", "mirrored", "balanced", "one_sided", "wake_sleep"] = field(
        default="plain",
        metadata={"help": "What weights learn from: one relaxation, or several."},
    )
    strengths: list[float] | None = field(
        default=None, metadata={"help": "Of one_sided: factors on the output energy, from 1 down."}
    )
    output: str = field(default="auto", metadata={"help": "Energy of the output: categorical, gaussian, bernoulli."})
    precision: float | None = field(default=None, metadata={"help": "Fixed 1/sigma^2 of every node."})
    relative_std: float | None = field(
        default=None, metadata={"help": "sigma as a multiple of the RMS of a node's predictions."}
    )
    relaxed_fraction: float | None = field(
        default=None,
        metadata={"help": "Target for how far relaxation changes the output's gradient; steers relative_std."},
    )
    bias_limit: float | None = field(
        default=None, metadata={"help": "Most signal_bias that a steered relaxed_fraction may reach."}
    )
    solver: str = field(default="error", metadata={"help": "How the errors relax."})
    sweeps: int = field(default=3, metadata={"help": "Passes per step, the learning pass included; 1 is backprop."})
    step_size: float | str | None = field(
        default="auto", metadata={"help": '"auto" or a number, units of 1/precision.'}
    )
    anderson_depth: int = field(
        default=1, metadata={"help": 'Moves that the acceleration of step "auto" remembers; 0 is none.'}
    )
    state_optimizer: str | None = field(
        default=None, metadata={"help": "A class of torch.optim for the states, such as Adam or SGD(momentum=0.9)."}
    )
    weight_update: Literal["final", "every_sweep"] = field(
        default="final", metadata={"help": "Weights move after relaxation, or at every sweep (iPC)."}
    )
    tolerance: float = field(default=0.0, metadata={"help": "Residual under which a sequence stops relaxing."})
    dropout: Literal["replay", "off"] = field(
        default="replay", metadata={"help": "Same mask in every sweep of a step, or no dropout."}
    )
    relaxation_dtype: str | None = field(
        default=None, metadata={"help": "bfloat16 or float16, of sweeps between the first and the last."}
    )
    compile: bool = field(default=False, metadata={"help": "Compile each node's module and the output energy."})
    cuda_graph: bool = field(default=False, metadata={"help": "Record each step as one CUDA graph."})

    def __post_init__(self) -> None:
        from hf_pc.combinations import check as check_combinations
        from hf_pc.solvers import SOLVERS

        self._normalise_nodes()
        self._check_names()
        self._check_strength()
        check_whole("PCConfig", "sweeps", self.sweeps, least=1)
        self._normalise_step_size()
        tolerance_ok = isinstance(self.tolerance, (int, float)) and not isinstance(self.tolerance, bool)
        if not tolerance_ok or not 0 <= self.tolerance < 1:
            raise ValueError(f"PCConfig.tolerance={self.tolerance!r} is not allowed: 0 <= tolerance < 1 is needed")
        for name in ("compile", "cuda_graph"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"PCConfig.{name}={value!r} is not allowed: true or false is needed")
        check_choice("PCConfig", "dropout", self.dropout, DROPOUT_POLICIES)
        check_combinations(self, SOLVERS[self.solver])
        if self.strengths is not None:
            self.strengths = [float(value) for value in self.strengths]

    def _check_names(self) -> None:
        """Of what is looked up in a registry."""
        from hf_pc.energies import ENERGIES
        from hf_pc.output import OUTPUTS
        from hf_pc.solvers import SOLVERS

        defaults = (("output", "auto"), ("attention_energy", None))
        registries: dict[str, Registry[Any]] = {
            "energy": ENERGIES,
            "attention_energy": ENERGIES,
            "solver": SOLVERS,
            "output": OUTPUTS,
        }
        for name, registry in registries.items():
            value = getattr(self, name)
            if (name, value) in defaults:
                continue
            check_string("PCConfig", name, value)
            check_choice("PCConfig", name, value, registry.names())

    def _check_strength(self) -> None:
        """That there is one of the three that say it."""
        strengths = {n: getattr(self, n) for n in ("precision", "relative_std", "relaxed_fraction")}
        given = {n: v for n, v in strengths.items() if v is not None}
        if len(given) > 1 and given.get("relaxed_fraction") == DEFAULT_RELAXED_FRACTION:
            self.relaxed_fraction = None  # the default gives way, as when dataclasses.replace sets another
            del given["relaxed_fraction"]
        if len(given) > 1:
            both = " and ".join(f"{n}={v!r}" for n, v in given.items())
            raise ValueError(
                f"PCConfig.{both} exclude each other: give one of precision, relative_std, relaxed_fraction"
            )
        if not given:
            self.relaxed_fraction = DEFAULT_RELAXED_FRACTION
        for name, value in given.items():
            upper = {"relaxed_fraction": 1.0, "relative_std": 1e6}.get(name, LARGEST)
            check_scale("PCConfig", name, value, upper=upper)

    def _normalise_nodes(self) -> None:
        if isinstance(self.nodes, str):
            check_string("PCConfig", "nodes", self.nodes)
            parts = _split(self.nodes)
            if len(parts) > 1:
                self.nodes = [NodeSpec.parse(part.strip()) for part in parts]
        elif isinstance(self.nodes, (list, tuple)) and self.nodes:
            self.nodes = [NodeSpec.parse(part) for part in self.nodes]
        else:
            raise ValueError(f"PCConfig.nodes={self.nodes!r} is not allowed: a preset, a pattern or a list is needed")

    def _normalise_step_size(self) -> None:
        if isinstance(self.step_size, str) and self.step_size != "auto":
            try:
                self.step_size = float(self.step_size)  # a command line gives text
            except ValueError:
                raise ValueError(
                    f"PCConfig.step_size={self.step_size!r}: 'auto' or a number above 0 is needed"
                ) from None
        if self.step_size != "auto":
            check_scale("PCConfig", "step_size", self.step_size)

    @property
    def specs(self) -> list[NodeSpec]:
        """The rules of placement that are written out; a preset is none."""
        return self.nodes if isinstance(self.nodes, list) else []

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` gives the same configuration back."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, given: PCConfig | dict[str, Any] | None) -> PCConfig:
        """What a caller gave: a configuration, its dictionary, or None for the defaults. Raises ValueError else."""
        if given is None or isinstance(given, dict):
            return cls.from_dict(given or {})
        if not isinstance(given, cls):
            raise ValueError(f"a PCConfig, its dictionary or None is needed, not {reprlib.repr(given)}")
        return given

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PCConfig:
        """The inverse of `to_dict`. Raises ValueError on anything malformed."""
        if not isinstance(values, dict):
            raise ValueError(f"a PCConfig is made from a JSON object, not from {type(values).__name__}")
        check_known("PCConfig", values, cls)
        try:
            return cls(**values)
        except RecursionError:
            raise ValueError("a PCConfig is made from a JSON object, not from one that is nested so deeply") from None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `pc_config.json` into `folder` and return its path."""
        path = Path(folder) / PC_CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> PCConfig:
        """Read `pc_config.json` from a folder or a Hub repository.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is malformed.
        """
        values = read_json(path_or_repo, PC_CONFIG_NAME, **hub_kwargs)
        if values is None:
            raise FileNotFoundError(f"{path_or_repo} holds no {PC_CONFIG_NAME}: it was not saved by hf_pc")
        return cls.from_dict(values)
