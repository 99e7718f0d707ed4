"""The protocol of set disjointness: what is handed over is all there is, and the model by hand solves it."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from holdall.contract import Format, pack
from holdall.tasks.information import disjointness_bits, recall_bits
from holdall.tasks.set_disjointness import SetDisjointness
from holdall.theory import exchanges
from holdall.theory.disjointness import ByHandConfig, hand_over
from holdall.theory.messages import converse

SHORT_FIRST = {"first": 4, "second": 16}
LONG_FIRST = {"first": 16, "second": 4}
BLOCKED: dict[str, Any] = {"vocab": 68, "distribution": "blocked"}


@pytest.mark.parametrize("reads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [SHORT_FIRST, LONG_FIRST], ids=["short-first", "long-first"])
@pytest.mark.parametrize("others", [BLOCKED, {"vocab": 100}], ids=["blocked", "random"])
def test_one_hot_codes_name_every_common_element(
    sizes: dict[str, int], others: dict[str, Any], reads: int
) -> None:
    task = SetDisjointness(**sizes, **others, reads=reads)
    config = ByHandConfig(task=task)
    assert config.keeps_second == (reads > 1 and task.second < task.first)
    model = config.build()
    for format in ("fp32", "int2"):
        found = hand_over(model, task, Format(format), rows=20)
        assert found.accuracy == 1
        assert len(found.message_bits) == 2 * reads - 1
        if reads == 1 and others is BLOCKED:
            assert found.proven_bits == disjointness_bits(task.first, task.second, 1.0)
        assert found.proven_bits <= found.largest
    # the one who never erred did so in the bits that are carried, and no others
    _, states = model(task.generate(1).tokens[:, : 1 + task.first])
    assert hand_over(model, task, Format("int2"), rows=1).message_bits[0] == sum(
        pack(state, Format("int2")).bits_per_row for state in states
    )


def test_random_codes_hold_a_short_set_better_than_a_long_one_until_it_is_read_again() -> None:
    """Crosstalk is that of the set that is kept: the first, but from two reads on the smaller one."""

    def accuracy(sizes: dict[str, int], reads: int) -> float:
        task = SetDisjointness(**sizes, vocab=260, reads=reads)
        return hand_over(
            ByHandConfig(task=task, features=48).build(), task, Format("fp32"), rows=150
        ).accuracy

    short, long, twice = accuracy(SHORT_FIRST, 1), accuracy(LONG_FIRST, 1), accuracy(LONG_FIRST, 2)
    deviation = (0.25 / 150) ** 0.5
    assert short > long + 3 * deviation
    assert twice > long + 2 * deviation


@pytest.mark.parametrize("sizes", [SHORT_FIRST, LONG_FIRST], ids=["short-first", "long-first"])
def test_every_block_can_be_asked_of_one_message(sizes: dict[str, int]) -> None:
    task = SetDisjointness(**sizes, **BLOCKED)
    exchange = exchanges.disjointness(task, 3)
    full = ByHandConfig(task=task).build()
    found = converse(full, exchange, Format("int2"))
    assert found.accuracy == 1
    assert found.conveyed_bits == pytest.approx(recall_bits(task.first, task.second, 1.0, distinct=False))
    assert found.conveyed_bits <= found.message_bits
    for format in ("fp32", "int8", "int4", "int2", "int1"):
        few = converse(ByHandConfig(task=task, features=16).build(), exchange, Format(format))
        assert few.conveyed_bits <= few.message_bits
        assert few.accuracy < 1


def test_the_rows_that_are_asked_are_rows_of_the_task() -> None:
    task = SetDisjointness(**SHORT_FIRST, **BLOCKED)
    exchange = exchanges.disjointness(task, 5)
    for question in range(task.first):
        tokens_BN = torch.cat((exchange.context_BN, exchange.question_BQT[:, question]), dim=1)
        answer_B = exchange.values_BQV[0, question][exchange.answer_BQ[:, question]]
        assert torch.equal(task.oracle(tokens_BN)[:, 0], answer_B)
        assert torch.equal(
            task.sets(tokens_BN)[1].sort(1).values, exchange.values_BQV[0, [question]].expand(5, -1)
        )


def test_the_next_reader_has_what_the_format_left() -> None:
    """int1 has no zero, so a table of one-hot lines says that everything is in the set."""
    task = SetDisjointness(**SHORT_FIRST, **BLOCKED)
    model = ByHandConfig(task=task).build()
    assert hand_over(model, task, Format("int2"), rows=40).accuracy == 1
    assert hand_over(model, task, Format("int1"), rows=40).accuracy < 0.5


class Forgetful(torch.nn.Module):
    """A model whose states never reach the one who answers: it expects the first element of B."""

    mixers: ClassVar[list] = []

    def forward(self, tokens_BT: Tensor, states: object = None) -> tuple[Tensor, list]:
        logits_BTV = torch.zeros(*tokens_BT.shape, 100)
        if tokens_BT.shape[1] > 1:
            logits_BTV[torch.arange(len(tokens_BT)), -1, tokens_BT[:, 1]] = 1
        return logits_BTV, []


def test_without_a_message_b_guesses() -> None:
    found = hand_over(Forgetful(), SetDisjointness(**SHORT_FIRST, vocab=100), Format("fp32"), rows=400)
    assert abs(found.accuracy - 1 / 16) < 4 * (15 / 256 / 400) ** 0.5
    assert found.message_bits == (0,)
    assert found.efficiency == 0


def test_yes_and_no_are_answers_too() -> None:
    class Always(Forgetful):
        def forward(self, tokens_BT: Tensor, states: object = None) -> tuple[Tensor, list]:
            logits_BTV = torch.zeros(*tokens_BT.shape, 100)
            logits_BTV[..., 5] = 1
            return logits_BTV, []

    task = SetDisjointness(**SHORT_FIRST, vocab=100, answer="yes-no")
    yes = (task.generate(40).answers == 5).double().mean().item()
    assert hand_over(Always(), task, Format("fp32"), rows=40).accuracy == yes


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="the task's answer must be 'element'"):
        ByHandConfig(task=SetDisjointness(**SHORT_FIRST, vocab=200, answer="yes-no"))
    with pytest.raises(ValueError, match='with distribution "blocked"'):
        exchanges.disjointness(SetDisjointness(**SHORT_FIRST, vocab=200), 1)
