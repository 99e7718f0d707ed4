"""OLMo Hybrid: gated delta net layers, and attention in every fourth layer, whose norms come after.

The `transformers` library's olmo_hybrid. The delta net layers have their norms in front, as usual. The
attention layers read the residual stream as it is; they normalise the queries of all heads together, and the
keys.

Letters: D width, W taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holdall.adapters.llama import attention_weights, rotary
from holdall.adapters.parts import block, gated_mlp, layer_kinds, outer_weights
from holdall.adapters.qwen import FULL, LINEAR, delta_net_config
from holdall.adapters.reading import Fields, Weights
from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.model import ModelConfig

DELTA_NET_EPS = 1e-5
"""Of the norm of each head's output, whatever `rms_norm_eps` is for the others."""


def olmo_hybrid(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    fields.only("hidden_act", "silu")
    # initialisation; dropout; the longest text that it was trained on
    fields.ignore(
        "linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor",
        "attention_dropout", "max_position_embeddings",
    )  # fmt: skip
    width, layers = fields.number("hidden_size"), fields.number("num_hidden_layers")
    kinds = layer_kinds(
        fields, (LINEAR, FULL), [FULL if depth % 4 == 3 else LINEAR for depth in range(layers)]
    )
    heads, eps = fields.number("num_attention_heads"), fields.take("rms_norm_eps", 1e-6)
    key_heads = fields.number("linear_num_key_heads", heads)
    key_dim = fields.number("linear_key_head_dim", int(0.75 * width / max(key_heads, 1)))
    delta_net = delta_net_config(
        fields, width, eps=DELTA_NET_EPS,
        negative_eigenvalues=fields.only("linear_allow_neg_eigval", True, False),
        linear_num_key_heads=heads, linear_num_value_heads=heads, linear_key_head_dim=key_dim,
        linear_value_head_dim=2 * key_dim,
    )  # fmt: skip
    bias = fields.only("attention_bias", False, True)
    attention = AttentionConfig(
        width=width, heads=heads, kv_heads=fields.number("num_key_value_heads", heads),
        head_dim=fields.number("head_dim", 0), bias=bias, qk_norm="all", qk_norm_eps=eps, **_rotary(fields),
    )  # fmt: skip
    _rename(weights, layers)
    tied = fields.only("tie_word_embeddings", False, True)
    tensors = outer_weights(weights, "model.embed_tokens.weight", "model.norm.weight", tied=tied)
    mixers: list[MixerConfig] = []
    for depth, kind in enumerate(kinds):
        there = f"model.layers.{depth}"
        if kind == LINEAR:
            mixers.append(delta_net)
            names = "input", "post_attention"
            mixer = _delta_net(weights, f"{there}.linear_attn")
        else:
            mixers.append(attention)
            names = "post_attention", "post_feedforward"
            mixer = attention_weights(weights, f"{there}.self_attn.", "", bias, qk_norm=True)
        norms = [weights.take(f"{there}.{name}_layernorm.weight") for name in names]
        mlp = gated_mlp(weights, *(f"{there}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")))
        tensors |= block(depth, norms[0], mixer, norms[1], mlp)
    config = ModelConfig(
        vocab=fields.number("vocab_size"), width=width, layers=tuple(mixers), tied=tied, norm="rms", eps=eps,
        norms_after=tuple(depth for depth, kind in enumerate(kinds) if kind == FULL),
        mlp=fields.number("intermediate_size"), mlp_kind="swiglu",
    )  # fmt: skip
    return config, tensors


def _rotary(fields: Fields) -> dict[str, Any]:
    """Rotary positions, or none where their base is null, as in the released models."""
    if "rope_parameters" not in fields and "rope_theta" not in fields:
        raise fields.refused(
            "rope_parameters", None, "an object, since programs differ in what its absence means: "
            '{"rope_theta": null} for no positions, as the released models were trained, or a base'
        )  # fmt: skip
    given = fields.take("rope_parameters", {})
    turned = rotary(fields)
    none = isinstance(given, dict) and given.get("rope_theta", 0) is None
    return turned | {"rotary": 0.0, "rotary_scaling": ()} if none else turned


def _rename(weights: Weights, layers: int) -> None:
    """Released folders call two norms otherwise than the library's classes do."""
    names = {"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"}
    weights.rename(
        {
            f"model.layers.{depth}.{released}.": f"model.layers.{depth}.{name}."
            for depth in range(layers)
            for released, name in names.items()
        }
    )


def _delta_net(weights: Weights, there: str) -> dict[str, Tensor]:
    projections = {name: weights.take(f"{there}.{name}_proj.weight") for name in "qkvabgo"}
    if f"{there}.conv1d.weight" in weights:
        conv_E1W = weights.take(f"{there}.conv1d.weight")
    else:  # as released folders have it
        conv_E1W = torch.cat([weights.take(f"{there}.{name}_conv1d.weight") for name in "qkv"])
    return {
        "qkv.weight": torch.cat([projections[name] for name in "qkv"]),
        "ab_proj.weight": torch.cat([projections[name] for name in "ab"]),
        "gate_proj.weight": projections["g"],
        "out_proj.weight": projections["o"],
        "conv_weight_EW": conv_E1W.squeeze(1),
        "A_log": weights.take(f"{there}.A_log"),
        "dt_bias": weights.take(f"{there}.dt_bias"),
        "norm_weight_V": weights.take(f"{there}.o_norm.weight"),
    }
