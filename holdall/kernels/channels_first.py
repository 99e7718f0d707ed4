"""Linear layers between channels-last tensors (B, T, D) and channels-first tensors (E, B, T).

    into:   u_EBT = W_ED x_BTD        out of:   y_BTE = W_ED v_DBT

Products along time, such as long convolutions, need the times of a channel contiguous; everything else needs
the channels of a token contiguous. cuBLAS is equally fast with both layouts, so the change is free if each
product, also of the gradients, is computed in the layout in which it is needed. PyTorch would return the
gradient of a transposed operand transposed, and the next operation would copy it.

Letters: M members (1 outside of `vmap`), B row, T time, D channels read, E channels written.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdall.kernels import register_batch_vmap

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float


def into_channels(x_BTD: Float[Tensor, "b t d"], weight_ED: Float[Tensor, "e d"]) -> Float[Tensor, "e b t"]:
    """`F.linear` without bias, with channels-first output. Like F.linear, in the dtype of autocast."""
    return _into(*(each[None] for each in _autocast(x_BTD, weight_ED)))[0]


def out_of_channels(
    v_DBT: Float[Tensor, "d b t"], weight_ED: Float[Tensor, "e d"], bias_E: Float[Tensor, "e"] | None
) -> Float[Tensor, "b t e"]:
    """`F.linear` with channels-first input. Like F.linear, in the dtype of autocast."""
    y_BTE = _out_of(*(each[None] for each in _autocast(v_DBT, weight_ED)))[0]
    return y_BTE if bias_E is None else y_BTE + bias_E.to(y_BTE.dtype)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(kind)) for each in tensors)


@torch.library.custom_op("holdall::into_channels", mutates_args=())
def _into(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(weight, x.flatten(1, 2).mT).unflatten(2, x.shape[1:3])


@_into.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1], *x.shape[1:3]))


@torch.library.custom_op("holdall::out_of_channels", mutates_args=())
def _out_of(v: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(v.flatten(2).mT, weight.mT).unflatten(1, v.shape[2:])


@_out_of.register_fake
def _(v: Tensor, weight: Tensor) -> Tensor:
    return v.new_empty((v.shape[0], *v.shape[2:], weight.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _into_gradients(ctx: Any, du: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return _out_of(du, weight.mT), torch.bmm(du.flatten(2), x.flatten(1, 2))


def _out_of_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    v, weight = ctx.saved_tensors
    return _into(dy, weight.mT), torch.bmm(dy.flatten(1, 2).mT, v.flatten(2).mT)


_into.register_autograd(_into_gradients, setup_context=_save)
_out_of.register_autograd(_out_of_gradients, setup_context=_save)
register_batch_vmap(_into)
register_batch_vmap(_out_of)
