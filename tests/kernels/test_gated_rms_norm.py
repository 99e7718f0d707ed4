"""The gated RMS norm's kernel against fp64, beside plain PyTorch in the same dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from holdall.contract import forms
from holdall.kernels.gated_rms_norm import gated_rms_norm, launch_backward, launch_forward
from holdall.ops import gated_rms_norm as ops
from holdall.testing import laws

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "gradient of y", "gradient of z", "gradient of the weight")

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(*size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """y, z, weight and the output's gradient."""
    sizes = (size, size, size[-1:], size)
    return [laws.draw(*each, dtype=torch.float64, seed=i).to(device, dtype) for i, each in enumerate(sizes)]


def plain(y: Tensor, z: Tensor, weight: Tensor, after: bool = False) -> Tensor:
    return ops.gated_rms_norm(y, z, weight, 1e-5, after=after)


def kernel(y: Tensor, z: Tensor, weight: Tensor, after: bool = False) -> Tensor:
    return gated_rms_norm(y, z, weight, 1e-5, after=after)


def pulled(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    *inputs, dout = (tensor.detach() for tensor in tensors)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, dout)]


def check(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, after: bool) -> None:
    tensors = draw(*size, dtype=dtype, device=device)
    ours, again = (pulled(functools.partial(kernel, after=after), *tensors) for _ in range(2))
    theirs = laws.plainly(pulled, functools.partial(plain, after=after), *tensors)
    exact = pulled(functools.partial(plain, after=after), *(tensor.double() for tensor in tensors))
    for name, one, repeat, other, truth in zip(NAMES, ours, again, theirs, exact, strict=True):
        laws.assert_bitwise(name, one, repeat)
        laws.assert_as_good_as_plain(name, one, other, truth)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 16), (2, 63, 48), (3, 40, 129)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_exact_as_torch_s(
    size: tuple[int, ...], dtype: torch.dtype, after: bool, device: torch.device
) -> None:
    check(size, dtype, device, after)


@pytest.mark.gpu
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("size", [(4, 16384, 256), (3, 7, 5000), (70000, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_it_is_at_size(
    size: tuple[int, ...], dtype: torch.dtype, after: bool, device: torch.device
) -> None:
    check(size, dtype, device, after)


@pytest.mark.gpu("tens of GB")
def test_tensors_may_be_larger_than_32_bits_count() -> None:
    y = torch.randn(2**31 // 1024 + 5, 1024, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = torch.randn(1024, dtype=torch.bfloat16, device="cuda")
    out = kernel(y, y.detach(), weight)
    (dy,) = torch.autograd.grad(out, y, torch.ones(1, dtype=y.dtype, device="cuda").expand(y.shape))
    tail, z = y[-5:].detach().requires_grad_(), y[-5:].detach()
    truth = plain(tail, z, weight)
    (dtruth,) = torch.autograd.grad(truth, tail, torch.ones_like(tail))
    torch.testing.assert_close(out[-5:], truth, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(dy[-5:], dtruth, atol=5e-2, rtol=5e-2)


def test_groups_and_a_gate_within_a_wider_tensor(device: torch.device) -> None:
    """Each group's channels by themselves, with z and its gradient where they lie."""
    y, z, weight, dout = draw(2, 13, 48, dtype=torch.float32, device=device)
    weight = torch.stack((weight, 2 * weight))
    wider, dwider = (torch.full((2, 13, 64), torch.nan, device=device) for _ in range(2))
    wider[..., 7:55] = z
    out = launch_forward(y, wider[..., 7:55], weight, 1e-5, groups=3)
    dy, dweight, _ = launch_backward(y, wider[..., 7:55], weight, dout, dwider[..., 7:55], 1e-5, groups=3)
    assert dwider[..., :7].isnan().all()
    assert dwider[..., 55:].isnan().all()
    for member in range(2):
        for group in (slice(0, 16), slice(16, 32), slice(32, 48)):
            want = pulled(plain, *(u[member, ..., group] for u in (y, z, weight, dout)))
            got = (out, dy, dwider[..., 7:55], dweight)
            for name, one, other in zip(NAMES, got, want, strict=True):
                torch.testing.assert_close(one[member, ..., group], other, msg=lambda m, n=name: f"{n}: {m}")


def test_members_have_their_own_weights(device: torch.device) -> None:
    y, z, dout = (torch.randn(3, 2, 20, 24, device=device) for _ in range(3))
    weight = torch.randn(3, 24, device=device)
    together = pulled(vmap(kernel), y, z, weight, dout)
    for place in range(3):
        alone = pulled(kernel, y[place], z[place], weight[place], dout[place])
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[place], other)


def test_they_may_lie_anyhow(device: torch.device) -> None:
    y, z, weight, dout = draw(6, 10, 32, dtype=torch.float32, device=device)
    tensors = y.transpose(0, 1), z.transpose(0, 1), weight, dout.transpose(0, 1)
    for one, other in zip(pulled(kernel, *tensors), pulled(plain, *tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
def test_it_compiles_whole(device: torch.device) -> None:
    tensors = draw(2, 10, 32, dtype=torch.float32, device=device)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for one, other in zip(pulled(compiled, *tensors), pulled(kernel, *tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_fp64_is_refused(device: torch.device) -> None:
    y, z, weight, _ = draw(2, 3, 16, dtype=torch.float64, device=device)
    with pytest.raises(forms.KernelError, match="float64"):
        kernel(y, z, weight)
