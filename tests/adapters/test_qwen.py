"""Qwen3-Next and Qwen3.5 against the `transformers` library's own classes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.originals import in_plain_torch, randomised, refusal
from adapters.parity import check

from holdall.adapters import foreign
from holdall.adapters.reading import ForeignError, Weights, weights_in

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models import qwen3_5, qwen3_next

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 3,
    "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
SEES = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 2,
    "out_hidden_size": 24,
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    in_plain_torch(monkeypatch, qwen3_next.modeling_qwen3_next)
    in_plain_torch(monkeypatch, qwen3_5.modeling_qwen3_5)


def next_model(**changes: Any) -> Any:
    return randomised(Qwen3NextForCausalLM, Qwen3NextConfig(**(SIZES | {"num_experts": 0} | changes)))


def test_qwen3_next(tmp_path: Path) -> None:
    model = check(next_model(rms_norm_eps=1e-3), tmp_path)
    delta_net, attention, _ = model.config.layers
    assert (delta_net.name, attention.name) == ("gated-delta-net", "attention")
    assert not model.config.tied
    assert model.config.eps == 1e-3


@pytest.mark.full
def test_qwen3_next_with_biases_and_other_rotary_positions(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    check(next_model(attention_bias=True, rope_parameters=rope, linear_num_value_heads=2), tmp_path)


def test_layers_whose_experts_are_switched_off_are_dense(tmp_path: Path) -> None:
    check(next_model(num_experts=4, mlp_only_layers=[0, 1, 2]), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_5_text(tmp_path: Path, tied: bool) -> None:
    config = qwen3_5.Qwen3_5TextConfig(**SIZES, tie_word_embeddings=tied)
    model = check(randomised(qwen3_5.Qwen3_5ForCausalLM, config), tmp_path)
    assert model.config.tied is tied


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_of_one_that_sees(tmp_path: Path, tied: bool) -> None:
    config = qwen3_5.Qwen3_5Config(text_config=SIZES, vision_config=SEES, tie_word_embeddings=tied)
    check(randomised(qwen3_5.Qwen3_5ForConditionalGeneration, config), tmp_path, vocab=61)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    next_model().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 8),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters.rope_type", "yarn"),
        ("rope_parameters.factor", 4.0),
        ("layer_types", ["linear_attention", "sliding_attention", "linear_attention"]),
        ("layer_types", ["full_attention"]),
        ("linear_value_head_dim", 12),
        ("linear_num_value_heads", 3),
        ("attention_bias", 1),
        ("attn_output_gate", False),
        ("output_gate_type", "sigmoid"),
        ("use_sliding_window", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("twist", 1),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(folder: Path, field: str, value: Any) -> None:
    assert field.split(".")[-1] in refusal(folder, **{field: value})


def test_older_fields_mean_what_newer_ones_do(folder: Path) -> None:
    config_json = foreign.files.read_json(folder / "config.json")
    with weights_in(folder) as weights:
        newer, _ = foreign.read(config_json, weights, "config.json")
    del config_json["layer_types"], config_json["rope_parameters"]
    config_json |= {
        "full_attention_interval": 2, "rope_theta": 10000, "partial_rotary_factor": 0.25, "rope_scaling": None
    }  # fmt: skip
    with weights_in(folder) as weights:
        older, _ = foreign.read(config_json, weights, "config.json")
    assert older == newer


def test_fields_of_released_folders(tmp_path: Path) -> None:
    config = qwen3_5.Qwen3_5Config(text_config=SIZES, vision_config=SEES)
    randomised(qwen3_5.Qwen3_5ForConditionalGeneration, config).save_pretrained(tmp_path)
    config_json = foreign.files.read_json(tmp_path / "config.json")
    with weights_in(tmp_path) as weights:
        plain, _ = foreign.read(config_json, weights, "config.json")
    config_json["language_model_only"] = False
    config_json["text_config"] |= {
        "attn_output_gate": True, "output_gate_type": "swish", "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "mlp_only_layers": [],
        "full_attention_interval": 4, "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [1, 1, 0], "rope_type": "default",
            "rope_theta": 10000, "partial_rotary_factor": 0.25,
        },
    }  # fmt: skip
    with weights_in(tmp_path) as weights:
        released, _ = foreign.read(config_json, weights, "config.json")
    assert released == plain


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_stored_beside_the_embedding(tmp_path: Path, same: bool) -> None:
    """It is a copy of the tied embedding, or refused: the library's versions disagree on any other tensor."""
    config = qwen3_5.Qwen3_5TextConfig(**SIZES, tie_word_embeddings=True)
    randomised(qwen3_5.Qwen3_5ForCausalLM, config).save_pretrained(tmp_path)
    with weights_in(tmp_path) as weights:
        sources = {name: weights.take(name) for name in weights.names}
    sources["lm_head.weight"] = sources["model.embed_tokens.weight"] + (0 if same else 1)
    config_json = foreign.files.read_json(tmp_path / "config.json")
    with contextlib.nullcontext() if same else pytest.raises(ForeignError, match="ties the head to"):
        config, tensors = foreign.read(config_json, Weights(sources, "here"), "config.json")
        assert config.tied
        assert "head.weight" not in tensors


def test_the_drafting_head_is_left_unread(folder: Path) -> None:
    config_json = foreign.files.read_json(folder / "config.json")
    with weights_in(folder) as weights:
        sources = {name: weights.take(name) for name in weights.names} | {"mtp.fc.weight": torch.ones(2, 2)}
    foreign.read(config_json, Weights(sources, "here"), "config.json")
