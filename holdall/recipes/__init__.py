"""Recipes: functions that return complete configs. A variant calls another and replaces fields.

A sweep recipe takes the number of seeds and returns its sweeps; `holdall frontier NAME` runs them. A suite
recipe returns a suite of language models; `holdall suite NAME` runs it.
"""

from collections.abc import Callable

from holdall.contract import did_you_mean
from holdall.recipes import based_figure2, lm_suite, quick, synthetics, zoo, zoology_figure2, zoology_small
from holdall.sweeps import SuiteConfig, SweepConfig

SWEEPS: dict[str, Callable[[int], tuple[SweepConfig, ...]]] = {
    "quick": quick.sweeps,
    "zoo": zoo.sweeps,
    "zoology-small": zoology_small.sweeps,
    "synthetics": synthetics.sweeps,
    "zoology-figure2": zoology_figure2.sweeps,
    "based-figure2": based_figure2.sweeps,
}


def sweeps(name: str, seeds: int = 1) -> tuple[SweepConfig, ...]:
    """The sweeps of a recipe by name, with that many seeds for every learning rate.

    Raises KeyError for an unknown name, with the closest known one.
    """
    if name not in SWEEPS:
        raise KeyError(f"unknown recipe '{name}'. {did_you_mean(name, SWEEPS)}")
    return SWEEPS[name](seeds)


SUITES = {"lm-suite": (lm_suite.suite, lm_suite.PUBLISHED)}
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
