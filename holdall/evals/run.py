"""The runner: a model's answers to tasks, asked through lm-eval, into a results folder that resumes.

Each answer is written as soon as the model hands it in; what is written is not asked again. Scores are
lm-eval's own: it builds the requests, and computes the metrics from the answers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdall.evals import documents, needles, suites
from holdall.evals.folder import OTHER, Answers, EvalConfig, Result, ResultsFolder, prompt_hash
from holdall.evals.harness import TASKS, codec_of
from holdall.evals.scoring import first_gold
from holdall.evals.statistics import bootstrap
from holdall.evals.suites import Task, Unit
from holdall.evals.windows import ANSWER_TOKENS, Codec, Remembered
from holdall.files import RunError
from holdall.language_model import LanguageModel

STATE_TOKENS = (512, 1024, 2048)
"""Tokens after which a model's state is measured, beside the window's and twice that."""
FEWSHOT_SEED = 1234
"""By which lm-eval chooses examples with answers: its own default."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate."""

    name: str
    """Its name in tables, and of its files in the results folder."""
    source: str
    """Where it is from: a folder, a file or an address. A results folder knows a model by this."""
    kind: str
    """What kind of source that is, such as "holdall"."""
    tokenizer: str
    """The name of its tokenizer."""
    codec: Codec
    """Its tokenizer, by which documents are cut."""
    make: Callable[[int], Any] = field(repr=False)
    """Makes the lm-eval model that answers, for batches of so many rows. It needs lm-eval."""
    parameters: int | None = None
    """Trained weights; None if unknown."""
    state_bytes: Callable[[int], int | None] = field(default=lambda tokens: None, repr=False)
    """Bytes of the state of one row after so many tokens; None if unknown."""
    positions: int | None = None
    """The most tokens that it can read; None where there is no limit."""
    precision: str = ""
    """What it computes in, such as "float32"; empty if unknown."""
    fingerprint: str = ""
    """What identifies its weights, so that scores of others are never mixed in; empty if unknown."""
    note: str = ""
    """What a user should know of how it is run, as a sentence."""

    def about(self, window: int) -> dict[str, Any]:
        """What models/NAME.json says."""
        measured = sorted({*STATE_TOKENS, window, 2 * window})
        return {
            "name": self.name,
            "source": self.source,
            "kind": self.kind,
            "parameters": self.parameters,
            "state_bytes": {str(tokens): self.state_bytes(tokens) for tokens in measured},
            "tokenizer": self.tokenizer,
            "precision": self.precision,
            "fingerprint": self.fingerprint,
        }


