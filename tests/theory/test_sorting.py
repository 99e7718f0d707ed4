"""Recall as a circuit: both circuits answer every row, in the products and the depth that are claimed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdall.tasks.mqar import MQAR
from holdall.theory.circuits import Circuit
from holdall.theory.compile import compile_circuit
from holdall.theory.sorting import (
    Recall,
    all_pairs,
    bitonic_sort,
    by_sorting,
    greater,
    segmented_scan,
    wrong_rows,
)

# pairs (as many questions), bits of keys and of values; products and depth by sorting, and of all pairs
TABLE = [
    (2, 2, (91, 19), (20, 3)),
    (4, 3, (593, 48), (128, 4)),
    (8, 4, (2_710, 83), (704, 4)),
    (16, 5, (10_351, 150), (3_584, 5)),
    pytest.param(64, 7, (113_481, 280), (81_920, 5), marks=pytest.mark.full),
    pytest.param(128, 8, (333_770, 367), (376_832, 5), marks=pytest.mark.full),
]


def recall_of(pairs: int, bits: int) -> Recall:
    return Recall(pairs=pairs, questions=pairs, key_bits=bits, value_bits=bits)


@pytest.mark.parametrize(("pairs", "bits", "sort", "all"), TABLE)
def test_products_depth_and_no_wrong_row(
    pairs: int, bits: int, sort: tuple[int, int], all: tuple[int, int]
) -> None:
    recall = recall_of(pairs, bits)
    x_BND, answers_BM = recall.rows(200, seed=pairs)
    for make, size in ((all_pairs, all), (by_sorting, sort)):
        circuit = make(recall)
        assert (circuit.size, circuit.depth) == size
        assert wrong_rows(circuit, x_BND, answers_BM) == 0
    assert all == (pairs * pairs * (3 * bits - 1), 2 + math.ceil(math.log2(bits)))


@pytest.mark.parametrize(
    ("pairs", "bits", "layers", "width", "inline"),
    [
        (2, 2, 41, 36, 56),
        (4, 3, 99, 115, 296),
        pytest.param(8, 4, 169, 300, 1208, marks=pytest.mark.full),
    ],
)
def test_sorting_runs_as_layers_of_base_conv(
    pairs: int, bits: int, layers: int, width: int, inline: int
) -> None:
    recall = recall_of(pairs, bits)
    x_BND, answers_BM = recall.rows(20, seed=1)
    circuit = by_sorting(recall)
    for registers, wide in ((True, width), (False, inline)):
        compiled = compile_circuit(circuit, registers=registers)
        assert (len(compiled.stack.layers), compiled.stack.width) == (layers, wide)
        assert torch.equal(compiled.run(x_BND), answers_BM)


@pytest.mark.full
def test_sixteen_pairs_compile_to_the_widths_of_the_page() -> None:
    recall = recall_of(16, 5)
    sizes = [compile_circuit(make(recall)).report() for make in (by_sorting, all_pairs)]
    assert [(size.layers, size.width) for size in sizes] == [(303, 741), (13, 1_525)]


def test_the_page_has_these_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "theory.md").read_text()
    rows = [
        re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if re.match(r"\| \d+ \| \d \|", line)
    ]
    found = [[int(cell.replace(",", "") or 0) for cell in row] for row in rows]
    table = [getattr(row, "values", row) for row in TABLE]
    assert [(row[0], row[1], (row[2], row[3]), (row[6], row[7])) for row in found] == table
    compiled = [(row[3], row[4], row[7], row[8]) for row in found if row[4]]
    assert all((by == 2 * sort + 3) and (also == 2 * pairs + 3) for sort, by, pairs, also in compiled)
    assert [row[5] for row in found[:3]] == [36, 115, 300]  # as in the tests above


@pytest.mark.parametrize(("pairs", "bits", "layers"), [(2, 2, 9), (4, 3, 11), (8, 4, 11)])
def test_all_pairs_run_as_layers_of_base_conv(pairs: int, bits: int, layers: int) -> None:
    recall = recall_of(pairs, bits)
    x_BND, answers_BM = recall.rows(50, seed=2)
    compiled = compile_circuit(all_pairs(recall))
    assert len(compiled.stack.layers) == layers
    assert torch.equal(compiled.run(x_BND, all_tokens=pairs < 8), answers_BM)


@pytest.mark.parametrize("make", [all_pairs, by_sorting])
def test_rows_of_mqar_are_answered(make: Callable[[Recall], Circuit]) -> None:
    """The task's own rows: what stands between the questions asks nothing."""
    task = MQAR(vocab=16, length=24, pairs=4, filler="key-free")
    recall = recall_of(4, 3)
    batch = task.generate(100, seed=3)
    x_BND, answers_BM = recall.rows_of(task, batch)
    assert wrong_rows(make(recall), x_BND, answers_BM) == 0
    bits = 2 ** torch.arange(2, -1, -1)
    assert torch.equal((answers_BM.unflatten(1, (4, 3)) * bits).sum(-1) + 8, batch.answers)
    with pytest.raises(ValueError, match="have pairs, questions and bits"):
        recall_of(2, 2).rows_of(task, batch)


