"""Models built by hand answer as their theorems say: exactly, or up to a distance, or about as often."""

import math

import pytest
import torch

from holdall.tasks.mqar import MQAR, Batch
from holdall.theory import by_hand


def rows_of(vocab: int, length: int, pairs: int, rows: int, seed: int = 0) -> Batch:
    return MQAR(vocab=vocab, length=length, pairs=pairs, filler="key-free").generate(rows, seed=seed)


def made(wanted: str, vocab: int, length: int, dtype: torch.dtype = torch.float64) -> by_hand.HandBuilt:
    return by_hand.configured(wanted, vocab=vocab, length=length).build(dtype)


def outputs(model: by_hand.HandBuilt, rows: Batch) -> torch.Tensor:
    """The last layer's outputs at the questions, (B, K, D)."""
    y_BTD, _ = model(rows.tokens)
    return y_BTD.gather(1, rows.positions[..., None].expand(-1, -1, y_BTD.shape[2]))


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (256, 64), (1024, 256)])
def test_attention_is_right_at_a_width_that_does_not_grow(length: int, pairs: int) -> None:
    model = made("attention", 8192, length)
    assert by_hand.right(model, rows_of(8192, length, pairs, 4)).all()
    assert by_hand.right(model.float(), rows_of(8192, length, pairs, 4)).all()
    report = model.report()
    assert report.width == 26 == 2 * math.ceil(math.log2(8192))
    assert report.used_state == (2 * length + 1) * 13
    assert report.state_elements == 2 * length * 13 + 1 + 26  # the count of tokens; and a convolution's input


def test_attention_needs_its_sharpness() -> None:
    model = made("attention", 8192, 256)
    model.layers[1].project.qkv.weight[:13] *= 0.05
    assert not by_hand.right(model, rows_of(8192, 256, 64, 2)).all()


