"""What is made of a weight alone is made once, and not in every step of decoding."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class Kept:
    """The last tensor made of a weight, until it changes or moves; nothing while gradients are wanted.

    self.kept = Kept()
    a = self.kept.of(self.A_log, lambda log: -log.float().exp())
    """

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[Tensor], int, int, torch.dtype] | None = None
        self._made: Tensor | None = None

    def of(self, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(weight)`, of which a copy may be at hand. It must not be written into.

        `make` always has to be the same function.
        """
        wanted = torch.is_grad_enabled() and weight.requires_grad
        if wanted or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return make(weight)
        now = (weight.data_ptr(), weight._version, weight.dtype)
        if self._known is None or self._known[0]() is not weight or self._known[1:] != now:
            self._known, self._made = (weakref.ref(weight), *now), make(weight.detach())
        assert self._made is not None
        return self._made

    def __deepcopy__(self, memo: object) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()
