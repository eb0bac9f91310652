"""A compiler for trained PyTorch models: physically smaller networks, faster in ONNX Runtime."""

from __future__ import annotations

from fxprune.cost import Cost, cost
from fxprune.errors import FxpruneError
from fxprune.groups import Group, Unit, find_groups
from fxprune.program import Program
from fxprune.removal import remove_units
from fxprune.rules import operator_rule
from fxprune.trace import trace
from fxprune.verify import verify_removal

__all__ = [
    "Cost",
    "FxpruneError",
    "Group",
    "Program",
    "Unit",
    "cost",
    "find_groups",
    "operator_rule",
    "remove_units",
    "trace",
    "verify_removal",
]
