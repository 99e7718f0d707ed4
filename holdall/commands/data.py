"""`holdall data`; does not import PyTorch, so that it starts at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from holdall import environment, files, text
from holdall.commands import TELL_SECONDS, Words, busy, console
from holdall.text.corpus import SPLITS
from holdall.text.shards import Progress as DataProgress


def data(
    sources: Sequence[Path],
    out: Path,
    tokenizer: str,
    valid: float | Path,
    text_field: str,
    separator: str,
    strict: bool,
    workers: int | None,
    check: bool,
    *,
    command: str,
) -> int:
    """The command `holdall data`; returns the exit status."""
    began = time.monotonic()
    try:
        if check:
            return _check(out)
        if not sources:
            raise text.TextError("name at least one file or folder of text: holdall data SOURCE... --out DIR")
        with _DataView(out) as view:
            corpus = text.write_corpus(
                sources,
                out,
                text.tokenizer(tokenizer),
                valid=[valid] if isinstance(valid, Path) else valid,
                text_field=text_field,
                separator=separator.replace("\\n", "\n").replace("\\t", "\t"),
                strict=strict,
                workers=environment.cores() if workers is None else workers,
                command=command,
                on_progress=view.progress,
            )
    except KeyboardInterrupt:
        _print(f"Stopped. Finished shards are in {out}; the same command resumes from there.")
        return 130
    _print_corpus(corpus)
    seconds = time.monotonic() - began
    if view.tokens:
        console.print(f"  {seconds:,.1f} s, {view.tokens / seconds:,.0f} tokens/s")
    else:
        console.print("  It was already finished; nothing was done.")
    return 0


class _DataView:
    """A progress bar of the bytes read, with the number of tokens per second."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.bars = Progress(
            Words("reading"),
            BarColumn(),
            Words("{task.percentage:>3.0f}%  {task.fields[counts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.bar = self.bars.add_task("", total=None, counts="")
        self.tokens = 0
        """Tokens written since the command began."""
        self.began = self.reported = time.monotonic()

    def __enter__(self) -> _DataView:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def progress(self, progress: DataProgress) -> None:
        self.tokens = progress.tokens - progress.tokens_before
        now = time.monotonic()
        counts = f"{progress.documents:,} documents  {progress.tokens:,} tokens"
        counts += f"  {self.tokens / (now - self.began):,.0f}/s"
        counts += f"  {progress.left_out:,} left out" if progress.left_out else ""
        self.bars.update(self.bar, completed=progress.bytes, total=progress.of_bytes, counts=counts)
        if not console.is_terminal and now - self.reported > TELL_SECONDS:
            self.reported = now
            console.print(f"{progress.bytes / max(1, progress.of_bytes):4.0%}  {counts}")


def _print(line: str) -> None:
    """Print one line; anything unprintable in it, as in file names, is escaped."""
    console.print(files.printable(line), soft_wrap=True)


def _check(out: Path) -> int:
    with busy(f"reading {out}"):
        corpus = text.open_corpus(out, verify=True)
    _print_corpus(corpus)
    console.print(f"  All {len(corpus.manifest['files'])} files match the hashes in the manifest.")
    return 0


def _print_corpus(corpus: text.Corpus) -> None:
    manifest = corpus.manifest
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("split")
    for column in ("documents", "tokens", "shards"):
        table.add_column(column, justify="right", no_wrap=True)
    for split in SPLITS:
        counts = manifest[split]
        table.add_row(split, f"{counts['documents']:,}", f"{counts['tokens']:,}", str(len(counts["shards"])))
    console.print(table)
    for reason, count in manifest["left_out"].items():
        console.print(f"  left out: {count:,} of {reason}")
    for example in manifest["examples"]:
        _print(f"    {example}")
    if undivided := manifest.get("undivided"):
        console.print(
            f"  the separator does not occur in {undivided['files']:,} files, each of which is one document:"
        )
        for name in undivided["examples"]:
            _print(f"    {name}")
    if manifest["ignored_files"]:
        console.print(f"  ignored: {manifest['ignored_files']:,} files in folders that are not text")
    size = sum(file["bytes"] for file in manifest["files"].values()) / (1 << 20)
    _print(
        f"  {corpus.folder}: tokenizer {corpus.tokenizer.name}, vocabulary {corpus.vocab:,}, "
        f"{size:,.1f} MiB of {manifest['dtype']}, content hash {corpus.content_hash[:12]}",
    )
