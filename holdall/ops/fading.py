"""Decays between all pairs of tokens of a chunk, as products of decays and of nothing else.

A later token t sees an earlier one s through the middle of the smallest block that holds both. Blocks are 2,
4, 8, ... tokens long, up to the chunk; with m the first token of the block's later half,

    G(t, s) = w_{s+1} ... w_t = (w_m ... w_t) (w_{s+1} ... w_{m-1})

The first factor goes to what reads, the second to the key, and what is left is one matrix product per block.
With a decay per key dimension, pairs so take log2 C passes over C K elements; the decays are C C K of them.
Factors are products of at most C decays, each at most 1, made by doubling: no ratio of two products, which
overflows once a chunk forgets more than the dtype can hold, and no exponential of a difference of two sums,
which has lost its digits behind a token that forgot a lot.

Where a bound on decays says that a chunk keeps at least e^-16, none of this can happen: then the middle of
the chunk serves all pairs, with factors of up to e^8, and one product has them.

Letters: t and s tokens, m the middle between them, w_t the decay of token t, G(t, s) that between two. Of
shapes: C time within a chunk, K key dims or one for all of them, R reads and S keys of a token; N blocks of H
early and H late tokens, Q = H R, P = S H.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.ops.running import cumsum

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float

MILD = 16.0
"""What a chunk may forget at most, as a logarithm, for one product of all pairs."""
FEW = 4
"""Up to so many terms, PyTorch takes longer for many small products than for adding up the terms."""


class Fading:
    """What is left of tokens at others of their chunk.

    since_CK: the decay over the chunk's tokens up to each, that one among them.
    until_CK: the decay over the tokens behind each.
    """

    def __init__(self, log_w_CK: Float[Tensor, "*b c k"], *, least: float = -math.inf) -> None:
        """From the logarithms of the decays, at most 0 and at least `least`."""
        self.size = log_w_CK.shape[-2]
        self.from_middle_CK: Tensor | None = None
        """Logarithms of decays, of mild ones."""
        self.factors: list[Tensor] = []
        """Of blocks of 2, 4, ... tokens: from the early ones to the middle, from there to the late ones."""
        if -least * self.size <= MILD:
            sums_CK, middle = cumsum(log_w_CK, -2), self.size // 2
            self.from_middle_CK = sums_CK - sums_CK[..., middle : middle + 1, :]
            self.since_CK, self.until_CK = sums_CK.exp(), (sums_CK[..., -1:, :] - sums_CK).exp()
            return
        since_CK = self._filled_up(log_w_CK, -2).exp()
        until_CK = torch.ones_like(since_CK)
        half = 1
        while half < since_CK.shape[-2]:
            (early_since, late_since), (early_until, late_until) = (
                factor_CK.unflatten(-2, (-1, 2, half)).unbind(-3) for factor_CK in (since_CK, until_CK)
            )
            self.factors += [early_until, late_since]
            over_early, over_late = early_since[..., -1:, :], late_since[..., -1:, :]
            since_CK = torch.stack((early_since, late_since * over_early), dim=-3).flatten(-4, -2)
            until_CK = torch.stack((early_until * over_late, late_until), dim=-3).flatten(-4, -2)
            half *= 2
        self.since_CK, self.until_CK = since_CK[..., : self.size, :], until_CK[..., : self.size, :]

    def between(self) -> Float[Tensor, "*b c c"]:
        """G(t, s), zero where s is later, of decays that all key dimensions share."""
        if self.from_middle_CK is not None:
            log_CC = self.from_middle_CK - self.from_middle_CK.mT
            return log_CC.masked_fill(self._later(log_CC.device), -math.inf).exp()
        blocks_NCC = torch.ones_like(self._filled_up(self.since_CK, -2))[..., None]
        for early_NH1, late_NH1 in zip(self.factors[::2], self.factors[1::2], strict=True):
            blocks_NCC = _joined(blocks_NCC, late_NH1 * early_NH1.mT, -2)
        return blocks_NCC[..., 0, : self.size, : self.size]

    def pairs(
        self, reads_CRK: Float[Tensor, "*b c r k"], keys_CSK: Float[Tensor, "*b c s k"]
    ) -> Float[Tensor, "*b c r s c"]:
        """read_t . G(t, s) key_s of all pairs, zero where s is later; of each of R reads and S keys."""
        if self.from_middle_CK is not None:
            reads_CRK = reads_CRK * self.from_middle_CK.exp()[..., None, :]
            keys_CSK = keys_CSK * (-self.from_middle_CK).exp()[..., None, :]
            pairs = reads_CRK.flatten(-3, -2) @ _side_by_side(keys_CSK).mT
            pairs_CRSC = pairs.unflatten(-2, reads_CRK.shape[-3:-1]).unflatten(-1, (-1, self.size))
            return pairs_CRSC.masked_fill(self._later(pairs.device)[:, None, None], 0.0)
        reads_CRK, keys_CSK = (self._filled_up(x, -3) for x in (reads_CRK, keys_CSK))
        # the compiler makes the backward itself
        run = _Pairs.forward if torch.compiler.is_compiling() else _Pairs.apply
        pairs_CRSC = run(reads_CRK, keys_CSK, *self.factors)
        return pairs_CRSC[..., : self.size, :, :, : self.size]

    def _later(self, device: torch.device) -> Tensor:
        """Whether s is later than t, (C, C)."""
        return torch.ones(self.size, self.size, dtype=torch.bool, device=device).triu(1)

    def _filled_up(self, x: Tensor, dim: int) -> Tensor:
        """With zeros to a power of two: they write nothing, and their logarithms of decays forget nothing."""
        spare = (1 << (self.size - 1).bit_length()) - self.size
        return F.pad(x, (0, 0) * (-1 - dim) + (0, spare)) if spare else x


class _Pairs(torch.autograd.Function):
    """`Fading.pairs` of a power of two tokens, given the factors.

    The backward is that of the products, added up in place: by itself, autograd makes a tensor of zeros for
    all tokens wherever a block's half is read.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(reads_CRK: Tensor, keys_CSK: Tensor, *factors: Tensor) -> Tensor:
        reads, keys = reads_CRK.shape[-2], keys_CSK.shape[-2]
        blocks_NCRSC = (reads_CRK @ keys_CSK.mT)[..., None, :, :, None]
        for early_NHK, late_NHK in zip(factors[::2], factors[1::2], strict=True):
            half = early_NHK.shape[-2]
            late_NQK = (_half(reads_CRK, half, 1) * late_NHK[..., None, :]).flatten(-3, -2)
            across_NQP = late_NQK @ _side_by_side(_half(keys_CSK, half, 0) * early_NHK[..., None, :]).mT
            across_NHRSH = across_NQP.unflatten(-2, (half, reads)).unflatten(-1, (keys, half))
            blocks_NCRSC = _joined(blocks_NCRSC, across_NHRSH, -4)
        return blocks_NCRSC[..., 0, :, :, :, :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, up_CRSC: Tensor) -> tuple[Tensor, ...]:
        reads_CRK, keys_CSK, *factors = ctx.saved_tensors
        own_CRS = up_CRSC.diagonal(dim1=-4, dim2=-1).movedim(-1, -3)
        d_reads_CRK, d_keys_CSK = _product(own_CRS, keys_CSK), _product(own_CRS.mT, reads_CRK)
        d_factors = []
        for early_NHK, late_NHK in zip(factors[::2], factors[1::2], strict=True):
            half = early_NHK.shape[-2]
            early_NHSK, late_NHRK = _half(keys_CSK, half, 0), _half(reads_CRK, half, 1)
            to_late = up_CRSC.unflatten(-4, (-1, 2, half))[..., 1, :, :, :, :]
            from_early = to_late.unflatten(-1, (-1, 2, half))[..., 0, :]
            up_NQP = from_early.diagonal(dim1=-6, dim2=-2).movedim(-1, -5).flatten(-4, -3).flatten(-2)
            # each of these stands under its factor
            d_late_NQK = _product(up_NQP, _side_by_side(early_NHSK * early_NHK[..., None, :]))
            d_early_NPK = _product(up_NQP.mT, (late_NHRK * late_NHK[..., None, :]).flatten(-3, -2))
            d_late_NHRK = d_late_NQK.unflatten(-2, (half, -1))
            d_early_NHSK = d_early_NPK.unflatten(-2, (-1, half)).transpose(-3, -2)
            d_factors += [(d_early_NHSK * early_NHSK).sum(-2), (d_late_NHRK * late_NHRK).sum(-2)]
            _half(d_keys_CSK, half, 0).add_(d_early_NHSK * early_NHK[..., None, :])
            _half(d_reads_CRK, half, 1).add_(d_late_NHRK * late_NHK[..., None, :])
        return d_reads_CRK, d_keys_CSK, *d_factors


