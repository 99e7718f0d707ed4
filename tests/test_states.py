"""The public functions on states: of one mixer and of a model, with what does not fit refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import holdall
from holdall import states
from holdall.contract import Mixer, capacity_of
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig

ROWS, READ, WIDTH, VOCAB = 3, 5, 8, 11
LAYERS = (TaylorConfig(width=WIDTH, feature_dim=2), AttentionConfig(width=WIDTH))


def made_mixer(name: str = "taylor", width: int = WIDTH) -> Mixer:
    torch.manual_seed(0)
    return holdall.build(name, width=width)


def made_model(positions: int = 0) -> Model:
    torch.manual_seed(0)
    return ModelConfig(vocab=VOCAB, width=WIDTH, layers=LAYERS, positions=positions).build()


def activations(tokens: int = READ, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


def tokens_of(count: int = READ, rows: int = ROWS) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, count), generator=torch.Generator().manual_seed(count))


def assert_equal(one: object, other: object) -> None:
    """Kind, dtypes and every element."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        return
    for a, b in zip(one, other, strict=True):  # type: ignore[call-overload]
        assert_equal(a, b)


@pytest.mark.quick
def test_the_package_offers_states_by_name() -> None:
    from holdall import states as found

    assert found is states
    assert {"save", "load", "select", "join", "to", "detach"} <= set(states.__all__)
    assert all(getattr(states, name).__doc__ for name in states.__all__)


@pytest.mark.quick
def test_rows_of_a_model_continue_as_its_own_batch_does() -> None:
    model, read, more = made_model(positions=32), tokens_of(), tokens_of(4)
    _, after = model(read)
    picked = states.select(after, [2, 0, 2])
    assert isinstance(picked, list)
    assert len(picked) == 3  # two layers and the positions
    whole, _ = model(more, after)
    some, _ = model(more[[2, 0, 2]], picked)
    torch.testing.assert_close(some, whole[[2, 0, 2]])
    again = states.join([states.select(after, [0]), states.select(after, [1, 2])])
    assert_equal(again, after)


def test_rows_of_different_lengths_become_one_batch() -> None:
    model, more = made_model(), tokens_of(4, rows=2)
    texts = [tokens_of(3, rows=1), tokens_of(7, rows=1)]
    after = [model(text)[1] for text in texts]
    together, _ = model(more, states.join(after))
    for row, state in enumerate(after):
        alone, _ = model(more[row : row + 1], state)
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.quick
def test_what_was_saved_continues_as_if_it_had_stayed(tmp_path: Path) -> None:
    mixer, file = made_mixer("attention"), tmp_path / "one.safetensors"
    _, state = mixer(activations())
    states.save(state, file, model="mine", tokens_read=[READ] * ROWS)
    assert states.describe(file)[:2] == ("mine", [READ] * ROWS)
    back = states.load(str(file), mixer, model="mine")
    assert_equal(back, state)
    assert_equal(mixer(activations(2), back), mixer(activations(2), state))
    roomy = states.load(file, mixer, capacity=20)
    assert capacity_of(roomy) == 20


@pytest.mark.parametrize("positions", [0, 32])
def test_a_model_s_states_are_saved_and_loaded_by_one_call(positions: int, tmp_path: Path) -> None:
    model, file = made_model(positions), tmp_path / "all.safetensors"
    _, after = model(tokens_of())
    states.save(after, file)
    assert_equal(states.load(file, model), after)
    assert_equal(states.load(file, model.mixers), after)


def test_a_state_follows_its_mixer_to_another_dtype(tmp_path: Path) -> None:
    """A recurrence stays in fp32 beside bf16 activations, a cache does not: so a cast would be wrong."""
    model, file = made_model(positions=32), tmp_path / "fp32.safetensors"
    _, after = model(tokens_of())
    states.save(after, file)
    model.bfloat16()
    with pytest.raises(states.StateError, match=r"float32, where attention of width 8 needs .*bfloat16"):
        model(tokens_of(1), after)
    for moved in (states.to(after, model), states.load(file, model)):
        assert [tensor.dtype for tensor in moved[0]] == [torch.float32] * len(moved[0])
        assert moved[1].k_BSHK.dtype == torch.bfloat16
        assert moved[2].seen_B.dtype == torch.long
        model(tokens_of(1), moved)
    (one,) = [states.to(after[1], model.mixers[1])]
    assert_equal(one, states.to(after, model)[1])
    assert all(new is old for new, old in zip(states.to(one, model.mixers[1]), one, strict=True))


def test_a_state_with_room_follows_too() -> None:
    mixer = made_mixer("attention")
    state = mixer.init_state(ROWS, dtype=torch.float32, capacity=8)
    _, state = mixer(activations(), state)
    moved = states.to(state, mixer.bfloat16())
    assert type(moved) is type(state)
    assert moved.k_BSHK.dtype == torch.bfloat16
    assert_equal(moved.filled_B, state.filled_B)


