"""GPU kernels of the operations in holdall.ops, one file each, with a derivation of the work they must do.

The kernel of an op has the op's name, in a file of the same name, by which it is found
(`holdall.contract.forms.kernel_of`). The other files are parts of these: fla.py and the gradients beside it,
taylor.py, taylor_step.py, decayed_replay.py, toeplitz.py, channels_first.py and language.py.

A kernel is a PyTorch custom operation with the same signature as the operation, its own gradient and its own
rule for `vmap`, which folds the members of a population into the batch. These files are imported only when a
kernel is used. Tensors that a kernel does not support raise `holdall.contract.forms.KernelError`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def register_batch_vmap(op: Any) -> None:
    """Register a rule for `vmap` that enlarges the batch, the first dimension of all tensors."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        folded = [
            fold(arg, dim, info.batch_size) if isinstance(arg, Tensor) else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        out = op(*folded)
        if isinstance(out, Tensor):
            return unfold(out, info.batch_size), 0
        return tuple(unfold(each, info.batch_size) for each in out), (0,) * len(out)

    op.register_vmap(rule)


def fold(x: Tensor, dim: int | None, members: int) -> Tensor:
    """A population's tensors (M, B, ...) as one larger batch (M B, ...); shared ones are repeated."""
    x = x.expand(members, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def unfold(x: Tensor, members: int) -> Tensor:
    """The inverse of `fold`."""
    return x.unflatten(0, (members, -1))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(size: int) -> int:
    """A size padded for products of tiles: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def dense_last(x: Tensor) -> Tensor:
    """The tensor, or a copy of it, whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def overlapped(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel that begins by `wait_for_inputs`: options of the launch.

    On Hopper and later it is then launched while the kernel before it still runs, and waits there for its
    end, which saves most of the microsecond between two kernels ("programmatic dependent launch"). A step of
    decoding is hundreds of kernels of a few microseconds.
    """
    from holdall.kernels import language  # which needs Triton

    can = device.type == "cuda" and language.gdc_wait is not None and not torch.version.hip
    if not can or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAPPED": False}
    return {"OVERLAPPED": True, "launch_pdl": True}


def wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def alignment(size: int) -> int:
    """16 if the size is a multiple of 16, which allows loads and stores of 16 bytes, else 1.

    Kernels take sizes divided by this, so that they are compiled once for all multiples.
    """
    return 1 if size % 16 else 16
