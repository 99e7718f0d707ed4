"""LFM2: gated short convolutions, and attention with normalised queries and keys in some layers.

The `transformers` library's lfm2, as in LFM2 and LFM2.5; those with experts (lfm2_moe) are another kind.

Letters: D width, W taps.
"""

from __future__ import annotations

from torch import Tensor

from holdall.adapters.llama import attention_weights, rotary
from holdall.adapters.parts import block, gated_mlp, layer_kinds, outer_weights
from holdall.adapters.reading import Fields, Weights
from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.gated_short_conv import GatedShortConvConfig
from holdall.model import ModelConfig

CONV, FULL = "conv", "full_attention"


def lfm2(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    width, layers = fields.number("hidden_size"), fields.number("num_hidden_layers")
    heads, eps = fields.number("num_attention_heads"), fields.take("norm_eps", 1e-5)
    full = fields.take("full_attn_idxs", list(range(layers)))
    kinds = layer_kinds(fields, (CONV, FULL), [FULL if layer in full else CONV for layer in range(layers)])
    _refuse_what_is_said_twice(fields, width, heads, eps)
    conv = GatedShortConvConfig(
        width=width, kernel=fields.number("conv_L_cache", 3), bias=fields.only("conv_bias", False, True)
    )
    attention = AttentionConfig(
        width=width, heads=heads, kv_heads=fields.number("num_key_value_heads", heads),
        head_dim=fields.number("head_dim", 0), bias=False, qk_norm="head", qk_norm_eps=eps,
        **rotary(fields, 1_000_000.0),
    )  # fmt: skip
    said = fields.only("tie_word_embeddings", True, False)
    tied = fields.only("tie_embedding", said, not said)
    tensors = outer_weights(weights, "model.embed_tokens.weight", "model.embedding_norm.weight", tied=tied)
    mixers: list[MixerConfig] = []
    for depth, kind in enumerate(kinds):
        there = f"model.layers.{depth}"
        norms = [weights.take(f"{there}.{name}_norm.weight") for name in ("operator", "ffn")]
        if kind == CONV:
            mixers.append(conv)
            mixer = _conv(conv, weights, f"{there}.conv")
        else:
            mixers.append(attention)
            weights.rename(
                {
                    f"{there}.self_attn.out_proj": f"{there}.self_attn.o_proj",
                    f"{there}.self_attn.q_layernorm": f"{there}.self_attn.q_norm",
                    f"{there}.self_attn.k_layernorm": f"{there}.self_attn.k_norm",
                }
            )
            mixer = attention_weights(weights, f"{there}.self_attn.", "", qk_norm=True)
        mlp = gated_mlp(weights, *(f"{there}.feed_forward.w{name}.weight" for name in (1, 3, 2)))
        tensors |= block(depth, norms[0], mixer, norms[1], mlp)
    config = ModelConfig(
        vocab=fields.number("vocab_size"), width=width, layers=tuple(mixers), tied=tied,
        mlp=tensors["blocks.0.mlp.fc2.weight"].shape[1], mlp_kind="swiglu", norm="rms", eps=eps,
    )  # fmt: skip
    return config, tensors


def _refuse_what_is_said_twice(fields: Fields, width: int, heads: int, eps: float) -> None:
    """Fields of released folders that the `transformers` library does not read: they must say the same."""
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        fields.only(name, width)
    fields.only("num_heads", heads)
    fields.only("block_norm_eps", eps)
    fields.only("block_use_swiglu", True)
    fields.only("use_pos_enc", True)
    # the width of the MLPs, which their weights say; initialisation; the longest text that it was trained on
    fields.ignore(
        "intermediate_size", "block_ff_dim", "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier",
        "block_multiple_of", "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init",
        "conv_use_xavier_init", "max_position_embeddings",
    )  # fmt: skip


def _conv(config: GatedShortConvConfig, weights: Weights, there: str) -> dict[str, Tensor]:
    tensors = {"weight_DW": weights.take(f"{there}.conv.weight").squeeze(1)}
    if config.bias:
        tensors["bias_D"] = weights.take(f"{there}.conv.bias")
    for name in ("in_proj", "out_proj"):
        for kind in ("weight", "bias")[: 1 + config.bias]:
            tensors[f"{name}.{kind}"] = weights.take(f"{there}.{name}.{kind}")
    return tensors
