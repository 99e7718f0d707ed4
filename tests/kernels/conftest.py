"""Kernels run on a GPU where there is one, else in Triton's interpreter; the tests are the same.

Triton decides which when a kernel's file is first imported, so the environment is set here, before any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="needs Triton")


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to yet holds NaN; and what cannot be deterministic raises."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(100).new_empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip without one."""
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
