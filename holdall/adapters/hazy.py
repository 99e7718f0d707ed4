"""The models of the Based and JRT papers: Based, JRT-RNN, and the Transformers and Mambas beside them.

    based-360m, based-1b, based-1b-50b, based-360M-30B          JRT-360M-30B, JRT-1B-50B
    attn-360m, attn-1b, attn-360M-30B, attn-1b-50bn             mamba-360m, mamba-1b, mamba-1b-50b,
                                                                mamba-360M-30B

`gpt` reads those of flash-attention's GPT, whose config.json is GPT-2's and more: `mixer`, `alt_mixer`
and `alt_mixer_2` name classes and their arguments, and lists of layers say where the latter two are. Classes
moved between modules, so their own names count alone. Where there is no mixer, layers are attention. `mamba`
reads those of the mamba_ssm package, with its official models.

What was found in these programs and decides how a file is read:
- Stored tensors: the vocabulary is padded, so its size is read off the embedding, and the MLP's off its
  weights, since two programs rounded it up differently. The tied head is stored twice.
- Old names: norms of the time when a block ended with one, whose first was `ln_0`; `conv1` for `conv`.
- eps: Based's quadratic form adds 1e-12 to the normaliser, and the kernels named fla_* add 1e-6.
- `window_size` is halved. `kernel_sizes` is not read by the class, whose `kernel_size` is 3 by default.
- `transformer.decay.decay` is used with `use_decay_proj` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holdall.adapters.reading import Fields, ForeignError, Weights, head_of
from holdall.contract import MixerConfig
from holdall.engine.session import Session, read
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttention, PrefixLinearAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig

BOILERPLATE = (
    # of `transformers`: classification heads, and how to generate
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "id2label", "label2id", "problem_type", "finetuning_task", "tokenizer_class",
    "prefix", "n_ctx", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward",
    "tie_encoder_decoder", "is_decoder", "max_length", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
"""Fields that are in these config.json files because all fields were written, also those never set."""
TRAINING = (
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "special_initializer", "use_weight_init",
    # of JRT's rows: the mixers have their own
    "data_type", "enc_length", "dec_length",
)  # fmt: skip
FUSED = (
    "fused_mlp", "fused_bias_fc", "fused_dropout_add_ln", "use_flash_attn", "residual_in_fp32",
    "fused_add_norm", "use_fast_path",
)  # fmt: skip
"""Which kernels ran and how they rounded: the same function."""
BLOCK = "transformer.layers.{}"


class _About(NamedTuple):
    """What all layers of a GPT share. rotary: the share of a head's dimensions; decay: 0 for none."""

    width: int
    heads: int
    rotary: float
    decay: float


Layer = tuple[MixerConfig, dict[str, Tensor]]
"""A mixer's config, and its weights by Holdall's names."""


