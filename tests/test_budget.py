from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.errors import InputError
from fxprune.planning.budget import Budget, Name, Target, readable


@pytest.mark.parametrize(
    ("text", "name", "amount", "relative"),
    [
        ("macs=50%", "macs", 0.5, True),
        ("macs=0.5", "macs", 0.5, True),
        ("macs=2.0x", "macs", 0.5, True),
        ("macs=4X", "macs", 0.25, True),
        ("params=1.5M", "params", 1.5e6, False),
        ("params=120000", "params", 120000.0, False),
        ("params=1", "params", 1.0, True),
        ("macs=4.1G", "macs", 4.1e9, False),
        ("size=1MB", "size", 1e6, False),
        ("size=2KiB", "size", 2048.0, False),
        ("size = 30 %", "size", 0.3, True),
        ("latency=1.5ms", "latency", 1.5, False),
        ("latency=800us", "latency", 0.8, False),
        ("latency=2x", "latency", 0.5, True),
    ],
)
def test_reads_a_target(text: str, name: Name, amount: float, relative: bool) -> None:
    target = Target.parse(text)
    assert (target.name, target.relative) == (name, relative)
    assert math.isclose(target.amount, amount)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("text", "reason", "column"),
    [
        ("flops=50%", "'flops' is not a target; the targets are params, macs, size, latency", 0),
        ("macs", "expected '='", 4),
        ("macs=", "is not a valid macs budget", 5),
        ("macs=half", "'half' is not a valid", 5),
        ("macs=-3%", "is not a valid", 5),
        ("macs=nan", "is not a valid", 5),
        ("macs=0%", "above zero", 5),
        ("macs=120%", "more macs than the dense model has", 5),
        ("macs=0.5x", "more macs than the dense model has", 5),
        ("size=12", "'12' needs a unit of size; write 50%, 2x, 1MB", 5),
        ("size=3ms", "'ms' is not a unit of size", 5),
        ("latency= 3MB", "'MB' is not a unit of latency", 9),
    ],
)
def test_says_where_a_target_is_wrong(text: str, reason: str, column: int) -> None:
    with pytest.raises(InputError) as caught:
        Target.parse(text)
    message = str(caught.value)
    assert reason in message
    shown, caret = message.splitlines()[-2:]
    assert shown == f"    {text}"
    assert caret.index("^") == 4 + column


def test_reads_several_targets() -> None:
    budget = Budget.parse("macs=50%,size=1MB, latency=1.5ms")
    assert [target.quantity for target in budget.targets] == ["macs", "weight_bytes", "latency_ms"]
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "  ", "macs=50%,", "macs=50%,macs=20%"])
def test_refuses_a_budget(text: str) -> None:
    with pytest.raises(InputError):
        Budget.parse(text)


@given(st.floats(1e-3, 1.0), st.sampled_from(["params", "macs", "size", "latency"]))
def test_a_fraction_limits_relative_to_the_dense_model(fraction: float, name: Name) -> None:
    assert Target.of(name, fraction).limit(1000.0) == 1000.0 * fraction
    assert Target.of(name, f"{100 * fraction!r}%").limit(1.0) == pytest.approx(fraction)


def test_an_absolute_limit_is_itself() -> None:
    assert Target.of("size", "1MB").limit(5e7) == 1e6


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        ("macs", 62.7e6, "62.7M macs"),
        ("params", 900.0, "900 params"),
        ("weight_bytes", 1.5e6, "1.5 MB of weights"),
        ("latency_ms", 0.8312, "0.831 ms"),
    ],
)
def test_writes_costs_for_people(quantity: str, value: float, text: str) -> None:
    assert readable(quantity, value) == text  # type: ignore[arg-type]  # parametrised text
