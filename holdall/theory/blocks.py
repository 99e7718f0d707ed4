"""Softmax attention, whole and in blocks: the same numbers from N^2 and from N numbers of memory.

    whole       y = softmax(q k^T / sqrt(d)) v                      all N^2 scores are written and read again
    in blocks   for each block of keys, with m the largest score so far, l the sum of weights, a the sum of
                weights times values:
                    m' = max(m, max s)     c = e^(m - m')     w = e^(s - m')
                    l' = c l + sum w       a' = c a + w v
                y = a / l                                           a block of scores exists at a time

Both compute the same products, 4 N^2 d of them (causal attention needs half of these; a block that lies in
the future is left out). Dao et al., "FlashAttention: fast and memory-efficient exact attention with
IO-awareness", 2022, arXiv 2205.14135; the running maximum is Milakov and Gimelshein's, 2018, arXiv
1805.02867. This file is for counting and measuring; mixers call PyTorch's own, `fused`.

Letters: q, k, v queries, keys and values; y outputs; s scores of a block; w its weights; a, l, m running
sums of weighted values and of weights, and maximum; c what older sums are scaled by; e Euler's number; B row,
H head, N tokens, d (D in names) dimensions of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Tokens of a block."""


def whole(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """Causal attention as it is written, (B, H, N, D)."""
    length, size = q_BHND.shape[-2:]
    scores_BHNN = q_BHND @ k_BHND.transpose(-1, -2) / math.sqrt(size)
    future_NN = torch.ones(length, length, dtype=torch.bool, device=q_BHND.device).triu(1)
    return scores_BHNN.masked_fill(future_NN, -math.inf).softmax(-1) @ v_BHND


def in_blocks(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, block: int = BLOCK) -> Tensor:
    """The same, (B, H, N, D), with one block of scores in memory at a time."""
    length, size = q_BHND.shape[-2:]
    y_BHND = torch.empty_like(v_BHND)
    for first in range(0, length, block):
        q_BHQD = q_BHND[:, :, first : first + block] / math.sqrt(size)
        last = first + q_BHQD.shape[-2]
        m_BHQ1 = q_BHQD.new_full((*q_BHQD.shape[:-1], 1), -math.inf)
        l_BHQ1, a_BHQD = torch.zeros_like(m_BHQ1), torch.zeros_like(q_BHQD)
        for start in range(0, last, block):
            s_BHQK = q_BHQD @ k_BHND[:, :, start : start + block].transpose(-1, -2)
            if start == first:  # only here do queries meet keys of their own future
                s_BHQK = s_BHQK.masked_fill(torch.ones_like(s_BHQK, dtype=torch.bool).triu(1), -math.inf)
            higher_BHQ1 = torch.maximum(m_BHQ1, s_BHQK.amax(-1, keepdim=True))
            w_BHQK, c_BHQ1 = (s_BHQK - higher_BHQ1).exp(), (m_BHQ1 - higher_BHQ1).exp()
            l_BHQ1 = c_BHQ1 * l_BHQ1 + w_BHQK.sum(-1, keepdim=True)
            a_BHQD = c_BHQ1 * a_BHQD + w_BHQK @ v_BHND[:, :, start : start + block]
            m_BHQ1 = higher_BHQ1
        y_BHND[:, :, first:last] = a_BHQD / l_BHQ1
    return y_BHND


def fused(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """The same by PyTorch, whose kernels go through blocks, (B, H, N, D)."""
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=True)
