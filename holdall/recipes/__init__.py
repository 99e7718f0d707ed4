"""Recipes: functions that return complete configs. A variant calls another and replaces fields.

A sweep recipe is a function `sweeps` that takes the number of seeds, and whatever else of SETTINGS it lets
its user change, and returns its sweeps; `holdall frontier NAME` runs them, and `holdall frontier FILE` those
of a file of your own. A suite recipe returns a suite of language models; `holdall suite NAME` runs it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from holdall import mixers
from holdall.contract import did_you_mean
from holdall.recipes import (
    based_figure2,
    bits,
    jrt_figure2,
    jrt_figure2_small,
    lm_suite,
    quick,
    read_twice,
    synthetics,
    zoo,
    zoology_figure2,
    zoology_small,
)
from holdall.sweeps import SuiteConfig, SweepConfig

SWEEPS: dict[str, Callable[..., tuple[SweepConfig, ...]]] = {
    "quick": quick.sweeps,
    "zoo": zoo.sweeps,
    "bits": bits.sweeps,
    "zoology-small": zoology_small.sweeps,
    "synthetics": synthetics.sweeps,
    "zoology-figure2": zoology_figure2.sweeps,
    "based-figure2": based_figure2.sweeps,
    "jrt-figure2-small": jrt_figure2_small.sweeps,
    "jrt-figure2": jrt_figure2.sweeps,
}

SETTINGS = ("task", "pairs", "length", "passes", "vocab", "width", "depth", "mlp", "steps", "rates")
"""What a recipe may let its user change beside the seeds: keyword arguments of its function, and flags of
`holdall frontier`. Pairs, lengths, widths and rates are tuples."""

TEMPLATE = Path(__file__).with_name("template.py.txt")
"""What `holdall recipe new` writes."""


def sweeps(name: str, seeds: int = 1, **settings: Any) -> tuple[SweepConfig, ...]:
    """The sweeps of a recipe, by name or file, with that many seeds for every learning rate.

    Args:
        name: one of SWEEPS, or the path of a Python file that has a function `sweeps`.
        settings: what its function takes beside the seeds.

    Raises:
        KeyError: unknown name, with the closest known one.
        FileNotFoundError, RunError: as `holdall.mixers.run_file`.
        ValueError: the file has no such function, or the recipe no such setting.
    """
    return call(function(name), name, seeds, **settings)


def function(name: str) -> Callable[..., Any]:
    """The function of a recipe, by name or file, which is run; raises as `sweeps`."""
    make = of_file(Path(name)) if is_file(name) else SWEEPS.get(name)
    if make is None:
        raise KeyError(f"unknown recipe '{name}'. {did_you_mean(name, SWEEPS)}; or a Python file of your own")
    return make


def takes(make: Callable[..., Any]) -> list[str]:
    """What of the seeds and SETTINGS a recipe's function lets its user change."""
    arguments = inspect.signature(make).parameters
    return [setting for setting in ("seeds", *SETTINGS) if setting in arguments]


def call(make: Callable[..., Any], name: str, seeds: int = 1, **settings: Any) -> tuple[SweepConfig, ...]:
    """The sweeps that a recipe's function returns; arguments and errors as of `sweeps`."""
    for setting in settings:
        if setting not in takes(make):
            has = ", ".join(f"--{known}" for known in takes(make))
            raise ValueError(f"the recipe {name} has no --{setting}; it has {has or 'no such flags'}")
    if "seeds" in takes(make):
        settings["seeds"] = seeds
    elif seeds != 1:
        raise ValueError(f"the recipe {name} has no --seeds")
    made = make(**settings)
    made = (made,) if isinstance(made, SweepConfig) else tuple(made) if isinstance(made, Iterable) else ()
    if not made or not all(isinstance(sweep, SweepConfig) for sweep in made):
        raise ValueError(f"sweeps() of {name} must return SweepConfigs (holdall.sweeps)")
    return tuple(dataclasses.replace(sweep, takes_seeds="seeds" in takes(make)) for sweep in made)


def is_file(name: str) -> bool:
    """Whether a recipe is named by its file."""
    return name.endswith(".py")


def of_file(file: Path) -> Callable[..., Any]:
    """The function of a recipe file, whose tasks and mixers are registered by then; raises as `sweeps`."""
    make = getattr(mixers.run_file(file), "sweeps", None)
    if not callable(make):
        raise ValueError(
            f"{file} has no function sweeps(seeds); `holdall recipe new` writes one to start from"
        )
    return make


def summary(name: str) -> str:
    """What a recipe trains, in a line: the first of its module's docstring."""
    return (inspect.getdoc(inspect.getmodule(SWEEPS[name])) or "").partition("\n")[0]


SUITES: dict[str, tuple[Callable[[], SuiteConfig], dict[str, tuple[float, float, float]]]] = {
    "lm-suite": (lm_suite.suite, lm_suite.PUBLISHED),
    "read-twice-15m": (functools.partial(read_twice.suite, "15m"), {}),
    "read-twice-40m": (functools.partial(read_twice.suite, "40m"), {}),
}
"""Suites, and published figures to show beside theirs: by family, the perplexity of all tokens, of recall
hits and of the others."""


def suite(name: str) -> tuple[SuiteConfig, dict[str, tuple[float, float, float]]]:
    """A suite by name, and the published figures that belong to it.

    Raises KeyError for an unknown name, with the closest known one.
    """
    if name not in SUITES:
        raise KeyError(f"unknown suite '{name}'. {did_you_mean(name, SUITES)}")
    make, published = SUITES[name]
    return make(), published
