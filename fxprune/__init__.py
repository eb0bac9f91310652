"""A compiler for trained PyTorch models: physically smaller networks, faster in ONNX Runtime."""

from __future__ import annotations

from importlib.metadata import version

from fxprune.data.batches import batches
from fxprune.data.roles import Data
from fxprune.errors import FxpruneError, InputError
from fxprune.graph.cost import Cost
from fxprune.graph.program import Fact, Program
from fxprune.graph.serialize import load
from fxprune.graph.trace import trace
from fxprune.pipeline.context import Context
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.driver import Pipeline
from fxprune.run.api import (
    bench,
    cost,
    evaluate,
    export_onnx,
    find_groups,
    inspect,
    load_data,
    load_model,
    remove_units,
    save,
    verify_removal,
)
from fxprune.run.compile import Result, compile
from fxprune.structure.groups import Group, Unit
from fxprune.structure.rules.registry import operator_rule

__version__ = version("fxprune")

__all__ = [
    "Context",
    "Cost",
    "Data",
    "Fact",
    "FxpruneError",
    "Group",
    "InputError",
    "Pass",
    "Pipeline",
    "Program",
    "Result",
    "Unit",
    "__version__",
    "batches",
    "bench",
    "compile",
    "cost",
    "evaluate",
    "export_onnx",
    "find_groups",
    "inspect",
    "load",
    "load_data",
    "load_model",
    "operator_rule",
    "remove_units",
    "save",
    "trace",
    "verify_removal",
]
