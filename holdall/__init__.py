"""Holdall measures and trains language models whose memory does not grow.

    import holdall
    holdall.names()                                      # every registered sequence mixer
    holdall.describe("mamba")                            # paper, state, costs, options
    mixer = holdall.build("mamba", width=64, state=16)   # a torch module
    y_BTD, state = mixer(x_BTD)                          # any T >= 1
    y_BTD, state = mixer(more_BTD, state)                # and on from there

Nothing heavy is imported until one of these is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdall.contract import Entry, Mixer

__version__ = "0.1.0"
__all__ = ["build", "describe", "names"]


def names() -> list[str]:
    """The names of all registered sequence mixers, sorted."""
    from holdall import mixers

    return mixers.names()


def build(name: str, *, width: int, **options: Any) -> "Mixer":
    """Build a registered mixer of model width `width`; `describe(name)` lists its options.

    Raises KeyError for an unknown name, TypeError for an unknown or ill-typed option and
    ValueError for a value that does not fit, each naming the way out.
    """
    from holdall import mixers

    return mixers.entry(name).configure(width=width, **options).build()


def describe(name: str) -> "Entry":
    """What the registry knows of a mixer: paper, state formula, costs, options with defaults."""
    from holdall import mixers

    return mixers.entry(name)
