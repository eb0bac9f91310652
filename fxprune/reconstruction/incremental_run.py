"""Running a program part by part, with activations in memory up to a limit and on disk beyond.

An ``IncrementalRun`` runs a program once over fixed batches, and stops where its caller needs
values. It keeps only the frontier: values that later nodes still read, and those the caller asked
for. All parts together therefore cost one forward pass, however many stops there are.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.program import Program, owner_of

Values = dict[fx.Node, Any]
Key = tuple[str, str, int]  # the names of the run and the node, the number of the batch


class Store(AbstractContextManager["Store"]):
    """Tensors by key, on the CPU: in memory while they fit, else in a temporary folder.

    Attributes:
        limit: the largest number of bytes in memory.
        peak: the largest number of bytes that were in memory at a time.
        spilled: the number of bytes written to disk.

    """

    def __init__(self, limit: int) -> None:
        self.limit, self.peak, self.spilled = limit, 0, 0
        self._held = 0
        self._values: dict[Key, Any] = {}
        self._files: dict[Key, tuple[Path, Tensor]] = {}
        self._names = itertools.count()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Store:
        self._folder = tempfile.TemporaryDirectory(prefix="fxprune-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._values.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: Key, value: Any) -> None:
        """Keep a value; one that is not a tensor stays in memory and is not counted."""
        self.drop(key)
        if not isinstance(value, Tensor):
            self._values[key] = value
            return
        value = value.detach().cpu()
        if self._held + value.nbytes > self.limit and value.nbytes:
            self._files[key] = self._spill(value)
            return
        self._values[key] = value
        self._held += value.nbytes
        self.peak = max(self.peak, self._held)

    def _spill(self, value: Tensor) -> tuple[Path, Tensor]:
        assert self._folder is not None, "a store is used inside a with statement"
        path = Path(self._folder.name) / str(next(self._names))
        raw = value.contiguous().view(-1).view(torch.uint8)
        raw.numpy().tofile(path)
        self.spilled += value.nbytes
        return path, torch.empty(value.shape, dtype=value.dtype, device="meta")

    def get(self, key: Key) -> Any:
        """Return a value."""
        if key not in self._files:
            return self._values[key]
        path, like = self._files[key]
        size = like.numel()
        return torch.from_file(str(path), size=size, dtype=like.dtype).view(like.shape)

    def drop(self, key: Key) -> None:
        """Forget a value, if there is one."""
        value = self._values.pop(key, None)
        if isinstance(value, Tensor):
            self._held -= value.nbytes
        if key in self._files:
            self._files.pop(key)[0].unlink()


def compute(
    program: Program, node: fx.Node, values: Values, given: Mapping[str, Tensor],
    form: Callable[..., Any] | None = None,
) -> Any:  # fmt: skip
    """Return a node's value.

    Args:
        program: the program that the node is part of.
        node: the node; stored tensors among its inputs are read from the program.
        values: the values of its other inputs.
        given: tensors to use instead of stored ones, by name.
        form: a function to call instead of the node's operator.

    """

    def value(argument: fx.Node) -> Any:
        if argument in values:
            return values[argument]
        return compute(program, argument, values, given)  # only stored tensors are missing

    if node.op == "get_attr":
        name = str(node.target)
        if name in given:
            return given[name]
        owner, leaf = owner_of(program.graph_module, name)
        return getattr(owner, leaf)
    call = form or node.target
    assert callable(call), f"{node.name} is not a call"
    return call(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))


class IncrementalRun:
    """Runs a program node by node over fixed batches.

    Args:
        program: the program, in evaluation mode; stored tensors are read when a node runs.
        store: keeps the frontier.
        name: distinguishes the runs of one store.
        device: the program's device.

    """

    def __init__(self, program: Program, store: Store, name: str, device: str = "cpu") -> None:
        self.program, self._store, self._name, self._device = program, store, name, device
        self._nodes = list(program.graph.nodes)
        self._order = {node: number for number, node in enumerate(self._nodes)}
        self._last = {
            node: max((self._order[user] for user in node.users), default=-1)
            for node in self._nodes
        }
        self._live = [node for node in self._nodes if node.op == "placeholder"]
        self._position, self.batches = 0, 0

    def enter(self, inputs: tuple[Any, ...]) -> None:
        """Add a batch, before the first stop."""
        flat = self.program.graph.process_inputs(*inputs)
        for node, value in zip(self._live, flat, strict=True):
            self._store.put((self._name, node.name, self.batches), value)
        self.batches += 1

    def advance(self, stop: fx.Node | None, keep: Iterable[fx.Node] = ()) -> None:
        """Run every node before ``stop`` (None: all) that has not run yet.

        Args:
            stop: the first node that does not run.
            keep: nodes whose values are kept, although no later node reads them.

        """
        end = len(self._nodes) if stop is None else max(self._order[stop], self._position)
        wanted = set(keep)
        todo = [
            node for node in self._nodes[self._position : end]
            if node.op not in ("placeholder", "output", "get_attr")
        ]  # fmt: skip
        stay = [node for node in [*self._live, *todo] if self._last[node] >= end or node in wanted]
        for number in range(self.batches):
            values = self.frontier(number) if todo else {}
            for node in todo:
                values[node] = compute(self.program, node, values, {})
                for used in node.all_input_nodes:  # drop what no later node needs
                    if self._last[used] <= self._order[node] and used not in wanted:
                        values.pop(used, None)
            old = set(self._live)
            for node in old.difference(stay):
                self._store.drop((self._name, node.name, number))
            for node in stay:
                if node not in old:
                    self._store.put((self._name, node.name, number), values[node])
        self._live, self._position = stay, end

    def frontier(self, number: int) -> Values:
        """Return all values that are kept, for one batch."""
        return {node: self.value(node, number) for node in self._live}

    def value(self, node: fx.Node, number: int) -> Any:
        """Return one value that is kept, for one batch."""
        value = self._store.get((self._name, node.name, number))
        return value.to(self._device) if isinstance(value, Tensor) else value
