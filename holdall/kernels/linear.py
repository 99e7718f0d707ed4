"""A linear map of a few rows on a GPU, with or without SwiGLU behind it: the weights are read at the speed of
memory, and nothing is launched twice.

    y_be = sum_d x_bd w_ed + bias_e        gated: y_bi = a silu(g),  a, g = the maps of rows i and I + i of W

W has E D elements, read once; x and y of up to 64 rows are small beside it and stay in the L2 cache.
7168 x 1792 in bf16 are 25.7 MB, 6.0 us at the 4.3 TB/s that an H200 copies at; a kernel that only reads them
takes 7.7, since it takes time until all of it runs and until the last of it ends.

A program has a tile of BLOCK_E outputs for all rows: W's tile is the first operand, whose rows are outputs,
so that a few rows of x waste little of the tensor cores. Where there are too few tiles to fill the GPU, D is
cut into SPLIT parts; each leaves its sums in memory, and the program that finds that it is the last adds them
up, in the order of the parts. So the order of all sums depends on the weight's shape alone: a row's bits are
the same in every number of rows (tests/kernels/test_linear.py).

Counters of finished parts are the weight's, and return to zero: a weight is multiplied by on one stream at a
time.

Letters: B rows, D inputs, E outputs, I = E / 2 if gated.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from holdall.contract import forms
from holdall.kernels import cdiv, dense_last, overlapped, padded
from holdall.kernels.language import dot, narrow, wait_for_inputs

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

MAX_ROWS = 128
"""Most rows of one program."""
PROGRAMS = 84
"""Fewest programs that are enough for 132 multiprocessors: more parts cost more than the idle ones."""


@triton.jit
def _store(
    acc, bias_ptr, y_ptr, tile, b, rows, E: tl.constexpr, GATED: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """A tile's sums, (BLOCK_E, rows), as outputs; of a gated map, rows 2i and 2i + 1 are a and g."""
    BLOCK_B: tl.constexpr = acc.shape[1]
    WIDE: tl.constexpr = E // 2 if GATED else E
    WRITTEN: tl.constexpr = BLOCK_E // 2 if GATED else BLOCK_E
    e = tile * WRITTEN + tl.arange(0, WRITTEN)
    if GATED:
        a, g = tl.split(tl.permute(tl.reshape(acc, (WRITTEN, 2, BLOCK_B)), (0, 2, 1)))
        if bias_ptr is not None:
            a += tl.load(bias_ptr + e, mask=e < WIDE, other=0.0).to(tl.float32)[:, None]
            g += tl.load(bias_ptr + WIDE + e, mask=e < WIDE, other=0.0).to(tl.float32)[:, None]
        y = a * (g * tl.sigmoid(g))
    else:
        y = acc
        if bias_ptr is not None:
            y += tl.load(bias_ptr + e, mask=e < WIDE, other=0.0).to(tl.float32)[:, None]
    here = (b < rows)[None, :] & (e < WIDE)[:, None]
    at = b.to(tl.int64)[None, :] * WIDE + e[:, None]
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, x_row, rows,
    E: tl.constexpr, D: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, STAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPPED)
    tile, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    PART: tl.constexpr = D // SPLIT
    n, d = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    b = block * BLOCK_B + tl.arange(0, BLOCK_B)
    if GATED:
        e = tile * (BLOCK_E // 2) + n // 2
        real_E = (e < E // 2)[:, None]
        e += n % 2 * (E // 2)
    else:
        e = tile * BLOCK_E + n
        real_E = (e < E)[:, None]
    w_E1 = w_ptr + (e.to(tl.int64) * D + part * PART)[:, None]
    x_B1 = x_ptr + (b.to(tl.int64) * x_row + part * PART)[:, None]
    real_B = (b < rows)[:, None]
    acc = tl.zeros((BLOCK_E, BLOCK_B), tl.float32)
    for start in tl.range(0, PART, BLOCK_D, num_stages=STAGES):
        at = (start + d)[None, :]
        if PART % BLOCK_D == 0:
            w = tl.load(w_E1 + at, mask=real_E, other=0.0)
            x = tl.load(x_B1 + at, mask=real_B, other=0.0)
        else:
            w = tl.load(w_E1 + at, mask=real_E & (at < PART), other=0.0)
            x = tl.load(x_B1 + at, mask=real_B & (at < PART), other=0.0)
        acc = dot(w, tl.trans(x), acc)
    if SPLIT == 1:
        _store(acc, bias_ptr, y_ptr, tile, b, rows, E, GATED, BLOCK_E)
    else:
        whole = block * tl.num_programs(0) + tile
        sums_ptr = part_ptr + whole.to(tl.int64) * SPLIT * BLOCK_E * BLOCK_B
        sums_ptr += n[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
        tl.store(sums_ptr + part * BLOCK_E * BLOCK_B, acc)
        tl.debug_barrier()  # all threads' stores come before the count
        if tl.atomic_add(count_ptr + whole, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(count_ptr + whole, 0)
            # past the L1 cache, which does not know what other programs have stored
            acc = tl.load(sums_ptr, cache_modifier=".cg")
            for i in tl.static_range(1, SPLIT):
                acc += tl.load(sums_ptr + i * BLOCK_E * BLOCK_B, cache_modifier=".cg")
            _store(acc, bias_ptr, y_ptr, tile, b, rows, E, GATED, BLOCK_E)


_counted = WeakTensorKeyDictionary()
"""The counters of each weight that was cut, which stay where they are for recorded graphs."""


def _counters(weight: Tensor, tiles: int) -> Tensor:
    found = _counted.get(weight)
    if found is None or len(found) < tiles:
        found = torch.zeros(tiles, dtype=torch.int32, device=weight.device)
        # what is made while a graph is recorded is the graph's own, and made anew in each of its runs
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            _counted[weight] = found
    return found


def _split(tiles: int, inputs: int) -> int:
    """In how many parts sums are cut: until there are programs enough, while parts are of some length."""
    split = 1
    while tiles * split < PROGRAMS and inputs % (64 * split) == 0 and inputs // (2 * split) >= 256:
        split *= 2
    return split


@functools.cache
def _config(outputs: int, inputs: int) -> dict[str, int]:
    split = _split(cdiv(outputs, 64), inputs)
    return {"BLOCK_E": 64, "BLOCK_D": 64, "SPLIT": split, "STAGES": 8, "num_warps": 4}


@torch.library.custom_op("holdall::few_rows_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    x_BD, weight_ED = dense_last(x), weight.contiguous()
    (rows, inputs), outputs = x_BD.shape, len(weight_ED)
    y_BE = x.new_empty(rows, outputs // (1 + gated))
    if not y_BE.numel():
        return y_BE
    config = _config(outputs, inputs)
    block = min(MAX_ROWS, padded(rows))
    tiles, blocks, split = cdiv(outputs, config["BLOCK_E"]), cdiv(rows, block), config["SPLIT"]
    sums = counters = y_BE
    if split > 1:
        sums = x.new_empty(blocks * tiles * split * config["BLOCK_E"] * block, dtype=torch.float32)
        counters = _counters(weight, blocks * tiles)
    _kernel[(tiles, split, blocks)](
        x_BD, weight_ED, bias, y_BE, sums, counters, x_BD.stride(0), rows,
        E=outputs, D=inputs, GATED=gated, BLOCK_B=block, **config, **overlapped(x.device),
    )  # fmt: skip
    return y_BE


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], len(weight) // (1 + gated))


def linear(
    x: Float[Tensor, "*b d"],
    weight_ED: Float[Tensor, "e d"],
    bias_E: Float[Tensor, "e"] | None = None,
    *,
    gated: bool = False,
) -> Float[Tensor, "*b _"]:
    """The kernel form of `holdall.ops.linear.linear`, which documents the arguments; no gradients.

    Raises KernelError if no kernel can run on these tensors, or if they are wider than 16 bits.
    """
    forms.require_kernel(x, weight_ED, bias_E)
    if x.element_size() != 2 or x.dtype != weight_ED.dtype:
        given = " and ".join(sorted({str(u.dtype).removeprefix("torch.") for u in (x, weight_ED)}))
        raise forms.KernelError(f"the kernel takes rows and weights of the same 16 bits, not {given}")
    y_BE = _linear(x.reshape(-1, x.shape[-1]), weight_ED, bias_E, gated)
    return y_BE.view(*x.shape[:-1], y_BE.shape[-1])
