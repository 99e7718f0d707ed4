"""Floors: the least state, or the fewest layers, with which a task can be done, whatever the weights are.

    state, one read      K (log2 V - h(a) - (1 - a) log2(V - 1))    bits; any causal model (Fano)
    state, p reads       S >= log2 C(2m, m) / (2p - 1)              bits; disjoint or not, without error
    states in b bits     2^(b n) contexts at most are told apart    n elements (pigeonhole)
    layers, bits         log2(2 log2 c)                             BaseConv, tokens as their bits
    layers, p-hot        log2(2p), rounded down                     BaseConv, p one-hot digits
    layers, any code     least L with M(d, 2^L) 2^L log2(2 N^(a+2)) >= K (1 - h(2/3))     BaseConv, d numbers

The bounds on layers are of gated convolutions whose filters do not depend on the input. L layers of BaseConv
compute polynomials of degree 2^L at most. Recall contains the comparison of two codes, of degree 2p for p
digits; and it contains the index problem, in which what a sender of K bits leaves open is a polynomial in the
d numbers of the question, with M coefficients. Attention is no such polynomial, and needs no such depth.

Floors that follow from information alone are in holdall/tasks/information.py, and are named here again.

Letters: K questions of V values each, accuracy a, h the binary entropy; S bits of the largest state, p reads
or digits, m the size of the smaller set, C a binomial coefficient; b bits of each of n elements; c tokens of
the vocabulary, L layers, d numbers of a token's code, M the monomials of a degree at most, in d variables, N
the tokens of a row. In the last line of the formulas, a is the number of times log2 N bits that a parameter
has.

Sources: Arora et al., "Based", 2024, arXiv 2402.18668, theorems 3.1, 3.2 and 3.4, remark 3.3; Arora et al.,
"Just read twice", 2024, arXiv 2407.05483, proposition 3.1 and appendix G.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from holdall.contract import Config
from holdall.settings import NonNegativeInt, PositiveInt, Range
from holdall.tasks.information import answer_bits, best_accuracy, disjointness_bits, index_bits, recall_bits
from holdall.tasks.mqar import MQAR

__all__ = [
    "Floor", "Setting", "answer_bits", "best_accuracy", "contexts_told_apart_bits", "disjointness_bits",
    "disjointness_order", "exact_disjointness_bits", "floors", "index_bits", "layers_floor_any",
    "layers_floor_binary", "layers_floor_p_hot", "recall_bits", "state_elements_floor",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------- state


def contexts_told_apart_bits(elements: int, bits: int) -> int:
    """The most bits that a state of so many elements, each in so many bits, can convey: their product.

    There are 2^(bits elements) such states, and what is the same state has the same continuations: the
    pigeonhole principle. It bites where a state is stored in few bits; real numbers of unlimited precision it
    does not bound. Raises ValueError for negative numbers.
    """
    if elements < 0 or bits < 0:
        raise ValueError(f"{elements} elements of {bits} bits: neither can be negative")
    return elements * bits


def state_elements_floor(questions: int, values: int, accuracy: float, bits: int) -> int:
    """The fewest elements, of so many bits each, with which a causal model answers with this accuracy.

    `recall_bits` over bits, rounded up. Raises as `recall_bits`, and ValueError for less than one bit.
    """
    if bits < 1:
        raise ValueError(f"an element has at least 1 bit, not {bits}")
    return math.ceil(recall_bits(questions, values, accuracy) / bits)


def exact_disjointness_bits(first: int, second: int, reads: int) -> float:
    """The least bits of state with which a causal model that never errs says whether two sets are disjoint,
    from p reads of both: log2 C(2m, m) / (2p - 1), m = min(|A|, |B|).

    The states that cross from one set to the other are the messages of a protocol, 2p - 1 of them. Sets of m
    among 2m elements beside their complements are C(2m, m) pairs, of which no two can have the same messages:
    the A of one meets the B of the other, whose reader could not know. What the larger set has beyond m
    elements is the same in all pairs. It bites for models that are never wrong, of any depth.

    Source: Kushilevitz, Nisan, "Communication Complexity", 1997, section 1.3; the reduction is that of
    proposition 3.1 of "Just read twice".

    Raises ValueError for numbers below 1.
    """
    smaller = _smaller(first, second, reads)
    return math.log2(math.comb(2 * smaller, smaller)) / (2 * reads - 1)


def disjointness_order(first: int, second: int, reads: int) -> float:
    """min(|A|, |B|) / (2p): what bounds the state of p reads also of a model that errs, but for a constant.

    Some state of every recurrent model that solves general associative recall in p reads has at least this
    times a constant of bits ("Just read twice", proposition 3.1, by the two-way communication complexity of
    disjointness). No value of the constant is stated, so it is an order of growth: nothing to draw. From one
    read the bound is max(|A|, |B|), for the worse of the two orders. Raises ValueError for numbers below 1.
    """
    return _smaller(first, second, reads) / (2 * reads)


def _smaller(first: int, second: int, reads: int) -> int:
    if min(first, second, reads) < 1:
        raise ValueError(f"sets of {first} and {second} elements in {reads} reads: each must be at least 1")
    return min(first, second)


# --------------------------------------------------------------------------------------------------- layers


def layers_floor_binary(vocab: int) -> int:
    """The fewest layers of BaseConv that solve MQAR on tokens given as their log2 c bits: log2(2 log2 c),
    rounded up; 5 at c = 8192.

    For filters that are parameters. It bites for inputs of exactly these bits, d = log2 c: an embedding that
    is learned, and wider, can give codes of lower degree, as one-hot ones.

    Source: "Based", theorem 3.2. Raises ValueError for fewer than 2 tokens.
    """
    if vocab < 2:
        raise ValueError(f"a vocabulary of {vocab}: it needs at least 2 tokens")
    return _log2_rounded_up(2 * math.log2(vocab))


def layers_floor_p_hot(digits: int) -> int:
    """The fewest layers of BaseConv that solve MQAR on tokens written as p one-hot digits: log2(2p), rounded
    down.

    p = 1 is one-hot. For filters that are parameters, and a code of width p c^(1/p), where it bites from p =
    2 on, and by little. "Recall by hand" in docs/theory.md has models of hardly more layers.

    Source: "Based", remark 3.3; "Just read twice", appendix G.11. Raises ValueError for no digit.
    """
    if digits < 1:
        raise ValueError(f"{digits} digits: a token has at least 1")
    return (2 * digits).bit_length() - 1


def layers_floor_any(length: int, width: int, exponent: float = 1.0, *, pairs: int | None = None) -> int:
    """The fewest layers of BaseConv that answer one question of associative recall, whatever the code is.

    The least L with M(d, 2^L) 2^L log2(2 N^(a + 2)) >= K (1 - h(2/3)), where M(d, e) = C(d + e, e). It hardly
    bites: with d = log2 N, rounded up, and rows full of pairs it is 0 at N = 10,000, 1 at 100,000, 2 at a
    million and 3 at a thousand million, since it grows as log log N. Wider codes make it smaller.

    Args:
        length: N, tokens of a row. width: d, the numbers that a token is given as. exponent: a; a parameter
            has a log2 N bits. pairs: K, of a key and a value of one bit at least; by default as many as fit
            into a row with a question, (N - 1) / 2.

    Source: "Based", theorem 3.4, with the counting of its proof ("Just read twice", appendix G.6) in place
    of its asymptotic form, and for answers that are right in two of three cases. Raises ValueError for a
    length or width below 1, an exponent below 0, or pairs that do not fit.
    """
    if length < 1 or width < 1 or exponent < 0:
        raise ValueError(
            f"length {length}, width {width} and exponent {exponent} must be at least 1, 1 and 0"
        )
    most = (length - 1) // 2
    if pairs is not None and not 0 <= pairs <= most:
        raise ValueError(f"{pairs} pairs and a question do not fit into {length} tokens: at most {most} do")
    needed = (most if pairs is None else pairs) * (1 - _binary_entropy(2 / 3))
    layers = 0
    while True:
        degree = 2**layers
        each = degree * (1 + (exponent + 2) * math.log2(length))
        if math.comb(width + degree, degree) * each >= needed:
            return layers
        layers += 1


def _binary_entropy(share: float) -> float:
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def _log2_rounded_up(x: float) -> int:
    mantissa, exponent = math.frexp(x)  # x = mantissa 2^exponent, mantissa from 1/2
    return exponent - (mantissa == 0.5)


# -------------------------------------------------------------------------------------- all for one setting


@dataclass(frozen=True, kw_only=True)
class Setting(Config):
    """A task to list the floors of: recall of pairs, and the common element of two sets."""

    vocab: Annotated[int, Range(least=4)] = 8192
    """Tokens of the vocabulary, c; half of them are values."""
    length: PositiveInt = 1024
    """Tokens of a row, N."""
    pairs: PositiveInt = 64
    """Key-value pairs of a row, K, each of which is asked for."""
    accuracy: Annotated[float, Range(above=0, most=1)] = 1.0
    """The accuracy wanted."""
    digits: PositiveInt = 2
    """Digits of the p-hot code, p."""
    width: NonNegativeInt = 0
    """Numbers that a token is given as, d, for the floor of any code; 0 for log2 of the vocabulary."""
    first: PositiveInt = 16
    """Elements of the set that is read first, |A|."""
    second: PositiveInt = 768
    """Elements of the other set, |B|."""
    reads: PositiveInt = 2
    """How often both sets are read, p."""

    def validate(self) -> None:
        MQAR(vocab=self.vocab, length=self.length, pairs=self.pairs)  # which says what does not fit


@dataclass(frozen=True, kw_only=True)
class Floor:
    """One floor in one setting."""

    name: str
    """What is bounded."""
    value: float
    """The floor."""
    unit: str
    """What it counts."""
    of: str
    """The models that it is a floor of."""
    bites: bool
    """Whether it excludes any model at all here."""
    why: str
    """When it bites, or why it does not."""
    source: str
    """The theorem."""


def floors(setting: Setting) -> list[Floor]:
    """All floors that apply to a setting, those of state first."""
    c, accuracy = setting.vocab, setting.accuracy
    values = c - c // 2
    recall = recall_bits(setting.pairs, values, accuracy)
    width = setting.width or math.ceil(math.log2(c))
    any_code = layers_floor_any(setting.length, width, pairs=setting.pairs)
    first, second, reads = setting.first, setting.second, setting.reads
    at = f" at accuracy {accuracy:g}" * (accuracy < 1)
    fano, based = "Fano's inequality", "Based, theorem"
    elements = state_elements_floor(setting.pairs, values, accuracy, 1)
    swapped = [(first, second), (second, first)] if first != second else [(first, second)]
    sets = [
        Floor(name=f"sets of {a}, then {b}{at}", value=bits, unit="bits of state", of="causal, one read",
              bites=bits > 0, why="on blocked sets", source=fano)
        for a, b in swapped
        for bits in [disjointness_bits(a, b, accuracy) if b > 1 else 0.0]
    ]  # fmt: skip
    twice = exact_disjointness_bits(first, second, reads)
    return [
        Floor(name=f"recall of {setting.pairs} pairs{at}", value=recall, unit="bits of state",
              of="any causal model", bites=recall > 0,
              why="always" if recall else "guessing is as good", source=f"{fano}; {based} 3.1"),
        Floor(name="the same, one bit an element", value=elements, unit="elements",
              of="states in one bit", bites=elements > 0, why="b bits an element: a b-th of it",
              source="pigeonhole"),
        *sets,
        Floor(name=f"disjoint or not, {reads} reads", value=twice, unit="bits of state",
              of="causal, no error", bites=twice > 0, why="never wrong, any sets of these sizes",
              source="fooling set; Just read twice, 3.1"),
        Floor(name=f"the same with errors, {reads} reads", value=disjointness_order(first, second, reads),
              unit="bits of state, times a constant", of="any recurrent", bites=False,
              why="the constant is not known", source="Just read twice, 3.1"),
        Floor(name="recall, tokens as bits", value=layers_floor_binary(c), unit="layers",
              of="BaseConv, no error",
              bites=layers_floor_binary(c) > 1, why="inputs of log2 c bits, not learned embeddings",
              source=f"{based} 3.2"),
        Floor(name=f"recall, {setting.digits} one-hot digits", value=layers_floor_p_hot(setting.digits),
              unit="layers", of="BaseConv, no error", bites=layers_floor_p_hot(setting.digits) > 1,
              why="inputs of these digits, not learned embeddings", source="Based, remark 3.3"),
        Floor(name=f"recall, any {width} numbers a token", value=any_code, unit="layers",
              of="BaseConv, 2 of 3 right", bites=any_code > 1,
              why="grows as log log N" if any_code > 1 else "too few pairs", source=f"{based} 3.4"),
    ]  # fmt: skip
