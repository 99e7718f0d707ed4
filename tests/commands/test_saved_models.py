"""`holdall matrix --model` and `holdall recall --data`: trained models that name no corpus."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import holdall
import holdall.adapters.foreign
from holdall import cli, text
from holdall.analysis import gallery, recall
from holdall.language_model import LanguageModel
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

WIDTH = 16


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["holdall", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    layers = (BaseConvConfig(width=WIDTH), AttentionConfig(width=WIDTH, heads=2, rotary=1.0, bias=False))
    with seeded(0):
        model = ModelConfig(vocab=257, width=WIDTH, layers=layers, mlp=24).build()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    LanguageModel(model.eval(), Bytes()).save(tmp_path / "saved")
    return tmp_path / "saved"


def test_matrices_are_those_of_the_layers_that_read_the_text(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("The dog sees the cat.")
    out = tmp_path / "out"
    given = ("matrix", "--model", saved, "--text", tmp_path / "a.txt", "--length", 12, "--out", out)
    assert run(monkeypatch, *given, "--heads", 2) == 0
    found = gallery.load(out)
    assert [matrix.label for matrix in found.matrices] == ["layer 0, base-conv", "layer 1, attention"]
    assert found.tokens[:4] == ("<|endoftext|>", "T", "h", "e")
    # the attention of head 0, from the published equation and what the layer reads
    model = holdall.load(saved).model.double()
    ids = torch.tensor([[256, *b"The dog sees the cat."[:11]]])
    with torch.no_grad():
        r_BTD, _ = model.blocks[0](model.embed(ids), tokens_BT=ids)
        x_BTD = model.blocks[1].norm(r_BTD)
        q, k, _ = model.mixers[1].project(x_BTD, torch.zeros(1, dtype=torch.long))  # type: ignore[operator]
        score_TJ = (q[0, :, 0] @ k[0, :, 0].T) / 8**0.5
        want_TJ = score_TJ.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    np.testing.assert_allclose(found.matrices[1].values_STJ[0], want_TJ.numpy(), atol=1e-5)
    assert run(monkeypatch, *given, "--layer", 2) == 2
    assert "there is no layer 2" in capsys.readouterr().err
    assert run(monkeypatch, "matrix", "--model", saved) == 2
    assert "give --text" in capsys.readouterr().err
    assert run(monkeypatch, "matrix", "--layer", 1) == 2
    assert "give --model" in capsys.readouterr().err


def test_recall_of_a_saved_model_is_on_the_corpus_that_is_named(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("The dog sees the cat. " * 20)
    (tmp_path / "b.txt").write_text("The cat sees another cat. " * 10)
    corpus = text.write_corpus([tmp_path / "a.txt"], tmp_path / "data", Bytes(), valid=[tmp_path / "b.txt"])
    given = ("recall", saved, "--context", 64, "--rows", 2, "--out", tmp_path / "out")
    assert run(monkeypatch, *given) == 2
    assert f"holdall data TEXT --tokenizer {saved}" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, *given, "--data", tmp_path / "data") == 0
    about = json.loads((saved / "recall.json").read_text())
    assert about["windows"] == 2
    assert about["corpus"] == corpus.content_hash
    changed = json.loads((saved / "config.json").read_text())
    changed["tokenizer"]["sha256"] = "of another"
    (saved / "config.json").write_text(json.dumps(changed))
    assert run(monkeypatch, *given, "--data", tmp_path / "data") == 2
    assert "another tokenizer" in capsys.readouterr().err


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    """A folder of a tiny Llama, as the transformers library would write it, whose tokens are a file's."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["</s>"], show_progress=False, initial_alphabet=alphabet
    )
    made.train_from_iterator(["The dog sees the cat. The cat sees another cat."], trainer)
    vocab, folder = made.get_vocab_size(), tmp_path / "llama"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config_json = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config_json))
    layer, width = "model.layers.0", 16
    shapes = {
        "model.embed_tokens": (vocab, width), "model.norm": (width,), f"{layer}.input_layernorm": (width,),
        f"{layer}.post_attention_layernorm": (width,), f"{layer}.mlp.gate_proj": (24, width),
        f"{layer}.mlp.up_proj": (24, width), f"{layer}.mlp.down_proj": (width, 24),
        **{f"{layer}.self_attn.{name}_proj": (width, width) for name in "qkvo"},
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def test_recall_of_a_model_of_another_program(
    foreign_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says is what the converted model says; nothing is written into the folder."""
    (tmp_path / "a.txt").write_text("The dog sees the cat. " * 20)
    (tmp_path / "b.txt").write_text("The cat sees another cat. " * 20)
    own = text.tokenizer(str(foreign_folder))
    text.write_corpus([tmp_path / "a.txt"], tmp_path / "data", own, valid=[tmp_path / "b.txt"])
    there = sorted(foreign_folder.iterdir())
    how = ("--context", 32, "--rows", 2, "--out", tmp_path / "out")
    assert run(monkeypatch, "recall", foreign_folder, *how) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"holdall data TEXT --tokenizer {foreign_folder}" in said
    assert run(monkeypatch, "recall", foreign_folder, "--data", tmp_path / "data", *how) == 0
    assert sorted(foreign_folder.iterdir()) == there
    got = recall.find(tmp_path / "out" / "models" / "llama")
    holdall.adapters.foreign.convert(foreign_folder, tmp_path / "converted")
    assert run(monkeypatch, "recall", tmp_path / "converted", "--data", tmp_path / "data", *how) == 0
    want = recall.find(tmp_path / "converted")
    assert got is not None
    assert want is not None
    np.testing.assert_allclose(got.nll, want.nll, atol=1e-6)
    # predictions of other weights are not taken for these
    tensors = safetensors.torch.load_file(foreign_folder / "model.safetensors")
    tensors["model.norm.weight"] *= -1
    safetensors.torch.save_file(tensors, foreign_folder / "model.safetensors")
    assert run(monkeypatch, "recall", foreign_folder, "--data", tmp_path / "data", *how) == 0
    again = recall.find(tmp_path / "out" / "models" / "llama")
    assert again is not None
    assert abs(again.nll - got.nll).max() > 0.1
    other = text.write_corpus([tmp_path / "a.txt"], tmp_path / "bytes", Bytes(), valid=[tmp_path / "b.txt"])
    assert run(monkeypatch, "recall", foreign_folder, "--data", other.folder, *how) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_a_gguf_file_is_to_be_converted_for_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "recall", tmp_path / "a.gguf", "--data", tmp_path) == 2
    assert "holdall convert" in capsys.readouterr().err
