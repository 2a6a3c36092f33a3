"""PCConfig: what is allowed, what is refused by name, and its file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_invariants import make

from hf_pc import NodeSpec, PCConfig, PCModel
from hf_pc.config import DEFAULT_RELAXED_FRACTION

LIMITED = {"learning": "one_sided", "bias_limit": 0.05}
DRAWN = {"solver": "langevin", "relative_std": 0.3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sweeps": 0}, "sweeps=0"),
        ({"sweeps": 2.5}, "sweeps=2.5"),
        ({"precision": -1.0}, "precision=-1.0"),
        ({"precision": 1.0, "relative_std": 0.1}, "exclude each other"),
        ({"relaxed_fraction": 1.5}, "relaxed_fraction=1.5"),
        ({"relative_std": float("nan")}, "relative_std=nan"),
        ({"step_size": "fast"}, "step_size='fast'"),
        ({"step_size": 0}, "step_size=0"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"dropout": "maybe"}, "dropout='maybe'"),
        ({"nodes": [{"energy": "laplace"}]}, "lacks the field 'pattern'"),
        ({"attention_energy": "learned_variance"}, "attention_energy='learned_variance' is not allowed"),
        (
            {"nodes": [{"pattern": "h.0", "energy": "learned_variance"}]},
            "NodeSpec 'h.0'.energy='learned_variance' needs",
        ),
        ({"state_optimizer": "Adam"}, "state_optimizer='Adam' needs solver='lagrangian' or 'state', not 'error'"),
        (
            {"relaxation_dtype": "float32"},
            "relaxation_dtype='float32' is unknown; allowed: 'bfloat16', 'float16', None",
        ),
        ({"relaxation_dtype": "float16", "solver": "state"}, "needs solver='error' or 'langevin', not 'state'"),
        ({"energy": "gausian"}, "energy='gausian'.*'gaussian'"),
        ({"solver": "adam"}, "solver='adam'.*'error'"),
        ({"anderson_depth": 11}, "anderson_depth=11 is not allowed: a whole number from 0 to 10"),
        ({"anderson_depth": True}, "anderson_depth=True"),
        ({"anderson_depth": 2, "step_size": 0.3}, "anderson_depth=2 needs solver='error' and .* not 'error' and 0.3"),
        (
            {"anderson_depth": 2, "solver": "state"},
            "anderson_depth=2 needs solver='error' and .* not 'state' and 'auto'",
        ),
        (LIMITED | {"bias_limit": 0}, "bias_limit=0 is not allowed"),
        (LIMITED | {"bias_limit": True}, "bias_limit=True is not allowed"),
        (LIMITED | {"bias_limit": 1.0}, "bias_limit=1.0 is not allowed: a number between 0 and 1"),
        (LIMITED | {"relative_std": 1.0}, "bias_limit=0.05 needs relaxed_fraction"),
        (LIMITED | {"learning": "balanced"}, "'centred' or 'extrapolated' or 'one_sided', not 'balanced'"),
        (LIMITED | {"learning": "plain"}, "not 'plain', which has no phases whose bias cancels"),
        ({"solver": "langevin"}, "solver='langevin' needs precision or relative_std"),
        (DRAWN | {"energy": "laplace"}, "PCConfig.energy='laplace' is not allowed"),
        (DRAWN | {"attention_energy": "categorical"}, "attention_energy='categorical' is not allowed"),
        (
            DRAWN | {"nodes": [{"pattern": "h.0", "energy": "laplace"}]},
            "NodeSpec 'h.0'.energy='laplace' is not allowed",
        ),
        (DRAWN | {"anderson_depth": 2}, "anderson_depth=2 needs solver='error' and .* not 'langevin' and 'auto'"),
        (DRAWN | {"tolerance": 0.1}, "tolerance=0.1 is not allowed with solver='langevin'"),
        (DRAWN | {"step_size": 2}, "step_size=2 times NodeSpec.step_factor=1 is not allowed"),
        (
            DRAWN | {"nodes": [{"pattern": "h.0", "step_factor": 4.0}]},
            "'auto' times NodeSpec.step_factor=4 is not allowed",
        ),
        (DRAWN | {"learning": "centred"}, "learning='centred' needs solver='error', not 'langevin'"),
        ({"nodes": []}, "nodes="),
        ({"nodes": [3]}, "nodes"),
        ({"relaxd_fraction": 0.1}, "nearest names are 'relaxed_fraction'"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    """A wrong field or value is a ValueError that names it and what is allowed."""
    with pytest.raises(ValueError, match=message):
        PCConfig.from_dict(values)


def test_default_strength_is_a_target() -> None:
    """With no strength given, relaxed_fraction is the documented target."""
    assert PCConfig().relaxed_fraction == DEFAULT_RELAXED_FRACTION
    assert PCConfig(precision=2.0).relaxed_fraction is None


def test_file_round_trip(tmp_path: Path) -> None:
    """pc_config.json gives the same configuration back, node specifications included."""
    config = PCConfig(nodes=[NodeSpec("h.0", precision=2.0), NodeSpec("h.1")], relative_std=0.3, step_size=0.5)
    config.save_pretrained(tmp_path)
    assert PCConfig.from_pretrained(tmp_path) == config
    assert [p.name for p in tmp_path.iterdir()] == ["pc_config.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
FIELDS = st.sampled_from(list(PCConfig().to_dict()))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of other work on the machine
@given(st.dictionaries(FIELDS | st.text(max_size=5), JSON, max_size=4) | JSON)
def test_malformed_files_are_value_errors(values: Any) -> None:
    """Whatever JSON is in the file, the outcome is a configuration or a ValueError."""
    try:
        config = PCConfig.from_dict(json.loads(json.dumps(values)))
    except ValueError:
        return
    assert PCConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("blok", "neither a preset"),
        (["transformer.h.9"], r"nearest names are .*transformer\.h"),
        (["h.0", "transformer.h.0"], "one rule each"),
    ],
)
def test_nodes_that_do_not_fit_the_model(nodes: Any, message: str) -> None:
    """Unknown presets and patterns that match nothing say the nearest names; the model is left as it was."""
    model = make("gpt2")
    with pytest.raises(ValueError, match=message):
        PCModel(model, PCConfig(nodes=nodes))
    assert not any(m._forward_hooks for m in model.transformer.h)


def test_patterns_and_their_precision() -> None:
    """A NodeSpec places a node by the end of a module's name and gives it a precision of its own."""
    pc = PCModel(make("gpt2"), PCConfig(nodes=[NodeSpec("h.0.mlp", precision=7.0), NodeSpec(r".*\.h\.2")]))
    assert [(node.name, node.precision) for node in pc.nodes] == [
        ("transformer.h.0.mlp", 7.0),
        ("transformer.h.2", None),
    ]


