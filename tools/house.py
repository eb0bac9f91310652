"""Measure the structure of the code: layers, cycles, duplicated machinery, one-line helpers.

Usage: ``python -m tools.house [ROOT]``; prints one line per figure, and the imports that break the
order of the layers. The contract itself (no cycle, no upward import, passes import no pass) is
checked by ``tests/test_house.py``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx as nx

# Packages and top-level modules from the lowest to the highest; each imports only lower ones.
LAYERS = (
    "errors", "host", "files", "graph", "structure", "models", "data", "pipeline", "calibration",
    "onnx", "sensitivity", "planning", "latency", "reconstruction", "implants", "training",
    "quantization", "search", "passes", "report", "run", "cli", "__init__", "__main__",
)  # fmt: skip

# Where a dictionary from operators to anything belongs: one record per family of operators.
RECORDS = ("fxprune.graph.operators", "fxprune.structure.rules")
ROOT = Path(__file__).resolve().parent.parent
SHORT = 5  # lines of a function that may be a hop rather than an idea


def sources(root: Path) -> dict[str, ast.Module]:
    """Parse the product's modules, by dotted name."""
    found = {}
    for folder, prefix in ((root / "fxprune", "fxprune"), (root / "passes", "fxprune.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name == "fxprune" and parts[0] == "passes":
                continue  # the symbolic link to the other folder
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(modules: Mapping[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """Yield ``(importing module, imported module)`` for imports inside the product."""
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [one if one in modules else node.module for one in whole]
            else:
                continue
            yield from ((name, target) for target in targets if target.startswith("fxprune"))


def layer_of(module: str) -> str:
    """Return the package or top-level module that a module belongs to.

    >>> layer_of("fxprune.graph.program"), layer_of("fxprune")
    ('graph', '__init__')
    """
    return [*module.split("."), "__init__"][1]


def upward(modules: Mapping[str, ast.Module]) -> list[tuple[str, str]]:
    """List the imports of a higher layer by a lower one, and of one pass by another."""
    found = set()
    for name, target in imports(modules):
        here, there = layer_of(name), layer_of(target)
        between_passes = here == there == "passes" and name != "fxprune.passes"
        if between_passes or LAYERS.index(there) > LAYERS.index(here):
            found.add((name, target))
    return sorted(found)


def cycles(modules: Mapping[str, ast.Module]) -> list[set[str]]:
    """List the sets of packages that import each other in a circle."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_edges_from((layer_of(a), layer_of(b)) for a, b in imports(modules))
    return [group for group in nx.strongly_connected_components(graph) if len(group) > 1]


def interpreters(modules: Mapping[str, ast.Module]) -> list[str]:
    """List the classes that derive from ``fx.Interpreter``."""
    return [
        f"{name}.{node.name}"
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any("Interpreter" in ast.unparse(base) for base in node.bases)
    ]


def operator_tables(modules: Mapping[str, ast.Module]) -> list[str]:
    """List module-level tables of operators that lie outside the operators' records."""
    found = []
    for name, tree in modules.items():
        if name.startswith(RECORDS):
            continue
        for node in tree.body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                named = set(re.findall(r"aten\.(\w+)", ast.unparse(node.value)))
                if len(named) >= 2:
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    found.append(f"{name}.{ast.unparse(target)}")
    return found


def hops(modules: Mapping[str, ast.Module]) -> tuple[int, int, int]:
    """Count private functions, those used once, and those used once that are short."""
    private = once = short = 0
    for tree in modules.values():
        used = Counter(
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(tree)
            if isinstance(node, (ast.Name, ast.Attribute))
        )
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("_"):
                continue
            if node.name.startswith("__"):
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            private += 1
            once += used[node.name] == 1
            short += used[node.name] == 1 and lines <= SHORT
    return private, once, short


def main(arguments: list[str]) -> int:
    """Print the figures of a checkout."""
    root = Path(arguments[0]) if arguments else ROOT
    modules = sources(root)
    circles = cycles(modules)
    packages = {layer_of(name) for name in modules}
    unknown = sorted(packages - set(LAYERS))
    back = [] if unknown else upward(modules)
    private, once, short = hops(modules)
    tables, runners = operator_tables(modules), interpreters(modules)
    print(f"packages and top-level modules: {len(packages)}, in cycles: {sum(map(len, circles))}")
    if unknown:
        print(
            f"imports against the order of the layers: not counted, {unknown} have no place in it"
        )
    else:
        print(f"imports against the order of the layers: {len(back)}")
    print(*(f"    {name} -> {target}" for name, target in back), sep="\n", end="\n" if back else "")
    print(f"subclasses of fx.Interpreter: {len(runners)}", *runners, sep="\n    ")
    print(f"operator tables outside the records: {len(tables)}", *tables, sep="\n    ")
    print(
        f"private functions: {private}, with one caller: {once}, of at most {SHORT} lines: {short}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
