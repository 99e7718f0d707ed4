"""Holdall's models in lm-eval: states carried, so that a context is read once and a long text in one pass.

    from holdall.adapters.lm_eval import HoldallLM                    # registers "holdall"
    lm_eval.simple_evaluate(model="holdall", model_args="pretrained=runs/mine", tasks=["hellaswag"])
    lm_eval.simple_evaluate(model=HoldallLM(holdall.load()), tasks=["wikitext"])

or `holdall eval runs/mine --tasks hellaswag`. What is scored is what `LanguageModel.score` scores: a text
begins behind the end of a document. Scores are those of lm-eval's HFLM on the exported model; where it scores
whole texts, with add_bos_token=False, or it scores the token that begins each as well.

Letters: B contexts, N continuations, T tokens, C some of them, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from holdall import language_model, mixers
from holdall.adapters.foreign import load_any
from holdall.contract import State, recurrent_dtype
from holdall.engine import EngineConfig, Request, Sampling
from holdall.engine.request import NOT_FINITE
from holdall.language_model import LanguageModel
from holdall.states import join, select
from holdall.text.tokenizers import END

MAX_TOKENS = 256
"""Tokens to generate where a task does not say how many."""
DRAWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What a task may say of how tokens are drawn, by the names of `Sampling`."""
Scored = tuple[float, bool]
"""The log-probability of a continuation, in nats, and whether greedy generation would write it."""


