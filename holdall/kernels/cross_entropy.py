"""Cross-entropy of a linear head on a GPU, for one model or for a population, each member with its own head.

    loss = mean_n ( logsumexp_v s_nv - s_n,target(n) )        s_nv = h_n . e_v
    d loss / d h_n = ( sum_v p_nv e_v - e_target(n) ) / N     p_nv = exp(s_nv - logsumexp_v s_nv)
    d loss / d e_v = sum_n ( p_nv - [v = target(n)] ) h_n / N

Letters: M members, N predictions, D model width, V vocabulary; R, K and W are N, D and V padded to whole
tiles, S parts of a row of tiles, C predictions per chunk.

Up to width 256, in bf16 and fp16, logits are never stored (`_fused`). The gradient of h is softmax attention
with queries h and keys and values e, so one pass over the vocabulary with a running maximum and sum gives
logsumexp, the argmax and sum_v p_nv e_v together. The gradient of the head needs the final logsumexp: a
second pass, over the predictions, which recomputes the logits. If predictions, or vocabulary, are too few to
fill the GPU, several programs share a row of tiles and another launch combines their parts in a fixed order,
without atomics, so that results are deterministic.

    operations   4 products of 2 N V D: logits and sum_v p e in one pass, logits and sum_n p h in the next
    bytes        h twice, e twice, both gradients once: megabytes where the logits would be gigabytes

Storing p between the passes would save one product of four, but writes and reads 4 N V bytes, which takes
longer than the product up to width 256. Beyond it, and in fp32, where tensor cores cannot be used and library
products are faster than ours, `_in_chunks` does store it: three library products per chunk of predictions and
a kernel that turns a chunk's logits, in fp32, into p - [v = target]. Memory is bounded by the chunk.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import require_kernel
from holdall.kernels import cdiv, register_batch_vmap
from holdall.kernels.language import dot, narrow
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int

FUSED_WIDTH = 256
"""Largest width for which a program can hold a tile and an accumulator."""
CHUNK_LOGITS = 1 << 28
"""Logits per chunk in the wide form; with fewer, products would have too few rows."""
ROWS_FUSED = {64: (128, 64, 4, 3), 128: (64, 128, 4, 3), 256: (128, 64, 8, 3)}
"""First pass: from padded width to predictions and vocabulary per tile, warps and stages."""
VOCAB_FUSED = {64: (64, 128, 4, 3), 128: (64, 128, 4, 2), 256: (128, 64, 8, 3)}
"""Second pass: from padded width to vocabulary and predictions per tile, warps and stages."""
MERGE_ROWS = 32
SCALE_BLOCK = 2048
WHOLE = 128
"""Operands are padded to whole blocks and tiles of all of these, so that loads in loops need no masks."""
SOFTMAX = (8192, 16)
"""Logits per step, and warps, of a program that turns a row of logits into probabilities."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SHIFT = tl.constexpr(10.0)
SCALE = tl.constexpr(1024.0)
"""2^SHIFT: probabilities are scaled by this, so that small ones do not underflow in fp16."""


def linear_cross_entropy(
    h_ND: Float[Tensor, "n d"], head_VD: Float[Tensor, "v d"], target_N: Int[Tensor, "n"]
) -> tuple[Float[Tensor, ""], Bool[Tensor, "n"]]:
    """The mean loss in nats and whether each prediction is right, as in `holdall.ops.cross_entropy`.

    Under autocast both operands are cast to its dtype, and gradients have the operands' own dtypes; the loss
    is fp32. If gradients are enabled, they are computed in the forward, so disable them for evaluation. A
    target outside of the vocabulary makes the loss NaN.

    Raises:
        KernelError: no kernel can run on these tensors.
        ValueError: h and head have different dtypes, and there is no autocast to say which is meant.
    """
    require_kernel(h_ND, head_VD)
    dtype = h_ND.dtype
    if torch.is_autocast_enabled(h_ND.device.type):
        dtype = torch.get_autocast_dtype(h_ND.device.type)
    elif head_VD.dtype != dtype:
        raise ValueError(
            f"h is {dtype} and head is {head_VD.dtype}: convert one, or run under torch.autocast"
        )
    loss_1, right_1N, *_ = _op(h_ND[None], head_VD[None], target_N[None], dtype, torch.is_grad_enabled())
    return loss_1[0], right_1N[0]


