"""Hide known warnings of libraries from users; all others still show."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Warnings of torch and onnxscript about their own internals during tracing and export.
NOISY_MODULES = r"(torch|onnxscript|onnx|copyreg|onnx_ir)(\.|$)"
NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Hide the deprecation and user warnings that torch and onnx raise about themselves."""
    if not wanted:
        yield
        return
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=NOISY_MODULES)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
