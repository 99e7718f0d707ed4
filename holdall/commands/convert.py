"""`holdall convert`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from holdall.adapters import foreign
from holdall.commands import Words, console
from holdall.contract import bytes_per_row
from holdall.files import RunError
from holdall.language_model import LanguageModel
from holdall.report.style import bytes_text

TOKENS = 1000
"""Tokens after which the state is counted."""


def convert(source: Path, out: Path, tokenizer: Path | None, dtype: Literal["fp32", "bf16"] | None) -> int:
    """The command `holdall convert`; returns the exit status."""
    if not source.exists():
        raise RunError(f"there is no {source}: name a folder with config.json and weights, or a GGUF file")
    if not foreign.is_foreign(source):
        raise RunError(
            f"{source} is no model of another program: a folder with a config.json that has a model_type, or "
            "a GGUF file"
        )
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: name a folder, which is made")
    if out.exists() and any(out.iterdir()):  # before minutes of reading
        raise RunError(f"{out} holds something already. Choose another folder, or remove it first.")
    with Progress(
        Words("{task.description}"), BarColumn(), Words("{task.completed} of {task.total} weights"),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    ) as bars:  # fmt: skip
        task = bars.add_task("reading", total=None)

        def show(name: str, done: int, of: int) -> None:
            bars.update(task, description=name, completed=done, total=of)

        model = foreign.convert(source, out, tokenizer=tokenizer, dtype=dtype, on_take=show)
    for line in summary(model):
        console.print(line, soft_wrap=True)
    console.print(f"  {out}", soft_wrap=True)
    return 0


def summary(model: LanguageModel) -> list[str]:
    """What was made: layers, parameters, tokens, and the size of the state."""
    config, tokenizer = model.config, model.tokenizer
    kinds = Counter(layer.name for layer in config.layers)
    layers = ", ".join(f"{count} {name}" for name, count in kinds.items())
    ends = f"end {tokenizer.end}" + ("" if tokenizer.begin == tokenizer.end else f", begin {tokenizer.begin}")
    tokens = min(TOKENS, config.positions or TOKENS)
    states = model.model.init_states(
        1, dtype=torch.bfloat16, device=torch.device("meta"), capacity=tokens
    )  # fmt: skip
    size = sum(map(bytes_per_row, states))
    return [
        f"{len(config.layers)} layers of width {config.width}: {layers}",
        f"{model.model.parameter_count():,} parameters",
        f"vocabulary {config.vocab:,}, tokenizer {tokenizer.name} of {tokenizer.vocab:,} ({ends})",
        f"state after {tokens:,} tokens in bf16: {bytes_text(size)} ({size:,} bytes)",
    ]
