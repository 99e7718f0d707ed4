"""States as values: saved and loaded, their rows selected and joined, moved, detached.

    from holdall import states

    y_BTD, state = mixer(x_BTD)
    three = states.select(state, [0, 0, 1])        # row 0 twice: one prompt, two continuations
    both = states.join([state, other])             # the rows of several, in order
    states.save(state, "state.safetensors")        # and tomorrow, or on another machine:
    state = states.load("state.safetensors", mixer)
    state = states.to(state, mixer)                # on its device, in the dtypes that it carries
    state = states.detach(state)                   # where backpropagation through time ends

A state is a NamedTuple of tensors whose first dimension is the row of the batch. Each function takes the
state of one mixer or a model's, a list with one state per layer, and returns the same kind of thing. None
changes what it is given. For text there are the sessions of `holdall.load`, which keep more than states.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from holdall import contract
from holdall.contract import (
    POSITION_FIELDS,
    Field,
    Mixer,
    Position,
    State,
    StateError,
    StateFile,
    StateFileWarning,
    misfit,
    with_room_too,
)
from holdall.model import Model

__all__ = [
    "StateError", "StateFile", "StateFileWarning", "bytes_per_row", "clone", "describe", "detach", "join",
    "load", "save", "select", "to",
]  # fmt: skip

S = TypeVar("S")  # a state, or a list of them

# ------------------------------------------------------------------------------------------- rows


def select(states: S, rows: slice | Sequence[int] | Sequence[bool] | Tensor) -> S:
    """Copies of some rows, which may repeat: numbers, negative ones from the end, a slice, or a mask.

    Raises ValueError for numbers of rows that there are not.
    """
    return _each(states, lambda state: contract.select_rows(state, rows))


def join(parts: Sequence[S]) -> S:
    """The rows of several states, in order: how sequences of different lengths become one batch.

    Raises StateError for states of different mixers, sizes, dtypes, devices or numbers of layers.
    """
    if not parts:
        raise ValueError("there is no state to join")
    stacks = [_stack(part) for part in parts]
    layers = len(stacks[0])
    for number, stack in enumerate(stacks):
        if len(stack) != layers:
            raise StateError(
                f"state {number} has {len(stack)} layers and cannot be joined with the first, "
                f"which has {layers}"
            )
    joined: Any = [contract.join_rows(of_layer) for of_layer in zip(*stacks, strict=True)]
    return joined[0] if _is_one(parts[0]) else joined


# ------------------------------------------------------------------------------------- all tensors


def detach(states: S) -> S:
    """The same states outside the graph of automatic differentiation, sharing memory with those given.

    Between two pieces of a long sequence this is where backpropagation through time is cut off.
    """
    return _each(states, lambda state: contract.map_state(state, torch.Tensor.detach))


def clone(states: S) -> S:
    """Copies, which stay as they are when the original is given away by `inplace=True`."""
    return _each(states, lambda state: contract.map_state(state, torch.clone))


def to(states: S, where: str | torch.device | Mixer | Sequence[Mixer] | Model) -> S:
    """The states on a device; or as a mixer or a model carries them, which decides about dtypes too.

    There is no cast to a dtype: beside bf16 activations a recurrence stays in fp32, and only caches of keys
    and values become bf16. Each tensor gets the dtype that `mixer.init_state` gives it beside activations in
    the dtype of the mixer's weights. What fits already is returned as it is, not copied.

    Args:
        where: the device; or whose states they are: a mixer, a list of them, or a model.

    Raises StateError, naming the first layer that does not fit, if they are another mixer's or model's.
    """
    if isinstance(where, str | torch.device):
        return _each(states, lambda state: contract.map_state(state, lambda tensor: tensor.to(where)))
    stack, moved = _stack(states), []
    owners = _owners(where, stack)
    if len(owners) != len(stack):
        raise StateError(f"{len(stack)} states, where {_layers(len(owners))}")
    for layer, (state, (kind, fields, owner, device)) in enumerate(zip(stack, owners, strict=True)):
        kind, fields = with_room_too(state, kind, fields)
        name = "" if _is_one(states) else f" of layer {layer}"
        if why := misfit(state, kind, fields, owner, layer=name):
            raise StateError(why)
        moved.append(kind(*(t.to(device, field.dtype) for t, field in zip(state, fields, strict=True))))
    result: Any = moved[0] if _is_one(states) else moved
    return result


def bytes_per_row(states: State | Sequence[State]) -> int:
    """Bytes of one row, all layers together: the state size that Holdall reports."""
    return sum(map(contract.bytes_per_row, _stack(states)))


# ------------------------------------------------------------------------------------------- files


def save(
    states: State | Sequence[State],
    path: str | os.PathLike[str],
    *,
    model: str = "",
    tokens_read: Sequence[int] | None = None,
) -> None:
    """Write states to a safetensors file, at once or not at all.

    Args:
        path: the file.
        model: what identifies the weights that made them, as `LanguageModel.fingerprint` does; `load` then
            refuses other weights.
        tokens_read: how many tokens each row has read, for `describe`; None if the states count themselves.

    Raises OSError if the file cannot be written; the one of before is then still there.
    """
    contract.save_states(_stack(states), Path(path), model=model, tokens_read=tokens_read)


@overload
def load(
    path: str | os.PathLike[str], owner: Mixer, *, model: str = "", capacity: int | None = None
) -> State: ...
@overload
def load(
    path: str | os.PathLike[str],
    owner: Sequence[Mixer] | Model,
    *,
    model: str = "",
    capacity: int | None = None,
) -> list[State]: ...
def load(
    path: str | os.PathLike[str],
    owner: Mixer | Sequence[Mixer] | Model,
    *,
    model: str = "",
    capacity: int | None = None,
) -> State | list[State]:
    """What `save` wrote, on the device of its owner and in the dtypes that this carries (see `to`).

    Args:
        owner: the mixer, the mixers of all layers, or the model that the states are of.
        model: what identifies its weights, if that is to be checked.
        capacity: room for so many tokens, those read included, at fixed addresses.

    Returns one state for a mixer, otherwise one per layer.

    Raises StateError or ValueError naming both sides if the file is another mixer's or model's, and RunError
    if it is damaged or missing.
    """
    mixers = _mixers(owner)
    found = contract.load_states(Path(path), mixers, model=model, capacity=capacity)
    try:
        found = to(found, owner if isinstance(owner, Model) else mixers)
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    return found[0] if isinstance(owner, Mixer) else found


def describe(path: str | os.PathLike[str]) -> StateFile:
    """Whose states a file has, and how many tokens each row has read; nothing but its header is read."""
    return contract.describe_states(Path(path))


# --------------------------------------------------------------------------- one state, or one per layer


def _is_one(states: Any) -> bool:
    """Whether this is one mixer's state, not a list of them."""
    return isinstance(states, tuple) and len(states) > 0 and isinstance(states[0], Tensor)


