"""Cross-entropy of a linear head, without ever holding all logits.

    loss_n = logsumexp_v(z_nv) - z_n,target(n)        z_nv = h_n . e_v

or with logits that are bounded, z_nv = c tanh(h_n . e_v / c), as Gemma has them.

Letters: h_n what the head reads for prediction n, e_v the head's row of token v, z_nv their logit, c its
bound. Of shapes: N predictions, D model width, V vocabulary, C predictions at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import KernelError, kernel_of
from holdall.ops.derivatives import once_differentiable


def capped(logits: Tensor, soft_cap: float) -> Tensor:
    """c tanh(logits / c); as they are for c = 0."""
    return (logits / soft_cap).tanh() * soft_cap if soft_cap else logits


def linear_cross_entropy_loop(
    h_ND: Tensor, head_VD: Tensor, target_N: Tensor, soft_cap: float = 0.0
) -> Tensor:
    """The definition: the losses of all predictions, in nats, (N,)."""
    return F.cross_entropy(capped(h_ND @ head_VD.T, soft_cap), target_N, reduction="none")


def linear_cross_entropy(
    h_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    *,
    soft_cap: float = 0.0,
    block: int | None = None,
    form: str = "parallel",
) -> tuple[Tensor, Tensor]:
    """The mean loss and whether each prediction is right, block by block.

    The gradient of softmax is made while a block of logits is still in cache, so forward and backward
    together read each logit twice and keep only gradients of the size of `h` and `head`.

    Args:
        soft_cap: bound of the logits, c; 0 for none.
        block: predictions whose logits exist at once; None for as many as make about 4 MB, which stay in a
            CPU's cache, or 256 MB on a GPU, which wants large products. The kernel has a size of its own.
        form: "parallel" or "kernel", which under autocast takes h and head in different dtypes, and has no
            soft cap.

    Returns:
        The mean loss, a scalar that carries gradients to h and head, and right_N, booleans.
    """
    if form == "kernel" and soft_cap:
        raise KernelError("the kernel of the cross-entropy has no soft cap; form 'parallel' has")
    if form == "kernel":
        return kernel_of(linear_cross_entropy)(h_ND, head_VD, target_N)
    logits = 1 << 26 if h_ND.device.type == "cuda" else 1 << 20
    block = block or max(32, logits // head_VD.shape[0])
    loss, right_N, *_ = _LinearCrossEntropy.apply(h_ND, head_VD, target_N, block, soft_cap)
    return loss, right_N


LOG_2 = math.log(2)


class _LinearCrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        h_ND: Tensor, head_VD: Tensor, target_N: Tensor, block: int, soft_cap: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses, rights, grads_h, steep, grad_head_VD = [], [], [], [], torch.zeros_like(head_VD)
        count = h_ND.shape[0]
        for start in range(0, count, block):
            h_CD, target_C = h_ND[start : start + block], target_N[start : start + block]
            # logits in units of log 2: on a CPU torch.exp can take several times as long as torch.exp2
            logit_CV = capped((h_CD / LOG_2) @ head_VD.T, soft_cap / LOG_2)
            top_C1, guess_C1 = logit_CV.max(-1, keepdim=True)
            picked_C1 = logit_CV.gather(1, target_C[:, None])
            p_CV = (logit_CV - top_C1).exp2_()
            sum_C1 = p_CV.sum(-1, keepdim=True)
            losses.append((sum_C1.log2() + top_C1 - picked_C1).squeeze(1) * LOG_2)
            rights.append(guess_C1.squeeze(1) == target_C)
            # d loss / d logit = softmax - one-hot, here with the mean's 1 / N; the one-hot part as gather and
            # scatter of rows, so that p is read only by the two products
            p_CV = p_CV * (1 / (count * sum_C1))
            row_CD, steep_CD = head_VD[target_C], h_CD
            if soft_cap:  # the slope of c tanh(z / c) is 1 - tanh^2
                slope_CV, slope_C1 = (1 - (z * (LOG_2 / soft_cap)).square() for z in (logit_CV, picked_C1))
                p_CV, row_CD, steep_CD = p_CV * slope_CV, row_CD * slope_C1, h_CD * slope_C1
            grads_h.append(p_CV @ head_VD - row_CD / count)
            grad_head_VD = torch.addmm(grad_head_VD, p_CV.T, h_CD)
            steep.append(steep_CD)
        steep_ND = torch.cat(steep) if soft_cap else h_ND
        grad_head_VD = grad_head_VD.index_add(0, target_N, steep_ND, alpha=-1 / count)
        return torch.cat(losses).mean(), torch.cat(rights), torch.cat(grads_h), grad_head_VD

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loss, right_N, grad_h_ND, grad_head_VD = output
        ctx.mark_non_differentiable(right_N, grad_h_ND, grad_head_VD)
        ctx.save_for_backward(loss, grad_h_ND, grad_head_VD)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None, None]:
        return *_Gradients.apply(grad_loss, *ctx.saved_tensors), None, None, None


@once_differentiable("F.cross_entropy of all logits, or linear_cross_entropy_loop")
class _Gradients(torch.autograd.Function):
    """The gradients of h and head times that of the loss; they depend on h and head as the loss does."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss: Tensor, loss: Tensor, grad_h_ND: Tensor, grad_head_VD: Tensor
    ) -> tuple[Tensor, Tensor]:
        return grad_loss * grad_h_ND, grad_loss * grad_head_VD
