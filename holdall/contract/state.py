"""States as values: NamedTuples of tensors whose first dimension is the batch row.

Rows can be selected, copied and joined, with room (holdall/contract/room.py) or without; a state that is not
of the mixer, rows, dtype or device at hand is refused by name. A model with learned positions carries its
position as one more state.

Letters: B batch row, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from holdall.contract.room import capacity_of, is_reserved, of_kind

State = tuple[Tensor, ...]
"""A NamedTuple of tensors, first dimension the batch row; each mixer names its own."""


class StateError(ValueError):
    """A state that is not of the rows, sizes, dtype, device or kind that a mixer carries."""


class Field(NamedTuple):
    """One tensor of a state, whatever its rows: `sizes` begins with its second dimension, or with its third
    where the second is `time` and grows."""

    name: str
    time: bool
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"({', '.join(('rows', *['time'] * self.time, *map(str, self.sizes)))})"


def fields_of(start: State, grows: bool) -> tuple[Field, ...]:
    """The fields of a state in which nothing was read: where time grows, the second dimension is empty.

    So it may be where it never grows, as of a convolution that is switched off: `grows` says whether the
    state has more elements after a token. What has no elements either way, a count of tokens, always may.
    """
    fields = []
    for name, tensor in zip(type(start)._fields, start, strict=True):  # type: ignore[attr-defined]
        time = tensor.ndim > 1 and tensor.shape[1] == 0 and (grows or 0 in tensor.shape[2:])
        fields.append(Field(name, time, tuple(tensor.shape[1 + time :]), tensor.dtype))
    return tuple(fields)


def misfit(
    state: Any,
    kind: type[tuple],
    fields: tuple[Field, ...],
    owner: str,
    *,
    rows: int | None = None,
    device: torch.device | None = None,
    layer: str = "",
) -> str:
    """Why a state is none that `owner` carries; empty if it is one.

    Shapes, dtypes and devices alone are compared, which costs a few microseconds and never waits for a
    device. Without `rows`, all fields must have the same. Without `device`, as for a state from a file, it is
    anywhere and beside activations of any dtype.
    """
    nameless = type(state) is tuple and len(state) == len(fields)  # its tensors decide
    if not (nameless or isinstance(state, kind)):
        return f"the state{layer} is a {type(state).__name__}, where {owner} needs a {kind.__name__}"
    for found, field in zip(state, fields, strict=True):
        name, time, sizes, dtype = field
        if not isinstance(found, Tensor):
            return f"{name}{layer} is a {type(found).__name__}, where {owner} needs a tensor"
        shape = found.shape
        if len(shape) != 1 + time + len(sizes) or shape[1 + time :] != sizes:
            return f"{name}{layer} has shape {tuple(shape)}, where {owner} needs {field}"
        if rows is None:
            rows = shape[0]
        if shape[0] != rows:
            return f"{name}{layer} has shape {tuple(shape)}, where {owner} needs {rows} rows"
        if device is None:
            if found.is_floating_point() != dtype.is_floating_point:
                return f"{name}{layer} is {found.dtype}, where {owner} needs {dtype}"
        elif found.dtype != dtype:
            return f"{name}{layer} is {found.dtype}, where {owner} needs {dtype}"
        elif found.device != device:
            return f"{name}{layer} is on {found.device}, where {owner} is on {device}"
    return ""


# --------------------------------------------------------------------------------------- position


class Position(NamedTuple):
    """How many tokens a row has read: what a model with learned positions carries beside its mixers' states.

    `seen_B` counts them where they are needed, on the device. To refuse what lies beyond the last position,
    the host has to know too, without waiting for the device: it reads the length of `read_BT0`, a tensor with
    no elements, which grows as a cache of keys does and is as long as the longest row.
    """

    seen_B: Tensor
    read_BT0: Tensor


def none_read(batch: int, device: torch.device | None = None) -> Position:
    """The counts of rows that have read nothing."""
    seen_B = torch.zeros(batch, dtype=torch.long, device=device)
    return Position(seen_B, seen_B.new_zeros(batch, 0, 0))


def count_on(position: Any, new: int, limit: int, limited: str) -> Position:
    """The counts after `new` more tokens; more than `limit` in a row are refused with ValueError.

    A row that was longer than the others may have been taken out since. So only where the limit seems to be
    passed are the rows' own counts asked for, which waits for the device. A state with room is not asked at
    all: its capacity is within the limit, and its border holds it to that.
    """
    seen_B, read_BT0 = position.seen_B, position.read_BT0
    if is_reserved(position):
        if capacity_of(position) > limit:
            raise ValueError(f"a capacity of {capacity_of(position)} tokens, but {limited}")
        return Position(seen_B + new, read_BT0)
    total = read_BT0.shape[1] + new
    if total > limit and read_BT0.shape[1] and len(seen_B):
        total = int(seen_B.max()) + new
    if total > limit:
        before = f", {total - new} of them read before" * (total > new)
        raise ValueError(f"{total} tokens{before}, but {limited}")
    return Position(seen_B + new, seen_B.new_zeros(seen_B.shape[0], total, 0))


POSITION_FIELDS = fields_of(none_read(1, torch.device("meta")), True)
POSITION_SLOTS = ("read_BT0",)
"""What of a `Position` has a fixed size with a capacity."""
FILLED = Field("filled_B", False, (), torch.long)
"""What a state with room has beside the fields of one that grows."""


def with_room_too(state: Any, kind: type, fields: tuple[Field, ...]) -> tuple[type, tuple[Field, ...]]:
    """The kind and fields to check a state by: those given, or those of the same state with room."""
    if is_reserved(state) and of_kind(state) is kind:
        return type(state), (*fields, FILLED)
    return kind, fields


# ------------------------------------------------------------------------------------------- rows


S = TypeVar("S", bound=State)


def map_state(state: S, function: Callable[[Tensor], Tensor]) -> S:
    """The state with a function applied to each of its tensors."""
    return type(state)(*map(function, state))


def select_rows(state: S, rows: slice | Sequence[int] | Sequence[bool] | Tensor) -> S:
    """The state of some batch rows, copied; rows may repeat (one prompt read once, continued often).

    Rows are chosen as a tensor's are: by a slice, by number, from the end if negative, or by a mask that says
    of each whether it stays. Numbers that are on a GPU are waited for; a slice never has to get there.
    """
    if isinstance(rows, slice):
        return map_state(state, lambda tensor: tensor[rows].clone())
    index, count = _row_numbers(rows, state[0].shape[0]), state[0].shape[0]
    if index.numel() and not -count <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"rows {index.tolist()} of a state that has {count} rows, numbered from 0")
    index = torch.where(index < 0, index + count, index).to(state[0].device, non_blocking=True)
    return map_state(state, lambda tensor: tensor.index_select(0, index))


def _row_numbers(rows: Sequence[int] | Sequence[bool] | Tensor, count: int) -> Tensor:
    index = torch.as_tensor(rows)
    if index.ndim != 1 or (index.numel() and (index.is_floating_point() or index.is_complex())):
        raise ValueError(f"rows are a list of numbers or a mask, not {rows!r}")
    if index.dtype != torch.bool:
        return index.long()
    if len(index) != count:
        raise ValueError(f"a mask of {len(index)} rows for a state that has {count}")
    return index.nonzero()[:, 0]


def join_rows(states: Sequence[S]) -> S:
    """One state of the rows of several, in order: how requests of different lengths become one batch.

    A tensor that grows with the context has time as its second dimension, newest last; shorter ones get
    zeros in front, which every mixer that carries such a tensor must take for "nothing was there". States
    with room are joined with others with room, and get the largest of their capacities. States of different
    kinds are refused.
    """
    if not states:
        raise ValueError("there is no state to join")
    first = states[0]
    for number, state in enumerate(states):
        # but for time; a state of another number of slots that are not time is refused where it is read
        fields = [Field(name, tensor.ndim > 1, tuple(tensor.shape[2:]), tensor.dtype)
                  for name, tensor in zip(type(first)._fields, first, strict=True)]  # type: ignore[attr-defined]  # fmt: skip
        if why := misfit(state, type(first), tuple(fields), "the first", device=first[0].device):
            raise StateError(f"state {number} cannot be joined with the first: {why}")
    joined = []
    for tensors in zip(*states, strict=True):
        longest = max(tensor.shape[1] if tensor.ndim > 1 else 0 for tensor in tensors)
        joined.append(
            torch.cat([_as_long_as(longest, tensor, at_end=is_reserved(first)) for tensor in tensors])
        )
    return type(first)(*joined)


def _as_long_as(slots: int, tensor: Tensor, *, at_end: bool) -> Tensor:
    """A tensor with empty slots in front of its own, or behind them."""
    if tensor.ndim == 1 or tensor.shape[1] == slots:
        return tensor
    empty = tensor.new_zeros(tensor.shape[0], slots - tensor.shape[1], *tensor.shape[2:])
    return torch.cat((tensor, empty) if at_end else (empty, tensor), dim=1)


def write_state(given: S, new: S) -> S:
    """The new state in the memory of `given`, which its owner gives away: the same tensors, where sizes fit.

    What was written there already is not copied; a tensor that has grown is the new one.
    """
    late = [
        (old, now) for old, now in zip(given, new, strict=True) if now is not old and now.shape == old.shape
    ]
    # first copies of what lies in memory that is about to be written, such as fields that change places
    late = [(old, now.clone() if _lies_in(now, given) else now) for old, now in late]
    for old, now in late:
        old.copy_(now)
    fits = (old if now.shape == old.shape else now for old, now in zip(given, new, strict=True))
    return type(given)(*fits)


def _lies_in(tensor: Tensor, state: State) -> bool:
    """Whether a tensor shares memory with a state; so it may where that cannot be asked."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return any(torch._C._is_alias_of(tensor, other) for other in state)  # type: ignore[attr-defined]


def elements_per_row(state: State) -> int:
    """Elements of all tensors in one row of a state."""
    return sum(tensor[0].numel() for tensor in state)


def bytes_per_row(state: State) -> int:
    """Bytes of all tensors in one row of a state."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in state)
