"""Two models on the same real text: a page of passages that opens offline, and the slices' table on top.

Each token is coloured by which model has it right; pointing at one shows what both models expected and where
its bigram was before.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdall import files
from holdall.analysis.recall import SLICES, Curve, Scores, carried, check_same, curve, gap, slice_of, table
from holdall.report import recall_curves, recall_gaps, recall_state, shell
from holdall.report.recall_gaps import NAMES

OUTCOMES = ("both right", "only A right", "only B right", "both wrong")
AROUND = 7
"""Tokens to show before and after an earlier occurrence that lies outside the passage."""


def write(
    scored: Sequence[Scores],
    out: Path,
    *,
    threshold: int,
    drawn: Sequence[str] = (),
    dark: bool = False,
    command: str = "",
) -> list[Path]:
    """Write slices.json (all values of the table), recall.png (curves) and, of several runs, gaps.png (what
    their gaps are made of) and state.png (their state sizes) into `out`.

    The first run is the reference. `drawn` names the runs whose curves are drawn, if not those of all. Raises
    RunError unless all scored the same text.
    """
    states = {run.label: carried(run) for run in scored}
    lines: list[dict[str, Any]] = [
        {
            "label": run.label,
            **{name: run.about.get(name) for name in ("parameters", "checkpoint", "step", "precision")},
            "state": state._asdict() if (state := states[run.label]) else None,
            "slices": table(run, threshold),
            "curves": {by: _numbers(curve(run, by, threshold)) for by in recall_curves.AXES},
            "gap": None if run is scored[0] else _finite(gap(run, scored[0], threshold)._asdict()),
        }
        for run in scored
    ]
    shared = ("corpus", "context_len", "windows", "of_windows", "train_tokens")
    content = {
        "command": command,
        "threshold": threshold,
        "reference": scored[0].label,
        **{name: scored[0].about[name] for name in shared},
        "first": scored[0].first,
        "runs": lines,
    }
    with files.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "slices.json", content)
    written = [out / "slices.json"]
    looks: dict[str, Any] = {"threshold": threshold, "dark": dark}
    figures = {"recall": recall_curves.draw([run for run in scored if run.label in drawn] or scored, **looks)}
    if len(scored) > 1:
        figures["gaps"] = recall_gaps.draw(scored, **looks)
    hits = {line["label"]: line["slices"]["hits"]["perplexity"] for line in lines}
    known = {
        label: (state, hits[label])
        for label, state in states.items()
        if state and state.elements and math.isfinite(hits[label] or math.inf)
    }
    if len(known) > 1:  # of whom both are known, and have a place on axes without a zero
        figures["state"] = recall_state.draw(known, scored[0].about["context_len"], dark=dark)
    for name, figure in figures.items():
        picture = io.BytesIO()
        recall_curves.save_figure(figure, picture, command)
        files.write_atomically(out / f"{name}.png", picture.getvalue())
        written.append(out / f"{name}.png")
    return written


def _numbers(found: Curve) -> dict[str, list[float]]:
    """A curve as slices.json has it: bins by their lowest value."""
    perplexity = np.exp(found.nll)
    columns = {"from": found.low, "tokens": found.tokens, "perplexity": perplexity}
    return {name: [round(x, 4) for x in column.tolist()] for name, column in columns.items()}


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """For JSON, which has no other numbers."""
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def write_page(a: Scores, b: Scores, corpus: Any, out: Path, **options: Any) -> Path:
    """Write recall.html into `out`; arguments and errors as those of `render`."""
    with files.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    files.write_atomically(out / "recall.html", render(a, b, corpus, **options).encode())
    return out / "recall.html"


def render(
    a: Scores,
    b: Scores,
    corpus: Any,
    *,
    threshold: int,
    passages: int = 40,
    length: int = 512,
    licence: str = "",
    command: str = "",
) -> str:
    """The page as text: about 130 bytes a token of `passages` times `length`, and 300 KB of curves.

    Args:
        a, b: scores of the same windows; a is the reference. Raises RunError if they are not.
        corpus: the corpus that both were scored on, for its documents' names and its tokenizer.
        passages: how many, evenly from all windows. length: tokens of each, the last of its window.
        licence: of the text, in words; a document's own licence in the corpus comes first.
    """
    check_same(a, b)
    places = np.unique(np.linspace(0, len(a.start_W) - 1, min(passages, len(a.start_W))).round().astype(int))
    pieces = _Pieces(corpus.tokenizer)
    shown = [_passage(a, b, int(w), length, threshold, corpus, pieces, licence) for w in places]
    names = [_plain(run.label) for run in (a, b)]
    return shell.render(
        "recall.html",
        data={"names": names, "top": _most(a, b), "pieces": pieces.texts, "passages": shown},
        summary=_summary(a, b, threshold),
        rows=_rows(a, b, threshold),
        threshold=f"{threshold:,}",
        train_tokens=f"{a.about['train_tokens']:,}",
        context_len=f"{a.about['context_len']:,}",
        prefix=f"{a.first:,}" if a.first > 1 else "",
        curves={name: _curves(a, b, threshold, dark=name == "dark") for name in ("light", "dark")},
        command=command,
    )


# ------------------------------------------------------------------------------------------------ passages


class _Pieces:
    """The tokens that a page shows: each gets a number, and its text is in the page once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.index, self.texts = tokenizer, dict[int, int](), list[str]()

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The numbers of these tokens, in the same shape."""
        fresh = [i for i in dict.fromkeys(ids.flatten().tolist()) if i not in self.index]
        self.index.update((i, len(self.texts) + k) for k, i in enumerate(fresh))
        for i in fresh:  # a model's vocabulary may be padded
            self.texts.append(legible(*self.tokenizer.pieces([i])) if i < self.tokenizer.vocab else f"<{i}>")
        return np.vectorize(self.index.__getitem__, otypes=[np.int32])(ids)

    def text(self, ids: np.ndarray) -> str:
        return legible(self.tokenizer.decode(ids.tolist()))


def legible(text: str) -> str:
    """A text with all that cannot be seen made visible: line ends, tabs, control and format characters."""
    marks = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t"}
    return "".join(
        marks.get(letter)
        or (letter if unicodedata.category(letter)[0] != "C" else letter.encode("unicode_escape").decode())
        for letter in text
    )


def _most(a: Scores, b: Scores) -> int:
    """How many of a model's best tokens are shown: as many as were kept of both."""
    return min(run.predictions.top.shape[-1] for run in (a, b))


