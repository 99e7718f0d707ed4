"""Llama and its kin: pre-norm blocks of rotary attention and gated MLPs.

    llama     also SmolLM, SmolLM2, TinyLlama, Yi, DeepSeek-LLM and the like
    mistral   a sliding window in every layer
    qwen2     biases of queries, keys and values; perhaps sliding windows in the upper layers
    qwen3     queries and keys normalised, heads of a size of their own
    smollm3   no positions in some layers
    gemma     embeddings scaled, norms by 1 + w, GELU gates (the first generation)

Others may use `rotary`, `attention_weights` and `mlp_weights`, where their layers are of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from holdall.adapters.parts import layer_kinds
from holdall.adapters.reading import Fields, Weights, head_of
from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig

Read = tuple[ModelConfig, dict[str, Tensor]]
ACTIVATIONS: dict[str, Any] = {
    "silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"
}  # fmt: skip
"""The kind of gated MLP by the name of its activation."""


def llama(fields: Fields, weights: Weights) -> Read:
    return _read(
        fields,
        weights,
        bias=fields.only("attention_bias", False, True),
        mlp_bias=fields.only("mlp_bias", False, True),
    )


def mistral(fields: Fields, weights: Weights) -> Read:
    window = _window(fields)
    windows = None if window is None else [window] * fields.number("num_hidden_layers")
    return _read(fields, weights, bias=False, windows=windows)


def qwen2(fields: Fields, weights: Weights) -> Read:
    return _read(fields, weights, bias="qkv", windows=_upper_windows(fields))


def qwen3(fields: Fields, weights: Weights) -> Read:
    bias = fields.only("attention_bias", False, True)
    return _read(fields, weights, bias=bias, windows=_upper_windows(fields), qk_norm="head", head_dim=128)


def smollm3(fields: Fields, weights: Weights) -> Read:
    layers = fields.number("num_hidden_layers")
    interval = fields.number("no_rope_layer_interval", 4)
    turned = fields.take("no_rope_layers", None)  # whose ones are layers with rotary positions
    if turned is None:
        turned = [int((depth + 1) % interval != 0) for depth in range(layers)]
    if not isinstance(turned, list) or len(turned) < layers or not set(turned) <= {0, 1}:
        raise fields.refused("no_rope_layers", turned, f"{layers} zeros and ones")
    fields.only("use_sliding_window", False)
    fields.ignore("sliding_window")
    _layer_types(fields, ["full_attention"] * layers)
    bias, mlp_bias = fields.only("attention_bias", False, True), fields.only("mlp_bias", False, True)
    return _read(
        fields, weights, bias=bias, mlp_bias=mlp_bias, turned=turned, theta=2_000_000.0, tied=True
    )  # fmt: skip


def gemma(fields: Fields, weights: Weights) -> Read:
    """Norms by 1 + w become norms by w; whatever the config says, the gate is GELU's approximation."""
    fields.only("use_bidirectional_attention", False)
    named = fields.take("hidden_activation", fields.take("hidden_act", "gelu_pytorch_tanh"))
    if named not in ("gelu", "gelu_pytorch_tanh"):
        raise fields.refused("hidden_act", named, "'gelu_pytorch_tanh'")
    # which the original keeps in fp32
    scale = torch.tensor(math.sqrt(fields.number("hidden_size"))).item()
    config, tensors = _read(
        fields, weights, bias=fields.only("attention_bias", False, True), tied=True, head_dim=256,
        mlp_kind="geglu", embed_scale=scale,
    )  # fmt: skip
    norms = {name: tensor.float() + 1 for name, tensor in tensors.items() if name.endswith("norm.weight")}
    return config, tensors | norms


def _window(fields: Fields) -> int | None:
    """The window's tokens, 4,096 where the config leaves them out; None where it says null."""
    return None if fields.is_null("sliding_window") else fields.number("sliding_window", 4096)


