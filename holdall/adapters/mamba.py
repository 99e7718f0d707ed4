"""Mamba, Mamba-2 and Falcon Mamba of the `transformers` library, and back into its format.

    backbone.embeddings, layers.i = norm and mixer, norm_f; lm_head where the head is not tied

Their mixers have the names of `mamba_ssm`, as ours have: only the convolution and Mamba-2's norm are called
otherwise. Papers: arXiv 2312.00752 (Mamba), 2405.21060 (Mamba-2), 2410.05355 (Falcon Mamba).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from holdall.adapters.reading import Fields, ForeignError, Weights, head_of
from holdall.contract import MixerConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.mamba_2 import Mamba2Config
from holdall.model import Model, ModelConfig

SHARED = {"in_proj.weight", "out_proj.weight", "A_log", "D"}
"""Weights of each mixer, by Holdall's names, that are called the same there."""
BIASES = {"in_proj.bias", "out_proj.bias"}
ONLY_1 = {"x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
RENAMED_2 = {"dt_bias": "dt_bias", "norm_weight_E": "norm.weight"}
"""Those of Mamba-2 alone, with their names there."""
INITIAL = (
    "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor",
    "rescale_prenorm_residual",
)  # fmt: skip
"""Fields that say how training starts."""
HOW = ("residual_in_fp32", "use_mambapy", "use_falcon_mambapy", "use_associative_scan", "fused_add_norm")
"""Fields that say in which precision or by which program it is computed."""


def mamba(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """MambaForCausalLM: the state-spaces models whose names end in -hf, and what was trained since."""
    return _mamba_1(fields, weights)


def falcon_mamba(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """FalconMambaForCausalLM: Mamba with norms on dt, B and C."""
    return _mamba_1(fields, weights, inner_norm=True, eps=float(fields.take("mixer_rms_eps", 1e-6)))


def _mamba_1(fields: Fields, weights: Weights, **norms: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    width, expand = fields.number("hidden_size"), fields.number("expand", 2)
    inner = fields.number("intermediate_size", expand * width)  # which overrules `expand`
    if inner % max(width, 1):
        raise fields.refused("intermediate_size", inner, f"a multiple of hidden_size {width}")
    rank = fields.take("time_step_rank", "auto")
    layer = MambaConfig(
        width=width,
        state=fields.number("state_size", 16),
        expand=inner // max(width, 1),
        kernel=fields.number("conv_kernel", 4),
        dt_rank=math.ceil(width / 16) if rank == "auto" else fields.number("time_step_rank"),
        bias=fields.only("use_bias", False, True),
        **norms,
    )
    # the first models have the fields of mamba_ssm's config too, which say the same once more
    fields.only("d_inner", inner)
    fields.only("d_model", width)
    fields.only("rms_norm", True)
    fields.only("ssm_cfg", {})
    fields.ignore("pad_vocab_size_multiple")  # the vocabulary is the padded one
    return _model(fields, weights, layer, tied=True)


def mamba2(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Mamba2ForCausalLM: the state-spaces models, Codestral Mamba."""
    width, head_dim = fields.number("hidden_size"), fields.number("head_dim", 64)
    expand = fields.number("expand", 2)
    fields.only("num_heads", expand * width // max(head_dim, 1), default=128)
    limit = fields.take("time_step_limit", [0.0, math.inf])
    if limit not in ([0.0, math.inf], (0.0, math.inf), [0.0, {"__float__": "Infinity"}]):  # as JSON has none
        raise fields.refused("time_step_limit", limit, "from 0 to infinity")
    layer = Mamba2Config(
        width=width,
        state=fields.number("state_size", 128),
        expand=expand,
        head_dim=head_dim,
        groups=fields.number("n_groups", 8),
        kernel=fields.number("conv_kernel", 4),
        bias=fields.only("use_bias", False, True),
        eps=float(fields.take("layer_norm_epsilon", 1e-5)),
    )
    fields.only("intermediate_size", expand * width)
    fields.only("rms_norm", True)
    # how many tokens are computed at once; a field that only Mamba has a use for; and one of the first files
    # that says true, where the model gates before the norm nonetheless: the library has no other way
    fields.ignore("chunk_size", "time_step_rank", "norm_before_gate")
    return _model(fields, weights, layer, tied=False)


def _model(
    fields: Fields, weights: Weights, layer: MambaConfig | Mamba2Config, *, tied: bool
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """What all three have: a norm before each mixer, no MLP. `tied` is their own default."""
    depth = fields.number("num_hidden_layers")
    fields.only("n_layer", depth)
    fields.only("hidden_act", "silu")
    conv_bias = fields.only("use_conv_bias", True, False)
    fields.ignore(*INITIAL, *HOW)
    weights.rename({"embedding.": "embeddings."}, prefix="backbone.")  # as mamba_ssm calls it
    tensors = {
        "embed.weight": weights.take("embeddings.weight"),
        "norm.weight": weights.take("norm_f.weight"),
    }
    head_VD = head_of(weights, "lm_head.weight", tensors["embed.weight"], tied=_tied(fields, tied))
    if head_VD is not None:
        tensors["head.weight"] = head_VD
    for index in range(depth):
        tensors[f"blocks.{index}.norm.weight"] = weights.take(f"layers.{index}.norm.weight")
        mixer = f"layers.{index}.mixer."
        own = _mixer(weights, mixer, layer, conv_bias)
        tensors |= {f"blocks.{index}.mixer.{name}": tensor for name, tensor in own.items()}
    config = ModelConfig(
        vocab=fields.number("vocab_size"),
        width=layer.width,
        layers=(layer,) * depth,
        norm="rms",
        eps=float(fields.take("layer_norm_epsilon", 1e-5)),
        tied=head_VD is None,
    )
    return config, tensors


def _tied(fields: Fields, default: bool) -> bool:
    return fields.only("tie_word_embeddings", default, not default)


def _names(layer: MambaConfig | Mamba2Config) -> dict[str, str]:
    """The weights of a mixer whose shapes are the same, by Holdall's names, with their names there."""
    same = SHARED | (BIASES if layer.bias else set())
    if isinstance(layer, MambaConfig):
        return {name: name for name in same | ONLY_1}
    return {name: name for name in same} | RENAMED_2


def _mixer(
    weights: Weights, prefix: str, layer: MambaConfig | Mamba2Config, conv_bias: bool
) -> dict[str, Tensor]:
    tensors = {name: weights.take(prefix + theirs) for name, theirs in _names(layer).items()}
    tensors["conv_weight_EW"] = conv_EW = weights.take(f"{prefix}conv1d.weight").squeeze(1)
    # no bias is a bias of zero
    tensors["conv_bias_E"] = (
        weights.take(f"{prefix}conv1d.bias") if conv_bias else conv_EW.new_zeros(len(conv_EW))
    )
    return tensors


# ------------------------------------------------------------------------------------------ the way back


def to_transformers(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model of Mamba or Mamba-2 alone in the format of the `transformers` library.

    Returns:
        The fields of config.json, without those of the tokenizer (which tokens begin and end a document are
        null there), and the weights by their names, which are the model's own tensors. One layer of Mamba
        that has `inner_norm` makes all of it Falcon Mamba.

    Raises ForeignError, naming the layer or option, for a model that this format cannot hold.
    """
    config = model.config
    kind, own = _layer_fields(config.layers[0])
    for depth, layer in enumerate(config.layers):
        if _layer_fields(layer) != (kind, own):
            raise ForeignError(
                f"layer {depth} ({layer.name}) is another than layer 0: `transformers` has no such model of "
                "its own; all layers must be Mamba, or all Mamba-2, with the same options"
            )
    plain = ModelConfig(
        vocab=config.vocab, width=config.width, layers=config.layers, norm="rms", eps=config.eps,
        tied=config.tied,
    )  # fmt: skip
    for field in dataclasses.fields(ModelConfig):
        value, only = getattr(config, field.name), getattr(plain, field.name)
        if value != only:
            raise ForeignError(
                f"{field.name} = {value!r}: `transformers` has such a model with {only!r} alone"
            )
    if kind == "mamba2" and own["layer_norm_epsilon"] != config.eps:
        raise ForeignError(
            f"the layers have eps = {own['layer_norm_epsilon']} and the model {config.eps}: `transformers` "
            "has one epsilon for both"
        )
    fields = {
        "architectures": [f"{CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "layer_norm_epsilon": config.eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "use_conv_bias": True,
        # otherwise those of the class: tokens of another vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **own,
    }
    return fields, _weights_back(model)


CLASSES = {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}


def _layer_fields(layer: MixerConfig) -> tuple[str, dict[str, Any]]:
    """The kind of model that has such layers, and what its config says of them."""
    if isinstance(layer, MambaConfig):
        fields: dict[str, Any] = {
            "intermediate_size": layer.expand * layer.width,
            "time_step_rank": layer.rank,
        }
        if layer.inner_norm:
            fields["mixer_rms_eps"] = layer.eps
        kind = "falcon_mamba" if layer.inner_norm else "mamba"
    elif isinstance(layer, Mamba2Config):
        kind, fields = (
            "mamba2",
            {
                "num_heads": layer.heads,
                "head_dim": layer.inner // layer.heads,
                "n_groups": layer.groups,
                "layer_norm_epsilon": layer.eps,
            },
        )
    else:
        raise ForeignError(
            f"a layer of {layer.name}: `transformers` has no model of its own with it, only of Mamba "
            "alone or of Mamba-2 alone"
        )
    return kind, fields | {
        "state_size": layer.state, "expand": layer.expand, "conv_kernel": layer.kernel, "use_bias": layer.bias
    }  # fmt: skip


def _weights_back(model: Model) -> dict[str, Tensor]:
    """The weights by their names there."""
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {
        "backbone.embeddings.weight": own["embed.weight"],
        "backbone.norm_f.weight": own["norm.weight"],
    }
    if not model.config.tied:
        tensors["lm_head.weight"] = own["head.weight"]
    for index, layer in enumerate(model.config.layers):
        assert isinstance(layer, MambaConfig | Mamba2Config)
        here, there = f"blocks.{index}.", f"backbone.layers.{index}."
        tensors[f"{there}norm.weight"] = own[f"{here}norm.weight"]
        for name, theirs in _names(layer).items():
            tensors[f"{there}mixer.{theirs}"] = own[f"{here}mixer.{name}"]
        tensors[f"{there}mixer.conv1d.weight"] = own[f"{here}mixer.conv_weight_EW"][:, None]
        tensors[f"{there}mixer.conv1d.bias"] = own[f"{here}mixer.conv_bias_E"]
    return tensors
