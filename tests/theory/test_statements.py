"""Statements that no construction of its own is about: degrees, reductions, linear attention as a circuit."""

import itertools
import random

import numpy as np
import pytest
import torch

from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.theory.circuits import Circuit
from holdall.theory.compile import compile_circuit
from holdall.theory.degree import degree_along, degree_of_bits
from holdall.theory.floors import layers_floor_binary, layers_floor_p_hot
from holdall.theory.reductions import disjoint_by_recall, recall_by_disjointness

# --------------------------------------------------------------------------------------------------- degree


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_layers_are_polynomials_whose_degree_doubles(layers: int) -> None:
    torch.manual_seed(layers)
    stack = []
    for _ in range(layers):
        mixer = BaseConvConfig(width=3, kernel=2).build().double()
        for parameter in mixer.parameters():
            parameter.data = torch.randint(-1, 2, parameter.shape).double()
        mixer.weight_DW.data[:, 0] = 1.0
        mixer.projection.weight.data.copy_(torch.ones(3, 3))
        stack.append(mixer)
    along_1TD = torch.tensor([[[1.0, 0, 1], [0, 1, 1], [1, 1, 0]]]).double()

    @torch.no_grad()
    def at(t: int) -> torch.Tensor:
        x_1TD = t * along_1TD
        for mixer in stack:
            x_1TD, _ = mixer(x_1TD)
        return x_1TD

    assert degree_along(at, 2**layers) == 2**layers
    if layers:
        with pytest.raises(ValueError, match="above"):
            degree_along(at, 2**layers - 1)


@pytest.mark.parametrize("digits", [1, 2, 3, 4, 5])
def test_equality_of_bits_takes_all_of_them(digits: int) -> None:
    """So at least ceil(log2(2 d)) layers: for 2^d tokens the floor of binary codes."""

    def equal(bits: list[int]) -> int:
        return int(bits[:digits] == bits[digits:])

    assert degree_of_bits(equal, 2 * digits) == 2 * digits
    assert 2 ** layers_floor_binary(2**digits) >= 2 * digits > 2 ** (layers_floor_binary(2**digits) - 1)


@pytest.mark.parametrize(("digits", "size"), [(1, 2), (1, 3), (2, 2), (2, 3)])
def test_equality_of_digits_takes_two_for_each(digits: int, size: int) -> None:
    """A p-hot code is equal where each digit is: a product of p sums of products. No lower degree does it on
    these codes alone: along the line that turns every digit of both from one value to the other."""

    def equal(bits: list[int]) -> int:
        one, other = (np.reshape(half, (digits, size)) for half in np.split(np.array(bits), 2))
        return int(np.prod((one * other).sum(1)))

    assert degree_of_bits(equal, 2 * digits * size) == 2 * digits
    assert 2 ** layers_floor_p_hot(digits) <= 2 * digits
    codes = [np.eye(size, dtype=int)[list(word)] for word in itertools.product(range(size), repeat=digits)]
    for one, other in itertools.product(codes, codes):
        assert equal([*one.flatten(), *other.flatten()]) == int((one == other).all())


def test_degrees_of_known_functions() -> None:
    assert degree_along(lambda t: torch.tensor([3.0 * t**2 - t, 7.0]), 5) == 2
    assert degree_along(lambda t: torch.zeros(2), 3) == 0
    assert degree_of_bits(lambda bits: sum(bits) % 2, 4) == 4
    assert degree_of_bits(lambda bits: bits[0] + bits[2], 3) == 1
    assert degree_of_bits(lambda bits: 0, 2) == 0


# ----------------------------------------------------------------------------------------------- reductions


def recall(pairs: list[tuple[int, int]], questions: list[int]) -> list[int | None]:
    return [dict(pairs).get(question) for question in questions]


def test_recall_decides_disjointness_in_one_call() -> None:
    calls = []

    def counted(pairs: list[tuple[int, int]], questions: list[int]) -> list[int | None]:
        calls.append(1)
        return recall(pairs, questions)

    disjoint, rng = disjoint_by_recall(counted), random.Random(0)
    seen = set()
    for _ in range(200):
        first, second = (set(rng.sample(range(12), rng.randint(0, 5))) for _ in range(2))
        assert disjoint(first, second) == first.isdisjoint(second)
        seen.add(first.isdisjoint(second))
    assert (len(calls), seen) == (200, {True, False})


@pytest.mark.parametrize("values", [1, 2, 5, 16])
def test_disjointness_recalls_in_a_call_for_each_bit(values: int) -> None:
    calls = []

    def counted(first: set[int], second: set[int]) -> bool:
        calls.append(1)
        return set(first).isdisjoint(second)

    rng = random.Random(1)
    for _ in range(50):
        pairs = [(key, rng.randrange(values)) for key in rng.sample(range(20), rng.randint(0, 8))]
        questions = [rng.randrange(20) for _ in range(4)]
        calls.clear()
        answers = recall_by_disjointness(counted, values)(pairs, questions)
        assert answers == recall(pairs, questions)
        bits = (values - 1).bit_length()
        assert len(calls) == sum(1 if answer is None else 1 + bits for answer in answers)


def test_each_of_them_by_way_of_the_other() -> None:
    again = disjoint_by_recall(recall_by_disjointness(lambda a, b: set(a).isdisjoint(b), 32))
    assert again({3, 17}, {4, 31})
    assert not again({3, 17}, {17})


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 3"):
        recall_by_disjointness(lambda a, b: True, 4)([(1, 4)], [1])


# --------------------------------------------------------------------------- linear attention by convolution


def test_base_conv_simulates_linear_attention_exactly() -> None:
    """Proposition F.8 of "Based", with the layers that it takes here: products of queries and keys, then of
    these and values, whatever the length."""
    torch.manual_seed(0)
    config = LinearAttentionConfig(
        width=2, heads=1, feature_dim=2, feature_map="identity", normalise=False
    )  # fmt: skip
    mixer = config.build().double()
    for parameter in mixer.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape).double()
    weights = {name: parameter.detach().long().numpy() for name, parameter in mixer.named_parameters()}

    def attention(rows):
        """Of all tokens, by the mixer's own weights."""
        x_TD = np.array(rows, dtype=object)
        q_TK, k_TK, v_TV = np.split(x_TD @ weights["qkv.weight"].T, 3, axis=1)
        y_TV = [sum(v_TV[j] * (q @ k_TK[j]) for j in range(t + 1)) for t, q in enumerate(q_TK)]
        return [list(y @ weights["out_proj.weight"].T) for y in y_TV]

    for length in (3, 5):
        circuit = Circuit.trace(attention, length, 2, low=-3, high=3)
        compiled = compile_circuit(circuit)
        assert circuit.depth == 2
        assert compiled.report().layers == 7
        rows_BTD = compiled.draw(20)
        assert compiled.error(rows_BTD) == 0
        y_BTD, _ = mixer(rows_BTD.double())
        assert torch.equal(compiled.run(rows_BTD).double().flatten(), y_BTD.detach().flatten())
