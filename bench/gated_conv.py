"""The gated short convolution at the shapes of the Based language models, of sweeps, and of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu import Case
from holdall.kernels.gated_conv import gated_conv
from holdall.mixers.base_conv import BaseConv, BaseConvConfig
from holdall.ops.gated_conv import gated_conv as plain

HALF, SINGLE = torch.bfloat16, torch.float32
TARGET_SHARE = 0.75


def cases() -> Iterator[Case]:
    yield _between_products(8, 2048, 3584, HALF, backward=False)
    yield _between_products(8, 2048, 3584, HALF, backward=True)
    yield _mixer(8, 2048, 1792)
    yield _sweep(1024, 256, 128, HALF)
    yield _sweep(1024, 256, 128, SINGLE)
    yield _step(1, 1792)
    yield _step(128, 1792)


def _draw(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _trained(function: Callable, args: list[Tensor | None], **how: Any) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and the gradients of all that have one, from a gradient that is there already."""
    leaves = [a for a in args if a is not None and a.requires_grad]
    up = torch.randn_like(function(*args, **how)[0])
    return lambda: torch.autograd.grad(function(*args, **how)[0], leaves, up)


def _between_products(batch: int, length: int, channels: int, dtype: torch.dtype, *, backward: bool) -> Case:
    """What Based's layer does between its two products, from both halves of the first one's result."""
    projected = _draw(batch, length, 2 * channels, dtype=dtype).requires_grad_(backward)
    weight = _draw(channels, 3, dtype=dtype).requires_grad_(backward)
    args = [None, projected, None, weight, None, _draw(batch, 2, channels, dtype=dtype)]

    def way(function: Callable) -> Callable:
        if backward:
            return _trained(function, args, silu="conv")
        return lambda: function(*args, silu="conv")

    numbers = (8 if backward else 3) * batch * length * channels
    return Case(
        what="gated convolution, " + ("forward and backward" if backward else "forward"),
        shape=f"{batch} x {length} x {channels}, {str(dtype)[6:]}",
        bytes=numbers * dtype.itemsize,
        target_ms=numbers * dtype.itemsize / 3.0e9 / TARGET_SHARE,
        ways={
            "ours": way(gated_conv),
            "torch.compile of plain": way(torch.compile(plain, dynamic=False)),
            "plain": way(plain),
        },
    )


def _build(form: str, width: int, state: dict[str, Tensor] | None = None) -> BaseConv:
    mixer = BaseConvConfig(width=width, expand=4, form=form).build().to("cuda", HALF)
    if state is not None:
        mixer.load_state_dict(state)
    return mixer


def _mixer(batch: int, length: int, width: int) -> Case:
    """All of Based's layer, with its products."""
    ours = _build("kernel", width)
    other = _build("parallel", width, ours.state_dict())
    compiled = torch.compile(other, dynamic=False)
    x, up = _draw(batch, length, width).requires_grad_(), _draw(batch, length, width)

    def way(mixer: Callable, weights: list[Tensor]) -> Callable:
        return lambda: torch.autograd.grad(mixer(x, want_state=False)[0], [x, *weights], up)

    parameters = sum(p.numel() for p in ours.parameters())
    return Case(
        what="BaseConv, expand 4, forward and backward",
        shape=f"{batch} x {length} x {width}, bf16",
        bytes=2 * batch * length * (4 * width + 8 * 2 * width) + 4 * parameters,
        flops=3 * 2 * batch * length * 6 * width**2,
        ways={
            "ours": way(ours, list(ours.parameters())),
            "torch.compile of plain": way(compiled, list(other.parameters())),
            "plain": way(other, list(other.parameters())),
        },
    )


def _sweep(batch: int, length: int, channels: int, dtype: torch.dtype) -> Case:
    """Zoology's: the convolved tokens, their projection as the gate, and the tokens added."""
    x, gate = (_draw(batch, length, channels, dtype=dtype).requires_grad_() for _ in range(2))
    weight, bias = _draw(channels, 3).requires_grad_(), _draw(channels).requires_grad_()
    args = [x, gate, None, weight, bias, _draw(batch, 2, channels, dtype=dtype)]
    return Case(
        what="gated convolution with skip, forward and backward",
        shape=f"{batch} x {length} x {channels}, {str(dtype)[6:]}",
        bytes=8 * batch * length * channels * dtype.itemsize,
        ways={
            "ours": _trained(gated_conv, args, skip=True),
            "torch.compile of plain": _trained(torch.compile(plain, dynamic=False), args, skip=True),
            "plain": _trained(plain, args, skip=True),
        },
    )


def _step(batch: int, width: int) -> Case:
    """One token of Based's layer, its state given away: what generation repeats."""
    x = _draw(batch, 1, width)
    ours = _build("kernel", width)
    other = _build("parallel", width, ours.state_dict())
    compiled = torch.compile(other, dynamic=False)

    def way(mixer: Callable) -> Callable[[], None]:
        state = ours.init_state(batch, dtype=HALF, device=x.device)

        @torch.no_grad()
        def step() -> None:
            after = mixer(x, state, inplace=True)[1]
            if after.past_BPD is not state.past_BPD:
                state.past_BPD.copy_(after.past_BPD)

        return step

    parameters = sum(p.numel() for p in ours.parameters())
    return Case(
        what="BaseConv, expand 4, one more token",
        shape=f"{batch} x 1 x {width}, bf16",
        bytes=2 * (parameters + batch * (2 * width + 3 * 2 * 2 * width + 2 * 2 * 2 * width + 4 * width)),
        flops=2 * batch * 6 * width**2,
        ways={"ours": way(ours), "torch.compile of plain": way(compiled), "plain": way(other)},
    )
