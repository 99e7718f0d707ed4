"""Configs: frozen dataclasses that say what they take and refuse the rest by name; written as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from holdall import files, settings


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the closest known one, then all of them."""
    known = sorted(known)
    return f"{closest(word, known)}Known: {', '.join(known)}"


def closest(word: str, known: Iterable[str]) -> str:
    """A question whether the closest known name was meant, with a space behind it; empty if none is close."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"Did you mean '{close[0]}'? " if close else ""


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has an annotated type; True is not an int, and an int will do as a float."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        return fits(value, args[0])
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, args[0]) and fits(item, args[1]) for key, item in value.items()
        )
    if origin is tuple:
        each = args[:1] * len(value) if isinstance(value, tuple) and args[1:] == (...,) else args
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def check_fields(kind: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, if a dataclass can be made of them; TypeError for one of another type than its field's."""
    for name, hint in typing.get_type_hints(kind).items():
        if name in values and not fits(values[name], hint):
            raise TypeError(f"{name} = {values[name]!r:.80} is not of type {hint}")
    return values


C = TypeVar("C", bound="Config")  # not typing.Self, which the shape checks at test time cannot resolve


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configs: frozen, keyword-only, and picky about unknown fields, types and ranges.

    A field declares which numbers it takes beside its type (holdall/settings.py); NaN and infinity are taken
    nowhere. A subclass checks in `validate()` what fields must be to each other; types and ranges are right
    by then.
    """

    def __post_init__(self) -> None:
        hints, plain = field_types(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), plain[field.name]
            if not fits(value, kind):
                says = str(kind).replace("typing.", "") if typing.get_origin(kind) else kind.__name__
                raise TypeError(f"{type(self).__name__}.{field.name} = {value!r} is not of type {says}")
            settings.check(f"{type(self).__name__}.{field.name}", value, hints[field.name])
            if kind is float:
                object.__setattr__(self, field.name, float(value))
        self.validate()

    def validate(self) -> None:
        """Raise ValueError, naming field and way out, if values do not fit together."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, defaults included, as plain JSON values."""
        return {field.name: to_plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[C], plain: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`; an unknown field raises TypeError with the closest known one."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in plain:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no field '{name}'. {did_you_mean(name, known)}")
        _, hints = field_types(cls)
        return cls(**{name: _from_plain(value, hints[name]) for name, value in plain.items()})

    @classmethod
    def read(cls: type[C], path: Path, way_out: str = "") -> C:
        """The config that a JSON file holds. Raises RunError, which names the file and what is wrong."""
        return cls.checked(files.read_json(path, way_out), path, way_out)

    @classmethod
    def parse(cls: type[C], text: str, where: object, way_out: str = "") -> C:
        """The config that a JSON text says; `where` is named by the RunError about anything else."""
        return cls.checked(files.parse_json(text, where, way_out), where, way_out)

    @classmethod
    def checked(cls: type[C], plain: Any, where: object, way_out: str = "") -> C:
        """`from_dict` of values that come from a file: whatever is wrong with them is a RunError."""
        try:
            return cls.from_dict(plain)
        except Exception as error:  # the values may be of any kind, and validate() calculates with them
            reason = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise files.damaged(where, f"{reason or type(error).__name__}", way_out) from error


_field_types: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}


def field_types(config: type[Config]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a config's fields, with the ranges that they declare and without; looked up once."""
    if config not in _field_types:
        whole = typing.get_type_hints(config, include_extras=True)
        _field_types[config] = whole, typing.get_type_hints(config)
    return _field_types[config]


def to_plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def _from_plain(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) in (Union, types.UnionType):
        is_list = isinstance(value, list)
        fitting = [arg for arg in typing.get_args(kind) if (typing.get_origin(arg) is tuple) == is_list]
        return _from_plain(value, fitting[0]) if fitting else value
    if isinstance(value, list):
        args = typing.get_args(kind)
        each = args[:1] * len(value) if args[1:] == (...,) else args
        # items beyond the last type stay, so that the check of the whole refuses them
        return tuple(_from_plain(item, each[i] if i < len(each) else Any) for i, item in enumerate(value))
    if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Config):
        return kind.from_dict(value)
    return value
