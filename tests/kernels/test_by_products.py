"""Hyena and H3 on short rows, whose long convolutions are products, with all that their kernels stand on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import by_hand
import pytest
import torch
import torch.nn.functional as F
from kernel_checks import traced
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from holdall.contract import Mixer, MixerConfig
from holdall.contract.forms import KernelError
from holdall.kernels import channels_first, h3, hyena, toeplitz
from holdall.mixers.h3 import H3Config
from holdall.mixers.hyena import HyenaConfig
from holdall.testing import laws

CONFIGS: dict[str, Callable[..., MixerConfig]] = {
    "hyena": lambda **how: HyenaConfig(width=4, **how),
    "hyena of order 3": lambda **how: HyenaConfig(width=2, order=3, **how),
    "h3": lambda **how: H3Config(width=8, state=70, **how),
    "h3 with pairs": lambda **how: H3Config(width=8, state=8, head_dim=2, **how),
    "h3 with triples": lambda **how: H3Config(width=6, state=8, head_dim=3, **how),
}
FULL = (pytest.param(length, marks=pytest.mark.full) for length in (63, 64))
LENGTHS = (1, *FULL, 65, *(pytest.param(length, marks=pytest.mark.gpu) for length in (300, 512)))


def built(name: str, form: str, dtype: torch.dtype, device: torch.device) -> Mixer:
    """With weights that every dtype holds exactly."""
    mixer = laws.build(CONFIGS[name](form=form))
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.copy_(weight.bfloat16())
    return mixer.to(device, dtype)


def pulled(mixer: Mixer, length: int, *, rows: int = 3) -> dict[str, Tensor]:
    """The output, and the gradients of its input and of every weight."""
    weight = next(mixer.parameters())
    x, up = (
        laws.draw(rows, length, mixer.config.width, dtype=torch.bfloat16, seed=seed).to(weight)
        for seed in (0, 1)
    )
    own = {"x": x.requires_grad_(), **dict(mixer.named_parameters())}
    y = mixer(x, want_state=False)[0]
    return {"y": y, **dict(zip(own, torch.autograd.grad(y, list(own.values()), up), strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_as_exact_as_plain_pytorch(
    name: str, length: int, dtype: torch.dtype, device: torch.device, poisoned: None
) -> None:
    if device.type == "cpu" and (dtype == torch.float16 or length == 63) and name != "h3 with pairs":
        pytest.skip("as well on a GPU, where it does not take a second")
    exact = pulled(built(name, "parallel", torch.float64, device), length)
    ours, plain = (pulled(built(name, form, dtype, device), length) for form in ("kernel", "parallel"))
    assert all(got.dtype == dtype for got in ours.values())

    def error(got: dict[str, Tensor], parts: Sequence[str]) -> Tensor:
        shares = [(got[part].double() - exact[part]).norm() / exact[part].norm() for part in parts]
        return torch.stack(shares).square().mean().sqrt()

    # weights together: the gradient of a handful of numbers errs by luck
    for parts in (["y"], ["x"], [part for part in exact if part not in ("x", "y")]):
        assert error(ours, parts) <= 2 * error(plain, parts) + torch.finfo(dtype).eps, parts


@pytest.mark.parametrize("order", [2, 3, 4])
@torch.no_grad()
def test_every_gate_of_hyena_meets_its_own_filters(order: int, device: torch.device) -> None:
    """Fresh rows, which are products, and rows read in pieces, which are transforms."""
    mixer = laws.build(HyenaConfig(width=3, order=order, max_length=16, form="kernel"))
    x = laws.tokens(mixer, 9)
    want = by_hand.hyena(mixer.state_dict(), x, order=order, max_length=16, bands=1)
    mixer, x = mixer.to(device), x.to(device)
    for y in (mixer(x, want_state=False)[0], laws.read_in_pieces(mixer, x, (4, 5))[0]):
        torch.testing.assert_close(y.cpu().double(), want, rtol=1e-4, atol=1e-4 * laws.size(want))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_no_short_fresh_row_goes_by_transforms(name: str, device: torch.device) -> None:
    fast, plain = (built(name, form, torch.float32, device) for form in ("kernel", "parallel"))
    x = laws.draw(1, 530, fast.config.width, dtype=torch.float32).to(device)
    with torch.no_grad():
        long = [mixer(x, want_state=False)[0] for mixer in (fast, plain)]
        torch.testing.assert_close(*long, rtol=1e-4, atol=1e-4)
        _, state = fast(x[:, :8])
        whole = fast(x[:, :12], want_state=False)[0]
        torch.testing.assert_close(fast(x[:, 8:12], state)[0], whole[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["hyena", "h3 with pairs"])
def test_a_population_trains_under_vmap(name: str, autocast: bool, device: torch.device) -> None:
    mixer = built(name, "kernel", torch.float32, device)
    members = [copy.deepcopy(mixer) for _ in range(2)]
    with torch.no_grad():
        for i, member in enumerate(members):
            for parameter in member.parameters():
                parameter += 0.05 * laws.draw(*parameter.shape, dtype=torch.float32, seed=i).to(device)
    x = laws.draw(2, 2, 17, mixer.config.width, dtype=torch.float32).to(device)
    weights, buffers = stack_module_state(members)

    def one(weights: dict, buffers: dict, x: Tensor) -> Tensor:
        return functional_call(mixer, (weights, buffers), (x,), {"want_state": False})[0]

    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = vmap(one)(weights, buffers, x)
        alone = [member(x[i], want_state=False)[0] for i, member in enumerate(members)]
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    y.float().square().sum().backward()
    tolerance = 3e-2 if autocast else 1e-5
    for i, member in enumerate(members):
        torch.testing.assert_close(y[i], alone[i], rtol=tolerance, atol=tolerance)
        alone[i].float().square().sum().backward()
        for part, parameter in member.named_parameters():
            scale = parameter.grad.abs().max().item()
            assert laws.distance(weights[part].grad[i], parameter.grad) <= tolerance * scale, part


@pytest.mark.parametrize("name", ["hyena", "h3 with pairs"])
def test_the_same_bits_twice(name: str, device: torch.device) -> None:
    mixer = built(name, "kernel", torch.bfloat16, device)
    first, second = (pulled(mixer, 40, rows=20) for _ in range(2))
    for part, got in first.items():
        laws.assert_bitwise(part, second[part], got)


@pytest.mark.parametrize("length", [1, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_toeplitz_matrix_and_its_diagonals(length: int, dtype: torch.dtype, device: torch.device) -> None:
    filters = laws.draw(3, length, dtype=torch.float32).to(device).requires_grad_()
    matrix = toeplitz.toeplitz(filters, dtype)
    up = laws.draw(3, length, length, dtype=torch.float32, seed=1).to(device).to(dtype)
    (grad,) = torch.autograd.grad(matrix, filters, up)
    assert matrix.dtype == dtype
    assert grad.dtype == torch.float32
    for lag in range(length):
        below = matrix.diagonal(-lag, 1, 2)
        assert torch.equal(below, filters[:, lag, None].to(dtype).expand_as(below))
        torch.testing.assert_close(grad[:, lag], up.diagonal(-lag, 1, 2).float().sum(1))
    assert not matrix.triu(1).any()


def test_channels_first_is_a_linear_layer(device: torch.device) -> None:
    x, weight, back, bias, up = (
        laws.draw(*shape, dtype=torch.float32, seed=seed).to(device).requires_grad_()
        for seed, shape in enumerate([(2, 7, 4), (6, 4), (4, 6), (4,), (2, 7, 4)])
    )
    u = channels_first.into_channels(x, weight)
    assert u.is_contiguous()
    torch.testing.assert_close(u, F.linear(x, weight).permute(2, 0, 1))
    y = channels_first.out_of_channels(u.sin(), back, bias)
    assert y.is_contiguous()
    want = F.linear(F.linear(x, weight).sin(), back, bias)
    grads, wants = (torch.autograd.grad(end, (x, weight, back, bias), up) for end in (y, want))
    for one, other in zip((y, *grads), (want, *wants), strict=True):
        torch.testing.assert_close(one, other)
    assert grads[0].is_contiguous()


@pytest.mark.compile
@traced
@pytest.mark.parametrize("name", ["hyena", "h3 with pairs"])
def test_one_graph_under_compile(name: str, device: torch.device) -> None:
    mixer = built(name, "kernel", torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    x = laws.draw(2, 5, mixer.config.width, dtype=torch.float32).to(device).requires_grad_()
    (got,), (want,) = (
        torch.autograd.grad(f(x, want_state=False)[0].square().sum(), x) for f in (compiled, mixer)
    )
    torch.testing.assert_close(got, want)


def test_what_cannot_run_says_why(device: torch.device) -> None:
    cuda = torch.device("cuda")
    assert H3Config(width=18, head_dim=9).resolved_form(cuda) == "parallel"
    assert H3Config(width=18, head_dim=2).resolved_form(cuda) == "kernel"
    tensors = [torch.zeros(*shape, device=device) for shape in ((27, 1, 2), (27,), (9, 2, 2), (1, 2, 2))]
    with pytest.raises(KernelError, match="head_dim up to 8, not 9"):
        h3.remember(*tensors)
    with pytest.raises(KernelError, match="float64"):
        toeplitz.toeplitz(torch.zeros(1, 2, dtype=torch.float64, device=device), torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hyena", "h3 with pairs"])
def test_a_cuda_graph_replays_training(
    name: str, device: torch.device, assert_replays: Callable[[Callable[[], Sequence[Tensor]]], None]
) -> None:
    mixer = built(name, "kernel", torch.bfloat16, device)
    x = torch.randn(64, 256, mixer.config.width, device=device, dtype=torch.bfloat16).requires_grad_()
    leaves = [x, *mixer.parameters()]
    up = torch.randn_like(x)
    assert_replays(lambda: torch.autograd.grad(mixer(x, want_state=False)[0], leaves, up))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hyena", "h3 with pairs"])
def test_a_new_length_compiles_nothing(name: str, device: torch.device) -> None:
    def compiled() -> int:
        kernels: list[Any] = [
            *(hyena._forward_kernel, hyena._backward_kernel, h3._outer_kernel, h3._outer_backward_kernel),
            *(h3._read_kernel, h3._read_backward_kernel, toeplitz._forward_kernel, toeplitz._backward_kernel),
        ]
        return sum(len(entry[0]) for each in kernels for entry in each.device_caches.values())

    mixer = built(name, "kernel", torch.bfloat16, device)
    for length in (64, 65):  # a multiple of 16, and another
        pulled(mixer, length)
    before = compiled()
    for length in (1, 2, 16, 63, 128, 300, 512):
        pulled(mixer, length)
    assert compiled() == before


@pytest.mark.gpu("tens of GB")
@pytest.mark.parametrize("name", ["hyena", "h3 with pairs"])
def test_more_elements_than_32_bits_count(name: str, device: torch.device) -> None:
    """The last rows of many are as if alone, where offsets of the last channels are beyond 2^31."""
    mixer = built(name, "kernel", torch.bfloat16, device)
    rows = laws.draw(8, 512, mixer.config.width, dtype=torch.bfloat16).to(device)
    x = rows.repeat((1 << 30) // rows.numel(), 1, 1)
    assert 3 * x.numel() > 1 << 31
    with torch.no_grad():
        want = mixer(rows, want_state=False)[0]
        torch.testing.assert_close(mixer(x, want_state=False)[0][-8:], want)