def test_states_move_to_a_device() -> None:
    _, after = made_model(positions=32)(tokens_of())
    moved = states.to(after, "meta")
    assert {tensor.device.type for state in moved for tensor in state} == {"meta"}
    assert {tensor.device.type for state in after for tensor in state} == {"cpu"}


@pytest.mark.quick
def test_no_gradient_passes_a_detached_state_and_no_memory_is_copied() -> None:
    mixer, x_BTD = made_mixer(), activations().requires_grad_()
    _, state = mixer(x_BTD)
    cut = states.detach(state)
    assert not any(tensor.requires_grad for tensor in cut)
    assert all(new.data_ptr() == old.data_ptr() for new, old in zip(cut, state, strict=True))
    y_BTD, _ = mixer(activations(2), cut)
    y_BTD.sum().backward()
    assert x_BTD.grad is None
    y_BTD, _ = mixer(activations(2), state)
    y_BTD.sum().backward()
    assert x_BTD.grad is not None


def test_a_clone_stays_when_the_state_is_given_away() -> None:
    mixer = made_mixer()
    with torch.no_grad():
        _, state = mixer(activations())
        copy = states.clone(state)
        before = [tensor.tolist() for tensor in state]
        mixer(activations(2), state, inplace=True)
    assert [tensor.tolist() for tensor in copy] == before
    assert [tensor.tolist() for tensor in state] != before


@pytest.mark.quick
def test_the_bytes_of_a_row_are_those_that_the_model_reports() -> None:
    model = made_model(positions=32)
    _, after = model(tokens_of())
    assert states.bytes_per_row(after) == model.state_bytes(READ)
    assert states.bytes_per_row(after) == sum(map(states.bytes_per_row, after))


def of_other_width(tmp_path: Path) -> None:
    other = made_mixer(width=16)
    _, state = other(torch.zeros(1, 1, 16))
    states.save(state, tmp_path / "file")
    states.load(tmp_path / "file", made_mixer())


def of_other_mixer(tmp_path: Path) -> None:
    _, state = made_mixer()(activations())
    states.to(state, SlidingWindowConfig(width=WIDTH).build())


def of_other_weights(tmp_path: Path) -> None:
    mixer = made_mixer()
    states.save(mixer(activations())[1], tmp_path / "file", model="this")
    states.load(tmp_path / "file", mixer, model="that")


def of_other_depth(tmp_path: Path) -> None:
    _, after = made_model()(tokens_of())
    states.to(after, made_model(positions=32))


def file_of_other_depth(tmp_path: Path) -> None:
    states.save(made_model(positions=32)(tokens_of())[1], tmp_path / "file")
    states.load(tmp_path / "file", made_model())


def joined_depths(tmp_path: Path) -> None:
    states.join([made_model()(tokens_of())[1], made_model(positions=32)(tokens_of())[1]])


def joined_mixers(tmp_path: Path) -> None:
    states.join([made_mixer(name)(activations())[1] for name in ("taylor", "attention")])


def other_batch(tmp_path: Path) -> None:
    mixer = made_mixer()
    mixer(activations(rows=2), states.select(mixer(activations())[1], [0]))


@pytest.mark.parametrize(
    ("mistake", "error", "says"),
    [
        (of_other_width, states.StateError, r"file: s_BHFV of layer 0 has shape .* taylor of width 8 needs"),
        (
            of_other_mixer,
            states.StateError,
            "is a NormalisedState, where sliding-window of width 8 needs a Key",
        ),
        (of_other_weights, states.StateError, "has states of model this, not of this one, that"),
        (of_other_depth, states.StateError, "2 states, where the model has 3"),
        (file_of_other_depth, states.StateError, "file: 3 states, where the model has 2"),
        (joined_depths, states.StateError, "state 1 has 3 layers .* the first, which has 2"),
        (joined_mixers, states.StateError, "state 1 cannot be joined with the first"),
        (other_batch, states.StateError, "needs 2 rows"),
        (lambda _: states.join([]), ValueError, "there is no state to join"),
        (lambda _: states.select(made_mixer()(activations())[1], [7]), ValueError, r"rows \[7\] of a state"),
        (lambda _: states.detach(None), TypeError, "a list with one per layer, not None"),
        (lambda _: states.detach([None]), TypeError, "not a list"),
        (
            lambda folder: states.load(folder / "none", made_mixer()),
            holdall.files.RunError,
            "none is missing",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    mistake: object, error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        mistake(tmp_path)  # type: ignore[operator]


def test_a_session_says_where_its_states_are() -> None:
    session = holdall.load().read("It is")
    with pytest.raises(TypeError, match=r"not a Session; a session has them in \.states"):
        states.detach(session)
    assert len(states.select(session.states, [0, 0])[0][0]) == 2
