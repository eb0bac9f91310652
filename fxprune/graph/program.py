"""The program: a captured graph, an input that runs it, and the facts that hold on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from fxprune.errors import PostconditionError, PreconditionError
from fxprune.graph.node_args import assign
from fxprune.graph.notebook import html_table, plural

T = TypeVar("T")

# Names of arguments that say whether a model is in training.
MODE_ARGUMENTS = ("train", "training", "use_input_stats")


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A typed name under which one pass leaves a value and others find it."""

    name: str


@dataclass(eq=False, repr=False)
class Program:
    """A traced model: ``graph_module`` computes it, with every weight an explicit ``get_attr``.

    Every node's ``meta["val"]`` holds fake tensors with the shapes that ``example_inputs`` gives.

    Attributes:
        graph_module: the graph; its state-dict names are those of the user's model.
        example_inputs: positional inputs that run the program.
        dynamic: per flattened tensor input, the dimensions that may vary (the batch, usually).
        facts: values left by passes, by fact name; see ``put`` and ``get``.

    """

    graph_module: fx.GraphModule
    example_inputs: tuple[Any, ...]
    dynamic: tuple[frozenset[int], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the program."""
        return self.graph_module(*inputs, **keywords)

    def __repr__(self) -> str:
        return f"Program({self._summary()})"

    def _repr_html_(self) -> str:
        values = [node for node in self.graph.nodes if node.op in ("placeholder", "call_function")]
        rows = [(node.name, _operator(node), _shapes(node.meta.get("val"))) for node in values]
        return html_table(self._summary(), ("value", "operator", "shape"), rows)

    def _summary(self) -> str:
        calls = sum(node.op == "call_function" for node in self.graph.nodes)
        weights = sum(parameter.numel() for parameter in self.graph_module.parameters())
        facts = f", facts: {', '.join(sorted(self.facts))}" if self.facts else ""
        inputs = _shapes(self.example_inputs)
        return f"{plural(calls, 'call')}, {plural(weights, 'parameter')}, inputs {inputs}{facts}"

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.graph_module.graph

    def put(self, fact: Fact[T], value: T) -> None:
        """Record a fact."""
        self.facts[fact.name] = value

    def get(self, fact: Fact[T]) -> T:
        """Return a fact's value, or raise ``PreconditionError`` if it is not known."""
        if fact.name not in self.facts:
            raise PreconditionError(
                f"the program has no fact '{fact.name}'; run the pass that gives it first"
            )
        return cast(T, self.facts[fact.name])

    def tensor(self, name: str) -> Tensor:
        """Return the parameter or buffer of that dotted name."""
        owner, leaf = owner_of(self.graph_module, name)
        return cast(Tensor, getattr(owner, leaf))

    def tensor_nodes(self) -> Iterator[fx.Node]:
        """Yield the ``get_attr`` nodes that read parameters and buffers, in graph order."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and isinstance(self._attribute(node.target), Tensor):
                yield node

    def readers(self, name: str) -> tuple[fx.Node, ...]:
        """Return the calls that read a tensor, under any of its names; one entry per read."""
        tensor = self.tensor(name)
        return tuple(
            user
            for node in self.tensor_nodes()
            if self.tensor(str(node.target)) is tensor
            for user in node.users
        )

    def _attribute(self, name: str) -> object:
        owner, leaf = owner_of(self.graph_module, name)
        return getattr(owner, leaf)

    def train(self, mode: bool = True) -> Program:
        """Set batch norms and dropouts to training; returns the program itself."""
        for node in self.graph.nodes:
            name = _mode_argument(node)
            if name is not None and not _is_without_statistics(node):
                assign(node, name, mode)
        self.graph_module.recompile()
        return self

    def eval(self) -> Program:
        """Set batch norms and dropouts to evaluation; returns the program itself."""
        return self.train(False)

    def copy(self, *, share: bool = False) -> Program:
        """Return an independent copy; facts are immutable and shared.

        Args:
            share: the copy reads the same tensors, and so takes no memory for its own.

        """
        module = self.graph_module
        tensors = [*module.parameters(), *module.buffers()] if share else []
        copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
        return Program(copied, self.example_inputs, self.dynamic, dict(self.facts))

    def to(self, device: str | torch.device) -> Program:
        """Move the tensors and the example inputs; returns the program itself."""
        self.graph_module.to(device)
        self.example_inputs = pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), self.example_inputs
        )
        for node in self.graph.nodes:  # constructors carry the device as a keyword
            if "device" in node.kwargs and node.kwargs["device"] is not None:
                node.update_kwarg("device", torch.device(device))
        self.graph_module.recompile()
        return self

    def refresh(self) -> None:
        """Recompile, and recompute every node's fake value from the example inputs.

        Raises:
            PostconditionError: a node no longer fits its inputs; the message names it.

        """
        self.graph.lint()
        self.graph_module.recompile()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        leaves = [
            mode.from_tensor(leaf, static_shapes=True) if isinstance(leaf, Tensor) else leaf
            for leaf in pytree.tree_leaves(self.example_inputs)
        ]
        fake = _FakeParameters(self.graph_module, mode)
        try:
            with torch.no_grad():
                fake.propagate_dont_convert_inputs(*leaves)
        except Exception as error:
            raise PostconditionError(f"the graph does not run on fake tensors: {error}") from error

    def verify(self) -> None:
        """Fail unless the graph is well formed and every recorded shape is the true one."""
        before = {node.name: node.meta.get("val") for node in self.graph.nodes}
        self.refresh()
        for node in self.graph.nodes:
            old, new = before[node.name], node.meta.get("val")
            if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape != new.shape:
                raise PostconditionError(
                    f"node {node.name} was recorded with the shape {tuple(old.shape)}, but has "
                    f"{tuple(new.shape)}"
                )


def _mode_argument(node: fx.Node) -> str | None:
    """The name of the argument by which a call is told whether the model is in training."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = (item.name for item in node.target._schema.arguments)
    return next((name for name in names if name in MODE_ARGUMENTS), None)


def _is_without_statistics(node: fx.Node) -> bool:
    """Whether a norm keeps no running statistics, so that its mode is not the model's."""
    return str(node.target).endswith("_norm.default") and node.args[3] is None


class _FakeParameters(FakeTensorProp):
    """Propagates fake tensors, reading each parameter as a fake one, made once."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, mode)
        self._mode_of_parameters = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor):
            return self._mode_of_parameters.from_tensor(value, static_shapes=True)
        return value

    def run(self, *args: Any, **kwargs: Any) -> Any:
        # The program's placeholders are flat; the pytree wrapper is for callers with structure.
        kwargs["enable_io_processing"] = False
        return super().run(*args, **kwargs)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Split a dotted attribute name into the submodule that holds it and the last part."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the tensor that a node computes."""
    return tuple(node.meta["val"].shape)


def _operator(node: fx.Node) -> str:
    name = str(node.target) if node.op == "call_function" else "input"
    return name.removeprefix("aten.").removesuffix(".default")


def _shapes(values: Any) -> str:
    """The shapes of all tensors in a value, for people."""
    leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    return ", ".join("x".join(map(str, leaf.shape)) or "scalar" for leaf in leaves) or "-"
