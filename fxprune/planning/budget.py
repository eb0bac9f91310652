"""Budgets: how small or fast the result must be, as text such as ``macs=50%`` and as limits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fxprune.errors import InputError
from fxprune.pipeline.values import Scanner

Quantity = Literal["params", "macs", "weight_bytes", "latency_ms"]
Name = Literal["params", "macs", "size", "latency"]

QUANTITIES: Mapping[Name, Quantity] = {
    "params": "params",
    "macs": "macs",
    "size": "weight_bytes",
    "latency": "latency_ms",
}
_COUNTS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_SUFFIXES: Mapping[Name, Mapping[str, float]] = {
    "params": _COUNTS,
    "macs": _COUNTS,
    "size": {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
    "latency": {"S": 1e3, "MS": 1.0, "US": 1e-3},
}
_EXAMPLES: Mapping[Name, str] = {
    "params": "50%, 2x or 1.5M",
    "macs": "50%, 2x or 300M",
    "size": "50%, 2x, 1MB or 900KiB",
    "latency": "50%, 2x, 1.5ms or 800us",
}
_SCALES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_AMOUNT = re.compile(r"(?P<number>(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*(?P<suffix>[%a-zA-Z]*)", re.I)


@dataclass(frozen=True)
class Target:
    """An upper limit on one quantity.

    Attributes:
        name: what is limited, as users write it.
        amount: the limit; a fraction of the dense model's where ``relative``, else a count, bytes
            or milliseconds.
        relative: whether ``amount`` is a fraction.

    """

    name: Name
    amount: float
    relative: bool

    @property
    def quantity(self) -> Quantity:
        """The quantity as costs name it."""
        return QUANTITIES[self.name]

    def limit(self, dense: float) -> float:
        """Return the largest value allowed, given the dense model's."""
        return self.amount * dense if self.relative else self.amount

    def __str__(self) -> str:
        if self.relative:
            return f"{self.name}={_plain(self.amount * 100)}%"
        unit = {"size": "B", "latency": "ms"}.get(self.name, "")
        return f"{self.name}={_plain(self.amount)}{unit}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read one target.

        >>> Target.parse("macs=2.0x")
        Target(name='macs', amount=0.5, relative=True)
        >>> print(Target.parse("size=1.5MiB"))
        size=1572864B

        Raises:
            InputError: the text is not a target; the message shows where.

        """
        scanner = Scanner(text, "the target")
        start = len(text) - len(text.lstrip())
        name, sign, amount = text.partition("=")
        if name.strip() not in QUANTITIES:
            names = ", ".join(QUANTITIES)
            raise scanner.fail(f"'{name.strip()}' is not a target; the targets are {names}", start)
        if not sign:
            raise scanner.fail(f"expected '=' and an amount after '{name.strip()}'", len(text))
        place = len(name) + 1 + len(amount) - len(amount.lstrip())
        known: Name = next(known for known in get_args(Name) if known == name.strip())
        try:
            return cls.of(known, amount)
        except InputError as error:
            raise scanner.fail(str(error), place) from error

    @classmethod
    def of(cls, name: Name, amount: float | str) -> Target:
        """Make a target from an amount: text, or a number, which up to one is a fraction.

        Numbers of ``size`` and ``latency`` above one need a unit, so must be text.

        Raises:
            InputError: the amount is not one.

        """
        text = str(amount).strip().replace("_", "")
        match = _AMOUNT.fullmatch(text)
        if match is None:
            raise InputError(f"'{text}' is not a valid {name} budget; write {_EXAMPLES[name]}")
        number, suffix = float(match["number"]), match["suffix"].upper()
        if number <= 0:
            raise InputError(f"{name} must stay above zero, not '{text}'")
        if suffix == "%":
            return cls._fraction(name, number / 100, text)
        if suffix == "X":
            return cls._fraction(name, 1 / number, text)
        if not suffix and number <= 1:
            return cls(name, number, relative=True)
        if not suffix and name in ("params", "macs"):
            return cls(name, number, relative=False)
        if suffix not in _SUFFIXES[name]:
            what = f"'{match['suffix']}' is not a unit" if suffix else f"'{text}' needs a unit"
            raise InputError(f"{what} of {name}; write {_EXAMPLES[name]}")
        return cls(name, round(number * _SUFFIXES[name][suffix], 9), relative=False)

    @classmethod
    def exactly(cls, quantity: Quantity, value: float) -> Target:
        """Make the target that a cost just meets."""
        (name,) = (name for name, known in QUANTITIES.items() if known == quantity)
        digits = 4 if quantity == "latency_ms" else 0
        return cls(name, math.ceil(value * 10**digits) / 10**digits, relative=False)

    @classmethod
    def _fraction(cls, name: Name, fraction: float, text: str) -> Target:
        if fraction > 1:
            raise InputError(f"'{text}' allows more {name} than the dense model has")
        return cls(name, fraction, relative=True)


@dataclass(frozen=True)
class Budget:
    """Targets that must all be met; at most one per quantity.

    Raises:
        InputError: a quantity is limited twice.

    """

    targets: tuple[Target, ...]

    def __post_init__(self) -> None:
        names = [target.name for target in self.targets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"the budget limits {twice} twice; give only one of the two")

    def __str__(self) -> str:
        return ",".join(map(str, self.targets))

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read targets, separated by commas.

        >>> print(Budget.parse("macs=50%, latency=1.5ms"))
        macs=50%,latency=1.5ms

        Raises:
            InputError: the text is not a budget; the message shows where.

        """
        parts = text.split(",")
        if not text.strip():
            raise InputError("the budget is empty; write, for example, macs=50%")
        return cls(tuple(Target.parse(part) for part in parts))


def _plain(number: float) -> str:
    """Write a number without an exponent and without zeros that mean nothing."""
    return f"{number:.9f}".rstrip("0").rstrip(".")


def readable(quantity: Quantity, value: float) -> str:
    """Write a cost for people.

    >>> readable("macs", 62742848.0)
    '62.7M macs'
    """
    if quantity == "latency_ms":
        return f"{value:.3g} ms"
    scale, letter = next(
        ((scale, letter) for scale, letter in _SCALES if value >= scale), (1.0, "")
    )
    unit = {"weight_bytes": f" {letter}B of weights"}.get(quantity, f"{letter} {quantity}")
    return f"{value / scale:.3g}{unit}"
