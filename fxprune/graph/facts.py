"""The facts that passes leave for each other. Values are immutable and plain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fxprune.graph.program import Fact


@dataclass(frozen=True, order=True)
class Slot:
    """One dimension of one parameter or buffer, or of a literal that stands for one.

    >>> str(Slot("layer1.conv.weight", 0))
    'layer1.conv.weight:0'
    """

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}:{self.dim}"

    @classmethod
    def parse(cls, text: str) -> Slot:
        """Read what ``str`` wrote."""
        tensor, _, dim = text.rpartition(":")
        return cls(tensor, int(dim))


@dataclass(frozen=True)
class Sensitivity:
    """How much the loss rises if a unit goes: one score per unit, higher is dearer.

    Attributes:
        criterion: the estimator's name, such as ``hessian-trace``.
        scores: by ``group.name`` of each removable group, one float64 score per unit in
            the order of ``group.units``.
        errors: standard errors of the same shape; empty where the estimator has none.
        details: what the report should tell, such as the probes used.
        attention: which factor of attention widths the groups were found for.

    """

    criterion: str
    scores: Mapping[str, Tensor]
    errors: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, float | int | str] = field(default_factory=dict)
    attention: Preference = "heads"


@dataclass(frozen=True)
class Plan:
    """Which units go: by ``group.name``, their numbers within ``group.units``.

    Attributes:
        remove: the units to remove, ascending.
        implant: the units to replace by something cheaper, ascending.
        notes: what the report should tell, such as relaxed rounding.
        predicted: the costs that the solver expects after removal, by quantity.
        kinds: by weight, the kind of implant that its layer gets, such as ``low-rank:8``; where
            none is named, the pass that implants chooses.
        attention: which factor of attention widths the groups were found for.

    """

    remove: Mapping[str, tuple[int, ...]]
    implant: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    attention: Preference = "heads"


@dataclass(frozen=True)
class Frozen:
    """What was found out to be not removable, though the rules of its operators permit it.

    Attributes:
        why: by slot, the reason; its units, and those that are removed with them, stay.

    """

    why: Mapping[str, str]


@dataclass(frozen=True)
class Masks:
    """Zeros that every later pass keeps: by parameter name, a bool tensor, true where kept."""

    keep: Mapping[str, Tensor]
    pattern: str


@dataclass(frozen=True)
class Removed:
    """What is left of the dense program's values.

    Attributes:
        kept: by node name and dimension, the indices of the dense value that remain, in their
            order; nodes and dimensions that lost nothing are absent.

    """

    kept: Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class Quantized:
    """What of a program is to run, or runs, on 8-bit codes.

    Attributes:
        layers: by the name of a node with weights, the name of its weight.
        others: the names of other nodes.
        paired: codes of weights that are multiplied side by side, where of one sign, add up to
            128 at most, so that sums of two products fit 16 bits; not those of depthwise layers,
            which have kernels with longer sums.

    """

    layers: Mapping[str, str]
    others: tuple[str, ...] = ()
    paired: bool = False


SENSITIVITY: Fact[Sensitivity] = Fact("sensitivity")
PLAN: Fact[Plan] = Fact("plan")
FROZEN: Fact[Frozen] = Fact("frozen")
MASKS: Fact[Masks] = Fact("masks")
REMOVED: Fact[Removed] = Fact("removed")
OBSERVED: Fact[Quantized] = Fact("observed")
CALIBRATED: Fact[Quantized] = Fact("calibrated")
CONVERTED: Fact[Quantized] = Fact("converted")


Preference = Literal["heads", "head_dim"]
