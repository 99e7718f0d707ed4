"""Linformer: what it carries from call to call, and where its positions end."""

import pytest
import torch

from holdall.mixers.linformer import LinformerConfig
from holdall.testing import laws

DOUBLE = torch.float64


@pytest.mark.claim("mixers/linformer.py", "an output sees")
@torch.no_grad()
def test_an_output_sees_its_whole_call_and_all_calls_before() -> None:
    mixer = laws.build(LinformerConfig(width=8, heads=2, rank=3, max_length=40)).double()
    x_BTD = laws.draw(2, 40, 8, dtype=DOUBLE)
    whole_BTD, end = mixer(x_BTD)
    _, state = mixer(x_BTD[:, :25])
    late_BTD, after = mixer(x_BTD[:, 25:], state)
    laws.assert_close("the last call's outputs", late_BTD, whole_BTD[:, 25:])
    for name, tensor in laws.named(late_BTD, after).items():
        if name != "output":
            laws.assert_close(name, tensor, laws.named(whole_BTD, end)[name])
    other_BTD = x_BTD.clone()
    other_BTD[:, -1] += 1
    assert laws.distance(mixer(other_BTD)[0][:, 0], whole_BTD[:, 0]) > 1e-4


@pytest.mark.claim("mixers/linformer.py", "Weights")
def test_positions_beyond_max_length_are_an_error() -> None:
    mixer = LinformerConfig(width=8, max_length=10).build()
    with pytest.raises(ValueError, match="11 tokens, but linformer has max_length 10"):
        mixer(torch.zeros(1, 11, 8))
    _, state = mixer(torch.zeros(1, 9, 8))
    with pytest.raises(ValueError, match="11 tokens, 9 of them read before, but linformer has max_length 10"):
        mixer(torch.zeros(1, 2, 8), state)


@pytest.mark.parametrize("options", [{"rank": 0}, {"max_length": 0}, {"heads": 3}])
def test_bad_settings_name_the_numbers(options: dict) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}( =)? {value}"):
        LinformerConfig(width=8, **options)
