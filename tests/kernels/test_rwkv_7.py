"""What RWKV-7 does around its delta rule: the kernels beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import holdall
from holdall.contract.forms import KernelError
from holdall.kernels import rwkv_7
from holdall.ops import rwkv_7 as ops
from holdall.testing import laws

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, tokens, heads, dims of a head
SIZES = ((16, 1, 1, 8), (2, 63, 2, 24), (1, 65, 1, 64))
EPS = 1e-3
KEY_EPS = 0.3

pytestmark = pytest.mark.usefixtures("poisoned")


def prepare(rkv: Tensor, *others: Any) -> list[Tensor]:
    """Rounded as the kernel rounds: all but the decay."""
    return [u if i == 1 else u.to(rkv.dtype) for i, u in enumerate(ops.prepare(rkv, *others))]


def finish(*tensors: Tensor) -> list[Tensor]:
    """With what comes of the delta rule as wide as its plain forms give it."""
    *ruled, g, weight, bias, r_k = tensors
    dtype = torch.promote_types(g.dtype, torch.float32)
    return [ops.finish(*(u.to(dtype) for u in ruled), g, weight, bias, r_k, EPS)]


def cases(size: tuple[int, ...]) -> dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]]:
    """Kernel, plain form, and the inputs' shapes, those of tokens first."""
    rows, length, heads, dims = size
    tokens, width, split = (rows, length), heads * dims, (heads, dims)
    return {
        "beside": (
            lambda *u: [rwkv_7.beside(*u)],
            lambda *u: [ops.beside(*u)],
            [(*tokens, width), (rows, width)],
        ),
        "prepare": (
            lambda *u: list(rwkv_7.prepare(*u, heads)),
            lambda *u: prepare(*u, heads),
            [(*tokens, 3 * width), *[(*tokens, width)] * 2, *[(width,)] * 4],
        ),
        "prepare with an epsilon": (
            lambda *u: list(rwkv_7.prepare(*u, heads, KEY_EPS)),
            lambda *u: prepare(*u, heads, KEY_EPS),
            [(*tokens, 3 * width), *[(*tokens, width)] * 2, *[(width,)] * 4],
        ),
        "finish": (
            lambda *u: [rwkv_7.finish(*u, EPS)],
            finish,
            [*[(*tokens, *split)] * 4, (*tokens, width), *[(width,)] * 2, split],
        ),
    }


