"""RWKV-4 and its channel mixing: the published initialisation, token shift, learning from silence.

Letters: B row, T time, D width.
"""

import math

import pytest
import torch
from mixers.silent import assert_silent_layers_learn

import holdall
from holdall.mixers.rwkv_4 import RWKV4Config
from holdall.mixers.rwkv_channel_mix import RWKVChannelMixConfig
from holdall.testing import laws

WIDTH = 16


def test_it_starts_from_the_published_numbers() -> None:
    """In the third of four layers: 2/3 of the way down, and 1 - 2/4 of it left."""
    mixer = RWKV4Config(width=WIDTH, layer=2, layers=4).build()
    start_D = torch.tensor([i / WIDTH for i in range(WIDTH)])
    for name, got, want in (
        ("time_mix_k", mixer.time_mix_ZD[0], start_D**0.5),
        ("time_mix_v", mixer.time_mix_ZD[1], start_D**0.5 + 0.2),
        ("time_mix_r", mixer.time_mix_ZD[2], start_D**0.25),
    ):
        torch.testing.assert_close(got.detach(), want, msg=name)
    decay = [-5 + 8 * (i / (WIDTH - 1)) ** (0.7 + 1.3 * 2 / 3) for i in range(WIDTH)]
    torch.testing.assert_close(mixer.time_decay.detach(), torch.tensor(decay))
    first = [math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(WIDTH)]
    torch.testing.assert_close(mixer.time_first.detach(), torch.tensor(first))
    for layer in (mixer.key, mixer.receptance, mixer.out_proj):
        assert not layer.weight.any()
    w = mixer.value.weight.detach()
    torch.testing.assert_close(w @ w.T, torch.eye(WIDTH), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"width": 1}, {"layer": 0, "layers": 1}, {"layer": 11, "layers": 12}])
def test_any_layer_and_width_starts_finite(options: dict[str, int]) -> None:
    for name, parameter in RWKV4Config(**options).build().named_parameters():
        assert parameter.isfinite().all(), name


def test_the_token_before_weighs_without_decay_and_the_token_itself_with_the_bonus() -> None:
    """With keys of zero and a mix of one the second output is a mean of two values, 1 against e^u."""
    mixer = RWKV4Config(width=WIDTH).build().double()
    with torch.no_grad():
        mixer.time_mix_ZD.fill_(1.0)
        mixer.out_proj.weight.copy_(torch.eye(WIDTH))
    x_BTD = laws.tokens(mixer, 2)
    y_BTD, _ = mixer(x_BTD)
    v_BTD, bonus_D = mixer.value(x_BTD), mixer.time_first.exp()
    laws.assert_close("first", y_BTD[:, 0], v_BTD[:, 0] / 2)  # the receptance is sigmoid(0)
    laws.assert_close("second", y_BTD[:, 1], (v_BTD[:, 0] + bonus_D * v_BTD[:, 1]) / (1 + bonus_D) / 2)


def test_a_model_of_silent_layers_learns() -> None:
    layers = [RWKV4Config(width=WIDTH, layer=i, layers=2) for i in range(2)]
    assert_silent_layers_learn(layers, steps=30)


def test_configs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 2 is none of 2"):
        RWKV4Config(layer=2, layers=2)
    with pytest.raises(ValueError, match="chunk = 0"):
        RWKV4Config(chunk=0)


def test_channel_mixing_starts_from_the_published_numbers() -> None:
    """In the third of four layers: 1 - 2/4 of the way is left; and four times as wide, a gain of sqrt(4)."""
    mixer = RWKVChannelMixConfig(width=WIDTH, layer=2, layers=4).build()
    start_D = torch.tensor([i / WIDTH for i in range(WIDTH)]) ** 0.5
    torch.testing.assert_close(mixer.time_mix_ZD.detach(), torch.stack((start_D, start_D)))
    w = mixer.key.weight.detach()
    torch.testing.assert_close(w.T @ w, 4 * torch.eye(WIDTH), atol=1e-5, rtol=0)
    assert not mixer.value.weight.any()
    assert not mixer.receptance.weight.any()
    with pytest.raises(ValueError, match="layer 2 is none of 2"):
        RWKVChannelMixConfig(layer=2, layers=2)


@pytest.mark.parametrize(
    ("name", "last"),
    [("rwkv-4", "out_proj"), ("rwkv-5", "out_proj"), ("rwkv-7", "out_proj"), ("rwkv-channel-mix", "value")],
)
def test_at_the_start_a_mixer_is_silent_and_its_last_matrix_alone_has_a_gradient(
    name: str, last: str
) -> None:
    torch.manual_seed(0)
    mixer = holdall.build(name, width=WIDTH)
    y_BTD, _ = mixer(laws.tokens(mixer, 5))
    assert not y_BTD.any()
    y_BTD.sum().backward()
    moved = {n for n, p in mixer.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {f"{last}.weight"}
