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
from holdall.adapters.reading import ForeignError
from holdall.engine import EngineConfig, Request, Sampling
from holdall.language_model import LanguageModel
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

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


@pytest.mark.parametrize("name", ["mamba", "mamba-2"])
@torch.no_grad()
def test_models_of_mamba_alone_go_out_in_the_library_s_own_layout(name: str, tmp_path: Path) -> None:
    """And the library opens it without Holdall; what it cannot hold is refused by name."""
    library = parity.transformers()
    from holdall.adapters import transformers as adapter

    options = {"head_dim": 8} if name == "mamba-2" else {}
    layer = holdall.describe(name).configure(width=16, state=4, **options)
    sizes: dict[str, Any] = {"vocab": 264, "width": 16, "layers": (layer,) * 2, "norm": "rms"}
    with seeded(0):
        model = LanguageModel(ModelConfig(**sizes).build(), Bytes())
    adapter.export(model, tmp_path / "own")
    kind = "MambaForCausalLM" if name == "mamba" else "Mamba2ForCausalLM"
    theirs = getattr(library, kind).from_pretrained(tmp_path / "own")  # fla registers classes of its own
    tokens_BT = torch.tensor([PROMPT])
    got, want = theirs(tokens_BT, use_cache=False).logits, model.model(tokens_BT)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert theirs.config.eos_token_id == model.tokenizer.end
    assert torch.equal(holdall.load(tmp_path / "own").model(tokens_BT)[0], want)

    adapter.export(model, tmp_path / "ours", layout="holdall")
    assert (tmp_path / "ours" / "config.json").read_text().count('"model_type": "holdall"') == 1
    with seeded(0):
        other = LanguageModel(
            ModelConfig(
                **sizes | {"layers": (layer, holdall.describe("taylor").configure(width=16))}
            ).build(),
            Bytes(),
        )
    with pytest.raises(ForeignError, match=r"layer 1 .taylor|a layer of taylor"):
        adapter.export(other, tmp_path / "refused", layout="transformers")
    assert not (tmp_path / "refused").exists()
