"""MQAR: an oracle answers from the tokens alone, draws fit the distribution, published rows come back."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import holdall.tasks.mqar
from holdall.tasks.data import DataConfig, MQARData, MQARSegment
from holdall.tasks.mqar import FILLERS, MQAR, Batch, NotPublishedError, drawing


def context_of(row, pairs):
    """What the definition says that the row knows: the value that follows each key in the pairs."""
    return {row[2 * i]: row[2 * i + 1] for i in range(pairs)}


@st.composite
def tasks(draw):
    pairs = draw(st.integers(1, 9))
    return MQAR(
        vocab=draw(st.one_of(st.integers(2 * pairs + 2, 4 * pairs + 9), st.integers(100, 9000))),
        length=4 * pairs + draw(st.integers(0, 30)),
        pairs=pairs,
        power=draw(st.sampled_from([0.01, 0.1, 1, 2.5])),
        filler=draw(st.sampled_from(FILLERS)),
    )


# ------------------------------------------------------------------------------------- rows are what they say


@settings(max_examples=60)
@given(tasks(), st.integers(1, 7), st.integers(0, 2**70))
def test_an_oracle_that_reads_the_row_answers_every_question(task, rows, seed):
    batch = task.generate(rows, seed)
    K, start, middle = task.pairs, 2 * task.pairs, task.vocab // 2
    assert [t.dtype for t in (*batch, batch.targets, batch.answers, *batch.tags)] == [torch.int64] * 9
    assert batch.tokens.shape == batch.targets.shape == (rows, task.length)
    for b in range(rows):
        row, target = batch.tokens[b].tolist(), batch.targets[b].tolist()
        known = context_of(row, K)
        assert len(known) == len(set(known.values())) == K
        assert all(1 <= key < middle for key in known)
        assert all(middle <= value < task.vocab for value in known.values())
        assert all(0 <= token < task.vocab for token in row)

        asked = [p for p in range(task.length) if target[p] != -100]
        assert [target[p] for p in asked] == [known[row[p]] for p in asked]  # the oracle
        assert {row[p] for p in asked} == set(known)
        assert len(asked) == K
        assert all(p >= start and p % 2 == 0 for p in asked)
        if task.filler != "random":  # then the row alone says where it is asked: wherever a key is seen again
            assert asked == [p for p in range(start, task.length) if row[p] in known]
        if task.filler == "zero":
            assert all(row[p] == 0 for p in range(start, task.length) if p not in asked)

        assert batch.positions[b].tolist() == asked
        assert batch.answers[b].tolist() == [target[p] for p in asked]
        distance, place, pairs, repeats = (tag[b].tolist() for tag in batch.tags)
        assert place == [row.index(row[p]) // 2 for p in asked]
        assert distance == [p - row.index(row[p]) for p in asked]
        assert pairs == [K] * K
        assert repeats == [row[start:p].count(row[p]) for p in asked]


def test_random_filler_repeats_keys_before_their_question_and_the_tags_say_so():
    rows = 400
    tags = MQAR(length=1024, pairs=64, filler="random").generate(rows).tags
    spoiled = (tags.repeats > 0).sum() / rows
    assert spoiled == pytest.approx(1.5, abs=0.15)
    assert not MQAR(length=1024, pairs=64, filler="key-free").generate(50).tags.repeats.any()


def test_the_picture_in_the_docstring_is_the_row_that_it_names():
    batch = MQAR(vocab=32, length=24, pairs=3, filler="zero").generate(1, seed=0)
    for line in drawing(batch).splitlines():
        assert line in holdall.tasks.mqar.__doc__


def test_the_module_runs_as_its_own_demo(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    holdall.tasks.mqar.main()
    out = capsys.readouterr().out
    assert "key val key val key val" in out
    assert "3,060.3" in out  # bits that (1024, 256) needs for all answers


def test_large_vocabularies_are_used_to_the_end():
    for vocab in (1 << 16, 1 << 17, 200_001):
        batch = MQAR(vocab=vocab, length=256, pairs=64).generate(300)
        keys, values = batch.tokens[:, 0:128:2], batch.tokens[:, 1:128:2]
        assert 0.99 * vocab // 2 < keys.max() < vocab // 2 <= values.min() < 1.01 * vocab / 2
        assert 0.99 * vocab < values.max() < vocab
        assert 0.99 * vocab < batch.tokens[:, 128:].max() < vocab


def test_key_free_filler_of_a_vocabulary_just_above_16_bits():
    batch = MQAR(vocab=65_540, length=256, pairs=64, filler="key-free").generate(3000)
    assert not batch.tags.repeats.any()
    assert batch.tokens[:, 128:].max() > 65_535  # tokens that stand in for keys


def test_select_takes_rows_of_everything():
    batch = MQAR(length=32, pairs=4).generate(6)
    for rows in (slice(2, 5), torch.tensor([4, 0, 4])):
        some = batch.select(rows)
        assert isinstance(some, Batch)
        for whole, part in zip(
            (*batch, batch.targets, batch.answers, *batch.tags),
            (*some, some.targets, some.answers, *some.tags),
            strict=True,
        ):
            assert torch.equal(whole[rows], part)


def test_a_task_knows_its_numbers():
    task = MQAR(vocab=101, length=65, pairs=4)
    assert (task.keys, task.values, task.space, task.questions_per_row) == (49, 51, 28, 4)


# -------------------------------------------------------------------------------- the seed decides everything


@pytest.mark.parametrize("filler", FILLERS)
def test_the_seed_decides_everything_and_nothing_global_moves(filler):
    task = MQAR(length=32, filler=filler)
    np.random.seed(1)  # noqa: NPY002 - the global generator is the point
    torch.manual_seed(1)
    before_numpy, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    once = task.generate(50, seed=7)
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before_torch, torch.get_rng_state())
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert task.generate(50, seed=7).content_hash() == once.content_hash()
    hashes = {task.generate(50, seed=seed).content_hash() for seed in (*range(20), 2**64, 2**64 + 7)}
    assert len(hashes) == 22


def test_threads_change_nothing_and_more_rows_begin_with_the_same_rows():
    task = MQAR(length=1024, pairs=16, filler="key-free")  # 256 rows a block
    alone = task.generate(600, seed=3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = task.generate(600, seed=3)
    finally:
        torch.set_num_threads(before)
    for rows in (1, 255, 256, 257, 600):
        fewer = task.generate(rows, seed=3)
        for one, other, first in zip(alone, together, fewer, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one[:rows], first)


def test_fillers_share_pairs_and_questions():
    zero, *others = (MQAR(length=64, filler=filler).generate(40) for filler in ("zero", "random", "key-free"))
    for other in others:
        assert torch.equal(zero.positions, other.positions)
        assert torch.equal(zero.targets, other.targets)
        assert torch.equal(zero.tokens, torch.where(zero.tokens > 0, other.tokens, 0))


def test_no_two_rows_share_their_pairs():
    """Blocks have streams of their own: 9000 rows are three blocks."""
    keys = MQAR(length=64, pairs=4).generate(9000).tokens[:, :8]
    assert len(torch.unique(keys, dim=0)) == 9000


HASHES = {
    (8192, 64, 4, 0.01, "zero", 0): "97d28ccdc2b15b9cf7b6be7ff6880622ca8ebbfd91afd147dd1b811141d80808",
    (8192, 64, 4, 0.01, "random", 0): "a2ee7f0caf56d0609825742658b7f340fca09c8e1b227064db4f07613a740ad2",
    (8192, 64, 4, 0.01, "key-free", 0): "bec415be6604fe9f2b8168c4b3bf35634133287a073ae70fb5299bd45e5eb25c",
    (8192, 1024, 256, 0.01, "random", 5): "3c64ddb3737c8fc942b2918ed4b9f63489976e1d4ccde5da7fb47bb99dcf43f5",
    (23, 37, 9, 1.5, "key-free", 2**80): "2f05e174d3f23cfc210efe89ad2400d8ad91ef2519c09c1bea1d5f5e619f179d",
    (300_000, 40, 3, 0.1, "random", 1): "a2f3e09b18de957292e750eea8c56bc8883ae2116eb598677738e374de212572",
}


@pytest.mark.parametrize("setting", HASHES, ids=str)
def test_the_same_rows_on_every_machine(setting):
    vocab, length, pairs, power, filler, seed = setting
    task = MQAR(vocab=vocab, length=length, pairs=pairs, power=power, filler=filler)
    assert task.generate(300, seed).content_hash() == HASHES[setting]


def test_the_hash_sees_tokens_targets_and_shape():
    batch = MQAR(length=32).generate(2000)
    hashes = {batch.content_hash(), batch.select(slice(0, 1999)).content_hash()}
    for column in range(3):  # a token of filler, a position, a place
        changed = [part.clone() for part in batch]
        if column == 0:
            free = next(p for p in range(8, 32) if p not in batch.positions[1500].tolist())
            changed[0][1500, free] ^= 1
        elif column == 1:
            changed[1][1500, -1] = next(p for p in range(8, 32) if p not in batch.positions[1500].tolist())
        else:
            changed[2][1500] = changed[2][1500].flip(0)
        hashes.add(Batch(*changed).content_hash())
    for shape in ((2000, 32), (4000, 16)):  # the same bytes, and no questions
        nothing = torch.zeros(shape[0], 0, dtype=torch.int64)
        hashes.add(Batch(batch.tokens.reshape(shape), nothing, nothing).content_hash())
    assert len(hashes) == 7


# ------------------------------------------------------------------------------------------- the distribution


def assert_fits(counts, expected):
    """Chi-square: outcomes are as frequent as expected, to four sigma of a fixed seed's draws."""
    assert set(counts) <= set(expected)
    assert min(expected.values()) > 5
    statistic = sum((counts.get(o, 0) - e) ** 2 / e for o, e in expected.items())
    free = len(expected) - 1
    # Wilson and Hilferty: the cube root of chi-square is nearly normal
    limit = free * (1 - 2 / (9 * free) + 4 * math.sqrt(2 / (9 * free))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {free} degrees of freedom, limit {limit:.1f}"


@pytest.mark.parametrize(("space", "pairs", "power"), [(5, 2, 0.01), (4, 3, 0.5), (3, 3, 2.0), (4, 2, 1)])
def test_gaps_come_as_successive_draws(space, pairs, power):
    """Which slot each pair is asked in, against the probability of every ordered outcome."""
    rows = 40_000
    batch = MQAR(vocab=64, length=2 * pairs + 2 * space, pairs=pairs, power=power, filler="zero").generate(
        rows
    )
    slots = torch.empty_like(batch.positions).scatter_(1, batch.places, (batch.positions - 2 * pairs) // 2)
    weight = [g ** (power - 1) for g in range(1, space + 1)]
    expected = {}
    for outcome in itertools.permutations(range(space), pairs):
        probability, left = 1.0, sum(weight)
        for slot in outcome:
            probability *= weight[slot] / left
            left -= weight[slot]
        expected[outcome] = rows * probability
    assert sum(expected.values()) == pytest.approx(rows)
    assert_fits(Counter(map(tuple, slots.tolist())), expected)


@pytest.mark.parametrize(("vocab", "pairs"), [(14, 2), (14, 3), (10, 4), (11, 1), (16, 3)])
def test_keys_and_values_are_uniform_over_ordered_choices(vocab, pairs):
    """Both ways to draw: few of many, drawn again where equal, and most of few, shuffled."""
    rows = 40_000
    tokens = MQAR(vocab=vocab, length=4 * pairs, pairs=pairs, filler="zero").generate(rows).tokens
    for column, choices in ((0, range(1, vocab // 2)), (1, range(vocab // 2, vocab))):
        outcomes = list(itertools.permutations(choices, pairs))
        drawn = Counter(map(tuple, tokens[:, column : 2 * pairs : 2].tolist()))
        assert_fits(drawn, {outcome: rows / len(outcomes) for outcome in outcomes})


def test_pairs_and_gaps_are_independent():
    """The place of the larger key says nothing of which is asked first, nor of the larger value."""
    rows = 20_000
    batch = MQAR(vocab=64, length=40, pairs=2, filler="zero").generate(rows)
    row = batch.tokens
    signs = torch.stack((row[:, 0] > row[:, 2], row[:, 1] > row[:, 3], batch.places[:, 0] == 0), dim=1)
    drawn, alone = Counter(map(tuple, signs.tolist())), signs.double().mean(0).tolist()
    expected = {
        outcome: rows * math.prod(p if yes else 1 - p for p, yes in zip(alone, outcome, strict=True))
        for outcome in itertools.product((False, True), repeat=3)
    }
    assert_fits(drawn, expected)


@pytest.mark.parametrize("filler", ["random", "key-free"])
def test_filler_is_uniform_over_what_it_may_be(filler):
    rows, vocab, pairs = 5_000, 12, 3
    batch = MQAR(vocab=vocab, length=20, pairs=pairs, filler=filler).generate(rows)
    free = torch.ones(batch.tokens.shape, dtype=torch.bool).scatter_(1, batch.positions, False)
    free[:, : 2 * pairs] = False
    per_row = 20 - 3 * pairs
    # by what the token is to its row: itself, and whether it is one of the row's keys
    is_key = (batch.tokens[:, :, None] == batch.tokens[:, None, 0 : 2 * pairs : 2]).any(-1)
    drawn = Counter(zip(batch.tokens[free].tolist(), is_key[free].tolist(), strict=True))
    share = Counter(batch.tokens[:, 0 : 2 * pairs : 2].flatten().tolist())  # rows of which a token is a key
    expected = {}
    for token in range(vocab):
        each = per_row / (vocab if filler == "random" else vocab - pairs)
        expected[token, False] = (rows - share[token]) * each
        if filler == "random" and share[token]:
            expected[token, True] = share[token] * each
    assert_fits(drawn, expected)


# --------------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("passes", [2, 3])
def test_more_passes_show_the_pairs_again_and_change_nothing_else(filler, passes):
    once = MQAR(vocab=64, length=41, pairs=4, filler=filler)
    more = MQAR(vocab=64, length=41 + 8 * (passes - 1), pairs=4, filler=filler, passes=passes)
    # more rows than one block has
    few, many = once.generate(8000, 5), more.generate(8000, 5)
    assert torch.equal(many.tokens, torch.cat((few.tokens[:, :8].repeat(1, passes - 1), few.tokens), dim=1))
    assert torch.equal(many.positions, few.positions + 8 * (passes - 1))
    assert torch.equal(many.answers, few.answers)
    # a question is as far from its pair in the last pass as it was from the only one
    for name, one, other in zip(few.tags._fields, few.tags, many.tags, strict=True):
        assert torch.equal(one, other), name
    assert many.select(slice(3, 5)).passes == passes
    assert torch.equal(many.select(slice(3, 5)).tags.distance, many.tags.distance[3:5])
    assert MQARData.from_dict({**DATA.to_dict(), "passes": passes}).build().test[0].tokens_BN.shape[1] == (
        24 + 6 * (passes - 1)
    )


DATA = MQARData(
    vocab=32,
    train=(MQARSegment(length=24, pairs=3, rows=8),),
    test=(MQARSegment(length=24, pairs=3, rows=8),),
)


def test_data_of_several_passes_says_so_and_data_of_before_is_read():
    assert "2 times" in MQARData.from_dict({**DATA.to_dict(), "passes": 2}).about
    before = {name: value for name, value in DATA.to_dict().items() if name != "passes"}
    assert DataConfig.from_dict(before) == DATA
    assert DATA.row_length(DATA.test[0]) == DATA.longest == 24


def test_a_row_in_two_passes_is_drawn_and_asked_as_the_module_shows_it():
    task = MQAR(vocab=32, length=30, pairs=3, passes=2, filler="zero")
    lines = drawing(task.generate(1)).splitlines()[:2]
    for line in lines:
        assert line[: 8 + 4 * 13].rstrip() in (holdall.tasks.mqar.__doc__ or "")


def test_pairs_that_do_not_fit_so_often_are_refused():
    with pytest.raises(
        ValueError, match=r"2 tokens in each of 3 passes .* Lower pairs to 2 or raise length to 32"
    ):
        MQAR(length=16, pairs=4, passes=3)
    assert MQAR(length=32, pairs=4, passes=3).space == 4
    with pytest.raises(ValueError, match=r"must hold\. Raise length to 16$"):  # not even one fits
        MQAR(length=3, pairs=4)


def test_published_rows_of_two_passes_are_what_the_published_generator_means():
    """It refuses more than one pass (a shape that does not fit); its draws would be those of one pass."""
    once = MQAR(vocab=64, length=32, pairs=4, filler="zero").generate_published(5, seed=2)
    twice = MQAR(vocab=64, length=40, pairs=4, filler="zero", passes=2).generate_published(5, seed=2)
    assert torch.equal(twice.tokens[:, 8:], once.tokens)
    assert torch.equal(twice.tokens[:, :8], once.tokens[:, :8])
    assert torch.equal(twice.targets[:, 8:], once.targets)


# ---------------------------------------------------------------------------------------------- as published

PUBLISHED = {  # vocab, length, pairs, power, filler, rows, seed: sha256 of what the published code made
    (64, 32, 4, 0.01, "zero", 12, 0): "eaae384c701e0f5f5c9c41456fdd015eae9560c1e64f75cb8b1afbfd7b07d9c3",
    (64, 32, 4, 0.01, "zero", 12, 1): "97e99d8dc9816b7ed1d867bff6d0fc0ee3816a0edcd6d81a3691856d4a9d4418",
    (8192, 64, 8, 0.01, "zero", 8, 123): "b24dd30c49c17986c70ea652df345f4c1f00527e8549123ff00025beace6a7ef",
    (8192, 64, 8, 0.01, "random", 8, 123): "b4b7a1625464021e22e27893fbe1c333cfc511ea3b8dcd8d9e01f8ccad39de84",
    (8192, 256, 64, 0.01, "random", 4, 7): "7ef746ed28d7f7cf7a07fd1a8c740543f9e37a98abf2985e025885e1c96af8ba",
    (256, 64, 8, 0.1, "zero", 6, 42): "e24b2c08c278945f0a81ed1201de3182b3da3e15b81db43c139549f400aabdca",
    (
        256,
        128,
        16,
        1.0,
        "zero",
        6,
        2147483653,
    ): "5867703dce0e093c466f34545257bc8062acf521aa00f50b9f32dfc016cdc320",
}


@pytest.mark.parametrize("setting", PUBLISHED, ids=str)
def test_published_rows_return_to_the_bit(setting):
    vocab, length, pairs, power, filler, rows, seed = setting
    task = MQAR(vocab=vocab, length=length, pairs=pairs, power=power, filler=filler)
    batch = task.generate_published(rows, seed, torch.Generator().manual_seed(0))
    assert batch.content_hash() == PUBLISHED[setting]


def test_published_rows_return_token_by_token():
    zero = MQAR(vocab=20, length=16, pairs=2, filler="zero").generate_published(2, seed=0)
    assert zero.tokens.tolist() == [
        [8, 15, 3, 12, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0, 0],
        [4, 15, 2, 11, 4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert zero.positions.tolist() == [[6, 10], [4, 8]]
    assert zero.answers.tolist() == [[15, 12], [15, 11]]
    task = MQAR(vocab=18, length=16, pairs=4, filler="random")
    filled = task.generate_published(2, seed=3, filler_rng=torch.Generator().manual_seed(5))
    assert filled.tokens.tolist() == [
        [6, 12, 8, 11, 5, 10, 7, 17, 8, 10, 6, 12, 7, 8, 5, 6],
        [1, 12, 5, 15, 2, 9, 7, 13, 1, 7, 5, 3, 2, 12, 7, 14],
    ]
    assert filled.targets[:, 8:].tolist() == [
        [11, -100, 12, -100, 17, -100, 10, -100],
        [12, -100, 15, -100, 9, -100, 13, -100],
    ]


def test_published_draws_move_nothing_global_but_the_callers_generator():
    task, own = MQAR(vocab=64, length=32), torch.Generator().manual_seed(0)
    before_numpy, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = task.generate_published(3, 1, own)
    second = task.generate_published(3, 1, own)
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before_torch, torch.get_rng_state())
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.tokens, second.tokens)


def test_what_was_never_published_is_refused_by_name():
    with pytest.raises(NotPublishedError, match="key-free"):
        MQAR(filler="key-free").generate_published(1)
    with pytest.raises(ValueError, match="needs filler_rng"):
        MQAR(filler="random").generate_published(1)
    with pytest.raises(ValueError, match="seed 4294967296"):
        MQAR(filler="zero").generate_published(1, seed=1 << 32)
    with pytest.raises(ValueError, match="rows 0"):
        MQAR(filler="zero").generate_published(0)


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"length": 15}, ValueError, r"4 pairs .* length 15.* 4 \* pairs = 16 <= length.* to 3 .* to 16"),
        ({"pairs": 17}, ValueError, r"17 pairs .* length 64"),
        ({"pairs": 0}, ValueError, "pairs = 0"),
        ({"pairs": -2}, ValueError, "pairs = -2"),
        ({"vocab": 9}, ValueError, r"vocab 9 has 3 keys .* 4 pairs: raise vocab to 10"),
        ({"vocab": 0}, ValueError, "vocab = 0"),
        ({"power": 0.0}, ValueError, "power = 0.0"),
        ({"power": -1}, ValueError, "power = -1"),
        ({"power": math.nan}, ValueError, "power = nan"),
        ({"power": math.inf}, ValueError, "power = inf"),
        ({"power": 300}, ValueError, "power 300 makes .* 28 slots .* lower power to 211"),
        ({"filler": "keyfree"}, ValueError, "'keyfree'. Did you mean 'key-free'.*key-free, random, zero"),
        # wrong types: in which words, the type checker of the tests decides
        ({"length": 64.0}, TypeError, "(?s)length.*64.0"),
        ({"pairs": True}, TypeError, "(?s)pairs.*True"),
        ({"vocab": "8192"}, TypeError, "(?s)vocab.*'8192'"),
        ({"power": "1"}, TypeError, "(?s)power.*'1'"),
        ({"filler": None}, TypeError, "(?s)filler.*None"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_say_so_and_the_way_out(fields, error, says):
    with pytest.raises(error, match=says):
        MQAR(**fields)


def test_the_way_out_works():
    MQAR(length=15, pairs=3)
    MQAR(length=16, pairs=4)
    MQAR(vocab=10, pairs=4)
    MQAR(power=211).generate(10)  # a whole number will do as a power


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"rows": 0}, ValueError, "rows 0"),
        ({"rows": -1}, ValueError, "rows -1"),
        ({"rows": 2, "seed": -1}, ValueError, "seed -1"),
        ({"rows": 2.0}, TypeError, "(?s)rows.*2.0"),
        ({"rows": True}, TypeError, "(?s)rows.*True"),
        ({"rows": 2, "seed": 1.5}, TypeError, "(?s)seed.*1.5"),
    ],
    ids=str,
)
def test_rows_and_seeds_are_whole_numbers(arguments, error, says):
    with pytest.raises(error, match=says):
        MQAR().generate(**arguments)
