"""What a user puts in a linear layer's place is what runs: LoRA, quantised layers, hooks.

A layer that reads its weight past the module, to fuse or widen a product, would bypass it in silence, since
LoRA's layer has the old weight too. So every linear layer of every mixer, in all variants and forms that run
here, is replaced by one that has the old weight and computes with another; the outputs must be those of a
model that has the other weight.
"""

from __future__ import annotations

import pytest
import torch
from replaced import changed, linear_layers
from torch import Tensor, nn

from holdall import mixers
from holdall.contract import MixerConfig
from holdall.model import MLP, ModelConfig, seeded
from holdall.ops.linear import is_plain
from holdall.testing import laws

FORMS = [
    pytest.param(case.config, form, id=f"{case}-{form}")
    for case in laws.cases()
    for form in ("loop", "parallel")
    if form in case.config.forms
]


@pytest.mark.parametrize(("config", "form"), FORMS)
@torch.no_grad()
def test_every_layer_of_a_mixer_is_the_one_that_runs(config: MixerConfig, form: str) -> None:
    mixer = laws.build(config).double()
    mixer.form = form
    x_BTD = laws.tokens(mixer, 9)
    before_BTD, _ = mixer(x_BTD)
    for name in linear_layers(mixer):
        wrapped, merged = changed(mixer, name)
        got_BTD, after = wrapped(x_BTD[:, :5])
        more_BTD, _ = wrapped(x_BTD[:, 5:], after)
        want_BTD, state = merged(x_BTD[:, :5])
        torch.testing.assert_close(got_BTD, want_BTD, rtol=1e-9, atol=1e-9, msg=f"{name} is bypassed")
        torch.testing.assert_close(more_BTD, merged(x_BTD[:, 5:], state)[0], rtol=1e-9, atol=1e-9)
        assert not torch.equal(wrapped(x_BTD)[0], before_BTD), name


@torch.no_grad()
def test_every_layer_of_a_model_is_the_one_that_runs() -> None:
    layers = (mixers.entry("taylor").configure(width=16), mixers.entry("base-conv").configure(width=16))
    for kind in ("gelu", "swiglu"):
        config = ModelConfig(vocab=40, width=16, layers=layers, mlp=24, mlp_kind=kind, tied=False)
        with seeded(0):
            model = config.build().double()
        tokens_BT = torch.arange(8)[None]
        names = linear_layers(model)
        assert {"head", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"} < set(names)
        for name in names:
            wrapped, merged = changed(model, name)
            torch.testing.assert_close(wrapped(tokens_BT)[0], merged(tokens_BT)[0], rtol=1e-9, atol=1e-9)
            assert not torch.equal(wrapped(tokens_BT)[0], model(tokens_BT)[0]), name
        wrapped, _ = changed(model, "head")
        with pytest.raises(ValueError, match="the head is a Adapted"):
            _ = wrapped.head_weight


@torch.no_grad()
def test_hooks_and_parametrisations_run() -> None:
    mlp = MLP(8, 12, "swiglu").double()
    x = laws.draw(3, 8, dtype=torch.float64)
    before = mlp(x)
    assert is_plain(mlp.fc1)
    handle = mlp.fc1.register_forward_hook(lambda _layer, _args, y: 2 * y)
    assert not is_plain(mlp.fc1)
    assert not torch.equal(mlp(x), before)
    handle.remove()
    assert torch.equal(mlp(x), before)

    forward = mlp.fc1.forward
    mlp.fc1.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    assert not torch.equal(mlp(x), before)
    del mlp.fc1.forward
    assert torch.equal(mlp(x), before)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(mlp.fc1, "weight", Doubled())
    assert not torch.equal(mlp(x), before)
