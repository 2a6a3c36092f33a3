"""Checks of values: errors that name the owner, the field, its value and what is allowed; flags of a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hf_pc.registry import nearest

#: what a scale may be: beyond it float32 runs over
SMALLEST, LARGEST = 1e-12, 1e12


def check_scale(owner: str, name: str, value: object, *, upper: float = LARGEST) -> None:
    """Raise ValueError unless `value` is a number between SMALLEST and `upper`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not SMALLEST <= value <= upper or value == 1 == upper:  # type: ignore[operator]
        allowed = "between 0 and 1, both excluded" if upper == 1 else f"above 0, from {SMALLEST:g} to {upper:g},"
        raise ValueError(f"{owner}.{name}={value!r} is not allowed: a number {allowed} is needed")


def check_known(owner: str, given: dict[str, Any], cls: type) -> None:
    """Raise ValueError unless each key of `given` is a field of the dataclass `cls`."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            raise ValueError(f"{owner} has no field {key!r}; the nearest names are {nearest(str(key), known)}")


def check_string(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a string that holds something."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{owner}.{name}={value!r} is not allowed: a non-empty string is needed")


def check_choice(owner: str, name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless `value` is one of those that are allowed."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{owner}.{name}={value!r} is unknown; allowed: {choices}")


def check_whole(owner: str, name: str, value: object, *, least: int, most: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{owner}.{name}={value!r} is not allowed: a whole number {allowed} is needed")


def known_to_hold(flags: Tensor) -> bool:
    """Whether all hold, where the answer is at hand: False on a GPU, which would have to finish first."""
    return flags.device.type == "cpu" and bool(flags.all())


def check_flags(args: object, least: Mapping[str, int]) -> None:
    """Raise ValueError unless each of these flags of a command is none or at least so much."""
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name} {value} is not allowed: at least {smallest} is needed")
