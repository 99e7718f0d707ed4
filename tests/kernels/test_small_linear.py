"""Linear maps with few weights, with and without log sigmoid: the kernel beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from holdall.contract.forms import KernelError
from holdall.kernels.small_linear import _backward as small_linear_backward
from holdall.kernels.small_linear import small_linear
from holdall.ops import small_linear as ops
from holdall.testing import laws

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, tokens, channels, outputs, log sigmoid; the last has more weights than a program takes
SIZES = (
    (1, 1, 8, 1, False), (2, 63, 40, 2, False), (1, 65, 16, 64, True), (3, 130, 3, 20, True),
    (1, 5, 200, 100, True),
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("poisoned")


def plain(x: Tensor, weight: Tensor, bias: Tensor, log_sigmoid: bool) -> Tensor:
    return ops.small_linear(x, weight, bias, log_sigmoid=log_sigmoid, divisor=16)


def kernel(x: Tensor, weight: Tensor, bias: Tensor, log_sigmoid: bool) -> Tensor:
    return small_linear(x, weight, bias, log_sigmoid=log_sigmoid, scale=1 / 16)


def pulled(function: Callable, tensors: list[Tensor], dy: Tensor, log_sigmoid: bool) -> list[Tensor]:
    leaves = [u.detach().requires_grad_() for u in tensors]
    y = function(*leaves, log_sigmoid)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def draw(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor, bool]:
    rows, length, channels, outputs, log_sigmoid = size
    torch.manual_seed(sum(size))
    shapes = (rows, length, channels), (outputs, channels), (outputs,)
    tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return tensors, torch.randn(rows, length, outputs, device=device), bool(log_sigmoid)


def check(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors, dy, log_sigmoid = draw(size, dtype, device)
    truth = pulled(plain, [u.double() for u in tensors], dy.double(), log_sigmoid)
    ours, again = (pulled(kernel, tensors, dy, log_sigmoid) for _ in range(2))
    theirs = laws.plainly(pulled, plain, tensors, dy, log_sigmoid)
    for i, (one, repeat, other, right) in enumerate(zip(ours, again, theirs, truth, strict=True)):
        assert torch.equal(one, repeat)
        name = f"result or gradient {i}"
        laws.assert_as_good_as_plain(name, one, other, right, 4, torch.linalg.vector_norm)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_exact_as_plain_pytorch(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check(size, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(4, 16384, 128, 4, False), (3, 1000, 16, 64, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_it_is_at_size(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check(size, dtype, device)


def test_where_nothing_is_forgotten_and_where_everything_is(device: torch.device) -> None:
    """Digits of log sigmoid where 1 + e^-l has none of them, and no infinities."""
    bias = torch.tensor([30.0, 12.0, 0.0, -12.0, -200.0], device=device)
    tensors = [torch.zeros(2, 3, device=device), torch.zeros(5, 3, device=device), bias]
    dy = torch.ones(2, 5, device=device)
    for one, right in zip(
        pulled(kernel, tensors, dy, True),
        pulled(plain, [u.double() for u in tensors], dy.double(), True),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=0)


def test_gradients_are_not_rounded_before_they_are_multiplied(device: torch.device) -> None:
    """Of bf16, sums over tokens have 16 bits of each gradient and not 8."""
    (x, weight, bias), dy, _ = draw((1, 70, 16, 20, False), torch.bfloat16, device)
    _, dweight, _ = small_linear_backward(x, weight[None], bias[None], dy, 0.0)
    want = dy[0].double().T @ x[0].double()
    assert (dweight[0] - want).norm() < 2.0**-15 * want.norm()


def test_members_have_their_own_weights(device: torch.device) -> None:
    each = [draw((2, 70, 12, 3, True), torch.float32, device) for _ in range(2)]
    each[1][0][1].neg_()
    stacked = [torch.stack(both) for both in zip(*(tensors for tensors, *_ in each), strict=True)]
    dy = torch.stack([each[0][1], each[1][1]])

    def members(*own: Tensor) -> Tensor:
        return vmap(lambda *one: kernel(*one, True))(*own[:3])

    together = pulled(members, stacked, dy, True)
    for place, (tensors, up, _) in enumerate(each):
        for one, right in zip(together, pulled(kernel, tensors, up, True), strict=True):
            torch.testing.assert_close(one[place], right)


@pytest.mark.compile
def test_it_compiles_whole(device: torch.device) -> None:
    how = draw((2, 10, 16, 8, True), torch.float32, device)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for one, other in zip(pulled(compiled, *how), pulled(kernel, *how), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.compile
def test_an_op_that_has_not_found_its_kernel_yet_compiles_whole(device: torch.device) -> None:
    """The import happens while the compiler traces, which could not trace it."""
    tensors, _, _ = draw((2, 10, 16, 8, True), torch.float32, device)

    def op(*tensors: Tensor) -> Tensor:
        return ops.small_linear(*tensors, log_sigmoid=True, divisor=16, form="kernel")

    vars(ops.small_linear).pop("kernel", None)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(compiled(*tensors), kernel(*tensors, True))
    assert ops.small_linear.kernel is small_linear  # type: ignore[attr-defined]


def test_fp64_is_refused(device: torch.device) -> None:
    tensors, _, _ = draw((1, 2, 8, 4, False), torch.float64, device)
    with pytest.raises(KernelError, match="float64"):
        small_linear(*tensors)
