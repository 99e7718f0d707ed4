"""How commands become typed: ranges of their flags, and flags that are the fields of a dataclass.

    TrainFlags = flags_of(PretrainOptions)      each field a flag, its docstring the flag's help
    given(flags)                                of such flags those that were given, as values of the fields

Nothing here is heavy to import, so that help is instant.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

import tyro

from holdall import settings
from holdall.settings import field_docs

Yes = Annotated[
    bool | None,
    tyro.conf.FlagCreatePairsOff,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=0,
        metavar="",
        instance_from_str=lambda words: True,
        is_instance=lambda value: value in (True, None),
        str_from_instance=lambda value: [],
    ),
]
"""A flag without a value; None where it is not given."""


def checked(function: Callable[..., int]) -> Callable[..., int]:
    """A command whose numbers must be in the ranges that its signature declares."""

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> int:
        check(function, inspect.signature(function).bind(*args, **options).arguments)
        return function(*args, **options)

    return command


def check(function: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the flag, for a number outside of the range that its annotation declares."""
    for name, kind, value in typed(function, arguments):
        settings.check(f"--{name.replace('_', '-')}", value, kind)


def typed(owner: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, annotated type and value of each argument; of one that is a dataclass, of its fields instead."""
    kinds = typing.get_type_hints(owner, include_extras=True)
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value):
            yield from typed(type(value), vars(value))
        else:
            yield name, kinds[name], value


def flags_of(
    config: type,
    *,
    leave_out: Collection[str] = (),
    called: Mapping[str, str] | None = None,
    default: str = "(default: {})",
) -> type:
    """The fields of a dataclass as flags: a dataclass in which each is None where it is not given.

    A field's docstring is the flag's help, its annotation the flag's type and range. A boolean field has two
    flags, --this and --no-this.

    Args:
        config: the dataclass; each of its fields needs a docstring (else KeyError).
        leave_out: fields that are no flags.
        called: names of flags that differ from their field's, which remains an alias.
        default: how the help shows the field's default.
    """
    made = []
    docs, kinds = field_docs(config), typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        kind, own_name = kinds[field.name], field.name.replace("_", "-")
        name = (called or {}).get(field.name, field.name)
        how = {"help": docs[field.name], "aliases": [f"--{own_name}"] if name != field.name else None}
        if kind is bool:
            made.append(_flag(name, Yes, field.name, **how))
            made.append(_flag(f"no_{name}", Yes, field.name, means=False, help=f"Not --{own_name}."))
        else:
            hint = default.format(_typed_as(field.default)) if field.default != "" else ""
            how |= {"help_behavior_hint": hint, "metavar": metavar(kind)}
            made.append(_flag(name, kind | None, field.name, **how))
    return dataclasses.make_dataclass(f"{config.__name__}Flags", made, frozen=True, kw_only=True)


def _flag(name: str, kind: Any, field: str, *, means: Any = None, **how: Any) -> tuple[str, Any, Any]:
    """A flag, for `make_dataclass`, of a field; `means`: the field's value, if it is not the flag's own."""
    about = tyro.conf.arg(**{"help_behavior_hint": "", **how})
    return (
        name,
        Annotated[kind, about],
        dataclasses.field(default=None, metadata={"of": field, "means": means}),
    )


def given(flags: Any) -> dict[str, Any]:
    """The values of the flags that were given, by field. Raises ValueError for both --this and --no-this."""
    values: dict[str, Any] = {}
    for flag in dataclasses.fields(flags):
        value, field, means = getattr(flags, flag.name), flag.metadata["of"], flag.metadata["means"]
        if value is None:
            continue
        if field in values:
            raise ValueError(f"--{field} and --{flag.name.replace('_', '-')} were both given")
        values[field] = value if means is None else means
    return values


def metavar(kind: Any) -> str:
    """What stands for a flag's value in its help: INT, "FLOAT FLOAT" or {this,that}."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return metavar(args[0])
    if origin is Literal:
        return f"{{{','.join(map(str, args))}}}"
    return " ".join(map(metavar, args)) if origin is tuple else kind.__name__.upper()


def _typed_as(value: Any) -> str:
    """A value as a user would type it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
