"""Rotary positions in one kernel against fp64, beside PyTorch's in the same dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdall.contract import forms
from holdall.kernels.rotary import rotate_both
from holdall.mixers.attention import QKV
from holdall.ops import rotary as ops
from holdall.testing import laws

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (3, 1, 2, 2, 112, 112),
    (1, 1, 5, 1, 70, 35),
    (2, 9, 3, 1, 6, 4),
    (1, 2, 1, 1, 3, 1),
    (1, 3, 40, 8, 16, 16),
)
"""Rows, tokens, heads of queries, of keys, head dim, and how many of it set the frequencies."""

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(
    rows: int, new: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Queries and keys as they are: parts of one projection, with values behind them."""
    qkv = laws.draw(rows, new, heads + 2 * groups, head_dim, dtype=torch.float32).to(device, dtype)
    return qkv[:, :, :heads], qkv[:, :, heads : heads + groups]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_exact_as_torch_s(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    *sizes, dims = shape
    q, k = draw(*sizes, dtype, device)
    seen_B = torch.tensor([0, 17, 100_003][: sizes[0]], device=device)
    truth = ops.rotate_both(q.double(), k.double(), seen_B, dims, 10000.0)
    theirs = laws.plainly(ops.rotate_both, q, k, seen_B, dims, 10000.0)
    before = q.clone(), k.clone()
    got = rotate_both(q, k, seen_B, dims, 10000.0)
    for name, one, plain, exact in zip("qk", got, theirs, truth, strict=True):
        laws.assert_as_good_as_plain(name, one, plain, exact, 1)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.parametrize("base", [10000.0, 500_000.0])
def test_angles_keep_their_digits_up_to_a_million(base: float, device: torch.device) -> None:
    """Each angle's cosine and sine are those of fp64 rounded once, up to the error that the kernel states."""
    dims, position = 112, torch.tensor([0, 1, 4097, 131_071, 999_983, 1_000_000], device=device)
    q = torch.zeros(len(position), 1, 1, dims, device=device)
    q[..., : dims // 2] = 1
    got, _ = rotate_both(q, q, position, dims, base)
    angle = position[:, None].double() * ops.standard_frequencies(dims, base, q)
    truth = torch.cat((angle.cos(), angle.sin()), -1)
    assert (got[:, 0, 0].double() - truth).abs().max() <= 2**-25 + 1e-8


@pytest.mark.parametrize("scaling", [(4.0,), (8.0, 1.0, 4.0, 8192.0), (8.0, 1.0, 4.0, 64.0)], ids=str)
def test_scaled_frequencies_keep_their_digits_too(scaling: tuple[float, ...], device: torch.device) -> None:
    dims, position = 64, torch.tensor([1, 4097, 131_071, 1_000_000], device=device)
    q = torch.zeros(len(position), 1, 1, dims, device=device)
    q[..., : dims // 2] = 1
    got, _ = rotate_both(q, q, position, dims, 500_000.0, scaling)
    angle = position[:, None].double() * ops.standard_frequencies(dims, 500_000.0, q, scaling)
    truth = torch.cat((angle.cos(), angle.sin()), -1)
    assert (got[:, 0, 0].double() - truth).abs().max() <= 2**-25 + 1e-8


def test_one_count_is_for_all_rows_and_counts_may_lie_apart(device: torch.device) -> None:
    q, k = draw(3, 4, 2, 1, 8, torch.float32, device)
    seen_B = torch.tensor([5, 5, 5], device=device)
    want = rotate_both(q, k, seen_B, 8, 100.0)
    apart_B = torch.tensor([5, 0, 5, 0, 5, 0], device=device)[::2]
    alone_B = torch.tensor([5, 99, 99], device=device)[:1]
    for other_B in (alone_B, apart_B):
        for got, right in zip(rotate_both(q, k, other_B, 8, 100.0), want, strict=True):
            laws.assert_bitwise("turned", got, right)
    q_T = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    laws.assert_bitwise("turned", rotate_both(q_T, k, seen_B, 8, 100.0)[0], want[0])
    none = rotate_both(q[:0], k[:0], seen_B[:0], 8, 100.0)
    assert [x.shape for x in none] == [(0, 4, 2, 8), (0, 4, 1, 8)]


def test_projections_take_it_on_a_gpu_where_nothing_is_trained(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, calls = QKV(24, 4, 0.5, 100.0, True, 2).to(device), []
    x_BTD, seen_B = torch.randn(2, 3, 24, device=device), torch.tensor([0, 9], device=device)
    with torch.no_grad():
        plain = project(x_BTD, seen_B)
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(
        ops.rotate_both, "kernel", lambda *args: calls.append(1) or rotate_both(*args), raising=False
    )
    with torch.no_grad():
        for got, want in zip(project(x_BTD, seen_B), plain, strict=True):
            torch.testing.assert_close(got, want)
        assert len(calls) == 1
        torch.func.vmap(project, in_dims=(0, None))(x_BTD[:, None], seen_B[:1])
    (grad,) = torch.autograd.grad(project(x_BTD, seen_B)[0].square().sum(), [project.qkv.weight])
    assert grad.any()
    assert len(calls) == 1


def test_fp64_is_refused(device: torch.device) -> None:
    q, k = draw(1, 1, 1, 1, 4, torch.float64, device)
    with pytest.raises(forms.KernelError, match="float64"):
        rotate_both(q, k, torch.zeros(1, dtype=torch.long, device=device), 4, 100.0)
