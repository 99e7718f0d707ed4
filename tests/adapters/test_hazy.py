"""The published models of the Based and JRT papers: folders as theirs, held to the models' equations.

The published files are not at hand. So folders are made here with the keys, shapes and fields that the code
of these models gives them. `Original` computes their equations over all pairs of tokens, in plain PyTorch.

Letters: B row, T and S time, D width, H heads, K key dim, V value dim, E tokens of a prefix.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters import parity
from torch import Tensor

from holdall.adapters import foreign, hazy
from holdall.adapters.reading import Fields, ForeignError, Weights
from holdall.engine.session import read as read_on
from holdall.files import RunError
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model
from holdall.text.tokenizers import Bytes

# -------------------------------------------------------------------------------------------------- folders

GPT = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 0,
    "n_inner": None, "activation_function": "swiglu", "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0,
    "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True, "use_cache": True,
    "bos_token_id": 50256, "eos_token_id": 50256, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "rms_norm": True, "fused_mlp": False, "mlp_fc1_bias": False,
    "mlp_fc2_bias": False, "fused_bias_fc": True, "out_proj_bias": False, "qkv_proj_bias": False,
    "use_flash_attn": True, "residual_in_fp32": True, "fused_dropout_add_ln": True,
    "pad_vocab_size_multiple": 8, "tie_word_embeddings": True,
    # what `transformers` adds when it writes all fields
    "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None,
    "summary_proj_to_labels": True, "summary_first_dropout": 0.1, "return_dict": True, "torchscript": False,
    "output_hidden_states": False, "output_attentions": False, "torch_dtype": None, "use_bfloat16": False,
    "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
    "is_decoder": False, "cross_attention_hidden_size": None, "add_cross_attention": False,
    "tie_encoder_decoder": False, "max_length": 20, "min_length": 0, "do_sample": False, "temperature": 1.0,
    "top_k": 50, "num_beams": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "prefix": None,
    "finetuning_task": None, "pad_token_id": None, "_name_or_path": "", "transformers_version": "4.36.2",
}  # fmt: skip
CONV = {
    "_target_": "based.models.mixers.convolution.BaseConv", "l_max": 2048, "use_bias": True, "expand_proj": 4,
    "kernel_sizes": 3,
}  # fmt: skip
LINEAR = {
    "_target_": "based.models.mixers.linear_attention.LinearAttention", "l_max": 2048, "feature_dim": 16,
    "num_heads": 16, "parallel_implementation": "fla_parallel",
    "feature_map": {
        "_target_": "based.models.mixers.linear_attention.TaylorExp", "input_dim": 16
    },
}  # fmt: skip
SLIDING = {
    "_target_": "based.models.mixers.slide_attention.SlidingAttention", "window_size": 256, "num_heads": 16,
    "causal": True,
}  # fmt: skip
DECAYED = {
    "_target_": "based.models.mixers.linear_attn.LinearAttention", "l_max": 2048, "feature_dim": 16,
    "feature_name": "taylor_exp", "num_heads": 16, "num_key_value_heads": 16, "use_rotary_apply": False,
    "use_act": False, "train_view": "quadratic", "use_decay_proj": True,
}  # fmt: skip
PREFIX = {
    "_target_": "based.models.mixers.prefix_linear_attention.PrefixLinearAttention", "l_max": 2048,
    "feature_dim": 16, "feature_name": "taylor_exp", "num_heads": 16, "num_key_value_heads": 16,
    "enc_length": 1024, "dec_length": 1024, "implementation": "fla_parallel", "use_mask": True,
}  # fmt: skip
MAMBA = {
    "d_model": 1024, "n_layer": 46, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "n_head": 16,
    "reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False, "n_positions": 2048,
    "n_embd": 1024, "use_flash_attn": True, "fused_dropout_add_ln": True, "fused_mlp": False,
    "fused_bias_fc": True, "use_fast_path": True,
}  # fmt: skip
SMALL, LARGE = [1, 6, 11, 16, 21], [1, 6, 11, 16, 21, 27, 33]


def based(width: int, depth: int, at: list[int], alt: dict[str, Any], **more: Any) -> dict[str, Any]:
    return GPT | {
        "n_embd": width, "n_layer": depth, "n_head": 16, "n_inner": 2 * width, "rotary_emb_fraction": 1,
        "special_initializer": True, "mixer": CONV, "alt_mixer": alt, "alt_mixer_2": SLIDING,
        "alt_mixer_layers": at, "alt_mixer_2_layers": [layer + 1 for layer in at], **more,
    }  # fmt: skip


def attention(width: int, depth: int, heads: int) -> dict[str, Any]:
    return GPT | {
        "n_embd": width, "n_layer": depth, "n_head": heads, "rotary_emb_fraction": 0.5, "ff_mult": 4,
        "pad_vocab_size_multiple": 16,
    }  # fmt: skip


FIXED = {"fixed_decay": True, "decay_const": -3, "decay_denom": False}
JRT = {"data_type": "mixed", "enc_length": 1024, "dec_length": 1024}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "based-360m": (based(1024, 27, SMALL, LINEAR), 2048, 362_620_928, 226),
    "based-1b": (
        based(1792, 36, LARGE, {**LINEAR, "parallel_implementation": "quadratic"}, **FIXED),
        3584, 1_349_453_056, 300,
    ),
    "based-1b-50b": (based(1792, 36, LARGE, LINEAR, fixed_decay=False), 3584, 1_349_453_056, 299),
    "based-360M-30B": (based(1024, 27, SMALL, DECAYED, **FIXED), 2048, 362_702_848, 232),
    "attn-360m": (attention(1024, 24, 16), 2816, 359_810_048, 147),
    "attn-1b": (attention(1680, 36, 24), 4608, 1_327_080_720, 219),
    "attn-1b-50bn": (attention(1680, 36, 24), 4480, 1_303_856_400, 219),
    "mamba-360m": (MAMBA, 0, 358_190_080, 463),
    "mamba-1b": (MAMBA | {"d_model": 2048}, 0, 1_319_311_360, 463),
    "JRT-360M-30B": (based(1024, 26, SMALL, PREFIX, **JRT), 2048, 356_578_304, 227),
    "JRT-1B-50B": (based(1792, 36, LARGE, PREFIX, **JRT), 3584, 1_375_143_168, 313),
}  # fmt: skip
"""config.json, the MLP's hidden width, parameters with the head counted once, and keys."""


