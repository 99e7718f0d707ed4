"""The language models of flash-linear-attention: gla, delta_net, gated_deltanet and retnet.

Its layouts are one block around different layers: RMS norms, SwiGLU, and perhaps softmax attention in the
layers that `attn` names. Its rwkv7 has another block: see holdall/adapters/rwkv7.py.

Letters: D width, E channels of a projection, H heads, K key dim, V value dim, W taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holdall.adapters.llama import attention_weights
from holdall.adapters.parts import block, gated_mlp, outer_weights
from holdall.adapters.reading import Fields, Weights
from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.gated_delta_net import GatedDeltaNetConfig
from holdall.mixers.gla import GLAConfig
from holdall.mixers.retnet import RetNetConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig

Read = tuple[ModelConfig, dict[str, Tensor]]
Layer = Callable[[Weights, str], dict[str, Tensor]]
"""From the weights and where a layer's begin to those of the mixer."""


def gla(fields: Fields, weights: Weights) -> Read:
    fields.only("use_gk", True)
    fields.only("use_gv", False)
    fields.only("clamp_min", None)
    fields.only("feature_map", None)
    fields.only("use_output_gate", True)
    kernel = _taps(fields, used=False)
    heads = fields.number("num_heads", 4)
    down, width = "attn.gk_proj.0.weight", fields.number("hidden_size")
    rank = next((len(weights.look(name)) for name in weights.names if name.endswith(down)), 16)
    fields.only("gate_low_rank_dim", rank)
    config = GLAConfig(
        width=width, heads=heads, gate_rank=rank,
        key_ratio=fields.take("expand_k", 0.5), value_ratio=fields.take("expand_v", 1.0),
        tau=fields.take("gate_logit_normalizer", 16), kernel=kernel, eps=_eps(fields),
    )  # fmt: skip
    shared = _shared_keys(fields, heads)

    def layer(weights: Weights, there: str) -> dict[str, Tensor]:
        return {
            "qkvg.weight": _side_by_side(weights, there, "qkvg", "proj", shared),
            "gate_down.weight": weights.take(f"{there}.gk_proj.0.weight"),
            "gate_up.weight": shared(weights.take(f"{there}.gk_proj.1.weight")),
            "gate_up.bias": shared(weights.take(f"{there}.gk_proj.1.bias")),
            "norm_weight_V": _gated_norm(fields, weights, there, config.values // heads),
            "out_proj.weight": weights.take(f"{there}.o_proj.weight"),
        } | _convolution(weights, there, kernel, shared)

    return _model(fields, weights, config, layer)


def delta_net(fields: Fields, weights: Weights) -> Read:
    for name in ("expand_k", "expand_v"):
        fields.only(name, 1)
    fields.only("use_beta", True)
    fields.only("use_output_norm", True)
    kernel = _taps(fields, used=True)
    activation = fields.only("qk_activation", "silu", "elu")
    fields.only("qk_norm", "l2" if activation == "silu" else "sum", default="l2")
    config = DeltaNetConfig(
        width=fields.number("hidden_size"), heads=fields.number("num_heads", 16), kernel=kernel,
        key_map="silu" if activation == "silu" else "elu1",
        gate=fields.only("use_gate", False, True), eps=_eps(fields),
        negative_eigenvalues=fields.only("allow_neg_eigval", False, True),
    )  # fmt: skip

    def layer(weights: Weights, there: str) -> dict[str, Tensor]:
        tensors = {
            "qkv.weight": _side_by_side(weights, there, "qkv", "proj"),
            "beta_proj.weight": weights.take(f"{there}.b_proj.weight"),
            "norm_weight_V": weights.take(f"{there}.o_norm.weight"),
            "out_proj.weight": weights.take(f"{there}.o_proj.weight"),
        }
        if config.gate:
            tensors["gate_proj.weight"] = weights.take(f"{there}.g_proj.weight")
        return tensors | _convolution(weights, there, kernel)

    return _model(fields, weights, config, layer)


def gated_deltanet(fields: Fields, weights: Weights) -> Read:
    fields.only("output_gate_activation", "swish", "silu")
    kernel = _taps(fields, used=True)
    heads = fields.number("num_heads", 6)
    config = GatedDeltaNetConfig(
        width=fields.number("hidden_size"), heads=heads, value_heads=fields.number("num_v_heads", heads),
        head_dim=fields.number("head_dim", 256), value_ratio=_whole(fields, "expand_v", 2),
        # without a convolution: one of two taps, which passes on what it gets
        kernel=kernel or 2, gate=fields.only("use_gate", True, False), eps=_eps(fields),
        negative_eigenvalues=fields.only("allow_neg_eigval", False, True),
    )  # fmt: skip

    def layer(weights: Weights, there: str) -> dict[str, Tensor]:
        a_ED, beta_ED = (weights.take(f"{there}.{name}_proj.weight") for name in "ab")
        tensors = {
            "qkv.weight": _side_by_side(weights, there, "qkv", "proj"),
            "ab_proj.weight": torch.cat((a_ED, beta_ED)),
            "A_log": weights.take(f"{there}.A_log"),
            "dt_bias": weights.take(f"{there}.dt_bias"),
            "norm_weight_V": weights.take(f"{there}.o_norm.weight"),
            "out_proj.weight": weights.take(f"{there}.o_proj.weight"),
            "conv_weight_EW": torch.tensor([0.0, 1.0]).expand(sum(config.sizes), 2),
        }
        if config.gate:
            tensors["gate_proj.weight"] = weights.take(f"{there}.g_proj.weight")
        return tensors | _convolution(weights, there, kernel)

    return _model(fields, weights, config, layer)


def retnet(fields: Fields, weights: Weights) -> Read:
    fields.only("expand_k", 1)
    fields.only("feature_map", None)
    fields.only("use_output_gate", True)
    fields.only("use_short_conv", False)  # which its blocks do not pass on
    fields.ignore("conv_size")
    width, heads = fields.number("hidden_size"), fields.number("num_heads", 8)
    config = RetNetConfig(
        width=width, heads=heads, value_ratio=_whole(fields, "expand_v", 2), eps=_eps(fields),
        angles="standard", scaled=False,
    )  # fmt: skip
    shared = _shared_keys(fields, heads)

    def layer(weights: Weights, there: str) -> dict[str, Tensor]:
        q_ED, k_ED, v_ED, gate_ED = (weights.take(f"{there}.{name}_proj.weight") for name in "qkvg")
        # the norm's weight has no place of its own: the gate comes after it, and is per element
        norm_E = (
            _gated_norm(fields, weights, there, config.value_ratio * width // heads).float().repeat(heads)
        )
        return {
            "qkvg.weight": torch.cat(
                (_interleaved(q_ED, heads), _interleaved(shared(k_ED), heads), shared(v_ED), gate_ED)
            ),
            "out_proj.weight": weights.take(f"{there}.o_proj.weight").float() * norm_E,
        }

    return _model(fields, weights, config, layer)


def _model(fields: Fields, weights: Weights, config: MixerConfig, layer: Layer) -> Read:
    """Around layers of one kind, and those of softmax attention that `attn` names."""
    fields.only("hidden_act", "swish", "silu")
    fields.only("attnres_block_size", None)
    # how its kernels compute, and sizes that the weights say
    fields.ignore(
        "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy",
        "use_l2warp", "max_position_embeddings", "hidden_ratio", "intermediate_size",
    )  # fmt: skip
    layers, attention = fields.number("num_hidden_layers"), _attention_layers(fields)
    tied = fields.only("tie_word_embeddings", False, True)
    tensors = outer_weights(weights, "model.embeddings.weight", "model.norm.weight", tied=tied)
    mixers: list[MixerConfig] = []
    for depth in range(layers):
        there = f"model.layers.{depth}"
        norms = [weights.take(f"{there}.{name}_norm.weight") for name in ("attn", "mlp")]
        mixers.append(attention.get(depth, config))
        if depth in attention:
            mixer = attention_weights(weights, f"{there}.attn.", "", attention[depth].bias)
        else:
            mixer = layer(weights, f"{there}.attn")
        mlp = gated_mlp(weights, *(f"{there}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")))
        tensors |= block(depth, norms[0], mixer, norms[1], mlp)
    return ModelConfig(
        vocab=fields.number("vocab_size"), width=config.width, layers=tuple(mixers), tied=tied,
        mlp=tensors["blocks.0.mlp.fc2.weight"].shape[1], mlp_kind="swiglu", norm="rms", eps=_eps(fields),
    ), tensors  # fmt: skip


def _eps(fields: Fields) -> float:
    """Of all norms; older versions call it as `transformers` does."""
    return fields.take("norm_eps", fields.take("rms_norm_eps", 1e-6))


def _whole(fields: Fields, name: str, otherwise: int) -> int:
    """A ratio that is written as a number with a point, but must be whole."""
    ratio = fields.take(name, otherwise)
    if not isinstance(ratio, int | float) or ratio < 1 or ratio % 1:
        raise fields.refused(name, ratio, "a whole number above 0")
    return int(ratio)


def _taps(fields: Fields, *, used: bool) -> int:
    """Taps of the short convolution, 0 for none; `used`: whether there is one where nothing is said."""
    taps = fields.number("conv_size", 4)
    if not fields.only("use_short_conv", used, not used):
        fields.ignore("share_conv_kernel")
        return 0
    fields.only("share_conv_kernel", False)
    return taps


def _shared_keys(fields: Fields, heads: int) -> Callable[[Tensor], Tensor]:
    """What repeats the rows of each key and value head for all query heads that share it."""
    given = fields.number("num_kv_heads", heads)
    if not given or heads % given:
        raise fields.refused("num_kv_heads", given, f"a divisor of num_heads {heads}")
    return lambda rows: rows.unflatten(0, (given, -1)).repeat_interleave(heads // given, dim=0).flatten(0, 1)


def _side_by_side(
    weights: Weights,
    there: str,
    names: str,
    kind: str,
    shared: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """The rows of q, k and v, and of the gate g, one below the other; keys and values for all their heads."""
    rows = {name: weights.take(f"{there}.{name}_{kind}.weight") for name in names}
    return torch.cat([shared(weight) if name in "kv" else weight for name, weight in rows.items()])


def _convolution(
    weights: Weights, there: str, taps: int, shared: Callable[[Tensor], Tensor] = lambda rows: rows
) -> dict[str, Tensor]:
    if not taps:
        return {}
    return {"conv_weight_EW": _side_by_side(weights, there, "qkv", "conv1d", shared).squeeze(1)}


def _gated_norm(fields: Fields, weights: Weights, there: str, size: int) -> Tensor:
    """The weight of the norm of each head before its gate; its name says whether one kernel does both."""
    if not fields.only("elementwise_affine", True, False):
        return torch.ones(size)
    fused = f"{there}.g_norm_swish_gate.weight"
    return weights.take(fused if fused in weights else f"{there}.g_norm.weight")


def _interleaved(weight_ED: Tensor, heads: int) -> Tensor:
    """Rows of each head whose pairs to be turned are K / 2 apart, with the two of a pair side by side."""
    pairs_H2KD = weight_ED.unflatten(0, (heads, 2, -1))
    return pairs_H2KD.transpose(1, 2).flatten(0, 2)


def _attention_layers(fields: Fields) -> dict[int, AttentionConfig | SlidingWindowConfig]:
    """The layers that are softmax attention instead."""
    given, width = fields.take("attn", []), fields.number("hidden_size")
    found: dict[int, AttentionConfig | SlidingWindowConfig] = {}
    for spec in given if isinstance(given, list) else [given]:
        if not isinstance(spec, dict):
            raise fields.refused("attn", given, "an object, or a list of them")
        of = Fields(spec, f"attn in {fields.where}")
        heads = of.number("num_heads")
        options: dict[str, Any] = {
            "width": width, "heads": heads, "kv_heads": of.number("num_kv_heads", heads), "rotary": 1.0,
            "rotary_base": of.take("rope_theta", 10000.0),
            "bias": "qkv" if of.only("qkv_bias", False, True) else False,
        }  # fmt: skip
        of.only("qk_norm", False)
        window = of.number("window_size", 0)
        attention = SlidingWindowConfig(window=window, **options) if window else AttentionConfig(**options)
        found |= dict.fromkeys(of.take("layers"), attention)
        of.finish()
    return found
