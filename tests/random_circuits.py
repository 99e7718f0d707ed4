"""Random circuits and formulas for tests."""

from __future__ import annotations

import random
from typing import Any

from holdall.theory.circuits import Circuit, Symbol
from holdall.theory.compile import Compiled, compile_circuit


def flat(x: Any) -> list[Symbol]:
    """All inputs of a circuit, whether they have channels or not."""
    return [symbol for token in x for symbol in (token if isinstance(token, list) else [token])]


def form(rng: random.Random, wires: list[Symbol], most: int = 3) -> Any:
    """An affine form of a few wires, with coefficients from -2 to 2."""
    total: Any = rng.randint(-2, 2)
    for wire in rng.sample(wires, min(len(wires), rng.randint(1, most))):
        total = total + wire * rng.choice([-2, -1, 1, 2])
    return total


def circuit(seed: int, *, named: bool = True) -> Circuit:
    """Up to 8 products, of any earlier wires, some of which get a wire of their own."""
    rng = random.Random(seed)
    n, d = rng.randint(1, 5), rng.randint(1, 3)
    wires = flat(Circuit.inputs(n, d, low=rng.randint(-2, 0), high=rng.randint(1, 3)))
    for _ in range(rng.randint(0, 8)):
        wires.append(form(rng, wires) * form(rng, wires))
        if named and rng.random() < 0.4:
            wires.append(form(rng, wires, most=4).within(-(10**40), 10**40))
    return Circuit.of([form(rng, wires) for _ in range(rng.randint(1, 4))])


def compiled(seed: int, *, registers: bool = True) -> Compiled | None:
    """A random circuit, compiled; None for one of the few whose numbers grow too large."""
    made = circuit(seed)
    try:
        return compile_circuit(made, registers=registers)
    except ValueError as refusal:
        if "beyond 2^53" not in str(refusal):
            raise
        return None


def formula(seed: int, inputs: int) -> Circuit:
    """Every input is read once: a random tree of products and sums, with constants."""
    rng = random.Random(seed)
    parts: list[Any] = Circuit.inputs(inputs, low=-2, high=2)
    rng.shuffle(parts)
    while len(parts) > 1:
        one, other = parts.pop(rng.randrange(len(parts))), parts.pop(rng.randrange(len(parts)))
        one, other = one + rng.randint(-1, 1), other * rng.choice([-1, 1, 2])
        parts.append(one * other if rng.random() < 0.7 else one + other)
    return Circuit.of(parts)
