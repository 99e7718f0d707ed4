"""LFM2 against the `transformers` library's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters.originals import in_plain_torch, randomised, refusal
from adapters.parity import check

from holdall.adapters import foreign
from holdall.adapters.reading import weights_in
from holdall.files import read_json

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.models import lfm2

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"],
    "block_multiple_of": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    in_plain_torch(monkeypatch, lfm2.modeling_lfm2)


def original(**changes: Any) -> Any:
    return randomised(lfm2.Lfm2ForCausalLM, lfm2.Lfm2Config(**(SIZES | changes)))


def test_lfm2(tmp_path: Path) -> None:
    model = check(original(), tmp_path)
    conv, attention, _ = model.config.layers
    assert (conv.name, attention.name) == ("gated-short-conv", "attention")
    assert model.config.tied


@pytest.mark.claim("mixers/gated_short_conv.py", "Weights", "of the W values")
def test_lfm2_with_all_it_can_have(tmp_path: Path) -> None:
    changes = {
        "conv_bias": True, "conv_L_cache": 5, "tie_word_embeddings": False, "norm_eps": 1e-3,
        "block_auto_adjust_ff_dim": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }  # fmt: skip
    model = check(original(**changes), tmp_path)
    # the library's cache has conv_L_cache columns, ours one less
    assert model.config.layers[0].build().state_elements(100) == (5 - 1) * 24
    assert model.config.mlp == 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lfm2")
    original().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_dim", 8),
        ("conv_dim", 8),
        ("conv_dim_out", 8),
        ("num_heads", 8),
        ("block_norm_eps", 1e-3),
        ("block_use_swiglu", False),
        ("use_pos_enc", False),
        ("conv_L_cache", 1.5),
        ("layer_types", ["conv", "linear_attention", "conv"]),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_parameters.rope_type", "yarn"),
        ("quantization_config", {"bits": 4}),
        ("twist", 1),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(folder: Path, field: str, value: Any) -> None:
    assert f"{field.split('.')[-1]} = " in refusal(folder, **{field: value})


def test_fields_as_the_first_folders_have_them(folder: Path) -> None:
    config_json = read_json(folder / "config.json")
    with weights_in(folder) as weights:
        newer, _ = foreign.read(config_json, weights, "config.json")
    del config_json["layer_types"], config_json["rope_parameters"], config_json["tie_word_embeddings"]
    config_json |= {
        "full_attn_idxs": [1], "rope_theta": 1000000.0, "tie_embedding": True, "block_dim": 24,
        "conv_dim": 24, "conv_dim_out": 24, "num_heads": 4, "block_norm_eps": 1e-5, "block_use_swiglu": True,
        "block_ff_dim": 40, "block_mlp_init_scale": 1.0, "block_out_init_scale": 1.0, "use_pos_enc": True,
        "block_use_xavier_init": True, "conv_use_xavier_init": True,
    }  # fmt: skip
    with weights_in(folder) as weights:
        older, _ = foreign.read(config_json, weights, "config.json")
    assert older == newer
