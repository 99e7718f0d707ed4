"""Sweep folders, read into models: the best learning rate counts, and seeds make a spread.

    run     one line of results.jsonl: one training, of one learning rate and one seed
    model   the runs that share label, width and state; each seed counts with its best learning rate
    sweep   one folder: its models, the test they all took, and what was worth saying while reading

Nothing here draws. State is per sequence over all layers, accuracy lies in [0, 1].
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from holdall import files
from holdall.files import RunError
from holdall.tasks.information import Asked

BY_HAND, NOT_TRAINED = "by hand", 0.0
"""What a line of a model built by hand says it is; and its learning rate."""
PAIRS = "pairs"
"""What every difficulty was called before tasks named their own."""
NOT_CAUSAL = frozenset({"linformer", "prefix-linear-attention"})
"""Mixers whose tokens see later ones; a line that does not say whether its model is causal is judged by them.
"""


@dataclass(frozen=True)
class Axis:
    """What state is counted in on a picture."""

    unit: str
    """Its unit, as a plural."""
    key: str
    """Where a line of results.jsonl says it."""
    times: int
    """Units in one of what is said there."""
    bits: int
    """Bits that a unit holds at most: what the information floor is drawn from."""


AXES = {
    "bytes": Axis("bytes", "state_bytes", 1, 8),
    "bits": Axis("bits", "state_bytes", 8, 1),
    "elements": Axis("elements", "state_elements", 1, 64),  # the widest are counters in int64
}
AGAIN = "Restore it from a copy, or run the sweep again into a new folder."


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One part of the test."""

    vocab: int
    """Tokens of the vocabulary."""
    length: int
    """Tokens of a row."""
    rows: int
    """The number of rows."""
    difficulty: int
    """How many of what the sweep's `difficulty` names."""
    values: int
    """The possible answers to a question."""
    questions: int
    """Questions of a row: answers that a state must be able to give."""
    distinct: bool = True
    """Whether these answers are distinct; else they are independent of each other."""
    sets: tuple[int, int] | None = None
    """In set disjointness, the sizes of the set that is read first and of the other."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training. `accuracy` is NaN where it diverged; `line` is the whole line it was read from."""

    label: str
    family: str
    width: int
    state_bytes: int
    state: int
    """The same in the unit of the picture's axis."""
    accuracy: float
    difficulty: str
    by_difficulty: Mapping[int, float]
    learning_rate: float
    seed: int
    line: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        return math.isnan(self.accuracy)


@dataclass(frozen=True)
class Rate:
    """The runs of a model at one learning rate, a run per seed."""

    learning_rate: float
    runs: tuple[Run, ...]
    counts: bool
    """Whether it is the best rate of any seed."""

    @property
    def converged(self) -> list[float]:
        """The accuracies of the seeds that did not diverge."""
        return [run.accuracy for run in self.runs if not run.diverged]

    @property
    def accuracy(self) -> float:
        """The mean of `converged`; NaN where all diverged."""
        return math.fsum(self.converged) / len(self.converged) if self.converged else math.nan

    @property
    def low(self) -> float:
        return min(self.converged, default=math.nan)

    @property
    def high(self) -> float:
        return max(self.converged, default=math.nan)