def _upper_windows(fields: Fields) -> list[int | None] | None:
    """The windows of Qwen's layers, which begin at a depth, or are listed."""
    layers, window = fields.number("num_hidden_layers"), _window(fields)
    first = fields.number("max_window_layers", 28)
    if not fields.only("use_sliding_window", False, True) or window is None:
        _layer_types(fields, ["full_attention"] * layers)
        return None
    kinds = ["sliding_attention" if depth >= first else "full_attention" for depth in range(layers)]
    kinds = layer_kinds(fields, ("full_attention", "sliding_attention"), kinds)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _layer_types(fields: Fields, expected: list[str]) -> None:
    if (kinds := fields.take("layer_types", expected)) != expected:
        raise fields.refused("layer_types", kinds, "'full_attention' in every layer")


def _read(
    fields: Fields,
    weights: Weights,
    *,
    bias: bool | str,
    mlp_bias: bool = False,
    mlp_kind: Any = "",
    windows: Sequence[Any] | None = None,
    turned: Sequence[int] | None = None,
    theta: float = 10000.0,
    tied: bool = False,
    qk_norm: str = "",
    head_dim: int = 0,
    embed_scale: float = 1.0,
) -> Read:
    """What all of them have in common.

    Args:
        windows: of each layer, None for all that was read.
        turned: whether each layer has rotary positions.
        theta, tied, head_dim: what a config means that does not say it; 0 is width / heads.
    """
    width, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    eps = float(fields.take("rms_norm_eps", 1e-6))
    head_dim = fields.number("head_dim", head_dim)
    if not head_dim and width % heads:
        raise fields.refused("num_attention_heads", heads, f"a divisor of hidden_size = {width}")
    count = fields.number("num_hidden_layers")
    options: dict[str, Any] = {
        "width": width,
        "heads": heads,
        "kv_heads": fields.number("num_key_value_heads", heads),
        "head_dim": head_dim or width // heads,
        "bias": bias,
        "qk_norm": qk_norm,
        "qk_norm_eps": eps,
        **rotary(fields, theta),
    }
    layers: list[MixerConfig] = []
    for depth in range(count):
        own = options if turned is None or turned[depth] else {**options, "rotary": 0.0, "rotary_scaling": ()}
        window = None if windows is None else windows[depth]
        if window is None:
            layers.append(AttentionConfig(**own))
        elif isinstance(window, int) and window >= 2:
            layers.append(SlidingWindowConfig(**own, window=window))
        else:
            raise fields.refused("sliding_window", window, "at least 2, or null")
    config = ModelConfig(
        vocab=fields.number("vocab_size"),
        width=width,
        layers=tuple(layers),
        mlp=fields.number("intermediate_size"),
        mlp_kind=mlp_kind or ACTIVATIONS[fields.only("hidden_act", *ACTIVATIONS)],
        mlp_bias=mlp_bias,
        norm="rms",
        eps=eps,
        embed_scale=embed_scale,
        tied=fields.only("tie_word_embeddings", tied, not tied),
    )
    # the longest text that it was trained on, dropout, and marks of programs that wrote the file
    fields.ignore(
        "max_position_embeddings", "attention_dropout", "is_llama_config", "unsloth_fixed",
        "transformers.js_config",
    )  # fmt: skip
    for name in ("rope_interleaved", "use_mrope"):
        fields.only(name, False)
    return config, _tensors(config, weights, bias, mlp_bias, qk_norm)


