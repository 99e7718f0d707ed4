"""GPT-2 against `transformers`: the same logits, pieces and greedy text; the rest is refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from adapters.parity import check, converted

from holdall.adapters import foreign
from holdall.adapters.reading import ForeignError, Weights


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers", reason="transformers is not installed")
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401 - makes the submodule known
    return module


def made(transformers: ModuleType, **options: Any) -> Any:
    sizes = {"vocab_size": 61, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **options)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_inner": 24, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        # scales of 1/2 and 2, which are exact in fp32
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        {"tie_word_embeddings": False, "activation_function": "gelu_pytorch_tanh"},
    ],
    ids=["as published", "inner width", "scales of scores", "untied"],
)
def test_it_is_the_original(transformers: ModuleType, options: dict[str, Any], tmp_path: Path) -> None:
    check(made(transformers, **options), tmp_path)


def test_the_first_files_have_no_prefix_and_keep_masks(transformers: ModuleType, tmp_path: Path) -> None:
    original = made(transformers)
    weights = {name.removeprefix("transformer."): each for name, each in original.state_dict().items()}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    weights |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    del weights["lm_head.weight"]
    config, tensors = foreign.read(original.config.to_diff_dict(), Weights(weights, "w"), "config.json")
    want = converted(original, tmp_path)
    assert config == want.config
    assert all(torch.equal(tensors[name], tensor) for name, tensor in want.state_dict().items())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"activation_function": "relu"}, "activation_function = 'relu'"),
    ({"add_cross_attention": True}, "add_cross_attention = True"),
    ({"scale_attn_weights": 2}, "scale_attn_weights = 2"),
    ({"n_head": 5}, "width 16 is not a multiple of heads 5"),
    ({"n_positions": -1}, "n_positions = -1"),
    ({"rotary_dim": 4}, "has rotary_dim = 4"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(
    transformers: ModuleType, changed: dict[str, Any], message: str
) -> None:
    original = made(transformers)
    with pytest.raises(ForeignError, match=message):
        foreign.read(
            {**original.config.to_diff_dict(), **changed}, Weights(original.state_dict(), "w"), "config.json"
        )


def test_a_head_that_should_be_the_embedding_and_is_not_is_refused(transformers: ModuleType) -> None:
    original = made(transformers)
    weights = {**original.state_dict(), "lm_head.weight": torch.ones(61, 16)}
    with pytest.raises(ForeignError, match="ties the head to the embedding, but lm_head"):
        foreign.read(original.config.to_diff_dict(), Weights(weights, "w"), "config.json")
