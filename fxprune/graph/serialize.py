"""Programs as files: a zip with the graph as JSON and the tensors as safetensors, no pickle.

``torch.export``'s own archive is not used because loading it falls back to unpickling whatever the
file holds. Here nothing but operators of ``torch.ops`` and a few functions of ``operator`` and
``math`` can be named, so that a file can compute but not act.
"""

from __future__ import annotations

import json
import zipfile
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxprune.errors import FxpruneError, InputError
from fxprune.files import replacing
from fxprune.graph.json_codec import Decoder, Encoder, operator_name, resolve_operator
from fxprune.graph.program import Program

FORMAT = 1
GRAPH, TENSORS = "fxprune/program.json", "fxprune/tensors.safetensors"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed date, so that the same program gives the same bytes


def save(program: Program, path: str | Path) -> None:
    """Write a program, its facts included; the file appears whole or not at all."""
    path = Path(path)
    encoder = Encoder()
    content = json.dumps(_describe(program, encoder), sort_keys=True)
    with replacing(path) as staging, zipfile.ZipFile(staging, "w") as archive:
        archive.writestr(zipfile.ZipInfo(GRAPH, _EPOCH), content, zipfile.ZIP_DEFLATED)
        data = safetensors.torch.save(encoder.tensors)
        archive.writestr(zipfile.ZipInfo(TENSORS, _EPOCH), data)


def load(path: str | Path) -> Program:
    """Read a program that ``save`` wrote; no class of the user's is needed, no code is run.

    Raises:
        InputError: the file is missing, truncated, of another format, or names what it may not.

    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            content = json.loads(archive.read(GRAPH))
            tensors = safetensors.torch.load(archive.read(TENSORS))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        OSError,
        safetensors.SafetensorError,
    ) as error:
        raise InputError(
            f"{path} is not a complete fxprune program ({error}); write it again with fxprune.save"
        ) from error
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path} has the format {content.get('format')}, but this version reads {FORMAT}"
        )
    try:
        return _rebuild(content, Decoder(tensors))
    except FxpruneError:
        raise
    except Exception as error:  # a damaged description can fail anywhere in the rebuilding
        raise InputError(f"{path} does not describe a program: {error}") from error


def is_program(path: str | Path) -> bool:
    """Whether a file was written by ``save``."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return GRAPH in archive.namelist()


def _describe(program: Program, encoder: Encoder) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tensors": _describe_tensors(program, encoder),
        "nodes": [_describe_node(node, encoder) for node in program.graph.nodes],
        "signature": _describe_signature(program),
        "inputs": encoder.encode(program.example_inputs),
        "dynamic": [sorted(dims) for dims in program.dynamic],
        "facts": {name: encoder.encode(value) for name, value in sorted(program.facts.items())},
    }


def _describe_tensors(program: Program, encoder: Encoder) -> list[dict[str, Any]]:
    """Name every tensor once; later names of the same one refer to the first."""
    module = program.graph_module
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found |= dict(module.named_buffers(remove_duplicate=False))
    for node in program.tensor_nodes():
        found.setdefault(str(node.target), program.tensor(str(node.target)))
    first: dict[int, str] = {}
    described = []
    for name, tensor in found.items():
        entry: dict[str, Any] = {"name": name}
        if id(tensor) in first:
            entry["same_as"] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            entry["value"] = encoder.encode(tensor)
            entry["parameter"] = isinstance(tensor, nn.Parameter)
            entry["trainable"] = tensor.requires_grad
        described.append(entry)
    return described


def _describe_node(node: fx.Node, encoder: Encoder) -> dict[str, Any]:
    target = operator_name(node.target) if node.op == "call_function" else str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": encoder.encode(node.args),
        "kwargs": encoder.encode(dict(node.kwargs)),
        "stack": [[str(part) for part in entry] for entry in stack.values()],
        "trace": node.meta.get("stack_trace"),
    }


def _describe_signature(program: Program) -> dict[str, Any] | None:
    codegen = program.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return None
    info = codegen.pytree_info
    return {
        "names": list(info.orig_args),
        "in": pytree.treespec_dumps(info.in_spec) if info.in_spec else None,
        "out": pytree.treespec_dumps(_plain_spec(info.out_spec)) if info.out_spec else None,
        "named_tuples": list(_named_tuples(info.out_spec)) if info.out_spec else [],
    }


