"""Qwen3-Next and Qwen3.5: gated delta net layers, and full attention in every fourth layer.

The `transformers` library's qwen3_next (dense layers only: experts are refused), qwen3_5_text, and the
language model within qwen3_5, whose vision tower and draft head do not touch what text gives.
Norms multiply by 1 + w, which becomes the weight; but those behind a gated delta net by w.

Letters: D width, H query and key heads, G value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdall.adapters.llama import rotary
from holdall.adapters.parts import block, gated_mlp, layer_kinds, outer_weights, shifted
from holdall.adapters.reading import REQUIRED, Fields, Weights
from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.gated_delta_net import GatedDeltaNetConfig
from holdall.model import ModelConfig

LINEAR, FULL = "linear_attention", "full_attention"


def qwen3_next(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    _refuse_experts(fields)
    _drop_draft(weights)
    return _read(fields, weights)


def qwen3_5_text(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    weights.rename({"model.language_model.": "model."})
    _drop_draft(weights)
    return _read(fields, weights)


def qwen3_5(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The language model of one that also sees: text alone gives what it gives without the vision tower."""
    fields.ignore(
        "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
        "language_model_only",
    )  # fmt: skip
    weights.rename({"model.language_model.": "model."})
    weights.drop(*(name for name in weights.names if name.startswith("model.visual.")))
    _drop_draft(weights)
    text = fields.part("text_config")
    config, tensors = _read(text, weights, tied=fields.only("tie_word_embeddings", False, True))
    text.finish()
    return config, tensors


def _drop_draft(weights: Weights) -> None:
    """The head that drafts further tokens, which the `transformers` library leaves unread too."""
    weights.drop(*(name for name in weights.names if name.startswith("mtp.")))


def _refuse_experts(fields: Fields) -> None:
    experts, step = fields.number("num_experts", 512), fields.number("decoder_sparse_step", 1)
    dense = fields.take("mlp_only_layers", [])
    layers = fields.number("num_hidden_layers")
    if experts and any(not step or (layer + 1) % step == 0 for layer in range(layers) if layer not in dense):
        raise fields.refused("num_experts", experts, "0, or mlp_only_layers must name every layer")
    fields.ignore(
        "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok", "norm_topk_prob",
        "output_router_logits", "router_aux_loss_coef",
    )  # fmt: skip


def _read(fields: Fields, weights: Weights, *, tied: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """`tied`: whether the head is said to be the embedding elsewhere; it is if these fields say so, too."""
    fields.only("hidden_act", "silu")
    # of released folders, for other programs: in which dtype to keep states, which are in fp32 here; drafting
    fields.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    fields.ignore("mlp_only_layers")  # all are, or they were refused
    fields.ignore("attention_dropout", "max_position_embeddings")
    fields.only("attn_output_gate", True)
    fields.only("output_gate_type", "swish", "silu")
    fields.only("use_sliding_window", False)
    width, layers = fields.number("hidden_size"), fields.number("num_hidden_layers")
    every = fields.number("full_attention_interval", 4)
    otherwise = [LINEAR if (layer + 1) % every else FULL for layer in range(layers)] if every else []
    kinds = layer_kinds(fields, (LINEAR, FULL), otherwise)
    eps = fields.take("rms_norm_eps", 1e-6)
    delta_net = delta_net_config(fields, width, eps=eps)
    # for text, positions of height and width are those of time, and turn as if there were one kind
    turned = rotary(fields, share=0.25, harmless=("mrope_section", "mrope_interleaved"))
    heads = fields.number("num_attention_heads")
    attention = AttentionConfig(
        width=width, heads=heads, kv_heads=fields.number("num_key_value_heads", heads),
        head_dim=fields.number("head_dim", 256), bias=fields.only("attention_bias", False, True),
        qk_norm="head", qk_norm_eps=eps, gate=True, **turned,
    )  # fmt: skip
    tied |= fields.only("tie_word_embeddings", False, True)
    tensors = outer_weights(weights, "model.embed_tokens.weight", "model.norm.weight", tied=tied, offset=1.0)
    mixers: list[MixerConfig] = []
    for depth, kind in enumerate(kinds):
        there = f"model.layers.{depth}"
        norms = [
            shifted(weights.take(f"{there}.{name}_layernorm.weight"), 1)
            for name in ("input", "post_attention")
        ]
        if kind == LINEAR:
            mixers.append(delta_net)
            mixer = _delta_net(delta_net, weights, f"{there}.linear_attn")
        else:
            mixers.append(attention)
            mixer = _attention(attention, weights, f"{there}.self_attn")
        mlp = gated_mlp(weights, *(f"{there}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")))
        tensors |= block(depth, norms[0], mixer, norms[1], mlp)
    config = ModelConfig(
        vocab=fields.number("vocab_size"), width=width, layers=tuple(mixers), tied=tied,
        mlp=fields.number("intermediate_size"), mlp_kind="swiglu", norm="rms", eps=eps,
    )  # fmt: skip
    return config, tensors