@torch.library.custom_op("holdall::linear_cross_entropy_forward", mutates_args=())
def _op(
    h: Tensor, head: Tensor, target: Tensor, dtype: torch.dtype, want_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss_M, right_MN, and N times the gradients of h_MND and head_MVD, or empty tensors without them."""
    loss_MN = h.new_empty(target.shape, dtype=torch.float32)
    right_MN, grad_h_MND, grad_head_MVD = _empty_results(h, head, target, dtype, want_grads)
    scheme = _fused if dtype.itemsize == 2 and h.shape[-1] <= FUSED_WIDTH else _in_chunks
    scheme(h, head, target.contiguous(), dtype, want_grads, loss_MN, right_MN, grad_h_MND, grad_head_MVD)
    return loss_MN.mean(1), right_MN, grad_h_MND, grad_head_MVD


def _empty_results(
    h: Tensor, head: Tensor, target: Tensor, dtype: torch.dtype, want_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for right_MN and the gradients, which are fp32 where the operands' dtype may overflow."""
    kept = torch.bfloat16 if h.dtype == dtype == torch.bfloat16 else torch.float32
    return (
        target.new_empty(target.shape, dtype=torch.bool),
        h.new_empty(h.shape if want_grads else (h.shape[0], 0), dtype=kept),
        head.new_empty(head.shape if want_grads else (h.shape[0], 0), dtype=torch.float32),
    )


@_op.register_fake
def _(h: Tensor, head: Tensor, target: Tensor, dtype: torch.dtype, want_grads: bool) -> tuple[Tensor, ...]:
    return h.new_empty(h.shape[0], dtype=torch.float32), *_empty_results(h, head, target, dtype, want_grads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, head, *_ = inputs
    loss, right, grad_h, grad_head = output
    ctx.mark_non_differentiable(right, grad_h, grad_head)
    ctx.set_materialize_grads(False)  # otherwise zeros of the gradients' size would be allocated for these
    ctx.save_for_backward(loss, grad_h, grad_head)
    ctx.dtypes = h.dtype, head.dtype


def _backward(ctx: Any, grad_loss_M: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss_M is None:
        return None, None, None, None, None
    loss_M, grad_h, grad_head = ctx.saved_tensors
    count, grad_loss_M = grad_h.shape[1], grad_loss_M.contiguous()
    h_dtype, head_dtype = ctx.dtypes
    return (
        _scaled_op(grad_h, grad_loss_M, loss_M, count, h_dtype),
        _scaled_op(grad_head, grad_loss_M, loss_M, count, head_dtype),
        None,
        None,
        None,
    )


_op.register_autograd(_backward, setup_context=_setup)
register_batch_vmap(_op)


@once_differentiable("F.cross_entropy of all logits")
@torch.library.custom_op("holdall::linear_cross_entropy_scaled", mutates_args=())
def _scaled_op(grad: Tensor, grad_loss: Tensor, loss: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """grad_MRD grad_loss_M / count in a dtype, in one pass where PyTorch's product needs two.

    It depends on h and head as the loss does; the loss is an argument so that autograd knows that.
    """
    out = torch.empty_like(grad, dtype=dtype)
    size = grad[0].numel()
    _scale_kernel[cdiv(size, SCALE_BLOCK), len(grad)](grad, grad_loss, out, size, count, BLOCK=SCALE_BLOCK)
    return out


@_scaled_op.register_fake
def _(grad: Tensor, grad_loss: Tensor, loss: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


register_batch_vmap(_scaled_op)


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(grad_ptr, grad_loss_ptr, out_ptr, size, count, BLOCK: tl.constexpr):
    member = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + member * size + at, mask=at < size).to(tl.float32)
    scaled = narrow(grad * (tl.load(grad_loss_ptr + member) / count), out_ptr.dtype.element_ty)
    tl.store(out_ptr + member * size + at, scaled, mask=at < size)


def _operand(x: Tensor, dtype: torch.dtype, multiple: int, width: int) -> Tensor:
    """x_MRD in a dtype, padded with zeros to a multiple in R and to a width in D; x itself if it fits."""
    members, rows, _ = x.shape
    whole = multiple * cdiv(rows, multiple)
    if (whole, width) == x.shape[1:]:
        return x.to(dtype).contiguous()
    out = torch.zeros((members, whole, width), dtype=dtype, device=x.device)
    out[:, :rows, : x.shape[2]] = x
    return out


# ------------------------------------------------------------------------------------ without stored logits


def _fused(
    h: Tensor,
    head: Tensor,
    target_MN: Tensor,
    dtype: torch.dtype,
    want_grads: bool,
    loss_MN: Tensor,
    right_MN: Tensor,
    grad_h_MND: Tensor,
    grad_head_MVD: Tensor,
) -> None:
    (members, count, width), vocab = h.shape, head.shape[1]
    empty = partial(torch.empty, dtype=torch.float32, device=h.device)
    padded = max(64, triton.next_power_of_2(width))
    h_MRK, head_MWK = _operand(h, dtype, WHOLE, padded), _operand(head, dtype, WHOLE, padded)
    rows, words = h_MRK.shape[1], head_MWK.shape[1]

    block, tile, warps, stages = ROWS_FUSED[padded]
    tiles = cdiv(vocab, tile)  # no tile may be entirely beyond the vocabulary: it would have no maximum
    splits, tiles_each = _split(members * rows // block, tiles, warps, h.device)
    top_SMR, sum_SMR = empty((2, splits, members, rows))
    guess_SMR = empty((splits, members, rows), dtype=torch.int32)
    mean_SMRK = empty((splits, members, rows, padded) if want_grads else 0)
    _rows_kernel[rows // block, splits, members](
        h_MRK, head_MWK, top_SMR, sum_SMR, guess_SMR, mean_SMRK, rows, vocab, words, tiles, tiles_each,
        PADDED=padded, BLOCK=block, TILE=tile, EVEN=vocab % tile == 0, WANT_GRADS=want_grads,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    log_sum_MR, place_MR = empty((members, rows)), empty((members, rows), dtype=torch.int32)
    _merge_kernel[rows // MERGE_ROWS, members](
        h_MRK, head_MWK, target_MN, top_SMR, sum_SMR, guess_SMR, mean_SMRK,
        loss_MN, right_MN, log_sum_MR, place_MR, grad_h_MND, count, rows, vocab, words, splits,
        WIDTH=width, PADDED=padded, BLOCK=MERGE_ROWS, WANT_GRADS=want_grads, num_warps=4,
    )  # fmt: skip
    if want_grads:
        block, tile, warps, stages = VOCAB_FUSED[padded]
        splits, tiles_each = _split(members * words // block, rows // tile, warps, h.device)
        parts = grad_head_MVD[None] if splits == 1 else empty((splits, *head.shape))
        _vocab_kernel[words // block, splits, members](
            h_MRK, head_MWK, place_MR, log_sum_MR, parts, rows, vocab, words, rows // tile, tiles_each,
            WIDTH=width, PADDED=padded, BLOCK=block, TILE=tile, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            torch.sum(parts, 0, out=grad_head_MVD)


def _split(programs: int, tiles: int, warps: int, device: torch.device) -> tuple[int, int]:
    """The number of programs that share a row of tiles, and the number of tiles of each.

    It minimises the tiles that are processed in sequence, where combining each part costs about one tile. A
    multiprocessor runs 8 warps at a time, which is all that the registers allow.
    """
    at_once = 4  # in the interpreter
    if device.type == "cuda":
        at_once = torch.cuda.get_device_properties(device).multi_processor_count * 8 // warps
    most = min(cdiv(tiles, 4), 4 * cdiv(at_once, programs))
    parts = min(range(1, most + 1), key=lambda n: cdiv(programs * n, at_once) * cdiv(tiles, n) + n)
    each = cdiv(tiles, parts)
    return cdiv(tiles, each), each


@triton.jit
def _tile(ptr, row, PADDED: tl.constexpr):
    return tl.load(ptr + (row[:, None] * PADDED + tl.arange(0, PADDED)[None, :]))


@triton.jit(do_not_specialize=["rows", "tiles_each"])
def _rows_kernel(
    h_ptr, head_ptr, top_ptr, sum_ptr, guess_ptr, mean_ptr, rows, vocab, words, tiles, tiles_each,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    EVEN: tl.constexpr, WANT_GRADS: tl.constexpr,
):  # fmt: skip
    """One block of predictions over one part of the vocabulary: maximum and argmax, sum, sum of p e."""
    split, member = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = _tile(h_ptr + member * rows * PADDED, row, PADDED)
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, tiles).to(tl.int32)
    head_ptr += (member * words + first * TILE) * PADDED

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    guess = tl.zeros((BLOCK,), tl.int32)
    mean = tl.zeros((BLOCK, PADDED), tl.float32)
    lane = tl.arange(0, TILE)
    for tile in range(first.to(tl.int32), last):
        e = _tile(head_ptr, lane, PADDED)
        head_ptr += TILE * PADDED
        s = dot(h, tl.trans(e))
        if not EVEN:
            s = tl.where(tile * TILE + lane[None, :] < vocab, s, float("-inf"))
        tile_top = tl.max(s, 1)
        # the first of equal ones, found by comparison, which is faster than an argmax
        place = tl.min(tl.where(s == tile_top[:, None], lane[None, :], TILE), 1)
        guess = tl.where(tile_top > top, tile * TILE + place, guess)
        new_top = tl.maximum(top, tile_top)
        p = tl.exp2(s * LOG2E - (new_top * LOG2E)[:, None])
        fade = tl.exp2((top - new_top) * LOG2E)
        total = total * fade + tl.sum(p, 1)
        if WANT_GRADS:
            mean = dot(narrow(p, e.dtype), e, mean * fade[:, None])
        top = new_top

    at = (split * tl.num_programs(2) + member) * rows + row
    tl.store(top_ptr + at, top)
    tl.store(sum_ptr + at, total)
    tl.store(guess_ptr + at, guess)
    if WANT_GRADS:
        tl.store(mean_ptr + (at[:, None] * PADDED + tl.arange(0, PADDED)[None, :]), mean)


@triton.jit(do_not_specialize=["count", "rows", "splits"])
def _merge_kernel(
    h_ptr, head_ptr, target_ptr, top_ptr, sum_ptr, guess_ptr, mean_ptr,
    loss_ptr, right_ptr, log_sum_ptr, place_ptr, grad_ptr, count, rows, vocab, words, splits,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, WANT_GRADS: tl.constexpr,
):  # fmt: skip
    """Combine the parts of the vocabulary: loss, gradient of h, and each row's data for the second pass.

    These are log2 of the sum, less SHIFT, and the target. Rows beyond `count` are zeros and contribute
    nothing.
    """
    member = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < count
    at = member * rows + row
    step = tl.num_programs(1).to(tl.int64) * rows

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    guess = tl.zeros((BLOCK,), tl.int32)
    for split in range(splits):
        part = tl.load(top_ptr + split * step + at)
        guess = tl.where(part > top, tl.load(guess_ptr + split * step + at), guess)
        top = tl.maximum(top, part)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, PADDED), tl.float32)
    for split in range(splits):
        fade = tl.exp2((tl.load(top_ptr + split * step + at) - top) * LOG2E)
        total += fade * tl.load(sum_ptr + split * step + at)
        if WANT_GRADS:
            mean += fade[:, None] * _tile(mean_ptr, split * step + at, PADDED)

    target = tl.load(target_ptr + member * count + row, mask=here, other=-1).to(tl.int64)
    known = (target >= 0) & (target < vocab)
    h = _tile(h_ptr, at, PADDED).to(tl.float32)
    e = _tile(head_ptr, member * words + tl.where(known, target, 0), PADDED).to(tl.float32)
    picked = tl.where(known, tl.sum(h * e, 1), float("nan"))
    log_sum = top * LOG2E + tl.log2(total)
    tl.store(loss_ptr + member * count + row, log_sum * LN2 - picked, mask=here)
    tl.store(right_ptr + member * count + row, guess == target, mask=here)
    tl.store(log_sum_ptr + at, log_sum - SHIFT)
    tl.store(place_ptr + at, target.to(tl.int32))
    if WANT_GRADS:
        d = tl.arange(0, PADDED)
        grad = narrow(mean / total[:, None] - e, grad_ptr.dtype.element_ty)
        grad_at = (member * count + row)[:, None] * WIDTH + d[None, :]
        tl.store(grad_ptr + grad_at, grad, mask=here[:, None] & (d[None, :] < WIDTH))


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_each"])
def _vocab_kernel(
    h_ptr, head_ptr, place_ptr, log_sum_ptr, grad_ptr, rows, vocab, words, tiles, tiles_each,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One block of the vocabulary over one part of the predictions: sum over n of (p - one-hot) h."""
    split, member = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = _tile(head_ptr + member * words * PADDED, v.to(tl.int64), PADDED)
    first = split * tiles_each
    start = member * rows + first * TILE
    h_ptr += start * PADDED
    log_sum_ptr += start
    place_ptr += start

    grad = tl.zeros((BLOCK, PADDED), tl.float32)
    lane = tl.arange(0, TILE)
    for _ in range(first.to(tl.int32), tl.minimum(first + tiles_each, tiles).to(tl.int32)):
        h = _tile(h_ptr, lane, PADDED)
        log_sum = tl.load(log_sum_ptr + lane)
        place = tl.load(place_ptr + lane)
        h_ptr += TILE * PADDED
        log_sum_ptr += TILE
        place_ptr += TILE
        s = dot(e, tl.trans(h))
        p = tl.exp2(s * LOG2E - log_sum[None, :])
        p = tl.where(v[:, None] == place[None, :], p - SCALE, p)
        grad = dot(narrow(p, h.dtype), h, grad)
    d = tl.arange(0, PADDED)
    tl.store(
        grad_ptr + ((split * tl.num_programs(2) + member) * vocab + v[:, None]) * WIDTH + d[None, :],
        grad / SCALE,
        mask=(v[:, None] < vocab) & (d[None, :] < WIDTH),
    )


# ---------------------------------------------------------------------------------------- logits in chunks


def _in_chunks(
    h: Tensor,
    head: Tensor,
    target_MN: Tensor,
    dtype: torch.dtype,
    want_grads: bool,
    loss_MN: Tensor,
    right_MN: Tensor,
    grad_h_MND: Tensor,
    grad_head_MVD: Tensor,
) -> None:
    (members, count, width), vocab = h.shape, head.shape[1]
    empty = partial(torch.empty, dtype=torch.float32, device=h.device)
    # with an odd vocabulary library products take three times as long
    h_MND, head_MWD = _operand(h, dtype, 1, width), _operand(head, dtype, 16, width)
    words = head_MWD.shape[1]
    chunk = cdiv(count, cdiv(count * members * words, CHUNK_LOGITS))
    logits_MCW = empty((members, chunk, words))
    p_MCW = logits_MCW if dtype == torch.float32 else torch.empty_like(logits_MCW, dtype=dtype)
    grad_head_MWD = grad_head_MVD
    if want_grads and words != vocab:
        grad_head_MWD = empty((members, words, width))
    for start in range(0, count, chunk):
        h_MCD = h_MND[:, start : start + chunk]
        logits, p = logits_MCW[:, : h_MCD.shape[1]], p_MCW[:, : h_MCD.shape[1]]
        _product(h_MCD, head_MWD.mT, logits)
        _softmax_kernel[h_MCD.shape[1], members](
            logits, p, target_MN, loss_MN, right_MN, start, count, vocab, words, chunk * words,
            BLOCK=min(SOFTMAX[0], triton.next_power_of_2(words)), WANT_GRADS=want_grads, num_warps=SOFTMAX[1],
        )  # fmt: skip
        if want_grads:
            _product(p, head_MWD, grad_h_MND[:, start : start + chunk], alpha=1 / SCALE.value)
            _product(p.mT, h_MCD, grad_head_MWD, alpha=1 / SCALE.value, beta=int(start > 0))
    if grad_head_MWD is not grad_head_MVD:
        grad_head_MVD.copy_(grad_head_MWD[:, :vocab])


def _product(a: Tensor, b: Tensor, out: Tensor, *, alpha: float = 1.0, beta: int = 0) -> None:
    """out = beta out + alpha a @ b, batched, summed in fp32; out may be fp32 where the operands are not."""
    if out.dtype == a.dtype:
        torch.baddbmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif a.device.type == "cuda":
        torch.baddbmm(out, a, b, out.dtype, alpha=alpha, beta=beta, out=out)
    else:  # on a CPU there are no products of mixed dtypes
        torch.baddbmm(out, a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta, out=out)


@triton.jit(do_not_specialize=["start", "count", "chunk_words"])
def _softmax_kernel(
    logit_ptr, p_ptr, target_ptr, loss_ptr, right_ptr, start, count, vocab, words, chunk_words,
    BLOCK: tl.constexpr, WANT_GRADS: tl.constexpr,
):  # fmt: skip
    """One prediction: its loss, and SCALE (p - one-hot), which may overwrite its logits."""
    row, member = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = member * count + start + row
    logit_ptr += member * chunk_words + row * words
    p_ptr += member * chunk_words + row * words
    target = tl.load(target_ptr + at).to(tl.int32)
    # read before the reductions below, after whose barrier other warps may overwrite it
    known = (target >= 0) & (target < vocab)
    picked = tl.load(logit_ptr + target, mask=known, other=float("nan"))

    # a running maximum and sum per lane, combined once at the end
    v = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    guess = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab, BLOCK):
        s = tl.load(logit_ptr + first + v, mask=first + v < vocab, other=float("-inf"))
        guess = tl.where(s > top, first + v, guess)
        new_top = tl.maximum(tl.maximum(top, s), -1e30)
        total = total * tl.exp2((top - new_top) * LOG2E) + tl.exp2((s - new_top) * LOG2E)
        top = new_top
    best = tl.max(top, 0)
    total = tl.sum(total * tl.exp2((top - best) * LOG2E), 0)
    guess = tl.min(tl.where(top == best, guess, vocab), 0)

    tl.store(loss_ptr + at, (best - picked) + tl.log2(total) * LN2)
    tl.store(right_ptr + at, guess == target)
    if WANT_GRADS:
        # not from logsumexp, whose rounding error would be in every p of the row
        scale = SCALE / total
        for first in range(0, words, BLOCK):
            s = tl.load(logit_ptr + first + v, mask=first + v < vocab, other=float("-inf"))
            p = tl.exp2((s - best) * LOG2E) * scale
            p = tl.where(first + v == target, p - SCALE, p)
            tl.store(p_ptr + first + v, narrow(p, p_ptr.dtype.element_ty), mask=first + v < words)
