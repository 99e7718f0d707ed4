"""States with room: a state that grows, in tensors of fixed sizes and addresses.

`init_state(rows, capacity=N)` reserves N slots where a state would grow by one per token: for keys and
values, or the inputs of a long convolution. Such a state is of a kind of its own (`reserved_kind`), which has
the tensors of the state that grows and one more:

    filled_B   on the device; slots 0 .. filled - 1 of a row hold what a growing state holds, oldest first

Shapes never depend on how much was read, so that a step can be recorded once, as a CUDA graph, and replayed
at every length; and every row has a length of its own. What the slots behind hold is never looked at, but it
may be infinite or NaN, which a product with zero does not remove: so give a row to another sequence by
copying a whole row of state into it, not by setting its count to zero.

Who sees that a row is full? Only the device knows the counts, and to ask it is to wait for all its work. So:
- on a CPU, where asking costs nothing, every call checks, and refuses what does not fit (StateError);
- on a GPU nothing waits: from the first call that does not fit on, that row's outputs are NaN. Its writes go
  round to its own first slots, and no other row is touched. Whoever drives the steps knows how many tokens it
  has sent and stops in time; `room_left` asks the device, for callers that do not.

Letters: B row, T new tokens, S slots.
"""

from __future__ import annotations

import copyreg
import functools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor


class _Of(NamedTuple):
    """What a reserved kind was made of."""

    kind: type
    slots: tuple[str, ...]


_RESERVED: dict[type, _Of] = {}


@functools.cache
def reserved_kind(kind: Any, slots: tuple[str, ...]) -> Any:
    """The NamedTuple of states of `kind` whose tensors named in `slots` have room."""
    made: Any = namedtuple(f"Reserved{kind.__name__}", (*kind._fields, "filled_B"))  # type: ignore[misc]
    _RESERVED[made] = _Of(kind, slots)
    # its name is in no module, where pickle would look for it
    copyreg.pickle(made, lambda state: (_again, (kind, slots, *state)))
    return made


def _again(kind: type, slots: tuple[str, ...], *tensors: Tensor) -> Any:
    return reserved_kind(kind, slots)(*tensors)


def is_reserved(state: Any) -> TypeGuard[Any]:
    """Whether this is a state with room."""
    return type(state) in _RESERVED


def of_kind(state: Any) -> type:
    """The kind of the state that grows which this one, with room, is a kind of."""
    return _RESERVED[type(state)].kind


def slot_names(state: Any) -> tuple[str, ...]:
    """The tensors of a state with room that have slots."""
    return _RESERVED[type(state)].slots


def capacity_of(state: Any) -> int:
    """The slots per row of a state with room."""
    return getattr(state, slot_names(state)[0]).shape[1]


def reserve(state: Any, slots: Sequence[str], capacity: int) -> Any:
    """A copy of a state with room for `capacity` tokens in each row, those it holds included.

    A state with room gets more or less of it, and every row keeps its own count; this waits for the device.
    In a state that grows, rows that were joined with longer ones have empty slots in front, which count as
    filled.

    Raises ValueError if the state holds more.
    """
    tensors = dict(zip(state._fields, state, strict=True))
    if is_reserved(state):
        kind, filled = type(state), capacity_of(state) - (room_left(state) or 0)
    else:
        kind = reserved_kind(type(state), tuple(slots))  # type: ignore[arg-type]
        filled = max(tensors[name].shape[1] for name in slots)
        tensors["filled_B"] = torch.full((len(state[0]),), filled, dtype=torch.long, device=state[0].device)
    if filled > capacity:
        raise ValueError(f"a state of {filled} tokens does not fit a capacity of {capacity}")
    for name, old in tensors.items():
        tensors[name] = old.clone()
        if name in slots:
            tensors[name] = old.new_zeros(old.shape[0], capacity, *old.shape[2:])
            tensors[name][:, :filled] = old[:, :filled]
    return kind(*tensors.values())


