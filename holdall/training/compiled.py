"""A model's blocks by torch.compile, and those that it fails on as they are.

What a compiler takes differs from one release of PyTorch and one device to the next: of complex numbers, say,
some programs compile on a CPU and not on a GPU. A model should train all the same, and say what runs how.
"""

from __future__ import annotations

from typing import Any

import torch

from holdall.contract import MixerConfig
from holdall.model import Block, Model
from holdall.precision import run_block

Kind = tuple[MixerConfig, bool, bool]
"""A block by what is compiled: its mixer, and whether later layers read what it shares, and it what an
earlier one shares."""


def compile_blocks(model: Model, rows: int, length: int, dtype: torch.dtype | None) -> dict[str, str]:
    """Compile each block for training on (rows, length) tokens, with its weights in a dtype or as they are.

    Every kind of block, which are those of equal layers, runs once, forward and backward. Where the compiler
    fails, mixers of that kind run without it, their MLPs and norms with it.

    Re-raises errors that also occur without the compiler.

    Returns:
        The mixers that run without it, by name, each with the first line of the error.
    """
    # equal layers share what was compiled; there are as many kinds as kinds of layers
    torch._dynamo.config.recompile_limit = max(64, 2 * len(model.blocks))
    failed: dict[Kind, str] = {}
    tried: set[Kind] = set()
    gives = set(model.shared_from.values())
    for depth, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        mixer = block.mixer
        kind = (mixer.config, depth in gives, depth in model.shared_from)
        block.compile(dynamic=False)
        new = kind not in tried
        if new:
            tried.add(kind)
            try:
                _once(block, kind, model, rows, length, dtype)
            except torch.OutOfMemoryError:
                raise  # it would need as much without the compiler
            except Exception as error:  # Dynamo, Inductor, Triton and drivers all have classes of their own
                failed[kind] = _why(error)
        if kind in failed:
            mixer.forward = torch.compiler.disable(mixer.forward)  # type: ignore[method-assign]
            block.compile(dynamic=False)  # again, around it
            if new:  # what fails without the compiler too is raised
                _once(block, kind, model, rows, length, dtype)
    return {config.name: why for (config, *_), why in failed.items()}


def _why(error: BaseException) -> str:
    """The cause in one line."""
    cause = getattr(error, "inner_exception", error)
    return ": ".join((type(cause).__name__, *str(cause).strip().splitlines()[:1]))


def _once(block: Block, kind: Kind, model: Model, rows: int, length: int, dtype: torch.dtype | None) -> None:
    """Forward and backward as in training."""
    _, gives, reads = kind
    device = model.device
    r_BTD = torch.zeros(rows, length, model.config.width, device=device, requires_grad=True)
    tokens_BT = torch.zeros(rows, length, dtype=torch.long, device=device)
    sharing: dict[str, Any] = {"want_shared": True} if gives else {}
    if reads:
        sharing["shared_BTD"] = torch.zeros_like(r_BTD, dtype=dtype).requires_grad_()
    y_BTD, _, *shared = run_block(
        block, dtype, r_BTD, tokens_BT=tokens_BT, at_BQ=None, want_state=False, **sharing
    )
    total = sum((u.sum() for u in shared), y_BTD.sum())
    torch.autograd.grad(total, [r_BTD, *block.parameters()], allow_unused=True)
