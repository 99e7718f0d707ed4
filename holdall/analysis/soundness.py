"""Numerical error of mixers over long sequences, in fp32 and bf16.

The reference is the same mixer in fp64 on the same tokens, where the laws hold it to the definition. Inputs
are Gaussian; weights are the initial ones, except those initialised to zero, which are drawn at random.
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
"""Tokens to read, by dtype."""
MOST_PAIRS = 16_384
"""Most tokens to read where the cost is quadratic in the length."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One measurement."""

    length: int
    """Tokens read."""
    error: float
    """Largest difference from fp64 over all outputs, relative to the largest output; NaN or infinite if an
    output is.
    """
    last: float
    """The same over the last tenth of the tokens, where drift would show."""
    seconds: float
    """Duration of the pass in this dtype."""


@dataclass(frozen=True, kw_only=True)
class Measured(Drift):
    """A measurement with its mixer and settings: a line of soundness.jsonl."""

    mixer: str
    dtype: str
    width: int


def read(path: Path) -> list[Measured]:
    """The lines of a soundness.jsonl; empty if there is no such file.

    Raises RunError, which names the line that is wrong.
    """
    kinds = {"mixer": str, "dtype": str, "width": int, "length": int} | dict.fromkeys(
        ("error", "last", "seconds"), float
    )
    measurements = []
    for number, line in enumerate(files.read_lines(path), 1):
        wrong = [name for name, kind in kinds.items() if type(line.get(name)) is not kind]
        if wrong or min(line["width"], line["length"]) < 1:
            reason = f"it has no usable {wrong[0] if wrong else 'width and length'}"
            raise files.damaged(f"line {number} of {path}", reason, "Remove that line.")
        measurements.append(Measured(**{name: line[name] for name in kinds}))
    return measurements


def length_for(config: MixerConfig, dtype: torch.dtype, length: int | None = None) -> int:
    """Tokens to read: `length` or the default of the dtype, fewer where the cost is quadratic."""
    wanted = length or LENGTHS[dtype]
    return min(wanted, MOST_PAIRS) if mixers.entry(config.name).quadratic else wanted


@torch.no_grad()
def drift(config: MixerConfig, dtype: torch.dtype, *, length: int | None = None, seed: int = 0) -> Drift:
    """Read the same tokens in `dtype` and in fp64, and compare the outputs.

    The fp64 weights are those in `dtype`, widened, so that the error is that of the computation alone.
    """
    length = length_for(config, dtype, length)
    if (
        getattr(config, "max_length", length) < length
    ):  # filters and positions are made for `max_length` tokens
        config = dataclasses.replace(config, max_length=length)  # type: ignore[call-arg]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = config.build().eval()
        for parameter in mixer.parameters():
            if not parameter.any():  # with RWKV's last projection at zero, all outputs would be zero
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
