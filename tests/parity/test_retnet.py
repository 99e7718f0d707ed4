"""RetNet's retention against torchscale's equations, where its authors wrote it, and fla's reference.

torchscale's recurrent form computes the same as ours. Its parallel form also divides each row of scores by
its sum, where that is above 1, and the norm that follows undoes this but for its eps. Both are written here
once more. fla's reference has no normaliser, rotation, norm or gate: these are made here.

Letters: B row, T time, D width, H heads, K key dim, V value dim.
"""

import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.mixers.retnet import RetNet, RetNetConfig
from holdall.testing import laws

WIDTH, LENGTH = 24, 40
DOUBLE = torch.float64
SHAPES = pytest.mark.parametrize(("heads", "value_ratio"), [(2, 2), (3, 1)])
FORMS = pytest.mark.parametrize("form", ["loop", "parallel"])


def imported(name: str, package: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{package} is not installed")


def decays(heads: int) -> Tensor:
    return 1 - 2.0 ** (-5 - torch.arange(heads, dtype=DOUBLE))


def angles(length: int, key_dim: int) -> Tensor:
    """Of each position and pair of features."""
    frequency_F = 10000.0 ** -torch.linspace(0, 1, key_dim // 2, dtype=DOUBLE)
    return torch.arange(length, dtype=DOUBLE)[:, None] * frequency_F


def retnet(heads: int, value_ratio: int, form: str, eps: float) -> RetNet:
    config = RetNetConfig(width=WIDTH, heads=heads, value_ratio=value_ratio, eps=eps, chunk=16, form=form)
    return laws.build(config).double()


def projected(mixer: RetNet, x_BTD: Tensor) -> list[Tensor]:
    """Queries and keys turned by their positions, values and gates, (B, H, T, K)."""
    heads, values = mixer.config.heads, mixer.config.value_ratio * WIDTH
    parts = (x_BTD @ mixer.qkvg.weight.T).split([WIDTH, WIDTH, values, values], dim=-1)
    q, k, v, gate = (u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in parts)
    angle_TK = angles(x_BTD.shape[1], WIDTH // heads).repeat_interleave(2, dim=-1)
    q, k = (
        u * angle_TK.cos() + torch.stack((-u[..., 1::2], u[..., ::2]), dim=-1).flatten(-2) * angle_TK.sin()
        for u in (q, k * (WIDTH // heads) ** -0.5)
    )
    return [q, k, v, gate]


def put_out(mixer: RetNet, o_BHTV: Tensor, gate_BHTV: Tensor) -> Tensor:
    o_BHTV = o_BHTV / (o_BHTV.square().mean(-1, keepdim=True) + mixer.config.eps).sqrt() * F.silu(gate_BHTV)
    return o_BHTV.transpose(1, 2).flatten(2) @ mixer.out_proj.weight.T


def torchscales_parallel_form(mixer: RetNet, x_BTD: Tensor) -> Tensor:
    q, k, v, gate = projected(mixer, x_BTD)
    lag_TT = torch.arange(x_BTD.shape[1])[:, None] - torch.arange(x_BTD.shape[1])
    mask_HTT = decays(mixer.config.heads)[:, None, None] ** lag_TT.clamp(min=0) * (lag_TT >= 0)
    score_BHTS = q @ k.mT * mask_HTT / mask_HTT.sum(-1, keepdim=True).sqrt()
    score_BHTS = score_BHTS / score_BHTS.abs().sum(-1, keepdim=True).clamp(1, 5e4)
    return put_out(mixer, score_BHTS @ v, gate)


@pytest.mark.claim("mixers/retnet.py", "map onto torchscale", "torchscale's parallel form")
@FORMS
@SHAPES
@torch.no_grad()
def test_outputs_and_states_are_those_of_torchscales_recurrence(
    heads: int, value_ratio: int, form: str
) -> None:
    """Its state is divided by the root of the sum of decays that ours divides the output by."""
    mixer = retnet(heads, value_ratio, form, eps=0.1)  # a small one would hide the normaliser
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v, gate = projected(mixer, x_BTD)
    gamma_H11, scale_H11 = decays(heads)[:, None, None], torch.zeros(heads, 1, 1, dtype=DOUBLE)
    s_BHKV = torch.zeros(2, heads, WIDTH // heads, v.shape[-1], dtype=DOUBLE)
    os = []
    for t in range(LENGTH):
        before_H11, scale_H11 = scale_H11, scale_H11 * gamma_H11 + 1
        s_BHKV = s_BHKV * before_H11.sqrt() * gamma_H11 / scale_H11.sqrt()
        s_BHKV = s_BHKV + k[:, :, t, :, None] * v[:, :, t, None] / scale_H11.sqrt()
        os.append((q[:, :, t, :, None] * s_BHKV).sum(2))
    y_BTD, state = laws.read_in_pieces(mixer, x_BTD, [LENGTH - 3, 1, 2])
    laws.assert_close("output", y_BTD, put_out(mixer, torch.stack(os, dim=2), gate))
    laws.assert_close("state", state.s_BHKV, s_BHKV * scale_H11.sqrt())


@pytest.mark.claim("mixers/retnet.py", "torchscale's parallel form")
@FORMS
@SHAPES
@torch.no_grad()
def test_the_norm_cancels_what_torchscales_parallel_form_divides_by_up_to_its_eps(
    heads: int, value_ratio: int, form: str
) -> None:
    x_BTD = 10 * laws.draw(2, LENGTH, WIDTH, dtype=DOUBLE)  # rows of scores whose sums are above 1
    mixer = retnet(heads, value_ratio, form, eps=0.0)
    laws.assert_close("output", mixer(x_BTD)[0], torchscales_parallel_form(mixer, x_BTD))
    mixer = retnet(heads, value_ratio, form, eps=0.1)
    assert laws.distance(mixer(x_BTD)[0], torchscales_parallel_form(mixer, x_BTD)) > 1e-3


@FORMS
@SHAPES
@torch.no_grad()
def test_outputs_are_those_of_flash_linear_attentions_reference(
    heads: int, value_ratio: int, form: str
) -> None:
    naive = imported("fla.ops.retention.naive", "fla-core")
    config = RetNetConfig(width=WIDTH, heads=heads, value_ratio=value_ratio, chunk=16, form=form)
    mixer = laws.build(config)
    x_BTD = laws.tokens(mixer, LENGTH)
    values = value_ratio * WIDTH
    *qkv, gate_BTE = F.linear(x_BTD, mixer.qkvg.weight).split([WIDTH, WIDTH, values, values], dim=-1)
    q_BHTK, k_BHTK, v_BHTV = (u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in qkv)
    # pairs of neighbours are complex numbers
    turn_TF = torch.polar(torch.ones(()), angles(LENGTH, WIDTH // heads).float())
    q_BHTK, k_BHTK = (
        torch.view_as_real(torch.view_as_complex(u.unflatten(-1, (-1, 2)).contiguous()) * turn_TF).flatten(-2)
        for u in (q_BHTK, k_BHTK)
    )
    total_HT = decays(heads)[:, None].pow(torch.arange(LENGTH)).cumsum(-1)
    o_BHTV = naive.naive_retention(q_BHTK, k_BHTK, v_BHTV) / total_HT.sqrt()[..., None].float()
    o_BHTV = o_BHTV / (o_BHTV.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want_BTD = mixer.out_proj(F.silu(gate_BTE) * o_BHTV.transpose(1, 2).flatten(2))
    y_BTD, _ = laws.read_in_pieces(mixer, x_BTD, [LENGTH - 3, 1, 2])
    laws.assert_close("output", y_BTD, want_BTD, 1e-5 * laws.size(want_BTD))
