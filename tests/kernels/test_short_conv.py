"""The short convolution's kernel against fp64, beside plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from holdall.contract.forms import KernelError
from holdall.kernels.short_conv import short_conv
from holdall.mixers.mamba import MambaConfig
from holdall.ops import short_conv as ops
from holdall.testing import laws


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, *, silu: bool
) -> tuple[Tensor, Tensor]:
    return ops.short_conv(x, weight, bias, past, silu=silu)


def pulled(function: object, tensors: list[Tensor | None], dtype: torch.dtype, **how: bool) -> list[Tensor]:
    """Outputs, and gradients from both together."""
    own = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    y, after = function(*own, **how)  # type: ignore[operator]
    torch.manual_seed(1)
    ups = [torch.randn(out.shape).to(out) for out in (y, after)]
    return [y, after, *torch.autograd.grad((y, after), [t for t in own if t is not None], ups)]


def draw(device: torch.device, rows: int, length: int, width: int, taps: int) -> list[Tensor | None]:
    torch.manual_seed(length)
    sizes = (rows, length, width), (width, taps), (width,), (rows, taps - 1, width)
    return [torch.randn(size, dtype=torch.float64).to(device) for size in sizes]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_as_exact_as_plain_pytorch(
    silu: bool, bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    for length, taps in ((1, 4), (65, 4), (9, 8)):
        tensors = draw(device, 2, length, 24, taps)
        tensors[2] = tensors[2] if bias else None
        tensors = [None if t is None else t.to(dtype).double() for t in tensors]
        exact = pulled(plain, tensors, torch.float64, silu=silu)
        ours = pulled(short_conv, tensors, dtype, silu=silu)
        theirs = laws.plainly(pulled, plain, tensors, dtype, silu=silu)
        for i, (one, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
            assert one.dtype == dtype
            name = f"result or gradient {i}"
            laws.assert_as_good_as_plain(name, one, other, truth, 1, torch.linalg.vector_norm)


def test_members_have_their_own_filters(device: torch.device) -> None:
    members = [draw(device, 2, length, 16, 4) for length in (20, 20, 20)]
    stacked = [torch.stack(each).float() for each in zip(*members, strict=True)]
    together = pulled(vmap(lambda *own: short_conv(*own, silu=True)), stacked, torch.float32)
    apart = [pulled(short_conv, [t[i] for t in stacked], torch.float32, silu=True) for i in range(3)]
    for one, *others in zip(together[:2], *(each[:2] for each in apart), strict=True):
        torch.testing.assert_close(one, torch.stack(others))


def test_x_may_be_a_part_of_something_wider(device: torch.device) -> None:
    x, *rest = draw(device, 2, 12, 32, 4)
    rest = [rest[0][:16].float(), rest[1][:16].float(), rest[2][..., :16].float()]
    half = x.float().chunk(2, dim=-1)[1]
    torch.testing.assert_close(short_conv(half, *rest)[0], ops.short_conv(half, *rest)[0])


def test_too_many_taps_are_refused(device: torch.device) -> None:
    tensors = [t.float() for t in draw(device, 1, 5, 16, 9)]
    with pytest.raises(KernelError, match="2 to 8 taps, not 9"):
        short_conv(*tensors)
    cuda = torch.device("cuda")
    assert MambaConfig(kernel=9).resolved_form(cuda) == "parallel"
    assert MambaConfig(kernel=4).resolved_form(cuda) == "kernel"
