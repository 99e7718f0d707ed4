"""Beam search: the likeliest texts after a session, several at a time.

    for beam in search(model, session, tokenizer=tokenizer, beams=4, max_tokens=50):
        print(beam.logprob, tokenizer.decode(beam.tokens))

States are values: the rows of a step are chosen from those of the last one, with repeats, and that is all.

Letters: B beams, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from holdall import settings
from holdall.contract import select_rows
from holdall.engine.request import NOT_FINITE
from holdall.engine.session import Session
from holdall.model import Model
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveInt
from holdall.text.tokenizers import Tokenizer


class Beam(NamedTuple):
    """A text. `ended`: at the end of the document, which is its last token, and not at the limit."""

    tokens: tuple[int, ...]
    logprob: float
    ended: bool


@torch.no_grad()
def search(
    model: Model,
    session: Session,
    *,
    tokenizer: Tokenizer,
    beams: int = 4,
    max_tokens: int = 256,
    length_penalty: float = 1.0,
) -> list[Beam]:
    """At most `beams` texts, the best first, by log-probability over length to the power of the penalty.

    Each step keeps the `beams` likeliest texts that have not ended; those that end are kept aside, where they
    are among the `beams` best of their step. With as many beams as there are texts the search is exhaustive;
    else it may miss the likeliest.

    Args:
        session: what was read before; stays as it was.
        length_penalty: 0 ranks by log-probability alone, which favours short texts; 1 by its mean.

    Raises ValueError for numbers out of range, or if the logits are NaN or infinite.
    """
    settings.check("beams", beams, PositiveInt)
    settings.check("max_tokens", max_tokens, NonNegativeInt)
    settings.check("length_penalty", length_penalty, NonNegativeFloat)
    vocab, ended = tokenizer.vocab, list[Beam]()
    states, texts = session.states, [()] if max_tokens else list[tuple[int, ...]]()
    logits_BV, logprob_B = session.logits_V[None], torch.zeros(1, dtype=torch.float64, device=model.device)

    def rank(beam: Beam) -> float:
        return beam.logprob / len(beam.tokens) ** length_penalty

    while texts:
        after_BV = logprob_B[:, None] + logits_BV[:, :vocab].double().log_softmax(-1)
        if not after_BV.amax().isfinite():
            raise ValueError(NOT_FINITE)
        # each text has one way to end: so many candidates hold as many that go on as there can be
        best_N, at_N = after_BV.flatten().topk(min(2 * beams, after_BV.numel()))
        rows, kept, scores = list[int](), list[tuple[int, ...]](), list[float]()
        for place, (score, at) in enumerate(zip(best_N.tolist(), at_N.tolist(), strict=True)):
            row, token = divmod(at, vocab)
            text = (*texts[row], token)
            if token == tokenizer.end:
                if place < beams:
                    ended.append(Beam(text, score, True))
            elif len(kept) < beams:
                rows.append(row)
                kept.append(text)
                scores.append(score)
        ended = sorted(ended, key=rank, reverse=True)[:beams]
        texts = kept
        if not texts or len(texts[0]) == max_tokens:
            ended += [Beam(text, score, False) for text, score in zip(texts, scores, strict=True)]
            break
        states = [select_rows(state, rows) for state in states]
        logprob_B = torch.tensor(scores, dtype=torch.float64, device=model.device)
        token_B1 = torch.tensor([[text[-1]] for text in texts], device=model.device)
        h_B1D, after = model.hidden(token_B1, states, inplace=True)
        assert after is not None
        states, logits_BV = after, model.logits(h_B1D[:, 0]).float()
    return sorted(ended, key=rank, reverse=True)[:beams]