def parts(config: dict[str, Any]) -> list[str]:
    """The class of each layer's mixer."""
    names = [_class(config.get("mixer"))] * config["n_layer"]
    for name in ("alt_mixer", "alt_mixer_2"):
        for layer in config.get(f"{name}_layers", []):
            names[layer] = _class(config[name])
    return names


def _class(part: dict[str, Any] | None) -> str:
    return "MHA" if part is None else part["_target_"].split(".")[-1]


def shapes(config: dict[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    """The keys of a published file, and their shapes."""
    multiple = config["pad_vocab_size_multiple"]
    vocab = multiple * math.ceil(config["vocab_size"] / multiple)
    if "d_model" in config:
        d, found = config["d_model"], dict[str, tuple[int, ...]]()
        e, rank = 2 * d, math.ceil(d / 16)
        for i in range(config["n_layer"]):
            own = {
                "norm.weight": (d,), "mixer.in_proj.weight": (2 * e, d), "mixer.conv1d.weight": (e, 1, 4),
                "mixer.conv1d.bias": (e,), "mixer.x_proj.weight": (rank + 32, e),
                "mixer.dt_proj.weight": (e, rank), "mixer.dt_proj.bias": (e,), "mixer.A_log": (e, 16),
                "mixer.D": (e,), "mixer.out_proj.weight": (d, e),
            }  # fmt: skip
            found |= {f"backbone.layers.{i}.{name}": shape for name, shape in own.items()}
        ends = {"backbone.embedding.weight": (vocab, d), "backbone.norm_f.weight": (d,)}
        return found | ends | {"lm_head.weight": (vocab, d)}
    d, found = config["n_embd"], {}
    alt = config.get("alt_mixer", {})
    keys = alt.get("feature_dim", 0) * alt.get("num_heads", 0)
    for i, kind in enumerate(parts(config)):
        own = {
            "norm1.weight": (d,), "norm2.weight": (d,), "mlp.fc1.weight": (2 * hidden, d),
            "mlp.fc2.weight": (d, hidden),
        }  # fmt: skip
        if kind == "BaseConv":
            own |= {
                "mixer.in_proj.weight": (4 * d, d), "mixer.in_proj.bias": (4 * d,),
                "mixer.conv.conv.weight": (2 * d, 1, 3), "mixer.out_proj.weight": (d, 2 * d),
                "mixer.out_proj.bias": (d,),
            }  # fmt: skip
        elif kind in ("MHA", "SlidingAttention"):
            own |= {"mixer.Wqkv.weight": (3 * d, d), "mixer.out_proj.weight": (d, d)}
        else:
            own |= {"mixer.proj_q.weight": (keys, d), "mixer.proj_k.weight": (keys, d)}
            own |= {"mixer.proj_v.weight": (d, d), "mixer.out_proj.weight": (d, d)}
            if kind == "PrefixLinearAttention":
                own |= {"mixer.proj_k_enc.weight": (keys, d), "mixer.proj_v_enc.weight": (d, d)}
            if alt.get("use_decay_proj"):
                own["mixer.decay_proj.weight"] = (config["n_head"], d)
        found |= {f"transformer.layers.{i}.{name}": shape for name, shape in own.items()}
    if config.get("fixed_decay"):
        found["transformer.decay.decay"] = (config["n_head"],)
    ends = {"transformer.embeddings.word_embeddings.weight": (vocab, d), "transformer.ln_f.weight": (d,)}
    return found | ends | {"lm_head.weight": (vocab, d)}


def decay_buffer(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """As the model makes it."""
    head_H = torch.arange(config["n_head"], dtype=dtype)
    return torch.log(1 - 2 ** (config["decay_const"] - head_H))


# ---------------------------------------------------------------------------------------------- the models


class Original:
    """A tiny published model, by its equations."""

    def __init__(self, config: Any) -> None:
        self.config, draw = config, torch.Generator().manual_seed(1)
        self.weights: dict[str, Tensor] = {}
        for name, shape in shapes(config.json, config.hidden).items():
            if "norm" in name or "ln_" in name:
                tensor = 1 + 0.3 * torch.randn(shape, generator=draw)
            elif name.endswith("A_log"):
                tensor = torch.arange(1.0, shape[1] + 1).log() + 0.3 * torch.randn(shape, generator=draw)
            elif name == "transformer.decay.decay":
                tensor = decay_buffer(config.json)
            else:
                width, gain = shape[-1] if len(shape) > 1 else 4, 1.0 if "backbone" in name else 1.5
                tensor = torch.randn(shape, generator=draw) * gain / math.sqrt(width)
            self.weights[name] = tensor
        embedding = next(name for name in self.weights if "embedding" in name)
        self.weights[embedding] *= 2
        self.weights["lm_head.weight"] = self.weights[embedding].clone()

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.json))
        torch.save(self.weights, folder / "pytorch_model.bin")

    def eval(self) -> Original:
        return self

    def double(self) -> Original:
        self.weights = {name: tensor.double() for name, tensor in self.weights.items()}
        if self.config.json.get("fixed_decay"):
            self.weights["transformer.decay.decay"] = decay_buffer(self.config.json, torch.float64)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        kept = {name: tensor.double() for name, tensor in weights.items() if "decay.decay" not in name}
        self.weights |= kept

    def __call__(
        self, tokens_BT: Tensor, *, use_cache: bool = False, prefix: int = 0, masked_BT: Tensor | None = None
    ) -> SimpleNamespace:
        config, weights = self.config.json, self.weights
        if "d_model" in config:
            r = weights["backbone.embedding.weight"][tokens_BT]
            for i in range(config["n_layer"]):
                there = f"backbone.layers.{i}."
                r = r + mamba({k: v for k, v in within(weights, f"{there}mixer.")},
                              norm(r, weights[f"{there}norm.weight"]))  # fmt: skip
            h = norm(r, weights["backbone.norm_f.weight"])
            return SimpleNamespace(logits=h @ weights["lm_head.weight"].T)
        r = weights["transformer.embeddings.word_embeddings.weight"][tokens_BT]
        for i, kind in enumerate(parts(config)):
            there = f"transformer.layers.{i}."
            h, w = norm(r, weights[f"{there}norm1.weight"]), dict(within(weights, f"{there}mixer."))
            if kind == "BaseConv":
                r = r + base_conv(w, h)
            elif kind in ("MHA", "SlidingAttention"):
                past = config["alt_mixer_2"]["window_size"] // 2 if kind != "MHA" else None
                rotary = int(config["rotary_emb_fraction"] * (config["n_embd"] // config["n_head"]))
                r = r + softmax_attention(w, h, config["n_head"], rotary, past)
            else:
                length = prefix or config["alt_mixer"].get("enc_length", 0)
                decay_H = weights.get("transformer.decay.decay")
                r = r + taylor(w, h, config["alt_mixer"], decay_H, length, masked_BT)
            h = norm(r, weights[f"{there}norm2.weight"])
            value, gate = (h @ weights[f"{there}mlp.fc1.weight"].T).chunk(2, dim=-1)
            r = r + value * F.silu(gate) @ weights[f"{there}mlp.fc2.weight"].T
        h = norm(r, weights["transformer.ln_f.weight"])
        return SimpleNamespace(logits=h @ weights["lm_head.weight"].T)


def within(weights: dict[str, Tensor], there: str) -> list[tuple[str, Tensor]]:
    return [(name[len(there) :], tensor) for name, tensor in weights.items() if name.startswith(there)]


def norm(r: Tensor, weight: Tensor) -> Tensor:
    return r * torch.rsqrt(r.square().mean(-1, keepdim=True) + 1e-5) * weight


def base_conv(w: dict[str, Tensor], h: Tensor) -> Tensor:
    u, gate = F.linear(h, w["in_proj.weight"], w["in_proj.bias"]).chunk(2, dim=-1)
    taps, T = w["conv.conv.weight"][:, 0], h.shape[1]
    padded = F.pad(u, (0, 0, 2, 0))
    c = sum(padded[:, i : i + T] * taps[:, i] for i in range(3))
    return F.linear(F.silu(c) * gate, w["out_proj.weight"], w["out_proj.bias"])


def softmax_attention(w: dict[str, Tensor], h: Tensor, heads: int, rotary: int, past: int | None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (h @ w["Wqkv.weight"].T).chunk(3, -1))
    position = torch.arange(h.shape[1], dtype=h.dtype)
    angle = position[:, None] * 10000 ** (-torch.arange(0, rotary, 2, dtype=h.dtype) / rotary)
    half = angle.shape[-1]

    def turned(x: Tensor) -> Tensor:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    s = turned(q) @ turned(k).mT / math.sqrt(q.shape[-1])
    distance = position[:, None] - position
    seen = (distance >= 0) if past is None else (distance >= 0) & (distance <= past)
    y = s.masked_fill(~seen, -math.inf).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2) @ w["out_proj.weight"].T


def taylor(
    w: dict[str, Tensor],
    h: Tensor,
    about: dict[str, Any],
    decay_H: Tensor | None,
    prefix: int,
    masked_BT: Tensor | None,
) -> Tensor:
    heads = about["num_heads"]

    def project(name: str, x: Tensor) -> Tensor:
        return (x @ w[f"proj_{name}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        s = q @ k.mT / math.sqrt(about["feature_dim"])
        return 1 + s + s.square() / 2

    q, k, v = (project(name, h) for name in "qkv")
    if masked_BT is not None:
        k = k.masked_fill(masked_BT[:, None, :, None], 0.0)
    a = scores(q, k).tril()
    norm = a.sum(-1, keepdim=True)
    if about.get("use_decay_proj"):
        assert decay_H is not None
        T = torch.arange(h.shape[1], dtype=h.dtype)
        a = a * torch.exp((T[:, None] - T).clamp(min=0) * decay_H[:, None, None])
        a = a * (h @ w["decay_proj.weight"].T).transpose(1, 2)[..., None]
    y = a @ v
    if "proj_k_enc.weight" in w:
        k, v = project("k_enc", h[:, :prefix]), project("v_enc", h[:, :prefix])
        if masked_BT is not None:
            k = k.masked_fill(masked_BT[:, None, :prefix, None], 0.0)
        a = scores(q, k)
        y, norm = y + a @ v, norm + a.sum(-1, keepdim=True)
    fla = about.get("parallel_implementation", "quadratic").startswith("fla")
    y = y / (norm + (1e-6 if fla else 1e-12))
    return y.transpose(1, 2).flatten(2) @ w["out_proj.weight"].T


def mamba(w: dict[str, Tensor], h: Tensor) -> Tensor:
    x, z = (h @ w["in_proj.weight"].T).chunk(2, dim=-1)
    T, taps = h.shape[1], w["conv1d.weight"][:, 0]
    padded = F.pad(x, (0, 0, 3, 0))
    x = F.silu(sum(padded[:, i : i + T] * taps[:, i] for i in range(4)) + w["conv1d.bias"])
    rank = w["dt_proj.weight"].shape[1]
    dt, b, c = (x @ w["x_proj.weight"].T).split([rank, 16, 16], dim=-1)
    dt = F.softplus(F.linear(dt, w["dt_proj.weight"], w["dt_proj.bias"]))
    a, state, ys = -w["A_log"].exp(), 0, []
    for t in range(T):
        state = torch.exp(dt[:, t, :, None] * a) * state + (dt * x)[:, t, :, None] * b[:, t, None]
        ys.append((state * c[:, t, None]).sum(-1) + w["D"] * x[:, t])
    return torch.stack(ys, 1) * F.silu(z) @ w["out_proj.weight"].T


def tiny(config: dict[str, Any], **more: Any) -> Original:
    """A small model of the kind of a published one."""
    if "d_model" in config:
        small = config | {"d_model": 24, "n_layer": 3, "vocab_size": 29}
    elif "mixer" in config:
        alt = config["alt_mixer"] | {"num_heads": 2, "feature_dim": 4}
        alt |= {name: 2 for name in ("num_key_value_heads",) if name in alt}
        alt |= {name: E for name in ("enc_length",) if name in alt}
        if "feature_map" in alt:
            alt["feature_map"] = alt["feature_map"] | {"input_dim": 4}
        small = config | {
            "n_embd": 24, "n_layer": 5, "n_head": 2, "vocab_size": 29, "alt_mixer_layers": [1, 4],
            "alt_mixer_2_layers": [2], "alt_mixer": alt,
            "alt_mixer_2": SLIDING | {"window_size": 9, "num_heads": 2},
        }  # fmt: skip
    else:
        small = config | {"n_embd": 28, "n_head": 2, "n_layer": 2, "vocab_size": 29}
    small |= more
    return Original(SimpleNamespace(json=small, hidden=40, vocab_size=small["vocab_size"]))


E = 9
CAUSAL = [name for name in PUBLISHED if "JRT" not in name]


@pytest.mark.parametrize("name", ["based-360m", "based-1b", "based-360M-30B", "attn-360m", "mamba-360m"])
def test_a_model_is_the_one_of_its_equations(name: str, tmp_path: Path) -> None:
    parity.check(tiny(PUBLISHED[name][0]), tmp_path)


def test_an_odd_number_of_rotary_dimensions_turns_one_more(tmp_path: Path) -> None:
    """As in attn-1b: a half of 70 dimensions are 35, whose 18 frequencies turn 36."""
    original = tiny(PUBLISHED["attn-1b"][0], n_embd=140)
    model = parity.check(original, tmp_path)
    assert model.config.layers[0] == AttentionConfig(width=140, heads=2, rotary=0.5, bias=False)


def test_the_eps_is_that_of_the_implementation(tmp_path: Path) -> None:
    for name, eps in (("based-360m", 1e-6), ("based-1b", 1e-12)):
        model = parity.converted(tiny(PUBLISHED[name][0]), tmp_path / name)  # type: ignore[arg-type]
        layer = model.config.layers[1]
        assert isinstance(layer, TaylorConfig)
        assert layer.eps == eps


@pytest.mark.parametrize("length", [5, E, 23])
@torch.no_grad()
def test_a_prefix_is_read_as_its_equations_say(length: int, tmp_path: Path) -> None:
    """The whole; in pieces, of which the first has the prefix; and the greedy text after it."""
    original = tiny(PUBLISHED["JRT-360M-30B"][0])
    model = parity.converted(original, tmp_path).double()  # type: ignore[arg-type]
    assert model.config.layers[1] == PrefixLinearAttentionConfig(
        width=24, heads=2, feature_dim=4, prefix=E, eps=1e-12
    )
    original.double()
    tokens_BT = torch.randint(29, (2, length), generator=torch.Generator().manual_seed(0))
    want_BTV = original(tokens_BT).logits
    scale = float(want_BTV.abs().max())
    assert (parity.whole(model, tokens_BT) - want_BTV).abs().max() < 1e-10 * scale
    if length > E:
        for sizes in ([E, 2, length - E - 2], [E, *[1] * (length - E)]):
            assert (parity.in_pieces(model, tokens_BT, sizes) - want_BTV).abs().max() < 1e-10 * scale
    text = tokens_BT
    logits_BTV, states = model(tokens_BT)
    for _ in range(8):
        want_B1 = original(text, prefix=min(E, length)).logits[:, -1:, :].argmax(-1)
        next_B1 = logits_BTV[:, -1:].argmax(-1)
        assert torch.equal(next_B1, want_B1)
        text = torch.cat((text, next_B1), dim=1)
        logits_BTV, states = model(next_B1, states)


@pytest.mark.claim("mixers/prefix_linear_attention.py", "rows of different lengths")
@pytest.mark.parametrize("length", [1, 4, E, E + 3])
@torch.no_grad()
def test_a_prompt_is_padded_as_published(length: int, tmp_path: Path) -> None:
    """The logits after it, and after each of the tokens that follow."""
    original = tiny(PUBLISHED["JRT-360M-30B"][0])
    model = parity.converted(original, tmp_path).double()  # type: ignore[arg-type]
    original.double()
    tokens = torch.randint(29, (length + 6,), generator=torch.Generator().manual_seed(0)).tolist()
    padding, pad = max(E - length, 0), 3
    session = hazy.read_padded(model, tokens[:length], pad=pad)
    text_BT = torch.tensor([[pad] * padding + tokens])
    masked_BT = torch.arange(text_BT.shape[1])[None] < padding
    want_TV = original(text_BT, masked_BT=masked_BT).logits[0]
    assert session.past.count == length + padding
    for at in range(length + padding - 1, text_BT.shape[1] - 1):
        torch.testing.assert_close(session.logits_V.double(), want_TV[at], rtol=1e-5, atol=1e-5)
        session = read_on(model, [int(text_BT[0, at + 1])], session)
    plain = read_on(model, tokens[:length])
    same = torch.allclose(plain.logits_V.double(), want_TV[length + padding - 1], atol=1e-3)
    assert same == (not padding)


def test_only_a_model_with_one_prefix_is_padded() -> None:
    with pytest.raises(ValueError, match="padded to the one prefix of all layers"):
        hazy.read_padded(read(PUBLISHED["attn-360m"][0]), [1], pad=0)


# ---------------------------------------------------------------------------------------- files as published


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_models_keys_and_parameters(name: str) -> None:
    """At the full size, without memory."""
    config, hidden, parameters, keys = PUBLISHED[name]
    made = {key: torch.empty(shape, device="meta") for key, shape in shapes(config, hidden).items()}
    assert len(made) == keys
    made["lm_head.weight"] = made[next(key for key in made if "embedding" in key)]
    if "transformer.decay.decay" in made:
        made["transformer.decay.decay"] = decay_buffer(config)
    model_config, tensors = foreign.read(config, Weights(made, "file"), "config.json")
    with torch.device("meta"):
        model = model_config.build()
    want = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in tensors.items()} == want
    assert model.parameter_count() == parameters


@torch.no_grad()
def test_old_names_and_the_trainers_own_are_read(tmp_path: Path) -> None:
    """The trainer's prefix, its metrics, `conv1`, norms that were counted from the first, old class names."""
    original = tiny(PUBLISHED["based-360m"][0])
    want = parity.converted(original, tmp_path / "new").state_dict()  # type: ignore[arg-type]
    weights, depth = dict(original.weights), original.config.json["n_layer"]
    norms = [f"transformer.layers.{i}.norm{n}.weight" for i in range(depth) for n in (1, 2)]
    olds = ["transformer.ln_0.weight", *norms]
    news = [*norms, "transformer.ln_f.weight"]
    moved = {old: weights.pop(new) for old, new in zip(olds, news, strict=True)}
    weights = {name.replace("mixer.conv.", "mixer.conv1."): tensor for name, tensor in weights.items()}
    weights = {f"model.{name}": tensor for name, tensor in (weights | moved).items()}
    weights["train_metrics.num-tokens.count"] = torch.zeros(())
    original.weights = weights
    config = json.loads(json.dumps(original.config.json))
    config["mixer"]["_target_"] = "src.models.mixers.base_conv.BaseConvWithSiLU4"
    config["alt_mixer"]["_target_"] = "src.models.mixers.linear_attention.LinearAttention"
    config["alt_mixer"]["feature_map"]["_target_"] = "src.models.mixers.linear_attention.TaylorExp"
    config["alt_mixer_2"] |= {"_target_": "src.models.mixers.slide_fa2.SlidingsMHA", "do_update": True}
    original.config.json = config
    got = parity.converted(original, tmp_path / "old").state_dict()  # type: ignore[arg-type]
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def read(
    config: dict[str, Any], change: Callable[[dict[str, Tensor]], object] = lambda weights: None
) -> Model:
    made = tiny(config).weights
    change(made)
    config_, tensors = foreign.read(tiny(config).config.json, Weights(made, "file"), "config.json")
    return foreign.built(config_, tensors, "folder")


def test_a_head_that_is_not_the_embedding_is_refused_or_its_own() -> None:
    def other(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"] + 1

    config = PUBLISHED["based-360m"][0]
    with pytest.raises(ForeignError, match="ties the head to the embedding, but lm_head"):
        read(config, other)
    model = read(config | {"tie_word_embeddings": False}, other)
    assert torch.equal(model.head_weight, model.embed.weight + 1)
    read(config, lambda weights: weights.pop("lm_head.weight"))


def test_a_decay_that_is_another_one_is_refused() -> None:
    def other(weights: dict[str, Tensor]) -> None:
        weights["transformer.decay.decay"] = weights["transformer.decay.decay"] * 2

    with pytest.raises(ForeignError, match=r"transformer\.decay\.decay is not"):
        read(PUBLISHED["based-360M-30B"][0], other)


def test_weights_that_nobody_has_are_refused() -> None:
    config = PUBLISHED["based-360m"][0]
    name = "transformer.embeddings.position_embeddings.weight"
    with pytest.raises(ForeignError, match="position_embeddings"):
        read(config, lambda weights: weights.update({name: torch.zeros(2, 24)}))
    with pytest.raises(ForeignError, match=r"no weight 'transformer\.layers\.1\.mixer\.proj_k\.weight'"):
        read(config, lambda weights: weights.pop("transformer.layers.1.mixer.proj_k.weight"))


REFUSED: dict[str, list[tuple[str, Any]]] = {
    "based-360m": [
        ("activation_function", "gelu"), ("rms_norm", False), ("mlp_fc1_bias", True), ("mlp_fc2_bias", None),
        ("qkv_proj_bias", True), ("out_proj_bias", None), ("lm_head_bias", True), ("mlp_type", "alt"),
        ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("prenorm", False),
        ("reorder_and_upcast_attn", True), ("add_cross_attention", True), ("rotary_emb_base", 500),
        ("rotary_emb_interleaved", True), ("attn_dwconv", True), ("parallel_block", True),
        ("pruned_heads", {"0": [1]}), ("rotary_emb_fraction", 2), ("rotary_emb_fraction", "half"),
        ("n_head_kv", 1), ("word_embed_proj_dim", 8), ("vocab_size", 99), ("alt_mixer_layers", [7]),
        ("alt_mixer_2_layers", "all"), ("n_embd", -1), ("decay_const", 3), ("decay_denom", True),
        ("mixer._target_", "based.models.mixers.Hyena"), ("mixer.use_bias", False), ("mixer.twist", 1),
        ("mixer.expand_proj", "4"), ("alt_mixer.feature_map._target_", "x.Hedgehog"),
        ("alt_mixer.feature_map.input_dim", 5), ("alt_mixer.feature_map.temp", 2.0),
        ("alt_mixer.parallel_implementation", "tk"), ("alt_mixer.head_dim", 5),
        ("alt_mixer.feature_name", "pos_elu"), ("alt_mixer.num_key_value_heads", 1),
        ("alt_mixer.use_rotary_apply", True), ("alt_mixer.use_act", True), ("alt_mixer.train_view", "linear"),
        ("alt_mixer.use_decay_proj", True), ("alt_mixer_2.causal", False), ("alt_mixer_2.num_heads", 4),
        ("alt_mixer_2.num_heads_kv", 1), ("alt_mixer_2.softmax_scale", 1.0),
        ("alt_mixer_2.rotary_emb_dim", 4), ("alt_mixer_2.window_size", -1),
        ("alt_mixer_2.qkv_proj_bias", True), ("alt_mixer_2.out_proj_bias", True),
        ("alt_mixer_2.rotary_emb_base", 5), ("alt_mixer_2.rotary_emb_interleaved", True),
    ],
    "based-360M-30B": [("fixed_decay", False), ("fixed_decay", 1)],
    "JRT-360M-30B": [
        ("alt_mixer.implementation", "tk"), ("alt_mixer.scale_dim", 3), ("alt_mixer.enc_length", None),
    ],
    "mamba-360m": [
        ("rms_norm", False), ("d_intermediate", 8), ("attn_layer_idx", [1]), ("attn_cfg", {"a": 1}),
        ("ssm_cfg.layer", "Mamba2"), ("ssm_cfg.conv_bias", False), ("ssm_cfg.bias", True),
        ("ssm_cfg.dt_rank", "all"), ("ssm_cfg.twist", 1), ("reorder_and_upcast_attn", True),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field", "value"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_what_cannot_be_represented_is_refused_by_name(name: str, field: str, value: Any) -> None:
    original = tiny(PUBLISHED[name][0])
    config = json.loads(json.dumps(original.config.json))
    *path, last = field.split(".")
    part = config
    for step in path:
        part = part[step]
    part[last] = value
    with pytest.raises(ForeignError, match=rf"\b{last}\b"):
        foreign.read(config, Weights(original.weights, "file"), "config.json")


# ------------------------------------------------------------------------------------------- which folder


def test_a_folder_is_told_by_its_fields() -> None:
    gpt2 = {name: value for name, value in GPT.items() if name != "rotary_emb_fraction"}
    assert foreign.kind_of(gpt2) == "gpt2"
    assert foreign.kind_of(PUBLISHED["attn-360m"][0]) == "flash-attention-gpt"
    assert foreign.kind_of(PUBLISHED["based-1b"][0]) == "flash-attention-gpt"
    assert foreign.kind_of(MAMBA) == "mamba-ssm"
    assert foreign.kind_of({"model_type": "mamba", "d_model": 4}) == "mamba"
    assert foreign.kind_of({}) == foreign.kind_of({"model_type": 3}) == ""


def test_a_folder_without_a_tokenizer_says_which_one_to_give(tmp_path: Path) -> None:
    tiny(PUBLISHED["mamba-360m"][0]).save_pretrained(tmp_path)
    assert foreign.is_foreign(tmp_path)
    with pytest.raises(RunError, match=r"no tokenizer\.json; name one: --tokenizer FILE.*gpt2"):
        foreign.load(tmp_path)


@torch.no_grad()
def test_a_folder_is_converted_and_loads_as_one_of_holdalls(tmp_path: Path) -> None:
    import holdall

    original = tiny(PUBLISHED["based-360m"][0], vocab_size=257, bos_token_id=256, eos_token_id=256)
    original.save_pretrained(tmp_path / "theirs")
    given = tmp_path / "tokenizer.json"
    given.write_bytes(Bytes().to_json())
    foreign.convert(tmp_path / "theirs", tmp_path / "ours", tokenizer=given)
    model = holdall.load(tmp_path / "ours")
    tokens_BT = torch.randint(257, (1, 12), generator=torch.Generator().manual_seed(0))
    want_BTV = original(tokens_BT).logits
    assert (model.model(tokens_BT)[0] - want_BTV).abs().max() < 1e-5 * want_BTV.abs().max()
    assert model.generate("abc", max_tokens=3, temperature=0) is not None


def test_parts_of_a_config_are_taken_whole() -> None:
    """A mixer that no layer has is not read, and so not refused."""
    read(PUBLISHED["attn-360m"][0] | {"alt_mixer": {"_target_": "x.Strange"}})
    assert Fields({"a": 1}, "x").take("a") == 1


@torch.no_grad()
def errors(name: str, folder: Path) -> list[float]:
    """The largest difference of the logits, over the largest logit, in fp32 and fp64; read in pieces."""
    original = tiny(PUBLISHED[name][0], **({"n_embd": 140} if name == "attn-1b" else {}))
    model = parity.converted(original, folder)  # type: ignore[arg-type]
    tokens_BT = torch.randint(29, (2, 23), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        want_BTV = original(tokens_BT).logits
        got_BTV = parity.in_pieces(model, tokens_BT, [E, 1, 6, 23 - E - 7])
        found.append(float((got_BTV - want_BTV).abs().max() / want_BTV.abs().max()))
        original.double()
        model.double()
    return found


if __name__ == "__main__":  # PYTHONPATH=.:tests python -m adapters.test_hazy
    for name in PUBLISHED:
        with tempfile.TemporaryDirectory() as folder:
            print(name, *(f"{error:.1e}" for error in errors(name, Path(folder))))