def delta_net_config(
    fields: Fields, width: int, *, eps: float, negative_eigenvalues: bool = False, **otherwise: int
) -> GatedDeltaNetConfig:
    """Of the fields linear_*, which Olmo Hybrid has too.

    Args:
        eps: of the norm of each head's output.
        otherwise: values of fields that need not be there.
    """

    def number(name: str) -> int:
        return fields.number(name, otherwise.get(name, REQUIRED))

    heads, value_heads = number("linear_num_key_heads"), number("linear_num_value_heads")
    key_dim, value_dim = number("linear_key_head_dim"), number("linear_value_head_dim")
    if not heads or not value_heads or value_heads % heads:
        raise fields.refused("linear_num_value_heads", value_heads, f"a multiple of the {heads} key heads")
    if not key_dim or not value_dim or value_dim % key_dim:
        raise fields.refused(
            "linear_value_head_dim", value_dim, f"a multiple of linear_key_head_dim, {key_dim}"
        )
    return GatedDeltaNetConfig(
        width=width, heads=heads, head_dim=key_dim, value_heads=value_heads, value_ratio=value_dim // key_dim,
        kernel=fields.number("linear_conv_kernel_dim", 4), negative_eigenvalues=negative_eigenvalues, eps=eps,
    )  # fmt: skip


def _delta_net(config: GatedDeltaNetConfig, weights: Weights, there: str) -> dict[str, Tensor]:
    heads, values = config.heads, config.sizes[-1]
    if f"{there}.in_proj_qkvz.weight" in weights:
        # each key head has its q, k, and the v and z of its value heads side by side; and its b and a
        sizes = [config.key_dim, config.key_dim, values // heads, values // heads]
        q, k, v, gate = _of_each_head(weights.take(f"{there}.in_proj_qkvz.weight"), heads, sizes)
        beta, a = _of_each_head(
            weights.take(f"{there}.in_proj_ba.weight"), heads, [config.states // heads] * 2
        )
        qkv = torch.cat((q, k, v))
    else:
        qkv, gate, beta, a = (
            weights.take(f"{there}.in_proj_{name}.weight") for name in ("qkv", "z", "b", "a")
        )
    return {
        "qkv.weight": qkv,
        "gate_proj.weight": gate,
        "ab_proj.weight": torch.cat((a, beta)),
        "conv_weight_EW": weights.take(f"{there}.conv1d.weight").squeeze(1),
        "A_log": weights.take(f"{there}.A_log"),
        "dt_bias": weights.take(f"{there}.dt_bias"),
        "norm_weight_V": weights.take(f"{there}.norm.weight"),
        "out_proj.weight": weights.take(f"{there}.out_proj.weight"),
    }


def _of_each_head(rows: Tensor, heads: int, sizes: list[int]) -> list[Tensor]:
    """Rows that stand head by head, by what they are: each part's rows of all heads."""
    of_heads = rows.unflatten(0, (heads, -1)).split(sizes, dim=1)
    return [part.flatten(0, 1) for part in of_heads]


def _attention(config: AttentionConfig, weights: Weights, there: str) -> dict[str, Tensor]:
    tensors = {
        f"project.{name}_norm.weight": weights.take(f"{there}.{name}_norm.weight") + 1 for name in "qk"
    }
    for kind in ("weight", "bias") if config.bias else ("weight",):
        # each head has its query and its gate side by side
        q, gate = _of_each_head(
            weights.take(f"{there}.q_proj.{kind}"), config.heads, [config.resolved_head_dim] * 2
        )
        k, v = (weights.take(f"{there}.{name}_proj.{kind}") for name in "kv")
        tensors |= {
            f"project.qkv.{kind}": torch.cat((q, k, v)),
            f"gate.{kind}": gate,
            f"out_proj.{kind}": weights.take(f"{there}.o_proj.{kind}"),
        }
    return tensors
