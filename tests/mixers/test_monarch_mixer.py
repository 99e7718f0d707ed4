"""M2's mixer beside Hyena, of which it is a relative, and what it does not offer."""

import pytest
import torch

import holdall
from holdall.mixers.hyena import HyenaConfig
from holdall.mixers.monarch_mixer import MonarchMixerConfig
from holdall.testing import laws

DOUBLE = torch.float64


@torch.no_grad()
def test_without_the_residual_it_is_hyena_of_order_2_with_other_names() -> None:
    """Two independent ways to one function: Monarch products here, a fast Fourier transform there."""
    mixer = laws.build(MonarchMixerConfig(width=8, max_length=64)).double()
    hyena = laws.build(HyenaConfig(width=8, max_length=64)).double()
    # hyena's blocks are x_0 (the last gate), x_1, v; here the first gate comes first
    order = torch.cat((torch.arange(8, 16), torch.arange(8), torch.arange(16, 24)))
    own = mixer.state_dict()
    renamed = {name.replace("skip_D", "skip_E"): tensor for name, tensor in own.items()}
    for name in ("in_proj.weight", "in_proj.bias", "short_weight_UW", "short_bias_U"):
        renamed[name] = own[name][order]
    hyena.load_state_dict(renamed)
    x_BTD = laws.draw(2, 100, 8, dtype=DOUBLE)
    laws.assert_close("y", mixer(x_BTD)[0], hyena(x_BTD)[0])


@torch.no_grad()
def test_the_residual_is_a_convolution_of_the_input_behind_the_gate() -> None:
    mixer = laws.build(MonarchMixerConfig(width=4, max_length=64, residual=True)).double()
    plain = laws.build(MonarchMixerConfig(width=4, max_length=64)).double()
    own = mixer.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in own.items() if "residual" not in name})
    x_BTD, h_LD = laws.draw(2, 30, 4, dtype=DOUBLE), mixer.residual_filter(30)
    added = [sum(h_LD[t - j] * x_BTD[:, j] for j in range(t + 1)) for t in range(30)]
    added_BTD = torch.stack(added, dim=1) + mixer.residual_skip_D * x_BTD
    laws.assert_close("y", mixer(x_BTD)[0], plain(x_BTD)[0] + added_BTD @ mixer.out_proj.weight.T)


@pytest.mark.claim("mixers/monarch_mixer.py", "M2-BERT's")
def test_the_bidirectional_mixer_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="monarch-mixer has no option 'bidirectional'"):
        holdall.describe("monarch-mixer").configure(bidirectional=True)


def test_bad_settings_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="max_length = 1"):
        MonarchMixerConfig(max_length=1)
