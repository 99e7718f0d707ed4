"""Monarch matrices against the dense products that they stand for, and the convolution made of them."""

import cmath
import math

import pytest
import torch

from holdall.ops.long_conv import long_conv_loop
from holdall.ops.monarch import _dft, _signal, _spectrum, monarch_conv, monarch_multiply
from holdall.testing import laws

B, D, DOUBLE = 2, 3, torch.float64


@pytest.mark.parametrize(("first", "second"), [((4, 4, 4), (4, 4, 4)), ((4, 3, 4), (2, 5, 6))], ids=str)
def test_the_product_is_two_block_diagonals_and_a_permutation(first, second) -> None:
    first_KQP, second_LSR = laws.draw(*first, dtype=DOUBLE), laws.draw(*second, dtype=DOUBLE, seed=1)
    (_, _, p), (blocks, s, r) = first, second
    dense = torch.block_diag(*first_KQP)
    deal = torch.zeros(blocks * r, blocks * r, dtype=DOUBLE)  # number r' L + l goes to place r' of block l
    for i in range(blocks * r):
        deal[(i % blocks) * r + i // blocks, i] = 1
    take = torch.zeros(blocks * s, blocks * s, dtype=DOUBLE)
    for i in range(blocks * s):
        take[i, (i % blocks) * s + i // blocks] = 1
    dense = take @ torch.block_diag(*second_LSR) @ deal @ dense
    x = laws.draw(B, first[0] * p, dtype=DOUBLE, seed=2)
    laws.assert_close("y", monarch_multiply(x, first_KQP, second_LSR), x @ dense.T)


@pytest.mark.parametrize(("p", "q"), [(4, 3), (6, 6), (2, 9)])
def test_the_fourier_matrix_is_a_monarch_matrix(p: int, q: int) -> None:
    size = p * q
    root = cmath.exp(-2j * math.pi / size)
    first = [[[root ** (q * i * k) for i in range(p)] for k in range(p)]] * q
    second = [[[root ** (j * (k + p * m)) for j in range(q)] for m in range(q)] for k in range(p)]
    first_KQP, second_LSR = (torch.tensor(blocks, dtype=torch.complex128) for blocks in (first, second))
    x = laws.draw(B, size, dtype=torch.complex128)
    y = monarch_multiply(x.unflatten(-1, (p, q)).mT.flatten(-2), first_KQP, second_LSR)
    assert laws.distance(y, torch.fft.fft(x)) < 1e-13 * size


@pytest.mark.parametrize(("rows", "q"), [(1, 1), (1, 2), (3, 5), (8, 16), (23, 2)])
def test_the_real_transform_is_torchs_and_comes_back(rows: int, q: int) -> None:
    x = laws.draw(B, D, rows * q, dtype=DOUBLE)
    dft = _dft(rows, q, DOUBLE, x.device)
    spectrum = _spectrum(x, dft)
    natural = torch.fft.fft(x, n=2 * rows * q).unflatten(-1, (q, 2 * rows)).mT[..., : rows + 1, :]
    assert laws.distance(spectrum, natural) < 1e-12
    laws.assert_close("and back", _signal(spectrum, dft), x)


@pytest.mark.parametrize(
    ("past", "length"), [(0, 1), (0, 2), (0, 3), (1, 2), (5, 1), (5, 12), (31, 33), (0, 300)]
)
@pytest.mark.parametrize("spare", [0, 9])
def test_the_convolution_is_the_loops(past: int, length: int, spare: int) -> None:
    tensors = [
        laws.draw(B, length, D, dtype=DOUBLE),
        laws.draw(past + length + spare, D, dtype=DOUBLE, seed=1),
        laws.draw(B, past, D, dtype=DOUBLE, seed=2),
    ]
    results = []
    for convolve in (monarch_conv, long_conv_loop):
        leaves = [t.clone().requires_grad_() for t in tensors]
        ends = convolve(*leaves)
        ups = [laws.draw(*end.shape, dtype=DOUBLE, seed=5) for end in ends]
        results.append((*ends, *torch.autograd.grad(ends, leaves, ups)))
    names = ("y", "past", "gradient of x", "gradient of filter", "gradient of past")
    for name, got, want in zip(names, *results, strict=True):
        laws.assert_close(name, got, want)


def test_a_long_convolution_keeps_its_digits_in_fp32() -> None:
    x_BTD, filter_LD = laws.draw(1, 20_000, 2, dtype=DOUBLE), laws.draw(20_000, 2, dtype=DOUBLE, seed=1)
    x_BTD, filter_LD = x_BTD.float(), filter_LD.float()
    got, _ = monarch_conv(x_BTD, filter_LD, x_BTD[:, :0])
    truth, _ = monarch_conv(x_BTD.double(), filter_LD.double(), x_BTD[:, :0].double())
    assert laws.distance(got, truth) < 8 * torch.finfo(torch.float32).eps * laws.size(truth)
