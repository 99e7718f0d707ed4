"""What every mixer costs as contexts grow, measured: the table of complexities, with exponents fitted.

    from holdall.theory.complexity import LENGTHS, growth, measure
    costs = [measure("taylor", length) for length in LENGTHS]
    growth(LENGTHS, [cost.operations for cost in costs])        # 1.0

Of N tokens read at once: operations, the longest chain of operations that need each other (`depth`) and the
most memory, with and without gradients, all counted from the calls that the plain form makes (counting.py),
and seconds. Of one more token after N: operations and seconds. The state is counted from its tensors. Beside
the exponents stands what the registry promises in O-notation, read as an exponent of N.

What it does not say: how large the factors are, which decide at any one length, nor what a kernel saves that
computes the same with fewer passes over memory. Exponents are of these lengths and this width.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdall import mixers
from holdall.contract import MixerConfig
from holdall.theory import blocks
from holdall.theory.counting import Count

LENGTHS = (1024, 4096, 16384)
"""Tokens, each four times as many: a whole factor of two for what grows with the root of N."""
WIDTH = 32
"""Width of the mixers: small, so that what grows with the length is soon the larger part."""
HEADS, HEAD_DIM = 1, 64
"""Of attention whole and in blocks."""

ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "attention, whole": blocks.whole,
    "attention, in blocks": blocks.in_blocks,
    "attention, PyTorch's": blocks.fused,
}
"""The same function of queries, keys and values in three ways."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a mixer costs at one length. What was not measured is NaN."""

    name: str
    """The mixer, or one of `ATTENTIONS`."""
    length: int
    """Tokens, N."""
    operations: float = math.nan
    """Of reading N tokens at once."""
    depth: float = math.nan
    """Steps of the longest chain among them."""
    peak_bytes: float = math.nan
    """The most memory meanwhile, beside weights and inputs: counted, on a GPU measured."""
    trained_operations: float = math.nan
    """The same with the backward pass."""
    trained_bytes: float = math.nan
    """The most memory of both passes, what is kept for gradients among it."""
    step_operations: float = math.nan
    """Of one more token."""
    state: float = math.nan
    """Elements of the state after N tokens."""
    seconds: float = math.nan
    """Of reading N tokens at once."""
    step_seconds: float = math.nan
    """Of one more token."""


def configure(name: str, length: int, width: int = WIDTH) -> MixerConfig:
    """A mixer for contexts of so many tokens and one more."""
    entry = mixers.entry(name)
    longest = {"max_length": length + 1} if "max_length" in entry.options else {}
    return entry.configure(width=width, **longest)


