"""A sweep as a Markdown table, to be read as it is or put into a page: a row per model.

What counts of a model are its best learning rate for each seed; of several seeds, the mean and both extremes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from holdall.report.data import BY_HAND, Model, Sweep, families
from holdall.report.style import PUBLISHED, bytes_text, marked, spread_text

LEGEND = """State: bytes that one sequence carries after {context} tokens, all layers, counted. Recall: share
of right answers, at the best learning rate, then by number of {difficulty}{seeds}.
Bits recalled: the least information that the answers of the hardest segment prove (Fano's inequality);
efficiency: these bits per bit of state. Seconds of training; where several learning rates were trained at
once, of all of them.
"""


def save(sweeps: Sequence[Sweep], path: Path) -> None:
    """Write the table to `path`, and below it what its columns mean."""
    path.write_text(render(sweeps), encoding="utf-8")


def render(sweeps: Sequence[Sweep]) -> str:
    """Table and legend. Several sweeps share the columns and follow one another."""
    several = len(sweeps) > 1
    tags = sorted({tag for sweep in sweeps for model in sweep.models for tag in model.by_difficulty})
    difficulty = sweeps[0].difficulty
    heads = ["model", *(["sweep"] if several else []), "width", "state", "recall", *_titles(tags, difficulty)]
    heads += ["bits recalled", "efficiency", "learning rate", "steps", "s"]
    rows = [
        [marked(model), *([sweep.name] if several else []), *_cells(model, tags)]
        for sweep in sweeps
        for family in families([sweep])
        for models in (sweep.models, sweep.by_hand)
        for model in sorted((m for m in models if m.family == family), key=lambda m: m.state_bytes)
    ]
    seeds = any(len(model.best) > 1 for sweep in sweeps for model in sweep.models)
    legend = LEGEND.format(
        context=f"{sweeps[0].context_len:,}",
        difficulty=difficulty,
        seeds=" (mean over seeds, lowest to highest in brackets)" if seeds else "",
    )
    legend += f"Spread: {spread_text(sweeps)}\n"
    models = [model for sweep in sweeps for model in sweep.models]
    for source in dict.fromkeys(model.published for model in models if model.published):
        legend += f"†: {PUBLISHED}: {source}.\n"
    if any(sweep.by_hand for sweep in sweeps):
        legend += "by hand: weights set as a theorem says, not trained (`holdall theory list`).\n"
    if free := dict.fromkeys(model.family for model in models if not model.causal):
        legend += f"Not causal, so that bits recalled need not be in their state: {', '.join(free)}.\n"
    if any(model.broken for model in models):
        legend += "✗: breaks this law of mixers (`holdall laws` says how).\n"
    return markdown(heads, rows, text=range(1 + several)) + "\n\n" + legend


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], text: Container[int] = (0,)) -> str:
    """A Markdown table; the columns in `text` stand to the left, the others, numbers, to the right."""
    rule = ["---" if column in text else "---:" for column in range(len(heads))]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (heads, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _titles(tags: Sequence[int], difficulty: str) -> list[str]:
    return [f"{tag} {difficulty}" if tag == tags[0] else str(tag) for tag in tags]


def _cells(model: Model, tags: Sequence[int]) -> list[str]:
    cells, accuracies = [str(model.width), bytes_text(model.state_bytes)], model.by_difficulty
    if not model.best:
        return [*cells, "diverged", *([""] * (len(tags) + 5))]
    recall = f"{model.accuracy:.1%}"
    if len(model.best) > 1:
        recall += f" ({100 * model.low:.1f} to {100 * model.high:.1f})"
    return [
        *cells,
        recall,
        *(f"{accuracies[tag]:.0%}" if tag in accuracies else "" for tag in tags),
        _mean(model, "recall_bits", "{:,.0f}"),
        _mean(model, "recall_efficiency", "{:.2%}"),
        BY_HAND if model.by_hand else ", ".join(f"{rate:.2g}" for rate in model.learning_rates),
        _mean(model, "steps", "{:,.0f}"),
        _mean(model, "seconds", "{:,.0f}"),
    ]


def _mean(model: Model, key: str, text: str) -> str:
    mean = model.mean(key)
    return "" if mean is None else text.format(mean)