def subject(model: LanguageModel, name: str, *, source: str = "", kind: str = "holdall") -> Subject:
    """A language model of Holdall's as one to evaluate."""

    def make(batch: int) -> Any:
        from holdall.adapters.lm_eval import HoldallLM

        return HoldallLM(model, batch_size=batch)

    def state_bytes(tokens: int) -> int | None:
        positions = model.config.positions
        return None if positions and tokens > positions else model.model.state_bytes(tokens)

    return Subject(
        name=name,
        source=source or name,
        kind=kind,
        tokenizer=model.tokenizer.name,
        codec=codec_of(model.tokenizer),
        make=make,
        parameters=model.model.parameter_count(),
        state_bytes=functools.cache(state_bytes),
        positions=model.config.positions or None,
        precision=str(model.model.block_dtype).removeprefix("torch."),
        fingerprint=model.fingerprint,
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to ask: tasks of the suites, and tasks of lm-eval by name."""

    config: EvalConfig
    tasks: tuple[Task, ...] = ()
    """Tasks of the suites."""
    others: tuple[str, ...] = ()
    """Names of tasks, groups or tags of lm-eval."""
    data: Path | None = None
    """The folder of the suites' files."""
    include: Path | None = None
    """A folder of further tasks, as YAML files of lm-eval."""

    def __post_init__(self) -> None:
        if both := sorted({task.name for task in self.tasks} & set(self.others)):
            raise ValueError(
                f"{both[0]} is a task of a suite and of lm-eval, and their documents differ: ask the two in "
                "folders of their own"
            )

    def missing(self) -> list[Task]:
        """The tasks whose files are not there."""
        return [
            task
            for task in self.tasks
            if task.file is not None and (self.data is None or documents.find(self.data, task) is None)
        ]

    def check_window(self, codec: Codec) -> None:
        """Raise ValueError if the window has no room for the questions of tasks that draw their documents; it
        names the least window for all of them.
        """
        config, count = self.config, min(self.config.limit or needles.DOCUMENTS, needles.DOCUMENTS)
        least = {
            task.name: needles.least_window(task.name, codec, seed=config.seed, count=count)
            for task in self.tasks
            if task.file is None
        }
        if small := [name for name, tokens in least.items() if tokens > config.window]:
            raise ValueError(
                f"a window of {config.window} tokens has no room for the question of {', '.join(small)}; "
                f"give --window {max(least.values())} or more"
            )

    def names(self) -> list[str]:
        """The names of all tasks."""
        return [*(task.name for task in self.tasks), *self.others]


class Manager:
    """lm-eval's tasks for one model: the suites', made by its tokenizer, and lm-eval's own."""

    def __init__(self, plan: Plan, asked: Subject) -> None:
        self.plan, self.asked, self.codec = plan, asked, Remembered(asked.codec)

    def load(self, name: str) -> Any:
        """What lm-eval knows a task, group or tag by, with its documents.

        Raises ValueError if it has none of that name, or prompts of the suites are too long for the model.
        """
        own_suite = name in {task.name for task in self.plan.tasks}
        manager = self._suites if own_suite else self._others
        if name not in manager.all_tasks:
            raise ValueError(f"lm-eval has no task '{name}': `lm_eval ls tasks` lists them")
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            # as lm-eval's command does: a task that allows no examples keeps to that
            if own != 0:
                wanted = self.plan.config.fewshot
                task.set_config(key="num_fewshot", value=(own or 0) if wanted is None else wanted)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            if own_suite:
                self._check_room(task)
        return loaded

    def _check_room(self, task: Any) -> None:
        """A prompt that is cut at its beginning would lose what is asked for, without a word."""
        positions = self.asked.positions
        if positions is None:
            return
        longest, wanted = 0, 0
        for doc in task.eval_docs:
            answer = ANSWER_TOKENS
            if task.OUTPUT_TYPE == "loglikelihood" and "golds" in doc:  # it is read, whatever its length
                answer = max(answer, len(self.codec.encode(first_gold(doc))))
            longest = max(longest, doc.get("tokens", 0))
            wanted = max(wanted, doc.get("tokens", 0) + answer)
        if longest and wanted > positions:
            raise ValueError(
                f"{task.config.task} has prompts of {longest:,} tokens, with an answer {wanted:,}, and "
                f"{self.asked.name} can read {positions:,}: give a smaller --window, or leave the task out"
            )

    @functools.cached_property
    def _suites(self) -> Any:
        from lm_eval.tasks import TaskManager

        config = self.plan.config
        passed = {
            "data": None if self.plan.data is None else str(self.plan.data),
            "window": config.window,
            "limit": config.limit,
            "seed": config.seed,
            "tokenizer": self.codec,
        }
        return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=passed)

    @functools.cached_property
    def _others(self) -> Any:
        from lm_eval.tasks import TaskManager

        include = self.plan.include
        return TaskManager(include_path=None if include is None else str(include))


