"""State files: the states of a stack of mixers, saved today and read again tomorrow or on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from holdall import checkpoints
from holdall.contract.mixer import Mixer
from holdall.contract.state import POSITION_FIELDS, Position, State, StateError, misfit

STATE_FORMAT = "holdall-state-1"
"""Written into every state file; changes when a file of before can no longer be read."""


def save_states(states: Sequence[State], path: Path) -> None:
    """Write the states of a stack of mixers, one per layer, to a safetensors file."""
    tensors = {
        f"{layer}.{type(state).__name__}.{field}": tensor.contiguous().cpu()
        for layer, state in enumerate(states)
        for field, tensor in zip(type(state)._fields, state, strict=True)  # type: ignore[attr-defined]
    }
    checkpoints.write(path, tensors, {"format": STATE_FORMAT})


def load_states(path: Path, mixers: Sequence[Mixer]) -> list[State]:
    """Read what `save_states` wrote, for the mixers of the same stack.

    A model's states end with the `Position` of its learned positions, if it has some: so do these.

    Raises ValueError naming the first layer whose state is not of the kind that its mixer carries, and
    RunError for a file that is damaged.
    """
    with checkpoints.opened(path) as file:
        if file.about.get("format") != STATE_FORMAT:
            raise ValueError(f"{path} is not a state file of Holdall ({STATE_FORMAT})")
        tensors = {name: file.tensor(name) for name in file.names}
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
    if tensors:
        raise ValueError(f"{path} holds states of more than {len(mixers)} layers: {sorted(tensors)}")
    return states
