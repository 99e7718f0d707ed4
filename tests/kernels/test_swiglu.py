"""SwiGLU's kernel against fp64, beside PyTorch's in the same dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdall.contract import forms
from holdall.kernels.swiglu import BLOCK, swiglu
from holdall.model import MLP
from holdall.ops import swiglu as ops
from holdall.testing import laws

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned")


def pulled(function: object, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 2), (3, 1, 46), (2, 5, 2 * BLOCK + 6), (1, 4 * BLOCK), (0, 8)], ids=str)
def test_it_is_as_exact_as_torch_s(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = 4 * laws.draw(*size, dtype=torch.float32).to(device, dtype)
    dy = laws.draw(*size[:-1], size[-1] // 2, dtype=torch.float32, seed=1).to(device, dtype)
    truth = pulled(ops.swiglu, x.double(), dy.double())
    theirs = laws.plainly(pulled, ops.swiglu, x, dy)
    for name, got, plain, exact in zip(("y", "dx"), pulled(swiglu, x, dy), theirs, truth, strict=True):
        laws.assert_as_good_as_plain(name, got, plain, exact, 1, torch.linalg.vector_norm)


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # of the interpreter's numpy: it is infinite
def test_gates_far_from_zero_are_open_or_closed(device: torch.device) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30], device=device)
    x = torch.stack((torch.full_like(gate, 2.0), gate)).flatten()[None]
    got = pulled(swiglu, x, torch.ones_like(gate)[None])
    for one, other in zip(got, pulled(ops.swiglu, x, torch.ones_like(gate)[None]), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_may_lie_anyhow(device: torch.device) -> None:
    x, dy = torch.randn(4, 3, 20, device=device), torch.randn(4, 3, 10, device=device)
    want = pulled(swiglu, x, dy)
    wide = torch.cat((x, x + 1), -1)[..., :20]
    scattered = x.repeat_interleave(2, -1)[..., ::2]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (wide, scattered, turned):
        for got, right in zip(pulled(swiglu, other, dy), want, strict=True):
            laws.assert_bitwise("of a view", got, right)
    got = pulled(swiglu, x, torch.cat((dy, dy + 1), -1)[..., :10])
    laws.assert_bitwise("gradient of a part", got[1], want[1])
    summed = pulled(swiglu, x, torch.ones((), device=device).expand(4, 3, 10))
    ones = pulled(swiglu, x, torch.ones(4, 3, 10, device=device))
    laws.assert_bitwise("gradient of a sum", summed[1], ones[1])


def test_a_population(device: torch.device) -> None:
    x, dy = torch.randn(3, 4, 20, device=device), torch.randn(3, 4, 10, device=device)
    for got, right in zip(pulled(torch.func.vmap(swiglu), x, dy), pulled(swiglu, x, dy), strict=True):
        laws.assert_bitwise("of members", got, right)


def test_the_mlp_takes_it_on_a_gpu_where_no_compiler_does(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp, calls = MLP(16, 24, "swiglu").to(device), []
    x = torch.randn(2, 3, 16, device=device)
    with torch.no_grad():
        plain = mlp.fc2(ops.swiglu(mlp.fc1(x)))
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(ops.swiglu, "kernel", lambda x: calls.append(x) or swiglu(x), raising=False)
    y = mlp(x)
    assert len(calls) == 1
    torch.testing.assert_close(y, plain)
    assert all(grad.any() for grad in torch.autograd.grad(y.sum(), list(mlp.parameters())))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mlp(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: False)
    mlp(x)
    assert len(calls) == 1


def test_fp64_is_refused(device: torch.device) -> None:
    with pytest.raises(forms.KernelError, match="float64"):
        swiglu(torch.randn(2, 4, dtype=torch.float64, device=device))
