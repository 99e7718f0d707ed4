"""The layer norm's kernel against fp64, beside PyTorch's own in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from holdall.contract import forms
from holdall.kernels.layer_norm import MAX_WIDTH, layer_norm, rms_norm
from holdall.model import LayerNorm
from holdall.testing import laws

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1, 16), (2, 63, 48), (1, 65, 64), (3, 40, 129))


pytestmark = pytest.mark.usefixtures("poisoned")


def draw(*size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x with a mean of its own, weight, bias and the output's gradient."""
    torch.manual_seed(sum(size))
    width = size[-1]
    tensors = (torch.randn(size) * 3 + 2, torch.randn(width), torch.randn(width), torch.randn(size))
    return [tensor.to(device, dtype) for tensor in tensors]


NAMES = ("y", "gradient of x", "gradient of the weight", "gradient of the bias")


def pulled(function: object, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*inputs)  # type: ignore[operator]
    return [y, *torch.autograd.grad(y, inputs, dy)]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, 1e-5, x.dtype)


def assert_as_exact_as_torch(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors = draw(*size, dtype=dtype, device=device)
    exact = pulled(plain, *(tensor.double() for tensor in tensors))
    ours, again = pulled(kernel, *tensors), pulled(kernel, *tensors)
    theirs = laws.plainly(pulled, plain, *tensors)
    for name, one, repeat, other, truth in zip(NAMES, ours, again, theirs, exact, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, repeat)
        laws.assert_as_good_as_plain(name, one, other, truth, 1, torch.linalg.vector_norm)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_exact_as_torch_s(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert_as_exact_as_torch(size, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_too_and_it_may_narrow_what_it_gives(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, _, dy = draw(5, 13, 24, dtype=torch.float32, device=device)
    weight, dy = weight.to(dtype), dy.to(dtype)

    def pull(x: Tensor, weight: Tensor, dy: Tensor, function: object) -> list[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight)]
        y = function(*inputs)  # type: ignore[operator]
        return [y, *torch.autograd.grad(y, inputs, dy)]

    exact = pull(x.double(), weight.double(), dy.double(), lambda x, w: F.rms_norm(x, (24,), w, 1e-5))
    theirs = laws.plainly(pull, x, weight, dy, lambda x, w: (F.rms_norm(x, (24,), eps=1e-5) * w).to(dtype))
    ours = pull(x, weight, dy, lambda x, w: rms_norm(x, w, 1e-5, dtype))
    for name, one, other, truth in zip(NAMES[:3], ours, theirs, exact, strict=True):
        laws.assert_as_good_as_plain(name, one, other, truth, 1, torch.linalg.vector_norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wide_residual_stream_beside_narrow_weights_gives_a_narrow_result(
    dtype: torch.dtype, device: torch.device
) -> None:
    """As blocks in bf16 need it: x is not rounded, nor is its gradient; members have weights of their own."""
    tensors = [t[None].repeat(3, *[1] * t.dim()) for t in draw(5, 13, 24, dtype=torch.float32, device=device)]
    x, weight, bias, dy = (tensors[0], *(tensor.to(dtype) for tensor in tensors[1:]))
    exact = pulled(vmap(plain), *(tensor.double() for tensor in (x, weight, bias, dy)))
    theirs = laws.plainly(
        pulled, lambda x, w, b: vmap(plain)(x, w.float(), b.float()).to(dtype), x, weight, bias, dy
    )
    ours = pulled(vmap(lambda x, w, b: layer_norm(x, w, b, 1e-5, dtype)), x, weight, bias, dy)
    assert [tensor.dtype for tensor in ours] == [dtype, torch.float32, dtype, dtype]
    for name, one, other, truth in zip(NAMES, ours, theirs, exact, strict=True):
        laws.assert_as_good_as_plain(name, one, other, truth, 1, torch.linalg.vector_norm)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(4, 16384, 128), (1000, 64, 256), (3, 7, 5000), (70000, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_it_is_at_size(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert_as_exact_as_torch(size, dtype, device)


@pytest.mark.gpu("tens of GB")
def test_tensors_may_be_larger_than_32_bits_count() -> None:
    x = torch.randn(2**31 // 1024 + 5, 1024, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight, bias = (torch.randn(1024, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(2))
    y = layer_norm(x, weight, bias, 1e-5, x.dtype)
    (dx,) = torch.autograd.grad(y, x, torch.ones(1, dtype=y.dtype, device="cuda").expand(y.shape))
    tail, dtail = x[-5:].detach().requires_grad_(), torch.ones(5, 1024, dtype=y.dtype, device="cuda")
    truth = plain(tail, weight, bias)
    torch.testing.assert_close(y[-5:], truth)
    torch.testing.assert_close(dx[-5:], torch.autograd.grad(truth, tail, dtail)[0], atol=2e-2, rtol=2e-2)


def test_members_have_their_own_weights(device: torch.device) -> None:
    x, dy = (torch.randn(3, 2, 20, 24, device=device) for _ in range(2))
    weight, bias = (torch.randn(3, 24, device=device) for _ in range(2))
    together = pulled(vmap(kernel), x, weight, bias, dy)
    for place in range(3):
        alone = pulled(kernel, x[place], weight[place], bias[place], dy[place])
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[place], other)


def test_x_may_lie_anyhow(device: torch.device) -> None:
    x, weight, bias, dy = draw(6, 10, 32, dtype=torch.float32, device=device)
    for one, other in zip(
        pulled(kernel, x.transpose(0, 1), weight, bias, dy.transpose(0, 1)),
        pulled(plain, x.transpose(0, 1), weight, bias, dy.transpose(0, 1)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
def test_it_compiles_whole(device: torch.device) -> None:
    tensors = draw(2, 10, 32, dtype=torch.float32, device=device)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for one, other in zip(pulled(compiled, *tensors), pulled(kernel, *tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_the_model_s_norm_takes_it_on_a_gpu_alone(device: torch.device) -> None:
    norm = LayerNorm(32, eps=1e-5)
    assert norm.refusal(torch.zeros(2, 32))  # also where the interpreter would do
    if device.type == "cuda":
        norm.cuda()
        x = torch.randn(2, 32, device="cuda")
        assert not norm.refusal(x)
        assert norm.refusal(x.double())
        assert torch.equal(norm(x), layer_norm(x, norm.weight, norm.bias, 1e-5, x.dtype))
    wide = LayerNorm(2 * MAX_WIDTH)
    assert "width" in wide.refusal(torch.zeros(2, 2 * MAX_WIDTH, device=device)) or device.type == "cpu"


def test_fp64_is_refused(device: torch.device) -> None:
    x, weight, bias, _ = draw(2, 3, 16, dtype=torch.float64, device=device)
    with pytest.raises(forms.KernelError, match="float64"):
        layer_norm(x, weight, bias, 1e-5, x.dtype)
