"""A residual stream's sum and the norm behind it in one kernel, against fp64, beside PyTorch's in the same
dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdall.contract import forms
from holdall.kernels.layer_norm import MAX_WIDTH, add_norm
from holdall.model import LayerNorm, Model, ModelConfig, RMSNorm, Sum
from holdall.ops import layer_norm as ops
from holdall.precision import compute_in
from holdall.recipes.presets import preset
from holdall.testing import laws

SINGLE, HALF = torch.float32, torch.bfloat16
DTYPES = ((SINGLE, HALF), (SINGLE, SINGLE), (HALF, HALF), (torch.float16, torch.float16))
"""Of the stream, and of what is added to it and the weights."""
SIZES = ((1, 16), (3, 1, 48), (2, 40, 129), (1, 1, 1792))

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(
    *size: int, wide: torch.dtype, narrow: torch.dtype, device: torch.device, bias: bool
) -> list[Tensor | None]:
    """r, x, weight and bias."""
    torch.manual_seed(sum(size))
    r, x = torch.randn(size) * 3 + 2, torch.randn(size)
    weight, bias_D = torch.randn(size[-1]), torch.randn(size[-1])
    tensors = (r.to(wide), x.to(narrow), weight.to(narrow), bias_D.to(narrow) if bias else None)
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("bias", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_it_is_as_exact_as_torch_s(
    dtypes: tuple[torch.dtype, torch.dtype], size: tuple[int, ...], bias: bool, device: torch.device
) -> None:
    wide, narrow = dtypes
    tensors = draw(*size, wide=wide, narrow=narrow, device=device, bias=bias)
    double = [None if tensor is None else tensor.double() for tensor in tensors]
    truth = ops.add_norm(*double, 1e-5, torch.float64)
    theirs = laws.plainly(ops.add_norm, *tensors, 1e-5, narrow)
    r, x, *_ = tensors
    before = [r.clone(), x.clone()]
    for name, one, other, exact in zip(
        ("sum", "norm"), add_norm(*tensors, 1e-5, narrow), theirs, truth, strict=True
    ):
        laws.assert_as_good_as_plain(name, one, other, exact, 1, torch.linalg.vector_norm)
    assert torch.equal(r, before[0])
    assert torch.equal(x, before[1])
    summed, normed = add_norm(*tensors, 1e-5, narrow)
    laws.assert_bitwise("sum", summed, r + x)
    got, other = add_norm(*tensors, 1e-5, narrow, inplace=True)
    assert got is r
    laws.assert_bitwise("sum in place", r, summed)
    laws.assert_bitwise("norm", other, normed)
    assert torch.equal(x, before[1])


def test_a_stream_may_be_added_to_itself(device: torch.device) -> None:
    r, _, weight, _ = draw(3, 33, wide=SINGLE, narrow=SINGLE, device=device, bias=False)
    want = ops.add_norm(r, r, weight, None, 1e-5, SINGLE)
    got = add_norm(r, r, weight, None, 1e-5, SINGLE, inplace=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_may_lie_in_wider_ones_and_none_are_none(device: torch.device) -> None:
    r, x, weight, bias = draw(2, 5, 24, wide=SINGLE, narrow=SINGLE, device=device, bias=True)
    want = add_norm(r, x, weight, bias, 1e-5, SINGLE)
    for lay in (lambda t: torch.cat((t + 1, t), -1)[..., 24:], lambda t: t.transpose(0, 1).clone().mT.mT):
        one, other = lay(r), lay(x)
        if one.shape != r.shape:
            one, other = one.transpose(0, 1), other.transpose(0, 1)
        for inplace in (False, True):
            for got, right in zip(
                add_norm(one, other, weight, bias, 1e-5, SINGLE, inplace=inplace), want, strict=True
            ):
                laws.assert_bitwise("of views", got, right)
    empty = add_norm(r[:0], x[:0], weight, bias, 1e-5, SINGLE)
    assert [tensor.shape for tensor in empty] == [(0, 5, 24)] * 2


def test_fp64_is_refused(device: torch.device) -> None:
    tensors = draw(2, 16, wide=torch.float64, narrow=torch.float64, device=device, bias=True)
    with pytest.raises(forms.KernelError, match="float64"):
        add_norm(*tensors, 1e-5, torch.float64)


# ------------------------------------------------------------------------------------------------- the model


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, also in the interpreter."""
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused sums that are taken."""
    taken = []
    for name in ("_add", "_add_inplace"):
        from holdall.kernels import layer_norm as kernels

        def seen(*args: object, name: str = name, op: object = getattr(kernels, name)) -> object:
            taken.append(name)
            return op(*args)  # type: ignore[operator]

        monkeypatch.setattr(kernels, name, seen)
    return taken


def narrow_based(norm: str = "rms") -> Model:
    """A Based of two layers of each kind, its blocks in bf16."""
    layers = tuple(
        {**layer.to_dict(), "width": 32, "heads": 2} if "heads" in layer.to_dict() else
        {**layer.to_dict(), "width": 32} for layer in preset("based-1b", 64).layers[:4]
    )  # fmt: skip
    plain = {"vocab": 64, "width": 32, "layers": list(layers), "mlp": 48, "mlp_kind": "swiglu", "norm": norm}
    torch.manual_seed(0)
    return compute_in(HALF, ModelConfig.from_dict(plain).build()).eval()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_model_that_is_only_read_takes_all_its_sums_so(
    norm: str, device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place from the first layer to the last norm, and the same to the last bit as a block at a time."""
    model = narrow_based(norm).to(device)
    tokens_BT = torch.randint(64, (3, 5), device=device)
    with torch.no_grad():
        got, _ = model.hidden(tokens_BT)
        assert launches == ["_add_inplace"] * 8
        launches.clear()
        one_by_one, _ = model.hidden(tokens_BT, run=torch.nn.Module.__call__)
        assert launches == ["_add"] * 4  # those within blocks
        laws.assert_close("as blocks", got, one_by_one, 2**-6 * laws.size(got))
        at_BQ = torch.tensor([[4], [0], [2]], device=device)
        asked, _ = model.hidden(tokens_BT, at_BQ=at_BQ)
        laws.assert_close("at", asked, got.take_along_dim(at_BQ[..., None], 1), 2**-6 * laws.size(got))
        monkeypatch.setattr(forms, "on_gpu", lambda tensor: False)
        launches.clear()
        plain, _ = model.hidden(tokens_BT)
        assert not launches
    laws.assert_close("as plain PyTorch", got, plain, 2**-5 * laws.size(got))


