"""The results folder of `holdall eval`, from which tables and pages are made. It needs no lm-eval.

    config.json             what all scores have in common: window, limit, seed, examples; its suites, tasks
    environment.json        versions, device, commit
    models/NAME.json        "name", "source", "kind", "parameters", "state_bytes" by tokens, "tokenizer",
                            "precision", "fingerprint" (of the weights)
    results.jsonl           a line for each model and task that is finished, see `Result`
    samples/NAME/TASK.jsonl a line for each question of a finished task:
                            "doc", "prompt", "target", "right" (a score), "window" ([first token, end] of the
                            document, or null), "truncated", "tokens" (of the prompt), "text_key" (of the
                            document, or null where it has no other questions), and "output"; or
                            "choices", "logprobs" (in nats) and "gold"
    answers/NAME/TASK.jsonl answers of an unfinished task, from which it resumes; removed when it is finished

Models and tasks can be added by later calls, and by several processes at a time, each with models of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch

from holdall import environment, files, settings
from holdall.contract import Config
from holdall.evals.suites import Unit
from holdall.evals.windows import ANSWER_TOKENS, WINDOW
from holdall.files import RunError
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seed

Finite = Annotated[float, Range()]
OTHER = "Choose another folder with --out."


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """What all scores of a results folder have in common."""

    window: PositiveInt = WINDOW
    """Tokens of a document that are shown, with 50 for the answer; by the model's own tokenizer."""
    limit: PositiveInt | None = None
    """The most documents of each task; None for all."""
    seed: Seed = 0
    """Of documents that are drawn, and of the bootstrap."""
    fewshot: NonNegativeInt | None = None
    """Examples with answers before each question, where a task lets them be chosen; None as each has it."""

    def validate(self) -> None:
        """A window must show something beside the answer."""
        if self.window < 2 * ANSWER_TOKENS:
            raise ValueError(
                f"window = {self.window} must be at least {2 * ANSWER_TOKENS}: {ANSWER_TOKENS} of its tokens "
                "are for the answer"
            )


@dataclass(frozen=True, kw_only=True)
class Result(Config):
    """A line of results.jsonl: the score of a model on a task."""

    model: str
    """The model's name, as in models/NAME.json."""
    task: str
    """The task's name."""
    asked: str
    """The name that was asked for: the task's, or that of a group or tag of lm-eval."""
    suite: str
    """The suite that has the task; empty for a task of lm-eval."""
    of: str
    """The task that shows the same documents once."""
    reads: PositiveInt | None
    """How often a prompt shows its document, 1 or 2; None where that is no question."""
    metric: str
    """Name of the metric."""
    unit: Unit
    """What the score counts; see `Unit`."""
    lower_is_better: bool
    """Whether of two scores the lower is better."""
    value: Finite
    """The score."""
    low: Finite | None
    """Lower bound of the 95% bootstrap interval; None if the score is no mean over questions,
    or all are about one text."""
    high: Finite | None
    """Upper bound of it."""
    others: dict[str, Finite]
    """The task's other metrics."""
    count: NonNegativeInt
    """Questions."""
    truncated: NonNegativeInt
    """Questions of whose document the window shows a part only."""
    version: str
    """Of the task."""
    prompt_hash: str
    """SHA-256 of all prompts and targets in their order; models with one tokenizer have one."""
    window: PositiveInt | None
    """Tokens of the window; None where documents are not cut."""
    seconds: NonNegativeFloat
    """Wall time of the call that finished it."""


