"""Taking tokens back from states that list them: caches, rings, and the last inputs of a short filter.

A state that grows loses its newest entries; with room (holdall/contract/room.py) its count is lowered. One of
fixed size drops an old entry for each new one, so to go back it keeps L entries more than outputs look at,
and counts in `spare_B` how many of a row's tokens can be taken back now: L once so many were read, fewer
after a rollback, until tokens have followed.

On a CPU a row that is to give back more than it can is refused. On a GPU nothing waits: its outputs are NaN
from then on.

Letters: B row, T new tokens, S slots, L most tokens taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from holdall.contract.room import in_order, is_reserved, known_to_the_host
from holdall.contract.state import StateError

LISTED = 32
"""How many tokens a state that grows takes back at once: shapes may not depend on how many are."""
LOST = -(1 << 40)
"""The counts of a row that gave back more than it had: no number of tokens makes them positive again."""


def counts_of(count_B: Tensor | int, rows: int, device: torch.device) -> Tensor:
    """A number for every row, or one for each, as (B,) on the device; a number is made there, not copied."""
    if isinstance(count_B, int):
        return torch.full((rows,), count_B, device=device)
    return torch.as_tensor(count_B).to(device).expand(rows)


def without_last(
    state: Any, names: Sequence[str], count_B: Tensor, owner: str, *, inplace: bool = False
) -> Any:
    """A state that grows, with room or without, without each row's last tokens, `count_B` of them.

    Args:
        state: what it counts in `seen_B` or `filled_B` is lowered.
        names: its tensors that have an entry for each token.
        count_B: at most LISTED.
        owner: what errors call the mixer.
        inplace: slots may be emptied where they are; counts are new.

    Without room and on a CPU, slots that no row needs any longer are dropped; on a GPU they stay, in front.
    Raises StateError if a row, as far as the host knows, has fewer tokens.
    """
    tensors = dict(zip(state._fields, state, strict=True))
    slots, counts = tensors[names[0]].shape[1], [name for name in ("seen_B", "filled_B") if name in tensors]
    held_B = torch.stack([torch.full_like(count_B, slots), *(tensors[name] for name in counts)]).amin(0)
    refuse_short(count_B, held_B, owner)
    known, short_B = known_to_the_host(count_B), count_B > held_B
    for name in names if slots else ():
        old_BSX = tensors[name]
        if is_reserved(state):
            tensors[name] = _emptied(old_BSX, state.filled_B, count_B, inplace)
            continue
        moved_BSX = in_order(old_BSX, slots - count_B)
        if not known and moved_BSX.is_floating_point():
            moved_BSX.masked_fill_(short_B.view(-1, *[1] * (old_BSX.ndim - 1)), torch.nan)
        tensors[name] = moved_BSX[:, int(count_B.min()) if known and len(count_B) else 0 :].clone()
    for name in counts:
        lost = slots + 1 if name == "filled_B" else 0  # beyond the room there is, every later output is NaN
        tensors[name] = (tensors[name] - count_B).masked_fill(short_B, lost)
    return type(state)(*tensors.values())


def _emptied(slots_BSX: Tensor, filled_B: Tensor, count_B: Tensor, inplace: bool) -> Tensor:
    """The slots with zeros in the last filled ones: what is not finite must not lie behind the others."""
    slots, device = slots_BSX.shape[1], slots_BSX.device
    back_L = torch.arange(1, min(LISTED, slots) + 1, device=device)
    ones = [1] * (slots_BSX.ndim - 2)
    slot_BL = (filled_B[:, None] - back_L) % slots
    index_BLX = slot_BL.view(*slot_BL.shape, *ones).expand(*slot_BL.shape, *slots_BSX.shape[2:])
    goes_BL = back_L <= count_B[:, None]
    kept_BLX = slots_BSX.gather(1, index_BLX).masked_fill(goes_BL.view(*goes_BL.shape, *ones), 0)
    return (
        slots_BSX.scatter_(1, index_BLX, kept_BLX) if inplace else slots_BSX.scatter(1, index_BLX, kept_BLX)
    )


# ------------------------------------------------------------------------------------- states of fixed size


def read_on(spare_B: Tensor, new: int, limit: int, *, inplace: bool) -> Tensor:
    """How many tokens can be taken back after so many more were read."""
    return spare_B.add_(new).clamp_(max=limit) if inplace else (spare_B + new).clamp(max=limit)


def lowered(seen_B: Tensor, spare_B: Tensor, count_B: Tensor, owner: str) -> tuple[Tensor, Tensor]:
    """How many tokens were read, and how many can be taken back, after a rollback.

    Raises StateError, if the host knows, for more than a row can give back.
    """
    refuse_short(count_B, spare_B, owner)
    lost_B = count_B > spare_B
    return (seen_B - count_B).masked_fill(lost_B, LOST), (spare_B - count_B).masked_fill(lost_B, LOST)


def refuse_short(count_B: Tensor, held_B: Tensor, owner: str) -> None:
    """Refuse with StateError what a row cannot give back, if the host knows."""
    if not known_to_the_host(count_B) or not (short_B := count_B > held_B).any():
        return
    row = int(short_B.nonzero()[0])
    raise StateError(
        f"{owner} cannot take back {int(count_B[row])} tokens of row {row}: it can give back its last "
        f"{int(held_B[row])}, after an earlier rollback or so few tokens. Take back no more than were read "
        "since"
    )


def nan_where_lost(y: Tensor, seen_B: Tensor) -> Tensor:
    """Outputs, (B, ...), NaN of rows that gave back more than they had; a CPU has refused those."""
    if known_to_the_host(seen_B):
        return y
    return y.masked_fill((seen_B < 0).view(-1, *[1] * (y.ndim - 1)), torch.nan)
