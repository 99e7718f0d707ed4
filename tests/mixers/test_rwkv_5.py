"""RWKV-5: the published initialisation, its norm, its heads, and that it learns from silence.

Letters: B row, T time, D width.
"""

import pytest
import torch
from mixers.silent import assert_silent_layers_learn

from holdall.mixers.rwkv_5 import RWKV5Config
from holdall.testing import laws

WIDTH = 16


def test_it_starts_from_the_published_numbers() -> None:
    """In the third of four layers: 2/3 of the way down, and 1 - 2/4 of it left."""
    mixer = RWKV5Config(width=WIDTH, head_size=8, layer=2, layers=4).build()
    start_D = torch.tensor([i / WIDTH for i in range(WIDTH)])
    decay = [-6 + 5 * (i / (WIDTH - 1)) ** (0.7 + 1.3 * 2 / 3) for i in range(WIDTH)]
    bonus = [2 / 3 * (1 - i / (WIDTH - 1)) + 0.1 * ((i + 1) % 3 - 1) for i in range(WIDTH)]
    for name, got, want in (
        ("time_mix_k", mixer.time_mix_ZD[0], start_D**0.5),
        ("time_mix_v", mixer.time_mix_ZD[1], start_D**0.5 + 0.2),
        ("time_mix_r", mixer.time_mix_ZD[2], start_D**0.25),
        ("time_mix_g", mixer.time_mix_ZD[3], start_D**0.25),
        ("time_decay", mixer.time_decay, torch.tensor(decay).reshape(2, 8)),
        ("time_faaaa", mixer.time_faaaa, torch.tensor(bonus).reshape(2, 8)),
        ("ln_x.weight", mixer.norm_weight_D, torch.full((WIDTH,), (3 / 4) ** 0.7)),
        ("ln_x.bias", mixer.norm_bias_D, torch.zeros(WIDTH)),
        ("output", mixer.out_proj.weight, torch.zeros(WIDTH, WIDTH)),
    ):
        torch.testing.assert_close(got.detach(), want, msg=name)
    for layer, gain in ((mixer.receptance, 1), (mixer.key, 0.1), (mixer.value, 1), (mixer.gate, 0.1)):
        w = layer.weight.detach() / gain
        torch.testing.assert_close(w @ w.T, torch.eye(WIDTH), atol=1e-5, rtol=0)


def test_the_norm_is_a_group_norm_of_an_eighth_of_each_head() -> None:
    mixer = laws.build(RWKV5Config(width=WIDTH, head_size=4)).double()
    with torch.no_grad():
        mixer.key.weight *= 0.1  # outputs whose variance is beside the norm's epsilon
        mixer.time_mix_ZD.fill_(1.0)
        mixer.gate.weight.copy_(torch.eye(WIDTH))
        mixer.out_proj.weight.copy_(torch.eye(WIDTH))
    x_BTD = laws.tokens(mixer, 1)[:, 0]
    r, k, v = (layer(x_BTD).unflatten(-1, (4, 4)) for layer in (mixer.receptance, mixer.key, mixer.value))
    o_BD = ((r * mixer.time_faaaa * k).sum(-1, keepdim=True) * v).flatten(1)
    assert (o_BD / 8).var() < 1e-4
    norm = torch.nn.functional.group_norm(o_BD / 8, 4, mixer.norm_weight_D, mixer.norm_bias_D, eps=1e-5)
    y_BTD, _ = mixer(x_BTD[:, None])
    laws.assert_close("y", y_BTD[:, 0], norm * torch.nn.functional.silu(x_BTD))


def test_a_model_of_silent_layers_learns() -> None:
    layers = [RWKV5Config(width=WIDTH, head_size=8, layer=i, layers=2) for i in range(2)]
    assert_silent_layers_learn(layers, steps=60)


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (48, 1), (64, 1), (128, 2)])
def test_heads_have_64_dimensions_where_there_is_room(width: int, heads: int) -> None:
    mixer = RWKV5Config(width=width).build()
    assert mixer.time_decay.shape == (heads, width // heads)
    for name, parameter in mixer.named_parameters():
        assert parameter.isfinite().all(), name


def test_configs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of head_size 64"):
        RWKV5Config(width=96)
    with pytest.raises(ValueError, match="layer 2 is none of 2"):
        RWKV5Config(layer=2, layers=2)
    with pytest.raises(ValueError, match="chunk 48 is not a power of two"):
        RWKV5Config(chunk=48)
