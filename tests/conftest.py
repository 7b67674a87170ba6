"""Fixtures: `golden` for printed text, `data` for what may be absent."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from benchmarks.models.data import DataMissing

# A busy machine is no failure.
_NOT_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=_NOT_SLOW)
hypothesis.settings.load_profile("untimed")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the text of `golden` instead of comparing it")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """golden(text): the same as golden/<test name>.txt, up to the newline at its end."""
    path = GOLDEN / (re.sub(r"[^\w.]+", "-", request.node.name).strip("-") + ".txt")

    def check(text: str) -> None:
        if request.config.getoption("accept"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        if not path.is_file():
            pytest.fail(f"no {path}: run pytest --accept, and read the file before committing it", pytrace=False)
        assert text.rstrip("\n") == path.read_text(encoding="utf-8").rstrip("\n")

    return check


@pytest.fixture
def data() -> Callable[..., Any]:
    """data(read, *args) is read(*args), or a skip where its files are absent: `net = data(minilm.model)`."""

    def call(read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return read(*args, **kwargs)
        except DataMissing as missing:
            pytest.skip(str(missing))

    return call
