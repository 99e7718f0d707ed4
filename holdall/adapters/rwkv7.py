"""RWKV-7 of flash-linear-attention, `model_type` rwkv7: the models of RWKV's Goose as they are released.

    embeddings, layers.0.pre_norm, layers.i = attn_norm, attn (time mixing), ffn_norm, ffn (channel mixing),
    norm, lm_head

A block there is two layers here, a time mixing and a channel mixing. From the second block on values are
mixed with those of the first. Peng et al., 2025, arXiv 2503.14456.

Letters: D width, I inner width of the channel mixing, R a rank, Z shifted inputs.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from holdall.adapters.parts import normalised
from holdall.adapters.reading import Fields, Weights, head_of
from holdall.contract import MixerConfig
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.mixers.rwkv_channel_mix import RWKVChannelMixConfig
from holdall.model import ModelConfig

LINEAR = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "out_proj"}
LOW_RANK = {"w": "decay_low_rank_dim", "a": "a_low_rank_dim", "g": "gate_low_rank_dim"}
"""The low-rank maps that every time mixing has, and the fields that say their ranks."""


def rwkv7(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """RWKV7ForCausalLM.

    The norm of the embeddings depends on the token alone, so the embedding is what it makes of each; then the
    head has weights of its own even where they were shared.
    """
    width, depth = fields.number("hidden_size"), fields.number("num_hidden_layers")
    fields.only("hidden_act", "sqrelu")
    fields.only("attn", None)  # whose layers hand no values down, so the package itself cannot run them
    fields.only("value_dim", width, [width] * depth)
    # how its kernels compute, and sizes that the weights say
    fields.ignore(
        "attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
        "max_position_embeddings", "hidden_ratio", "intermediate_size", "_attn_implementation_autoset",
    )  # fmt: skip
    eps, bias = fields.take("norm_eps", 1e-5), fields.only("norm_bias", True, False)
    mixing = RWKV7Config(
        width=width, heads=_heads(fields, width), eps=eps, layers=depth,
        # its kernel for the removal keys' length is not what it replaces
        key_eps=1e-6 if fields.only("fuse_norm", True, False) else 0.0,
    )  # fmt: skip
    first, later = (f"model.layers.{index}.attn" for index in (0, 1))
    ranks = {name: _rank(fields, weights, f"{first}.{name}_lora", LOW_RANK[name]) for name in LOW_RANK}
    value_rank = _rank(fields, weights, f"{later}.v_lora", "v_low_rank_dim") if depth > 1 else 0
    if depth < 2:
        fields.ignore("v_low_rank_dim")

    embed_VD, tied = weights.take("model.embeddings.weight"), fields.only("tie_word_embeddings", False, True)
    head_VD = head_of(weights, "lm_head.weight", embed_VD, tied=tied)
    tensors = _norm(weights, "model.norm", "norm", bias=bias)
    if fields.only("norm_first", True, False):
        norm = _norm(weights, "model.layers.0.pre_norm", "pre_norm", bias=bias)
        tensors["head.weight"] = embed_VD if head_VD is None else head_VD
        embed_VD = normalised(embed_VD, norm["pre_norm.weight"], norm["pre_norm.bias"], eps)
    elif head_VD is not None:
        tensors["head.weight"] = head_VD
    tensors["embed.weight"] = embed_VD

    layers: list[MixerConfig] = []
    for index in range(depth):
        there = f"model.layers.{index}"
        config = dataclasses.replace(
            mixing, layer=index, value_rank=value_rank if index else 0,
            decay_rank=ranks["w"], a_rank=ranks["a"], gate_rank=ranks["g"],
        )  # fmt: skip
        key_ID = weights.take(f"{there}.ffn.key.weight")
        channels = RWKVChannelMixConfig(
            width=width, hidden=len(key_ID), gate=False, layer=index, layers=depth
        )
        for part, theirs, own in (
            (config, "attn_norm", _time_mixing(weights, f"{there}.attn", config)),
            (channels, "ffn_norm", _channel_mixing(weights, f"{there}.ffn", key_ID)),
        ):
            here = f"blocks.{len(layers)}"
            tensors |= _norm(weights, f"{there}.{theirs}", f"{here}.norm", bias=bias)
            tensors |= {f"{here}.mixer.{name}": tensor for name, tensor in own.items()}
            layers.append(part)
    model = ModelConfig(
        vocab=fields.number("vocab_size"), width=width, layers=tuple(layers), eps=eps,
        tied="head.weight" not in tensors,
    )  # fmt: skip
    return model, tensors


def _heads(fields: Fields, width: int) -> int:
    """By the size of a head, which is 64 where nothing is said; by their number only where that is null."""
    given = fields.number("num_heads", 0)
    if given and fields.is_null("head_dim"):
        if width % given:
            raise fields.refused("num_heads", given, f"a divisor of hidden_size {width}")
        return given
    size = fields.number("head_dim", 64)
    if not size or width % size:
        raise fields.refused("head_dim", size, f"a divisor of hidden_size {width}")
    return width // size


def _rank(fields: Fields, weights: Weights, there: str, field: str) -> int:
    """Of a low-rank map: what its weights say, and so must the field, if it is there."""
    rank = len(weights.look(f"{there}.lora.0.weight"))
    fields.only(field, rank)
    return rank


def _norm(weights: Weights, there: str, here: str, *, bias: bool) -> dict[str, Tensor]:
    """A layer norm; one without a bias has a bias of zero here."""
    weight_D = weights.take(f"{there}.weight")
    bias_D = weights.take(f"{there}.bias") if bias else torch.zeros_like(weight_D)
    return {f"{here}.weight": weight_D, f"{here}.bias": bias_D}


def _time_mixing(weights: Weights, there: str, config: RWKV7Config) -> dict[str, Tensor]:
    if f"{there}.x_x" in weights:  # an older version has all mixes in one weight
        mix_ZD = weights.take(f"{there}.x_x").view(6, -1)
    else:
        mix_ZD = torch.stack([weights.take(f"{there}.x_{name}").flatten() for name in "rwkvag"])
    tensors = {"mix_ZD": mix_ZD}
    for theirs, ours in LINEAR.items():
        tensors[f"{ours}.weight"] = weights.take(f"{there}.{theirs}.weight")
    for name in (*LOW_RANK, *(["v"] if config.value_rank else [])):
        tensors[f"{name}1"] = weights.take(f"{there}.{name}_lora.lora.0.weight").T
        tensors[f"{name}2"] = weights.take(f"{there}.{name}_lora.lora.2.weight").T
        if name != "g":
            tensors[f"{name}0"] = weights.take(f"{there}.{name}_lora.lora.2.bias")
    for name in ("k_k", "k_a", "r_k"):
        tensors[name] = weights.take(f"{there}.{name}")
    for name in ("weight", "bias"):
        tensors[f"norm_{name}_D"] = weights.take(f"{there}.g_norm.{name}")
    return tensors


def _channel_mixing(weights: Weights, there: str, key_ID: Tensor) -> dict[str, Tensor]:
    """Its mix is the share of the token before, ours of the present one: in at least fp32, which holds it."""
    before_D = weights.take(f"{there}.x_k").flatten()
    present_D = 1 - before_D.to(torch.promote_types(before_D.dtype, torch.float32))
    return {
        "time_mix_ZD": present_D[None],
        "key.weight": key_ID,
        "value.weight": weights.take(f"{there}.value.weight"),
    }
