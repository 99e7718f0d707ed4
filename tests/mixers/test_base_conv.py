"""BaseConv as the Based language models have it, derived once more from torch's own layers; and its sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdall.mixers.base_conv import BaseConvConfig, ConvState
from holdall.ops.short_conv import short_conv
from holdall.testing import laws

DOUBLE = torch.float64


class Official(nn.Module):
    """Based's layer: parameters under its names, every step by a layer of torch."""

    def __init__(self, width: int, kernel: int, expand: int) -> None:
        super().__init__()
        self.inner = expand * width // 2
        self.in_proj = nn.Linear(width, expand * width)
        self.out_proj = nn.Linear(self.inner, width)
        self.conv = nn.Module()
        self.conv.conv = nn.Conv1d(
            self.inner, self.inner, kernel, groups=self.inner, padding=kernel - 1, bias=False
        )

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        u_BTE = self.in_proj(x_BTD)
        c_BDT = self.conv.conv(u_BTE[..., : self.inner].mT)[..., : x_BTD.shape[1]]
        return self.out_proj(F.silu(c_BDT).mT * u_BTE[..., self.inner :])


@pytest.mark.claim("mixers/base_conv.py", "Based's BaseConv", "of the W inputs")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("expand", [1, 2, 4])
@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_expanded_is_baseds_layer(form: str, expand: int, kernel: int, length: int) -> None:
    mixer = laws.build(BaseConvConfig(width=6, expand=expand, kernel=kernel, form=form)).double()
    official = Official(6, kernel, expand).double()
    weights = {name: tensor for name, tensor in mixer.state_dict().items() if name != "weight_DW"}
    official.load_state_dict({**weights, "conv.conv.weight": mixer.weight_DW.detach()[:, None]})
    x_BTD = laws.tokens(mixer, length)
    y_BTD, state = mixer(x_BTD)
    laws.assert_close("y", y_BTD, official(x_BTD))
    u_BTD = official.in_proj(x_BTD)[..., : official.inner]
    laws.assert_close("past", state.past_BPD, F.pad(u_BTD, (0, 0, kernel - 1, 0))[:, length:])


@pytest.mark.parametrize(("width", "count"), [(1024, 6_302_720), (1792, 19_287_296)], ids=["360M", "1.3B"])
def test_the_language_models_layer_has_their_parameters(width: int, count: int) -> None:
    with torch.device("meta"):
        mixer = BaseConvConfig(width=width, expand=4).build()
    shapes = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert shapes == {
        "weight_DW": (2 * width, 3),
        "in_proj.weight": (4 * width, width),
        "in_proj.bias": (4 * width,),
        "out_proj.weight": (width, 2 * width),
        "out_proj.bias": (width,),
    }
    assert sum(parameter.numel() for parameter in mixer.parameters()) == count
    assert mixer.state_elements(2048) == 2 * 2 * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_zoologys_is_its_equation_to_the_bit(activation: str, dtype: torch.dtype) -> None:
    mixer = laws.build(BaseConvConfig(width=12, activation=activation, form="parallel")).to(dtype)
    x_BTD, past_BPD = laws.tokens(mixer, 20), laws.draw(2, 2, 12, dtype=dtype, seed=1)
    y_BTD, state = mixer(x_BTD, ConvState(past_BPD))
    c_BTD, next_BPD = short_conv(x_BTD, mixer.weight_DW, mixer.bias_D, past_BPD)
    gate_BTD = F.linear(x_BTD, mixer.projection.weight, mixer.projection.bias)
    if activation == "silu":
        c_BTD, gate_BTD = F.silu(c_BTD), F.silu(gate_BTD)
    laws.assert_bitwise("y", y_BTD, torch.addcmul(x_BTD, c_BTD, gate_BTD))
    laws.assert_bitwise("past", state.past_BPD, next_BPD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 5, "expand": 3}, "expand 3 times width 5 is not an even number"),
        ({"expand": 0}, "expand = 0"),
        ({"expand": 4, "filter": "long"}, "leave filter and activation"),
        ({"expand": 4, "activation": "silu"}, "leave filter and activation"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseConvConfig(**options)
