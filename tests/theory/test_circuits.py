"""Circuits compute what the Python function that they were traced from computes, and know their bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import random_circuits
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from holdall.theory.circuits import LARGEST, Circuit, Product, report


def nested(x: list[Any]) -> list[Any]:
    """Uses every operator, on either side."""
    a, b, c, d = x
    return [
        a * b + 3,
        2 - c * (a - 1),
        -(d**3) + a,
        (a + b + 1) * (c - d) * 2 - 5,
        +a,
        d**0,
        d**5 - 7 * a * c,
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=4, max_size=4))
def test_a_traced_function_computes_itself(values: list[int]) -> None:
    assert Circuit.trace(nested, 4).evaluate(values) == nested(values)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**9))
def test_values_stay_within_their_bounds(seed: int) -> None:
    circuit, rng = random_circuits.circuit(seed), random.Random(seed)
    try:
        bounds = circuit.bounds()
    except ValueError:  # some grow too large
        assume(False)
    ends = (circuit.low, circuit.high)
    wires = [rng.choice([*ends, rng.randint(*ends)]) for _ in range(circuit.n * circuit.d)]
    values = [wires[t * circuit.d : (t + 1) * circuit.d] for t in range(circuit.n)]
    for gate in circuit.gates:
        if isinstance(gate, Product):
            wires.append(gate.left.evaluate(wires) * gate.right.evaluate(wires))
        else:
            wires.append(gate.form.evaluate(wires))
    for wire, value in enumerate(wires):
        low, high = bounds[wire]
        assert low <= value <= high, circuit.describe(wire)
    tokens: Any = values if circuit.d > 1 else [token[0] for token in values]
    assert circuit.evaluate(tokens) == [form.evaluate(wires) for form in circuit.outputs]


def test_additions_are_no_gates_and_constants_are_folded() -> None:
    x = Circuit.inputs(3)
    circuit = Circuit.of(2 * (x[0] + x[1]) * 3 - x[2] * 0 + (x[0] - x[0]) * x[1] + 1)
    assert (circuit.size, circuit.depth, len(circuit.gates)) == (0, 0, 0)
    assert circuit.evaluate([1, 2, 3]) == [19]


def test_equal_products_are_one_gate_and_unused_ones_are_dropped() -> None:
    x = Circuit.inputs(3)
    unused = (x[1] + 5) * x[2]
    circuit = Circuit.of([x[0] * (x[1] + 1), (1 + x[1]) * x[0] + x[2]])
    assert circuit.size == 1
    assert Circuit.of([unused, unused * x[0]]).size == 2


def test_size_depth_and_additions() -> None:
    x = Circuit.inputs(4)
    circuit = Circuit.of((x[0] + x[1] + 1) * x[2] + (x[3] ** 4))
    assert report(circuit).__dict__ == {"size": 3, "additions": 3, "depth": 2}
    assert Circuit.of(x[0] ** 13).depth == 5  # 13 = 2 (2 (2 + 1)) + 1: squares and products by x
    assert [Circuit.of(x[0] ** k).size for k in range(9)] == [0, 0, 1, 2, 2, 3, 3, 4, 3]


def test_a_square_is_not_negative() -> None:
    x = Circuit.inputs(2, low=-3, high=2)
    square, product = Circuit.of([(x[0] - 1) ** 2, (x[0] - 1) * (x[1] - 1)]).bounds()[2:]
    assert (square, product) == ((0, 16), (-4, 16))


def test_zero_is_a_value_of_every_input() -> None:
    """A compiled circuit runs at positions that have not read all inputs."""
    x = Circuit.inputs(2, low=3, high=5)
    assert Circuit.of(x[0] * x[1]).bounds() == [(0, 5), (0, 5), (0, 25)]


def test_the_wire_that_could_be_too_large_is_named() -> None:
    x = Circuit.inputs(3, low=0, high=2**26)
    fits = Circuit.of(x[0] * x[1] * 2)
    assert fits.bounds()[-1] == (0, 2**52)
    assert LARGEST == 2**53
    with pytest.raises(ValueError, match=r"^g1 = \(g0\) \(x\[2\]\) could reach 3.02e\+23, beyond 2\^53"):
        Circuit.of(x[0] * x[1] * x[2]).bounds()
    with pytest.raises(ValueError, match=r"^output 0, 3 g0, could reach 1.35e\+16"):
        Circuit.of(x[0] * x[1] * 3).bounds()
    # partial sums count: x - x' + ... may be large on the way
    with pytest.raises(ValueError, match="output 1"):
        Circuit.of([x[0] * x[1], 2 * (x[0] * x[1]) - x[2]]).bounds()


def test_a_promise_bounds_what_intervals_cannot() -> None:
    def swapped(x: list[Any]) -> Any:
        a, b, s = x
        for _ in range(60):
            move = s * (b - a)
            a, b = (a + move).within(0, 1), (b - move).within(0, 1)
        return a

    circuit = Circuit.trace(swapped, 3, low=0, high=1)
    assert max(circuit.bounds()) == (0, 1)
    assert circuit.evaluate([1, 0, 1]) == [1]
    assert circuit.depth == circuit.size == 60
    x = Circuit.inputs(2, low=0, high=1)
    with pytest.raises(
        ValueError, match=r"g0 = x\[0\] \+ 5 is from 5 to 6, and was promised to be within 0 and 1"
    ):
        Circuit.of((x[0] + 5).within(0, 1)).bounds()
    broken = Circuit.of((x[0] + x[1]).within(0, 1) * x[0])
    assert broken.evaluate([1, 0]) == [1]
    with pytest.raises(
        ValueError, match=r"g0 = x\[0\] \+ x\[1\] was promised to be within 0 and 1, and is 2"
    ):
        broken.evaluate([1, 1])


def test_arrays_of_rows_are_evaluated_at_once() -> None:
    circuit = Circuit.trace(lambda x: [x[0][0] * x[1][1] - x[0][1], 7], 2, 2)
    rows = np.arange(24).reshape(6, 2, 2) % 9
    columns = [[rows[:, t, j] for j in range(2)] for t in range(2)]
    product, seven = circuit.evaluate(columns)
    assert (product == rows[:, 0, 0] * rows[:, 1, 1] - rows[:, 0, 1]).all()
    assert seven == 7
    one = [circuit.evaluate(row)[0] for row in rows.tolist()]
    assert one == product.tolist()


def test_numpy_multiplies_matrices_of_symbols() -> None:
    circuit = Circuit.trace(lambda x: np.array(x) @ np.array([[1, 2], [0, -1]]) @ np.array(x), 2, 2)
    x = np.array([[3, 1], [-2, 4]])
    assert circuit.evaluate(x.tolist()) == (x @ np.array([[1, 2], [0, -1]]) @ x).flatten().tolist()
    assert circuit.size == 8


def test_wires_have_names() -> None:
    x = Circuit.inputs(2, 2)
    circuit = Circuit.of(-3 * x[0][1] * (x[1][0] - 1))
    assert circuit.describe(1) == "x[0][1]"
    assert circuit.describe(4) == "g0 = (-3 x[0][1]) (x[1][0] - 1)".replace("-3", "- 3")
    assert repr(x[0][0] + 2) == "x[0][0] + 2"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda x: x[0] if x[0] > 1 else x[1], TypeError, "cannot compare, divide, round or branch"),
        (lambda x: x[0] == x[1], TypeError, "cannot compare"),
        (lambda x: x[0] and x[1], TypeError, "cannot compare"),
        (lambda x: x[0] / 2, TypeError, "cannot compare, divide"),
        (lambda x: 2 // x[0], TypeError, "cannot compare, divide"),
        (lambda x: max(x), TypeError, "cannot compare"),
        (lambda x: [1, 2][x[0]], TypeError, "cannot compare"),
        (lambda x: x[0] * 0.5, TypeError, "0.5 is not an integer"),
        (lambda x: x[0] + True, TypeError, "True is not an integer"),
        (lambda x: x[0] ** -1, TypeError, "a power of -1"),
        (lambda x: x[0] ** x[1], TypeError, "circuits have powers 0, 1, 2"),
        (lambda x: x[0] + Circuit.inputs(1)[0], ValueError, "two symbols of different circuits"),
        (lambda x: [x[0], Circuit.inputs(1)[0]], ValueError, "outputs of different circuits"),
        (lambda x: 3, TypeError, r"the outputs \[3\] are no symbols"),
        (lambda x: None, TypeError, r"the outputs \[None\] are no symbols"),
        (lambda x: x[0].within(2, 1), ValueError, "within 2 and 1: give two integers, low <= high"),
        (lambda x: (x[0] * 0 + 3).within(0, 2), ValueError, "the constant 3 is not within 0 and 2"),
    ],
)
def test_what_is_no_arithmetic_is_refused(
    make: Callable[[Any], Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Circuit.trace(make, 2)


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match="n = 0"):
        Circuit.inputs(0)
    with pytest.raises(ValueError, match="inputs from 3 to 2"):
        Circuit.inputs(1, low=3, high=2)
    circuit = Circuit.trace(lambda x: x[0] * x[1], 2)
    with pytest.raises(ValueError, match=r"x\[1\] = 9 is not within -8 and 8"):
        circuit.evaluate([0, 9])
    with pytest.raises(ValueError, match="3 numbers, but the circuit has 2 x 1 inputs"):
        circuit.evaluate([0, 1, 2])