class Recorded:
    """A model as lm-eval asks it, that is asked only what it has not answered yet.

    Requests whose answers are drawn are asked again: two of them differ by intent.
    """

    def __init__(self, model: Any, answers: Answers, on_answers: Callable[[int, int], object]) -> None:
        self._model, self._answers, self._on_answers = model, answers, on_answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        return self._ask("generate_until", requests)

    def _ask(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        if any(_is_drawn(request.args) for request in requests):
            drawn: list[Any] = getattr(self._model, kind)(requests)
            return drawn
        # those with the same arguments are asked once
        asked = {_key(request.args): request for request in requests}
        known = {key: self._answers.get(kind, request.args) for key, request in asked.items()}
        missing = {key: request for key, request in asked.items() if known[key] is None}
        done = len(asked) - len(missing)
        self._on_answers(done, len(asked))

        def hand_in(kind: str, args: Sequence[Any], answer: Any) -> None:
            nonlocal done
            before = len(self._answers)
            self._answers.add_partial(kind, args, answer)
            done += len(self._answers) - before
            self._on_answers(min(done, len(asked)), len(asked))

        if missing:
            self._model.set_cache_hook(_Hook(hand_in))
            given = getattr(self._model, kind)(list(missing.values()), disable_tqdm=True)
            for (key, request), answer in zip(missing.items(), given, strict=True):
                hand_in(kind, request.args, answer)
                known[key] = answer
        self._on_answers(len(asked), len(asked))
        return [known[_key(request.args)] for request in requests]


@dataclass(frozen=True)
class _Hook:
    """What lm-eval's models hand their answers to, one by one."""

    add_partial: Callable[[str, Sequence[Any], Any], None]


def _key(arguments: Sequence[Any]) -> str:
    return repr(arguments)


def _is_drawn(arguments: Sequence[Any]) -> bool:
    return any(isinstance(one, Mapping) and bool(one.get("do_sample")) for one in arguments)


# --------------------------------------------------------------------------------------------------- run


def evaluate(
    asked: Subject,
    plan: Plan,
    folder: ResultsFolder,
    *,
    batch: int = 64,
    on_task: Callable[[str], object] = lambda name: None,
    on_answers: Callable[[int, int], object] = lambda done, total: None,
    on_result: Callable[[Result], object] = lambda line: None,
) -> list[Result]:
    """A model's scores on all tasks of a plan; what the folder has already is not asked again.

    Args:
        asked: the model.
        plan: what to ask; the folder must have been claimed for it.
        batch: rows that are read at once. Scores do not depend on it.
        on_task: called with a task's name before it is asked.
        on_answers: called with the answers that are there and the requests of the task, as they come.
        on_result: called with each score that was not in the folder, once it is.

    Returns:
        The lines of results.jsonl, in the plan's order.

    Raises:
        RunError: a file is missing or damaged, or the folder holds scores of other weights.
        ValueError: a prompt does not fit into the model or the window, or lm-eval has no such task.
    """
    plan.check_window(asked.codec)
    with folder.model(asked.about(plan.config.window)) as name:
        manager = Manager(plan, asked)
        model = functools.cache(lambda: asked.make(batch))
        lines: list[Result] = []
        for task in plan.names():
            answers = folder.answers(name, task)
            done = [line for line in folder.results() if line.model == name and line.asked == task]
            if done and bool(done[0].suite) != (task not in plan.others):
                whose = f"the suite {done[0].suite}" if done[0].suite else "lm-eval"
                raise RunError(f"{folder.path} holds {task} of {whose}, with other documents. {OTHER}")
            if not done or answers.path.exists():
                on_task(task)
                done = _one(task, name, manager, model(), folder, answers, on_answers)
                for line in done:
                    on_result(line)
            lines += done
        return lines


def _one(
    asked: str,
    name: str,
    manager: Manager,
    model: Any,
    folder: ResultsFolder,
    answers: Answers,
    on_answers: Callable[[int, int], object],
) -> list[Result]:
    """Ask a model one task, or all tasks of a group, and write its scores."""
    from lm_eval import evaluator

    began = time.monotonic()
    config = manager.plan.config
    with _without_bars():
        given: Any = evaluator.evaluate(
            lm=Recorded(model, answers, on_answers),
            task_dict=manager.load(asked),
            limit=config.limit,
            bootstrap_iters=0,
        )
    lines = []
    for task, scores in given["results"].items():
        known = next((one for one in manager.plan.tasks if one.name == task), None)
        main, others = _metrics(scores, known)
        if main is None:
            continue  # a group without a score of its own
        metric, _, filtered = main.partition(",")
        samples = [one for one in given["samples"].get(task, ()) if one["filter"] == filtered]
        written = [_sample(one, metric, manager.codec) for one in samples]
        right = [one["right"] for one in written]
        is_mean = _is_mean(right, scores[main])
        low, high = _interval(written, config.seed) if is_mean else (None, None)
        lower = given["higher_is_better"].get(task, {}).get(metric) is False
        unit = known.unit if known else _unit(right, lower=lower, is_mean=is_mean)
        line = Result(
            model=name,
            task=task,
            asked=asked,
            suite=suites.suite_of(task) if known else "",
            of=known.of if known else task,
            reads=known.reads if known else None,
            metric=metric if filtered == "none" else main,
            unit=unit,
            lower_is_better=lower,
            value=scores[main],
            low=low,
            high=high,
            others=others,
            count=len(written),
            truncated=sum(one["truncated"] for one in written),
            version=str(given["versions"].get(task, "")),
            prompt_hash=prompt_hash((one["prompt"], one["target"]) for one in written),
            window=config.window if known and known.windowed else None,
            seconds=round(time.monotonic() - began, 2),
        )
        folder.finish(line, written)
        lines.append(line)
    answers.remove()
    return lines


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval draws a bar while it builds requests, which takes no time and would cross the command's own."""
    from lm_eval.api import task

    bar = task.tqdm
    task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        task.tqdm = bar


def _metrics(scores: Mapping[str, Any], task: Task | None) -> tuple[str | None, dict[str, float]]:
    """The name of the metric that stands in tables, as "metric,filter", and the others' scores."""
    values = {
        name: float(value)
        for name, value in scores.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    }
    wanted = next((name for name in values if task and name.partition(",")[0] == task.metric), None)
    main = wanted or next(iter(values), None)
    others = {name: value for name, value in values.items() if name != main and math.isfinite(value)}
    return main, {name.removesuffix(",none"): value for name, value in others.items()}


def _is_mean(right: Sequence[Any], value: float) -> bool:
    """Whether a score is the mean over questions of what each scored."""
    numbers = [one for one in right if isinstance(one, int | float)]
    return len(numbers) == len(right) > 0 and math.isclose(math.fsum(numbers) / len(numbers), value)


def _interval(samples: Sequence[Mapping[str, Any]], seed: int) -> tuple[float | None, float | None]:
    """The bootstrap interval of a mean over questions; none if all are about one text, which says nothing of
    others."""
    texts = [one["text_key"] or place for place, one in enumerate(samples)]
    if len(set(texts)) == 1:
        return None, None
    return bootstrap([one["right"] for one in samples], texts, seed=seed)


def _unit(right: Sequence[Any], *, lower: bool, is_mean: bool) -> Unit:
    """What a metric of lm-eval's own counts, which lm-eval does not say: a share if it is the mean of scores
    from 0 to 1, of which more is better."""
    return "share" if is_mean and not lower and all(0 <= one <= 1 for one in right) else ""


def _sample(given: Mapping[str, Any], metric: str, codec: Codec) -> dict[str, Any]:
    """The line of samples/NAME/TASK.jsonl for a document, from what lm-eval logs of it."""
    doc, requests, answers = given["doc"], given["arguments"], given["filtered_resps"]
    prompt, right = str(requests[0][0]), given[metric]
    about: dict[str, Any] = {
        "doc": doc.get("id", given["doc_id"]),
        "prompt": prompt,
        "target": given["target"],
    }
    if isinstance(answers[0], str):
        about["output"] = answers[0]
    elif all(isinstance(answer, tuple | list) for answer in answers):
        # contexts that differ before one continuation, as WinoGrande has them, are the choices
        contexts = [str(context) for context, _ in requests]
        one_context = len(set(contexts)) == 1
        about["choices"] = [
            str(after) if one_context else context + str(after) for context, after in requests
        ]
        about["logprobs"] = [float(answer[0]) for answer in answers]
        # the place of the right choice, also where lm-eval's target is the text that all contexts share
        gold = doc.get("gold", 0 if len(requests) == 1 else None)
        about["gold"] = gold if isinstance(gold, int) else given["target"]
        if not one_context:
            about["prompt"] = prompt = ""
    else:
        about["logprobs"] = [float(answer) for answer in answers]
    return {
        **about,
        "right": right if isinstance(right, int | float) else list(right),
        "window": doc.get("window"),
        "truncated": bool(doc.get("truncated", False)),
        "tokens": doc.get("tokens") or len(codec.encode(prompt)),
        "text_key": doc.get("text_key"),
    }