def _stack(states: Any) -> list[Any]:
    """The states of all layers. Raises TypeError for what has none."""
    stack = [states] if _is_one(states) else states
    if not isinstance(stack, list | tuple) or not all(map(_is_one, stack)) or hasattr(stack, "_fields"):
        hint = "; a session has them in .states" if hasattr(states, "states") else ""
        raise TypeError(
            "states are a NamedTuple of tensors, or a list with one per layer, not "
            f"{'None' if states is None else 'a ' + type(states).__name__}{hint}"
        )
    return list(stack)


def _each(states: S, function: Callable[[Any], Any]) -> S:
    result: Any = [function(state) for state in _stack(states)]
    return result[0] if _is_one(states) else result


def _mixers(owner: Mixer | Sequence[Mixer] | Model) -> list[Mixer]:
    if isinstance(owner, Mixer):
        return [owner]
    return list(owner.mixers if isinstance(owner, Model) else owner)


def _owners(
    owner: Mixer | Sequence[Mixer] | Model, stack: Sequence[State]
) -> list[tuple[type, tuple[Field, ...], str, torch.device]]:
    """Of each layer the kind and fields of its state, its name, and where it is."""
    owners: list[tuple[type, tuple[Field, ...], str, torch.device]] = []
    whole = owner if isinstance(owner, Model) else None
    for mixer in _mixers(owner):
        # one without weights is where its model is
        device = whole.device if whole is not None else torch.get_default_device()
        tensor = next(itertools.chain(mixer.parameters(), mixer.buffers()), torch.empty(0, device=device))
        dtype = whole.block_dtype if whole is not None else tensor.dtype
        owners.append((mixer.state_type, mixer.state_fields(dtype), mixer.owner, tensor.device))
    if isinstance(owner, Model):
        with_positions = owner.position_embed is not None
    else:
        with_positions = len(stack) == len(owners) + 1 and isinstance(stack[-1], Position)
    if with_positions:
        device = owners[-1][3] if owners else torch.get_default_device()
        owners.append((Position, POSITION_FIELDS, "a model with learned positions", device))
    return owners


def _layers(count: int) -> str:
    return "the mixer has one" if count == 1 else f"the model has {count}"
