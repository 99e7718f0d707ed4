"""OLMo Hybrid against the `transformers` library's own classes."""

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

from transformers.models import olmo_hybrid

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 2, "linear_key_head_dim": 8, "pad_token_id": None, "eos_token_id": None,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": None},
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    in_plain_torch(monkeypatch, olmo_hybrid.modeling_olmo_hybrid)


def original(**changes: Any) -> Any:
    return randomised(olmo_hybrid.OlmoHybridForCausalLM, olmo_hybrid.OlmoHybridConfig(**(SIZES | changes)))


def test_olmo_hybrid(tmp_path: Path) -> None:
    model = check(original(), tmp_path)
    delta_net, attention, _ = model.config.layers
    assert (delta_net.name, attention.name) == ("gated-delta-net", "attention")
    assert model.config.norms_after == (1,)
    assert delta_net.negative_eigenvalues
    assert attention.rotary == 0


@pytest.mark.full
def test_olmo_hybrid_with_all_it_can_have(tmp_path: Path) -> None:
    changes = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3, "linear_allow_neg_eigval": False,
        "linear_value_head_dim": 8, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }  # fmt: skip
    model = check(original(**changes), tmp_path)
    assert model.config.layers[1].rotary == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("olmo_hybrid")
    original().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("linear_value_head_dim", 12),
        ("linear_num_value_heads", 3),
        ("linear_allow_neg_eigval", 1),
        ("layer_types", ["linear_attention", "sliding_attention", "linear_attention"]),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 100.0}),
        ("rope_parameters", None),
        ("attention_bias", 1),
        ("twist", 1),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(folder: Path, field: str, value: Any) -> None:
    name = "rope_type" if isinstance(value, dict) else field
    assert f"{name} = " in refusal(folder, **{field: value})


def test_what_is_not_said_is_as_in_the_library(tmp_path: Path) -> None:
    sizes = SIZES | {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "layer_types": None,
        "linear_key_head_dim": None,
    }
    model = randomised(olmo_hybrid.OlmoHybridForCausalLM, olmo_hybrid.OlmoHybridConfig(**sizes))
    model.save_pretrained(tmp_path)
    config_json = read_json(tmp_path / "config.json")
    with weights_in(tmp_path) as weights:
        said, _ = foreign.read(config_json, weights, "config.json")
    for name in [name for name in config_json if name.startswith("linear_") or name == "layer_types"]:
        del config_json[name]
    with weights_in(tmp_path) as weights:
        assert foreign.read(config_json, weights, "config.json")[0] == said