@dataclass(frozen=True, eq=False)  # two models are the same only if they are the same object
class Model:
    """The runs of one model. `accuracy` is the mean over seeds, `low` and `high` are its extremes."""

    runs: tuple[Run, ...]

    @cached_property
    def best(self) -> tuple[Run, ...]:
        """The run that counts for each seed: its best learning rate. Empty where all diverged."""
        chosen: dict[int, Run] = {}
        for run in self.runs:
            if not run.diverged and (run.seed not in chosen or run.accuracy > chosen[run.seed].accuracy):
                chosen[run.seed] = run
        return tuple(chosen[seed] for seed in sorted(chosen))

    @property
    def label(self) -> str:
        return self.runs[0].label

    @property
    def family(self) -> str:
        return self.runs[0].family

    @property
    def width(self) -> int:
        return self.runs[0].width

    @property
    def state_bytes(self) -> int:
        return self.runs[0].state_bytes

    @property
    def state(self) -> int:
        """In the unit of the picture's axis."""
        return self.runs[0].state

    @cached_property
    def accuracy(self) -> float:
        return math.fsum(run.accuracy for run in self.best) / len(self.best) if self.best else math.nan

    @property
    def low(self) -> float:
        return min((run.accuracy for run in self.best), default=math.nan)

    @property
    def high(self) -> float:
        return max((run.accuracy for run in self.best), default=math.nan)

    @cached_property
    def by_difficulty(self) -> Mapping[int, float]:
        """Mean over seeds at each difficulty that every seed was tested at."""
        asked = [run.by_difficulty for run in self.best]
        shared = sorted(set(asked[0]).intersection(*asked[1:])) if asked else ()
        return {k: math.fsum(each[k] for each in asked) / len(asked) for k in shared}

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Those that count, each once."""
        return tuple(dict.fromkeys(run.learning_rate for run in self.best))

    @cached_property
    def by_rate(self) -> tuple[Rate, ...]:
        """All that were tried, from low to high."""
        tried = sorted({run.learning_rate for run in self.runs})
        return tuple(
            Rate(
                rate,
                tuple(run for run in self.runs if run.learning_rate == rate),
                rate in self.learning_rates,
            )
            for rate in tried
        )

    @property
    def seeds(self) -> int:
        """Of how many seeds there is a run."""
        return len({run.seed for run in self.runs})

    def mean(self, key: str) -> float | None:
        """Of one number of the lines, over the seeds; None where one of them lacks it, or all diverged."""
        values = [value for run in self.best if isinstance(value := run.line.get(key), int | float)]
        return math.fsum(values) / len(values) if values and len(values) == len(self.best) else None

    @property
    def drawn(self) -> bool:
        """Whether it has a place on the picture: a log axis holds no empty state, and no NaN.

        A state whose elements cannot be counted is empty there; and a mixer that carries another state than
        it reports has none.
        """
        return bool(self.best) and self.state > 0 and "state_size" not in self.broken

    @property
    def broken(self) -> Mapping[str, str]:
        """The laws that its mixer breaks, by name, each with what is broken (holdall/testing/laws.py)."""
        return self._laws("broken")

    @property
    def refused(self) -> Mapping[str, str]:
        """The laws that its mixer says it cannot obey, by name, each with the reason."""
        return self._laws("refused")

    def _laws(self, status: str) -> Mapping[str, str]:
        laws = self.runs[0].line.get("laws")
        found = laws.get(status) if isinstance(laws, Mapping) else None
        return {str(name): str(says) for name, says in found.items()} if isinstance(found, Mapping) else {}

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one, without which the information floor does not hold for it."""
        line = self.runs[0].line
        names = line.get("mixer"), *(line.get("layers") or ())
        guess = "causal" not in self.refused and NOT_CAUSAL.isdisjoint(map(str, names))
        return bool(line.get("causal", guess))

    @property
    def by_hand(self) -> bool:
        """Whether it was built by hand, and not trained."""
        return self.runs[0].line.get("kind") == BY_HAND

    @property
    def published(self) -> str:
        """Where it was trained if it was not here: hardware and commit of runs that come with Holdall."""
        source = self.runs[0].line.get("published")
        if not isinstance(source, Mapping):
            return ""
        commit = source.get("commit")
        return f"{source.get('hardware')}{f', commit {commit}' if commit else ''}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One sweep folder. `name` distinguishes it from the others that were loaded with it."""

    name: str
    folder: Path
    command: str
    more_seeds: bool
    """Whether that command can add seeds to the folder."""
    context_len: int
    axis: Axis
    task: str
    """What is asked, in a sentence or two."""
    difficulty: str
    """What the difficulty of a segment counts, such as pairs."""
    segments: tuple[Segment, ...]
    environment: Mapping[str, Any]
    models: tuple[Model, ...]
    notes: tuple[str, ...]
    by_hand: tuple[Model, ...] = ()
    """Models that were built by hand and not trained (holdall/sweeps/by_hand.py): apart from `models`, so
    that no frontier, spread or learning rate is theirs."""

    @property
    def test(self) -> tuple[int, list[tuple[int, int, int]]]:
        """What must agree before two sweeps may share a picture."""
        return self.context_len, sorted((s.length, s.difficulty, s.vocab) for s in self.segments)

    @property
    def questions(self) -> list[Asked]:
        """What each segment asks for: all that the information floor depends on."""
        return [Asked(s.questions, s.values, s.distinct) for s in self.segments]


def load_each(folders: Sequence[Path], axis: str | None = None) -> tuple[Sweep, ...]:
    """Read sweep folders, whatever tests they took.

    axis: what state is counted in, one of AXES; by default what the first folder says, else bytes.

    Raises RunError for a file that is missing or cannot be used; it names the folder and the way out.
    """
    if not folders:
        raise RunError("no sweep folder was named; make one with: holdall frontier quick --out runs/quick")
    configs = [_config(folder) for folder in folders]
    axis = axis or str(configs[0].get("axis", "bytes"))
    if axis not in AXES:
        raise files.damaged(folders[0] / "config.json", f"its axis is '{axis}'", AGAIN)
    unit = AXES[axis]
    return tuple(
        _sweep(folder, config, name, unit)
        for folder, config, name in zip(folders, configs, _names(folders, configs), strict=True)
    )


