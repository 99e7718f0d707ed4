"""Taylor linear attention over whole sequences: 4 rows, 16 heads, f = 16, bf16.

Instead, a user would take softmax attention in PyTorch's fastest kernels, flash-linear-attention's two
kernels for Based, or the plain chunked form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu import Case
from holdall.ops.linear_attention import FEATURE_MAPS, linear_attention

ROWS, HEADS, KEY = 4, 16, 16
FEATURES = 1 + KEY + KEY * (KEY + 1) // 2
SHAPES = (
    (2048, 64, False, 0.08),
    (8192, 64, False, 0.25),
    (32768, 64, False, 0.95),
    (8192, 128, False, 0.0),
    (2048, 64, True, 0.0),
    (8192, 64, True, 1.3),
    (32768, 64, True, 0.0),
)
"""Length, value dim, whether backward too, and the target in ms."""


def _heads(length: int, dim: int, gradient: bool) -> Tensor:
    x = torch.randn(ROWS, length, HEADS, dim, device="cuda", dtype=torch.bfloat16)
    return x.requires_grad_(gradient)


def _softmax(backend: SDPBackend, length: int, value: int, gradient: bool) -> Callable[[], Tensor]:
    q, k, v = (_heads(length, value, gradient) for _ in range(3))

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            q_BHTK, k_BHTK, v_BHTV = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTV, is_causal=True).transpose(1, 2)

    return _maybe_backward(attend, (q, k, v), gradient)


def _taylor(way: str, length: int, value: int, gradient: bool) -> Callable[[], Tensor]:
    q, k, v = (_heads(length, dim, gradient) for dim in (KEY, KEY, value))
    return _maybe_backward(lambda: _TAYLOR[way](q, k, v), (q, k, v), gradient)


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from holdall.kernels.taylor import taylor_attention

    return taylor_attention(q, k, v, want_state=False)[0]


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(
        q, k, v, None, None, feature_map=FEATURE_MAPS["taylor"], normalise=True, want_state=False
    )[0]


def _fla(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        import fla.ops.based as based

        return getattr(based, name)(q, k, v)

    return attend


_TAYLOR = {
    "ours": _ours,
    "fla parallel": _fla("parallel_based"),
    "fla fused chunk": _fla("fused_chunk_based"),
    "plain PyTorch": _plain,
}


def _maybe_backward(function: Callable[[], Tensor], leaves: Any, gradient: bool) -> Callable[[], Any]:
    if not gradient:
        return function
    up = torch.randn_like(function())
    return lambda: torch.autograd.grad(function(), leaves, up)


def cases() -> Iterator[Case]:
    for length, value, gradient, target in SHAPES:
        tokens = ROWS * HEADS * length
        ways = {
            "ours": _taylor("ours", length, value, gradient),
            "cuDNN softmax": _softmax(SDPBackend.CUDNN_ATTENTION, length, value, gradient),
            "FlashAttention-2 softmax": _softmax(SDPBackend.FLASH_ATTENTION, length, value, gradient),
        }
        for way in ("fla parallel", "fla fused chunk", "plain PyTorch"):
            if not (way == "fla parallel" and length > 8192):
                ways[way] = _lazily(way, length, value, gradient)
        yield Case(
            what="Taylor forward + backward" if gradient else "Taylor forward",
            shape=f"{ROWS} x {length} x {HEADS}, f {KEY}, value {value}",
            # q, k, v, y; backward reads these and dy once more and writes dq, dk, dv
            bytes=tokens * 2 * (2 * KEY + 2 * value) * (3 if gradient else 1),
            # phi(q) S and phi(k) v^T; backward has five such products more
            flops=tokens * 4 * FEATURES * value * (1 + 2 * gradient),
            target_ms=target,
            ways=ways,
        )


def _lazily(way: str, length: int, value: int, gradient: bool) -> Callable[[], Any]:
    """Built at the first call, so that a way that fails or is not installed fails inside its own timing."""
    built: list[Callable[[], Any]] = []

    def call() -> Any:
        if not built:
            built.append(_taylor(way, length, value, gradient))
        return built[0]()

    return call
