"""The selective scan at the shapes of sweeps, of long rows and of decoding, and the diagonal scans.

Beside the bytes, an exponential per token, channel and state each way limits it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import Case
from holdall.kernels import diagonal_scan as diagonal_kernels
from holdall.kernels.selective_scan import selective_scan
from holdall.ops import diagonal_scan as diagonal_ops
from holdall.ops import selective_scan as selective_ops

HALF, SINGLE = torch.bfloat16, torch.float32
EXPONENTIALS = 3.7e12
"""A second: 132 multiprocessors x 16 a clock x 1.755 GHz."""
TARGET = 3.0
"""Times what the exponentials take."""


def cases() -> Iterator[Case]:
    yield _trained(4, 256, 256, 256, 16)
    yield _trained(4, 256, 64, 128, 24)
    yield _trained(1, 4, 8192, 2048, 16)
    yield _trained(1, 1, 8192, 2048, 16)
    yield _step(128, 2048, 16)
    yield _diagonal(1024, 256, 256)
    yield _diagonal(4, 8192, 2048)
    yield _steady(1024, 256, 128)


def _draw(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _inputs(rows: int, length: int, channels: int, size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What Mamba has at the scan: dt before its softplus, z as half of a projection."""
    x, z = _draw(rows, length, 2 * channels).chunk(2, dim=-1)
    a = -torch.arange(1.0, size + 1, device="cuda").repeat(channels, 1)
    b, c = (_draw(rows, length, size) for _ in range(2))
    args = [x.contiguous(), _draw(rows, length, channels) - 4, a, b, c, a.new_zeros(rows, channels, size)]
    per_channel = {name: _draw(channels, dtype=SINGLE) for name in ("dt_bias_D", "skip_D")}
    return args, per_channel | {"z_BTD": z}


def _plain(
    x: Tensor, dt: Tensor, *rest: Tensor, dt_bias_D: Tensor, skip_D: Tensor, z_BTD: Tensor
) -> tuple[Tensor, Tensor]:
    y, h = selective_ops.selective_scan(x, F.softplus(dt.float() + dt_bias_D), *rest)
    return torch.addcmul(y, x, skip_D.to(y.dtype)) * F.silu(z_BTD), h


def _backward(
    function: Callable, args: list[Tensor], fused: dict[str, Tensor], members: int = 1
) -> Callable[[], Any]:
    """Forward and the gradients of all inputs, for a population under vmap."""
    leaves = [u.detach().requires_grad_() for u in (*args, *fused.values())]

    def call(*given: Tensor) -> Tensor:
        return function(*given[: len(args)], **dict(zip(fused, given[len(args) :], strict=True)))[0]

    if members > 1:  # each with rows and parameters of its own
        leaves = [
            u.unflatten(0, (members, -1)) if u.ndim == 3 else u.expand(members, *u.shape) for u in leaves
        ]
        leaves, call = [u.detach().clone().requires_grad_() for u in leaves], torch.func.vmap(call)
    up = torch.randn_like(call(*leaves))
    return lambda: torch.autograd.grad(call(*leaves), leaves, up)


def _trained(members: int, rows: int, length: int, channels: int, size: int) -> Case:
    args, fused = _inputs(members * rows, length, channels, size)
    numbers = members * rows * length * channels
    return Case(
        what="selective scan, forward and backward",
        shape=f"{members} x {rows} x {length} x {channels}, state {size}, bfloat16",
        # x, dt, z read, y written; these and dy read, three gradients written
        bytes=2 * 11 * numbers,
        target_ms=TARGET * 2e3 * numbers * size / EXPONENTIALS,
        ways={
            "holdall": _backward(selective_scan, args, fused, members),
            "plain PyTorch": _backward(_plain, args, fused, members),
        },
    )


def _step(rows: int, channels: int, size: int) -> Case:
    args, fused = _inputs(rows, 1, channels, size)

    def way(function: Callable, **how: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return function(*args, **fused, **how)

        return call

    return Case(
        what="selective scan, one token in place",
        shape=f"{rows} x {channels}, state {size}, bfloat16",
        bytes=rows * channels * (8 * size + 2 * 4),
        ways={
            "holdall": way(selective_scan, inplace=True),
            "plain PyTorch": way(_plain),
            "torch.compile": way(torch.compile(_plain)),
        },
    )


def _scan_case(
    what: str, shape: str, numbers: float, ours: Callable, plain: Callable, args: list[Tensor]
) -> Case:
    leaves = [u.requires_grad_() for u in args]

    def way(function: Callable) -> Callable[[], Any]:
        up = torch.randn_like(function(*leaves))
        return lambda: torch.autograd.grad(function(*leaves), leaves, up)

    return Case(
        what=what + ", forward and backward",
        shape=shape,
        bytes=numbers,
        ways={"holdall": way(ours), "plain PyTorch": way(plain)},
    )


def _diagonal(rows: int, length: int, channels: int) -> Case:
    args = [torch.rand(rows, length, channels, device="cuda"), _draw(rows, length, channels, dtype=SINGLE)]
    args.append(_draw(rows, channels, dtype=SINGLE))
    return _scan_case(
        "diagonal scan", f"{rows} x {length} x {channels}, float32", 8 * 4 * args[0].numel(),
        diagonal_kernels.diagonal_scan, diagonal_ops.diagonal_scan, args,
    )  # fmt: skip


def _steady(rows: int, length: int, modes: int) -> Case:
    log_a = torch.complex(-torch.rand(modes, device="cuda"), torch.rand(modes, device="cuda"))
    b, h = (
        torch.randn(*s, dtype=torch.complex64, device="cuda") for s in ((rows, length, modes), (rows, modes))
    )
    return _scan_case(
        "steady scan", f"{rows} x {length} x {modes}, complex64", 5 * 8 * b.numel(),
        diagonal_kernels.steady_scan, diagonal_ops.steady_scan, [log_a, b, h],
    )  # fmt: skip
