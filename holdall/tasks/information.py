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

Where the K symbols are independent of each other, and a question asks for one of them, H = K log2 V, and the
rest is the same: this is the index problem, which set disjointness is on its blocked rows, and in part on all
others (holdall/tasks/set_disjointness.py). `distinct` says which of both it is.

Source: Fano's inequality, e.g. Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 2.10.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

SUMMED = 1 << 16
"""Up to so many questions the entropy of their answers is a sum over all of them."""


class Asked(NamedTuple):
    """What a state must answer for."""

    questions: int
    """K, the answers that may be asked for."""
    values: int
    """V, the values that each of them can have."""
    distinct: bool = True
    """Whether no two of a row's answers are equal; if not, they are independent of each other."""


@functools.lru_cache(maxsize=None, typed=True)  # True is no 1 here, and is refused
def answer_bits(questions: int, values: int, distinct: bool = True) -> float:
    """The entropy of a row's K answers in bits: log2(V! / (V - K)!); K log2 V if they are not distinct.

    Raises:
        TypeError: questions or values is not an int. ValueError: one of them is less than 1; or there are
            more distinct answers than values.
    """
    for name, number in (("questions", questions), ("values", values)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int, got {number!r}")
    if not distinct and min(questions, values) >= 1:
        return questions * math.log2(values)
    if not distinct:
        raise ValueError(f"{questions} questions for {values} values: both must be at least 1")
    if not 1 <= questions <= values:
        raise ValueError(
            f"{questions} questions cannot draw distinct values from {values}: needs 1 <= questions <= "
            f"values, so lower questions or raise the vocabulary"
        )
    if questions <= SUMMED:
        # a sum of logarithms rounds once; the difference of two log-gammas would cancel most digits
        return math.fsum(math.log2(values - used) for used in range(questions))
    left = values - questions
    if left < questions:  # little cancels
        return (math.lgamma(values + 1) - math.lgamma(left + 1)) / math.log(2)
    # Stirling's series for both, whose large terms are taken together; the next one is 1 / (360 left^3)
    nats = questions * math.log(values) + (left + 0.5) * math.log1p(questions / left) - questions
    return (nats + (1 / values - 1 / left) / 12) / math.log(2)


def recall_bits(questions: int, values: int, accuracy: int | float, distinct: bool = True) -> float:
    """The least bits about a row's values that any answerer with this accuracy (or better) must hold.

    Zero up to accuracy 1 / values, which guessing reaches: Fano's bound alone would turn up again below
    chance, since to be *always* wrong takes knowledge too, but being no better than chance needs no state.

    Args:
        questions: K, the questions of a row. values: V, the possible values. accuracy: expected share
            answered right, 0 to 1. distinct: as `answer_bits`.

    Raises:
        TypeError, ValueError: as `answer_bits`; ValueError also for an accuracy outside 0 to 1.
    """
    total = answer_bits(questions, values, distinct)
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy {accuracy} is not between 0 and 1")
    if accuracy <= 1 / values:
        return 0.0
    return max(0.0, total - questions * _doubt(values, accuracy))


def index_bits(symbols: int, alphabet: int, accuracy: int | float) -> float:
    """The least bits that tell any of so many independent symbols with this accuracy: the index problem.

    n (log2 c - h(a) - (1 - a) log2(c - 1)) for n symbols of c letters; n (1 - h(a)) for bits. Raises as
    `recall_bits`.
    """
    return recall_bits(symbols, alphabet, accuracy, distinct=False)


def disjointness_bits(first: int, second: int, accuracy: int | float) -> float:
    """The least bits of state with which a causal model names the common token of two sets, read once.

    |A| (log2 |B| - h(a) - (1 - a) log2(|B| - 1)), for the blocked distribution
    (holdall/tasks/set_disjointness.py): which of B's tokens A has is one of |A| symbols of an alphabet of
    |B|.

    Args:
        first: |A|, tokens of the set that is read first. second: |B|, of the other one. accuracy: expected
            share of rows answered right, 0 to 1.

    Raises:
        TypeError, ValueError: as `recall_bits`.
    """
    return index_bits(first, second, accuracy)


def best_accuracy(questions: int, values: int, bits: int | float, distinct: bool = True) -> float:
    """The highest accuracy that any causal model with so many bits of state can have.

    The inverse of `recall_bits`, by bisection to full precision; 1.0 from `answer_bits` up. For 0 bits it is
    slightly above 1 / values, since the bound is not tight there.

    Raises:
        TypeError, ValueError: as `answer_bits`; ValueError also for bits below 0.
    """
    total = answer_bits(questions, values, distinct)
    if not bits >= 0:
        raise ValueError(f"bits {bits} must be at least 0")
    if bits >= total:
        return 1.0
    low, high = 1 / values, 1.0  # low is within reach, high is not, and the bound rises between them
    while low < (middle := (low + high) / 2) < high:
        if recall_bits(questions, values, middle, distinct) <= bits:
            low = middle
        else:
            high = middle
    return low


def mean_best_accuracy(segments: Sequence[tuple[int, int] | Asked], bits: int | float) -> float:
    """The upper bound of a mean accuracy over test segments: the mean of their best accuracies.

    Args:
        segments: what is asked in each, the answers distinct unless it says otherwise; every segment's rows
            pass through the same state.

    Raises:
        ValueError: no segments; else as `best_accuracy`.
    """
    if not segments:
        raise ValueError("give at least one segment, as (questions, values)")
    asked = [Asked(*segment) for segment in segments]
    return math.fsum(best_accuracy(k, v, bits, distinct) for k, v, distinct in asked) / len(segments)


def _doubt(values: int, accuracy: int | float) -> float:
    """Fano: the largest remaining entropy of an answer in bits, h(a) + (1 - a) log2(V - 1), 1/V < a <= 1."""
    wrong = 1 - accuracy
    if wrong == 0:
        return 0.0
    # log1p(-wrong) is accurate where accuracy is close to one
    entropy = -(accuracy * math.log1p(-wrong) + wrong * math.log(wrong)) / math.log(2)
    return entropy + wrong * math.log2(values - 1)
