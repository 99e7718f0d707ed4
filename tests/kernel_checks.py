"""What several kernels' tests hold."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdall.contract import Mixer, State, map_state
from holdall.testing import laws

traced = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
"""Of tests that trace autograd functions by torch.compile."""


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


def mixer_pulled_back(mixer: Mixer, x_BTD: Tensor, state: State, cut: int) -> dict[str, Tensor]:
    """Of two pieces read one after the other: outputs, final state, and gradients from both together."""
    x_BTD = x_BTD.detach().clone().requires_grad_()
    state = map_state(state, lambda t: t.detach().clone().requires_grad_(laws.differentiable(t)))
    y_BTD, after = laws.read_in_pieces(mixer, x_BTD, (cut, x_BTD.shape[1] - cut), state)
    ends = {n: t for n, t in laws.named(y_BTD, after).items() if laws.differentiable(t)}
    ups = [laws.draw(*t.shape, dtype=torch.float64, seed=3 + i).to(t) for i, t in enumerate(ends.values())]
    leaves = {**dict(mixer.named_parameters()), "x": x_BTD, **laws.named(x_BTD, state)}
    leaves = {f"gradient of {name}": t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(list(ends.values()), list(leaves.values()), ups, materialize_grads=True)
    return {n: t.detach() for n, t in (*ends.items(), *zip(leaves, grads, strict=True))}


def strengths(*shape: int) -> Tensor:
    """Log decays, the last dimension of four kinds: a token forgets up to 5%, all but at most e^-10,
    all but at most e^-50, or one in four forgets all but e^-30, the others up to 5%."""
    share = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    rare = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.25
    kinds = (0.05 * share, 10 + 20 * share, 50 + 50 * share, torch.where(rare, 30.0, 0.05 * share))
    which = torch.arange(shape[-1]) % len(kinds)
    return -torch.stack(kinds).gather(0, which.expand(1, *shape))[0]


def apart(got: Tensor, right: Tensor, dim: int) -> Tensor:
    """The largest difference at each place of a dimension, in shares of the largest right entry there: what
    forgets fast has tiny gradients beside what does not."""
    rest = [i for i in range(right.ndim) if i != dim % right.ndim]
    size = right.abs().amax(rest).clamp(min=torch.finfo(torch.float64).tiny)
    return (got.double() - right).abs().amax(rest) / size
