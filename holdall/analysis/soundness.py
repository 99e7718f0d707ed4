"""How far a mixer's output drifts from the truth over great lengths, in the dtypes that people use.

The truth is the same mixer in fp64 on the same tokens: the laws hold its forms to the definition there.
Inputs are normal numbers, weights are the initial ones, but for those that start at zero.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from holdall import files, mixers
from holdall.contract import MixerConfig

LENGTHS = {torch.float32: 100_000, torch.bfloat16: 16_384}
"""Tokens after which an error is told, by dtype."""
MOST_PAIRS = 16_384
"""Where the cost grows with the square of the length, no more tokens than these."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One measurement.

    Attributes:
        error: largest difference from fp64 over all outputs, relative to the largest output; NaN or infinite
            where the outputs are.
        last: the same over the last tenth of the tokens, where drift would show.
        seconds: of the pass in this dtype.
    """

    length: int
    error: float
    last: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured(Drift):
    """A measurement and what it is of: a line of soundness.jsonl."""

    mixer: str
    dtype: str
    width: int


def read(path: Path) -> list[Measured]:
    """The lines of a soundness.jsonl; empty if there is no such file.

    Raises RunError, which names the line that is none.
    """
    kinds = {"mixer": str, "dtype": str, "width": int, "length": int} | dict.fromkeys(
        ("error", "last", "seconds"), float
    )
    found = []
    for number, line in enumerate(files.read_lines(path), 1):
        wrong = [name for name, kind in kinds.items() if type(line.get(name)) is not kind]
        if wrong or min(line["width"], line["length"]) < 1:
            reason = f"it has no usable {wrong[0] if wrong else 'width and length'}"
            raise files.damaged(f"line {number} of {path}", reason, "Remove that line.")
        found.append(Measured(**{name: line[name] for name in kinds}))
    return found


def length_for(config: MixerConfig, dtype: torch.dtype, length: int | None = None) -> int:
    """The tokens to read: those asked for or the usual ones, fewer where the cost is quadratic."""
    wanted = length or LENGTHS[dtype]
    quadratic = any(square in mixers.entry(config.name).training for square in ("N²", "N^2"))
    return min(wanted, MOST_PAIRS) if quadratic else wanted


@torch.no_grad()
def drift(config: MixerConfig, dtype: torch.dtype, *, length: int | None = None, seed: int = 0) -> Drift:
    """Read so many tokens in `dtype` and in fp64, and compare.

    The weights are rounded to `dtype` first and then widened, so that what is measured is the computation.
    """
    length = length_for(config, dtype, length)
    if getattr(config, "max_length", length) < length:  # filters and positions are made for so many tokens
        config = dataclasses.replace(config, max_length=length)  # type: ignore[call-arg]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = config.build().eval()
        for parameter in mixer.parameters():
            if not parameter.any():  # RWKV's last projection starts at zero, and would hide everything
                parameter.normal_(std=0.02)
        mixer = mixer.to(dtype)
        x_1TD = torch.randn(1, length, config.width, dtype=torch.float64).to(dtype)
    tokens = {"tokens_BT": torch.arange(length)[None] % 97} if mixer.reads_tokens else {}
    started = time.perf_counter()
    y_1TD, _ = mixer(x_1TD, **tokens)
    seconds = time.perf_counter() - started
    truth_1TD, _ = copy.deepcopy(mixer).double()(x_1TD.double(), **tokens)
    size = truth_1TD.abs().max()
    off_T = (y_1TD.double() - truth_1TD)[0].abs().amax(-1) / size
    return Drift(
        length=length,
        error=off_T.max().item(),
        last=off_T[-max(1, length // 10) :].max().item(),
        seconds=seconds,
    )
