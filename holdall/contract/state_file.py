"""State files: the states of a stack of mixers, saved today and read again tomorrow or on another machine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from holdall import checkpoints
from holdall.contract.mixer import Mixer
from holdall.contract.room import reserve, trim
from holdall.contract.state import POSITION_FIELDS, POSITION_SLOTS, Position, State, StateError, misfit

STATE_FORMAT = "holdall-state-1"
"""Written into every state file; changes when a file of before can no longer be read."""


class StateFileWarning(UserWarning):
    """A state file of before files named their model: whether it is another model's cannot be checked."""


BESIDE = "beside."
"""How the names of tensors begin that are no states."""


class StateFile(NamedTuple):
    """What a state file says of itself.

    model: the fingerprint of the model whose states these are; "" if the file does not say.
    tokens_read: how many tokens each row has read; None if the file does not say.
    about: the whole header; `save_states` takes entries of the caller's own.
    """

    model: str
    tokens_read: list[int] | None
    about: Mapping[str, str]


class Contents(NamedTuple):
    """What is in a state file: states, one per layer, and tensors that were saved beside them."""

    states: list[State]
    beside: dict[str, Tensor]
    file: StateFile


def save_states(
    states: Sequence[State],
    path: Path,
    *,
    model: str = "",
    tokens_read: Sequence[int] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the states of a stack of mixers, one per layer, to a safetensors file.

    Of a state with room, what was read is written.

    Args:
        states: one per layer, and one more of learned positions.
        path: the file.
        model: the fingerprint of the model whose states these are; `load_states` refuses another model's.
        tokens_read: how many tokens each row has read; None takes the count of the first state that has one.
        beside: tensors that belong to the states; `read_states` gives them back.
        about: texts that do, likewise.
    """
    states = [trim(state) for state in states]
    tensors = {
        f"{layer}.{type(state).__name__}.{field}": tensor.contiguous().cpu()
        for layer, state in enumerate(states)
        for field, tensor in zip(type(state)._fields, state, strict=True)  # type: ignore[attr-defined]
    }
    tensors |= {BESIDE + name: tensor.contiguous().cpu() for name, tensor in (beside or {}).items()}
    about = {**(about or {}), "format": STATE_FORMAT}
    if model:
        about["model_fingerprint"] = model  # "model" is the config in a file of weights
    if tokens_read is None:
        counts = (state.seen_B.tolist() for state in states if hasattr(state, "seen_B"))
        tokens_read = next(counts, None)
    if tokens_read is not None:
        about["tokens_read"] = json.dumps(list(tokens_read))
    checkpoints.write(path, tensors, about)


def describe_states(path: Path) -> StateFile:
    """Whose states are in a file that `save_states` wrote, and how many tokens they have read."""
    with checkpoints.opened(path) as file:
        return _described(path, file.about)


def _described(path: Path, about: Mapping[str, str]) -> StateFile:
    if about.get("format") != STATE_FORMAT:
        raise ValueError(f"{path} is not a state file of Holdall ({STATE_FORMAT})")
    read = about.get("tokens_read")
    model = about.get("model_fingerprint", "")
    return StateFile(model, None if read is None else json.loads(read), about)


def load_states(
    path: Path, mixers: Sequence[Mixer], *, model: str = "", capacity: int | None = None
) -> list[State]:
    """The states that `save_states` wrote; arguments and errors as of `read_states`."""
    return read_states(path, mixers, model=model, capacity=capacity).states


def read_states(
    path: Path, mixers: Sequence[Mixer], *, model: str = "", capacity: int | None = None
) -> Contents:
    """Read what `save_states` wrote, for the mixers of the same stack.

    A model's states end with the `Position` of its learned positions, if it has some: so do these.

    Args:
        path: the file.
        mixers: one per layer.
        model: the fingerprint of the model that they belong to, if it is to be checked. A file that does not
            name its model, as those of before did not, is read with a StateFileWarning.
        capacity: give the states room for so many tokens, those read included.

    Raises ValueError naming the first layer whose state is not of the kind that its mixer carries, or both
    models if the file is of another, and RunError for a file that is damaged.
    """
    with checkpoints.opened(path) as file:
        about = _described(path, file.about)
        tensors = {name: file.tensor(name) for name in file.names}
    if model and not about.model:
        warnings.warn(
            f"{path} does not name its model, so it may be another's", StateFileWarning, stacklevel=2
        )
    elif model and about.model != model:
        raise StateError(f"{path} has states of model {about.model}, not of this one, {model}")
    kinds = [(mixer.state_type, mixer.state_fields(torch.float32), mixer.owner) for mixer in mixers]
    if any(name.startswith(f"{len(mixers)}.{Position.__name__}.") for name in tensors):
        kinds.append((Position, POSITION_FIELDS, "a model with learned positions"))
    states: list[State] = []
    for layer, (kind, fields, owner) in enumerate(kinds):
        names = [f"{layer}.{kind.__name__}.{field.name}" for field in fields]
        if any(name not in tensors for name in names):
            found = sorted(name for name in tensors if name.startswith(f"{layer}."))
            raise ValueError(f"{path}: layer {layer} needs {names} but the file holds {found}")
        state = kind(*(tensors.pop(name) for name in names))
        if why := misfit(state, kind, fields, owner, layer=f" of layer {layer}"):
            raise StateError(f"{path}: {why}")
        states.append(state)
    names = [name for name in tensors if name.startswith(BESIDE)]
    beside = {name.removeprefix(BESIDE): tensors.pop(name) for name in names}
    if tensors:
        raise ValueError(f"{path} holds states of more than {len(mixers)} layers: {sorted(tensors)}")
    if capacity is not None:
        positions = [reserve(state, POSITION_SLOTS, capacity) for state in states[len(mixers) :]]
        pairs = zip(mixers, states, strict=False)
        states = [*(mixer.with_room(state, capacity) for mixer, state in pairs), *positions]
    return Contents(states, beside, about)
