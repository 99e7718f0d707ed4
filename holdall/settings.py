"""Ranges of a config's numbers, declared beside their types, and the differences between two configs.

    learning_rate: PositiveFloat = 8e-4
    kernel: Annotated[int, Range(least=2, zero="no convolution")] = 4

Values are accepted if comparisons hold, so that NaN, for which none does, is refused like any other value out
of range. Infinity is refused everywhere.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import docstring_parser


@dataclass(frozen=True, kw_only=True)
class Range:
    """The range of a number. A bound that is None does not apply."""

    above: float | None = None
    """Lower bound, excluded."""
    least: float | None = None
    """Lower bound, included."""
    below: float | None = None
    """Upper bound, excluded."""
    most: float | None = None
    """Upper bound, included."""
    zero: str = ""
    """What 0 stands for, if it is allowed although it is out of the range; "" if it is not."""

    def __contains__(self, value: float) -> bool:
        return bool(self.zero and value == 0) or (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            text = f"from {self.least:,} to {self.most:,}"
        else:
            ends = [
                "" if self.above is None else f"above {self.above:g}" if self.above else "positive",
                "" if self.least is None else f"at least {self.least:g}",
                "" if self.below is None else f"below {self.below:g}",
                "" if self.most is None else f"at most {self.most:g}",
            ]
            text = " and ".join(filter(None, ends)) or "a number"
        return text + (f", or 0 for {self.zero}" if self.zero else "")

    @property
    def bounded(self) -> bool:
        """Whether there is an upper bound, so that errors need not add that infinity is out of range."""
        return self.below is not None or self.most is not None


PositiveInt = Annotated[int, Range(above=0)]
NonNegativeInt = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
Seed = Annotated[int, Range(least=0, most=2**63 - 1)]
"""Seed of a random generator; PyTorch and NumPy accept all of this range."""
Betas = tuple[Annotated[float, Range(least=0, below=1)], Annotated[float, Range(least=0, below=1)]]
"""Decay rates of Adam's moving averages."""
Precision = Literal["fp32", "bf16"]
"""What a forward and backward pass computes in: holdall/precision.py."""


def is_finite(value: float) -> bool:
    """Whether a number is not NaN, not infinite, and no int beyond the largest float."""
    return abs(value) <= MOST


MOST = 1.7976931348623157e308
"""The largest float."""


def refusal(value: Any, kind: Any) -> str:
    """What a value of the annotated type `kind` must be but is not, such as "positive"; empty if it fits.

    Types are not checked here: a value of another type has no range.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        declared = [bounds for bounds in args[1:] if isinstance(bounds, Range)]
        if not declared or not _is_number(value):
            return refusal(value, args[0])
        endless = args[0] is float and not any(bounds.bounded for bounds in declared)
        wants = " and ".join(map(str, declared)) + " and finite" * endless
        if args[0] is int and isinstance(value, float):
            return f"an integer, {wants}"
        return "" if is_finite(value) and all(value in bounds for bounds in declared) else wants
    if origin in (Union, types.UnionType):
        others = [arg for arg in args if arg is not types.NoneType]
        fitting = [arg for arg in others if not _is_number(value) or arg in (int, float) or _declares(arg)]
        refusals = [refusal(value, arg) for arg in fitting]
        return "" if "" in refusals or not refusals else refusals[-1]
    if origin is dict and isinstance(value, Mapping):
        return next(filter(None, (refusal(item, args[1]) for item in value.values())), "")
    if origin is tuple and isinstance(value, tuple):
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        return next(filter(None, map(refusal, value, kinds)), "")
    return "finite" if kind is float and _is_number(value) and not is_finite(value) else ""


def _declares(kind: Any) -> bool:
    return typing.get_origin(kind) is Annotated


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError, naming the setting, if its value is out of the range that `kind` declares."""
    if wants := refusal(value, kind):
        raise ValueError(f"{name} = {value!r} must be {wants}")


def differences(held: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two configs, as plain JSON values, differ: "model.width: 64 there, 32 here"."""
    if isinstance(held, Mapping) and isinstance(wanted, Mapping):
        names = [*held, *(name for name in wanted if name not in held)]
        pairs = [
            (f"{path}.{name}".lstrip("."), held.get(name, ABSENT), wanted.get(name, ABSENT)) for name in names
        ]
    elif isinstance(held, list) and isinstance(wanted, list) and len(held) == len(wanted):
        pairs = [(f"{path}[{i}]", *both) for i, both in enumerate(zip(held, wanted, strict=True))]
    else:
        return [] if _same(held, wanted) else [f"{path}: {_short(held)} there, {_short(wanted)} here"]
    return [line for where, one, other in pairs for line in differences(one, other, where)]


ABSENT = object()


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal. 1 equals 1.0, which JSON does not distinguish; True is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _short(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def differ(held: Any, wanted: Any, *, most: int = 6) -> str:
    """The differences between two configs in one line; empty if there are none."""
    return listed(differences(held, wanted), most=most)


def listed(differences: Sequence[str], *, most: int = 6) -> str:
    """The first `most` differences in one line, and the number of those left out."""
    more = f"; and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(differences[:most]) + more


def field_docs(config: type[Any]) -> dict[str, str]:
    """The docstring of each field of a dataclass, the string right below it, as one line; "" without one.

    Read from the source by the parser that tyro uses for `--help`, so a field has the same words everywhere.
    A class without source, as one typed into a prompt, gives none.
    """
    docs = {field.name: "" for field in dataclasses.fields(config)}
    for owner in reversed(config.__mro__):
        if dataclasses.is_dataclass(owner):
            for param in docstring_parser.parse_from_object(owner).params:
                if param.arg_name in docs and param.description:
                    docs[param.arg_name] = " ".join(param.description.split())
    return docs
