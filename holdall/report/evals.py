"""What `holdall eval` measured, as a page that opens offline, a picture and a table for README files.

The page has the table of models by tasks, recall against state, and every right and wrong answer with the
prompt that it was given, two models side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdall import files
from holdall.evals.suites import unit_text
from holdall.report import evals_chart, evals_samples, shell, style, table
from holdall.report.evals_data import (
    Evaluation,
    Interval,
    Model,
    Score,
    Task,
    file_name,
    is_evaluation,
    load,
)

__all__ = ["is_evaluation", "render", "write"]

NONE = "–"


def write(folder: Path, out: Path | None = None, *, samples: int = evals_samples.SAMPLES) -> list[Path]:
    """Write index.html, table.md and, where state and recall are known, recall.png; return their paths.

    A reader never sees half a file. Takes seconds, and half a minute per gigabyte of samples.

    Args:
        folder: what `holdall eval` wrote, whether it is complete or not.
        out: the folder for all of them; by default the same.
        samples: questions of each task whose prompts and answers are on the page.

    Raises RunError, naming the file, if there is nothing to show yet or a file is damaged.
    """
    out = folder if out is None else out
    evaluation = load(folder)
    made = {
        "index.html": render(evaluation, samples=samples).encode(),
        "table.md": markdown(evaluation).encode(),
    }
    if charts := _charts(evaluation):
        suite, models = charts[0]
        made["recall.png"] = evals_chart.picture(evaluation, suite, models, _command(evaluation))
    files.make_folder(out)
    for name, data in made.items():
        files.write_atomically(out / name, data)
    return [out / name for name in made]


def render(evaluation: Evaluation, *, samples: int = evals_samples.SAMPLES) -> str:
    """The page as text: nearly 5 MB of Plotly's own program, and what the samples take, compressed."""
    from plotly.offline import get_plotlyjs

    charts = _charts(evaluation)
    tasks = [evals_samples.pack(evaluation, task, samples) for task in evaluation.tasks]
    tasks = [task for task in tasks if task["columns"]]
    return shell.render(
        "evals.html",
        data={
            "models": [_about(evaluation, model) for model in evaluation.models],
            "tasks": tasks,
            "charts": [
                {
                    "suite": suite,
                    "traces": evals_chart.traces(models, share=evaluation.is_share(suite)),
                    "layout": evals_chart.layout(evaluation, suite, models),
                    "text": _picture(evaluation, suite, models),
                }
                for suite, models in charts
            ],
        },
        heading=_heading(evaluation),
        title=_title(evaluation),
        models=len(evaluation.models),
        lede=_lede(evaluation),
        notes=evaluation.notes,
        charts=[suite for suite, _ in charts],
        head=_head(evaluation),
        rows=_rows(evaluation),
        window=evaluation.window,
        units=_units(evaluation),
        gain=_gain_text(evaluation) if (1, 2) in _means(evaluation).values() else "",
        kinds=sorted({task.unit for task in evaluation.tasks}),
        shown=_shown(tasks),
        has_samples=bool(tasks),
        task_rows=_task_rows(evaluation),
        other_rows=_other_rows(evaluation),
        model_rows=_model_rows(evaluation),
        command=_command(evaluation),
        environment=[(key, style.value_text(value)) for key, value in evaluation.environment.items()],
        config=[
            (key.replace("_", " "), style.value_text(value))
            for key, value in evaluation.config.items()
            if key != "command"
        ],
        plotly=get_plotlyjs(),
    )


def _charts(evaluation: Evaluation) -> list[tuple[str, list[evals_chart.Drawn]]]:
    """A picture per suite of which a mean and states are known."""
    found = [(suite, evals_chart.drawn(evaluation, suite)) for suite in evaluation.suites]
    return [(suite, models) for suite, models in found if models]


def _command(evaluation: Evaluation) -> str:
    return str(evaluation.config.get("command") or "")