@pytest.mark.parametrize("previous", ["window", "convolution"])
@pytest.mark.parametrize("length", [64, 256])
def test_linear_attention_answers_without_any_error(previous: str, length: int) -> None:
    model = made(f"linear-attention:previous={previous}", 256, length)
    rows = rows_of(256, length, length // 4, 4)
    assert by_hand.right(model, rows).all()
    assert torch.equal(outputs(model, rows), model.head_VD[rows.answers])
    table = 128 * 8
    assert model.report().used_state == table + 128
    assert model.layers[1].state_elements(length) == 132 * 8  # four lines for each of 33 heads


def test_a_window_blurs_the_previous_token_by_what_its_sharpness_leaves() -> None:
    rows = rows_of(64, 64, 8, 4)
    exact, blurred = (made(f"linear-attention:sharpness={b}", 64, 64) for b in (2000, 60))
    left = math.exp(-60 * (1 - math.cos(1)))
    assert left == pytest.approx(1e-12, rel=0.1)
    difference = (blurred.layers[0](blurred.embedding_VD[rows.tokens])[0]
                  - exact.layers[0](exact.embedding_VD[rows.tokens])[0]).abs()  # fmt: skip
    # where a sign of the value is +1 and its predecessor's -1
    assert float(difference.max()) == pytest.approx(2 * left, rel=1e-3, abs=0)
    error = (outputs(blurred, rows) - outputs(exact, rows)).abs().max()
    assert 0 < float(error) < 5e-12


def test_the_first_token_has_no_predecessor() -> None:
    for previous in ("window", "convolution"):
        model = made(f"linear-attention:previous={previous}", 64, 16)
        key, value = 5, 40
        y_BTD, _ = model(torch.tensor([[key, value, key, key]]))
        assert torch.equal(model.logits(y_BTD)[0, 2:].argmax(-1), torch.tensor([value, value]))


# ---------------------------------------------------------------------------------------------- convolution


@pytest.mark.parametrize(
    ("vocab", "length", "pairs", "digits", "layers", "width", "non_zeros"),
    [
        (64, 32, 4, 2, 4, 1008, 11_856),
        (64, 32, 8, 3, 5, 756, 7_032),
        (64, 32, 8, 6, 6, 756, 6_040),
        pytest.param(64, 32, 4, 1, 3, 4032, 148_608, marks=pytest.mark.full),
        pytest.param(256, 64, 8, 8, 6, 2032, 16_584, marks=pytest.mark.full),
        pytest.param(256, 64, 16, 4, 5, 2032, 19_608, marks=pytest.mark.full),
    ],
)
def test_shifts_answer_everything_from_as_many_layers_as_a_code_has_digits(
    vocab: int, length: int, pairs: int, digits: int, layers: int, width: int, non_zeros: int
) -> None:
    model = made(f"base-conv:digits={digits}", vocab, length)
    rows = rows_of(vocab, length, pairs, 4)
    assert by_hand.right(model, rows).all()
    report = model.report()
    assert report.layers == layers == 2 + math.ceil(math.log2(2 * digits))
    base = math.ceil(round(vocab ** (1 / digits), 9))
    assert report.width == width == digits * base * (1 + 2 * (length - 1))
    assert report.non_zeros == non_zeros
    # whole numbers: nothing is rounded, so the copies of the value add up to the code itself
    at = slice(digits * base * length, width)
    code = outputs(model, rows)[..., at].unflatten(-1, (length - 1, -1)).sum(2)
    assert torch.equal(code, by_hand.p_hot(vocab, digits)[rows.answers])


@pytest.mark.parametrize("shifts", [4, 8, 16, 24])
def test_a_question_is_right_if_and_only_if_its_key_is_near(shifts: int) -> None:
    model = made(f"base-conv:shifts={shifts}", 64, 64, torch.float32)
    rows = rows_of(64, 64, 8, 24)
    right_BK = by_hand.right(model, rows)
    near_BK = rows.positions - 2 * rows.places <= shifts
    assert torch.equal(right_BK, near_BK)
    assert torch.equal(right_BK, model.config.promised(rows))
    assert near_BK.any()
    assert not near_BK.all()


@pytest.mark.parametrize("shifts", [23, 12])
def test_two_layers_are_enough_for_one_hot_codes(shifts: int) -> None:
    model = made(f"base-conv-two-layers:shifts={shifts}", 32, 24, torch.float32)
    rows = rows_of(32, 24, 4, 32)
    right_BK = by_hand.right(model, rows)
    assert torch.equal(right_BK, rows.tags.distance <= shifts)
    assert bool(right_BK.all()) == (shifts == 23)
    assert (model.report().layers, model.report().width) == (2, 32 * (1 + 2 * shifts))


# ------------------------------------------------------------------------------------------------ Taylor


def test_taylor_holds_a_quarter_of_its_law() -> None:
    shares, accuracies = (1 / 8, 1 / 4, 1, 2), []
    for share in shares:
        config = by_hand.configured("taylor:feature_dim=16,value_dim=64", vocab=8192, length=64)
        assert round(config.most_pairs) == 303 == round(16**2 * 64 / (6 * math.log(8192)))
        pairs = round(share * config.most_pairs)
        rows = rows_of(8192, 4 * pairs, pairs, max(2, 400 // pairs))
        right_BK = by_hand.right(config.build(torch.float32), rows)
        accuracies.append(float(right_BK.double().mean()))
    # of some 400 answers, whose share spreads by 1% at 95% and by 2.5% at half
    assert accuracies[0] > 0.97
    assert accuracies[1] > 0.95
    assert 0.35 < accuracies[2] < 0.7
    assert 0.08 < accuracies[3] < 0.25


def test_fewer_lines_than_keys_cost_answers() -> None:
    rows = rows_of(256, 64, 16, 64)
    accuracy = [
        float(by_hand.right(made(f"linear-attention:lines={lines}", 256, 64), rows).double().mean())
        for lines in (4, 16, 64, 0)
    ]
    assert accuracy == sorted(accuracy)
    assert accuracy[0] < 0.3
    assert accuracy[-1] == 1.0


# ------------------------------------------------------------------------------------------------ all of them

SMALL = [
    "attention", "linear-attention", "linear-attention:lines=8", "linear-attention:previous=convolution",
    "base-conv:shifts=6", "base-conv-two-layers:shifts=3", "taylor:feature_dim=4,value_dim=8",
]  # fmt: skip


@pytest.mark.parametrize("wanted", SMALL)
def test_the_state_is_counted_and_a_row_may_be_cut_anywhere(wanted: str) -> None:
    model, rows = made(wanted, 32, 24), rows_of(32, 24, 4, 3)
    whole_BTD, states = model(rows.tokens)
    held = sum(part[0].numel() for state in states for part in state)
    assert held == model.state_elements(24) == model.report().state_elements
    assert 0 < model.report().used_state <= held
    first_BTD, states = model(rows.tokens[:, :9])
    last_BTD, _ = model(rows.tokens[:, 9:], states)
    # sums of 24 terms in fp64, taken in another order
    scale = float(whole_BTD.abs().max())
    assert float((torch.cat((first_BTD, last_BTD), dim=1) - whole_BTD).abs().max()) <= 1e-13 * scale
    assert torch.equal(list(model.between(rows.tokens))[-1], model(rows.tokens, want_state=False)[0])


def test_every_construction_is_listed_and_says_what_it_claims() -> None:
    known = by_hand.constructions()
    assert list(known) == ["attention", "linear-attention", "taylor", "base-conv", "base-conv-two-layers"]
    for name, config in known.items():
        assert config.name == name
        assert config.claim.endswith(".")
        for options in config.sizes:
            assert "by hand" in config.from_dict({"vocab": 256, "length": 64, **options}).label


def test_building_one_moves_no_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made("taylor", 64, 16)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("wanted", "vocab", "error", "words"),
    [
        ("atention", 32, KeyError, "unknown construction 'atention'. Did you mean 'attention'"),
        ("attention:lines=3", 32, TypeError, "has no field 'lines'"),
        ("base-conv:shifts=-1", 32, ValueError, "shifts"),
        ("base-conv:digits=1", 1024, ValueError, "lower vocab, or give shifts, at most 1, or more digits"),
        ("base-conv:digits=1", 8192, ValueError, "more than 4096: lower vocab, or give more digits$"),
        ("base-conv-two-layers", 256, ValueError, "more than 4096: lower vocab, or give shifts, at most 7$"),
        ("base-conv-two-layers", 8192, ValueError, "more than 4096: lower vocab$"),
        ("linear-attention", 8192, ValueError, "lower vocab, or give lines, at most"),
        ("linear-attention:window", 32, ValueError, "write options as option=value"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    wanted: str, vocab: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        by_hand.configured(wanted, vocab=vocab, length=64)


def test_codes_tell_all_tokens_apart() -> None:
    for count in (2, 3, 27, 64):
        for code in (by_hand.signs(count), *(by_hand.p_hot(count, digits) for digits in (1, 2, 3))):
            assert len(code.unique(dim=0)) == count
            own = (code @ code.T).diagonal()
            others = (code @ code.T - torch.diag(own)).max(1).values
            assert (own > others).all()
    assert by_hand.base_of(64, 3) == 4
    assert by_hand.base_of(65, 3) == 5
