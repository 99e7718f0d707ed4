"""GSS: its state space as a sum over all pairs of tokens; its start; its widths.

Letters: B row, T time, R channels of v.
"""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F

import holdall
from holdall.mixers.gss import GSS, GSSConfig
from holdall.testing import laws

DOUBLE = torch.float64


@pytest.mark.parametrize("imag_exp", [True, False])
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_outputs_are_the_sums_over_all_pairs(imag_exp: bool, form: str) -> None:
    config = holdall.describe("gss").configure(
        width=6, modes=3, imag_exp=imag_exp, reduce=2, form=form, chunk=8
    )
    mixer = laws.build(config).to(DOUBLE)
    assert isinstance(mixer, GSS)
    x_BTD = laws.tokens(mixer, 11)
    u_weight, v_weight = mixer.uv.weight.split([24, 3])
    v_BTR = F.gelu(x_BTD @ v_weight.T)
    v_BTR = v_BTR - v_BTR.mean(-1, keepdim=True)
    v_BTR = (
        v_BTR / (v_BTR.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
    )
    s_BTR = mixer.D * v_BTR
    for r in range(3):
        for lag in range(11):
            k = 0.0
            for n in range(3):
                frequency = math.exp(mixer.A_imag[n]) if imag_exp else float(mixer.A_imag[n])
                a = complex(-math.exp(mixer.A_real[n]), frequency)
                k += (complex(*mixer.C[r, n]) * (cmath.exp(a) - 1) / a * cmath.exp(lag * a)).real
            s_BTR[:, lag:, r] += k * v_BTR[:, : 11 - lag, r]
    y_BTD = (F.gelu(x_BTD @ u_weight.T) * (s_BTR @ mixer.gate.weight.T)) @ mixer.out_proj.weight.T
    laws.assert_close("y", mixer(x_BTD)[0], y_BTD + mixer.out_proj.bias)


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    mixer = GSSConfig(width=64).build()
    assert mixer.C.shape == (16, 512, 2)
    assert mixer.gate.weight.shape == (256, 16)
    for normal in (mixer.A_real, mixer.A_imag, mixer.C):
        assert normal.std().item() == pytest.approx(1, rel=0.1)
        assert normal.mean().abs() < 4 * normal.numel() ** -0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modes": 0}, "positive"),
        ({"expand": 0}, "positive"),
        ({"chunk": 0}, "positive"),
        ({"reduce": 3}, "multiple"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GSSConfig(width=8, **options)
