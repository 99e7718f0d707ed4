"""Compiled circuits equal Python's integers, exactly, in the layers and the width that are promised."""

from __future__ import annotations

import functools
import operator

import pytest
import random_circuits
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from holdall.theory import compile as compiling
from holdall.theory.circuits import Circuit, Named, Product
from holdall.theory.compile import Compiled, compile_circuit, compile_formula, read_twice
from holdall.theory.schedule import Schedule, with_shared_forms


def checked(compiled: Compiled, seed: int, rows: int = 6) -> None:
    """No error, and the sizes that the compiler promises."""
    report = compiled.report()
    assert report.layers == report.layers_promised
    assert report.width == report.width_promised
    assert compiled.error(compiled.draw(rows, seed)) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.booleans())
def test_any_circuit_is_exact(seed: int, registers: bool) -> None:
    compiled = random_circuits.compiled(seed, registers=registers)
    assume(compiled is not None)
    assert compiled is not None
    assert len(compiled.stack.layers) == 2 * compiled.circuit.depth + 3
    checked(compiled, seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 14))
def test_any_formula_is_exact(seed: int, inputs: int) -> None:
    circuit = random_circuits.formula(seed, inputs)
    assert not read_twice(circuit)
    compiled = compile_formula(circuit)
    assert len(compiled.stack.layers) == circuit.depth + 2
    assert compiled.stack.width == 1 + inputs
    checked(compiled, seed)
    checked(compile_circuit(circuit), seed)


def test_most_random_circuits_are_not_refused() -> None:
    """So that the tests above have something to compile."""
    assert sum(random_circuits.compiled(seed) is not None for seed in range(100)) > 80


@pytest.mark.full
@pytest.mark.parametrize("seed", range(0, 1000, 5))
def test_many_circuits_and_formulas_are_exact(seed: int) -> None:
    compiled = random_circuits.compiled(seed)
    if compiled is not None:
        checked(compiled, seed, rows=20)
    checked(compile_formula(random_circuits.formula(seed, 2 + seed % 20)), seed, rows=20)


def test_the_width_is_the_most_registers_that_are_live() -> None:
    """Counted layer by layer from who writes and who reads, apart from the compiler's own count."""
    for seed in range(40):
        circuit = random_circuits.circuit(seed)
        schedule = Schedule(circuit)
        live = [
            sum(written <= layer < last for written, last in schedule.lives.values())
            for layer in range(1, schedule.out + 1)
        ]
        assert max(live) == schedule.most_live == schedule.allocate()[1]


def test_a_power_reuses_its_registers() -> None:
    """x^32 by squaring: five levels, and never more than two registers beside the input."""
    compiled = compile_circuit(Circuit.trace(lambda x: x[0] ** 32, 1, low=-3, high=3))
    assert compiled.stack.width <= 3
    assert len(compiled.stack.layers) == 2 * 5 + 3
    checked(compiled, 0)


def test_formulas_by_hand() -> None:
    product = Circuit.trace(lambda x: functools.reduce(operator.mul, x), 9, low=-4, high=4)
    assert compile_formula(product).report().layers == 8 + 2  # a chain
    x = Circuit.inputs(8, low=-4, high=4)
    tree = [*x]
    while len(tree) > 1:
        tree = [one * other for one, other in zip(tree[::2], tree[1::2], strict=True)]
    compiled = compile_formula(Circuit.of(tree))
    assert compiled.report().layers == 3 + 2
    assert compiled.run(torch.tensor([[1, 2, -3, 4, 1, -1, 2, 2]])).tolist() == [[96]]
    # const(A) B stays readable from B's registers: (x + 3)(y + 2)(z + 1) = ... at x = y = z = 0
    shifted = Circuit.trace(lambda x: (x[0] + 3) * (x[1] + 2) * (x[2] + 1), 3, low=-1, high=1)
    compiled = compile_formula(shifted)
    checked(compiled, 1, rows=30)
    assert compiled.run(torch.zeros(1, 3)).tolist() == [[6]]


def test_no_multiplication_at_all() -> None:
    circuit = Circuit.trace(lambda x: [x[1][0] - 2 * x[0][1], 5], 2, 2)
    assert compile_circuit(circuit).report().layers == 3
    assert compile_formula(circuit).report().layers == 2
    values = torch.tensor([[[1, 2], [3, 4]]])
    assert compile_circuit(circuit).run(values).tolist() == [[-1, 5]]
    assert compile_formula(circuit).run(values).tolist() == [[-1, 5]]


def test_more_outputs_than_registers_make_it_wider() -> None:
    compiled = compile_circuit(Circuit.trace(lambda x: [k * x[0] for k in range(1, 8)], 1))
    assert compiled.stack.width == 7
    assert compiled.run(torch.tensor([[3]])).tolist() == [[3, 6, 9, 12, 15, 18, 21]]


def test_a_named_form_is_written_once_and_read_from_its_register() -> None:
    def total_times_each(x: list) -> list:
        total = sum(x).within(-40, 40)
        deeper = x[0] * x[1] * x[2]
        return [deeper * total, deeper * x[3] * total]

    circuit = Circuit.trace(total_times_each, 5)
    apart, inline = compile_circuit(circuit), compile_circuit(circuit, registers=False)
    named = [wire for wire, gate in enumerate(circuit.gates, 5) if isinstance(gate, Named)]
    assert set(named) <= set(Schedule(circuit).lives)
    assert not set(named) & set(Schedule(circuit, registers=False).lives)
    for compiled in (apart, inline):
        checked(compiled, 3)
    assert apart.stack.width <= inline.stack.width


