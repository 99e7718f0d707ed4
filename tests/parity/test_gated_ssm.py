"""S5 and GSS against packages that others wrote, with these packages' random weights.

Letters: B row, T time, D channels, P modes.
"""

import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import holdall
from holdall.testing import laws

DOUBLE = torch.float64


def imported(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def perturb(module: torch.nn.Module) -> None:
    """Initial zeros, ones and equal numbers would hide wrong terms."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)


@pytest.mark.claim("mixers/s5.py", "Weights")
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@torch.no_grad()
def test_s5(discretisation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s5-pytorch: the JAX original's state space without conjugate pairs and without its gate."""
    s5 = imported("s5")
    monkeypatch.setattr(s5.s5_model, "as_complex", torch.view_as_complex)  # its own rounds to complex64
    torch.manual_seed(0)
    theirs = s5.S5(6, state_width=8, block_count=2).seq
    theirs.discretize = getattr(s5.s5_model, f"discretize_{discretisation}")
    perturb(theirs)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, DOUBLE))
    c_DP2 = torch.view_as_real(theirs.C)
    config = holdall.describe("s5").configure(
        width=6, state=8, blocks=2, conj_sym=False, discretisation=discretisation, activation="gelu", chunk=16
    )
    ours = config.build().to(DOUBLE)
    weights = {"A_re": theirs.Lambda.real, "A_im": theirs.Lambda.imag, "B": theirs.B, "C": c_DP2}
    ours.load_state_dict({**weights, "D": theirs.D, "log_step": theirs.log_step})
    x_BTD = laws.draw(2, 50, 6, dtype=DOUBLE)
    y_BTD, state = ours(x_BTD)
    for row in range(2):
        want_TD, end_P = theirs(x_BTD[row], return_state=True)
        laws.assert_close("y", y_BTD[row], F.gelu(want_TD, approximate="tanh"))
        laws.assert_close("state", state.h_BP2[row], torch.view_as_real(end_P))


@pytest.mark.claim("mixers/gss.py", "Weights", "Deviations: none")
@pytest.mark.parametrize("imag_exp", [True, False])
@torch.no_grad()
def test_gss(imag_exp: bool) -> None:
    """gated-state-spaces-pytorch, whose LayerNorm in front and residual are the model's in Holdall."""
    package = imported("gated_state_spaces_pytorch")
    torch.manual_seed(0)
    theirs = package.GSS(
        dim=8, dim_expansion_factor=3, dss_kernel_N=6, dss_kernel_H=4, dss_kernel_lambda_imag_exp=imag_exp
    )
    perturb(theirs)
    theirs = theirs.to(DOUBLE)
    dss = theirs.dss
    config = holdall.describe("gss").configure(
        width=8, modes=6, reduce=2, expand=3, imag_exp=imag_exp, chunk=16
    )
    ours = config.build().to(DOUBLE)
    weights = {
        "uv.weight": torch.cat((theirs.to_u[0].weight, theirs.to_v[0].weight)),
        "norm.weight": dss.norm.weight,
        "norm.bias": dss.norm.bias,
        "A_real": dss.Lambda_real,
        "A_imag": dss.Lambda_imag,
        "C": torch.stack((dss.C_real, dss.C_imag), dim=-1),
        "D": dss.param_D,
        "gate.weight": theirs.to_gate.weight,
        "out_proj.weight": theirs.to_out.weight,
        "out_proj.bias": theirs.to_out.bias,
    }
    ours.load_state_dict(weights)
    x_BTD = laws.draw(2, 50, 8, dtype=DOUBLE)
    y_BTD, _ = ours(theirs.norm(x_BTD))
    laws.assert_close("y", x_BTD + y_BTD, theirs(x_BTD))