def load(folders: Sequence[Path], axis: str | None = None) -> tuple[Sweep, ...]:
    """Read sweep folders that took the same test; raises as `load_each`, and if they did not."""
    sweeps = load_each(folders, axis)
    for other in sweeps[1:]:
        if other.test != sweeps[0].test:
            raise RunError(
                f"{sweeps[0].folder} and {other.folder} took different tests, so their accuracies and states "
                "cannot share a picture; write one report for each"
            )
    return sweeps


def grouped(runs: Iterable[Run]) -> tuple[Model, ...]:
    """The models that these are runs of, in order of appearance."""
    groups: dict[tuple[str, int, int], list[Run]] = {}
    for run in runs:
        # the state belongs to the key: two states under one label are two models, whatever the label says
        groups.setdefault((run.label, run.width, run.state_bytes), []).append(run)
    return tuple(Model(tuple(group)) for group in groups.values())


def pareto(models: Iterable[Model]) -> list[Model]:
    """The frontier, by rising state: each model that beats all others with no larger a state.

    A mixer that breaks a law has no place there.
    """
    frontier: list[Model] = []
    for model in sorted(
        (m for m in models if m.drawn and not m.broken),
        key=lambda m: (m.state, -m.accuracy, m.label, m.width),
    ):
        if not frontier or model.accuracy > frontier[-1].accuracy:
            frontier.append(model)
    return frontier


def families(sweeps: Sequence[Sweep]) -> list[str]:
    """Every family in order of appearance, so that a sweep that still grows keeps its colours."""
    trained = [model.family for sweep in sweeps for model in sweep.models]
    return list(dict.fromkeys([*trained, *(model.family for sweep in sweeps for model in sweep.by_hand)]))


def by_construction(sweep: Sweep, family: str) -> list[list[Model]]:
    """A family's models built by hand, those with a place on the picture: each construction's, by state."""
    series: dict[Any, list[Model]] = {}
    for model in sweep.by_hand:
        if model.drawn and model.family == family:
            series.setdefault(model.runs[0].line.get("construction"), []).append(model)
    return [sorted(models, key=lambda m: (m.state, m.accuracy)) for models in series.values()]


def has_rates(sweeps: Sequence[Sweep]) -> bool:
    """Whether any model on the picture was trained at several learning rates."""
    return any(len(model.by_rate) > 1 for sweep in sweeps for model in sweep.models if model.drawn)


def is_series(models: Iterable[Model]) -> bool:
    """Whether these are one mixer in several sizes, so that a line through them means something."""
    return len({model.runs[0].line.get("mixer") for model in models}) == 1


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise RunError(f"no sweep folder {folder}; make one with: holdall frontier quick --out {folder}")
    if not (path := folder / "config.json").exists():
        raise RunError(
            f"{folder} holds no {path.name}, so it is no sweep folder; name one made by holdall frontier"
        )
    return files.read_json(path, AGAIN)


