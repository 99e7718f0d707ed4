"""What is made of a weight alone is made once, and not in every step of decoding.

    weights = Unchanging()
    with weights:            whoever enters promises that no weight changes as long as `weights` lives
        model.hidden(...)

PyTorch cannot say whether a weight has changed: a fused optimizer leaves its version as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Unchanging:
    """A promise that weights stay as they are, of an engine say: what is made of them is kept while it lives.

    So it stays where recorded CUDA graphs read it.
    """

    def __init__(self) -> None:
        self._before: list[Token[Unchanging | None]] = []

    def __enter__(self) -> None:
        self._before.append(_promised.set(self))

    def __exit__(self, *_: object) -> None:
        _promised.reset(self._before.pop())


_promised: ContextVar[Unchanging | None] = ContextVar("promised", default=None)


class Kept:
    """What is made of a weight, at hand wherever weights are promised to stay; made anew everywhere else.

    self.kept = Kept()
    a = self.kept.of(self.A_log, lambda log: -log.float().exp())
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Unchanging, Tensor] = WeakKeyDictionary()

    def of(self, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(weight)`, always of the same weight and function. It must not be written into."""
        if torch.compiler.is_compiling() or (promised := _promised.get()) is None:
            return make(weight)
        wanted = torch.is_grad_enabled() and weight.requires_grad
        if wanted or torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return make(weight)
        made = self._made.get(promised)
        if made is None:
            made = self._made[promised] = make(weight.detach())
        return made

    def __deepcopy__(self, memo: object) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()