def _passage(
    a: Scores, b: Scores, w: int, length: int, threshold: int, corpus: Any, pieces: _Pieces, licence: str
) -> dict[str, Any]:
    """The last `length` tokens of window w: where a model has read the most."""
    window_X = a.tokens_WX[w]
    first = max(a.first, len(window_X) - length)  # those before are read, not predicted
    within = np.s_[w, first - a.first :]
    distance = a.distance_WN[within]
    slices = slice_of(distance, a.count_WN[within], threshold)
    fields = [pieces.of(window_X[first:]), slices, distance, np.minimum(a.count_WN[within], 2**31 - 1)]
    for run in (a, b):
        fields += [_milli(run.predictions.log_prob[within]), run.predictions.rank[within]]
        tops, logs = (
            x[within][:, : _most(a, b)] for x in (run.predictions.top, run.predictions.top_log_prob)
        )
        fields += [*pieces.of(tops).T, *_milli(logs).T]
    earlier = {}
    for place in np.flatnonzero(distance > np.arange(len(distance)) - 1).tolist():
        if distance[place]:
            then = first + place - int(distance[place])
            cut = (max(0, then - 1 - AROUND), then - 1, then + 1, then + 1 + AROUND)
            earlier[place] = [pieces.text(window_X[s:e]) for s, e in itertools.pairwise(cut)]
    return {
        "documents": _documents(corpus, int(a.start_W[w]) + first, len(distance), licence),
        "first": first,
        "earlier": earlier,
        "data": base64.b64encode(np.concatenate([np.asarray(f, "<i4") for f in fields]).tobytes()).decode(),
    }


def _milli(log_prob: np.ndarray) -> np.ndarray:
    """Thousandths of nats below zero; what is no finite number is as far below as anything can be."""
    nats = np.nan_to_num(-log_prob.astype(np.float64), nan=1e6, posinf=1e6)
    return np.minimum(np.maximum(nats, 0) * 1000, 1e9).round().astype(np.int32)


