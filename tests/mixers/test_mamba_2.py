"""Mamba-2: Mamba's own scan gives the same, the numbers it starts from, and options that do not fit.

Letters: B row, T time, D width, E inner channels, H heads, G groups, N state per channel.
"""

import pytest
import torch
import torch.nn.functional as F

from holdall.mixers.mamba_2 import Mamba2Config
from holdall.ops.selective_scan import selective_scan_loop
from holdall.ops.short_conv import short_conv_loop
from holdall.testing import laws

DOUBLE = torch.float64


@pytest.mark.parametrize(("head_dim", "groups"), [(8, 1), (8, 2), (4, 2)])
def test_it_is_mambas_scan_with_steps_and_decays_shared_by_a_head(head_dim: int, groups: int) -> None:
    states, inner, length = 3, 32, 40
    heads = inner // head_dim
    mixer = laws.build(
        Mamba2Config(width=16, state=states, head_dim=head_dim, groups=groups, chunk=16)
    ).double()
    u_BTD = laws.tokens(mixer, length)
    y_BTD, state = mixer(u_BTD)

    z_BTE, xbc_BTE, dt_BTH = mixer.in_proj(u_BTD).split([inner, inner + 2 * groups * states, heads], dim=-1)
    nothing_BPE = u_BTD.new_zeros(2, 3, xbc_BTE.shape[-1])
    xbc_BTE, _ = short_conv_loop(xbc_BTE, mixer.conv_weight_EW, mixer.conv_bias_E, nothing_BPE)
    x_BTE, b_BTE, c_BTE = F.silu(xbc_BTE).split([inner, groups * states, groups * states], dim=-1)
    dt_BTE = F.softplus(dt_BTH + mixer.dt_bias).repeat_interleave(head_dim, dim=-1)
    a_EN = -mixer.A_log.exp().repeat_interleave(head_dim)[:, None].expand(-1, states)
    ys, ends = [], []
    for g in range(groups):  # a scan per group: its channels share B and C
        own, of_group = (
            slice(g * inner // groups, (g + 1) * inner // groups),
            slice(g * states, (g + 1) * states),
        )
        y_BTE, h_BEN = selective_scan_loop(
            x_BTE[..., own],
            dt_BTE[..., own],
            a_EN[own],
            b_BTE[..., of_group],
            c_BTE[..., of_group],
            u_BTD.new_zeros(2, inner // groups, states),
        )
        y_BTE = (y_BTE + mixer.D.repeat_interleave(head_dim)[own] * x_BTE[..., own]) * F.silu(z_BTE[..., own])
        ys.append(y_BTE * (y_BTE.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
        ends.append(h_BEN)
    want_BTD = mixer.out_proj(torch.cat(ys, dim=-1) * mixer.norm_weight_E)
    laws.assert_close("output", y_BTD, want_BTD)
    laws.assert_close("state", state.s_BHNV.mT.flatten(1, 2), torch.cat(ends, dim=1))


def test_published_initialisation() -> None:
    mixer = Mamba2Config(width=512, head_dim=2, state=4).build()
    dt_H, a_H = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 1e-3 <= dt_H.min() < 1.1e-3
    assert 0.09 < dt_H.max() <= 0.1 + 1e-6
    assert (dt_H.log().mean() - torch.tensor([1e-3, 1e-1]).log().mean()).abs() < 0.2
    assert 1 <= a_H.min() < 1.2
    assert 15.8 < a_H.max() <= 16 + 1e-5
    assert (a_H.mean() - 8.5).abs() < 0.7
    assert (mixer.D == 1).all()
    assert (mixer.norm_weight_E == 1).all()
    assert 0.49 < mixer.conv_weight_EW.max() <= 0.5


def test_published_size() -> None:
    """130m of the released models: 24 layers of width 768; a state of 128 per channel in heads of 64."""
    config = Mamba2Config(width=768)
    assert (config.inner, config.heads, config.conv_channels) == (1536, 24, 1792)
    mixer = config.build()
    assert mixer.in_proj.weight.shape == (3352, 768)
    assert mixer.state_elements(0) == 1536 * 128 + 3 * 1792


def test_a_model_narrower_than_a_head_has_one() -> None:
    config = Mamba2Config(width=16)
    assert (config.inner, config.head_dim, config.heads) == (32, 64, 1)
    assert config.build().init_state(1, dtype=torch.float32).s_BHNV.shape == (1, 1, 128, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 12}, "not a multiple of head_dim 12"),
        ({"head_dim": 20}, "not a multiple of head_dim 20"),
        ({"head_dim": 8, "groups": 3}, "not a multiple of groups 3"),
        ({"kernel": 1}, "kernel = 1 must be at least 2"),
        ({"state": 0}, "state = 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2Config(width=16, **options)
