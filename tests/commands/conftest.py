"""What tests of several commands need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdall.contract import registry


@pytest.fixture
def registry_as_before() -> Iterator[None]:
    """Forgets, after a test, the mixers that a command registered in it."""
    before = dict(registry._registry)
    yield
    registry._registry.clear()
    registry._registry.update(before)
