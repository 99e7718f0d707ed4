"""One token of Taylor linear attention: 16 heads, f = 16, packed state, in place.

The target is 80 % of the copy bandwidth on the state, read and written. Instead, a user would compile the
definition, or run the chunked form of PyTorch on one token. The last way negates the state in place and does
nothing else: so near do so few bytes come to the bandwidth of a large copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu import Case
from holdall.ops.linear_attention import FEATURE_MAPS, linear_attention, linear_attention_loop

HEADS, KEY = 16, 16
TAYLOR = FEATURE_MAPS["taylor"]
SHAPES = (
    (128, 112, torch.float32, 0.116),
    (128, 112, torch.bfloat16, 0.058),
    (128, 64, torch.float32, 0.0),
    (1, 112, torch.float32, 0.0),
    (512, 112, torch.float32, 0.0),
)
"""Rows, value dim, dtype of the state, and the target in ms."""


def _ours(q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
    from holdall.kernels.taylor_step import taylor_step

    return taylor_step(q, k, v, s, z, inplace=True)


def _plain(q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
    y, after, z = linear_attention(q, k, v, s.float(), z, feature_map=TAYLOR, normalise=True, inplace=True)
    return y, after.to(s.dtype), z  # type: ignore[union-attr]


def _loop(q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
    y, after, z_after = linear_attention_loop(q, k, v, s.float(), z, feature_map=TAYLOR)
    s.copy_(after)
    z.copy_(z_after)  # type: ignore[arg-type]
    return y


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_loop)


WAYS: dict[str, Callable[..., Any]] = {
    "ours": _ours,
    "torch.compile": lambda *tensors: _compiled()(*tensors),
    "plain PyTorch": _plain,
    "negating the state": lambda q, k, v, s, z: s.neg_(),
}


def _lazily(way: str, rows: int, value: int, dtype: torch.dtype) -> Callable[[], Any]:
    """Built at the first call, so that what fails or does not fit fails inside its own timing."""

    @functools.cache
    def built() -> Callable[[], Any]:
        tokens = (torch.randn(rows, 1, HEADS, dim, device="cuda").bfloat16() for dim in (KEY, KEY, value))
        features = TAYLOR.size(KEY)
        s = torch.randn(rows, HEADS, features, value, device="cuda").to(dtype)
        return functools.partial(WAYS[way], *tokens, s, torch.rand(rows, HEADS, features, device="cuda"))

    return lambda: built()()


def cases() -> Iterator[Case]:
    features = TAYLOR.size(KEY)
    for rows, value, dtype, target in SHAPES:
        yield Case(
            what="Taylor step",
            shape=f"{rows} rows, {HEADS} heads, f {KEY}, value {value}, {str(dtype).removeprefix('torch.')}",
            bytes=2 * rows * HEADS * features * value * dtype.itemsize,
            target_ms=target,
            ways={way: _lazily(way, rows, value, dtype) for way in WAYS},
        )
