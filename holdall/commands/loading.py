"""The flags of every command that runs a language model, and the model that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from holdall.commands import resolve_device

if TYPE_CHECKING:
    from holdall.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU if there is one."""
    precision: Annotated[Literal["fp32", "bf16"] | None, tyro.conf.arg(aliases=["--dtype"])] = None
    """What the model computes in; by default bf16 on a GPU and fp32 on a CPU."""
    checkpoint: Literal["model", "best", "last"] | None = None
    """The weights at the end of training (model), at the lowest validation loss (best) or at the last
    checkpoint (last); by default the first of these that is there."""
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A mixer file of your own that the model was trained with."""

    def load_mixers(self) -> None:
        """Register the mixers of the files that were named."""
        from holdall import mixers

        for file in self.load:
            mixers.load(file)

    def model(self, run: str) -> LanguageModel:
        """The model of a run folder, of a saved model's or another program's, or one that is included."""
        from holdall.adapters import foreign

        device = resolve_device(self.device)
        dtype = self.precision or ("fp32" if device == "cpu" else "bf16")
        return foreign.load_any(run, dtype=dtype, device=device, checkpoint=self.checkpoint)
