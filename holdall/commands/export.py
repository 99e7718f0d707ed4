"""The command `holdall export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from holdall import language_model, mixers
from holdall.adapters.foreign import load_any
from holdall.commands import console
from holdall.language_model import Checkpoint, LanguageModel
from holdall.text.sources import needed


def export(
    run: str,
    out: Path,
    dtype: str | None,
    layout: Literal["auto", "transformers", "holdall"],
    checkpoint: Checkpoint | None,
    load: tuple[Path, ...],
) -> int:
    """Write a language model as a folder of the transformers library; returns the exit status."""
    for file in load:
        mixers.load(file)
    model: LanguageModel = load_any(run, checkpoint=checkpoint)
    needed("transformers")
    from holdall.adapters import transformers

    narrow = None if dtype is None else language_model.DTYPES[dtype]
    transformers.export(model, out, dtype=narrow, layout=layout)
    console.print(f"  {out}", soft_wrap=True)
    return 0
