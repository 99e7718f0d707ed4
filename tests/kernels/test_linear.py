"""Linear maps of a few rows: equal to PyTorch's, and a row's bits the same in any number of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from holdall.contract.forms import KernelError
from holdall.kernels import linear as kernel
from holdall.ops.linear import Linear, linear
from holdall.testing import laws

# outputs and inputs: a whole number of tiles, some more, cut into 4 parts, too narrow to be cut
SHAPES = [(64, 128), (72, 80), (128, 1024), (6, 16)]


def operands(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    torch.manual_seed(rows + outputs)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape) for shape in shapes)
    return [u.to(device, dtype) for u in (x, weight / inputs**0.5, bias)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 64])
@torch.no_grad()
def test_equals_the_definition(
    rows: int, outputs: int, inputs: int, gated: bool, device: torch.device
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, weight, bias = operands(rows, outputs, inputs, dtype, device)
        for given in (None, bias):
            y = kernel.linear(x[None], weight, given, gated=gated)
            wide = None if given is None else given.double()
            wanted = linear(x[None].double(), weight.double(), wide, gated=gated)
            assert y.dtype == dtype
            assert y.shape == (1, rows, outputs // (1 + gated))
            plain = laws.plainly(linear, x[None], weight, given, gated=gated)
            laws.assert_as_good_as_plain("y", y, plain, wanted, 1, torch.linalg.vector_norm)


@torch.no_grad()
def test_the_order_of_sums_does_not_depend_on_the_rows(device: torch.device) -> None:
    x, weight, _ = operands(64, 128, 1024, torch.bfloat16, device)
    assert kernel._config(128, 1024)["SPLIT"] > 1
    whole = kernel.linear(x, weight)
    for rows in (1, 2, 16, 17, 33):
        assert torch.equal(kernel.linear(x[:rows], weight), whole[:rows]), rows


@torch.no_grad()
def test_counters_return_to_zero_and_strides_are_the_tensors_own(device: torch.device) -> None:
    x, weight, _ = operands(3, 128, 1024, torch.bfloat16, device)
    apart = torch.randn(3, 2048).to(device, torch.bfloat16)
    apart[:, :1024] = x
    first = kernel.linear(x, weight)
    for given in (x, apart[:, :1024]):
        assert torch.equal(kernel.linear(given, weight), first)
    assert not kernel._counted[weight].any()
    assert kernel._counters(weight, 2) is kernel._counted[weight]


@torch.no_grad()
def test_wide_tensors_are_refused(device: torch.device) -> None:
    x, weight, _ = operands(1, 64, 128, torch.float32, device)
    with pytest.raises(KernelError, match="16 bits, not float32"):
        kernel.linear(x, weight)


@torch.no_grad()
def test_no_rows_and_a_module(device: torch.device) -> None:
    x, weight, bias = operands(0, 64, 128, torch.bfloat16, device)
    assert kernel.linear(x, weight, bias).shape == (0, 64)
    module = Linear(16, 8).to(device)
    x_BD = torch.randn(2, 16).to(device)
    torch.testing.assert_close(module(x_BD), F.linear(x_BD, module.weight, module.bias))


@pytest.mark.gpu
@torch.no_grad()
def test_taken_on_a_gpu_for_a_few_rows_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    calls = []
    monkeypatch.setattr(
        linear,
        "kernel",
        lambda *args, **how: calls.append(args) or kernel.linear(*args, **how),
        raising=False,
    )
    weight = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    for rows, taken in ((1, 1), (64, 2), (65, 2)):
        linear(torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16), weight)
        assert len(calls) == taken
    linear(torch.randn(1, 128, device="cuda"), weight.float())
    assert len(calls) == 2


@pytest.mark.gpu
@torch.no_grad()
def test_in_a_graph_beside_the_kernels_around_it() -> None:
    """Kernels that are launched before the one before them has ended still read what it wrote."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    weights = [torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16) / 32 for _ in range(24)]
    x = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        y = x
        for weight in weights:
            y = linear(y, weight)
        return y

    eager = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, eager)