def _title(evaluation: Evaluation) -> str:
    suites = list(dict.fromkeys(task.suite for task in evaluation.tasks if task.suite))
    return ", ".join(suites) or evaluation.folder.resolve().name


def _heading(evaluation: Evaluation) -> str:
    """What the page is about, in the words of the suite that comes first."""
    if not evaluation.suites:
        return "Scores of language models"
    recall = evaluation.is_share(evaluation.suites[0])
    return f"{'What is recalled' if recall else 'How likely right answers are'}, and from how much state"


def _lede(evaluation: Evaluation) -> dict[str, str] | None:
    """The best model, and what reading twice does to the mean of all."""
    best, suite = evaluation.models[0], next(iter(evaluation.suites), "")
    once, twice = (evaluation.mean(best, reads, suite) for reads in (1, 2))
    share = evaluation.is_share(suite)
    if not once and not twice:
        return None
    gains = [(model.name, gain) for model in evaluation.models if (gain := evaluation.gain(model, suite))]
    most = max((each for each in gains if each[1].low > 0), key=lambda each: each[1].value, default=None)
    return {
        "name": best.name,
        "mean": evals_chart.mean_text(evaluation, suite),
        "is_share": "1" if share else "",
        "once": "" if once is None else f"{_number(once, share)}{'%' if share else ' nats'}",
        "twice": "" if twice is None else f"{_number(twice, share)}{'%' if share else ' nats'}",
        "gainer": most[0] if most else "",
        "gain": f"{_signed(most[1].value, share)} {'points' if share else 'nats'}" if most else "",
        "interval": f"{_signed(most[1].low, share)} to {_signed(most[1].high, share)}" if most else "",
    }


def _picture(evaluation: Evaluation, suite: str, models: Sequence[evals_chart.Drawn]) -> str:
    """What the picture shows."""
    window = evaluation.window
    better = ", lower is better," if evaluation.lower_is_better(suite) else ""
    text = (
        f"{evals_chart.what(evaluation, suite)} ({evals_chart.mean_text(evaluation, suite)}){better} against "
        "the bytes of state that a model carries. "
        "An arrow leads from reading once to reading twice."
    )
    if any(model.grows for model in models):
        text += (
            f" Hollow marks are models whose state grows with what they read: {window:,} tokens once, "
            f"{2 * window:,} twice."
        )
    if any(model.shift != 1 for model in models):
        text += " Models with the same state are drawn side by side."
    return " ".join([text, *evals_chart.not_drawn(evaluation, suite)])


