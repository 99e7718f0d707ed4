"""One token of Taylor linear attention: features, state, output and normaliser in one launch.

    S += phi(k) v^T      z += phi(k)      y = phi(q) S / (phi(q) . z + eps)

with phi and the packed order of its features as in holdall.ops.linear_attention: F = 1 + K + K (K + 1) / 2.
Each feature is a weight times a product of two entries of [1, x], so a table of F pairs of indices is enough
to compute features where they are used; they are never stored.

One program handles one head of a row: it reads z, adds phi(k), computes the normaliser, and writes z; then it
loops over blocks of features of S, updates and writes them, and accumulates y. No other program reads these
elements, so the state can be updated in place.

S must be read and written: 2 F V elements per row and head. 128 rows, 16 heads, V = 112, K = 16 in fp32 are
281 MB, 0.093 ms at 3.02 TB/s, and half of it in bf16; q, k, v, y and z are 2 % of that. Operations: 4 F V per
row and head, which is negligible.

S may be bf16: it is updated in fp32 and rounded to nearest once per token. z is at least fp32: its first
entry counts the tokens, and in bf16 it would stop at 256. S itself stops growing where a token adds less than
1/512 of its value. Error of y against fp64, token by token (K = 16, V = 64, standard normal; in brackets with
values whose mean equals their standard deviation): 1.4 % (1.3 %) after 256 tokens, 3.0 % (27 %) after
1024, 6.0 % (66 %) after 4096, 12 % (87 %) after 16384. In fp32 it is 2e-6 after 16384, either way.

Letters: B row, H heads, K key dim, V value dim, F features.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import overlapped, register_batch_vmap
from holdall.kernels.language import narrow, wait_for_inputs

MAX_KEY_DIM = 32
"""Most key dimensions for which the F features of a head fit into one block."""


@triton.jit
def _feature(x_ptr, i, j, weight):
    """weight x_i x_j, where x_0 stands for 1."""
    x_i = tl.load(x_ptr + i - 1, mask=i > 0, other=1.0).to(tl.float32)
    x_j = tl.load(x_ptr + j - 1, mask=j > 0, other=1.0).to(tl.float32)
    return weight * x_i * x_j


@triton.jit
def _indices(table_ptr, weight_ptr, f, F: tl.constexpr):
    """The indices of each feature's two factors in [1, x], and its weight, 0 beyond the last feature."""
    pair = tl.load(table_ptr + f, mask=f < F, other=0)
    return pair % 64, pair // 64, tl.load(weight_ptr + f, mask=f < F, other=0.0)


