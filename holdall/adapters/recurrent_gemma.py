"""RecurrentGemma of the `transformers` library: Griffin's recurrent blocks and attention within a window.

    embed_tokens, layers.i = temporal_pre_norm, temporal_block, channel_pre_norm, mlp_block; final_norm

De et al., 2024, arXiv 2402.19427. Norms multiply by 1 + w there, and the embedding by the root of the width,
rounded to bf16. A window of s shows s tokens there, the token itself among them; in the code that the
published models were trained with it shows one more (holdall/mixers/sliding_window.py).
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from holdall.adapters.reading import Fields, Weights, head_of
from holdall.contract import MixerConfig
from holdall.mixers.hawk import HawkConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig

DEFAULT_BLOCKS = ["recurrent", "recurrent", "attention"]


def recurrent_gemma(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """RecurrentGemmaForCausalLM."""
    width, depth = fields.number("hidden_size"), fields.number("num_hidden_layers")
    kinds = _layers(fields, width)
    blocks = fields.take("block_types", DEFAULT_BLOCKS)
    if not isinstance(blocks, list) or not blocks or not all(kind in kinds for kind in blocks):
        raise fields.refused("block_types", blocks, 'a list of "recurrent" and "attention"')
    fields.only("_block_types", blocks)
    order = list(itertools.islice(itertools.cycle(blocks), depth))
    # which both the recurrent blocks and the MLPs have
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("embeddings_scale_by_sqrt_dim", True)
    fields.ignore("attention_dropout", "w_init_variance_scale", "final_w_init_variance_scale")
    config = ModelConfig(
        vocab=fields.number("vocab_size"),
        width=width,
        layers=tuple(kinds[kind] for kind in order),
        mlp=fields.number("intermediate_size") // 2,
        mlp_kind="geglu",
        mlp_bias=True,
        norm="rms",
        eps=float(fields.take("rms_norm_eps", 1e-6)),
        embed_scale=float(torch.tensor(width**0.5, dtype=torch.bfloat16)),
        soft_cap=float(fields.take("logits_soft_cap", 30.0)),
    )
    weights.rename({}, prefix="model.")
    embed_VD = weights.take("embed_tokens.weight")
    tensors = {"embed.weight": embed_VD, "norm.weight": _norm(weights, "final_norm")}
    tied = fields.only("tie_word_embeddings", True, False)
    if (head_VD := head_of(weights, "lm_head.weight", embed_VD, tied=tied)) is not None:
        tensors["head.weight"] = head_VD
    for index, kind in enumerate(order):
        there, here = f"layers.{index}.", f"blocks.{index}."
        tensors[f"{here}norm.weight"] = _norm(weights, f"{there}temporal_pre_norm")
        tensors[f"{here}mlp_norm.weight"] = _norm(weights, f"{there}channel_pre_norm")
        for part in ("weight", "bias"):
            mlp = f"{there}mlp_block."
            tensors[f"{here}mlp.fc1.{part}"] = _rows(weights, mlp, ("up_proj", "gate_proj"), part)
            tensors[f"{here}mlp.fc2.{part}"] = weights.take(f"{mlp}down_proj.{part}")
        read = _attention if kind == "attention" else _recurrent
        own = read(weights, f"{there}temporal_block.")
        tensors |= {f"{here}mixer.{name}": tensor for name, tensor in own.items()}
    return dataclasses.replace(config, tied=head_VD is None), tensors


def _layers(fields: Fields, width: int) -> dict[str, MixerConfig]:
    """The two kinds of layers by their names there."""
    heads = fields.number("num_attention_heads")
    rope = fields.part("rope_parameters")  # up to version 4 its fields stand outside
    rope.only("rope_type", "default")
    base = rope.take("rope_theta", fields.take("rope_theta", 10000.0))
    share = rope.take("partial_rotary_factor", fields.take("partial_rotary_factor", 0.5))
    rope.finish()
    fields.only("head_dim", width // max(heads, 1))
    return {
        "recurrent": HawkConfig(
            width=width,
            lru_width=fields.number("lru_width", width),
            heads=heads,
            kernel=fields.number("conv1d_width", 4),
        ),
        "attention": SlidingWindowConfig(
            width=width,
            window=fields.number("attention_window_size", 2048),
            heads=heads,
            kv_heads=fields.number("num_key_value_heads", heads),
            rotary=float(share),
            rotary_base=float(base),
            bias=True if fields.only("attention_bias", False, True) else "out",
        ),
    }


def _norm(weights: Weights, name: str) -> Tensor:
    """1 + w, in at least fp32."""
    weight_D = weights.take(f"{name}.weight")
    return 1 + weight_D.to(torch.promote_types(weight_D.dtype, torch.float32))


def _rows(weights: Weights, prefix: str, names: tuple[str, ...], part: str) -> Tensor:
    """Weights or biases of linear maps of the same inputs, one after another."""
    return torch.cat([weights.take(f"{prefix}{name}.{part}") for name in names])


def _recurrent(weights: Weights, prefix: str) -> dict[str, Tensor]:
    lru = f"{prefix}rg_lru."

    def gates(part: str) -> Tensor:
        return torch.stack([weights.take(f"{lru}{gate}_gate_{part}") for gate in ("input", "recurrent")])

    tensors = {
        "conv_weight_EW": weights.take(f"{prefix}conv_1d.weight").squeeze(1),
        "conv_bias_E": weights.take(f"{prefix}conv_1d.bias"),
        "gate_weight_GHIJ": gates("weight"),
        "gate_bias_GHJ": gates("bias"),
        "a_param_E": weights.take(f"{lru}recurrent_param"),
    }
    for part in ("weight", "bias"):
        tensors[f"in_proj.{part}"] = _rows(weights, prefix, ("linear_y", "linear_x"), part)
        tensors[f"out_proj.{part}"] = weights.take(f"{prefix}linear_out.{part}")
    return tensors


def _attention(weights: Weights, prefix: str) -> dict[str, Tensor]:
    names = ("q_proj", "k_proj", "v_proj")
    tensors = {f"out_proj.{part}": weights.take(f"{prefix}o_proj.{part}") for part in ("weight", "bias")}
    tensors["project.qkv.weight"] = _rows(weights, prefix, names, "weight")
    if f"{prefix}q_proj.bias" in weights:
        tensors["project.qkv.bias"] = _rows(weights, prefix, names, "bias")
    return tensors
