"""Circuits as stacks of BaseConv: every gate is a channel of Holdall's mixer `base-conv`, with exact weights.

`compile_circuit` takes any circuit, of size s and depth D, with n inputs of d numbers:

    layer 1         every input gets a channel, a register: a copy of its channel of the sequence
    layer 2         the copy of token t is shifted by n - 1 - t, so that all meet at the last token
    2 l + 1         of every product of depth l: its first form is written into a register
    2 l + 2         the register is multiplied, in place, by the second form
    2 D + 3         the outputs are written into the first channels, at the last token

    layers = 2 D + 3        width = d + the most registers in use at a time

A register is free after the last layer that reads it, and is overwritten as it is. `compile_formula` takes a
circuit in which everything is read once. It needs no layer for writing: to multiply form A by form B, A's
registers are multiplied in place by B, and const(A) B can still be read from B's.

    layers = D + 2          width = d + the inputs that are read

Either runs in fp64 without any rounding, since all values are integers below 2^53; what could be larger is
refused when it is compiled.

Letters: s products and D depth of the circuit; n inputs, tokens t, of d numbers; l the depth of a product; A
and B forms. Of shapes: B rows, N tokens (n), D channels (d), O outputs.

Source: Arora et al., "Zoology", 2023, arXiv 2312.04927, theorem 4.2: O~(s D) parameters and O~(D) layers. Its
proof writes a matrix as a product of sparse ones, which is what O~ is for; here P is dense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from holdall.theory.circuits import (
    LARGEST,
    Circuit,
    Form,
    Interval,
    Named,
    forms_of,
    largest,
    product_interval,
    too_large,
)
from holdall.theory.primitives import Layer, Stack
from holdall.theory.schedule import Schedule, with_shared_forms

GATHER = 2
"""Layers that bring all inputs to the last token."""


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """A compiled circuit beside what its kind of compiler promises."""

    size: int
    """Products of the circuit."""
    depth: int
    """Its multiplicative depth, D."""
    layers: int
    """Layers of the stack."""
    layers_promised: int
    """2 D + 3 for a circuit, D + 2 for a formula."""
    width: int
    """Channels of each layer."""
    width_promised: int
    """d + the most registers in use at a time; at least the number of outputs."""
    nonzeros: int
    """Weights that are not zero."""
    parameters: int
    """All weights, zeros included."""
    kernel: int
    """Taps of the longest filter: that which brings the inputs together."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A circuit, and a stack of BaseConv that computes it."""

    circuit: Circuit
    """What is computed, with a wire for each form that has a register."""
    stack: Stack
    """The layers."""
    heads: tuple[Form, ...]
    """Where each output is read, at the last token: an affine form of channels."""
    layers_promised: int
    """Layers by the compiler's formula."""
    width_promised: int
    """Channels by the compiler's formula."""

    def run(
        self, values: Tensor, progress: Callable[[int], None] | None = None, *, all_tokens: bool = False
    ) -> Tensor:
        """The outputs for rows of inputs, (B, O), int64.

        Args:
            values: integers, (B, n, d), or for d = 1 also (B, n). ValueError if they are not within the range
                of the circuit's inputs.
            progress: is called with the number of layers that are done.
            all_tokens: whether layers from the third on run at all tokens; by default at the last alone, for
                the same result, since their filters have a tap at lag 0 and no other.
        """
        circuit = self.circuit
        x_BND = values[..., None] if values.dim() == 2 and circuit.d == 1 else values
        if x_BND.dim() != 3 or x_BND.shape[1:] != (circuit.n, circuit.d):
            raise ValueError(
                f"inputs of shape {tuple(values.shape)}: the circuit takes (rows, {circuit.n}, {circuit.d})"
            )
        wrong = (x_BND < circuit.low) | (x_BND > circuit.high) | (x_BND != x_BND.round())
        if wrong.any():
            raise ValueError(
                f"input {x_BND[wrong][0].item():g}: the circuit was compiled for integers from "
                f"{circuit.low} to {circuit.high}"
            )
        if all_tokens:
            last_BD = self.stack.run(x_BND, progress)[:, -1]
        else:
            gathered_B1D = Stack(self.stack.layers[:GATHER]).run(x_BND)[:, -1:]
            last_BD = gathered_B1D[:, 0]
            if rest := self.stack.layers[GATHER:]:
                later = None if progress is None else lambda done: progress(GATHER + done)
                last_BD = Stack(rest).run(gathered_B1D, later)[:, 0]
        y_BO = torch.stack(
            [
                sum((weight * last_BD[:, channel] for channel, weight in head.weights.items()),
                    torch.full_like(last_BD[:, 0], head.constant))
                for head in self.heads
            ], dim=1,
        )  # fmt: skip
        if not torch.equal(y_BO, y_BO.round()):
            fractions = y_BO[y_BO != y_BO.round()]
            raise ArithmeticError(f"a compiled circuit computed a fraction, {fractions[0].item()}")
        return y_BO.long()

    def draw(self, rows: int, seed: int = 0) -> Tensor:
        """Random inputs within the circuit's range, (B, n, d), int64."""
        rng = torch.Generator().manual_seed(seed)
        shape = (rows, self.circuit.n, self.circuit.d)
        return torch.randint(self.circuit.low, self.circuit.high + 1, shape, generator=rng)

    def error(self, values: Tensor, progress: Callable[[int], None] | None = None) -> int:
        """The largest difference of the stack's outputs from the circuit's in Python's integers.

        Args:
            values: rows of inputs, (B, n, d).
        """
        y_BO = self.run(values, progress)
        worst = 0
        for row, outputs in zip(values.tolist(), y_BO.tolist(), strict=True):
            tokens = row if self.circuit.d > 1 or not isinstance(row[0], list) else [t[0] for t in row]
            truth = self.circuit.evaluate(tokens)
            worst = max([worst, *(abs(y - t) for y, t in zip(outputs, truth, strict=True))])
        return worst

    def report(self) -> CompileReport:
        """Size, depth, layers and width, beside what is promised."""
        size = self.stack.report()
        return CompileReport(
            size=self.circuit.size,
            depth=self.circuit.depth,
            layers=size.layers,
            layers_promised=self.layers_promised,
            width=size.width,
            width_promised=self.width_promised,
            nonzeros=size.nonzeros,
            parameters=size.parameters,
            kernel=size.kernel,
        )


