"""A compiler for trained PyTorch models: physically smaller networks, faster in ONNX Runtime."""

from __future__ import annotations

from fxprune.compile import Result, compile
from fxprune.context import Context
from fxprune.cost import Cost, cost
from fxprune.errors import FxpruneError, InputError
from fxprune.export import export_onnx
from fxprune.groups import Group, Unit, find_groups
from fxprune.pipeline import Pass, Pipeline
from fxprune.program import Fact, Program
from fxprune.removal import remove_units
from fxprune.rules import operator_rule
from fxprune.serialize import load, save
from fxprune.trace import trace
from fxprune.verify import verify_removal

__all__ = [
    "Context",
    "Cost",
    "Fact",
    "FxpruneError",
    "Group",
    "InputError",
    "Pass",
    "Pipeline",
    "Program",
    "Result",
    "Unit",
    "compile",
    "cost",
    "export_onnx",
    "find_groups",
    "load",
    "operator_rule",
    "remove_units",
    "save",
    "trace",
    "verify_removal",
]
