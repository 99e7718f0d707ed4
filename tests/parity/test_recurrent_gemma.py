"""Hawk and Griffin's local attention against RecurrentGemma in transformers, an independent implementation.

Letters: B row, T time, D width, E channels.
"""

import warnings
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from holdall.mixers.hawk import Hawk, HawkConfig
from holdall.mixers.sliding_window import SlidingWindow
from holdall.recipes.patterns import griffin
from holdall.testing import laws

WIDTH, HEADS, LENGTH, STEPS = 16, 4, 20, 5


@pytest.fixture(scope="module")
def gemma() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="transformers is not installed")
        from transformers.models.recurrent_gemma import modeling_recurrent_gemma

    return modeling_recurrent_gemma


def config_of(gemma: ModuleType, **options):
    options = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "vocab_size": 10, **options}
    return gemma.RecurrentGemmaConfig(num_hidden_layers=3, intermediate_size=32, **options)


def perturbed(module: nn.Module) -> nn.Module:
    """Random weights everywhere: initial zeros and ones would hide wrong terms, and some are not set."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(0.4 * laws.draw(*parameter.shape, dtype=torch.float64, seed=i))
    return module.eval()


def load_recurrent_block(block: nn.Module, mixer: Hawk) -> None:
    """Their weights into ours, as the mixer's docstring says."""
    lru = block.rg_lru
    ours = {
        "in_proj.weight": torch.cat((block.linear_y.weight, block.linear_x.weight)),
        "in_proj.bias": torch.cat((block.linear_y.bias, block.linear_x.bias)),
        "conv_weight_EW": block.conv_1d.weight[:, 0],
        "conv_bias_E": block.conv_1d.bias,
        "gate_weight_GHIJ": torch.stack((lru.input_gate_weight, lru.recurrent_gate_weight)),
        "gate_bias_GHJ": torch.stack((lru.input_gate_bias, lru.recurrent_gate_bias)),
        "a_param_E": lru.recurrent_param,
        "out_proj.weight": block.linear_out.weight,
        "out_proj.bias": block.linear_out.bias,
    }
    mixer.load_state_dict(ours)


@pytest.mark.claim("mixers/hawk.py", "Weights")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("lru_width", [WIDTH, 24])
@torch.no_grad()
def test_hawk_is_recurrent_gemmas_block(gemma: ModuleType, lru_width: int, form: str) -> None:
    block = perturbed(gemma.RecurrentGemmaRecurrentBlock(config_of(gemma, lru_width=lru_width), 0))
    mixer = HawkConfig(width=WIDTH, lru_width=lru_width, heads=HEADS, chunk=8, form=form).build().eval()
    load_recurrent_block(block, mixer)
    x_BTD = laws.draw(2, LENGTH + STEPS, WIDTH, dtype=torch.float32)
    position_BT = torch.arange(LENGTH + STEPS).expand(2, -1)
    pieces = [LENGTH] + [1] * STEPS
    want_BTD = torch.cat(
        [
            block(piece, position, None)[0]
            for piece, position in zip(x_BTD.split(pieces, 1), position_BT.split(pieces, 1), strict=True)
        ],
        dim=1,
    )
    y_BTD, state = mixer(x_BTD)
    for name, got, want in (
        ("output", y_BTD, want_BTD),
        ("recurrent state", state.h_BE, block.rg_lru.recurrent_states),
        ("convolution's inputs", state.conv_BPE, block.conv1d_state.mT),
    ):
        laws.assert_close(name, got, want, 1e-6 * laws.size(want))


@pytest.mark.claim("mixers/sliding_window.py", "recurrentgemma's")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_griffins_window_is_recurrent_gemmas_attention(gemma: ModuleType, form: str) -> None:
    past = 6  # tokens before each one that it sees
    config = config_of(gemma, num_key_value_heads=1, attn_implementation="eager")
    theirs = perturbed(gemma.RecurrentGemmaAttention(config, 2))
    _, _, local = griffin(WIDTH, window=past + 1, heads=HEADS)
    mixer = replace(local, form=form).build().eval()
    assert isinstance(mixer, SlidingWindow)
    weights = {
        "project.qkv.weight": torch.cat([theirs.get_submodule(f"{z}_proj").weight for z in "qkv"]),
        "out_proj.weight": theirs.o_proj.weight,
        "out_proj.bias": theirs.o_proj.bias,
    }
    mixer.load_state_dict(weights)
    x_BTD = laws.draw(2, LENGTH, WIDTH, dtype=torch.float32)
    position_T = torch.arange(LENGTH)
    lag_TT = position_T[:, None] - position_T
    mask_TT = torch.zeros(LENGTH, LENGTH).masked_fill((lag_TT < 0) | (lag_TT > past), -torch.inf)
    want_BTD, _ = theirs(x_BTD, position_T.expand(2, -1), mask_TT)
    y_BTD, state = mixer(x_BTD)
    laws.assert_close("output", y_BTD, want_BTD, 1e-6 * laws.size(want_BTD))
    assert state.k_BSHK.shape == state.v_BSHV.shape == (2, past, 1, WIDTH // HEADS)


@pytest.mark.claim("mixers/hawk.py", "a^8 is drawn")
@torch.no_grad()
def test_hawk_draws_the_eighth_power_of_what_the_released_code_draws(gemma: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = gemma.RecurrentGemmaModel(config_of(gemma, lru_width=400)).layers[0].temporal_block.rg_lru
    a_E = torch.exp(-nn.functional.softplus(theirs.recurrent_param))
    b_E = torch.exp(-nn.functional.softplus(HawkConfig(width=16, lru_width=400).build().a_param_E))
    for name, kept_E in (("theirs", a_E), ("ours", b_E**8)):
        assert 0.9 - 1e-6 <= kept_E.min() < 0.905, name
        assert 0.994 < kept_E.max() <= 0.9991, name
