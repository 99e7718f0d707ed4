"""Arithmetic circuits over integers: written with operators, or traced from a Python function.

    x = Circuit.inputs(3)                              # three numbers
    circuit = Circuit.of(x[0] * x[1] + 3 * x[2] - 1)
    circuit = Circuit.trace(function, 3)               # the same, if a function computes that of three inputs
    circuit.evaluate([2, 5, 1])                        # [12]

A circuit is in normal form: every gate is the product of two affine forms of earlier wires,

    p = (a_0 + sum_i a_i w_i) (b_0 + sum_i b_i w_i),

so that additions are no gates, and cost no depth. Products by constants are folded, equal products are one
gate, and what no output needs is dropped. An affine form may be given a wire of its own (`Symbol.within`).

Every wire has bounds, by interval arithmetic from those of the inputs: `Circuit.bounds` refuses a circuit
that could leave the integers that fp64 holds, and names the wire.

Letters: x the inputs; p a product; w_i earlier wires, inputs or gates; a_i and b_i integer coefficients of
its two forms, a_0 and b_0 their constants. A circuit has n inputs of d numbers: n tokens in d channels.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LARGEST = 2**53
"""Integers up to this size are exact in fp64."""

Interval = tuple[int, int]
"""The least and the largest value that a wire can have."""


class Form(NamedTuple):
    """An affine form of wires, or of channels: a constant plus a weighted sum."""

    weights: dict[int, int]
    """Coefficient by wire; none is zero."""
    constant: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal forms, and hashable."""
        return (self.constant, *sorted(self.weights.items()))

    def evaluate(self, values: Sequence[Any]) -> Any:
        """The form of these values, integers or arrays of them, by wire."""
        return sum((weight * values[wire] for wire, weight in self.weights.items()), self.constant)

    def interval(self, bounds: Sequence[Interval]) -> Interval:
        """What the form can be if its wires are within these bounds."""
        low = high = self.constant
        for wire, weight in self.weights.items():
            ends = weight * bounds[wire][0], weight * bounds[wire][1]
            low, high = low + min(ends), high + max(ends)
        return low, high

    def size(self, sizes: Sequence[int]) -> int:
        """The largest absolute value that any partial sum can have, in any order, from those of its wires."""
        return abs(self.constant) + sum(abs(weight) * sizes[wire] for wire, weight in self.weights.items())


class Product(NamedTuple):
    """A gate: the product of two forms."""

    left: Form
    right: Form


class Named(NamedTuple):
    """A form that has a wire of its own, and a range that its author promises; no product."""

    form: Form
    within: Interval


Gate = Product | Named


def largest(interval: Interval) -> int:
    return max(abs(interval[0]), abs(interval[1]))


def product_interval(one: Interval, other: Interval) -> Interval:
    """What the product of two numbers within these bounds can be."""
    ends = [a * b for a in one for b in other]
    return min(ends), max(ends)


