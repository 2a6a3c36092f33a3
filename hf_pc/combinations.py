"""What the fields of a `PCConfig` may be beside each other; errors name the field, its value and what it needs."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from hf_pc.checks import SMALLEST, check_choice, check_scale, check_string, check_whole
from hf_pc.learning import RULES, cancels_in_each_sequence, taken_to_zero
from hf_pc.solvers.base import SOLVERS, Solver
from hf_pc.solvers.optimizers import parse_optimizer

if TYPE_CHECKING:
    from hf_pc.config import PCConfig

WEIGHT_UPDATES = ("final", "every_sweep")
RELAXATION_DTYPES = ("bfloat16", "float16")
#: the most moves that acceleration may remember
DEEPEST = 10
#: what extrapolation from several strengths may do with the phases: add up their residuals so often, and weigh one so
#: little that a half precision loses it
MOST_STRENGTHS, LARGEST_SHARES, SMALLEST_SHARE = 8, 100.0, 1e-4


def check(config: PCConfig, solver: type[Solver]) -> None:
    """Raise ValueError unless the solver can follow the configuration, whose single values are right."""
    _check_learning(config, solver)
    _check_strengths(config)
    _check_bias_limit(config)
    _check_depth(config, solver)
    _check_energies(config)
    _check_precision(config, solver)
    _check_updates(config, solver)
    _check_recording(config)
    solver.check(config)


def _check_learning(config: PCConfig, solver: type[Solver]) -> None:
    """`learning`, and what its phases need."""
    learning = config.learning
    check_string("PCConfig", "learning", learning)
    check_choice("PCConfig", "learning", learning, RULES)
    if learning != "plain" and not solver.takes_phases:
        raise ValueError(f"PCConfig.learning={learning!r} needs {_with('takes_phases')}, not {config.solver!r}")
    if learning != "plain" and config.step_size != "auto":
        raise ValueError(
            f"PCConfig.learning={learning!r} needs step_size='auto', not {config.step_size!r}: phases relaxed by "
            "unequal amounts do not cancel"
        )


def _check_strengths(config: PCConfig) -> None:
    """`strengths`: that extrapolation from them is well-conditioned."""
    strengths = config.strengths
    if strengths is None:
        return
    if config.learning != "one_sided":
        raise ValueError(f"PCConfig.strengths={strengths!r} needs learning='one_sided', not {config.learning!r}")
    given = strengths if isinstance(strengths, (list, tuple)) else []
    numbers = [v for v in given if isinstance(v, (int, float)) and not isinstance(v, bool)]
    falls = all(higher > lower >= SMALLEST for higher, lower in pairwise(numbers))
    if len(numbers) < len(given) or not 2 <= len(numbers) <= MOST_STRENGTHS or numbers[0] != 1 or not falls:
        raise ValueError(
            f"PCConfig.strengths={strengths!r} is not allowed: a list of two to {MOST_STRENGTHS} Python numbers is "
            f"needed, the first 1, each under the one before and no less than {SMALLEST:g}"
        )
    shares = [abs(phase.share) for phase in taken_to_zero(*numbers)]
    if not sum(shares) <= LARGEST_SHARES:
        raise ValueError(
            f"PCConfig.strengths={strengths!r} is not allowed: they are too close together, so that what each phase "
            f"leaves is taken {sum(shares):.3g} times; at most {LARGEST_SHARES:g} times is allowed"
        )
    if min(shares) < SMALLEST_SHARE:
        raise ValueError(
            f"PCConfig.strengths={strengths!r} is not allowed: they are too far apart, so that one carries "
            f"{min(shares):.1g} of the gradient; at least {SMALLEST_SHARE:g} is needed"
        )


def _check_bias_limit(config: PCConfig) -> None:
    """`bias_limit`: that there is a controller, and a bias that it can lower."""
    limit = config.bias_limit
    if limit is None:
        return
    check_scale("PCConfig", "bias_limit", limit, upper=1.0)
    if config.relaxed_fraction is None:
        raise ValueError(f"PCConfig.bias_limit={limit!r} needs relaxed_fraction: no other strength is steered")
    allowed = [rule for rule, phases in RULES.items() if cancels_in_each_sequence(phases)]
    if config.learning not in allowed:
        raise ValueError(
            f"PCConfig.bias_limit={limit!r} needs learning={' or '.join(map(repr, allowed))}, not "
            f"{config.learning!r}, which has no phases whose bias cancels in each sequence"
        )


def _check_depth(config: PCConfig, solver: type[Solver]) -> None:
    """`anderson_depth`."""
    depth = config.anderson_depth
    check_whole("PCConfig", "anderson_depth", depth, least=0, most=DEEPEST)
    if depth > 1 and not (solver.accelerates and config.step_size == "auto"):
        raise ValueError(
            f"PCConfig.anderson_depth={depth!r} needs {_with('accelerates')} and step_size='auto', not "
            f"{config.solver!r} and {config.step_size!r}: other moves are not accelerated further"
        )


def _check_energies(config: PCConfig) -> None:
    """Energies that learn, and attention inside compiled blocks."""
    if config.attention_energy == "learned_variance":
        raise ValueError(
            "PCConfig.attention_energy='learned_variance' is not allowed: the keys of a sequence are as many as its "
            "tokens, so no variance can be learned for each"
        )
    fields: dict[str, str | None] = {"PCConfig.energy": config.energy}
    fields |= {f"NodeSpec {node.pattern!r}.energy": node.energy for node in config.specs if node.precision is None}
    learning = [field for field, energy in fields.items() if energy == "learned_variance"]
    if learning and config.relaxed_fraction is not None:
        raise ValueError(
            f"{learning[0]}='learned_variance' needs precision or relative_std: a steered relaxed_fraction would take "
            "back what the variances learn, until all are at their floor"
        )
    if config.compile and config.attention_energy is not None:
        raise ValueError(
            f"PCConfig.compile=True excludes attention_energy={config.attention_energy!r}: a node inside compiled "
            "code would be skipped"
        )


def _check_precision(config: PCConfig, solver: type[Solver]) -> None:
    """`relaxation_dtype`, which needs errors that are no differences."""
    dtype = config.relaxation_dtype
    check_choice("PCConfig", "relaxation_dtype", dtype, (*RELAXATION_DTYPES, None))
    if dtype is not None and not solver.stores_errors:
        raise ValueError(
            f"PCConfig.relaxation_dtype={dtype!r} needs {_with('stores_errors')}, not {config.solver!r}: the rounding "
            "of a prediction would be an error of its state"
        )


def _check_updates(config: PCConfig, solver: type[Solver]) -> None:
    """`weight_update` and `state_optimizer`, which only solvers that move states follow."""
    update, optimizer = config.weight_update, config.state_optimizer
    check_choice("PCConfig", "weight_update", update, WEIGHT_UPDATES)
    if update == "every_sweep" and not solver.moves_weights:
        raise ValueError(f"PCConfig.weight_update={update!r} needs {_with('moves_weights')}, not {config.solver!r}")
    if optimizer is None:
        return
    check_string("PCConfig", "state_optimizer", optimizer)
    parse_optimizer(optimizer)
    if not solver.takes_optimizer:
        raise ValueError(
            f"PCConfig.state_optimizer={optimizer!r} needs {_with('takes_optimizer')}, not {config.solver!r}"
        )
    if config.step_size == "auto":
        raise ValueError(
            f"PCConfig.state_optimizer={optimizer!r} needs a number as step_size, its learning rate; it is 'auto'"
        )


def _check_recording(config: PCConfig) -> None:
    """`cuda_graph`: that nothing in a step is drawn, or decided by what it measures."""
    needed = {"solver": ("error",), "learning": [rule for rule in RULES if rule != "wake_sleep"], "tolerance": (0,),
              "attention_energy": (None,)}  # fmt: skip
    for name, allowed in needed.items() if config.cuda_graph else ():
        if (value := getattr(config, name)) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise ValueError(f"PCConfig.cuda_graph=True needs {name}={wanted}, not {value!r}: all steps are alike")


def _with(attribute: str) -> str:
    """The solvers of which this is true, as a choice."""
    return "solver=" + " or ".join(repr(name) for name in SOLVERS.names() if getattr(SOLVERS[name], attribute))
