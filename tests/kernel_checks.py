"""What several kernels' tests hold."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import laws
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to yet holds NaN; and what cannot be deterministic raises."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def times_compiled(*kernels: Any) -> int:
    """How often these kernels were compiled so far, on a GPU."""
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def assert_trains_under_vmap(
    mixer: nn.Module, x_PBTD: Tensor, *, autocast: bool, still: bool = False
) -> None:
    """Members with weights of their own, P of them, give what each gives alone, gradients of weights too.

    still: whether a parameter may have a gradient of zero.
    """
    device = x_PBTD.device
    members = [copy.deepcopy(mixer) for _ in range(len(x_PBTD))]
    with torch.no_grad():
        for i, member in enumerate(members):
            for parameter in member.parameters():
                parameter += 0.1 * laws.draw(*parameter.shape, dtype=torch.float32, seed=i).to(device)
    weights, buffers = torch.func.stack_module_state(members)

    def one(weights: dict, buffers: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, (weights, buffers), (x,), {"want_state": False})[0]

    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = torch.func.vmap(one)(weights, buffers, x_PBTD)
        alone = [member(x_PBTD[i], want_state=False)[0] for i, member in enumerate(members)]
    y.float().square().sum().backward()
    tolerance = 2e-2 if autocast else 1e-5
    for i, member in enumerate(members):
        torch.testing.assert_close(y[i].float(), alone[i].float(), rtol=tolerance, atol=tolerance)
        alone[i].float().square().sum().backward()
        for name, parameter in member.named_parameters():
            bound = tolerance * parameter.grad.abs().max().item()
            apart = laws.distance(weights[name].grad[i], parameter.grad)
            assert apart < bound or (still and apart == bound), name