def prompt_hash(prompts: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 of prompts and their targets, in order."""
    hashed = hashlib.sha256()
    for pair in prompts:
        hashed.update((json.dumps(pair, ensure_ascii=False) + "\n").encode(errors="surrogatepass"))
    return hashed.hexdigest()


class ResultsFolder:
    """A results folder, to write to and to read.

    Args:
        path: the folder, which is made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # --------------------------------------------------------------------------------------- what it holds

    def claim(
        self, config: EvalConfig, suites: Sequence[str], tasks: Sequence[str], *, command: str, device: str
    ) -> None:
        """Write what the folder holds, beside what it held.

        Args:
            config: what all scores have in common.
            suites: names of suites that are added.
            tasks: names of their tasks, and of lm-eval's.
            command: what was typed.
            device: where models run.

        Raises RunError if the folder holds scores with other settings, or something else.
        """
        path = self.path / "config.json"
        with files.locked(self.path):
            held, wanted = self._config(), config.to_dict()
            if held is not None:
                different = settings.differ({name: held.get(name) for name in wanted}, wanted)
                if different and self._has_answers():
                    raise RunError(f"{self.path} holds scores with other settings ({different}). {OTHER}")
                if different:  # an earlier command ended before the first answer
                    held = None
            before = held or {}
            merged = {
                "suite": [*dict.fromkeys([*before.get("suite", []), *suites])],
                "tasks": [*dict.fromkeys([*before.get("tasks", []), *tasks])],
                **config.to_dict(),
                "command": command,
            }
            if held is None:
                about = environment.describe(device, torch.get_num_threads())
                with contextlib.suppress(metadata.PackageNotFoundError):
                    about["lm-eval"] = metadata.version("lm-eval")
                files.write_json(self.path / "environment.json", about)
            if held != merged:
                files.write_json(path, merged)

    def _has_answers(self) -> bool:
        return bool(self.results()) or any((self.path / "answers").glob("*/*.jsonl"))

    def _config(self) -> dict[str, Any] | None:
        path = self.path / "config.json"
        if not path.exists():
            return None
        held: dict[str, Any] = files.read_json(path, f"Restore it from a copy. {OTHER}")
        if "suite" not in held or "window" not in held:
            raise RunError(f"{self.path} holds something else than evaluations (its config.json). {OTHER}")
        return held

    def results(self) -> list[Result]:
        """The lines of results.jsonl; the last of each model and task."""
        path = self.path / "results.jsonl"
        lines = [
            Result.checked(line, f"line {number} of {path}", "Remove that line.")
            for number, line in enumerate(files.read_lines(path), 1)
        ]
        return list({(line.model, line.task): line for line in lines}.values())

    def models(self) -> dict[str, dict[str, Any]]:
        """What models/NAME.json say, by name."""
        return {path.stem: files.read_json(path) for path in sorted((self.path / "models").glob("*.json"))}

    def samples(self, model: str, task: str) -> list[dict[str, Any]]:
        """The lines of a model's documents of a task; empty if it is not finished."""
        return files.read_lines(self._lines("samples", model, task))

    # ---------------------------------------------------------------------------------------------- models

    @contextlib.contextmanager
    def model(self, about: Mapping[str, Any]) -> Iterator[str]:
        """The name of a model in the folder, whose files are this process's meanwhile.

        about: what models/NAME.json says: at least "name" and "source". A name that another source has gets
        a number.

        Raises RunError if the weights at that source, or what they compute in, are others than before, InUse
        if another process scores that model.
        """
        with files.locked(self.path):
            name, held = self._named(about)
            same = ("fingerprint", "precision")
            if held is not None and any(held.get(what, about.get(what)) != about.get(what) for what in same):
                raise RunError(
                    f"{self.path} holds scores of {about['source']} with other weights or precision; remove "
                    f"{self.path / 'models' / (name + '.json')} and samples/{name} with its lines of "
                    "results.jsonl, or choose another folder with --out"
                )
            files.make_folder(self.path / "models")
            files.write_json(self.path / "models" / f"{name}.json", {**about, "name": name})
        with files.locked(self.path / "answers" / name):
            yield name

    def _named(self, about: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
        held = self.models()
        for name, one in held.items():
            if one.get("source") == about["source"]:
                return name, one
        plain = re.sub(r"[^\w.+-]+", "-", files.encodable(str(about["name"]))).strip(".-") or "model"
        name, number = plain, 2
        while name in held:
            name, number = f"{plain}-{number}", number + 1
        return name, None

    # --------------------------------------------------------------------------------------------- answers

    def _lines(self, kind: str, model: str, task: str) -> Path:
        return files.inside(self.path / kind, f"{model}/{_file_name(task)}.jsonl")

    def answers(self, model: str, task: str) -> Answers:
        """The answers that an unfinished task has so far."""
        return Answers(self._lines("answers", model, task))

    def finish(self, result: Result, samples: Iterable[Mapping[str, Any]]) -> None:
        """Write what a model scored on a task."""
        path = self._lines("samples", result.model, result.task)
        files.make_folder(path.parent)
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        files.write_atomically(path, text.encode(errors="backslashreplace"))
        # last, since it says that the samples are there
        files.append_line(self.path / "results.jsonl", result.to_dict())


def _file_name(task: str) -> str:
    """A task's name as a file's: upstream names of tasks may have any characters."""
    return re.sub(r"[^\w.+-]", lambda match: f"%{ord(match[0]):x}", task)


class Answers:
    """A model's answers to a task's requests, each written to a file as soon as it is there.

    It is also what lm-eval calls a cache hook, by which models hand in answers while they go.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_request: dict[str, Any] = {
            line["request"]: line["answer"]
            for line in files.read_lines(path)
            if {"request", "answer"} <= line.keys()
        }

    def __len__(self) -> int:
        return len(self._by_request)

    def remove(self) -> None:
        """Remove the file: the task is finished."""
        self.path.unlink(missing_ok=True)

    def get(self, kind: str, request: Sequence[Any]) -> Any:
        """The answer to a request of lm-eval; None if there is none."""
        answer = self._by_request.get(request_hash(kind, request))
        return tuple(answer) if isinstance(answer, list) else answer

    def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """Keep an answer; one that is there already is left as it is."""
        if (key := request_hash(kind, request)) not in self._by_request:
            self._by_request[key] = answer
            files.make_folder(self.path.parent)
            files.append_line(self.path, {"request": key, "answer": answer})


def request_hash(kind: str, request: Sequence[Any]) -> str:
    """What identifies a request: the method of the model and all its arguments, the prompt first."""
    return hashlib.sha256(json.dumps([kind, *request], default=str).encode()).hexdigest()
