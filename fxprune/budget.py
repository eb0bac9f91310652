"""Budgets: what a compressed program may cost, as text and as numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fxprune.cost import Cost
from fxprune.errors import InputError

Budgeted = Literal["macs", "params", "size"]
QUANTITIES: tuple[Budgeted, ...] = get_args(Budgeted)
UNITS: Mapping[str, int] = {
    "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3,
    "kib": 1024, "mib": 1024**2, "gib": 1024**3,
}  # fmt: skip
TOLERANCE = 0.01


@dataclass(frozen=True)
class Target:
    """An upper limit on one quantity, relative to the dense program or absolute.

    Attributes:
        quantity: macs, params, or size (bytes of all weights).
        fraction: what may remain, between 0 and 1; None for an absolute limit.
        limit: the absolute limit; None for a relative one.

    >>> Target.parse("macs=50%").fraction, Target.parse("macs=2.0x").fraction
    (0.5, 0.5)
    >>> Target.parse("size=1MB").limit
    1000000.0

    """

    quantity: Budgeted
    fraction: float | None = None
    limit: float | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``macs=50%`` (half is left), ``macs=2.0x`` (half is left), ``size=1MB``.

        Raises:
            InputError: the text is not of that form.

        """
        name, sign, amount = text.partition("=")
        name, amount = name.strip().lower(), amount.strip().lower()
        number = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)", amount)
        if not sign or name not in QUANTITIES or number is None:
            raise InputError(
                f"'{text}' is not a target; write macs=50%, params=2.0x or size=1MB, with one of "
                f"{', '.join(QUANTITIES)} on the left"
            )
        value, unit = float(number[1]), number[2]
        if unit == "%":
            return cls._relative(name, value / 100, text)
        if unit == "x":
            return cls._relative(name, 1 / value if value else math.inf, text)
        if name == "size" and unit in UNITS:
            return cls(name, limit=value * UNITS[unit])
        if name != "size" and not unit:
            return cls._relative(name, value, text) if value <= 1 else cls(name, limit=value)
        raise InputError(
            f"'{text}' has an unknown unit '{unit}'; use % or x, or for size one of "
            f"{', '.join(UNITS)}"
        )

    @classmethod
    def _relative(cls, name: Budgeted, fraction: float, text: str) -> Target:
        if not 0 < fraction <= 1:
            raise InputError(
                f"'{text}' asks to leave {fraction:.0%} of the {name}; ask for more than 0 % and "
                "at most 100 % (2x means a half)"
            )
        return cls(name, fraction)

    def __str__(self) -> str:
        amount = f"{self.limit:.0f}" if self.fraction is None else f"{100 * self.fraction:g}%"
        return f"{self.quantity}={amount}{'B' if self.quantity == 'size' else ''}".replace(
            "%B", "%"
        )

    def absolute(self, dense: Cost) -> float:
        """Return the limit in elements, multiply-accumulates or bytes."""
        if self.limit is not None:
            return self.limit
        assert self.fraction is not None
        return self.fraction * measured(dense, self.quantity)

    def met(self, dense: Cost, after: Cost) -> bool:
        """Whether a cost is at most the limit, to one per cent."""
        return measured(after, self.quantity) <= (1 + TOLERANCE) * self.absolute(dense)


def measured(cost: Cost, quantity: Budgeted) -> float:
    """Return the part of a cost that a target speaks of."""
    return {"macs": cost.macs, "params": cost.params, "size": cost.weight_bytes}[quantity]