@pytest.mark.parametrize(
    "sizes",
    [
        {"pairs": 3, "questions": 2, "key_bits": 2, "value_bits": 4},
        {"pairs": 1, "questions": 1, "key_bits": 1, "value_bits": 1},
        {"pairs": 2, "questions": 5, "key_bits": 3, "value_bits": 1},
    ],
)
@pytest.mark.parametrize("make", [all_pairs, by_sorting])
def test_other_sizes(make: Callable[[Recall], Circuit], sizes: dict[str, int]) -> None:
    recall = Recall(**sizes)
    x_BND, answers_BM = recall.rows(100, seed=4)
    circuit = make(recall)
    assert wrong_rows(circuit, x_BND, answers_BM) == 0
    assert torch.equal(compile_circuit(circuit).run(x_BND), answers_BM)


def test_wrong_rows_are_counted() -> None:
    recall = recall_of(2, 2)
    x_BND, answers_BM = recall.rows(30)
    answers_BM[[3, 3, 7], [0, 1, 2]] ^= 1
    assert wrong_rows(all_pairs(recall), x_BND, answers_BM) == 2


def test_too_many_pairs_for_their_keys() -> None:
    with pytest.raises(ValueError, match="5 pairs need distinct keys, and there are 4 of key_bits 2: raise"):
        Recall(pairs=5, key_bits=2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_greater_of_all_numbers(bits: int) -> None:
    circuit = Circuit.trace(lambda x: greater(x[:bits], x[bits:]), 2 * bits, low=0, high=1)
    for values in itertools.product((0, 1), repeat=2 * bits):
        assert circuit.evaluate(values) == [int(values[:bits] > values[bits:])]
    assert circuit.depth == 1 + math.ceil(math.log2(bits))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_network_sorts_all_zeros_and_ones(count: int) -> None:
    """And therefore everything: the zero-one principle."""
    circuit = Circuit.trace(lambda x: bitonic_sort([[bit] for bit in x], 1), count, low=0, high=1)
    rows = np.array(list(itertools.product((0, 1), repeat=count)))
    sorted_rows = np.stack([np.broadcast_to(y, len(rows)) for y in circuit.evaluate(list(rows.T))], axis=1)
    assert (sorted_rows == np.sort(rows, axis=1)).all()


def test_records_move_as_a_whole() -> None:
    def sort(x: list[Any]) -> Any:
        return bitonic_sort([x[k : k + 4] for k in range(0, 16, 4)], 2)

    rng = np.random.default_rng(0)
    circuit = Circuit.trace(sort, 16, low=0, high=1)
    for _ in range(50):
        keys = [divmod(int(key), 2) for key in rng.permutation(4)]  # distinct, or the order is not unique
        records = [[*key, *map(int, rng.integers(0, 2, 2))] for key in keys]
        assert circuit.evaluate([*itertools.chain(*records)]) == [*itertools.chain(*sorted(records))]
    with pytest.raises(ValueError, match="3 records: a bitonic network sorts a power of two"):
        bitonic_sort([[0], [1], [0]], 1)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_scan_carries_the_last_value_that_starts_a_segment(count: int) -> None:
    circuit = Circuit.trace(
        lambda x: segmented_scan(x[:count], [[v * f] for f, v in zip(x[:count], x[count:], strict=True)]),
        2 * count, low=0, high=1,
    )  # fmt: skip
    rows = np.array(list(itertools.product((0, 1), repeat=2 * count)))
    found = np.stack([np.broadcast_to(y, len(rows)) for y in circuit.evaluate(list(rows.T))], axis=1)
    for values, row in zip(rows.tolist(), found.tolist(), strict=True):
        carried, wanted = 0, []
        for start, value in zip(values[:count], values[count:], strict=True):
            carried = value if start else carried
            wanted.append(carried)
        assert row == wanted
