"""How many bits of state recall needs: a lower bound for every model.

A row names K values, drawn without replacement from V, and then asks for each of them once. Whatever a causal
model is, its answers are a function of its state after the pairs and of the rest of the row, and the rest of
the row holds nothing about the values. A state of S bits therefore holds at most S bits about them:

    S  >=  I(values; state)  =  H - H(values | state)          entropy of the values, less what remains of it
    H(values | state)  <=  sum_i H(value_i | state)            chain rule
    H(value_i | state)  <=  h(a_i) + (1 - a_i) log2(V - 1)     Fano; a_i: how often answer i is right
    sum_i (...)  <=  K (h(a) + (1 - a) log2(V - 1))            concave in a; a is the mean of the a_i

h is the binary entropy. H = log2(V! / (V - K)!) exactly. K log2 V, the entropy of values drawn with
replacement, is larger, and would not give a lower bound (11.7 bits too high at K = 256, V = 4096, so that a
perfect model could lie below it).

Source: Fano's inequality, e.g. Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 2.10.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence


@functools.lru_cache(maxsize=None, typed=True)  # True is no 1 here, and is refused
def answer_bits(questions: int, values: int) -> float:
    """The entropy of a row's K answers in bits: log2(V! / (V - K)!).

    Raises:
        TypeError: questions or values is not an int. ValueError: not 1 <= questions <= values.
    """
    for name, number in (("questions", questions), ("values", values)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int, got {number!r}")
    if not 1 <= questions <= values:
        raise ValueError(
            f"{questions} questions cannot draw distinct values from {values}: needs 1 <= questions <= "
            f"values, so lower questions or raise the vocabulary"
        )
    # a sum of logarithms rounds once; the difference of two log-gammas would cancel most digits
    return math.fsum(math.log2(values - used) for used in range(questions))


def recall_bits(questions: int, values: int, accuracy: int | float) -> float:
    """The least bits about a row's values that any answerer with this accuracy (or better) must hold.

    Zero up to accuracy 1 / values, which guessing reaches: Fano's bound alone would turn up again below
    chance, since to be *always* wrong takes knowledge too, but being no better than chance needs no state.

    Args:
        questions: K, the questions of a row. values: V, the possible values. accuracy: expected share
            answered right, 0 to 1.

    Raises:
        TypeError, ValueError: as `answer_bits`; ValueError also for an accuracy outside 0 to 1.
    """
    total = answer_bits(questions, values)
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy {accuracy} is not between 0 and 1")
    if accuracy <= 1 / values:
        return 0.0
    return max(0.0, total - questions * _doubt(values, accuracy))


def best_accuracy(questions: int, values: int, bits: int | float) -> float:
    """The highest accuracy that any causal model with so many bits of state can have.

    The inverse of `recall_bits`, by bisection to full precision; 1.0 from `answer_bits` up. For 0 bits it is
    slightly above 1 / values, since the bound is not tight there.

    Raises:
        TypeError, ValueError: as `answer_bits`; ValueError also for bits below 0.
    """
    total = answer_bits(questions, values)
    if not bits >= 0:
        raise ValueError(f"bits {bits} must be at least 0")
    if bits >= total:
        return 1.0
    low, high = 1 / values, 1.0  # low is within reach, high is not, and the bound rises between them
    while low < (middle := (low + high) / 2) < high:
        if recall_bits(questions, values, middle) <= bits:
            low = middle
        else:
            high = middle
    return low


def mean_best_accuracy(segments: Sequence[tuple[int, int]], bits: int | float) -> float:
    """The upper bound of a mean accuracy over test segments: the mean of their best accuracies.

    Args:
        segments: (questions, values) of each; every segment's rows pass through the same state.

    Raises:
        ValueError: no segments; else as `best_accuracy`.
    """
    if not segments:
        raise ValueError("give at least one segment, as (questions, values)")
    return math.fsum(best_accuracy(questions, values, bits) for questions, values in segments) / len(segments)


def _doubt(values: int, accuracy: int | float) -> float:
    """Fano: the largest remaining entropy of an answer in bits, h(a) + (1 - a) log2(V - 1), 1/V < a <= 1."""
    wrong = 1 - accuracy
    if wrong == 0:
        return 0.0
    # log1p(-wrong) is accurate where accuracy is close to one
    entropy = -(accuracy * math.log1p(-wrong) + wrong * math.log(wrong)) / math.log(2)
    return entropy + wrong * math.log2(values - 1)
