"""Registers for a circuit's wires: which layer writes each, which reads it last, and what forms get one.

A product of depth l is written by layer 2 l + 1 and multiplied by layer 2 l + 2; an affine form with a wire
of its own, whose wires have depth l at most, is written by layer 2 l + 3, beside the products of depth l + 1.
So none takes a layer of its own: what reads a form before that, reads the form's wires.

Letters: l the depth of a wire, in products.
"""

from __future__ import annotations

import heapq
from collections import Counter

from holdall.theory.circuits import Circuit, Form, Named, Product, Tape, forms_of

SHARED = 4
"""An affine form of so many wires that is read more than once gets a register of its own."""


def with_shared_forms(circuit: Circuit, least: int = SHARED) -> Circuit:
    """The same circuit, with a wire of its own for each affine form of many wires that is read repeatedly.

    Forms that differ by a constant are one. Products and depth stay the same; bounds too, since the range of
    such a wire is its form's.
    """
    forms = [form for gate in circuit.gates for form in forms_of(gate)] + list(circuit.outputs)
    reads = Counter(_sum_of(form) for form in forms if len(form.weights) >= least)
    if not any(count > 1 for count in reads.values()):
        return circuit
    tape = Tape(circuit.n, circuit.d, circuit.low, circuit.high)
    bounds = circuit.bounds()
    moved: list[Form] = [Form({wire: 1}, 0) for wire in range(circuit.n * circuit.d)]

    def rewritten(form: Form) -> Form:
        weights = {next(iter(moved[wire].weights)): weight for wire, weight in form.weights.items()}
        if reads[_sum_of(form)] < 2:
            return Form(weights, form.constant)
        interval = Form(form.weights, 0).interval(bounds)
        return Form(tape.named(Form(weights, 0), interval).weights, form.constant)

    for gate in circuit.gates:
        if isinstance(gate, Product):
            moved.append(tape.product(rewritten(gate.left), rewritten(gate.right)))
        else:
            moved.append(tape.named(rewritten(gate.form), gate.within))
    return Circuit(tape, [rewritten(form) for form in circuit.outputs])


def _sum_of(form: Form) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(form.weights.items()))


class Schedule:
    """Which layer computes what, and from when to when a wire needs a register.

    Attributes:
        out: the last layer, which writes the outputs.
        steps: of each layer from the third, what it writes, or in even layers multiplies, as pairs of a wire
            (or in the last layer an output's place) and a form of wires that are in registers then.
        lives: of each wire that has a register, the layer that writes it and the last one that reads it.
    """

    def __init__(self, circuit: Circuit, registers: bool = True) -> None:
        self.circuit, self.registers = circuit, registers
        self.first, self.out = circuit.n * circuit.d, 2 * circuit.depth + 3
        self.steps: dict[int, list[tuple[int, Form]]] = {layer: [] for layer in range(3, self.out + 1)}
        self._last_read: dict[int, int] = {}
        for place, form in enumerate(circuit.outputs):
            self._step(self.out, place, self.expanded(form, self.out))
        # from the last to the first: a gate that nothing reads, once forms are expanded, is not computed
        for wire in range(self.first + len(circuit.gates) - 1, self.first - 1, -1):
            if wire not in self._last_read:
                continue
            gate, layer = circuit.gates[wire - self.first], self.written(wire)
            if isinstance(gate, Named):
                self._step(layer, wire, self.expanded(gate.form, layer))
                continue
            # of the two orders, the one that reads less: the second form can read more registers
            orders = [
                (self.expanded(one, layer), self.expanded(other, layer + 1))
                for one, other in ((gate.left, gate.right), (gate.right, gate.left))
            ]
            one, other = min(orders, key=lambda forms: sum(len(form.weights) for form in forms))
            self._step(layer, wire, one)
            self._step(layer + 1, wire, other)
        self.lives = {wire: (self.written(wire), last) for wire, last in sorted(self._last_read.items())}

    def written(self, wire: int) -> int:
        """The layer that writes a wire's register: its first form, if it is a product."""
        if wire < self.first:
            return 1
        depth = self.circuit.depths[wire]
        return 2 * depth + (3 if isinstance(self.circuit.gates[wire - self.first], Named) else 1)

    def is_half(self, wire: int, layer: int) -> bool:
        """Whether the layer writes the first form of a product, to be multiplied by the next layer."""
        return layer % 2 == 1 and isinstance(self.circuit.gates[wire - self.first], Product)

    def expanded(self, form: Form, layer: int) -> Form:
        """The form, with named forms that are in no register when the layer reads replaced by their wires."""
        weights, constant = dict(form.weights), form.constant
        waiting = [-wire for wire in weights if self._is_open(wire, layer)]
        heapq.heapify(waiting)
        while waiting:  # the latest first, so that all that reads a wire is replaced before it
            wire = -heapq.heappop(waiting)
            factor, gate = weights.pop(wire), self.circuit.gates[wire - self.first]
            assert isinstance(gate, Named)
            constant += factor * gate.form.constant
            for part, weight in gate.form.weights.items():
                if part not in weights and self._is_open(part, layer):
                    heapq.heappush(waiting, -part)
                weights[part] = weights.get(part, 0) + factor * weight
        return Form({wire: weight for wire, weight in weights.items() if weight}, constant)

    def _is_open(self, wire: int, layer: int) -> bool:
        if wire < self.first or isinstance(self.circuit.gates[wire - self.first], Product):
            return False
        return not self.registers or self.written(wire) >= layer

    def _step(self, layer: int, wire: int, form: Form) -> None:
        self.steps[layer].append((wire, form))
        for read in form.weights:
            self._last_read[read] = max(layer, self._last_read.get(read, 0))

    @property
    def most_live(self) -> int:
        """The most registers in use at a time: a layer reads before it writes."""
        changes: Counter[int] = Counter()
        for written, last_read in self.lives.values():
            changes[written] += 1
            changes[last_read] -= 1
        live = most = 0
        for layer in sorted(changes):
            live += changes[layer]
            most = max(most, live)
        return most

    def allocate(self) -> tuple[dict[int, int], int]:
        """A register for each wire, the lowest that is free; and how many there are."""
        begins: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for wire, (written, last_read) in self.lives.items():
            begins.setdefault(written, []).append(wire)
            ends.setdefault(last_read, []).append(wire)
        place: dict[int, int] = {}
        free: list[int] = []
        used = 0
        for layer in range(1, self.out + 1):
            for wire in ends.get(layer, []):
                heapq.heappush(free, place[wire])
            for wire in begins.get(layer, []):
                if not free:
                    heapq.heappush(free, used)
                    used += 1
                place[wire] = heapq.heappop(free)
        return place, used
