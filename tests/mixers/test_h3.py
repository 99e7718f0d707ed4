"""H3: both state spaces as sums over all pairs of tokens, in the channels' published order; its start.

Letters: B row, T time, D channels, N modes.
"""

import cmath
import math

import pytest
import torch
from torch import Tensor

import holdall
from holdall.mixers.h3 import H3, H3Config
from holdall.ops.h3 import remember, shift
from holdall.testing import laws

DOUBLE = torch.float64


def by_sums(mixer: H3, x_BTD: Tensor) -> Tensor:
    """The outputs by kernels of every lag, channel by channel, in Python's numbers."""
    config, length, width = mixer.config, x_BTD.shape[1], mixer.config.width
    dim, heads, taps = config.head_dim, width // config.head_dim, config.state
    q, k, v = mixer.qkv(x_BTD).chunk(3, dim=-1)
    k_hat = torch.zeros_like(k)
    for d in range(width):
        shift = [sum(float(mixer.shift_B[d, n] * mixer.shift_C[d, n + lag]) for n in range(taps - lag))
                 for lag in range(taps)]  # fmt: skip
        for t in range(length):
            k_hat[:, t, d] = mixer.shift_D[d] * k[:, t, d]
            for lag in range(min(taps, t + 1)):
                k_hat[:, t, d] += shift[lag] * k[:, t - lag, d]
    y = torch.zeros_like(q)
    for h in range(heads):
        dt, kernel = math.exp(mixer.log_dt[h]), [0.0] * length
        for n in range(taps // 2):
            a = complex(-math.exp(mixer.inv_A_real[h, n]), mixer.A_imag[h, n])
            b, c = complex(*mixer.B[h, n]), complex(*mixer.C[h, n])
            for lag in range(length):
                power = ((1 + dt * a / 2) / (1 - dt * a / 2)) ** lag
                kernel[lag] += 2 * (c * b * dt / (1 - dt * a / 2) * power).real
        for i in range(dim):
            for j in range(dim):
                kv = k_hat[..., h * dim + i] * v[..., h * dim + j]
                for t in range(length):
                    memory = mixer.D[h] * kv[:, t] + sum(kernel[lag] * kv[:, t - lag] for lag in range(t + 1))
                    y[:, t, j * heads + h] += q[:, t, h * dim + i] * memory
    return y @ mixer.out_proj.weight.T + mixer.out_proj.bias


@pytest.mark.claim("mixers/h3.py", "Weights")
@pytest.mark.parametrize("head_dim", [1, 2, 3])
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_outputs_are_the_sums_over_all_pairs(head_dim: int, form: str) -> None:
    config = holdall.describe("h3").configure(width=6, state=4, head_dim=head_dim, chunk=8, form=form)
    mixer = laws.build(config).to(DOUBLE)
    assert isinstance(mixer, H3)
    x_BTD = laws.tokens(mixer, 11)
    laws.assert_close("y", mixer(x_BTD)[0], by_sums(mixer, x_BTD))


@pytest.mark.claim("mixers/h3.py", "the shift's state")
@torch.no_grad()
def test_the_shifts_state_is_the_last_keys_as_they_are() -> None:
    mixer = laws.build(H3Config(width=6, state=4, head_dim=2)).to(DOUBLE)
    x_BTD = laws.tokens(mixer, 11)
    _, state = mixer(x_BTD)
    laws.assert_close("keys", state.past_BPD, mixer.qkv(x_BTD)[:, -3:, 6:12])


@torch.no_grad()
def test_more_taps_than_tokens() -> None:
    """As in Zoology, where the shift is as long as the sequence."""
    mixer = laws.build(H3Config(width=2, state=32)).to(DOUBLE)
    assert isinstance(mixer, H3)
    x_BTD = laws.tokens(mixer, 5)
    laws.assert_close("y", mixer(x_BTD)[0], by_sums(mixer, x_BTD))


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    mixer = H3Config(width=64, head_dim=2).build()
    assert torch.equal(mixer.shift_B, torch.eye(1, 64).expand(64, -1))
    assert -1 / 8 <= mixer.shift_C.min() < -0.12
    assert 0.12 < mixer.shift_C.max() <= 1 / 8
    assert mixer.A_imag[0].tolist() == pytest.approx([math.pi * n for n in range(32)])
    assert mixer.inv_A_real.exp().flatten().tolist() == pytest.approx([0.5] * 32 * 32)
    assert torch.view_as_complex(mixer.B.detach()).eq(1).all()
    assert torch.view_as_complex(mixer.C.detach()).abs().square().mean().item() == pytest.approx(1, rel=0.1)
    assert mixer.log_dt.shape == (32,)
    assert 0.001 <= mixer.log_dt.exp().min() < mixer.log_dt.exp().max() <= 0.1
    for skip in (mixer.shift_D, mixer.D):
        assert skip.std().item() == pytest.approx(1, rel=0.3)


@torch.no_grad()
def test_a_fresh_shift_is_a_convolution_with_c() -> None:
    mixer = H3Config(width=3, state=4).build().to(DOUBLE)
    impulse_BTD = torch.zeros(1, 6, 3, dtype=DOUBLE)
    impulse_BTD[:, 0] = 1
    past_BPD = torch.zeros(1, 3, 3, dtype=DOUBLE)
    k_BTD, _ = shift(impulse_BTD, mixer.shift_kernel(DOUBLE), mixer.shift_D, past_BPD)
    want_TD = torch.zeros(6, 3, dtype=DOUBLE)
    want_TD[:4] = mixer.shift_C.T
    want_TD[0] += mixer.shift_D
    laws.assert_close("shifted", k_BTD[0], want_TD)


def test_a_mode_is_the_bilinear_oscillation_of_its_frequency() -> None:
    """One mode, one head, an impulse: what the diagonal state space rings with."""
    mixer = H3Config(width=1, state=2).build().to(DOUBLE)
    dt, rate, frequency = 0.05, 0.7, 3.0
    with torch.no_grad():
        mixer.log_dt.fill_(math.log(dt))
        mixer.inv_A_real.fill_(math.log(rate))
        mixer.A_imag.fill_(frequency)
        mixer.D.zero_()
        impulse = torch.zeros(1, 40, 1, 1, 1, dtype=DOUBLE)
        impulse[:, 0] = 1
        y, _ = remember(impulse, mixer.diagonal(DOUBLE), mixer.D, None, want_state=False)
        c = complex(*mixer.C[0, 0])
    ring = [2 * (c * dt * cmath.exp(complex(-rate, frequency) * dt * (t + 0.5))).real for t in range(40)]
    # the rule of second order is close to the exact solution, to dt^2
    for t, want in enumerate(ring):
        assert y[0, 0, 0, t, 0].item() == pytest.approx(want, abs=2e-2 * dt)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"state": 7}, "even"),
        ({"state": 0}, "state = 0"),
        ({"head_dim": 3}, "multiple"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        H3Config(width=8, **options)
