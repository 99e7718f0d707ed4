"""S5: its discretisation against matrix exponentials, its start, its gates.

Letters: B row, T time, D channels, P modes.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import holdall
from holdall.mixers.s5 import S5, S5Config
from holdall.ops.hippo import legs
from holdall.testing import laws

DOUBLE = torch.float64


def s5(**options) -> S5:
    mixer = laws.build(holdall.describe("s5").configure(width=5, **options)).to(DOUBLE)
    assert isinstance(mixer, S5)
    return mixer


def state_space(mixer: S5, x_BTD: Tensor) -> Tensor:
    """What the state space puts out, before any activation, by the recurrence of a matrix exponential."""
    a_P = torch.complex(mixer.A_re, mixer.A_im)
    b_PD, c_DP = (torch.view_as_complex(m) for m in (mixer.B, mixer.C))
    dt_P, modes, width = mixer.log_step.exp(), len(a_P), x_BTD.shape[-1]
    if (
        mixer.config.discretisation == "zoh"
    ):  # h' = A h + B u over a step, u held: a system of h and u together
        system = torch.zeros(modes + width, modes + width, dtype=torch.complex128)
        system[:modes, :modes], system[:modes, modes:] = torch.diag(dt_P * a_P), dt_P[:, None] * b_PD
        step = torch.matrix_exp(system)
        a_PP, b_PD = step[:modes, :modes], step[:modes, modes:]
    else:  # h_t - h_{t-1} is dt times the mean of A h before and after, plus dt B u
        half, one = torch.diag(dt_P * a_P) / 2, torch.eye(modes, dtype=torch.complex128)
        a_PP = torch.linalg.solve(one - half, one + half)
        b_PD = torch.linalg.solve(one - half, dt_P[:, None] * b_PD)
    h_BP, ys = torch.zeros(len(x_BTD), modes, dtype=torch.complex128), []
    for u_BD in x_BTD.unbind(1):
        h_BP = h_BP @ a_PP.T + u_BD.to(h_BP.dtype) @ b_PD.T
        y_BD = h_BP @ c_DP.T
        if mixer.config.conj_sym:  # the mode and its partner
            y_BD = y_BD + (h_BP.conj() @ c_DP.conj().T)
        ys.append(y_BD.real + mixer.D * u_BD)
    return torch.stack(ys, dim=1)


@pytest.mark.claim("mixers/s5.py", "Weights")
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("conj_sym", [True, False])
@pytest.mark.parametrize("activation", ["half_glu1", "half_glu2", "full_glu", "gelu"])
@torch.no_grad()
def test_outputs_are_those_of_the_continuous_system(
    discretisation: str, conj_sym: bool, activation: str
) -> None:
    mixer = s5(state=8, blocks=2, discretisation=discretisation, conj_sym=conj_sym, activation=activation,
               chunk=7)  # fmt: skip
    x_BTD = laws.tokens(mixer, 20)
    s = state_space(mixer, x_BTD)
    g = F.gelu(s, approximate="tanh")
    want = {"gelu": g}
    if mixer.gate is not None:
        gate = torch.sigmoid(g @ mixer.gate.weight.T + mixer.gate.bias)
        want |= {"half_glu1": g * gate, "half_glu2": s * gate}
        if mixer.out_proj is not None:
            want |= {"full_glu": (g @ mixer.out_proj.weight.T + mixer.out_proj.bias) * gate}
    laws.assert_close("y", mixer(x_BTD)[0], want[activation])


@pytest.mark.claim("mixers/s5.py", "of its initialisations")
def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    mixer = S5Config(width=64).build()
    imaginary_P = torch.cat([legs(32)[0].imag[:16]] * 8).float()
    assert torch.equal(mixer.A_im, imaginary_P)
    assert (mixer.A_im < 0).all()
    assert (mixer.A_re == -0.5).all()
    step_P = mixer.log_step.exp()
    assert 0.001 <= step_P.min() < 0.0015 < 0.07 < step_P.max() <= 0.1
    # in the modes' basis, a unitary one: variance 1 / n of B's real entries, and of each part of C's
    assert mixer.B.shape == (128, 64, 2)
    assert mixer.C.shape == (64, 128, 2)
    assert mixer.B.square().sum(-1).mean().item() == pytest.approx(1 / 256, rel=0.05)
    assert mixer.C.square().sum(-1).mean().item() == pytest.approx(2 / 256, rel=0.05)
    assert mixer.D.std().item() == pytest.approx(1, rel=0.3)
    assert mixer.gate is not None
    assert mixer.gate.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert mixer.gate.weight.abs().max() <= 2 / 8 / 0.87
    assert not mixer.gate.bias.any()


@pytest.mark.claim("mixers/s5.py", "the real parts of A")
@torch.no_grad()
def test_a_mode_cannot_grow_unless_it_may() -> None:
    for clip in (True, False):
        mixer = s5(state=4, blocks=1, clip_eigs=clip)
        mixer.A_re.fill_(0.3)
        log_a_P, _ = mixer.discretized(DOUBLE)
        want = (-1e-4 if clip else 0.3) * mixer.log_step.exp()
        laws.assert_close("log a", log_a_P.real, want)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"state": 12, "blocks": 4}, "pairs of modes"),
        ({"state": 9, "blocks": 2, "conj_sym": False}, "equal blocks"),
        ({"chunk": 0}, "chunk = 0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(S5Config(), **options)
