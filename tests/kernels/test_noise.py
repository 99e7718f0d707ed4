"""Draws by the kernel: the words and tokens of plain PyTorch, but where two tokens tie to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from holdall.kernels import noise as kernels
from holdall.ops import noise

pytestmark = pytest.mark.usefixtures("poisoned")

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32 + 5, 2**63 - 1, 987654321987654321)


def inputs(rows: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    z_BV = 3 * torch.randn(rows, vocab, generator=generator)
    temperature_B = torch.tensor([0.0, 1.0, 0.5, 1e-4, 30.0])[torch.arange(rows) % 5]
    seed_B = torch.tensor(SEEDS)[torch.arange(rows) % len(SEEDS)]
    position_B = torch.arange(rows) * 65_537 * 40_000
    return tuple(tensor.to(device) for tensor in (z_BV, temperature_B, seed_B, position_B))  # type: ignore[return-value]


def score(z_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor) -> Tensor:
    """What is largest for the token that is drawn, (B, V) fp64, by noise in fp64."""
    word_BV = noise.words(seed_B, position_B, z_BV.shape[1]).double()
    u_BV = ((word_BV + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    noise_BV = -(-torch.log1p(-u_BV)).log()
    hot_B1 = (temperature_B > 0)[:, None]
    scaled_BV = z_BV.double() / torch.where(hot_B1, temperature_B[:, None].double(), 1.0)
    return scaled_BV + torch.where(hot_B1, noise_BV, 0.0)


@pytest.mark.parametrize("vocab", [1, 2, 257, 5000])
@pytest.mark.parametrize("rows", [1, 21])
def test_it_draws_what_plain_pytorch_draws(rows: int, vocab: int, device: torch.device) -> None:
    args = inputs(rows, vocab, device)
    got, want = kernels.draw(*args), noise.draw(*args)
    assert got.dtype == torch.long
    score_BV = score(*args)
    for row in (got != want).nonzero().flatten().tolist():  # logarithms may differ in the last bit
        one, other = score_BV[row, got[row]], score_BV[row, want[row]]
        assert abs(one - other) <= 1e-5 * max(1, abs(other)), f"row {row}"
    assert (got == want).double().mean() > 0.97


def test_the_noise_is_as_exact_as_plain_pytorch_s(device: torch.device) -> None:
    """Of two tokens the one is drawn whose noise makes up for its logit, by fp64."""
    rows = 300
    generator = torch.Generator().manual_seed(5)
    gap_B = torch.empty(rows).uniform_(-6, 6, generator=generator)
    z_BV = torch.stack((torch.zeros(rows), gap_B), dim=1).to(device)
    args = (z_BV, torch.ones(rows), torch.arange(rows), torch.arange(rows) * 7)
    args = tuple(tensor.to(device) for tensor in args)
    score_BV = score(*args)
    near_B = (score_BV[:, 0] - score_BV[:, 1]).abs() < 1e-5
    assert near_B.double().mean() < 0.01
    assert torch.equal(kernels.draw(*args)[~near_B], score_BV.argmax(1)[~near_B])


def test_rows_that_cannot_be_drawn_from_and_ties(device: torch.device) -> None:
    z_BV = torch.zeros(6, 9000)  # more than a program looks at at a time
    z_BV[0, 7], z_BV[1, 8], z_BV[2, :] = math.nan, math.inf, -math.inf
    z_BV[3, 9:] = -math.inf
    z_BV[4, 200] = -0.0
    temperature_B = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 5e-30])
    args = (z_BV, temperature_B, torch.arange(6), torch.arange(6))
    token_B = kernels.draw(*(tensor.to(device) for tensor in args)).cpu()
    assert token_B[:3].tolist() == [-1, -1, -1]
    assert 0 <= token_B[3] < 9
    assert token_B[4] == 0  # of equals the first
    assert torch.equal(token_B, noise.draw(*args))


def test_rows_of_a_larger_tensor_and_none(device: torch.device) -> None:
    z_BV, *rest = inputs(5, 40, device)
    assert torch.equal(kernels.draw(z_BV[:, :33], *rest), noise.draw(z_BV[:, :33], *rest))
    assert torch.equal(kernels.draw(z_BV.T.contiguous().T, *rest), noise.draw(z_BV, *rest))
    assert kernels.draw(z_BV[:0], *(tensor[:0] for tensor in rest)).shape == (0,)


@pytest.mark.gpu
def test_the_words_are_those_of_every_device() -> None:
    seed_B, position_B = torch.tensor(SEEDS), torch.arange(len(SEEDS)) * 12345678901
    here, there = (noise.words(seed_B.to(d), position_B.to(d), 1000).cpu() for d in ("cpu", "cuda"))
    assert torch.equal(here, there)
