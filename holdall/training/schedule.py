"""Learning-rate schedules: factors of the peak rate, from a linear warm-up and a cosine."""

from __future__ import annotations

import math


def warmup(step: int, steps: int) -> float:
    """The factor at a step (from 0) of a linear warm-up over so many: 1/steps, 2/steps, ..., 1, 1, ..."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def cosine(progress: float, end: float = 0.0) -> float:
    """The factor along half a cosine from 1 to `end`, at a progress from 0 to 1."""
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
