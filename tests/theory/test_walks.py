"""What the page of recall by hand shows is what the models compute."""

import pytest
import torch

from holdall.tasks.mqar import Batch
from holdall.theory import by_hand, walks


@pytest.fixture(scope="module")
def rows() -> Batch:
    return walks.row()


@pytest.fixture(scope="module")
def trio(rows: Batch) -> tuple[walks.Walk, ...]:
    return walks.walks_of(rows)


def grid(walk: walks.Walk, words: str) -> torch.Tensor:
    (found,) = (step.grid_TJ for step in walk.steps if words in step.grid_says)
    assert found is not None
    return found


def test_the_row_asks_at_distances_that_are_far_apart(rows: Batch) -> None:
    assert rows.tags.distance[0].tolist() == [4, 10, 12, 18]
    assert torch.equal(walks.row().tokens, rows.tokens)


def test_all_of_them_answer_the_row(trio: tuple[walks.Walk, ...], rows: Batch) -> None:
    for walk in trio:
        assert torch.equal(walk.answers_K, rows.answers[0])
        assert walk.steps[-1].answered
        assert [step.answered for step in walk.steps[:-1]] == [False] * (len(walk.steps) - 1)
        assert {step.layer for step in walk.steps} - {None} <= set(range(len(walk.activations_LDT)))
        assert walk.activations_LDT[0].shape == (walk.report.width, walks.LENGTH)


def test_each_looks_from_a_question_to_its_value(trio: tuple[walks.Walk, ...], rows: Batch) -> None:
    attention, table, convolution = trio
    at_K, key_K = rows.positions[0], 2 * rows.places[0]
    weights_TJ = grid(attention, "attention weights")
    assert (weights_TJ[at_K, key_K + 1] > 0.99).all()
    assert torch.allclose(weights_TJ.sum(1), torch.ones(walks.LENGTH, dtype=torch.float64))
    before_TJ = torch.ones(walks.LENGTH - 1, dtype=torch.float64).diag(-1)
    assert torch.equal(grid(attention, "second code"), before_TJ)
    assert torch.equal(grid(table, "one token back")[1:], before_TJ[1:])
    assert torch.equal(grid(table, "q·k")[at_K, key_K + 1], torch.ones(4, dtype=torch.float64))
    same_TJ = (rows.tokens[0][:, None] == rows.tokens[0]).double().tril(-1)
    assert torch.equal(grid(convolution, "two tokens are the same"), same_TJ)
    reach_TJ = torch.ones(walks.LENGTH, walks.LENGTH, dtype=torch.float64).tril(-1)
    assert torch.equal(grid(convolution, "beside it"), reach_TJ)
    codes_VE = by_hand.p_hot(walks.VOCAB, 5)[rows.tokens[0]]
    assert torch.equal(grid(convolution, "agree"), (codes_VE @ codes_VE.T / 5).tril(-1))


def test_the_table_holds_the_values_read_so_far(trio: tuple[walks.Walk, ...], rows: Batch) -> None:
    table_TLF, tokens = trio[1].table_TLF, rows.tokens[0].tolist()
    assert table_TLF is not None
    signs, wanted_LF = by_hand.signs(walks.VOCAB).double(), torch.zeros_like(table_TLF[0])
    for t, (before, now) in enumerate(zip([0, *tokens], tokens, strict=False)):
        if 0 < before < 16 <= now:
            wanted_LF[before] += signs[now]
        assert torch.equal(table_TLF[t], wanted_LF)


def test_a_convolution_reaches_as_far_as_its_copies(trio: tuple[walks.Walk, ...], rows: Batch) -> None:
    walk = trio[2]
    assert walk.right_SK is not None
    assert walk.accuracy_S is not None
    reach_S1 = torch.arange(1, walks.LENGTH)[:, None]
    assert torch.equal(walk.right_SK, rows.tags.distance <= reach_S1)
    assert (walk.accuracy_S.diff() >= 0).all()
    assert (walk.accuracy_S[0], walk.accuracy_S[-1]) == (0, 1)
    assert [report.width for report in walk.report_S] == [10 * (1 + 2 * s) for s in range(1, walks.LENGTH)]


@pytest.mark.parametrize(("vocab", "length"), [(32, 24), (64, 16), (100, 12)])
def test_costs_are_those_of_the_models(vocab: int, length: int) -> None:
    for cost, name in zip(
        walks.costs(vocab, length), ("attention", "linear-attention", "base-conv"), strict=True
    ):
        report = by_hand.configured(name, vocab=vocab, length=length).build().report()
        assert (cost.width, cost.state_elements) == (report.width, report.state_elements)
