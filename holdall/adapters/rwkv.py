"""RWKV-4 of the `transformers` library.

    embeddings, blocks.0.pre_ln, blocks.i = ln1, attention (time mixing), ln2, feed_forward (channel mixing),
    ln_out, head

A block there is two layers here, a time mixing and a channel mixing. Peng et al., 2023, arXiv 2305.13048.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdall.adapters.parts import normalised
from holdall.adapters.reading import Fields, Weights, head_of
from holdall.contract import MixerConfig
from holdall.mixers.rwkv_4 import RWKV4Config
from holdall.mixers.rwkv_channel_mix import RWKVChannelMixConfig
from holdall.model import ModelConfig


def rwkv(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """RwkvForCausalLM: the models of BlinkDL's rwkv-4-pile and -raven.

    The norm of the embeddings, which stands before the first block, depends on the token alone: the embedding
    is what it makes of each, and the head has weights of its own even where they were shared.
    """
    width, depth = fields.number("hidden_size"), fields.number("num_hidden_layers")
    fields.only("attention_hidden_size", width)
    hidden = fields.number("intermediate_size", 4 * width)
    # the last norm there has this epsilon whatever the field says
    eps = fields.only("layer_norm_epsilon", 1e-5)
    # What one call can read by a kernel of theirs; and after how many blocks activations are halved, and the
    # weights that write to them, so that fp16 does not overflow. Training does not halve, and ours does not:
    # the two differ by what epsilon is beside a quarter of the variance.
    fields.ignore("context_length", "rescale_every")
    weights.rename({}, prefix="rwkv.")
    read_VD = weights.take("embeddings.weight")
    head_VD = head_of(weights, "head.weight", read_VD, tied=fields.only("tie_word_embeddings", False, True))
    ln_weight_D, ln_bias_D = (weights.take(f"blocks.0.pre_ln.{name}") for name in ("weight", "bias"))
    tensors = {
        "embed.weight": normalised(read_VD, ln_weight_D, ln_bias_D, eps),
        "head.weight": read_VD if head_VD is None else head_VD,
        "norm.weight": weights.take("ln_out.weight"),
        "norm.bias": weights.take("ln_out.bias"),
    }
    layers: list[MixerConfig] = []
    for index in range(depth):
        for norm, part, mixes, linear in (
            ("ln1", "attention", ("key", "value", "receptance"), ("key", "value", "receptance", "output")),
            ("ln2", "feed_forward", ("key", "receptance"), ("key", "value", "receptance")),
        ):
            there, here = f"blocks.{index}.", f"blocks.{len(layers)}."
            for name in ("weight", "bias"):
                tensors[f"{here}norm.{name}"] = weights.take(f"{there}{norm}.{name}")
            there, here = f"{there}{part}.", f"{here}mixer."
            mix_Z = [weights.take(f"{there}time_mix_{name}").flatten() for name in mixes]
            tensors[f"{here}time_mix_ZD"] = torch.stack(mix_Z)
            for name in linear:
                own = "out_proj" if name == "output" else name
                tensors[f"{here}{own}.weight"] = weights.take(f"{there}{name}.weight")
            if part == "attention":
                for name in ("time_decay", "time_first"):
                    tensors[f"{here}{name}"] = weights.take(f"{there}{name}")
                layers.append(RWKV4Config(width=width, layer=index, layers=depth))
            else:
                layers.append(RWKVChannelMixConfig(width=width, hidden=hidden, layer=index, layers=depth))
    config = ModelConfig(
        vocab=fields.number("vocab_size"), width=width, layers=tuple(layers), eps=eps, tied=False
    )
    return config, tensors