def _documents(corpus: Any, position: int, length: int, licence: str) -> list[list[Any]]:
    """Where in a passage a document begins, or continues at 0, and what it is called."""
    starts, found = np.asarray(corpus.valid.documents), []
    index = int(corpus.valid.document_of(position))
    while index < len(starts) and starts[index] < position + length:
        about = corpus.valid.about(index)
        licensed = about.get("licence") or about.get("license") or licence
        title = about.get("title") or about.get("id") or f"document {index + 1}"
        continued = bool(starts[index] < position)
        found.append([max(0, int(starts[index]) - position), _plain(title), continued, _plain(licensed)])
        index += 1
    return found


def _plain(text: Any) -> str:
    return legible(str(text)).replace("\n", "")


# --------------------------------------------------------------------------------------------------- tables


def _summary(a: Scores, b: Scores, threshold: int) -> dict[str, Any]:
    """What the page says first: both perplexities, and what the gap between them is made of."""
    lines, found = [table(run, threshold) for run in (a, b)], gap(b, a, threshold)
    summary: dict[str, Any] = {
        "perplexity": [perplexity_text(line["all"]["perplexity"]) for line in lines],
        "tokens": f"{a.distance_WN.size:,}",
        "hits": f"{lines[0]['hits']['share']:.1%}",
        "ahead": "",
        "share": "",
    }
    if found.gap < 0:
        on_hits = f"{'behind' if found.hits > 0 else 'ahead'} by {abs(found.hits):.3f}"
        return summary | {"ahead": f"B is ahead by {-found.gap:.3f} nats a token; on the hits {on_hits}."}
    if share_text(found.share) == "–":
        return summary
    interval = f"{share_text(found.low)} to {share_text(found.high)}"
    return summary | {"share": share_text(found.share), "interval": interval}


def share_text(share: float | None) -> str:
    """A share of a gap; a dash where there is none, or hardly one, to share."""
    return "–" if share is None or not abs(share) <= 10 else f"{share:.0%}".replace("-", "−")


def interval_text(share: float | None, low: float | None, high: float | None) -> str:
    """A share of a gap with its interval; a dash alone where there is none."""
    whole, *ends = map(share_text, (share, low, high))
    return whole if whole == "–" else f"{whole} ({ends[0]} to {ends[1]})"


def outcomes(a: Scores, b: Scores) -> np.ndarray:
    """Who is right about each token, as an index into OUTCOMES."""
    return np.where(a.right & b.right, 0, np.where(a.right, 1, np.where(b.right, 2, 3)))


def _rows(a: Scores, b: Scores, threshold: int) -> list[dict[str, Any]]:
    """The table of slices."""
    lines_a, lines_b = table(a, threshold), table(b, threshold)
    slice_WN, who_WN = slice_of(a.distance_WN, a.count_WN, threshold), outcomes(a, b)
    behind_WN = b.nll - a.nll
    rows = []
    for name in ("all", *SLICES):
        mask = slice_WN >= 0 if name == "all" else slice_WN == SLICES.index(name)
        whole = behind_WN.sum()
        share = share_text(behind_WN[mask].sum() / whole if whole > 0 else None)
        counts = np.bincount(who_WN[mask], minlength=4)
        cells = [
            f"{lines_a[name]['tokens']:,}",
            f"{lines_a[name]['share']:.1%}",
            *(perplexity_text(lines[name]["perplexity"]) for lines in (lines_a, lines_b)),
            share,
            *(f"{count / max(1, counts.sum()):.1%}" for count in counts),
        ]
        rows.append({"title": NAMES.get(name, "all tokens"), "cells": cells})
    return rows


def perplexity_text(value: float | None) -> str:
    """A perplexity; a dash for that of no tokens."""
    return "–" if value is None else f"{value:,.2f}"


def _curves(a: Scores, b: Scores, threshold: int, *, dark: bool) -> str:
    """The picture of the curves as the URL of an image within the page."""
    picture = io.BytesIO()
    recall_curves.save([a, b], threshold, picture, dark=dark)
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
