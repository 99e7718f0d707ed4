"""`holdall recall`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from holdall import files, language_model, mixers
from holdall.adapters import foreign
from holdall.analysis import recall as slices
from holdall.commands import TELL_SECONDS, Words, console, resolve_device
from holdall.files import RunError
from holdall.language_model import Checkpoint, MissingError
from holdall.model import Model, ModelConfig
from holdall.report import recall as recalls
from holdall.text.corpus import open_corpus
from holdall.text.tokenizers import Bytes
from holdall.training.language_models import PretrainConfig, open_data

SAVED_CONTEXT = 1024
"""Tokens per window, by default, of a model that does not say what it was trained on."""


def recall(
    folders: Sequence[Path],
    out: Path,
    checkpoint: Checkpoint | None,
    rows: int | None,
    context: int | None,
    threshold: int,
    passages: int,
    length: int,
    licence: str,
    device: str,
    load: Sequence[Path],
    dark: bool,
    *,
    command: str,
    data: Path | None = None,
) -> int:
    """The command `holdall recall`; returns the exit status.

    data: the corpus of models that name none: saved, converted, or of another program.
    """
    if not folders:
        raise ValueError("name at least one run: holdall recall RUN [RUN ...]")
    for file in load:
        mixers.load(file)
    device = resolve_device(device)
    try:
        labels = _labels(folders)
        asked = [_asked(folder, data, checkpoint, out / "models" / label)
                 for folder, label in zip(folders, labels, strict=True)]  # fmt: skip
        configs = [model.config for model in asked]
        _warn_of_bytes(configs[0])
        context = context or min(config.context_len for config in configs)
        prefix, longest = max((config.prefix, label) for config, label in zip(configs, labels, strict=True))
        if prefix >= context:
            raise RunError(
                f"the prefix of {longest}, {prefix:,} tokens that it reads in both directions, takes all of "
                f"a window of {context:,}, of which nothing would be scored: choose a larger --context"
            )
        scored = []
        with _ScoreView(len(folders)) as view:
            for model, label in zip(asked, labels, strict=True):
                view.start(label)
                found = _scores(model, checkpoint, context, rows, device, view.progress)
                scored.append(dataclasses.replace(found, label=label))
        scored = slices.on_the_same_tokens(scored)
        console.print(_table(scored, threshold))
        how: dict[str, Any] = {"threshold": threshold, "command": command}
        for path in recalls.write(scored, out, dark=dark, **how):
            console.print(f"  {path}", soft_wrap=True)
        if len(scored) == 2:
            how |= {"passages": passages, "length": length, "licence": licence}
            path = recalls.write_page(scored[0], scored[1], open_data(asked[0].config), out, **how)
            console.print(f"  {path}", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("Stopped. Finished scores are in the run folders; the same command resumes from there.")
        return 130
    return 0


def _warn_of_bytes(config: PretrainConfig) -> None:
    """Warn if tokens are bytes: nearly every pair of bytes is repeated, so hits say little about recall."""
    with contextlib.suppress(files.RunError):  # scores can be shown without their corpus
        if isinstance(open_data(config).tokenizer, Bytes):
            console.print(
                "warning: the tokens of this corpus are bytes, so a recall hit is a repeated pair of letters "
                "and says little about recall. For hits on words make the corpus with a tokenizer, such as "
                "`holdall data --tokenizer gpt2`, and train on that.",
                soft_wrap=True,
            )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A model whose recall is asked for."""

    folder: Path
    config: PretrainConfig
    """Of the run; of a saved or a foreign model, with the corpus that is named for it."""
    kept: Path
    """The folder for its predictions."""
    fingerprint: str = ""
    """Of another program's model, which has no step to be known by."""


def _asked(folder: Path, data: Path | None, checkpoint: Checkpoint | None, beside: Path) -> _Asked:
    """What a folder holds. Predictions of another program's model are kept in `beside`, not in its folder."""
    path = folder / "config.json"
    if foreign.is_foreign(folder) and folder.is_dir():
        if checkpoint is not None:
            raise RunError(f"{folder} is a model of another program: it has no checkpoint {checkpoint!r}")
        corpus = _named_corpus(folder, data, "a model of another program")
        loaded = foreign.load(folder)
        config = _on_corpus(folder, loaded.config, loaded.tokenizer.describe(), corpus)
        return _Asked(folder=folder, config=config, kept=beside, fingerprint=loaded.fingerprint)
    if foreign.is_foreign(folder):
        raise RunError(
            f"{folder} is a GGUF file: `holdall convert {folder} --out FOLDER` first, which writes the "
            "tokenizer that a corpus is made with"
        )
    if not path.exists():
        raise RunError(f"{folder} holds no run of a language model; `holdall train` makes one")
    config_json = files.read_json(path)
    if "format" not in config_json:
        return _Asked(folder=folder, config=PretrainConfig.read(path), kept=folder)
    corpus = _named_corpus(folder, data, "a saved model")
    header = language_model.read_header(folder)
    config = _on_corpus(folder, header.config, config_json.get("tokenizer"), corpus)
    return _Asked(folder=folder, config=config, kept=folder)


def _named_corpus(folder: Path, data: Path | None, what: str) -> Path:
    if data is None:
        raise RunError(
            f"{folder} is {what}, without a corpus to score it on; name the run that it is of, or "
            f"with --data a corpus of its tokenizer: `holdall data TEXT --tokenizer {folder}`"
        )
    return data


