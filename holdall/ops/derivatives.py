"""What can be differentiated once only says so, and is never taken for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.library import CustomOpDef

Gradients = TypeVar("Gradients", CustomOpDef, type[torch.autograd.Function])


def once_differentiable(
    instead: str = "the same mixer with form='parallel' or form='loop'",
) -> Callable[[Gradients], Gradients]:
    """Decorates what computes gradients and has none of its own, a custom operation or a Function without a
    `backward`: a second derivative raises a RuntimeError that says what to take instead.

    It must get everything that its result depends on as an argument: PyTorch then knows of it. A formula in
    a Function's `backward`, under PyTorch's own decorator of this name, would be taken for a constant
    wherever the gradient that it is given requires none.
    """

    def refusing(name: str) -> Callable[..., None]:
        def refuse(ctx: Any, *_: Any) -> None:
            raise RuntimeError(
                f"{name} is differentiated twice, and has a first derivative only: take {instead}"
            )

        return refuse

    def decorate(gradients: Gradients) -> Gradients:
        if isinstance(gradients, CustomOpDef):
            gradients.register_autograd(refusing(gradients._qualname))
        else:
            refuse = refusing(f"{gradients.__module__}.{gradients.__qualname__}")
            gradients.setup_context = staticmethod(lambda ctx, inputs, output: None)  # type: ignore[method-assign]
            gradients.backward = staticmethod(refuse)  # type: ignore[method-assign]
        return gradients

    return decorate
