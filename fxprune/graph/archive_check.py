"""Exported programs from strangers: what a ``.pt2`` archive may hold before it is opened.

``torch.export.load`` runs code that an archive chooses: it unpickles freely where the safe way
fails, evaluates size expressions and guards as Python, resolves operators by any dotted path below
``torch``, and pastes names into the source of the graph. ``check_exported`` admits archives that
offer it nothing but plain tensors, known operators, arithmetic and names.
"""

from __future__ import annotations

import ast
import io
import json
import operator
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from fxprune.errors import InputError

PLAIN_FILES = re.compile(
    r"models/[\w-]+\.json|data/sample_inputs/[\w-]+\.pt|"
    r"data/(weights|constants)/((weight|tensor)_\d+|[\w-]+_config\.json)|"
    r"archive_format|archive_version|byteorder|\.data/\w+|extra/.*"
)
PLAIN_TEXT = re.compile(r"[\w.,>\- ]*")
PLAIN_PATH = re.compile(r"(torch\.ops|torch|_operator|math)(\.[A-Za-z0-9]\w*|\._\w*[a-z0-9])+")
NAMESPACES = ("aten", "prims", "higher_order", "torchvision", "quantized_decomposed", "fxprune")
TOUCHES_FILES = ("from_file", "save")
NESTED = ("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast")
NOT_ARITHMETIC = ("attrgetter", "itemgetter", "methodcaller", "call", "setitem", "delitem")
CALLS = frozenset(
    {
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod"),
        *("PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "Where", "LShift"),
        *("PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt"),
        *("RoundToInt", "CeilToInt", "FloorToInt", "ToFloat", "RShift", "Identity", "Equality"),
        *("Unequality", "Eq", "Ne", "StrictLessThan", "LessThan", "StrictGreaterThan"),
        *("GreaterThan", "And", "Or", "Not", "max", "min", "size", "stride", "storage_offset"),
    }
)
EXPRESSION: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword),
    *(ast.Name, ast.Constant, ast.Subscript, ast.Load, ast.operator, ast.unaryop, ast.boolop),
    *(ast.cmpop, ast.Attribute),
)


def check_exported(path: Path) -> None:
    """Refuse an archive of ``torch.export.save`` whose loading could run code of its author's.

    Raises:
        InputError: names the first thing in it that is more than tensors and operators.

    """
    with zipfile.ZipFile(path) as archive:
        if len(names := archive.namelist()) != len(set(names)):
            raise _refusal(path, "it holds two files with the same name")
        for name in names:
            inner = name.partition("/")[2]
            if not PLAIN_FILES.fullmatch(inner):
                raise _refusal(path, f"it holds {name}, which is neither a graph nor a tensor")
            if inner.startswith("models/"):
                _check_graph(path, json.loads(archive.read(name)))
            elif inner.endswith("_config.json"):
                _check_payloads(path, json.loads(archive.read(name)))
            elif inner.startswith("data/sample_inputs/"):
                _check_sample(path, archive.read(name))


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is refused: {reason}, so loading it could execute code; export the model again "
        "with torch.export.save, or pass --trust-pickle if you trust the source of the file"
    )


def _check_payloads(path: Path, config: Any) -> None:
    for name, payload in config["config"].items():
        if payload["use_pickle"] or not payload["tensor_meta"]:
            raise _refusal(path, f"the tensor {name} is stored as a pickle")


def _check_sample(path: Path, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        raise _refusal(path, "its sample inputs are not plain tensors") from error


def _check_graph(path: Path, program: Any) -> None:
    for key, text in _strings(program, ""):
        allowed = CHECKS.get(key, _is_plain)
        if not allowed(text):
            raise _refusal(path, f"its graph holds {key} {text[:80]!r}")


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every string of a JSON value, with the nearest key that it stands under."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield "the size" if key == "range_constraints" else "the name", name
            if name != "metadata" or not _is_prose(item):
                yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        yield key, value


def _is_prose(value: Any) -> bool:
    """Whether it is a node's metadata: told to people, and looked up in torch, never called."""
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_plain(text: str) -> bool:
    return PLAIN_TEXT.fullmatch(text) is not None


def _is_expression(text: str) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    nodes = list(ast.walk(tree))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = [getattr(func, "attr", getattr(func, "id", "")) for func in called]
    attributes = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    words = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return (
        all(isinstance(node, EXPRESSION) for node in nodes)
        and all(name in CALLS for name in [*names, *attributes])
        and all(_is_plain(word) for word in words)
    )


def _is_operator(target: str) -> bool:
    if not PLAIN_PATH.fullmatch(target):
        return False
    root, *parts = target.split(".")
    if root == "_operator":
        return len(parts) == 1 and hasattr(operator, parts[0]) and parts[0] not in NOT_ARITHMETIC
    if root == "math":
        return len(parts) == 1
    if parts[0] != "ops":
        return len(parts) == 1 and parts[0].lstrip("_").startswith("sym_")
    if len(parts) < 3 or parts[1] not in NAMESPACES or parts[2] in TOUCHES_FILES:
        return False
    found: Any = torch.ops
    for part in parts[1:]:
        found = getattr(found, part, None)
    if isinstance(found, HigherOrderOperator):
        return parts[2] in NESTED
    return isinstance(found, OpOverload)


def _is_structure(text: str) -> bool:
    """Whether a pytree's description names containers without asking for an import."""
    return "fqn" not in text and "__enum__" not in text and "defaultdict" not in text


CHECKS: dict[str, Callable[[str], bool]] = {
    "the size": _is_expression,
    "expr_str": _is_expression,
    "guards_code": _is_expression,
    "target": _is_operator,
    "in_spec": _is_structure,
    "out_spec": _is_structure,
    "torch_version": lambda text: True,
}