def gpt(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Based, JRT-RNN and Transformers; see the top of this file."""
    width, depth, heads = (fields.number(name) for name in ("n_embd", "n_layer", "n_head"))
    _rename(weights, depth)
    for name, allowed, default in (
        ("activation_function", "swiglu", "gelu_new"), ("rms_norm", True, False),
        ("mlp_fc1_bias", False, True), ("mlp_fc2_bias", False, True), ("qkv_proj_bias", False, True),
        ("out_proj_bias", False, True), ("lm_head_bias", False, False), ("mlp_type", "base", "base"),
        ("scale_attn_weights", True, True), ("scale_attn_by_inverse_layer_idx", False, False),
        ("reorder_and_upcast_attn", False, False), ("add_cross_attention", False, False),
        ("rotary_emb_base", 10000, 10000), ("rotary_emb_interleaved", False, False),
        ("attn_dwconv", False, False), ("parallel_block", False, False), ("prenorm", True, True),
        ("pruned_heads", {}, {}),
    ):  # fmt: skip
        fields.only(name, allowed, default=default)
    # learned positions would be a weight, which nobody takes; ff_mult is read by no class of these
    fields.ignore(*BOILERPLATE, *TRAINING, *FUSED, "n_positions", "n_inner", "ff_mult")
    about = _About(width, heads, _rotary(fields, width, heads), _decay(fields, weights, heads))
    parts = _parts(fields, depth)

    layers, tensors = [], dict[str, Tensor]()
    for depth_, part in enumerate(parts):
        there = BLOCK.format(depth_)
        read = _attention if part is None else _reader_of(part)
        layer, own = read(part, about, weights, f"{there}.mixer.")  # type: ignore[arg-type]
        layers.append(layer)
        tensors |= {f"blocks.{depth_}.mixer.{name}": tensor for name, tensor in own.items()}
        for ours, theirs in (
            ("norm", "norm1"), ("mlp_norm", "norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")
        ):  # fmt: skip
            tensors[f"blocks.{depth_}.{ours}.weight"] = weights.take(f"{there}.{theirs}.weight")
    for part in parts:
        if part is not None:
            part.finish()
    tensors["norm.weight"] = weights.take("transformer.ln_f.weight")
    tied = fields.only("tie_word_embeddings", True, False)
    tensors |= _embedding_and_head(
        fields, weights, "transformer.embeddings.word_embeddings.weight", tied=tied
    )
    config = ModelConfig(
        vocab=len(tensors["embed.weight"]), width=width, layers=tuple(layers),
        mlp=tensors["blocks.0.mlp.fc2.weight"].shape[1], mlp_kind="swiglu", norm="rms",
        eps=fields.take("layer_norm_epsilon", 1e-5), tied=tied,
    )  # fmt: skip
    return config, tensors


def mamba(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The mamba_ssm package's language models of Mamba layers; those of the Based paper are of this kind."""
    width, depth = fields.number("d_model"), fields.number("n_layer")
    weights.rename({}, prefix="model.")
    weights.drop(*(name for name in weights.names if "metrics" in name))
    for name, allowed, default in (
        ("rms_norm", True, True), ("d_intermediate", 0, 0), ("attn_layer_idx", [], []), ("attn_cfg", {}, {}),
        ("reorder_and_upcast_attn", False, False), ("scale_attn_by_inverse_layer_idx", False, False),
    ):  # fmt: skip
        fields.only(name, allowed, default=default)
    # the last three are of GPT-2: in the larger model n_embd is that of the smaller one
    fields.ignore(*FUSED, "n_positions", "n_embd", "n_head")
    cfg = fields.part("ssm_cfg")
    cfg.only("layer", "Mamba1")
    cfg.only("conv_bias", True)
    cfg.only("bias", False)
    cfg.ignore("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path")
    rank = cfg.take("dt_rank", "auto")
    layer = MambaConfig(
        width=width, state=cfg.number("d_state", 16), kernel=cfg.number("d_conv", 4),
        expand=cfg.number("expand", 2), dt_rank=0 if rank == "auto" else cfg.number("dt_rank"),
    )  # fmt: skip
    cfg.finish()

    tensors = {}
    for depth_ in range(depth):
        ours, theirs = f"blocks.{depth_}", f"backbone.layers.{depth_}"
        tensors[f"{ours}.norm.weight"] = weights.take(f"{theirs}.norm.weight")
        tensors[f"{ours}.mixer.conv_weight_EW"] = weights.take(f"{theirs}.mixer.conv1d.weight")[:, 0]
        tensors[f"{ours}.mixer.conv_bias_E"] = weights.take(f"{theirs}.mixer.conv1d.bias")
        for name in (
            "in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D",
            "out_proj.weight",
        ):  # fmt: skip
            tensors[f"{ours}.mixer.{name}"] = weights.take(f"{theirs}.mixer.{name}")
    tensors["norm.weight"] = weights.take("backbone.norm_f.weight")
    tied = fields.only("tie_embeddings", True, False)
    tensors |= _embedding_and_head(fields, weights, "backbone.embedding.weight", tied=tied)
    # the eps of the norms is in no field: all of these programs leave it at its default
    config = ModelConfig(
        vocab=len(tensors["embed.weight"]), width=width, layers=(layer,) * depth, norm="rms", eps=1e-5,
        tied=tied,
    )  # fmt: skip
    return config, tensors


def read_padded(model: Model, tokens: Sequence[int], *, pad: int) -> Session:
    """Read a prompt as the published JRT-RNN models do, for comparison with them: `read` needs no padding.

    A prompt that is shorter than the prefix is padded on the left. Prefix linear attention has zeros for the
    padding's keys; convolutions and windows read it as text. One that is as long is read as by `read`.
    `LanguageModel.generate` and the engine continue the session, as any other.

    Args:
        pad: the token, 50256 (the end of a document) in their generation, 220 (a space) in their evaluations.

    Raises ValueError if the model has no prefix, or layers with different ones, if `pad` is no token of its
    vocabulary, or if there are no tokens.
    """
    layers = [mixer for mixer in model.mixers if isinstance(mixer, PrefixLinearAttention)]
    prefixes = sorted({mixer.prefix for mixer in layers})
    if len(prefixes) != 1:
        has = f"layers with prefixes of {', '.join(map(str, prefixes))}" if prefixes else "none"
        raise ValueError(
            "a prompt is padded to the one prefix of all layers of prefix linear attention; "
            f"this model has {has}"
        )
    if not 0 <= pad < model.config.vocab:
        raise ValueError(
            f"the padding token is {pad}, where the model's vocabulary is 0 to {model.config.vocab - 1}"
        )
    if not len(tokens):
        raise ValueError("there is nothing to pad: give at least one token")
    padding = max(model.prefix - len(tokens), 0)

    def add(mixer: nn.Module, args: tuple[Any, ...], how: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, how | {"padding": padding}

    with contextlib.ExitStack() as hooks:
        if padding:  # then all is one call, the first
            for mixer in layers:
                hooks.callback(mixer.register_forward_pre_hook(add, with_kwargs=True).remove)
        session = read(model, [pad] * padding + list(tokens))
    return session._replace(past=session.past.padded(padding))


# ------------------------------------------------------------------------------------------------ the whole


def _rename(weights: Weights, depth: int) -> None:
    """Today's names for those of older files, and for files that kept the trainer's prefix and metrics."""
    weights.rename({}, prefix="model.")
    weights.drop(*(name for name in weights.names if "metrics" in name))
    if "transformer.ln_0.weight" in weights:  # each norm was written where its input was made
        norms = [f"{BLOCK.format(i)}.norm{n}." for i in range(depth) for n in (1, 2)]
        shifted = ["transformer.ln_0.", *norms], [*norms, "transformer.ln_f."]
        weights.rename(dict(zip(*shifted, strict=True)))
    mixers = [f"{BLOCK.format(i)}.mixer." for i in range(depth)]
    weights.rename({f"{mixer}conv1.": f"{mixer}conv." for mixer in mixers})


def _embedding_and_head(fields: Fields, weights: Weights, name: str, *, tied: bool) -> dict[str, Tensor]:
    """The embedding, and the head if it is another one. The vocabulary is the embedding's, as padded."""
    embed_VD = weights.take(name)
    vocab = fields.number("vocab_size")
    fields.ignore("pad_vocab_size_multiple")
    if vocab > len(embed_VD):
        raise fields.refused("vocab_size", vocab, f"at most the embedding's {len(embed_VD)} rows")
    head_VD = head_of(weights, "lm_head.weight", embed_VD, tied=tied)
    return {"embed.weight": embed_VD} | ({} if head_VD is None else {"head.weight": head_VD})


def _rotary(fields: Fields, width: int, heads: int) -> float:
    """The share of each head's dimensions that positions turn, which has to leave a whole number of pairs."""
    share = fields.take("rotary_emb_fraction", 0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise fields.refused("rotary_emb_fraction", share, "a number from 0 to 1")
    return float(share) if int(share * (width // heads)) else 0.0


def _decay(fields: Fields, weights: Weights, heads: int) -> float:
    """The forgetting c of heads that keep 1 - 2^-(c + h), 0 for none; the buffer has to say the same."""
    fixed = fields.only("fixed_decay", False, True)
    fields.only("decay_denom", False)
    const = fields.take("decay_const", -3)
    if isinstance(const, bool) or not isinstance(const, int | float) or const >= 0:
        raise fields.refused("decay_const", const, "a negative number")
    if not fixed:
        return 0.0
    found_H = weights.take("transformer.decay.decay").double()
    want_H = torch.log1p(-(2.0 ** (const - torch.arange(heads, dtype=torch.float64))))
    if found_H.shape != want_H.shape or not torch.allclose(found_H, want_H, rtol=1e-2, atol=1e-6):
        raise ForeignError(
            f"{weights.where}: transformer.decay.decay is not log(1 - 2^(decay_const - h)) of head h with "
            f"decay_const = {const}"
        )
    return float(-const)


def _parts(fields: Fields, depth: int) -> list[Fields | None]:
    """The fields of each layer's mixer, None where a layer is attention. A part that no layer has is left."""
    parts: list[Fields | None] = [fields.part("mixer") if "mixer" in fields else None] * depth
    for name in ("alt_mixer", "alt_mixer_2"):
        layers = fields.take(f"{name}_layers", [])
        if not isinstance(layers, list) or not all(type(at) is int and 0 <= at < depth for at in layers):
            raise fields.refused(f"{name}_layers", layers, f"a list of layers, 0 to {depth - 1}")
        part = fields.part(name) if name in fields else None
        for at in layers:
            parts[at] = part
    return parts


# --------------------------------------------------------------------------------------------- the mixers


def _attention(part: None, about: _About, weights: Weights, there: str) -> Layer:
    """flash-attention's MHA."""
    config = AttentionConfig(width=about.width, heads=about.heads, rotary=about.rotary, bias=False)
    return config, _qkv_and_out(weights, there, "project.qkv")


def _sliding(part: Fields, about: _About, weights: Weights, there: str) -> Layer:
    head_dim = about.width // about.heads
    part.only("causal", True)
    # what the model's fields say already: its program writes them in here too
    for name, value in (
        ("num_heads", about.heads), ("num_heads_kv", about.heads), ("qkv_proj_bias", False),
        ("out_proj_bias", False), ("softmax_scale", head_dim**-0.5), ("rotary_emb_base", 10000),
        ("rotary_emb_interleaved", False), ("rotary_emb_dim", int(about.rotary * head_dim)),
    ):  # fmt: skip
        part.only(name, value)
    part.ignore("do_update", "use_mask", "layer_idx", "dropout", *FUSED)
    config = SlidingWindowConfig(
        width=about.width, heads=about.heads, window=part.number("window_size") // 2 + 1,
        rotary=about.rotary, bias=False,
    )  # fmt: skip
    return config, _qkv_and_out(weights, there, "project.qkv")


def _qkv_and_out(weights: Weights, there: str, qkv: str) -> dict[str, Tensor]:
    return {
        f"{qkv}.weight": weights.take(f"{there}Wqkv.weight"),
        "out_proj.weight": weights.take(f"{there}out_proj.weight"),
    }


def _conv(part: Fields, about: _About, weights: Weights, there: str) -> Layer:
    part.only("use_bias", True)
    part.ignore("l_max", "kernel_sizes", "use_cuda", "layer_idx")
    config = BaseConvConfig(
        width=about.width, expand=part.number("expand_proj"), kernel=part.number("kernel_size", 3)
    )
    tensors = {"weight_DW": weights.take(f"{there}conv.conv.weight")[:, 0]}
    for name in ("in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"):
        tensors[name] = weights.take(there + name)
    return config, tensors


def _linear(part: Fields, about: _About, weights: Weights, there: str) -> Layer:
    feature_dim, heads = _heads(part, about)
    if "feature_map" in part:
        feature_map = part.part("feature_map")
        _class_of(feature_map, "TaylorExp")
        feature_map.only("input_dim", feature_dim)
        feature_map.finish()
    part.only("use_rotary_apply", False)
    part.only("use_act", False)
    part.only("train_view", "quadratic")
    part.ignore("inference_implementation")
    way = part.only("parallel_implementation", "quadratic", "linear", "fla_parallel", "fla_chunk")
    eps, tensors = part.take("eps", 1e-12), {"qkv.weight": _joined(weights, there, "q", "k", "v")}
    tensors["out_proj.weight"] = weights.take(f"{there}out_proj.weight")
    decays = part.only("use_decay_proj", False, True)
    if decays:
        if not about.decay or way != "quadratic":
            raise ForeignError(
                f"{part.where}: use_decay_proj needs fixed_decay, and parallel_implementation 'quadratic': "
                "without, the program of these models leaves it out, or stops"
            )
        tensors["decay_proj.weight"] = weights.take(f"{there}decay_proj.weight")
    config = TaylorConfig(
        width=about.width, heads=heads, feature_dim=feature_dim, eps=1e-6 if way.startswith("fla") else eps,
        decay=about.decay if decays else 0.0, decay_proj=decays,
    )  # fmt: skip
    return config, tensors


def _prefix(part: Fields, about: _About, weights: Weights, there: str) -> Layer:
    feature_dim, heads = _heads(part, about)
    part.only("implementation", "default", "fla_parallel")
    part.only("scale_dim", feature_dim)
    part.ignore("dec_length", "use_mask")
    config = PrefixLinearAttentionConfig(
        width=about.width, heads=heads, feature_dim=feature_dim, eps=part.take("eps", 1e-12),
        prefix=part.number("enc_length"),
    )  # fmt: skip
    return config, {
        "qkv.weight": _joined(weights, there, "q", "k", "v"),
        "prefix_kv.weight": _joined(weights, there, "k_enc", "v_enc"),
        "out_proj.weight": weights.take(f"{there}out_proj.weight"),
    }


def _heads(part: Fields, about: _About) -> tuple[int, int]:
    """What both linear attentions have: feature_dim and num_heads, and no choice else."""
    heads = part.number("num_heads", 16)
    part.only("num_key_value_heads", heads)
    part.only("head_dim", about.width // heads)
    part.only("feature_name", "taylor_exp")
    part.ignore("l_max", "layer_idx")
    return part.number("feature_dim", 16), heads


def _joined(weights: Weights, there: str, *names: str) -> Tensor:
    return torch.cat([weights.take(f"{there}proj_{name}.weight") for name in names])


READERS: Mapping[str, Callable[[Fields, _About, Weights, str], Layer]] = {
    "BaseConv": _conv,
    "BaseConvWithSiLU4": _conv,
    "LinearAttention": _linear,
    "PrefixLinearAttention": _prefix,
    "SlidingAttention": _sliding,
    "SlidingsMHA": _sliding,
}
"""By the class that `_target_` ends with."""


def _reader_of(part: Fields) -> Callable[[Fields, _About, Weights, str], Layer]:
    return READERS[_class_of(part, *READERS)]


def _class_of(part: Fields, *known: str) -> str:
    target: Any = part.take("_target_")
    name = str(target).rpartition(".")[2]
    if name not in known:
        raise part.refused("_target_", target, f"a class named {' or '.join(known)}")
    return name
