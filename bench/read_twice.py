"""Prefill of a layer's kernel that reads the first half of a prompt twice: 16 rows, 16 heads, f = 16, bf16.

JRT-RNN reads a prefix without queries and then the whole prompt causally from its sums. Beside it are Based,
which reads the prompt once, Based on the prompt given twice, and softmax attention on the prompt in PyTorch's
fastest kernels: the rows of table 5 of Just Read Twice (Arora et al., 2024, arXiv 2407.05483). All give the
state, or keep keys and values, that decoding starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu import Case
from holdall.kernels.taylor import FEATURES, absorb, taylor_attention

ROWS, HEADS, KEY, VALUE = 16, 16, 16, 64
LENGTHS = (2048, 4096, 8192, 16384, 32768)


def read_twice(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> tuple[Any, ...]:
    """The outputs and the state of prefix linear attention."""
    return taylor_attention(q, k, v, *absorb(prefix_k, prefix_v))


def drawn(length: int, dim: int, rows: int = ROWS, device: str = "cuda") -> Tensor:
    return torch.randn(rows, length, HEADS, dim, device=device, dtype=torch.bfloat16)


def _softmax(length: int, backend: SDPBackend) -> Callable[[], Tensor]:
    q_BHTK, k_BHTK, v_BHTV = (drawn(length, VALUE).transpose(1, 2) for _ in range(3))

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTV, is_causal=True)

    return attend


def _ways(length: int) -> dict[str, Callable[[], Any]]:
    q, k, v = (drawn(length, dim) for dim in (KEY, KEY, VALUE))
    prefix = [drawn(length // 2, dim) for dim in (KEY, VALUE)]
    given_twice = [torch.cat((x, x), dim=1) for x in (q, k, v)]
    return {
        "ours": lambda: read_twice(q, k, v, *prefix),
        "Based, read once": lambda: taylor_attention(q, k, v),
        "Based, given twice": lambda: taylor_attention(*given_twice),
        "cuDNN softmax": _softmax(length, SDPBackend.CUDNN_ATTENTION),
        "FlashAttention-2 softmax": _softmax(length, SDPBackend.FLASH_ATTENTION),
    }


def cases() -> Iterator[Case]:
    for length in LENGTHS:
        whole, prefix = (ROWS * HEADS * tokens for tokens in (length, length // 2))
        yield Case(
            what="prefix linear attention, prefill",
            shape=f"{ROWS} x {length} x {HEADS}, prefix {length // 2}, f {KEY}, value {VALUE}",
            # q, k, v, y; keys and values of the prefix; and the state, in fp32
            bytes=whole * 2 * (2 * KEY + 2 * VALUE)
            + prefix * 2 * (KEY + VALUE)
            + ROWS * HEADS * 4 * FEATURES(KEY) * (VALUE + 1),
            # phi(q) S and phi(k) v^T; of the prefix the second
            flops=(whole * 4 + prefix * 2) * FEATURES(KEY) * VALUE,
            ways=_ways(length),
        )
