"""`holdall matrix --model` and `holdall recall --data`: trained models that name no corpus."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import holdall
from holdall import cli, text
from holdall.analysis import gallery
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


def test_a_model_of_another_program_is_to_be_converted_for_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert run(monkeypatch, "recall", tmp_path, "--data", tmp_path) == 2
    assert "holdall convert" in capsys.readouterr().err
