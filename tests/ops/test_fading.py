"""Decays between all pairs of a chunk are the products of the decays between them, of every length.

Letters: B row, C time within a chunk, R reads and S keys of a token, K key dim.
"""

import math

import pytest
import torch
from torch import Tensor

from holdall.ops.fading import Fading
from holdall.testing import laws

B, R, S, K = 2, 2, 3, 4
DOUBLE, SINGLE = torch.float64, torch.float32


BOUNDS = (-math.inf, -1.0)
"""By products of decays, and by the chunk's middle."""


def log_decays(size: int, keys: int, of: str = "mild") -> Tensor:
    share = laws.draw(B, size, keys, dtype=DOUBLE).sigmoid()
    if of == "resets":
        return torch.where(share < 0.3, -50.0, -1e-3 * share)
    return -(share if of == "mild" else 50 * torch.ones_like(share))


def by_loop(log_w_BCK: Tensor) -> Tensor:
    """G(t, s), (B, C, C, K)."""
    w_BCK, size = log_w_BCK.exp(), log_w_BCK.shape[1]
    rows = []
    for t in range(size):
        row = [torch.ones_like(w_BCK[:, t])]
        for s in range(t, 0, -1):
            row.insert(0, row[0] * w_BCK[:, s])
        rows.append(torch.stack(row + [torch.zeros_like(row[0])] * (size - t - 1), dim=1))
    return torch.stack(rows, dim=1)


def of_all_pairs(reads_BCRK: Tensor, keys_BCSK: Tensor, log_w_BCK: Tensor) -> Tensor:
    return torch.einsum("btrk,busk,btuk->btrsu", reads_BCRK, keys_BCSK, by_loop(log_w_BCK))


def tokens(size: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    reads_BCRK, keys_BCSK = (laws.draw(B, size, n, K, dtype=DOUBLE, seed=n) for n in (R, S))
    return reads_BCRK.to(dtype), keys_BCSK.to(dtype)


@pytest.mark.parametrize("least", BOUNDS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
def test_pairs_are_those_of_the_decays_between_them(size: int, least: float) -> None:
    reads, keys = tokens(size)
    log_w = log_decays(size, K)
    laws.assert_close(
        "pairs", Fading(log_w, least=least).pairs(reads, keys), of_all_pairs(reads, keys, log_w)
    )


@pytest.mark.parametrize("least", BOUNDS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
def test_what_all_dimensions_share_is_between_and_from_end_to_end(size: int, least: float) -> None:
    log_w = log_decays(size, 1)
    fading, g_BCCK = Fading(log_w, least=least), by_loop(log_w)
    laws.assert_close("between", fading.between(), g_BCCK[..., 0])
    laws.assert_close("until", fading.until_CK, g_BCCK[:, -1])
    laws.assert_close("since", fading.since_CK, log_w[:, :1].exp() * g_BCCK[:, :, 0])


@pytest.mark.parametrize(("of", "least"), [("strong", -math.inf), ("resets", -math.inf), ("mild", -1.0)])
def test_however_much_is_forgotten_no_pair_loses_digits(of: str, least: float) -> None:
    """Each by itself, and not beside the largest: behind a token that forgot a lot all is as exact."""
    log_w = log_decays(16, K, of).float()
    ones = torch.ones(B, 16, 1, K)
    wanted = of_all_pairs(ones.double(), ones.double(), log_w.double())
    pairs = Fading(log_w, least=least).pairs(ones, ones).double()
    assert ((pairs - wanted).abs() <= 32 * 2.0**-24 * wanted + torch.finfo(SINGLE).tiny).all()


@pytest.mark.parametrize("least", BOUNDS)
@pytest.mark.parametrize("size", [3, 8])
def test_gradients_are_those_of_the_definition(size: int, least: float) -> None:
    leaves = [*tokens(size), log_decays(size, K)]
    up = laws.draw(B, size, R, S, size, dtype=DOUBLE, seed=7)

    def gradients(function: object) -> tuple[Tensor, ...]:
        fresh = [leaf.clone().requires_grad_() for leaf in leaves]
        return torch.autograd.grad(function(*fresh), fresh, up)

    def ours(reads: Tensor, keys: Tensor, log_w: Tensor) -> Tensor:
        return Fading(log_w, least=least).pairs(reads, keys)

    for i, (got, wanted) in enumerate(zip(gradients(ours), gradients(of_all_pairs), strict=True)):
        laws.assert_close(f"gradient {i}", got, wanted)


def test_members_of_a_population_have_pairs_of_their_own() -> None:
    reads, keys = tokens(8)
    log_w = log_decays(8, K)

    def loss(reads: Tensor, keys: Tensor, log_w: Tensor) -> Tensor:
        return Fading(log_w).pairs(reads, keys).square().sum()

    members = [torch.stack((x, 2 * x)) for x in (reads, keys, log_w)]
    together = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*members)
    for member in range(2):
        alone = torch.func.grad(loss, (0, 1, 2))(*(x[member] for x in members))
        for i, (got, wanted) in enumerate(zip(together, alone, strict=True)):
            laws.assert_close(f"member {member}, gradient {i}", got[member], wanted)
