"""Every number of every config has a declared range, and what lies outside is refused by name."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest

from holdall import mixers
from holdall.contract import Config, MixerConfig, field_types
from holdall.evals.folder import Result
from holdall.model import ModelConfig
from holdall.recipes import lm_suite
from holdall.settings import PositiveFloat, PositiveInt, Range, check, differ
from holdall.sweeps import Point, SweepConfig
from holdall.tasks.data import (
    DataConfig,
    MQARData,
    MQARSegment,
    Segment,
    SetDisjointnessData,
    SetSegment,
    SingleQueryData,
)
from holdall.tasks.set_disjointness import SetDisjointness
from holdall.tasks.single_query import SingleQuery
from holdall.theory import by_hand_conv, disjointness
from holdall.training import chassis, language_models, populations
from holdall.training.language_models import PretrainConfig
from holdall.training.populations import TrainConfig

SEGMENT = MQARSegment(length=32, pairs=2, rows=16)
DATA = MQARData(vocab=64, train=(SEGMENT,), test=(SEGMENT,))
MODEL = ModelConfig(vocab=64, width=8, layers=(mixers.entry("base-conv").configure(width=8),))
TRAIN = TrainConfig(model=MODEL, data=DATA, learning_rates=(1e-3,))
SETS = SetSegment.of(4, 8, 16)
ONE_QUESTION = Segment(length=30, rows=16)
MEMBER = populations.MemberState(stopped="", steps=1, accuracy=0.5, accuracy_by_difficulty={"4": 0.5})
POINT = Point(label="a", family="b", train=TRAIN)
EXAMPLES = [
    SEGMENT, ONE_QUESTION, lm_suite.suite(), DATA, MODEL, TRAIN, POINT,
    SweepConfig(recipe="quick", points=(POINT,)),
    PretrainConfig(model=MODEL),
    SingleQueryData(vocab=20, train=(ONE_QUESTION,), test=(ONE_QUESTION,), task_name="induction-heads"),
    language_models.PretrainState(step=1), chassis.RunState(step=1),
    language_models.Result(
        steps=1, tokens=1, valid_loss=1.0, valid_perplexity=1.0, best_valid_loss=1.0, seconds=1.0,
        parameters=1, forms=("loop",),
    ),
    MEMBER, populations.PopulationState(step=1, seconds=1.0, members=(MEMBER,), metrics_bytes=1),
    populations.MemberResult(
        learning_rate=1e-3, seed=0, accuracy=0.5, accuracy_by_difficulty={"4": 0.5}, steps=1, rows=1,
        stopped="end", seconds=1.0, forms=("loop",), weights=None,
    ),
    SETS, SetDisjointnessData(vocab=64, train=(SETS,), test=(SETS,)),
    disjointness.ByHandConfig(task=SetDisjointness(vocab=64, first=4, second=8)),
    by_hand_conv.BaseConvByHand(shifts=7), by_hand_conv.TwoLayersByHand(shifts=7),
    Result(
        model="a", task="fda", asked="fda", suite="recall", of="fda", reads=1, metric="contains",
        unit="share", lower_is_better=False, value=0.5, low=0.25, high=0.75, others={"acc": 0.5}, count=2,
        truncated=1, version="1", prompt_hash="0", window=512, seconds=1.0,
    ),
]  # fmt: skip
"""Configs with fields that have no default."""
BASES = (Config, MixerConfig, DataConfig, SingleQuery)


def configs() -> Iterator[type[Config]]:
    """Every config of Holdall, the mixers' included."""
    waiting: list[type[Config]] = [Config]
    seen = set()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("holdall.") and kind not in BASES and kind not in seen:
            seen.add(kind)
            yield kind


def example(kind: type[Config]) -> Config:
    return next((each for each in EXAMPLES if type(each) is kind), None) or kind()


