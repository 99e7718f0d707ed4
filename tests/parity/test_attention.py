"""Softmax attention against Llama, GPT-NeoX and Mistral in transformers: masks, positions and caches theirs.

Letters: B row, T time, D width, S slots, H heads (G of keys and values), K head dim.
"""

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from holdall.contract import Mixer
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.testing import laws

WIDTH, HEADS, BASE = 32, 4, 500.0
FORMS = pytest.mark.parametrize("form", ["loop", "blockwise", "parallel"])


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers", reason="transformers is not installed")
        import transformers.models.gpt_neox.modeling_gpt_neox
        import transformers.models.llama.modeling_llama
        import transformers.models.mistral.modeling_mistral  # noqa: F401 - makes the submodules known
    return module


def theirs_of(attention: type[nn.Module], config: Any) -> nn.Module:
    """With biases that are not zero."""
    theirs = attention(config, layer_idx=0).eval()
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.4 * laws.draw(*parameter.shape, dtype=torch.float32, seed=i))
    return theirs


def load_projections(theirs: nn.Module, mixer: Mixer) -> None:
    """Weights, and biases where there are, of Llama's and Mistral's attention into ours."""
    own = theirs.state_dict()
    ours = {}
    for kind in ("weight", "bias"):
        if f"o_proj.{kind}" in own:
            ours[f"project.qkv.{kind}"] = torch.cat([own[f"{name}_proj.{kind}"] for name in "qkv"])
            ours[f"out_proj.{kind}"] = own[f"o_proj.{kind}"]
    mixer.load_state_dict(ours)


def load_neox(theirs: nn.Module, mixer: Mixer) -> None:
    """GPT-NeoX holds each head's query, key and value rows together."""
    own = theirs.state_dict()
    ours = {}
    for kind in ("weight", "bias"):
        rows = own[f"query_key_value.{kind}"].unflatten(0, (HEADS, 3, WIDTH // HEADS))
        ours[f"project.qkv.{kind}"] = rows.transpose(0, 1).flatten(0, 2)
        ours[f"out_proj.{kind}"] = own[f"dense.{kind}"]
    mixer.load_state_dict(ours)


def assert_reads_the_same(
    transformers: ModuleType,
    theirs: nn.Module,
    mixer: Mixer,
    rotary: type[nn.Module],
    prompt: int,
    steps: int,
) -> None:
    """A prompt, then single tokens: outputs, and keys and values kept; theirs stand oldest first."""
    config = theirs.config
    masks = transformers.masking_utils
    windowed = config.model_type == "mistral"
    mask_of = masks.create_sliding_window_causal_mask if windowed else masks.create_causal_mask
    turns, cache, state, start = rotary(config), transformers.DynamicCache(config=config), None, 0
    cache_name = "layer_past" if config.model_type == "gpt_neox" else "past_key_values"
    for piece_BTD in laws.tokens(mixer, prompt + steps).split([prompt] + [1] * steps, dim=1):
        stop = start + piece_BTD.shape[1]
        position_1T = torch.arange(start, stop)[None]
        mask = mask_of(config, piece_BTD, None, cache, position_ids=position_1T)
        want_BTD, _ = theirs(
            piece_BTD, attention_mask=mask, position_embeddings=turns(piece_BTD, position_1T),
            **{cache_name: cache},
        )  # fmt: skip
        y_BTD, state = mixer(piece_BTD, state)
        laws.assert_close("output", y_BTD, want_BTD, 1e-5 * laws.size(want_BTD))
        assert state.seen_B.unique().tolist() == [stop]
        for name, got_BSGK, want in (
            ("keys", state.k_BSHK, cache.layers[0].keys),
            ("values", state.v_BSHV, cache.layers[0].values),
        ):
            want_BSGK = want.transpose(1, 2)
            kept = got_BSGK[:, torch.arange(stop - want_BSGK.shape[1], stop) % got_BSGK.shape[1]]
            laws.assert_close(name, kept, want_BSGK, 1e-5 * laws.size(want_BSGK))
        start = stop


@FORMS
@pytest.mark.parametrize(("kv_heads", "bias"), [(4, False), (2, False), (1, True)])
@torch.no_grad()
def test_attention_is_llamas(transformers: ModuleType, kv_heads: int, bias: bool, form: str) -> None:
    llama = transformers.models.llama.modeling_llama
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=kv_heads, attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": BASE}, num_hidden_layers=1,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = theirs_of(llama.LlamaAttention, config)
    options = {"heads": HEADS, "kv_heads": kv_heads, "rotary": 1.0, "rotary_base": BASE, "bias": bias}
    mixer = AttentionConfig(width=WIDTH, block=16, form=form, **options).build()
    load_projections(theirs, mixer)
    assert_reads_the_same(transformers, theirs, mixer, llama.LlamaRotaryEmbedding, prompt=37, steps=3)


@FORMS
@pytest.mark.parametrize("rotary", [0.25, 0.4, 0.5])  # of 8 dimensions: 0.4 makes 2 pairs of 3
@torch.no_grad()
def test_attention_with_part_of_a_head_turned_is_gpt_neoxs(
    transformers: ModuleType, rotary: float, form: str
) -> None:
    neox = transformers.models.gpt_neox.modeling_gpt_neox
    config = transformers.GPTNeoXConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=1, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": BASE, "partial_rotary_factor": rotary},
    )  # fmt: skip
    theirs = theirs_of(neox.GPTNeoXAttention, config)
    options = {"heads": HEADS, "rotary": rotary, "rotary_base": BASE, "block": 16}
    mixer = AttentionConfig(width=WIDTH, form=form, **options).build()
    load_neox(theirs, mixer)
    assert_reads_the_same(transformers, theirs, mixer, neox.GPTNeoXRotaryEmbedding, prompt=37, steps=3)


@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("prompt", [3, 37])  # shorter than the window, and longer
@pytest.mark.parametrize(("window", "kv_heads"), [(6, 2), (17, 4)])
@torch.no_grad()
def test_sliding_window_is_mistrals(
    transformers: ModuleType, window: int, kv_heads: int, prompt: int, form: str
) -> None:
    """Mistral's window counts the token itself, as ours does."""
    mistral = transformers.models.mistral.modeling_mistral
    config = transformers.MistralConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=kv_heads, sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": BASE}, num_hidden_layers=1,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = theirs_of(mistral.MistralAttention, config)
    options = {"heads": HEADS, "kv_heads": kv_heads, "rotary": 1.0, "rotary_base": BASE, "bias": False}
    mixer = SlidingWindowConfig(width=WIDTH, window=window, form=form, **options).build()
    load_projections(theirs, mixer)
    assert_reads_the_same(transformers, theirs, mixer, mistral.MistralRotaryEmbedding, prompt, steps=window)
