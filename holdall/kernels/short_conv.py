"""The short causal convolution on a GPU, with or without SiLU after it: gated_conv.py with a gate of ones.

    y_t = f(b + sum_{i < W} w_i x_{t - W + 1 + i})

The gate is a row of ones, broadcast over tokens, which stays in cache. Only the gate's gradient is written
without need, one element in six. Forward reads x and writes y, backward reads x and dy and writes dx. Plain
PyTorch reads and writes fp32 tensors again for every tap, some 40 elements in both directions.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdall.kernels import gated_conv

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float


@functools.lru_cache(maxsize=64)
def _ones(channels: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The open gate, made once: a step of decoding would launch a kernel for it in every layer."""
    with torch.inference_mode(False):
        return torch.ones(channels, dtype=dtype, device=device)


def kernel_refusal(taps: int) -> str:
    """Why there is no kernel for this many taps; empty if there is one, or if there is no convolution."""
    return gated_conv.kernel_refusal(taps) if taps else ""


def short_conv(
    x_BTD: Float[Tensor, "b t d"],
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    past_BPD: Float[Tensor, "b w-1 d"],
    *,
    silu: bool = False,
    inplace: bool = False,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b w-1 d"]]:
    """The kernel form of `holdall.ops.short_conv.short_conv`; `inplace` as in `gated_conv`.

    Raises KernelError if no kernel can run on these tensors, or for this many taps.
    """
    # torch.compile makes them by itself, and warns of what is remembered; tensors without values need such
    ones = _ones if not torch.compiler.is_compiling() and type(x_BTD) is Tensor else torch.ones
    open_BTD = ones(x_BTD.shape[-1], dtype=x_BTD.dtype, device=x_BTD.device).expand(x_BTD.shape)
    return gated_conv.gated_conv(
        x_BTD, open_BTD, None, weight_DW, bias_D, past_BPD,
        silu="conv" if silu else "none", inplace=inplace,
    )  # fmt: skip
