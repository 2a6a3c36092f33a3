"""pc_config.json and pc_state.json come from anywhere: 10,000 and 2,000 broken ones, the same in every run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_invariants import batch, make

from hf_pc import NodeSpec, PCConfig, PCModel
from hf_pc.json_files import read_json_file

CONFIGS = [
    PCConfig(),
    PCConfig(nodes=[NodeSpec("h.0", precision=2.0), NodeSpec("h.1", energy="laplace")], relative_std=0.3),
    PCConfig(solver="state", step_size=0.1, state_optimizer="SGD(momentum=0.9)", attention_energy="gaussian"),
    PCConfig(nodes="linear", energy="learned_variance", precision=3.0, sweeps=1, tolerance=0.1, dropout="off"),
]
STATE = {"relative_std": 0.2, "rows": 1, "activity": {"transformer.h.0": 1.5},
         "energies": {"transformer.h.0": {"log_std": [0.1] * 32}}}  # fmt: skip
#: values as they would stand in the file; N is replaced by a depth or a length
TEXTS = [
    "NaN", "-Infinity", "1e999", "-1e308", "1e-320", "0", "-1", "2.5", "10" * 200, "1" * 5000, "true", "null", "[]",
    "{}", '""', '"\\ud800"', '"\\u0000"', '"auto"', '"1e400"', '"nan"', '"state"', '"every_sweep"', '"gaussian"',
    '"block,linear"', '"(a+"', '"a{99999999999}"', "[1, [2, {}]]", '{"pattern": 1}', '{"pattern": "h", "x": 1}',
    '[{"pattern": "h", "precision": 1e999}]', '[{"pattern": "h", "energy": ["gaussian"]}]', "[null]", '{"a": {}}',
    '"Adam(betas=1)"', '"SGD(momentum=1+2j)"', '"SGD(nesterov=True)"', '"Adam(eps=[])"', '"SGD(momentum={}[0])"',
    '"Rprop(etas=(1,))"', '"().__class__"', '"SGD(**{})"', '"Adam(weight_decay=\'x\')"', '"SGD(momentum=1e999)"',
]  # fmt: skip
NESTED = ["[", '{"a":', '"' + "(", '"Adam(eps=' + "-", '"SGD(momentum=' + "[", '"' + "a,"]
ODD = [b"", b"\x00", b"\xff\xfe{}", "\ufeff{}".encode(), "{}".encode("utf-16"), b"[]", b"3", b"null", b'"block"']


def nested(draw: random.Random) -> str:
    """Something in itself, very often: brackets, a regular expression, an argument of an optimizer."""
    opening = draw.choice(NESTED)
    depth = draw.choice([3, 90, 300, 900, 20_000])
    closing = {"[": "]", '{"a":': "1}"}.get(opening)
    if closing is not None:
        return opening * depth + "1" * (closing == "]") + ("]" * depth if closing == "]" else "1" + "}" * depth)
    return opening[:-1] + opening[-1] * depth + ('"' if opening != '"a,' else 'b"')


def broken(draw: random.Random, values: dict[str, Any]) -> bytes:
    """One file: a whole one with a value exchanged, a key more, or damage to its bytes; or something else."""
    if draw.random() < 0.03:
        return draw.choice([*ODD, draw.randbytes(draw.randrange(200)), nested(draw).encode()])
    fields = {name: json.dumps(value) for name, value in values.items()}
    for _ in range(draw.choice([0, 1, 1, 2])):
        name = draw.choice([*fields, "unknown", "", "sweeps ", "__class__", "x" * 5000])
        value = draw.choice([nested(draw), *draw.choices(TEXTS, k=12), *draw.choices(list(fields.values()), k=3)])
        fields[name if draw.random() < 0.9 else f'{name}": 1, "{name}'] = value  # the latter: a key twice
    text = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    damage = draw.random()
    if damage < 0.15:
        del data[draw.randrange(len(data)) :]
    elif damage < 0.4:
        for _ in range(draw.randrange(1, 5)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif damage < 0.5:
        at, to = sorted(draw.choices(range(len(data)), k=2))
        data[at:at] = data[at : min(to, at + 100)]
    return bytes(data)


def survivors(path: Path, count: int, sources: list[dict[str, Any]], load: Callable[[], Any]) -> int:
    """How many of `count` files load; whatever else `load` raises than ValueError is raised here."""
    draw, loaded = random.Random(0), 0
    for _ in range(count):
        path.write_bytes(data := broken(draw, draw.choice(sources)))
        try:
            load()
        except ValueError:
            continue
        except BaseException as error:
            error.add_note(f"the file begins with {data[:300]!r}")
            raise
        loaded += 1
    return loaded


def test_a_broken_configuration_is_a_value_error(tmp_path: Path) -> None:
    """Of 10,000 broken files each is a ValueError, or a configuration that comes back from its own dictionary."""

    def load() -> None:
        config = PCConfig.from_pretrained(tmp_path)
        assert PCConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    loaded = survivors(tmp_path / "pc_config.json", 10_000, [config.to_dict() for config in CONFIGS], load)
    assert 500 < loaded < 5_000  # neither is refused whatever was touched, nor is all taken


def test_a_broken_state_is_a_value_error(tmp_path: Path) -> None:
    """Of 2,000 broken files each is a ValueError, or a state that is written again as numbers."""
    pc = PCModel(make("gpt2"), PCConfig(energy="learned_variance", relative_std=0.2))

    def load() -> None:
        pc.load_state_dict(read_json_file(tmp_path / "pc_state.json"))
        assert math.isfinite(pc.relative_std)
        json.dumps(pc.state_dict(), allow_nan=False)

    assert 100 < survivors(tmp_path / "pc_state.json", 2_000, [STATE], load) < 1_000


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 3000 + ")" * 3000, "h.[", "\x00"])
def test_patterns_that_are_no_expressions(pattern: str) -> None:
    """What no regular expression can be made of matches nothing, which is said as ever."""
    with pytest.raises(ValueError, match="neither a preset"):
        PCModel(make("gpt2"), PCConfig(nodes=[pattern]))


def test_learned_variances_that_cannot_be() -> None:
    """Variances of another width, or beyond their limits, are errors by name."""
    pc = PCModel(make("gpt2"), PCConfig(energy="learned_variance", relative_std=0.2))
    for wrong in ("1", [None], [True], [float("nan")], [1e9], {"a": 1}, [[0.0]]):
        with pytest.raises(ValueError, match="log_std"):
            pc.load_state_dict(STATE | {"energies": {"transformer.h.0": {"log_std": wrong}}})
    pc.load_state_dict(STATE | {"energies": {"transformer.h.0": {"log_std": [0.0]}}})
    with pytest.raises(ValueError, match="width 32"):
        pc.relax(**batch())
