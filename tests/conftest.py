from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from fxprune.latency.stairs import WidthSteps

REPOSITORY = Path(__file__).resolve().parent.parent

# The same examples in every run; `--hypothesis-profile=explore` draws new ones.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", parent=settings.get_profile("repeatable"), derandomize=False)
settings.register_profile(  # for who only wants to know whether there is a failure
    "hasty", parent=settings.get_profile("repeatable"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden/*.txt; review the diff"
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def steps_of_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let default widths be the same wherever tests run: multiples of 16, depthwise of 8."""
    steps = WidthSteps(8, 4)
    monkeypatch.setattr("fxprune.latency.stairs.width_steps", lambda *_, **__: steps)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``tests/golden/NAME.txt``, or write it there with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = REPOSITORY / "tests" / "golden" / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.strip() + "\n")
        assert path.exists(), f"no golden text {path.name}; run pytest --update-golden"
        assert text.strip() == path.read_text().strip()

    return compare


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of trained weights and data that lies beside the repository on some machines."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs trained weights and data in {path.name}/ beside the repository")
    return path
