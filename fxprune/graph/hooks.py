"""Running a program with hooks: watch what chosen nodes read, or compute them in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from fxprune.graph.program import Program


@dataclass(frozen=True)
class Call:
    """One call during a run.

    Attributes:
        node: the node.
        args: the values of its positional arguments.
        kwargs: the values of its keyword arguments.

    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def value(self, *args: Any) -> Any:
        """Apply the operator, to other positional arguments if any are given."""
        assert callable(self.node.target)
        return self.node.target(*(args or self.args), **self.kwargs)


Hook = Callable[[Call], Any]  # returns the value of the call's node


def run_with_hooks(program: Program, inputs: tuple[Any, ...], hooks: Mapping[fx.Node, Hook]) -> Any:
    """Run a program in which hooks compute the values of some nodes.

    Args:
        program: what to run.
        inputs: positional inputs, as the program takes them.
        hooks: by operator call, a function that returns its value; ``call.value()`` is the value
            without the hook.

    Returns:
        The outputs, in the structure that the program has.

    """
    (*_, last) = program.graph.nodes
    outputs = _Runner(program, hooks).run_to(last, inputs)
    return program.graph.process_outputs(outputs)


def visit(program: Program, inputs: tuple[Any, ...], hooks: Mapping[fx.Node, Hook]) -> None:
    """Run a program as far as the last node with a hook; see ``run_with_hooks``."""
    last = next((node for node in reversed(program.graph.nodes) if node in hooks), None)
    if last is not None:
        _Runner(program, hooks).run_to(last, inputs)


class _Runner(fx.Interpreter):
    """Interprets a program, and hands the calls that have hooks to them."""

    def __init__(self, program: Program, hooks: Mapping[fx.Node, Hook]) -> None:
        super().__init__(program.graph_module)
        self._hooks = hooks

    def run_to(self, last: fx.Node, inputs: tuple[Any, ...]) -> Any:
        """Compute all nodes up to one, and return its value."""
        self.env = {}
        self.args_iter = iter(pytree.tree_leaves(inputs))
        for node in self.graph.nodes:
            try:
                self.env[node] = self.run_node(node)
            except Exception as error:
                error.add_note(f"while computing {node.format_node()}")
                raise
            if node is last:
                break
            for unused in self.user_to_last_uses.get(node, []):
                del self.env[unused]
        return self.env[last]

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._hooks:
            return super().run_node(n)
        return self._hooks[n](Call(n, *self.fetch_args_kwargs_from_env(n)))