class Tape:
    """The gates of one circuit while it is written. Symbols of two tapes cannot be combined."""

    def __init__(self, n: int, d: int, low: int, high: int) -> None:
        for name, value in (("n", n), ("d", d)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: a circuit has at least one input of one number")
        if not (isinstance(low, int) and isinstance(high, int) and low <= high):
            raise ValueError(f"inputs from {low!r} to {high!r}: give two integers, low <= high")
        self.n, self.d, self.low, self.high = n, d, low, high
        self.gates: list[Gate] = []
        self._known: dict[Any, int] = {}

    def product(self, left: Form, right: Form) -> Form:
        """The wire of a product, which is a gate unless a factor is constant or the gate is there already."""
        for one, other in ((left, right), (right, left)):
            if not one.weights:
                return _scaled(other, one.constant)
        key = (left.key, right.key) if left.key <= right.key else (right.key, left.key)
        return self._wire(("product", key), Product(left, right))

    def named(self, form: Form, within: Interval) -> Form:
        """A wire for a form; a constant needs none."""
        if not form.weights:
            if not within[0] <= form.constant <= within[1]:
                raise ValueError(f"the constant {form.constant} is not within {within[0]} and {within[1]}")
            return form
        return self._wire(("named", form.key, within), Named(form, within))

    def _wire(self, key: Any, gate: Gate) -> Form:
        if key not in self._known:
            self._known[key] = self.n * self.d + len(self.gates)
            self.gates.append(gate)
        return Form({self._known[key]: 1}, 0)


@functools.total_ordering
class Symbol:
    """A number that a circuit computes: add, subtract, multiply, and raise to a power of 0, 1, 2, ...

    Other operands are Python integers. What is no arithmetic raises TypeError: a comparison, a division, a
    fraction, or an `if`, since a circuit computes the same gates for all inputs.
    """

    __slots__ = ("form", "tape")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tape: Tape, form: Form) -> None:
        self.tape, self.form = tape, form

    def within(self, low: int, high: int) -> Symbol:
        """The same number on a wire of its own, which the author promises to lie in a range.

        For what interval arithmetic cannot know: x + s (y - x) of bits is a bit. `Circuit.evaluate` checks
        the promise. It must hold for all inputs in their range, and for zeros in place of any. A form of many
        wires that is read often is cheaper on a wire of its own, which costs no product and no depth.
        """
        if not (isinstance(low, int) and isinstance(high, int) and low <= high):
            raise ValueError(f"within {low!r} and {high!r}: give two integers, low <= high")
        return Symbol(self.tape, self.tape.named(self.form, (low, high)))

    def __add__(self, other: Any) -> Symbol:
        form = self._form(other)
        weights = dict(self.form.weights)
        for wire, weight in form.weights.items():
            if total := weights.get(wire, 0) + weight:
                weights[wire] = total
            else:
                del weights[wire]
        return Symbol(self.tape, Form(weights, self.form.constant + form.constant))

    __radd__ = __add__

    def __neg__(self) -> Symbol:
        return Symbol(self.tape, _scaled(self.form, -1))

    def __pos__(self) -> Symbol:
        return self

    def __sub__(self, other: Any) -> Symbol:
        return self + Symbol(self.tape, _scaled(self._form(other), -1))

    def __rsub__(self, other: Any) -> Symbol:
        return -self + other

    def __mul__(self, other: Any) -> Symbol:
        return Symbol(self.tape, self.tape.product(self.form, self._form(other)))

    __rmul__ = __mul__

    def __pow__(self, power: Any) -> Symbol:
        """By repeated squaring: at most 2 log2(power) products."""
        if not isinstance(power, int) or isinstance(power, bool) or power < 0:
            raise TypeError(f"a power of {power!r}: circuits have powers 0, 1, 2, ...")
        if power == 0:
            return Symbol(self.tape, Form({}, 1))
        half = self ** (power // 2)
        return half * half * self if power % 2 else half * half

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            "a circuit computes the same gates for all inputs, so it cannot compare, divide, round or branch "
            "on its values: write the choice as arithmetic, such as a + s * (b - a) for a bit s"
        )

    __bool__ = __lt__ = __eq__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _refuse
    __mod__ = __rmod__ = __abs__ = __int__ = __float__ = __index__ = __and__ = __or__ = __xor__ = _refuse

    def __repr__(self) -> str:
        return show(self.form, functools.partial(input_name, self.tape.n, self.tape.d))

    def _form(self, other: Any) -> Form:
        if isinstance(other, Symbol):
            if other.tape is not self.tape:
                raise ValueError(
                    "two symbols of different circuits cannot be combined: take all inputs at once"
                )
            return other.form
        if isinstance(other, bool) or not hasattr(other, "__index__"):
            raise TypeError(f"{other!r} is not an integer: circuits compute with integers")
        return Form({}, operator.index(other))


