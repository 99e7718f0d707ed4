"""States with room: what the laws do not say of them, and models and files of such states."""

import copy
import dataclasses
import inspect
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import holdall
from holdall.contract import (
    Mixer,
    MixerConfig,
    StateError,
    StateFileWarning,
    bytes_per_row,
    capacity_of,
    describe_states,
    is_reserved,
    join_rows,
    load_states,
    map_state,
    room,
    room_left,
    save_states,
    select_rows,
    trim,
    write_state,
)
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.linformer import LinformerConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import Model, ModelConfig
from holdall.testing import laws

LAYERS = (
    AttentionConfig(width=16, heads=2),
    BaseConvConfig(width=16, filter="long", max_length=64),
    SlidingWindowConfig(width=16, window=5),
)
CONFIG = ModelConfig(vocab=40, width=16, layers=LAYERS, mlp=32, positions=32)


def build(config: ModelConfig = CONFIG) -> Model:
    torch.manual_seed(0)
    return config.build().double().eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(seed))


def addresses(states: list[Any]) -> list[int]:
    return [tensor.data_ptr() for state in states for tensor in state]


def as_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host does not ask how much a row has read."""
    monkeypatch.setattr(room, "known_to_the_host", lambda filled_B: False)


# ----------------------------------------------------------------------------------------------- a model's


@torch.no_grad()
@pytest.mark.parametrize("positions", [0, 32])
def test_a_model_reads_with_a_capacity_what_it_reads_without_at_the_same_addresses(positions: int) -> None:
    model = build(dataclasses.replace(CONFIG, positions=positions))
    ids = tokens(2, 20)
    states, grown, at = model.init_states(2, capacity=20), None, 0
    where = addresses(states)
    for size in (1, 1, 9, 1, 8):
        got, states = model(ids[:, at : at + size], states, inplace=True)
        want, grown = model(ids[:, at : at + size], grown)
        laws.assert_close("logits", got, want)
        assert addresses(states) == where
        at += size
    for state, other in zip(states, grown, strict=True):
        for tensor, want in zip(trim(state), other, strict=True):
            laws.assert_close("state", tensor, want)
    assert [room_left(state) for state in states] == [0, 0, None, *[0] * bool(positions)]
    before = [map_state(state, torch.clone) for state in states]
    with pytest.raises(StateError, match=r"20 tokens were read, and 1 more do not fit .* capacity of 20"):
        model(ids[:, :1], states, inplace=True)
    for state, old in zip(states, before, strict=True):
        assert all(map(torch.equal, state, old))


@torch.no_grad()
def test_a_model_s_states_are_given_more_room() -> None:
    model = build()
    _, grown = model(tokens(2, 9))
    _, full = model(tokens(2, 9), model.init_states(2, capacity=9))
    want, _ = model(tokens(2, 3, seed=1), grown)
    for states in (grown, full):
        wider = model.with_room(states, 12)
        where = addresses(wider)
        logits, after = model(tokens(2, 3, seed=1), wider, inplace=True)
        laws.assert_close("logits", logits, want)
        assert addresses(after) == where
        assert room_left(after[-1]) == 0
    with pytest.raises(ValueError, match="a capacity of 33 tokens, but the model has 32 learned positions"):
        model.with_room(grown, 33)
    with pytest.raises(StateError, match="needs 4 states, not 3"):
        model.with_room(grown[:-1], 12)


@torch.no_grad()
def test_rows_come_and_go_in_fixed_buffers() -> None:
    """A finished row's place is taken by another sequence, of another length: each reads as if alone."""
    model = build()
    buffers = model.init_states(3, capacity=24)
    where = addresses(buffers)
    _, buffers = model(tokens(3, 17), buffers, inplace=True)
    alone = model(tokens(1, 5, seed=1), model.init_states(1, capacity=24))[1]
    for buffer, state in zip(buffers, alone, strict=True):
        for tensor, row in zip(buffer, state, strict=True):
            tensor[1:2] = row
    logits, buffers = model(tokens(3, 4, seed=2), buffers, inplace=True)
    assert addresses(buffers) == where
    for row, (read, seed) in enumerate([(17, 0), (5, 1), (17, 0)]):
        before = tokens(3, read)[row : row + 1] if seed == 0 else tokens(1, read, seed=seed)
        want, _ = model(tokens(3, 4, seed=2)[row : row + 1], model(before)[1])
        laws.assert_close(f"row {row}", logits[row], want[0])
    assert buffers[-1].seen_B.tolist() == [21, 9, 21]
    # rows that are packed to the front are read by themselves, in the same buffers
    front = [map_state(state, lambda tensor: tensor[:2]) for state in buffers]
    want, _ = model(tokens(2, 2, seed=3), [map_state(state, torch.clone) for state in front])
    behind = [tensor[2:].clone() for state in buffers for tensor in state]
    logits, _ = model(tokens(2, 2, seed=3), front, inplace=True)
    laws.assert_close("the front rows", logits, want)
    assert buffers[-1].seen_B.tolist() == [23, 11, 21]
    assert all(torch.equal(a[2:], b) for a, b in zip((t for s in buffers for t in s), behind, strict=True))


