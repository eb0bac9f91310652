"""A compiler for trained PyTorch models: physically smaller networks, faster in ONNX Runtime."""

from __future__ import annotations

from fxprune.errors import FxpruneError, InputError
from fxprune.graph.cost import Cost, cost
from fxprune.graph.program import Fact, Program
from fxprune.graph.serialize import load, save
from fxprune.graph.trace import trace
from fxprune.onnx.export import export_onnx
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.driver import Pipeline
from fxprune.run.compile import Result, compile
from fxprune.structure.groups import Group, Unit, find_groups
from fxprune.structure.removal import remove_units
from fxprune.structure.rules.registry import operator_rule
from fxprune.structure.verify import verify_removal

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
