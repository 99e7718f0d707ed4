"""Queries and keys of unit length, and values, out of one projection: the kernel beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from holdall.contract.forms import KernelError
from holdall.kernels.unit_heads import unit_heads
from holdall.ops import unit_heads as ops
from holdall.testing import laws

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, tokens, heads, key dim, channels of the values
SIZES = ((1, 1, 1, 8, 8), (2, 63, 2, 24, 100), (1, 65, 3, 32, 64), (3, 40, 2, 65, 20))

pytestmark = pytest.mark.usefixtures("poisoned")


def plain(qkv: Tensor, heads: int, key_dim: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = ops.unit_heads(qkv, heads, key_dim, scale)
    return q.to(qkv.dtype), k.to(qkv.dtype), v


def pulled(function: Callable, qkv: Tensor, ups: list[Tensor], heads: int, key_dim: int) -> list[Tensor]:
    leaf = qkv.detach().requires_grad_()
    found = function(leaf, heads, key_dim, 0.3)
    return [*found, *torch.autograd.grad(found, leaf, ups)]


def draw(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    rows, length, heads, key_dim, values = size
    torch.manual_seed(sum(size))
    qkv = 2 * torch.randn(rows, length, 2 * heads * key_dim + values)
    qkv[0, 0, :key_dim] = 0  # no direction to give a length
    shapes = ((heads, key_dim), (heads, key_dim), (values,))
    return qkv.to(device, dtype), [torch.randn(rows, length, *s).to(device, dtype) for s in shapes]


def check(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    qkv, ups = draw(size, dtype, device)
    truth = pulled(plain, qkv.double(), [up.double() for up in ups], *size[2:4])
    ours, again = (pulled(unit_heads, qkv, ups, *size[2:4]) for _ in range(2))
    theirs = laws.plainly(pulled, plain, qkv, ups, *size[2:4])
    for name, one, repeat, other, right in zip(
        ("q", "k", "v", "gradient"), ours, again, theirs, truth, strict=True
    ):
        assert torch.equal(one, repeat)
        laws.assert_as_good_as_plain(name, one, other, right, 1, torch.linalg.vector_norm)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_exact_as_plain_pytorch(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check(size, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(4, 1000, 2, 64, 256), (1, 16384, 16, 128, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_it_is_at_size(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check(size, dtype, device)


def test_members_are_rows_and_strides_do_not_matter(device: torch.device) -> None:
    qkv, ups = draw((4, 10, 2, 16, 24), torch.float32, device)
    want = pulled(unit_heads, qkv, ups, 2, 16)
    apart = torch.empty(4, 10, 2 * qkv.shape[-1], device=device)[..., : qkv.shape[-1]].copy_(qkv)
    members = [u.unflatten(0, (2, 2)) for u in (apart, *ups)]

    def each(own: Tensor, *how: float) -> tuple[Tensor, ...]:
        return vmap(lambda one: unit_heads(one, *how))(own)  # type: ignore[arg-type]

    for one, right in zip(pulled(each, members[0], members[1:], 2, 16), want, strict=True):
        assert torch.equal(one.flatten(0, 1), right)


@pytest.mark.compile
def test_it_compiles_whole(device: torch.device) -> None:
    qkv, ups = draw((2, 10, 2, 16, 24), torch.float32, device)
    compiled = torch.compile(unit_heads, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        pulled(compiled, qkv, ups, 2, 16), pulled(unit_heads, qkv, ups, 2, 16), strict=True
    ):
        assert torch.equal(one, other)


def test_fp64_is_refused(device: torch.device) -> None:
    with pytest.raises(KernelError, match="float64"):
        unit_heads(torch.zeros(1, 2, 24, dtype=torch.float64, device=device), 1, 8, 1.0)
