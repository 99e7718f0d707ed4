"""Runs of plain PyTorch that err twice as much as rounding makes it err, on any processor.

What a kernel may err is measured by what plain PyTorch errs (laws.py), and that is luck where few numbers
are added or where large ones cancel: of the gradient of a lone key, a difference of two equal sums, one
processor leaves rounding alone and another gives 0. A bound needs the size of the terms, not of their sum.
Here it is measured, and not derived for each function by hand: the function runs with small errors
everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MOVES = frozenset([
    "_local_scalar_dense", "_to_copy", "_unsafe_view", "all", "amax", "amin", "any", "argmax",
    "argmin", "cat", "complex", "constant_pad_nd", "copy", "copy_", "cummax", "cummin", "embedding",
    "equal", "fill_", "flip", "full_like", "gather", "index", "index_put", "index_put_",
    "index_select", "lift_fresh_copy", "masked_fill_", "masked_select", "max", "median", "min",
    "new_full", "new_ones", "nonzero", "ones_like", "repeat", "roll", "scatter", "select_backward",
    "select_scatter", "slice_backward", "slice_scatter", "sort", "stack", "topk", "tril", "tril_",
    "triu", "triu_", "zero_", "zeros_like",
])  # fmt: skip
"""Operations that move numbers or choose among them. One that is missing here is taken to round its results,
which adds a rounding to those of a run: nothing else depends on this list."""
SHIFTED = frozenset(["_softmax", "_log_softmax", "logsumexp", "logcumsumexp"])
"""Those that first take away the largest number, exactly: they add up no products of what they read."""


class Nudges(TorchDispatchMode):
    """Inside, every fourth element that an operation computes is moved to one of its two neighbours, by lot.

    A result that is rounded correctly errs by up to half a unit in the last place: evenly spread, that is a
    variance of 1/12. A whole unit up or down one time in four adds 1/4, so the variance is 4/12: such a run
    errs twice as much as plain PyTorch does, where PyTorch errs by rounding, and twice is what is allowed. An
    operation that adds up products rounds these too, before anyone sees them: each of their factors is moved
    one time in eight, a product therefore about one time in four. (Not in 16 bits, whose sums are in fp32.)

    What comes out is the size of all terms on the way, not of their sum, and no order in which a processor
    adds makes it small by luck. Softmax over a lone key is the example: its gradient, dy . v - dy . y with
    y = v, is 0 or the rounding of either product, but in these runs y is not v and the products are not the
    same. Moving the inputs alone would show nothing: that gradient is 0 for all of them.

    Zeros stay zero, as do infinities and NaN. Each tensor is nudged in its own dtype, so sums in fp32 beside
    bf16 are nudged in the 24th bit. What is only moved (MOVES, views) is left alone, as is an element that is
    one of those it was computed from or its negative, such as x + 0, and what came from outside. The lot is
    drawn from a seed. (Monte Carlo arithmetic; Parker, 1997.)
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.generators = seed, dict[torch.device, torch.Generator]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        aliases = [each.alias_info for each in func._schema.returns]
        view = any(alias and not alias.is_write for alias in aliases)
        read = [*filter(rounded, tree_leaves((args, kwargs)))]
        if name in MOVES or view or not read:
            return func(*args, **kwargs)
        pointwise = torch.Tag.pointwise in func.tags
        if pointwise and func._schema.is_mutable:
            read = [tensor.clone() for tensor in read]
        elif not (pointwise or func._schema.is_mutable or name in SHIFTED):
            factor = functools.partial(self.factor, keep_layout="attention" in name)
            args, kwargs = tree_map_only(Tensor, factor, (args, kwargs))
        results = func(*args, **kwargs)
        for result in filter(rounded, tree_leaves(results)):
            self.nudge(result, one_in=4, operands=read if pointwise else [])
        return results

    def factor(self, tensor: Tensor, keep_layout: bool) -> Tensor:
        if not rounded(tensor) or torch.finfo(tensor.dtype).bits < 32:
            return tensor
        moved = tensor.resolve_conj().resolve_neg().clone()
        if keep_layout and moved.stride() != tensor.stride():
            return tensor  # a bias, which PyTorch has padded for its kernels
        self.nudge(moved, one_in=8)
        return moved

    def nudge(self, tensor: Tensor, one_in: int, operands: Sequence[Tensor] = ()) -> None:
        """In place."""
        real = parts(tensor)
        rng = self.generators.setdefault(real.device, torch.Generator(real.device).manual_seed(self.seed))
        lot = torch.randint(2 * one_in, real.shape, generator=rng, device=real.device)
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()]
        step = (lot == 0).to(whole) - (lot == 1).to(whole)
        still = ~real.isfinite() | (real == 0)
        for operand in operands:
            if operand.is_complex() == tensor.is_complex():
                still |= real.abs() == parts(operand).abs()
        # read as whole numbers, neighbours are one apart
        real.view(whole).add_(step.masked_fill(still, 0))


def parts(tensor: Tensor) -> Tensor:
    """Of a complex tensor its real and imaginary parts, side by side."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def rounded(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