def numbers(kind: Any) -> Iterator[Any]:
    """The types of numbers in an annotation, with their ranges if they declare them."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float) or (origin is Annotated and args[0] in (int, float)):
        yield kind
    elif origin is not typing.Literal:
        for arg in args:
            yield from numbers(arg)


FIELDS = [(kind, field.name) for kind in configs() for field in dataclasses.fields(kind)]
NUMBERS = [(kind, name) for kind, name in FIELDS if list(numbers(field_types(kind)[0][name]))]


def test_the_walk_sees_all_configs() -> None:
    kinds = {kind for kind, _ in NUMBERS}
    assert {entry.config for entry in map(mixers.entry, mixers.names())} <= kinds
    assert {TrainConfig, PretrainConfig, ModelConfig, Segment, MQARData, SingleQueryData} <= kinds
    assert len(NUMBERS) > 200


def within(value: Any, bad: float) -> Any:
    """A value, or its last element, replaced."""
    if isinstance(value, dict):
        return {name: bad for name in value}
    if value == ():
        return (bad,)
    return (*value[:-1], within(value[-1], bad)) if isinstance(value, tuple) else bad


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda each: getattr(each, "__name__", each))
def test_a_number_out_of_range_is_refused_by_name(kind: type[Config], name: str) -> None:
    declared = list(numbers(field_types(kind)[0][name]))
    ranges = [arg for each in declared for arg in typing.get_args(each)[1:] if isinstance(arg, Range)]
    assert len(ranges) == len(declared), f"{kind.__name__}.{name} declares no range"
    known = example(kind)
    refused = [math.nan, math.inf, -math.inf, -1, -1.5, -(10**400)]
    zero = [] if all(0 in each for each in ranges) else [0]
    # where the type checker of the tests sees it first, in its words
    says = rf"^{kind.__name__}\.{name} = |typechecking parameter '{name}'"
    for bad in (value for value in (*refused, *zero) if not all(value in each for each in ranges)):
        with pytest.raises((ValueError, TypeError), match=says):
            dataclasses.replace(known, **{name: within(getattr(known, name), bad)})


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "says"),
    [
        ({"above": 0}, [5e-324, 1], [0, -0.0, -1], "positive"),
        ({"least": 0}, [0, -0.0, 7], [-5e-324, -1], "at least 0"),
        ({"least": 2, "zero": "none"}, [0, 2, 3], [1, -2], "at least 2, or 0 for none"),
        ({"least": 0, "below": 1}, [0, 0.9], [1, 1.0, -0.1], "at least 0 and below 1"),
        ({"above": 0, "most": 1}, [0.5, 1], [0, 1.5], "positive and at most 1"),
        ({"least": 1, "most": 16}, [1, 16], [0, 17], "from 1 to 16"),
        ({"most": 3}, [3, -9], [4], "at most 3"),
    ],
)
def test_a_range_affirms_what_it_takes(
    bounds: dict[str, Any], inside: list[float], outside: list[float], says: str
) -> None:
    kind = Annotated[float, Range(**bounds)]
    assert str(Range(**bounds)) == says
    end = "" if {"below", "most"} & set(bounds) else " and finite"
    for value in inside:
        check("x", value, kind)
    for value in (*outside, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^x = .* must be {says}{end}$"):
            check("x", value, kind)


def test_a_range_is_found_inside_tuples_and_unions() -> None:
    kind = tuple[PositiveInt, tuple[PositiveFloat | None, ...]]
    check("x", (1, (0.5, None)), kind)
    for value in ((0, ()), (1, (None, math.nan)), (1, (0.0,))):
        with pytest.raises(ValueError, match=r"^x = .* must be positive"):
            check("x", value, kind)


@pytest.mark.parametrize("kind", [PositiveInt | PositiveFloat, PositiveFloat | None | typing.Literal["x"]])
def test_a_union_takes_what_one_of_its_types_takes(kind: Any) -> None:
    check("x", 0.5, kind)
    for bad in (math.nan, math.inf, 0.0, -1):
        with pytest.raises(ValueError, match=r"^x = .* must be positive and finite$"):
            check("x", bad, kind)


def test_an_integer_is_no_fraction() -> None:
    for bad in (math.nan, 1.5):
        with pytest.raises(ValueError, match=r"^x = .* must be an integer, positive$"):
            check("x", bad, PositiveInt)


def test_a_float_that_declares_no_range_is_finite() -> None:
    check("x", (-1.0, 3), tuple[float, int])
    for bad in (math.nan, -math.inf, 10**400):
        with pytest.raises(ValueError, match=r"^x = .* must be finite$"):
            check("x", (bad, 3), tuple[float, int])


def test_two_configs_differ_by_path() -> None:
    other = dataclasses.replace(MODEL, layers=(mixers.entry("base-conv").configure(width=8, kernel=4),))
    changed = dataclasses.replace(TRAIN, model=other, learning_rates=(1e-3, 2e-3), stop_at=0.5)
    assert differ(TRAIN.to_dict(), TRAIN.to_dict()) == ""
    said = differ(TRAIN.to_dict(), changed.to_dict())
    assert said == (
        "model.layers[0].kernel: 3 there, 4 here; learning_rates: [0.001] there, [0.001, 0.002] here; "
        "stop_at: 0.99 there, 0.5 here"
    )
    assert differ({"a": 1, "b": True}, {"b": 1, "c": 2}) == (
        "a: 1 there, nothing here; b: True there, 1 here; c: nothing there, 2 here"
    )
    assert differ({"a": list(range(9))}, {"a": [9 - i for i in range(9)]}, most=1).endswith("; and 8 more")
