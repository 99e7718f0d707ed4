"""A decode step of attention over reserved slots, of which a part is filled; bf16, one new token a row.

Instead, a user would take scaled dot product attention with a mask over all slots, as our plain form does;
or, if all rows were equally long and nothing were reserved, without one.

Letters: B row, S slots, G heads of keys and values, K head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import Case
from holdall.ops.attention import reserved_attention

SHAPES = (
    (1, 24, 8, 70, 1024, 5120),
    (1, 32, 8, 64, 65_536, 69_632),
    (8, 24, 8, 70, 16_384, 20_480),
    (128, 24, 8, 70, 1024, 5120),
    (128, 24, 24, 70, 1024, 5120),
    (128, 32, 8, 64, 1024, 5120),
    (128, 32, 8, 128, 1024, 1280),
)
"""Rows, heads, heads of keys and values, head dim, filled slots, capacity."""


def _way(
    name: str, rows: int, heads: int, groups: int, dim: int, filled: int, slots: int
) -> Callable[[], Any]:
    """Built at the first call, so that what does not fit fails inside its own timing."""

    @functools.cache
    def built() -> Callable[[], Any]:
        def draw(length: int, many: int) -> Tensor:
            return torch.randn(rows, length, many, dim, device="cuda", dtype=torch.bfloat16)

        q, k, v = draw(1, heads), draw(1, groups), draw(1, groups)
        if name == "SDPA, filled slots only":
            heads_first = [x.transpose(1, 2) for x in (q, draw(filled, groups), draw(filled, groups))]
            grouped = groups != heads
            return lambda: F.scaled_dot_product_attention(*heads_first, enable_gqa=grouped)
        counts = (torch.full((rows,), filled, device="cuda") for _ in range(2))
        tensors, form = (q, k, v, draw(slots, groups), draw(slots, groups), *counts), "parallel"
        if name == "ours":
            form = "kernel"
        return lambda: reserved_attention(*tensors, scale=dim**-0.5, inplace=True, form=form)

    return lambda: built()()


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        rows, heads, groups, dim, filled, slots = shape
        yield Case(
            what="attention step",
            shape=f"{rows} rows, {heads} heads in {groups}, dim {dim}, {filled:,} of {slots:,} slots",
            # keys and values of all slots and of the token, which are read and written; queries and outputs
            bytes=rows * dim * 2 * (2 * groups * (filled + 2) + 2 * heads),
            ways={way: _way(way, *shape) for way in ("ours", "SDPA with a mask", "SDPA, filled slots only")},
        )