def _plain_spec(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Replace classes of other libraries that are mappings by dictionaries."""
    try:
        pytree.treespec_dumps(spec)
    except NotImplementedError:
        value = pytree.tree_unflatten(range(spec.num_leaves), spec)
        return pytree.tree_structure(_plain_value(value))
    return spec


def _named_tuples(spec: pytree.TreeSpec) -> Iterator[dict[str, Any]]:
    """Yield where the named tuples of an output are, with their names."""

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = list(value._fields)
            yield {"path": list(path), "name": type(value).__name__, "fields": fields}
        items = value.items() if isinstance(value, Mapping) else _numbered(value)
        for key, item in items:
            yield from walk(item, (*path, str(key)))

    yield from walk(pytree.tree_unflatten(range(spec.num_leaves), spec), ())


def _numbered(value: Any) -> list[tuple[int, Any]]:
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def _with_names(spec: pytree.TreeSpec, described: list[dict[str, Any]]) -> pytree.TreeSpec:
    """Turn the sequences at some places of an output back into named tuples."""
    made = {tuple(entry["path"]): namedtuple(entry["name"], entry["fields"]) for entry in described}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(item, (*path, str(key))) for key, item in value.items()}
        items = [walk(item, (*path, str(key))) for key, item in _numbered(value)]
        if path in made:
            return made[path](*items)
        return type(value)(items) if isinstance(value, (list, tuple)) else value

    return pytree.tree_structure(walk(pytree.tree_unflatten(range(spec.num_leaves), spec), ()))


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_plain_value(item) for item in value)
    return value


def _rebuild(content: dict[str, Any], decoder: Decoder) -> Program:
    root = nn.Module()
    values = _decode_tensors(content["tensors"], decoder)
    _attach(root, values)
    graph = fx.Graph()
    for entry in content["nodes"]:
        is_call = entry["op"] == "call_function"
        if entry["op"] not in ("placeholder", "get_attr", "call_function", "output"):
            raise InputError(f"node {entry['name']} has the unknown kind {entry['op']}")
        node = graph.create_node(
            entry["op"],
            resolve_operator(entry["target"]) if is_call else entry["target"],
            decoder.decode(entry["args"]),
            decoder.decode(entry["kwargs"]),
            entry["name"],
        )
        decoder.nodes[entry["name"]] = node
        stack = {str(number): tuple(part) for number, part in enumerate(entry["stack"])}
        node.meta = {"nn_module_stack": stack, "stack_trace": entry["trace"]}
    if (signature := content["signature"]) is not None:
        graph.set_codegen(_PyTreeCodeGen(_signature(signature)))
    module = fx.GraphModule(root, graph, "Program")
    _attach(module, values)  # what the graph does not read itself, such as a tied weight's alias
    program = Program(
        module,
        decoder.decode(content["inputs"]),
        tuple(frozenset(dims) for dims in content["dynamic"]),
        {name: decoder.decode(value) for name, value in content["facts"].items()},
    )
    program.refresh()
    return program


def _signature(described: dict[str, Any]) -> _PyTreeInfo:
    specs = {
        side: pytree.treespec_loads(described[side]) if described[side] else None
        for side in ("in", "out")
    }
    if specs["out"] and (named := described.get("named_tuples")):
        specs["out"] = _with_names(specs["out"], named)
    return _PyTreeInfo(described["names"], specs["in"], specs["out"])  # type: ignore[arg-type]


def _decode_tensors(entries: list[dict[str, Any]], decoder: Decoder) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for entry in entries:
        if "same_as" in entry:
            values[entry["name"]] = values[entry["same_as"]]
            continue
        value = decoder.decode(entry["value"])
        if entry["parameter"]:
            value = nn.Parameter(value, requires_grad=entry["trainable"])
        values[entry["name"]] = value
    return values


def _attach(root: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = root
        for part in filter(None, path.split(".")):
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if hasattr(owner, leaf):
            continue
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)
