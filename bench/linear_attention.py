"""Linear attention and the delta rules: flash-linear-attention's kernels beside our plain form, as it is and
compiled.

At the size of a language model's layer, and at the sizes of a sweep on MQAR, where the rows of a population
of four share a pass. Bytes: q, k, v, y, gates and decays, once; with the gradient all that again, with y's
gradient for y, and the gradients of the inputs. Operations: pairs within chunks of 64 tokens, and the state
twice per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import Case
from holdall.kernels import delta_rule as kernels_delta
from holdall.kernels import linear_attention as kernels_linear
from holdall.ops import delta_rule as ops_delta
from holdall.ops import linear_attention as ops_linear

MODEL = (4, 8192, 16, 64, 64)
"""Rows, tokens, heads, key and value dimensions."""
SWEEP = {
    "RetNet": ("decay per head", (1024, 256, 2, 32, 64)),
    "GLA": ("decay per key", (1024, 256, 2, 16, 32)),
    "Mamba-2": ("decay per head", (1024, 256, 2, 16, 64)),
    "DeltaNet": ("delta", (1024, 256, 2, 32, 32)),
    "Gated DeltaNet": ("delta, decay per head", (1024, 256, 2, 32, 64)),
    "Kimi": ("delta, decay per key", (1024, 256, 2, 32, 32)),
    "RWKV-7": ("generalised delta", (1024, 256, 1, 64, 64)),
}
COMPILED = ("GLA", "Mamba-2", "DeltaNet")
"""Whose plain form is also compiled; the loop over chunks is unrolled, which takes its time."""


def drawn(rule: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The inputs of a rule, in the order of its arguments."""
    rows, length, heads, key_dim, value_dim = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(rows, length, heads, *size, device="cuda")

    q, k, v = draw(key_dim) * key_dim**-0.5, F.normalize(draw(key_dim), dim=-1), draw(value_dim)
    s = torch.zeros(rows, heads, key_dim, value_dim, device="cuda")
    found = [x.to(dtype) for x in (q, k, v)]
    if rule == "generalised delta":
        found += [(-k * draw(1).sigmoid()).to(dtype), k.to(dtype)]
    elif "delta" in rule:
        found += [draw().sigmoid()]
    found += [s]
    if "per head" in rule:
        found += [F.logsigmoid(draw() + 3)]
    elif "per key" in rule or rule == "generalised delta":
        found += [F.logsigmoid(draw(key_dim) + 3)]
    return [x.requires_grad_() for x in found]


def twins(rule: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Kernel and plain form, of arguments as drawn, to output and final state."""
    if rule == "generalised delta":
        return kernels_delta.generalised_delta_rule, ops_delta.generalised_delta_rule
    if "delta" in rule:
        return kernels_delta.delta_rule, ops_delta.delta_rule

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *x: function(*x[:4], None, *x[4:])[:2]

    return of(kernels_linear.linear_attention), of(ops_linear.linear_attention)


def case(name: str, rule: str, shape: tuple[int, ...], *, gradient: bool, compiled: bool) -> Case:
    rows, length, heads, key_dim, value_dim = shape
    inputs = drawn(rule, shape, torch.bfloat16)
    kernel, plain = twins(rule)
    dy = torch.randn(*inputs[2].shape, device="cuda", dtype=torch.bfloat16)

    def run(function: Callable[..., Any]) -> Any:
        if not gradient:
            with torch.no_grad():
                return function(*inputs)[0]
        return torch.autograd.grad(function(*inputs)[0], inputs, dy)

    moved = sum(x.nbytes for x in inputs) + dy.nbytes
    products = rows * length * heads * (64 * (key_dim + value_dim) + 4 * key_dim * value_dim)
    ways = {"kernel": kernel, "plain": plain}
    if compiled:
        ways["plain, compiled"] = torch.compile(plain)
    return Case(
        what=f"{name}, {'forward + backward' if gradient else 'forward'}",
        shape=f"{rows} x {length} x {heads} heads of {key_dim}, {value_dim}",
        bytes=moved * (3 if gradient else 1) - (dy.nbytes if gradient else 0),
        flops=products * (3 if gradient else 1),
        ways={way: (lambda function=function: run(function)) for way, function in ways.items()},
    )


def cases(names: Iterable[str] = tuple(SWEEP)) -> Iterator[Case]:
    """All in bf16."""
    for name in names:
        rule, shape = SWEEP[name]
        for gradient in (False, True):
            yield case(name, rule, MODEL, gradient=gradient, compiled=False)
        yield case(name, rule, shape, gradient=True, compiled=name in COMPILED)
