"""Kernels run on a GPU where there is one, else in Triton's interpreter; the tests are the same.

Triton decides which when a kernel's file is first imported, so the environment is set here, before any.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import kernel_checks
import pytest
import torch
from torch import Tensor

from holdall.testing import laws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="needs Triton")


def interpret_faster() -> None:
    """Spare Triton's interpreter what takes most of its time, and changes nothing.

    With every call of a jitted function, also of one within a kernel that runs, it looks through all of
    `triton.language` for what is to be replaced, though all of it has been replaced when the kernel began.
    """
    from triton import language
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_patch_builtin", "_patch_attr")):
        return  # another release of Triton: it interprets as slowly as it does
    patch_lang, is_builtin = interpreter._patch_lang, language.core.is_builtin

    @functools.cache
    def languages(function: Callable) -> list[ModuleType]:
        return [u for u in function.__globals__.values() if u is language or u is language.core]

    @functools.cache
    def builtins(module: object) -> list[str]:
        return [name for name, member in inspect.getmembers(module) if is_builtin(member)]

    def patch_once(function: Callable) -> object:
        if any(is_builtin(module.load) for module in languages(function)):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    def patch_builtin(module: object, builder: object, scope: object) -> None:
        for name in builtins(module):
            if is_builtin(member := getattr(module, name)):
                interpreter._patch_attr(module, name, member, builder, scope)

    interpreter._patch_lang, interpreter._patch_builtin = patch_once, patch_builtin


if DEVICE == "cpu":
    interpret_faster()


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def poisoned() -> Iterator[None]:
    with kernel_checks.poisoned():
        assert torch.empty(100).new_empty(7).isnan().all()
        yield


@pytest.fixture
def assert_replays() -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """Holds that a CUDA graph of a function without arguments gives the function's bits."""

    def check(function: Callable[[], Sequence[Tensor]]) -> None:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):  # all on one: a leaf belongs to the stream that first saw it
            want = [x.detach().clone() for x in function()]
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=side):
                got = [x.detach() for x in function()]
        for x in got:
            x.fill_(torch.nan if laws.differentiable(x) else -1)
        graph.replay()
        torch.cuda.synchronize()
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            laws.assert_bitwise(f"result {i} of a replay", one, other)

    return check


@pytest.fixture(autouse=True)
def shares_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several processes may test on one GPU: they keep nothing, and what is marked gpu("tens of GB") is alone
    with its kind."""
    mark = request.node.get_closest_marker("gpu")
    with contextlib.ExitStack() as stack:
        if mark and mark.args and DEVICE == "cuda":
            lock = stack.enter_context((Path(tempfile.gettempdir()) / "holdall-gpu-memory.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip without one."""
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
