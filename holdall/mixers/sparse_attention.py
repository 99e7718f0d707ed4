"""Input-dependent sparse attention: attention to a few past tokens, chosen by a learned score.

    z_t = w_key . x_t            kept_t = the `keys` tokens j <= t of largest z_j, the newer of equals
    a_t = sum_{j in kept_t} softmax_j(q_t . k_j / sqrt(K) + log sigmoid(z_j)) v_j,   H heads
    y_t = sigmoid(w_query . x_t) (W_o a_t + b)

Letters: x_t and y_t input and output of token t; j tokens up to t; z_t the score of a token; a_t attention's
output; q, k, v queries, keys and values of each of H heads; K their dimensions; w_key and w_query learned
vectors; W_o a learned map; b its bias.

The tokens kept at t + 1 are among those kept at t and the new one: a cache of `keys` slots is exact.
Arora et al., "Zoology", 2023, arXiv 2312.04927.
Weights map onto Zoology's SigmoidLookups: Wqkv is `project.qkv`, selecting is the first row of `select`,
out_proj. With w_key = 0 and `keys` at least the length this is its train form, less residual and loss.
Deviations:
- SigmoidLookups trains on full attention times sigmoid(w . x_t), and at test time keeps only the outputs
  where this is among the k largest of the whole sequence, which leaks the future and needs all keys. Here the
  choice is causal and the same in training and inference, and it is of keys, not of outputs, so that memory
  is bounded;
- the choice has its own score (`w_key`, second row of `select`), which is trained through log sigmoid(z); the
  auxiliary loss against too many lookups is not needed;
- with w_key = 0 and fewer keys it is a gated sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.mixers.attention import QKV
from holdall.ops.linear import wide
from holdall.settings import PositiveInt


class Kept(NamedTuple):
    """Keys, values and scores of the tokens kept, oldest first; a row's last min(seen, slots) slots."""

    k_BSHK: Tensor
    v_BSHV: Tensor
    z_BS: Tensor
    seen_B: Tensor


@register(
    "sparse-attention",
    family="softmax attention",
    paper=Paper(
        title="Zoology: Measuring and Improving Recall in Efficient Language Models",
        authors="Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré",
        year=2023,
        arxiv="2312.04927",
    ),
    state="(2D+1)min(N,k) + 1",
    training="ND(k + C + D)",
    inference="D(k + D)",
)
@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig(MixerConfig):
    """Softmax attention over a few past tokens, chosen by a learned score."""

    keys: PositiveInt = 64
    """Tokens that are kept, k."""
    heads: PositiveInt = 1
    """Number of heads, H."""
    chunk: PositiveInt = 64
    """Tokens per chunk, C."""

    export_sizes = ()  # sorting, as it is traced, fixes both
    variants = ({"keys": 8, "heads": 2, "chunk": 32}, {"keys": 70, "chunk": 32})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def build(self) -> SparseAttention:
        return SparseAttention(self)


def read_one_by_one(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, z_BT: Tensor, kept: Kept, *, keys: int
) -> tuple[Tensor, Kept]:
    """The definition: put a token with those kept, drop the least if they are too many, look at the rest."""
    ys = []
    for t in range(q_BTHK.shape[1]):
        q_B1HK, k_B1HK, v_B1HV, z_B1 = (u[:, t : t + 1] for u in (q_BTHK, k_BTHK, v_BTHV, z_BT))
        kept = _add(kept, k_B1HK, v_B1HV, z_B1)
        if kept.z_BS.shape[1] > keys:
            z_BS = kept.z_BS.masked_fill(~_filled(kept), -torch.inf)
            slot_S = torch.arange(keys, device=z_BS.device)  # argmin takes the first, the oldest, of equals
            kept = _take(kept, slot_S + (slot_S >= z_BS.argmin(1, keepdim=True)))
        ys.append(_attend(q_B1HK, kept, _filled(kept)[:, None]))
    return torch.cat(ys, dim=1), kept