class Circuit:
    """Gates and outputs, with what no output needs left out.

    Attributes:
        n, d: numbers of inputs: n tokens in d channels. Wire d t + j is channel j of token t.
        low, high: the range of every input.
        gates: products and named forms; gate g has wire n d + g.
        outputs: affine forms of wires.
        depths: of each wire, the products on the longest path to it from an input.
    """

    def __init__(self, tape: Tape, outputs: Sequence[Form]) -> None:
        self.n, self.d, self.low, self.high = tape.n, tape.d, tape.low, tape.high
        first = self.n * self.d
        needed = {wire for form in outputs for wire in form.weights}
        for wire in range(first + len(tape.gates) - 1, first - 1, -1):
            if wire in needed:
                needed.update(*(form.weights for form in forms_of(tape.gates[wire - first])))
        kept = [wire for wire in range(first, first + len(tape.gates)) if wire in needed]
        place = {wire: wire for wire in range(first)} | {wire: first + g for g, wire in enumerate(kept)}

        def moved(form: Form) -> Form:
            return Form({place[wire]: weight for wire, weight in form.weights.items()}, form.constant)

        gates: list[Gate] = []
        for gate in (tape.gates[wire - first] for wire in kept):
            if isinstance(gate, Named):
                gates.append(Named(moved(gate.form), gate.within))
            else:
                gates.append(Product(moved(gate.left), moved(gate.right)))
        self.gates = tuple(gates)
        self.outputs = tuple(map(moved, outputs))
        self.depths = [0] * first
        for gate in self.gates:
            deepest = max(self.depths[wire] for form in forms_of(gate) for wire in form.weights)
            self.depths.append(deepest + isinstance(gate, Product))

    @staticmethod
    def inputs(n: int, d: int = 1, *, low: int = -8, high: int = 8) -> Any:
        """The symbols of a new circuit's inputs: n of them, or for d > 1 n lists of d.

        Args:
            n: tokens.
            d: numbers of a token.
            low, high: the range of every input, from which all bounds follow.
        """
        tape = Tape(n, d, low, high)
        symbols = [Symbol(tape, Form({wire: 1}, 0)) for wire in range(n * d)]
        return symbols if d == 1 else [symbols[t * d : (t + 1) * d] for t in range(n)]

    @staticmethod
    def of(outputs: Any) -> Circuit:
        """The circuit that computes these symbols: one, or nested sequences or arrays of them, flattened.

        Raises TypeError if there is none among them: integers alone are no circuit.
        """
        flat = list(_flattened(outputs))
        tapes = {id(symbol.tape): symbol.tape for symbol in flat if isinstance(symbol, Symbol)}
        if len(tapes) != 1:
            raise (ValueError if tapes else TypeError)(
                "outputs of different circuits: take all inputs at once" if tapes else
                f"the outputs {flat!r:.80} are no symbols: return what was computed from the inputs"
            )  # fmt: skip
        (tape,) = tapes.values()
        zero = Symbol(tape, Form({}, 0))
        return Circuit(tape, [(zero + output).form for output in flat])

    @classmethod
    def trace(
        cls, function: Callable[..., Any], n: int, d: int = 1, *, low: int = -8, high: int = 8
    ) -> Circuit:
        """The circuit of a Python function of one argument, the inputs as `Circuit.inputs` gives them."""
        return cls.of(function(cls.inputs(n, d, low=low, high=high)))

    # ------------------------------------------------------------------------------------------ properties

    @property
    def size(self) -> int:
        """Products."""
        return sum(isinstance(gate, Product) for gate in self.gates)

    @property
    def additions(self) -> int:
        """Additions of all forms, which are no gates in normal form."""
        forms = [form for gate in self.gates for form in forms_of(gate)] + list(self.outputs)
        return sum(max(0, len(form.weights) + bool(form.constant) - 1) for form in forms)

    @property
    def depth(self) -> int:
        """Multiplicative depth: the most products on any path from an input to an output."""
        return max([0, *(self.depths[wire] for form in self.outputs for wire in form.weights)])

    @property
    def range(self) -> Interval:
        """What an input can be at any position of a row: its range, or zero before it has been read."""
        return min(0, self.low), max(0, self.high)

    def name(self, wire: int) -> str:
        """`x[t]` or `x[t][j]` for an input, `g5` for a gate."""
        return input_name(self.n, self.d, wire)

    def describe(self, wire: int) -> str:
        """A wire with what it computes, as `g5 = (x[0] + 1) (g4)`."""
        if wire < self.n * self.d:
            return self.name(wire)
        forms = forms_of(self.gates[wire - self.n * self.d])
        written = [show(form, self.name) for form in forms]
        if len(written) == 2:
            written = [f"({form})" for form in written]
        return f"{self.name(wire)} = {' '.join(written)}"

    def evaluate(self, values: Any) -> list[Any]:
        """The outputs for these inputs, in the arithmetic of Python's integers.

        Args:
            values: n integers, or for d > 1 n sequences of d; or in place of each integer a NumPy array of
                them, one for each row. Arrays of int64 are exact for circuits that `bounds` takes.

        Raises ValueError for inputs of another number or outside of their range, and if a promise of
        `Symbol.within` is broken, naming the wire.
        """
        rows = values if self.d == 1 else [value for token in values for value in token]
        wires = list(rows)
        if len(wires) != self.n * self.d or (self.d > 1 and len(values) != self.n):
            raise ValueError(f"{len(wires)} numbers, but the circuit has {self.n} x {self.d} inputs")
        for wire, value in enumerate(wires):
            if not _all_within(value, (self.low, self.high)):
                raise ValueError(f"{self.name(wire)} = {value} is not within {self.low} and {self.high}")
        for gate in self.gates:
            if isinstance(gate, Product):
                wires.append(gate.left.evaluate(wires) * gate.right.evaluate(wires))
            else:
                wires.append(gate.form.evaluate(wires))
                if not _all_within(wires[-1], gate.within):
                    raise ValueError(
                        f"{self.describe(len(wires) - 1)} was promised to be within {gate.within[0]} and "
                        f"{gate.within[1]}, and is {wires[-1]}"
                    )
        return [form.evaluate(wires) for form in self.outputs]

    def bounds(self) -> list[Interval]:
        """The range of each wire, by interval arithmetic and promises.

        0 counts as a value of every input, since a compiled circuit runs at all positions of its row.

        Raises ValueError if a product, or a partial sum of a form, could be larger than 2^53, or if a promise
        cannot hold; names the wire.
        """
        bounds = [self.range] * (self.n * self.d)
        sizes = [largest(self.range)] * (self.n * self.d)
        for gate in self.gates:
            if isinstance(gate, Named):
                low, high = gate.form.interval(bounds)
                bounds.append((max(low, gate.within[0]), min(high, gate.within[1])))
                if bounds[-1][0] > bounds[-1][1]:
                    raise ValueError(
                        f"{self.describe(len(bounds) - 1)} is from {low} to {high}, and was promised to be "
                        f"within {gate.within[0]} and {gate.within[1]}"
                    )
            else:
                low, high = product_interval(gate.left.interval(bounds), gate.right.interval(bounds))
                bounds.append((max(low, 0), high) if gate.left == gate.right else (low, high))
            reached = max(largest(bounds[-1]), *(form.size(sizes) for form in forms_of(gate)))
            if reached > LARGEST:
                raise ValueError(too_large(self.describe(len(bounds) - 1), reached))
            sizes.append(largest(bounds[-1]))
        for place, form in enumerate(self.outputs):
            if (size := form.size(sizes)) > LARGEST:
                raise ValueError(too_large(f"output {place}, {show(form, self.name)},", size))
        return bounds


