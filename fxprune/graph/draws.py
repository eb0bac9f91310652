"""Random operators without chance: every draw gives one value, whatever its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class FixedDraws(TorchDispatchMode):
    """While active, random operators give the centre of what they draw from.

    Uniform draws give the middle of their interval, Bernoulli draws their probability; so dropout
    and stochastic depth, which divide by it, change nothing. Unlike with a seed, an element's
    value does not depend on how many others are drawn.

    Args:
        normal: what a standard normal draw gives; a value other than 0 keeps what multiplies the
            draw visible in the output.

    """

    def __init__(self, normal: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._normal = normal

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        draw = _DRAWS.get(func._opname.removesuffix("_"))
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args)}  # noqa: B905
        given = {
            **{a.name: a.default_value for a in func._schema.arguments if a.has_default_value()},
            **given,
            **kwargs,
        }
        fixed = None if draw is None else draw(given, self._normal)
        if fixed is None:
            return _seeded(func, args, kwargs)
        if isinstance(fixed, tuple):
            return fixed
        if func._schema.is_mutable:
            return args[0].copy_(torch.as_tensor(fixed))
        with torch.random.fork_rng(devices=[]):
            like = func(*args, **kwargs)  # its shape, type and device
        return torch.as_tensor(fixed).to(like.device, like.dtype).expand(like.shape).clone()


def _seeded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run an operator with no rule of its own on a generator that starts afresh."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return func(*args, **kwargs)


def _bernoulli(given: Mapping[str, Any], normal: float) -> Any:
    probability = given.get("p")
    return given["self"] if probability is None else probability


def _uniform(given: Mapping[str, Any], normal: float) -> Any:
    return (given.get("from", 0.0) + given.get("to", 1.0)) / 2


def _normal(given: Mapping[str, Any], normal: float) -> Any:
    return given.get("mean", 0.0) + normal * given.get("std", 1.0)


def _dropout(given: Mapping[str, Any], normal: float) -> Any:
    operand = given.get("input", given.get("self"))
    assert isinstance(operand, Tensor)
    return operand.clone(), torch.ones_like(operand, dtype=torch.bool)


def _rrelu(given: Mapping[str, Any], normal: float) -> Any:
    slope = (given["lower"] + given["upper"]) / 2
    return torch.nn.functional.leaky_relu(given["self"], slope)


_DRAWS: Mapping[str, Callable[[Mapping[str, Any], float], Any]] = {
    "bernoulli": _bernoulli,
    "uniform": _uniform,
    "rand": lambda given, normal: 0.5,
    "rand_like": lambda given, normal: 0.5,
    "randn": lambda given, normal: normal,
    "randn_like": lambda given, normal: normal,
    "normal": _normal,
    "randint": lambda given, normal: given.get("low", 0),
    "randint_like": lambda given, normal: given.get("low", 0),
    "exponential": lambda given, normal: 1 / given.get("lambd", 1.0),
    "poisson": lambda given, normal: given["self"],
    "native_dropout": _dropout,
    "_fused_dropout": _dropout,
    "rrelu_with_noise": _rrelu,
}
