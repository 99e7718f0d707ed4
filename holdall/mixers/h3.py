"""H3: a shift state space for keys, and a diagonal one for their products with values, read by queries.

    k~ = shift(k) + d_s * k        shift(k)_t = sum_{l < n} K_l k_{t-l}      K_l = sum_{i < n - l} B_i C_{i+l}
    S_t = k~_t v_t^T               per head, an outer product of r keys and r values
    m = diag(S) + d_h S            A = -exp(inv_A_real) + i A_imag, bilinear with step exp(log_dt), per head,
                                   n / 2 modes for as many conjugate pairs:  m_t = 2 Re(C . h_t)
    y = W_o [q_t^T m_t, all heads]

Letters: y_t output of token t; q, k, v queries, keys and values of a head, r dimensions each; l lags; i the n
taps; K_l the kernel of the shift; B and C its two factors; d_s and d_h skips; S_t products of keys and
values; m_t what the second state space makes of them; h_t its modes; A their rates; C their read-out; W_o a
learned map.

Fu et al., "Hungry Hungry Hippos: Towards Language Modeling with State Space Models", 2022, arXiv 2212.14052.
Weights map onto the H3 of HazyResearch/H3 and Zoology: q_proj, k_proj, v_proj are the rows of `qkv`, in that
order; ssm_k_kernel.kernel holds shift_B and (with a first dimension of 1) shift_C, ssm_k_D is shift_D;
kernel.kernel holds log_dt, B, (with a first dimension of 1) C, inv_A_real and A_imag; output_linear is
out_proj. As there, channel h r + i of q, k and v is dimension i of head h, but value i of head h reaches
out_proj as channel i D / r + h.
Deviations:
- the shift's state is the last n - 1 keys, instead of their products with B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops import hippo, ssm
from holdall.ops.h3 import between_projections, h3, kernel_refusal
from holdall.ops.linear import is_plain
from holdall.settings import PositiveInt


class H3State(NamedTuple):
    """The keys that the shift still needs, and the modes of each product of key and value, as (re, im)."""

    past_BPD: Tensor
    h_BKVHN2: Tensor


@register(
    "h3",
    family="state space",
    paper=Paper(
        title="Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
        authors="Fu et al.",
        year=2022,
        arxiv="2212.14052",
    ),
    state="(n(r + 1) - 1)D",
    training="ND(D + rn)",
    inference="D(D + rn)",
)
@dataclass(frozen=True, kw_only=True)
class H3Config(MixerConfig):
    """Shifted keys times values in a diagonal state space, read by queries.

    The kernel form runs where up to 512 tokens are read from an empty state and no state is wanted, as in
    training; all other calls are Fourier transforms.
    """

    state: PositiveInt = 64
    """Taps of the shift, and real numbers of state per product of a key and a value, n."""
    head_dim: PositiveInt = 1
    """Key and value dimensions per head, r."""
    chunk: PositiveInt = ssm.CHUNK
    """Tokens per Fourier transform of the diagonal state space."""

    forms = ("loop", "parallel", "kernel")
    variants = ({"state": 8}, {"state": 6, "head_dim": 2, "chunk": 16})

    def validate(self) -> None:
        if self.state % 2:
            raise ValueError(f"state {self.state} is not an even number: modes come in conjugate pairs")
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return super().kernel_refusal(device, dtype) or kernel_refusal(self.head_dim)

    def build(self) -> H3:
        return H3(self)


class H3(Mixer):
    config: H3Config
    state_type = H3State

    def __init__(self, config: H3Config) -> None:
        super().__init__(config)
        width, heads, taps, modes = config.width, config.heads, config.state, config.state // 2
        self.qkv = nn.Linear(width, 3 * width)
        self.shift_B = nn.Parameter(torch.eye(1, taps).repeat(width, 1))
        self.shift_C = nn.Parameter(torch.empty(width, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.shift_D = nn.Parameter(torch.randn(width))
        lambda_N = hippo.s4d_lin(modes)
        self.log_dt = nn.Parameter(hippo.log_step_sizes(heads))
        self.inv_A_real = nn.Parameter((-lambda_N.real).log().float().repeat(heads, 1))
        self.A_imag = nn.Parameter(lambda_N.imag.float().repeat(heads, 1))
        self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(heads, modes, 1))
        self.C = nn.Parameter(torch.randn(heads, modes, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(heads))
        self.out_proj = nn.Linear(width, width)

    def shift_kernel(self, dtype: torch.dtype) -> Tensor:
        """What the shift convolves with, (D, n): the correlation of C with B, by transforms of twice n."""
        taps = self.config.state
        b_DF, c_DF = (torch.fft.rfft(m.to(dtype), n=2 * taps) for m in (self.shift_B, self.shift_C))
        return torch.fft.irfft(b_DF.conj() * c_DF, n=2 * taps)[:, :taps]

    def diagonal(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """log_a, b and c of the diagonal state space of each head, (H, N)."""
        a_HN = torch.complex(-self.inv_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        log_a_HN, scale_HN = ssm.bilinear(self.log_dt.to(dtype).exp()[:, None], a_HN)
        b_HN = scale_HN * torch.view_as_complex(self.B.to(dtype))
        return log_a_HN, b_HN, 2 * torch.view_as_complex(self.C.to(dtype))

    def forward(
        self, x_BTD: Tensor, state: H3State | None = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, H3State | None]:
        dtype = recurrent_dtype(x_BTD.dtype)
        between = self.shift_kernel(dtype), self.shift_D, self.diagonal(dtype), self.D
        before: Any = state or (None, None)
        how: dict[str, Any] = {"chunk": self.config.chunk, "want_state": want_state, "form": self.form}
        past_BPD: Tensor | None
        if is_plain(self.qkv) and is_plain(self.out_proj):
            y_BTD, past_BPD, h_BKVHN2 = h3(
                x_BTD, self.qkv.weight, self.qkv.bias, *between, self.out_proj.weight, self.out_proj.bias,
                *before, **how,
            )  # fmt: skip
        else:
            read_BTD, past_BPD, h_BKVHN2 = between_projections(self.qkv(x_BTD), *between, *before, **how)
            y_BTD = self.out_proj(read_BTD)
        if past_BPD is None or h_BKVHN2 is None or not want_state:
            return y_BTD, None
        return y_BTD, H3State(past_BPD, h_BKVHN2)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> H3State:
        config = self.config
        shape = (batch, config.head_dim, config.head_dim, config.heads, config.state // 2, 2)
        return H3State(
            torch.zeros(batch, config.state - 1, config.width, dtype=dtype, device=device),
            torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device),
        )

    def state_elements(self, context_len: int) -> int:
        return (self.config.state * (self.config.head_dim + 1) - 1) * self.config.width