@pytest.mark.usefixtures("everywhere")
def test_whoever_wants_gradients_gets_them(device: torch.device, launches: list[str]) -> None:
    norm = RMSNorm(24, eps=1e-5).to(device)
    r, x = torch.randn(2, 3, 24, device=device), torch.randn(2, 3, 24, device=device)
    summed, normed = norm.read(Sum(r, x), inplace=True)
    assert not launches
    assert not torch.equal(summed, r)
    (grad,) = torch.autograd.grad(normed.square().sum(), [norm.weight])
    assert grad.any()
    with torch.no_grad():
        norms = torch.func.vmap(lambda r, x: norm.read(Sum(r, x), inplace=True)[1])(r, x)
        assert not launches
        torch.testing.assert_close(norms, normed)
        assert norm.read(Sum(r.to(HALF), x))[0].dtype == SINGLE  # it widens: the stream is what PyTorch makes
        assert not launches
        torch.testing.assert_close(norm.read(Sum(r, x))[1], normed)
        assert launches == ["_add"]
        r.requires_grad_()  # and gradients are not wanted
        norm.read(Sum(r, x))
        assert launches == ["_add"] * 2
        wide = LayerNorm(2 * MAX_WIDTH, device=device)
        wide.read(Sum(*torch.randn(2, 1, 2 * MAX_WIDTH, device=device)))
        assert launches == ["_add"] * 2


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_a_norm_of_a_wide_stream_is_one_kernel(norm: type, device: torch.device) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        made: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None):
            self.made.append(func._opname)  # type: ignore[attr-defined]
            return func(*args, **(kwargs or {}))  # type: ignore[operator]

    module = norm(24, eps=1e-5).to(device, HALF)
    r = torch.randn(2, 3, 24, device=device)
    with torch.no_grad(), Calls() as calls:
        assert module(r).dtype == HALF
    assert [name for name in calls.made if name not in ("view", "unsqueeze")] == ["layer_norm_forward"]
