"""Every error that fxprune raises on purpose."""

from __future__ import annotations

from typing import ClassVar


class FxpruneError(Exception):
    """A deliberate error: its message says what is wrong, where, and how to mend it."""

    exit_code: ClassVar[int] = 1


class InputError(FxpruneError):
    """What the user handed in cannot be used as it is."""

    exit_code: ClassVar[int] = 2


class TraceError(InputError):
    """The model cannot be captured as a graph."""


class ExportError(InputError):
    """The model cannot be written as ONNX, or ONNX Runtime cannot run it."""


class OrderError(InputError):
    """A pipeline's passes are in an order that cannot work."""


class PreconditionError(FxpruneError):
    """A pass was run on a program that lacks a fact it reads."""


class PostconditionError(FxpruneError):
    """A program is not what the step that made it promised."""


class BudgetError(FxpruneError):
    """A budget cannot be met; the message says what stops it."""
