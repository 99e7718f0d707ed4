"""Hawk: its first token, the numbers it starts from, and gates that close entirely.

Letters: B row, T time, D width, E channels.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.mixers.hawk import HawkConfig
from holdall.testing import laws

DOUBLE = torch.float64


def mixer_of(**options):
    return laws.build(HawkConfig(width=16, **options)).double()


def test_the_first_token_enters_without_the_scale_that_all_others_get() -> None:
    mixer = mixer_of(heads=2)
    x_BTD = laws.tokens(mixer, 2)
    _, one = mixer(x_BTD[:, :1])
    _, two = mixer(x_BTD)
    (first_BE, second_BE), taps_EW = mixer.in_proj(x_BTD)[..., 16:].unbind(1), mixer.conv_weight_EW
    x0_BE = mixer.conv_bias_E + first_BE * taps_EW[:, 3]
    x1_BE = mixer.conv_bias_E + first_BE * taps_EW[:, 2] + second_BE * taps_EW[:, 3]

    def gate(which: int, x_BE: Tensor) -> Tensor:
        blocks_EE = torch.block_diag(*mixer.gate_weight_GHIJ[which])
        return torch.sigmoid(x_BE @ blocks_EE + mixer.gate_bias_GHJ[which].flatten())

    h0_BE = gate(0, x0_BE) * x0_BE
    laws.assert_close("after one", one.h_BE, h0_BE)
    a_BE = torch.exp(-8 * gate(1, x1_BE) * F.softplus(mixer.a_param_E))
    h1_BE = a_BE * h0_BE + (1 - a_BE**2).sqrt() * gate(0, x1_BE) * x1_BE
    laws.assert_close("after two", two.h_BE, h1_BE)


def test_a_row_of_zeros_that_was_read_is_not_a_row_that_read_nothing() -> None:
    mixer = mixer_of()
    x_BTD = laws.tokens(mixer, 1)
    fresh = mixer.init_state(2, dtype=DOUBLE)
    later = fresh._replace(seen_B=fresh.seen_B + torch.tensor([0, 5]))
    y_BTD, _ = mixer(x_BTD, later)
    want_BTD, _ = mixer(x_BTD)
    laws.assert_close("row that read nothing", y_BTD[0], want_BTD[0])
    assert laws.distance(y_BTD[1], want_BTD[1]) > 1e-3


@pytest.mark.claim("mixers/hawk.py", "a^8 is drawn")
def test_it_starts_from_the_published_numbers() -> None:
    torch.manual_seed(0)
    mixer = HawkConfig(width=512, lru_width=768).build()
    kept = torch.exp(-8 * F.softplus(mixer.a_param_E))
    assert 0.9 <= kept.min() < 0.901
    assert 0.998 < kept.max() <= 0.9991
    assert abs(kept.mean() - 0.9495) < 0.003  # uniform between 0.9 and 0.999
    for weight, std in (
        (mixer.in_proj.weight, 512**-0.5),
        (mixer.out_proj.weight, 768**-0.5),
        (mixer.conv_weight_EW, (0.01 / 4) ** 0.5),
        (mixer.gate_weight_GHIJ, (768 / 4) ** -0.5),
    ):
        assert abs(weight.std() / std - 1) < 0.05
        assert abs(weight.mean()) < 0.1 * std
    for bias in (mixer.in_proj.bias, mixer.out_proj.bias, mixer.conv_bias_E, mixer.gate_bias_GHJ):
        assert not bias.any()


@pytest.mark.claim("mixers/hawk.py", "that code bounds")
@pytest.mark.parametrize("gate", [-30.0, -90.0, -1000.0])
@pytest.mark.parametrize("form", ["loop", "parallel"])
def test_gates_that_never_forget_have_finite_gradients(form: str, gate: float) -> None:
    """At -90 a rounds to 1; at -1000 the gate is zero to the bit, where the square root has no slope."""
    mixer = laws.twin(laws.build(HawkConfig(width=16)), form=form)
    with torch.no_grad():
        mixer.gate_bias_GHJ[1] = gate
    x_BTD = laws.tokens(mixer, 20)
    y_BTD, _ = mixer(x_BTD)
    y_BTD.sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), f"gradient of {name}"


@pytest.mark.claim("mixers/hawk.py", "that code bounds")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_what_enters_beside_a_decay_of_nearly_one_has_all_its_digits(form: str) -> None:
    """A first token of zeros leaves nothing, the second sqrt(1 - a^2) of its own; a rounds to 1."""
    mixer = laws.build(HawkConfig(width=16, form=form))
    for bias in (mixer.in_proj.bias, mixer.conv_bias_E):
        bias.zero_()
    mixer.gate_weight_GHIJ[1] = 0
    mixer.gate_bias_GHJ[1] = -16
    x_BTD = laws.tokens(mixer, 2)
    x_BTD[:, 0] = 0
    log_a_E = -8 * torch.sigmoid(torch.tensor(-16.0)) * F.softplus(mixer.a_param_E)
    assert (log_a_E.exp() == 1).all()
    h_BE, truth_BE = mixer(x_BTD)[1].h_BE, laws.loop_of(mixer, DOUBLE)(x_BTD.double())[1].h_BE
    assert laws.size(truth_BE) > 1e-5
    torch.testing.assert_close(h_BE.double(), truth_BE, rtol=1e-5, atol=1e-9)


def test_configs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of heads 3"):
        HawkConfig(width=16, heads=3)
    with pytest.raises(ValueError, match="lru_width 18"):
        HawkConfig(width=16, lru_width=18)
    with pytest.raises(ValueError, match="kernel = 1"):
        HawkConfig(width=16, kernel=1)
