"""Sliding-window attention: training on MQAR's short rows and on text, long prefills, and decode steps; bf16.

Instead, a user would take PyTorch's flex attention, compiled, with the band as its mask; scaled dot product
attention with a mask, as our plain form does in blocks; or full attention's fastest kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import Case
from holdall.ops.attention import KeyValueCache
from holdall.ops.window_attention import window_attention

SHAPES = (
    (1024, 64, 1, 128, 9),
    (1024, 256, 1, 128, 65),
    (1024, 256, 1, 128, 257),
    (4, 2048, 16, 64, 129),
    (4, 2048, 16, 112, 129),
    (4, 8192, 16, 64, 129),
    (1, 16384, 16, 64, 1025),
)
"""Rows, length, heads, head dim, window. 1024 rows are populations of four models with 256 rows each."""

STEPS = ((1, 16, 64, 129), (128, 16, 64, 129), (128, 16, 112, 129), (512, 16, 64, 129), (128, 16, 64, 1025))
"""Rows, heads, head dim, window."""


def _qkv(rows: int, length: int, heads: int, dim: int, gradient: bool = False) -> tuple[Tensor, ...]:
    """Parts of one projection, as a mixer makes them."""
    x = torch.randn(rows, length, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    return tuple(part.requires_grad_(gradient) for part in x.unbind(2))


def _ours(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    from holdall.kernels.window_attention import window_attention

    return window_attention(q, k, v, None, window=window, scale=q.shape[-1] ** -0.5, want_state=False)[0]


def _plain(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return window_attention(q, k, v, None, window=window, scale=q.shape[-1] ** -0.5, want_state=False)[0]


def _full(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


@functools.cache
def _flex_parts(length: int, window: int, dim: int, gradient: bool) -> tuple[Callable[..., Tensor], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def band(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return (j <= t) & (t - j < window)

    torch._dynamo.reset()  # it gives up compiling after eight shapes
    mask = create_block_mask(band, None, None, length, length, device="cuda")
    return torch.compile(flex_attention, dynamic=False), mask


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    flex_attention, mask = _flex_parts(q.shape[1], window, q.shape[-1], q.requires_grad)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(*heads_first, block_mask=mask).transpose(1, 2)


WAYS = {"ours": _ours, "flex attention": _flex, "SDPA with a mask": _plain, "SDPA, all keys": _full}


def _lazily(way: str, shape: tuple[int, ...], gradient: bool) -> Callable[[], Any]:
    """Built at the first call, so that what fails or does not fit fails inside its own timing."""

    @functools.cache
    def built() -> Callable[[], Any]:
        *sizes, window = shape
        tensors = _qkv(*sizes, gradient=gradient)  # type: ignore[arg-type]
        attend = functools.partial(WAYS[way], *tensors, window)
        if not gradient:
            return attend
        up = torch.randn_like(attend())
        return lambda: torch.autograd.grad(attend(), tensors, up)

    return lambda: built()()


def _step(way: str, rows: int, heads: int, dim: int, window: int) -> Callable[[], Any]:
    @functools.cache
    def built() -> Callable[[], Any]:
        q, k, v = _qkv(rows, 1, heads, dim)
        ring = (torch.randn(rows, window - 1, heads, dim, device="cuda", dtype=q.dtype) for _ in range(2))
        cache = KeyValueCache(*ring, torch.full((rows,), 3 * window, device="cuda"))
        step = window_attention
        if way == "ours":
            from holdall.kernels.window_attention import window_attention as step
        return lambda: step(q, k, v, cache, window=window, scale=dim**-0.5, inplace=True)

    return lambda: built()()


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        rows, length, heads, dim, window = shape
        tokens = rows * heads * length
        pairs = sum(min(t + 1, window) for t in range(length)) / length
        for gradient in (False, True):
            yield Case(
                what="window forward + backward" if gradient else "window forward",
                shape=f"{rows} x {length} x {heads}, dim {dim}, window {window}",
                # q, k, v, y; backward reads these and dy and writes three gradients
                bytes=tokens * 2 * dim * (12 if gradient else 4),
                # two products for every pair; backward has five
                flops=tokens * pairs * 2 * dim * (7 if gradient else 2),
                ways={way: _lazily(way, shape, gradient) for way in WAYS},
            )
    for step in STEPS:
        rows, heads, dim, window = step
        yield Case(
            what="window step",
            shape=f"{rows} rows, {heads} heads, dim {dim}, window {window}",
            bytes=rows * heads * dim * 2 * (2 * (window - 1) + 6),
            ways={way: _step(way, *step) for way in ("ours", "SDPA with a mask")},
        )
