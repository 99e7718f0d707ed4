"""What makes models of other programs fit to be compared with, on any machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from holdall import files
from holdall.adapters import foreign
from holdall.adapters.reading import ForeignError, weights_in
from holdall.model import seeded

# what transformers replaces by kernels of other packages where they are installed, and those only run on GPUs
REPLACED = (
    "causal_conv1d_fn", "causal_conv1d_update",
    "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule",
)  # fmt: skip


def fla_models() -> ModuleType:
    """The models of flash-linear-attention; where it is not installed, the test or the module is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="transformers is not installed")
        reason = "flash-linear-attention is not installed"
        return pytest.importorskip("fla.models", reason=reason, exc_type=ImportError)


def in_plain_torch(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Have a module of models compute by its own definitions, whatever packages are installed."""
    for name in REPLACED:
        if function := getattr(module, name, None):
            monkeypatch.setattr(module, name, getattr(function, "__wrapped__", function))


@torch.no_grad()
def randomised(make: Callable[[Any], nn.Module], config: Any, seed: int = 1) -> nn.Module:
    """A model of this config, with N(0, 1 / fan in) in its matrices, and its vectors moved by up to a half.

    So no weight can be forgotten unseen: libraries start norms at one or zero, biases at zero, and matrices
    so small that a layer says little. All are multiples of 2^-10, so that what a conversion makes of two
    weights, 1 + w or a product, is exact in fp32, and comparisons in fp64 see equations alone.
    """
    with seeded(seed):
        model = make(config)
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            spread = 1.0 if "embed" in name else weight[0].numel() ** -0.5
            new = torch.randn(weight.shape, generator=draw) * spread
        else:
            new = weight + torch.rand(weight.shape, generator=draw) - 0.5
        weight.copy_((new * 1024).round() / 1024)
    return model.eval()


def refusal(folder: Path, **changes: Any) -> str:
    """Why a folder is refused when fields of its config.json have other values; "a.b" is a field within a."""
    config_json = files.read_json(folder / "config.json")
    for name, value in changes.items():
        *outer, last = name.split(".")
        inner = config_json
        for part in outer:
            inner = inner[part]
        inner[last] = value
    with weights_in(folder) as weights, pytest.raises(ForeignError) as error:
        foreign.read(config_json, weights, "config.json")
    return str(error.value)
