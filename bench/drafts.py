"""Speculative decoding: based-mini with a drafter, beside itself without one, on a CPU.

    python -m bench.drafts

All write the same texts. Time is that of the processor, of one thread, so that other processes count little;
a text is written once by each in turn, REPEATS times. *itself* guesses with based-mini, and is always right:
what a call for many tokens saves at most when guesses are not cheaper. *smaller* is trained here first.

*taken back*: guesses that were wrong, by the model with replay, instead of reading again from a copy of its
states. *engine*: rows of that model, each with a seed of its own, guessed for on the device; it is compared
with itself without guesses, and a call is a step.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import holdall
from bench import show
from holdall.engine import Engine, EngineConfig, slow
from holdall.engine.drafts import Drafted, Drafter, NGrams, SmallerModel, generate_with_drafts
from holdall.engine.request import Request, Sampling
from holdall.engine.session import Session, read
from holdall.language_model import LanguageModel
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig
from holdall.training.language_models import PretrainConfig, pretrain

TOKENS, REPEATS = 200, 3
PLAIN = "It was a fine morning in May, and Elizabeth was walking in the garden when "
SENTENCE = "Mr. Darcy danced twice with Miss Bingley, and once with Mrs. Hurst; Jane was silent.\n"
TEXTS = {"plain": PLAIN, "repetitive": SENTENCE * 8}
TEMPERATURES = (0.0, 0.5, 1.0)
MOST = (2, 4, 8, 16)
REPLAY = 17
"""Tokens that the model with replay takes back: of the engine, twice as many guesses and one."""
ROWS = (1, 8)

Make = Callable[[Sampling], Drafter]


def smaller(folder: Path) -> LanguageModel:
    """A model of 79,680 parameters, trained on the text of based-mini in 20 seconds of one core."""
    layers = (
        BaseConvConfig(width=64, filter="short", kernel=3, expand=2),
        SlidingWindowConfig(width=64, window=17, heads=2),
    )
    model = ModelConfig(vocab=264, width=64, layers=layers, mlp=128, norm="rms")
    config = PretrainConfig(
        model=model, context_len=128, batch=8, micro_batch=8, steps=1000, warmup=20, learning_rate=5e-3,
        evaluate_every=1000, evaluate_rows=8,
    )  # fmt: skip
    pretrain(config, folder)
    return holdall.load(folder)


def run() -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield from _run(holdall.load(), smaller(Path(folder) / "smaller"))
    finally:
        torch.set_num_threads(threads)


def _run(large: LanguageModel, small: LanguageModel) -> Iterator[dict[str, Any]]:
    drafters: dict[str, Make] = {
        "n-grams, 2 to 4": lambda _: NGrams(4, 2),
        "n-grams, 4 to 8": lambda _: NGrams(8, 4),
        "smaller": lambda asked: SmallerModel(small.model, asked, tokenizer=small.tokenizer),
        "itself": lambda asked: SmallerModel(large.model, asked, tokenizer=large.tokenizer),
    }
    able = large.with_replay(REPLAY)
    for (text, given), temperature in itertools.product(TEXTS.items(), TEMPERATURES):
        prompt = (large.tokenizer.end, *large.tokenizer.encode_batch([given])[0].tolist())
        asked = Sampling(seed=0, temperature=temperature, max_tokens=TOKENS, ignore_end=True)
        writers = {("none", 0): _plain(large, read(large.model, prompt), asked)}
        for name, make in drafters.items():
            for most in MOST if name.startswith("n-grams") else (4,):
                writers[name, most] = _drafting(large, prompt, asked, make, most)
        for most in MOST:
            drafting = _drafting(able, prompt, asked, drafters["n-grams, 2 to 4"], most)
            writers["n-grams, 2 to 4, taken back", most] = drafting
        for rows, most in itertools.product(ROWS, (0, 2, 4, 8)):
            writers[f"engine of {rows}", most] = _engine(able, prompt, asked, rows, most)
        seconds: dict[tuple[str, int], list[float]] = {way: [] for way in writers}
        counts, written = {way: Drafted() for way in writers}, list[list[int]]()
        for _ in range(REPEATS):
            for way, write in writers.items():
                start = time.process_time()
                ids = write(counts[way])
                seconds[way].append(time.process_time() - start)
                written.append(ids)
        same = sum(ids == written[0] for ids in written) / len(written)
        for (name, most), count in counts.items():
            rows = int(name.split()[-1]) if name.startswith("engine") else 1
            took = statistics.median(seconds[name, most])
            before = statistics.median(seconds[(name, 0) if (name, 0) in seconds else ("none", 0)])
            yield {
                "text": text,
                "temperature": temperature,
                "drafter": name,
                "most": most,
                "tokens_per_second": round(rows * TOKENS / took),
                "times_none": round(before / took, 2),
                "accepted_of_proposed": round(count.accepted / count.proposed, 3) if count.proposed else None,
                "tokens_per_call": round(count.tokens / count.calls / rows, 2) if count.calls else 1.0,
                "same_texts": same,
            }


Write = Callable[[Drafted], list[int]]
"""Writes the text, and counts what drafts were worth."""


def _plain(model: LanguageModel, session: Session, asked: Sampling) -> Write:
    def write(count: Drafted) -> list[int]:
        pieces = slow.generate(
            model.model, model.tokenizer, Request(prompt=(), session=session, sampling=asked)
        )
        return [token.id for piece in pieces for token in piece.tokens]

    return write


def _drafting(model: LanguageModel, prompt: tuple[int, ...], asked: Sampling, make: Make, most: int) -> Write:
    session = read(model.model, prompt)

    def write(count: Drafted) -> list[int]:
        found = generate_with_drafts(
            model.model, session, asked, make(asked), tokenizer=model.tokenizer, prompt=prompt, most=most,
            drafted=count,
        )  # fmt: skip
        return [token.id for token in found]

    return write


def _engine(model: LanguageModel, prompt: tuple[int, ...], asked: Sampling, rows: int, most: int) -> Write:
    """The text of the first row; row i is drawn with the seed + i."""
    engine = Engine(model.model, model.tokenizer, EngineConfig(rows=rows, drafts=most))
    request = Request(prompt=(), session=read(model.model, prompt), sampling=asked, n=rows)

    def write(count: Drafted) -> list[int]:
        before = engine.stats()
        ids = [token.id for piece in engine.run([request]) if not piece.index for token in piece.tokens]
        after = engine.stats()
        count.tokens += after.tokens - before.tokens
        count.calls += after.steps - before.steps
        count.proposed += after.drafted - before.drafted
        count.accepted += after.accepted - before.accepted
        return ids

    return write


def table(results: list[dict[str, Any]]) -> Table:
    columns = {
        "text": "text",
        "temperature": "temperature",
        "drafter": "drafter",
        "guesses": "most",
        "tokens/s": "tokens_per_second",
        "times none": "times_none",
        "accepted": "accepted_of_proposed",
        "tokens/call": "tokens_per_call",
    }
    drawn = Table(title=f"based-mini, {TOKENS} tokens, one thread, median of {REPEATS}")
    for title in columns:
        drawn.add_column(title, justify="left" if title in ("text", "drafter") else "right")
    for result in results:
        accepted = result["accepted_of_proposed"]
        shown = {**result, "accepted_of_proposed": "" if accepted is None else f"{accepted:.0%}"}
        drawn.add_row(*(str(shown[key]) for key in columns.values()))
    return drawn


def main() -> None:
    show("drafts", list(run()), table)


if __name__ == "__main__":
    main()
