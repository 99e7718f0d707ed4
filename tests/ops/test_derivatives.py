"""Every Function of the package gives right second derivatives, or refuses them by name."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import holdall
from holdall.model import _SumAt
from holdall.ops import attention
from holdall.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_loop
from holdall.ops.derivatives import once_differentiable
from holdall.ops.fading import Fading
from holdall.precision import _Copies
from holdall.testing import laws

DOUBLE = torch.float64
AT, TARGET = torch.tensor([[0, 4], [2, 2]]), torch.tensor([1, 0, 4, 1, 1])


def attend(function: Callable, q: Tensor, k: Tensor, v: Tensor, **how: int) -> Tensor:
    rows, _, heads, dim = k.shape
    return function(q, k, v, attention.empty_cache(rows, 0, heads, dim, dim, dtype=DOUBLE), scale=0.7, **how)[
        0
    ]


def over_members(function: Callable, *x: Tensor) -> Tensor:
    return torch.func.vmap(lambda *each: attend(function, *each))(*(torch.stack((u, 2 * u)) for u in x))


def looped_members(function: Callable, *x: Tensor) -> Tensor:
    return torch.stack([attend(function, *(scale * u for u in x)) for scale in (1, 2)])


def sum_at(r: Tensor, x: Tensor) -> Tensor:
    rows = torch.arange(2)[:, None]
    return r[rows, AT] + x[rows, AT]


def decays_between(log_w_CK: Tensor) -> Tensor:
    """Of all pairs, (C, C, K), zero where the second is later."""
    sums_CK = log_w_CK.cumsum(0)
    later_CC1 = torch.ones(len(log_w_CK), len(log_w_CK)).tril()[..., None]
    return (sums_CK[:, None] - sums_CK).exp() * later_CC1


QKV = (2, 7, 2, 3)
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "holdall.ops.attention._Blockwise": (
        (QKV, QKV, QKV),
        lambda *x: attend(attention.blockwise_attention, *x, block=3),
        lambda *x: attend(attention.full_attention_loop, *x),
    ),
    "holdall.ops.attention._OverMembers": (
        (QKV, QKV, QKV),
        lambda *x: over_members(attention.full_attention, *x),
        lambda *x: looped_members(attention.full_attention_loop, *x),
    ),
    "holdall.ops.cross_entropy._LinearCrossEntropy": (
        ((5, 3), (6, 3)),
        lambda h, head: linear_cross_entropy(h, head, TARGET, block=2)[0],
        lambda h, head: linear_cross_entropy_loop(h, head, TARGET).mean(),
    ),
    "holdall.model._SumAt": (
        ((2, 5, 3), (2, 5, 3)),
        lambda r, x: _SumAt.apply(r.sin(), x.exp(), AT).square(),
        lambda r, x: sum_at(r.sin(), x.exp()).square(),
    ),
    "holdall.ops.fading._Pairs": (
        ((4, 2, 3), (4, 1, 3), (4, 3)),
        lambda reads, keys, log_w: Fading(-log_w.exp()).pairs(reads, keys).square(),
        lambda reads, keys, log_w: torch.einsum(
            "trk,usk,tuk->trsu", reads, keys, decays_between(-log_w.exp())
        ).square(),
    ),
    "holdall.precision._Copies": (
        ((2, 3), (4,)),
        lambda a, b: sum(c.sin().sum() for c in _Copies.apply([DOUBLE] * 3, a * a, b.exp(), a)[:2]),
        lambda a, b: (a * a).sin().sum() + b.exp().sin().sum(),
    ),
}
"""Shapes of what they are differentiated by; by them; and without them."""
REFUSE = {"holdall.ops.cross_entropy._LinearCrossEntropy"}
PARTS = {"holdall.ops.cross_entropy._Gradients"}
"""The refusal of another one."""


def functions() -> Iterator[str]:
    """Of the whole package, read off its files: some cannot be imported here."""
    root = Path(holdall.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "Function" in text else ():
            if isinstance(node, ast.ClassDef) and any("Function" in ast.unparse(base) for base in node.bases):
                yield ".".join((*path.relative_to(root.parent).with_suffix("").parts, node.name))


def test_every_function_is_here() -> None:
    assert {*functions()} == {*CASES, *PARTS}


def by_autograd(function: Callable[..., Tensor], leaves: list[Tensor], ways: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
    along = sum((grad * way).sum() for grad, way in zip(first, ways, strict=True))
    return list(torch.autograd.grad(along, leaves))


def by_torch_func(function: Callable[..., Tensor], leaves: list[Tensor], ways: list[Tensor]) -> list[Tensor]:
    places = tuple(range(len(leaves)))
    first = torch.func.grad(lambda *x: function(*x).sum(), places)

    def along(*x: Tensor) -> Tensor:
        return sum((grad * way).sum() for grad, way in zip(first(*x), ways, strict=True))

    return list(torch.func.grad(along, places)(*leaves))


@pytest.mark.parametrize("second", [by_autograd, by_torch_func])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_right_or_refused(name: str, second: Callable) -> None:
    if name == "holdall.precision._Copies" and second is by_torch_func:
        pytest.skip("of weights in another dtype, which PyTorch's transforms do not see")
    shapes, function, plain = CASES[name]
    leaves, ways = ([laws.draw(*shape, dtype=DOUBLE, seed=seed + i) for i, shape in enumerate(shapes)]
                    for seed in (0, 9))  # fmt: skip
    with sdpa_kernel(SDPBackend.MATH):
        if name in REFUSE:
            with pytest.raises(
                RuntimeError, match="is differentiated twice, and has a first derivative only"
            ):
                second(function, leaves, ways)
            return
        got = second(function, leaves, ways)
    for i, (one, other) in enumerate(zip(got, second(plain, leaves, ways), strict=True)):
        laws.assert_close(f"second derivative {i}", one, other)


def test_a_third_derivative_through_blocks() -> None:
    shapes, function, plain = CASES["holdall.ops.attention._Blockwise"]
    q, k, v = (laws.draw(*shape, dtype=DOUBLE, seed=i) for i, shape in enumerate(shapes))

    def third(function: Callable[..., Tensor]) -> Tensor:
        at = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
        along = function(q + at, k * (1 + at), v * at).square().sum()
        for _ in range(3):
            (along,) = torch.autograd.grad(along, at, create_graph=True)
        return along

    laws.assert_close("third derivative", third(function), third(plain))


def test_a_refusal_says_where_and_what_instead() -> None:
    @once_differentiable("a sine")
    class Wave(torch.autograd.Function):
        @staticmethod
        def forward(grad: Tensor, x: Tensor) -> Tensor:
            return grad * x.cos()

    x = torch.tensor(2.0, requires_grad=True)
    grad = Wave.apply(torch.tensor(1.0), x)
    assert grad.item() == pytest.approx(-0.41614684)
    with pytest.raises(RuntimeError, match=r"Wave is differentiated twice, and .* only: take a sine"):
        torch.autograd.grad(grad, x)
