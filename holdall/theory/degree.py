"""The degree of what layers compute: why a bounded number of them cannot compare codes.

    L layers of BaseConv        a polynomial of their inputs, of degree 2^L at most: each doubles it
    two codes of d bits         are equal where a polynomial of degree 2 d is 1, and no lower one does it
    two p-hot codes             likewise, of degree 2 p

so comparing takes 2^L >= 2 d: the floors on layers of holdall/theory/floors.py. "Based" (Arora et al., 2024,
arXiv 2402.18668), theorem 3.2 and remark 3.3, by this argument. Both degrees are measured here: that of a
function along a line by finite differences, that of a function of bits by its multilinear form.

Letters: L layers, d bits, p digits of a p-hot code; t a whole number, f a function of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor


def degree_along(function: Callable[[int], Tensor], most: int) -> int:
    """The degree of a polynomial f(t) of one whole number, from its values at 0 .. most + 1.

    The difference of order k of a polynomial of degree k is constant and not zero, and all later ones are
    zero. Values must be whole numbers that fp64 holds exactly, and so must the differences: small inputs.

    Raises ValueError if the degree is above `most`.
    """
    differences = [function(t).double() for t in range(most + 2)]
    degree = 0
    for order in range(most + 2):
        if any(bool(values.any()) for values in differences):
            degree = order
        differences = [later - before for before, later in itertools.pairwise(differences)]
    if degree > most:
        raise ValueError(f"the degree is above {most}")
    return degree


def degree_of_bits(function: Callable[[Sequence[int]], int], bits: int) -> int:
    """The degree of the one multilinear polynomial that is a function of so many bits, by its coefficients.

    The coefficient of a product of bits is the alternating sum of the function's values on all subsets of
    them (Moebius inversion). It takes 2^bits values.
    """
    coefficients = [function([number >> bit & 1 for bit in range(bits)]) for number in range(2**bits)]
    for bit in range(bits):
        for number in range(2**bits):
            if number >> bit & 1:
                coefficients[number] -= coefficients[number ^ (1 << bit)]
    return max((number.bit_count() for number, value in enumerate(coefficients) if value), default=0)