def _on_corpus(folder: Path, model: ModelConfig, described: Any, data: Path) -> PretrainConfig:
    """The config of a model that names no corpus, on this one, which must be of its tokenizer."""
    theirs = open_corpus(data).tokenizer.describe()
    if not isinstance(described, dict) or any(
        described.get(name) != theirs[name] for name in ("kind", "sha256")
    ):
        raise RunError(f"the corpus in {data} was made with another tokenizer than that of {folder}")
    prefix = max(getattr(layer, "prefix", 0) for layer in model.layers)
    context = max(SAVED_CONTEXT, 2 * prefix)
    context = min(context, model.positions or context)
    return PretrainConfig(model=model, data=str(data), context_len=context)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as are needed to distinguish them."""
    whole = [folder.absolute() for folder in folders]
    if len(set(whole)) < len(whole):
        raise ValueError("a run is named twice")
    parts = 1
    while len(labels := {"/".join(path.parts[-parts:]) for path in whole}) < len(whole):
        parts += 1
    assert labels
    return ["/".join(path.parts[-parts:]) for path in whole]


def _scores(
    asked: _Asked,
    checkpoint: Checkpoint | None,
    context: int,
    rows: int | None,
    device: str,
    on_progress: Callable[[int, int], None],
) -> slices.Scores:
    """What a model says of the validation text: as its folder keeps it, or computed now."""
    folder, config = asked.folder, asked.config
    dtype = torch.bfloat16 if config.precision == "bf16" and device != "cpu" else torch.float32
    about: dict[str, Any] = {
        "config": {**config.to_dict(), "data": ""},
        "precision": str(dtype).removeprefix("torch."),
    }
    if asked.fingerprint:
        about |= {"checkpoint": "model", "step": 0, "fingerprint": asked.fingerprint}
        files.make_folder(asked.kept)
    else:
        try:
            header = language_model.read_header(folder, checkpoint)
        except MissingError as error:  # copied here without its weights?
            kept = slices.find(folder)
            if kept is None or not _has(kept, context, rows):
                raise RunError(
                    f"{error}, and there is no recall.json for --context {context}"
                    f"{f' --rows {rows}' if rows else ''}"
                ) from error
            return kept
        about |= {"checkpoint": header.path.stem, "step": header.step}
    corpus = open_data(config, folder / "config.json")

    def model() -> Model:
        return foreign.load_any(folder, dtype=dtype, device=device, checkpoint=checkpoint).model

    return slices.score(
        asked.kept, about, corpus, model, context_len=context, rows=rows, prefix=config.prefix,
        on_progress=on_progress,
    )  # fmt: skip


def _has(kept: slices.Scores, context: int, rows: int | None) -> bool:
    windows = min(rows or kept.about["of_windows"], kept.about["of_windows"])
    return bool((kept.about["context_len"], kept.about["windows"]) == (context, windows))


class _ScoreView:
    """A progress bar of the run that is being scored; if there is no terminal, a line now and then."""

    def __init__(self, count: int) -> None:
        self.bars = Progress(
            Words("{task.description}", justify="right"),
            BarColumn(),
            Words("{task.completed} of {task.total} windows"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.count, self.number, self.reported = count, 0, time.monotonic()

    def __enter__(self) -> _ScoreView:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, label: str) -> None:
        self.number += 1
        self.label = f"{label} ({self.number} of {self.count})"
        self.task = self.bars.add_task(self.label, total=None)

    def progress(self, done: int, of: int) -> None:
        self.bars.update(self.task, completed=done, total=of)
        if not console.is_terminal and time.monotonic() - self.reported > TELL_SECONDS:
            self.reported = time.monotonic()
            console.print(f"{self.label}: {done} of {of} windows")


def _table(scored: Sequence[slices.Scores], threshold: int) -> Table:
    """A table of all runs; the first is the reference."""
    first, wide = scored[0], console.width >= 100
    lines = [slices.table(run, threshold) for run in scored]
    names = ["all", "hits", "other", *(["repeated", "rest"] if wide else [])]
    of = lines[0]
    text = (
        f"Perplexity. Hits complete a bigram that occurred before in the {first.about['context_len']:,} "
        f"tokens of context and at most {threshold:,} times in {first.about['train_tokens']:,} training "
        "tokens; "
        f"they are {of['hits']['share']:.1%} of {of['all']['tokens']:,} tokens, other repeated bigrams "
        f"{of['repeated']['share']:.1%}. Right: the most likely token is the true one."
    )
    if first.first > 1:
        text += (
            f" Of each window only the tokens behind the first {first.first:,} are scored, of every run: a "
            "model that reads these in both directions has seen them."
        )
    if len(scored) > 1:
        text += (
            f" Gap: in log-perplexity to {first.label}{'; on hits: the part due to hits' if wide else ''}; "
            f"of it hits: their share of it{', with its 95% interval over windows' if wide else ''}; "
            "above 100% if the run is better on other tokens, none if there is no gap."
        )
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), caption=Text(text), caption_justify="left"
    )
    table.add_column(
        "run", overflow="fold", min_width=min(24 if wide else 16, max(len(run.label) for run in scored))
    )
    columns = [
        *(["parameters"] if wide else []),
        *names,
        "hits right",
        *(["gap", *(["on hits"] if wide else []), "of it hits"] if len(scored) > 1 else []),
    ]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for run, line in zip(scored, lines, strict=True):
        gap = slices.gap(run, first, threshold)
        share = recalls.interval_text(gap.share, gap.low, gap.high) if wide else recalls.share_text(gap.share)
        right = line["hits"]["accuracy"]
        apart = [f"{gap.gap:+.4f}", *([f"{gap.hits:+.4f}"] if wide else []), share]
        table.add_row(
            Text(run.label),
            *([f"{run.about['parameters']:,}"] if wide else []),
            *(recalls.perplexity_text(line[name]["perplexity"]) for name in names),
            "–" if right is None else f"{right:.1%}",
            *([] if len(scored) == 1 else [""] * len(apart) if run is first else apart),
        )
    return table