@torch.no_grad()
def test_rows_of_states_with_room_are_selected_and_joined() -> None:
    model = build()
    long, short = (
        model(tokens(1, n, seed=n), model.init_states(1, capacity=c))[1] for n, c in ((12, 16), (3, 20))
    )
    joined = [join_rows(pair) for pair in zip(long, short, strict=True)]
    assert {capacity_of(state) for state in joined if is_reserved(state)} == {20}
    picked = [select_rows(state, [1, 0, 1]) for state in joined]
    logits, _ = model(tokens(1, 4).expand(3, -1), picked)
    for row, n in enumerate((3, 12, 3)):
        want, _ = model(tokens(1, 4), model(tokens(1, n, seed=n))[1])
        laws.assert_close(f"row {row}", logits[row], want[0])
    for capacity, left in ((30, 18), (12, 0)):  # more room or less, and every row keeps its own count
        moved = model.with_room(joined, capacity)
        assert moved[0].filled_B.tolist() == [12, 3]
        assert room_left(moved[0]) == left
    want, _ = model(tokens(2, 4), joined)
    laws.assert_close("with more room", model(tokens(2, 4), model.with_room(joined, 30))[0], want)
    with pytest.raises(ValueError, match="a state of 12 tokens does not fit a capacity of 11"):
        model.with_room(joined, 11)
    with pytest.raises(StateError, match="cannot be joined with the first"):
        join_rows([long[0], model(tokens(1, 3))[1][0]])


@torch.no_grad()
def test_states_with_room_are_pickled_and_copied() -> None:
    model = build()
    _, states = model(tokens(2, 5), model.init_states(2, capacity=9))
    for again in (copy.deepcopy(states), pickle.loads(pickle.dumps(states))):
        assert [type(state) for state in again] == [type(state) for state in states]
        for state, other in zip(again, states, strict=True):
            assert all(map(torch.equal, state, other))


def test_bytes_with_a_capacity_are_those_of_the_tensors() -> None:
    model = build()
    for capacity in (1, 32):
        states = model.init_states(1, capacity=capacity)
        assert model.reserved_bytes(capacity) == sum(map(bytes_per_row, states))
    assert model.reserved_bytes(32) - model.reserved_bytes(31) == 8 * (2 * 16 + 16)
    # with room for what was read, the counts of slots alone are more
    assert model.reserved_bytes(20) - model.state_bytes(20) == 3 * 8


def test_more_room_than_there_are_positions_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="a capacity of 33 tokens, but the model has 32 learned positions"):
        model.init_states(1, capacity=33)
    with pytest.raises(ValueError, match="a capacity of 9 tokens, but linformer has max_length 8"):
        LinformerConfig(width=16, max_length=8).build().init_state(1, dtype=torch.float32, capacity=9)
    states = model.init_states(1, capacity=32)
    states[-1] = room.reserve(trim(states[-1]), ("read_BT0",), 40)
    with pytest.raises(ValueError, match="a capacity of 40 tokens, but the model has 32 learned positions"):
        model(tokens(1, 1), states)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        model.init_states(1, capacity=0)


