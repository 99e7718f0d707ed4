"""Induction heads and associative recall: an oracle answers from the tokens, draws fit the distribution."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from holdall.tasks.data import DataConfig, MQARData, MQARSegment, Segment, SingleQueryData, updated
from holdall.tasks.single_query import AssociativeRecall, InductionHeads, drawing

TASKS = [InductionHeads(), AssociativeRecall(), InductionHeads(vocab=4, length=3),
         AssociativeRecall(vocab=6, length=2), AssociativeRecall(vocab=40, length=30)]  # fmt: skip
ROWS = 20_000


def slow_answer(task: InductionHeads | AssociativeRecall, row: list[int]) -> set[int]:
    """All tokens that once followed what the row ends with."""
    return {after for token, after in itertools.pairwise(row) if token == row[-1]}


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_each_row_has_one_answer_and_the_oracle_finds_it(task):
    batch = task.generate(300, seed=1)
    assert batch.tokens.shape == (300, task.row_length)
    assert torch.equal(task.oracle(batch.tokens), batch.answers)
    for row, answer in zip(batch.tokens.tolist(), batch.answers.flatten().tolist(), strict=True):
        assert slow_answer(task, row) == {answer}
    assert (batch.positions == task.row_length - 1).all()
    assert batch.answers.unique().numel() <= task.values


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_seed_decides_and_a_longer_draw_begins_with_the_shorter(task):
    few, many = task.generate(100, seed=2), task.generate(5000, seed=2)
    for short, long in zip(few, many, strict=True):
        assert torch.equal(short, long[:100])
    assert few.content_hash() == task.generate(100, seed=2).content_hash()
    assert few.content_hash() != task.generate(100, seed=3).content_hash()


def shares(counts: torch.Tensor) -> torch.Tensor:
    return counts.double() / counts.sum()


def test_induction_heads_are_drawn_as_published():
    task = InductionHeads()
    batch = task.generate(ROWS, seed=0)
    context = batch.tokens[:, :-1]
    first = (context == task.trigger).int()
    assert (first.sum(1) == 1).all()
    place = first.argmax(1)
    assert place.unique().tolist() == list(range(task.length - 2))
    # 20,000 draws: the share of one of 28 places has a standard deviation of 0.0013, of one of 18 tokens less
    assert (shares(place.bincount()) - 1 / 28).abs().max() < 6 * 0.0013
    assert (shares(batch.answers.flatten().bincount(minlength=18)) - 1 / 18).abs().max() < 6 * 0.0017
    assert (batch.tokens != task.vocab - 1).all()


def test_associative_recall_is_drawn_as_published():
    task = AssociativeRecall()
    batch = task.generate(ROWS, seed=0)
    pairs = batch.tokens[:, : task.length].unflatten(1, (-1, 2))
    assert pairs[..., 0].unique().tolist() == [0, 1, 2, 3]
    assert pairs[..., 1].unique().tolist() == [4, 5, 6, 7]
    for token in range(4):  # a key has one value in a row
        of_key = torch.where(pairs[..., 0] == token, pairs[..., 1], -1)
        values = [set(row) - {-1} for row in of_key[:200].tolist()]
        assert max(map(len, values)) == 1
    assert (shares(pairs[..., 0].flatten().bincount()) - 0.25).abs().max() < 0.006
    assert (shares(batch.answers.flatten().bincount()[4:]) - 0.25).abs().max() < 0.02
    # the question is uniform over the keys shown, not over the pairs: of the rows with one key shown once
    # and all others together nine times, it is that key's in one of as many as there are keys
    counts = torch.stack([(pairs[..., 0] == token).sum(1) for token in range(4)], dim=1)
    rows = ((counts > 0).sum(1) == 4) & ((counts == 1).sum(1) == 1)
    rare = counts[rows].eq(1).int().argmax(1)
    share = (batch.tokens[rows, -1] == rare).double().mean()
    assert rows.sum() > 1000
    assert abs(share - 0.25) < 6 * (0.1875 / int(rows.sum())) ** 0.5


def test_tags_say_how_far_and_how_often():
    task = AssociativeRecall(vocab=10, length=8)
    batch = task.generate(200, seed=0)
    distance, shown = task.tags(batch)
    for row, far, often in zip(batch.tokens.tolist(), distance[:, 0], shown[:, 0], strict=True):
        *context, asked = row
        assert context.count(asked) == often
        assert far == len(context) - (len(context) - 1 - context[::-1].index(asked))
    assert (InductionHeads().tags(InductionHeads().generate(50)).shown == 1).all()


def test_the_drawings_in_the_module_are_real():
    from holdall.tasks import single_query

    for task in (InductionHeads(vocab=12, length=14), AssociativeRecall(vocab=10, length=8)):
        assert drawing(task, task.generate(1)).strip() in (single_query.__doc__ or "")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: InductionHeads(vocab=3), "vocab"),
        (lambda: InductionHeads(length=2), "length"),
        (lambda: AssociativeRecall(vocab=7), "vocab"),
        (lambda: AssociativeRecall(length=5), "length"),
        (lambda: InductionHeads().generate(0), "rows"),
        (lambda: InductionHeads().generate(1, seed=-1), "seed"),
    ],
)
def test_settings_that_do_not_fit_name_the_field(make, field):
    with pytest.raises(ValueError, match=field):
        make()


# ------------------------------------------------------------------------------------------------ as data


def recall_data(**changes):
    segment = Segment(length=20, rows=64)
    plain = {"vocab": 10, "train": (segment,), "test": (segment,), "task_name": "associative-recall"}
    return SingleQueryData(**{**plain, **changes})


def test_the_loss_on_every_token_asks_for_each_next_one_and_the_answer_last():
    data = recall_data().build()
    (train,), (test,) = data.train, data.test
    assert train.at_BQ.tolist() == [list(range(22))] * 64
    assert torch.equal(train.answer_BQ[:, :-1], train.tokens_BN[:, 1:])
    task = AssociativeRecall()
    assert torch.equal(train.answer_BQ[:, -1:], task.oracle(train.tokens_BN))
    assert test.at_BQ.shape == (64, 1)
    assert torch.equal(test.answer_BQ, task.oracle(test.tokens_BN))
    answers = recall_data(loss="answers").build().train[0]
    assert torch.equal(answers.tokens_BN, train.tokens_BN)
    assert answers.at_BQ.shape == (64, 1)
    assert data.batch(0, 0, 16).answer_BQ.shape == (16, 22)


def test_the_longest_row_counts_what_asks_too():
    assert recall_data().longest == 22


def test_a_segment_is_as_hard_as_its_context_is_long():
    data = recall_data(test=(Segment(length=20, rows=8), Segment(length=40, rows=8)))
    assert (data.difficulty, [data.tag(segment) for segment in data.test]) == ("tokens", [20, 40])


@pytest.mark.parametrize("part", ["associative-recall", "induction-heads-answers"])
def test_data_of_before_is_read(part):
    """Segments of these tasks had pairs, and the loss was called otherwise."""
    folder = Path(__file__).parents[2] / "results" / "synthetics" / part
    held = json.loads((folder / "config.json").read_text())["points"][0]["train"]["data"]
    (segment,) = held["test"]
    assert segment["pairs"] == (10 if part == "associative-recall" else 1)
    data = DataConfig.from_dict(held)
    assert data.test == (Segment(length=20 if part == "associative-recall" else 30, rows=500),)
    assert (data.task_name, data.loss) == (part.removesuffix("-answers"), held["practise"])
    assert updated(held) == data.to_dict()


def test_data_comes_back_from_plain_json_as_its_own_kind():
    segment = MQARSegment(length=64, pairs=4, rows=8)
    for data in (recall_data(), MQARData(vocab=64, train=(segment,), test=(segment,))):
        assert DataConfig.from_dict(data.to_dict()) == data
        assert type(data).from_dict(data.to_dict()) == data
    with pytest.raises(TypeError, match="is not a MQARData"):
        MQARData.from_dict(recall_data().to_dict())
    with pytest.raises(TypeError, match="Did you mean 'mqar'"):
        DataConfig.from_dict({"kind": "mqarr"})
