"""A linear layer that a user has replaced, as LoRA does: with the old weight, and another map."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from holdall.testing import laws


class Adapted(nn.Module):
    """A layer and a change of its map, as LoRA has it: `weight` and `bias` are those of before."""

    def __init__(self, layer: nn.Linear, change_ED: Tensor) -> None:
        super().__init__()
        self.layer, self.change_ED = layer, nn.Parameter(change_ED)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.change_ED.T


def linear_layers(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def changed(module: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """Copies of a module with another map at one place: in a wrapper, and in the weight itself."""
    wrapped, merged = copy.deepcopy(module), copy.deepcopy(module)
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    change_ED = 0.3 * laws.draw(*layer.weight.shape, dtype=layer.weight.dtype, seed=5)
    parent, _, last = name.rpartition(".")
    own = wrapped.get_submodule(name)
    assert isinstance(own, nn.Linear)
    setattr(wrapped.get_submodule(parent), last, Adapted(own, change_ED))
    merged.get_submodule(name).weight.data += change_ED  # type: ignore[operator,union-attr]
    return wrapped, merged
