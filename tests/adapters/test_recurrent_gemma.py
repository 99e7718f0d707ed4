"""RecurrentGemma of transformers, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import parity

from holdall.adapters import foreign
from holdall.adapters.reading import Weights
from holdall.model import seeded

SIZES = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 1, "intermediate_size": 40, "attention_window_size": 5,
}  # fmt: skip


def original(**options: Any) -> Any:
    """A tiny one with random weights everywhere: initial zeros and ones would hide what is forgotten."""
    library = parity.transformers()
    with seeded(0):
        config = library.RecurrentGemmaConfig(**SIZES | options)
        model = library.RecurrentGemmaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "lru_width": 36, "conv1d_width": 3, "num_key_value_heads": 3, "attention_bias": True,
            "logits_soft_cap": 2.0, "tie_word_embeddings": False, "rms_norm_eps": 1e-2,
            "block_types": ["attention", "recurrent"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
        },
    ],
    ids=["as released", "other sizes"],
)  # fmt: skip
def test_it_is_what_it_was_there(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = original(**options)
    model = parity.check(theirs, tmp_path)
    assert model.config.tied == theirs.config.tie_word_embeddings


def test_fields_of_the_first_files_are_read() -> None:
    """Those of version 4: rotary positions outside, and what says no more than others."""
    model = original()
    now = model.config.to_diff_dict()
    first = {name: value for name, value in now.items() if name != "rope_parameters"}
    first |= {
        "rope_theta": 100.0, "partial_rotary_factor": 1.0, "embeddings_scale_by_sqrt_dim": True,
        "_block_types": ["recurrent", "recurrent", "attention"],
    }  # fmt: skip

    def config_of(config_json: dict[str, Any]) -> Any:
        tensors = dict(model.state_dict())
        return foreign.read(config_json, Weights(tensors, "weights"), "config.json")[0]

    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}
    assert config_of(first) == config_of(now | {"rope_parameters": rope})


def test_weights_in_bf16_keep_their_bits_in_one_plus_w() -> None:
    model = original().bfloat16()
    config_json, weights = model.config.to_diff_dict(), Weights(dict(model.state_dict()), "weights")
    _, tensors = foreign.read(config_json, weights, "config.json")
    want = 1 + model.model.final_norm.weight.float()
    assert torch.equal(tensors["norm.weight"], want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ({"block_types": ["recurrent", "mamba"]}, r"block_types = \['recurrent', 'mamba'\]"),
        ({"block_types": []}, r"block_types = \[\]"),
        ({"_block_types": ["attention"]}, r"_block_types = \['attention'\]"),
        ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim = False"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"attention_bias": "yes"}, "attention_bias = 'yes'"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings = 0"),
        ({"conv1d_width": 4.5}, "conv1d_width = 4.5"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor = 2.0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling = "),
        ({"twist": 3}, "twist = 3"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    parity.check_refused(original(), fields, message)


if __name__ == "__main__":  # PYTHONPATH=.:tests python -m adapters.test_recurrent_gemma
    parity.show_errors("recurrent gemma", original())
