"""RWKV-4 of transformers, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import parity

from holdall.model import seeded

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "rescale_every": 0}


def original(**options: Any) -> Any:
    """A tiny one with random weights everywhere: initial zeros and ones would hide what is forgotten."""
    library = parity.transformers()
    with seeded(0):
        model = library.RwkvForCausalLM(library.RwkvConfig(**SIZES | options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("options", [{}, {"intermediate_size": 24}, {"tie_word_embeddings": True}], ids=str)
def test_it_is_what_it_was_there(options: dict[str, Any], tmp_path: Path) -> None:
    model = parity.check(original(**options), tmp_path)
    assert not model.config.tied, "the embedding is normalised, the head is not"
    assert len(model.blocks) == 2 * SIZES["num_hidden_layers"]


@torch.no_grad()
def test_it_is_what_was_trained_and_not_what_is_halved_for_fp16(tmp_path: Path) -> None:
    theirs = original(rescale_every=1)
    model = parity.converted(theirs, tmp_path)
    tokens_BT = torch.randint(40, (2, 23), generator=torch.Generator().manual_seed(0))
    got_BTV = parity.whole(model, tokens_BT)
    trained_BTV = theirs.train()(tokens_BT, use_cache=False).logits
    assert (got_BTV - trained_BTV).abs().max() <= 1e-5 * trained_BTV.abs().max()
    # halved twice in three blocks, the last norm's epsilon of 1e-5 weighs 64 times as much
    halved_BTV = theirs.eval()(tokens_BT, use_cache=False).logits
    assert 1e-6 < (got_BTV - halved_BTV).abs().max() <= 1e-2 * trained_BTV.abs().max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_hidden_size": 32}, "attention_hidden_size = 32"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
        ({"intermediate_size": 24.5}, "intermediate_size = 24.5"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
        ({"twist": 3}, "twist = 3"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    parity.check_refused(original(), fields, message)


if __name__ == "__main__":  # PYTHONPATH=.:tests python -m adapters.test_rwkv
    parity.show_errors("rwkv", original())