def test_a_form_of_many_wires_that_is_read_often_gets_a_register() -> None:
    def against_the_total(x: list) -> list:
        total = sum(x)
        return [x[0] * value * (total + k) for k, value in enumerate(x)]

    circuit = Circuit.trace(against_the_total, 10, low=-3, high=3)
    shared = with_shared_forms(circuit)
    (named,) = [gate for gate in shared.gates if isinstance(gate, Named)]
    assert (named.form.weights, named.within) == (dict.fromkeys(range(10), 1), (-30, 30))
    assert (shared.size, shared.depth) == (circuit.size, circuit.depth)
    apart, inline = compile_circuit(circuit), compile_circuit(circuit, registers=False)
    for compiled in (apart, inline):
        checked(compiled, 5)
    assert apart.report().nonzeros < inline.report().nonzeros - 40  # readers read one wire and not ten


def bounds_of_products(circuit: Circuit) -> list[tuple[int, int]]:
    first = circuit.n * circuit.d
    bounds = circuit.bounds()
    return [bounds[first + g] for g, gate in enumerate(circuit.gates) if isinstance(gate, Product)]


def test_sharing_changes_no_product_and_no_value() -> None:
    for seed in range(60):
        circuit = random_circuits.circuit(seed)
        try:
            circuit.bounds()
            shared = with_shared_forms(circuit, least=2)
        except ValueError:  # some grow too large
            continue
        assert (shared.size, shared.depth) == (circuit.size, circuit.depth)
        assert bounds_of_products(circuit) == bounds_of_products(shared)
        zeros: list = [0] * circuit.n if circuit.d == 1 else [[0] * circuit.d] * circuit.n
        ends = [[circuit.high if i % 2 else circuit.low for i in range(circuit.d)] for _ in range(circuit.n)]
        values: list = ends if circuit.d > 1 else [token[0] for token in ends]
        for row in [values, *([zeros] if circuit.low <= 0 <= circuit.high else [])]:
            assert shared.evaluate(row) == circuit.evaluate(row)


@pytest.mark.parametrize("registers", [True, False])
def test_a_product_that_cancels_once_forms_are_expanded(registers: bool) -> None:
    x = Circuit.inputs(3)
    product = x[0] * x[1]
    named = (product + x[2]).within(-100, 100)
    compiled = compile_circuit(Circuit.of([named - product, (named - product) * x[0]]), registers=registers)
    checked(compiled, 2)


def test_a_long_chain_of_named_forms_is_no_recursion() -> None:
    def chained(x: list):
        total = x[0]
        for k in range(3000):
            total = (total + x[1 + k % 2]).within(-30000, 30000)
        return total * x[0]

    checked(compile_circuit(Circuit.trace(chained, 3)), 0, rows=2)


def test_all_tokens_or_the_last_alone() -> None:
    compiled = compile_circuit(random_circuits.circuit(8))
    values = compiled.draw(5)
    assert torch.equal(compiled.run(values), compiled.run(values, all_tokens=True))
    layers = compiled.stack.layers[compiling.GATHER :]
    assert {lag for layer in layers for taps in layer.taps.values() for lag in taps} <= {0}
    done: list[int] = []
    compiled.run(values, done.append)
    assert done == list(range(3, len(compiled.stack.layers) + 1))


def test_a_wrong_weight_is_an_error() -> None:
    """The comparison can fail."""
    compiled = compile_circuit(Circuit.trace(lambda x: x[0] * x[1] + x[2], 3))
    for layer in compiled.stack.layers[2:]:
        for channel, weights in layer.gate.items():
            for source in weights:
                weights[source] += 1
                assert compiled.error(compiled.draw(20)) > 0, (channel, source)
                weights[source] -= 1
    assert compiled.error(compiled.draw(20)) == 0


def test_a_layer_s_own_sums_are_bounded_too() -> None:
    """To overwrite x by l, a layer computes (l - x) + x: with both near 2^53 that would round."""
    big = 2**26
    circuit = Circuit.trace(lambda x: [x[0] * x[1], x[0] * x[2]], 3, low=-big, high=big)
    circuit.bounds()
    assert compile_circuit(circuit).error(torch.tensor([[[big], [big], [-big]]])) == 0
    twice = Circuit.trace(lambda x: 2 * x[0] * x[1], 2, low=-big, high=big)
    twice.bounds()
    with pytest.raises(
        ValueError, match=r"in computing g0 = \(2 x\[0\]\) .*, a layer's sum could reach 9.01e\+15, beyond"
    ):
        compile_circuit(twice)
    with pytest.raises(ValueError, match=r"g1 = \(g0\) \(x\[2\]\) could reach"):
        compile_formula(Circuit.trace(lambda x: x[0] * x[1] * x[2], 3, low=0, high=big))


def test_what_cannot_be_compiled_or_run_is_named() -> None:
    x = Circuit.inputs(2)
    with pytest.raises(ValueError, match=r"x\[0\] is read 2 times; a formula reads every wire once"):
        compile_formula(Circuit.of(x[0] * x[1] + x[0]))
    with pytest.raises(ValueError, match=r"x\[0\] is read 2 times"):
        compile_formula(Circuit.of(x[0] ** 2))
    compiled = compile_circuit(Circuit.of(x[0] * x[1]))
    with pytest.raises(ValueError, match=r"shape \(1, 3\): the circuit takes \(rows, 2, 1\)"):
        compiled.run(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="input 9: the circuit was compiled for integers from -8 to 8"):
        compiled.run(torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match=r"input 0.5: the circuit was compiled for integers"):
        compiled.run(torch.tensor([[0, 0.5]]))
