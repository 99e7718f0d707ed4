"""The information floor: how little state the answers themselves need, whatever the model.

Questions are what each segment of a test asks for: (questions of a row, possible answers), and whether these
are distinct; the mathematics is in holdall/tasks/information.py. State is in units that hold so many bits
each, such as bytes of 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from holdall.report.data import Model, pareto
from holdall.tasks.information import Asked, answer_bits, mean_best_accuracy

Questions = Sequence[tuple[int, int] | Asked]


def accuracy_at(questions: Questions, state: float, bits: int = 8) -> float:
    """The highest mean accuracy that any causal model with this much state can have."""
    return mean_best_accuracy(questions, bits * state)


def state_for_all(questions: Questions, bits: int = 8) -> float:
    """The smallest state that allows every answer of every segment to be right."""
    return max(answer_bits(*asked) for asked in questions) / bits


def state_for(questions: Questions, accuracy: float, bits: int = 8) -> float:
    """The smallest state that allows this mean accuracy, to a millionth; 0 where guessing reaches it."""
    low, high = 0.0, state_for_all(questions, bits)
    if accuracy_at(questions, low, bits) >= accuracy:
        return 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if accuracy_at(questions, middle, bits) >= accuracy else (middle, high)
    return high


def curve(questions: Questions, low: float, bits: int = 8) -> tuple[list[float], list[float]]:
    """The floor from a state of `low` to where it meets 100 %: (state, accuracy), evenly on a log axis."""
    full, steps = state_for_all(questions, bits), 240
    state = [*(low * (full / low) ** (k / steps) for k in range(steps)), full]
    return state, [accuracy_at(questions, count, bits) for count in state]


def guessing(questions: Questions) -> float:
    """The accuracy of a model that remembers nothing."""
    return sum(1 / asked[1] for asked in questions) / len(questions)


def gap(questions: Questions, models: Iterable[Model], bits: int = 8) -> tuple[Model, float] | None:
    """How far models are from the floor: a model and its state size over the bits that its answers need.

    The model is the smallest on the frontier of causal models, for which alone the floor holds, with at least
    90 % of the best accuracy reached. None where none is drawn or guessing does as well.
    """
    frontier = pareto(model for model in models if model.causal)
    if not frontier:
        return None
    model = next(m for m in frontier if m.accuracy >= 0.9 * frontier[-1].accuracy)
    needed = state_for(questions, model.accuracy, bits)
    return (model, model.state / needed) if needed else None
