"""Folders of recurrent models of transformers: converted, loaded and served like any other of Holdall's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import parity

import holdall
from holdall.adapters import foreign
from holdall.engine import EngineConfig, Request, Sampling
from holdall.model import seeded

SIZES: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 4},
    "FalconMamba": {"state_size": 4},
    "Mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2},
    "Rwkv": {"rescale_every": 0},
    "RecurrentGemma": {
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32,
        "attention_window_size": 5, "logits_soft_cap": 3.0,
    },
}  # fmt: skip
PROMPT, MORE = tuple(b"the state is the memory"), 8


@pytest.mark.parametrize("kind", SIZES)
@torch.no_grad()
def test_a_converted_folder_scores_and_writes_as_the_original(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 2} | SIZES[kind]
    with seeded(0):
        theirs = getattr(parity.transformers(), f"{kind}ForCausalLM")(
            getattr(parity.transformers(), f"{kind}Config")(**sizes)
        )
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    foreign.convert(tmp_path / "theirs", tmp_path / "ours", tokenizer="bytes")
    model = holdall.load(tmp_path / "ours")

    text = torch.tensor([PROMPT])
    for _ in range(MORE):
        text = torch.cat((text, theirs(text, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    engine = model.engine(EngineConfig(rows=1, max_context=64 if model.model.needs_room else None))
    request = Request(prompt=PROMPT, sampling=Sampling(max_tokens=MORE, temperature=0, ignore_end=True))
    got = [token.id for piece in engine.run([request]) for token in piece.tokens]
    assert got == text[0, len(PROMPT) :].tolist()

    score = model.score(bytes(PROMPT).decode())
    ids = score.ids_T[None]
    first = torch.tensor([[model.tokenizer.end]])  # behind the end of the document before
    log_prob_TV = theirs(torch.cat((first, ids), 1)[:, :-1], use_cache=False).logits.log_softmax(-1)[0]
    want = -log_prob_TV.gather(1, ids[0, :, None]).sum()
    assert math.isclose(score.nats, float(want), rel_tol=1e-5)
