"""What a user puts in a linear layer's place runs beside kernels too: see tests/test_replaced_layers.py."""

from __future__ import annotations

import pytest
import torch
from replaced import changed, linear_layers

from holdall import mixers
from holdall.testing import laws


@pytest.mark.parametrize(
    ("name", "options", "length"),
    [
        ("base-conv", {}, 3),
        ("base-conv", {"expand": 2}, 3),
        pytest.param("gla", {"heads": 1}, 3, marks=pytest.mark.full),
        pytest.param("gated-delta-net", {}, 3, marks=pytest.mark.full),
        ("h3", {"state": 4}, 3),
        ("hyena", {}, 3),
        ("mamba", {"state": 4}, 3),
        ("mamba-2", {}, 3),
        ("rwkv-7", {}, 32),  # so many that all maps would be one product
    ],
)
@torch.no_grad()
def test_every_layer_of_a_mixer_is_the_one_that_runs(
    name: str, options: dict[str, int], length: int, device: torch.device
) -> None:
    mixer = laws.build(mixers.entry(name).configure(width=16, **options)).to(device)
    mixer.form = "kernel"
    x_BTD = laws.tokens(mixer, length).to(device)
    for layer in linear_layers(mixer):
        wrapped, merged = changed(mixer, layer)
        got_BTD, _ = wrapped(x_BTD, want_state=False)
        want_BTD, _ = merged(x_BTD, want_state=False)
        torch.testing.assert_close(got_BTD, want_BTD, rtol=1e-3, atol=1e-4, msg=f"{layer} is bypassed")
        assert not torch.equal(got_BTD, mixer(x_BTD, want_state=False)[0]), layer