# ----------------------------------------------------------------------------------------------- layers


class _Task(NamedTuple):
    """What one layer does to one channel."""

    channel: int
    form: Form
    """Of channels."""
    multiply: bool
    """Whether the channel is multiplied by the form, or overwritten with it."""
    size: int
    """The largest absolute value that the channel has afterwards."""
    name: str
    """What is computed, for errors."""


class _Builder:
    """Adds layers, each value bounded so that fp64 holds it exactly.

    Attributes:
        layers: those that are there.
        sizes: of each channel, the largest absolute value of its content.
    """

    def __init__(self, circuit: Circuit, width: int) -> None:
        self.width = width
        self.layers: list[Layer] = []
        self.sizes = [largest(circuit.range)] * circuit.d + [0] * (width - circuit.d)

    def gather(self, circuit: Circuit, channels: Mapping[int, int]) -> None:
        """The first two layers: each input wire's channel gets its value, at the last token."""
        copy, shift = Layer(self.width), Layer(self.width)
        for wire, channel in channels.items():
            copy.affine(channel, {wire % circuit.d: 1})
            shift.shift(channel, circuit.n - 1 - wire // circuit.d)
            self.sizes[channel] = largest(circuit.range)
            self._check(2 * self.sizes[channel], circuit.name(wire))  # (x[t - s] - x[t]) + x[t]
        self.layers += [copy, shift]

    def add(self, tasks: Iterable[_Task]) -> None:
        """One more layer; all tasks read what was there before it."""
        layer, sizes = Layer(self.width), list(self.sizes)
        for channel, form, multiply, size, name in tasks:
            read, had = form.size(self.sizes), self.sizes[channel]
            # a layer computes x (form - 1) + x for a product, and (form - x) + x to overwrite x
            self._check(had * (read + 1) if multiply else read + had, name)
            if multiply:
                layer.product(channel, form.weights, form.constant)
            else:
                layer.affine(channel, form.weights, form.constant)
            sizes[channel] = size
        self.layers.append(layer)
        self.sizes = sizes

    @staticmethod
    def _check(reached: int, name: str) -> None:
        if reached > LARGEST:
            raise ValueError(too_large(f"in computing {name}, a layer's sum", reached))


def _moved(form: Form, at: Mapping[int, int]) -> Form:
    return Form({at[wire]: weight for wire, weight in form.weights.items()}, form.constant)


# --------------------------------------------------------------------------------------------- circuits


def compile_circuit(circuit: Circuit, *, registers: bool = True) -> Compiled:
    """Any circuit, in 2 depth + 3 layers.

    Args:
        circuit: refused (ValueError, naming the wire) if a value could leave the integers that fp64 holds.
        registers: whether affine forms get registers of their own, those of `Symbol.within` and those of four
            or more wires that are read twice or more. They are written beside the products of the next
            depth. Without, whatever reads them reads their wires instead, which takes more weights and as a
            rule keeps more registers in use.
    """
    bounds = circuit.bounds()
    if registers:
        circuit = with_shared_forms(circuit)
        bounds = circuit.bounds()
    schedule = Schedule(circuit, registers)
    outputs = len(circuit.outputs)
    registers_of, used = schedule.allocate()
    width = max(circuit.d + used, outputs)
    at = {wire: circuit.d + register for wire, register in registers_of.items()}
    builder = _Builder(circuit, width)
    builder.gather(circuit, {wire: at[wire] for wire in schedule.lives if wire < circuit.n * circuit.d})
    for number in range(3, schedule.out):
        builder.add(
            _Task(
                channel=at[wire],
                form=_moved(form, at),
                multiply=number % 2 == 0,
                # the first form of a product has bounds of its own until it is multiplied
                size=largest(form.interval(bounds) if schedule.is_half(wire, number) else bounds[wire]),
                name=circuit.describe(wire),
            )
            for wire, form in schedule.steps[number]
        )
    builder.add(
        _Task(channel=k, form=_moved(form, at), multiply=False, size=0, name=f"output {k}")
        for k, form in schedule.steps[schedule.out]
    )
    return Compiled(
        circuit=circuit,
        stack=Stack(builder.layers),
        heads=tuple(Form({channel: 1}, 0) for channel in range(outputs)),
        layers_promised=2 * circuit.depth + 3,
        width_promised=max(circuit.d + schedule.most_live, outputs),
    )


# --------------------------------------------------------------------------------------------- formulas


def compile_formula(circuit: Circuit) -> Compiled:
    """A circuit in which every input and gate is read at most once, in depth + 2 layers.

    The outputs are read by a head, as affine forms of registers. Raises ValueError for a circuit that reads a
    wire twice, and as `compile_circuit` for values that fp64 may not hold.
    """
    circuit.bounds()
    reads = _reads(circuit)
    if twice := read_twice(circuit):
        raise ValueError(
            f"{circuit.describe(twice[0])} is read {reads[twice[0]]} times; a formula reads every wire "
            "once: use compile_circuit, which takes any circuit"
        )
    first = circuit.n * circuit.d
    at = {wire: circuit.d + k for k, wire in enumerate(sorted(wire for wire in reads if wire < first))}
    # of each wire, its value as a form of channels
    values = [Form({at[wire]: 1}, 0) if wire in at else Form({}, 0) for wire in range(first)]
    builder = _Builder(circuit, circuit.d + len(at))
    builder.gather(circuit, at)
    by_layer: dict[int, list[_Task]] = {}
    bounds: list[Interval] = [circuit.range] * builder.width
    for wire, gate in enumerate(circuit.gates, first):
        forms = [_substituted(form, values) for form in forms_of(gate)]
        if isinstance(gate, Named):
            values.append(forms[0])
            continue
        # fewer weights: each of A's registers takes all of B's
        a, b = sorted(forms, key=lambda form: (len(form.weights), bool(form.constant)))
        factor = b.interval(bounds)
        for channel in a.weights:
            bounds[channel] = product_interval(bounds[channel], factor)
            task = _Task(channel, b, True, largest(bounds[channel]), circuit.describe(wire))
            by_layer.setdefault(circuit.depths[wire] + 2, []).append(task)
        left_over = {channel: a.constant * weight for channel, weight in b.weights.items() if a.constant}
        values.append(Form({**a.weights, **left_over}, a.constant * b.constant))
    for number in range(3, circuit.depth + 3):
        builder.add(by_layer[number])
    heads = tuple(_substituted(form, values) for form in circuit.outputs)
    for place, head in enumerate(heads):
        if (reached := head.size(builder.sizes)) > LARGEST:
            raise ValueError(too_large(f"output {place}", reached))
    return Compiled(
        circuit=circuit,
        stack=Stack(builder.layers),
        heads=heads,
        layers_promised=circuit.depth + 2,
        width_promised=circuit.d + sum(wire < first for wire in reads),
    )


def _reads(circuit: Circuit) -> Counter[int]:
    """How many forms read each wire, the outputs included."""
    return Counter(
        wire
        for forms in (*map(forms_of, circuit.gates), circuit.outputs)
        for form in forms
        for wire in form.weights
    )


def read_twice(circuit: Circuit) -> list[int]:
    """The wires that more than one form reads; a formula has none."""
    return sorted(wire for wire, count in _reads(circuit).items() if count > 1)


def _substituted(form: Form, values: Sequence[Form]) -> Form:
    """A form of wires, as a form of what these are forms of. No two wires share a channel in a formula."""
    weights = {
        channel: weight * inner
        for wire, weight in form.weights.items()
        for channel, inner in values[wire].weights.items()
    }
    constant = form.constant + sum(weight * values[wire].constant for wire, weight in form.weights.items())
    return Form(weights, constant)
