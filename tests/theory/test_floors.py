"""Floors are the numbers that the theorems give, and no model of a table goes below them."""

import itertools
import math

import pytest

from holdall.tasks import information
from holdall.theory import floors as theory
from holdall.theory.floors import (
    Setting,
    contexts_told_apart_bits,
    disjointness_order,
    exact_disjointness_bits,
    floors,
    layers_floor_any,
    layers_floor_binary,
    layers_floor_p_hot,
    state_elements_floor,
)


def test_floors_of_layers_are_those_of_the_theorems() -> None:
    assert [layers_floor_binary(c) for c in (2, 4, 16, 64, 256, 8192, 50257)] == [1, 2, 3, 4, 4, 5, 5]
    for c in range(2, 5000):
        layers = layers_floor_binary(c)
        assert 2**layers >= 2 * math.log2(c) - 1e-9 > 2 ** (layers - 1) - 1e-9
    assert [layers_floor_p_hot(p) for p in (1, 2, 3, 4, 7, 8, 13)] == [1, 2, 2, 3, 3, 4, 4]


def test_the_floor_of_any_code_has_no_teeth() -> None:
    lengths = (10**4, 10**5, 10**6, 10**9)
    assert [layers_floor_any(n, math.ceil(math.log2(n))) for n in lengths] == [0, 1, 2, 3]
    assert layers_floor_any(10**9, 1000) < 3  # a wider code takes fewer
    # counted in pairs, of which a row has half as many as tokens
    pairs = (10**3, 10**4, 10**6, 10**9)
    assert [layers_floor_any(2 * n + 1, math.ceil(math.log2(n))) for n in pairs] == [0, 1, 2, 3]


def test_the_floor_of_any_code_is_of_the_pairs_of_a_row() -> None:
    assert layers_floor_any(10**6, 20) == layers_floor_any(10**6, 20, pairs=499_999) == 2
    assert layers_floor_any(10**6, 20, pairs=64) == 0  # a state of 64 bits holds them
    with pytest.raises(ValueError, match="500000 pairs and a question do not fit into 1000000 tokens"):
        layers_floor_any(10**6, 20, pairs=500_000)
    few, many = (
        next(floor for floor in floors(setting) if floor.name.startswith("recall, any"))
        for setting in (Setting(length=10**6), Setting(vocab=2**19, length=10**6, pairs=2 * 10**5))
    )
    assert (few.value, few.why) == (0, "too few pairs")
    assert many.value == 1


def test_the_floor_of_any_code_is_its_inequality() -> None:
    def monomials(variables: int, degree: int) -> int:
        """Counted one by one."""
        powers = itertools.product(range(degree + 1), repeat=variables)
        return sum(sum(power) <= degree for power in powers)

    for length, width in itertools.product((50, 2000, 10**5), (1, 2, 3)):
        layers = layers_floor_any(length, width, 0.5)
        needed = (length - 1) // 2 * (1 - (math.log2(3) - 2 / 3))  # the pairs that fit before a question

        def sent(layers: int, length: int = length, width: int = width) -> float:
            return monomials(width, 2**layers) * 2**layers * math.log2(2 * length**2.5)

        if monomials(width, 1) and layers <= 4:
            assert sent(layers) >= needed
            assert layers == 0 or sent(layers - 1) < needed


def test_floors_of_information_are_those_of_the_tasks() -> None:
    for name in ("recall_bits", "answer_bits", "best_accuracy", "disjointness_bits", "index_bits"):
        assert getattr(theory, name) is getattr(information, name)
    assert theory.disjointness_bits(16, 768, 1.0) == pytest.approx(153.4, abs=0.05)
    assert state_elements_floor(64, 4096, 1.0, 1) == 768
    assert state_elements_floor(64, 4096, 1.0, 32) == 24
    assert state_elements_floor(64, 4096, 1 / 4096, 1) == 0
    assert contexts_told_apart_bits(100, 4) == 400


def test_the_exact_floor_of_disjointness_is_that_of_its_fooling_set() -> None:
    """No two pairs of the fooling set can share their messages, whatever else the larger set has."""
    for m in (1, 2, 3):
        subsets = [set(s) for s in itertools.combinations(range(2 * m), m)]
        pairs = [(a, set(range(2 * m)) - a) for a in subsets]
        assert all(not a & b for a, b in pairs)
        assert all(
            a & other_b or other_a & b for (a, b), (other_a, other_b) in itertools.combinations(pairs, 2)
        )
        assert exact_disjointness_bits(m, m + 5, 1) == pytest.approx(math.log2(len(pairs)))
    one, two = exact_disjointness_bits(16, 768, 1), exact_disjointness_bits(16, 768, 2)
    assert one == pytest.approx(3 * two)
    assert exact_disjointness_bits(768, 16, 2) == two
    # to send the whole smaller set solves it, so the floor must be below that
    assert one <= 2 * 16
    assert disjointness_order(768, 16, 2) == 4


def test_what_makes_no_sense_is_refused() -> None:
    for call, why in (
        (lambda: layers_floor_binary(1), "at least 2 tokens"),
        (lambda: layers_floor_p_hot(0), "at least 1"),
        (lambda: layers_floor_any(0, 3), "length 0"),
        (lambda: exact_disjointness_bits(3, 4, 0), "in 0 reads"),
        (lambda: disjointness_order(0, 4, 1), "sets of 0"),
        (lambda: contexts_told_apart_bits(-1, 4), "negative"),
        (lambda: state_elements_floor(4, 8, 0.5, 0), "at least 1 bit"),
        (lambda: Setting(length=64, pairs=64), "pairs do not fit into length"),
    ):
        with pytest.raises(ValueError, match=why):
            call()


def test_all_floors_of_a_setting_say_whether_they_bite() -> None:
    by_name = {floor.name: floor for floor in floors(Setting())}
    assert by_name["recall of 64 pairs"].value == pytest.approx(767.3, abs=0.05)
    assert by_name["the same, one bit an element"].value == 768
    assert by_name["sets of 16, then 768"].value == pytest.approx(153.4, abs=0.05)
    assert by_name["sets of 768, then 16"].value == 3072
    assert by_name["recall, tokens as bits"].value == 5
    any_code = by_name["recall, any 13 numbers a token"]
    assert (any_code.value, any_code.bites) == (0, False)
    assert all(floor.why and floor.source and floor.of for floor in by_name.values())
    guessed = floors(Setting(accuracy=1 / 4096))
    assert not guessed[0].bites