def forms_of(gate: Gate) -> tuple[Form, ...]:
    """The forms that a gate reads."""
    return (gate.form,) if isinstance(gate, Named) else (gate.left, gate.right)


def input_name(n: int, d: int, wire: int) -> str:
    """The name of a wire: `x[t]` or `x[t][j]` for an input, `g5` for a gate."""
    if wire >= n * d:
        return f"g{wire - n * d}"
    return f"x[{wire}]" if d == 1 else f"x[{wire // d}][{wire % d}]"


def show(form: Form, name: Callable[[int], str], most: int = 6) -> str:
    """A form as text; of one with many terms, the first."""
    terms = [
        f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight)} '}{name(wire)}"
        for wire, weight in form.weights.items()
    ]
    if len(terms) > most:
        terms = [*terms[:most], f"+ ... ({len(terms)} terms)"]
    if form.constant or not terms:
        terms.append(f"{'-' if form.constant < 0 else '+'} {abs(form.constant)}")
    return " ".join(terms).removeprefix("+ ")


def too_large(wire: str, reached: int) -> str:
    return (
        f"{wire} could reach {reached:.3g}, beyond 2^53, up to which fp64 holds every integer: narrow the "
        "inputs' range (low, high), or promise a range that you know by .within(low, high)"
    )


def _scaled(form: Form, factor: int) -> Form:
    weights = {wire: factor * weight for wire, weight in form.weights.items()} if factor else {}
    return Form(weights, factor * form.constant)


def _all_within(value: Any, interval: Interval) -> bool:
    inside = (interval[0] <= value) & (value <= interval[1])
    return bool(inside.all()) if hasattr(inside, "all") else bool(inside)


def _flattened(values: Any) -> Iterator[Any]:
    if hasattr(values, "tolist"):  # a NumPy array of symbols
        values = values.tolist()
    if isinstance(values, Sequence):
        for value in values:
            yield from _flattened(value)
    else:
        yield values


@dataclass(frozen=True, kw_only=True)
class CircuitReport:
    """The size of a circuit."""

    size: int
    """Products."""
    additions: int
    """Additions of all affine forms."""
    depth: int
    """Multiplicative depth."""


def report(circuit: Circuit) -> CircuitReport:
    """Size and depth of a circuit."""
    return CircuitReport(size=circuit.size, additions=circuit.additions, depth=circuit.depth)
