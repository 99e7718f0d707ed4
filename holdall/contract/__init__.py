"""The one contract: a sequence mixer maps a stretch of tokens and a state to outputs and the next state.

    y_BTD, state = mixer(x_BTD, state)       any T >= 1; state None means "nothing read yet"

Training, prefill, one decode step and another chunk after that are this same call. A *state* is a
value: a NamedTuple of tensors whose first dimension is the batch row, so rows can be selected, copied,
saved and moved. holdall/testing/laws.py holds every registered mixer to the laws that follow from this.

Shape letters, here and in all of Holdall: B batch row, T time, D model width, H heads, K key dim,
V value dim, F features, N state size per channel, S slots of a cache.
"""

from holdall.contract.config import Config, check_fields, closest, did_you_mean, field_types
from holdall.contract.mixer import Mixer, MixerConfig, readout_dtype, recurrent_dtype
from holdall.contract.packed import Format, PackedState, pack
from holdall.contract.registry import Entry, Paper, lookup, register, registered
from holdall.contract.room import capacity_of, is_reserved, reserve, room_left, trim
from holdall.contract.state import (
    POSITION_FIELDS,
    POSITION_SLOTS,
    Field,
    Position,
    State,
    StateError,
    bytes_per_row,
    count_on,
    elements_per_row,
    fields_of,
    join_rows,
    map_state,
    misfit,
    none_read,
    select_rows,
    with_room_too,
    write_state,
)
from holdall.contract.state_file import (
    StateFile,
    StateFileWarning,
    describe_states,
    load_states,
    read_states,
    save_states,
)

__all__ = [
    "POSITION_FIELDS", "POSITION_SLOTS", "Config", "Entry", "Field", "Format", "Mixer", "MixerConfig",
    "PackedState", "Paper", "Position", "State", "StateError", "StateFile", "StateFileWarning",
    "bytes_per_row", "capacity_of", "check_fields", "closest", "count_on", "describe_states", "did_you_mean",
    "elements_per_row", "field_types", "fields_of", "is_reserved", "join_rows", "load_states", "lookup",
    "map_state", "misfit", "none_read", "pack", "read_states", "readout_dtype", "recurrent_dtype",
    "register", "registered", "reserve", "room_left", "save_states", "select_rows", "trim",
    "with_room_too", "write_state",
]  # fmt: skip
