"""Folders as `holdall eval` writes them, with made-up models, documents and answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ATTACK = """<img src=x onerror="document.title = 'attacked'"></script><script>document.title = 'x'</script>"""
WORDS = (
    "the",
    "river",
    "of",
    "a",
    "town",
    "was",
    "said",
    "to",
    "have",
    "been",
    "built",
    "by",
    "its",
    "mayor",
)


class Writer:
    """Writes an evaluation, file by file."""

    def __init__(self, folder: Path, *, window: int = 1024, **config: Any) -> None:
        self.folder, self.window = folder, window
        (folder / "models").mkdir(parents=True)
        self.json("config.json", {"suite": ["recall", "recall-twice"], "window": window, "seed": 0, **config})
        self.json("environment.json", {"holdall": "0.1.0", "device": "cpu, 2 threads"})

    def json(self, name: str, value: Any) -> None:
        (self.folder / name).write_text(json.dumps(value), "utf-8")

    def model(self, name: str, state: Sequence[int], key: str = "", **more: Any) -> None:
        """state: bytes after half a window, one window and two."""
        sizes = {str(self.window * times // 2): size for times, size in zip((1, 2, 4), state, strict=True)}
        about = {"name": name, "source": f"runs/{name}", "kind": "run", "parameters": 15_000_000, **more}
        self.json(f"models/{key or name}.json", {"state_bytes": sizes, "tokenizer": "gpt2", **about})

    def samples(self, key: str, task: str, lines: Sequence[dict[str, Any]], tail: str = "") -> None:
        path = self.folder / "samples" / key / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, "utf-8")

    def result(self, model: str, task: str, right: Sequence[float], **more: Any) -> None:
        """The line that sums up these scores."""
        value = sum(right) / len(right)
        half = 1.96 * (max(value * (1 - value), 0.0) / len(right)) ** 0.5
        twice = task.endswith("_twice")
        line = {
            "model": model, "task": task, "of": task.removesuffix("_twice"), "reads": 2 if twice else 1,
            "suite": "recall-twice" if twice else "recall", "metric": "contains", "unit": "share",
            "lower_is_better": False, "value": value,
            "low": max(0.0, value - half), "high": min(1.0, value + half), "others": {}, "count": len(right),
            "truncated": len(right) // 3, "version": "1", "prompt_hash": task.encode().hex() * 4,
            "window": self.window, "seconds": 1.5, **more,
        }  # fmt: skip
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def task(self, model: str, task: str, lines: Sequence[dict[str, Any]], **more: Any) -> None:
        """Samples and result."""
        self.samples(model, task, lines)
        self.result(model, task, [line["right"] for line in lines], **more)


def document(index: int, words: int, rng: random.Random) -> tuple[str, str]:
    """A document with an answer in its midst."""
    text, gold = [rng.choice(WORDS) for _ in range(words)], f"Answer{index}"
    text.insert(words // 2, f"Key: {gold}.")
    return " ".join(text), gold


def answers(
    skill: float,
    *,
    twice: bool = False,
    documents: int = 12,
    words: int = 60,
    seed: int = 0,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda line: line,
) -> list[dict[str, Any]]:
    """A line per document: right with a chance of `skill`, the same documents for every model."""
    texts, dice = random.Random(7), random.Random(seed)
    lines = []
    for index in range(documents):
        text, gold = document(index, words, texts)
        right = int(dice.random() < skill)
        prompt = f"{text} Key:" if not twice else f"Information about Key. {text}\n{text} Key:"
        line = {
            "doc": index, "prompt": prompt, "target": [gold], "output": f" {gold if right else 'the river'}",
            "right": right, "window": [0, words], "truncated": index % 3 == 0, "tokens": words * (1 + twice),
        }  # fmt: skip
        lines.append(change(line))
    return lines


SMALL = {
    "attention": ((6 << 20, 12 << 20, 24 << 20), 0.75, 0.85),
    "based": ((1300 << 10,) * 3, 0.5, 0.7),
    "mamba-2": ((6 << 20,) * 3, 0.45, 0.6),
}


def small(
    folder: Path, *, documents: int = 12, words: int = 60, tasks: Sequence[str] = ("fda", "swde")
) -> Writer:
    """Three models on two tasks, once and twice."""
    writer = Writer(folder, tasks=[*tasks, *(f"{task}_twice" for task in tasks)], command="holdall eval a b")
    for place, (name, (state, once, twice)) in enumerate(SMALL.items()):
        writer.model(name, state)
        for index, task in enumerate(tasks):
            more = {"documents": documents, "words": words, "seed": 10 * place + index}
            writer.task(name, task, answers(once, **more))
            writer.task(name, f"{task}_twice", answers(twice, twice=True, **more))
    return writer