SPAN = 32
"""Chunks that are read side by side; what is kept goes from one such span to the next."""


def read_in_chunks(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, z_BT: Tensor, kept: Kept, *, keys: int, chunk: int
) -> tuple[Tensor, Kept]:
    """Chunks of C queries, each against the tokens kept before it and its own. O(T (k + C)) for C >= k."""
    ys = []
    spans = (u.split(SPAN * chunk, dim=1) for u in (q_BTHK, k_BTHK, v_BTHV, z_BT))
    for q, k, v, z in zip(*spans, strict=True):
        y_BTHV, kept = _read_span(q, k, v, z, kept, keys, min(chunk, z.shape[1]))
        ys.append(y_BTHV)
    return torch.cat(ys, dim=1), kept


def _read_span(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, z_BT: Tensor, kept: Kept, keys: int, chunk: int
) -> tuple[Tensor, Kept]:
    """G chunks at once: what is kept before a chunk is the best of all that was read before it.

    N are a chunk's candidates, in order of time: the best k before it, then its own C tokens. One is visible
    at time t if it is read by then and fewer than `keys` of those read by then come before it in rank.
    """
    rows, new = z_BT.shape
    kept = _add(kept, k_BTHK, v_BTHV, z_BT)
    count, filled_BS = kept.z_BS.shape[1], _filled(kept)
    z_BS = kept.z_BS.detach().masked_fill(~filled_BS, -torch.inf)
    time_S, time_C = (torch.arange(n, device=z_BS.device) for n in (count, chunk))
    start_G1 = count - new + chunk * torch.arange(-(-new // chunk), device=z_BS.device)[:, None]
    groups = len(start_G1)

    early_BGS = (time_S < start_G1) & filled_BS[:, None]
    best_BGN = _best_first(z_BS[:, None].masked_fill(~early_BGS, -torch.inf))[..., :keys].sort(-1).values
    own_GC = start_G1 + time_C
    slot_BGN = torch.cat((best_BGN, own_GC.clamp(max=count - 1).expand(rows, -1, -1)), dim=2)
    real_BGN = torch.cat(
        (early_BGS.take_along_dim(best_BGN, 2), (own_GC < count).expand(rows, -1, -1)), dim=2
    )
    slot_BX = slot_BGN.flatten(1)
    z_BGN = z_BS.take_along_dim(slot_BX, 1).view_as(slot_BGN).masked_fill(~real_BGN, -torch.inf)
    order_BGN = _best_first(z_BGN)
    rank_BGN = order_BGN.argsort(-1)
    # in order of rank, how many have been read at t up to and with each; then back in order of time
    read_CN = torch.cat(
        (time_C.new_ones(chunk, best_BGN.shape[2], dtype=torch.bool), time_C <= time_C[:, None]), dim=1
    )
    read_BGCN = read_CN.expand(rows, groups, -1, -1)
    order, rank = (u[:, :, None].expand_as(read_BGCN) for u in (order_BGN, rank_BGN))
    place_BGCN = read_BGCN.take_along_dim(order, 3).cumsum(3).take_along_dim(rank, 3)
    visible_BGCN = read_BGCN & (place_BGCN <= keys) & real_BGN[:, :, None]

    looked_at = _take(kept, slot_BX)
    q_BTHK = F.pad(q_BTHK, (0, 0, 0, 0, 0, groups * chunk - new))
    q_XCHK, k_XNHK, v_XNHV, z_XN = (
        u.unflatten(1, (groups, -1)).flatten(0, 1) for u in (q_BTHK, *looked_at[:3])
    )
    own = Kept(k_XNHK, v_XNHV, z_XN, kept.seen_B)
    y_XCHV = _attend(q_XCHK, own, visible_BGCN.flatten(0, 1))
    y_BTHV = y_XCHV.unflatten(0, (rows, groups)).flatten(1, 2)[:, :new]
    if count > keys:
        kept = _take(kept, _best_first(z_BS)[:, :keys].sort(-1).values)
    return y_BTHV, kept


def _best_first(z_XS: Tensor) -> Tensor:
    """Which is the largest, which the next; of equals the newer first, which a stable sort leaves so."""
    return z_XS.shape[-1] - 1 - z_XS.flip(-1).argsort(dim=-1, descending=True, stable=True)


def _add(kept: Kept, k_BTHK: Tensor, v_BTHV: Tensor, z_BT: Tensor) -> Kept:
    return Kept(
        torch.cat((kept.k_BSHK, k_BTHK), dim=1),
        torch.cat((kept.v_BSHV, v_BTHV), dim=1),
        torch.cat((kept.z_BS, z_BT), dim=1),
        kept.seen_B + z_BT.shape[1],
    )


def _take(kept: Kept, slot_BS: Tensor) -> Kept:
    # by rows: the gradient adds whole tokens in a fixed order, that of take_along_dim each number by itself
    row_B1 = torch.arange(slot_BS.shape[0], device=slot_BS.device)[:, None]
    return Kept(
        kept.k_BSHK[row_B1, slot_BS],
        kept.v_BSHV[row_B1, slot_BS],
        kept.z_BS[row_B1, slot_BS],
        kept.seen_B,
    )


def _filled(kept: Kept) -> Tensor:
    """Which slots hold a token: all but those in front that only rows with more tokens fill."""
    slots = kept.z_BS.shape[1]
    return torch.arange(slots, device=kept.seen_B.device) >= slots - kept.seen_B[:, None]


def _attend(q_BTHK: Tensor, kept: Kept, visible_BTS: Tensor) -> Tensor:
    dtype = kept.z_BS.dtype
    score_BHTS = torch.einsum(
        "bthk,bshk->bhts", q_BTHK.to(dtype) * q_BTHK.shape[-1] ** -0.5, kept.k_BSHK.to(dtype)
    )
    score_BHTS = score_BHTS + F.logsigmoid(kept.z_BS)[:, None, None]
    p_BHTS = score_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", p_BHTS.to(kept.v_BSHV.dtype), kept.v_BSHV)


class SparseAttention(Mixer):
    config: SparseAttentionConfig
    state_type = Kept

    def __init__(self, config: SparseAttentionConfig) -> None:
        super().__init__(config)
        self.project = QKV(config.width, config.heads, rotary=0, rotary_base=1, bias=True)
        self.select = nn.Linear(config.width, 2, bias=False)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(
        self, x_BTD: Tensor, state: Kept | None = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, Kept | None]:
        config, dtype = self.config, recurrent_dtype(x_BTD.dtype)
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = self.project(x_BTD, state.seen_B)
        # in bf16 many scores would be equal, and others change places
        gate_BT, z_BT = wide(self.select, x_BTD, dtype).unbind(-1)
        if self.form == "loop":
            y_BTHV, after = read_one_by_one(q, k, v, z_BT, state, keys=config.keys)
        else:
            y_BTHV, after = read_in_chunks(q, k, v, z_BT, state, keys=config.keys, chunk=config.chunk)
        y_BTD = self.out_proj(y_BTHV.flatten(2)) * gate_BT.sigmoid()[..., None].to(x_BTD.dtype)
        return y_BTD, after if want_state else None

    def init_state(
        self,
        batch: int,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        capacity: int | None = None,
    ) -> Kept:
        heads, head_dim = self.config.heads, self.config.width // self.config.heads
        slots = 0 if capacity is None else self.config.keys  # which is all that it ever keeps
        nothing = torch.zeros(batch, slots, heads, head_dim, dtype=dtype, device=device)
        return Kept(
            nothing,
            nothing.clone(),
            torch.zeros(batch, slots, dtype=recurrent_dtype(dtype), device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
        )

    def state_elements(self, context_len: int) -> int:
        return (2 * self.config.width + 1) * min(context_len, self.config.keys) + 1
