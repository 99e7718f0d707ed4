"""Operations, depth and memory of any code on tensors, counted from what PyTorch is asked to do.

    with Count() as count:
        mixer(x_BTD)
    count.operations, count.depth, count.peak_bytes

Every call of PyTorch that is made inside passes here once, whatever device it runs on. What a Triton kernel
does inside is one call that nobody sees into: count the plain forms.

Letters: m, n, k sizes of a matrix product or of a sum.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FREE = frozenset([
    "_assert_async", "_local_scalar_dense", "_reshape_alias", "alias", "as_strided", "detach", "empty",
    "empty_like", "empty_strided", "expand", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided",
    "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "sym_size", "t", "transpose",
    "unbind", "unfold", "unsqueeze", "view", "view_as_complex", "view_as_real", "_unsafe_view", "_conj",
    "_neg_view", "diagonal", "real", "imag", "movedim", "narrow", "chunk", "resolve_conj", "resolve_neg",
])  # fmt: skip
"""Calls that neither compute nor move an element."""
PICKS = frozenset(["embedding", "gather", "index", "index_select", "take", "take_along_dim"])
"""Calls that read only what they return of a tensor."""
SCANS = frozenset(["cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"])
SUMS = frozenset(["sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "argmax"])
ROW_SUMS = frozenset(["logsumexp", "var", "var_mean", "std"])
"""Sums over rows, whose results may be as large as what they read."""
SORTS = frozenset(["sort", "topk", "argsort", "kthvalue", "unique"])
PRODUCTS = frozenset(["mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "vdot"])
WRITES = frozenset(["copy_", "fill_", "zero_", "zero", "fill", "copy"])
"""In-place calls whose result does not depend on what was there."""


class Count(TorchDispatchMode):
    """Counts what runs inside the `with`.

    Attributes:
        operations: multiplications and additions of matrix products, convolutions and attention, as PyTorch's
            own counter has them; 5 n log2 n of a Fourier transform of n elements, n log2 n of sorting; of any
            other call, one per element of the largest tensor that it reads or writes, which moving it costs
            as well.
        depth: steps of the longest chain of calls that need each other's results, on a machine with as many
            processors as elements: one for an elementwise call, log2 n for a sum, scan or transform over n
            elements, n for a triangular system of n equations, which is solved row by row.
        peak_bytes: the most that tensors made inside held at once.

    A tensor that is written in part counts as one for the depth: a chain through its other parts is taken
    for a dependence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.depth = 0.0, 0.0
        self.peak_bytes = 0
        self._live_bytes = 0
        self._holders: dict[int, int] = {}  # of each storage that was made inside, its tensors
        self._depths: dict[int, float] = {}  # of each storage, the chain that ends in it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        before = {_storage(tensor) for tensor in read}
        steps = 0.0
        if name.removesuffix("_copy") not in FREE:
            self.operations += _operations(func, name, args, kwargs, result, read, made)
            steps = _steps(name, args, read, made)
        needed = read[1:] if name in WRITES and read else read
        deep = steps + max((self._depths.get(_storage(tensor), 0.0) for tensor in needed), default=0.0)
        written = [*made, *(read[:1] if name.endswith("_") else [])]
        for tensor in written:
            key = _storage(tensor)
            old = self._depths.get(key, 0.0) if key in before else 0.0
            self._depths[key] = max(old, deep)
            self.depth = max(self.depth, deep)
        for tensor in made:
            self._hold(tensor, fresh=_storage(tensor) not in before)
        return result

    def _hold(self, tensor: Tensor, *, fresh: bool) -> None:
        """Count the bytes of a new tensor until the last that shares its storage is gone."""
        key = _storage(tensor)
        if fresh and key not in self._holders:
            self._holders[key] = 0
            self._live_bytes += tensor.untyped_storage().nbytes()
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        if key in self._holders:
            self._holders[key] += 1
            weakref.finalize(tensor, self._let_go, key, tensor.untyped_storage().nbytes())

    def _let_go(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._depths.pop(key, None)
            self._live_bytes -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _operations(
    func: Any, name: str, args: Any, kwargs: Any, result: Any, read: Iterable[Tensor], made: Iterable[Tensor]
) -> float:
    packet = func._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result))
    if "scaled_dot_product" in name:  # of a CPU, which PyTorch's counter leaves out
        q, k, v = list(read)[:3]
        return 2.0 * q.numel() / q.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    most = max((tensor.numel() for tensor in (*([] if name in PICKS else read), *made)), default=0)
    if name.startswith("_fft"):
        return 5 * most * _log2(_over(name, args, read))
    if name in SORTS:
        return most * _log2(_over(name, args, read))
    if "solve_triangular" in name or name == "triangular_solve":
        right = next(tensor for tensor in made)
        return float(right.numel() * right.shape[-2])
    return float(most)


def _steps(name: str, args: Any, read: Iterable[Tensor], made: Iterable[Tensor]) -> float:
    """How long the chain within one call is."""
    read, made = list(read), list(made)
    if not read:
        return 0.0
    if "solve_triangular" in name or name == "triangular_solve":
        return float(made[0].shape[-2])
    if name in PRODUCTS:
        factors = read[-2:]
        return 1 + _log2(factors[0].shape[-1])
    if "convolution" in name:
        return 1 + _log2(math.prod(read[1].shape[1:]))
    if "attention" in name:
        return 3 + _log2(read[0].shape[-1]) + 2 * _log2(read[1].shape[-2])
    if name.startswith("_fft") or name in SCANS or name in SORTS:
        return max(1.0, _log2(_over(name, args, read)))
    if name in ROW_SUMS or "softmax" in name or "norm" in name:
        return 1 + _log2(read[0].shape[-1] if read[0].ndim else 1)
    if name in SUMS and made:
        return max(1.0, _log2(max(1, read[0].numel()) / max(1, made[0].numel())))
    return 1.0


def _over(name: str, args: Any, read: Iterable[Tensor]) -> int:
    """How many elements a transform, scan or sort goes over together."""
    tensor = next(iter(read))
    dims = args[1] if len(args) > 1 else -1
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    size = math.prod(
        tensor.shape[dim] for dim in dims if isinstance(dim, int) and -tensor.ndim <= dim < tensor.ndim
    )
    # of a real transform, the longer of its two sides
    return max(size, args[-1] if name == "_fft_c2r" and isinstance(args[-1], int) else 0)


def _log2(size: float) -> float:
    return float(math.ceil(math.log2(size))) if size > 1 else 0.0