@triton.jit
def _normaliser(
    q_ptr, k_ptr, z, next_z_ptr, table_ptr, weight_ptr, at, F: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """phi(q) . z for the updated z, which is stored."""
    f = tl.arange(0, BLOCK_F)
    i, j, weight = _indices(table_ptr, weight_ptr, f, F)
    z += _feature(k_ptr, i, j, weight)
    norm = tl.sum(_feature(q_ptr, i, j, weight) * z, 0)
    # a thread may read what another one stores: all must have read before the first writes
    tl.debug_barrier()
    tl.store(next_z_ptr + at + f, z, mask=f < F)
    return norm


@triton.jit(do_not_specialize=["H"])
def _step_kernel(
    q_ptr, k_ptr, v_ptr, s_ptr, z_ptr, y_ptr, next_s_ptr, next_z_ptr, table_ptr, weight_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, eps, H,
    F: tl.constexpr, V: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPPED)
    row_head = tl.program_id(0).to(tl.int64)
    b, h = row_head // H, row_head % H
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    s_ptr += row_head * F * V
    next_s_ptr += row_head * F * V

    # z is loaded while S is read; the rest of the normaliser is computed after that
    f_z = tl.arange(0, BLOCK_F)
    z = tl.load(z_ptr + row_head * F + f_z, mask=f_z < F, other=0.0)
    norm = eps
    for first in tl.static_range(0, V, BLOCK_V):
        d = first + tl.arange(0, BLOCK_V)
        v = tl.load(v_ptr + d, mask=d < V, other=0.0).to(tl.float32)
        y = tl.zeros((TILE, BLOCK_V), tl.float32)
        for start in tl.range(0, F, TILE, num_stages=STAGES):
            f = start + tl.arange(0, TILE)
            at = f[:, None] * V + d[None, :]
            mask = (f < F)[:, None] & (d < V)[None, :]
            s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
            i, j, weight = _indices(table_ptr, weight_ptr, f, F)
            s += _feature(k_ptr, i, j, weight)[:, None] * v[None, :]
            y += _feature(q_ptr, i, j, weight)[:, None] * s
            tl.store(next_s_ptr + at, narrow(s, next_s_ptr.dtype.element_ty), mask=mask)
        if first == 0:
            norm += _normaliser(q_ptr, k_ptr, z, next_z_ptr, table_ptr, weight_ptr, row_head * F, F, BLOCK_F)
        y_V = tl.sum(y, 0) / norm
        tl.store(y_ptr + row_head * V + d, narrow(y_V, y_ptr.dtype.element_ty), mask=d < V)


@functools.cache
def _features(key_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each feature, the indices of its factors in [1, x] as i + 64 j, and its weight."""
    one, own = torch.zeros(1, dtype=torch.int32), torch.arange(1, key_dim + 1, dtype=torch.int32)
    i, j = torch.triu_indices(key_dim, key_dim, offset=1, dtype=torch.int32) + 1
    table = torch.cat((one, own, own + 64 * own, i + 64 * j))
    weights = (1.0, key_dim**-0.25, (2 * key_dim) ** -0.5, key_dim**-0.5)
    sizes = (1, key_dim, key_dim, key_dim * (key_dim - 1) // 2)
    weight = torch.cat([torch.full((n,), w) for w, n in zip(weights, sizes, strict=True)])
    return table.to(device), weight.to(device)


def _config(value_dim: int) -> dict[str, int]:
    """Tiles of at least as many elements as threads, so that each element of S belongs to one thread."""
    block = min(128, max(16, triton.next_power_of_2(value_dim)))
    return {"BLOCK_V": block, "TILE": 2048 // block, "STAGES": 4, "num_warps": 4}


def _launch(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, s: Tensor, z: Tensor, next_s: Tensor, next_z: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """Returns y; writes the next state to the given tensors, which may be the state itself."""
    batch, _, heads, key_dim = q_B1HK.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_B1HK, k_B1HK, v_B1HV))
    y_B1HV = v.new_empty(v.shape)
    features, value_dim = s.shape[2:]
    strides = (stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2)))
    _step_kernel[(batch * heads,)](
        q, k, v, s, z, y_B1HV, next_s, next_z, *_features(key_dim, s.device), *strides, eps, heads,
        F=features, V=value_dim, BLOCK_F=triton.next_power_of_2(features),
        **_config(value_dim), **overlapped(s.device),
    )  # fmt: skip
    return y_B1HV


@torch.library.custom_op("holdall::taylor_step", mutates_args=())
def _step(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, s_BHFV: Tensor, z_BHF: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    s, z = s_BHFV.contiguous(), z_BHF.contiguous()
    next_s, next_z = torch.empty_like(s), torch.empty_like(z)
    return _launch(q_B1HK, k_B1HK, v_B1HV, s, z, next_s, next_z, eps), next_s, next_z


@_step.register_fake
def _(q_B1HK, k_B1HK, v_B1HV, s_BHFV, z_BHF, eps):
    after = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (s_BHFV, z_BHF))
    return v_B1HV.new_empty(v_B1HV.shape), *after


register_batch_vmap(_step)


@torch.library.custom_op("holdall::taylor_step_inplace", mutates_args=("s_BHFV", "z_BHF"))
def _step_inplace(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, s_BHFV: Tensor, z_BHF: Tensor, eps: float
) -> Tensor:
    return _launch(q_B1HK, k_B1HK, v_B1HV, s_BHFV, z_BHF, s_BHFV, z_BHF, eps)


@_step_inplace.register_fake
def _(q_B1HK, k_B1HK, v_B1HV, s_BHFV, z_BHF, eps):
    return v_B1HV.new_empty(v_B1HV.shape)


def taylor_step(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    s_BHFV: Tensor,
    z_BHF: Tensor,
    *,
    eps: float = 1e-12,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`holdall.ops.linear_attention` for one token, with the Taylor map and normalised; without gradients.

    Args:
        s_BHFV: fp32 or bf16.
        z_BHF: fp32.
        inplace: update the state in place.

    Returns:
        y_B1HV in the dtype of v, and the next s and z in their own dtypes.

    Raises:
        KernelError: no kernel can run on these tensors, or for this many key dimensions.
    """
    forms.require_kernel(q_B1HK, k_B1HK, v_B1HV, s_BHFV, z_BHF)
    if q_B1HK.shape[-1] > MAX_KEY_DIM:
        raise forms.KernelError(
            f"the kernel takes at most {MAX_KEY_DIM} key dimensions, not {q_B1HK.shape[-1]}"
        )
    if inplace and s_BHFV.is_contiguous() and z_BHF.is_contiguous():
        return _step_inplace(q_B1HK, k_B1HK, v_B1HV, s_BHFV, z_BHF, eps), s_BHFV, z_BHF
    return _step(q_B1HK, k_B1HK, v_B1HV, s_BHFV, z_BHF, eps)
