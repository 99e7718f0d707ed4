"""A suite of language models compared: results.jsonl, slices and figures, passages, a table for README files.

All models are compared with the suite's reference, at the published threshold of recall hits and at the same
share of this corpus.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdall import files
from holdall.analysis.recall import THRESHOLD, Scores, find, on_the_same_tokens
from holdall.files import RunError
from holdall.report import recall, table
from holdall.sweeps import SuiteConfig
from holdall.sweeps.suite import models, valid_loss
from holdall.text import open_corpus

DRAWN = ("attention", "based", "mamba-2", "griffin", "rwkv", "conv-attention", "hyena")
"""Lines of the figure of curves where a suite has more families than it has colours."""
BESIDE = ("jrt", "based")
"""Families whose passages are shown beside the reference's: the first of them that a suite has."""
PUBLISHED_TOKENS = 10e9
"""Tokens of training text for which the published threshold was chosen."""

Published = Mapping[str, tuple[float, float, float]]
"""Perplexity of all tokens, of recall hits and of the others, by family."""


class NotTrainedError(RunError):
    """The model that all are compared with is not trained and scored yet."""


def write(
    config: SuiteConfig,
    out: Path,
    *,
    published: Published,
    data: Path | None = None,
    licence: str = "",
    command: str = "",
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Write what a suite's folder says of its models so far; returns the table, as Markdown.

    Args:
        published: figures of other work, for the table's last column.
        data: the corpus, and licence: of its text; with both, passages.html shows some of it.
        report: called with a line about each run that has to be left out.

    Raises:
        NotTrainedError: before anything is written.
        RunError: a file is damaged, or the models were not scored on the same text.
    """
    scores: dict[str, Scores] = {}
    folders: dict[str, Path] = {}
    for family in config.families:
        for folder in models(family, out):
            if (found := find(folder)) is not None:
                scores[family], folders[family] = replace(found, label=family), folder
                break
            report(f"{folder} has no recall.npz that can be read: left out")
    if config.reference not in scores:
        raise NotTrainedError(
            f"{out} has nothing to compare yet: {config.reference}, to which all others are compared, is not "
            "trained and scored"
        )
    scores = dict(zip(scores, on_the_same_tokens(scores.values()), strict=True))
    by_loss = sorted(scores.values(), key=lambda run: (run.label != config.reference, run.nll.mean()))
    reference, rare = by_loss[0], rare_threshold(by_loss[0])
    drawn = config.families if len(config.families) <= len(DRAWN) else DRAWN
    for threshold, folder in ((THRESHOLD, out), (rare, out / f"threshold-{rare}")):
        recall.write(by_loss, folder, threshold=threshold, drawn=drawn, command=command)
    beside = next((scores[family] for family in BESIDE if family in scores), None)
    if licence and data and beside:
        page = recall.render(
            reference, beside, open_corpus(data), threshold=THRESHOLD, passages=8, length=128,
            licence=licence, command=command,
        )  # fmt: skip
        files.write_atomically(out / "passages.html", page.encode())
    lines = [result_of(folder) for folder in sorted((out / "runs").glob("*/*-lr*"))]
    text = "".join(json.dumps(line) + "\n" for line in lines if line)
    files.write_atomically(out / "results.jsonl", text.encode())
    rates = {family: folder.name.rpartition("-lr")[2] for family, folder in folders.items()}
    return _table(out, rare, rates, published)


def rare_threshold(scores: Scores) -> int:
    """The published threshold as the same share of this training text."""
    return max(1, round(THRESHOLD * scores.about["train_tokens"] / PUBLISHED_TOKENS))


def result_of(folder: Path) -> dict[str, Any] | None:
    """A run's line of results.jsonl; None if the run has not ended."""
    if valid_loss(folder) == math.inf:
        return None
    config, result, environment = (
        files.read_json(folder / f"{name}.json") for name in ("config", "result", "environment")
    )
    return {
        "kind": folder.parent.name,
        "family": folder.name.rpartition("-lr")[0],
        **{key: config[key] for key in ("learning_rate", "steps", "batch", "context_len", "seed")},
        "data_hash": config["data_hash"],
        **result,
        "environment": environment,
    }


def _table(out: Path, rare: int, rates: Mapping[str, str], published: Published) -> str:
    """The table of what `recall.write` left at both thresholds."""
    usual, at_rare = (
        files.read_json(folder / "slices.json")["runs"] for folder in (out, out / f"threshold-{rare}")
    )
    head = (
        "family", "state", "learning rate", "all", "hits", "other", "hits right", "behind", "on hits",
        "of it hits", f"of it hits, at most {rare} times", "published: all / hits / other",
    )  # fmt: skip
    rows = []
    for run, rare_run in zip(usual, at_rare, strict=True):
        family, slices, gap = run["label"], run["slices"], run["gap"]
        right = slices["hits"]["accuracy"]
        behind = [""] * 4
        if gap is not None:
            behind = [
                *(f"{gap[part]:.3f}".replace("-", "−") for part in ("gap", "hits")),
                recall.interval_text(gap["share"], gap["low"], gap["high"]),
                recall.share_text(rare_run["gap"]["share"]),
            ]
        rows.append(
            (
                f"`{family}`",
                f"{run['state']['elements'] / 1e3:,.0f}k",
                rates[family],
                *(recall.perplexity_text(slices[name]["perplexity"]) for name in ("all", "hits", "other")),
                "–" if right is None else f"{right:.1%}",
                *behind,
                " / ".join(f"{perplexity:.2f}" for perplexity in published.get(family, ())),
            )
        )
    return table.markdown(head, rows)
