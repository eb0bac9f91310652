"""Functions that a user names on the command line as ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxprune.errors import InputError


def find_factory(spec: str, purpose: str) -> Callable[..., Any]:
    """Import what ``package.module:factory`` names; the current directory is importable.

    Args:
        spec: module path, colon, name of a callable.
        purpose: the option that names it, such as ``--arch``; part of the error message.

    Raises:
        InputError: the module or the callable does not exist, or importing the module fails.

    """
    module_name, _, name = spec.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{purpose} {spec}: there is no module {error.name} in the current directory ({here}) "
            "or among the installed packages"
        ) from error
    except Exception as error:
        raise InputError(
            f"{purpose} {spec}: importing {module_name} failed with {type(error).__name__}: {error}"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise InputError(
            f"{purpose} {spec}: {module_name} has no callable {name!r}"
            + suggest(name, [key for key, value in vars(module).items() if callable(value)])
        )
    return factory  # type: ignore[no-any-return]  # checked to be callable just above


def call_factory(factory: Callable[..., Any], spec: str, purpose: str, options: Any) -> Any:
    """Call a user's factory with keyword options; an exception in it becomes an ``InputError``."""
    try:
        return factory(**options)
    except InputError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise InputError(
            f"{purpose} {spec}: the call with ({given}) failed with {type(error).__name__}: {error}"
        ) from error


def suggest(name: str, known: list[str]) -> str:
    """Return a clause that suggests the most similar known names, or an empty string."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