def _tensors(
    config: ModelConfig, weights: Weights, bias: bool | str, mlp_bias: bool, qk_norm: str
) -> dict[str, Tensor]:
    tensors = {
        "embed.weight": weights.take("model.embed_tokens.weight"),
        "norm.weight": weights.take("model.norm.weight"),
    }
    head_VD = head_of(weights, "lm_head.weight", tensors["embed.weight"], tied=config.tied)
    if head_VD is not None:
        tensors["head.weight"] = head_VD
    for depth in range(len(config.layers)):
        theirs, ours = f"model.layers.{depth}.", f"blocks.{depth}."
        weights.drop(f"{theirs}self_attn.rotary_emb.inv_freq")
        tensors[f"{ours}norm.weight"] = weights.take(f"{theirs}input_layernorm.weight")
        tensors[f"{ours}mlp_norm.weight"] = weights.take(f"{theirs}post_attention_layernorm.weight")
        tensors |= attention_weights(weights, f"{theirs}self_attn.", f"{ours}mixer.", bias, bool(qk_norm))
        tensors |= mlp_weights(weights, f"{theirs}mlp.", f"{ours}mlp.", mlp_bias)
    return tensors


def rotary(
    fields: Fields, theta: float = 10000.0, *, share: float | None = None, harmless: Sequence[str] = ()
) -> dict[str, Any]:
    """The options of rotary positions in halves, as configs of before `transformers` 5 say them and since.

    Args:
        theta, share: what a config means that does not say them; with a share, it may say another.
        harmless: what may stand beside the others and does nothing.
    """
    turned = (
        fields.only("partial_rotary_factor", 1.0)
        if share is None
        else fields.take("partial_rotary_factor", share)
    )
    both = "rope_parameters" in fields and "rope_scaling" in fields
    if both:
        raise fields.refused("rope_scaling", fields.take("rope_scaling"), "left out beside rope_parameters")
    name = "rope_scaling" if "rope_scaling" in fields else "rope_parameters"
    scaling, outside = fields.part(name), fields.take("rope_theta", None)
    base = scaling.take("rope_theta", theta if outside is None else outside)
    if outside is not None and outside != base:
        raise fields.refused("rope_theta", outside, f"{base!r}, as in rope_parameters")
    turned = scaling.take("partial_rotary_factor", turned)
    if share is None and turned != 1:
        raise scaling.refused("partial_rotary_factor", turned, "1.0")
    scaling.ignore(*harmless)
    kind = scaling.take("type", "default")
    kind = scaling.take("rope_type", kind)
    scaled: tuple[float, ...] = ()
    if kind == "linear":
        scaled = (float(scaling.take("factor")),)
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaled = tuple(float(scaling.take(name)) for name in names)
    elif kind != "default":
        raise scaling.refused("rope_type", kind, "'default', 'linear' or 'llama3'")
    scaling.finish()
    return {"rotary": float(turned), "rotary_base": float(base), "rotary_scaling": scaled}


def attention_weights(
    weights: Weights, theirs: str, ours: str, bias: bool | str = False, qk_norm: bool = False
) -> dict[str, Tensor]:
    """The weights of an attention layer by Holdall's names; arguments: prefixes, and what there is."""
    tensors = {}
    for kind, there in (("weight", True), ("bias", bool(bias))):
        if there:
            parts = [weights.take(f"{theirs}{name}_proj.{kind}") for name in "qkv"]
            tensors[f"{ours}project.qkv.{kind}"] = torch.cat(parts)
    tensors[f"{ours}out_proj.weight"] = weights.take(f"{theirs}o_proj.weight")
    if bias is True:
        tensors[f"{ours}out_proj.bias"] = weights.take(f"{theirs}o_proj.bias")
    for name in ("q_norm", "k_norm") if qk_norm else ():
        tensors[f"{ours}project.{name}.weight"] = weights.take(f"{theirs}{name}.weight")
    return tensors


def mlp_weights(weights: Weights, theirs: str, ours: str, bias: bool = False) -> dict[str, Tensor]:
    """The weights of a gated MLP: the value half of `fc1` is up_proj, the other gate_proj."""
    tensors = {}
    for kind in ("weight", "bias")[: 1 + bias]:
        parts = [weights.take(f"{theirs}{name}_proj.{kind}") for name in ("up", "gate")]
        tensors[f"{ours}fc1.{kind}"] = torch.cat(parts)
        tensors[f"{ours}fc2.{kind}"] = weights.take(f"{theirs}down_proj.{kind}")
    return tensors