def _half(x_CXK: Tensor, half: int, late: int) -> Tensor:
    """The early or late tokens of all blocks, (N, H, X, K)."""
    return x_CXK.unflatten(-3, (-1, 2, half))[..., late, :, :, :]


def _side_by_side(keys_NHSK: Tensor) -> Tensor:
    """All first keys of a block, then all second ones, (N, P, K)."""
    return keys_NHSK.transpose(-3, -2).flatten(-3, -2)


def _joined(blocks_NHXH: Tensor, across_NHXH: Tensor, rows: int) -> Tensor:
    """Neighbouring blocks as one: what late tokens see of early ones below the diagonal, nothing above."""
    early, late = blocks_NHXH.unflatten(rows - 1, (-1, 2)).unbind(rows - 1)
    above = F.pad(early, (0, early.shape[-1]))
    return torch.cat((above, torch.cat((across_NHXH, late), dim=-1)), dim=rows)


def _product(a_XY: Tensor, b_YZ: Tensor) -> Tensor:
    """a @ b."""
    if a_XY.shape[-1] > FEW:
        return a_XY @ b_YZ
    (column, *columns), (row, *rows) = a_XY.split(1, dim=-1), b_YZ.split(1, dim=-2)
    product_XZ = column * row
    for column, row in zip(columns, rows, strict=True):
        product_XZ = torch.addcmul(product_XZ, column, row)
    return product_XZ
