"""The one place that edits graphs and tensors; every pass rewrites programs through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from fxprune.graph.program import Program, owner_of


def set_tensor(program: Program, name: str, value: Tensor) -> None:
    """Replace or create the parameter or buffer of that name; a parameter stays a parameter.

    Floating-point tensors under new names become parameters if they require gradients, else
    buffers. Every alias of a replaced tensor (tied weights) is replaced with it.
    """
    module = program.graph_module
    path, _, leaf = name.rpartition(".")
    owner = _ensure_submodule(module, path)
    old = getattr(owner, leaf, None)
    if isinstance(old, nn.Parameter) or (old is None and value.requires_grad):
        trains = value.is_floating_point() and (old is None or old.requires_grad)
        value = nn.Parameter(value.detach(), requires_grad=trains)
    if old is None:
        _register(owner, leaf, value)
        return
    for submodule in list(module.modules()):
        for key, tensor in [*submodule._parameters.items(), *submodule._buffers.items()]:
            if tensor is old:
                setattr(submodule, key, value)
    for submodule in list(module.modules()):  # constants that torch.export keeps as attributes
        for key, tensor in list(vars(submodule).items()):
            if tensor is old:
                setattr(submodule, key, value)


def unused_name(program: Program, wanted: str) -> str:
    """Return a name for a new tensor: the wanted one, or with a number if something has it."""
    state = program.graph_module.state_dict()
    names = itertools.chain([wanted], (f"{wanted}_{number}" for number in itertools.count(1)))
    return next(name for name in names if name not in state)


def _ensure_submodule(module: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module


def _register(owner: nn.Module, leaf: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def read_tensor(program: Program, name: str, before: fx.Node) -> fx.Node:
    """Insert a node that reads the tensor of that name, ahead of ``before``."""
    with program.graph.inserting_before(before):
        node = program.graph.get_attr(name)
    node.meta = {"nn_module_stack": before.meta.get("nn_module_stack", {})}
    return node


def insert_call(
    program: Program,
    before: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """Insert a call ahead of ``before``, inheriting its place in the user's source."""
    with program.graph.inserting_before(before):
        node = program.graph.call_function(target, args, kwargs or {})
    node.meta = {
        key: before.meta[key] for key in ("nn_module_stack", "stack_trace") if key in before.meta
    }
    return node


def replace_node(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Let every user of ``old`` read ``new`` instead, and erase ``old``."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    program.graph.erase_node(old)


def rewrite_call(
    program: Program, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Let a call compute something else in its place; it keeps its name and its users."""
    node.target, node.args, node.kwargs = target, args, {}


def drop_unused(program: Program) -> None:
    """Erase calls and reads that nothing uses, then tensors read under none of their names.

    Calls that may draw random numbers, as attention may, go like others.
    """
    program.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    module = program.graph_module
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    used = {id(tensors[name]) for name in read if name in tensors}
    for name, tensor in tensors.items():
        if id(tensor) not in used:
            owner, leaf = owner_of(module, name)
            delattr(owner, leaf)