def measure(name: str, length: int, *, width: int = WIDTH, device: str = "cpu", timed: bool = False) -> Cost:
    """The cost of a mixer, or of one of `ATTENTIONS`, at one length; one row, fp32 (on a GPU bf16).

    Args:
        name: of the registry.
        length: tokens that are read, N.
        device: "cpu" counts operations, depth and memory; "cuda" measures memory, and its kernels run.
        timed: measure seconds too, the least of several passes.

    Raises KeyError for a name that is not known, with the closest one.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name in ATTENTIONS:
        shape = (1, HEADS, length, HEAD_DIM)
        qkv = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
        return _measured(Cost(name=name, length=length), lambda: ATTENTIONS[name](*qkv), None, device, timed)
    config = configure(name, length, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = config.build().to(device=device, dtype=dtype)
        x_1TD = torch.randn(1, length + 1, width).to(device=device, dtype=dtype)
    ids_1T = torch.arange(length + 1, device=device)[None] % 97

    def read(first: int, last: int, state: Any = None) -> Any:
        tokens = {"tokens_BT": ids_1T[:, first:last]} if mixer.reads_tokens else {}
        return mixer(x_1TD[:, first:last], state, **tokens)

    with torch.no_grad():
        _, state = read(0, length)
    cost = Cost(name=name, length=length, state=mixer.state_elements(length))
    return _measured(cost, lambda: read(0, length)[0], lambda: read(length, length + 1, state), device, timed)


def _measured(
    cost: Cost, whole: Callable[[], Tensor], step: Callable[[], Any] | None, device: str, timed: bool
) -> Cost:
    found: dict[str, Any] = {}
    if device == "cuda":
        with torch.no_grad():
            found["peak_bytes"] = _peak(whole)
    else:
        with torch.no_grad(), Count() as count:
            whole()
        found |= {
            "operations": count.operations, "depth": count.depth, "peak_bytes": float(count.peak_bytes)
        }  # fmt: skip
        if step is not None:
            with torch.no_grad(), Count() as count:
                step()
            found["step_operations"] = count.operations
        # held by Python as well, what is saved for gradients is counted as long as it is there
        saved = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.enable_grad(), saved, Count() as count:
            y = whole()
            y.backward(torch.ones_like(y))
        found |= {"trained_operations": count.operations, "trained_bytes": float(count.peak_bytes)}
    if timed:
        with torch.no_grad():
            found["seconds"] = _seconds(whole, device)
            if step is not None:
                found["step_seconds"] = _seconds(step, device)
    return dataclasses.replace(cost, **found)


def _peak(run: Callable[[], Any]) -> float:
    """Bytes of a GPU's memory that a pass takes beside what was there."""
    run()  # what is made once and kept
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def _seconds(run: Callable[[], Any], device: str, passes: int = 5) -> float:
    """The least of several passes, behind one that is not counted; a slow one is measured fewer times."""
    least, spent = math.inf, 0.0
    for number in range(passes + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        spent += took
        if number:
            least = min(least, took)
            if spent > 2.0:
                break
    return least


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log(value) over log(length) between the two longest lengths, for what has noise or steps:
    seconds and memory. NaN if it was not measured.
    """
    if len(lengths) < 2 or not all(value > 0 for value in values[-2:]):
        return math.nan
    return math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2])


def growth(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of the part that grows, from exact counts at lengths by one factor apart.

    For value = c + a N^p this is p, whatever the constant part c: from the ratio of the last two increments.
    0 where nothing grows, or ever less; NaN if it was not measured. Raises ValueError for other lengths.
    """
    if len(lengths) < 3 or lengths[-1] * lengths[-3] != lengths[-2] ** 2:
        raise ValueError(f"lengths {list(lengths)}: growth needs three at the end that are one factor apart")
    first, second = values[-2] - values[-3], values[-1] - values[-2]
    if math.isnan(first + second):
        return math.nan
    if min(first, second) <= 1e-9 * values[-1]:
        return 0.0
    return max(0.0, math.log(second / first) / math.log(lengths[-1] / lengths[-2]))


def promised(formula: str) -> float:
    """The exponent of N in a formula of the registry, such as "ND(D + n)": 1; of "or", the first.

    Raises ValueError for what is not a formula of that kind.
    """
    text = formula.split(" or ")[0].replace("²", "**2").replace("³", "**3").replace("√N", "(N**0.5)")
    text = re.sub(r"log\s+N", "log(N)", text)
    tokens = re.findall(r"\*\*[\d.]+|log|min|\d+(?:\.\d+)?|[A-Za-z]|[()+\-/,]", text)
    if "".join(tokens) != text.replace(" ", ""):
        raise ValueError(f"'{formula}' is no formula of letters, powers, log and min")
    program, before = "", ""
    for token in tokens:
        factor = token[0].isalnum() or token == "("
        ended = before[:1].isalnum() or before == ")" or before.startswith("**")
        if factor and ended and before not in ("log", "min"):
            program += "*"
        program, before = program + token, token
    letters = dict.fromkeys(re.findall(r"[A-Za-z]", formula), 8.0) | {"L": 1e300, "log": math.log, "min": min}
    near, far = 1e30, 1e33
    ends = [
        float(eval(compile(program, formula, "eval"), {"__builtins__": {}}, letters | {"N": n}))
        for n in (near, far)
    ]
    return round(math.log(ends[1] / ends[0]) / math.log(far / near), 1)
