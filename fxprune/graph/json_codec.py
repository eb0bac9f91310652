"""Values of graphs and facts as JSON, and back, without ever running or importing anything named.

Tensors go to a table of their own. What JSON lacks is an object with one key that says what it is.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import fxprune.graph.custom_ops  # noqa: F401  # declares operators that programs may call
from fxprune.errors import InputError
from fxprune.graph import facts
from fxprune.graph.program import Fact

# The functions besides operators that exported graphs call.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg",
                     "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{f"torch.{name}": getattr(torch, name)
       for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")},
}  # fmt: skip
_NAMES = {function: name for name, function in FUNCTIONS.items()}
_FACTS: Mapping[str, type[Any]] = {
    name: item
    for name, item in vars(facts).items()
    if isinstance(item, type) and dataclasses.is_dataclass(item) and item is not Fact
}
_TORCH = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def operator_name(target: Any) -> str:
    """Name an operator or function of a graph.

    Raises:
        InputError: it is neither an operator of ``torch.ops`` nor a known function.

    """
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    raise InputError(f"{target} cannot be saved; a program may only call operators of torch.ops")


def resolve_operator(name: str) -> Any:
    """Find what ``operator_name`` named.

    Raises:
        InputError: it names anything but an operator or a known function.

    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    space, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    found = getattr(torch.ops, space, None)
    for part in (packet, overload):
        found = getattr(found, part, None) if part.isidentifier() else None
    if not isinstance(found, torch._ops.OpOverload):
        raise InputError(
            f"'{name}' is not a known operator; if it is a custom operator, import its library "
            "first"
        )
    return found


@dataclass(eq=False)
class Encoder:
    """Turns values into JSON; tensors collect in ``tensors``."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def encode(self, value: Any) -> Any:
        """Return the value as JSON can hold it.

        Raises:
            InputError: the value is of a type that no program holds.

        """
        match value:
            case None | bool() | int() | str():
                return value
            case float():
                return value if math.isfinite(value) else {"float": str(value)}
            case complex():
                return {"complex": [value.real, value.imag]}
            case fx.Node():
                return {"node": value.name}
            case Tensor():
                key = str(len(self.tensors))
                self.tensors[key] = value.detach().cpu().contiguous().clone()
                return {"tensor": key}
            case list():
                return [self.encode(item) for item in value]
            case tuple():
                return {"tuple": [self.encode(item) for item in value]}
            case slice():
                return {"slice": [self.encode(x) for x in (value.start, value.stop, value.step)]}
            case torch.device():
                return {"device": str(value)}
            case Mapping():
                return {"dict": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        for name, kind in _TORCH.items():
            if isinstance(value, kind):
                return {name: str(value).removeprefix("torch.")}
        if _FACTS.get(type(value).__name__) is type(value):
            fields = {
                f.name: self.encode(getattr(value, f.name)) for f in dataclasses.fields(value)
            }
            return {"fact": type(value).__name__, "fields": fields}
        raise InputError(f"a {type(value).__name__} cannot be saved with a program")


@dataclass(eq=False)
class Decoder:
    """Turns what an ``Encoder`` made into values again."""

    tensors: Mapping[str, Tensor]
    nodes: dict[str, fx.Node] = field(default_factory=dict)

    def decode(self, value: Any) -> Any:
        """Return the value.

        Raises:
            InputError: it names a type that no program holds.

        """
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "fact" in value:
            kind = _FACTS.get(value["fact"])
            if kind is None:
                raise InputError(
                    f"the file holds a fact '{value['fact']}' that this version does not know"
                )
            return kind(**{name: self.decode(item) for name, item in value["fields"].items()})
        ((kind, content),) = value.items()
        return self._decode(kind, content)

    def _decode(self, kind: str, content: Any) -> Any:
        match kind:
            case "float":
                return float(content)
            case "complex":
                return complex(*content)
            case "node":
                return self.nodes[content]
            case "tensor":
                return self.tensors[content]
            case "tuple":
                return tuple(self.decode(item) for item in content)
            case "slice":
                return slice(*(self.decode(item) for item in content))
            case "device":
                return torch.device(content)
            case "dict":
                return {self.decode(key): self.decode(item) for key, item in content}
        if kind in _TORCH and isinstance(found := getattr(torch, content, None), _TORCH[kind]):
            return found
        raise InputError(f"the file holds a '{kind}' that this version does not know")
