"""State dicts: extract them from checkpoints and load them into models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxprune.errors import InputError

WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "net", "module", "params")
PREFIXES = ("module.", "_orig_mod.")
# Batch norms count their batches; old checkpoints lack the counter, and no result depends on it.
COUNTERS = ("num_batches_tracked",)
SHOWN = 3  # how many mismatches an error lists


def state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """Extract the tensors of a checkpoint, without the name prefixes that wrappers add."""
    while isinstance(content, Mapping) and not _is_state(content):
        key = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            raise InputError(
                f"{path} holds a dictionary of {', '.join(map(str, list(content)[:5]))}, and none "
                "of these is a known key for weights; save only model.state_dict()"
            )
        content = content[key]
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {type(content).__name__}; it must hold a state dict, an exported "
            "program or a module"
        )
    state = dict(content)
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def fit(model: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Load the weights into the model; raises ``InputError`` that names what does not fit."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith(COUNTERS)]
    unexpected = [name for name in state if name not in expected]
    clashing = [
        f"{name} (file {_size(state[name])}, model {_size(tensor)})"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        _listed(kind, names)
        for kind, names in [
            ("with another shape", clashing),
            ("missing from the file", missing),
            ("not in the model", unexpected),
        ]
        if names
    ]
    if problems:
        raise InputError(f"{path} does not fit --arch {arch}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}"
