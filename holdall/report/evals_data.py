"""The folder that `holdall eval` writes, read: who scored what, how surely, and what each model answered.

    score     one line of results.jsonl: one model on one task
    task      what the page has a column for: "fda" and "fda_twice" are two readings of one task
    samples   a file per model and task, a line per question; read first for scores, then for what is shown

A folder may be incomplete, while a run is under way or after it was stopped. What is not there is absent
here, too, and never a zero.

Letters: N questions, T tasks, R resamples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from holdall import files
from holdall.evals.statistics import resampled_means
from holdall.files import RunError

TWICE = re.compile(r"[-_]twice$")
WAY_OUT = "Give the `holdall eval` command again: it resumes."


def is_evaluation(folder: Path) -> bool:
    """Whether `holdall eval` wrote this folder."""
    return (folder / "config.json").exists() and any(
        (folder / name).is_dir() for name in ("models", "samples", "answers")
    )


class Task(NamedTuple):
    """A column of the table."""

    name: str
    """Without what says that it is read twice."""
    metric: str
    suite: str
    """The suite that it was asked in, read once."""
    unit: str = "share"
    """As results.jsonl has it: "share", which is written in per cent, "nats", or "" for another number."""
    lower_is_better: bool = False

    @property
    def is_share(self) -> bool:
        """Whether its values are shares, to be written in per cent."""
        return self.unit == "share"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one task."""

    value: float
    low: float
    """The ends of the 95% interval; NaN if none was computed."""
    high: float
    count: int
    truncated: int | None
    line: Mapping[str, Any]
    """All of the line of results.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, with its scores by task and number of readings (0 where the task knows no such thing)."""

    name: str
    key: str
    """What its files are called."""
    about: Mapping[str, Any]
    """All of models/NAME.json; empty while it is not written."""
    scores: Mapping[tuple[Task, int], Score]
    samples: Mapping[tuple[Task, int], Samples]
    begun: Mapping[str, int] = field(default_factory=dict)
    """Answers of tasks that are not finished, by the name of the task's file."""

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Bytes of state by tokens read, where they were counted; from few tokens to many."""
        known = self.about.get("state_bytes")
        counted = known.items() if isinstance(known, Mapping) else ()
        return dict(sorted((int(t), count) for t, count in counted if isinstance(count, int)))

    def state_bytes(self, tokens: int) -> int | None:
        """Bytes of state after so many tokens; None where they were not counted."""
        return self.sizes.get(tokens)

    @property
    def grows(self) -> bool:
        """Whether its state grows with what it reads, beyond every window here."""
        sizes = list(self.sizes.values())
        return len(sizes) > 1 and sizes[-1] > sizes[-2]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A model's answers to the documents of a task: their scores in memory, the rest in the file."""

    path: Path
    right: Mapping[str, float]
    """The score by document, in the order of the file; without those whose metric is no number of theirs, as
    perplexity is not."""
    places: Mapping[str, tuple[int, int]]
    """The number of each document's line, and the byte at which it begins."""
    texts: Mapping[str, str]
    """The key of the text that each question is about, where the file has one."""

    def read(self, documents: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The lines of those documents that are there."""
        with files.open_file(self.path, WAY_OUT) as file:
            for document in documents:
                if document in self.places:
                    number, start = self.places[document]
                    file.seek(start)
                    yield document, _parsed(file.readline(), number, self.path)


class Interval(NamedTuple):
    """A mean, and its 95% bootstrap interval over texts; NaN where a task's questions are all about one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that the folder holds."""

    folder: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    models: tuple[Model, ...]
    """The best first, in the mean over the first of `suites`; then those that have none yet."""
    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def window(self) -> int:
        """Tokens of a prompt that is read once; 0 if the folder does not say."""
        return int(self.config.get("window") or 0)

    def readings(self, task: Task) -> tuple[int, ...]:
        """Which readings of a task any model has: (1, 2), or (0,) where a task knows no such thing."""
        return self._readings[task]

    @cached_property
    def _readings(self) -> dict[Task, tuple[int, ...]]:
        places = {place for model in self.models for place in (*model.scores, *model.samples)}
        return {task: tuple(sorted(n for other, n in places if other == task)) for task in self.tasks}

    @cached_property
    def suites(self) -> tuple[str, ...]:
        """The suites that recall is a mean of: those whose tasks are read once or twice. The one that says
        most comes first: where no model writes a right answer, that of how likely answers are."""
        found = dict.fromkeys(task.suite for task in self.tasks if set(self.readings(task)) & {1, 2})

        def says_nothing(suite: str) -> bool:
            return not any(self.mean(model, reads, suite) for model in self.models for reads in (1, 2))

        return tuple(sorted(found, key=says_nothing))

    def recall_tasks(self, suite: str) -> tuple[Task, ...]:
        """The tasks of a suite that are read once or twice."""
        return tuple(t for t in self.tasks if t.suite == suite and set(self.readings(t)) & {1, 2})

    def compared(self, suite: str) -> tuple[Task, ...]:
        """The tasks of a suite that the models' means are taken over, the same for all.

        All of them as soon as one model has them all in all readings, else what all models have so far.
        """
        return self._compared.get(suite, ())

    @cached_property
    def _compared(self) -> dict[str, tuple[Task, ...]]:
        suites = {task.suite for task in self.tasks}
        return {
            suite: self._shared({t: self.readings(t) for t in self.recall_tasks(suite)}) for suite in suites
        }

    def _shared(self, asked: Mapping[Task, Sequence[int]]) -> tuple[Task, ...]:
        def has(model: Model, task: Task) -> bool:
            return all((task, n) in model.scores for n in asked[task])

        if any(all(has(model, task) for task in asked) for model in self.models):
            return tuple(asked)
        begun = [m for m in self.models if any((t, n) in m.scores for t in asked for n in asked[t])]
        return tuple(task for task in asked if begun and all(has(model, task) for model in begun))

    def mean(self, model: Model, reads: int, suite: str) -> float | None:
        """The mean over `compared` of what the model scored; None unless it has them all."""
        scores = [model.scores.get((task, reads)) for task in self.compared(suite)]
        if not scores or any(score is None for score in scores):
            return None
        return math.fsum(score.value for score in scores if score) / len(scores)

    def interval(self, model: Model, reads: int, suite: str) -> Interval | None:
        """That mean with its interval; None where either is not known."""
        mean = self.mean(model, reads, suite)
        if mean is None:
            return None
        return self._once(
            (model.key, suite, reads), lambda: _mean_interval(model, self.compared(suite), reads, mean)
        )

    def gain(self, model: Model, suite: str) -> Interval | None:
        """What reading twice gains, as `differences` has it."""
        return self._once((model.key, suite), lambda: differences(model, self.compared(suite)))

    def _once(self, place: tuple[Any, ...], drawn: Callable[[], Interval | None]) -> Interval | None:
        """An interval that is drawn once: thousands of documents, thousands of times, which takes seconds."""
        if place not in self._intervals:
            self._intervals[place] = drawn()
        return self._intervals[place]

    @cached_property
    def _intervals(self) -> dict[tuple[Any, ...], Interval | None]:
        return {}

    def is_share(self, suite: str) -> bool:
        """Whether a suite's means are of shares, to be written in per cent."""
        return all(task.is_share for task in self.compared(suite))

    def lower_is_better(self, suite: str) -> bool:
        """Whether of a suite's means the lower is better."""
        return any(task.lower_is_better for task in self.compared(suite))

    def text(self, task: Task, reads: int) -> str:
        """A task and how often it is read, in words; with its suite where another has a task of its name."""
        shared = any(other.name == task.name and other != task for other in self.tasks)
        name = f"{task.name} ({task.suite})" if shared else task.name
        return name + {1: " once", 2: " twice"}.get(reads, "")

    def missing(self, model: Model) -> list[str]:
        """What of the table the model has no score for."""
        return [
            self.text(task, n)
            for task in self.tasks
            for n in self.readings(task)
            if (task, n) not in model.scores
        ]


# ---------------------------------------------------------------------------------------------- statistics


def differences(model: Model, tasks: Sequence[Task]) -> Interval | None:
    """What reading twice gains, mean over `tasks`: read twice less read once; once less twice of a metric of
    which lower is better. A paired bootstrap over the texts within each task.

    Questions that only one reading has are left out. None unless all tasks have questions in both.
    """
    gains: list[tuple[np.ndarray, Sequence[str]]] = []
    for task in tasks:
        once, twice = (model.samples.get((task, n)) for n in (1, 2))
        if not once or not twice or not (both := [d for d in once.right if d in twice.right]):
            return None
        sign = -1 if task.lower_is_better else 1
        gain_N = sign * np.array([twice.right[d] - once.right[d] for d in both])
        gains.append((gain_N, [once.texts.get(d, d) for d in both]))
    return _interval(math.fsum(gain_N.mean() for gain_N, _ in gains) / len(gains), gains) if gains else None


def _mean_interval(model: Model, tasks: Sequence[Task], reads: int, value: float) -> Interval | None:
    """The interval of a model's mean over `tasks`: a bootstrap over the texts within each task."""
    samples = [model.samples.get((task, reads)) for task in tasks]
    if not samples or not all(one and one.right for one in samples):
        return None
    scores = [
        (np.array(list(one.right.values())), [one.texts.get(d, d) for d in one.right])
        for one in samples
        if one
    ]
    return _interval(value, scores)


def _interval(value: float, scores: Sequence[tuple[np.ndarray, Sequence[str]]]) -> Interval:
    """A mean over tasks with the interval that the texts of each, drawn again, give it.

    scores: of each task the scores, and the text of each.
    """
    if any(len(set(text_N)) == 1 for _, text_N in scores):
        return Interval(value, math.nan, math.nan)
    mean_TR = [resampled_means(score_N, text_N, seed=index) for index, (score_N, text_N) in enumerate(scores)]
    low, high = np.quantile(np.mean(mean_TR, axis=0), [0.025, 0.975])
    return Interval(value, float(low), float(high))


# ------------------------------------------------------------------------------------------------- reading


def load(folder: Path) -> Evaluation:
    """Read the folder that `holdall eval` wrote.

    Raises RunError if it holds no results and no samples yet, or if a file is damaged, which it names.
    """
    if not is_evaluation(folder):
        raise RunError(
            f"{folder} is no folder of `holdall eval`, which has config.json, models/ and samples/"
        )
    config = files.read_json(folder / "config.json", WAY_OUT)
    environment = {}
    if (folder / "environment.json").exists():
        environment = files.read_json(folder / "environment.json", WAY_OUT)
    about = {path.stem: files.read_json(path, WAY_OUT) for path in sorted((folder / "models").glob("*.json"))}
    names = {key: str(model.get("name", key)) for key, model in about.items()}
    scores, asked = _results(folder / "results.jsonl", {name: key for key, name in names.items()})
    found = {file_name(task): place for task, place in asked.items()}
    samples: dict[str, dict[tuple[Task, int], Samples]] = {}
    for path in sorted((folder / "samples").glob("*/*.jsonl")):
        read = _scan(path)
        if read.right:
            place = found.get(path.stem) or _guess(path.stem, config)
            samples.setdefault(path.parent.name, {})[place] = read
    begun: dict[str, dict[str, int]] = {}
    for path in sorted((folder / "answers").glob("*/*.jsonl")):
        begun.setdefault(path.parent.name, {})[path.stem] = len(files.read_lines(path, WAY_OUT))
    if not any(scores.values()) and not samples:
        raise RunError(f"{folder} holds no results yet; wait until the first questions are answered")
    models = [
        Model(
            name=names.get(key, key),
            key=key,
            about=about.get(key, {}),
            scores=scores.get(key, {}),
            samples=samples.get(key, {}),
            begun=begun.get(key, {}),
        )
        for key in sorted({*about, *scores, *samples})
    ]
    places = {place for model in models for place in (*model.scores, *model.samples)}
    tasks = _ordered({task for task, _ in places}, asked, config)
    evaluation = Evaluation(
        folder=folder, config=config, environment=environment, models=tuple(models), tasks=tasks
    )
    return _in_order(evaluation)


def _results(
    path: Path, keys: Mapping[str, str]
) -> tuple[dict[str, dict[tuple[Task, int], Score]], dict[str, tuple[Task, int]]]:
    """The scores of each model, and what each of the folder's own names of tasks stands for.

    keys: what models' files are called, by the name of the model.
    """
    read: list[tuple[str, str, tuple[Task, int], Score]] = []
    for number, line in enumerate(files.read_lines(path, WAY_OUT), 1):
        try:
            key = keys.get(line["model"], str(line["model"]))
            read.append((key, str(line["task"]), _place_of(line), _score_of(line)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            where = f"line {number} of {path}"
            raise files.damaged(where, f"it is no result ({error!r})", "Remove that line.") from None
    # of a metric of lm-eval's own the unit is seen in a model's scores, and a column has one unit: it is a
    # share only if it is one for all models
    others = {task._replace(unit="share") for _, _, (task, _), _ in read if task.unit == ""}
    scores: dict[str, dict[tuple[Task, int], Score]] = {}
    asked: dict[str, tuple[Task, int]] = {}
    for key, name, (task, reads), score in read:
        place = task._replace(unit="") if task in others else task, reads
        scores.setdefault(key, {})[place] = score  # the last one counts
        asked.setdefault(name, place)
    return scores, asked


def _ordered(
    tasks: Iterable[Task], asked: Mapping[str, tuple[Task, int]], config: Mapping[str, Any]
) -> tuple[Task, ...]:
    """Tasks by where the config first names them; those that it does not name come last."""
    order = {str(name): index for index, name in enumerate(config.get("tasks") or ())}
    first: dict[Task, int] = {}
    for name, (task, _) in asked.items():
        first[task] = min(first.get(task, len(order)), order.get(name, len(order)))
    return tuple(sorted(tasks, key=lambda task: (first.get(task, len(order)), task)))


def _in_order(evaluation: Evaluation) -> Evaluation:
    """The same with the best model first, read twice where it was, and with notes on what is missing."""
    first = evaluation.suites[0] if evaluation.suites else ""
    compared = evaluation.compared(first)
    last = max((n for task in compared for n in evaluation.readings(task)), default=1)

    def rank(model: Model) -> tuple[bool, float, str]:
        mean = evaluation.mean(model, last, first)
        return mean is None, (1 if evaluation.lower_is_better(first) else -1) * (mean or 0.0), model.name

    planned = {str(name) for name in evaluation.config.get("tasks") or ()}
    begun = {str(score.line["task"]) for model in evaluation.models for score in model.scores.values()}
    begun |= {samples.path.stem for model in evaluation.models for samples in model.samples.values()}
    cells = sum(len(evaluation.readings(task)) for task in evaluation.tasks) * len(evaluation.models)
    there = sum(len(model.scores) for model in evaluation.models)
    notes = []
    if there < cells:
        lacking = [
            f"{model.name} ({', '.join(missing)})"
            for model in evaluation.models
            if (missing := evaluation.missing(model))
        ]
        notes.append(
            f"{there} of {cells} scores are there: the evaluation is still running or was stopped. "
            f"Missing: {'; '.join(lacking)}. {WAY_OUT}"
        )
    if planned - begun:
        notes.append(f"Not begun yet: {', '.join(sorted(planned - begun))}. {WAY_OUT}")
    return Evaluation(
        folder=evaluation.folder,
        config=evaluation.config,
        environment=evaluation.environment,
        models=tuple(sorted(evaluation.models, key=rank)),
        tasks=evaluation.tasks,
        notes=tuple(notes),
    )


def _place_of(line: Mapping[str, Any]) -> tuple[Task, int]:
    """The task and the number of readings of a result."""
    name = str(line.get("of") or TWICE.sub("", str(line["task"])))
    suite = TWICE.sub("", str(line.get("suite") or ""))
    task = Task(name, str(line["metric"]), suite, str(line["unit"]), bool(line["lower_is_better"]))
    return task, int(line.get("reads") or 0)


def _guess(stem: str, config: Mapping[str, Any]) -> tuple[Task, int]:
    """The same of a file of samples that no result speaks of yet."""
    suites = config.get("suite") or [""]
    suite = TWICE.sub("", str(suites[0] if isinstance(suites, list) else suites))
    return Task(TWICE.sub("", stem), "contains", suite), 2 if TWICE.search(stem) else 1


def file_name(task: str) -> str:
    """What a task's files are called: names of tasks from elsewhere may have any characters."""
    return re.sub(r"[^\w.+-]", lambda match: f"%{ord(match[0]):x}", task)


def _score_of(line: Mapping[str, Any]) -> Score:
    value, low, high = (
        math.nan if line.get(name) is None else float(line[name]) for name in ("value", "low", "high")
    )
    if math.isnan(value):
        raise ValueError("it has no value")
    truncated = line.get("truncated")
    return Score(
        value=value, low=low, high=high, count=int(line["count"]),
        truncated=None if truncated is None else int(truncated), line=line,
    )  # fmt: skip


def _scan(path: Path) -> Samples:
    """The score of each document and where its line is; without a last line that is not finished."""
    right: dict[str, float] = {}
    places: dict[str, tuple[int, int]] = {}
    texts: dict[str, str] = {}
    with files.open_file(path, WAY_OUT) as file:
        end = 0
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if not line.endswith(b"\n"):
                break
            content = _parsed(line, number, path) if line.strip() else {}
            if not isinstance(score := content.get("right"), int | float):
                continue
            document = str(content["doc"])
            if document in right:  # several questions about one document, under its name alone
                document = f"{document} ({number})"
            right[document], places[document] = float(score), (number, start)
            if key := content.get("text_key"):
                texts[document] = str(key)
    return Samples(path=path, right=right, places=places, texts=texts)


def _parsed(line: bytes, number: int, path: Path) -> dict[str, Any]:
    where = f"line {number} of {path}"
    content: dict[str, Any] = files.parse_json(line, where, WAY_OUT, constants=True)
    try:
        content["doc"]
        if isinstance(score := content["right"], int | float) and not math.isfinite(score):
            raise ValueError("its score is not finite")
    except (KeyError, ValueError) as error:
        raise files.damaged(where, f"it is no answer ({error!r})", WAY_OUT) from None
    return content
