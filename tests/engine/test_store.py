"""The state store: what is found, what that saves, and what never happens to its limits and files."""

import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import children
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from holdall import checkpoints
from holdall.contract import StateError, map_state
from holdall.engine import session as sessions
from holdall.engine import store as stores
from holdall.engine.session import CHUNK, Past, Session, load_session, read, save_session
from holdall.engine.store import PinError, StateStore, StoreConfig, StoreWarning
from holdall.files import RunError
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig
from holdall.precision import compute_in

RECURRENT = ModelConfig(
    vocab=40,
    width=16,
    layers=(
        TaylorConfig(width=16, heads=2, feature_dim=4),
        SlidingWindowConfig(width=16, window=5),
        BaseConvConfig(width=16),
    ),
)
CONFIGS = {
    "recurrent": RECURRENT,
    "attention": replace(
        RECURRENT, layers=(AttentionConfig(width=16, heads=2), *RECURRENT.layers[:1]), positions=2048
    ),
}
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1)


def build(config: ModelConfig = RECURRENT, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return config.build().to(dtype).eval()


MODEL = build()


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(40, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def made(tokens: Sequence[int], model: Model = MODEL) -> Session:
    """A session that says it has read these tokens, and can be told from others: reading takes too long."""
    value = float(hash(tuple(tokens)) % 1000)
    states = [map_state(state, lambda t: t.new_full(t.shape, value)) for state in model.init_states(1)]
    return Session(states, torch.full((40,), value), Past().after(tokens))


def store_of(
    folder: Path | None = None, *, model: Model = MODEL, fingerprint: str = "abc", **limits: int
) -> StateStore:
    config = StoreConfig(folder=None if folder is None else str(folder), **limits)
    return StateStore(config, fingerprint=fingerprint, model=model)


SIZE = made([1]).nbytes


def tensors(session: Session) -> list[torch.Tensor]:
    return [session.logits_V, *(tensor for state in session.states for tensor in state)]


def assert_same(got: Session | None, want: Session) -> None:
    """Bit for bit."""
    assert got is not None
    assert got.past == want.past
    assert [type(state) for state in got.states] == [type(state) for state in want.states]
    for one, other in zip(tensors(got), tensors(want), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.cpu().numpy().tobytes() == other.cpu().numpy().tobytes()


def the_files(folder: Path) -> list[Path]:
    """Those in place, not what a process is about to write."""
    return sorted(folder.glob("*/*.safetensors"))


# --------------------------------------------------------------------------------------- what a hit is worth


@pytest.mark.parametrize("place", ["memory", "file", "restart"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_hit_resumes_to_the_bit(name: str, dtype: torch.dtype, place: str, tmp_path: Path) -> None:
    model = build(CONFIGS[name], dtype)
    for length in LENGTHS:
        prompt = ids(length + 70)
        before = read(model, prompt[:length])
        store = store_of(tmp_path / str(length), model=model)
        store.put(before)
        if place == "file":
            store.flush()
            store._evict()  # which leaves it to its file alone
        elif place == "restart":
            store.flush()
            store = store_of(tmp_path / str(length), model=model)
        hit = store.longest(prompt)
        assert_same(hit, before)
        assert_same(read(model, prompt[length:], hit), read(model, prompt[length:], before))
        assert store.stats().file_hits == (place != "memory")
        # at a point of the grid that is also what is read where nothing was stored
        if length % CHUNK == 0:
            assert_same(read(model, prompt[length:], hit), read(model, prompt))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_exact_prompt_again_reads_no_token(length: int) -> None:
    prompt, store = ids(length), store_of()
    store.put(read(MODEL, prompt))
    hit = store.longest(prompt)
    assert hit is not None
    assert hit.past.count == length
    assert_same(hit, read(MODEL, prompt))
    assert store.stats().tokens_saved == length


def test_a_shared_system_prompt_hits_from_the_third_request_on() -> None:
    """As an engine uses the store: a snapshot where an earlier prompt agrees, and one at the end."""
    store, system, hits = store_of(), ids(2 * CHUNK + 100), []
    for request in range(5):
        prompt = [*system, *ids(50, seed=1 + request)]
        session, shared = store.resume(prompt)
        hits.append(0 if session is None else session.past.count)
        if shared > hits[-1]:
            session = read(MODEL, prompt[hits[-1] : shared], session)
            store.put(session)
        done = 0 if session is None else session.past.count
        store.put(last := read(MODEL, prompt[done:], session))
        assert_same(last, read(MODEL, prompt))
    assert hits == [0, 0, 2 * CHUNK, 2 * CHUNK, 2 * CHUNK]


def test_nothing_that_is_done_with_a_session_changes_what_is_stored() -> None:
    prompt, store = ids(20), store_of()
    want = read(MODEL, prompt)
    store.put(given := read(MODEL, prompt))
    for tensor in tensors(given):
        tensor.zero_()
    hit = store.longest(prompt)
    assert_same(hit, want)
    assert hit is not None
    MODEL.hidden(torch.tensor([[1, 2, 3]]), hit.states, inplace=True)
    hit.logits_V.zero_()
    assert_same(store.longest(prompt), want)


def test_a_copy_is_waited_for_by_whoever_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As from a GPU, whose copies to the host take their time: here they hold nothing before they arrive."""

    class Late:
        """The event after which a copy is there."""

        def __init__(self, given: Session) -> None:
            self.want, self.copy, self.waits = given, stores._copied(given, torch.device("cpu")), 0
            for tensor in tensors(self.copy):
                tensor.fill_(-7)
            late.append(self)

        def synchronize(self) -> None:
            self.waits += 1
            for mine, want in zip(tensors(self.copy), tensors(self.want), strict=True):
                mine.copy_(want)

    late = list[Late]()

    def to_host(session: Session) -> tuple[Session, Late]:
        arrival = Late(session)
        return arrival.copy, arrival

    monkeypatch.setattr(stores, "_to_host", to_host)
    store = store_of(tmp_path, memory=2 * SIZE)
    for tokens in ([1], [2], [1], [3]):  # 2 leaves for its file when 3 comes
        store.put(made(tokens))
    assert [arrival.waits for arrival in late] == [0, 1, 0]
    assert_same(store.longest([1, 9]), made([1]))
    assert [arrival.waits for arrival in late] == [1, 1, 0]
    store.flush()
    assert late[2].waits == 1
    restarted = store_of(tmp_path)
    for number in (1, 2, 3):
        assert_same(restarted.longest([number]), made([number]))


@pytest.mark.gpu
def test_a_session_on_a_gpu_may_be_overwritten_as_soon_as_it_is_stored() -> None:
    """The copy to the host is made while the GPU computes other things, and its memory is used again."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = build().cuda()
    store, kept = store_of(model=model, memory=1 << 26), list[Session]()
    work = torch.randn(4096, 4096, device="cuda")
    for number in range(50):
        session = made([number], model).to("cuda")
        kept.append(stores._copied(session, torch.device("cuda")))
        work = (work @ work).tanh()  # or the copies would be made before they could be overwritten
        store.put(session)
        for tensor in tensors(session):
            tensor.zero_()
        del session
    for number, want in enumerate(kept):
        assert_same(store.longest([number]), want)


def test_a_view_of_a_large_buffer_is_kept_as_small_as_it_is() -> None:
    """As the rows of an engine's buffers, which change with the next step."""
    buffer = torch.zeros(1000, 40)
    session = made([1, 2])._replace(logits_V=buffer[7])
    store = store_of(memory=SIZE)
    store.put(session)
    assert len(store) == 1
    buffer.fill_(9.0)
    hit = store.longest([1, 2])
    assert hit is not None
    assert not hit.logits_V.any()
    assert held(store) == store.nbytes == SIZE


def test_a_session_lies_in_memory_as_its_file_does() -> None:
    """A product's bits may depend on strides: so a hit has the same, whether it was in a file or not."""

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mT.contiguous().mT if tensor.ndim > 2 else tensor

    states = [map_state(state, turned) for state in made([1]).states]
    assert not all(tensor.is_contiguous() for state in states for tensor in state)
    store = store_of()
    store.put(made([1])._replace(states=states))
    hit = store.longest([1])
    assert_same(hit, made([1]))
    assert hit is not None
    assert all(tensor.is_contiguous() for tensor in tensors(hit))


def held(store: StateStore) -> int:
    """Bytes of memory that the sessions in memory hold, whatever the store says."""
    kept = [tensor for entry in store._memory.values() for tensor in tensors(entry.session)]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


# --------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("at", [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 9])
def test_a_session_is_found_by_any_text_that_begins_as_it_does_and_by_no_other(at: int) -> None:
    prompt, store = ids(3 * CHUNK), store_of()
    store.put(made(prompt[:at]))
    for longer in (at, at + 1, 3 * CHUNK):
        assert_same(store.longest(prompt[:longer]), made(prompt[:at]))
    assert store.longest(prompt[: at - 1]) is None
    assert store.longest(prompt, most=at - 1) is None
    assert_same(store.longest(prompt, most=at), made(prompt[:at]))
    for changed in {0, at // 2, at - 1}:
        other = [*prompt[:changed], (prompt[changed] + 1) % 40, *prompt[changed + 1 :]]
        assert store.longest(other) is None
    assert Past().after(prompt[:at]) in store
    assert Past().after(prompt[: at + 1]) not in store


def test_the_reasons_of_misses_are_counted() -> None:
    store = store_of()
    assert store.longest(ids(3)) is None
    store.put(made(ids(9)))
    assert store.longest(ids(3)) is None
    assert store.longest([]) is None
    assert store.longest(ids(CHUNK, seed=1)) is None
    assert store.longest(ids(CHUNK, seed=1), most=4) is None
    want = {"nothing stored": 1, "shorter than a grid point": 3, "no stored beginning": 1}
    assert store.stats().misses == want
    with pytest.raises(ValueError, match="most = -1 must be"):
        store.longest([1], most=-1)


TOKENS = st.builds(
    lambda text, length: text[:length],
    st.sampled_from([(0, 0, 0, 0) * 3, (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0), (0, 1, 1, 1) * 3]),
    st.sampled_from([0, 1, 3, 4, 5, 8, 9, 11]),
)  # few, so that many are equal
WHAT = ["put"] * 8 + ["longest"] * 8 + ["resume"] * 2 + ["pin", "restart", "clear"]
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(WHAT), TOKENS, st.none() | st.integers(0, 12)), min_size=5, max_size=60
)


class Plain:
    """The store's definition: a list in order of last use; every question is answered by looking at each."""

    def __init__(self, room: int, folder: bool) -> None:
        self.room, self.folder = room, folder
        self.memory, self.pinned = list[tuple[int, ...]](), set[tuple[int, ...]]()
        self.files, self.earlier = set[tuple[int, ...]](), list[tuple[int, ...]]()

    def use(self, tokens: tuple[int, ...], pin: bool) -> bool:
        """Whether there is room for it."""
        if tokens in self.memory:
            self.memory.remove(tokens)
        elif len(self.pinned) == self.room:
            return False
        elif len(self.memory) == self.room:
            gone = next(kept for kept in self.memory if kept not in self.pinned)
            self.memory.remove(gone)
            self.files |= {gone} if self.folder else set()
        self.memory.append(tokens)
        self.pinned |= {tokens} if pin else set()
        return True

    def longest(self, tokens: tuple[int, ...]) -> tuple[int, ...] | None:
        there = {*self.memory, *self.files}
        found = max((one for one in there if tokens[: len(one)] == one), key=len, default=None)
        if found is not None:
            self.use(found, pin=False)
        return found

    def shared(self, tokens: tuple[int, ...], chunk: int) -> int:
        points = range(len(tokens) // chunk * chunk, 0, -chunk)
        agree = (at for at in points if any(tokens[:at] == earlier[:at] for earlier in self.earlier))
        point = next(agree, 0)
        self.earlier.append(tokens)
        return point


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "folder"])
@settings(max_examples=60)
@given(operations=OPERATIONS, room=st.integers(1, 6))
def test_a_store_is_what_a_plain_list_is(
    folder: bool, tmp_path_factory: pytest.TempPathFactory, operations: list, room: int
) -> None:
    chunk = 4
    path = tmp_path_factory.mktemp("store") if folder else None
    with mock.patch.object(sessions, "CHUNK", chunk), mock.patch.object(stores, "CHUNK", chunk):
        store, plain = store_of(path, memory=room * SIZE), Plain(room, folder)
        for what, tokens, most in operations:
            if what in ("put", "pin"):
                tokens = tokens or (1,)
                fits = plain.use(tokens, what == "pin")
                if what == "pin" and not fits:
                    with pytest.raises(PinError, match="cannot be pinned"):
                        store.put(made(tokens), pin=True)
                else:
                    store.put(made(tokens), pin=what == "pin")
            elif what == "longest":
                found, want = store.longest(tokens, most=most), plain.longest(tokens[:most])
                assert (found is None) == (want is None)
                if want is not None:
                    assert_same(found, made(want))
            elif what == "resume":
                found, shared = store.resume(tokens)
                want = plain.longest(tokens)
                assert (found and found.past) == (want and made(want).past)
                assert shared == plain.shared(tokens, chunk)
            elif what == "clear":
                store.clear()
                plain = Plain(room, folder)
            else:
                store.flush()
                store, files = store_of(path, memory=room * SIZE), plain.files | set(plain.memory)
                plain = Plain(room, folder)
                plain.files = files if folder else set()
            there = {*plain.memory, *plain.files}
            assert len(store) == len(there)
            assert all(Past().after(tokens) in store for tokens in there)
            assert held(store) == store.nbytes == len(plain.memory) * SIZE
            assert store.stats().pinned == len(plain.pinned)
        assert not store._ends._lengths or len(store)


def test_a_lookup_among_a_hundred_thousand_looks_at_few() -> None:
    store, prompt = store_of(), ids(CHUNK - 1)
    for number in range(100_000):
        grid, tail = b"", (number, *prompt[: number % (CHUNK - 1)])
        store._ends.add(stores._End(grid, len(tail), number.to_bytes(16)))
    assert len(store._ends.along(prompt)[0]) == CHUNK - 1
    assert len(store._ends.along(ids(4096))[0]) == CHUNK - 1


def test_grid_points_are_bounded_and_the_shallow_ones_stay() -> None:
    store, prompt = store_of(points=4), ids(8 * CHUNK)
    assert store.resume(prompt).shared == 0
    assert store.resume(prompt).shared == 4 * CHUNK
    for other in range(1, 5):
        assert store.resume(ids(CHUNK, seed=other)).shared == 0
    assert len(store._points) == 4
    assert store.resume(ids(CHUNK + 3, seed=1)).shared == CHUNK
    assert store.resume(prompt).shared == 0


# -------------------------------------------------------------------------------------------------- memory


def test_a_thousand_prompts_never_exceed_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from all tensors that the store has ever made and that are still there, as each one is made."""
    limit, alive = 11 * SIZE - 1, list[weakref.ref[torch.Tensor]]()
    most = 0

    def counted(session: Session, device: torch.device) -> Session:
        nonlocal most
        copy = copied(session, device)
        alive.extend(map(weakref.ref, tensors(copy)))
        alive[:] = [ref for ref in alive if ref() is not None]
        there = [tensor for ref in alive if (tensor := ref()) is not None]
        most = max(most, sum(tensor.untyped_storage().nbytes() for tensor in there))
        return copy

    copied = stores._copied
    monkeypatch.setattr(stores, "_copied", counted)
    store = store_of(memory=limit)
    for number in range(1000):
        store.put(made(ids(1 + number % 20, seed=number)))
        assert held(store) == store.nbytes <= limit
    assert most == 10 * SIZE
    assert len(store) == 10
    assert store.stats().evictions > 900


def test_only_what_is_used_is_refreshed() -> None:
    store, prompt = store_of(memory=3 * SIZE), ids(30)
    for length in (5, 10, 20):
        store.put(made(prompt[:length]))
    assert_same(store.longest(prompt[:12]), made(prompt[:10]))  # of which 5 is a beginning
    store.put(made(ids(4, seed=1)))
    assert Past().after(prompt[:5]) not in store
    store.put(made(ids(4, seed=2)))
    assert Past().after(prompt[:20]) not in store
    assert Past().after(prompt[:10]) in store
    store.put(made(prompt[:10]))  # which is there: also a use
    for seed in (3, 4):
        store.put(made(ids(4, seed)))
    assert Past().after(prompt[:10]) in store


def test_what_is_larger_than_the_limit_is_not_kept_and_counted() -> None:
    model = build(CONFIGS["attention"])
    short, long = read(model, ids(4)), read(model, ids(200))
    store = store_of(model=model, memory=long.nbytes - 1)
    store.put(short)
    store.put(long)
    assert len(store) == 1
    assert short.past in store
    assert store.stats().too_large == 1
    with pytest.raises(PinError, match=rf"{long.nbytes:,} bytes cannot be pinned: 0 of .*StoreConfig.memory"):
        store.put(long, pin=True)


def test_pinned_sessions_stay() -> None:
    store = store_of(memory=3 * SIZE)
    store.put(made([1]), pin=True)
    store.put(made([2]))
    store.put(made([2]), pin=True)  # which is there already
    for number in range(3, 20):
        store.put(made([number]))
        assert len(store) == 3
    assert made([1]).past in store
    assert made([2]).past in store
    store.put(made([19]), pin=True)
    with pytest.raises(PinError, match="of the store's"):
        store.put(made([20]), pin=True)
    store.put(made([20]))
    assert made([20]).past not in store
    assert store.stats().too_large == 1
    store.clear()
    assert (len(store), store.nbytes, store.stats().pinned) == (0, 0, 0)
    store.put(made([20]), pin=True)


def test_a_session_of_another_model_is_refused_by_name() -> None:
    store = store_of()
    with pytest.raises(StateError, match="cannot keep this session: it has 2 states, where the model has 3"):
        store.put(made([1])._replace(states=made([1]).states[:2]))
    with pytest.raises(StateError, match=r"of layer 0 is torch\.float32, where taylor of width 16 needs"):
        store.put(made([1], build(dtype=torch.float32)))
    with pytest.raises(StateError, match=r"logits_V has shape \(41,\), where the model's vocabulary is 40"):
        store.put(made([1])._replace(logits_V=torch.zeros(41)))
    with pytest.raises(StateError, match="nothing was read"):
        store.put(made([]))
    with pytest.raises(StateError, match="of layer 0 has shape"):
        store.put(made([1])._replace(states=MODEL.init_states(2)))
    model = build(CONFIGS["attention"])
    with pytest.raises(StateError, match="is a ReservedKeyValueCache, where attention of width 16 needs"):
        store_of(model=model).put(made([1], model)._replace(states=model.init_states(1, capacity=9)))


# --------------------------------------------------------------------------------------------------- files


def test_what_leaves_memory_is_found_in_its_file_also_after_a_restart(tmp_path: Path) -> None:
    store = store_of(tmp_path, memory=2 * SIZE)
    for number in range(6):
        store.put(made([number, 1]))
    assert [len(store), store.stats().files] == [6, 4]
    assert {path.stem for path in the_files(tmp_path)} == {made([number, 1]).past.key for number in range(4)}
    assert_same(store.longest([0, 1, 2]), made([0, 1]))
    assert store.stats().file_hits == 1
    assert held(store) == 2 * SIZE
    assert_same(store.longest([0, 1, 2]), made([0, 1]))  # now in memory again
    assert store.stats().file_hits == 1

    with mock.patch.object(
        checkpoints.TensorFile, "tensor", side_effect=AssertionError("a tensor was loaded")
    ):
        again = store_of(tmp_path, memory=2 * SIZE)
    assert len(again) == 5  # all but the one that was only in memory
    assert_same(again.longest([3, 1]), made([3, 1]))
    store.flush()
    assert len(store_of(tmp_path)) == 6
    store.clear()
    assert the_files(tmp_path) == []
    assert len(store) == 0


def test_a_file_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.put(made([1]))
    store.flush()
    with mock.patch.object(stores, "save_session", side_effect=AssertionError("written again")):
        store.flush()
        store._evict()
    assert_same(store.longest([1]), made([1]))


def test_a_use_in_memory_and_a_flush_are_uses_of_the_file(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.put(made([1]))
    store.flush()
    (path,) = the_files(tmp_path)
    for use in (lambda: store.longest([1]), store.flush):
        os.utime(path, ns=(1, 1))
        use()
        assert path.stat().st_mtime_ns > 10**9
    store.put(made([2]))
    store.longest([1])
    store.flush()  # in order of last use
    by_use = sorted(the_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    assert [path.stem for path in by_use] == [made([2]).past.key, made([1]).past.key]


def test_files_are_removed_by_last_use_under_the_limit(tmp_path: Path) -> None:
    store = store_of(tmp_path, memory=SIZE)
    for number in range(4):
        store.put(made([number]))
    one = max(path.stat().st_size for path in the_files(tmp_path))
    for at, path in enumerate(the_files(tmp_path)):
        os.utime(path, ns=(at, at))
    oldest, older, old = the_files(tmp_path)

    store = store_of(tmp_path, memory=SIZE, disk=3 * one)
    assert len(store) == 3
    hit = next(number for number in range(3) if made([number]).past.key == oldest.stem)
    store.longest([hit])
    assert oldest.stat().st_mtime_ns > 10**9
    store.put(made([7]))  # so the hit leaves memory; its file is there
    assert the_files(tmp_path) == [oldest, older, old]
    store.put(made([8]))
    assert the_files(tmp_path) == sorted([oldest, old, older.with_stem(made([7]).past.key)])
    assert sum(path.stat().st_size for path in the_files(tmp_path)) <= 3 * one
    assert store.stats().file_bytes == sum(path.stat().st_size for path in the_files(tmp_path))

    store_of(tmp_path, disk=one)  # a smaller limit holds from the start
    assert the_files(tmp_path) == [older.with_stem(made([7]).past.key)]
    unlimited = store_of(tmp_path, memory=SIZE, disk=0)
    for number in range(20, 30):
        unlimited.put(made([number]))
    assert len(the_files(tmp_path)) == 10
    small = store_of(tmp_path / "small", memory=SIZE, disk=SIZE - 1)
    small.put(made([1]))
    small.put(made([2]))
    assert the_files(tmp_path / "small") == []
    assert small.stats().too_large == 1


def test_room_is_made_before_a_file_is_written_and_its_header_counts(tmp_path: Path) -> None:
    save_session(made([1]), tmp_path / "one", model="abc")
    one, there = (tmp_path / "one").stat().st_size, list[int]()

    def noted(*args: Any, **options: Any) -> None:
        there.append(sum(path.stat().st_size for path in the_files(tmp_path)))
        save_session(*args, **options)

    exact, roomier = 3 * one, 3 * one + SIZE  # which a fourth session would fit, but not its file
    assert one > SIZE
    for disk, most in ((exact, exact - SIZE), (roomier, 3 * one)):
        store = store_of(tmp_path, memory=SIZE, disk=disk)
        with mock.patch.object(stores, "save_session", noted):
            for number in range(8):
                store.put(made([disk, number]))
                assert sum(path.stat().st_size for path in the_files(tmp_path)) <= disk
        assert max(there) <= most
    assert len(there) == 14


def test_files_of_another_model_are_left_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.put(made([1]))
    store.flush()
    other = store_of(tmp_path, fingerprint="other", disk=1)
    assert len(other) == 0
    assert other.longest([1]) is None
    wide = build(dtype=torch.float32)
    assert len(store_of(tmp_path, model=wide)) == 0
    assert len(store_of(tmp_path, model=compute_in(torch.bfloat16, wide))) == 0

    (mine,) = the_files(tmp_path)
    foreign = mine.with_stem(made([2]).past.key)
    save_session(made([2]), foreign, model="other")
    (mine.parent / "notes.safetensors").write_text("of somebody else")
    store = store_of(tmp_path, disk=1)  # not even one of its own fits
    assert len(store) == 0
    assert [path.name for path in the_files(tmp_path)] == [foreign.name, "notes.safetensors"]
    store = store_of(tmp_path, memory=SIZE)
    store.put(made([2]))
    with pytest.warns(StoreWarning, match="is of another model"):
        store.put(made([3]))
    assert load_session(foreign, MODEL, fingerprint="other").past == made([2]).past
    assert store.stats().unwritten == 1
    store.clear()
    assert foreign.exists()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def another_text(path: Path) -> None:
    save_session(made([5, 5, 5]), path, model="abc")


def another_kind(path: Path) -> None:
    attention = build(CONFIGS["attention"])
    save_session(made([1, 2], attention), path, model="abc")


def another_vocabulary(path: Path) -> None:
    save_session(made([1, 2])._replace(logits_V=torch.zeros(41)), path, model="abc")


@pytest.mark.parametrize("damage", [truncate, empty, flip, another_text, another_kind, another_vocabulary])
@pytest.mark.parametrize("when", ["before the start", "after it"])
def test_a_damaged_file_is_removed_counted_and_passed_over(
    damage: Callable[[Path], None], when: str, tmp_path: Path
) -> None:
    store = store_of(tmp_path)
    store.put(made([1]))
    store.put(made([1, 2]))
    store.flush()
    path = next(path for path in the_files(tmp_path) if path.stem == made([1, 2]).past.key)
    store = store_of(tmp_path)
    damage(path)
    if when == "before the start":
        store = store_of(tmp_path)
    assert_same(store.longest([1, 2, 3]), made([1]))
    assert store.stats().damaged == 1
    assert not path.exists()
    assert len(store) == 1
    store.put(made([1, 2]))
    store.flush()
    assert_same(store_of(tmp_path).longest([1, 2, 3]), made([1, 2]))


def test_a_file_that_is_gone_or_cannot_be_read_is_passed_over_and_nothing_is_removed(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.put(made([1]))
    store.put(made([1, 2]))
    store.flush()
    store = store_of(tmp_path)
    path = next(path for path in the_files(tmp_path) if path.stem == made([1, 2]).past.key)
    path.rename(elsewhere := tmp_path / "elsewhere")
    path.symlink_to(elsewhere)  # links are not followed
    assert_same(store.longest([1, 2]), made([1]))
    assert path.is_symlink()
    assert store.stats().damaged == 0
    path.unlink()
    assert_same(store_of(tmp_path).longest([1, 2]), made([1]))
    elsewhere.rename(path)
    assert_same(store_of(tmp_path).longest([1, 2]), made([1, 2]))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to .*file.*: Not a directory.*StoreConfig.folder"):
        store_of(tmp_path / "file")
    with pytest.raises(ValueError, match="needs the model's fingerprint"):
        store_of(tmp_path, fingerprint="")
    store = store_of(tmp_path, memory=SIZE)
    store.put(made([1]))
    full = mock.patch.object(checkpoints, "save_file", side_effect=OSError(28, "No space left on device"))
    with (
        full,
        pytest.raises(RunError, match=r"cannot write to .*: No space left on device.*StoreConfig\.folder"),
    ):
        store.flush()
    with full, pytest.warns(StoreWarning, match="No space left on device.* is lost"):
        store.put(made([2]))
    assert store.stats().unwritten == 1
    assert held(store) == SIZE
    assert [store.longest([1]), len(store)] == [None, 1]


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    store = store_of(tmp_path, memory=SIZE)
    store.put(made([1]))
    store.put(made([2]))
    the_files(tmp_path)[0].unlink()
    next(tmp_path.iterdir()).rmdir()
    store.put(made([3]))
    assert [path.stem for path in the_files(tmp_path)] == [made([2]).past.key]
    assert len(store) == 2


# ----------------------------------------------------------------------------------------------- processes


def writes(folder: Path, first: int, last: int, disk: int) -> None:
    store = store_of(folder, memory=3 * SIZE, disk=disk)
    for number in range(first, last):
        store.put(made([number, number + 1]))
        store.longest([(first + number) // 2, (first + number) // 2 + 1])
    store.flush()


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "a minute has passed"
        time.sleep(0.002)


def test_a_killed_process_leaves_whole_files_only(tmp_path: Path) -> None:
    process = children.start(writes, tmp_path, 0, 10**9, 0)
    until(lambda: len(the_files(tmp_path)) > 20)
    process.kill()
    process.join()
    store = store_of(tmp_path)
    assert len(store) == len(the_files(tmp_path)) > 20
    for number in range(len(store)):
        assert_same(store.longest([number, number + 1]), made([number, number + 1]))
    assert store.stats().damaged == 0
    assert list(next(tmp_path.iterdir()).glob(".holdall-*.tmp")) == []


@pytest.mark.parametrize("when", ["before it is opened", "before PyTorch maps it"])
def test_a_file_that_another_process_removes_is_no_session_and_not_damaged(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path)
    store.put(made([1, 2]))
    store.flush()
    store = store_of(tmp_path)
    (path,) = the_files(tmp_path)

    def removed(given: Path, **options: Any) -> Any:
        path.unlink()
        if when == "before PyTorch maps it":  # the header was read
            raise RuntimeError(f"unable to open file <{given}> in read-only mode")
        return safe_open(given, **options)

    monkeypatch.setattr(checkpoints, "safe_open", removed)
    assert store.longest([1, 2]) is None
    assert (len(store), store.stats().damaged) == (0, 0)


def test_two_processes_share_a_folder_and_its_limit(tmp_path: Path) -> None:
    save_session(made([1]), tmp_path / "one", model="abc")
    disk = 12 * (tmp_path / "one").stat().st_size
    both = [children.start(writes, tmp_path / "states", first, first + 60, disk) for first in (0, 40)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    sizes = [path.stat().st_size for path in the_files(tmp_path / "states")]
    # each may have written one while the other was looking
    assert sum(sizes) <= disk + 2 * max(sizes)
    store = store_of(tmp_path / "states", disk=disk)
    assert sum(path.stat().st_size for path in the_files(tmp_path / "states")) <= disk
    found = [store.longest([number, number + 1]) for number in range(100)]
    assert sum(session is not None for session in found) == len(the_files(tmp_path / "states")) >= 10
    assert store.stats().damaged == 0


def test_a_store_sees_the_files_of_others_when_it_writes(tmp_path: Path) -> None:
    one, other = store_of(tmp_path, memory=SIZE), store_of(tmp_path, memory=SIZE)
    for number in (1, 2):
        other.put(made([number]))
    assert one.longest([1]) is None
    one.put(made([3]))
    one.put(made([4]))
    assert_same(one.longest([1]), made([1]))


def test_a_file_that_another_process_uses_is_not_removed_as_the_oldest(tmp_path: Path) -> None:
    save_session(made([1]), tmp_path / "one", model="abc")
    disk = 3 * (tmp_path / "one").stat().st_size
    one = store_of(tmp_path, memory=SIZE, disk=disk)
    for number in range(4):
        one.put(made([number]))
    other = store_of(tmp_path, disk=disk)
    assert_same(other.longest([0]), made([0]))
    one.put(made([4]))
    assert [made([number]).past in one for number in range(5)] == [True, False, True, True, True]
    assert_same(one.longest([0]), made([0]))