def pulled(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [u.detach().requires_grad_() for u in tensors]
    found = function(*leaves)
    torch.manual_seed(1)
    ups = [torch.randn(u.shape).to(u) for u in found]
    return [*found, *torch.autograd.grad(found, leaves, ups)]


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    torch.manual_seed(len(shapes))
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def check(name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    kernel, plain, shapes = cases(size)[name]
    tensors = draw(shapes, dtype, device)
    # what the tokens' gradients are rounded to before they are pulled back is the same for all three
    truth = pulled(plain, [u.double() for u in tensors])
    ours, again = pulled(kernel, tensors), pulled(kernel, tensors)
    theirs = laws.plainly(pulled, plain, tensors)
    for i, (one, repeat, other, right) in enumerate(zip(ours, again, theirs, truth, strict=True)):
        assert torch.equal(one, repeat), i
        name = f"result or gradient {i}"
        laws.assert_as_good_as_plain(name, one, other, right, 2, torch.linalg.vector_norm)


@pytest.mark.parametrize("name", ["beside", "prepare", "prepare with an epsilon", "finish"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.full)], ids=str)
def test_it_is_as_exact_as_plain_pytorch(
    name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check(name, size, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["beside", "prepare", "finish"])
@pytest.mark.parametrize("size", [(4, 1000, 2, 64), (1, 16384, 16, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_it_is_at_size(name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check(name, size, dtype, device)


@pytest.mark.parametrize("name", ["beside", "prepare", "finish"])
def test_members_have_their_own_weights(name: str, device: torch.device) -> None:
    kernel, _, shapes = cases((2, 9, 2, 16))[name]
    both = draw([(2, *shape) for shape in shapes], torch.float32, device)
    together = pulled(vmap(lambda *own: tuple(kernel(*own))), both)
    torch.manual_seed(1)
    outputs = len(together) - len(both)
    ups = [torch.randn(u.shape).to(u) for u in together[:outputs]]
    for place in range(2):
        leaves = [u[place].detach().requires_grad_() for u in both]
        found = kernel(*leaves)
        grads = torch.autograd.grad(found, leaves, [up[place] for up in ups])
        for one, right in zip(together, (*found, *grads), strict=True):
            torch.testing.assert_close(one[place], right)


def test_a_part_of_a_wider_projection_is_read_where_it_lies(device: torch.device) -> None:
    kernel, _, shapes = cases((2, 9, 2, 16))["prepare"]
    rkv, *others = draw(shapes, torch.float32, device)
    wider = torch.randn(2, 9, rkv.shape[-1] + 12, device=device)
    wider[..., : rkv.shape[-1]] = rkv
    for one, right in zip(kernel(wider[..., : rkv.shape[-1]], *others), kernel(rkv, *others), strict=True):
        assert torch.equal(one, right)


def test_a_key_of_nothing_removes_nothing(device: torch.device) -> None:
    kernel, plain, shapes = cases((1, 3, 1, 8))["prepare"]
    tensors = draw(shapes, torch.float32, device)
    tensors[0][:, :, 8:16] = 0
    for one, other in zip(kernel(*tensors), plain(*tensors), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["beside", "prepare", "finish"])
def test_it_compiles_whole(name: str, device: torch.device) -> None:
    kernel, _, shapes = cases((2, 9, 2, 16))[name]
    tensors = draw(shapes, torch.float32, device)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for one, other in zip(pulled(compiled, tensors), pulled(kernel, tensors), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["beside", "prepare", "finish"])
def test_fp64_is_refused(name: str, device: torch.device) -> None:
    kernel, _, shapes = cases((1, 2, 1, 8))[name]
    with pytest.raises(KernelError, match="float64"):
        kernel(*draw(shapes, torch.float64, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 5])
def test_folded_into_the_maps_the_lerps_are_as_exact(
    rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Outputs and gradients, also of the mix, at most twice as far off as by lerps that are rounded."""
    config = holdall.describe("rwkv-7").configure(width=32, form="kernel", value_rank=rank)
    mixer = laws.build(config).to(device)
    x, last = torch.randn(2, 60, 32, device=device), torch.randn(2, 32, device=device)
    x, last = x.to(dtype), last.to(dtype)
    ups = [
        torch.randn(2, 60, size, device=device).to(dtype) for size in (96, *mixer.config.ranks, rank) if size
    ]
    names = [
        "mix_ZD",
        "receptance.weight",
        "key.weight",
        "value.weight",
        "w1",
        "a1",
        "g1",
        *["v1"] * bool(rank),
    ]

    def pull(way: str, dtype: torch.dtype) -> list[Tensor]:
        own = mixer.to(dtype)
        leaves = [u.detach().to(dtype).requires_grad_() for u in (x, last)]
        found = getattr(own, way)(*leaves)
        weights = [own.get_parameter(name) for name in names]
        return [*found, *torch.autograd.grad(found, [*leaves, *weights], [up.to(dtype) for up in ups])]

    mixer.to(dtype)  # weights that all have
    ours, theirs = pull("_mapped_at_once", dtype), laws.plainly(pull, "_mapped", dtype)
    truth = pull("_mapped", torch.double)
    for i, (one, other, right) in enumerate(zip(ours, theirs, truth, strict=True)):
        name = f"result or gradient {i}"
        laws.assert_as_good_as_plain(name, one, other, right, 1, torch.linalg.vector_norm)
