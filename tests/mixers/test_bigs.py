"""BiGS: both directions as sums over pairs of tokens; what a second call sees; its refusals; its start.

Letters: B row, T time, D channels.
"""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdall
from holdall.mixers.bigs import BiGS, BiGSConfig, Direction
from holdall.testing import laws

DOUBLE = torch.float64


def bigs(**options) -> BiGS:
    mixer = laws.build(holdall.describe("bigs").configure(width=4, modes=3, chunk=8, **options)).to(DOUBLE)
    assert isinstance(mixer, BiGS)
    return mixer


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return x @ layer.weight.T + layer.bias


def one_direction(direction: Direction, x_BTD: Tensor) -> Tensor:
    """The state space's sum over all earlier tokens, one kernel for all channels, between its two maps."""
    u_BTD, length = F.gelu(linear(direction.u, x_BTD)), x_BTD.shape[1]
    s_BTD, dt = direction.D * u_BTD, math.exp(direction.log_step)
    for lag in range(length):
        k = 0.0
        for n in range(3):
            a = complex(min(float(direction.A_re[n]), -1e-4), direction.A_im[n])
            k += (complex(*direction.C[n]) * (cmath.exp(dt * a) - 1) / a * cmath.exp(dt * a * lag)).real
        s_BTD[:, lag:] += k * u_BTD[:, : length - lag]
    return linear(direction.c, s_BTD)


@pytest.mark.claim("mixers/bigs.py", "Weights", "the published model is")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_outputs_are_the_sums_over_all_pairs(bidirectional: bool, form: str) -> None:
    mixer = bigs(bidirectional=bidirectional, form=form)
    mixer.forwards.A_re[1] = 0.7  # a mode that would grow
    x_BTD = laws.tokens(mixer, 11)
    c_BTD = one_direction(mixer.forwards, x_BTD)
    if mixer.backwards is not None:
        c_BTD = c_BTD * one_direction(mixer.backwards, x_BTD.flip(1)).flip(1)
    want_BTD = linear(mixer.out_proj, F.gelu(linear(mixer.mix, c_BTD)) * F.gelu(linear(mixer.v, x_BTD)))
    laws.assert_close("y", mixer(x_BTD)[0], want_BTD)


@pytest.mark.claim("mixers/bigs.py", "bidirectional, the backward")
@torch.no_grad()
def test_a_second_call_of_both_directions_goes_on_from_the_left_and_ends_where_it_ends() -> None:
    mixer = bigs(bidirectional=True)
    assert mixer.backwards is not None
    x_BTD = laws.tokens(mixer, 11)
    _, state = mixer(x_BTD[:, :6])
    y_BTD, end = mixer(x_BTD[:, 6:], state)
    left_BTD = one_direction(mixer.forwards, x_BTD)[:, 6:]
    right_BTD = one_direction(mixer.backwards, x_BTD[:, 6:].flip(1)).flip(1)
    v_BTD = F.gelu(linear(mixer.v, x_BTD[:, 6:]))
    want_BTD = linear(mixer.out_proj, F.gelu(linear(mixer.mix, left_BTD * right_BTD)) * v_BTD)
    laws.assert_close("y", y_BTD, want_BTD)
    # the last token has nothing to its right: it is what it is in one call
    whole_BTD, whole = mixer(x_BTD)
    laws.assert_close("last output", y_BTD[:, -1], whole_BTD[:, -1])
    laws.assert_close("state", end.h_BDN2, whole.h_BDN2)


def test_only_both_directions_refuse_laws() -> None:
    assert bigs().refusals == {}
    assert set(bigs(bidirectional=True).refusals) == {"causal", "splits", "gradients_through_state"}
    assert bigs().refusals == {}


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    directions = [BiGSConfig(width=4).build().forwards for _ in range(200)]
    first = directions[0]
    assert first.A_re.tolist() == [-0.5] * 64
    assert first.A_im.tolist() == pytest.approx([math.pi * n for n in range(64)])
    assert first.C.square().mean().item() == pytest.approx(0.5, rel=0.3)
    steps = torch.stack([direction.log_step.detach().exp() for direction in directions])
    assert 0.01 <= steps.min() < 0.011 < 0.9 < steps.max() <= 1
    assert torch.stack([d.D.detach() for d in directions]).std().item() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("option", ["modes", "expand", "chunk"])
def test_what_does_not_fit_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        BiGSConfig(**{option: 0})