@register_model("holdall")
class HoldallLM(TemplateLM):
    """A language model for lm-eval.

    Args:
        pretrained: the model, or a run folder or name as `holdall.load` takes it.
        batch_size: rows that are read at once, 64 for "auto". Scores do not depend on it.
        device, dtype, checkpoint: as of `holdall.load`; by default a GPU if there is one, bf16 there and fp32
            elsewhere.
        load: a mixer file of your own that the model was trained with.
        max_gen_toks: tokens to generate where a task does not say how many.
        seed: of the draws, where a task samples.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel = language_model.DEFAULT,
        *,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        checkpoint: language_model.Checkpoint | None = None,
        load: str | None = None,
        max_gen_toks: int = MAX_TOKENS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            if load is not None:
                mixers.load(Path(load))
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = dtype or ("fp32" if device == "cpu" else "bf16")
            pretrained = load_any(pretrained, dtype=dtype, device=device, checkpoint=checkpoint)
        self.model = pretrained
        given = str(batch_size)
        self.batch_size = int(given) if given.isdecimal() else 64
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self._ahead: dict[str, np.ndarray] = {}
        # such a mixer sees a prompt as a whole, and what follows token by token
        self._whole = not all(mixers.entry(layer.name).causal for layer in self.model.config.layers)

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        """What a document begins with, before which nothing is read."""
        return self.model.tokenizer.begin

    @property
    def max_length(self) -> int | None:
        """Tokens that the model can read; None where there is no limit."""
        return self.model.config.positions or None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, behind what a document begins with unless that is not wanted."""
        begins = add_special_tokens is not False
        if add_special_tokens is None:
            string = string.removeprefix(END)
        known = self._ahead.get(string)
        ids = (self.model.tokenizer.encode_batch([string])[0] if known is None else known).tolist()
        return [self.prefix_token_id, *ids] if begins else ids

    @contextmanager
    def _encoded_ahead(self, texts: Iterable[str]) -> Iterator[None]:
        """Texts are encoded at once, on all cores; lm-eval asks for them one by one."""
        several = list(dict.fromkeys(text.removeprefix(END) for text in texts))
        self._ahead = dict(zip(several, self.model.tokenizer.encode_batch(several), strict=True))
        try:
            yield
        finally:
            self._ahead = {}

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.model.tokenizer.decode(tokens)

    # -------------------------------------------------------------------------------------------- score

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Scored]:
        """The log-probability of continuations of contexts, in nats, and whether each is the likeliest."""
        pairs = [request.args for request in requests]  # encoded as lm-eval does: space at the end moves over
        texts = [text for context, after in pairs for text in (context.rstrip(), context + after)]
        with self._encoded_ahead(texts):
            scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scored

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[Scored]:
        """What the model says of continuations; a context that several share is read once."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, given, continuation) in enumerate(requests):
            by_context.setdefault(self._that_fits(given, continuation), []).append(number)
        contexts = sorted(by_context, key=lambda context: (-len(context), context))
        scored: list[Scored] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as progress:
            for start in range(0, len(contexts), self.batch_size):
                batch = contexts[start : start + self.batch_size]
                states, h_BD = self._read(batch)
                asked = [(row, number) for row, context in enumerate(batch) for number in by_context[context]]
                for few in self._alike(asked, [len(continuation) for _, _, continuation in requests]):
                    rows = [row for row, _ in few]
                    continuations = [requests[number][2] for _, number in few]
                    own = select(states, rows)
                    answers = self._continue(continuations, own, h_BD[rows])
                    for (_, number), answer in zip(few, answers, strict=True):
                        scored[number] = answer
                        if (asker := requests[number][0]) is not None:
                            self.cache_hook.add_partial("loglikelihood", asker, answer)
                    progress.update(len(few))
        return scored

    def _alike(self, asked: list[tuple[int, int]], lengths: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Continuations to score together, of about one length; of just one where there are learned
        positions, which what fills up shorter ones would run out of."""
        asked = sorted(asked, key=lambda one: -lengths[one[1]])
        groups = [asked]
        if self.max_length is not None:
            groups = [list(group) for _, group in groupby(asked, key=lambda one: lengths[one[1]])]
        for group in groups:
            for first in range(0, len(group), self.batch_size):
                yield group[first : first + self.batch_size]

    def _that_fits(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """A context without its beginning, where a model with learned positions cannot read all."""
        if self.max_length is None:
            return tuple(context)
        room = self.max_length - (len(continuation) - 1)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens, but the model has {self.max_length} positions"
            )
        return tuple(context[-room:])

    def _read(self, contexts: Sequence[tuple[int, ...]]) -> tuple[list[State], Tensor]:
        """The states of all rows after contexts, the longest first, and what the head reads of their last.

        Rows are read together as far as the shortest of them; there it is put aside, and the others go on.
        """
        device = self.model.model.device
        done: list[tuple[list[State], Tensor]] = []
        states: list[State] | None = None
        read, going = 0, len(contexts)
        for length in sorted(set(map(len, contexts))):
            rows = [row for row in range(going) if not self._whole or len(contexts[row]) == length]
            tokens_BT = torch.tensor([contexts[row][read:length] for row in rows], device=device)
            h_BTD, states = self._pieces(tokens_BT, states)
            ended = sum(len(contexts[row]) == length for row in rows)
            kept = len(rows) - ended
            done.append((select(states, slice(kept, None)), h_BTD[kept:, -1]))
            going -= ended
            states, read = (None, 0) if self._whole else (select(states, slice(kept)), length)
        done.reverse()
        return join([states for states, _ in done]), torch.cat([h_BD for _, h_BD in done])

    def _pieces(self, tokens_BT: Tensor, states: list[State] | None) -> tuple[Tensor, list[State]]:
        """The last of what the head reads, and the states; a long text is read in pieces."""
        size = tokens_BT.shape[1] if self._whole else language_model.TOKENS_AT_ONCE
        h_BTD = None
        for piece_BT in tokens_BT.split(size, dim=1):
            h_BTD, states = self.model.model.hidden(piece_BT, states)
        assert h_BTD is not None
        assert states is not None
        return h_BTD, states

    def _continue(
        self, continuations: Sequence[list[int]], states: list[State], h_ND: Tensor
    ) -> Iterator[Scored]:
        """Score continuations of rows in which this was read; shorter ones are filled at the end, which
        nothing before it can see."""
        model, longest = self.model.model, max(map(len, continuations))
        filled = [[*tokens, *[-1] * (longest - len(tokens))] for tokens in continuations]
        next_NT = torch.tensor(filled, device=h_ND.device)
        parts = [h_ND[:, None]]
        if longest > 1:
            after: list[State] | None = states
            read_NT = next_NT[:, :-1].clamp(min=0)
            for piece_NT in read_NT.split(1 if self._whole else longest, dim=1):
                h_NTD, after = model.hidden(piece_NT, after, want_states=self._whole)
                parts.append(h_NTD)
        there_NT = next_NT >= 0
        log_prob_NT = torch.zeros(next_NT.shape, dtype=torch.float64, device=h_ND.device)
        likeliest_NT = torch.full_like(next_NT, -1)
        size = max(1, language_model.LOGITS_AT_ONCE // self.model.config.vocab)
        scored = [
            _score(model.logits(h_CD), next_C)
            for h_CD, next_C in zip(
                torch.cat(parts, dim=1)[there_NT].split(size), next_NT[there_NT].split(size), strict=True
            )
        ]
        log_prob_NT[there_NT] = torch.cat([log_prob_C for log_prob_C, _ in scored])
        likeliest_NT[there_NT] = torch.cat([likeliest_C for _, likeliest_C in scored])
        greedy_N = (likeliest_NT == next_NT).all(1)
        yield from zip(log_prob_NT.sum(1).tolist(), greedy_N.tolist(), strict=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in nats, each in one pass and in constant memory.

        Where a model has learned positions, a text that is longer is scored in windows, as HFLM does.
        """
        totals = []
        for request in tqdm(requests, desc="Scoring texts", disable=disable_tqdm):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            if not ids:
                total = 0.0
            elif self.max_length is None or len(ids) <= self.max_length:
                total = -self.model.score(text).nats
            else:
                windows = get_rolling_token_windows(
                    token_list=ids,
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                asked = [(None, *make_disjoint_window(window)) for window in windows]
                total = sum(score for score, _ in self._loglikelihood_tokens(asked, disable_tqdm=True))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ----------------------------------------------------------------------------------------- generate

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts by the engine, up to the end of the document, a task's stops or its number of tokens."""
        with self._encoded_ahead(request.args[0] for request in requests):
            asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
        if not asked:
            return []
        longest = max(len(one.prompt) + one.sampling.max_tokens for one in asked)
        limit = longest if self.model.model.needs_room else None
        engine = self.model.engine(EngineConfig(rows=self.batch_size, max_context=limit))
        written: dict[int, str] = {}  # by ticket, which count from 1 in a new engine
        with tqdm(total=len(asked), desc="Generating", disable=disable_tqdm) as progress:
            for piece in engine.run(asked):
                if piece.finish == "error":
                    raise ValueError(NOT_FINITE)
                written[piece.ticket] = written.get(piece.ticket, "") + piece.text
                progress.update(bool(piece.finish))
                if piece.finish:  # handed in at once, so that a killed run has it
                    request = requests[piece.ticket - 1]
                    self.cache_hook.add_partial("generate_until", request.args, written[piece.ticket])
        return [written[ticket] for ticket in sorted(written)]

    def _request(self, number: int, context: str, options: dict[str, Any]) -> Request:
        """What a task asks for, as the engine takes it; an unknown option is refused by name."""
        how: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        max_tokens, until = how.pop("max_gen_toks"), how.pop("until")
        if not how.pop("do_sample"):
            how["temperature"] = 0.0
        if how.pop("num_beams", 1) != 1:
            raise ValueError("num_beams of a task must be 1: the engine draws or takes the likeliest token")
        drawn = {name: how.pop(name) for name in DRAWN if how.get(name) is not None}
        if left := {name: value for name, value in how.items() if value is not None}:
            raise ValueError(f"a task asks for {left}, which Holdall's engine does not do")
        prompt = self.tok_encode(context)
        if self.max_length is not None:
            if max_tokens >= self.max_length:
                raise ValueError(
                    f"a task asks for {max_tokens} tokens, and the model has {self.max_length} positions"
                )
            prompt = prompt[-(self.max_length - max_tokens) :]
        sampling = Sampling(
            max_tokens=max_tokens, stop=tuple(filter(None, until)), seed=self.seed + number, **drawn
        )
        return Request(prompt=tuple(prompt), sampling=sampling)


def _score(logits_CV: Tensor, next_C: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of tokens, fp64, and the likeliest tokens. Raises ValueError if any is NaN."""
    log_prob_CV = logits_CV.to(recurrent_dtype(logits_CV.dtype)).log_softmax(-1)
    log_prob_C = log_prob_CV.gather(1, next_C[:, None])[:, 0].double()
    if log_prob_C.isnan().any():
        raise ValueError(NOT_FINITE)
    return log_prob_C, logits_CV.argmax(-1)