def _shown(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Which questions are on the page, if not all."""
    cut = [task for task in tasks if task["shown"] < task["documents"]]
    if not cut:
        return ""
    most = max(task["documents"] for task in cut)
    if len(cut) > evals_chart.MOST_NAMES:
        what = f"{max(task['shown'] for task in cut):,} of up to {most:,} of each task"
    else:
        what = ", ".join(f"{task['shown']:,} of {task['documents']:,} of {task['name']}" for task in cut)
    return (
        f"On this page are the prompts and answers of the first questions: {what}. "
        "All scores, and differences of two models, are over all questions. "
        f"`holdall report FOLDER --samples {most}` puts all of them here."
    )


def _about(evaluation: Evaluation, model: Model) -> dict[str, Any]:
    look = style.look(evaluation.models.index(model))
    sizes = {
        str(tokens): style.bytes_text(count)
        for reads in (1, 2)
        if (count := model.state_bytes(tokens := evaluation.window * reads)) is not None
    }
    return {"name": model.name, "colour": look.colour, "glyph": look.glyph, "state": sizes}


# ---------------------------------------------------------------------------------------------------- table


def _columns(evaluation: Evaluation) -> list[tuple[Task, int]]:
    return [(task, reads) for task in evaluation.tasks for reads in evaluation.readings(task)]


def _means(evaluation: Evaluation) -> dict[str, tuple[int, ...]]:
    """The readings that there is a mean of, by suite."""
    means = {
        suite: tuple(
            reads
            for reads in (1, 2)
            if any(evaluation.mean(model, reads, suite) is not None for model in evaluation.models)
        )
        for suite in evaluation.suites
    }
    return {suite: readings for suite, readings in means.items() if readings}


def _head(evaluation: Evaluation) -> dict[str, Any]:
    """Both rows of the table's head: what spans columns, and the columns."""
    means = _means(evaluation)
    names = {1: "once", 2: "twice", 0: "score"}
    spans = [
        ("Mean", _under(suite, evaluation.compared(suite)[0]), len(readings) + (readings == (1, 2)))
        for suite, readings in means.items()
    ]
    spans += [
        (task.name, _under(task.suite, task), len(evaluation.readings(task))) for task in evaluation.tasks
    ]
    below = []
    for readings in means.values():
        below += [*(names[reads] for reads in readings), *(["gain"] if readings == (1, 2) else [])]
    return {
        "spans": spans,
        "firsts": [0, *itertools.accumulate(width for *_, width in spans[:-1])],
        "below": [*below, *(names[reads] for _, reads in _columns(evaluation))],
    }


def _under(suite: str, task: Task) -> str:
    """A suite, and the unit of a task's scores."""
    return ", ".join(filter(None, [suite, unit_text(task.unit, task.metric)]))


def _rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    best = {}
    for task, reads in _columns(evaluation):
        values = [m.scores[task, reads].value for m in evaluation.models if (task, reads) in m.scores]
        best[task, reads] = _best(values, lower=task.lower_is_better)
    means = {
        suite: _mean_cells(evaluation, suite, readings) for suite, readings in _means(evaluation).items()
    }
    return [
        {
            "index": index,
            "name": model.name,
            "look": style.look(index),
            "state": _state_text(evaluation, model),
            "state_value": model.state_bytes(evaluation.window) or "",
            "means": {suite: cells[index] for suite, cells in means.items()},
            "scores": {
                place: _score_cell(evaluation, model, place, best=best[place])
                for place in _columns(evaluation)
            },
        }
        for index, model in enumerate(evaluation.models)
    ]


def _mean_cells(evaluation: Evaluation, suite: str, readings: Sequence[int]) -> list[list[dict[str, Any]]]:
    """Of each model its means over a suite and, where there are both readings, the gain."""
    rows = []
    means = {n: [evaluation.mean(model, n, suite) for model in evaluation.models] for n in readings}
    share = evaluation.is_share(suite)
    lower = evaluation.lower_is_better(suite)
    best = {n: _best([mean for mean in means[n] if mean is not None], lower=lower) for n in readings}
    for index, model in enumerate(evaluation.models):
        cells = []
        for reads in readings:
            mean = means[reads][index]
            interval = evaluation.interval(model, reads, suite)
            cells.append(_cell(mean, interval, share=share, best=mean is not None and mean == best[reads]))
        if readings == (1, 2):
            gain = evaluation.gain(model, suite)
            cells.append(_cell(gain and gain.value, gain, share=share, signed=True))
        rows.append(cells)
    return rows


def _best(values: Sequence[float], *, lower: bool = False) -> float | None:
    """The best of a column; None if none is better than another."""
    return (min if lower else max)(values) if len(set(values)) > 1 else None


def _cell(
    value: float | None, interval: Interval | None, *, share: bool, best: bool = False, signed: bool = False
) -> dict[str, Any]:
    """A mean; a dash where it is not known."""
    if value is None:
        return {
            "text": NONE,
            "interval": "",
            "value": "",
            "best": False,
            "title": "not all of its tasks are scored",
        }
    write = _signed if signed else _number
    ends = (
        f"{write(interval.low, share)} to {write(interval.high, share)}"
        if interval and not math.isnan(interval.low)
        else ""
    )
    return {"text": write(value, share), "interval": ends, "value": value, "best": best, "title": ""}


def _score_cell(
    evaluation: Evaluation, model: Model, place: tuple[Task, int], *, best: float | None
) -> dict[str, Any]:
    score = model.scores.get(place)
    if score is None:
        title, text = "not evaluated", NONE
        task, reads = place
        if so_far := model.samples.get(place):
            title, text = f"{len(so_far.right):,} questions so far", "…"
        elif answers := model.begun.get(file_name(task.name + ("_twice" if reads == 2 else ""))):
            title, text = f"{answers:,} answers so far", "…"
        return {"text": text, "interval": "", "value": "", "best": False, "title": title}
    task = place[0]
    line = score.line
    about = [f"{score.count:,} questions"]
    about += [] if score.truncated is None else [f"{score.truncated:,} cut to the window"]
    about += [f"version {line['version']}"] if line.get("version") is not None else []
    about += [f"prompts {line['prompt_hash']}"] if line.get("prompt_hash") else []
    ends = ""
    if not math.isnan(score.low):
        ends = f"{_number(score.low, task.is_share)} to {_number(score.high, task.is_share)}"
    return {
        "text": _number(score.value, task.is_share),
        "interval": ends,
        "value": score.value,
        "best": score.value == best,
        "title": f"{evaluation.text(*place)}: {', '.join(about)}",
    }


def _number(value: float, share: bool) -> str:
    """A value: of a share its per cent."""
    return f"{100 * value:.1f}" if share else f"{value:,.2f}"


def _signed(value: float, share: bool) -> str:
    text = f"{100 * value:+.1f}" if share else f"{value:+,.2f}"
    return text.replace("-", "−") if text.strip("+-0.,") else text[1:]


def _units(evaluation: Evaluation) -> str:
    """What the table's numbers are, as sentences."""
    shares = sorted({task.metric for task in evaluation.tasks if task.is_share})
    nats = list(dict.fromkeys(task.suite for task in evaluation.tasks if task.unit == "nats"))
    texts = [f"Per cent of right answers ({', '.join(shares)})."] if shares else []
    if nats:
        of = f"Of {' and '.join(nats)}: nats" if shares else "Nats"
        texts.append(
            f"{of}, minus the log-likelihood of the first right answer per question; lower is better."
        )
    return " ".join(texts)


def _state_text(evaluation: Evaluation, model: Model) -> str:
    """Bytes of state after the window and, where that is another number, after two."""
    sizes = [model.state_bytes(evaluation.window * reads) for reads in (1, 2)]
    texts = dict.fromkeys(style.bytes_text(size) for size in sizes if size is not None)
    return " / ".join(texts) or NONE


def _task_rows(evaluation: Evaluation) -> list[list[str]]:
    """What each task was: its version, and the hashes of its prompts with the models that were asked so."""
    rows = []
    for task, reads in _columns(evaluation):
        scores = [(m.name, m.scores[task, reads]) for m in evaluation.models if (task, reads) in m.scores]
        rows.append(
            [
                evaluation.text(task, reads),
                task.suite,
                task.metric,
                _distinct(f"{score.count:,}" for _, score in scores),
                _distinct("" if s.truncated is None else f"{s.truncated:,}" for _, s in scores),
                _distinct(str(score.line.get("version", "")) for _, score in scores),
                _by_hash(scores),
            ]
        )
    return rows


def _other_rows(evaluation: Evaluation) -> list[list[str]]:
    """The other metrics of tasks, a row for each and a column for each model."""
    rows = []
    for task, reads in _columns(evaluation):
        others = [
            score.line.get("others") if (score := model.scores.get((task, reads))) else None
            for model in evaluation.models
        ]
        found = [other if isinstance(other, Mapping) else {} for other in others]
        for metric in dict.fromkeys(name for other in found for name in other):
            values = [f"{other[metric]:.4g}" if metric in other else NONE for other in found]
            rows.append([evaluation.text(task, reads), str(metric), *values])
    return rows


def _by_hash(scores: Sequence[tuple[str, Score]]) -> str:
    """The hashes of the prompts; of several, which models were asked with each."""
    names: dict[str, list[str]] = {}
    for name, score in scores:
        names.setdefault(str(score.line.get("prompt_hash") or NONE), []).append(name)
    if len(names) == 1:
        return next(iter(names))[:12]
    return "; ".join(f"{key[:12]} ({', '.join(those)})" for key, those in names.items())


def _distinct(texts: Any) -> str:
    """Different values, the commonest case being one."""
    found = list(dict.fromkeys(texts))
    return " | ".join(found[:4]) + (" | …" if len(found) > 4 else "")


def _model_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for model in evaluation.models:
        about = model.about
        parameters = about.get("parameters")
        rows.append(
            [
                model.name,
                f"{parameters:,}" if isinstance(parameters, int) else "",
                _sizes_text(model.sizes),
                *(style.value_text(about.get(name) or "") for name in ("kind", "tokenizer", "source")),
            ]
        )
    return rows


def _sizes_text(sizes: Mapping[int, int]) -> str:
    """Bytes of state by tokens read; once if it is always the same."""
    texts = [(style.bytes_text(size), tokens) for tokens, size in sizes.items()]
    if len({text for text, _ in texts}) == 1:
        return texts[0][0]
    return ", ".join(f"{text} after {tokens:,}" for text, tokens in texts)


# ------------------------------------------------------------------------------------------------- Markdown


def markdown(evaluation: Evaluation) -> str:
    """The table for a README: a row per model, once and twice in one cell as "74.4 / 86.1"."""
    means = _means(evaluation)
    heads = ["model", "state"]
    for suite, readings in means.items():
        heads += [f"mean of {suite}", *(["gain"] if readings == (1, 2) else [])]
    names = [task.name for task in evaluation.tasks]
    heads += [
        f"{task.name} ({task.suite})"
        if task.suite and (names.count(task.name) > 1 or task.lower_is_better)
        else task.name
        for task in evaluation.tasks
    ]
    rows = []
    for row in _rows(evaluation):
        texts = [row["name"], row["state"]]
        for suite, readings in means.items():
            cells = row["means"][suite]
            texts.append(" / ".join(_bold(cell) for cell in cells[: len(readings)]))
            texts += [
                f"{c['text']} ({c['interval']})" if c["interval"] else c["text"]
                for c in cells[len(readings) :]
            ]
        texts += [
            " / ".join(_bold(row["scores"][task, reads]) for reads in evaluation.readings(task))
            for task in evaluation.tasks
        ]
        rows.append(texts)
    twice = any(evaluation.readings(task) == (1, 2) for task in evaluation.tasks)
    legend = [
        f"{_units(evaluation)} {'Read once / read twice; the' if twice else 'The'} best is bold.".strip()
    ]
    if (window := evaluation.window) > 0:
        legend.append(
            f"State: bytes per sequence after {window:,} tokens and, where it grows, after {2 * window:,}."
        )
    legend += [f"Mean of {suite}: {evals_chart.mean_text(evaluation, suite)}." for suite in means]
    if (1, 2) in means.values():
        legend.append(
            f"{_gain_text(evaluation)}, with the 95% interval of a paired bootstrap over documents, each "
            "with all its questions."
        )
    notes = "".join(f"\n{note}\n" for note in evaluation.notes)
    return table.markdown(heads, rows) + "\n\n" + "\n".join(legend) + "\n" + notes


def _gain_text(evaluation: Evaluation) -> str:
    """What a gain is, so that more is better."""
    kinds = {evaluation.is_share(suite) for suite in _means(evaluation)}
    texts = {
        frozenset({True}): "twice less once",
        frozenset({False}): "once less twice",
        frozenset({True, False}): "twice less once, of nats once less twice",
    }
    return f"Gain: {texts[frozenset(kinds)]}"


def _bold(cell: Mapping[str, Any]) -> str:
    return f"**{cell['text']}**" if cell["best"] else str(cell["text"])