@torch.no_grad()
@pytest.mark.parametrize("positions", [0, 32])
@pytest.mark.parametrize("layer", range(2))
def test_where_the_host_does_not_know_a_full_row_is_nan_and_the_others_are_not(
    layer: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_unknown(monkeypatch)
    model = build(dataclasses.replace(CONFIG, layers=LAYERS[layer : layer + 1], positions=positions))
    long, short = (model(tokens(1, n), model.init_states(1, capacity=8))[1] for n in (6, 2))
    states = [join_rows(pair) for pair in zip(long, short, strict=True)]
    where = addresses(states)
    logits, states = model(tokens(2, 4, seed=1), states, inplace=True)
    assert addresses(states) == where
    assert logits.isnan().all(-1).tolist() == [[True] * 4, [False] * 4]
    want, _ = model(tokens(2, 4, seed=1)[1:], model(tokens(1, 2))[1])
    laws.assert_close("the other row", logits[1], want[0])
    with pytest.raises(ValueError, match="10 tokens were read into a state with a capacity of 8"):
        trim(states[-1])
    with pytest.raises(StateError, match="9 more do not fit"):  # which needs no count
        model(tokens(2, 9), states)


@torch.no_grad()
def test_a_mixer_of_a_mixer_counts_its_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that calls the forward of the class it extends passes the border twice."""
    as_unknown(monkeypatch)
    mixer = AttentionConfig(width=16, heads=2).build().double()

    class Extended(type(mixer)):
        def forward(self, x_BTD: Tensor, state: Any = None, **how: Any) -> tuple[Tensor, Any]:
            return super().forward(x_BTD, state, **how)

    extended = Extended(mixer.config).double()
    extended.load_state_dict(mixer.state_dict())
    x_BTD = laws.draw(1, 8, 16, dtype=torch.float64)
    for each in (mixer, extended):
        state = each.init_state(1, dtype=x_BTD.dtype, capacity=8)
        y_BTD = torch.cat([each(x_B1D, state, inplace=True)[0] for x_B1D in x_BTD.split(1, dim=1)], dim=1)
        laws.assert_close("outputs up to the last that fits", y_BTD, mixer(x_BTD)[0])


# ------------------------------------------------------------------------------------------------- files


@torch.no_grad()
def test_a_file_holds_what_was_read_and_may_be_given_room_again(tmp_path: Path) -> None:
    model, plain, roomy = build(), tmp_path / "plain.safetensors", tmp_path / "roomy.safetensors"
    _, grown = model(tokens(2, 9))
    _, states = model(tokens(2, 9), model.init_states(2, capacity=30))
    save_states(grown, plain)
    save_states(states, roomy)
    assert abs(plain.stat().st_size - roomy.stat().st_size) < 100
    want, _ = model(tokens(2, 3, seed=1), grown)
    for file in (plain, roomy):
        assert describe_states(file).tokens_read == [9, 9]
        laws.assert_close(
            "from a file", model(tokens(2, 3, seed=1), load_states(file, model.mixers))[0], want
        )
        loaded = load_states(file, model.mixers, capacity=12)
        where = addresses(loaded)
        logits, after = model(tokens(2, 3, seed=1), loaded, inplace=True)
        laws.assert_close("with room again", logits, want)
        assert addresses(after) == where
        with pytest.raises(StateError, match="capacity of 12"):
            model(tokens(2, 1), after)
    with pytest.raises(ValueError, match="a state of 9 tokens does not fit a capacity of 8"):
        load_states(plain, model.mixers, capacity=8)


@torch.no_grad()
def test_a_file_names_its_model_and_another_s_is_refused(tmp_path: Path) -> None:
    model, file = build(), tmp_path / "state.safetensors"
    _, states = model(tokens(2, 9))
    save_states(states, file, model="0123abcd")
    assert describe_states(file)[:2] == ("0123abcd", [9, 9])
    load_states(file, model.mixers, model="0123abcd")
    load_states(file, model.mixers)
    with pytest.raises(StateError, match=r"has states of model 0123abcd, not of this one, feedbeef"):
        load_states(file, model.mixers, model="feedbeef")


@torch.no_grad()
def test_a_file_of_before_is_read_with_a_warning_that_it_cannot_be_checked(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    mixer, file = LAYERS[1].build(), tmp_path / "state.safetensors"
    past_BPD = torch.randn(2, 3, 16)
    save_file({"0.ConvState.past_BPD": past_BPD}, file, {"format": "holdall-state-1"})
    assert describe_states(file)[:2] == ("", None)
    assert torch.equal(load_states(file, [mixer])[0][0], past_BPD)
    with pytest.warns(StateFileWarning, match="does not name its model"):
        load_states(file, [mixer], model="0123abcd")


@torch.no_grad()
def test_the_caller_may_say_how_many_tokens_were_read(tmp_path: Path) -> None:
    mixer, file = holdall.build("mamba", width=16), tmp_path / "state.safetensors"
    save_states([mixer(torch.ones(2, 3, 16))[1]], file)
    assert describe_states(file).tokens_read is None
    save_states([mixer(torch.ones(2, 3, 16))[1]], file, tokens_read=[3, 3])
    assert describe_states(file).tokens_read == [3, 3]


# ---------------------------------------------------------------------------------------------- no copies

WRITTEN = {
    "attention": ("k_BSHK", "v_BSHV"),
    "repeat-attention": ("k_BSHK", "v_BSHV", "id_BS"),
    "sliding-window": ("k_BSHK", "v_BSHV"),
    "linear-attention": ("s_BHFV", "z_BHF"),
    "taylor": ("s_BHFV", "z_BHF"),
    "retnet": ("s_BHKV",),
    "gla": ("s_BHKV",),
    "mamba-2": ("s_BHNV",),
    "mamba": ("h_BEN",),
    "delta-net": ("s_BHKV",),
    "gated-delta-net": ("s_BHKV",),
    "kimi-delta-attention": ("s_BHKV",),
    "rwkv-5": ("s_BHKV",),
    "rwkv-7": ("s_BHKV",),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRITTEN)
def test_one_token_is_written_into_a_large_state_by_its_op_and_not_copied(name: str) -> None:
    """The border would copy a new tensor into the old one unseen, which takes as long as the step."""
    mixer = laws.of_x_alone(holdall.build(name, width=16, form="parallel"))
    state = mixer.init_state(2, dtype=torch.float32, capacity=4)
    kind = type(mixer).__mro__[1] if mixer.reads_tokens else type(mixer)
    ids = {"tokens_BT": torch.zeros(2, 1, dtype=torch.long)} if mixer.reads_tokens else {}
    _, after = inspect.unwrap(kind.forward)(
        mixer, laws.draw(2, 1, 16, dtype=torch.float32), state, inplace=True, **ids
    )
    for field in WRITTEN[name]:
        assert getattr(after, field) is getattr(state, field), field


# ------------------------------------------------------------------------------------- a mixer of one's own


class Kept(NamedTuple):
    x_BTD: Tensor
    last_BD: Tensor
    before_BD: Tensor


@dataclass(frozen=True, kw_only=True)
class OwnConfig(MixerConfig):
    most: int = 1000
    forms = ("loop",)

    def build(self) -> "Own":
        return Own(self)


class Own(Mixer):
    """The mean of the last `most` tokens; it keeps the last two beside them, which change places."""

    state_type = Kept

    def forward(self, x_BTD: Tensor, state: Any = None, *, inplace: bool = False, want_state: bool = True):  # type: ignore[no-untyped-def]
        if state is None:
            state = self.init_state(len(x_BTD), dtype=x_BTD.dtype, device=x_BTD.device)
        seen_BTD, last_BD, before_BD = state
        ys = []
        for t in range(x_BTD.shape[1]):
            seen_BTD = torch.cat((seen_BTD, x_BTD[:, t : t + 1]), dim=1)[:, -self.config.most :]
            last_BD, before_BD = x_BTD[:, t], last_BD
            ys.append(seen_BTD.sum(1) + last_BD + before_BD)
        return torch.stack(ys, dim=1), Kept(seen_BTD, last_BD, before_BD)

    def init_state(self, batch, *, dtype, device=None):  # type: ignore[no-untyped-def]
        x_BD = torch.zeros(batch, self.config.width, dtype=dtype, device=device)
        return Kept(x_BD[:, None, :][:, :0], x_BD, x_BD.clone())

    def state_elements(self, context_len: int) -> int:
        return (min(context_len, self.config.most) + 2) * self.config.width


def test_a_mixer_of_one_s_own_has_room_without_a_line_of_code() -> None:
    mixer = OwnConfig(width=4).build()
    state, grown, x_BTD = (
        mixer.init_state(2, dtype=torch.float64, capacity=9),
        None,
        laws.draw(2, 9, 4, dtype=torch.float64),
    )
    where = addresses([state])
    for piece in x_BTD.split([1, 1, 4, 3], dim=1):
        y_BTD, state = mixer(piece, state, inplace=True)
        want_BTD, grown = mixer(piece, grown)
        laws.assert_close("output", y_BTD, want_BTD)
        assert addresses([state]) == where
    for tensor, want in zip(trim(state), grown, strict=True):
        assert torch.equal(tensor, want)


def test_a_mixer_that_grows_otherwise_is_asked_to_take_the_capacity_itself() -> None:
    mixer = OwnConfig(width=4, most=5).build()
    state = mixer.init_state(2, dtype=torch.float32, capacity=9)
    with pytest.raises(
        StateError, match="does not grow by one per token: have its init_state take a capacity"
    ):
        mixer(torch.ones(2, 1, 4), state)


class Two(NamedTuple):
    a: Tensor
    b: Tensor


def test_fields_that_change_places_are_written_in_place() -> None:
    given = Two(torch.zeros(2), torch.ones(2))
    after = write_state(given, Two(given.b, given.a))
    assert after.a is given.a
    assert after.b is given.b
    assert (after.a.tolist(), after.b.tolist()) == ([1, 1], [0, 0])
    assert write_state(given, after).a is given.a
