"""Set disjointness: an oracle answers from the tokens, draws fit their distribution, no memory beats its
bound, published rows come back."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdall.tasks import set_disjointness
from holdall.tasks.data import DataConfig, SetDisjointnessData, SetSegment
from holdall.tasks.information import Asked, recall_bits
from holdall.tasks.set_disjointness import NO, YES, NotPublishedError, SetDisjointness, drawing

ROWS = 20_000


@st.composite
def tasks(draw):
    answer = draw(st.sampled_from(["element", "yes-no"]))
    distribution = draw(st.sampled_from(["random", "blocked"]))
    first, second = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    special, pairs = (6, 2) if answer == "yes-no" else (4, 1)
    needed = first * second * pairs if distribution == "blocked" else first + second - 2 + pairs
    return SetDisjointness(
        vocab=max(6, special + needed) + draw(st.integers(0, 40)), first=first, second=second,
        reads=draw(st.integers(1, 3)), answer=answer, distribution=distribution,
    )  # fmt: skip


def sets_of(row: list[int], task: SetDisjointness) -> tuple[list[int], list[int]]:
    """What stands between "[", "|" and "?" of the first read."""
    return row[1 : row.index(2)], row[row.index(2) + 1 : row.index(3)]


@settings(max_examples=50)
@given(tasks(), st.integers(1, 30), st.integers(0, 2**70))
def test_each_row_is_two_sets_and_the_oracle_answers_it(task, rows, seed):
    batch = task.generate(rows, seed)
    assert batch.tokens.shape == (rows, task.row_length)
    assert [column.dtype for column in (*batch, *task.tags(batch))] == [torch.int64] * 7
    assert torch.equal(task.oracle(batch.tokens), batch.answers)
    for row, at, answer in zip(*(column.tolist() for column in batch), strict=True):
        assert at == [len(row) - 1]
        once = len(row) // task.reads
        assert row == row[:once] * task.reads
        a, b = sets_of(row, task)
        assert (len(set(a)), len(set(b))) == (len(a), len(b)) == (task.first, task.second)
        assert row[:once] == [1, *a, 2, *b, 3]
        assert all(task.special <= token < task.vocab for token in (*a, *b))
        common = set(a) & set(b)
        if task.answer == "element":
            assert common == set(answer)
        else:
            assert len(common) <= 1
            assert answer == [YES if common else NO]
        if task.distribution == "blocked":
            blocks = [(token - task.special) // task.second for token in a]
            assert len({(token - task.special) // task.second for token in b}) == 1
            each = 2 if task.answer == "yes-no" else 1
            assert sorted(block // each for block in blocks) == list(range(task.first))


def test_the_seed_decides_and_a_longer_draw_begins_with_the_shorter():
    for task in (SetDisjointness(), SetDisjointness(distribution="blocked", answer="yes-no")):
        torch.manual_seed(0)
        few = task.generate(100, seed=2)
        torch.manual_seed(1)
        many = task.generate(20_000, seed=2)
        for short, long in zip(few, many, strict=True):
            assert torch.equal(short, long[:100])
        assert few.content_hash() == task.generate(100, seed=2).content_hash()
        assert few.content_hash() != task.generate(100, seed=3).content_hash()


def test_more_reads_show_the_same_sets():
    once, thrice = SetDisjointness().generate(50, 4), SetDisjointness(reads=3).generate(50, 4)
    assert torch.equal(once.tokens.repeat(1, 3), thrice.tokens)
    assert torch.equal(once.answers, thrice.answers)


HASHES = {
    "random": "5943c456e4f8e1669da53e1b55f0f64b5bb05b775df4951846df4c8ef438f946",
    "blocked": "832285e37e76a78590d5626a3ddd375209fac3cff4b54f450d646c35d51e51df",
}


@pytest.mark.parametrize("distribution", HASHES)
def test_the_same_rows_on_every_machine(distribution):
    task = SetDisjointness(vocab=300, first=5, second=12, distribution=distribution)
    assert task.generate(300, 7).content_hash() == HASHES[distribution]


def test_tags_say_the_sizes_the_order_and_how_far_the_common_element_is():
    for task in (SetDisjointness(vocab=40, first=3, second=6, reads=2),
                 SetDisjointness(vocab=40, first=6, second=3, answer="yes-no")):  # fmt: skip
        batch = task.generate(100, seed=0)
        tags = task.tags(batch)
        assert set(tags.first.flatten().tolist()) == {task.first}
        assert set(tags.second.flatten().tolist()) == {task.second}
        assert set(tags.short_first.flatten().tolist()) == {int(task.first < task.second)}
        for row, distance in zip(batch.tokens.tolist(), tags.distance[:, 0].tolist(), strict=True):
            a, b = sets_of(row, task)
            common = set(a) & set(b)
            if common:
                # the last place but that in B, seen from the question at the end
                places = [place for place, token in enumerate(row) if token in common]
                assert distance == len(row) - 1 - places[-2]
            else:
                assert distance == -1


# ------------------------------------------------------------------------------------------- distributions


def assert_even(counts: Counter, outcomes: int) -> None:
    """All of so many outcomes are equally frequent, to six standard deviations."""
    total = sum(counts.values())
    expected = total / outcomes
    spread = math.sqrt(expected * (1 - 1 / outcomes))
    assert len(counts) == outcomes
    assert all(abs(count - expected) < 6 * spread for count in counts.values())


def test_random_sets_are_uniform():
    """All (A, B) of so few elements: 6 ordered choices of A, 2 of which of them is common, 2 of its place in
    B and 1 token that A has not."""
    task = SetDisjointness(vocab=7, first=2, second=2)
    rows = task.generate(ROWS, 0).tokens.tolist()
    assert_even(Counter(map(tuple, rows)), 6 * 2 * 2)
    task = SetDisjointness(vocab=9, first=2, second=1, answer="yes-no")
    batch = task.generate(ROWS, 0)
    rows = batch.tokens.tolist()
    for meet, outcomes in ((YES, 6 * 2), (NO, 6 * 1)):
        kept = [
            tuple(row) for row, answer in zip(rows, batch.answers.tolist(), strict=True) if answer == [meet]
        ]
        assert abs(len(kept) - ROWS / 2) < 6 * math.sqrt(ROWS) / 2
        assert_even(Counter(kept), outcomes)


def test_blocked_sets_are_uniform():
    """2 tokens of each of 2 blocks, in 2 orders; one of 2 blocks, in 2 orders."""
    task = SetDisjointness(vocab=8, first=2, second=2, distribution="blocked")
    assert_even(Counter(map(tuple, task.generate(ROWS, 0).tokens.tolist())), 2 * 2 * 2 * 2 * 2)
    task = SetDisjointness(vocab=10, first=2, second=1, distribution="blocked", answer="yes-no")
    # a block of each of 2 pairs, in 2 orders; B is any of 4 blocks
    assert_even(Counter(map(tuple, task.generate(ROWS, 0).tokens.tolist())), 2 * 2 * 2 * 4)


@pytest.mark.parametrize("answer", ["element", "yes-no"])
def test_random_rows_are_those_of_an_index_into_symbols(answer):
    """The bound on random rows: m disjoint sets at random, A one token of each of them and the rest from
    elsewhere, B any of the sets. That has the probabilities of the random distribution, row by row."""
    special, vocab, first, second = (4, 8, 2, 2) if answer == "element" else (6, 11, 2, 1)
    task = SetDisjointness(vocab=vocab, first=first, second=second, answer=answer)
    m = task.symbols
    assert m == 2
    drawn: Counter = Counter()
    elements = range(special, vocab)
    each = 1 if answer == "element" else 2
    # all ways to lay out the elements: blocks first, then what A has from elsewhere
    for order in itertools.permutations(elements):
        blocks = [order[k * second : (k + 1) * second] for k in range(each * m)]
        for choice in itertools.product(range(each), repeat=m):
            chosen = [blocks[each * k + which] for k, which in enumerate(choice)]
            for picks in itertools.product(range(second), repeat=m):
                a = [block[pick] for block, pick in zip(chosen, picks, strict=True)]
                for shuffled_a in itertools.permutations(a):
                    for b in blocks:
                        drawn[(shuffled_a, b)] += 1
    counts = Counter()
    for row in task.generate(40_000, 0).tokens.tolist():
        a, b = sets_of(row, task)
        counts[tuple(a), tuple(b)] += 1
    total = sum(drawn.values())
    assert set(drawn) == set(counts)
    for outcome, ways in drawn.items():
        share = ways / total
        assert abs(counts[outcome] - 40_000 * share) < 6 * math.sqrt(40_000 * share)


# ------------------------------------------------------------------------------------------------ the bound


def test_symbols_by_hand():
    of = SetDisjointness
    assert of(first=16, second=768).symbols == (2044 - 16) // 767 == 2
    assert of(first=768, second=16).symbols == (2044 - 768) // 15 == 85
    assert of(first=4, second=16).symbols == 4
    assert of(first=16, second=768, vocab=4 + 16 * 768, distribution="blocked").symbols == 16
    assert of(first=16, second=4, answer="yes-no").symbols == 16
    assert of(first=500, second=500, answer="yes-no").symbols == (2042 - 500) // 999 == 1
    assert (
        of(first=1000, second=1000, answer="yes-no").symbols == 1
    )  # no other set fits; B's own answer counts
    assert of(first=5, second=1).symbols == 5
    assert of(first=5, second=1).asked == Asked(5, 1, distinct=False)  # which holds no bits
    assert of(first=16, second=64).asked == Asked(16, 64, distinct=False)
    assert of(first=16, second=64, reads=2).asked == Asked(1, 64, distinct=False)


@pytest.mark.parametrize(
    "task",
    [
        SetDisjointness(vocab=8, first=2, second=2),
        SetDisjointness(vocab=7, first=1, second=3),
        SetDisjointness(vocab=8, first=2, second=2, distribution="blocked"),
        SetDisjointness(vocab=10, first=1, second=2, answer="yes-no"),
        SetDisjointness(vocab=10, first=2, second=1, answer="yes-no", distribution="blocked"),
    ],
    ids=str,
)
def test_no_memory_of_a_tiny_task_beats_the_bound(task):
    """The best accuracy of every way to squeeze the first set into m states, against the bound at log2 m."""
    batch = task.generate(4000, 0)
    weights: dict[frozenset[int], Counter] = {}
    for row, (answer,) in zip(batch.tokens.tolist(), batch.answers.tolist(), strict=True):
        a, b = sets_of(row, task)
        weights.setdefault(frozenset(a), Counter())[frozenset(b), answer] += 1
    firsts = sorted(weights, key=sorted)
    # drawn rows in place of probabilities: an accuracy is off by a standard deviation of 0.8% at most
    slack = 6 * 0.5 / math.sqrt(4000)
    for states in range(1, 4):
        best = 0
        for memory in itertools.product(range(states), repeat=len(firsts)):
            right = 0
            for state in set(memory):
                held: Counter = Counter()
                for first, own in zip(firsts, memory, strict=True):
                    if own == state:
                        held.update(weights[first])
                answers: dict[frozenset[int], int] = {}
                for (b, _), count in held.items():
                    answers[b] = max(count, answers.get(b, 0))
                right += sum(answers.values())
            best = max(best, right)
        reached = max(0.0, best / 4000 - slack)
        questions, values, distinct = task.asked
        assert recall_bits(questions, values, reached, distinct) <= math.log2(states)


# ---------------------------------------------------------------------------------------------- as published

PUBLISHED = {  # vocab, first, second, seed: sha256 of six rows of what the published code made
    (64, 4, 12, 0): "ab664dfaf4d0cf019f8732594949dbcd80f0f2a1051329a860bc506cc3468593",
    (64, 12, 4, 1): "c2683625b729a40d107ad0459a3373ba8b3d49877e4b3effd4ba8547fa6fe3d7",
    (2048, 4, 128, 123): "8bc4350c4fc1a9d73ac62d2bb906c8f30668e549957ae52740c0b41e4eefe2f8",
    (2048, 16, 16, 2147483655): "be39f152eb0779abf4554f861e9193ce2c3846487ca1cfc8771ba0b2aba6f731",
    (64, 1, 20, 3): "1c9d9ffc518ff4d149fb0dfa4252f5d240204f1c5243d01db6863f1df91ecf32",
    (2048, 768, 16, 5): "e520addf60ba94b737a722e77f14c5eb19368cd1eb9ff4b08ea5499826e28ad5",
    (65, 32, 29, 5): "3d7cb48ef6fc0c387f63fa2d410c35df79f0b44f4a7b91f0c7de4f848fe750d0",
}


@pytest.mark.parametrize("setting", PUBLISHED, ids=str)
def test_published_rows_return_to_the_bit(setting):
    vocab, first, second, seed = setting
    task = SetDisjointness(vocab=vocab, first=first, second=second)
    batch = task.generate_published(6, seed)
    assert batch.content_hash() == PUBLISHED[setting]
    assert torch.equal(task.oracle(batch.tokens), batch.answers)


def test_published_rows_are_of_the_random_distribution():
    """The first token of A with what B has besides, and where the common one stands."""
    task = SetDisjointness(vocab=12, first=2, second=2)
    tokens, places = Counter(), Counter()
    for row in task.generate_published(3000, 0).tokens.tolist():
        a, b = sets_of(row, task)
        (common,) = set(a) & set(b)
        (other,) = set(b) - {common}
        tokens[a[0], other] += 1
        places[a.index(common), b.index(common)] += 1
    assert_even(tokens, 8 * 7)
    assert_even(places, 4)


# -------------------------------------------------------------------------------------- pictures and errors


def test_the_drawing_in_the_module_is_real():
    task = SetDisjointness(vocab=16, first=2, second=4)
    assert drawing(task.generate(1)) in (set_disjointness.__doc__ or "")


def test_the_module_prints_a_row_of_each_kind(capsys):
    set_disjointness.main()
    out = capsys.readouterr().out
    assert ", the only token of both" in out
    assert "-> yes" in out or "-> no" in out
    assert "2,411.8" in out  # of the blocked sets of 768 and 16 tokens, nine of ten right


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: SetDisjointness(vocab=20, first=9, second=9), ValueError, "raise vocab to 21"),
        (
            lambda: SetDisjointness(vocab=20, first=9, second=9, answer="yes-no"),
            ValueError,
            "raise vocab to 24",
        ),
        (lambda: SetDisjointness(distribution="blocked", first=64, second=64), ValueError, "64 blocks of 64"),
        (lambda: SetDisjointness(first=0), ValueError, "first"),
        (lambda: SetDisjointness(reads=0), ValueError, "reads"),
        (lambda: SetDisjointness(answer="both"), TypeError, "answer"),
        (lambda: SetDisjointness().generate(0), ValueError, "rows 0"),
        (lambda: SetDisjointness().generate(True), TypeError, "rows"),
        (lambda: SetDisjointness().generate(1, -1), ValueError, "seed -1"),
        (lambda: SetDisjointness().generate_published(1, 1 << 32), ValueError, "2\\*\\*32"),
        (lambda: SetDisjointness(answer="yes-no").generate_published(1), NotPublishedError, "element"),
        (lambda: SetDisjointness(first=1025).generate_published(1), NotPublishedError, "at most 1024"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, error, says):
    with pytest.raises(error, match=says):
        make()


# ------------------------------------------------------------------------------------------------ as data


def sets_data(**changes):
    train = (SetSegment.of(2, 6, 32), SetSegment.of(6, 2, 32))
    test = (*train, SetSegment.of(2, 12, 16))
    return SetDisjointnessData(**{"vocab": 32, "train": train, "test": test, **changes})


def test_segments_become_rows_with_one_question_at_their_end():
    for reads in (1, 2):
        config = sets_data(reads=reads)
        assert DataConfig.from_dict(config.to_dict()) == config
        data = config.build()
        assert [rows.tokens_BN.shape for rows in data.test] == [
            (32, 11 * reads),
            (32, 11 * reads),
            (16, 17 * reads),
        ]
        assert config.longest == 17 * reads
        for rows, segment in zip(data.test, config.test, strict=True):
            assert (rows.at_BQ == rows.tokens_BN.shape[1] - 1).all()
            assert torch.equal(config.task(segment).oracle(rows.tokens_BN), rows.answer_BQ)
    assert "2 times over" in sets_data(reads=2).about
    assert [config.tag(segment) for segment in config.test] == [2, 6, 2]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SetSegment(length=10, rows=1, first=4, second=4), "length 10 is not 11"),
        (lambda: sets_data(test=(SetSegment.of(4, 1, 8), SetSegment.of(6, 1, 8))), "one token in its second"),
        (lambda: sets_data(test=(SetSegment.of(4, 2, 8), SetSegment.of(4, 9, 8))), "first set of 4 tokens"),
        (lambda: sets_data(vocab=12), "raise vocab to"),
    ],
)
def test_data_that_does_not_fit_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
