"""A training step's pass over a language model, on one device or on many.

    pass      in fp32, or in bf16 as holdall/precision.py says
    devices   one needs nothing more. Of several, Lightning Fabric starts the processes and joins their
              gradients: DDP, or FSDP (PyTorch's `fully_shard`), which makes the copies itself, by blocks

Letters: B rows, N = T + 1 tokens of a row, M masked tokens, D width.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from holdall.files import RunError
from holdall.model import Model, head_loss
from holdall.precision import run_block
from holdall.training.masking import Masked, mask_token

Fabric = Any
"""`OneProcess`, or lightning_fabric.Fabric, which is imported late: it is an optional dependency."""
Strategy = Literal["auto", "ddp", "fsdp"]


class SingleDeviceStrategy:
    """Nobody to start and nobody to wait for; under the name that Lightning Fabric has for it."""

    launcher = None


class OneProcess:
    """Of Lightning Fabric what training asks for, where one process trains on one device."""

    world_size, global_rank, is_global_zero = 1, 0, True

    def __init__(self, device: str) -> None:
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        self.strategy = SingleDeviceStrategy()

    def launch(self) -> None:
        """Nothing to start; on a GPU, make it the one that tensors and kernels go to."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def setup_module(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def all_reduce(self, tensor: Tensor, *, reduce_op: str) -> Tensor:
        """The mean, or the sum, over one process."""
        return tensor

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


def launcher(device: str = "cpu", devices: int = 1, strategy: Strategy = "auto", nodes: int = 1) -> Fabric:
    """What starts and joins the processes of a run; its `is_global_zero` tells the one that writes.

    "auto" is DDP where there is more than one device. Raises RunError if several are asked for and Lightning
    Fabric is missing.
    """
    world = devices * nodes
    if world == 1:
        return OneProcess(device)
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import ModelParallelStrategy
    except ImportError as error:
        raise RunError(
            f"training on {world} devices needs the package lightning-fabric ({error}): "
            "pip install lightning-fabric"
        ) from error
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    how: Any = "ddp"
    if strategy == "fsdp":
        how = ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)
    return Fabric(accelerator=device, devices=devices, num_nodes=nodes, strategy=how)


class LanguageModelLoss(nn.Module):
    """A model as the function that training differentiates: rows of tokens to the mean loss of the next one.

    Where the first P tokens see each other (`Model.prefix`), all next tokens that are predicted come after
    them, and some of them may be masked, to be filled in (holdall/training/masking.py).

    With `dtype` each block runs on copies of its weights in it. `recompute` runs a block once more in the
    backward pass, from its input; the copies are made once more too.
    """

    def __init__(self, model: Model, dtype: torch.dtype | None, recompute: bool) -> None:
        super().__init__()
        self.model, self.dtype, self.recompute = model, dtype, recompute
        self.first = max(model.prefix - 1, 0)
        """The first position that predicts: the last of a prefix, which has not seen what follows."""
        self.sharded = False
        """Whether FSDP makes the copies, and the blocks themselves run again."""

    def forward(self, rows_BN: Tensor, masked: Masked | None = None) -> Tensor:
        """The mean loss of next tokens, in nats, a scalar; with masked tokens (2,), the second of which is
        the mean loss of these times `masked.weight`."""
        tokens_BT, next_BT = rows_BN[:, :-1], rows_BN[:, 1:]
        if masked is not None:
            given_N, mask = tokens_BT.flatten(), mask_token(self.model.config)
            token_M = given_N[masked.index_M]
            tokens_BT = given_N.index_fill(0, masked.index_M, mask).view_as(tokens_BT)
        h_BTD, _ = self.model.hidden(tokens_BT, want_states=False, run=self._run)
        h_BTD = h_BTD if self.dtype is None else h_BTD.to(self.dtype)
        ntp = self._mean_loss(h_BTD[:, self.first :].flatten(0, 1), next_BT[:, self.first :].flatten())
        if masked is None:
            return ntp
        if not len(masked.index_M):
            return torch.stack((ntp, torch.zeros_like(ntp)))
        mlm = self._mean_loss(h_BTD.flatten(0, 1).index_select(0, masked.index_M), token_M)
        return torch.stack((ntp, mlm * masked.weight))

    def _mean_loss(self, h_ND: Tensor, target_N: Tensor) -> Tensor:
        return head_loss(h_ND, self.model.head_weight, target_N, self.model.config.soft_cap)[0]

    def _run(self, block: nn.Module, r: Tensor, state: None, **options: Any) -> tuple[Any, ...]:
        if self.sharded:
            return block(r, state, **options)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run_block, block, self.dtype, r, use_reentrant=False, **options)
        return run_block(block, self.dtype, r, **options)


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Each block's parameters over all devices, and the rest's; called by Fabric."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert isinstance(module, LanguageModelLoss)
    module.sharded = True
    policy = MixedPrecisionPolicy(
        param_dtype=module.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in module.model.blocks:
        if module.recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, mesh=mesh["data_parallel"], mp_policy=policy)
    fully_shard(module, mesh=mesh["data_parallel"])
    return module.to(mesh.device_type)


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or all of one whose parts lie on several devices, which then all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, or into this device's part of it."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(
            value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    tensor.copy_(value)
