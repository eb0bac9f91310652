from __future__ import annotations

from hypothesis import given, settings
from strategies import Design, designs

from tools.random_networks import fault_of, main


@settings(max_examples=10)
@given(designs())
def test_programs_are_the_networks_and_removal_is_exact(design: Design) -> None:
    assert fault_of(design) is None


def test_the_command_counts_failures() -> None:
    assert main(2, seed=1) == 0
