"""What "bf16" means, the same in sweeps, training, scoring and generation.

    weights, their gradients, AdamW, checkpoints                    fp32
    embeddings, residual stream, last norm                          fp32
    a block's weights and activations                               bf16, on copies of the weights
    in a block: norms' statistics, softmax, recurrent states        fp32 or wider, as each mixer has it
    the head: its operands                                          bf16 where a kernel multiplies, else fp32
    the head: sums, logits, the loss                                fp32

So rounding does not accumulate along depth or along time: the sums over layers and over steps are kept in
fp32. It is not autocast, which would take the products of a mixer's wide states to bf16 too.

Blocks get their bf16 copies in one of three ways, with the same results:

    run_block       training a language model: a block's copies are made when it runs, and freed after it
    block_copies    training a population: weights as a mapping, which may be those of many models under vmap
    compute_in      scoring and generation: the weights of a model that is only read are replaced for good

FSDP makes the copies of `run_block` itself (holdall/training/devices.py). "fp32" is all weights as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from holdall.contract import recurrent_dtype
from holdall.model import Model
from holdall.settings import Precision


def dtype_of(precision: Precision) -> torch.dtype | None:
    """The dtype of the blocks' copies; None where weights are used as they are."""
    return torch.bfloat16 if precision == "bf16" else None


def choose_forms(model: Model, dtype: torch.dtype | None) -> None:
    """Let each mixer choose its form for the device it is on and the dtype that its block computes in."""
    for mixer in model.mixers:
        mixer.form = mixer.config.resolved_form(model.embed.weight.device, dtype or torch.float32)


def compute_in(dtype: torch.dtype, model: Model) -> Model:
    """The model itself, its blocks' weights and buffers in a dtype, its other weights at least fp32.

    For a model that is only read: the weights lose their digits.
    """
    for part, own in ((model, recurrent_dtype(dtype)), *((block, dtype) for block in model.blocks)):
        # as `Module.to` does it, which would make complex weights real
        part._apply(lambda tensor, own=own: tensor.to(own) if tensor.is_floating_point() else tensor)
    choose_forms(model, dtype)
    return model


def block_copies(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A model's weights and buffers by name, those of its blocks in a dtype."""
    return {
        name: w.to(dtype) if name.startswith("blocks.") and w.is_floating_point() else w
        for name, w in weights.items()
    }


def run_block(block: nn.Module, dtype: torch.dtype | None, r: Tensor, **options: Any) -> Any:
    """Call a block on copies of its weights and buffers in a dtype; the residual stream `r` stays wide."""
    if dtype is None:
        return block(r, **options)
    own = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    names = [name for name, w in own.items() if w.is_floating_point() and w.dtype != dtype]
    copies = _Copies.apply([dtype] * len(names), *(own[name] for name in names))
    return functional_call(block, {**own, **dict(zip(names, copies, strict=True))}, (r,), options)


class _Copies(torch.autograd.Function):
    """Tensors in other dtypes, all by one kernel, and their gradients back likewise: a block has many."""

    @staticmethod
    def forward(ctx: Any, dtypes: Sequence[torch.dtype], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        copies = [
            torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)
        ]
        if copies:
            torch._foreach_copy_(copies, list(tensors))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        copies = _Copies.apply([ctx.dtypes[i] for i in there], *(gradients[i] for i in there))
        given = dict(zip(there, copies, strict=True))
        return None, *(given.get(i) for i in range(len(gradients)))
