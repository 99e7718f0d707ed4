"""The suites' tasks in lm-eval: the documents of each, with their prompts, as its YAML file asks for them.

The YAML files of `tasks/` name `dataset` as their `custom_dataset`. What it needs besides comes as `metadata`
of lm-eval's TaskManager: the data folder, the window, and the model's tokenizer.

    TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": "evaldata", "window": 512})
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdall.evals import documents, general, needles, prompts, windows
from holdall.evals.documents import Question
from holdall.evals.suites import Task, named
from holdall.evals.windows import WINDOW, Codec
from holdall.files import RunError

TASKS = Path(__file__).with_name("tasks")
"""The folder of the YAML files."""
AT_ONCE = 64
"""Questions whose documents are encoded together."""


@dataclass(frozen=True)
class Row:
    """A question with its prompt, as the harness and the results folder have it."""

    id: str
    prompt: str
    golds: tuple[str, ...]
    window: tuple[int, int] | None
    """The first of the document's tokens that the prompt shows, and the one after the last; None where
    documents are not cut."""
    truncated: bool
    """Whether the document has more tokens than the window shows."""
    tokens: int
    """Tokens of the prompt."""
    text_key: str | None = None
    """What its document is known by, of which there may be other questions; None where it has its own."""


def rows(
    task: Task,
    codec: Codec,
    *,
    data: Path | None = None,
    window: int = WINDOW,
    seed: int = 0,
    limit: int | None = None,
) -> Iterator[Row]:
    """The documents of a task in their order, made as they are asked for.

    Args:
        codec: the model's tokenizer, by which documents are cut.
        data: the folder of files; tasks that draw their documents need none.
        window: tokens that are shown of a document, and for its answer.
        seed: of documents that are drawn.
        limit: the most documents.

    Raises RunError, which says what is missing, if a task's file is not there or damaged.
    """
    at_once = AT_ONCE if limit is None else min(AT_ONCE, limit)
    return itertools.islice(_rows(task, codec, data, window, seed, at_once), limit)


def _rows(task: Task, codec: Codec, data: Path | None, window: int, seed: int, at_once: int) -> Iterator[Row]:
    """All documents of a task; those of a file are encoded so many at once."""
    if task.name in general.FORMS:
        for doc in general.rows(task, data):
            asked = general.pairs(doc)
            prompt, gold = asked[doc.get("gold", 0)]
            yield Row(doc["id"], prompt, (gold,), None, False, len(codec.encode(prompt)))
        return
    if task.file is None:
        for number, needle in enumerate(needles.needles(task.name, window, codec, seed=seed)):
            tokens = len(codec.encode(needle.prompt))
            yield Row(f"{number} depth {needle.depth}", needle.prompt, (needle.gold,), None, False, tokens)
        return
    path = None if data is None else documents.find(data, task)
    if path is None:
        raise RunError(documents.missing(data, task))
    questions = documents.questions(task, path)
    while some := list(itertools.islice(questions, at_once)):
        yield from _asked(task, some, window, codec)


def _asked(task: Task, asked: Sequence[Question], window: int, codec: Codec) -> Iterator[Row]:
    """The documents of some questions, whose texts are encoded at once."""
    parts: Sequence[windows.Cut | None]
    if task.windowed:
        parts = windows.around_each(asked, window, codec)
    else:
        parts = [windows.Cut(question.context, 0, 0, truncated=False) for question in asked]
    made: list[Row] = []
    for question, shown in zip(asked, parts, strict=True):
        if shown is None:
            continue  # the answer is longer than what the window shows behind its middle
        prompt = prompts.prompt(prompts.FORMS[task.of], shown.text, question.asked, task.reads)
        place = (shown.first, shown.end) if task.windowed else None
        key = windows.key_of(question.context)
        made.append(Row(question.id, prompt, question.golds, place, shown.truncated, 0, key))
    for row, ids in zip(made, codec.encode_batch([row.prompt for row in made]), strict=True):
        yield dataclasses.replace(row, tokens=len(ids))


class Documents(list[dict[str, Any]]):
    """A split of a data set as lm-eval asks it: documents by place, and the names of their fields."""

    @property
    def features(self) -> dict[str, None]:
        """The names of the fields, as keys."""
        return dict.fromkeys(self[0]) if self else {}


def dataset(
    *,
    task: str,
    tokenizer: Any = None,
    data: str | Path | None = None,
    window: int = WINDOW,
    seed: int = 0,
    limit: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """The documents of a task for lm-eval, which passes what a YAML file and the TaskManager's metadata say.

    Args:
        tokenizer: a `Codec`, or the name of a tokenizer as `holdall data` takes it; without it that of the
            model that `pretrained` names.
        limit: the most documents, so that no others are made.
        others: what else lm-eval knows of the task and the model.
    """
    about, folder = named(task), None if data is None else Path(data)
    if task in general.FORMS:  # of which other fields are asked for
        if not (choices := list(itertools.islice(general.rows(about, folder), limit))):
            raise RunError(f"{task}: its file in {folder} has no rows")
        return {"test": Documents(choices)}
    made = rows(
        about,
        _codec(tokenizer, others),
        data=folder,
        window=window,
        seed=seed,
        limit=limit,
    )
    docs = [
        {
            "id": row.id,
            "prompt": row.prompt,
            "golds": list(row.golds),
            "window": None if row.window is None else list(row.window),
            "truncated": row.truncated,
            "tokens": row.tokens,
            "text_key": row.text_key,
        }
        for row in made
    ]
    if not docs:
        path = documents.find(folder, about) if folder else None
        if path and next(documents.read_rows(path), None) is None:
            raise RunError(f"{task}: {path} has no rows. {task} reads {about.form}")
        where = f" of {path}" if path else ""
        raise RunError(f"{task}: no document{where} has an answer within a window of {window} tokens")
    return {"test": Documents(docs)}


def _codec(tokenizer: Any, others: dict[str, Any]) -> Codec:
    from holdall import language_model
    from holdall.text import tokenizers

    if tokenizer is None:
        name = others.get("pretrained", language_model.DEFAULT)
        return codec_of(language_model.load(name, device="cpu").tokenizer)
    return codec_of(tokenizers.tokenizer(tokenizer)) if isinstance(tokenizer, str) else tokenizer


@dataclass(frozen=True)
class TokenizerCodec:
    """A tokenizer of Holdall's as a `Codec`."""

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.tokenizer.encode_batch(texts)]

    def decode(self, ids: Any) -> str:
        text: str = self.tokenizer.decode(ids)
        return text


def codec_of(tokenizer: Any) -> Codec:
    """What windows need of a tokenizer of Holdall's."""
    return TokenizerCodec(tokenizer)