@pytest.mark.parametrize("name", ["precision", "relative_std"])
@pytest.mark.parametrize("value", [10**400, 1e300, 1e-320, float("nan"), float("inf"), -1.0, 0, True, "1"])
def test_scales_that_run_over(name: str, value: object) -> None:
    """A scale beyond float32's reach is refused by name, as a number or from a file."""
    with pytest.raises(ValueError, match=name):
        PCConfig.from_dict({name: value})


def test_replacing_the_strength() -> None:
    """The default target gives way to a strength that dataclasses.replace sets."""
    assert dataclasses.replace(PCConfig(), precision=2.0).relaxed_fraction is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Sgd", "Sgd is no class of torch.optim"),
        ("LBFGS", "no class of torch.optim for dense"),
        ("SGD(momentum=", "never closed"),
        ("SGD(0.1)", "named arguments"),
        ("SGD(lr=0.1)", "its learning rate is step_size"),
        ("SGD(speed=1)", "speed"),
        ("SGD(momentum=-1)", "momentum"),
        ("__import__('os').system('true')", "a name, or a name with named arguments"),
        ("SGD(momentum=print())", "not allowed"),
        ("Adam(betas=(0.9,))", "not allowed"),
        ("optim.SGD(momentum=0.9)", "a name, or a name with named arguments"),
        ("SGD(maximize=True)", "maximize=True leads up the free energy"),
        ("Adam(foreach=True, fused=True)", "not allowed"),
    ],
)
def test_state_optimizers_that_cannot_be(text: str, message: str) -> None:
    """What is no class of torch.optim with literal arguments is an error by name, and runs nothing."""
    with pytest.raises(ValueError, match=r"PCConfig\.state_optimizer=.*" + re.escape(message)):
        PCConfig(solver="state", step_size=0.1, state_optimizer=text)
