"""The information floor: by hand, by brute force over all memories of a tiny task, and its inverse."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdall.tasks.information import (
    SUMMED,
    Asked,
    answer_bits,
    best_accuracy,
    disjointness_bits,
    index_bits,
    mean_best_accuracy,
    recall_bits,
)


@pytest.mark.parametrize("values", [SUMMED + 1, SUMMED + 2, 2 * SUMMED, 2 * SUMMED + 3, 10**7, 10**15])
def test_of_many_questions_the_same_is_a_closed_form(values: int) -> None:
    many = SUMMED + 1
    want = math.fsum(math.log2(values - used) for used in range(many))
    assert answer_bits(many, values) == pytest.approx(want, rel=2e-15)


def test_answer_bits_count_the_ordered_choices():
    assert answer_bits(1, 2) == 1
    assert answer_bits(3, 5) == pytest.approx(math.log2(5 * 4 * 3), rel=1e-15)
    assert answer_bits(5, 5) == pytest.approx(math.log2(120), rel=1e-15)
    assert answer_bits(256, 4096) == pytest.approx(math.log2(math.perm(4096, 256)), rel=1e-15)
    assert answer_bits(256, 4096) == pytest.approx(256 * 12 - 11.74, abs=0.01)


def test_recall_bits_by_hand():
    # two values, one pair: 1 - h(3/4), and h(3/4) = 2 - 3/4 log2 3
    assert recall_bits(1, 2, 0.75) == pytest.approx(1 - (2 - 0.75 * math.log2(3)), rel=1e-14)
    # five values, two pairs, half right: log2 20 - 2 (1 + 1/2 log2 4)
    assert recall_bits(2, 5, 0.5) == pytest.approx(math.log2(20) - 4, rel=1e-14)
    assert recall_bits(4, 4096, 1.0) == answer_bits(4, 4096)
    assert recall_bits(4, 4096, 0.0) == recall_bits(4, 4096, 1 / 4096) == 0.0
    # all right but one in 10**12, of 4096 values: the digits of 1 - a survive
    wrong = 1 - (1 - 1e-12)
    doubt = wrong * (math.log2(1 / wrong) + math.log2(math.e)) + wrong * math.log2(4095)
    lost = answer_bits(1, 4096) - recall_bits(1, 4096, 1 - 1e-12)
    assert lost == pytest.approx(doubt, abs=2e-15)
    assert recall_bits(1, 1, 0.3) == 0.0  # nothing to know


@pytest.mark.parametrize(("pairs", "values"), [(1, 2), (1, 3), (1, 6), (2, 3), (3, 3)])
def test_no_memory_of_a_tiny_task_beats_the_floor(pairs, values):
    """The best accuracy of every way to squeeze the rows into m states, against the floor at log2 m bits."""
    rows = list(itertools.permutations(range(values), pairs))
    for states in range(1, len(rows) + 1 if len(rows) < 6 else 4):
        best = 0
        # which rows share a state; given them, the best answer to each question is the commonest value
        for memory in itertools.product(range(states), repeat=len(rows)):
            right = 0
            for state in set(memory):
                held = [row for row, own in zip(rows, memory, strict=True) if own == state]
                right += sum(max(map(answers.count, answers)) for answers in zip(*held, strict=True))
            best = max(best, right)
        reached = best / (len(rows) * pairs)
        assert recall_bits(pairs, values, reached) <= math.log2(states) + 1e-12
        assert reached <= best_accuracy(pairs, values, math.log2(states)) + 1e-12


def test_the_entropy_of_values_drawn_with_replacement_would_be_no_floor():
    """A table of all ordered choices of 3 values of 3 is perfect with log2 6 bits, less than 3 log2 3."""
    assert best_accuracy(3, 3, math.log2(6)) == 1.0
    assert math.log2(6) < 3 * math.log2(3)


@settings(max_examples=100)
@given(
    st.integers(1, 40).flatmap(lambda pairs: st.tuples(st.just(pairs), st.integers(max(2, pairs), 5000))),
    st.floats(0, 1),
)
def test_best_accuracy_is_the_inverse_of_recall_bits(task, share):
    bits = share * answer_bits(*task)
    accuracy = best_accuracy(*task, bits)
    assert 1 / task[1] <= accuracy <= 1
    assert recall_bits(*task, accuracy) <= bits
    if accuracy < 1:
        assert recall_bits(*task, math.nextafter(accuracy, 2)) > bits  # and not one step more


@settings(max_examples=100)
@given(st.integers(2, 5000), st.floats(0, 1), st.floats(0, 1))
def test_more_accuracy_never_needs_fewer_bits(values, one, other):
    low, high = sorted((one, other))
    assert 0 <= recall_bits(2, values, low) <= recall_bits(2, values, high) <= answer_bits(2, values)


def test_enough_bits_make_everything_possible():
    assert best_accuracy(4, 4096, answer_bits(4, 4096)) == 1.0
    assert best_accuracy(4, 4096, math.inf) == 1.0
    assert best_accuracy(4, 4096, math.nextafter(answer_bits(4, 4096), 0)) <= 1.0
    assert 1 / 4096 <= best_accuracy(4, 4096, 0) < 0.01


def test_the_mean_over_segments():
    segments = [(4, 4096), (64, 4096), (256, 4096)]
    expected = (1 + best_accuracy(64, 4096, 200) + best_accuracy(256, 4096, 200)) / 3
    assert mean_best_accuracy(segments, 200) == pytest.approx(expected, rel=1e-15)
    assert best_accuracy(256, 4096, 200) < best_accuracy(64, 4096, 200) < 1


# ------------------------------------------------------------------------------------- independent symbols


def test_bits_of_independent_symbols_by_hand():
    assert answer_bits(5, 4, False) == 10  # more symbols than letters
    assert index_bits(5, 4, 1.0) == 10
    assert index_bits(100, 2, 0.75) == pytest.approx(100 * (1 - (2 - 0.75 * math.log2(3))), rel=1e-13)
    assert index_bits(100, 2, 0.5) == index_bits(7, 1, 1.0) == 0
    # more than that of distinct answers
    assert recall_bits(3, 5, 1.0) < index_bits(3, 5, 1.0) == 3 * math.log2(5)


def test_bits_of_two_sets_by_hand():
    assert disjointness_bits(16, 768, 1.0) == pytest.approx(153.4, abs=0.05)
    assert disjointness_bits(768, 16, 1.0) == 3072
    # |A| (log2 |B| - h(.9) - .1 log2(|B| - 1))
    h = -0.9 * math.log2(0.9) - 0.1 * math.log2(0.1)
    assert disjointness_bits(768, 16, 0.9) == pytest.approx(768 * (4 - h - 0.1 * math.log2(15)), rel=1e-13)
    assert disjointness_bits(16, 768, 0.9) == pytest.approx(130.5, abs=0.05)
    assert disjointness_bits(768, 16, 0.9) == pytest.approx(2411.8, abs=0.05)


@pytest.mark.parametrize(("symbols", "letters"), [(1, 2), (2, 2), (1, 5), (3, 2)])
def test_no_memory_of_independent_symbols_beats_the_bound(symbols, letters):
    rows = list(itertools.product(range(letters), repeat=symbols))
    for states in range(1, 4):
        for memory in itertools.product(range(states), repeat=len(rows)):
            right = 0
            for state in set(memory):
                held = [row for row, own in zip(rows, memory, strict=True) if own == state]
                right += sum(max(map(answers.count, answers)) for answers in zip(*held, strict=True))
            reached = right / (len(rows) * symbols)
            assert index_bits(symbols, letters, reached) <= math.log2(states) + 1e-12
            assert reached <= best_accuracy(symbols, letters, math.log2(states), False) + 1e-12


@settings(max_examples=50)
@given(st.integers(1, 900), st.integers(2, 900), st.floats(0, 1))
def test_best_accuracy_of_independent_symbols_is_the_inverse(symbols, letters, share):
    bits = share * answer_bits(symbols, letters, False)
    accuracy = best_accuracy(symbols, letters, bits, False)
    assert index_bits(symbols, letters, accuracy) <= bits
    if accuracy < 1:
        assert index_bits(symbols, letters, math.nextafter(accuracy, 2)) > bits


def test_the_mean_over_segments_of_both_kinds():
    segments = [(4, 4096), Asked(64, 16, distinct=False)]
    expected = (best_accuracy(4, 4096, 40) + best_accuracy(64, 16, 40, False)) / 2
    assert mean_best_accuracy(segments, 40) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: recall_bits(5, 4, 0.5),
            ValueError,
            r"5 questions .* from 4: needs 1 <= questions <= values",
        ),
        (lambda: recall_bits(0, 4, 0.5), ValueError, "0 questions"),
        (lambda: recall_bits(2, 4, 1.01), ValueError, "accuracy 1.01"),
        (lambda: recall_bits(2, 4, -0.1), ValueError, "accuracy -0.1"),
        (lambda: recall_bits(2, 4, math.nan), ValueError, "accuracy nan"),
        (lambda: best_accuracy(2, 4, -1), ValueError, "bits -1 must be"),
        (lambda: best_accuracy(2, 4, math.nan), ValueError, "bits nan must be"),
        (lambda: best_accuracy(5, 4, 1.0), ValueError, "5 questions"),
        (lambda: mean_best_accuracy([], 1.0), ValueError, "at least one segment"),
        (lambda: answer_bits(True, 4), TypeError, "questions"),
        (lambda: index_bits(0, 4, 0.5), ValueError, "0 questions for 4 values: both must be"),
        (lambda: disjointness_bits(4, 4, 2), ValueError, "accuracy 2"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
