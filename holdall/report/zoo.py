"""The zoo's page: what every registered mixer is, and how it did, as Markdown.

Made from the registry, the folder of `holdall frontier zoo` and, beside it, soundness.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdall import files, mixers
from holdall.analysis import soundness
from holdall.contract import Entry
from holdall.report import table
from holdall.report.data import Model, load_each
from holdall.report.style import bytes_text

INTRO = """# The zoo

Every registered sequence mixer: what it is, what it carries, and how it does on the same small task.
`holdall zoo NAME` prints its equations with their letters, its options and its state; `holdall matrix NAME`
draws what it does.

Made by `make zoo`, which trains ({command}), measures errors and writes this page.

**Task.** Multi-query associative recall, the `quick` recipe: {test}; two layers of width {width}, a short
convolution and then the mixer; the better of {rates} learning rates, {seeds}, at most {steps} steps. So
little training says how fast a mixer learns to recall as much as how much it can hold: a low number is no
verdict on a mixer.
**State** is what one sequence carries after {context} tokens, both layers, counted. **Efficiency**: bits of
answers that the recall proves, per bit of state. **Parameters** of the whole model. **Seconds** of training
on one CPU core.
**Error**: the largest difference from fp64 over all outputs of one layer, relative to the largest output,
in fp32 after 100,000 tokens and in bf16 after 16,384 (where the cost is quadratic, 16,384 for both).
"""


def markdown(folder: Path, *, package: str = "") -> str:
    """The page, from a folder that `holdall frontier zoo` left.

    `package` is what leads from the page to the folder that has `holdall/`, as "../": mixers are then linked
    to their files. Raises RunError, naming what is missing and the way out.
    """
    (sweep,) = load_each([folder])
    models = {str(model.runs[0].line.get("mixer")): model for model in sweep.models}
    drifts = {(each.mixer, each.dtype): each for each in soundness.read(folder / "soundness.jsonl")}
    lines = [model.runs[0].line for model in sweep.models]
    rates, seeds = (
        {run.learning_rate for model in sweep.models for run in model.runs},
        {run.seed for model in sweep.models for run in model.runs},
    )
    parts = [f"{s.difficulty} {sweep.difficulty} in {s.length} tokens" for s in sweep.segments]
    page = [
        INTRO.format(
            command=f"`{sweep.command}`",
            test=", ".join(parts),
            width=sweep.models[0].width,
            rates=len(rates),
            seeds="one seed" if len(seeds) == 1 else f"the mean of {len(seeds)} seeds",
            steps=max(line.get("steps", 0) for line in lines),
            context=sweep.context_len,
        )
    ]
    for family, members in mixers.families().items():
        entries = [mixers.entry(name) for name in members]
        page += [
            f"## {family[0].upper()}{family[1:]}\n",
            _what(entries, package),
            _how(entries, models, drifts),
        ]
    missing = [name for name in mixers.names() if name not in models]
    if missing:
        page.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(page)


def write(folder: Path, target: Path) -> Path:
    """Write the page; raises as `markdown`."""
    beside = (target.resolve().parents[1] / "holdall" / "mixers").is_dir()  # as in docs/ of the repository
    text = markdown(folder, package="../" if beside else "")
    files.make_folder(target.parent)
    files.write_atomically(target, text.encode())
    return target


def _cited(authors: str) -> str:
    """One name, two, or the first of several and the others unnamed."""
    names = authors.split(", ")
    return " and ".join(names) if len(names) <= 2 else f"{names[0]} et al."


def _what(entries: Sequence[Entry], package: str) -> str:
    rows = []
    for entry in entries:
        paper = f"{_cited(entry.paper.authors)}, {entry.paper.year}"
        if entry.paper.arxiv:
            paper = f"[{paper}](https://arxiv.org/abs/{entry.paper.arxiv})"
        causal = "" if entry.causal else " (not causal)"
        summary = entry.summary
        if package and entry.file.startswith("holdall/"):
            summary = f"[{summary}]({package}{entry.file})"
        rows.append((f"`{entry.name}`{causal}", summary, paper, entry.state, entry.training, entry.inference))
    heads = ("mixer", "what it is", "paper", "state elements after N tokens", "N tokens at once", "one more")
    return table.markdown(heads, rows, text=range(len(heads))) + "\n"


def _how(entries: Sequence[Entry], models: Mapping[str, Model], drifts: Mapping[tuple[str, str], Any]) -> str:
    rows = []
    for entry in sorted(
        entries, key=lambda entry: -models[entry.name].accuracy if entry.name in models else 1
    ):
        model = models.get(entry.name)
        cells = ["-"] * 5
        if model is not None and model.best:
            best = max(model.best, key=lambda run: run.accuracy)
            line = best.line
            cells = [
                f"{model.accuracy:.1%}",
                bytes_text(model.state_bytes),
                *(
                    "-" if line.get(key) is None else text.format(line[key])
                    for key, text in (
                        ("recall_efficiency", "{:.2%}"),
                        ("parameters", "{:,}"),
                        ("seconds", "{:.0f}"),
                    )
                ),
            ]
        elif model is not None:
            cells[:2] = ["diverged", bytes_text(model.state_bytes)]
        errors = [_error(drifts.get((entry.name, dtype))) for dtype in ("float32", "bfloat16")]
        rows.append((f"`{entry.name}`", *cells, *errors))
    heads = ("mixer", "recall", "state", "efficiency", "parameters", "seconds", "error fp32", "error bf16")
    return table.markdown(heads, rows) + "\n"


def _error(drift: soundness.Drift | None) -> str:
    return "-" if drift is None else f"{drift.error:.0e}"
