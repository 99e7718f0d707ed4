"""A second derivative through a kernel is refused by name, whatever it would depend on.

Every operation runs with its gradients on tensors without values, as a mixer calls it: nothing is computed.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import holdall
from holdall.kernels import cross_entropy, rwkv_7, swiglu
from holdall.testing import laws

LINEAR = {"rwkv_7_beside", "toeplitz_forward"}
"""Their gradients do not depend on what they are differentiated by."""
TWICE = {"into_channels": ((2, 3, 2, 4), (2, 5, 4)), "out_of_channels": ((2, 4, 3, 2), (2, 5, 4))}
"""Products, differentiable as often as one likes; the shapes of their inputs."""
NEVER = {
    *("rotary_turn", "gated_conv_inplace", "taylor_step", "taylor_step_inplace", "selective_scan_step"),
    *("add_norm", "add_norm_inplace", "rotate_both"),
    *("selective_scan_step_inplace", "window_attention_step", "window_attention_step_inplace"),
    *("taylor_replay", "taylor_replay_inplace", "decayed_replay", "decayed_replay_inplace"),
    *("reserved_attention", "reserved_attention_inplace", "noisy_draw", "few_rows_linear"),
    "gated_conv_ring",
}
"""For decoding, and of positions: PyTorch refuses the first derivative."""


class Calls(TorchDispatchMode):
    """The arguments of the first call of each of the package's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "holdall":
            self.arguments.setdefault(func._opname, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def operations() -> dict[str, Any]:
    """All that the package registers, by name; read off its files, so that none is left out."""
    root, names = Path(holdall.__file__).parent, set()
    for path in root.rglob("*.py"):
        if found := re.findall(r'custom_op\(\s*"holdall::(\w+)"', path.read_text(encoding="utf-8")):
            importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
            names.update(found)
    return {name: OPDEFS[f"holdall::{name}"] for name in names}


@pytest.fixture(scope="module")
def fake() -> FakeTensorMode:
    return FakeTensorMode()


@pytest.fixture(scope="module")
def arguments(fake: FakeTensorMode) -> dict[str, tuple[Any, ...]]:
    """What each operation is called with, forward and backward, by mixers in their kernel form and others."""
    with Calls() as calls, torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        for name in holdall.names():
            entry = holdall.describe(name)
            if "kernel" not in entry.config.forms:
                continue
            mixer = entry.configure(width=16, form="kernel", **entry.config.variants[0]).build()
            assert mixer.form == "kernel"
            own = {
                name: fake.from_tensor(x.detach()).requires_grad_(x.requires_grad)
                for name, x in (*mixer.named_parameters(), *mixer.named_buffers())
            }
            with fake:
                x = torch.zeros(2, 3, 16, requires_grad=True)
                y, _ = torch.func.functional_call(mixer, own, (x,), {"want_state": False})
                y.sum().backward()
        with fake:
            h, head = torch.zeros(6, 8, requires_grad=True), torch.zeros(5, 8, requires_grad=True)
            cross_entropy.linear_cross_entropy(h, head, torch.zeros(6, dtype=torch.long))[0].backward()
            rwkv_7.beside(h[None], torch.zeros(1, 8)).sum().backward()
            swiglu.swiglu(h).sum().backward()
    return calls.arguments


def test_every_operation_has_a_gradient_or_refuses_it(operations: dict[str, Any]) -> None:
    """Whether the gradient can be differentiated is the next test's question."""
    assert {name for name, op in operations.items() if op._backward_fn is None} == NEVER


def test_second_derivatives_are_refused(
    operations: dict[str, Any], arguments: dict[str, tuple[Any, ...]], fake: FakeTensorMode
) -> None:
    assert set(operations) - set(arguments) == NEVER, "no mixer's kernel form calls these: call them above"
    refusing = {
        name for name in arguments if "once_differentiable" in operations[name]._backward_fn.__qualname__
    }
    assert all(re.search("_backward$|_scaled$", name) for name in refusing), "no mixer trains through these"
    for name in sorted(set(arguments) - refusing - set(TWICE)):
        with fake:
            args = [
                torch.zeros_like(x, requires_grad=True)
                if isinstance(x, Tensor) and x.is_floating_point()
                else x
                for x in arguments[name]
            ]
            leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
            out = operations[name](*args)
            outs = [x for x in ([out] if isinstance(out, Tensor) else out) if x.requires_grad]
            # the gradients that come in depend on nothing, and then on something
            for depend in (False, True):
                ups = [torch.ones_like(out, requires_grad=depend) for out in outs]
                for grad in torch.autograd.grad(outs, leaves, ups, create_graph=True, allow_unused=True):
                    if grad is None:
                        continue
                    if not grad.requires_grad:
                        assert (name in LINEAR) > depend, f"{name}: a gradient is taken for a constant"
                        continue
                    with pytest.raises(RuntimeError, match="is differentiated twice"):
                        torch.autograd.grad(grad.sum(), leaves + ups * depend, retain_graph=True)


@pytest.mark.parametrize("name", TWICE)
def test_products_are_differentiable_twice(name: str, operations: dict[str, Any]) -> None:
    inputs = [laws.draw(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(TWICE[name])]
    assert torch.autograd.gradgradcheck(
        lambda *x: operations[name](*x).square(), [x.requires_grad_() for x in inputs]
    )
