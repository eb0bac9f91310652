"""Print the lengths of modules and functions; fail if one exceeds its limit."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"fxprune": 300, "passes": 200, "tools": 300, "examples": 300}
FUNCTION = 40


@dataclass(frozen=True)
class Size:
    """Lines of a module, and of its longest function, docstrings left out."""

    path: Path
    lines: int
    limit: int
    function: str
    function_lines: int

    @property
    def fits(self) -> bool:
        """Whether both are within limits."""
        return self.lines <= self.limit and self.function_lines <= FUNCTION


def sizes() -> Iterator[Size]:
    """Measure every module, folder by folder."""
    for folder, limit in LIMITS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / "fxprune" / "passes") not in path.parents:  # a link to passes/
                yield measure(path, limit)


def measure(path: Path, limit: int) -> Size:
    """Measure one module."""
    text = path.read_text()
    functions = [
        (_body_lines(node), node.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lines, name = max(functions, default=(0, "-"))
    return Size(path.relative_to(ROOT), len(text.splitlines()), limit, name, lines)


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the last; signature and docstring do not count."""
    first = node.body[0]
    start = first.lineno
    if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None:
        start = (first.end_lineno or first.lineno) + 1
    return (node.end_lineno or node.lineno) - start + 1


def main() -> int:
    """Print the table; 1 if something is too long."""
    found = list(sizes())
    print(f"{'module':<40} {'lines':>5} {'longest function':>32} {'lines':>5}")
    for size in found:
        mark = "" if size.fits else "  <- too long"
        print(
            f"{size.path!s:<40} {size.lines:>5} {size.function:>32} {size.function_lines:>5}{mark}"
        )
    print(f"{'total':<40} {sum(size.lines for size in found):>5}")
    return 0 if all(size.fits for size in found) else 1


if __name__ == "__main__":
    sys.exit(main())