def in_order(slots_BSX: Tensor, filled_B: Tensor) -> Tensor:
    """A copy of all slots as a state that grows has them: the filled ones last, zeros in front."""
    slots = slots_BSX.shape[1]
    slot_S = torch.arange(slots, device=filled_B.device)
    row_B1 = torch.arange(len(filled_B), device=filled_B.device)[:, None]
    empty_BS = slot_S < slots - filled_B[:, None]
    moved_BSX = slots_BSX[row_B1, (filled_B[:, None] + slot_S) % slots]
    return moved_BSX.masked_fill_(empty_BS.view(*empty_BS.shape, *[1] * (slots_BSX.ndim - 2)), 0)


def fill(slots_BSX: Tensor, new_BTX: Tensor, filled_B: Tensor, *, inplace: bool) -> Tensor:
    """The slots with T new entries behind those that are filled, in the same memory or in a copy."""
    slots, new = slots_BSX.shape[1], new_BTX.shape[1]
    slot_BT = (filled_B[:, None] + torch.arange(new, device=filled_B.device)) % slots
    index_BTX = slot_BT.view(*slot_BT.shape, *[1] * (new_BTX.ndim - 2)).expand(new_BTX.shape)
    if inplace:
        return slots_BSX.scatter_(1, index_BTX, new_BTX)
    return slots_BSX.scatter(1, index_BTX, new_BTX)


def as_grown(state: Any) -> Any:
    """A state with room as one that grows, with all its slots, most of which may be empty ones in front."""
    of, filled_B = _RESERVED[type(state)], state.filled_B
    return of.kind(
        *(
            in_order(tensor, filled_B) if name in of.slots else tensor
            for name, tensor in zip(of.kind._fields, state, strict=False)  # type: ignore[attr-defined]
        )
    )


def advanced(state: Any, tensors: Sequence[Tensor], new: int) -> Any:
    """The state with room that follows after T new tokens, from its tensors but for the count of slots."""
    return type(state)(*tensors, state.filled_B + new)


def trim(state: Any) -> Any:
    """A state as one that grows, with no more slots than its longest row fills. Waits for the device.

    A state without room is returned as it is. Raises ValueError if a row has read more than it could hold.
    """
    if not is_reserved(state):
        return state
    capacity = capacity_of(state)
    filled = int(state.filled_B.max()) if len(state.filled_B) else 0
    if filled > capacity:
        raise ValueError(f"{filled} tokens were read into a state with a capacity of {capacity}")
    grown = as_grown(state)
    return grown._replace(
        **{name: getattr(grown, name)[:, capacity - filled :].clone() for name in slot_names(state)}
    )


def room_left(state: Any) -> int | None:
    """How many more tokens every row of a state can hold; None if it never fills. Waits for the device."""
    if not is_reserved(state):
        return None
    return capacity_of(state) - (int(state.filled_B.max()) if len(state.filled_B) else 0)


def check_room(state: Any, new: int) -> str:
    """Why a state with room cannot read so many more tokens; empty if it can, or if only the device knows."""
    capacity, filled_B = capacity_of(state), state.filled_B
    filled = int(filled_B.max()) if known_to_the_host(filled_B) and len(filled_B) else 0
    if filled + new <= capacity:
        return ""
    return (
        f"{filled} tokens were read, and {new} more do not fit the state's capacity of {capacity}. Make it "
        "with a larger one, init_state(rows, capacity=...), or move to one by with_room, of mixers and models"
    )


def beyond(state: Any, new: int) -> Tensor | None:
    """Which rows have no room for so many more tokens, (B,); None where `check_room` saw that all have it."""
    filled_B = state.filled_B
    if known_to_the_host(filled_B):
        return None
    return filled_B > capacity_of(state) - new


def known_to_the_host(filled_B: Tensor) -> bool:
    """Whether counts can be looked at without waiting for a device, or for what is being traced."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(filled_B)
    return filled_B.device.type == "cpu" and not traced
