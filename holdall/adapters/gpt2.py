"""GPT-2: learned positions, layer norms, biases everywhere; its matrices are stored with inputs first.

Files of the `transformers` library, and the first published ones, whose names have no prefix and which keep
causal masks as weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdall.adapters.reading import Fields, Weights, head_of
from holdall.mixers.attention import AttentionConfig
from holdall.model import ModelConfig

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Kinds of MLP by the name of the activation."""


def gpt2(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    width, heads, count = fields.number("n_embd"), fields.number("n_head"), fields.number("n_layer")
    config = ModelConfig(
        vocab=fields.number("vocab_size"),
        width=width,
        layers=(AttentionConfig(width=width, heads=heads),) * count,
        mlp=fields.number("n_inner", 4 * width),
        mlp_kind=ACTIVATIONS[fields.only("activation_function", *ACTIVATIONS)],  # type: ignore[arg-type]
        positions=fields.number("n_positions"),
        eps=float(fields.take("layer_norm_epsilon", 1e-5)),
        tied=fields.only("tie_word_embeddings", True, False),
    )
    fields.only("add_cross_attention", False)
    # dropout, a head of classifiers, and the order of an addition
    fields.ignore(
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_type",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    )  # fmt: skip
    by_depth = fields.only("scale_attn_by_inverse_layer_idx", False, True)
    plain = 1.0 if fields.only("scale_attn_weights", True, False) else math.sqrt(width // heads)
    q_scales = [plain / (depth + 1 if by_depth else 1) for depth in range(count)]
    return config, _tensors(config, weights, q_scales)


def _tensors(config: ModelConfig, weights: Weights, q_scales: list[float]) -> dict[str, Tensor]:
    """The weights by Holdall's names; queries are multiplied by what scores are scaled by beside K^-1/2."""
    weights.rename({}, prefix="transformer.")
    tensors = {
        "embed.weight": weights.take("wte.weight"),
        "position_embed.weight": weights.take("wpe.weight"),
        "norm.weight": weights.take("ln_f.weight"),
        "norm.bias": weights.take("ln_f.bias"),
    }
    head_VD = head_of(weights, "lm_head.weight", tensors["embed.weight"], tied=config.tied)
    if head_VD is not None:
        tensors["head.weight"] = head_VD
    names = {
        "ln_1": "norm", "attn.c_attn": "mixer.project.qkv", "attn.c_proj": "mixer.out_proj",
        "ln_2": "mlp_norm", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    for depth, q_scale in enumerate(q_scales):
        weights.drop(f"h.{depth}.attn.bias", f"h.{depth}.attn.masked_bias")  # masks
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                tensor = weights.take(f"h.{depth}.{theirs}.{kind}")
                if theirs == "attn.c_attn" and q_scale != 1:
                    q, kv = tensor.float().tensor_split([config.width], dim=-1)
                    tensor = torch.cat((q * q_scale, kv), dim=-1)
                tensors[f"blocks.{depth}.{ours}.{kind}"] = tensor.T if tensor.ndim == 2 else tensor
    return tensors