def _names(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The shortest name that tells the folders apart: recipe, folder name or whole path."""
    recipes = [
        str(config.get("recipe", folder.name)) for folder, config in zip(folders, configs, strict=True)
    ]
    for names in (recipes, [folder.name for folder in folders]):
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _sweep(folder: Path, config: Mapping[str, Any], name: str, axis: Axis) -> Sweep:
    try:
        segments = tuple(
            Segment(
                **{
                    key: _whole(part, key, low=1)
                    for key in ("vocab", "length", "rows", "difficulty", "values", "questions")
                },
                distinct=part.get("distinct", True) is True,
                sets=_sets(part),
            )
            for part in map(_with_defaults, config["test"])
        )
        context_len = _whole(config, "context_len", low=1)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"it lacks a usable test or context_len ({error!r})"
        raise files.damaged(folder / "config.json", reason, AGAIN) from None
    if not segments:
        raise files.damaged(folder / "config.json", "it names no test segment", AGAIN)
    runs, notes = _runs(folder, config, axis)
    models = grouped(runs)
    notes += [f"{m.label} (width {m.width}) diverged at every learning rate." for m in models if not m.best]
    notes += [
        f"{m.seeds - len(m.best)} of {m.seeds} seeds of {m.label} (width {m.width}) diverged at every "
        "learning rate; its accuracy is that of the others."
        for m in models
        if 0 < len(m.best) < m.seeds
    ]
    notes += [
        f"{m.label} (width {m.width}) has no state: a log axis has no place for it."
        for m in models
        if m.best and not m.state_bytes
    ]
    notes += [
        f"{m.label} (width {m.width}) breaks the law '{law}': {says}"
        + ("; so it has no place on the picture." if law == "state_size" else ".")
        for m in models
        for law, says in m.broken.items()
    ]
    notes += [
        f"{m.label} (width {m.width}) does not obey the law '{law}': {says}."
        for m in models
        for law, says in m.refused.items()
    ]
    if free := dict.fromkeys(m.family for m in models if m.drawn and not m.causal):
        notes.append(
            f"The information floor holds for causal models alone; these are not causal: {', '.join(free)}."
        )
    notes += [
        f"{m.label} (width {m.width}) was not trained here: published with Holdall, {m.published}."
        for m in models
        if m.published
    ]
    by_hand = grouped(_by_hand(folder, axis))
    if by_hand:
        many = f"{len(by_hand)} models are" if len(by_hand) > 1 else "1 model is"
        notes += [
            f"{many} built by hand and not trained, for comparison (holdall theory list): thin diamonds. "
            "They have no part in the frontier."
        ]
    has_environment = (folder / "environment.json").exists()
    return Sweep(
        name=name,
        folder=folder,
        command=str(config.get("command", "")),
        more_seeds=_more_seeds(config),
        context_len=context_len,
        axis=axis,
        task=str(config.get("task") or _task(config)),
        difficulty=str(config.get("difficulty") or PAIRS),
        segments=segments,
        environment=files.read_json(folder / "environment.json", AGAIN) if has_environment else {},
        models=models,
        notes=tuple(notes),
        by_hand=by_hand,
    )


def _more_seeds(config: Mapping[str, Any]) -> bool:
    """Whether the command of a sweep can add seeds to it; folders that do not say so can if their recipe is
    one of Holdall's own, all of which have the flag."""
    words = str(config.get("command", "")).split()
    if words[:2] != ["holdall", "frontier"]:
        return False
    return bool(config.get("takes_seeds", not any(word.endswith(".py") for word in words[2:3])))


def _task(config: Mapping[str, Any]) -> str:
    """What the task of a sweep asks, for folders that do not say it; MQAR where they name no task either."""
    from holdall.tasks.data import ABOUT_MQAR, DataConfig  # PyTorch with it

    with contextlib.suppress(Exception):  # of another version, or damaged: what it trains is not needed here
        return DataConfig.from_dict(config["points"][0]["train"]["data"]).about
    return ABOUT_MQAR


def _with_defaults(part: Mapping[str, Any]) -> dict[str, Any]:
    """A test segment with what the first sweeps, which were all of MQAR, did not write down."""
    pairs = {"questions": part["pairs"], "difficulty": part["pairs"]} if "pairs" in part else {}
    return {"values": part["vocab"] // 2, **pairs, **part}


def _sets(part: Mapping[str, Any]) -> tuple[int, int] | None:
    """The sizes of the two sets of a test segment that has some."""
    if not {"first", "second"} <= part.keys():
        return None
    return _whole(part, "first", low=1), _whole(part, "second", low=1)


def _runs(folder: Path, config: Mapping[str, Any], axis: Axis) -> tuple[list[Run], list[str]]:
    path = folder / "results.jsonl"
    if not path.exists():
        raise RunError(
            f"{folder} holds no results.jsonl; the sweep has not started or this is another kind of folder"
        )
    lines = [
        (number, line) for number, line in enumerate(files.read_bytes(path).split(b"\n"), 1) if line.strip()
    ]
    runs: dict[object, Run] = {}
    notes = []
    elements, not_counted = _Elements(config), dict[str, str]()
    way_out = "Delete that line and run the sweep again to fill the gap."
    for number, line in lines:
        where = f"line {number} of {path}"
        try:
            content = files.parse_json(line, where, way_out, constants=True)
        except RunError:
            if number == lines[-1][0]:
                notes.append(f"Skipped {where}: it is torn, as while a sweep is writing it.")
                continue
            raise
        try:
            if axis.key == "state_elements" and axis.key not in content:
                try:
                    content = {**content, axis.key: elements.of(content)}
                except _NotCountedError as error:
                    not_counted[f"{content['label']} (width {content['width']})"] = str(error)
                    content = {**content, axis.key: 0}
            # a training that was run again under its old name replaces what it wrote before; members of a
            # population share the name
            run = run_of(content, axis)
            runs[content.get("run", number), run.learning_rate, run.seed] = run
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise files.damaged(where, f"it is no result ({error!r})", way_out) from None
    if not runs:
        raise RunError(f"{path} holds no results yet; wait for the first model to finish")
    if not any(run.state for run in runs.values()) and not_counted:
        reason = next(iter(not_counted.values()))
        raise RunError(
            f"no line of {path} counts {axis.unit}, and {reason}; its `holdall frontier` command adds them "
            "from the runs in its folder"
        )
    notes += [
        f"{model} has no place on an axis of {axis.unit}: its lines do not count them, and {reason}."
        for model, reason in not_counted.items()
    ]
    return list(runs.values()), notes


def _by_hand(folder: Path, axis: Axis) -> list[Run]:
    """The models of by_hand.jsonl, if there is one."""
    path = folder / "by_hand.jsonl"
    try:
        return [run_of(line, axis) for line in files.read_lines(path)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        way_out = f"Delete it; `holdall theory frontier {folder}` writes it again."
        raise files.damaged(path, f"it holds no results ({error!r})", way_out) from None


class _NotCountedError(Exception):
    """Why the elements of a model's state cannot be counted."""


class _Elements:
    """Elements of states, for lines from before they were counted: models are built as config.json says."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.counted: dict[tuple[str, int], tuple[int, int]] = {}

    @cached_property
    def points(self) -> Mapping[tuple[str, int], Any]:
        points = self.config.get("points") or ()
        return {(point["label"], point["train"]["model"]["width"]): point for point in points}

    def of(self, line: Mapping[str, Any]) -> int:
        """After the longest test row. Raises _NotCountedError with the reason if they cannot be known."""
        from holdall.sweeps.config import Point  # PyTorch with it
        from holdall.sweeps.result import measure

        key = (line["label"], line["width"])
        if key not in self.counted:
            try:
                if key not in self.points:
                    raise _NotCountedError("config.json does not hold the model")
                model = Point.from_dict(self.points[key]).train.model
                state_bytes, elements, _ = measure(model, self.config["context_len"])
            except (KeyError, TypeError, ValueError) as error:  # a mixer or an option that is not there
                raise _NotCountedError(f"the model cannot be built here ({error})") from None
            self.counted[key] = state_bytes, elements
        state_bytes, elements = self.counted[key]
        if state_bytes != line["state_bytes"]:
            says = f"the model carries {state_bytes:,} bytes in this version, not {line['state_bytes']:,}"
            raise _NotCountedError(says)
        return elements


WHOLE, REAL = ("parameters", "steps", "rows"), ("seconds", "recall_bits", "recall_efficiency")
"""What a line may say besides, and pages show."""


def run_of(line: Mapping[str, Any], axis: Axis = AXES["bytes"]) -> Run:
    """A line of results.jsonl; of any other an AttributeError, KeyError, TypeError or ValueError."""
    for key in WHOLE:
        if line.get(key) is not None:
            _whole(line, key)
    for key in REAL:
        if not isinstance(line.get(key, 0.0), float | int | None) or _is_too_large(line.get(key)):
            raise ValueError(f"{key} is {line[key]!r}, not a number")
    # before difficulties had names, all were called pairs
    accuracies = line.get("accuracy_by_difficulty", line.get("accuracy_by_pairs"))
    return Run(
        label=str(line["label"]),
        family=str(line.get("family") or line["mixer"]),
        width=_whole(line, "width", low=1),
        state_bytes=_whole(line, "state_bytes"),
        state=axis.times * _whole(line, axis.key),
        accuracy=_accuracy(line["accuracy"]),
        difficulty=str(line.get("difficulty", PAIRS)),
        by_difficulty={int(tag): _accuracy(value) for tag, value in (accuracies or {}).items()},
        learning_rate=NOT_TRAINED if line.get("kind") == BY_HAND else _rate(line["learning_rate"]),
        seed=_whole(line, "seed"),
        line=line,
    )


def _whole(line: Mapping[str, Any], key: str, *, low: int = 0) -> int:
    value = line[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < low or _is_too_large(value):
        raise ValueError(f"{key} is {value!r}, not a whole number from {low} up")
    return value


def _is_too_large(value: Any) -> bool:
    """A number that nothing here can be, and no axis can show."""
    return isinstance(value, int) and abs(value) >= 1 << 63


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"learning_rate is {value!r}, not a positive number")
    return float(value)


def _accuracy(value: Any) -> float:
    """JSON has no NaN of its own, so a diverged training may say null; infinities count as diverged too."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"an accuracy is {value!r}, which is not from 0 to 1")
    return float(value)
